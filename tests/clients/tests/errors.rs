//! The code and the text of every refusal that KV, Lease, Lock and Election make.
//!
//! Clients compare these texts literally. KV and Lease answer with a proper code; Lock and Election
//! answer every failure with UNKNOWN and the same text.

use std::time::Duration;

use etcd_client::{
    Client, CompactionOptions, Compare, CompareOp, GetOptions, LeaderKey, LeaseGrantOptions,
    LockOptions, ProclaimOptions, PutOptions, ResignOptions, Txn, TxnOp, WatchOptions,
};
use holdfast_client_tests::check::{Code, SOON, refused, silent};
use holdfast_client_tests::raw::{self, AnyResponse, KeepAliveRequest, KeepAliveResponse};
use holdfast_client_tests::{Cluster, status_of, target_is_etcd, within};
use tonic::Request;

const NO_KEY: &str = "etcdserver: key is not provided";
const KEY_NOT_FOUND: &str = "etcdserver: key not found";
const NO_LEASE: &str = "etcdserver: requested lease not found";
const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";
const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const TOO_MANY: &str = "etcdserver: too many operations in txn request";
const DUPLICATE: &str = "etcdserver: duplicate key given in txn request";
const NOT_ELECTED: &str = "election: not leader";

/// A lease nobody granted.
const UNKNOWN_LEASE: i64 = 0x1234_5678;

async fn one_member() -> (Cluster, Client) {
    let cluster = Cluster::start(1).await;
    let client = cluster.client(0).await;
    (cluster, client)
}

/// The store's revision, which a refused request must leave as it was.
async fn revision(client: &mut Client) -> i64 {
    let answer = client.get("x", None).await.expect("a range");
    answer.header().expect("a header").revision()
}

#[tokio::test]
async fn put() {
    let (_cluster, mut client) = one_member().await;
    let before = revision(&mut client).await;
    let options = PutOptions::new;
    refused(client.put("", "v", None).await, Code::InvalidArgument, NO_KEY);
    let value = options().with_ignore_value();
    let answer = client.put("k", "v", Some(value.clone())).await;
    refused(answer, Code::InvalidArgument, "etcdserver: value is provided");
    let leased = options().with_ignore_lease().with_lease(UNKNOWN_LEASE);
    let answer = client.put("k", "v", Some(leased)).await;
    refused(answer, Code::InvalidArgument, "etcdserver: lease is provided");
    for absent in [value, options().with_ignore_lease()] {
        refused(client.put("k", "", Some(absent)).await, Code::InvalidArgument, KEY_NOT_FOUND);
    }
    for lease in [UNKNOWN_LEASE, -1] {
        let answer = client.put("k", "v", Some(options().with_lease(lease))).await;
        refused(answer, Code::NotFound, NO_LEASE);
    }
    let large = vec![b'v'; 1_600_000];
    let answer = client.put("k", large, None).await;
    refused(answer, Code::InvalidArgument, "etcdserver: request is too large");
    assert_eq!(revision(&mut client).await, before);
    client.put("k", vec![b'v'; 1_500_000], None).await.expect("below the limit");
}

