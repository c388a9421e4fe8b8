//! Transfers between accounts, and reads of all accounts in one moment.
//!
//! A transfer reads two accounts and moves money if neither has changed since, both in one
//! transaction; refused, it reads them again in the same. Values are unique by a number, so the
//! witness tells whether a transfer happened, when, and whether as a whole.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp, TxnOpResponse};
use holdfast_client_tests::addresses::{Addresses, connect};
use holdfast_client_tests::moment;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::now;
use crate::record::Outcome;
use crate::witness::Told;

const PREFIX: &str = "t/";
const ACCOUNTS: usize = 8;
const INITIAL: i64 = 100;
const WORKERS_A_MEMBER: usize = 3;

const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(2);
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(20);

/// A key as a read shows it; an absent one is not shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    pub key: String,
    pub mod_revision: i64,
    pub value: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Asked {
    /// Sets two accounts if they are as they were.
    Transfer {
        number: u64,
        before: [Account; 2],
        values: [String; 2],
    },
    ReadAll {
        serializable: bool,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answered {
    Done {
        revision: i64,
    },
    /// One of the accounts had changed: both as they are at the revision.
    Refused {
        revision: i64,
        found: Vec<Account>,
    },
    Found {
        revision: i64,
        all: Vec<Account>,
    },
    Unknown,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    pub member: usize,
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
            Answered::Unknown => Outcome::Unknown,
            Answered::Refused { .. } => Outcome::Refused,
            _ => Outcome::Done,
        }
    }
}

/// The running clients.
pub struct Accounts {
    run: Arc<Run>,
    workers: JoinSet<()>,
}

struct Run {
    calls: Mutex<Vec<Call>>,
    next: AtomicU64,
    stop: AtomicBool,
}

impl Accounts {
    /// Opens the accounts and starts the clients.
    pub async fn start(cluster: &Addresses, seed: u64) -> Result<Accounts, String> {
        let open = |n: usize| TxnOp::put(key(n), format!("{INITIAL} open{n}"), None);
        let open = Txn::new().and_then((0..ACCOUNTS).map(open).collect::<Vec<_>>());
        let opened = tokio::time::timeout(PATIENCE, cluster.client(0).await.txn(open)).await;
        opened.map_err(|e| e.to_string())?.map_err(|e| format!("no accounts: {e}"))?;
        let next = AtomicU64::new(1);
        let run = Arc::new(Run { calls: Mutex::default(), next, stop: AtomicBool::new(false) });
        let mut workers = JoinSet::new();
        for worker in 0..cluster.size() * WORKERS_A_MEMBER {
            let member = worker % cluster.size();
            let random = StdRng::seed_from_u64(seed.wrapping_add(worker as u64));
            workers.spawn(run.clone().work(member, cluster.endpoint(member), random));
        }
        Ok(Accounts { run, workers })
    }

    pub async fn stop(self) -> Vec<Call> {
        self.run.stop.store(true, Ordering::Relaxed);
        self.workers.join_all().await;
        std::mem::take(&mut *self.run.calls.lock().expect("noting does not panic"))
    }
}

