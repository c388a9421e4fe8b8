//! The history of all keys, by key and by revision.
//!
//! One thread writes: it inserts the records of an entry, then publishes the entry's revision once.
//! Any number of threads read at a published revision; they take no lock, never wait for the writer
//! and never make it wait. Records are immutable.
//!
//! A range can be counted without walking it: the writer also publishes the [`Roster`] of the keys
//! that are there, each time one comes or goes, *before* the revision that made it. A reader that
//! has seen a revision published thus finds the roster of that revision or of a later one, and what
//! a later one differs by is in the journal, whose records are inserted before either is published.
//!
//! Compaction has two halves. The logical one moves `compacted` and takes effect at once. The
//! physical one ([`Scrubber`]) removes records that no reader at or above `compacted` can see. A
//! reader below may thus miss keys, so every read looks at `compacted` again when it is done and
//! starts over if it was overtaken.

mod chain;
mod compaction;
mod hash;
mod index;
mod journal;
mod live;
mod pages;
mod range;
mod roster;
mod space;
mod view;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use arc_swap::ArcSwap;

use super::{Record, Rejection};
use crate::types::{KeyRange, Revision};

pub use hash::HashKv;
pub use pages::{PAGE_BYTES, Page, Pages, PagesEnd};
pub use space::RECORD_OVERHEAD_BYTES;
pub use view::{Changes, Store, View};

pub(super) use compaction::Scrubber;
pub(super) use hash::Hasher;
pub(super) use live::Live;
pub(super) use range::Snapshot;
pub(super) use space::Space;
#[cfg(test)]
pub(super) use space::weight_bytes;
pub(super) use writer::Writer;

use chain::Chain;
use index::Index;
use journal::Journal;
use roster::Roster;

/// What [`History::compacted`] says before the first compaction.
pub const NEVER_COMPACTED: i64 = -1;

/// A count at an older revision is corrected for the changes since, as long as they are no more than
/// [`FREE_CORRECTIONS`] and one in so many of the keys counted: beyond, a walk through the range
/// costs less.
const KEYS_PER_CORRECTION: usize = 16;
const FREE_CORRECTIONS: usize = 64;

pub(super) struct History {
    index: Index,
    journal: Journal,
    /// The keys that were there from one revision on.
    edition: ArcSwap<Edition>,
    published: AtomicI64,
    compacted: AtomicI64,
    /// How many readers need every record that is there to stay.
    holders: AtomicUsize,
}

/// The keys at revision `since`, and at all later ones up to the next edition's.
struct Edition {
    since: i64,
    roster: Roster,
}

impl History {
    /// No records yet; who adds stored ones calls [`History::publish_roster`] when done.
    pub fn new(revision: i64, compacted: i64) -> History {
        History {
            index: Index::default(),
            journal: Journal::default(),
            edition: ArcSwap::from_pointee(Edition { since: revision, roster: Roster::default() }),
            published: AtomicI64::new(revision),
            compacted: AtomicI64::new(compacted),
            holders: AtomicUsize::new(0),
        }
    }

    /// Adds a record, with what [`Space::add`] said of it, to the history of its key, which the caller
    /// may know and is returned. Readers see it once its revision is published.
    fn insert(&self, record: Record, obsolete_bytes: u64, chain: Option<&Chain>) -> Chain {
        self.journal.insert(record.clone(), obsolete_bytes);
        self.index.insert(record, chain)
    }

    /// The revision that readers may read at.
    pub fn published(&self) -> i64 {
        self.published.load(Ordering::SeqCst)
    }

    /// Lets readers read at `revision`. `roster`: when keys came or went, those that are there now.
    fn publish(&self, revision: i64, roster: Option<Roster>) {
        if let Some(roster) = roster {
            self.publish_roster(revision, roster);
        }
        self.published.store(revision, Ordering::SeqCst);
    }

    /// Lets readers count by `roster`, the keys from revision `since` on.
    pub fn publish_roster(&self, since: i64, roster: Roster) {
        self.edition.store(Arc::new(Edition { since, roster }));
    }

    /// How many keys there were in `range` at `revision`, a published one; `None` when it takes a
    /// walk through the range to tell.
    fn count(&self, range: &KeyRange, revision: i64) -> Option<i64> {
        let edition = self.edition.load();
        let now = edition.roster.count(range);
        let mut count = now as i64;
        if edition.since <= revision {
            return Some(count);
        }
        let mut corrections = now / KEYS_PER_CORRECTION + FREE_CORRECTIONS;
        let (from, to) = (Revision::first_of(revision + 1), Revision::last_of(edition.since));
        for record in self.journal.records(from, to) {
            corrections = corrections.checked_sub(1)?;
            if !range.contains(record.key()) {
                continue;
            }
            let before = self.index.before(&record);
            if before.as_ref().is_some_and(|before| before.mod_revision().main > revision) {
                // An earlier record of the same key has counted for it.
                continue;
            }
            let was = before.is_some_and(|before| !before.is_tombstone());
            count += i64::from(was) - i64::from(edition.roster.contains(record.key()));
        }
        Some(count)
    }

    /// Runs `look` on the newest roster, which may differ from that of any revision readers are at.
    fn with_roster<T>(&self, look: impl FnOnce(&Roster) -> T) -> T {
        look(&self.edition.load().roster)
    }

    /// The oldest readable revision; [`NEVER_COMPACTED`] when everything is.
    pub fn compacted(&self) -> i64 {
        self.compacted.load(Ordering::SeqCst)
    }

    /// Forgets what was before `revision`, logically and at once.
    ///
    /// # Errors
    ///
    /// A revision that is compacted already (also a negative one, and zero the second time), or that
    /// is still to come.
    pub fn compact(&self, revision: i64) -> Result<(), Rejection> {
        let (current, oldest) = (self.published(), self.compacted());
        if revision <= oldest {
            return Err(Rejection::Compacted { requested: revision, oldest });
        }
        if revision > current {
            return Err(Rejection::FutureRevision { requested: revision, current });
        }
        self.compacted.store(revision, Ordering::SeqCst);
        Ok(())
    }

    /// All records whose revision is in `from..=to`, oldest first, those included that a compaction
    /// at `to` or before has made unreadable and that are not removed yet.
    pub fn records(&self, from: Revision, to: Revision) -> impl Iterator<Item = Record> {
        self.journal.records(from, to)
    }

    /// Whether `record` still counts after a compaction at `compacted`: it came later, or it is what
    /// its key was at that revision. Of the tombstones only those of exactly that revision do.
    pub fn survives(&self, record: &Record, compacted: i64) -> bool {
        let main = record.mod_revision().main;
        main > compacted
            || (main == compacted || !record.is_tombstone())
                && self
                    .index
                    .newest(record.key(), Revision::last_of(compacted))
                    .is_none_or(|newest| newest.mod_revision() == record.mod_revision())
    }

    /// Keeps every record that is there now until the hold is dropped.
    pub fn hold(self: &Arc<History>) -> Hold {
        self.holders.fetch_add(1, Ordering::SeqCst);
        Hold(self.clone())
    }

    fn is_held(&self) -> bool {
        self.holders.load(Ordering::SeqCst) > 0
    }
}

/// While one exists, nothing is removed physically.
pub(super) struct Hold(Arc<History>);

impl Clone for Hold {
    fn clone(&self) -> Hold {
        self.0.hold()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.holders.fetch_sub(1, Ordering::SeqCst);
    }
}
