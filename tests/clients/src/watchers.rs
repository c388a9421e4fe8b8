//! Writers of all kinds, and watches of all kinds beside them, which note everything for
//! [`crate::watching`].
//!
//! Writers put, delete, delete ranges, write several keys at once and let leases end. Watches read
//! beside them, at random speeds, leave at random moments, and go on from what they saw on whichever
//! member comes next; compaction follows right behind the slowest of them, and one that stays away is
//! overtaken by it. What happens to the members meanwhile is the caller's affair.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::{JoinHandle, JoinSet};
use tonic::Status;

use crate::addresses::Addresses;
use crate::check::{AFTER_ELECTION, SOON, eventually, within};
use crate::watching::{Interest, Note, Record, Summary, Witness};
use crate::wire::{
    self, DeleteRangeRequest, Op, RequestOp, TxnRequest, WatchCall, WatchProgress, WatchRequest,
    WatchUnion, Wire,
};

const WRITERS_A_MEMBER: usize = 2;

/// Watches that move about, on a stream each.
pub const READERS: usize = 10;

/// Keys that are watched, and keys beside them.
const KEYS: usize = 12;
const KEYS_BESIDE: usize = 4;

/// Every so many values are this large, so that readers who pause fall behind and must catch up.
const LARGE_EVERY: u64 = 8;
const LARGE_BYTES: usize = 32 << 10;

/// What a reader takes in unread.
const WINDOW_BYTES: u32 = 64 << 10;

/// A call without an answer by then is given up as unknown.
const PATIENCE: Duration = Duration::from_secs(2);

/// Between two calls of a writer, so that two cores are busy but not so busy that elections are late.
const WRITER_PAUSE_MS: std::ops::Range<u64> = 1..8;

/// How often a reader asks for progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(150);

const COMPACT_EVERY: Duration = Duration::from_millis(300);

/// How far compaction must have passed the sleeper before it comes back.
const OVERTAKEN_BY: i64 = 50;

/// Running writers and watches: see [`Watchers::start`].
pub struct Watchers {
    run: Arc<Run>,
    witnesses: Vec<JoinHandle<Vec<Record>>>,
    readers: JoinSet<Vec<Record>>,
    writers: JoinSet<()>,
    compactor: JoinHandle<()>,
}

/// What the watches were told and the writers wrote.
#[derive(Debug, Default)]
pub struct Told {
    /// What each member told the watch of everything from revision 1.
    pub witnesses: Vec<Record>,
    pub readers: Vec<Record>,
    /// Acknowledged puts: revision, key and value.
    pub acknowledged: Vec<(i64, Bytes, Bytes)>,
    /// All values that anyone tried to write.
    pub issued: HashSet<Bytes>,
    pub calls: Vec<WriteCall>,
    /// The revision that nothing follows, and up to where compaction went.
    pub last: i64,
    pub compacted: i64,
    /// How long after that revision the last watch had seen it.
    pub caught_up: Duration,
}

impl Told {
    /// Checks that the members tell one history, that the writers' answers fit it, and every watch.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<Summary, String> {
        let events: Vec<_> = self.witnesses.iter().map(Record::events).collect();
        let witness = Witness::new(&events[0])?;
        if let Some(member) = events.iter().position(|theirs| *theirs != events[0]) {
            return Err(format!("members 0 and {member} tell different histories"));
        }
        witness.check_writes(&self.acknowledged, &self.issued)?;
        let mut total = Summary::default();
        for record in self.witnesses.iter().chain(&self.readers) {
            let summary = record.check(&witness, self.last);
            total += summary.map_err(|found| format!("{:?}: {found}", record.interest))?;
        }
        Ok(total)
    }
}

