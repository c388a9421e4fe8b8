//! Puts, reads, and transactions on a few keys.

use std::time::Duration;

use bytes::Bytes;
use holdfast::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use holdfast::pb::etcdserverpb::kv_client::KvClient;
use holdfast::pb::etcdserverpb::{
    Compare, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest, request_op,
};
use rand::Rng;

use crate::client::Client;
use crate::record::{Answered, Asked};

const KEYS: usize = 4;

pub async fn kv(mut client: Client) {
    while !client.is_over() {
        let key = format!("kv/{}", client.dice.random_range(0..KEYS));
        match client.dice.random_range(0..10) {
            0..4 => put(&mut client, key).await,
            4 | 5 => swap(&mut client, key).await,
            6 => put_both(&mut client).await,
            7 => drop(read(&mut client, key, true).await),
            _ => drop(read(&mut client, key, false).await),
        }
        if client.dice.random_ratio(1, 8) {
            client.turn_to_any();
        }
        client.pause(Duration::from_millis(120)).await;
    }
}

/// Reads only, on one member after the other: it does not get stuck where nothing can be written.
pub async fn read_around(mut client: Client) {
    while !client.is_over() {
        let key = format!("kv/{}", client.dice.random_range(0..KEYS));
        let serializable = client.dice.random_ratio(1, 6);
        read(&mut client, key, serializable).await;
        if client.dice.random_ratio(1, 3) {
            client.turn_to_any();
        }
        client.pause(Duration::from_millis(80)).await;
    }
}

pub async fn put(client: &mut Client, key: String) {
    let value = client.unique();
    let request = put_request(&key, &value, 0);
    let mut kv = KvClient::new(client.channel());
    let asked = Asked::Put { key, value };
    client
        .call(asked, async { Ok((kv.put(request).await?.into_inner().header, Answered::Done)) })
        .await;
}

async fn put_both(client: &mut Client) {
    let keys = [0, 1].map(|n| format!("kv/{n}"));
    let value = client.unique();
    let puts = keys.iter().map(|key| op(put_request(key, &value, 0))).collect();
    let request = TxnRequest { success: puts, ..TxnRequest::default() };
    let mut kv = KvClient::new(client.channel());
    let asked = Asked::PutBoth { keys, value };
    client
        .call(asked, async { Ok((kv.txn(request).await?.into_inner().header, Answered::Done)) })
        .await;
}

async fn swap(client: &mut Client, key: String) {
    let Some(if_at) = read(client, key.clone(), false).await else { return };
    client.pause(Duration::from_millis(20)).await;
    let value = client.unique();
    let request = TxnRequest {
        compare: vec![Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: Bytes::from(key.clone()),
            target_union: Some(TargetUnion::ModRevision(if_at)),
            ..Compare::default()
        }],
        success: vec![op(put_request(&key, &value, 0))],
        failure: vec![],
    };
    let mut kv = KvClient::new(client.channel());
    let call = async {
        let answer = kv.txn(request).await?.into_inner();
        let done = if answer.succeeded { Answered::Done } else { Answered::Refused };
        Ok((answer.header, done))
    };
    client.call(Asked::Swap { key, value, if_at }, call).await;
}

/// The mod revision of the key, zero if it is absent, `None` without an answer.
async fn read(client: &mut Client, key: String, serializable: bool) -> Option<i64> {
    let request =
        RangeRequest { key: Bytes::from(key.clone()), serializable, ..RangeRequest::default() };
    let mut kv = KvClient::new(client.channel());
    let call = async {
        let RangeResponse { header, kvs, .. } = kv.range(request).await?.into_inner();
        let (mod_revision, value) = kvs.first().map_or((0, String::new()), |kv| {
            (kv.mod_revision, String::from_utf8_lossy(&kv.value).into_owned())
        });
        Ok((header, Answered::Found { mod_revision, value }))
    };
    let (answered, _) = client.call(Asked::Read { key, serializable }, call).await;
    match answered {
        Answered::Found { mod_revision, .. } => Some(mod_revision),
        _ => None,
    }
}

pub fn put_request(key: &str, value: &str, lease: i64) -> PutRequest {
    let (key, value) = (Bytes::from(key.to_owned()), Bytes::from(value.to_owned()));
    PutRequest { key, value, lease, ..PutRequest::default() }
}

pub fn op(put: PutRequest) -> RequestOp {
    RequestOp { request: Some(request_op::Request::RequestPut(put)) }
}
