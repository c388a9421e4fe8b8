//! A Lock or Campaign call on the leader.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::machine::{Command, Enqueue, Rejection, Reply};
use crate::node::{Failure, Node, WaitingFor, told};
use crate::types::LeaseId;

/// A call as it travels from the member asked to the leader. Sent again to another leader it is
/// the same call: the key it made keeps its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    pub name: Bytes,
    pub lease: LeaseId,
    pub value: Bytes,
    /// Whether a key that is there already takes `value`: a campaign's does, a lock's does not.
    pub rewrite: bool,
}

impl Call {
    /// The call's key in the queue.
    pub fn key(&self) -> Bytes {
        let hex = self.lease.to_hex();
        let mut key = Vec::with_capacity(self.name.len() + 1 + hex.len());
        key.extend_from_slice(&self.name);
        key.push(b'/');
        key.extend_from_slice(hex.as_bytes());
        key.into()
    }
}

/// What the caller is told, in this order: at most one `Queued`, then one of the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    Queued(Place),
    Granted {
        /// The revision at which the key became the first.
        revision: i64,
        /// The entry up to which this is known.
        index: u64,
    },
    Ended(Ending),
}

/// A key's place in its queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub key: Bytes,
    pub create_revision: i64,
    /// Whether this call made the key.
    pub created: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    LeaseNotFound,
    /// The key or its lease went away while the call waited.
    Expired,
    /// This member does not lead, or no longer: ask the one that does.
    Moved,
    /// There is no saying whether the key was made: ask again.
    Unknown,
    TooManyRequests,
}

/// Runs `call` here. Nothing is undone when the stream is dropped: that is for the member that the
/// client asked, which alone knows whether the client is still there.
pub fn enter(node: Arc<Node>, call: Call) -> BoxStream<'static, Step> {
    let (steps, receiver) = mpsc::channel(2);
    let run = async move {
        let ending = run(&node, &call, &steps).await;
        if let Some(last) = ending {
            // The other side may have gone.
            let _ = steps.send(last).await;
        }
        None::<Step>
    };
    // The call runs as the stream is polled, and ends when it is dropped.
    let running = futures::StreamExt::filter_map(futures::stream::once(run), |step| async { step });
    Box::pin(ReceiverStream::new(receiver).merge(running))
}

async fn run(node: &Node, call: &Call, steps: &mpsc::Sender<Step>) -> Option<Step> {
    let ended = |ending| Some(Step::Ended(ending));
    let role = node.role();
    if role.leading.is_none() {
        return ended(Ending::Moved);
    }
    let mut waiter = node.waiters().listen(call.key());
    let enqueue = Command::Enqueue(Enqueue {
        name: call.name.clone(),
        lease: call.lease,
        value: call.value.clone(),
        rewrite: call.rewrite,
    });
    let enqueued = match node.propose(enqueue).await {
        Ok(applied) => match applied.reply {
            Reply::Enqueued(enqueued) => enqueued,
            other => unreachable!("an enqueue was answered with {other:?}"),
        },
        Err(Failure::Rejected(Rejection::LeaseNotFound(_))) => {
            return ended(Ending::LeaseNotFound);
        }
        Err(Failure::Rejected(rejection)) => unreachable!("an enqueue was refused: {rejection}"),
        Err(Failure::NoLeader | Failure::Stopping) => return ended(Ending::Moved),
        Err(Failure::TimedOut | Failure::Unknown) => return ended(Ending::Unknown),
        Err(Failure::TooManyRequests) => return ended(Ending::TooManyRequests),
    };
    let place = Place {
        key: enqueued.key,
        create_revision: enqueued.create_revision,
        created: enqueued.created,
    };
    let mine = place.create_revision;
    if steps.send(Step::Queued(place)).await.is_err() {
        return None;
    }
    if enqueued.first {
        return Some(Step::Granted { revision: mine, index: node.applied_index() });
    }
    let mut roles = node.watch_role();
    let mut stopping = node.stopping();
    loop {
        match *waiter.news.borrow_and_update() {
            WaitingFor::First { create_revision, revision, lease_alive }
                if create_revision == mine =>
            {
                return if lease_alive {
                    Some(Step::Granted { revision, index: node.applied_index() })
                } else {
                    ended(Ending::Expired)
                };
            }
            WaitingFor::Left { create_revision } if create_revision == mine => {
                return ended(Ending::Expired);
            }
            // News of an earlier key of the same name.
            _ => {}
        }
        tokio::select! {
            biased;
            changed = waiter.news.changed() => if changed.is_err() { return ended(Ending::Moved) },
            _ = roles.wait_for(|now| now.term != role.term || now.leading.is_none()) => {
                return ended(Ending::Moved);
            }
            () = told(&mut stopping) => return ended(Ending::Moved),
            () = steps.closed() => return None,
        }
    }
}
