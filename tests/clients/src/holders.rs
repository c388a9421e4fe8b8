//! Clients that take and leave locks and leaderships in all ways there are, and note everything for
//! [`crate::holding`].
//!
//! Each client does one thing after the other on names that all share: the Lock service with a lease
//! of its own or none, Campaign, or the recipe of Go's `concurrency` package on transactions and
//! watches. What it does beside (cancelling, dropping its connection, ending its lease while it waits
//! or holds) is drawn from the run's seed.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, Error, EventType, GetOptions, KeyValue, LeaderKey, ProclaimOptions,
    PutOptions, ResignOptions, ResponseHeader, SortOrder, SortTarget, Txn, TxnOp, TxnOpResponse,
    WatchOptions,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::addresses::{Addresses, connect};
use crate::check::{eventually, within};
use crate::holding::{Answered, Asked, Call, Change, GUARDED, History, Limits, QUEUES};
use crate::raw::{self, LockRequest, LockResponse, UnlockRequest, UnlockResponse};

/// Of the clients' own leases, which nobody renews: longer than any run waits for one of them.
const TTL: i64 = 600;

/// A call that should be answered at once is given up after this time.
const PATIENCE: Duration = Duration::from_secs(5);

/// The same of one that may wait for others.
const LONG_PATIENCE: Duration = Duration::from_secs(20);

/// After an error, which a member that is down answers at once.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(50);

/// A key that is first of its queue for so long is nobody's: the janitor takes its lease away. Longer
/// than the limits, so that the check finds it all the same.
const JANITOR: Duration = Duration::from_secs(5);

/// Those who follow who leads.
const OBSERVERS: u64 = 4;

/// Everything that the clients share.
pub struct Run {
    endpoints: Vec<String>,
    names: usize,
    manners: &'static [Manner],
    seed: u64,
    granted: AtomicUsize,
    stop: AtomicBool,
    /// Makes values unique.
    next: AtomicU64,
    calls: Mutex<Vec<Call>>,
    changes: Mutex<Vec<Change>>,
    pub swept: AtomicUsize,
}

/// How a client takes and leaves what it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    Lock,
    LockWithoutLease,
    Campaign,
    Recipe,
}

/// All there are, in turn.
pub const MANNERS: &[Manner] =
    &[Manner::Lock, Manner::LockWithoutLease, Manner::Campaign, Manner::Recipe];

/// What a client does while it waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whim {
    Wait,
    Cancel,
    Disconnect,
    EndLease,
}

/// The connections of one client to one member, closed when the last clone goes.
#[derive(Clone)]
struct Link {
    channel: Channel,
    client: Client,
}

impl Link {
    async fn to(endpoint: &str) -> Link {
        Link { channel: raw::lazy_channel(endpoint), client: connect(endpoint).await }
    }
}

/// What a client has been granted.
#[derive(Debug, Clone)]
struct Hold {
    name: String,
    key: String,
    token: i64,
}

impl Hold {
    fn leader_key(&self) -> LeaderKey {
        let name = format!("{QUEUES}{}", self.name);
        let key = LeaderKey::new().with_name(name).with_key(self.key.as_str());
        key.with_rev(self.token).with_lease(self.lease())
    }

    /// The lease that the key is named after.
    fn lease(&self) -> i64 {
        let hex = self.key.rsplit('/').next().unwrap_or_default();
        i64::from_str_radix(hex, 16).expect("a queue key ends in its lease")
    }
}

/// A running crowd: see [`Crowd::start`].
pub struct Crowd {
    pub run: Arc<Run>,
    clients: JoinSet<()>,
    observer: Option<tokio::task::JoinHandle<()>>,
}

impl Crowd {
    /// Starts so many clients on so many names, and an observer for [`Crowd::finish`].
    pub fn start(cluster: &Addresses, clients: usize, names: usize, seed: u64) -> Crowd {
        let mut crowd = Crowd::unobserved(cluster, clients, names, MANNERS, seed);
        crowd.observer = Some(tokio::spawn(crowd.run.clone().observe()));
        crowd
    }

