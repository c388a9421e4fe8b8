//! What other threads read: the store at the revision published when they looked.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering, fence};

use arc_swap::ArcSwap;

use super::{HashKv, History, Snapshot, hash};
use crate::machine::txn;
use crate::machine::{Event, Range, RangeReply, Record, Rejection, Txn, TxnReply};
use crate::mutant;
use crate::types::{KeyRange, Revision};

/// How often a read that compaction overtook is repeated before it holds physical removal up.
const FREE_ATTEMPTS: usize = 3;

/// The changes of a range of several keys are looked for key by key when that takes no more than one
/// of so many of the steps which the caller allows: what is lost when there turn out to be more.
const STEPS_OF_LIMIT: usize = 16;

/// A handle on the key history. Clones are cheap and see the same store, from any thread.
#[derive(Clone)]
pub struct Store {
    /// Replaced as a whole when a snapshot is installed.
    history: Arc<ArcSwap<History>>,
}

impl Store {
    pub(in crate::machine) fn new(history: Arc<History>) -> Store {
        Store { history: Arc::new(ArcSwap::new(history)) }
    }

    /// Lets every handle on this store see `history` from now on.
    pub(in crate::machine) fn replace(&self, history: Arc<History>) {
        self.history.store(history);
    }

    /// The store as it is now.
    pub fn view(&self) -> View {
        let history = self.history.load_full();
        View { revision: AtomicI64::new(history.published()), history }
    }

    /// The revision of the newest change; 1 when there was none.
    pub fn revision(&self) -> i64 {
        self.history.load().published()
    }

    /// The oldest readable revision; -1 before the first compaction.
    pub fn compacted(&self) -> i64 {
        self.history.load().compacted()
    }
}

/// Reads at one revision, whatever is written meanwhile.
///
/// When the history is compacted past that revision, a read of the current state moves the view to
/// a newer revision instead of failing; [`View::revision`] then tells that one.
pub struct View {
    history: Arc<History>,
    revision: AtomicI64,
}

impl Clone for View {
    fn clone(&self) -> View {
        View { history: self.history.clone(), revision: AtomicI64::new(self.revision()) }
    }
}

impl View {
    /// The revision of the state this view reads. Ask after reading.
    pub fn revision(&self) -> i64 {
        self.revision.load(Ordering::SeqCst)
    }

    /// # Errors
    ///
    /// A revision before the compacted one or after the view's.
    pub fn range(&self, query: &Range) -> Result<RangeReply, Rejection> {
        self.read(|present| {
            let revision = match present.resolve(query) {
                Ok(revision) => revision,
                Err(rejection) => return (Err(rejection), i64::MAX),
            };
            (Ok(present.at(revision).range(query)), revision)
        })
    }

    /// The pair of `key`.
    pub fn get(&self, key: &[u8]) -> Option<Record> {
        self.read(|present| (present.get(key), present.revision()))
    }

    /// Runs a transaction that cannot write, without an entry.
    ///
    /// # Errors
    ///
    /// As [`View::range`], for any range of the branches taken.
    ///
    /// # Panics
    ///
    /// When a branch of `txn` can write: see [`Txn::is_read_only`].
    pub fn read_txn(&self, txn: &Txn) -> Result<TxnReply, Rejection> {
        self.read(|present| txn::read(present, txn))
    }

    /// The changes in `range` that revisions from `from` to the view's made, in their order, each
    /// with the pair before it unless that was compacted away.
    ///
    /// Ends after the revision in which it has looked at `limit` records, matching or not: the
    /// answer holds whole revisions, at least one, and says where to go on. It does not look at the
    /// records of other keys where it can go by the index. A delete made exactly at the compacted
    /// revision is still told.
    ///
    /// # Errors
    ///
    /// [`Rejection::Compacted`] when `from` lies before the compacted revision.
    pub fn changes(&self, from: i64, range: &KeyRange, limit: usize) -> Result<Changes, Rejection> {
        self.read(|present| {
            let oldest = self.history.compacted();
            if from < oldest {
                return (Err(Rejection::Compacted { requested: from, oldest }), i64::MAX);
            }
            (Ok(self.scan_changes(from, present.revision(), oldest, range, limit)), from)
        })
    }

