//! A hash of the key history, equal on every member that holds the same one.
//!
//! It covers what counts after the last compaction and nothing that waits for its removal, so how
//! far a member has scrubbed makes no difference.

use super::History;
use crate::machine::Record;
use crate::types::Revision;

/// The hash of a history, with what it was taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashKv {
    pub hash: u32,
    /// Hashes compare only when this is equal; -1: never compacted.
    pub compact_revision: i64,
    pub hash_revision: i64,
}

pub(super) fn hash_kv(history: &History, revision: i64, compacted: i64) -> HashKv {
    let mut hasher = Hasher::new();
    hasher.history(history, revision, compacted);
    let hash = hasher.finish();
    HashKv {
        hash: (hash ^ hash >> 32) as u32,
        compact_revision: compacted,
        hash_revision: revision,
    }
}

/// A 64-bit hash whose function never changes between builds. It finds accidents, not attacks.
pub struct Hasher(u64);

impl Hasher {
    pub fn new() -> Hasher {
        Hasher(0xcbf2_9ce4_8422_2325)
    }

    /// Goes on behind what gave `finished`.
    pub fn resume(finished: u64) -> Hasher {
        let mut hasher = Hasher::new();
        hasher.number(finished);
        hasher
    }

    pub fn number(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }

    /// Hashes the length as well, so that neighbouring fields cannot trade bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.number(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.number(u64::from_le_bytes(last));
    }

    /// Every record up to `revision` that survives a compaction at `compacted`.
    pub fn history(&mut self, history: &History, revision: i64, compacted: i64) {
        for record in history.records(Revision::default(), Revision::last_of(revision)) {
            if history.survives(&record, compacted) {
                self.record(&record);
            }
        }
    }

    fn record(&mut self, record: &Record) {
        self.bytes(record.key());
        self.bytes(record.value());
        self.number(record.create_revision() as u64);
        self.number(record.mod_revision().main as u64);
        self.number(u64::from(record.mod_revision().sub));
        self.number(record.version() as u64);
        self.number(record.lease().0 as u64);
    }

    pub fn finish(&self) -> u64 {
        let mixed = (self.0 ^ self.0 >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed ^ mixed >> 33
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(parts: &[&[u8]]) -> u64 {
        let mut hasher = Hasher::new();
        for part in parts {
            hasher.bytes(part);
        }
        hasher.finish()
    }

    #[test]
    fn bytes_do_not_move_between_fields_unnoticed() {
        assert_ne!(hash(&[b"ab", b"c"]), hash(&[b"a", b"bc"]));
        assert_ne!(hash(&[b"a\0"]), hash(&[b"a"]));
        assert_ne!(hash(&[b"12345678"]), hash(&[b"12345678", b""]));
    }

    #[test]
    fn the_function_never_changes() {
        assert_eq!(hash(&[b"holdfast", b"1", b"0123456789abcdef-"]), PINNED);
    }

    const PINNED: u64 = 3_114_005_462_374_019_271;
}