impl Run {
    async fn work(self: Arc<Run>, member: usize, endpoint: String, mut random: StdRng) {
        let mut client = connect(&endpoint).await;
        let mut known: Vec<Account> = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let done = if known.len() < ACCOUNTS || random.random_bool(0.4) {
                let serializable = random.random_bool(0.25);
                match self.read_all(member, &mut client, serializable).await {
                    Some(all) => {
                        known = all;
                        true
                    }
                    None => false,
                }
            } else {
                let from = random.random_range(0..ACCOUNTS);
                let to = (from + random.random_range(1..ACCOUNTS)) % ACCOUNTS;
                let before = [known[from].clone(), known[to].clone()];
                let found = self.transfer(member, &mut client, before, &mut random).await;
                for account in found.iter().flatten() {
                    let at = known.iter().position(|k| k.key == account.key);
                    known[at.expect("an account")] = account.clone();
                }
                found.is_some()
            };
            if done {
                tokio::time::sleep(PAUSE).await;
            } else {
                client = connect(&endpoint).await;
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
            }
        }
    }

    async fn read_all(
        &self,
        member: usize,
        client: &mut Client,
        serializable: bool,
    ) -> Option<Vec<Account>> {
        let mut options = GetOptions::new().with_prefix();
        if serializable {
            options = options.with_serializable();
        }
        let answered = self.note(member, Asked::ReadAll { serializable }, async {
            let answer = client.get(PREFIX, Some(options)).await.ok()?;
            let all = answer.kvs().iter().map(account).collect();
            Some(Answered::Found { revision: answer.header()?.revision(), all })
        });
        match answered.await {
            Answered::Found { all, .. } => Some(all),
            _ => None,
        }
    }

    /// The two accounts as they are now, as far as there was an answer.
    async fn transfer(
        &self,
        member: usize,
        client: &mut Client,
        before: [Account; 2],
        random: &mut StdRng,
    ) -> Option<Vec<Account>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let amount = random.random_range(1..5);
        let [from, to] = [balance(&before[0].value), balance(&before[1].value)];
        let values = [format!("{} v{number}", from - amount), format!("{} v{number}", to + amount)];
        let unchanged =
            |a: &Account| Compare::mod_revision(a.key.as_str(), CompareOp::Equal, a.mod_revision);
        let put = |n: usize| TxnOp::put(before[n].key.as_str(), values[n].as_str(), None);
        let get = |n: usize| TxnOp::get(before[n].key.as_str(), None);
        let txn = Txn::new()
            .when([unchanged(&before[0]), unchanged(&before[1])])
            .and_then([put(0), put(1)])
            .or_else([get(0), get(1)]);
        let asked = Asked::Transfer { number, before: before.clone(), values: values.clone() };
        let answered = self.note(member, asked, async {
            let answer = client.txn(txn).await.ok()?;
            let revision = answer.header()?.revision();
            if answer.succeeded() {
                return Some(Answered::Done { revision });
            }
            let mut found = Vec::new();
            for response in answer.op_responses() {
                if let TxnOpResponse::Get(got) = response {
                    found.extend(got.kvs().iter().map(account));
                }
            }
            Some(Answered::Refused { revision, found })
        });
        match answered.await {
            Answered::Done { revision } => {
                let new = |n: usize| Account {
                    key: before[n].key.clone(),
                    mod_revision: revision,
                    value: values[n].clone(),
                };
                Some(vec![new(0), new(1)])
            }
            Answered::Refused { found, .. } => Some(found),
            _ => None,
        }
    }

    async fn note(
        &self,
        member: usize,
        asked: Asked,
        call: impl Future<Output = Option<Answered>>,
    ) -> Answered {
        let began = now();
        let answered = tokio::time::timeout(PATIENCE, call).await.ok().flatten();
        let answered = answered.unwrap_or(Answered::Unknown);
        let call = Call { member, asked, answered: answered.clone(), began, ended: now() };
        self.calls.lock().expect("noting does not panic").push(call);
        answered
    }
}

fn key(n: usize) -> String {
    format!("{PREFIX}{n}")
}

fn account(kv: &etcd_client::KeyValue) -> Account {
    Account {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        mod_revision: kv.mod_revision(),
        value: String::from_utf8_lossy(kv.value()).into_owned(),
    }
}

fn balance(value: &str) -> i64 {
    value.split(' ').next().and_then(|n| n.parse().ok()).expect("a balance comes first")
}

/// How many transfers and reads were answered.
#[derive(Debug, Default, Clone, Copy)]
pub struct Summary {
    pub transfers: usize,
    pub refused: usize,
    pub reads: usize,
    pub unknown: usize,
    pub unknown_but_done: usize,
}

