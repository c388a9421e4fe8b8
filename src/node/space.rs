//! Whether a command may be proposed now: the alarms that are raised, and the quota, which raises
//! one of them.
//!
//! The state machine refuses by the alarms itself, at the same entry on every member. Here they keep
//! what would be refused anyway out of the log. The quota is looked at here alone: it is a setting of
//! each member, so nothing replicated may depend on it but the alarm. What is under way when the
//! alarm is raised goes beyond it: at most the calls that may be open (`calls.rs`).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{Failure, Node};
use crate::machine::{
    Alarm, AlarmAction, AlarmKind, AlarmKinds, Command, Machine, Principal, Rejection,
};

/// What the applier tells of the machine, for those who do not lock it.
#[derive(Debug, Default)]
pub struct Space {
    used_bytes: AtomicU64,
    no_space: AtomicBool,
    corrupt: AtomicBool,
    /// Held by the call that raises the alarm.
    raising: tokio::sync::Mutex<()>,
}

impl Space {
    /// Takes over what the machine says, after each entry.
    pub fn note(&self, machine: &Machine) {
        let AlarmKinds { no_space, corrupt } = machine.alarm_kinds();
        self.used_bytes.store(machine.used_bytes(), Ordering::Relaxed);
        self.no_space.store(no_space, Ordering::Relaxed);
        self.corrupt.store(corrupt, Ordering::Relaxed);
    }

    /// What keys, history and leases take, as of the newest entry applied here.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    fn alarm_kinds(&self) -> AlarmKinds {
        AlarmKinds {
            no_space: self.no_space.load(Ordering::Relaxed),
            corrupt: self.corrupt.load(Ordering::Relaxed),
        }
    }

    fn obstacle(&self, command: &Command, quota_bytes: Option<u64>) -> Option<Obstacle> {
        if let Some(rejection) = self.alarm_kinds().refusal(command) {
            return Some(Obstacle::Alarm(rejection));
        }
        let quota_bytes = quota_bytes?;
        let growth_bytes = command.growth_bytes();
        let full = growth_bytes > 0 && self.used_bytes() + growth_bytes > quota_bytes;
        full.then_some(Obstacle::Quota { quota_bytes })
    }
}

/// Why a command is not proposed.
#[derive(Debug, PartialEq, Eq)]
enum Obstacle {
    Alarm(Rejection),
    Quota { quota_bytes: u64 },
}

impl Node {
    /// Refuses what an alarm would refuse, and raises NOSPACE for what the quota does not allow.
    pub(super) async fn admit(&self, command: &Command) -> Result<(), Failure> {
        let space = &self.shared.space;
        if space.obstacle(command, self.limits.quota_bytes).is_none() {
            return Ok(());
        }
        // Another member may have answered already that the alarm is cleared or the history
        // compacted: whoever was told so must not be refused here.
        self.read_barrier().await?;
        match space.obstacle(command, self.limits.quota_bytes) {
            None => Ok(()),
            Some(Obstacle::Alarm(rejection)) => Err(rejection.into()),
            Some(Obstacle::Quota { quota_bytes }) => {
                self.raise_no_space(quota_bytes).await;
                Err(Rejection::NoSpace.into())
            }
        }
    }

    async fn raise_no_space(&self, quota_bytes: u64) {
        // One call raises it; the others are refused all the same.
        let Ok(_raising) = self.shared.space.raising.try_lock() else { return };
        if self.shared.space.alarm_kinds().no_space {
            return;
        }
        let used_bytes = self.shared.space.used_bytes();
        tracing::warn!(
            used_bytes,
            quota_bytes,
            "the store is larger than --quota-backend-bytes: raising alarm NOSPACE; compact the \
             history or delete keys and compact, then disarm the alarm"
        );
        let alarm = Alarm { member: self.identity.member_id, kind: AlarmKind::NoSpace };
        let raise = Command::Alarm(AlarmAction::Raise(alarm));
        // Without it the next write that finds no room raises it.
        if let Err(failure) = Box::pin(self.call(Some(Principal::Server), raise)).await {
            tracing::warn!(%failure, "alarm NOSPACE is not raised yet");
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::machine::Put;
    use crate::types::LeaseId;

    fn put(value_bytes: usize) -> Command {
        Command::Put(Put {
            key: Bytes::from_static(b"k"),
            value: Some(vec![0; value_bytes].into()),
            lease: Some(LeaseId::NONE),
            prev_kv: false,
        })
    }

    #[test]
    fn the_quota_stops_what_would_pass_it_and_nothing_that_frees_space() {
        let space = Space::default();
        let quota_bytes = put(100).growth_bytes() + 1_000;
        space.used_bytes.store(1_000, Ordering::Relaxed);
        let quota = Some(quota_bytes);
        assert_eq!(space.obstacle(&put(100), quota), None);
        assert_eq!(space.obstacle(&put(101), quota), Some(Obstacle::Quota { quota_bytes }));
        assert_eq!(space.obstacle(&put(101), None), None);
        space.used_bytes.store(u64::MAX / 2, Ordering::Relaxed);
        assert_eq!(space.obstacle(&Command::Compact { revision: 5 }, quota), None);
        assert_eq!(space.obstacle(&Command::LeaseRevoke { id: LeaseId(1) }, quota), None);
    }
}
