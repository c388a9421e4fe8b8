//! A disk that takes longer than an election: the member lets others lead until it is back.
//!
//! A leader needs its own disk for none of its commits, so it would live on, and hang as soon as its
//! queues are full. What counts is the write or sync of the log that is under way, and the applier's
//! wait for room in the queue of the state writer: while that queue takes batches, a stall of the
//! engine matters to nobody.
//!
//! | what has stalled | leader | follower |
//! | --- | --- | --- |
//! | log | hands over; if nobody takes over in time, falls silent | does not stand for election |
//! | state, its queue full | the same | the same; reads answer what is applied |
//!
//! What it has told nobody is safe either way; the member itself goes on when the disk does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Node, told};
use crate::raft::log_store::UnderWay;

/// How often the disk is looked at, in parts of the limit, which is the election timeout.
const LOOKS_IN_LIMIT: u32 = 8;

/// What of the disk has stalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stalled {
    Log,
    State,
}

/// Whether this member's disk has stalled. One task finds out, everybody may look.
pub struct Stall {
    log: Arc<UnderWay>,
    stalled: AtomicBool,
}

impl Stall {
    pub fn new(log: Arc<UnderWay>) -> Stall {
        Stall { log, stalled: AtomicBool::new(false) }
    }

    pub fn is(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }
}

/// A wait for room of the state writer, and since when it has been seen.
#[derive(Default)]
struct SeenWait(Option<(u64, Duration)>);

impl SeenWait {
    /// For how long the wait that is under way has been seen.
    fn time(&mut self, wait: Option<u64>, now: Duration) -> Duration {
        match (wait, self.0) {
            (Some(wait), Some((seen, since))) if wait == seen => now.saturating_sub(since),
            (wait, _) => {
                self.0 = wait.map(|wait| (wait, now));
                Duration::ZERO
            }
        }
    }
}

impl Node {
    /// Whether this member's disk has been at one write for longer than an election takes.
    pub fn disk_stalled(&self) -> bool {
        self.stall.is()
    }

    /// Watches the disk, and lets another lead while it stalls: runs as long as the member.
    pub(super) async fn keep_watching_disk(self: Arc<Self>) {
        let limit = self.limits.election_timeout;
        let mut look = tokio::time::interval(limit / LOOKS_IN_LIMIT);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut stopping = self.stopping.subscribe();
        let mut waits = SeenWait::default();
        let mut silent = false;
        loop {
            tokio::select! {
                _ = look.tick() => {}
                () = told(&mut stopping) => return,
            }
            let waited = waits.time(self.writer.waits(), self.clock.monotonic());
            let stalled = if self.stall.log.time().is_some_and(|time| time >= limit) {
                Some(Stalled::Log)
            } else if waited >= limit {
                Some(Stalled::State)
            } else {
                None
            };
            self.tell_stall(stalled);
            if stalled.is_none() && !silent {
                continue;
            }
            let leads = self.role().leader == Some(self.identity.member_id);
            if !leads || self.raft.voter_ids().count() == 1 {
                if stalled.is_none() {
                    self.raft.runtime_config().heartbeat(true);
                    silent = false;
                }
                continue;
            }
            tokio::select! {
                () = self.hand_over() => {}
                () = told(&mut stopping) => return,
            }
            if self.role().leader == Some(self.identity.member_id) && !silent {
                // It may take no more proposals: openraft does not take back a transfer. So the
                // others have to elect one of them.
                tracing::warn!(
                    "nobody took over from this member, whose disk stalls: falling silent"
                );
                self.raft.runtime_config().heartbeat(false);
                silent = true;
            }
        }
    }

    fn tell_stall(&self, stalled: Option<Stalled>) {
        if self.stall.stalled.swap(stalled.is_some(), Ordering::Relaxed) == stalled.is_some() {
            return;
        }
        self.raft.runtime_config().elect(stalled.is_none());
        match stalled {
            Some(stalled) => {
                self.meters().disk_stalls.increment();
                let limit_ms = self.limits.election_timeout.as_millis();
                tracing::warn!(
                    ?stalled,
                    limit_ms,
                    "the disk has been at one write for longer than an election takes: \
                     this member lets others lead"
                );
            }
            None => tracing::info!("the disk goes on"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_and_the_same_wait_for_room_grows_old() {
        let at = Duration::from_millis;
        let mut seen = SeenWait::default();
        assert_eq!(seen.time(Some(0), at(100)), Duration::ZERO);
        assert_eq!(seen.time(Some(0), at(400)), at(300));
        assert_eq!(seen.time(Some(1), at(500)), Duration::ZERO, "another wait");
        assert_eq!(seen.time(None, at(600)), Duration::ZERO);
        assert_eq!(seen.time(Some(1), at(700)), Duration::ZERO, "not seen in between");
        assert_eq!(seen.time(Some(1), at(900)), at(200));
    }
}
