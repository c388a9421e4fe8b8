//! The records of one key, safe to read while the one writer adds and removes.
//!
//! ```text
//! newest -> @9 -> @7 -> @4    @2 first     each record leads to the one before it,
//!            `-----------^                 and some lead far back
//! ```
//!
//! Most keys are written once, and a store of a million of them should not pay for what the others
//! need: the first record stands in the chain itself, behind all that lead to each other.
//!
//! Adding a record takes one step. A record of any age is found in O(log n) steps, for every record
//! also knows one further back, chosen as Myers does in "An applicative random-access stack" (1983):
//! the distances are those of the digits of a skew binary number.
//!
//! Compaction takes the oldest records off the end. What lay further back than the cut is gone then,
//! and a way that leads there is no way any more: it would have led past whatever is still readable.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use hashbrown::HashTable;
use triomphe::ThinArc;

use crate::machine::Record;
use crate::machine::record::Place;
use crate::types::Revision;

/// The history of one key. A clone is the same history. It compares and borrows as its key.
#[derive(Clone)]
pub struct Chain(ThinArc<Head, u8>);

#[derive(Default)]
struct Head {
    /// The newest record, unless that is the first.
    newest: ArcSwapOption<Node>,
    /// The record that came when there was none, until it is removed.
    first: Place,
}

struct Node {
    record: Record,
    /// How many records were ever added to the chain up to this one, the first not counted.
    depth: u64,
    older: ArcSwapOption<Node>,
    /// One further back, or the same.
    back: Weak<Node>,
}

impl Node {
    fn is_after(&self, at: Revision) -> bool {
        self.record.mod_revision() > at
    }

    /// The node that is added on top of `newest`.
    fn on(newest: Option<Arc<Node>>, record: Record) -> Node {
        let Some(newest) = newest else {
            return Node { record, depth: 1, older: ArcSwapOption::empty(), back: Weak::new() };
        };
        let depth = newest.depth + 1;
        // Two steps back of equal length become one of twice that and one.
        let doubled = newest.back.upgrade().and_then(|back| {
            let further = back.back.upgrade()?;
            let equal = newest.depth - back.depth == back.depth - further.depth;
            equal.then(|| Arc::downgrade(&further))
        });
        let back = doubled.unwrap_or_else(|| Arc::downgrade(&newest));
        Node { record, depth, older: ArcSwapOption::new(Some(newest)), back }
    }
}

impl Drop for Node {
    /// One after the other: a chain may be longer than the stack is deep.
    fn drop(&mut self) {
        let mut next = self.older.swap(None);
        while let Some(node) = next {
            next = Arc::into_inner(node).and_then(|node| node.older.swap(None));
        }
    }
}

impl Chain {
    pub fn new(key: &[u8]) -> Chain {
        Chain(ThinArc::from_header_and_slice(Head::default(), key))
    }

    pub fn key(&self) -> &[u8] {
        &self.0.slice
    }

    pub fn is_empty(&self) -> bool {
        self.head().newest.load().is_none() && self.head().first.mod_revision().is_none()
    }

    fn head(&self) -> &Head {
        &self.0.header.header
    }

    /// Adds the newest record.
    pub fn push(&self, record: Record) {
        let Head { newest, first } = self.head();
        let before = newest.load_full();
        if before.is_none() && first.mod_revision().is_none() {
            first.set(Some(record));
        } else {
            newest.store(Some(Arc::new(Node::on(before, record))));
        }
    }

    /// The newest record of all.
    pub fn last(&self) -> Option<Record> {
        match &*self.head().newest.load() {
            Some(newest) => Some(newest.record.clone()),
            None => self.head().first.get(),
        }
    }

    /// The newest record that is no younger than `at`; it may be a tombstone.
    pub fn newest(&self, at: Revision) -> Option<Record> {
        if let Some(newest) = &*self.head().newest.load() {
            if !newest.is_after(at) {
                return Some(newest.record.clone());
            }
            if let Some(before) = &*last_after(newest, at).older.load() {
                return Some(before.record.clone());
            }
        }
        self.first(at)
    }

    /// The first record, if it is there and no younger than `at`.
    fn first(&self, at: Revision) -> Option<Record> {
        self.head().first.get().filter(|first| first.mod_revision() <= at)
    }

    /// The newest node that is no younger than `at`.
    fn node(&self, at: Revision) -> Option<Arc<Node>> {
        match self.head().newest.load_full() {
            Some(newest) if newest.is_after(at) => last_after(&newest, at).older.load_full(),
            newest => newest,
        }
    }

    /// The records from `at` on backward, newest first.
    pub fn from(&self, at: Revision) -> impl Iterator<Item = Record> {
        let nodes = std::iter::successors(self.node(at), |node| node.older.load_full());
        let first = std::iter::once_with(move || self.first(at)).flatten();
        nodes.map(|node| node.record.clone()).chain(first)
    }

    /// Removes the records before `revision` and returns them, newest first. The one of `revision` is
    /// there.
    pub fn cut_before(&self, revision: Revision) -> Vec<Record> {
        let mut cut = Vec::new();
        let Some(kept) = self.node(revision) else { return cut };
        let mut next = kept.older.swap(None);
        while let Some(node) = next {
            cut.push(node.record.clone());
            next = node.older.load_full();
        }
        cut.extend(self.head().first.take());
        cut
    }

    /// Removes the record of `revision` and all before it. Whether none is left.
    pub fn cut(&self, revision: Revision) -> bool {
        let Head { newest, first } = self.head();
        match newest.load_full() {
            Some(newest) if newest.is_after(revision) => {
                last_after(&newest, revision).older.store(None);
                first.set(None);
            }
            Some(_) => {
                newest.store(None);
                first.set(None);
            }
            None if self.first(revision).is_some() => first.set(None),
            None => {}
        }
        self.is_empty()
    }
}

