//! The pairs that are there now, for the thread that writes.
//!
//! Every put asks what was there before, and adds to the history of the same key. The index could
//! tell, but among many keys that is a dozen cache misses, most of what applying a put would cost.

use super::Roster;
use super::chain::{Chain, Chains};
use crate::machine::Record;

/// The histories of the keys that are not deleted.
#[derive(Default)]
pub struct Live {
    chains: Chains,
    /// The same keys, in order.
    roster: Roster,
}

impl Live {
    /// The keys of `chains` that are not deleted; `in_order` are theirs, in the order of the keys.
    pub fn loaded(mut chains: Chains, in_order: &[Chain]) -> Live {
        chains.retain(|chain| chain.last().is_some_and(|record| !record.is_tombstone()));
        Live { chains, roster: Roster::of_sorted(in_order.iter().map(Chain::key)) }
    }

    /// The pair of `key`.
    pub fn get(&self, key: &[u8]) -> Option<Record> {
        self.chain(key)?.last()
    }

    /// The history of `key`, if it is there.
    pub fn chain(&self, key: &[u8]) -> Option<&Chain> {
        self.chains.get(key)
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.chains.len()
    }

    /// The keys of all pairs. It changes only when a key comes or goes.
    pub fn roster(&self) -> &Roster {
        &self.roster
    }

    /// A key came that was not there.
    pub fn add(&mut self, chain: Chain) {
        self.roster.insert(chain.key());
        self.chains.add(chain);
    }

    /// The key went that was there.
    pub fn remove(&mut self, key: &[u8]) {
        self.chains.remove(key);
        self.roster.remove(key);
    }
}
