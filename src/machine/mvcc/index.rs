//! The records of each key, newest first, safe to read while the one writer adds and removes.
//!
//! ```text
//! a@9  a@4  a@2 | b@7 | c@8†  c@3        † tombstone
//! ```
//!
//! A reader at revision 5 seeks to `(a, 5)` and finds `a@4`. A hot key may have a million records,
//! so a scan that has taken a key's visible record takes a few steps and then seeks to the next key.

use std::borrow::Borrow;
use std::cmp::{Ordering, Reverse};
use std::ops::Bound;

use crossbeam_skiplist::SkipMap;
use crossbeam_skiplist::map::Entry;

use crate::machine::Record;
use crate::types::{KeyRange, Revision};

/// How many records of one key a scan steps over before it seeks: about what a seek costs.
const STEPS_BEFORE_SEEK: usize = 8;

/// Behind the oldest record of a key, whatever its revision.
const OLDEST: Revision = Revision::new(i64::MIN, 0);

#[derive(Default)]
pub struct Index {
    records: SkipMap<Place, ()>,
}

impl Index {
    /// Adds a record. Its place must be free: revisions are never used twice.
    pub fn insert(&self, record: Record) {
        self.records.insert(Place(record), ());
    }

    pub fn remove(&self, record: &Record) {
        self.records.remove(&(record.key(), Reverse(record.mod_revision())) as &dyn Placed);
    }

    /// The newest record of `key` that is no younger than `at`; it may be a tombstone.
    pub fn newest(&self, key: &[u8], at: Revision) -> Option<Record> {
        let entry = self.seek(key, at)?;
        found(&entry, key)
    }

    /// The record of the same key that came before `record`; it may be a tombstone.
    pub fn before(&self, record: &Record) -> Option<Record> {
        let entry = self.seek_behind(record.key(), record.mod_revision())?;
        found(&entry, record.key())
    }

    /// All records of the same key that came before `record`, newest first.
    pub fn older(&self, record: &Record) -> Vec<Record> {
        let first = self.seek_behind(record.key(), record.mod_revision());
        std::iter::successors(first, |entry| entry.next())
            .map_while(|entry| found(&entry, record.key()))
            .collect()
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
        if range.is_empty() {
            return;
        }
        let mut next = self.seek(range.start(), at);
        while let Some(entry) = next {
            let Place(record) = entry.key();
            if range.ends_before(record.key()) {
                return;
            }
            next = if record.mod_revision() > at {
                self.step(&entry, |record| record.mod_revision() <= at)
                    .unwrap_or_else(|| self.seek(record.key(), at))
            } else {
                if !record.is_tombstone() && !visit(record) {
                    return;
                }
                self.step(&entry, |_| false)
                    .unwrap_or_else(|| self.seek_behind(record.key(), OLDEST))
            };
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
        if range.is_empty() {
            return Some(found);
        }
        let mut next = self.seek(range.start(), to);
        for _ in 0..steps {
            let Some(entry) = next.filter(|entry| !range.ends_before(entry.key().0.key())) else {
                return Some(found);
            };
            let Place(record) = entry.key();
            next = if record.mod_revision() > to {
                self.seek(record.key(), to)
            } else if record.mod_revision() < from {
                self.seek_behind(record.key(), OLDEST)
            } else {
                found.push(record.clone());
                entry.next()
            };
        }
        None
    }

    /// Walks on from `entry` to the first record of another key, or of the same key that is
    /// `wanted`. `None`: not within a few steps; `Some(None)`: the index ends here.
    fn step<'a>(
        &self,
        entry: &Entry<'a, Place, ()>,
        wanted: impl Fn(&Record) -> bool,
    ) -> Option<Option<Entry<'a, Place, ()>>> {
        let mut next = entry.next();
        for _ in 0..STEPS_BEFORE_SEEK {
            match next {
                Some(at) if at.key().0.key() == entry.key().0.key() && !wanted(&at.key().0) => {
                    next = at.next();
                }
                reached => return Some(reached),
            }
        }
        None
    }

    /// The first record at or behind the place of `(key, revision)`.
    fn seek(&self, key: &[u8], revision: Revision) -> Option<Entry<'_, Place, ()>> {
        self.records.lower_bound(Bound::Included(&(key, Reverse(revision)) as &dyn Placed))
    }

    fn seek_behind(&self, key: &[u8], revision: Revision) -> Option<Entry<'_, Place, ()>> {
        self.records.lower_bound(Bound::Excluded(&(key, Reverse(revision)) as &dyn Placed))
    }
}

/// The record of `entry`, if it is one of `key`.
fn found(entry: &Entry<'_, Place, ()>, key: &[u8]) -> Option<Record> {
    let Place(record) = entry.key();
    (record.key() == key).then(|| record.clone())
}

/// A record in the order of the index.
struct Place(Record);

/// Lets the map be searched with a borrowed key: a record can lend no tuple of its parts.
trait Placed {
    fn parts(&self) -> (&[u8], Reverse<Revision>);
}

impl Placed for Place {
    fn parts(&self) -> (&[u8], Reverse<Revision>) {
        (self.0.key(), Reverse(self.0.mod_revision()))
    }
}

impl Placed for (&[u8], Reverse<Revision>) {
    fn parts(&self) -> (&[u8], Reverse<Revision>) {
        *self
    }
}

impl<'a> Borrow<dyn Placed + 'a> for Place {
    fn borrow(&self) -> &(dyn Placed + 'a) {
        self
    }
}

impl Ord for dyn Placed + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl PartialOrd for dyn Placed + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for dyn Placed + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for dyn Placed + '_ {}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for Place {}

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
            index.insert(record(key, *main, *version));
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
    fn long_histories_are_skipped_on_both_sides_of_the_reader() {
        let index = Index::default();
        for main in 1..=1000 {
            index.insert(record("hot", main, main));
        }
        index.insert(record("cold", 1, 1));
        index.insert(record("later", 1, 1));
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
        index.remove(&before);
        assert!(index.before(&newest).is_none());
        assert!(index.newest(b"b", Revision::last_of(4)).is_none());
    }
}