/// The oldest node after `at`, of those from `newest` on, which is one.
fn last_after(newest: &Arc<Node>, at: Revision) -> Arc<Node> {
    let mut node = newest.clone();
    loop {
        if let Some(back) = node.back.upgrade().filter(|back| back.is_after(at)) {
            node = back;
            continue;
        }
        match node.older.load_full().filter(|older| older.is_after(at)) {
            Some(older) => node = older,
            None => return node,
        }
    }
}

impl Borrow<[u8]> for Chain {
    fn borrow(&self) -> &[u8] {
        self.key()
    }
}

impl Ord for Chain {
    fn cmp(&self, other: &Chain) -> Ordering {
        self.key().cmp(other.key())
    }
}

impl PartialOrd for Chain {
    fn partial_cmp(&self, other: &Chain) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Chain {
    fn eq(&self, other: &Chain) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Chain {}

/// The histories of some keys. Never iterated: the order differs from member to member, what it holds
/// does not.
///
/// The hashes are kept. When a table of a million keys grows, it would otherwise look at each of them
/// in its history, a cache miss each, and the entry that makes it grow would take half a second.
#[derive(Default)]
pub struct Chains {
    table: HashTable<(u64, Chain)>,
    hashing: RandomState,
}

impl Chains {
    pub fn get(&self, key: &[u8]) -> Option<&Chain> {
        let hash = self.hashing.hash_one(key);
        self.table.find(hash, is(hash, key)).map(|(_, chain)| chain)
    }

    /// Adds the history of a key that has none here.
    pub fn add(&mut self, chain: Chain) {
        let hash = self.hashing.hash_one(chain.key());
        self.table.insert_unique(hash, (hash, chain), |(hash, _)| *hash);
    }

    pub fn remove(&mut self, key: &[u8]) {
        let hash = self.hashing.hash_one(key);
        if let Ok(place) = self.table.find_entry(hash, is(hash, key)) {
            place.remove();
        }
    }

    pub fn retain(&mut self, keep: impl Fn(&Chain) -> bool) {
        self.table.retain(|(_, chain)| keep(chain));
    }

    pub fn len(&self) -> usize {
        self.table.len()
    }
}

fn is(hash: u64, key: &[u8]) -> impl Fn(&(u64, Chain)) -> bool {
    move |(other, chain)| *other == hash && chain.key() == key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(main: i64) -> Record {
        Record::tombstone(b"k", Revision::first_of(main))
    }

    /// Records at 2, 4, 6, ...
    fn chain(records: i64) -> Chain {
        let chain = Chain::new(b"k");
        (1..=records).for_each(|number| chain.push(record(2 * number)));
        chain
    }

    fn newest(chain: &Chain, at: i64) -> Option<i64> {
        chain.newest(Revision::last_of(at)).map(|record| record.mod_revision().main)
    }

    fn from(chain: &Chain, at: i64) -> Vec<i64> {
        chain.from(Revision::last_of(at)).map(|record| record.mod_revision().main).collect()
    }

    #[test]
    fn every_record_is_found_whatever_was_cut_off() {
        for cut in [0, 1, 2, 50, 63, 64, 99, 100] {
            let chain = chain(100);
            if cut > 0 {
                assert_eq!(chain.cut(Revision::first_of(2 * cut)), cut == 100);
            }
            // What is added behind a cut is found as well.
            (101..=200).for_each(|number| chain.push(record(2 * number)));
            for at in 0..=402 {
                let expected = (at / 2).min(200);
                let expected = (expected > cut).then_some(2 * expected);
                assert_eq!(newest(&chain, at), expected, "cut {cut}, at {at}");
            }
        }
    }

    #[test]
    fn a_record_of_any_age_is_near() {
        let chain = chain(100_000);
        let newest = chain.head().newest.load_full().unwrap();
        for at in (1..200_000).step_by(997) {
            let at = Revision::last_of(at);
            let (mut node, mut steps) = (newest.clone(), 0);
            loop {
                steps += 1;
                let back = node.back.upgrade().filter(|back| back.is_after(at));
                let next = back.or_else(|| node.older.load_full().filter(|it| it.is_after(at)));
                let Some(next) = next else { break };
                node = next;
            }
            assert!(steps <= 3 * 17, "{steps} steps to {at:?}");
        }
    }

    #[test]
    fn what_is_cut_off_is_told_newest_first() {
        let chain = chain(5);
        let cut = chain.cut_before(Revision::first_of(6));
        let cut: Vec<i64> = cut.iter().map(|record| record.mod_revision().main).collect();
        assert_eq!(cut, [4, 2]);
        assert_eq!(from(&chain, 10), [10, 8, 6]);
        assert_eq!(from(&chain, 9), [8, 6]);
        assert!(chain.cut_before(Revision::first_of(6)).is_empty());
        assert!(!chain.cut(Revision::first_of(6)));
        assert_eq!(from(&chain, 10), [10, 8]);
        assert!(chain.cut(Revision::first_of(10)));
        assert_eq!(newest(&chain, 10), None);
        assert!(chain.cut_before(Revision::first_of(10)).is_empty());
    }

    #[test]
    fn a_long_chain_is_dropped_without_a_deep_stack() {
        drop(chain(1_000_000));
        let chain = chain(1_000_000);
        chain.cut_before(Revision::first_of(2_000_000));
        assert_eq!(from(&chain, 2_000_000), [2_000_000]);
    }
}
