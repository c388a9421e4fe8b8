//! The bytes of entries and of stored values.
//!
//! Each begins with a format byte; the rest is bincode with variable-length integers. Whoever keeps
//! or sends them puts a checksum around them. Decoding refuses what it does not understand with a
//! [`Fault`], never with a panic.

use std::cell::Cell;

use bincode::config::{Configuration, Limit};
use bincode::enc::write::SizeWriter;
use bytes::Bytes;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};

use super::holds::{ForcedRelease, Label};
use super::lease::Lease;
use super::state::{Meta, PublishedMember};
use super::{DIGEST_VERSION, Digest, Entry, Fault, Parts, Principal, Record, Txn, schema};
use crate::types::{LeaseId, Revision, Timestamp};

/// The format this code writes, and the only one so far but for those below.
const FORMAT: u8 = 1;
/// Of an entry in somebody's name, which stands behind the command.
const FORMAT_WITH_PRINCIPAL: u8 = 2;
/// Of the meta record, since it holds the digest.
const FORMAT_WITH_DIGEST: u8 = 2;

/// No entry and no stored value may be larger. It is also the most that a corrupt length can make
/// decoding allocate before it fails.
pub const LARGEST_VALUE_BYTES: usize = 64 * 1024 * 1024;

/// How deep transactions may nest in an entry; the outermost is at depth 1. Requests that arrive as
/// protobuf or JSON cannot nest deeper than 50.
pub const DEEPEST_TXN: usize = 64;

fn config()
-> Configuration<bincode::config::LittleEndian, bincode::config::Varint, Limit<LARGEST_VALUE_BYTES>>
{
    bincode::config::standard().with_limit()
}

impl Entry {
    /// The entry as it travels and as the log keeps it, in a buffer of exactly its size.
    pub fn encode(&self) -> Bytes {
        match &self.principal {
            None => encode_exactly(FORMAT, self),
            Some(principal) => encode_exactly(FORMAT_WITH_PRINCIPAL, &(self, principal)),
        }
    }

    /// The inverse of [`Entry::encode`]. The result shares no memory with `bytes`. `index` is the
    /// entry's place in the log, for the fault.
    ///
    /// # Errors
    ///
    /// [`Fault::Undecodable`] for anything that `encode` does not produce, and for transactions
    /// nested deeper than [`DEEPEST_TXN`].
    pub fn decode(index: u64, bytes: &[u8]) -> Result<Entry, Fault> {
        let decoded = if bytes.first() == Some(&FORMAT_WITH_PRINCIPAL) {
            let decoded = decode_as::<(Entry, Principal)>(FORMAT_WITH_PRINCIPAL, bytes);
            decoded.map(|(entry, principal)| Entry { principal: Some(principal), ..entry })
        } else {
            decode(bytes)
        };
        decoded.map_err(|reason| Fault::Undecodable { index, reason })
    }
}

/// In a buffer of exactly its size.
fn encode_exactly(format: u8, value: &impl Serialize) -> Bytes {
    let mut size = SizeWriter::default();
    bincode::serde::encode_into_writer(value, &mut size, config()).expect("counting never fails");
    encode_as(format, value, size.bytes_written).into()
}

thread_local! {
    static TXN_DEPTH: Cell<usize> = const { Cell::new(1) };
}

/// Decodes a transaction inside a transaction. Each level of nesting takes a few bytes of input and
/// a good deal of stack, so hostile bytes could overflow it: hence the limit.
pub(super) fn nested_txn<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Txn, D::Error> {
    struct Level;
    impl Drop for Level {
        fn drop(&mut self) {
            TXN_DEPTH.set(TXN_DEPTH.get() - 1);
        }
    }
    if TXN_DEPTH.get() >= DEEPEST_TXN {
        return Err(D::Error::custom("transactions are nested too deep"));
    }
    TXN_DEPTH.set(TXN_DEPTH.get() + 1);
    let _level = Level;
    Txn::deserialize(deserializer)
}

/// A record without its modification revision, which is in its key.
#[derive(Serialize, Deserialize)]
struct StoredRecord<'a> {
    #[serde(borrow, with = "serde_bytes")]
    key: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    value: &'a [u8],
    create_revision: i64,
    version: i64,
    lease: LeaseId,
}

pub(super) fn encode_record(record: &Record) -> Vec<u8> {
    let stored = StoredRecord {
        key: record.key(),
        value: record.value(),
        create_revision: record.create_revision(),
        version: record.version(),
        lease: record.lease(),
    };
    // Two lengths and three numbers, at most nine bytes each.
    encode(&stored, record.key().len() + record.value().len() + 45)
}

