//! All records in the order of their revisions: what watchers catch up from, snapshots are made of,
//! and compaction walks along.

use std::sync::Arc;

use crossbeam_skiplist::SkipMap;

use crate::machine::Record;
use crate::types::Revision;

#[derive(Default)]
pub struct Journal {
    records: SkipMap<Revision, Arc<Record>>,
}

impl Journal {
    pub fn insert(&self, record: Arc<Record>) {
        self.records.insert(record.mod_revision, record);
    }

    pub fn remove(&self, record: &Record) {
        self.records.remove(&record.mod_revision);
    }

    /// The records of `from..=to`. Ones added or removed meanwhile may or may not be among them.
    pub fn records(&self, from: Revision, to: Revision) -> impl Iterator<Item = Arc<Record>> {
        let mut next = self.records.lower_bound(std::ops::Bound::Included(&from));
        std::iter::from_fn(move || {
            let entry = next.take()?;
            if *entry.key() > to {
                return None;
            }
            next = entry.next();
            Some(entry.value().clone())
        })
    }
}
