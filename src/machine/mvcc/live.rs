//! The pairs that are there now, for the thread that writes.
//!
//! Every put asks what was there before. The index could tell, but in a long history that is a
//! dozen cache misses, most of what applying a put would cost.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::Roster;
use crate::machine::Record;

/// The newest record of each key that is not deleted. Never iterated: a hash map's order differs
/// from member to member, what it holds does not.
#[derive(Default)]
pub struct Live {
    pairs: HashMap<Bytes, Arc<Record>>,
    /// The same keys, in order.
    roster: Roster,
}

impl Live {
    pub fn get(&self, key: &[u8]) -> Option<&Arc<Record>> {
        self.pairs.get(key)
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// The keys of all pairs. It changes only when a key comes or goes.
    pub fn roster(&self) -> &Roster {
        &self.roster
    }

    /// Notes the newest record of a key, which may be a tombstone. Returns whether the key came or
    /// went by it.
    pub fn note(&mut self, record: &Arc<Record>) -> bool {
        if record.is_tombstone() {
            let went = self.pairs.remove(&record.key).is_some();
            if went {
                self.roster.remove(&record.key);
            }
            went
        } else {
            let came = self.pairs.insert(record.key.clone(), record.clone()).is_none();
            if came {
                self.roster.insert(&record.key);
            }
            came
        }
    }
}

/// The newest record of each key while a store is read, tombstones among them.
#[derive(Default)]
pub struct Newest(HashMap<Bytes, Arc<Record>>);

impl Newest {
    /// Notes a record, and returns the one of the same key before it.
    pub fn replace(&mut self, record: &Arc<Record>) -> Option<Arc<Record>> {
        self.0.insert(record.key.clone(), record.clone())
    }
}
