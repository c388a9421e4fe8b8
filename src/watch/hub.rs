//! Hands each published event to the live watchers that want it.

use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::census::{self, Census, Tally};
use super::index::Index;
use super::stream::WatchStream;
use super::watcher::{Interest, Mailbox, Mode, Offer, Watcher};
use crate::machine::{Event, Store};

/// See [`Hub::pause`]. The runtime's timers count milliseconds.
const PAUSE_A_WATCHER: Duration = Duration::from_micros(30);
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// The fan-out wanes by this part with each publication.
const FAN_OUT_WANES: usize = 16;

/// The meeting point of the applier and all watch streams of this member. Clones are the same hub.
#[derive(Clone)]
pub struct Hub(Arc<Inner>);

struct Inner {
    store: Store,
    /// Written only under the lock, after the events are with the watchers: whoever reads it finds
    /// everything up to it in their mailboxes.
    published: AtomicI64,
    /// How many watchers there ever were.
    created: AtomicU64,
    /// How many watchers take an event at present: the most of late.
    fan_out: AtomicUsize,
    live: Mutex<Live>,
    tally: Arc<Tally>,
}

struct Live {
    index: Index,
    /// Streams to be woken when a revision is published. Emptied by the publication; a stream
    /// stands here at most once for each of its bounded progress requests.
    expecting: Vec<(i64, Arc<Mailbox>)>,
}

impl Hub {
    /// A hub that stands at the store's revision. To be made before the applier goes on.
    pub fn new(store: Store) -> Hub {
        let published = AtomicI64::new(store.revision());
        let live = Mutex::new(Live { index: Index::default(), expecting: Vec::new() });
        let (created, fan_out) = (AtomicU64::new(0), AtomicUsize::new(0));
        Hub(Arc::new(Inner { store, published, created, fan_out, live, tally: Arc::default() }))
    }

    /// How many watch here, and how far behind they are.
    pub fn census(&self) -> Census {
        self.0.tally.census()
    }

    pub(super) fn tally(&self) -> &Arc<Tally> {
        &self.0.tally
    }

    /// A stream without watches. `progress_interval` is how often its idle watches that ask for it
    /// tell their progress.
    pub fn stream(&self, progress_interval: Duration) -> WatchStream {
        WatchStream::new(self.clone(), progress_interval)
    }

    /// Hands the events of `revision` to the live watchers, and wakes the streams that had nothing
    /// to do. Never waits for a client.
    ///
    /// Called by the applier alone, in revision order, for each entry that made events, after the
    /// store shows the revision.
    ///
    /// # Panics
    ///
    /// When `revision` is not above the last: watchers would see it twice.
    pub fn publish(&self, revision: i64, events: &[Event]) {
        if events.is_empty() {
            return;
        }
        let mut live = self.lock();
        assert!(
            revision > self.published(),
            "revision {revision} is published after {}",
            self.published()
        );
        let offered = match events {
            [event] => live.offer_one(revision, event),
            events => live.offer_many(revision, events),
        };
        for watcher in offered.full {
            live.index.remove(&watcher);
            census::subtract(&self.0.tally.live, 1);
        }
        // Of many keys only some may be watched by many: those set the pace, the others let it wane.
        let fan_out = self.0.fan_out.load(Ordering::Relaxed);
        let fan_out = offered.watchers.max(fan_out - fan_out.div_ceil(FAN_OUT_WANES));
        self.0.fan_out.store(fan_out, Ordering::Relaxed);
        self.set_published(&mut live, revision);
    }

