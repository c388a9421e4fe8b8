//! The changes of one entry to the key history.

use super::{History, Live, Snapshot, Space};
use crate::machine::{Event, Parts, Record, Rejection, codec, schema};
use crate::storage::Batch;
use crate::types::{LeaseId, Revision};

/// Collects changes under one main revision, which readers see when [`Writer::publish`] is called.
/// The entry itself sees them at once, through [`Writer::snapshot`].
pub struct Writer<'a> {
    history: &'a History,
    live: &'a mut Live,
    space: &'a mut Space,
    batch: &'a mut Batch,
    before: i64,
    events: Vec<Event>,
    /// Whether keys came or went.
    roster_changed: bool,
}

impl<'a> Writer<'a> {
    pub fn new(
        history: &'a History,
        live: &'a mut Live,
        space: &'a mut Space,
        batch: &'a mut Batch,
    ) -> Writer<'a> {
        let before = history.published();
        Writer { before, history, live, space, batch, events: Vec::new(), roster_changed: false }
    }

    pub fn batch(&mut self) -> &mut Batch {
        self.batch
    }

    /// The store's revision as the entry sees it: grown by one from its first change on.
    pub fn revision(&self) -> i64 {
        self.before + i64::from(!self.events.is_empty())
    }

    /// The pair of `key`, with the changes made so far.
    pub fn get(&self, key: &[u8]) -> Option<Record> {
        self.live.get(key)
    }

    /// The state with the changes made so far.
    pub fn snapshot(&self) -> Snapshot<'_> {
        Snapshot::of_writer(self.history, self.revision(), self.live.roster())
    }

    /// Compacts at once, whatever was published.
    ///
    /// # Errors
    ///
    /// As [`History::compact`].
    pub fn compact(&mut self, revision: i64) -> Result<(), Rejection> {
        self.history.compact_counted(revision, self.space)
    }

    /// Puts a pair. `prev` is the pair that is there now.
    pub fn put(
        &mut self,
        key: &[u8],
        value: &[u8],
        lease: LeaseId,
        prev: Option<Record>,
    ) -> Record {
        let mod_revision = self.next_revision();
        let (create_revision, version) = match &prev {
            Some(prev) => (prev.create_revision(), prev.version() + 1),
            None => (mod_revision.main, 1),
        };
        let parts = Parts { key, value, create_revision, mod_revision, version, lease };
        self.add(Record::new(parts), prev)
    }

    /// Deletes a pair that is there.
    pub fn delete(&mut self, prev: Record) {
        let tombstone = Record::tombstone(prev.key(), self.next_revision());
        self.add(tombstone, Some(prev));
    }

    /// Makes the changes visible to readers, all at once. Returns the store's revision.
    pub fn publish(self) -> (i64, Vec<Event>) {
        let revision = self.revision();
        if revision != self.before {
            let roster = self.roster_changed.then(|| self.live.roster().clone());
            self.history.publish(revision, roster);
        }
        (revision, self.events)
    }

    fn next_revision(&self) -> Revision {
        let sub = u32::try_from(self.events.len()).expect("an entry changes fewer than 2^32 keys");
        Revision::new(self.before + 1, sub)
    }

    /// The tombstone that `record`, on a key that is not there, is about to write over in the same
    /// revision.
    fn deleted_by_this_entry(&self, record: &Record) -> Option<Record> {
        if !self.space.has_tombstones_of(record.mod_revision().main) {
            return None;
        }
        let same_key = self.events.iter().rev().find(|event| event.record.key() == record.key());
        same_key.map(|event| event.record.clone())
    }

    fn add(&mut self, record: Record, prev: Option<Record>) -> Record {
        self.batch.put(schema::record_key(record.mod_revision()), codec::encode_record(&record));
        let obsolete_bytes = match &prev {
            Some(prev) => self.space.add(&record, Some(prev)),
            None => self.space.add(&record, self.deleted_by_this_entry(&record).as_ref()),
        };
        let known = self.live.chain(record.key());
        let (was, is) = (known.is_some(), !record.is_tombstone());
        let chain = self.history.insert(record.clone(), obsolete_bytes, known);
        match (was, is) {
            (false, true) => self.live.add(chain),
            (true, false) => self.live.remove(record.key()),
            _ => {}
        }
        self.roster_changed |= was != is;
        self.events.push(Event { record: record.clone(), prev });
        record
    }
}