    fn scan_changes(
        &self,
        from: i64,
        to: i64,
        oldest: i64,
        range: &KeyRange,
        limit: usize,
    ) -> Changes {
        let limit = limit.max(1);
        if let Some(changes) = self.pick_changes(from, to, oldest, range, limit) {
            return changes;
        }
        let mut events = Vec::new();
        let (mut scanned, mut last_main) = (0, from);
        for record in self.history.records(Revision::first_of(from), Revision::last_of(to)) {
            let main = record.mod_revision().main;
            if scanned >= limit && main != last_main {
                return Changes { events, next: main };
            }
            scanned += 1;
            last_main = main;
            if range.contains(record.key()) {
                events.extend(self.event(record, oldest));
            }
        }
        Changes { events, next: from.max(to.saturating_add(1)) }
    }

    /// The changes from `from` on where the index leads to them sooner than the journal does: those
    /// of one key, or of a range that has hardly any.
    fn pick_changes(
        &self,
        from: i64,
        to: i64,
        oldest: i64,
        range: &KeyRange,
        limit: usize,
    ) -> Option<Changes> {
        let is_one = matches!(range, KeyRange::One(_));
        // A key that is gone costs a step as well, and nobody knows how many there are.
        let steps = if is_one { limit.saturating_add(1) } else { limit / STEPS_OF_LIMIT };
        if !is_one && self.history.with_roster(|roster| roster.count(range)) >= steps {
            return None;
        }
        let near = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut until = to;
        // A revision makes one record at least, so closer to `from` the journal is as short a way.
        while until.saturating_sub(from) >= near {
            let (first, last) = (Revision::first_of(from), Revision::last_of(until));
            if let Some(mut records) = self.history.index.between(range, first, last, steps) {
                records.sort_unstable_by_key(|record| record.mod_revision());
                let events = records.into_iter().filter_map(|record| self.event(record, oldest));
                return Some(Changes { events: events.collect(), next: until.saturating_add(1) });
            }
            if !is_one {
                return None;
            }
            until = from + (until - from) / 4;
        }
        None
    }

    /// What watchers see of `record`, when `oldest` is the compacted revision.
    fn event(&self, record: Record, oldest: i64) -> Option<Event> {
        let prev = if record.mod_revision().main > oldest {
            let before = self.history.index.before(&record).filter(|before| !before.is_tombstone());
            let wrong = before.as_ref().filter(|_| mutant::is("prev-pair-too-old"));
            wrong.map_or(before.clone(), |before| self.history.index.before(before))
        } else if self.history.survives(&record, oldest) {
            // What was before the compacted revision cannot be read, removed yet or not.
            None
        } else {
            return None;
        };
        Some(Event { record, prev })
    }

    /// The hash of the history up to `revision` (zero and below: the view's), equal on all members
    /// that have compacted alike.
    ///
    /// # Errors
    ///
    /// As [`View::range`].
    pub fn hash_kv(&self, revision: i64) -> Result<HashKv, Rejection> {
        let query = Range { revision, ..Range::all(KeyRange::From(Default::default())) };
        self.read(|present| {
            let compacted = self.history.compacted();
            match present.resolve(&query) {
                // The hash depends on the compacted revision itself, so any compaction voids it.
                Ok(revision) => (Ok(hash::hash_kv(&self.history, revision, compacted)), compacted),
                Err(rejection) => (Err(rejection), i64::MAX),
            }
        })
    }

    /// Runs `read` on the view's present until no compaction has overtaken it. `read` returns its
    /// result and the oldest revision that it looked at.
    pub(super) fn read<T>(&self, read: impl Fn(Snapshot<'_>) -> (T, i64)) -> T {
        for _ in 0..FREE_ATTEMPTS {
            let (result, oldest_used) = read(self.present());
            // Whoever saw a record missing must now see the compaction that allowed its removal,
            // also on processors that reorder loads.
            fence(Ordering::Acquire);
            if self.history.compacted() <= oldest_used {
                return result;
            }
        }
        // Compactions come faster than this read ends.
        let _hold = self.history.hold();
        read(self.present()).0
    }

    /// The state at the view's revision; when that is compacted, at a newer one.
    fn present(&self) -> Snapshot<'_> {
        if self.revision() < self.history.compacted() {
            self.revision.fetch_max(self.history.published(), Ordering::SeqCst);
        }
        Snapshot::new(&self.history, self.revision())
    }
}

/// A part of the history, for watchers that catch up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    pub events: Vec<Event>,
    /// The first revision that is not covered: where to go on.
    pub next: i64,
}
