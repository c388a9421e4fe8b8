//! What is counted, and when: the window of the measurement and the tally of operations.
//!
//! With a fixed time, the throughput counts the operations that *ended* inside the window, since
//! those begun before it and those ended after it then balance. The latencies also include the
//! operations that were under way when the window closed: leaving them out would hide a stall at
//! the end. With a fixed number, exactly the operations begun after the warm-up count.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tonic::Status;

/// More kinds of errors than this are counted together.
const ERROR_KINDS_MAX: usize = 20;

/// From when to when operations count.
pub struct Window {
    pub opens: Instant,
    end: End,
}

enum End {
    At(Instant),
    /// How many operations may still begin.
    After(AtomicU64),
}

impl Window {
    /// Opens after `warmup` and closes `duration` later, or after `total` operations if given.
    pub fn new(warmup: Duration, duration: Duration, total: Option<u64>) -> Window {
        let opens = Instant::now() + warmup;
        let end = match total {
            Some(total) => End::After(AtomicU64::new(total)),
            None => End::At(opens + duration),
        };
        Window { opens, end }
    }

    /// When the window closes, if that is known beforehand.
    pub fn closes(&self) -> Option<Instant> {
        match self.end {
            End::At(closes) => Some(closes),
            End::After(_) => None,
        }
    }

    /// Whether an operation may begin at `now`. Takes it off the number to do, if there is one.
    pub fn admits(&self, now: Instant) -> bool {
        match &self.end {
            End::At(closes) => now < *closes,
            End::After(_) if now < self.opens => true,
            End::After(left) => left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                .is_ok(),
        }
    }
}

/// Operations counted so far.
#[derive(Debug)]
pub struct Tally {
    /// Successful operations that count for the throughput.
    pub operations: u64,
    /// Microseconds that each successful operation took.
    pub latencies: Histogram<u64>,
    pub errors: Errors,
    /// When the last operation ended.
    pub last: Option<Instant>,
}

impl Tally {
    pub fn new() -> Tally {
        let latencies = Histogram::new_with_max(3_600_000_000, 3)
            .expect("an hour in microseconds and three digits are within the bounds");
        Tally { operations: 0, latencies, errors: Errors::default(), last: None }
    }

    /// Counts an operation, as far as it belongs to `window`.
    pub fn record(
        &mut self,
        window: &Window,
        began: Instant,
        ended: Instant,
        result: Result<(), &Status>,
    ) {
        let (measured, counts) = match window.end {
            End::At(closes) => (ended >= window.opens, ended <= closes),
            End::After(_) => (began >= window.opens, true),
        };
        if !measured {
            return;
        }
        self.last = self.last.max(Some(ended));
        match result {
            Ok(()) => {
                self.operations += u64::from(counts);
                let microseconds = ended.saturating_duration_since(began).as_micros();
                self.latencies.saturating_record(u64::try_from(microseconds).unwrap_or(u64::MAX));
            }
            Err(status) => self.errors.add(status),
        }
    }

    pub fn merge(&mut self, other: &Tally) {
        self.operations += other.operations;
        self.latencies
            .add(&other.latencies)
            .expect("histograms with the same bounds can always be added");
        self.errors.merge(&other.errors);
        self.last = self.last.max(other.last);
    }
}

/// How often each kind of error occurred.
#[derive(Debug, Default, Clone)]
pub struct Errors {
    pub kinds: BTreeMap<String, u64>,
}

impl Errors {
    pub fn add(&mut self, status: &Status) {
        self.add_kind(format!("{:?}: {}", status.code(), status.message()), 1);
    }

    pub fn add_kind(&mut self, kind: String, count: u64) {
        let room = self.kinds.len() < ERROR_KINDS_MAX || self.kinds.contains_key(&kind);
        let kind = if room { kind } else { "other".to_owned() };
        *self.kinds.entry(kind).or_default() += count;
    }

    pub fn merge(&mut self, other: &Errors) {
        for (kind, count) in &other.kinds {
            self.add_kind(kind.clone(), *count);
        }
    }

    pub fn total(&self) -> u64 {
        self.kinds.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_warmup_does_not_count() {
        let window = Window::new(SECOND, SECOND, None);
        let mut tally = Tally::new();
        tally.record(&window, window.opens - SECOND, window.opens - SECOND / 2, Ok(()));
        assert_eq!((tally.operations, tally.latencies.len()), (0, 0));
        tally.record(&window, window.opens - SECOND / 2, window.opens + SECOND / 2, Ok(()));
        assert_eq!((tally.operations, tally.latencies.len()), (1, 1));
    }

    #[test]
    fn an_operation_that_outlasts_the_window_shows_in_the_latencies_only() {
        let window = Window::new(SECOND, SECOND, None);
        let mut tally = Tally::new();
        tally.record(&window, window.opens, window.opens + 5 * SECOND, Ok(()));
        assert_eq!(tally.operations, 0);
        assert!(tally.latencies.max() >= 4_990_000);
    }

    #[test]
    fn a_total_admits_exactly_that_many_after_the_warmup() {
        let window = Window::new(SECOND, SECOND, Some(2));
        let admitted = |at| window.admits(at);
        assert!(admitted(window.opens - SECOND / 2));
        assert!(admitted(window.opens));
        assert!(admitted(window.opens));
        assert!(!admitted(window.opens));
    }

    #[test]
    fn kinds_of_errors_are_bounded() {
        let mut errors = Errors::default();
        for number in 0..100 {
            errors.add(&Status::unknown(format!("number {number}")));
        }
        assert_eq!(errors.total(), 100);
        assert_eq!(errors.kinds.len(), ERROR_KINDS_MAX + 1);
    }
}
