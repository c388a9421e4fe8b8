//! What etcd keeps in its file: the state that a new cluster takes over.
//!
//! ```text
//! bucket "key"     revision -> KeyValue: one pair a change. The key is main (u64, big-endian), '_',
//!                  sub (u64), and 't' where the change was a delete
//! bucket "lease"   id (i64, big-endian) -> Lease
//! bucket "meta"    "scheduledCompactRev", "finishedCompactRev": a revision
//! buckets "auth", "authUsers", "authRoles", "alarm": not taken over
//! ```
//!
//! The newest change of each key is its state. Bucket and field names are etcd 3.5's and 3.6's.

use std::collections::BTreeMap;
use std::io::{Read, Seek};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;

use super::bolt::{Bolt, BoltError};
use crate::machine::{Parts, Record};
use crate::types::{LeaseId, Revision};

const REVISION_BYTES: usize = 17;
const TOMBSTONE_MARK: u8 = b't';

#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    #[error(transparent)]
    Bolt(#[from] BoltError),
    #[error("damaged at revision {revision}: {what}")]
    Record { revision: i64, what: &'static str },
    #[error("damaged in bucket {bucket}: {what}")]
    Bucket { bucket: &'static str, what: &'static str },
    #[error(
        "there is no bucket \"key\" with changes and none of metadata: this is no state of etcd"
    )]
    NoState,
}

/// etcd's newest state.
#[derive(Debug, Default)]
pub struct EtcdState {
    /// The newest that etcd has given out.
    pub revision: i64,
    pub records: BTreeMap<Bytes, Record>,
    pub leases: BTreeMap<LeaseId, EtcdLease>,
    /// Keys that named a lease which is not there; they are taken over without one.
    pub orphans: usize,
    pub left: Left,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EtcdLease {
    pub ttl_seconds: i64,
    /// What was left of it when etcd last wrote that down, else all of it.
    pub remaining: Duration,
}

/// What is in the file and is not taken over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Left {
    pub auth_enabled: bool,
    pub users: usize,
    pub roles: usize,
    pub alarms: usize,
}

/// etcd's `mvccpb.KeyValue`.
#[derive(Clone, PartialEq, Message)]
struct StoredKeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(int64, tag = "2")]
    create_revision: i64,
    #[prost(int64, tag = "3")]
    mod_revision: i64,
    #[prost(int64, tag = "4")]
    version: i64,
    #[prost(bytes = "bytes", tag = "5")]
    value: Bytes,
    #[prost(int64, tag = "6")]
    lease: i64,
}

/// etcd's `leasepb.Lease`.
#[derive(Clone, PartialEq, Message)]
struct StoredLease {
    #[prost(int64, tag = "1")]
    id: i64,
    #[prost(int64, tag = "2")]
    ttl_seconds: i64,
    #[prost(int64, tag = "3")]
    remaining_seconds: i64,
}

/// Reads the newest state out of `file`.
///
/// # Errors
///
/// Anything that etcd does not write.
pub fn read<R: Read + Seek>(file: &mut Bolt<R>) -> Result<EtcdState, EtcdError> {
    let mut state = EtcdState::default();
    let mut metadata = 0;
    file.read_bucket(b"meta", |key, value| {
        metadata += 1;
        if key == b"scheduledCompactRev" || key == b"finishedCompactRev" {
            let what = "a compacted revision of another length";
            let (revision, _) =
                parse_revision(value).ok_or(EtcdError::Bucket { bucket: "meta", what })?;
            state.revision = state.revision.max(revision.main);
        }
        Ok::<(), EtcdError>(())
    })?;
    read_keys(file, &mut state)?;
    if state.revision == 0 && metadata == 0 {
        return Err(EtcdError::NoState);
    }
    // An etcd without a write is at revision 1.
    state.revision = state.revision.max(1);
    read_leases(file, &mut state)?;
    let leases = &state.leases;
    for record in state.records.values_mut() {
        if !record.lease().is_none() && !leases.contains_key(&record.lease()) {
            *record = Record::new(Parts { lease: LeaseId::NONE, ..record.parts() });
            state.orphans += 1;
        }
    }
    state.left = read_left(file)?;
    Ok(state)
}