pub(super) fn decode_record(revision: Revision, bytes: &[u8]) -> Result<Record, Fault> {
    let stored: StoredRecord<'_> = decode_borrowed(bytes)
        .map_err(|reason| corrupt(format!("{}.{}", revision.main, revision.sub), reason))?;
    Ok(Record::new(Parts {
        key: stored.key,
        value: stored.value,
        create_revision: stored.create_revision,
        mod_revision: revision,
        version: stored.version,
        lease: stored.lease,
    }))
}

/// A lease without its keys.
#[derive(Serialize, Deserialize)]
struct StoredLease {
    ttl_seconds: i64,
    deadline: Timestamp,
    renewed_at_index: u64,
}

pub(super) fn encode_lease(lease: &Lease) -> Vec<u8> {
    let &Lease { ttl_seconds, deadline, renewed_at_index, keys: _ } = lease;
    encode(&StoredLease { ttl_seconds, deadline, renewed_at_index }, 27)
}

pub(super) fn decode_lease(key: &[u8], bytes: &[u8]) -> Result<(LeaseId, Lease), Fault> {
    let id = schema::lease_id(key).ok_or_else(|| bad_key("lease", key))?;
    let stored: StoredLease =
        decode(bytes).map_err(|reason| corrupt(format!("lease {id}"), reason))?;
    let StoredLease { ttl_seconds, deadline, renewed_at_index } = stored;
    Ok((id, Lease { ttl_seconds, deadline, renewed_at_index, keys: Default::default() }))
}

/// As releases before the digest wrote it, in format 1.
#[derive(Serialize, Deserialize)]
struct StoredMeta {
    revision: i64,
    compacted: i64,
    now: Timestamp,
}

/// In format 2.
#[derive(Serialize, Deserialize)]
struct StoredMetaAndDigest {
    meta: StoredMeta,
    digest_version: u32,
    digest: Option<Digest>,
}

pub(super) fn encode_meta(meta: &Meta) -> Vec<u8> {
    let &Meta { revision, compacted, now, digest } = meta;
    let meta = StoredMeta { revision, compacted, now };
    let stored = StoredMetaAndDigest { meta, digest_version: DIGEST_VERSION, digest };
    encode_as(FORMAT_WITH_DIGEST, &stored, 51)
}

pub(super) fn decode_meta(bytes: &[u8]) -> Result<Meta, Fault> {
    let decoded = match bytes.first() {
        Some(&FORMAT) => decode::<StoredMeta>(bytes).map(|meta| (meta, None)),
        _ => decode_as::<StoredMetaAndDigest>(FORMAT_WITH_DIGEST, bytes).map(|stored| {
            let comparable = stored.digest_version == DIGEST_VERSION;
            (stored.meta, stored.digest.filter(|_| comparable))
        }),
    };
    let (StoredMeta { revision, compacted, now }, digest) =
        decoded.map_err(|reason| corrupt("meta".into(), reason))?;
    Ok(Meta { revision, compacted, now, digest })
}

pub(super) fn encode_member(member: &PublishedMember) -> Vec<u8> {
    encode(member, 64)
}

pub(super) fn decode_member(bytes: &[u8]) -> Result<PublishedMember, Fault> {
    decode(bytes).map_err(|reason| corrupt("published member".into(), reason))
}

pub(super) fn encode_label(label: &Label) -> Vec<u8> {
    encode(label, 64)
}

pub(super) fn decode_label(bytes: &[u8]) -> Result<Label, Fault> {
    decode(bytes).map_err(|reason| corrupt("label of a queue key".into(), reason))
}

pub(super) fn encode_forced(forced: &ForcedRelease) -> Vec<u8> {
    encode(forced, 128)
}

pub(super) fn decode_forced(bytes: &[u8]) -> Result<ForcedRelease, Fault> {
    decode(bytes).map_err(|reason| corrupt("forced release".into(), reason))
}

pub(super) fn corrupt(what: String, reason: impl ToString) -> Fault {
    Fault::Corrupt { what, reason: reason.to_string() }
}

pub(super) fn bad_key(kind: &str, key: &[u8]) -> Fault {
    corrupt(format!("{kind} at {}", key.escape_ascii()), "the key has the wrong length")
}

pub(super) fn encode(value: &impl Serialize, expected_bytes: usize) -> Vec<u8> {
    encode_as(FORMAT, value, expected_bytes)
}

fn encode_as(format: u8, value: &impl Serialize, expected_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + expected_bytes);
    bytes.push(format);
    bincode::serde::encode_into_std_write(value, &mut bytes, config())
        .expect("memory takes all bytes, and the types are plain");
    bytes
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    decode_borrowed(bytes)
}

fn decode_borrowed<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, String> {
    decode_as(FORMAT, bytes)
}

