//! A cluster with its clients, and one run of it.
//!
//! ```text
//! start -> all well -> faults, one after the other -> healed: all must serve -> what is left to tell
//! ```

use std::cell::RefCell;
use std::net::IpAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use holdfast::node::Sizes;
use holdfast::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use holdfast::pb::etcdserverpb::{HashKvRequest, StatusRequest};
use holdfast::vfs::{MemVfs, Survival, Vfs};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use turmoil::Sim;

use crate::client::{self, Client};
use crate::faults::{End, Trouble};
use crate::invariants::agreement::Testimony;
use crate::invariants::revisions::Chains;
use crate::invariants::{agreement, leases, locks, revisions};
use crate::member::{self, Shape, Start};
use crate::record::{Answered, Asked, Record};
use crate::{determinism, workloads};

/// What a message takes at most while all is well.
pub const LATENCY: Duration = Duration::from_millis(3);
const TICK: Duration = Duration::from_millis(2);
/// A batch of the log takes up to so long.
const SYNC: Duration = Duration::from_millis(40);
/// The cluster must serve from all members so soon after everything is well again.
const CONVERGENCE: Duration = Duration::from_secs(10);
/// A cluster that begins gets as long.
const BEGINNING: Duration = Duration::from_secs(10);
const TROUBLES: std::ops::Range<usize> = 3..7;

pub struct Cluster {
    pub record: Rc<Record>,
    shape: Shape,
    starts: Rc<RefCell<Vec<Start>>>,
}

impl Cluster {
    pub fn members(&self) -> usize {
        self.shape.members
    }

    pub fn disk(&self, member: usize) -> MemVfs {
        self.starts.borrow()[member].disk.clone()
    }

    /// The links that lie between `members` and the others.
    pub fn across(&self, members: &[usize]) -> Vec<(IpAddr, IpAddr)> {
        let others = (0..self.members()).filter(|other| !members.contains(other));
        let others: Vec<usize> = others.collect();
        let pairs = members.iter().flat_map(|a| others.iter().map(move |b| (*a, *b)));
        pairs.map(|(a, b)| (member::address(a), member::address(b))).collect()
    }

    /// Ends them, and prepares what they will find.
    pub fn crash(&self, sim: &mut Sim<'_>, members: &[usize], end: End) {
        for member in members {
            let start = &mut self.starts.borrow_mut()[*member];
            // First the disk: whatever the dying process does has no effect on it.
            start.disk = match end {
                End::PowerCut(survival) | End::TornWrite { survival, .. } => {
                    let survival = match survival {
                        Survival::Some(seed) => Survival::Some(seed ^ *member as u64),
                        other => other,
                    };
                    start.disk.after_power_cut(survival)
                }
                End::Kill => start.disk.after_kill(),
            };
            start.entropy = start.entropy.wrapping_add(1);
        }
        for member in members {
            sim.crash(member::address(*member));
        }
    }
}

/// What a run found.
pub struct Outcome {
    pub record: Rc<Record>,
    pub violations: Vec<String>,
}

struct Run {
    cluster: Cluster,
    dice: StdRng,
    clients: usize,
}

pub fn run(seed: u64) -> Outcome {
    let mut dice = StdRng::seed_from_u64(seed);
    let mut builder = turmoil::Builder::new();
    builder
        .rng_seed(dice.random())
        .tick_duration(TICK)
        .simulation_duration(Duration::from_secs(3_600))
        .min_message_latency(Duration::from_micros(200))
        .max_message_latency(LATENCY)
        .tcp_capacity(65_536)
        .enable_random_order();
    let mut sim = builder.build();
    let record = Rc::new(Record::default());
    // Then members that were away are sent snapshots.
    let often = dice.random_ratio(2, 3);
    let shape = Shape {
        members: if dice.random_ratio(1, 6) { 5 } else { 3 },
        snapshot_count: if often { dice.random_range(5..40) } else { dice.random_range(40..400) },
        sizes: Sizes {
            entries_kept: if often { dice.random_range(0..10) } else { dice.random_range(0..100) },
            purge_batch: dice.random_range(1..8),
            log_segment_bytes: dice.random_range(4..64) << 10,
            log_segments_kept: if often { 2 } else { 1_000 },
            simulated_flush_bytes: dice.random_range(1..64) << 10,
        },
    };
    record.note_at(Duration::ZERO, &format!("seed {seed}: {shape:?}"));
    let starts = (0..shape.members).map(|number| {
        let disk = MemVfs::default();
        disk.simulate_time(dice.random(), SYNC.mul_f64(dice.random()));
        let drift_ppm = dice.random_range(-200..200);
        let wall_ms = 1_000_000 + dice.random_range(0..10_000_000);
        Start { number, entropy: dice.random(), drift_ppm, wall_ms, disk }
    });
    let starts = Rc::new(RefCell::new(starts.collect::<Vec<_>>()));
    for number in 0..shape.members {
        let (shape, starts, record) = (shape.clone(), starts.clone(), record.clone());
        sim.host(member::address(number), move || {
            let (shape, start) = (shape.clone(), starts.borrow()[number].clone());
            let (record, disk) = (record.clone(), start.disk.clone());
            async move {
                record.note(&format!("m{number} starts"));
                let reason = member::run(shape, start).await;
                record.note(&format!("m{number} ended: {reason}"));
                let disk_is_gone = disk.list(Path::new("/data")).is_err();
                if !disk_is_gone {
                    record.violation(format!("m{number} gave up: {reason}"));
                }
                Ok(())
            }
        });
    }
    let cluster = Cluster { record, shape, starts };
    let mut run = Run { cluster, dice, clients: 0 };
    let violations = match run.through(&mut sim) {
        Ok(()) => run.cluster.record.violations.borrow().clone(),
        Err(error) => {
            let mut all = run.cluster.record.violations.borrow().clone();
            all.push(error);
            all
        }
    };
    Outcome { record: run.cluster.record.clone(), violations }
}

