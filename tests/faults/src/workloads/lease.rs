//! Leases that are renewed for a while and then left to run out, or revoked, with keys on them.
//!
//! A lease must not end before its time to live has passed since the *sending* of the last call that
//! renewed it, and must end soon after it has passed since the last that may have; all its keys go at
//! one revision. The witness tells when its keys went.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_client::{Client, LeaseGrantOptions, PutOptions};
use holdfast_client_tests::addresses::{Addresses, connect};
use holdfast_client_tests::moment;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::now;
use crate::record::Outcome;
use crate::witness::Told;

const PREFIX: &str = "l/";
const TENANTS_A_MEMBER: usize = 40;
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(50);

/// What a lease may live longer than its time to live: an election timeout, and a second more; and a
/// second for a machine that is busy with everything else of the run.
const LATE: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asked {
    Grant { ttl: i64 },
    Put { key: String },
    Renew,
    Revoke,
    TimeToLive,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answered {
    Done,
    /// The lease is not there (any more).
    Gone,
    Unknown,
}

/// A call about one lease; no two leases of a run have the same id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    pub member: usize,
    pub lease: i64,
    pub asked: Asked,
    pub answered: Answered,
    #[serde(with = "moment")]
    pub began: Instant,
    #[serde(with = "moment")]
    pub ended: Instant,
}

impl Call {
    pub fn outcome(&self) -> Outcome {
        match self.answered {
            Answered::Done => Outcome::Done,
            Answered::Gone => Outcome::Refused,
            Answered::Unknown => Outcome::Unknown,
        }
    }
}

pub struct Tenants {
    run: Arc<Run>,
    tenants: JoinSet<()>,
}

struct Run {
    endpoints: Vec<String>,
    calls: Mutex<Vec<Call>>,
    stop: AtomicBool,
}

impl Tenants {
    pub fn start(cluster: &Addresses, seed: u64) -> Tenants {
        let endpoints = (0..cluster.size()).map(|m| cluster.endpoint(m)).collect();
        let run =
            Arc::new(Run { endpoints, calls: Mutex::default(), stop: AtomicBool::new(false) });
        let mut tenants = JoinSet::new();
        for tenant in 0..cluster.size() * TENANTS_A_MEMBER {
            let random = StdRng::seed_from_u64(seed.wrapping_add(tenant as u64));
            tenants.spawn(run.clone().live(tenant, random));
        }
        Tenants { run, tenants }
    }

    pub async fn stop(self) -> Vec<Call> {
        self.run.stop.store(true, Ordering::Relaxed);
        self.tenants.join_all().await;
        std::mem::take(&mut *self.run.calls.lock().expect("noting does not panic"))
    }
}

impl Run {
    /// One lease after the other.
    async fn live(self: Arc<Run>, tenant: usize, mut random: StdRng) {
        let mut turn = 0;
        while !self.stop.load(Ordering::Relaxed) {
            turn += 1;
            let lease = i64::try_from(tenant * 1_000_000 + turn).expect("few") + 1;
            let member = random.random_range(0..self.endpoints.len());
            let mut tenancy = Tenancy { run: &self, member, lease, random: &mut random };
            tenancy.live().await;
        }
    }
}

struct Tenancy<'a> {
    run: &'a Run,
    member: usize,
    lease: i64,
    random: &'a mut StdRng,
}