#[tokio::test]
async fn range_and_delete() {
    let (cluster, mut client) = one_member().await;
    refused(client.get("", None).await, Code::InvalidArgument, NO_KEY);
    let ranged = GetOptions::new().with_range("z");
    refused(client.get("", Some(ranged)).await, Code::InvalidArgument, NO_KEY);
    refused(client.delete("", None).await, Code::InvalidArgument, NO_KEY);
    let before = revision(&mut client).await;
    for serializable in [false, true] {
        let mut options = GetOptions::new().with_revision(before + 1);
        if serializable {
            options = options.with_serializable();
        }
        refused(client.get("k", Some(options)).await, Code::OutOfRange, FUTURE);
    }
    let options = GetOptions::new().with_range("a");
    let backwards = client.get("b", Some(options)).await.expect("no error");
    assert_eq!((backwards.count(), backwards.kvs().len()), (0, 0));
    assert_eq!(client.delete("absent", None).await.expect("no error").deleted(), 0);
    assert_eq!(revision(&mut client).await, before);

    // Unknown orders are no order. An unknown sort target crashes etcd, so only others are asked.
    let channel = raw::channel(&cluster.endpoint(0)).await;
    let range =
        |sort_order, sort_target| raw::RangeRequest { key: b"k".to_vec(), sort_order, sort_target };
    let call = async |request| {
        raw::unary::<_, AnyResponse>(&channel, "/etcdserverpb.KV/Range", request).await
    };
    call(range(77, 0)).await.expect("an unknown order is accepted");
    if !target_is_etcd() {
        match call(range(1, 77)).await {
            Ok(_) => {}
            Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{status:?}"),
        }
        revision(&mut client).await;
    }
}

#[tokio::test]
async fn transaction() {
    let (_cluster, mut client) = one_member().await;
    client.put("k", "v", None).await.expect("a put");
    let before = revision(&mut client).await;
    let put = |key: &str| TxnOp::put(key, "v", None);
    let puts = |n: usize| (0..n).map(|i| put(&format!("many{i}"))).collect::<Vec<_>>();
    let many = |n| (0..n).map(|_| Compare::version("k", CompareOp::Equal, 1)).collect::<Vec<_>>();
    let prefix = || Some(etcd_client::DeleteOptions::new().with_prefix());
    let nested = |ops: Vec<TxnOp>| TxnOp::txn(Txn::new().and_then(ops));
    let lease = Some(PutOptions::new().with_lease(UNKNOWN_LEASE));
    let ignore = Some(PutOptions::new().with_ignore_value());
    let future = Some(GetOptions::new().with_revision(before + 100));
    let then = |ops: Vec<TxnOp>| Txn::new().and_then(ops);
    let invalid = Code::InvalidArgument;
    let cases = [
        ("129 puts", then(puts(129)), invalid, TOO_MANY),
        ("129 in the other branch", Txn::new().or_else(puts(129)), invalid, TOO_MANY),
        ("129 compares", Txn::new().when(many(129)), invalid, TOO_MANY),
        ("129 nested", then(vec![nested(puts(129))]), invalid, TOO_MANY),
        ("one key twice", then(vec![put("a"), put("a")]), invalid, DUPLICATE),
        ("in the branch not taken", Txn::new().or_else([put("a"), put("a")]), invalid, DUPLICATE),
        (
            "put, then deleted",
            then(vec![put("ab"), TxnOp::delete("a", prefix())]),
            invalid,
            DUPLICATE,
        ),
        (
            "deleted, then put",
            then(vec![TxnOp::delete("a", prefix()), put("ab")]),
            invalid,
            DUPLICATE,
        ),
        ("twice through nesting", then(vec![put("a"), nested(vec![put("a")])]), invalid, DUPLICATE),
        ("a put without a key", then(vec![put("")]), invalid, NO_KEY),
        ("a range without a key", Txn::new().or_else([TxnOp::get("", None)]), invalid, NO_KEY),
        (
            "a compare without a key",
            Txn::new().when([Compare::version("", CompareOp::Equal, 0)]),
            invalid,
            NO_KEY,
        ),
        (
            "an unknown lease",
            then(vec![put("a"), TxnOp::put("b", "", lease)]),
            Code::NotFound,
            NO_LEASE,
        ),
        (
            "an absent value kept",
            then(vec![put("a"), TxnOp::put("b", "", ignore)]),
            invalid,
            KEY_NOT_FOUND,
        ),
        ("a future range", then(vec![put("a"), TxnOp::get("k", future)]), Code::OutOfRange, FUTURE),
    ];
    for (name, txn, code, text) in cases {
        let status = status_of(client.txn(txn).await);
        assert_eq!(status, (code, text.to_owned()), "{name}");
    }
    assert_eq!(revision(&mut client).await, before, "a refused transaction does nothing at all");

    client.txn(then(puts(128))).await.expect("128 are allowed");
    let twice = vec![TxnOp::delete("k", None), TxnOp::delete("k", None)];
    client.txn(then(twice)).await.expect("the same key may be deleted twice");
    let both = Txn::new().and_then([put("a")]).or_else([put("a")]);
    client.txn(both).await.expect("the same key may be in both branches");
    // A value compare of an absent key is false, whatever it asks.
    for compare in [CompareOp::NotEqual, CompareOp::Equal] {
        let absent = Txn::new().when([Compare::value("absent", compare, "")]);
        assert!(!client.txn(absent).await.expect("a transaction").succeeded());
    }
}

