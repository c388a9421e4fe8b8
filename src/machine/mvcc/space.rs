//! How much the history takes, counted as it changes.
//!
//! Counted is what a compaction leaves, from the moment it is applied, whether or not the rest has
//! been removed by then. So all members count alike, and a compaction gives its space back at once.
//! That takes no walk: the journal keeps with each record how much all records up to it have made
//! *obsolete*, that is, what a compaction right there would remove.
//!
//! ```text
//! a@2  b@3  a@5  b@6†  c@7          † tombstone
//!  0    0   a@2  a@2   a@2
//!                b@3   b@3
//!                      b@6          obsolete only behind its own revision
//! ```

use super::chain::{Chain, Chains};
use super::{History, Live};
use crate::machine::{Record, Rejection};
use crate::types::Revision;

/// What a record takes beside its key and value: its places in the index and the journal, its
/// numbers, and its pair in the engine. About what was measured; etcd counts as much.
pub const RECORD_OVERHEAD_BYTES: u64 = 256;

/// The account of one history, for the thread that writes it.
#[derive(Debug, Default)]
pub struct Space {
    /// All records that were ever added here.
    added_bytes: u64,
    /// Those of them that a compaction at `revision` would remove.
    obsolete_bytes: u64,
    /// The main revision of the newest record.
    revision: i64,
    /// Tombstones of that revision that were not written over in it: a compaction at the next one
    /// would remove them, too.
    tombstone_bytes: u64,
    /// What the last compaction removed, or will.
    compacted_bytes: u64,
}

impl Space {
    /// Counts `record`, which comes after all that were counted. `before` is the record of the same
    /// key before it, which may be left out if it is a tombstone of an earlier revision. Returns what
    /// is to be kept with the record in the journal.
    pub fn add(&mut self, record: &Record, before: Option<&Record>) -> u64 {
        let main = record.mod_revision().main;
        if main != self.revision {
            self.obsolete_bytes += std::mem::take(&mut self.tombstone_bytes);
            self.revision = main;
        }
        if let Some(before) = before {
            if !before.is_tombstone() {
                self.obsolete_bytes += weight_bytes(before);
            } else if before.mod_revision().main == main {
                self.tombstone_bytes -= weight_bytes(before);
                self.obsolete_bytes += weight_bytes(before);
            }
        }
        let weight_bytes = weight_bytes(record);
        self.added_bytes += weight_bytes;
        if record.is_tombstone() {
            self.tombstone_bytes += weight_bytes;
        }
        self.obsolete_bytes
    }

    /// Whether a key that is not there may have been deleted in the revision `main`.
    pub fn has_tombstones_of(&self, main: i64) -> bool {
        self.revision == main && self.tombstone_bytes > 0
    }

    /// What a compaction at `revision` removes, where no record of a later one was counted yet.
    pub fn obsolete_at(&self, revision: i64) -> u64 {
        let tombstone_bytes = if revision > self.revision { self.tombstone_bytes } else { 0 };
        self.obsolete_bytes + tombstone_bytes
    }

    /// Counts a compaction that removes `obsolete_bytes` of all that was added.
    pub fn compact(&mut self, obsolete_bytes: u64) {
        self.compacted_bytes = obsolete_bytes;
    }

    /// What counts of the history now.
    pub fn used_bytes(&self) -> u64 {
        self.added_bytes - self.compacted_bytes
    }
}

/// Takes the records of a store in their order, counts them, and makes the history of them.
pub struct Loading<'a> {
    history: &'a History,
    space: &'a mut Space,
    chains: Chains,
    /// The same, to be put in order.
    keys: Vec<Chain>,
    /// What the compaction that the store has seen has made obsolete, once its end is passed.
    compacted_bytes: Option<u64>,
}

impl Loading<'_> {
    /// Adds the next record.
    pub fn insert(&mut self, record: Record) {
        if record.mod_revision().main > self.history.compacted() {
            self.pass_compacted();
        }
        let (chain, before) = match self.chains.get(record.key()) {
            Some(chain) => (chain.clone(), chain.last()),
            None => {
                let chain = Chain::new(record.key());
                self.chains.add(chain.clone());
                self.keys.push(chain.clone());
                (chain, None)
            }
        };
        let obsolete_bytes = self.space.add(&record, before.as_ref());
        chain.push(record.clone());
        self.history.journal.insert(record, obsolete_bytes);
    }

    /// Returns the pairs that are there, and in order of their keys the newest record of each.
    pub fn finish(mut self) -> (Live, Vec<Record>) {
        self.pass_compacted();
        self.space.compact(self.compacted_bytes.unwrap_or(0));
        let mut keys = sorted(self.keys);
        // Nobody reads yet. Each goes to the one end, where its place is found without a search.
        for chain in keys.iter().rev() {
            self.history.index.adopt(chain.clone());
        }
        keys.retain(|chain| chain.last().is_some_and(|record| !record.is_tombstone()));
        let pairs = keys.iter().filter_map(Chain::last).collect();
        (Live::loaded(self.chains, &keys), pairs)
    }

    fn pass_compacted(&mut self) {
        let obsolete_bytes = self.space.obsolete_at(self.history.compacted());
        self.compacted_bytes.get_or_insert(obsolete_bytes);
    }
}

/// In order of their keys.
fn sorted(chains: Vec<Chain>) -> Vec<Chain> {
    let mut keys = chains.iter().map(Chain::key);
    let first = keys.next().unwrap_or_default();
    let common = keys.fold(first.len(), |common, key| {
        first[..common].iter().zip(key).take_while(|(a, b)| a == b).count()
    });
    // Most keys differ in the first bytes that not all have in common, and these need no look at the
    // whole.
    let mut sorted: Vec<(u64, Chain)> =
        chains.into_iter().map(|chain| (first_bytes(&chain.key()[common..]), chain)).collect();
    sorted.sort_unstable();
    sorted.into_iter().map(|(_, chain)| chain).collect()
}

/// A number that orders as the first bytes of `key` do, as far as they differ.
fn first_bytes(key: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let length = key.len().min(bytes.len());
    bytes[..length].copy_from_slice(&key[..length]);
    u64::from_be_bytes(bytes)
}

impl History {
    /// Begins to read the records of a store.
    pub fn loading<'a>(&'a self, space: &'a mut Space) -> Loading<'a> {
        let (chains, keys) = Default::default();
        Loading { history: self, space, chains, keys, compacted_bytes: None }
    }

    /// [`History::compact`], counted in `space`.
    pub fn compact_counted(&self, revision: i64, space: &mut Space) -> Result<(), Rejection> {
        self.compact(revision)?;
        // What was removed physically is not found any more, but it was counted before.
        space.compact(space.compacted_bytes.max(self.obsolete_at(revision)));
        Ok(())
    }

    /// What a compaction at `revision` removes of what is there.
    fn obsolete_at(&self, revision: i64) -> u64 {
        let Some((main, obsolete_bytes)) = self.journal.obsolete_at(revision) else { return 0 };
        if main == revision {
            return obsolete_bytes;
        }
        // A revision without records, as a restored backup leaves them: the newest tombstones before
        // it go, too.
        let newest = self.journal.records(Revision::first_of(main), Revision::last_of(main));
        let gone = newest.filter(|record| record.is_tombstone() && self.survives(record, main));
        obsolete_bytes + gone.map(|record| weight_bytes(&record)).sum::<u64>()
    }
}

pub fn weight_bytes(record: &Record) -> u64 {
    (record.key().len() + record.value().len()) as u64 + RECORD_OVERHEAD_BYTES
}
