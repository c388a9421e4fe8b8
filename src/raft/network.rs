//! How openraft reaches the other members.
//!
//! Appends and heartbeats travel on streams that stay open, one for each: openraft opens a session
//! for each heartbeat, and a call of its own for each would cost more than all it says.
//!
//! A commit that openraft sends alone, without entries, waits until this member has nothing else to
//! do: the answer to the client goes first, and often the next entries come and take the commit
//! along. It is not answered either, as nothing is learned from that.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use openraft::error::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::frame;
use super::links::{Links, Peer};
use super::snapshot::{self, SnapshotData};
use super::traffic::PeerTraffic;
use super::types::{PeerNode, Raft, SnapshotOf, Vote};
use crate::pb::peer::Frame;
use crate::types::MemberId;

/// Append requests under way to one peer before the next waits.
const APPENDS_IN_FLIGHT: usize = 64;

/// The shortest time a peer gets to answer an append. openraft asks for one heartbeat interval,
/// which a disk under load does not keep.
const APPEND_DEADLINE: Duration = Duration::from_secs(1);

/// One chunk of a snapshot must be taken within this time.
const SNAPSHOT_CHUNK_DEADLINE: Duration = Duration::from_secs(10);
/// The peer has this long to build its state from a snapshot that has arrived whole.
const SNAPSHOT_INSTALL_DEADLINE: Duration = Duration::from_secs(600);

pub struct NetworkFactory {
    pub links: Arc<Links>,
}

impl RaftNetworkFactory<Raft> for NetworkFactory {
    type Network = Network;

    async fn new_client(&mut self, target: u64, node: &PeerNode) -> Network {
        let traffic = self.links.traffic().with(MemberId(target));
        Network { links: self.links.clone(), target, node: node.clone(), traffic, appends: None }
    }
}

/// One of openraft's ways to one peer: replication, heartbeat, vote and snapshot have one each.
pub struct Network {
    links: Arc<Links>,
    target: u64,
    node: PeerNode,
    traffic: Arc<PeerTraffic>,
    /// The stream that the last session left in order.
    appends: Option<AppendLink>,
}

struct AppendLink {
    requests: mpsc::Sender<Frame>,
    responses: Streaming<Frame>,
    /// Fires when the peer is removed or moves to other URLs.
    closed: CancellationToken,
}

impl AppendLink {
    fn is_of_use(&self) -> bool {
        !self.requests.is_closed() && !self.closed.is_cancelled()
    }
}

impl Network {
    fn peer(&self) -> Result<Peer, RPCError<Raft>> {
        self.links.peer(self.target, &self.node).map_err(rpc_error)
    }

    async fn open_appends(&self, deadline: Duration) -> Result<AppendLink, RPCError<Raft>> {
        let (requests, outgoing) = mpsc::channel(APPENDS_IN_FLIGHT);
        let peer = self.peer()?;
        let mut client = peer.raft();
        let call = client.append(ReceiverStream::new(outgoing));
        let responses = within(deadline, call).await?.into_inner();
        Ok(AppendLink { requests, responses, closed: peer.closed().clone() })
    }
}

/// A failure to reach the peer makes openraft wait before it tries again; any other does not.
fn rpc_error(status: Status) -> RPCError<Raft> {
    match status.code() {
        Code::Unavailable
        | Code::FailedPrecondition
        | Code::PermissionDenied
        | Code::Unimplemented => RPCError::Unreachable(Unreachable::new(&status)),
        _ => RPCError::Network(NetworkError::new(&status)),
    }
}

async fn within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, RPCError<Raft>> {
    match tokio::time::timeout(deadline, call).await {
        Ok(result) => result.map_err(rpc_error),
        Err(_) => Err(rpc_error(Status::unavailable("no answer within the deadline"))),
    }
}

async fn ask<Q, A>(
    deadline: Duration,
    question: &Q,
    call: impl AsyncFnOnce(Frame) -> Result<tonic::Response<Frame>, Status>,
) -> Result<A, RPCError<Raft>>
where
    Q: serde::Serialize,
    A: serde::de::DeserializeOwned,
{
    let request = frame::encode(question).map_err(rpc_error)?;
    let answer = within(deadline, call(request)).await?;
    frame::decode(answer.get_ref()).map_err(rpc_error)
}

type Responses<'s> = BoxStream<'s, Result<StreamAppendResult<Raft>, RPCError<Raft>>>;