fn decode_as<'de, T: Deserialize<'de>>(format: u8, bytes: &'de [u8]) -> Result<T, String> {
    let body = match bytes.split_first() {
        Some((found, body)) if *found == format => body,
        Some((format, _)) => return Err(format!("unknown format {format}")),
        None => return Err("no bytes".into()),
    };
    let (value, used) = bincode::serde::borrow_decode_from_slice(body, config())
        .map_err(|error| error.to_string())?;
    if used == body.len() {
        Ok(value)
    } else {
        Err(format!("{} bytes too many", body.len() - used))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::{Random, random_entry};
    use crate::machine::{Command, Origin, TxnOp};

    fn entry(command: Command) -> Entry {
        Entry { at: Timestamp(5), origin: Origin::default(), command, principal: None }
    }

    #[test]
    fn an_entry_survives_its_bytes() {
        let mut random = Random::new(1);
        for _ in 0..2000 {
            let entry = random_entry(&mut random);
            let bytes = entry.encode();
            assert_eq!(Entry::decode(1, &bytes).unwrap(), entry);
        }
    }

    #[test]
    fn damaged_entries_are_refused_without_a_panic() {
        let mut random = Random::new(2);
        for _ in 0..20_000 {
            let mut bytes = random_entry(&mut random).encode().to_vec();
            for _ in 0..=random.below(4) {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] = random.next() as u8;
            }
            bytes.truncate(random.below(bytes.len() as u64 + 1) as usize);
            let _ = Entry::decode(1, &bytes);
            let _ = decode_record(Revision::new(2, 0), &bytes);
            let _ = decode_lease(&schema::lease_key(LeaseId(1)), &bytes);
            let _ = decode_meta(&bytes);
            let _ = decode_member(&bytes);
            let _ = decode_label(&bytes);
            let _ = decode_forced(&bytes);
        }
        for _ in 0..50_000 {
            let length = random.below(64) as usize;
            let mut bytes: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
            bytes.insert(0, FORMAT);
            let _ = Entry::decode(1, &bytes);
        }
    }

    #[test]
    fn the_meta_of_releases_without_a_digest_is_read() {
        let now = Timestamp(7);
        let old = encode(&StoredMeta { revision: 5, compacted: -1, now }, 27);
        let meta = Meta { revision: 5, compacted: -1, now, digest: None };
        assert_eq!(decode_meta(&old).unwrap(), meta);
        let digest = Some(Digest { since: 3, value: u64::MAX });
        let meta = Meta { digest, ..meta };
        assert_eq!(decode_meta(&encode_meta(&meta)).unwrap(), meta);
        let foreign = StoredMetaAndDigest {
            meta: StoredMeta { revision: 5, compacted: -1, now },
            digest_version: DIGEST_VERSION + 1,
            digest,
        };
        let foreign = decode_meta(&encode_as(FORMAT_WITH_DIGEST, &foreign, 51)).unwrap();
        assert_eq!(foreign, Meta { digest: None, ..meta }, "another function does not compare");
        assert!(decode_meta(&[3, 0, 0, 0]).is_err());
    }

    #[test]
    fn bytes_that_are_left_over_are_refused() {
        let entry = entry(Command::Tick);
        let mut bytes = entry.encode().to_vec();
        bytes.push(0);
        assert!(matches!(Entry::decode(9, &bytes), Err(Fault::Undecodable { index: 9, .. })));
        assert!(Entry::decode(9, &[]).is_err());
    }

    #[test]
    fn transactions_nested_too_deep_are_refused() {
        let nested = |depth: usize| {
            let empty = || Txn { compares: vec![], success: vec![], failure: vec![] };
            let mut txn = empty();
            for _ in 1..depth {
                txn = Txn { success: vec![TxnOp::Txn(txn)], ..empty() };
            }
            entry(Command::Txn(txn)).encode()
        };
        Entry::decode(1, &nested(DEEPEST_TXN)).unwrap();
        Entry::decode(1, &nested(DEEPEST_TXN + 1)).unwrap_err();
        // The failure leaves nothing behind for the next entry.
        Entry::decode(1, &nested(DEEPEST_TXN)).unwrap();

        let mut hostile = nested(2).to_vec();
        let level = hostile.len();
        hostile.truncate(level - 3);
        let step = hostile[hostile.len() - 3..].to_vec();
        for _ in 0..100_000 {
            hostile.extend_from_slice(&step);
        }
        Entry::decode(1, &hostile).unwrap_err();
    }

    #[test]
    fn the_buffer_of_an_entry_has_its_size() {
        let mut random = Random::new(3);
        for _ in 0..100 {
            let bytes = random_entry(&mut random).encode().try_into_mut().expect("the only one");
            assert_eq!(bytes.len(), bytes.capacity());
        }
    }
}