impl Tenancy<'_> {
    async fn client(&mut self) -> Client {
        self.member = self.random.random_range(0..self.run.endpoints.len());
        connect(&self.run.endpoints[self.member]).await
    }

    async fn live(&mut self) {
        let (lease, ttl) = (self.lease, self.random.random_range(2..5));
        let mut client = self.client().await;
        let mut leases = client.clone();
        let granted = self.note(Asked::Grant { ttl }, async {
            let options = LeaseGrantOptions::new().with_id(lease);
            answer(leases.lease_grant(ttl, Some(options)).await.map(|_| true))
        });
        if granted.await != Answered::Done {
            tokio::time::sleep(PAUSE_AFTER_ERROR).await;
            return;
        }
        for n in 0..self.random.random_range(1..4) {
            let key = format!("{PREFIX}{lease}/{n}");
            let mut keys = client.clone();
            self.note(Asked::Put { key: key.clone() }, async {
                let options = PutOptions::new().with_lease(lease);
                answer(keys.put(key, "", Some(options)).await.map(|_| true))
            })
            .await;
        }
        for _ in 0..self.random.random_range(0..20) {
            let pause = self.random.random_range(50..400);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if self.run.stop.load(Ordering::Relaxed) {
                break;
            }
            let mut leases = client.clone();
            let renewed = if self.random.random_bool(0.8) {
                self.note(Asked::Renew, async { renew(&mut leases, lease).await }).await
            } else {
                self.note(Asked::TimeToLive, async {
                    let left = leases.lease_time_to_live(lease, None).await;
                    // Whole seconds that are left: 0 in the last of them, -1 when it is gone.
                    answer(left.map(|left| left.ttl() >= 0))
                })
                .await
            };
            match renewed {
                Answered::Done => {}
                Answered::Gone => return,
                Answered::Unknown => client = self.client().await,
            }
        }
        if self.random.random_bool(0.3) {
            self.note(Asked::Revoke, async {
                answer(client.lease_revoke(lease).await.map(|_| true))
            })
            .await;
        } else if !self.run.stop.load(Ordering::Relaxed) {
            // It runs out, while other leases of this tenant live.
            let pause = self.random.random_range(0..200);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn note(&self, asked: Asked, call: impl Future<Output = Answered>) -> Answered {
        let began = now();
        let answered = tokio::time::timeout(PATIENCE, call).await.unwrap_or(Answered::Unknown);
        let (member, lease, ended) = (self.member, self.lease, now());
        let call = Call { member, lease, asked, answered: answered.clone(), began, ended };
        self.run.calls.lock().expect("noting does not panic").push(call);
        answered
    }
}

async fn renew(client: &mut Client, lease: i64) -> Answered {
    let Ok((mut keeper, mut answers)) = client.lease_keep_alive(lease).await else {
        return Answered::Unknown;
    };
    if keeper.keep_alive().await.is_err() {
        return Answered::Unknown;
    }
    match answers.message().await {
        Ok(Some(renewed)) if renewed.ttl() > 0 => Answered::Done,
        Ok(Some(_)) => Answered::Gone,
        _ => Answered::Unknown,
    }
}

/// Done, or gone when the lease is not there, be it said by an answer or a refusal.
fn answer(result: Result<bool, etcd_client::Error>) -> Answered {
    match result {
        Ok(true) => Answered::Done,
        Ok(false) => Answered::Gone,
        Err(etcd_client::Error::GRpcStatus(status))
            if status.message().contains("requested lease not found") =>
        {
            Answered::Gone
        }
        Err(_) => Answered::Unknown,
    }
}

#[derive(Debug, Default, Clone, Copy)]
pub struct Summary {
    pub leases: usize,
    pub renewals: usize,
    pub ran_out: usize,
    pub revoked: usize,
    /// The longest time beyond the time to live, without a fault.
    pub latest: Duration,
}

/// All that is known of one lease.
#[derive(Default)]
struct Lease<'a> {
    calls: Vec<&'a Call>,
    /// Its keys, each with the revision of its delete and when that was seen first.
    keys: HashMap<&'a str, Option<(i64, Instant)>>,
}

/// Checks the calls against the witness. `disturbed` are the times of faults and of elections, from
/// whose end a leader counts the whole time to live anew; `over` is when the record ends.
///
/// # Errors
///
/// All that does not fit.
pub fn check(
    calls: &[Call],
    told: &[&Told],
    disturbed: &[(Instant, Instant)],
    over: Instant,
) -> Result<Summary, Vec<String>> {
    let mut leases: HashMap<i64, Lease> = HashMap::new();
    for call in calls {
        leases.entry(call.lease).or_default().calls.push(call);
    }
    let mut found = Vec::new();
    for told in told {
        for change in told.changes.iter().filter(|c| c.key.starts_with(PREFIX)) {
            let id = change.key[PREFIX.len()..].split('/').next().and_then(|n| n.parse().ok());
            let Some(lease) = id.and_then(|id: i64| leases.get_mut(&id)) else {
                found.push(format!("nobody's: {change:?}"));
                continue;
            };
            match change.value {
                Some(_) => lease.keys.insert(&change.key, None),
                None => lease.keys.insert(&change.key, Some((told.revision, told.first_seen()))),
            };
        }
    }
    let mut summary = Summary::default();
    let mut ids: Vec<&i64> = leases.keys().collect();
    ids.sort_unstable();
    for id in ids {
        if let Err(what) = leases[id].check(disturbed, over, &mut summary) {
            found.push(format!("lease {id}: {what}"));
        }
    }
    if found.is_empty() { Ok(summary) } else { Err(found) }
}

