//! A recorded time: microseconds since a moment that all records of one process share.
//!
//! An `Instant` means nothing outside of its process. With `#[serde(with = "crate::moment")]` one is
//! written as the time since the first of them was asked for, and read back into another process
//! such that the distances are the same.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serializer};

/// Where recorded times count from. A process that records calls this before anything happens.
pub fn origin() -> Instant {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    *ORIGIN.get_or_init(Instant::now)
}

/// Microseconds from the origin; 0 for what was before it.
pub fn micros(at: Instant) -> u64 {
    let since = at.saturating_duration_since(origin());
    u64::try_from(since.as_micros()).expect("a process does not run for 500,000 years")
}

/// The inverse of [`micros`].
pub fn at(micros: u64) -> Instant {
    origin() + Duration::from_micros(micros)
}

pub fn serialize<S: Serializer>(at: &Instant, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(micros(*at))
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Instant, D::Error> {
    Ok(at(u64::deserialize(deserializer)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_is_read_back_is_the_time_that_was_written() {
        let now = origin() + Duration::from_micros(1_234_567);
        assert_eq!(at(micros(now)), now);
    }
}
