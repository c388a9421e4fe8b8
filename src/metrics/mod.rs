//! Numbers that a running member counts, and the text in which they are told.
//!
//! A layer owns its counters as plain values and adds to them with one relaxed atomic operation: no
//! name, no label and no lock is met on the way of a request. Names and labels are put on at the
//! top, when somebody asks ([`page`]). What can be read at that time instead is not counted at all.
//!
//! The text is written here, and not by a library, because the libraries want to own the counters:
//! the layers below would then depend on them and on their registry.

mod page;
mod process;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use page::{CONTENT_TYPE, Kind, Page};
pub use process::Process;

/// Only ever grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn increment(&self) {
        self.add(1);
    }

    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// From 1 ms in powers of two: etcd's buckets for its log and its backend.
pub const DISK_BOUNDS_US: &[u64] = &[
    1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 256_000, 512_000, 1_024_000,
    2_048_000, 4_096_000, 8_192_000,
];

/// From 0.1 ms in powers of two: etcd's buckets for the way to a peer and back.
pub const ROUND_TRIP_BOUNDS_US: &[u64] = &[
    100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 51_200, 102_400, 204_800, 409_600,
    819_200, 1_638_400, 3_276_800,
];

/// The default buckets of Prometheus, which Go's gRPC servers use for their calls.
pub const CALL_BOUNDS_US: &[u64] = &[
    5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000,
    10_000_000,
];

/// How often things took how long.
#[derive(Debug)]
pub struct Histogram {
    /// The upper end of each bucket but the last, in microseconds, ascending.
    bounds_us: &'static [u64],
    /// One more than there are bounds.
    buckets: Box<[Counter]>,
    sum_ns: Counter,
}

impl Histogram {
    pub fn new(bounds_us: &'static [u64]) -> Histogram {
        let buckets = (0..=bounds_us.len()).map(|_| Counter::default()).collect();
        Histogram { bounds_us, buckets, sum_ns: Counter::default() }
    }

    pub fn observe(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        // A bucket holds what is at most its bound.
        let bucket = self.bounds_us.partition_point(|bound_us| bound_us.saturating_mul(1_000) < ns);
        self.buckets[bucket].increment();
        self.sum_ns.add(ns);
    }

    /// For each bound in seconds how many were at most that, the sum in seconds, and the number of
    /// all.
    fn cumulative(&self) -> (Vec<(f64, u64)>, f64, u64) {
        let mut below = 0;
        let bounded = self.bounds_us.iter().zip(&self.buckets).map(|(bound_us, bucket)| {
            below += bucket.get();
            (*bound_us as f64 / 1e6, below)
        });
        let bounded = bounded.collect();
        let all = below + self.buckets.last().map_or(0, Counter::get);
        (bounded, self.sum_ns.get() as f64 / 1e9, all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::new(&[1_000, 2_000]);
        for us in [0, 1_000, 1_001, 2_000, 2_001, 60_000_000] {
            histogram.observe(Duration::from_micros(us));
        }
        let (bounded, sum, all) = histogram.cumulative();
        assert_eq!(bounded, [(0.001, 2), (0.002, 4)]);
        assert_eq!(all, 6);
        assert!((sum - 60.006002).abs() < 1e-9, "{sum}");
    }

    #[test]
    fn bounds_ascend() {
        for bounds in [DISK_BOUNDS_US, ROUND_TRIP_BOUNDS_US, CALL_BOUNDS_US] {
            assert!(bounds.is_sorted_by(|a, b| a < b));
        }
    }
}