/// One session on an append stream: requests from openraft go out, answers come back in order.
struct Session<'s, S> {
    network: &'s mut Network,
    /// Taken while the session runs, and put back only if it ends with nothing under way.
    link: AppendLink,
    input: Option<S>,
    /// Requests that will be answered.
    under_way: usize,
    /// Whether a request of this session was sent: the first one asks where the peer stands.
    begun: bool,
    /// Whether commits were sent since the last other request: should the peer refuse one, the
    /// answer is still to come.
    quiet: bool,
    /// When a heartbeat was sent that nothing was under way before: its answer tells the time to
    /// the peer and back, with no disk on the way.
    heartbeat_at: Option<Duration>,
    deadline: Duration,
}

enum Step {
    Request(Option<AppendEntriesRequest<Raft>>),
    Response(Result<Option<Frame>, Status>),
    /// The peer is removed, or elsewhere.
    Closed,
    Late,
}

impl<'s, S> Session<'s, S>
where
    S: Stream<Item = AppendEntriesRequest<Raft>> + Send + Unpin + 'static,
{
    /// The next answer, or `None` when the input has ended and everything is answered.
    async fn next(&mut self) -> Result<Option<StreamAppendResult<Raft>>, RPCError<Raft>> {
        loop {
            if self.input.is_none() && self.under_way == 0 {
                return Ok(None);
            }
            match self.step().await {
                Step::Request(None) => self.input = None,
                Step::Request(Some(request)) => {
                    let request = self.after_all_else(request).await;
                    self.send(request).await?;
                }
                Step::Response(Ok(Some(frame))) => {
                    self.under_way = self.under_way.saturating_sub(1);
                    if let Some(sent) = self.heartbeat_at.take() {
                        let took = self.network.links.now().saturating_sub(sent);
                        self.network.traffic.round_trip.observe(took);
                    }
                    return frame::decode(&frame).map(Some).map_err(rpc_error);
                }
                Step::Response(Ok(None)) => {
                    return Err(rpc_error(Status::unavailable("the peer closed the stream")));
                }
                Step::Response(Err(status)) => return Err(rpc_error(status)),
                Step::Closed => {
                    return Err(rpc_error(Status::unavailable(
                        "the peer was removed or has moved",
                    )));
                }
                Step::Late => {
                    return Err(rpc_error(Status::unavailable("no answer within the deadline")));
                }
            }
        }
    }

    /// `request` itself if it says more than what is committed; otherwise the next one, if there is
    /// one by the time all tasks that could run have run.
    async fn after_all_else(
        &mut self,
        mut request: AppendEntriesRequest<Raft>,
    ) -> AppendEntriesRequest<Raft> {
        while self.begun && request.entries.is_empty() {
            let Some(input) = &mut self.input else { break };
            let next = tokio::select! {
                biased;
                next = input.next() => next,
                () = tokio::task::yield_now() => break,
            };
            match next {
                // It carries a commit at least as new.
                Some(next) => request = next,
                None => self.input = None,
            }
        }
        request
    }

    async fn send(&mut self, request: AppendEntriesRequest<Raft>) -> Result<(), RPCError<Raft>> {
        self.quiet = self.begun && request.entries.is_empty();
        self.begun = true;
        if !self.quiet && self.under_way == 0 && request.entries.is_empty() {
            self.heartbeat_at = Some(self.network.links.now());
        }
        let frame = frame::encode(&request).map_err(rpc_error)?;
        let frame = Frame { quiet: self.quiet, ..frame };
        // The peer has closed its side: the reason follows among the responses.
        if self.link.requests.send(frame).await.is_err() {
            self.input = None;
            self.under_way += 1;
        } else if !self.quiet {
            self.under_way += 1;
        }
        Ok(())
    }

    async fn step(&mut self) -> Step {
        let room = self.under_way < APPENDS_IN_FLIGHT;
        let input = &mut self.input;
        let next_request = async {
            match input {
                Some(input) if room => input.next().await,
                _ => std::future::pending().await,
            }
        };
        let late = async {
            if self.under_way > 0 {
                tokio::time::sleep(self.deadline).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            response = self.link.responses.message() => Step::Response(response),
            request = next_request => Step::Request(request),
            () = self.link.closed.cancelled() => Step::Closed,
            () = late => Step::Late,
        }
    }
}

impl RaftNetworkV2<Raft> for Network {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Raft>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Raft>, RPCError<Raft>> {
        let once = Box::pin(futures::stream::once(async { request }));
        let mut responses = self.stream_append(once, option).await?;
        match responses.next().await {
            Some(result) => result.map(AppendEntriesResponse::from),
            None => Err(rpc_error(Status::unavailable("the peer closed the stream"))),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        option: RPCOption,
    ) -> openraft::base::BoxFuture<'s, Result<Responses<'s>, RPCError<Raft>>>
    where
        S: Stream<Item = AppendEntriesRequest<Raft>> + openraft::OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            let deadline = option.hard_ttl().max(APPEND_DEADLINE);
            // Inside the input openraft waits out its pause after a failure. So that goes first: a
            // member that is gone is not called without end.
            let Some(first) = input.next().await else {
                return Ok(futures::stream::empty().boxed());
            };
            let input = futures::stream::iter([first]).chain(input);
            let link = match self.appends.take() {
                Some(link) if link.is_of_use() => link,
                _ => self.open_appends(deadline).await?,
            };
            let session = Session {
                network: self,
                link,
                input: Some(input),
                under_way: 0,
                begun: false,
                quiet: false,
                heartbeat_at: None,
                deadline,
            };
            let responses = futures::stream::unfold(Some(session), |session| async move {
                let mut session = session?;
                match session.next().await {
                    Ok(None) => {
                        if !session.quiet {
                            session.network.appends = Some(session.link);
                        }
                        None
                    }
                    // After a refusal the peer ends its side of the stream.
                    Ok(Some(refusal @ Err(_))) => Some((Ok(refusal), None)),
                    Ok(Some(answer)) => Some((Ok(answer), Some(session))),
                    Err(error) => Some((Err(error), None)),
                }
            });
            Ok(responses.boxed())
        })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Raft>,
        option: RPCOption,
    ) -> Result<VoteResponse<Raft>, RPCError<Raft>> {
        let mut client = self.peer()?.raft();
        ask(option.hard_ttl(), &request, async |frame| client.vote(frame).await).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<Raft>,
        option: RPCOption,
    ) -> Result<VoteResponse<Raft>, RPCError<Raft>> {
        let mut client = self.peer()?.raft();
        ask(option.hard_ttl(), &request, async |frame| client.pre_vote(frame).await).await
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Raft>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Raft>, RPCError<Raft>> {
        let mut client = self.peer()?.raft();
        ask(option.hard_ttl(), &request, async |frame| client.transfer_leader(frame).await).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf,
        cancel: impl Future<Output = ReplicationClosed> + openraft::OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Raft>, StreamingError<Raft>> {
        let mut client = self.peer().map_err(StreamingError::from)?.raft_bulk();
        // Until the peer has answered.
        let held = match &snapshot.snapshot {
            SnapshotData::Image(_, outgoing) => Some(outgoing.clone()),
            SnapshotData::Durable | SnapshotData::Staged(_) => None,
        };
        let (chunks, outgoing) = mpsc::channel(2);
        let sending = snapshot::send(vote, snapshot, chunks, SNAPSHOT_CHUNK_DEADLINE);
        let call = async {
            let call = client.snapshot(ReceiverStream::new(outgoing));
            let (sent, answer) = tokio::join!(sending, within(SNAPSHOT_INSTALL_DEADLINE, call));
            // The peer's own answer says more than that it stopped listening.
            let answer = answer?;
            sent.map_err(rpc_error)?;
            let answer = frame::decode::<SnapshotResponse<Raft>>(answer.get_ref());
            let answer = answer.map_err(rpc_error)?;
            if let Some(held) = held {
                held.delivered();
            }
            Ok::<_, RPCError<Raft>>(answer)
        };
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            result = call => result.map_err(StreamingError::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures::FutureExt;
    use openraft::EntryPayload;
    use openraft::alias::CommittedLeaderIdOf;
    use tonic::{Request, Response};

    use super::*;
    use crate::clock::ManualClock;
    use crate::pb::peer::raft_server::{self, RaftServer};
    use crate::raft::types::{LogEntry, LogId};
    use crate::types::{ClusterId, MemberId};

    fn log_id(index: u64) -> LogId {
        LogId { leader_id: CommittedLeaderIdOf::<Raft>::new(1), index }
    }

    fn request(prev: u64, entries: &[u64]) -> AppendEntriesRequest<Raft> {
        let entry = |index: &u64| LogEntry { log_id: log_id(*index), payload: EntryPayload::Blank };
        AppendEntriesRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: Some(log_id(prev)),
            entries: entries.iter().map(entry).collect(),
            leader_commit: Some(log_id(prev)),
        }
    }

    /// A follower that takes everything, and keeps whether it was to answer.
    #[derive(Clone, Default)]
    struct Follower {
        quiet: Arc<Mutex<Vec<bool>>>,
        streams: Arc<Mutex<usize>>,
    }

    #[tonic::async_trait]
    impl raft_server::Raft for Follower {
        type AppendStream = BoxStream<'static, Result<Frame, Status>>;

        async fn append(
            &self,
            request: Request<Streaming<Frame>>,
        ) -> Result<Response<Self::AppendStream>, Status> {
            *self.streams.lock().unwrap() += 1;
            let seen = self.quiet.clone();
            let answers = request.into_inner().filter_map(move |frame| {
                let frame = frame.unwrap();
                seen.lock().unwrap().push(frame.quiet);
                let asked: AppendEntriesRequest<Raft> = frame::decode(&frame).unwrap();
                let last = asked.entries.last().map(|entry| entry.log_id).or(asked.prev_log_id);
                let answer: StreamAppendResult<Raft> = Ok(last);
                std::future::ready((!frame.quiet).then(|| frame::encode(&answer)))
            });
            Ok(Response::new(answers.boxed()))
        }

        async fn vote(&self, _: Request<Frame>) -> Result<Response<Frame>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn pre_vote(&self, _: Request<Frame>) -> Result<Response<Frame>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn leads(&self, _: Request<Frame>) -> Result<Response<Frame>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn transfer_leader(&self, _: Request<Frame>) -> Result<Response<Frame>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn snapshot(&self, _: Request<Streaming<Frame>>) -> Result<Response<Frame>, Status> {
            Err(Status::unimplemented(""))
        }
    }

    async fn network(follower: &Follower) -> Network {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let server = tonic::transport::Server::builder()
            .add_service(RaftServer::new(follower.clone()))
            .serve_with_incoming(incoming);
        tokio::spawn(server);
        let links =
            Arc::new(Links::new(ClusterId(1), MemberId(1), Arc::new(ManualClock::default())));
        let node = PeerNode { name: "peer".to_owned(), peer_urls: vec![url] };
        NetworkFactory { links }.new_client(2, &node).await
    }

    /// One session with these requests; its answers.
    async fn session(
        network: &mut Network,
        requests: Vec<AppendEntriesRequest<Raft>>,
    ) -> Vec<Option<LogId>> {
        let option = RPCOption::new(Duration::from_secs(5));
        let responses = network.stream_append(futures::stream::iter(requests), option).await;
        let answers = responses.unwrap().map(|answer| answer.unwrap().unwrap());
        answers.collect().await
    }

    #[tokio::test]
    async fn a_commit_alone_goes_with_the_entries_behind_it_or_unanswered() {
        let follower = Follower::default();
        let mut network = network(&follower).await;
        let requests = vec![request(1, &[]), request(1, &[2]), request(2, &[]), request(2, &[3])];
        let answers = session(&mut network, requests).await;
        // The first of a session asks where the peer stands.
        assert_eq!(answers, [1, 2, 3].map(|index| Some(log_id(index))));
        assert_eq!(*follower.quiet.lock().unwrap(), [false, false, false]);

        let answers = session(&mut network, vec![request(3, &[4]), request(4, &[])]).await;
        assert_eq!(answers, [Some(log_id(4))]);
        assert_eq!(*follower.streams.lock().unwrap(), 1, "sessions share a stream");
        // A refusal of the last one could still come: the next session has a stream of its own.
        let answers = session(&mut network, vec![request(4, &[5])]).await;
        assert_eq!(answers, [Some(log_id(5))]);
        assert_eq!(*follower.streams.lock().unwrap(), 2);
    }

    #[tokio::test]
    async fn nobody_is_called_before_there_is_a_request() {
        let follower = Follower::default();
        let mut network = network(&follower).await;
        let option = RPCOption::new(Duration::from_secs(5));
        let pause = futures::stream::pending::<AppendEntriesRequest<Raft>>();
        assert!(network.stream_append(pause, option).now_or_never().is_none());
        assert_eq!(*follower.streams.lock().unwrap(), 0);
        assert_eq!(session(&mut network, Vec::new()).await, []);
        assert_eq!(*follower.streams.lock().unwrap(), 0);
    }
}
