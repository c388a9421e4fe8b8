//! One watch as the publisher sees it, and the mailbox of the stream it is on.
//!
//! Locks are taken in this order: the hub's, a watcher's, a mailbox's ring.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

use super::census::{self, Tally};
use super::{EVENT_BYTES, QUEUE_BYTES};
use crate::machine::Event;
use crate::mutant;
use crate::types::KeyRange;

/// What a watch wants to see.
#[derive(Debug, Clone)]
pub struct Interest {
    pub range: KeyRange,
    pub puts: bool,
    pub deletes: bool,
    pub prev_kv: bool,
}

impl Interest {
    /// The event as this watch shows it; `None` when it does not. The key is known to be in range.
    pub fn show(&self, event: &Event) -> Option<Event> {
        let wanted = if event.record.is_tombstone() { self.deletes } else { self.puts };
        wanted.then(|| Event {
            record: event.record.clone(),
            prev: if self.prev_kv { event.prev.clone() } else { None },
        })
    }
}

/// What an event counts for in a queue.
pub fn event_bytes(event: &Event) -> usize {
    let prev = event.prev.as_ref().map_or(0, |prev| prev.key().len() + prev.value().len());
    EVENT_BYTES + event.record.key().len() + event.record.value().len() + prev
}

pub struct Watcher {
    id: i64,
    serial: u64,
    interest: Interest,
    mailbox: Arc<Mailbox>,
    tally: Arc<Tally>,
    /// Where it stands among the members of its range. Only used under the hub's lock.
    slot: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// In the hub's index: every event published is offered to it.
    Live,
    /// Not in the index: its stream reads the history for it.
    Behind,
    Ended,
}

pub struct State {
    pub mode: Mode,
    /// The first revision that was neither handed out nor queued, as far as the watcher itself
    /// knows: a live one also has everything that was published since.
    pub next: i64,
    /// Whole revisions, in order.
    queue: Vec<Event>,
    queue_bytes: usize,
    /// Whether it stands in its mailbox's ring, or is about to.
    in_ring: bool,
    /// Whether nothing was handed out since the last turn of the progress interval.
    pub quiet: bool,
}

/// A live watcher's answer to an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    Settled,
    /// The stream's queue is full. The watcher is behind now, and must leave the index.
    Full,
}

impl State {
    pub fn has_queue(&self) -> bool {
        !self.queue.is_empty()
    }
}

impl Watcher {
    /// A watcher that is behind, and not in its mailbox's ring yet.
    pub fn new(
        id: i64,
        serial: u64,
        interest: Interest,
        next: i64,
        mailbox: Arc<Mailbox>,
        tally: Arc<Tally>,
    ) -> Arc<Watcher> {
        let state = State {
            mode: Mode::Behind,
            next,
            queue: Vec::new(),
            queue_bytes: 0,
            in_ring: false,
            quiet: true,
        };
        let slot = AtomicUsize::new(usize::MAX);
        Arc::new(Watcher { id, serial, interest, mailbox, tally, slot, state: Mutex::new(state) })
    }

    pub fn id(&self) -> i64 {
        self.id
    }

