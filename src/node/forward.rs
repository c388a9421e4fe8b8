//! What a follower sends to the leader, and what the leader does with it.
//!
//! Proposals go over one stream. When it breaks while the leader stays, some of what was sent may
//! be in the log and some lost. So a new stream begins with a barrier: an entry that the leader
//! appends only after it has stopped listening to the old stream. Once the barrier is applied here,
//! what was sent before it and has not been seen is lost for good, and is sent again.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::calls::Sent;
use super::{Failure, Node, Room, locked};
use crate::machine::{Command, Entry};
use crate::pb::peer::{Frame, forward_server};
use crate::raft::types::OnRefused;
use crate::raft::{frame, links};
use crate::types::{MemberId, Timestamp};

/// Proposals in one message, messages under way, and proposals that wait to be put into one.
const PROPOSALS_A_MESSAGE: usize = 256;
const MESSAGES_UNDER_WAY: usize = 8;
const PROPOSALS_QUEUED: usize = 1024;
/// A message closes at this size, whatever its number of proposals.
const MESSAGE_BYTES: usize = 1 << 20;

/// The leader gets this long to accept a stream or to say its read index.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);
/// Between two attempts to reach a leader that does not answer.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// How long a leader-to-be keeps proposals of its term before it gives up on leading it.
const PROMOTION_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
struct Proposals {
    /// Entries without a time, to be appended only in this term.
    term: u64,
    payloads: Vec<ByteBuf>,
}

/// From when a linearizable read may be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadPoint {
    /// Everything up to this entry must be applied.
    pub index: u64,
    /// Cluster time, for what remains of leases.
    pub now: Timestamp,
}

/// A stream to the leader of one term.
#[derive(Clone)]
pub struct ProposalStream {
    pub term: u64,
    /// Counts this member's streams, from one.
    pub number: u64,
    proposals: mpsc::Sender<Bytes>,
}

impl ProposalStream {
    /// Whether the stream took the proposal. One that has broken takes nothing.
    pub async fn send(&self, payload: Bytes) -> bool {
        self.proposals.send(payload).await.is_ok()
    }
}

/// Keeps a stream to whoever leads.
pub struct Forwarder {
    stream: watch::Sender<Option<ProposalStream>>,
}

impl Forwarder {
    pub fn new() -> Forwarder {
        Forwarder { stream: watch::Sender::new(None) }
    }

    /// The stream to the leader of `term`, if it stands.
    pub fn stream(&self, term: u64) -> Option<ProposalStream> {
        self.stream.borrow().clone().filter(|stream| stream.term == term)
    }

    pub fn watch(&self) -> watch::Receiver<Option<ProposalStream>> {
        self.stream.subscribe()
    }
}

impl Node {
    /// Opens a stream whenever another member leads, and again when it breaks: runs as long as the
    /// member.
    pub(super) async fn keep_forwarding(self: Arc<Self>) {
        let mut role = self.shared.role.subscribe();
        let mut number = 0;
        loop {
            let now = *role.borrow_and_update();
            let me = self.identity.member_id;
            let Some(leader) = now.leader.filter(|leader| *leader != me) else {
                if role.changed().await.is_err() {
                    return;
                }
                continue;
            };
            number += 1;
            let other_leader = async {
                let mut role = self.shared.role.subscribe();
                let other = |role: &super::Role| role.term != now.term || role.leader != now.leader;
                // The sender lives as long as this node.
                let _ = role.wait_for(other).await;
            };
            tokio::select! {
                broken = self.run_stream(leader, now.term, number) => {
                    tracing::debug!(%leader, reason = %broken, "proposal stream ended");
                    self.forwarder.stream.send_replace(None);
                    self.succession.suspect(Some(&broken));
                    // Another leader is not waited for.
                    tokio::select! {
                        _ = role.changed() => {}
                        () = tokio::time::sleep(RETRY_PAUSE) => {}
                    }
                }
                () = other_leader => {
                    self.forwarder.stream.send_replace(None);
                }
            }
        }
    }