impl Run {
    fn through(&mut self, sim: &mut Sim<'_>) -> Result<(), String> {
        self.client(sim, "observer", observe);
        self.client(sim, "witness", workloads::witness);
        self.all_serve(sim, "beginning", BEGINNING)?;
        for n in 0..3 {
            self.client(sim, &format!("kv{n}"), workloads::kv);
        }
        self.client(sim, "reader", workloads::read_around);
        let kinds = self.dice.random_range(1..8);
        if kinds & 1 != 0 {
            for n in 0..3 {
                self.client(sim, &format!("lock{n}"), workloads::locks);
            }
        }
        if kinds & 2 != 0 {
            self.client(sim, "lease", workloads::leases);
            for n in 0..2 {
                self.client(sim, &format!("brink{n}"), workloads::brink);
            }
        }
        if kinds & 4 != 0 {
            self.client(sim, "compactor", workloads::compact);
        }
        for _ in 0..self.dice.random_range(TROUBLES) {
            let calm = self.dice.random_range(Duration::from_millis(50)..Duration::from_secs(3));
            self.pass(sim, calm)?;
            let trouble = Trouble::draw(&mut self.dice, &self.cluster);
            let (elapsed, record) = (sim.elapsed(), &self.cluster.record);
            record.note_at(elapsed, &format!("{:?} for {:?}", trouble.fault, trouble.lasts));
            trouble.begin(sim, &self.cluster);
            self.pass(sim, trouble.lasts)?;
            trouble.end(sim, &self.cluster);
            self.cluster.record.note_at(sim.elapsed(), "healed");
        }
        self.all_serve(sim, "healed", CONVERGENCE)?;
        self.pass(sim, Duration::from_millis(500))?;
        self.cluster.record.enough.set(true);
        self.testify(sim)
    }

