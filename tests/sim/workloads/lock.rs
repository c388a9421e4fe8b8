//! Holders of one lock: each waits, writes what its token guards, and lets go, or dies with it.

use std::time::Duration;

use bytes::Bytes;
use holdfast::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use holdfast::pb::etcdserverpb::kv_client::KvClient;
use holdfast::pb::etcdserverpb::{Compare, RangeRequest, TxnRequest};
use holdfast::pb::v3lockpb::lock_client::LockClient;
use holdfast::pb::v3lockpb::{LockRequest, UnlockRequest};
use rand::Rng;

use super::kv::{op, put_request};
use super::lease::{grant, keep_alive};
use crate::client::Client;
use crate::record::{Answered, Asked};

const NAME: &str = "locks/one";
/// Waiting for a lock takes as long as others hold it.
const PATIENCE: Duration = Duration::from_secs(12);

pub async fn locks(mut client: Client) {
    while !client.is_over() {
        let ttl_seconds = client.dice.random_range(2..6);
        let Some(lease) = grant(&mut client, ttl_seconds).await else { continue };
        let Some(owner) = lock(&mut client, lease).await else { continue };
        if let Some(token) = token(&mut client, &owner).await {
            for _ in 0..client.dice.random_range(1..4) {
                guarded(&mut client, &owner, token).await;
                client.pause(Duration::from_millis(300)).await;
            }
        }
        if client.dice.random_ratio(1, 3) {
            keep_alive(&mut client, lease).await;
        }
        // One that does not let go is found out by its lease.
        if client.dice.random_ratio(3, 4) {
            unlock(&mut client, owner).await;
        }
        client.pause(Duration::from_millis(400)).await;
    }
}

async fn lock(client: &mut Client, lease: i64) -> Option<String> {
    let mut locks = LockClient::new(client.channel());
    let call = async {
        let request = LockRequest { name: Bytes::from_static(NAME.as_bytes()), lease };
        let locked = locks.lock(request).await?.into_inner();
        let key = String::from_utf8_lossy(&locked.key).into_owned();
        Ok((locked.header, Answered::Locked { key }))
    };
    let asked = Asked::Lock { name: NAME.to_owned(), lease };
    match client.call_within(PATIENCE, asked, call).await.0 {
        Answered::Locked { key } => Some(key),
        _ => None,
    }
}

/// The create revision of the holder's key.
async fn token(client: &mut Client, owner: &str) -> Option<i64> {
    let request = RangeRequest { key: Bytes::from(owner.to_owned()), ..RangeRequest::default() };
    let mut kv = KvClient::new(client.channel());
    let mut token = None;
    let call = async {
        let found = kv.range(request).await?.into_inner();
        token = found.kvs.first().map(|kv| kv.create_revision);
        let mod_revision = found.kvs.first().map_or(0, |kv| kv.mod_revision);
        Ok((found.header, Answered::Found { mod_revision, value: String::new() }))
    };
    client.call(Asked::Read { key: owner.to_owned(), serializable: false }, call).await;
    token
}

async fn guarded(client: &mut Client, owner: &str, token: i64) {
    let (key, value) = ("guarded".to_owned(), client.unique());
    let request = TxnRequest {
        compare: vec![Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Create.into(),
            key: Bytes::from(owner.to_owned()),
            target_union: Some(TargetUnion::CreateRevision(token)),
            ..Compare::default()
        }],
        success: vec![op(put_request(&key, &value, 0))],
        failure: vec![],
    };
    let mut kv = KvClient::new(client.channel());
    let call = async {
        let answer = kv.txn(request).await?.into_inner();
        Ok((answer.header, if answer.succeeded { Answered::Done } else { Answered::Refused }))
    };
    client.call(Asked::Guarded { key, value, owner: owner.to_owned(), token }, call).await;
}

async fn unlock(client: &mut Client, key: String) {
    let mut locks = LockClient::new(client.channel());
    let request = UnlockRequest { key: Bytes::from(key.clone()) };
    let call = async { Ok((locks.unlock(request).await?.into_inner().header, Answered::Done)) };
    client.call(Asked::Unlock { key }, call).await;
}