    /// How long after a stream has handed out all it had it gathers events before it hands out more.
    ///
    /// Where a thousand streams want each event, a message for each would be most of the work, and
    /// the last would leave when several more events are there. So the pause is what a few rounds
    /// over the streams take. It is none where few watch, and a stream that was idle for as long
    /// hands out at once.
    pub(super) fn pause(&self) -> Duration {
        let watchers = u32::try_from(self.0.fan_out.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        let pause = PAUSE_A_WATCHER.saturating_mul(watchers).min(LONGEST_PAUSE);
        if pause < SHORTEST_PAUSE { Duration::ZERO } else { pause }
    }

    /// Sends every live watcher to the history, from where it stands, after the store's content was
    /// replaced by a snapshot. Called by the applier, before it goes on.
    pub fn reset(&self) {
        let mut live = self.lock();
        for watcher in live.index.drain() {
            census::subtract(&self.0.tally.live, 1);
            watcher.fall_behind(self.published());
        }
        self.set_published(&mut live, self.store().revision());
    }

    pub(super) fn store(&self) -> &Store {
        &self.0.store
    }

    /// The last revision whose events are with the watchers. Not above the store's.
    pub(super) fn published(&self) -> i64 {
        self.0.published.load(Ordering::Acquire)
    }

    /// A watcher on `mailbox`: live when `next` is still to be published, behind and in the
    /// mailbox's ring otherwise.
    pub(super) fn create(
        &self,
        id: i64,
        interest: Interest,
        next: i64,
        mailbox: &Arc<Mailbox>,
    ) -> Arc<Watcher> {
        let serial = self.0.created.fetch_add(1, Ordering::Relaxed);
        let tally = self.0.tally.clone();
        census::add(&tally.watchers, 1);
        let watcher = Watcher::new(id, serial, interest, next, mailbox.clone(), tally);
        self.join(&watcher);
        watcher
    }

    /// Makes a watcher live that is behind and has read up to what is published; puts any other one
    /// back into its mailbox's ring.
    pub(super) fn join(&self, watcher: &Arc<Watcher>) {
        // The lock keeps publications out: whatever is published later is offered to the watcher.
        let mut live = self.lock();
        let mut state = watcher.state();
        if state.next > self.published() {
            state.mode = Mode::Live;
            drop(state);
            live.index.insert(watcher.clone());
            census::add(&self.0.tally.live, 1);
        } else {
            watcher.ring(state);
        }
    }

    /// Ends a watcher: nothing is handed to it any more.
    pub(super) fn leave(&self, watcher: &Watcher) {
        let mut live = self.lock();
        match watcher.end() {
            Mode::Live => {
                live.index.remove(watcher);
                census::subtract(&self.0.tally.live, 1);
                census::subtract(&self.0.tally.watchers, 1);
            }
            Mode::Behind => census::subtract(&self.0.tally.watchers, 1),
            Mode::Ended => {}
        }
    }

    /// Wakes `mailbox` once `revision`, which the store shows already, is published too.
    pub(super) fn wake_at(&self, revision: i64, mailbox: &Arc<Mailbox>) {
        let mut live = self.lock();
        if self.published() < revision {
            live.expecting.push((revision, mailbox.clone()));
        }
    }

    #[cfg(test)]
    pub(crate) fn live_watchers(&self) -> usize {
        self.lock().index.len()
    }

    fn set_published(&self, live: &mut Live, revision: i64) {
        self.0.published.store(revision, Ordering::Release);
        live.expecting.retain(|(expected, mailbox)| {
            let reached = *expected <= revision;
            if reached {
                mailbox.wake();
            }
            !reached
        });
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.0.live.lock().expect("no thread panics with the hub locked")
    }
}

/// What became of a revision's events.
#[derive(Default)]
struct Offered {
    /// How many watchers were asked.
    watchers: usize,
    /// Those that fell behind.
    full: Vec<Arc<Watcher>>,
}

impl Live {
    fn offer_one(&self, revision: i64, event: &Event) -> Offered {
        let mut offered = Offered::default();
        self.index.visit(event.record.key(), |watcher| {
            offered.watchers += 1;
            if watcher.offer(revision, [event].into_iter()) == Offer::Full {
                offered.full.push(watcher.clone());
            }
        });
        offered
    }

    /// As [`Live::offer_one`]; each watcher gets all its events at once, so that no stream ever
    /// sees a part of a revision.
    fn offer_many(&self, revision: i64, events: &[Event]) -> Offered {
        let mut matches = Vec::new();
        for (order, event) in events.iter().enumerate() {
            self.index.visit(event.record.key(), |watcher| matches.push((watcher, order)));
        }
        matches.sort_unstable_by_key(|(watcher, order)| (watcher.serial(), *order));
        let mut offered = Offered::default();
        for own in matches.chunk_by(|(a, _), (b, _)| a.serial() == b.serial()) {
            let watcher = own[0].0;
            offered.watchers += 1;
            if watcher.offer(revision, own.iter().map(|(_, order)| &events[*order])) == Offer::Full
            {
                offered.full.push(watcher.clone());
            }
        }
        offered
    }
}
