//! A Lock or Campaign call on the member that the client asked.
//!
//! The call runs in a task of its own, which outlives the client: only the task knows what the call
//! has made so far, so the task alone can undo it. It finds the leader, asks again when another one
//! takes over, and ends in one of three ways: the client has its answer, the call has failed, or
//! the client is gone and the key with it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::oneshot;

use super::server::{self, Call, Ending, Place, Step};
use crate::machine::{Command, Rejection, Reply};
use crate::node::{Failure, Node};
use crate::raft::frame;
use crate::types::LeaseId;

/// The TTL of a lease that the server makes for a call without one, as etcd's sessions have.
pub const SESSION_TTL_SECONDS: i64 = 60;

/// Between two attempts to reach a leader, unless another one turns up earlier.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Between two attempts to take back what a call has made.
const UNDO_PAUSE: Duration = Duration::from_millis(200);
/// After this long the lease has to do the cleaning up.
const UNDO_PATIENCE: Duration = Duration::from_secs(60);

/// What a client asks for.
#[derive(Debug, Clone)]
pub struct Request {
    pub name: Bytes,
    /// [`LeaseId::NONE`] lets the server make one.
    pub lease: LeaseId,
    pub value: Bytes,
    pub rewrite: bool,
}

/// A key that is first in its queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    pub key: Bytes,
    pub lease: LeaseId,
    /// Of the key; the fencing token.
    pub create_revision: i64,
    /// At which it became the first.
    pub revision: i64,
    /// Set when the server made the lease.
    pub session_ttl_seconds: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnterFailure {
    LeaseNotFound,
    /// The key or its lease went away while the call waited.
    Expired,
    Failed(Failure),
}

/// Joins a queue, waits to be its first, and returns then. When the caller drops this future, what
/// the call has made is undone.
pub async fn enter(node: &Arc<Node>, request: Request) -> Result<Granted, EnterFailure> {
    let (answer, receiver) = oneshot::channel();
    let task = Task { node: node.clone(), base_revision: node.store().revision(), made: None };
    tokio::spawn(task.run(request, answer));
    match receiver.await {
        Ok(result) => result,
        Err(_) => Err(EnterFailure::Failed(Failure::Stopping)),
    }
}

type AnswerSender = oneshot::Sender<Result<Granted, EnterFailure>>;

struct Task {
    node: Arc<Node>,
    /// The store's when the call began: a key created later is this call's, even if the answer that
    /// said so was lost with its leader.
    base_revision: i64,
    /// The key that this call made.
    made: Option<Place>,
}

/// How one attempt with one leader ended.
enum Attempt {
    Granted {
        place: Place,
        revision: i64,
    },
    Failed(EnterFailure),
    /// Ask the leader there is now.
    Again,
    /// The client went away, and what the call made is known.
    Abandoned,
}

impl Task {
    async fn run(mut self, request: Request, mut answer: AnswerSender) {
        let session = request.lease.is_none();
        let lease = if session {
            match self.make_lease().await {
                Ok(lease) => lease,
                Err(failure) => {
                    let _ = answer.send(Err(EnterFailure::Failed(failure)));
                    return;
                }
            }
        } else {
            request.lease
        };
        let call =
            Call { name: request.name, lease, value: request.value, rewrite: request.rewrite };
        let outcome = if session {
            let node = self.node.clone();
            tokio::select! {
                outcome = self.attempts(&call, &mut answer) => outcome,
                never = keep_alive(&node, lease) => never,
            }
        } else {
            self.attempts(&call, &mut answer).await
        };
        let abandoned = match outcome {
            Some(Ok((place, revision))) => {
                if session && revision != place.create_revision {
                    // It waited: its time begins now. A failure leaves what the last renewal gave.
                    let _ = self.node.lease_renew(lease).await;
                }
                let granted = Granted {
                    key: place.key.clone(),
                    lease,
                    create_revision: place.create_revision,
                    revision,
                    session_ttl_seconds: session.then_some(SESSION_TTL_SECONDS),
                };
                answer.send(Ok(granted)).is_err()
            }
            Some(Err(failure)) => {
                let _ = answer.send(Err(failure));
                // What a failed call has made is of no use to anybody.
                true
            }
            None => true,
        };
        if abandoned {
            self.undo(session.then_some(lease)).await;
        }
    }

    /// Attempt after attempt, until one is conclusive; `None` when the client went away.
    async fn attempts(
        &mut self,
        call: &Call,
        answer: &mut AnswerSender,
    ) -> Option<Result<(Place, i64), EnterFailure>> {
        let mut unknown = false;
        loop {
            let mut roles = self.node.watch_role();
            roles.mark_unchanged();
            match self.attempt(call, answer, &mut unknown).await {
                Attempt::Granted { place, revision } => return Some(Ok((place, revision))),
                Attempt::Failed(failure) => return Some(Err(failure)),
                Attempt::Abandoned => return None,
                Attempt::Again => {}
            }
            if *self.node.stopping().borrow() {
                return Some(Err(EnterFailure::Failed(Failure::Stopping)));
            }
            // With an attempt of unknown outcome behind it the call goes on even without its
            // client, until it is known what there is to undo.
            let gone = answer.is_closed();
            if gone && !unknown {
                return None;
            }
            tokio::select! {
                _ = roles.changed() => {}
                () = tokio::time::sleep(RETRY_PAUSE) => {}
                () = answer.closed(), if !gone => {}
            }
        }
    }