#[tokio::test]
async fn compaction() {
    let (_cluster, mut client) = one_member().await;
    for value in ["1", "2", "3"] {
        client.put("k", value, None).await.expect("a put");
    }
    let last = revision(&mut client).await;
    refused(client.compact(last + 1, None).await, Code::OutOfRange, FUTURE);
    let options = CompactionOptions::new().with_physical();
    client.compact(last - 1, Some(options)).await.expect("compacted");
    for again in [last - 1, 1, -1, 0] {
        refused(client.compact(again, None).await, Code::OutOfRange, COMPACTED);
    }
    let options = GetOptions::new().with_revision(last - 2);
    refused(client.get("k", Some(options)).await, Code::OutOfRange, COMPACTED);
    let options = GetOptions::new().with_revision(last - 1);
    let kept = client.get("k", Some(options)).await.expect("readable at the compacted revision");
    assert_eq!(kept.kvs()[0].value(), b"2");

    let options = WatchOptions::new().with_start_revision(last - 2);
    let mut watch = client.watch("k", Some(options)).await.expect("a stream");
    let mut next = async || {
        within(SOON, "an answer", watch.message()).await.expect("no error").expect("no end")
    };
    assert!(next().await.created());
    let cancelled = next().await;
    assert!(cancelled.canceled() && !cancelled.created(), "{cancelled:?}");
    assert_eq!((cancelled.compact_revision(), cancelled.cancel_reason()), (last - 1, ""));
}

#[tokio::test]
async fn watch_creation() {
    let (_cluster, mut client) = one_member().await;
    let cases = [
        (WatchOptions::new().with_range("a"), "mvcc: watcher range is empty"),
        (WatchOptions::new().with_start_revision(-1), COMPACTED),
    ];
    for (options, reason) in cases {
        let mut watch = client.watch("b", Some(options)).await.expect("a stream");
        let answer = within(SOON, "an answer", watch.message()).await;
        let answer = answer.expect("no error").expect("no end");
        assert!(answer.created() && answer.canceled(), "{answer:?}");
        assert_eq!((answer.watch_id(), answer.cancel_reason()), (-1, reason));
    }
    let mut watch =
        client.watch("a", Some(WatchOptions::new().with_watch_id(7))).await.expect("ok");
    let mut ids = Vec::new();
    watch.watch("b", Some(WatchOptions::new().with_watch_id(7))).await.expect("asked");
    let mut reason = String::new();
    for _ in 0..2 {
        let answer = within(SOON, "an answer", watch.message()).await;
        let answer = answer.expect("no error").expect("no end");
        ids.push((answer.watch_id(), answer.created(), answer.canceled()));
        reason = answer.cancel_reason().to_owned();
    }
    assert_eq!(ids, [(7, true, false), (-1, true, true)]);
    assert_eq!(reason, "mvcc: duplicate watch ID provided on the WatchStream");
}

