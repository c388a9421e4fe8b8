//! The history of each key, in the order of keys, safe to read while the one writer adds and removes.
//!
//! ```text
//! a: @9 @4 @2     b: @7     c: @8† @3        † tombstone
//! ```
//!
//! A reader at revision 5 walks along the keys and takes of each the newest record that is no younger:
//! `a@4` and `c@3`. A key costs a scan the same however many records it has: see [`super::chain`].

use std::ops::Bound;

use crossbeam_skiplist::SkipSet;
use crossbeam_skiplist::set::Entry;

use super::chain::Chain;
use crate::machine::Record;
use crate::types::{KeyRange, Revision};

#[derive(Default)]
pub struct Index {
    keys: SkipSet<Chain>,
}

impl Index {
    /// Adds the newest record of its key. `chain` is that key's, where the caller knows it; the one
    /// that has the record now is returned.
    pub fn insert(&self, record: Record, chain: Option<&Chain>) -> Chain {
        let chain = chain.cloned().unwrap_or_else(|| {
            let known = self.keys.get(record.key());
            known.map_or_else(|| Chain::new(record.key()), |entry| entry.value().clone())
        });
        let new = chain.is_empty();
        chain.push(record);
        if new {
            // With its record, as readers take a key without any for one that was removed.
            self.keys.insert(chain.clone());
        }
        chain
    }

    /// Adds a key with its history.
    pub fn adopt(&self, chain: Chain) {
        self.keys.insert(chain);
    }

    /// Removes the record of a key that is the oldest.
    pub fn remove_oldest(&self, record: &Record) {
        let Some(entry) = self.keys.get(record.key()) else { return };
        if entry.value().cut(record.mod_revision()) {
            entry.remove();
        }
    }

    /// Removes all records of the same key that came before `record`, and returns them newest first.
    pub fn remove_before(&self, record: &Record) -> Vec<Record> {
        let entry = self.keys.get(record.key());
        entry.map_or_else(Vec::new, |entry| entry.value().cut_before(record.mod_revision()))
    }

    /// The newest record of `key` that is no younger than `at`; it may be a tombstone.
    pub fn newest(&self, key: &[u8], at: Revision) -> Option<Record> {
        self.keys.get(key)?.value().newest(at)
    }

    /// The record of the same key that came before `record`; it may be a tombstone.
    pub fn before(&self, record: &Record) -> Option<Record> {
        self.newest(record.key(), record.mod_revision().before()?)
    }

    /// Calls `visit` with each pair in `range` as it was at `at`, in key order, until it returns
    /// false. Tombstones are left out.
    pub fn scan(&self, range: &KeyRange, at: Revision, mut visit: impl FnMut(&Record) -> bool) {
        if let KeyRange::One(key) = range {
            if let Some(record) = self.newest(key, at).filter(|record| !record.is_tombstone()) {
                visit(&record);
            }
            return;
        }
        for entry in self.chains(range) {
            let newest = entry.value().newest(at);
            if let Some(record) = newest.filter(|record| !record.is_tombstone())
                && !visit(&record)
            {
                return;
            }
        }
    }

    /// The records of `from..=to` whose keys are in `range`, newest first for each key; `None` when it
    /// takes more than `steps` to find them. A step is a record found or a key with other ones.
    pub fn between(
        &self,
        range: &KeyRange,
        from: Revision,
        to: Revision,
        steps: usize,
    ) -> Option<Vec<Record>> {
        let mut found = Vec::new();
        let mut steps = 0..steps;
        for entry in self.chains(range) {
            steps.next()?;
            for record in entry.value().from(to).take_while(|record| record.mod_revision() >= from)
            {
                steps.next()?;
                found.push(record);
            }
        }
        Some(found)
    }

    fn chains(&self, range: &KeyRange) -> impl Iterator<Item = Entry<'_, Chain>> {
        // A crossed range would not be taken for an empty one.
        let first = (!range.is_empty())
            .then(|| self.keys.lower_bound(Bound::Included(&range.start()[..])))
            .flatten();
        let all = std::iter::successors(first, Entry::next);
        all.take_while(|entry| !range.ends_before(entry.value().key()))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::machine::Parts;
    use crate::types::LeaseId;

    fn record(key: &'static str, main: i64, version: i64) -> Record {
        Record::new(Parts {
            key: key.as_bytes(),
            value: b"",
            create_revision: 1,
            mod_revision: Revision::first_of(main),
            version,
            lease: LeaseId::NONE,
        })
    }