    /// Its number among all watchers of the hub, in the order they were created.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    pub fn range(&self) -> &KeyRange {
        &self.interest.range
    }

    pub fn interest(&self) -> &Interest {
        &self.interest
    }

    pub fn slot(&self) -> usize {
        self.slot.load(Ordering::Relaxed)
    }

    pub fn set_slot(&self, slot: usize) {
        self.slot.store(slot, Ordering::Relaxed);
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with a watcher locked")
    }

    /// Hands a live watcher its events of `revision`, all of them. Called under the hub's lock.
    pub fn offer<'a>(
        self: &Arc<Watcher>,
        revision: i64,
        events: impl Iterator<Item = &'a Event>,
    ) -> Offer {
        let mut state = self.state();
        if revision < state.next {
            return Offer::Settled;
        }
        let (mut bytes, mut shown) = (0, 0);
        for event in events.filter_map(|event| self.interest.show(event)) {
            bytes += event_bytes(&event);
            state.queue.push(event);
            shown += 1;
        }
        if bytes == 0 {
            return Offer::Settled;
        }
        census::add(&self.tally.pending_events, shown);
        state.queue_bytes += bytes;
        let queued_bytes = self.mailbox.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let offer = if queued_bytes > QUEUE_BYTES {
            // Everything before its queue was handed out.
            state.next = state.queue[0].record.mod_revision().main;
            if mutant::is("watch-forgets-its-queue") {
                state.next = revision + 1;
            }
            state.mode = Mode::Behind;
            self.clear(&mut state);
            Offer::Full
        } else {
            Offer::Settled
        };
        self.ring(state);
        offer
    }

    /// Sends a live watcher, just taken out of the index, back to the history after `published`.
    /// What is queued stays queued.
    pub fn fall_behind(self: &Arc<Watcher>, published: i64) {
        let mut state = self.state();
        state.mode = Mode::Behind;
        state.next = state.next.max(published + 1);
        self.ring(state);
    }

    /// Puts the watcher into its mailbox's ring unless it is there.
    pub fn ring(self: &Arc<Watcher>, mut state: MutexGuard<'_, State>) {
        if !std::mem::replace(&mut state.in_ring, true) {
            drop(state);
            self.mailbox.ring(self.clone());
        }
    }

    /// Takes what is queued, and tells the mode. The watcher was just taken from the ring.
    pub fn take(&self) -> (Vec<Event>, Mode) {
        let mut state = self.state();
        state.in_ring = false;
        let events = std::mem::take(&mut state.queue);
        census::subtract(&self.tally.pending_events, events.len());
        self.clear(&mut state);
        if !events.is_empty() {
            state.quiet = false;
        }
        (events, state.mode)
    }

    /// Ends the watcher and forgets its queue; tells which mode it was in. Called under the hub's
    /// lock.
    pub fn end(&self) -> Mode {
        let mut state = self.state();
        self.clear(&mut state);
        std::mem::replace(&mut state.mode, Mode::Ended)
    }

    /// The first revision that its stream has not been handed. For a watcher that is in the ring.
    fn first_undelivered(&self) -> i64 {
        let state = self.state();
        match (state.queue.first(), state.mode) {
            (Some(event), _) => event.record.mod_revision().main,
            (None, Mode::Behind) => state.next,
            (None, Mode::Live | Mode::Ended) => i64::MAX,
        }
    }

    fn clear(&self, state: &mut State) {
        let events = std::mem::take(&mut state.queue);
        census::subtract(&self.tally.pending_events, events.len());
        let bytes = std::mem::take(&mut state.queue_bytes);
        self.mailbox.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What one stream has to look at.
#[derive(Default)]
pub struct Mailbox {
    /// The watchers that have something queued, or are behind. Each stands here at most once, and
    /// they are served in turn.
    ring: Mutex<VecDeque<Arc<Watcher>>>,
    /// Woken when the ring is no longer empty, and for progress.
    ready: Notify,
    /// The sum over the watchers. Only the publisher adds, under the hub's lock; so it is never
    /// above the limit for longer than an offer takes.
    queued_bytes: AtomicUsize,
}

impl Mailbox {
    fn ring(&self, watcher: Arc<Watcher>) {
        let mut ring = self.lock();
        ring.push_back(watcher);
        let first = ring.len() == 1;
        drop(ring);
        if first {
            self.wake();
        }
    }

    pub fn wake(&self) {
        self.ready.notify_one();
    }

    /// Returns when the ring may have become non-empty, or progress may be due. Dropping the future
    /// loses no wake-up.
    pub async fn woken(&self) {
        self.ready.notified().await;
    }

    pub fn pop(&self) -> Option<Arc<Watcher>> {
        self.lock().pop_front()
    }

    pub fn ring_len(&self) -> usize {
        self.lock().len()
    }

    /// The revision up to which the stream has been handed everything, given that everything up to
    /// `published` was offered to its live watchers before the call.
    pub fn delivered_up_to(&self, published: i64) -> i64 {
        // The ring is copied because a watcher's lock comes before the ring's.
        let ring = self.lock().clone();
        ring.iter().map(|watcher| watcher.first_undelivered() - 1).fold(published, i64::min)
    }

    #[cfg(test)]
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes.load(Ordering::Relaxed)
    }

    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Watcher>>> {
        self.ring.lock().expect("no thread panics with a mailbox locked")
    }
}