/// Checks that the calls and the witness fit each other.
///
/// # Errors
///
/// A sentence about the first thing that does not.
pub fn check(calls: &[Call], told: &[&Told]) -> Result<Summary, String> {
    let states = States::of(told)?;
    let mut summary = Summary::default();
    let mut known: HashMap<u64, &Call> = HashMap::new();
    let mut placed: Vec<Placed> = Vec::new();
    for call in calls {
        let mut place = |revision, writes, serializable| {
            placed.push(Placed { call, revision, writes, serializable });
        };
        match (&call.asked, &call.answered) {
            (Asked::Transfer { number, before, values }, answered) => {
                known.insert(*number, call);
                let happened = states.transfers.get(number);
                if let Some((revision, changed)) = happened {
                    let mut expected: Vec<(&str, &str)> =
                        (0..2).map(|n| (before[n].key.as_str(), values[n].as_str())).collect();
                    expected.sort_unstable();
                    if *changed != expected {
                        return Err(format!("not as a whole: {call:?} became {changed:?}"));
                    }
                    if let Some(other) = before.iter().find(|b| {
                        states.at(&b.key, revision - 1).map_or(0, |(at, _)| at) != b.mod_revision
                    }) {
                        return Err(format!(
                            "done at {revision} though changed: {other:?}, {call:?}"
                        ));
                    }
                    place(*revision, true, false);
                }
                match (answered, happened) {
                    (Answered::Done { revision }, Some((at, _))) if at == revision => {
                        summary.transfers += 1;
                    }
                    (Answered::Done { .. }, other) => {
                        return Err(format!("acknowledged transfer lost: {call:?}, {other:?}"));
                    }
                    (Answered::Refused { .. }, Some(other)) => {
                        return Err(format!("refused yet done: {call:?}, {other:?}"));
                    }
                    (Answered::Refused { revision, found }, None) => {
                        summary.refused += 1;
                        let same = |b: &Account| {
                            states.at(&b.key, *revision).map_or(0, |(at, _)| at) == b.mod_revision
                        };
                        if before.iter().all(same) {
                            return Err(format!("refused though nothing changed: {call:?}"));
                        }
                        states.fits(found, *revision).map_err(|e| format!("{e}: {call:?}"))?;
                        place(*revision, false, false);
                    }
                    (Answered::Unknown, happened) => {
                        summary.unknown += 1;
                        summary.unknown_but_done += usize::from(happened.is_some());
                    }
                    (Answered::Found { .. }, _) => return Err(format!("no answer: {call:?}")),
                }
            }
            (Asked::ReadAll { serializable }, Answered::Found { revision, all }) => {
                summary.reads += 1;
                states.fits(all, *revision).map_err(|e| format!("{e}: {call:?}"))?;
                let sum: i64 = all.iter().map(|a| balance(&a.value)).sum();
                let total = INITIAL * i64::try_from(ACCOUNTS).expect("few");
                if all.len() != ACCOUNTS || sum != total {
                    return Err(format!("{sum} in {} accounts: {call:?}", all.len()));
                }
                place(*revision, false, *serializable);
            }
            (Asked::ReadAll { .. }, Answered::Unknown) => summary.unknown += 1,
            (Asked::ReadAll { .. }, _) => return Err(format!("no answer to a read: {call:?}")),
        }
    }
    if let Some((number, what)) = states.transfers.iter().find(|(n, _)| !known.contains_key(n)) {
        return Err(format!("transfer {number} is nobody's: {what:?}"));
    }
    real_time(&placed)?;
    Ok(summary)
}

type Changed<'a> = Vec<(&'a str, &'a str)>;

/// The accounts at each revision.
struct States<'a> {
    accounts: HashMap<&'a str, BTreeMap<i64, &'a str>>,
    /// By number: the revision and what changed there, by key.
    transfers: HashMap<u64, (i64, Changed<'a>)>,
}