impl Lease<'_> {
    fn check(
        &self,
        disturbed: &[(Instant, Instant)],
        over: Instant,
        summary: &mut Summary,
    ) -> Result<(), String> {
        let Asked::Grant { ttl } = self.calls[0].asked else { return Err("not granted".into()) };
        if self.calls[0].answered != Answered::Done {
            return match self.keys.is_empty() {
                true => Ok(()),
                false => Err("it has keys without a grant that was answered".to_owned()),
            };
        }
        summary.leases += 1;
        let ttl = Duration::from_secs(u64::try_from(ttl).expect("positive"));
        let renews = |c: &&&Call| matches!(c.asked, Asked::Grant { .. } | Asked::Renew);
        let revoke = self.calls.iter().find(|c| c.asked == Asked::Revoke);
        // Sent by the client, it cannot have been answered before; that is how the last renewal that
        // counts is told, with no clock but the client's.
        let due = |before: Instant| {
            let renewals = self.calls.iter().filter(renews);
            let counts = renewals.filter(|c| c.answered == Answered::Done && c.ended <= before);
            counts.map(|c| c.began).max().expect("the grant") + ttl
        };
        summary.renewals += self.calls.iter().filter(renews).count() - 1;
        // An answer that it is gone.
        for call in self.calls.iter().filter(|c| c.answered == Answered::Gone) {
            if revoke.is_none_or(|r| r.began > call.ended) && call.ended < due(call.began) {
                return Err(format!("gone {:?} too early: {call:?}", due(call.began) - call.ended));
            }
        }
        for call in &self.calls {
            let Asked::Put { key } = &call.asked else { continue };
            if call.answered == Answered::Done && !self.keys.contains_key(key.as_str()) {
                return Err(format!("acknowledged key is lost: {call:?}"));
            }
        }
        let mut gone = self.keys.values().copied();
        let Some(first) = gone.next() else { return Ok(()) };
        if gone.any(|other| other.map(|o| o.0) != first.map(|f| f.0)) {
            return Err(format!("its keys went apart: {:?}", self.keys));
        }
        let attempted = self.calls.iter().filter(renews).map(|c| c.ended).max().expect("the grant");
        let put = self.calls.iter().map(|c| c.ended).max().expect("the grant");
        let mut deadline = attempted.max(put) + ttl + LATE;
        for (from, to) in disturbed {
            if *from < deadline && *to > self.calls[0].began {
                deadline = deadline.max(*to + ttl + LATE);
            }
        }
        let Some((_, seen)) = first else {
            return if over > deadline { Err("it never ended".to_owned()) } else { Ok(()) };
        };
        if let Some(revoke) = revoke
            && seen >= revoke.began
        {
            summary.revoked += 1;
            return Ok(());
        }
        summary.ran_out += 1;
        if seen < due(seen) {
            return Err(format!(
                "ended {:?} too early, its keys {:?}",
                due(seen) - seen,
                self.keys
            ));
        }
        let undisturbed =
            disturbed.iter().all(|(from, to)| *from > seen || *to < self.calls[0].began);
        if undisturbed {
            summary.latest = summary.latest.max(seen - due(seen));
        }
        if seen > deadline {
            return Err(format!("ended {:?} too late, its keys {:?}", seen - deadline, self.keys));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::witness::Change;

    fn at(seconds: f64) -> Instant {
        moment::at((seconds * 1e6) as u64)
    }

    fn call(asked: Asked, answered: Answered, began: f64) -> Call {
        Call { member: 0, lease: 7, asked, answered, began: at(began), ended: at(began + 0.1) }
    }

    fn told(revision: i64, key: &str, put: bool, seen: f64) -> Told {
        let value = put.then(String::new);
        let create_revision = if put { revision } else { 0 };
        let change = Change { key: key.to_owned(), value, create_revision, version: 1, lease: 7 };
        Told { revision, changes: vec![change], seen: vec![(seen * 1e6) as u64] }
    }

    /// Granted at 1 s for 2 s, renewed at 2 s, deleted at the given time.
    fn verdict(deleted: f64) -> Result<Summary, Vec<String>> {
        let put = Asked::Put { key: "l/7/0".to_owned() };
        let calls = [
            call(Asked::Grant { ttl: 2 }, Answered::Done, 1.0),
            call(put, Answered::Done, 1.2),
            call(Asked::Renew, Answered::Done, 2.0),
        ];
        let (put, delete) = (told(2, "l/7/0", true, 1.3), told(3, "l/7/0", false, deleted));
        check(&calls, &[&put, &delete], &[], at(20.0))
    }

    #[test]
    fn a_lease_ends_neither_early_nor_late() {
        assert_eq!(verdict(4.2).expect("in time").ran_out, 1);
        assert!(verdict(3.9).expect_err("early")[0].contains("too early"));
        assert!(verdict(9.0).expect_err("late")[0].contains("too late"));
    }

    #[test]
    fn keys_of_a_lease_go_together() {
        let put = |n| Asked::Put { key: format!("l/7/{n}") };
        let calls = [
            call(Asked::Grant { ttl: 2 }, Answered::Done, 1.0),
            call(put(0), Answered::Done, 1.2),
            call(put(1), Answered::Done, 1.3),
        ];
        let history = [
            told(2, "l/7/0", true, 1.3),
            told(3, "l/7/1", true, 1.4),
            told(4, "l/7/0", false, 4.0),
            told(5, "l/7/1", false, 4.0),
        ];
        let told: Vec<&Told> = history.iter().collect();
        assert!(check(&calls, &told, &[], at(20.0)).expect_err("apart")[0].contains("apart"));
        let found = check(&calls, &told[..1], &[], at(20.0)).expect_err("lost");
        assert!(found[0].contains("lost"), "{found:?}");
    }
}
