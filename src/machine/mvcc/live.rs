//! The pairs that are there now, for the thread that writes.
//!
//! Every put asks what was there before. The index could tell, but in a long history that is a
//! dozen cache misses, most of what applying a put would cost.

use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::Roster;
use crate::machine::Record;

/// The newest record of each key that is not deleted.
#[derive(Default)]
pub struct Live {
    pairs: ByKey,
    /// The same keys, in order.
    roster: Roster,
}

impl Live {
    /// What `newest` holds and is no tombstone. `keys` are its keys, in order.
    pub fn loaded<'a>(newest: Newest, keys: impl Iterator<Item = &'a [u8]>) -> Live {
        let mut pairs = newest.0;
        pairs.table.retain(|(_, record)| !record.is_tombstone());
        Live { pairs, roster: Roster::of_sorted(keys) }
    }

    pub fn get(&self, key: &[u8]) -> Option<&Record> {
        self.pairs.get(key)
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.pairs.table.len()
    }

    /// The keys of all pairs. It changes only when a key comes or goes.
    pub fn roster(&self) -> &Roster {
        &self.roster
    }

    /// Notes the newest record of a key, which may be a tombstone. Returns whether the key came or
    /// went by it.
    pub fn note(&mut self, record: &Record) -> bool {
        if record.is_tombstone() {
            let went = self.pairs.remove(record.key());
            if went {
                self.roster.remove(record.key());
            }
            went
        } else {
            let came = self.pairs.replace(record).is_none();
            if came {
                self.roster.insert(record.key());
            }
            came
        }
    }
}

/// The newest record of each key while a store is read, tombstones among them.
#[derive(Default)]
pub struct Newest(ByKey);

impl Newest {
    /// Notes a record, and returns the one of the same key before it.
    pub fn replace(&mut self, record: &Record) -> Option<Record> {
        self.0.replace(record)
    }
}

/// A record for each of some keys. Never iterated: the order differs from member to member, what it
/// holds does not.
///
/// The hashes are kept. When a table of a million keys grows, it would otherwise look at each of them
/// in its record, a cache miss each, and the entry that makes it grow would take half a second.
#[derive(Default)]
struct ByKey {
    table: HashTable<(u64, Record)>,
    hashing: RandomState,
}

impl ByKey {
    fn get(&self, key: &[u8]) -> Option<&Record> {
        let hash = self.hashing.hash_one(key);
        self.table.find(hash, is(hash, key)).map(|(_, record)| record)
    }

    fn replace(&mut self, record: &Record) -> Option<Record> {
        let hash = self.hashing.hash_one(record.key());
        match self.table.entry(hash, is(hash, record.key()), |(hash, _)| *hash) {
            Entry::Occupied(mut place) => {
                Some(std::mem::replace(&mut place.get_mut().1, record.clone()))
            }
            Entry::Vacant(place) => {
                place.insert((hash, record.clone()));
                None
            }
        }
    }

    fn remove(&mut self, key: &[u8]) -> bool {
        let hash = self.hashing.hash_one(key);
        let found = self.table.find_entry(hash, is(hash, key));
        found.map(|place| place.remove()).is_ok()
    }
}

fn is(hash: u64, key: &[u8]) -> impl Fn(&(u64, Record)) -> bool {
    move |(other, record)| *other == hash && record.key() == key
}