    /// Starts so many clients on so many names, each of one of these manners, for [`Crowd::stop`].
    pub fn unobserved(
        cluster: &Addresses,
        clients: usize,
        names: usize,
        manners: &'static [Manner],
        seed: u64,
    ) -> Crowd {
        let endpoints = (0..cluster.size()).map(|m| cluster.endpoint(m)).collect();
        let run = Arc::new(Run {
            endpoints,
            names,
            manners,
            seed,
            granted: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            next: AtomicU64::new(0),
            calls: Mutex::default(),
            changes: Mutex::default(),
            swept: AtomicUsize::new(0),
        });
        let mut tasks = JoinSet::new();
        for client in 0..clients {
            tasks.spawn(run.clone().live(client));
        }
        for observer in 0..OBSERVERS {
            tasks.spawn(run.clone().follow(observer));
        }
        tasks.spawn(run.clone().sweep());
        Crowd { run, clients: tasks, observer: None }
    }

    /// Waits until so many grants were made since the start.
    ///
    /// # Panics
    ///
    /// If for a minute there is none.
    pub async fn grants(&self, goal: usize) {
        loop {
            let before = self.run.granted.load(Ordering::Relaxed);
            if before >= goal {
                return;
            }
            eventually(Duration::from_secs(60), "another grant", || async {
                (self.run.granted.load(Ordering::Relaxed) > before).then_some(())
            })
            .await;
        }
    }

    /// Stops the clients, waits for the last of their keys to go, and gives the calls they made.
    pub async fn stop(&mut self) -> Vec<Call> {
        self.run.stop.store(true, Ordering::Relaxed);
        while let Some(done) = self.clients.join_next().await {
            done.expect("a client does not panic");
        }
        std::mem::take(&mut *self.run.calls.lock().expect("noting does not panic"))
    }

    /// As [`Crowd::stop`], and gives all that was recorded, for a crowd that was observed.
    ///
    /// # Panics
    ///
    /// If the members tell different histories.
    pub async fn finish(
        mut self,
        cluster: &Addresses,
        faults: Vec<(Instant, Instant)>,
        limits: Limits,
    ) -> History {
        let run = self.run.clone();
        let calls = self.stop().await;
        let client = cluster.client(0).await;
        let put = client.clone().put("h/end", "", None).await.expect("a put");
        let last = put.header().expect("a header").revision();
        eventually(Duration::from_secs(60), "the observer sees the end", || async {
            let changes = run.changes.lock().expect("noting does not panic");
            changes.last().is_some_and(|c| c.revision >= last).then_some(())
        })
        .await;
        self.observer.expect("it was observed").abort();
        let changes = std::mem::take(&mut *run.changes.lock().expect("noting does not panic"));
        for member in 0..cluster.size() {
            let theirs = witness(cluster.client(member).await, last).await;
            let same = |(a, b): (&Change, &Change)| {
                (a.revision, &a.key, a.create_revision, a.lease, &a.value)
                    == (b.revision, &b.key, b.create_revision, b.lease, &b.value)
            };
            assert!(
                changes.len() == theirs.len() && changes.iter().zip(&theirs).all(same),
                "member {member} tells another history than was seen as it happened"
            );
        }
        History { changes, calls, faults, limits }
    }
}

/// What a watch from revision 1 tells up to `last`.
async fn witness(mut client: Client, last: i64) -> Vec<Change> {
    let mut changes = Vec::new();
    let options = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut stream = client.watch("h/", Some(options)).await.expect("a watch");
    within(Duration::from_secs(60), "the watch from revision 1 catches up", async {
        while changes.last().is_none_or(|c: &Change| c.revision < last) {
            let answer = stream.message().await.expect("the watch goes on").expect("no end");
            note_events(&mut changes, &answer);
        }
    })
    .await;
    changes
}

