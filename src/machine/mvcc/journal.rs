//! All records in the order of their revisions: what watchers catch up from, snapshots are made of,
//! and compaction walks along.
//!
//! ```text
//! 2 -> [ 2 3 4 5 ]     6 -> [ 6 . . 9 ]     10 -> [ 10 11          the last chunk is open
//! ```
//!
//! The one writer adds to the last chunk until it is full. A record that is removed is marked as gone;
//! when a quarter of a full chunk is, what is left of it moves to a chunk of its own size. So adding
//! costs no search, and what is gone but still in memory is bounded.

use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use arc_swap::{ArcSwap, ArcSwapOption};
use crossbeam_skiplist::SkipMap;

use crate::machine::Record;
use crate::machine::record::Place;
use crate::types::Revision;

/// A chunk is full at this many records, or when they hold this many bytes.
const CHUNK_RECORDS: usize = 256;
const CHUNK_BYTES: usize = 1 << 20;

/// A chunk of which one in so many records is gone is copied without them.
const GONE_PART: usize = 4;

#[derive(Default)]
pub struct Journal {
    /// By the revision of the first record that was ever in the chunk. A chunk is replaced in its
    /// place: were it taken out first, a reader who comes by would miss what is left of it.
    chunks: SkipMap<Revision, ArcSwap<Chunk>>,
    /// The last one, if it has room.
    open: ArcSwapOption<Chunk>,
}

struct Chunk {
    first: Revision,
    slots: Box<[Slot]>,
    filled: AtomicUsize,
    bytes: AtomicUsize,
    gone: AtomicUsize,
}

/// A record and what was said of it, in two words: there is one for each record of the history.
#[derive(Default)]
struct Slot {
    record: Place,
    /// What a compaction at the record's revision removes of all that came before it, in bytes, and
    /// [`GONE`] when the record is removed.
    obsolete_bytes: AtomicU64,
}

const GONE: u64 = 1 << 63;

impl Slot {
    fn is_gone(&self) -> bool {
        self.obsolete_bytes.load(Ordering::Relaxed) & GONE != 0
    }

    fn revision(&self) -> Revision {
        self.record.mod_revision().expect(FILLED)
    }
}

const FILLED: &str = "slots are filled before they are counted";

impl Chunk {
    fn new(first: Revision, slots: usize) -> Chunk {
        let slots = std::iter::repeat_with(Slot::default).take(slots).collect();
        let (filled, bytes, gone) = Default::default();
        Chunk { first, slots, filled, bytes, gone }
    }

    /// Adds a record behind all others. Only the writer does.
    fn push(&self, record: Record, obsolete_bytes: u64) {
        let at = self.filled.load(Ordering::Relaxed);
        self.bytes.fetch_add(record.key().len() + record.value().len(), Ordering::Relaxed);
        self.slots[at].obsolete_bytes.store(obsolete_bytes, Ordering::Relaxed);
        self.slots[at].record.set(Some(record));
        self.filled.store(at + 1, Ordering::Release);
    }

    fn is_full(&self) -> bool {
        self.filled.load(Ordering::Relaxed) == self.slots.len()
            || self.bytes.load(Ordering::Relaxed) >= CHUNK_BYTES
    }

    fn len(&self) -> usize {
        self.filled.load(Ordering::Acquire)
    }

    /// The slots that are filled.
    fn filled(&self) -> &[Slot] {
        &self.slots[..self.len()]
    }

    /// Those of records that are not removed.
    fn present(&self) -> impl Iterator<Item = &Slot> {
        self.filled().iter().filter(|slot| !slot.is_gone())
    }

    /// How many records, removed ones too, lie before `revision`.
    fn before(&self, revision: Revision) -> usize {
        self.filled().partition_point(|slot| slot.revision() < revision)
    }

    /// Marks the record of `revision` as gone, for readers to see after the compaction that allows it.
    /// Whether it was there.
    fn remove(&self, revision: Revision) -> bool {
        let slot = self.filled().get(self.before(revision));
        let removed = slot.is_some_and(|slot| {
            slot.revision() == revision
                && slot.obsolete_bytes.fetch_or(GONE, Ordering::Release) & GONE == 0
        });
        if removed {
            self.gone.fetch_add(1, Ordering::Relaxed);
        }
        removed
    }

