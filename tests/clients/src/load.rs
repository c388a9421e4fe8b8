//! Clients that write, swap and read all the time, and note everything for the revision check.
//!
//! Each worker talks to one member, one call at a time, and never repeats a call: what has no answer
//! is noted as unknown and the next call is a new one with a new value.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp};
use tokio::task::JoinHandle;

use crate::addresses::{Addresses, connect};
use crate::check::eventually;
use crate::history::{Answered, Asked, Operation, Summary, Written, check, witness};

/// All keys of the load are under this.
pub const PREFIX: &str = "load/";

/// A call without an answer by then is given up as unknown.
const PATIENCE: Duration = Duration::from_secs(2);

/// Between two probes of a member, which do not wait for each other.
const PROBE_INTERVAL: Duration = Duration::from_millis(25);

/// Between two calls of a worker, so that two cores are busy but not so busy that elections are late.
const PAUSE: Duration = Duration::from_millis(3);

/// After an error, which a member that is down answers at once.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(20);

/// A load that runs until [`Load::finish`].
#[derive(Debug)]
pub struct Load {
    notes: Arc<Notes>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Notes {
    operations: Mutex<Vec<(usize, Operation)>>,
    /// Makes every written value unique.
    next: AtomicU64,
    stop: AtomicBool,
    reads: Reads,
    pace: Option<Pace>,
}

/// The calls of all workers follow each other at this distance or a longer one.
#[derive(Debug)]
struct Pace {
    interval: Duration,
    next: Mutex<Instant>,
}

impl Pace {
    /// Waits until it is time for another call.
    async fn wait(&self) {
        let at = {
            let mut next = self.next.lock().expect("counting does not panic");
            let at = Instant::now().max(*next);
            *next = at + self.interval;
            at
        };
        tokio::time::sleep_until(at.into()).await;
    }
}

/// How the load reads. Whatever it is, it is noted as a linearizable read.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    #[default]
    Linearizable,
    /// Only to show that the check finds stale reads.
    Serializable,
}

impl Load {
    /// On each member two workers that put, each to a few keys of its own, and one that increments
    /// one of two counters all members share.
    pub fn start(cluster: &Addresses) -> Load {
        Load::start_reading(cluster, Reads::Linearizable)
    }

    /// As [`Load::start`], with reads of this kind.
    pub fn start_reading(cluster: &Addresses, reads: Reads) -> Load {
        Load::start_paced(cluster, reads, None)
    }

    /// As [`Load::start_reading`], with no more than so many calls a second in all.
    pub fn start_paced(cluster: &Addresses, reads: Reads, a_second: Option<u32>) -> Load {
        let pace = a_second.map(|calls| Pace {
            interval: Duration::from_secs(1) / calls.max(1),
            next: Mutex::new(Instant::now()),
        });
        let notes = Arc::new(Notes { reads, pace, ..Notes::default() });
        let mut load = Load { notes, workers: Vec::new() };
        for member in 0..cluster.size() {
            load.add(cluster, member);
        }
        load
    }

    /// The same on one more member.
    pub fn add(&mut self, cluster: &Addresses, member: usize) {
        let endpoint = cluster.endpoint(member);
        for worker in 0..2 {
            let (notes, endpoint) = (self.notes.clone(), endpoint.clone());
            self.workers.push(tokio::spawn(async move {
                notes.keep_putting(member, &endpoint, &format!("m{member}w{worker}")).await;
            }));
        }
        let (notes, counter) = (self.notes.clone(), member % 2);
        self.workers.push(tokio::spawn(async move {
            notes.keep_counting(member, &endpoint, &counter_key(counter)).await;
        }));
    }

    /// How many writes have been acknowledged so far.
    pub fn acknowledged(&self) -> usize {
        let operations = self.notes.operations.lock().expect("noting does not panic");
        operations.iter().filter(|(_, o)| matches!(o.answered, Answered::Done { .. })).count()
    }

    /// Waits until `more` further writes have been acknowledged.
    pub async fn flows(&self, more: usize) {
        let wanted = self.acknowledged() + more;
        eventually(Duration::from_secs(30), &format!("{more} more writes"), || async {
            (self.acknowledged() >= wanted).then_some(())
        })
        .await;
    }

    /// From now on puts to each of `members` every 25 ms, whatever became of the puts before, so that
    /// [`Load::longest_gap`] shows the cluster's silence and not the patience of stuck workers.
    pub async fn probe(&mut self, cluster: &Addresses, members: &[usize]) {
        for member in members {
            let (notes, member) = (self.notes.clone(), *member);
            let client = cluster.client(member).await;
            self.workers.push(tokio::spawn(async move {
                let mut calls = tokio::task::JoinSet::new();
                let mut tick = tokio::time::interval(PROBE_INTERVAL);
                while !notes.stop.load(Ordering::Relaxed) {
                    tick.tick().await;
                    let (notes, mut client) = (notes.clone(), client.clone());
                    calls.spawn(async move {
                        notes.put(member, &mut client, &format!("{PREFIX}probe{member}")).await
                    });
                }
                calls.join_all().await;
            }));
        }
    }