    async fn attempt(
        &mut self,
        call: &Call,
        answer: &mut AnswerSender,
        unknown: &mut bool,
    ) -> Attempt {
        let Some(mut steps) = self.ask_leader(call).await else { return Attempt::Again };
        let mut place: Option<Place> = None;
        loop {
            // Until it is known what was made, the client's going away changes nothing.
            let step = if place.is_some() {
                tokio::select! {
                    biased;
                    step = steps.next() => step,
                    () = answer.closed() => return Attempt::Abandoned,
                }
            } else {
                steps.next().await
            };
            match step {
                Some(Step::Queued(queued)) => {
                    if queued.created || (*unknown && queued.create_revision > self.base_revision) {
                        self.made = Some(queued.clone());
                    }
                    *unknown = false;
                    place = Some(queued);
                }
                Some(Step::Granted { revision, index }) => {
                    let Some(place) = place else { return Attempt::Again };
                    // The client reads its own writes where it made them.
                    return match self.node.applied_up_to_entry(index).await {
                        Ok(()) => Attempt::Granted { place, revision },
                        Err(failure) => Attempt::Failed(EnterFailure::Failed(failure)),
                    };
                }
                Some(Step::Ended(Ending::LeaseNotFound)) => {
                    *unknown = false;
                    return Attempt::Failed(EnterFailure::LeaseNotFound);
                }
                Some(Step::Ended(Ending::Expired)) => {
                    return Attempt::Failed(EnterFailure::Expired);
                }
                Some(Step::Ended(Ending::TooManyRequests)) => {
                    return Attempt::Failed(EnterFailure::Failed(Failure::TooManyRequests));
                }
                Some(Step::Ended(Ending::Moved)) => return Attempt::Again,
                Some(Step::Ended(Ending::Unknown)) | None => {
                    *unknown |= place.is_none();
                    return Attempt::Again;
                }
            }
        }
    }

    async fn ask_leader(&self, call: &Call) -> Option<BoxStream<'static, Step>> {
        let role = self.node.role();
        let leader = role.leader?;
        if leader == self.node.identity().member_id {
            // Elected, perhaps, but not yet in a position to lead.
            role.leading?;
            return Some(server::enter(self.node.clone(), call.clone()));
        }
        let mut client = self.node.links_to(leader)?.queue();
        let question = frame::encode(call).ok()?;
        let answers = client.enter(question).await.ok()?.into_inner();
        // A damaged or broken answer ends the attempt.
        let steps = futures::stream::unfold(answers, |mut answers| async move {
            let frame = answers.message().await.ok()??;
            Some((frame::decode::<Step>(&frame).ok()?, answers))
        });
        Some(steps.boxed())
    }

    async fn make_lease(&self) -> Result<LeaseId, Failure> {
        loop {
            let id = self.node.new_lease_id();
            let grant = Command::LeaseGrant { id, ttl_seconds: SESSION_TTL_SECONDS };
            match self.node.propose(grant).await {
                Ok(_) => return Ok(id),
                Err(Failure::Rejected(Rejection::LeaseExists(_))) => {}
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Takes back what the call has made: the lease if the server made it, else the key.
    async fn undo(self, session: Option<LeaseId>) {
        let command = match (session, self.made) {
            (Some(id), _) => Command::LeaseRevoke { id },
            (None, Some(place)) => {
                Command::Leave { key: place.key, create_revision: place.create_revision }
            }
            (None, None) => return,
        };
        let attempts = async {
            loop {
                match self.node.propose(command.clone()).await {
                    Ok(_) | Err(Failure::Rejected(_) | Failure::Stopping) => return,
                    Err(failure) => tracing::debug!(%failure, "queue key not yet removed"),
                }
                tokio::time::sleep(UNDO_PAUSE).await;
            }
        };
        if tokio::time::timeout(UNDO_PATIENCE, attempts).await.is_err() {
            tracing::warn!("a queue key is left to its lease: it could not be removed");
        }
    }
}

/// Renews the lease of a waiting call: its time shall begin with the grant.
async fn keep_alive<T>(node: &Node, lease: LeaseId) -> T {
    loop {
        tokio::time::sleep(Duration::from_secs(SESSION_TTL_SECONDS as u64 / 3)).await;
        if let Err(failure) = node.lease_renew(lease).await {
            tracing::debug!(%failure, "lease of a waiting call not renewed");
        }
    }
}

/// Gives up a lock.
///
/// Returns whether a key was deleted: only one of the form `NAME/HEX` that is attached to the lease
/// HEX is.
pub async fn unlock(node: &Node, key: Bytes) -> Result<bool, Failure> {
    match node.propose(Command::Unlock { key }).await?.reply {
        Reply::Left(left) => Ok(left),
        other => unreachable!("an unlock was answered with {other:?}"),
    }
}
