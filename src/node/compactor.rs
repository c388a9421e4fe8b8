//! Auto-compaction: history older than a time, or longer than a number of revisions, ends by itself.
//!
//! Every member notes how the revision goes on, and the leader alone proposes. So a change of
//! leader neither delays a compaction by a whole retention nor makes it reach further than asked.
//! The schedules are etcd's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::{Failure, Node, told};
use crate::machine::{Command, Principal, Rejection};

/// Of a long retention, and so how far behind its time a compaction may be.
const LONGEST_INTERVAL: Duration = Duration::from_secs(3_600);
/// Looks at the revision in one interval.
const LOOKS_AN_INTERVAL: u32 = 10;
/// However short the retention.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
/// Between two looks when it is the number of revisions that counts.
const REVISION_LOOK: Duration = Duration::from_secs(300);

/// Which history to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoCompaction {
    /// That of the last while, which is not zero.
    Periodic(Duration),
    /// The last so many revisions, at least one.
    Revision(i64),
}

/// Decides when to compact, and up to which revision. Times are on one monotonic clock.
#[derive(Debug)]
enum Schedule {
    Periodic {
        retention: Duration,
        /// The revision at each look of the last retention, oldest first.
        looks: VecDeque<i64>,
        compacted_at: Duration,
        /// Whether a first retention has passed: from then on the interval counts.
        begun: bool,
    },
    Revision {
        keep: i64,
        compacted: i64,
    },
}

impl Schedule {
    fn new(asked: AutoCompaction, now: Duration) -> Schedule {
        match asked {
            AutoCompaction::Periodic(retention) => Schedule::Periodic {
                retention,
                looks: VecDeque::new(),
                compacted_at: now,
                begun: false,
            },
            AutoCompaction::Revision(keep) => Schedule::Revision { keep, compacted: 0 },
        }
    }

    /// How long to wait between two looks.
    fn pause(&self) -> Duration {
        match self {
            Schedule::Periodic { retention, .. } => {
                (interval(*retention) / LOOKS_AN_INTERVAL).max(SHORTEST_PAUSE)
            }
            Schedule::Revision { .. } => REVISION_LOOK,
        }
    }

    /// Notes that the store is at `revision`: at the start, and after each look.
    fn note(&mut self, revision: i64) {
        let pause = self.pause();
        let Schedule::Periodic { retention, looks, .. } = self else { return };
        looks.push_back(revision);
        // One more than there are pauses in a retention: at the next look the first is older than it.
        let most = retention.as_nanos() / pause.as_nanos() + 1;
        while looks.len() as u128 > most {
            looks.pop_front();
        }
    }

    /// The revision to compact at, if it is time, at a store that is at `revision`.
    fn due(&mut self, now: Duration, revision: i64) -> Option<i64> {
        match self {
            Schedule::Periodic { retention, looks, compacted_at, begun } => {
                let wait = if *begun { interval(*retention) } else { *retention };
                if now.saturating_sub(*compacted_at) < wait {
                    return None;
                }
                *begun = true;
                looks.front().copied()
            }
            Schedule::Revision { keep, compacted } => {
                let target = revision - *keep;
                (target > 0 && target != *compacted).then_some(target)
            }
        }
    }

    /// Everything before `revision` is compacted.
    fn done(&mut self, now: Duration, revision: i64) {
        match self {
            Schedule::Periodic { compacted_at, .. } => *compacted_at = now,
            Schedule::Revision { compacted, .. } => *compacted = revision,
        }
    }
}

/// A compaction follows so long after another.
fn interval(retention: Duration) -> Duration {
    retention.min(LONGEST_INTERVAL)
}

