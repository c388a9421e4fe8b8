//! Who leads, as this member knows it, and the time that a leader stamps on entries.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::clock::Clock;
use crate::mutant;
use crate::types::{MemberId, Timestamp};

/// What this member knows of the cluster's leadership.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Role {
    pub term: u64,
    /// The leader of `term`, once known.
    pub leader: Option<MemberId>,
    /// Set when this member leads `term` and has applied everything from before it.
    pub leading: Option<LeaderClock>,
    /// The highest term of which an entry was applied here.
    pub applied_term: u64,
}

/// Cluster time as the leader of one term counts it: from the newest entry it knew at its
/// promotion, on its own monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderClock {
    base: Timestamp,
    promoted_at: Duration,
}

impl LeaderClock {
    pub fn now(&self, clock: &dyn Clock) -> Timestamp {
        self.base.plus(clock.monotonic().saturating_sub(self.promoted_at))
    }
}

/// Keeps [`Role`] from the two sources that tell of it: openraft, and the entries applied.
pub struct RoleTracker {
    me: MemberId,
    clock: Arc<dyn Clock>,
    role: watch::Sender<Role>,
}

impl RoleTracker {
    pub fn new(me: MemberId, clock: Arc<dyn Clock>) -> RoleTracker {
        RoleTracker { me, clock, role: watch::Sender::new(Role::default()) }
    }

    pub fn subscribe(&self) -> watch::Receiver<Role> {
        self.role.subscribe()
    }

    pub fn get(&self) -> Role {
        *self.role.borrow()
    }

    /// openraft's view. `newest` is the time of the newest entry applied.
    pub fn on_raft(&self, term: u64, leader: Option<MemberId>, newest: Timestamp) {
        self.role.send_if_modified(|role| {
            let before = *role;
            if term > role.term {
                role.term = term;
                role.leader = leader;
                role.leading = None;
            } else if term == role.term {
                role.leader = leader;
            }
            self.promote(role, newest);
            *role != before
        });
    }

    /// An entry of `term` was applied, and `newest` is its time.
    pub fn on_applied(&self, term: u64, newest: Timestamp) {
        if self.role.borrow().applied_term >= term {
            return;
        }
        self.role.send_if_modified(|role| {
            role.applied_term = role.applied_term.max(term);
            self.promote(role, newest);
            true
        });
    }

    fn promote(&self, role: &mut Role, newest: Timestamp) {
        if role.leader != Some(self.me) {
            role.leading = None;
        } else if role.leading.is_none() && role.applied_term == role.term {
            let base = if mutant::is("lease-anew") { Timestamp(0) } else { newest };
            role.leading = Some(LeaderClock { base, promoted_at: self.clock.monotonic() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    #[test]
    fn a_leader_counts_from_the_newest_entry_once_its_own_term_is_applied() {
        let clock = Arc::new(ManualClock::default());
        let tracker = RoleTracker::new(MemberId(1), clock.clone());
        tracker.on_raft(3, Some(MemberId(1)), Timestamp(500));
        assert_eq!(tracker.get().leading, None, "entries of earlier terms may be missing");
        clock.advance(Duration::from_secs(5));
        tracker.on_applied(3, Timestamp(700));
        clock.advance(Duration::from_millis(40));
        let leading = tracker.get().leading.expect("promoted");
        assert_eq!(leading.now(clock.as_ref()), Timestamp(740));

        tracker.on_raft(4, None, Timestamp(740));
        assert_eq!(tracker.get().leading, None);
        tracker.on_raft(3, Some(MemberId(1)), Timestamp(740));
        assert_eq!(tracker.get().leader, None, "news of an older term are old");
    }
}