    /// Runs one stream until it breaks, and says why it did.
    async fn run_stream(self: &Arc<Self>, leader: MemberId, term: u64, number: u64) -> Status {
        let Some(peer) = self.links_to(leader) else {
            return Status::unavailable("the leader is not a member");
        };
        let (messages, outgoing) = mpsc::channel(MESSAGES_UNDER_WAY);
        let mut client = peer.forward();
        let open = client.propose(ReceiverStream::new(outgoing));
        let mut standing = match tokio::time::timeout(ANSWER_DEADLINE, open).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return status,
            Err(_) => return Status::unavailable("no answer within the deadline"),
        };
        let (proposals, queue) = mpsc::channel(PROPOSALS_QUEUED);
        let stream = ProposalStream { term, number, proposals };
        if self.shared.calls.any_sent_before(term, number) {
            tokio::spawn(self.clone().barrier(stream.clone()));
        }
        self.forwarder.stream.send_replace(Some(stream));
        tokio::select! {
            broken = pack(term, queue, messages) => broken,
            ended = standing.message() => match ended {
                Err(status) => status,
                Ok(_) => Status::unavailable("the leader closed the stream"),
            },
        }
    }

    /// Finds out what became of what earlier streams of the same term carried.
    async fn barrier(self: Arc<Self>, stream: ProposalStream) {
        let lost = |sent: Sent| {
            sent.term == stream.term && sent.stream != 0 && sent.stream < stream.number
        };
        let stands = |now: ProposalStream| now.number == stream.number;
        while self.forwarder.stream(stream.term).is_some_and(stands) {
            if self.propose_over(&stream, Command::Tick).await.is_ok() {
                self.shared.calls.revive(lost);
                // Wakes the router.
                self.forwarder.stream.send_modify(|_| {});
                return;
            }
            // A refusal may come without any wait, as where too many calls are open: then their own
            // deadlines have to have their turn.
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    async fn propose_over(&self, stream: &ProposalStream, command: Command) -> Result<(), Failure> {
        let sent = Sent { term: stream.term, stream: stream.number };
        let (mut call, payload) = self.open(None, command, Timestamp(0), Some(sent))?;
        if !stream.send(payload).await {
            return Err(Failure::NoLeader);
        }
        self.patiently(call.answer()).await.map(drop)
    }

    /// Asks the leader from when a read may be answered.
    pub(super) async fn ask_read_point(&self, leader: MemberId) -> Result<ReadPoint, Failure> {
        let peer = self.links_to(leader).ok_or(Failure::NoLeader)?;
        let mut client = peer.forward();
        let question = frame::encode(&()).map_err(|_| Failure::NoLeader)?;
        match tokio::time::timeout(ANSWER_DEADLINE, client.read_index(question)).await {
            Ok(Ok(answer)) => frame::decode(answer.get_ref()).map_err(|_| Failure::NoLeader),
            Ok(Err(_)) | Err(_) => Err(Failure::NoLeader),
        }
    }
}

/// Puts the proposals that wait into messages.
async fn pack(
    term: u64,
    mut queue: mpsc::Receiver<Bytes>,
    messages: mpsc::Sender<Frame>,
) -> Status {
    let mut waiting = Vec::new();
    loop {
        if queue.recv_many(&mut waiting, PROPOSALS_A_MESSAGE).await == 0 {
            return Status::unavailable("closed here");
        }
        let mut rest = waiting.drain(..).peekable();
        while rest.peek().is_some() {
            let mut bytes = 0;
            let mut payloads = Vec::new();
            while let Some(payload) =
                rest.next_if(|next| bytes == 0 || bytes + next.len() <= MESSAGE_BYTES)
            {
                bytes += payload.len();
                payloads.push(ByteBuf::from(payload));
            }
            let message = match frame::encode(&Proposals { term, payloads }) {
                Ok(message) => message,
                Err(status) => return status,
            };
            if messages.send(message).await.is_err() {
                return Status::unavailable("the leader closed the stream");
            }
        }
    }
}

/// For each forwarding member, the newest of its streams: an older one may append no more.
#[derive(Default)]
pub struct Streams {
    newest: Mutex<HashMap<MemberId, Arc<tokio::sync::Mutex<u64>>>>,
}

impl Streams {
    fn of(&self, origin: MemberId) -> Arc<tokio::sync::Mutex<u64>> {
        locked(&self.newest).entry(origin).or_default().clone()
    }
}

/// The leader's side.
pub struct ForwardService {
    pub node: Arc<Node>,
}

#[tonic::async_trait]
impl forward_server::Forward for ForwardService {
    type ProposeStream = BoxStream<'static, Result<Frame, Status>>;

    async fn propose(
        &self,
        request: Request<Streaming<Frame>>,
    ) -> Result<Response<Self::ProposeStream>, Status> {
        let newest = self.node.streams.of(links::origin_of(&request));
        let number = {
            // Waits for an append that the previous stream has under way; see the file's header.
            let mut newest = newest.lock().await;
            *newest += 1;
            *newest
        };
        let node = self.node.clone();
        let run = async move {
            let ended = node.append_forwarded(request.into_inner(), newest, number).await;
            Err(ended)
        };
        Ok(Response::new(futures::stream::once(run).boxed()))
    }

    async fn known(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let member: MemberId = frame::decode(request.get_ref())?;
        let known = self.node.machine().published_members().contains_key(&member);
        frame::encode(&known).map(Response::new)
    }

    async fn checkpoints(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        frame::decode::<()>(request.get_ref())?;
        frame::encode(&self.node.tell_checkpoints()).map(Response::new)
    }

    async fn read_index(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        frame::decode::<()>(request.get_ref())?;
        let point = self.node.confirm_leadership().await;
        let point = point.map_err(|failure| Status::unavailable(failure.to_string()))?;
        frame::encode(&point).map(Response::new)
    }

    async fn room(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        frame::decode::<()>(request.get_ref())?;
        frame::encode(&(self.node.disk().room == Room::Enough)).map(Response::new)
    }
}

impl Node {
    /// Appends what another member forwards, until its stream ends; says why it did.
    async fn append_forwarded(
        &self,
        mut messages: Streaming<Frame>,
        newest: Arc<tokio::sync::Mutex<u64>>,
        number: u64,
    ) -> Status {
        let refused = Arc::new(Notify::new());
        let on_refused: OnRefused = {
            let refused = refused.clone();
            Arc::new(move |_, _| refused.notify_one())
        };
        loop {
            let message = tokio::select! {
                message = messages.message() => message,
                // Not offered again from here, where it might come behind a newer stream's
                // barrier: the end of this stream makes the other side find out.
                () = refused.notified() => return Status::unavailable("a proposal was refused"),
            };
            let proposals: Proposals = match message {
                Ok(Some(message)) => match frame::decode(&message) {
                    Ok(proposals) => proposals,
                    Err(status) => return status,
                },
                Ok(None) => return Status::unavailable("closed by the other side"),
                Err(status) => return status,
            };
            if !self.promoted(proposals.term).await {
                if self.role().term > proposals.term {
                    // Dropped: an entry of the later term will tell the other side.
                    continue;
                }
                return Status::unavailable("not leading");
            }
            let newest = newest.lock().await;
            if *newest != number {
                return Status::aborted("replaced by a newer stream");
            }
            for payload in &proposals.payloads {
                if let Err(fault) = Entry::decode(0, payload) {
                    // It would stop every member that applied it.
                    tracing::error!(%fault, "another member forwards what this one cannot read");
                    continue;
                }
                let term = proposals.term;
                match self.append_if_leading(0, term, payload, &on_refused).await {
                    Ok(true) => {}
                    Ok(false) => return Status::unavailable("not leading"),
                    Err(_) => return Status::unavailable("stopping"),
                }
            }
        }
    }

    /// Waits until this member leads `term`; false when it never will.
    pub(super) async fn promoted(&self, term: u64) -> bool {
        let decided =
            |role: &super::Role| role.term > term || (role.term == term && role.leading.is_some());
        if decided(&self.shared.role.get()) {
            return self.shared.role.get().term == term;
        }
        let mut role = self.shared.role.subscribe();
        let wait = async { role.wait_for(decided).await.is_ok_and(|role| role.term == term) };
        tokio::time::timeout(PROMOTION_PATIENCE, wait).await.unwrap_or(false)
    }
}