impl<'a> States<'a> {
    fn of(told: &[&'a Told]) -> Result<States<'a>, String> {
        let mut states = States { accounts: HashMap::new(), transfers: HashMap::new() };
        for told in told {
            for change in told.changes.iter().filter(|c| c.key.starts_with(PREFIX)) {
                let Some(value) = change.value.as_deref() else {
                    return Err(format!("nobody deletes: {change:?}"));
                };
                states.accounts.entry(&change.key).or_default().insert(told.revision, value);
                let number = value.split(" v").nth(1).and_then(|n| n.parse().ok());
                let Some(number) = number else { continue };
                let new = (told.revision, Vec::new());
                let (revision, changed) = states.transfers.entry(number).or_insert(new);
                if *revision != told.revision {
                    return Err(format!("{number} happened at {revision} and {}", told.revision));
                }
                changed.push((&change.key, value));
                changed.sort_unstable();
            }
        }
        Ok(states)
    }

    fn at(&self, key: &str, revision: i64) -> Option<(i64, &'a str)> {
        let chain = self.accounts.get(key)?;
        chain.range(..=revision).next_back().map(|(at, value)| (*at, *value))
    }

    fn fits(&self, found: &[Account], revision: i64) -> Result<(), String> {
        for account in found {
            let fact = self.at(&account.key, revision);
            if fact != Some((account.mod_revision, account.value.as_str())) {
                return Err(format!("{account:?} at {revision} is in fact {fact:?}"));
            }
        }
        Ok(())
    }
}

struct Placed<'a> {
    call: &'a Call,
    revision: i64,
    writes: bool,
    serializable: bool,
}

/// Whatever begins after an answer does not stand before its revision, and a write stands after it.
/// A serializable read may stand anywhere before, but nothing that it saw may be written later.
fn real_time(placed: &[Placed]) -> Result<(), String> {
    let answered = |p: &&Placed| !matches!(p.call.answered, Answered::Unknown);
    let mut ends: Vec<&Placed> = placed.iter().filter(answered).collect();
    ends.sort_by_key(|p| p.call.ended);
    let mut begins: Vec<&Placed> = placed.iter().collect();
    begins.sort_by_key(|p| p.call.began);
    let mut ends = ends.into_iter().peekable();
    // The highest revision answered so far, and the highest of answers that bind reads too.
    let (mut seen, mut floor) = (0, 0);
    for p in begins {
        while let Some(earlier) = ends.next_if(|e| e.call.ended < p.call.began) {
            seen = seen.max(earlier.revision);
            if !earlier.serializable {
                floor = floor.max(earlier.revision);
            }
        }
        if p.writes && p.revision <= seen {
            return Err(format!("written at {} after {seen} was seen: {:?}", p.revision, p.call));
        }
        if !p.serializable && p.revision < floor {
            return Err(format!("stands at {} after {floor}: {:?}", p.revision, p.call));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::witness::Change;

    fn told(revision: i64, changes: &[(usize, &str)]) -> Told {
        let change = |(n, value): &(usize, &str)| Change {
            key: key(*n),
            value: Some((*value).to_owned()),
            create_revision: 2,
            version: 1,
            lease: 0,
        };
        Told { revision, changes: changes.iter().map(change).collect(), seen: vec![0] }
    }

    fn open() -> Told {
        let values: Vec<String> = (0..ACCOUNTS).map(|n| format!("100 open{n}")).collect();
        let changes: Vec<(usize, &str)> =
            values.iter().enumerate().map(|(n, v)| (n, v.as_str())).collect();
        told(2, &changes)
    }

    fn transfer(answered: Answered) -> Call {
        let account =
            |n: usize| Account { key: key(n), mod_revision: 2, value: format!("100 open{n}") };
        let values = ["99 v1".to_owned(), "101 v1".to_owned()];
        let asked = Asked::Transfer { number: 1, before: [account(0), account(1)], values };
        Call { member: 0, asked, answered, began: moment::at(1000), ended: moment::at(2000) }
    }

    fn read(serializable: bool, revision: i64, accounts: &[(i64, &str)]) -> Call {
        let mut all: Vec<Account> = (0..ACCOUNTS)
            .map(|n| Account { key: key(n), mod_revision: 2, value: format!("100 open{n}") })
            .collect();
        for (n, (at, value)) in accounts.iter().enumerate() {
            (all[n].mod_revision, all[n].value) = (*at, (*value).to_owned());
        }
        let answered = Answered::Found { revision, all };
        let asked = Asked::ReadAll { serializable };
        Call { member: 0, asked, answered, began: moment::at(3000), ended: moment::at(4000) }
    }

    #[test]
    fn a_good_history_passes_and_each_defect_is_found() {
        let (open, done) = (open(), told(3, &[(0, "99 v1"), (1, "101 v1")]));
        let history = [&open, &done];
        let moved = transfer(Answered::Done { revision: 3 });
        let now = read(false, 3, &[(3, "99 v1"), (3, "101 v1")]);
        check(&[moved.clone(), now.clone()], &history).expect("this is how it was");
        check(&[moved.clone(), read(true, 2, &[])], &history).expect("serializable may be old");
        let half = told(3, &[(0, "99 v1")]);
        for (calls, history, complaint) in [
            (vec![moved.clone(), read(false, 2, &[])], vec![&open, &done], "stands at 2"),
            (vec![moved.clone(), read(false, 3, &[(3, "99 v1")])], vec![&open, &done], "in fact"),
            (vec![moved.clone()], vec![&open], "lost"),
            (vec![moved.clone()], vec![&open, &half], "whole"),
            (
                vec![transfer(Answered::Refused { revision: 3, found: vec![] })],
                vec![&open, &done],
                "refused yet done",
            ),
            (
                vec![transfer(Answered::Refused { revision: 2, found: vec![] })],
                vec![&open],
                "nothing changed",
            ),
            (vec![now.clone()], vec![&open, &done], "nobody"),
        ] {
            let found = check(&calls, &history).expect_err(complaint);
            assert!(found.contains(complaint), "{found}");
        }
    }
}
