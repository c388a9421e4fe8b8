//! The witness: what a watch of everything from revision 1 is told, live, on every member.
//!
//! It is read while the run goes on, so that the history may be compacted behind it. A stream that
//! ends is followed by one that goes on where it ended.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use holdfast_client_tests::addresses::Addresses;
use holdfast_client_tests::watching::Interest;
use holdfast_client_tests::wire::{self, DELETE, Wire};
use holdfast_client_tests::{history, holding, moment};
use serde::{Deserialize, Serialize};

use crate::record::Line;

/// After a stream ended.
const PAUSE: Duration = Duration::from_millis(50);

/// How long a member may take to tell the end of the history, with everything healed.
const END: Duration = Duration::from_secs(30);

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub key: String,
    /// `None` for a delete.
    pub value: Option<String>,
    pub create_revision: i64,
    pub version: i64,
    pub lease: i64,
}

/// The changes of one revision, and when each member told of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Told {
    pub revision: i64,
    pub changes: Vec<Change>,
    /// Microseconds since the run began, a member each.
    pub seen: Vec<u64>,
}

impl Told {
    /// When the first member told of it.
    pub fn first_seen(&self) -> Instant {
        moment::at(self.seen.iter().copied().min().expect("some member told it"))
    }
}

/// What one member told.
#[derive(Default)]
struct Account {
    revisions: Mutex<BTreeMap<i64, (Vec<Change>, u64)>>,
    last: AtomicI64,
    complaints: Mutex<Vec<String>>,
    stop: AtomicBool,
}

pub struct Witnesses {
    accounts: Vec<Arc<Account>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Witnesses {
    pub fn start(cluster: &Addresses) -> Witnesses {
        let accounts: Vec<Arc<Account>> = (0..cluster.size()).map(|_| Arc::default()).collect();
        let tasks = accounts.iter().enumerate().map(|(member, account)| {
            let (endpoint, account) = (cluster.endpoint(member), account.clone());
            tokio::spawn(async move { account.follow(&endpoint).await })
        });
        Witnesses { tasks: tasks.collect(), accounts }
    }

    /// The revision that all of them have seen: what is compacted up to here, nobody misses.
    pub fn seen_by_all(&self) -> i64 {
        self.accounts.iter().map(|a| a.last.load(Ordering::SeqCst)).min().expect("some members")
    }

    /// Waits until all have seen this revision, and gives what they told.
    pub async fn finish(self, last: i64) -> Vec<Line> {
        let deadline = Instant::now() + END;
        let mut lines = Vec::new();
        for (member, account) in self.accounts.iter().enumerate() {
            while account.last.load(Ordering::SeqCst) < last {
                if Instant::now() > deadline {
                    let got = account.last.load(Ordering::SeqCst);
                    let what = format!("the witness of member {member} is at {got} of {last}");
                    lines.push(Line::Failed { what });
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            account.stop.store(true, Ordering::SeqCst);
        }
        for task in self.tasks {
            task.abort();
        }
        let mut told = Vec::new();
        for (member, account) in self.accounts.iter().enumerate() {
            for what in account.complaints.lock().expect("no panic").drain(..) {
                lines
                    .push(Line::Failed { what: format!("the witness of member {member}: {what}") });
            }
            told.push(std::mem::take(&mut *account.revisions.lock().expect("no panic")));
        }
        lines.extend(merge(told));
        lines
    }
}

/// One line for each revision that all members tell alike, one of each member for the others. What was
/// told is given away bit by bit, as hours of it take room.
fn merge(mut told: Vec<BTreeMap<i64, (Vec<Change>, u64)>>) -> Vec<Line> {
    let mut lines = Vec::new();
    let revisions: std::collections::BTreeSet<i64> =
        told.iter().flat_map(|t| t.keys().copied()).collect();
    for revision in revisions {
        let mut tellings: Vec<Option<(Vec<Change>, u64)>> =
            told.iter_mut().map(|t| t.remove(&revision)).collect();
        let given: Vec<_> = tellings.iter().flatten().map(|(changes, _)| changes).collect();
        let alike = given.len() == told.len() && given.iter().all(|changes| *changes == given[0]);
        if alike {
            let seen = tellings.iter().flatten().map(|(_, seen)| *seen).collect();
            let (changes, _) = tellings.swap_remove(0).expect("all tell it");
            lines.push(Line::Revision(Told { revision, changes, seen }));
            continue;
        }
        for (member, t) in tellings.into_iter().enumerate() {
            let (changes, seen) = t.unwrap_or_default();
            let told = Told { revision, changes, seen: vec![seen] };
            lines.push(Line::Differs { member, told });
        }
    }
    lines
}

impl Account {
    async fn follow(&self, endpoint: &str) {
        while !self.stop.load(Ordering::SeqCst) {
            // What is there is taken; the next stream goes on.
            if self.stream(endpoint).await.is_err() {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    async fn stream(&self, endpoint: &str) -> Result<(), tonic::Status> {
        let everything = Interest { prev_kv: false, ..Interest::everything() };
        let from = 1 + self.last.load(Ordering::SeqCst);
        let create = wire::create(everything.create(1, from, false));
        let mut call = Wire::lazy(endpoint).watch(vec![create]).await?;
        loop {
            let answer = call.next().await?;
            if answer.canceled {
                let revision = answer.compact_revision;
                let what = format!("cancelled at {from}, compacted {revision}: {answer:?}");
                self.complaints.lock().expect("no panic").push(what);
                self.last.fetch_max(revision - 1, Ordering::SeqCst);
                return Err(tonic::Status::cancelled("the watch"));
            }
            let seen = moment::micros(Instant::now());
            let mut revisions = self.revisions.lock().expect("no panic");
            for own in answer.events.chunk_by(|a, b| a.revision() == b.revision()) {
                let revision = own[0].revision();
                let changes = own.iter().map(change).collect();
                if revision <= self.last.load(Ordering::SeqCst) {
                    let what = format!("{revision} after {:?}: {own:?}", self.last);
                    self.complaints.lock().expect("no panic").push(what);
                    continue;
                }
                revisions.insert(revision, (changes, seen));
                self.last.store(revision, Ordering::SeqCst);
            }
        }
    }
}

fn change(event: &wire::Event) -> Change {
    let pair = event.pair();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let delete = event.kind == DELETE;
    Change {
        key: text(&pair.key),
        value: (!delete).then(|| text(&pair.value)),
        create_revision: if delete { 0 } else { pair.create_revision },
        version: pair.version,
        lease: pair.lease,
    }
}

/// What the witness tells of puts under a prefix, for the revision check.
pub fn written(told: &[&Told], prefix: &str) -> Result<Vec<history::Written>, String> {
    let mut written = Vec::new();
    for told in told {
        for change in told.changes.iter().filter(|c| c.key.starts_with(prefix)) {
            let Some(value) = change.value.clone() else {
                return Err(format!("nobody deletes: {change:?} at {}", told.revision));
            };
            written.push(history::Written {
                key: change.key.clone(),
                value,
                revision: told.revision,
                create_revision: change.create_revision,
                version: change.version,
            });
        }
    }
    Ok(written)
}

/// What the witness tells of locks and elections.
pub fn held(told: &[&Told]) -> Vec<holding::Change> {
    let mut changes = Vec::new();
    for told in told {
        for change in told.changes.iter().filter(|c| c.key.starts_with("h/")) {
            changes.push(holding::Change {
                revision: told.revision,
                key: change.key.clone(),
                create_revision: change.create_revision,
                lease: change.lease,
                value: change.value.clone().unwrap_or_default(),
                seen: told.first_seen(),
            });
        }
    }
    changes
}
