//! The time that entries carry.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Cluster time in milliseconds since the cluster's first entry.
///
/// It is no wall clock. The leader stamps each entry with the time of the newest entry it knew when
/// it was promoted plus what its own monotonic clock has counted since. Cluster time therefore
/// never runs backward, and stands still while there is no leader.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Timestamp(pub u64);

impl Timestamp {
    pub fn plus(self, duration: Duration) -> Timestamp {
        Timestamp(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// The time from `earlier` to `self`, zero when `earlier` is later.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}
