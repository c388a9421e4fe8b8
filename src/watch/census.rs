//! How many watch, and how far behind they are.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::metrics::Counter;

/// The watches of this member at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    pub streams: usize,
    pub watchers: usize,
    /// Of the watchers, those that read the history because they are behind.
    pub slow_watchers: usize,
    /// Events that wait in the queues of streams.
    pub pending_events: usize,
    /// Events ever handed to streams.
    pub events: u64,
}

/// Shared by the hub, its streams and its watchers.
#[derive(Debug, Default)]
pub struct Tally {
    pub streams: AtomicUsize,
    pub watchers: AtomicUsize,
    pub live: AtomicUsize,
    pub pending_events: AtomicUsize,
    pub events: Counter,
}

impl Tally {
    pub fn census(&self) -> Census {
        let watchers = self.watchers.load(Ordering::Relaxed);
        Census {
            streams: self.streams.load(Ordering::Relaxed),
            watchers,
            // The two are not read at the same moment.
            slow_watchers: watchers.saturating_sub(self.live.load(Ordering::Relaxed)),
            pending_events: self.pending_events.load(Ordering::Relaxed),
            events: self.events.get(),
        }
    }
}

pub fn add(count: &AtomicUsize, by: usize) {
    count.fetch_add(by, Ordering::Relaxed);
}

pub fn subtract(count: &AtomicUsize, by: usize) {
    count.fetch_sub(by, Ordering::Relaxed);
}
