//! All records in the order of their revisions: what watchers catch up from, snapshots are made of,
//! and compaction walks along.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::ops::Bound;

use crossbeam_skiplist::SkipMap;

use crate::machine::Record;
use crate::types::Revision;

#[derive(Default)]
pub struct Journal {
    entries: SkipMap<Entry, ()>,
}

struct Entry {
    record: Record,
    /// What a compaction at the record's revision removes of all that came before it.
    obsolete_bytes: u64,
}

impl Journal {
    pub fn insert(&self, record: Record, obsolete_bytes: u64) {
        self.entries.insert(Entry { record, obsolete_bytes }, ());
    }

    /// The main revision of the newest record up to `revision`, and what was said of it.
    pub fn obsolete_at(&self, revision: i64) -> Option<(i64, u64)> {
        let last = Revision::last_of(revision);
        let last = self.entries.upper_bound(Bound::Included(&last as &dyn Dated))?;
        Some((last.key().record.mod_revision().main, last.key().obsolete_bytes))
    }

    pub fn remove(&self, record: &Record) {
        self.entries.remove(&record.mod_revision() as &dyn Dated);
    }

    /// The records of `from..=to`. Ones added or removed meanwhile may or may not be among them.
    pub fn records(&self, from: Revision, to: Revision) -> impl Iterator<Item = Record> {
        let mut next = self.entries.lower_bound(Bound::Included(&from as &dyn Dated));
        std::iter::from_fn(move || {
            let entry = next.take()?;
            let record = &entry.key().record;
            if record.mod_revision() > to {
                return None;
            }
            let record = record.clone();
            next = entry.next();
            Some(record)
        })
    }
}

/// Lets the map be searched with a revision: an entry has it in its record, and cannot lend it.
trait Dated {
    fn revision(&self) -> Revision;
}

impl Dated for Entry {
    fn revision(&self) -> Revision {
        self.record.mod_revision()
    }
}

impl Dated for Revision {
    fn revision(&self) -> Revision {
        *self
    }
}

impl<'a> Borrow<dyn Dated + 'a> for Entry {
    fn borrow(&self) -> &(dyn Dated + 'a) {
        self
    }
}

impl Ord for dyn Dated + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        self.revision().cmp(&other.revision())
    }
}

impl PartialOrd for dyn Dated + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for dyn Dated + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.revision() == other.revision()
    }
}

impl Eq for dyn Dated + '_ {}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.revision().cmp(&other.revision())
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.revision() == other.revision()
    }
}

impl Eq for Entry {}
