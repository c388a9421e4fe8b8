//! What the keys alone tell of locks, for clusters that have no better service.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::LIMIT;
use crate::cli::session::SessionError;
use crate::cli::session::endpoints::Endpoints;
use crate::pb::etcdserverpb::RangeRequest;
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::holdfastpb::{Lock, Place};
use crate::pb::mvccpb::KeyValue;

/// Keys in one answer.
const PAGE: i64 = 1_000;

pub fn say() {
    eprintln!(
        "holdfast: the members have no holdfast.v1.Locks: inferred from keys, without owners and times"
    );
}

pub async fn get(endpoints: &mut Endpoints, name: &str) -> Result<Lock, SessionError> {
    let locks = locks(read(endpoints, &format!("{name}/")).await?);
    let found = locks.into_iter().find(|lock| lock.name == name);
    Ok(found.unwrap_or_else(|| Lock { name: name.to_owned().into(), ..Lock::default() }))
}

pub async fn list(endpoints: &mut Endpoints, prefix: &str) -> Result<Vec<Lock>, SessionError> {
    let mut locks = locks(read(endpoints, prefix).await?);
    locks.retain(|lock| lock.name.starts_with(prefix.as_bytes()));
    Ok(locks)
}

/// The keys that begin with `prefix` and stand in a queue, read page by page.
async fn read(endpoints: &mut Endpoints, prefix: &str) -> Result<Vec<KeyValue>, SessionError> {
    let mut key =
        if prefix.is_empty() { Bytes::from_static(&[0]) } else { prefix.to_owned().into() };
    let range_end = end_of(prefix.as_bytes());
    let mut found = Vec::new();
    loop {
        let page = endpoints.ask(LIMIT, |channel| {
            let (key, range_end) = (key.clone(), range_end.clone());
            let request =
                RangeRequest { key, range_end, limit: PAGE, keys_only: true, ..Default::default() };
            async move { KvClient::new(channel).range(request).await }
        });
        let page = page.await?;
        let last = page.kvs.last().map(|last| last.key.clone());
        found.extend(page.kvs.into_iter().filter(|found| name_of(found).is_some()));
        match last {
            Some(last) if page.more => key = [&last[..], &[0]].concat().into(),
            _ => return Ok(found),
        }
    }
}

/// The first key after all that begin with `prefix`; one zero byte when there is none.
fn end_of(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(&[0])
}

/// The name of the lock in whose queue this key stands.
fn name_of(found: &KeyValue) -> Option<Bytes> {
    let slash = found.key.iter().rposition(|byte| *byte == b'/')?;
    let named = std::str::from_utf8(&found.key[slash + 1..]).ok()?;
    let stands = found.lease != 0 && slash > 0 && named == format!("{:x}", found.lease);
    stands.then(|| found.key.slice(..slash))
}

fn locks(found: Vec<KeyValue>) -> Vec<Lock> {
    let mut queues: BTreeMap<Bytes, Vec<KeyValue>> = BTreeMap::new();
    for found in found {
        if let Some(name) = name_of(&found) {
            queues.entry(name).or_default().push(found);
        }
    }
    let lock = |(name, mut queue): (Bytes, Vec<KeyValue>)| {
        queue.sort_by_key(|found| found.create_revision);
        let mut places = (0..).zip(queue).map(|(position, found)| Place {
            position,
            key: found.key,
            token: found.create_revision,
            lease: found.lease,
            live: true,
            inferred: true,
            ..Place::default()
        });
        let holder = places.next();
        let waiters: Vec<Place> = places.collect();
        let waiting = i64::try_from(waiters.len()).unwrap_or(i64::MAX);
        Lock { name, holder, waiters, waiting, forced: Vec::new() }
    };
    queues.into_iter().map(lock).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(key: &'static str, create_revision: i64, lease: i64) -> KeyValue {
        KeyValue { key: key.into(), create_revision, lease, ..KeyValue::default() }
    }

    #[test]
    fn only_keys_that_name_their_lease_stand_in_a_queue() {
        let found = vec![
            key("a/1f", 12, 0x1f),
            key("a/2f", 9, 0x2f),
            key("a/3", 4, 5),
            key("a/b", 4, 0),
            key("b/c/1f", 6, 0x1f),
            key("/1f", 7, 0x1f),
            key("1f", 8, 0x1f),
        ];
        let locks = locks(found);
        let told: Vec<(&[u8], i64, i64)> = locks
            .iter()
            .map(|lock| (&lock.name[..], lock.holder.as_ref().unwrap().token, lock.waiting))
            .collect();
        assert_eq!(told, [(&b"a"[..], 9, 1), (&b"b/c"[..], 6, 0)]);
    }

    #[test]
    fn a_prefix_ends_where_its_last_byte_does() {
        assert_eq!(end_of(b"a/"), &b"a0"[..]);
        assert_eq!(end_of(b"a\xff"), &b"b"[..]);
        assert_eq!(end_of(b""), &b"\0"[..]);
    }
}