impl Watchers {
    /// Starts two writers on each member, a witness of each, readers that move about, one that stays
    /// away until it is overtaken, and what compacts behind them.
    pub fn start(cluster: &Addresses, seed: u64) -> Watchers {
        let run = Run::new(cluster, seed);
        let members = cluster.size();
        let witness = |member| tokio::spawn(Reader::witness(&run, member).read());
        let witnesses = (0..members).map(witness).collect();
        let mut readers = JoinSet::new();
        let mut random = run.random(700);
        for place in 0..READERS {
            let watches = random.random_range(1..4);
            let interests = (0..watches).map(|_| interest(&mut random)).collect();
            let who = 100 + place as u64;
            readers.spawn(Reader::new(&run, who, Some(members + place), interests).read());
        }
        let interests = vec![Interest::everything(), interest(&mut random)];
        readers.spawn(Reader::new(&run, 99, None, interests).sleep_and_read());
        let compactor = tokio::spawn(run.clone().compact());
        let mut writers = JoinSet::new();
        for who in 0..members * WRITERS_A_MEMBER {
            writers.spawn(run.clone().write(who % members, who as u64));
        }
        Watchers { run, witnesses, readers, writers, compactor }
    }

    /// The highest revision that a writer was told.
    pub fn newest(&self) -> i64 {
        self.run.newest.load(Ordering::Relaxed)
    }

    /// Waits until the history is longer by `more` revisions.
    pub async fn flows(&self, more: i64) {
        let wanted = self.newest() + more;
        eventually(Duration::from_secs(60), &format!("{more} more revisions"), || async {
            (self.newest() >= wanted).then_some(())
        })
        .await;
    }

    /// Stops the writers, waits until every watch has seen the end, and gives what all were told.
    ///
    /// # Panics
    ///
    /// If a watch was told what no watch may be told. One that does not see the end within 20 s is
    /// left to the check.
    pub async fn stop(mut self) -> Told {
        let run = self.run;
        run.stop_writing.store(true, Ordering::Relaxed);
        self.writers.join_all().await;
        // Unknown writes and leases may still move the history: only from here on is it settled.
        let (last, settled) = settle(&run).await;
        run.last.store(last, Ordering::Relaxed);
        let mut readers = Vec::new();
        while !self.readers.is_empty() {
            match tokio::time::timeout_at(
                (settled + AFTER_ELECTION).into(),
                self.readers.join_next(),
            )
            .await
            {
                Ok(read) => readers.extend(read.expect("there is one").expect("no panic")),
                Err(_) => {
                    run.give_up.store(true, Ordering::Relaxed);
                    let rest = std::mem::take(&mut self.readers).join_all();
                    let rest = within(SOON, "the watches that see no end give up", rest).await;
                    readers.extend(rest.into_iter().flatten());
                }
            }
        }
        let caught_up = settled.elapsed();
        self.compactor.await.expect("no panic");
        let mut witnesses = Vec::new();
        for witness in self.witnesses {
            let records = within(SOON, "every witness sees the end", witness).await;
            witnesses.push(records.expect("no panic").remove(0));
        }
        let writes = std::mem::take(&mut *run.writes.lock().expect("noting does not panic"));
        Told {
            witnesses,
            readers,
            acknowledged: writes.acknowledged,
            issued: writes.issued,
            calls: writes.calls,
            last,
            compacted: run.compacted.load(Ordering::SeqCst),
            caught_up,
        }
    }
}

/// What all clients share.
pub struct Run {
    seed: u64,
    endpoints: Vec<String>,
    /// Makes every written value unique.
    next_value: AtomicU64,
    writes: Mutex<Writes>,
    stop_writing: AtomicBool,
    /// Whoever has not seen the end by now has seen enough: what is missing is for the check.
    give_up: AtomicBool,
    /// The highest revision a writer was told.
    newest: AtomicI64,
    /// The highest revision anyone asked to compact.
    compacting: AtomicI64,
    /// The highest revision that was compacted.
    compacted: AtomicI64,
    /// The last revision of the run, 0 until it is known.
    last: AtomicI64,
    /// For each reader that compaction stays behind: up to where it has seen everything.
    seen: Vec<AtomicI64>,
}