impl Node {
    /// Compacts by the schedule while this member leads: runs as long as the member.
    pub(super) async fn keep_compacting(self: Arc<Self>, asked: AutoCompaction) {
        let mut schedule = Schedule::new(asked, self.clock.monotonic());
        let mut stopping = self.stopping.subscribe();
        loop {
            schedule.note(self.store.revision());
            tokio::select! {
                () = tokio::time::sleep(schedule.pause()) => {}
                () = told(&mut stopping) => return,
            }
            if self.role().leading.is_none() {
                continue;
            }
            let now = self.clock.monotonic();
            let Some(revision) = schedule.due(now, self.store.revision()) else { continue };
            match self.propose(Some(Principal::Server), Command::Compact { revision }).await {
                Ok(_) => {
                    tracing::info!(revision, retention = ?asked, "compacted");
                    schedule.done(now, revision);
                }
                // By a client, or nothing was written in the meantime.
                Err(Failure::Rejected(Rejection::Compacted { .. })) => schedule.done(now, revision),
                Err(failure) => {
                    tracing::warn!(revision, %failure, "auto-compaction failed; tried again at the next look");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock, ManualClock};

    const MINUTE: Duration = Duration::from_secs(60);

    /// Runs a schedule for `time`, in which `revision` tells how far the store is at each moment,
    /// and every compaction succeeds. Returns when, in minutes, and up to where it compacted.
    fn run(
        asked: AutoCompaction,
        time: Duration,
        revision: impl Fn(Duration) -> i64,
        leads: impl Fn(Duration) -> bool,
    ) -> Vec<(u64, i64)> {
        let clock = ManualClock::default();
        clock.advance(17 * MINUTE);
        let start = clock.monotonic();
        let mut schedule = Schedule::new(asked, start);
        let mut compactions = Vec::new();
        loop {
            schedule.note(revision(clock.monotonic() - start));
            clock.advance(schedule.pause());
            let now = clock.monotonic();
            let since = now - start;
            if since > time {
                return compactions;
            }
            if !leads(since) {
                continue;
            }
            if let Some(target) = schedule.due(now, revision(since)) {
                schedule.done(now, target);
                compactions.push((since.as_secs() / 60, target));
            }
        }
    }

    /// A store that is written once a minute.
    fn a_minute(since: Duration) -> i64 {
        1 + i64::try_from(since.as_secs() / 60).unwrap()
    }

    fn always(_: Duration) -> bool {
        true
    }

    #[test]
    fn a_short_retention_compacts_once_in_its_own_time() {
        let ten_minutes = AutoCompaction::Periodic(10 * MINUTE);
        let compactions = run(ten_minutes, 35 * MINUTE, a_minute, always);
        // To what the revision was ten minutes before, or one look earlier.
        assert_eq!(compactions, [(10, 1), (20, 10), (30, 20)]);
    }

    #[test]
    fn a_long_retention_waits_once_and_then_compacts_every_hour() {
        let three_hours = AutoCompaction::Periodic(180 * MINUTE);
        let compactions = run(three_hours, 330 * MINUTE, a_minute, always);
        assert_eq!(compactions, [(180, 1), (240, 55), (300, 115)]);
    }

    #[test]
    fn a_new_leader_knows_the_revisions_from_before_it_led() {
        let hour = AutoCompaction::Periodic(60 * MINUTE);
        let promoted = |since: Duration| since >= 80 * MINUTE;
        let compactions = run(hour, 150 * MINUTE, a_minute, promoted);
        // Eighty-four minutes is the first look after eighty; an hour and one look are kept.
        assert_eq!(compactions, [(84, 19), (144, 79)]);
    }

    #[test]
    fn a_failure_is_tried_again_at_the_next_look() {
        let clock = ManualClock::default();
        let mut schedule = Schedule::new(AutoCompaction::Periodic(10 * MINUTE), clock.monotonic());
        for revision in 1..=10 {
            schedule.note(revision);
            clock.advance(MINUTE);
        }
        assert_eq!(schedule.due(clock.monotonic(), 11), Some(1));
        schedule.note(11);
        clock.advance(MINUTE);
        assert_eq!(schedule.due(clock.monotonic(), 12), Some(1), "not done yet");
        schedule.done(clock.monotonic(), 1);
        schedule.note(12);
        clock.advance(MINUTE);
        assert_eq!(schedule.due(clock.monotonic(), 13), None);
    }

    #[test]
    fn revisions_are_counted_every_five_minutes() {
        let hundred = AutoCompaction::Revision(100);
        let fast = |since: Duration| 1 + i64::try_from(since.as_secs()).unwrap() / 2;
        let compactions = run(hundred, 16 * MINUTE, fast, always);
        assert_eq!(compactions, [(5, 51), (10, 201), (15, 351)]);
        let still = |since: Duration| fast(since.min(5 * MINUTE));
        assert_eq!(run(hundred, 16 * MINUTE, still, always), [(5, 51)], "nothing to do twice");
        assert_eq!(run(hundred, 16 * MINUTE, |_| 100, always), [], "there are not so many");
    }
}
