//! Fenced writes by any client.

use tonic::{Code, Request, Status};

use super::*;
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::request_op::Request as Op;
use crate::pb::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use crate::pb::v3lockpb::lock_client::LockClient;
use crate::pb::v3lockpb::{LockRequest, UnlockRequest};

fn with<T>(fences: &[&str], message: T) -> Request<T> {
    let mut request = Request::new(message);
    for fence in fences {
        request.metadata_mut().append("holdfast-fence", fence.parse().unwrap());
    }
    request
}

fn put() -> PutRequest {
    PutRequest { key: "k".into(), value: "v".into(), ..Default::default() }
}

fn said(status: &Status) -> (Code, &str) {
    (status.code(), status.message())
}

const STALE: (Code, &str) = (Code::FailedPrecondition, "holdfast: stale fencing token");

#[tokio::test]
async fn writes_go_through_while_the_lock_is_held_and_are_refused_after() {
    let cluster = cluster(1, &[]).await;
    let channel = cluster[0].connect().await;
    let (mut kv, mut locks) = (KvClient::new(channel.clone()), LockClient::new(channel));
    let lock = LockRequest { name: "a=b".into(), lease: 0 };
    let held = locks.lock(lock).await.unwrap();
    let token: i64 =
        held.metadata().get("holdfast-fence").unwrap().to_str().unwrap().parse().unwrap();
    let fence = format!("a=b={token}");
    let fences = [fence.as_str()];
    let read = || {
        let op = Op::RequestRange(RangeRequest { key: "k".into(), ..Default::default() });
        let success = vec![RequestOp { request: Some(op) }];
        TxnRequest { success, ..Default::default() }
    };
    let delete = || DeleteRangeRequest { key: "k".into(), ..Default::default() };

    kv.put(with(&fences, put())).await.unwrap();
    let mut binary = Request::new(put());
    let value = tonic::metadata::MetadataValue::from_bytes(fence.as_bytes());
    binary.metadata_mut().insert_bin("holdfast-fence-bin", value);
    kv.put(binary).await.unwrap();
    assert!(kv.txn(with(&fences, read())).await.unwrap().into_inner().succeeded);
    assert_eq!(kv.delete_range(with(&fences, delete())).await.unwrap().into_inner().deleted, 1);
    // One that does not hold is enough.
    let both = [fence.as_str(), "other=1"];
    assert_eq!(said(&kv.put(with(&both, put())).await.unwrap_err()), STALE);
    let malformed = kv.put(with(&["a"], put())).await.unwrap_err();
    assert_eq!(malformed.code(), Code::InvalidArgument);
    assert!(malformed.message().starts_with("holdfast: malformed fence"), "{malformed}");

    locks.unlock(UnlockRequest { key: held.into_inner().key }).await.unwrap();
    let revision = cluster[0].node().store().revision();
    assert_eq!(said(&kv.put(with(&fences, put())).await.unwrap_err()), STALE);
    assert_eq!(said(&kv.delete_range(with(&fences, delete())).await.unwrap_err()), STALE);
    assert_eq!(said(&kv.txn(with(&fences, read())).await.unwrap_err()), STALE);
    assert_eq!(cluster[0].node().store().revision(), revision, "nothing was written");
    kv.put(put()).await.expect("without a fence it is an ordinary write");
}