/// The pair of a leader, as of the revision in the header.
fn leads(header: Option<&ResponseHeader>, kv: Option<&KeyValue>) -> Option<Answered> {
    let kv = kv?;
    Some(Answered::Leads {
        revision: header?.revision(),
        key: kv.key_str().ok()?.to_owned(),
        create_revision: kv.create_revision(),
        mod_revision: kv.mod_revision(),
        value: kv.value_str().ok()?.to_owned(),
    })
}

fn note_events(changes: &mut Vec<Change>, answer: &etcd_client::WatchResponse) {
    assert!(!answer.canceled(), "watch cancelled: {}", answer.cancel_reason());
    let seen = Instant::now();
    for event in answer.events() {
        let kv = event.kv().expect("an event has a pair");
        let delete = event.event_type() == EventType::Delete;
        changes.push(Change {
            revision: kv.mod_revision(),
            key: kv.key_str().expect("text").to_owned(),
            create_revision: if delete { 0 } else { kv.create_revision() },
            lease: kv.lease(),
            value: kv.value_str().expect("text").to_owned(),
            seen,
        });
    }
}

impl Run {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    async fn link(&self, random: &mut StdRng) -> Link {
        Link::to(&self.endpoints[random.random_range(0..self.endpoints.len())]).await
    }

    /// Follows who leads, one name at a member after the other.
    async fn follow(self: Arc<Self>, observer: u64) {
        let mut random = StdRng::seed_from_u64(self.seed.wrapping_sub(1 + observer));
        while !self.stopped() {
            let mut link = self.link(&mut random).await;
            let name = random.random_range(0..self.names).to_string();
            let stream = random.random();
            let until = Instant::now() + Duration::from_millis(random.random_range(200..4_000));
            let began = Instant::now();
            let opened = link.client.observe(format!("{QUEUES}{name}"));
            let Ok(Ok(mut leaders)) = tokio::time::timeout(PATIENCE, opened).await else {
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                continue;
            };
            while !self.stopped() && Instant::now() < until {
                let next = tokio::time::timeout_at(until.into(), leaders.message()).await;
                let Ok(Ok(Some(told))) = next else { break };
                let Some(leads) = leads(told.header(), told.kv()) else { break };
                self.push(Asked::Observe { name: name.clone(), stream }, leads, began);
            }
        }
    }

    /// The witness with its times, on whichever member is up.
    async fn observe(self: Arc<Self>) {
        let mut member = 0;
        loop {
            let from = 1 + self.changes.lock().expect("no panic").last().map_or(0, |c| c.revision);
            let mut client = connect(&self.endpoints[member]).await;
            let options = WatchOptions::new().with_prefix().with_start_revision(from);
            if let Ok(mut stream) = client.watch("h/", Some(options)).await {
                while let Ok(Some(answer)) = stream.message().await {
                    note_events(&mut self.changes.lock().expect("no panic"), &answer);
                }
            }
            member = (member + 1) % self.endpoints.len();
            tokio::time::sleep(PAUSE_AFTER_ERROR).await;
        }
    }

