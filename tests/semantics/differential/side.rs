//! One of the two clusters: asks a member, and gives the answer in comparable form.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Response, Status, Streaming};

use holdfast::pb::etcdserverpb as pb;
use holdfast::pb::etcdserverpb::kv_client::KvClient;
use holdfast::pb::etcdserverpb::lease_client::LeaseClient;
use holdfast::pb::etcdserverpb::request_op;

use super::answer::{Answer, comparable};
use super::operation::Request;
use crate::cluster::{Cluster, Program};

/// How long a call may take. None is meant to wait.
pub const CALL_LIMIT: Duration = Duration::from_secs(20);

/// The largest answer: everything, at one revision.
const ANSWER_BYTES: usize = 64 << 20;

/// Requests under way on one stream: the next is made after the last was answered.
const REQUESTS_UNDER_WAY: usize = 4;

/// Reads under way, where their order does not matter.
const READS_UNDER_WAY: usize = 16;

/// No answer to compare: the member or its leader is gone, for now or for good. What was asked may
/// have happened or not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Interrupted(pub String);

pub struct Side {
    cluster: Cluster,
    keep_alive: Option<Conversation<pb::LeaseKeepAliveRequest, pb::LeaseKeepAliveResponse>>,
    /// The member that stream goes to, once it is open.
    keep_alive_at: usize,
    /// The ids this server picked for leases that were granted without one.
    pub picked: Vec<i64>,
    /// A member that has applied for certain whatever was answered.
    caught_up: usize,
}

impl Side {
    pub async fn start(program: Program, members: usize) -> Side {
        let cluster = Cluster::start(program, members, &[]).await;
        Side { cluster, keep_alive: None, keep_alive_at: 0, picked: Vec::new(), caught_up: 0 }
    }

    pub fn size(&self) -> usize {
        self.cluster.size()
    }

    pub fn channel(&self, member: usize) -> Channel {
        self.cluster.channel(member % self.cluster.size())
    }

    /// Asks a member, modulo their number.
    pub async fn ask(&mut self, member: usize, request: &Request) -> Result<Answer, Interrupted> {
        let member = match request {
            Request::KeepAlive(_) if self.keep_alive.is_some() => self.keep_alive_at,
            _ => member % self.cluster.size(),
        };
        if answers_from_own_state(request) {
            self.catch_up(member).await?;
        }
        let answer = match request.with_leases(&self.picked) {
            Request::KeepAlive(request) => self.keep_alive(member, request).await?,
            request => call(self.channel(member), request).await?,
        };
        match (request, &answer) {
            (Request::Grant(request), Answer::Grant(granted)) if request.id == 0 => {
                self.picked.push(granted.id);
                self.caught_up = member;
            }
            // What is refused may have been refused before anything was applied.
            (_, Answer::Refused { .. } | Answer::TimeToLive(_) | Answer::Leases(_)) => {}
            _ => self.caught_up = member,
        }
        Ok(comparable(answer, &self.picked))
    }

    /// Waits until a member has applied everything that was answered, here or by others. A member
    /// that answers from its own state may be behind, in etcd as well.
    pub async fn catch_up(&mut self, member: usize) -> Result<(), Interrupted> {
        if member % self.cluster.size() == self.caught_up {
            return Ok(());
        }
        let range =
            pb::RangeRequest { key: "a".into(), count_only: true, ..pb::RangeRequest::default() };
        call(self.channel(member), Request::Range(range)).await?;
        self.caught_up = member % self.cluster.size();
        Ok(())
    }

    /// Linearizable reads, many at a time, of all members in turn.
    pub async fn read(&self, ranges: &[pb::RangeRequest]) -> Result<Vec<Answer>, Interrupted> {
        let reads = ranges.iter().cloned().enumerate().map(|(nth, range)| {
            let answer = call(self.channel(nth), Request::Range(range));
            async move { Ok(comparable(answer.await?, &self.picked)) }
        });
        futures::stream::iter(reads).buffered(READS_UNDER_WAY).try_collect().await
    }

    /// All on one stream, at the member that was asked first.
    async fn keep_alive(
        &mut self,
        member: usize,
        request: pb::LeaseKeepAliveRequest,
    ) -> Result<Answer, Interrupted> {
        let channel = self.channel(member);
        self.keep_alive_at = member;
        let stream = self.keep_alive.get_or_insert_with(|| {
            Conversation::open(|requests| async move {
                LeaseClient::new(channel).lease_keep_alive(requests).await
            })
        });
        stream.say(request).await?;
        match tokio::time::timeout(CALL_LIMIT, stream.hear()).await {
            Ok(answer) => Ok(Answer::KeepAlive(answer?)),
            Err(_) => Err(Interrupted(format!("no answer to a keep-alive in {CALL_LIMIT:?}"))),
        }
    }
}

