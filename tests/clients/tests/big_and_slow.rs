//! Much of everything, and clients that do not keep up: memory stays bounded, the others are served,
//! and nothing is lost.
//!
//! Each test prints what it measured. Sizes are set by environment variables, for longer runs:
//! `SLOW_MIB`, `WATCHERS`, `RANGE_KEYS`, `LEASES`, `DISCONNECTS`, `KEEP_ALIVES`, `BURST`.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use holdfast_client_tests::check::{Code, SOON, eventually, report, spread, within};
use holdfast_client_tests::crowd::{Others, SERVED, many, size};
use holdfast_client_tests::memory::{Growth, MIB, Resident};
use holdfast_client_tests::raw::{self, KeepAliveRequest, KeepAliveResponse, RawConnection};
use holdfast_client_tests::wire::{
    self, CompareVersion, DELETE, KeyValue, Op, RangeRequest, RequestOp, TxnRequest, WatchCall,
    WatchCancel, WatchCreate, WatchUnion, Wire,
};
use holdfast_client_tests::{Cluster, target_is_etcd};
use prost::Message;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::Status;

/// Enough for a large answer or a long row of small ones.
const LARGE: Duration = Duration::from_secs(60);

const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";

/// What one stream may cost a member: its queue and an answer in the making of 1 MiB each, what waits
/// in the connection, and as much again for the memory's own fragments. Go collects its garbage when
/// the heap has doubled, so etcd gets more.
fn stream_bytes() -> u64 {
    if target_is_etcd() { 1024 * MIB } else { 64 * MIB }
}

fn watch_of(key: &str, start_revision: i64) -> WatchCreate {
    WatchCreate { key: key.to_owned().into(), start_revision, ..WatchCreate::default() }
}

fn watch_under(prefix: &str, start_revision: i64) -> WatchCreate {
    WatchCreate {
        range_end: wire::prefix_end(prefix.as_bytes()),
        ..watch_of(prefix, start_revision)
    }
}

fn under(prefix: &'static str) -> RangeRequest {
    let range_end = wire::prefix_end(prefix.as_bytes());
    RangeRequest { key: prefix.into(), range_end, ..RangeRequest::default() }
}

/// A watch alone on a connection of its own, created, of a client that takes in little unread.
async fn watching(cluster: &Cluster, create: WatchCreate) -> WatchCall {
    let wire = Wire::narrow(&cluster.endpoint(0), 64 << 10).await.expect("it listens");
    let mut call = wire.watch(vec![wire::create(create)]).await.expect("a stream");
    assert!(answer(&mut call).await.created);
    call
}

async fn answer(call: &mut WatchCall) -> wire::WatchResponse {
    within(SOON, "an answer of the watch", call.next()).await.expect("the stream goes on")
}