    /// Ends the leases of keys that nobody will ever remove, such as those of a killed member's
    /// callers, until the clients are done and no key is left.
    async fn sweep(self: Arc<Self>) {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut firsts: std::collections::HashMap<String, Instant> = Default::default();
        let mut stopped = None;
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let mut link = self.link(&mut random).await;
            let options =
                GetOptions::new().with_prefix().with_sort(SortTarget::Create, SortOrder::Ascend);
            let Ok(Ok(answer)) =
                tokio::time::timeout(PATIENCE, link.client.get(QUEUES, Some(options))).await
            else {
                continue;
            };
            if self.stopped() {
                let since = stopped.get_or_insert_with(Instant::now);
                // What is left then, the check complains of.
                if answer.kvs().is_empty() || since.elapsed() > 3 * JANITOR {
                    return;
                }
            }
            let mut names = std::collections::HashSet::new();
            let mut now = std::collections::HashMap::new();
            for kv in answer.kvs() {
                let key = kv.key_str().expect("text");
                if !names.insert(crate::holding::name_of(key).expect("a queue key").to_owned()) {
                    continue;
                }
                let id = format!("{key} {}", kv.create_revision());
                let since = firsts.get(&id).copied().unwrap_or_else(Instant::now);
                if since.elapsed() > JANITOR {
                    self.swept.fetch_add(1, Ordering::Relaxed);
                    self.revoke(&mut link, kv.lease()).await;
                }
                now.insert(id, since);
            }
            firsts = now;
        }
    }

    async fn note(&self, asked: Asked, call: impl Future<Output = Option<Answered>>) -> Answered {
        let began = Instant::now();
        let answered = tokio::time::timeout(PATIENCE, call).await;
        let answered = answered.ok().flatten().unwrap_or(Answered::Failed);
        self.push(asked, answered.clone(), began);
        answered
    }

    fn push(&self, asked: Asked, answered: Answered, began: Instant) {
        let ended = Instant::now();
        let call = Call { asked, answered, began, ended };
        self.calls.lock().expect("noting does not panic").push(call);
    }

    async fn revoke(&self, link: &mut Link, lease: i64) -> bool {
        let answered = self.note(Asked::Revoke { lease }, async {
            let answer = link.client.lease_revoke(lease).await.ok()?;
            Some(Answered::Done { revision: answer.header()?.revision() })
        });
        answered.await != Answered::Failed
    }

    /// Ends a lease whatever it takes; when it has ended already that will do.
    async fn retire(&self, random: &mut StdRng, lease: i64) {
        loop {
            let mut link = self.link(random).await;
            if self.revoke(&mut link, lease).await {
                return;
            }
            let left = tokio::time::timeout(PATIENCE, link.client.lease_time_to_live(lease, None));
            if left.await.is_ok_and(|left| left.is_ok_and(|left| left.ttl() <= 0)) {
                return;
            }
            tokio::time::sleep(PAUSE_AFTER_ERROR).await;
        }
    }

    /// The life of a client.
    async fn live(self: Arc<Self>, client: usize) {
        let mut random = StdRng::seed_from_u64(self.seed.wrapping_add(1 + client as u64));
        let manner = self.manners[client % self.manners.len()];
        let mut link = self.link(&mut random).await;
        let mut own = None;
        let mut reapers = JoinSet::new();
        while !self.stopped() {
            let lease = match (manner, own) {
                (Manner::LockWithoutLease, _) => 0,
                (_, Some(lease)) => lease,
                (_, None) => {
                    let granted = link.client.lease_grant(TTL, None);
                    let Ok(Ok(granted)) = tokio::time::timeout(PATIENCE, granted).await else {
                        tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                        link = self.link(&mut random).await;
                        continue;
                    };
                    *own.insert(granted.id())
                }
            };
            let name = random.random_range(0..self.names).to_string();
            let whim = match random.random_range(0..100) {
                0..4 => Whim::Cancel,
                4..6 => Whim::Disconnect,
                6..9 if lease != 0 => Whim::EndLease,
                _ => Whim::Wait,
            };
            let delay = Duration::from_millis(random.random_range(1..60));
            let (answered, began) =
                self.enter(&mut link, manner, &name, lease, (whim, delay), &mut random).await;
            let key = (lease != 0).then(|| format!("{QUEUES}{name}/{lease:x}"));
            // What a recipe's client leaves behind is its own affair.
            let noted = match (&answered, manner) {
                (Answered::GivenUp, Manner::Recipe) => Answered::Failed,
                _ => answered.clone(),
            };
            let served = manner != Manner::Recipe;
            self.push(Asked::Enter { name: name.clone(), key: key.clone(), served }, noted, began);
            let kept = match answered {
                Answered::Granted { key, token, .. } => {
                    self.granted.fetch_add(1, Ordering::Relaxed);
                    self.hold(&mut link, manner, &name, key, token, &mut random).await
                }
                Answered::GivenUp if manner != Manner::Recipe && lease != 0 => {
                    own = None;
                    let key = key.expect("it has a lease");
                    let (run, seed) = (self.clone(), random.random());
                    reapers.spawn(async move { run.reap(seed, key, lease).await });
                    true
                }
                _ => false,
            };
            if whim == Whim::EndLease {
                own = None;
            }
            if !kept {
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                if let Some(lease) = own.take() {
                    self.retire(&mut random, lease).await;
                }
                link = self.link(&mut random).await;
            }
        }
        while reapers.join_next().await.is_some() {}
        if let Some(lease) = own {
            self.retire(&mut random, lease).await;
        }
    }

    /// Asks, and does what it likes while it waits.
    async fn enter(
        self: &Arc<Self>,
        link: &mut Link,
        manner: Manner,
        name: &str,
        lease: i64,
        (whim, delay): (Whim, Duration),
        random: &mut StdRng,
    ) -> (Answered, Instant) {
        let value = format!("candidate {}", self.next.fetch_add(1, Ordering::Relaxed));
        let (queue, asking) = (format!("{QUEUES}{name}"), link.clone());
        let began = Instant::now();
        let mut call = tokio::spawn(async move {
            let call = ask(asking, manner, queue, lease, value);
            tokio::time::timeout(LONG_PATIENCE, call).await.ok().flatten()
        });
        if whim != Whim::Wait
            && let Ok(done) = tokio::time::timeout(delay, &mut call).await
        {
            return (done.expect("no panic").unwrap_or(Answered::Failed), began);
        }
        match whim {
            Whim::Wait => {}
            Whim::EndLease => {
                self.revoke(&mut link.clone(), lease).await;
            }
            Whim::Cancel | Whim::Disconnect => {
                call.abort();
                if whim == Whim::Disconnect {
                    *link = self.link(random).await;
                }
                let done = call.await;
                // Unless the answer was there just before.
                let done = done.ok().map(|done| done.unwrap_or(Answered::Failed));
                return (done.unwrap_or(Answered::GivenUp), began);
            }
        }
        (call.await.expect("no panic").unwrap_or(Answered::Failed), began)
    }

    /// After going away from a member that is up: the key must go by itself, unless it was granted in
    /// that moment. The lease follows when it is gone, or when it should have been for long.
    async fn reap(&self, seed: u64, key: String, lease: i64) {
        let mut random = StdRng::seed_from_u64(seed);
        let since = Instant::now();
        let queue = key[..=key.rfind('/').expect("a queue key")].to_owned();
        let mut link = self.link(&mut random).await;
        let options =
            GetOptions::new().with_prefix().with_sort(SortTarget::Create, SortOrder::Ascend);
        while since.elapsed() < JANITOR {
            let answer = link.client.get(queue.as_str(), Some(options.clone()));
            if let Ok(Ok(answer)) = tokio::time::timeout(PATIENCE, answer).await {
                let place = answer.kvs().iter().position(|kv| kv.key() == key.as_bytes());
                let first = place == Some(0) && since.elapsed() < PAUSE_AFTER_ERROR;
                if place.is_none() || first {
                    break;
                }
            } else {
                link = self.link(&mut random).await;
            }
            tokio::time::sleep(4 * PAUSE_AFTER_ERROR).await;
        }
        self.retire(&mut random, lease).await;
    }

    /// What a holder does, to the end of its hold; whether its lease can be used again.
    async fn hold(
        &self,
        link: &mut Link,
        manner: Manner,
        name: &str,
        key: String,
        token: Option<i64>,
        random: &mut StdRng,
    ) -> bool {
        let token = match token {
            Some(token) => token,
            None => {
                let answer = tokio::time::timeout(PATIENCE, link.client.get(key.as_str(), None));
                let Ok(Ok(answer)) = answer.await else { return false };
                let Some(kv) = answer.kvs().first() else { return false };
                kv.create_revision()
            }
        };
        let hold = Hold { name: name.to_owned(), key, token };
        if random.random_bool(0.6) {
            self.write(link, &hold).await;
        }
        if manner == Manner::Campaign && random.random_bool(0.4) {
            self.proclaim(link, &hold).await;
        }
        if random.random_bool(0.2) {
            self.ask_leader(link, name).await;
        }
        if manner == Manner::Lock && random.random_bool(0.05) {
            // Again with the same lease: the same key and token.
            let (began, queue) = (Instant::now(), format!("{QUEUES}{name}"));
            let again = ask(link.clone(), manner, queue, hold.lease(), String::new());
            let again = tokio::time::timeout(PATIENCE, again).await.ok().flatten();
            let key = Some(hold.key.clone());
            let asked = Asked::Enter { name: name.to_owned(), key, served: true };
            self.push(asked, again.unwrap_or(Answered::Failed), began);
        }
        let ends = random.random_bool(0.04);
        let left = if ends {
            self.revoke(link, hold.lease()).await
        } else {
            self.leave(link, manner, &hold).await
        };
        if random.random_bool(0.1) {
            // It has not noticed that it is over.
            self.write(link, &hold).await;
        }
        if !left && manner == Manner::LockWithoutLease {
            self.retire(random, hold.lease()).await;
        }
        left && !ends
    }

    async fn write(&self, link: &mut Link, hold: &Hold) {
        let text = format!("{} {}", hold.token, self.next.fetch_add(1, Ordering::Relaxed));
        let put = TxnOp::put(format!("{GUARDED}{}", hold.name), text.as_str(), None);
        let guard = Compare::create_revision(hold.key.as_str(), CompareOp::Equal, hold.token);
        let (name, key, token) = (hold.name.clone(), hold.key.clone(), hold.token);
        self.note(Asked::Guarded { name, key, token, value: text }, async {
            let answer = link.client.txn(Txn::new().when([guard]).and_then([put])).await.ok()?;
            let revision = answer.header()?.revision();
            let done = answer.succeeded();
            Some(if done { Answered::Done { revision } } else { Answered::Refused { revision } })
        })
        .await;
    }

    async fn proclaim(&self, link: &mut Link, hold: &Hold) {
        let value = format!("leader {}", self.next.fetch_add(1, Ordering::Relaxed));
        let options = ProclaimOptions::new().with_leader(hold.leader_key());
        let (key, token) = (hold.key.clone(), hold.token);
        self.note(Asked::Proclaim { key, token, value: value.clone() }, async {
            let answer = link.client.proclaim(value, Some(options)).await.ok()?;
            Some(Answered::Done { revision: answer.header()?.revision() })
        })
        .await;
    }

    async fn ask_leader(&self, link: &mut Link, name: &str) {
        self.note(Asked::Leader { name: name.to_owned() }, async {
            let answer = link.client.leader(format!("{QUEUES}{name}")).await.ok()?;
            leads(answer.header(), answer.kv())
        })
        .await;
    }

    async fn leave(&self, link: &mut Link, manner: Manner, hold: &Hold) -> bool {
        let answered = self.note(Asked::Leave { key: hold.key.clone() }, async {
            let revision = match manner {
                Manner::Lock | Manner::LockWithoutLease => {
                    let request = UnlockRequest { key: hold.key.clone().into_bytes() };
                    let path = "/v3lockpb.Lock/Unlock";
                    let answer = raw::unary::<_, UnlockResponse>(&link.channel, path, request);
                    answer.await.ok()?.into_inner().header?.revision
                }
                Manner::Campaign => {
                    let options = ResignOptions::new().with_leader(hold.leader_key());
                    link.client.resign(Some(options)).await.ok()?.header()?.revision()
                }
                Manner::Recipe => {
                    let answer = link.client.delete(hold.key.as_str(), None).await.ok()?;
                    answer.header()?.revision()
                }
            };
            Some(Answered::Done { revision })
        });
        answered.await != Answered::Failed
    }
}

