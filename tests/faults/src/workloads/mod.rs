//! What clients do, started and stopped alike; what they were told comes out as lines of the record.
//!
//! No client repeats a call by itself: what has no answer is noted as unknown.

pub mod lease;
pub mod observing;
pub mod txn;

use holdfast_client_tests::addresses::Addresses;
use holdfast_client_tests::holders::{Crowd, Manner};
use holdfast_client_tests::load::{Load, Reads};
use holdfast_client_tests::moment;
use holdfast_client_tests::watchers::Watchers;

use crate::cell::{Setup, Workload};
use crate::record::{Line, Outcome, Span, millis};

/// Clients of the lock service and candidates, and the names they share: enough that some always
/// wait, and that nobody waits for long.
const HOLDERS: usize = 36;
const NAMES: usize = 12;

const LOCKS: &[Manner] = &[Manner::Lock, Manner::LockWithoutLease, Manner::Recipe];
const CANDIDATES: &[Manner] = &[Manner::Campaign];

/// A workload that runs.
pub enum Running {
    Register(Load),
    Txn(txn::Accounts),
    Watch(Watchers),
    Lease(lease::Tenants),
    Lock(Crowd),
    Election(Crowd, observing::Observers),
}

impl Running {
    pub async fn start(cluster: &Addresses, setup: &Setup) -> Result<Running, String> {
        let seed = setup.seed;
        Ok(match setup.workload {
            Workload::Register => {
                let reads = match setup.treat_serializable_as_linearizable {
                    true => Reads::Serializable,
                    false => Reads::Linearizable,
                };
                Running::Register(Load::start_paced(cluster, reads, setup.rate))
            }
            Workload::Txn => Running::Txn(txn::Accounts::start(cluster, seed).await?),
            Workload::Watch => Running::Watch(Watchers::start(cluster, seed)),
            Workload::Lease => Running::Lease(lease::Tenants::start(cluster, seed)),
            Workload::Lock => {
                Running::Lock(Crowd::unobserved(cluster, HOLDERS, NAMES, LOCKS, seed))
            }
            Workload::Election => {
                let observers = observing::Observers::start(cluster, NAMES);
                let crowd = Crowd::unobserved(cluster, HOLDERS, NAMES, CANDIDATES, seed);
                Running::Election(crowd, observers)
            }
        })
    }

    /// Stops the clients and gives what they were told. All members serve by now.
    pub async fn stop(self, cluster: &Addresses) -> Vec<Line> {
        match self {
            Running::Register(load) => {
                let noted = load.stop().await.into_iter();
                noted.map(|(member, operation)| Line::Operation { member, operation }).collect()
            }
            Running::Txn(accounts) => accounts.stop().await.into_iter().map(Line::Txn).collect(),
            Running::Watch(watchers) => watched(watchers).await,
            Running::Lease(tenants) => tenants.stop().await.into_iter().map(Line::Lease).collect(),
            Running::Lock(mut crowd) => crowd.stop().await.into_iter().map(Line::Hold).collect(),
            Running::Election(mut crowd, observers) => {
                let mut lines: Vec<Line> = crowd.stop().await.into_iter().map(Line::Hold).collect();
                lines.extend(observers.finish(cluster).await);
                lines
            }
        }
    }
}

async fn watched(watchers: Watchers) -> Vec<Line> {
    let told = watchers.stop().await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let record = |witness| move |record| Line::Watched { witness, record };
    let mut lines: Vec<Line> = told.witnesses.into_iter().map(record(true)).collect();
    lines.extend(told.readers.into_iter().map(record(false)));
    lines.extend(told.acknowledged.iter().map(|(revision, key, value)| Line::Acknowledged {
        revision: *revision,
        key: text(key),
        value: text(value),
    }));
    lines.extend(told.issued.iter().map(|value| Line::Issued { value: text(value) }));
    lines.extend(told.calls.iter().map(|call| {
        let outcome = if call.done { Outcome::Done } else { Outcome::Unknown };
        let (began, ended) = (call.began, call.ended);
        Line::Wrote(Span { member: Some(call.member), began, ended, outcome })
    }));
    let caught_up_ms = millis(told.caught_up);
    lines.push(Line::End { revision: told.last, compacted: told.compacted, caught_up_ms });
    lines
}

/// Now, as it will be read back.
pub fn now() -> std::time::Instant {
    moment::at(moment::micros(std::time::Instant::now()))
}