#[derive(Default)]
struct Writes {
    issued: HashSet<Bytes>,
    acknowledged: Vec<(i64, Bytes, Bytes)>,
    calls: Vec<WriteCall>,
}

/// When a writer did something, be it several calls, and whether all of it was acknowledged.
#[derive(Debug, Clone, Copy)]
pub struct WriteCall {
    pub member: usize,
    pub began: Instant,
    pub ended: Instant,
    pub done: bool,
}

impl Run {
    fn new(cluster: &Addresses, seed: u64) -> Arc<Run> {
        let behind = cluster.size() + READERS;
        Arc::new(Run {
            seed,
            endpoints: (0..cluster.size()).map(|m| cluster.endpoint(m)).collect(),
            next_value: AtomicU64::new(0),
            writes: Mutex::default(),
            stop_writing: AtomicBool::new(false),
            give_up: AtomicBool::new(false),
            newest: AtomicI64::new(1),
            compacting: AtomicI64::new(0),
            compacted: AtomicI64::new(0),
            last: AtomicI64::new(0),
            seen: (0..behind).map(|_| AtomicI64::new(0)).collect(),
        })
    }

    fn random(&self, who: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed.wrapping_add(who.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    fn new_value(&self) -> Bytes {
        let number = self.next_value.fetch_add(1, Ordering::Relaxed);
        self.writes.lock().expect("noting does not panic").issued.insert(name(number));
        value(number)
    }

    fn note(&self, revision: i64, puts: &[(Bytes, Bytes)]) {
        self.newest.fetch_max(revision, Ordering::Relaxed);
        let mut writes = self.writes.lock().expect("noting does not panic");
        let named = puts.iter().map(|(key, value)| (revision, key.clone(), name_in(value)));
        writes.acknowledged.extend(named);
    }

    async fn write(self: Arc<Run>, member: usize, who: u64) {
        let mut random = self.random(who);
        let wire = Wire::lazy(&self.endpoints[member]);
        while !self.stop_writing.load(Ordering::Relaxed) {
            // What has no answer is unknown: the witness will tell.
            let began = Instant::now();
            let done = tokio::time::timeout(PATIENCE, self.write_once(&wire, &mut random)).await;
            let call = WriteCall {
                member,
                began,
                ended: Instant::now(),
                done: matches!(done, Ok(Ok(()))),
            };
            self.writes.lock().expect("noting does not panic").calls.push(call);
            let pause = match done {
                Ok(Ok(())) => random.random_range(WRITER_PAUSE_MS),
                _ => 20,
            };
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn write_once(&self, wire: &Wire, random: &mut StdRng) -> Result<(), Status> {
        match random.random_range(0..100) {
            0..45 => {
                let (key, value) = (any_key(random), self.new_value());
                let revision = wire.put(key.clone(), value.clone()).await?;
                self.note(revision, &[(key, value)]);
            }
            45..65 => {
                wire.delete(any_key(random), "").await?;
            }
            65..70 => {
                let from = random.random_range(0..KEYS);
                let to = (from + random.random_range(1..4)).min(KEYS);
                wire.delete(key(from), key(to)).await?;
            }
            70..92 => self.write_many(wire, random).await?,
            _ => self.write_leased(wire, random).await?,
        }
        Ok(())
    }

    /// Several puts and deletes of distinct keys in one transaction.
    async fn write_many(&self, wire: &Wire, random: &mut StdRng) -> Result<(), Status> {
        let mut ops = Vec::new();
        let mut puts = Vec::new();
        let mut used = HashSet::new();
        for _ in 0..random.random_range(2..6) {
            let key = any_key(random);
            if !used.insert(key.clone()) {
                continue;
            }
            if random.random_bool(0.7) {
                let value = self.new_value();
                ops.push(wire::put_op(key.clone(), value.clone()));
                puts.push((key, value));
            } else {
                let delete = DeleteRangeRequest { key, range_end: Bytes::new() };
                ops.push(RequestOp { request: Some(Op::Delete(delete)) });
            }
        }
        let txn = TxnRequest { success: ops, ..TxnRequest::default() };
        let answer = wire.txn(txn).await?;
        self.note(answer.header.map_or(0, |h| h.revision), &puts);
        Ok(())
    }

    /// Some keys on a lease, which is revoked or left to run out.
    async fn write_leased(&self, wire: &Wire, random: &mut StdRng) -> Result<(), Status> {
        let lease = wire.lease_grant(2, 0).await?.id;
        for _ in 0..random.random_range(1..4) {
            let (key, value) = (any_key(random), self.new_value());
            let revision = wire.put_leased(key.clone(), value.clone(), lease).await?;
            self.note(revision, &[(key, value)]);
        }
        if random.random_bool(0.5) {
            wire.lease_revoke(lease).await?;
        }
        Ok(())
    }

    /// Compacts up to what the slowest reader has seen, again and again, on any member.
    async fn compact(self: Arc<Run>) {
        let mut random = self.random(900);
        let wires: Vec<Wire> = self.endpoints.iter().map(|e| Wire::lazy(e)).collect();
        while self.last.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(COMPACT_EVERY).await;
            let behind = self.seen.iter().map(|s| s.load(Ordering::Relaxed)).min();
            let revision = behind.expect("there are readers");
            if revision <= self.compacting.load(Ordering::Relaxed) {
                continue;
            }
            self.compacting.store(revision, Ordering::SeqCst);
            let call = wires[random.random_range(0..wires.len())].compact(revision);
            if let Ok(Ok(_)) = tokio::time::timeout(PATIENCE, call).await {
                self.compacted.store(revision, Ordering::SeqCst);
            }
        }
    }
}

fn name(number: u64) -> Bytes {
    format!("v{number}").into()
}

/// The value of this number: its name, and for some a long tail.
fn value(number: u64) -> Bytes {
    let mut value = name(number).to_vec();
    if number.is_multiple_of(LARGE_EVERY) {
        value.resize(LARGE_BYTES, b'.');
    }
    value.into()
}

/// The name of a value, which is kept instead of it.
///
/// # Panics
///
/// If the value is none of ours, or not whole.
fn name_in(found: &Bytes) -> Bytes {
    let digits = found[1..].iter().take_while(|b| b.is_ascii_digit()).count();
    let number = std::str::from_utf8(&found[1..=digits]).expect("digits").parse().expect("ours");
    assert!(value(number) == found, "value {number} is broken: {found:?}");
    name(number)
}

fn key(n: usize) -> Bytes {
    format!("k/{n:02}").into()
}

fn any_key(random: &mut StdRng) -> Bytes {
    match random.random_range(0..KEYS + KEYS_BESIDE) {
        n if n < KEYS => key(n),
        n => format!("other/{n}").into(),
    }
}

/// What readers watch, by turns.
fn interest(random: &mut StdRng) -> Interest {
    let all = Interest { key: "k/".into(), range_end: "k0".into(), ..Interest::default() };
    let prev_kv = random.random_bool(0.5);
    let from = random.random_range(0..KEYS - 1);
    let to = random.random_range(from + 1..KEYS);
    match random.random_range(0..7) {
        0 => Interest { prev_kv, ..all },
        1 => Interest { key: key(from), prev_kv, ..Interest::default() },
        2 => Interest { key: key(from), range_end: key(to), prev_kv, ..Interest::default() },
        3 => Interest { no_put: true, prev_kv, ..all },
        4 => Interest { no_delete: true, prev_kv, ..all },
        5 => {
            let range_end = Bytes::from_static(&[0]);
            Interest { key: key(from), range_end, prev_kv, ..Interest::default() }
        }
        _ => Interest::everything(),
    }
}

/// One stream's worth of watches, which move from member to member together.
struct Reader {
    run: Arc<Run>,
    random: StdRng,
    /// The members it may read from.
    members: Vec<usize>,
    watches: Vec<Watch>,
    /// Where the latest of the watches on its stream begins.
    ahead: i64,
    /// Its place in [`Run::seen`]; `None` for the sleeper, which nothing waits for.
    place: Option<usize>,
    /// What comes of it at random: to leave, and to pause.
    restless: bool,
}

struct Watch {
    record: Record,
    /// The first revision that is still to come.
    next: i64,
}

impl Reader {
    fn new(run: &Arc<Run>, who: u64, place: Option<usize>, interests: Vec<Interest>) -> Reader {
        let watch = |interest| Watch { record: Record::new(interest), next: 1 };
        Reader {
            run: run.clone(),
            random: run.random(who),
            members: (0..run.endpoints.len()).collect(),
            watches: interests.into_iter().map(watch).collect(),
            ahead: 0,
            place,
            restless: true,
        }
    }

    /// Everything that one member tells, read at once and in one piece as far as the member lives.
    fn witness(run: &Arc<Run>, member: usize) -> Reader {
        let who = 800 + member as u64;
        let mut reader = Reader::new(run, who, Some(member), vec![Interest::everything()]);
        reader.members = vec![member];
        reader.restless = false;
        reader
    }

    fn next(&self) -> i64 {
        self.watches.iter().map(|w| w.next).min().expect("a reader has watches")
    }

    /// Whether it has seen the last revision of the run.
    fn done(&self) -> bool {
        if self.run.give_up.load(Ordering::Relaxed) {
            return true;
        }
        let last = self.run.last.load(Ordering::Relaxed);
        last > 0 && self.next() > last
    }

    /// Reads on one stream after the other until it has seen everything.
    async fn read(mut self) -> Vec<Record> {
        while !self.done() {
            let turn = self.random.random_range(0..self.members.len());
            let member = self.members[turn];
            let answers = match self.restless {
                true => self.random.random_range(1..300),
                false => usize::MAX,
            };
            // A member that is down, or goes down, ends the turn: the next may be another.
            if self.turn(member, answers).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        self.watches.into_iter().map(|w| w.record).collect()
    }

    /// Opens a stream on this member and takes so many answers, or until all is seen.
    async fn turn(&mut self, member: usize, answers: usize) -> Result<(), Status> {
        let mut call = self.open(member).await?;
        let mut progress = tokio::time::interval(PROGRESS_EVERY);
        for _ in 0..answers {
            if self.restless {
                let pause = match self.random.random_range(0..200) {
                    0 => self.random.random_range(200..1000),
                    1..20 => self.random.random_range(0..40),
                    _ => 0,
                };
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            loop {
                tokio::select! {
                    answer = call.next() => {
                        if self.take(answer?) {
                            // One of its watches is gone: all begin again.
                            return Ok(());
                        }
                        break;
                    }
                    _ = progress.tick() => {
                        let last = self.run.last.load(Ordering::Relaxed);
                        let ahead = last > 0 && self.ahead > last;
                        if ahead || self.run.give_up.load(Ordering::Relaxed) {
                            return Ok(());
                        }
                        call.ask(WatchUnion::Progress(WatchProgress {}));
                    }
                }
            }
            if self.done() {
                break;
            }
        }
        Ok(())
    }

    async fn open(&mut self, member: usize) -> Result<WatchCall, Status> {
        let fragment = self.random.random_bool(0.3);
        let create = |(id, watch): (usize, &Watch)| -> WatchRequest {
            let id = i64::try_from(id).expect("few") + 1;
            wire::create(watch.record.interest.create(id, watch.next, fragment))
        };
        // Progress is told of a whole stream, and not before its latest watch has begun: one that has
        // seen the end would wait for what never comes, and keep the others waiting.
        let last = self.run.last.load(Ordering::Relaxed);
        let wants = |watch: &Watch| last == 0 || watch.next <= last;
        let watches = self.watches.iter().enumerate();
        let requests = watches.filter(|(_, watch)| wants(watch)).map(create).collect();
        self.ahead = 0;
        for watch in self.watches.iter_mut().filter(|watch| wants(watch)) {
            self.ahead = self.ahead.max(watch.next);
            watch.record.notes.push(Note::Began { from: watch.next });
        }
        let endpoint = &self.run.endpoints[member];
        let call = async { Wire::narrow(endpoint, WINDOW_BYTES).await?.watch(requests).await };
        let call = tokio::time::timeout(PATIENCE, call).await;
        call.unwrap_or_else(|_| Err(Status::deadline_exceeded("no stream")))
    }

    /// Notes an answer; true when it ends a watch.
    fn take(&mut self, mut answer: wire::WatchResponse) -> bool {
        // Before what was asked to be compacted since, which cannot have mattered.
        let compacted = self.run.compacting.load(Ordering::SeqCst);
        let revision = answer.revision();
        if answer.watch_id == -1 && !answer.created {
            assert!(!answer.canceled && answer.events.is_empty(), "{answer:?}");
            for watch in &mut self.watches {
                watch.record.notes.push(Note::Progress { revision });
                watch.next = watch.next.max(revision + 1);
            }
        } else {
            let id = usize::try_from(answer.watch_id).expect("one of ours");
            let watch = &mut self.watches[id - 1];
            if answer.created {
                assert!(!answer.canceled && answer.events.is_empty(), "{answer:?}");
            } else if answer.canceled {
                let revision = answer.compact_revision;
                assert!(revision > 0, "cancelled without a reason to know: {answer:?}");
                assert!(
                    self.place.is_none(),
                    "told to be past what is compacted, and then cancelled: {answer:?}"
                );
                assert!(revision <= compacted, "not asked for yet: {answer:?}");
                watch.record.notes.push(Note::Compacted { revision });
                watch.next = revision;
            } else {
                let (mut events, fragment) = (std::mem::take(&mut answer.events), answer.fragment);
                for event in &mut events {
                    for pair in event.kv.iter_mut().chain(&mut event.prev_kv) {
                        if !pair.value.is_empty() {
                            pair.value = name_in(&pair.value);
                        }
                    }
                }
                let last = events.last().expect("an answer of a watch has events").revision();
                if !fragment {
                    watch.next = watch.next.max(last + 1);
                }
                watch.record.notes.push(Note::Events { events, fragment, compacted });
            }
        }
        if let Some(place) = self.place {
            self.run.seen[place].store(self.next() - 1, Ordering::Relaxed);
        }
        answer.canceled
    }

    /// Reads a little, stays away until compaction has passed it, and finds that out.
    async fn sleep_and_read(mut self) -> Vec<Record> {
        while !self.done() {
            let member = self.random.random_range(0..self.members.len());
            let answers = self.random.random_range(1..30);
            if self.turn(member, answers).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            let wanted = self.next() + OVERTAKEN_BY;
            let (run, limit) = (self.run.clone(), Duration::from_secs(60));
            eventually(limit, "compaction passes the sleeper, or the end", || async {
                let passed = run.compacted.load(Ordering::SeqCst) >= wanted;
                (passed || run.last.load(Ordering::Relaxed) > 0).then_some(())
            })
            .await;
        }
        self.watches.into_iter().map(|w| w.record).collect()
    }
}

/// Waits until no lease is left, and gives the revision that nothing follows, and since when.
async fn settle(run: &Run) -> (i64, Instant) {
    let wire = Wire::lazy(&run.endpoints[0]);
    let (wire, mut before) = (&wire, 0);
    eventually(AFTER_ELECTION, "all leases end", || async {
        wire.leases().await.ok()?.is_empty().then_some(())
    })
    .await;
    loop {
        let settled = Instant::now();
        let now = wire.put("other/end", run.new_value()).await.expect("a put");
        if now == before + 1 {
            return (now, settled);
        }
        before = now;
    }
}