#[tokio::test]
async fn lease() {
    let (cluster, mut client) = one_member().await;
    let answer = client.lease_grant(9_000_000_001, None).await;
    refused(answer, Code::OutOfRange, "etcdserver: too large lease TTL");
    let own = LeaseGrantOptions::new().with_id(77);
    client.lease_grant(60, Some(own.clone())).await.expect("a lease");
    let answer = client.lease_grant(60, Some(own.clone())).await;
    refused(answer, Code::FailedPrecondition, "etcdserver: lease already exists");
    // The TTL is looked at before the ID.
    let answer = client.lease_grant(9_000_000_001, Some(own)).await;
    refused(answer, Code::OutOfRange, "etcdserver: too large lease TTL");
    for ttl in [1, 0, -5] {
        assert_eq!(client.lease_grant(ttl, None).await.expect("raised").ttl(), 2);
    }
    for unknown in [UNKNOWN_LEASE, 0, -1] {
        refused(client.lease_revoke(unknown).await, Code::NotFound, NO_LEASE);
    }
    let left = client.lease_time_to_live(UNKNOWN_LEASE, None).await.expect("no error");
    assert_eq!((left.id(), left.ttl(), left.granted_ttl()), (UNKNOWN_LEASE, -1, 0));

    // Keeping an unknown lease alive is no error either, and the stream stays usable.
    let channel = raw::channel(&cluster.endpoint(0)).await;
    let (requests, receiver) = tokio::sync::mpsc::channel(4);
    let receiver = tokio_stream::wrappers::ReceiverStream::new(receiver);
    requests.send(KeepAliveRequest { id: UNKNOWN_LEASE }).await.expect("the stream takes it");
    let path = "/etcdserverpb.Lease/LeaseKeepAlive";
    let mut answers =
        raw::streaming::<_, KeepAliveResponse>(&channel, path, receiver).await.expect("a stream");
    let mut next = async || {
        within(SOON, "an answer", answers.message()).await.expect("no error").expect("no end")
    };
    assert_eq!(next().await, KeepAliveResponse { id: UNKNOWN_LEASE, ttl: 0 });
    requests.send(KeepAliveRequest { id: 77 }).await.expect("the stream takes it");
    assert_eq!(next().await, KeepAliveResponse { id: 77, ttl: 60 });
    drop(requests);
    assert_eq!(within(SOON, "the end", answers.message()).await.expect("a clean end"), None);
}

#[tokio::test]
async fn lock() {
    let (_cluster, mut client) = one_member().await;
    let options = LockOptions::new().with_lease(UNKNOWN_LEASE);
    refused(client.lock("name", Some(options)).await, Code::Unknown, NO_LEASE);
    refused(client.unlock("").await, Code::Unknown, NO_KEY);
    let before = revision(&mut client).await;
    client.unlock("name/absent").await.expect("an unknown key is no error");
    assert_eq!(revision(&mut client).await, before);
    let id = client.lease_grant(60, None).await.expect("a lease").id();
    let key = client.lock("", Some(LockOptions::new().with_lease(id))).await.expect("no name");
    assert_eq!(key.key(), format!("/{id:x}").as_bytes());
    let options = LeaseGrantOptions::new().with_id(-77);
    client.lease_grant(60, Some(options)).await.expect("a lease");
    let key = client.lock("n", Some(LockOptions::new().with_lease(-77))).await.expect("a lock");
    assert_eq!(key.key(), b"n/-4d");
}

#[tokio::test]
async fn a_lock_past_its_deadline_leaves_no_key() {
    let (cluster, mut client) = one_member().await;
    let (first, second) = (client.lease_grant(60, None).await, client.lease_grant(60, None).await);
    let (first, second) = (first.expect("a lease").id(), second.expect("a lease").id());
    client.lock("name", Some(LockOptions::new().with_lease(first))).await.expect("the lock");
    let channel = raw::channel(&cluster.endpoint(0)).await;
    let mut request = Request::new(raw::LockRequest { name: b"name".to_vec(), lease: second });
    request.set_timeout(Duration::from_millis(500));
    let path = "/v3lockpb.Lock/Lock";
    let answer = raw::unary_with::<_, raw::LockResponse>(&channel, path, request).await;
    // Whoever notices first, the client or the server, words it.
    let code = answer.expect_err("the lock is held").code();
    let expected = [Code::DeadlineExceeded, Code::Cancelled, Code::Unknown];
    assert!(expected.contains(&code), "{code:?}");
    let key = format!("name/{second:x}");
    holdfast_client_tests::eventually(SOON, "the waiter's key is gone", || {
        let (mut client, key) = (client.clone(), key.clone());
        async move { (client.get(key, None).await.expect("a range").count() == 0).then_some(()) }
    })
    .await;
}

