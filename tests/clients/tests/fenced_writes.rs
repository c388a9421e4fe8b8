//! Writes that carry a fencing token: `holdfast-fence: NAME=TOKEN`.
//!
//! etcd knows nothing of the header and writes whatever it says, which is what the tests expect of it.

use std::fmt::Debug;

use bytes::Bytes;
use holdfast_client_tests::check::{Code, SOON};
use holdfast_client_tests::raw::{self, LockRequest, LockResponse};
use holdfast_client_tests::wire::{
    DeleteRangeRequest, PutRequest, RangeRequest, TxnRequest, Wire, Written, put_op,
};
use holdfast_client_tests::{Cluster, target_is_etcd, within};
use tonic::{Request, Response, Status};

fn fenced<Q>(fences: &[&str], message: Q) -> Request<Q> {
    let mut request = Request::new(message);
    for fence in fences {
        let value = fence.parse().expect("printable");
        request.metadata_mut().append("holdfast-fence", value);
    }
    request
}

/// The three kinds of writes, each with these fences and each to a key of its own, which are deleted
/// or written when they succeed.
async fn write(
    wire: &Wire,
    fences: &[&str],
    value: &str,
) -> Vec<Result<Response<Written>, Status>> {
    let value = Bytes::copy_from_slice(value.as_bytes());
    let put = PutRequest { key: "data/put".into(), value: value.clone(), lease: 0 };
    let delete = DeleteRangeRequest { key: "data/delete".into(), range_end: Bytes::new() };
    let txn = TxnRequest { success: vec![put_op("data/txn", value)], ..TxnRequest::default() };
    let channel = wire.channel();
    vec![
        raw::unary_with(channel, "/etcdserverpb.KV/Put", fenced(fences, put)).await,
        raw::unary_with(channel, "/etcdserverpb.KV/DeleteRange", fenced(fences, delete)).await,
        raw::unary_with(channel, "/etcdserverpb.KV/Txn", fenced(fences, txn)).await,
    ]
}

/// What is there now: the keys with their values.
async fn data(wire: &Wire) -> Vec<(Bytes, Bytes)> {
    let range =
        RangeRequest { key: "data/".into(), range_end: "data0".into(), ..RangeRequest::default() };
    let answer = wire.range(range).await.expect("a range");
    answer.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect()
}