    fn is_scant(&self) -> bool {
        self.gone.load(Ordering::Relaxed) * GONE_PART >= self.len()
    }

    /// What is left of it; `None` if nothing is.
    fn remainder(&self) -> Option<Chunk> {
        let left = self.present().count();
        let remainder = Chunk::new(self.first, left);
        for slot in self.present() {
            let record = slot.record.get().expect(FILLED);
            remainder.push(record, slot.obsolete_bytes.load(Ordering::Relaxed));
        }
        (left > 0).then_some(remainder)
    }
}

impl Journal {
    /// Adds a record behind all others.
    pub fn insert(&self, record: Record, obsolete_bytes: u64) {
        if let Some(open) = &*self.open.load() {
            open.push(record, obsolete_bytes);
            if open.is_full() {
                self.open.store(None);
                self.tidy(open);
            }
            return;
        }
        let chunk = Arc::new(Chunk::new(record.mod_revision(), CHUNK_RECORDS));
        chunk.push(record, obsolete_bytes);
        self.chunks.insert(chunk.first, ArcSwap::new(chunk.clone()));
        self.open.store((!chunk.is_full()).then_some(chunk));
    }

    /// The main revision of the newest record up to `revision`, and what was said of it.
    pub fn obsolete_at(&self, revision: i64) -> Option<(i64, u64)> {
        let end = Revision::first_of(revision.checked_add(1)?);
        let last = self.chunks.upper_bound(Bound::Excluded(&end))?;
        let mut chunks = std::iter::successors(Some(last), |chunk| chunk.prev());
        chunks.find_map(|chunk| {
            let chunk = chunk.value().load();
            let before = &chunk.filled()[..chunk.before(end)];
            let slot = before.iter().rfind(|slot| !slot.is_gone())?;
            Some((slot.revision().main, slot.obsolete_bytes.load(Ordering::Relaxed) & !GONE))
        })
    }

    pub fn remove(&self, record: &Record) {
        let revision = record.mod_revision();
        let Some(place) = self.chunks.upper_bound(Bound::Included(&revision)) else { return };
        let chunk = place.value().load();
        // The open one is looked at when it is full.
        if chunk.remove(revision) && chunk.is_full() {
            self.tidy(&chunk);
        }
    }

    /// Frees what is gone of a full chunk, if it is enough.
    fn tidy(&self, chunk: &Chunk) {
        let Some(place) = self.chunks.get(&chunk.first).filter(|_| chunk.is_scant()) else {
            return;
        };
        match chunk.remainder() {
            Some(remainder) => place.value().store(Arc::new(remainder)),
            None => _ = place.remove(),
        }
    }

