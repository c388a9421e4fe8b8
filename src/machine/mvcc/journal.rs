//! All records in the order of their revisions: what watchers catch up from, snapshots are made of,
//! and compaction walks along.

use std::ops::Bound;
use std::sync::Arc;

use crossbeam_skiplist::SkipMap;

use crate::machine::Record;
use crate::types::Revision;

#[derive(Default)]
pub struct Journal {
    records: SkipMap<Revision, Entry>,
}

struct Entry {
    record: Arc<Record>,
    /// What a compaction at the record's revision removes of all that came before it.
    obsolete_bytes: u64,
}

impl Journal {
    pub fn insert(&self, record: Arc<Record>, obsolete_bytes: u64) {
        self.records.insert(record.mod_revision, Entry { record, obsolete_bytes });
    }

    /// The main revision of the newest record up to `revision`, and what was said of it.
    pub fn obsolete_at(&self, revision: i64) -> Option<(i64, u64)> {
        let last = self.records.upper_bound(Bound::Included(&Revision::last_of(revision)))?;
        Some((last.key().main, last.value().obsolete_bytes))
    }

    pub fn remove(&self, record: &Record) {
        self.records.remove(&record.mod_revision);
    }

    /// The records of `from..=to`. Ones added or removed meanwhile may or may not be among them.
    pub fn records(&self, from: Revision, to: Revision) -> impl Iterator<Item = Arc<Record>> {
        let mut next = self.records.lower_bound(Bound::Included(&from));
        std::iter::from_fn(move || {
            let entry = next.take()?;
            if *entry.key() > to {
                return None;
            }
            next = entry.next();
            Some(entry.value().record.clone())
        })
    }
}