fn pairs(pairs: &[(&'static str, &str)]) -> Vec<(Bytes, Bytes)> {
    pairs.iter().map(|(k, v)| (Bytes::from(*k), Bytes::copy_from_slice(v.as_bytes()))).collect()
}

#[track_caller]
fn all_refused<T: Debug>(answers: Vec<Result<T, Status>>, code: Code, starts: &str) {
    for answer in answers {
        if target_is_etcd() {
            answer.expect("etcd passes over the header");
            continue;
        }
        let status = answer.expect_err("refused");
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().starts_with(starts), "{status:?}");
    }
}

async fn lock(wire: &Wire, name: &str) -> (Bytes, i64) {
    let lease = wire.lease_grant(60, 0).await.expect("a lease").id;
    let request = LockRequest { name: name.as_bytes().to_vec(), lease };
    let path = "/v3lockpb.Lock/Lock";
    let answer = raw::unary::<_, LockResponse>(wire.channel(), path, request);
    let answer = within(SOON, "the lock", answer).await.expect("granted").into_inner();
    let key = Bytes::from(answer.key);
    let range = RangeRequest { key: key.clone(), ..RangeRequest::default() };
    let kvs = wire.range(range).await.expect("a range").kvs;
    (key, kvs[0].create_revision)
}

#[tokio::test]
async fn only_the_present_holder_writes_on_whichever_member() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let mut members = vec![leader];
    members.extend(cluster.others(leader));
    for (round, member) in members.into_iter().enumerate() {
        let wire = Wire::connect(&cluster.endpoint(member)).await;
        let name = format!("jobs=x/{round}");
        wire.put("data/delete", "old").await.expect("a put");

        let (key, first) = lock(&wire, &name).await;
        let current = format!("{name}={first}");
        for answer in write(&wire, &[&current], "first").await {
            answer.expect("the holder writes");
        }
        let written = [("data/put", "first"), ("data/txn", "first")];
        assert_eq!(data(&wire).await, pairs(&written), "the delete was done too");

        // A second holder; the first goes on without having noticed.
        wire.delete(key, Bytes::new()).await.expect("a delete");
        all_refused(write(&wire, &[&current], "nobody").await, Code::FailedPrecondition, STALE);
        let (_, second) = lock(&wire, &name).await;
        assert!(second > first);
        wire.put("data/delete", "old").await.expect("a put");
        let next = format!("{name}={second}");
        let future = format!("{name}={}", second + 1000);
        let elsewhere = format!("other={second}");
        for fences in [
            &[current.as_str()][..],
            &[&future],
            &[&elsewhere],
            &[&next, &current],
            &[&current, &next],
        ] {
            all_refused(write(&wire, fences, "stale").await, Code::FailedPrecondition, STALE);
        }
        if !target_is_etcd() {
            let untouched = [("data/delete", "old"), ("data/put", "first"), ("data/txn", "first")];
            assert_eq!(data(&wire).await, pairs(&untouched), "a refused write leaves nothing");
        }
        for answer in write(&wire, &[&next], "second").await {
            answer.expect("the next holder writes");
        }
        let written = [("data/put", "second"), ("data/txn", "second")];
        assert_eq!(data(&wire).await, pairs(&written));
    }
}

const STALE: &str = "holdfast: stale fencing token";

#[tokio::test]
async fn what_is_no_fence_is_refused_and_writes_nothing() {
    let cluster = Cluster::start(1).await;
    let wire = Wire::connect(&cluster.endpoint(0)).await;
    let (_, token) = lock(&wire, "jobs").await;
    let good = format!("jobs={token}");
    for bad in ["", "jobs", "jobs=", "=", "jobs=0", "jobs=-1", "jobs=+1", "jobs=0x7", "jobs=1e3"] {
        all_refused(write(&wire, &[bad], "bad").await, Code::InvalidArgument, "holdfast: ");
        all_refused(write(&wire, &[&good, bad], "bad").await, Code::InvalidArgument, "holdfast: ");
    }
    let too_many = vec![good.as_str(); 17];
    all_refused(write(&wire, &too_many, "bad").await, Code::InvalidArgument, "holdfast: ");
    if !target_is_etcd() {
        assert_eq!(data(&wire).await, []);
    }
    for answer in write(&wire, &too_many[..16], "good").await {
        answer.expect("sixteen are not too many");
    }
    assert_eq!(data(&wire).await, pairs(&[("data/put", "good"), ("data/txn", "good")]));
}

/// And whoever sends no fence is not asked for one.
#[tokio::test]
async fn a_token_ends_with_its_lease() {
    let cluster = Cluster::start(1).await;
    let wire = Wire::connect(&cluster.endpoint(0)).await;
    let (key, token) = lock(&wire, "jobs").await;
    let fence = format!("jobs={token}");
    let hex = key.rsplit(|b| *b == b'/').next().expect("a lease");
    let hex = std::str::from_utf8(hex).expect("text");
    let lease = i64::from_str_radix(hex, 16).expect("hexadecimal");
    wire.lease_revoke(lease).await.expect("a revoke");
    all_refused(write(&wire, &[&fence], "late").await, Code::FailedPrecondition, STALE);
    // Made anew by hand, with the same name but another create revision.
    wire.put(key, "forged").await.expect("a put");
    all_refused(write(&wire, &[&fence], "forged").await, Code::FailedPrecondition, STALE);
    for answer in write(&wire, &[], "plain").await {
        answer.expect("whoever does not ask is not refused");
    }
}
