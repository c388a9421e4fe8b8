//! Leases: renewals that travel together, and the end of those that ran out.
//!
//! A keep-alive is an entry: its answer proves that the leader still led, and no later leader
//! forgets it. All keep-alives that arrive while one such entry is under way share the next.
//!
//! The leader proposes the end of a lease once its own clock has passed the deadline. The proposal
//! names the renewal it saw, so it is void if the lease was renewed in the meantime.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};

use super::{Failure, LeaseInfo, Node, locked, told};
use crate::machine::{Command, ExpiredLease, Reply};
use crate::mutant;
use crate::types::{LeaseId, Timestamp};

/// Leases that end in one entry.
const ENDS_AN_ENTRY: usize = 1000;
/// Renewals in one entry.
const RENEWALS_AN_ENTRY: usize = 10_000;
/// How far cluster time may stand behind the leader's clock while leases exist: what a new leader
/// may give a lease on top.
const TICK_INTERVAL: Duration = Duration::from_secs(1);

/// Of cluster time.
const RESOLUTION: Duration = Duration::from_millis(1);

/// After a proposal that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

type Waiting = oneshot::Sender<Result<Option<i64>, Failure>>;

/// Keep-alives that wait for the next entry; bounded by the calls that make them.
#[derive(Default)]
pub struct Renewals {
    waiting: Mutex<Vec<(LeaseId, Waiting)>>,
    arrived: Notify,
}

impl Node {
    /// Refills the time of lease `id` and returns its granted TTL in seconds, or `None` when there
    /// is no such lease.
    pub async fn lease_renew(&self, id: LeaseId) -> Result<Option<i64>, Failure> {
        if *self.stopping.borrow() {
            return Err(Failure::Stopping);
        }
        let (answer, receiver) = oneshot::channel();
        locked(&self.renewals.waiting).push((id, answer));
        self.renewals.arrived.notify_one();
        self.patiently(async { receiver.await.map_err(|_| Failure::Stopping)? }).await
    }

    /// Renews what waits, entry by entry: runs as long as the member.
    pub(super) async fn keep_renewing(self: Arc<Self>) {
        loop {
            self.renewals.arrived.notified().await;
            let mut waiting = std::mem::take(&mut *locked(&self.renewals.waiting));
            while !waiting.is_empty() {
                let rest = waiting.split_off(waiting.len().min(RENEWALS_AN_ENTRY));
                self.renew_together(waiting).await;
                waiting = rest;
            }
        }
    }

    async fn renew_together(&self, waiting: Vec<(LeaseId, Waiting)>) {
        let mut by_lease: BTreeMap<LeaseId, Vec<Waiting>> = BTreeMap::new();
        for (id, answer) in waiting {
            if !answer.is_closed() {
                by_lease.entry(id).or_default().push(answer);
            }
        }
        if by_lease.is_empty() {
            return;
        }
        let ids: Vec<LeaseId> = by_lease.keys().copied().collect();
        if mutant::is("renewal-unproposed") {
            for answer in by_lease.into_values().flatten() {
                let _ = answer.send(Ok(Some(1)));
            }
            return;
        }
        let result =
            self.patiently(self.propose_patiently(None, Command::LeaseRenew { ids })).await;
        let results: Vec<Result<Option<i64>, Failure>> = match result.map(|applied| applied.reply) {
            Ok(Reply::LeaseRenewed(granted)) => granted.into_iter().map(Ok).collect(),
            Ok(other) => unreachable!("a renewal was answered with {other:?}"),
            Err(failure) => vec![Err(failure); by_lease.len()],
        };
        for (answers, result) in by_lease.into_values().zip(results) {
            for answer in answers {
                // The caller may be gone by now.
                let _ = answer.send(result.clone());
            }
        }
    }

    /// What remains of lease `id`; `None` when there is no such lease.
    pub async fn lease_info(&self, id: LeaseId, keys: bool) -> Result<Option<LeaseInfo>, Failure> {
        let point = self.read_point().await?;
        let machine = self.machine();
        Ok(machine.leases().get(id).map(|lease| LeaseInfo {
            granted_ttl_seconds: lease.ttl_seconds,
            remaining: lease.deadline.since(point.now.max(machine.now())),
            keys: if keys { lease.keys.iter().cloned().collect() } else { Vec::new() },
        }))
    }