    fn index(records: &[(&'static str, i64, i64)]) -> Index {
        let index = Index::default();
        for (key, main, version) in records {
            index.insert(record(key, *main, *version), None);
        }
        index
    }

    fn scan(index: &Index, range: &KeyRange, at: i64) -> Vec<(String, i64)> {
        let mut seen = Vec::new();
        index.scan(range, Revision::last_of(at), |record| {
            let key = String::from_utf8(record.key().to_vec()).unwrap();
            seen.push((key, record.mod_revision().main));
            true
        });
        seen
    }

    fn pairs(expected: &[(&str, i64)]) -> Vec<(String, i64)> {
        expected.iter().map(|(key, main)| (key.to_string(), *main)).collect()
    }

    #[test]
    fn a_scan_sees_each_key_as_it_was() {
        let index =
            index(&[("a", 2, 1), ("a", 4, 2), ("a", 9, 3), ("b", 7, 1), ("c", 3, 1), ("c", 8, 0)]);
        let all = KeyRange::From(Bytes::new());
        assert_eq!(scan(&index, &all, 1), []);
        assert_eq!(scan(&index, &all, 5), pairs(&[("a", 4), ("c", 3)]));
        assert_eq!(scan(&index, &all, 7), pairs(&[("a", 4), ("b", 7), ("c", 3)]));
        assert_eq!(scan(&index, &all, 9), pairs(&[("a", 9), ("b", 7)]));
        let until_b = KeyRange::Span { start: "a".into(), end: "b".into() };
        assert_eq!(scan(&index, &until_b, 9), pairs(&[("a", 9)]));
        let crossed = KeyRange::Span { start: "b".into(), end: "a".into() };
        assert_eq!(scan(&index, &crossed, 9), []);
    }

    #[test]
    fn a_key_with_a_long_history_is_one_key() {
        let index = Index::default();
        for main in 1..=1000 {
            index.insert(record("hot", main, main), None);
        }
        index.insert(record("cold", 1, 1), None);
        index.insert(record("later", 1, 1), None);
        let all = KeyRange::From(Bytes::new());
        for at in [1, 2, 500, 996, 1000] {
            assert_eq!(scan(&index, &all, at), pairs(&[("cold", 1), ("hot", at), ("later", 1)]));
        }
    }

    #[test]
    fn the_record_before_is_of_the_same_key() {
        let index = index(&[("a", 2, 1), ("b", 3, 1), ("b", 5, 0)]);
        let newest = index.newest(b"b", Revision::last_of(9)).unwrap();
        assert_eq!(newest.mod_revision().main, 5);
        let before = index.before(&newest).unwrap();
        assert_eq!(before.mod_revision().main, 3);
        assert!(index.before(&before).is_none());
        assert_eq!(index.remove_before(&newest), [before]);
        assert!(index.before(&newest).is_none());
        assert!(index.newest(b"b", Revision::last_of(4)).is_none());
    }

    #[test]
    fn a_key_whose_last_record_was_removed_may_come_again() {
        let index = index(&[("a", 2, 1), ("a", 3, 0)]);
        let end = index.newest(b"a", Revision::last_of(3)).unwrap();
        assert_eq!(index.remove_before(&end).len(), 1);
        index.remove_oldest(&end);
        assert_eq!(index.newest(b"a", Revision::last_of(9)), None);
        assert!(index.keys.is_empty());
        index.insert(record("a", 7, 1), None);
        assert_eq!(scan(&index, &KeyRange::From(Bytes::new()), 9), pairs(&[("a", 7)]));
    }

    #[test]
    fn what_takes_too_many_steps_is_not_looked_for() {
        let index = index(&[("a", 2, 1), ("a", 4, 2), ("a", 9, 3), ("b", 7, 1)]);
        let all = KeyRange::From(Bytes::new());
        let between = |from, to, steps| {
            let found =
                index.between(&all, Revision::first_of(from), Revision::last_of(to), steps)?;
            Some(found.iter().map(|record| record.mod_revision().main).collect::<Vec<_>>())
        };
        assert_eq!(between(3, 7, 4), Some(vec![4, 7]));
        assert_eq!(between(3, 7, 3), None);
        assert_eq!(between(10, 12, 2), Some(vec![]));
    }
}