    /// Puts to each of `members` every 25 ms until one is acknowledged, and gives the time from
    /// `since` to that. The calls still open go on and are waited for by [`Load::finish`].
    pub async fn time_to_next_write(
        &mut self,
        cluster: &Addresses,
        members: &[usize],
        since: Instant,
    ) -> Duration {
        let (sender, mut acknowledged) = tokio::sync::mpsc::unbounded_channel();
        let mut tick = tokio::time::interval(PROBE_INTERVAL);
        let mut clients = Vec::new();
        for member in members {
            clients.push((*member, cluster.client(*member).await));
        }
        loop {
            tokio::select! {
                Some(at) = acknowledged.recv() => return Instant::duration_since(&at, since),
                _ = tick.tick() => for (member, client) in &clients {
                    let (notes, sender) = (self.notes.clone(), sender.clone());
                    let (member, mut client) = (*member, client.clone());
                    self.workers.push(tokio::spawn(async move {
                        let key = format!("{PREFIX}probe{member}");
                        if notes.put(member, &mut client, &key).await {
                            // Only the first matters, so nobody may be listening.
                            let _ = sender.send(Instant::now());
                        }
                    }));
                }
            }
        }
    }

    /// The longest time between two acknowledged writes on `members`, one after the other, that
    /// began after `since`.
    pub fn longest_gap(&self, members: &[usize], since: Instant) -> Duration {
        let operations = self.notes.operations.lock().expect("noting does not panic");
        let done = |o: &Operation| matches!(o.answered, Answered::Done { .. });
        let mut times: Vec<Instant> = operations
            .iter()
            .filter(|(m, o)| members.contains(m) && o.ended >= since && done(o))
            .map(|(_, o)| o.ended)
            .collect();
        times.push(since);
        times.sort_unstable();
        times.windows(2).map(|w| w[1] - w[0]).max().unwrap_or_default()
    }

    /// Of the calls to `members` that were open `at` that time: how much longer the last of them took.
    /// A call that was given up counts as well.
    pub fn longest_open_at(&self, members: &[usize], at: Instant) -> Duration {
        let operations = self.notes.operations.lock().expect("noting does not panic");
        let open = |o: &Operation| o.began <= at && o.ended >= at;
        let rests = operations
            .iter()
            .filter(|(m, o)| members.contains(m) && open(o))
            .map(|(_, o)| o.ended - at);
        rests.max().unwrap_or_default()
    }

    /// Stops the load and gives all that it noted, each with the member that was asked.
    pub async fn stop(self) -> Vec<(usize, Operation)> {
        self.notes.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            worker.await.expect("a worker does not panic");
        }
        std::mem::take(&mut *self.notes.operations.lock().expect("noting does not panic"))
    }

    /// Stops the load, writes once more, and checks everything against the history as each of the
    /// members, all of which must serve by now, tells it.
    ///
    /// # Panics
    ///
    /// If the members differ or the history does not fit what the clients were told.
    pub async fn finish(self, cluster: &Addresses) -> Summary {
        self.notes.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            worker.await.expect("a worker does not panic");
        }
        let mut client = cluster.client(0).await;
        let last = eventually(Duration::from_secs(20), "the last write", || async {
            let key = format!("{PREFIX}end");
            let mut client = client.clone();
            self.notes.put(0, &mut client, &key).await.then_some(())?;
            let operations = self.notes.operations.lock().expect("noting does not panic");
            match operations.last()?.1.answered {
                Answered::Done { revision } => Some(revision),
                _ => None,
            }
        })
        .await;
        let history = witness(&mut client, PREFIX, last).await;
        for member in 1..cluster.size() {
            let mut other = cluster.client(member).await;
            let theirs = witness(&mut other, PREFIX, last).await;
            assert!(history == theirs, "members 0 and {member} tell different histories");
        }
        let operations = self.notes.operations.lock().expect("noting does not panic");
        let operations: Vec<Operation> = operations.iter().map(|(_, o)| o.clone()).collect();
        let summary =
            check(&operations, &history).unwrap_or_else(|complaint| panic!("{complaint}"));
        check_counters(&operations, &history).unwrap_or_else(|complaint| panic!("{complaint}"));
        summary
    }
}

fn counter_key(counter: usize) -> String {
    format!("{PREFIX}counter{counter}")
}