/// The revisions of the events it gives, which must go up, until `last` or until it is cancelled:
/// then with the revision it can go on from.
async fn read_until(call: &mut WatchCall, last: i64) -> (Vec<i64>, Option<i64>) {
    let mut seen: Vec<i64> = Vec::new();
    while seen.last().is_none_or(|r| *r < last) {
        let answer = answer(call).await;
        if answer.canceled {
            assert!(answer.compact_revision > 0, "{answer:?}");
            return (seen, Some(answer.compact_revision));
        }
        for event in &answer.events {
            assert!(seen.last().is_none_or(|r| *r < event.revision()), "backward: {answer:?}");
            seen.push(event.revision());
        }
    }
    (seen, None)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_never_reads_costs_little_and_loses_nothing() {
    const VALUE_BYTES: usize = 256 << 10;
    const KEYS: usize = 8;
    /// Compaction every so many puts, right behind the watcher that reads.
    const COMPACT_EVERY: usize = 16;
    let began = Instant::now();
    let puts = size("SLOW_MIB", 200) * (1 << 20) / VALUE_BYTES;
    let cluster = Cluster::start(1).await;
    let wire = Wire::connect(&cluster.endpoint(0)).await;
    let seen = AtomicI64::new(0);
    // Overwrites a few keys, and gives the revisions; compacts only behind `seen`.
    let overwrite = async |puts: usize, compact: bool| {
        let mut revisions = Vec::new();
        let mut compacted = 0;
        for n in 0..puts {
            let value = Bytes::from(vec![u8::try_from(n % 251).expect("small"); VALUE_BYTES]);
            let key = format!("big/{}", n % KEYS);
            revisions.push(wire.put(key, value).await.expect("a put"));
            let behind = seen.load(Ordering::Relaxed);
            if compact && n % COMPACT_EVERY == 0 && behind > compacted {
                wire.compact(behind).await.expect("a compaction");
                compacted = behind;
            }
        }
        revisions
    };
    let follow = async |mut call: WatchCall, puts: usize| {
        let mut revisions = Vec::new();
        while revisions.len() < puts {
            let answer = answer(&mut call).await;
            assert!(!answer.canceled, "cancelled: {answer:?}");
            revisions.extend(answer.events.iter().map(wire::Event::revision));
            seen.store(*revisions.last().expect("events"), Ordering::Relaxed);
        }
        revisions
    };
    // Fills the log's and the engine's caches, which belong to the baseline.
    let warm = watching(&cluster, watch_under("big/", 0)).await;
    let (written, followed) = tokio::join!(overwrite(puts, true), follow(warm, puts));
    assert!(written == followed);

    let resident = Resident::watch(cluster.pid(0));
    let others = Others::start(&cluster, 0).await;
    let mut slow = watching(&cluster, watch_under("big/", 0)).await;
    // A while without compaction: the slow one gets all of it when it wakes up.
    let written = overwrite(64, false).await;
    let last = *written.last().expect("some");
    let (got, cancelled) =
        within(LARGE, "the slow one catches up", read_until(&mut slow, last)).await;
    assert!(got == written && cancelled.is_none(), "{got:?} of {written:?}, {cancelled:?}");

    let reading = watching(&cluster, watch_under("big/", 0)).await;
    let (written, followed) = tokio::join!(overwrite(puts, true), follow(reading, puts));
    assert!(written == followed, "the reading watcher missed something");
    let growth = resident.within(stream_bytes() + 64 * VALUE_BYTES as u64, "a slow watcher");
    let last = *written.last().expect("some");
    let (mut got, cancelled) =
        within(LARGE, "the slow one wakes", read_until(&mut slow, last)).await;
    let before = got.len();
    if let Some(from) = cancelled {
        assert!(got.last().is_none_or(|r| *r < from), "it had {got:?} before {from}");
        let mut rest = watching(&cluster, watch_under("big/", from)).await;
        let (rest, again) = within(LARGE, "it goes on", read_until(&mut rest, last)).await;
        assert!(again.is_none(), "cancelled at its compact revision");
        // What compaction took is missing, and nothing else.
        got.extend(written.iter().filter(|r| **r < from).skip(before));
        got.extend(rest);
    }
    assert!(got == written, "a gap: {got:?} of {written:?}");
    others.finish("beside a slow watcher").await;
    report(&format!(
        "{puts} events of {VALUE_BYTES} B unread: {growth}; got {before}, then {cancelled:?}; {:?}",
        began.elapsed()
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_watchers_of_one_key_see_each_event_once_and_in_order() {
    const PUTS: usize = 100;
    const CONNECTIONS: usize = 4;
    let began = Instant::now();
    let a_connection = size("WATCHERS", 1000) / CONNECTIONS;
    let cluster = Cluster::start(1).await;
    let mut readers = JoinSet::new();
    for connection in 0..CONNECTIONS {
        let wire = Wire::connect(&cluster.endpoint(0)).await;
        // Half of them have a stream each, the others share one.
        let (streams, watches) =
            if connection % 2 == 0 { (a_connection, 1) } else { (1, a_connection) };
        for _ in 0..streams {
            let creates = vec![wire::create(watch_of("hot", 0)); watches];
            let mut call = wire.watch(creates).await.expect("a stream");
            for _ in 0..watches {
                assert!(answer(&mut call).await.created);
            }
            readers.spawn(async move {
                let mut seen: HashMap<i64, Vec<i64>> = HashMap::new();
                let mut events = 0;
                while events < PUTS * watches {
                    let answer = answer(&mut call).await;
                    assert!(!answer.canceled && !answer.events.is_empty(), "{answer:?}");
                    events += answer.events.len();
                    let own = seen.entry(answer.watch_id).or_default();
                    own.extend(answer.events.iter().map(wire::Event::revision));
                }
                assert_eq!(seen.len(), watches, "each watch got something");
                seen.into_values().collect::<Vec<_>>()
            });
        }
    }
    let created = began.elapsed();
    let wire = Wire::connect(&cluster.endpoint(0)).await;
    let mut written = Vec::new();
    let mut times = Vec::new();
    for n in 0..PUTS {
        let put = Instant::now();
        written.push(wire.put("hot", n.to_string()).await.expect("a put"));
        times.push(put.elapsed());
    }
    let seen = within(LARGE, "all watchers see all", readers.join_all()).await;
    let seen: Vec<Vec<i64>> = seen.into_iter().flatten().collect();
    assert_eq!(seen.len(), a_connection * CONNECTIONS);
    assert!(seen.iter().all(|revisions| *revisions == written), "not once each, in order");
    report(&format!(
        "{} watchers made in {created:?}, {PUTS} puts {}; all in {:?}",
        seen.len(),
        spread(&times),
        began.elapsed()
    ));
}

/// Where a stamp stands: keys at the two ends of the range are always written together.
fn mirrored(pair: usize, keys: usize) -> [Bytes; 2] {
    [range_key(pair), range_key(keys - 1 - pair)]
}

const RANGE_VALUE: &[u8] = &[b'v'; 64];

fn range_key(n: usize) -> Bytes {
    format!("r/{n:08}").into()
}

/// Writers that put the same stamp to both ends of the range, and know at which revision.
struct Stamps {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    writers: JoinSet<Vec<(i64, Bytes)>>,
}

impl Stamps {
    const PAIRS: usize = 4;

    async fn start(cluster: &Cluster, keys: usize) -> Stamps {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut writers = JoinSet::new();
        for pair in 0..Self::PAIRS {
            let wire = Wire::connect(&cluster.endpoint(0)).await;
            let (stop, made) = (stop.clone(), made.clone());
            writers.spawn(async move {
                let mut stamps = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let stamp = Bytes::from(format!("{pair}-{}", stamps.len()));
                    let [first, last] = mirrored(pair, keys);
                    let ops =
                        vec![wire::put_op(first, stamp.clone()), wire::put_op(last, stamp.clone())];
                    let txn = TxnRequest { success: ops, ..TxnRequest::default() };
                    let answer = within(SERVED, "a stamp", wire.txn(txn)).await.expect("a stamp");
                    stamps.push((answer.header.expect("a header").revision, stamp));
                    made.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                stamps
            });
        }
        Stamps { stop, made, writers }
    }

    /// Waits for `more` further stamps.
    async fn flow(&self, more: usize) {
        let wanted = self.made.load(Ordering::Relaxed) + more;
        eventually(LARGE, "more stamps", || async {
            (self.made.load(Ordering::Relaxed) >= wanted).then_some(())
        })
        .await;
    }

    /// For each pair, the stamps in order with their revisions.
    async fn finish(self) -> Vec<Vec<(i64, Bytes)>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut stamps = self.writers.join_all().await;
        stamps.sort_by(|a, b| a[0].1.cmp(&b[0].1));
        stamps
    }
}

/// Asserts that `kvs` is the whole range as it was at `revision`.
fn check_range(kvs: &[KeyValue], revision: i64, keys: usize, stamps: &[Vec<(i64, Bytes)>]) {
    assert_eq!(kvs.len(), keys);
    for (n, kv) in kvs.iter().enumerate() {
        assert_eq!(kv.key, range_key(n), "out of order");
        assert!(kv.mod_revision <= revision, "{kv:?} is not of {revision}");
    }
    for (pair, stamps) in stamps.iter().enumerate() {
        let (at, stamp) =
            stamps.iter().rfind(|(r, _)| *r <= revision).expect("one was made before");
        for at_end in [pair, keys - 1 - pair] {
            let (kv, expected) = (&kvs[at_end], (*at, stamp));
            assert_eq!((kv.mod_revision, &kv.value), expected, "not as at {revision}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_over_very_many_keys_is_one_moment_and_holds_nobody_up() {
    const OPS: usize = 125;
    let keys = size("RANGE_KEYS", 300_000) / OPS * OPS;
    let began = Instant::now();
    let cluster = Cluster::start(1).await;
    many(&cluster, 0, 0..keys / OPS, |wire, n| async move {
        let ops =
            (n * OPS..(n + 1) * OPS).map(|k| wire::put_op(range_key(k), RANGE_VALUE)).collect();
        wire.txn(TxnRequest { success: ops, ..TxnRequest::default() }).await.map(|_| ())
    })
    .await;
    report(&format!("{keys} keys written in {:?}", began.elapsed()));
    let wire = Wire::connect(&cluster.endpoint(0)).await;
    let stamps = Stamps::start(&cluster, keys).await;
    stamps.flow(8 * Stamps::PAIRS).await;

    // The stream comes first: what a large answer took is not given back at once.
    let others = Others::start(&cluster, 0).await;
    let resident = Resident::watch(cluster.pid(0));
    let asked = Instant::now();
    let streamed = match stream_all(&wire, under("r/"), &stamps).await {
        Ok(streamed) => {
            let growth = resident.within(stream_bytes(), "a streamed range");
            report(&format!("streamed in {:?}: {growth}", asked.elapsed()));
            Some(streamed)
        }
        Err(status) if status.code() == Code::Unimplemented => {
            report(&format!("NOT TESTED: this server has no RangeStream: {}", status.message()));
            None
        }
        Err(status) => panic!("a streamed range failed: {status:?}"),
    };
    others.finish("beside a streamed range").await;

    let others = Others::start(&cluster, 0).await;
    let resident = Resident::watch(cluster.pid(0));
    let asked = Instant::now();
    let whole = within(LARGE, "a large range", wire.range(under("r/"))).await.expect("a range");
    let (took, bytes) = (asked.elapsed(), whole.encoded_len() as u64);
    others.finish("beside a large range").await;
    let growth = resident.growth();
    report(&format!("one answer of {} MiB in {took:?}: {growth}", bytes / MIB));

    let stamps = stamps.finish().await;
    assert_eq!(whole.count, i64::try_from(keys).expect("few"));
    assert!(!whole.more);
    check_range(&whole.kvs, whole.header.expect("a header").revision, keys, &stamps);
    if let Some((revision, kvs)) = streamed {
        check_range(&kvs, revision, keys, &stamps);
    }
    report(&format!("all in {:?}", began.elapsed()));
}

/// Reads a streamed range, pausing in the middle until the writers have gone on.
async fn stream_all(
    wire: &Wire,
    range: RangeRequest,
    stamps: &Stamps,
) -> Result<(i64, Vec<KeyValue>), Status> {
    let mut stream = within(SOON, "a streamed range", wire.range_stream(range)).await?;
    let (mut revisions, mut kvs, mut answers) = (Vec::new(), Vec::new(), 0);
    let mut count = 0;
    while let Some(answer) = within(SOON, "the next piece", stream.message()).await? {
        let piece = answer.range_response.expect("a piece has a content");
        revisions.extend(piece.header.map(|h| h.revision).filter(|r| *r > 0));
        kvs.extend(piece.kvs);
        count = count.max(piece.count);
        answers += 1;
        if answers == 2 {
            stamps.flow(100).await;
        }
    }
    assert!(answers > 2, "one answer is no stream");
    assert_eq!(usize::try_from(count), Ok(kvs.len()), "the count is of another moment");
    revisions.dedup();
    assert_eq!(revisions.len(), 1, "not one moment: {revisions:?}");
    Ok((revisions[0], kvs))
}

fn compares(count: usize) -> Vec<CompareVersion> {
    let absent = |n| CompareVersion { key: format!("no/{n}").into(), version: Some(0) };
    (0..count).map(absent).collect()
}

fn puts(prefix: &str, count: usize) -> Vec<RequestOp> {
    (0..count).map(|n| wire::put_op(format!("{prefix}/{n:03}"), "v")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_at_each_limit_is_taken_and_one_above_is_refused() {
    const MOST: usize = 128;
    const TOO_MANY: &str = "etcdserver: too many operations in txn request";
    let began = Instant::now();
    let cluster = Cluster::start(1).await;
    let wire = Wire::connect(&cluster.endpoint(0)).await;
    let txn = |compare, success, failure| TxnRequest {
        compare: compares(compare),
        success: puts("s", success),
        failure: puts("f", failure),
    };
    let taken = wire.txn(txn(MOST, MOST, MOST)).await.expect("at the limit");
    assert!(taken.succeeded && taken.responses.len() == MOST);
    let revision = taken.header.expect("a header").revision;
    for (compare, success, failure) in
        [(MOST + 1, 1, 1), (1, MOST + 1, 1), (1, 1, MOST + 1), (MOST + 1, MOST + 1, MOST + 1)]
    {
        let status = wire.txn(txn(compare, success, failure)).await.expect_err("above it");
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, TOO_MANY));
    }

    // A nested one has what the longest list around it leaves, however many stand beside it.
    let outer = MOST / 2;
    let inner = MOST - outer;
    let full = |n: usize, ops| {
        let txn = TxnRequest { success: puts(&format!("n/{n:03}"), ops), ..TxnRequest::default() };
        RequestOp { request: Some(Op::Txn(txn)) }
    };
    let many = |outer, inner| TxnRequest {
        compare: compares(1),
        success: (0..outer).map(|n| full(n, inner)).collect(),
        failure: (0..outer).map(|n| full(n, inner)).collect(),
    };
    let taken = within(LARGE, "very many puts", wire.txn(many(outer, inner))).await;
    let taken = taken.expect("at the limit");
    assert_eq!(taken.header.expect("a header").revision, revision + 1);
    let each = taken.responses.iter().map(|r| r.txn.as_ref().expect("nested").responses.len());
    assert!(taken.responses.len() == outer && each.into_iter().all(|n| n == inner));
    let count = wire.range(RangeRequest { count_only: true, ..under("n/") }).await;
    assert_eq!(count.expect("a range").count, i64::try_from(outer * inner).expect("few"));
    for (outer, inner) in [(outer, inner + 1), (1, MOST)] {
        let status = wire.txn(many(outer, inner)).await.expect_err("a nested one above it");
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, TOO_MANY));
    }
    assert_eq!(wire.revision().await.expect("a range"), revision + 1);

    request_sizes(&wire).await;
    report(&format!("all in {:?}", began.elapsed()));
}

/// Requests of exactly 1.5 MiB and one byte more, and messages of exactly 2 MiB and one byte more.
async fn request_sizes(wire: &Wire) {
    const REQUEST_BYTES: usize = 1_572_864;
    const MESSAGE_BYTES: usize = REQUEST_BYTES + (512 << 10);
    const TOO_LARGE: &str = "etcdserver: request is too large";
    // etcd measures the request in the envelope that goes into its log.
    let envelope = if target_is_etcd() { 64 } else { 0 };
    let sized = |bytes: usize| {
        let put = wire::put_op("sized", vec![b'v'; bytes - 100]);
        // An absent key as long as is still needed: its length takes one byte, whatever it is.
        let of = |len| TxnRequest {
            compare: vec![CompareVersion { key: vec![b'k'; len].into(), version: Some(0) }],
            success: vec![put.clone()],
            failure: Vec::new(),
        };
        let txn = of(1 + bytes - of(1).encoded_len());
        assert_eq!(txn.encoded_len(), bytes);
        txn
    };
    let revision = wire.revision().await.expect("a range");
    wire.txn(sized(REQUEST_BYTES - envelope)).await.expect("exactly as large as it may be");
    for bytes in [REQUEST_BYTES + 1, MESSAGE_BYTES] {
        let status = wire.txn(sized(bytes)).await.expect_err("a byte too large");
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, TOO_LARGE));
    }
    for bytes in [MESSAGE_BYTES + 1, 4 * MESSAGE_BYTES] {
        let status = wire.txn(sized(bytes)).await.expect_err("not even received");
        let text = format!("grpc: received message larger than max ({bytes} vs. {MESSAGE_BYTES})");
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, text.as_str()));
    }
    assert_eq!(wire.revision().await.expect("a range"), revision + 1);
}