fn read_keys<R: Read + Seek>(file: &mut Bolt<R>, state: &mut EtcdState) -> Result<(), EtcdError> {
    let mut last = None;
    file.read_bucket(b"key", |key, value| {
        let what = "a revision of another form";
        let (revision, is_tombstone) =
            parse_revision(key).ok_or(EtcdError::Bucket { bucket: "key", what })?;
        let damaged = |what| EtcdError::Record { revision: revision.main, what };
        if last.is_some_and(|last| last >= revision) {
            return Err(damaged("revisions out of order"));
        }
        last = Some(revision);
        state.revision = state.revision.max(revision.main);
        if value.is_empty() {
            // What etcd's own restore writes to skip revisions.
            return Ok(());
        }
        let stored = StoredKeyValue::decode(value).map_err(|_| damaged("not a key and a value"))?;
        if is_tombstone {
            state.records.remove(&stored.key);
            return Ok(());
        }
        let record = record(revision, stored).ok_or_else(|| damaged("numbers that cannot be"))?;
        state.records.insert(Bytes::copy_from_slice(record.key()), record);
        Ok(())
    })
}

/// `None` when its numbers contradict each other.
fn record(revision: Revision, stored: StoredKeyValue) -> Option<Record> {
    let StoredKeyValue { key, create_revision, mod_revision, version, value, lease } = stored;
    let is_one = mod_revision == revision.main
        && (1..=mod_revision).contains(&create_revision)
        && version >= 1
        && !key.is_empty();
    is_one.then(|| {
        Record::new(Parts {
            key: &key,
            value: &value,
            create_revision,
            mod_revision: revision,
            version,
            lease: LeaseId(lease),
        })
    })
}

fn read_leases<R: Read + Seek>(file: &mut Bolt<R>, state: &mut EtcdState) -> Result<(), EtcdError> {
    let damaged = |what| EtcdError::Bucket { bucket: "lease", what };
    file.read_bucket(b"lease", |_, value| {
        let stored = StoredLease::decode(value).map_err(|_| damaged("not a lease"))?;
        let StoredLease { id, ttl_seconds, remaining_seconds } = stored;
        if id == 0 || ttl_seconds < 1 || remaining_seconds < 0 {
            return Err(damaged("a lease with numbers that cannot be"));
        }
        let remaining = if remaining_seconds > 0 { remaining_seconds } else { ttl_seconds };
        let remaining = Duration::from_secs(remaining.unsigned_abs());
        state.leases.insert(LeaseId(id), EtcdLease { ttl_seconds, remaining });
        Ok(())
    })
}

fn read_left<R: Read + Seek>(file: &mut Bolt<R>) -> Result<Left, BoltError> {
    let mut left = Left::default();
    file.read_bucket(b"auth", |key, value| {
        left.auth_enabled |= key == b"authEnabled" && value == [1];
        Ok::<(), BoltError>(())
    })?;
    let mut count = |bucket: &[u8], number: &mut usize| {
        file.read_bucket(bucket, |_, _| {
            *number += 1;
            Ok::<(), BoltError>(())
        })
    };
    count(b"authUsers", &mut left.users)?;
    count(b"authRoles", &mut left.roles)?;
    count(b"alarm", &mut left.alarms)?;
    Ok(left)
}

/// The revision, and whether it is a tombstone's.
fn parse_revision(bytes: &[u8]) -> Option<(Revision, bool)> {
    let (revision, mark) = bytes.split_at_checked(REVISION_BYTES)?;
    let is_tombstone = match mark {
        [] => false,
        [TOMBSTONE_MARK] => true,
        _ => return None,
    };
    let (main, rest) = revision.split_first_chunk::<8>()?;
    let sub = rest.strip_prefix(b"_")?;
    let main = i64::try_from(u64::from_be_bytes(*main)).ok()?;
    let sub = u32::try_from(u64::from_be_bytes(sub.try_into().ok()?)).ok()?;
    Some((Revision::new(main, sub), is_tombstone))
}