/// Each increment counts once: the number in a counter is the number of its writes, which is that of
/// the acknowledged increments and at most the unknown ones more.
///
/// # Errors
///
/// A sentence about the first counter that is wrong.
pub fn check_counters(operations: &[Operation], history: &[Written]) -> Result<(), String> {
    for counter in 0..2 {
        let counter = counter_key(counter);
        let mut last = 0;
        for written in history.iter().filter(|w| w.key == counter) {
            last = count_in(&written.value);
            if last != written.version {
                return Err(format!("not an increment: {written:?}"));
            }
        }
        let mut swaps = (0, 0);
        for operation in operations {
            if matches!(&operation.asked, Asked::Swap { key, .. } if *key == counter) {
                swaps.0 += i64::from(matches!(operation.answered, Answered::Done { .. }));
                swaps.1 += i64::from(matches!(operation.answered, Answered::Unknown));
            }
        }
        let (done, unknown) = swaps;
        if !(done..=done + unknown).contains(&last) {
            return Err(format!(
                "{counter} is {last} after {done} increments and {unknown} unknown ones"
            ));
        }
    }
    Ok(())
}

fn count_in(value: &str) -> i64 {
    value.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

impl Notes {
    async fn keep_putting(&self, member: usize, endpoint: &str, worker: &str) {
        let mut client = connect(endpoint).await;
        let mut turn = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let key = format!("{PREFIX}{worker}k{}", turn % 4);
            turn += 1;
            let done = self.put(member, &mut client, &key).await;
            pause(done, &mut client, endpoint).await;
        }
    }

    async fn keep_counting(&self, member: usize, endpoint: &str, key: &str) {
        let mut client = connect(endpoint).await;
        while !self.stop.load(Ordering::Relaxed) {
            let done = match self.read(member, &mut client, key).await {
                Some((at, value)) => {
                    self.swap(member, &mut client, key, at, count_in(&value) + 1).await
                }
                None => false,
            };
            pause(done, &mut client, endpoint).await;
        }
    }

    /// Whether the put was acknowledged.
    async fn put(&self, member: usize, client: &mut Client, key: &str) -> bool {
        let value = format!("v{}", self.next.fetch_add(1, Ordering::Relaxed));
        let asked = Asked::Put { key: key.to_owned(), value: value.clone() };
        self.note(member, asked, async {
            let answer = client.put(key, value, None).await.ok()?;
            Some(Answered::Done { revision: answer.header()?.revision() })
        })
        .await
        .is_some()
    }

    /// Whether the swap was answered, be it with a refusal.
    async fn swap(&self, member: usize, client: &mut Client, key: &str, at: i64, n: i64) -> bool {
        let value = format!("{n} v{}", self.next.fetch_add(1, Ordering::Relaxed));
        let asked = Asked::Swap { key: key.to_owned(), value: value.clone(), if_at: at };
        let txn = Txn::new()
            .when([Compare::mod_revision(key, CompareOp::Equal, at)])
            .and_then([TxnOp::put(key, value, None)]);
        self.note(member, asked, async {
            let answer = client.txn(txn).await.ok()?;
            let revision = answer.header()?.revision();
            let done = answer.succeeded();
            Some(if done { Answered::Done { revision } } else { Answered::Refused { revision } })
        })
        .await
        .is_some()
    }

    /// The key's mod revision and value, when there was an answer.
    async fn read(&self, member: usize, client: &mut Client, key: &str) -> Option<(i64, String)> {
        let asked = Asked::Read { key: key.to_owned() };
        let answered = self.note(member, asked, async {
            let options =
                (self.reads == Reads::Serializable).then(|| GetOptions::new().with_serializable());
            let answer = client.get(key, options).await.ok()?;
            let revision = answer.header()?.revision();
            let kv = answer.kvs().first();
            let mod_revision = kv.map_or(0, |kv| kv.mod_revision());
            let value = kv.map_or(Ok(""), |kv| kv.value_str()).ok()?.to_owned();
            Some(Answered::Found { revision, mod_revision, value })
        });
        match answered.await? {
            Answered::Found { mod_revision, value, .. } => Some((mod_revision, value)),
            _ => None,
        }
    }

    async fn note(
        &self,
        member: usize,
        asked: Asked,
        call: impl Future<Output = Option<Answered>>,
    ) -> Option<Answered> {
        if let Some(pace) = &self.pace {
            pace.wait().await;
        }
        let began = Instant::now();
        let answered = tokio::time::timeout(PATIENCE, call).await.ok().flatten();
        let ended = Instant::now();
        let noted = answered.clone().unwrap_or(Answered::Unknown);
        let operation = Operation { asked, answered: noted, began, ended };
        self.operations.lock().expect("noting does not panic").push((member, operation));
        answered
    }
}

async fn pause(done: bool, client: &mut Client, endpoint: &str) {
    if done {
        tokio::time::sleep(PAUSE).await;
    } else {
        *client = connect(endpoint).await;
        tokio::time::sleep(PAUSE_AFTER_ERROR).await;
    }
}
