//! What the other members' openraft asks of ours.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use openraft::raft::AppendEntriesRequest;
use tonic::{Request, Response, Status, Streaming};

use super::applier::Applier;
use super::frame;
use super::snapshot;
use super::succession::Succession;
use super::types::Raft;
use crate::clock::Clock;
use crate::pb::peer::Frame;
use crate::pb::peer::raft_server;
use crate::storage::Home;

pub type RaftHandle = openraft::Raft<Raft, Applier>;

pub struct PeerService {
    pub raft: RaftHandle,
    pub home: Arc<Home>,
    pub contact: Arc<LeaderContact>,
    pub succession: Arc<Succession>,
    /// Held while a snapshot is received and installed: one at a time.
    pub receiving: tokio::sync::Mutex<()>,
    /// False while the disk is full: then entries are neither stored nor confirmed.
    pub takes_entries: TakesEntries,
}

pub type TakesEntries = Arc<dyn Fn() -> bool + Send + Sync>;

/// When a leader was last heard of. openraft keeps naming the last leader to a member that nobody
/// talks to any more.
pub struct LeaderContact {
    clock: Arc<dyn Clock>,
    /// On the monotonic clock; zero for never.
    heard_ms: AtomicU64,
    messages: AtomicU64,
}

impl LeaderContact {
    pub fn new(clock: Arc<dyn Clock>) -> LeaderContact {
        LeaderContact { clock, heard_ms: AtomicU64::new(0), messages: AtomicU64::new(0) }
    }

    fn hear(&self) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.heard_ms.store(self.now_ms().max(1), Ordering::Relaxed);
    }

    /// Whether a leader was heard of in the last `patience`.
    pub fn within(&self, patience: Duration) -> bool {
        let heard_ms = self.heard_ms.load(Ordering::Relaxed);
        let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        heard_ms != 0 && self.now_ms().saturating_sub(heard_ms) <= patience_ms
    }

    /// How many messages from a leader have come so far.
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.clock.monotonic().as_millis()).unwrap_or(u64::MAX)
    }
}

fn unavailable(error: impl std::fmt::Display) -> Status {
    Status::unavailable(error.to_string())
}

const DISK_FULL: &str = "the disk of this member is full";

/// Which of the requests under way want no answer but a refusal, oldest first. openraft takes a
/// bounded number of requests before it has answered the first.
type Quiet = Arc<Mutex<VecDeque<bool>>>;

async fn next_append(
    frames: &mut Streaming<Frame>,
    quiet: &Quiet,
    takes_entries: &TakesEntries,
) -> Result<Option<AppendEntriesRequest<Raft>>, Status> {
    let Some(frame) = frames.message().await? else { return Ok(None) };
    let request: AppendEntriesRequest<Raft> = frame::decode(&frame)?;
    if !request.entries.is_empty() && !takes_entries() {
        return Err(Status::resource_exhausted(DISK_FULL));
    }
    quiet.lock().unwrap_or_else(PoisonError::into_inner).push_back(frame.quiet);
    Ok(Some(request))
}

#[tonic::async_trait]
impl raft_server::Raft for PeerService {
    type AppendStream = BoxStream<'static, Result<Frame, Status>>;

    async fn append(
        &self,
        request: Request<Streaming<Frame>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        // openraft's input has no room for an error. A damaged request, or one that the disk has no
        // room for, ends the stream, and the leader opens another.
        let (contact, succession) = (self.contact.clone(), self.succession.clone());
        let quiet = Quiet::default();
        let under_way = quiet.clone();
        let takes_entries = self.takes_entries.clone();
        let requests = futures::stream::unfold(request.into_inner(), move |mut frames| {
            let (contact, under_way) = (contact.clone(), under_way.clone());
            let (takes_entries, succession) = (takes_entries.clone(), succession.clone());
            async move {
                match next_append(&mut frames, &under_way, &takes_entries).await {
                    Ok(Some(request)) => {
                        contact.hear();
                        Some((request, frames))
                    }
                    Ok(None) => {
                        succession.suspect(None);
                        None
                    }
                    Err(status) => {
                        tracing::debug!(%status, "append stream ended");
                        succession.suspect(Some(&status));
                        None
                    }
                }
            }
        });
        let answers = self.raft.stream_append(requests).filter_map(move |answer| {
            let quiet = quiet.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            std::future::ready(match answer {
                Ok(Ok(_)) if quiet == Some(true) => None,
                Ok(answer) => Some(frame::encode(&answer)),
                Err(fatal) => Some(Err(unavailable(fatal))),
            })
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn vote(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let answer = self.raft.vote(frame::decode(request.get_ref())?).await;
        frame::encode(&answer.map_err(unavailable)?).map(Response::new)
    }

    async fn pre_vote(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let answer = self.succession.on_pre_vote(frame::decode(request.get_ref())?).await?;
        frame::encode(&answer).map(Response::new)
    }

    async fn leads(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let leads = self.succession.leads(frame::decode(request.get_ref())?).await?;
        frame::encode(&leads).map(Response::new)
    }

    async fn transfer_leader(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let request = frame::decode(request.get_ref())?;
        let answer = self.raft.handle_transfer_leader(request).await;
        frame::encode(&answer.map_err(unavailable)?).map(Response::new)
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<Frame>>,
    ) -> Result<Response<Frame>, Status> {
        let _alone = self
            .receiving
            .try_lock()
            .map_err(|_| Status::unavailable("a snapshot is being received"))?;
        let has_room = self.takes_entries.clone();
        let received = snapshot::receive(request.into_inner(), self.home.clone(), &*has_room);
        let (vote, snapshot) = received.await?;
        let answer = self.raft.install_full_snapshot(vote, snapshot).await;
        frame::encode(&answer.map_err(unavailable)?).map(Response::new)
    }
}
