//! Time and chance, handed in as values.
//!
//! Everything that needs to know how late it is, or needs a number nobody can guess, takes a
//! [`Clock`] or an [`Entropy`] as a parameter. A simulation hands in its own and decides both.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// How late it is on this member. Two members never agree on either answer.
pub trait Clock: Send + Sync {
    /// The time since some fixed moment in this process's life. Never runs backward. It may stand
    /// still while the machine is suspended, so it cannot prove that a leader lease still holds.
    fn monotonic(&self) -> Duration;

    /// Milliseconds since 1970-01-01 00:00 UTC, zero for an earlier time. May jump either way: for
    /// log lines and certificates, never for deadlines.
    fn wall_ms(&self) -> u64;
}

/// Numbers that cannot be foreseen.
pub trait Entropy: Send + Sync {
    /// Any `u64`, zero included.
    fn random_u64(&self) -> u64;
}

/// The machine's own clocks.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    started: Instant,
}

impl SystemClock {
    /// A clock whose monotonic time begins now.
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the monotonic clock")]
    pub fn new() -> SystemClock {
        SystemClock { started: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> SystemClock {
        SystemClock::new()
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }

    #[allow(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
    fn wall_ms(&self) -> u64 {
        match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since_epoch) => whole_ms(since_epoch),
            Err(_before_1970) => 0,
        }
    }
}

/// The operating system's randomness, fit for tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    #[allow(clippy::disallowed_methods, reason = "the one place that draws random numbers")]
    fn random_u64(&self) -> u64 {
        rand::random()
    }
}

/// A clock that moves only when told to.
#[derive(Debug, Default)]
pub struct ManualClock {
    monotonic_ns: AtomicU64,
    wall_ms: AtomicU64,
}

impl ManualClock {
    /// A clock at monotonic zero and at `wall_ms` after the epoch.
    pub fn at_wall_ms(wall_ms: u64) -> ManualClock {
        ManualClock { monotonic_ns: AtomicU64::new(0), wall_ms: AtomicU64::new(wall_ms) }
    }

    /// Moves both clocks forward. The wall clock moves by whole milliseconds.
    pub fn advance(&self, by: Duration) {
        let nanoseconds = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        self.monotonic_ns.fetch_add(nanoseconds, Ordering::SeqCst);
        self.wall_ms.fetch_add(whole_ms(by), Ordering::SeqCst);
    }

    /// Sets the wall clock, also backward, as an operator or a time server may.
    pub fn set_wall_ms(&self, wall_ms: u64) {
        self.wall_ms.store(wall_ms, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn monotonic(&self) -> Duration {
        Duration::from_nanos(self.monotonic_ns.load(Ordering::SeqCst))
    }

    fn wall_ms(&self) -> u64 {
        self.wall_ms.load(Ordering::SeqCst)
    }
}

/// The same numbers for the same seed (splitmix64). Foreseeable: for tests and simulation only.
#[derive(Debug)]
pub struct SeededEntropy {
    state: AtomicU64,
}

impl SeededEntropy {
    pub fn new(seed: u64) -> SeededEntropy {
        SeededEntropy { state: AtomicU64::new(seed) }
    }
}

impl Entropy for SeededEntropy {
    fn random_u64(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.state.fetch_add(STEP, Ordering::SeqCst).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told_to() {
        let clock = ManualClock::at_wall_ms(5_000);
        assert_eq!((clock.monotonic(), clock.wall_ms()), (Duration::ZERO, 5_000));
        clock.advance(Duration::from_millis(1_500));
        assert_eq!((clock.monotonic(), clock.wall_ms()), (Duration::from_millis(1_500), 6_500));
    }

    #[test]
    fn setting_the_wall_clock_leaves_monotonic_time_alone() {
        let clock = ManualClock::at_wall_ms(5_000);
        clock.advance(Duration::from_secs(1));
        clock.set_wall_ms(1);
        assert_eq!((clock.monotonic(), clock.wall_ms()), (Duration::from_secs(1), 1));
    }

    #[test]
    fn the_system_clock_never_runs_backward() {
        let clock = SystemClock::new();
        let earlier = clock.monotonic();
        assert!(clock.monotonic() >= earlier);
        let in_2020_ms = 1_577_836_800_000;
        assert!(clock.wall_ms() > in_2020_ms);
    }

    #[test]
    fn a_seed_alone_replays_the_numbers() {
        let first = SeededEntropy::new(7);
        let second = SeededEntropy::new(7);
        let drawn: Vec<u64> = (0..4).map(|_| first.random_u64()).collect();
        assert_eq!(drawn, (0..4).map(|_| second.random_u64()).collect::<Vec<_>>());
        assert_eq!(SeededEntropy::new(0).random_u64(), 0xe220_a839_7b1d_cdaf);
    }
}
