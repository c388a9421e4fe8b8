//! Life without a quorum: what one member of three still answers when the two others are gone, and
//! how the rest fails.

use std::time::Duration;

use etcd_client::{GetOptions, PutOptions};
use holdfast_client_tests::check::{AFTER_ELECTION, SOON, eventually, refused, silent};
use holdfast_client_tests::raw::{
    self, AnyResponse, KeepAliveRequest, KeepAliveResponse, LockRequest, PutRequest, RangeRequest,
};
use holdfast_client_tests::{Cluster, within};
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

/// etcd gives a call up after five seconds and two election timeouts.
const GIVEN_UP: Duration = Duration::from_secs(20);

const OBSERVE: &str = "/v3electionpb.Election/Observe";
const WATCH: &str = "/etcdserverpb.Watch/Watch";
const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";

/// `WatchRequest { create_request: WatchCreateRequest { key: "a" } }` as bytes of field 1.
#[derive(Clone, PartialEq, prost::Message)]
struct WatchA {
    #[prost(bytes = "vec", tag = "1")]
    create: Vec<u8>,
}

fn watch_a() -> WatchA {
    WatchA { create: b"\x0a\x01a".to_vec() }
}

fn requiring_leader<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("hasleader", "true".parse().expect("metadata"));
    request
}

/// A stream of requests that sends one and stays open.
fn open<Q: Send + 'static>(first: Q) -> impl tokio_stream::Stream<Item = Q> + Send + 'static {
    use tokio_stream::StreamExt;
    tokio_stream::once(first).chain(tokio_stream::pending())
}

/// Kills all members but the first, and waits until that one has noticed.
async fn lose_the_quorum(cluster: &mut Cluster) {
    for member in 1..cluster.size() {
        cluster.kill(member);
    }
    let client = cluster.client(0).await;
    eventually(AFTER_ELECTION, "the member knows no leader", || {
        let mut client = client.clone();
        async move { (client.status().await.expect("a status").leader() == 0).then_some(()) }
    })
    .await;
}

fn no_leader<T: std::fmt::Debug>(result: Result<T, Status>) {
    let status = result.expect_err("there is no leader");
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));
}

/// How a stream ends: its answers so far are passed over.
async fn end_of<A>(mut stream: Streaming<A>) -> Status {
    loop {
        match within(AFTER_ELECTION, "the stream ends", stream.message()).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without an error"),
            Err(status) => return status,
        }
    }
}

#[tokio::test]
async fn what_needs_no_quorum_is_answered_and_the_rest_is_given_up() {
    let mut cluster = Cluster::start(3).await;
    let mut client = cluster.client(0).await;
    client.put("a", "1", None).await.expect("a put");
    lose_the_quorum(&mut cluster).await;

    let options = GetOptions::new().with_serializable();
    let answer = within(SOON, "a serializable range", client.get("a", Some(options))).await;
    assert_eq!(answer.expect("no quorum is needed").kvs()[0].value(), b"1");
    let members = within(SOON, "the members", client.member_list()).await;
    assert_eq!(members.expect("no quorum is needed").members().len(), 3);
    let status = within(SOON, "the status", client.status()).await.expect("a status");
    assert_eq!(status.errors(), ["etcdserver: no leader"]);

    let (mut putting, mut reading) = (client.clone(), client.clone());
    silent(Duration::from_secs(1), "nobody can agree", putting.put("a", "2", None)).await;
    let put = putting.put("a", "2", Some(PutOptions::new().with_prev_key()));
    let range = reading.get("a", None);
    let both = async { tokio::join!(put, range) };
    let (put, range) = within(GIVEN_UP, "the server gives up", both).await;
    refused(put, Code::DeadlineExceeded, "context deadline exceeded");
    refused(range, Code::Unavailable, "etcdserver: request timed out");
}

/// The streams that a client holds open, with or without asking for a leader.
struct Streams {
    watch: Streaming<AnyResponse>,
    observe: Streaming<AnyResponse>,
    keep_alive: Streaming<KeepAliveResponse>,
}

impl Streams {
    async fn begin(channel: &Channel, lease: i64, requires_leader: bool) -> Streams {
        fn request<T>(message: T, requires_leader: bool) -> Request<T> {
            if requires_leader { requiring_leader(message) } else { Request::new(message) }
        }
        let observe = LockRequest { name: b"e".to_vec(), lease: 0 };
        let watch = raw::streaming_with(channel, WATCH, request(open(watch_a()), requires_leader));
        let observe = raw::streaming_with(
            channel,
            OBSERVE,
            request(tokio_stream::once(observe), requires_leader),
        );
        let keep_alive = KeepAliveRequest { id: lease };
        let keep_alive =
            raw::streaming_with(channel, KEEP_ALIVE, request(open(keep_alive), requires_leader));
        let begin = async { tokio::join!(watch, keep_alive) };
        let (watch, keep_alive) = within(SOON, "streams begin", begin).await;
        let (mut watch, mut keep_alive) = (watch.expect("a watch"), keep_alive.expect("a stream"));
        within(SOON, "the watch is made", watch.message()).await.expect("a watch");
        within(SOON, "the lease is renewed", keep_alive.message()).await.expect("a renewal");
        // Its head comes with the first leader, and there is none yet in etcd.
        let observe = within(SOON, "somebody leads", observe).await.expect("a stream");
        Streams { watch, observe, keep_alive }
    }
}

#[tokio::test]
async fn whoever_requires_a_leader_learns_that_it_is_lost() {
    let mut cluster = Cluster::start(3).await;
    let mut client = cluster.client(0).await;
    let lease = client.lease_grant(60, None).await.expect("a lease").id();
    client.campaign("e", "me", lease).await.expect("elected");
    let channel = raw::channel(&cluster.endpoint(0)).await;
    let requiring = Streams::begin(&channel, lease, true).await;
    let mut patient = Streams::begin(&channel, lease, false).await;
    within(SOON, "the leader", patient.observe.message()).await.expect("somebody leads");
    lose_the_quorum(&mut cluster).await;

    for end in [
        end_of(requiring.watch).await,
        end_of(requiring.observe).await,
        end_of(requiring.keep_alive).await,
    ] {
        no_leader::<()>(Err(end));
    }
    let both = async { tokio::join!(patient.watch.message(), patient.observe.message()) };
    silent(Duration::from_secs(2), "they asked for no leader", both).await;
    silent(Duration::from_secs(1), "nothing was asked", patient.keep_alive.message()).await;

    // What begins only now fails at once.
    let put = PutRequest { key: b"a".to_vec(), value: b"1".to_vec() };
    let put =
        raw::unary_with::<_, AnyResponse>(&channel, "/etcdserverpb.KV/Put", requiring_leader(put));
    no_leader(within(SOON, "a put", put).await);
    let range = RangeRequest { key: b"a".to_vec(), ..RangeRequest::default() };
    let range = raw::unary_with::<_, AnyResponse>(
        &channel,
        "/etcdserverpb.KV/Range",
        requiring_leader(range),
    );
    no_leader(within(SOON, "a range", range).await);
    let watch =
        raw::streaming_with::<_, AnyResponse>(&channel, WATCH, requiring_leader(open(watch_a())));
    match within(SOON, "a watch", watch).await {
        Ok(stream) => no_leader::<()>(Err(end_of(stream).await)),
        Err(status) => no_leader::<()>(Err(status)),
    }
}