/// Asks for a lock and waits for it; `None` for any error.
async fn ask(
    mut link: Link,
    manner: Manner,
    queue: String,
    lease: i64,
    value: String,
) -> Option<Answered> {
    match manner {
        Manner::Lock | Manner::LockWithoutLease => {
            let request = LockRequest { name: queue.into_bytes(), lease };
            let path = "/v3lockpb.Lock/Lock";
            let answer = raw::unary::<_, LockResponse>(&link.channel, path, request).await.ok()?;
            let fence = raw::metadata(&answer, "holdfast-fence");
            let answer = answer.into_inner();
            Some(Answered::Granted {
                key: String::from_utf8(answer.key).ok()?,
                token: fence.map(|fence| fence.parse().expect("a token is a number")),
                revision: Some(answer.header?.revision),
            })
        }
        Manner::Campaign => {
            let answer = link.client.campaign(queue, value, lease).await.ok()?;
            let leader = answer.leader()?;
            // The header is from when the candidate began to wait, so a read tells when it leads.
            let key = leader.key_str().ok()?;
            let read = link.client.get(key, None).await.ok();
            let read =
                read.filter(|r| r.kvs().iter().any(|kv| kv.create_revision() == leader.rev()));
            let revision = read.and_then(|read| Some(read.header()?.revision()));
            Some(Answered::Granted { key: key.to_owned(), token: Some(leader.rev()), revision })
        }
        Manner::Recipe => recipe(&mut link.client, &queue, lease).await.ok().flatten(),
    }
}