    /// All leases, the one that ends soonest first.
    pub async fn lease_list(&self) -> Result<Vec<LeaseId>, Failure> {
        self.read_barrier().await?;
        let machine = self.machine();
        Ok(machine.leases().iter_by_deadline().map(|(id, _)| id).collect())
    }

    /// Ends leases whose time has run out, while this member leads: runs as long as the member.
    pub(super) async fn keep_expiring(self: Arc<Self>) {
        let mut role = self.shared.role.subscribe();
        let mut stopping = self.stopping.subscribe();
        loop {
            let now = *role.borrow_and_update();
            let due = match now.leading {
                None => Due::Later(None),
                Some(leading) => self.due(leading.now(self.clock.as_ref())),
            };
            let (command, pause) = match due {
                Due::Ended(leases) => (Some(Command::LeaseExpire { term: now.term, leases }), None),
                Due::Tick => (Some(Command::Tick), None),
                Due::Later(pause) => (None, pause),
            };
            if let Some(command) = command {
                // A failure leaves the leases where they are, for the next turn.
                if let Err(failure) = self.propose(None, command).await {
                    tracing::debug!(%failure, "no lease ended, no tick");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                continue;
            }
            let sleep = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = sleep => {}
                () = self.shared.lessor.notified() => {}
                changed = role.changed() => if changed.is_err() { return },
                () = told(&mut stopping) => return,
            }
        }
    }

    fn due(&self, now: Timestamp) -> Due {
        let machine = self.machine();
        let leases = machine.leases();
        if machine.alarm_kinds().corrupt {
            // No lease ends until the alarm is cleared, which wakes the lessor.
            return match now.since(machine.now()) {
                behind if leases.is_empty() || behind < TICK_INTERVAL => {
                    let left = TICK_INTERVAL.saturating_sub(behind);
                    Due::Later((!leases.is_empty()).then_some(left))
                }
                _ => Due::Tick,
            };
        }
        let ended: Vec<ExpiredLease> = leases
            .iter_by_deadline()
            .take_while(|(_, lease)| has_passed(lease.deadline, now))
            .take(ENDS_AN_ENTRY)
            .map(|(id, lease)| ExpiredLease { id, renewed_at_index: lease.renewed_at_index })
            .collect();
        if !ended.is_empty() {
            return Due::Ended(ended);
        }
        let Some((_, next)) = leases.iter_by_deadline().next() else { return Due::Later(None) };
        let behind = now.since(machine.now());
        if behind >= TICK_INTERVAL {
            return Due::Tick;
        }
        let left = next.deadline.since(now) + RESOLUTION;
        Due::Later(Some(left.min(TICK_INTERVAL - behind)))
    }
}

/// Whether all of the millisecond that `deadline` names is over.
///
/// A time is the millisecond it lies in. A lease that is renewed late in one and ended early in
/// another would live up to a millisecond less than was promised if the two were merely compared.
fn has_passed(deadline: Timestamp, now: Timestamp) -> bool {
    now >= deadline.plus(RESOLUTION)
}

enum Due {
    Ended(Vec<ExpiredLease>),
    Tick,
    /// Nothing before this time has passed; never, while there is no lease.
    Later(Option<Duration>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock, ManualClock};
    use crate::node::role::RoleTracker;
    use crate::types::MemberId;

    #[test]
    fn no_lease_ends_before_its_whole_time_has_passed() {
        const TTL: Duration = Duration::from_secs(2);
        let clock = Arc::new(ManualClock::default());
        let tracker = RoleTracker::new(MemberId(1), clock.clone());
        tracker.on_raft(1, Some(MemberId(1)), Timestamp(0));
        tracker.on_applied(1, Timestamp(0));
        let leading = tracker.get().leading.expect("promoted");

        clock.advance(Duration::from_micros(900));
        let (renewed_at, deadline) = (clock.monotonic(), leading.now(clock.as_ref()).plus(TTL));
        while !has_passed(deadline, leading.now(clock.as_ref())) {
            clock.advance(Duration::from_micros(100));
        }
        let lived = clock.monotonic() - renewed_at;
        assert!(lived >= TTL, "{lived:?}");
        assert!(lived <= TTL + RESOLUTION, "{lived:?}");
    }
}