#[tokio::test]
async fn election() {
    let (_cluster, mut client) = one_member().await;
    refused(client.campaign("job", "v", UNKNOWN_LEASE).await, Code::Unknown, NO_LEASE);
    refused(client.leader("job").await, Code::Unknown, "election: no leader");
    let no_field = "\"leader\" field must be provided";
    refused(client.proclaim("v", None).await, Code::Unknown, no_field);
    refused(client.resign(None).await, Code::Unknown, no_field);
    let proclaim = |key: LeaderKey| Some(ProclaimOptions::new().with_leader(key));
    let resign = |key: LeaderKey| Some(ResignOptions::new().with_leader(key));
    refused(client.proclaim("v", proclaim(LeaderKey::new())).await, Code::Unknown, NO_KEY);
    refused(client.resign(resign(LeaderKey::new())).await, Code::Unknown, NO_KEY);

    let id = client.lease_grant(60, None).await.expect("a lease").id();
    let won = client.campaign("job", "v", id).await.expect("elected");
    let leader = won.leader().expect("a leader key").clone();
    let before = revision(&mut client).await;
    // The same candidate with the same value: the same answer, and nothing written.
    let again = client.campaign("job", "v", id).await.expect("elected");
    assert_eq!(again.leader().expect("a leader key").rev(), leader.rev());
    assert_eq!(revision(&mut client).await, before);
    // With another value the key is rewritten, and the answer tells the create revision still.
    let other = client.campaign("job", "w", id).await.expect("elected");
    assert_eq!(other.header().expect("a header").revision(), leader.rev());
    assert_eq!(revision(&mut client).await, before + 1);

    let wrong = leader.clone().with_rev(leader.rev() + 1);
    refused(client.proclaim("x", proclaim(wrong.clone())).await, Code::Unknown, NOT_ELECTED);
    client.resign(resign(wrong)).await.expect("a wrong revision is no error");
    assert_eq!(client.leader("job").await.expect("still").kv().expect("a pair").value(), b"w");
    let stale = leader.clone().with_lease(UNKNOWN_LEASE);
    refused(client.proclaim("x", proclaim(stale)).await, Code::Unknown, NO_LEASE);
    client.resign(resign(leader.clone())).await.expect("resigned");
    refused(client.proclaim("x", proclaim(leader)).await, Code::Unknown, NOT_ELECTED);
    // Nobody leads, so nothing comes, and etcd does not even begin to answer.
    let nobody = async {
        let mut observer = client.observe("job").await.expect("a stream");
        observer.message().await
    };
    silent(Duration::from_millis(300), "nobody leads", nobody).await;
}

#[tokio::test]
async fn unknown_services_and_methods() {
    let (cluster, _client) = one_member().await;
    let channel = raw::channel(&cluster.endpoint(0)).await;
    let cases = [
        ("/etcdserverpb.KV/Nothing", "unknown method Nothing for service etcdserverpb.KV"),
        ("/nobody.Knows/This", "unknown service nobody.Knows"),
    ];
    for (path, text) in cases {
        let status = raw::unary::<_, AnyResponse>(&channel, path, AnyResponse {}).await;
        let status = status.expect_err("there is none");
        assert_eq!((status.code(), status.message()), (Code::Unimplemented, text));
    }
}