/// The mutex of Go's `concurrency` package; `None` when the session has ended.
async fn recipe(client: &mut Client, queue: &str, lease: i64) -> Result<Option<Answered>, Error> {
    let key = format!("{queue}/{lease:x}");
    let absent = Compare::create_revision(key.as_str(), CompareOp::Equal, 0);
    let leased = PutOptions::new().with_lease(lease);
    let txn = Txn::new()
        .when([absent])
        .and_then([TxnOp::put(key.as_str(), "", Some(leased))])
        .or_else([TxnOp::get(key.as_str(), None)]);
    let answer = client.txn(txn).await?;
    let mut revision = answer.header().map_or(0, |h| h.revision());
    let token = match answer.op_responses().first() {
        Some(TxnOpResponse::Get(found)) => match found.kvs().first() {
            Some(kv) => kv.create_revision(),
            None => return Ok(None),
        },
        _ => revision,
    };
    loop {
        let older = GetOptions::new()
            .with_prefix()
            .with_max_create_revision(token - 1)
            .with_sort(SortTarget::Create, SortOrder::Descend)
            .with_limit(1);
        let answer = client.get(format!("{queue}/"), Some(older)).await?;
        let from = 1 + answer.header().map_or(revision, |h| h.revision());
        let Some(next) = answer.kvs().first() else { break };
        let options = WatchOptions::new().with_start_revision(from);
        let mut stream = client.watch(next.key(), Some(options)).await?;
        'deleted: loop {
            let Some(answer) = stream.message().await? else { return Ok(None) };
            if answer.canceled() {
                return Ok(None);
            }
            if answer.events().iter().any(|e| e.event_type() == EventType::Delete) {
                break 'deleted;
            }
        }
    }
    let answer = client.get(key.as_str(), None).await?;
    revision = answer.header().map_or(0, |h| h.revision());
    let mine = answer.kvs().first().filter(|kv| kv.create_revision() == token);
    Ok(mine.map(|_| Answered::Granted { key, token: Some(token), revision: Some(revision) }))
}