    /// The records of `from..=to`. Ones added or removed meanwhile may or may not be among them.
    pub fn records(&self, from: Revision, to: Revision) -> impl Iterator<Item = Record> {
        let mut next = self
            .chunks
            .upper_bound(Bound::Included(&from))
            .or_else(|| self.chunks.lower_bound(Bound::Excluded(&from)));
        let mut chunk = next.as_ref().map(|place| place.value().load_full());
        let mut at = chunk.as_ref().map_or(0, |chunk| chunk.before(from));
        std::iter::from_fn(move || {
            loop {
                let present = chunk.as_ref()?.filled();
                if at == present.len() {
                    next = next.take().and_then(|place| place.next());
                    chunk = next.as_ref().map(|place| place.value().load_full());
                    at = 0;
                    continue;
                }
                at += 1;
                let slot = &present[at - 1];
                if slot.is_gone() {
                    continue;
                }
                return slot.record.get().filter(|record| record.mod_revision() <= to);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::AtomicBool;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::machine::Parts;
    use crate::types::LeaseId;

    fn record(revision: Revision, value: &[u8]) -> Record {
        Record::new(Parts {
            key: b"k",
            value,
            create_revision: 1,
            mod_revision: revision,
            version: 2,
            lease: LeaseId::NONE,
        })
    }

    fn mains(journal: &Journal, from: i64, to: i64) -> Vec<i64> {
        let records = journal.records(Revision::first_of(from), Revision::last_of(to));
        records.map(|record| record.mod_revision().main).collect()
    }

    /// Adds and removes at random beside a map, and compares.
    #[test]
    fn it_tells_what_was_added_and_not_removed() {
        for seed in 0..20 {
            let mut random = SmallRng::seed_from_u64(seed);
            let (journal, mut model) = (Journal::default(), BTreeMap::new());
            let mut newest = Revision::first_of(2);
            for _ in 0..3000 {
                if random.random_range(0..5) < 3 {
                    newest = match random.random_range(0..3) {
                        0 => Revision::new(newest.main, newest.sub + 1),
                        step => Revision::first_of(newest.main + step),
                    };
                    let obsolete_bytes = random.random_range(0..GONE);
                    journal.insert(record(newest, b"v"), obsolete_bytes);
                    model.insert(newest, obsolete_bytes);
                } else if !model.is_empty() {
                    // Mostly the oldest, as compaction does.
                    let among = model.len().min(random.random_range(1..600));
                    let chosen = model.keys().nth(random.random_range(0..among)).copied();
                    let chosen = chosen.expect("there are as many");
                    journal.remove(&record(chosen, b"v"));
                    model.remove(&chosen);
                }
                let (a, b) = (random.random_range(0..newest.main + 2), newest.main + 1);
                let (from, to) =
                    (Revision::first_of(a), Revision::last_of(random.random_range(a..=b)));
                if random.random_range(0..20) == 0 {
                    let told: Vec<_> =
                        journal.records(from, to).map(|it| it.mod_revision()).collect();
                    let expected: Vec<_> = model.range(from..=to).map(|(it, _)| *it).collect();
                    assert_eq!(told, expected, "seed {seed}");
                }
                let expected = model.range(..=to).next_back();
                let expected = expected.map(|(revision, bytes)| (revision.main, *bytes));
                assert_eq!(journal.obsolete_at(to.main), expected, "seed {seed}");
            }
        }
    }

    #[test]
    fn what_is_removed_is_freed_soon() {
        let journal = Journal::default();
        let value = vec![0; 100_000];
        for main in 1..=100 {
            journal.insert(record(Revision::first_of(main), &value), 0);
        }
        for main in 1..=97 {
            journal.remove(&record(Revision::first_of(main), &[]));
        }
        let kept: usize = journal.chunks.iter().map(|chunk| chunk.value().load().len()).sum();
        assert!(kept < 20, "{kept} records are kept for 3");
        assert_eq!(mains(&journal, 0, 200), [98, 99, 100]);
    }

    /// Every seventh record stays. Whoever reads sees all of these, whatever chunks do meanwhile.
    #[test]
    fn what_stays_is_seen_while_chunks_are_replaced() {
        const RECORDS: i64 = 20_000;
        let journal = Journal::default();
        for main in 1..=RECORDS {
            journal.insert(record(Revision::first_of(main), b""), 0);
        }
        let stays = |main: &i64| main % 7 == 0;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let seen = mains(&journal, 0, RECORDS).into_iter().filter(stays);
                    assert!(seen.eq((1..=RECORDS).filter(stays)));
                }
            });
            for main in (1..=RECORDS).filter(|main| !stays(main)) {
                journal.remove(&record(Revision::first_of(main), b""));
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn who_reads_goes_on_while_chunks_are_replaced() {
        let journal = Journal::default();
        (1..=1000).for_each(|main| journal.insert(record(Revision::first_of(main), b""), 0));
        let mut reading = journal.records(Revision::first_of(1), Revision::last_of(2000));
        assert_eq!(reading.next().map(|record| record.mod_revision().main), Some(1));
        for main in (1..=1000).filter(|main| main % 7 != 0) {
            journal.remove(&record(Revision::first_of(main), b""));
        }
        (1001..=1010).for_each(|main| journal.insert(record(Revision::first_of(main), b""), 0));
        let rest: Vec<i64> = reading.map(|record| record.mod_revision().main).collect();
        assert!(rest.is_sorted());
        let kept = (7..=1000).step_by(7).chain(1001..=1010);
        assert!(kept.into_iter().all(|main| rest.binary_search(&main).is_ok()));
    }
}
