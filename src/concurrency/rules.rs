//! What an operator may choose about etcd's Lock service, and the account of the leases that the
//! server makes for calls without one.

use std::str::FromStr;
use std::sync::Mutex;
use std::time::Duration;

use crate::clock::Clock;

/// How long a lease lives that the server made for a call without one, after the grant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Lease0 {
    /// For its TTL; nobody renews it.
    #[default]
    Etcd,
    /// As long as the connection of the call, and the key, and then its TTL.
    Connection,
}

/// What Unlock deletes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UnlockRule {
    /// A key of the form `NAME/HEX` that is attached to the lease HEX.
    #[default]
    Strict,
    /// Any key.
    Etcd,
}

/// The operator's choices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    pub lease0: Lease0,
    pub unlock: UnlockRule,
}

impl FromStr for Lease0 {
    type Err = ();

    fn from_str(text: &str) -> Result<Lease0, ()> {
        match text {
            "etcd" => Ok(Lease0::Etcd),
            "connection" => Ok(Lease0::Connection),
            _ => Err(()),
        }
    }
}

impl FromStr for UnlockRule {
    type Err = ();

    fn from_str(text: &str) -> Result<UnlockRule, ()> {
        match text {
            "strict" => Ok(UnlockRule::Strict),
            "etcd" => Ok(UnlockRule::Etcd),
            _ => Err(()),
        }
    }
}

/// Between two warnings about leases that the server made.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Counts the leases that the server made for calls without one, and warns of them: such a lock
/// vanishes under its holder, who may not know that it has a lease at all.
#[derive(Default)]
pub struct ServerLeases {
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    made: u64,
    /// When a warning was written last, and what `made` was.
    warned: Option<(Duration, u64)>,
}

impl ServerLeases {
    /// How many there were since the member started.
    pub fn made(&self) -> u64 {
        self.lock().made
    }

    pub(super) fn count(&self, clock: &dyn Clock) {
        if let Some(since_warning) = self.note(clock.monotonic()) {
            tracing::warn!(
                calls = since_warning,
                "Lock or Campaign without a lease: the server made one, which nobody renews after \
                 the grant; pass a lease of your own and keep it alive"
            );
        }
    }

    /// Notes one lease. Returns how many there were since the last warning when it is time for
    /// another.
    fn note(&self, now: Duration) -> Option<u64> {
        let mut counts = self.lock();
        counts.made += 1;
        let before = match counts.warned {
            Some((at, _)) if now.saturating_sub(at) < WARNING_INTERVAL => return None,
            Some((_, made)) => made,
            None => 0,
        };
        counts.warned = Some((now, counts.made));
        Some(counts.made - before)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_leases_is_counted_in_full_and_warned_of_once_a_minute() {
        let leases = ServerLeases::default();
        let at = Duration::from_secs;
        assert_eq!(leases.note(at(5)), Some(1));
        for second in 5..65 {
            assert_eq!(leases.note(at(second)), None);
        }
        assert_eq!(leases.note(at(65)), Some(61));
        assert_eq!(leases.note(at(66)), None);
        assert_eq!(leases.made(), 63);
    }
}