    /// A client on a host of its own.
    fn client<F: Future<Output = ()> + 'static>(
        &mut self,
        sim: &mut Sim<'_>,
        name: &str,
        work: impl FnOnce(Client) -> F + 'static,
    ) {
        self.clients += 1;
        let record = self.cluster.record.clone();
        let client =
            Client::new(name.to_owned(), self.dice.random(), self.cluster.members(), record);
        sim.client(name.to_owned(), async move {
            work(client).await;
            Ok(())
        });
    }

    fn step(&self, sim: &mut Sim<'_>) -> Result<(), String> {
        determinism::set_time(sim.elapsed());
        sim.step().map_err(|error| error.to_string())?;
        match self.cluster.record.violations.borrow().first() {
            Some(violation) => Err(format!("stopped at {violation}")),
            None => Ok(()),
        }
    }

    fn pass(&self, sim: &mut Sim<'_>, time: Duration) -> Result<(), String> {
        let until = sim.elapsed() + time;
        while sim.elapsed() < until {
            self.step(sim)?;
        }
        Ok(())
    }

    fn wait(
        &self,
        sim: &mut Sim<'_>,
        what: &str,
        limit: Duration,
        done: impl Fn() -> bool,
    ) -> Result<(), String> {
        let until = sim.elapsed() + limit;
        while !done() {
            if sim.elapsed() > until {
                return Err(format!("{what}: not within {limit:?}"));
            }
            self.step(sim)?;
        }
        Ok(())
    }

    /// Waits until each member has taken a write.
    fn all_serve(&mut self, sim: &mut Sim<'_>, when: &str, limit: Duration) -> Result<(), String> {
        let members = self.cluster.members();
        let served = Rc::new(RefCell::new(vec![0; members]));
        for member in 0..members {
            let served = served.clone();
            self.client(sim, &format!("{when}-m{member}"), move |mut client| async move {
                loop {
                    client.turn_to(member);
                    let value = client.unique();
                    let key = format!("probe/{member}");
                    let request = workloads::put_request(&key, &value, 0);
                    let channel = client.channel();
                    let mut kv = holdfast::pb::etcdserverpb::kv_client::KvClient::new(channel);
                    let put =
                        async { Ok((kv.put(request).await?.into_inner().header, Answered::Done)) };
                    let within = Duration::from_millis(1_500);
                    let asked = Asked::Put { key, value };
                    if let (Answered::Done, revision) = client.call_within(within, asked, put).await
                    {
                        served.borrow_mut()[member] = revision;
                        return;
                    }
                    client.pause(Duration::from_millis(100)).await;
                }
            });
        }
        self.wait(sim, when, limit, || served.borrow().iter().all(|revision| *revision > 0))
    }

    /// Asks everybody what has happened, and checks it.
    fn testify(&mut self, sim: &mut Sim<'_>) -> Result<(), String> {
        // Leases and calls of before come to their ends.
        self.pass(sim, Duration::from_secs(1))?;
        let last = Rc::new(RefCell::new(0));
        let found = last.clone();
        self.client(sim, "last", move |mut client| async move {
            while *found.borrow() == 0 {
                let value = client.unique();
                let request = workloads::put_request("last", &value, 0);
                let channel = client.channel();
                let mut kv = holdfast::pb::etcdserverpb::kv_client::KvClient::new(channel);
                let put =
                    async { Ok((kv.put(request).await?.into_inner().header, Answered::Done)) };
                let asked = Asked::Put { key: "last".to_owned(), value };
                *found.borrow_mut() = client.call(asked, put).await.1;
            }
        });
        self.wait(sim, "a last write", CONVERGENCE, || *last.borrow() > 0)?;
        let last = *last.borrow();
        let record = self.cluster.record.clone();
        record.last_revision.set(Some(last));
        let testimonies = Rc::new(RefCell::new(Vec::new()));
        for member in 0..self.cluster.members() {
            let testimonies = testimonies.clone();
            self.client(sim, &format!("judge{member}"), move |client| async move {
                match testify(member, last).await {
                    Ok(testimony) => testimonies.borrow_mut().push(testimony),
                    Err(why) => client.record.violation(format!("m{member} does not tell: {why}")),
                }
            });
        }
        self.wait(sim, "what all members tell", CONVERGENCE, || {
            record.witnessed.borrow().revision() >= last
                && testimonies.borrow().len() == self.cluster.members()
        })?;
        self.judge(&testimonies.borrow(), last)
    }

    fn judge(&self, testimonies: &[Testimony], last: i64) -> Result<(), String> {
        let record = &self.cluster.record;
        let (calls, witnessed) = (record.calls.borrow(), record.witnessed.borrow());
        // What came later, nobody has watched.
        let until = witnessed.revision();
        let calls: Vec<_> = calls.iter().filter(|call| call.revision <= until).cloned().collect();
        let chains = Chains::new(&witnessed.changes)?;
        agreement::check(testimonies, &witnessed.changes, last)?;
        revisions::check(&calls, &witnessed.changes, &chains)?;
        locks::check(&calls, &chains)?;
        leases::check(&calls, &witnessed)?;
        let done = calls.iter().filter(|call| matches!(call.answered, Answered::Done)).count();
        if done < 10 {
            return Err(format!("only {done} writes: this was no test"));
        }
        Ok(())
    }
}

/// Looks who leads.
async fn observe(mut client: Client) {
    let mut ids = Vec::new();
    while !client.is_over() {
        client.turn_to_any();
        let member = client.member();
        let mut maintenance = MaintenanceClient::new(client.channel());
        let status = maintenance.status(StatusRequest {});
        let status = tokio::time::timeout(Duration::from_millis(300), status).await;
        if let Ok(Ok(status)) = status {
            let status = status.into_inner();
            let id = status.header.map_or(0, |header| header.member_id);
            if !ids.contains(&(id, member)) {
                ids.push((id, member));
            }
            let leader = ids.iter().find(|(id, _)| *id == status.leader);
            if let Some((_, leader)) = leader {
                client.record.leader.set(Some(*leader));
            }
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
}

async fn testify(member: usize, last: i64) -> Result<Testimony, String> {
    let channel = client::connect(member);
    // Once it tells of the last revision, it has it.
    let hash = async {
        let mut maintenance = MaintenanceClient::new(channel.clone());
        let hash = maintenance.hash_kv(HashKvRequest { revision: last }).await;
        let hash = hash.map_err(|status| status.message().to_owned())?.into_inner();
        Ok::<_, String>((hash.hash, hash.compact_revision))
    };
    let mut kv = holdfast::pb::etcdserverpb::kv_client::KvClient::new(channel.clone());
    let range = holdfast::pb::etcdserverpb::RangeRequest {
        key: "last".into(),
        ..holdfast::pb::etcdserverpb::RangeRequest::default()
    };
    // Linearizable: it has applied everything then.
    kv.range(range).await.map_err(|status| status.message().to_owned())?;
    let hash = hash.await?;
    let from = hash.1.max(0) + 1;
    let history = workloads::history_of(channel, from, last).await?;
    Ok(Testimony { member, from, history, hash })
}