/// etcd's lessor revokes a thousand leases a second.
fn ending_of(leases: usize) -> Duration {
    let etcd = 2 * Duration::from_millis(leases as u64);
    let allowance = Duration::from_secs(3);
    if target_is_etcd() { etcd + allowance } else { allowance }
}

/// Keeps all of them alive, and has the answers.
async fn keep_alive(wire: &Wire, ids: &[i64], ttl: i64) {
    let requests = tokio_stream::iter(ids.to_vec()).map(|id| KeepAliveRequest { id });
    let stream = raw::streaming::<_, KeepAliveResponse>(wire.channel(), KEEP_ALIVE, requests);
    let mut answers = stream.await.expect("a stream");
    for id in ids {
        let answer = within(SOON, "a keep-alive", answers.message()).await;
        let answer = answer.expect("no error").expect("no end");
        assert_eq!((answer.id, answer.ttl), (*id, ttl), "setting up took longer than the TTL");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_leases_that_end_together_end_once_and_in_time() {
    const TTL: i64 = 8;
    const FIRST: i64 = 1_000_000;
    const BATCH: usize = 2_000;
    /// With default flags.
    const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);
    let leases = size("LEASES", 10_000);
    let began = Instant::now();
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let member = cluster.others(leader)[0];
    let wire = Wire::connect(&cluster.endpoint(member)).await;
    let ids: Vec<i64> = (FIRST..).take(leases).collect();
    // What was granted first must not end before the last is there.
    for batch in (0..leases).step_by(BATCH) {
        let batch = batch..leases.min(batch + BATCH);
        many(&cluster, member, batch.clone(), |wire, n| async move {
            let id = FIRST + i64::try_from(n).expect("few");
            assert_eq!(wire.lease_grant(TTL, id).await?.ttl, TTL);
            wire.put_leased(format!("lease/{id}"), "v", id).await.map(|_| ())
        })
        .await;
        keep_alive(&wire, &ids[..batch.end], TTL).await;
    }
    let made = began.elapsed();
    let now = wire.revision().await.expect("a range");
    let mut call = watching(&cluster, watch_under("lease/", now + 1)).await;
    let others = Others::start(&cluster, member).await;

    // A lease lives on from when its keep-alive is processed: that is after this moment.
    let sent = Instant::now();
    keep_alive(&wire, &ids, TTL).await;
    let acknowledged = sent.elapsed();

    let ttl = Duration::from_secs(TTL as u64);
    let bound = acknowledged + ttl + ELECTION_TIMEOUT + Duration::from_secs(1) + ending_of(leases);
    let mut ended: HashMap<Bytes, Duration> = HashMap::new();
    let reading = async {
        while ended.len() < leases {
            let answer = call.next().await.expect("the stream goes on");
            let at = sent.elapsed();
            for event in &answer.events {
                assert_eq!(event.kind, DELETE, "{event:?}");
                let earlier = ended.insert(event.pair().key.clone(), at);
                assert!(earlier.is_none(), "deleted twice: {event:?}");
            }
        }
    };
    within(bound + SOON, "all leases end", reading).await;
    let times: Vec<Duration> = ended.values().copied().collect();
    let (first, last) = (times.iter().min().expect("some"), times.iter().max().expect("some"));
    assert!(*first >= ttl, "the first ended {first:?} after the keep-alives were sent");
    assert!(*last <= bound, "the last ended {last:?} after the keep-alives, not in {bound:?}");
    others.finish("while leases end").await;
    assert_eq!(wire.leases().await.expect("an answer"), [0; 0]);
    let left = RangeRequest { count_only: true, ..under("lease/") };
    assert_eq!(wire.range(left).await.expect("a range").count, 0);
    report(&format!(
        "{leases} leases made in {made:?}, kept alive in {acknowledged:?}, gone between {first:?} \
         and {last:?} after; all in {:?}",
        began.elapsed()
    ));
}

/// The middle one of some puts to a key that very many watched.
async fn put_time(wire: &Wire) -> Duration {
    let mut times = Vec::new();
    for _ in 0..51 {
        let began = Instant::now();
        wire.put("hot", "v").await.expect("a put");
        times.push(began.elapsed());
    }
    times.sort_unstable();
    times[25]
}

/// Does the same thing three times: what it cost after the first must come back after the others.
async fn leaves_nothing<F>(cluster: &Cluster, what: &str, mut round: impl FnMut() -> F)
where
    F: Future<Output = ()>,
{
    /// Of memory that the allocator has not given back.
    const SLACK: u64 = 24 * MIB;
    /// A put is never slower than this for what is gone; ten thousand watchers would make it so.
    const PUT: Duration = Duration::from_millis(4);
    let wire = Wire::connect(&cluster.endpoint(0)).await;
    round().await;
    let before = put_time(&wire).await;
    let resident = Resident::watch(cluster.pid(0));
    let began = Instant::now();
    for _ in 0..2 {
        round().await;
    }
    let took = began.elapsed() / 2;
    // The member learns of a closed connection a little later than we close it.
    let settled = async || {
        let (after, growth) = (put_time(&wire).await, resident.growth());
        let memory = growth.now_bytes <= growth.before_bytes + SLACK || target_is_etcd();
        (memory && after <= before * 3 + PUT).then_some((after, growth))
    };
    let found: (Duration, Growth) =
        eventually(SOON, &format!("{what} leave nothing behind"), settled).await;
    report(&format!("{what} in {took:?} a time: {}; put {before:?}, then {:?}", found.1, found.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_and_watches_that_are_gone_leave_nothing_behind() {
    const WATCHES: i64 = 10_000;
    const HALF_OPEN: usize = 1_000;
    const WATCHES_A_CLIENT: usize = 20;
    // In three rounds.
    let disconnects = size("DISCONNECTS", 1_000) / 3;
    let cluster = Cluster::start(1).await;
    let others = Others::start(&cluster, 0).await;
    let port = cluster.client_port(0);
    leaves_nothing(&cluster, "1,000 half-open streams", || async {
        let mut connection = RawConnection::open(port).await;
        let mut open = Vec::new();
        for n in 0..HALF_OPEN {
            let path = ["/etcdserverpb.Watch/Watch", "/etcdserverpb.KV/Put"][n % 2];
            open.push(connection.half_open(path).await.expect("one more"));
        }
        // A call that is whole gets through beside them.
        let call = connection.call("/etcdserverpb.KV/Range", raw::grpc_frame(&[0x0a, 1, b'k']));
        assert_eq!(within(SOON, "a call", call).await.expect("an answer").code, 0);
    })
    .await;

    leaves_nothing(&cluster, "10,000 watches made and cancelled", || async {
        let wire = Wire::connect(&cluster.endpoint(0)).await;
        let mut call = wire.watch(vec![wire::create(watch_of("hot", 0))]).await.expect("a stream");
        for _ in 1..WATCHES {
            call.ask(WatchUnion::Create(watch_of("hot", 0)));
        }
        for id in 0..WATCHES {
            let created = answer(&mut call).await;
            assert!(created.created && created.watch_id == id, "{created:?}");
        }
        let revision = wire.put("hot", "v").await.expect("a put");
        for _ in 0..WATCHES {
            let told = answer(&mut call).await;
            assert_eq!((told.events.len(), told.revision()), (1, revision));
        }
        for watch_id in 0..WATCHES {
            call.ask(WatchUnion::Cancel(WatchCancel { watch_id }));
        }
        let mut cancelled = 0;
        while cancelled < WATCHES {
            cancelled += i64::from(answer(&mut call).await.canceled);
        }
        // The id may be used again, and only the new watch is told of a put.
        call.ask(WatchUnion::Create(watch_of("hot", 0)));
        assert!(answer(&mut call).await.created);
        let revision = wire.put("hot", "v").await.expect("a put");
        let told = answer(&mut call).await;
        assert_eq!((told.events.len(), told.events[0].revision()), (1, revision));
    })
    .await;

    leaves_nothing(&cluster, &format!("{disconnects} clients that watch and go"), || async {
        let next = AtomicUsize::new(0);
        let client = async || {
            while next.fetch_add(1, Ordering::Relaxed) < disconnects {
                let wire = Wire::connect(&cluster.endpoint(0)).await;
                let creates = vec![wire::create(watch_of("hot", 1)); WATCHES_A_CLIENT];
                let mut call = wire.watch(creates).await.expect("a stream");
                assert!(answer(&mut call).await.created);
            }
        };
        tokio::join!(client(), client(), client(), client());
    })
    .await;
    others.finish("while streams come and go").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_keep_alives_whose_answers_nobody_reads_is_held_back() {
    /// Long on the wire, so that fewer fill the windows.
    const LEASE: i64 = i64::MAX;
    const TTL: i64 = 600;
    /// It stands when nothing more is taken for so long.
    const STILL: Duration = Duration::from_millis(500);
    let total = size("KEEP_ALIVES", 150_000);
    let began = Instant::now();
    let cluster = Cluster::start(1).await;
    let wire = Wire::connect(&cluster.endpoint(0)).await;
    wire.lease_grant(TTL, LEASE).await.expect("a lease");
    // So little that the client's own guard against many small unread frames stays quiet.
    let flood = Wire::narrow(&cluster.endpoint(0), 1 << 10).await.expect("it listens");
    let others = Others::start(&cluster, 0).await;
    let resident = Resident::watch(cluster.pid(0));
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = taken.clone();
    let requests = tokio_stream::iter(0..total).map(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
        KeepAliveRequest { id: LEASE }
    });
    let mut answers = raw::streaming::<_, KeepAliveResponse>(flood.channel(), KEEP_ALIVE, requests)
        .await
        .expect("a stream");
    let mut before = (0, Instant::now());
    let held = eventually(LARGE, "the flood is held back", || {
        let now = taken.load(Ordering::Relaxed);
        if now != before.0 {
            before = (now, Instant::now());
        }
        let still = before.1.elapsed() >= STILL && now > 0;
        async move { still.then_some(now) }
    })
    .await;
    assert!(held < total, "all {total} were taken, with no answer read");
    let growth = resident.within(stream_bytes(), "a flood of keep-alives");
    for n in 0..total {
        let answer = within(SOON, "an answer", answers.message()).await.expect("no error");
        let answer = answer.unwrap_or_else(|| panic!("the stream ended after {n} answers"));
        assert_eq!((answer.id, answer.ttl), (LEASE, TTL));
    }
    assert!(within(SOON, "the end", answers.message()).await.expect("no error").is_none());
    others.finish("beside a flood of keep-alives").await;
    report(&format!("{held} keep-alives taken unread: {growth}; all in {:?}", began.elapsed()));
}

/// Go's clients send each message in an HTTP/2 frame of its own, and one that holds many leases sends
/// all its keep-alives at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_keep_alives_in_frames_of_their_own_is_answered() {
    const LEASE: i64 = i64::MAX;
    let burst = size("BURST", 50_000);
    let cluster = Cluster::start(1).await;
    let wire = Wire::connect(&cluster.endpoint(0)).await;
    wire.lease_grant(600, LEASE).await.expect("a lease");
    let began = Instant::now();
    let mut connection = RawConnection::open(cluster.client_port(0)).await;
    let message = KeepAliveRequest { id: LEASE }.encode_to_vec();
    let answers = within(LARGE, "the answers", connection.burst(KEEP_ALIVE, &message, burst)).await;
    assert_eq!(answers.expect("the connection stays"), burst);
    report(&format!("{burst} keep-alives in a burst: {:?}", began.elapsed()));
}