/// Whether a member may answer without having applied what others have answered.
fn answers_from_own_state(request: &Request) -> bool {
    match request {
        Request::Range(range) => range.serializable,
        Request::Txn(txn) => all_serializable(txn),
        // Its header is taken before it is renewed.
        Request::KeepAlive(_) | Request::Watch { .. } => true,
        _ => false,
    }
}

fn all_serializable(txn: &pb::TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).all(|op| match &op.request {
        Some(request_op::Request::RequestRange(range)) => range.serializable,
        Some(request_op::Request::RequestTxn(txn)) => all_serializable(txn),
        _ => false,
    })
}

async fn call(channel: Channel, request: Request) -> Result<Answer, Interrupted> {
    let mut kv = KvClient::new(channel.clone()).max_decoding_message_size(ANSWER_BYTES);
    let mut leases = LeaseClient::new(channel);
    match request {
        Request::Range(request) => unary(kv.range(request), Answer::Range).await,
        Request::Put(request) => unary(kv.put(request), Answer::Put).await,
        Request::DeleteRange(request) => unary(kv.delete_range(request), Answer::DeleteRange).await,
        Request::Txn(request) => unary(kv.txn(request), Answer::Txn).await,
        Request::Compact(request) => unary(kv.compact(request), Answer::Compact).await,
        Request::Grant(request) => unary(leases.lease_grant(request), Answer::Grant).await,
        Request::Revoke(request) => unary(leases.lease_revoke(request), Answer::Revoke).await,
        Request::TimeToLive(request) => {
            unary(leases.lease_time_to_live(request), Answer::TimeToLive).await
        }
        Request::Leases => {
            unary(leases.lease_leases(pb::LeaseLeasesRequest {}), Answer::Leases).await
        }
        Request::KeepAlive(_) | Request::Watch { .. } | Request::CloseStream { .. } => {
            unreachable!("it goes through a stream: {request}")
        }
    }
}

async fn unary<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
    answer: fn(T) -> Answer,
) -> Result<Answer, Interrupted> {
    match tokio::time::timeout(CALL_LIMIT, call).await {
        Ok(Ok(response)) => Ok(answer(response.into_inner())),
        Ok(Err(status)) => refused(&status),
        Err(_) => Err(Interrupted(format!("no answer in {CALL_LIMIT:?}"))),
    }
}

fn refused(status: &Status) -> Result<Answer, Interrupted> {
    use std::error::Error;
    let passing =
        matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled);
    // A status with a source was made here, of a broken connection.
    if passing || status.source().is_some() {
        return Err(Interrupted(format!("{status:?}")));
    }
    Ok(Answer::Refused { code: status.code(), message: status.message().to_owned() })
}

/// A stream in both directions. Dropping it closes it.
pub struct Conversation<Q, A> {
    requests: mpsc::Sender<Q>,
    /// Some servers do not open their side before they have something to say, and the first request
    /// has to get through all the same.
    opening: Option<JoinHandle<Result<Response<Streaming<A>>, Status>>>,
    answers: Option<Streaming<A>>,
}

impl<Q: Send + 'static, A: Send + 'static> Conversation<Q, A> {
    pub fn open<F, O>(open: O) -> Conversation<Q, A>
    where
        O: FnOnce(ReceiverStream<Q>) -> F,
        F: Future<Output = Result<Response<Streaming<A>>, Status>> + Send + 'static,
    {
        let (requests, receiver) = mpsc::channel(REQUESTS_UNDER_WAY);
        let opening = Some(tokio::spawn(open(ReceiverStream::new(receiver))));
        Conversation { requests, opening, answers: None }
    }

    pub async fn say(&mut self, request: Q) -> Result<(), Interrupted> {
        let sent = self.requests.send(request).await;
        sent.map_err(|_| Interrupted("the stream has ended".to_owned()))
    }

    /// The next answer, as soon as there is one. Dropping the future loses nothing.
    pub async fn hear(&mut self) -> Result<A, Interrupted> {
        if let Some(opening) = &mut self.opening {
            let opened = opening.await.expect("a call does not panic");
            self.opening = None;
            let opened = opened.map_err(|status| Interrupted(format!("{status:?}")))?;
            self.answers = Some(opened.into_inner());
        }
        let answers = self.answers.as_mut();
        let answers = answers.ok_or_else(|| Interrupted("the stream was not opened".to_owned()))?;
        match answers.next().await {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(status)) => Err(Interrupted(format!("{status:?}"))),
            None => Err(Interrupted("the stream has ended".to_owned())),
        }
    }
}
