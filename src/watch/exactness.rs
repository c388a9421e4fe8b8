//! Each watch sees exactly its part of the history, under random schedules and real threads.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::testing::{Fixture, all, one, put_op, ready, show};
use super::{Delivery, WatchSpec, WatchStream};
use crate::machine::{Command, DeleteRange, Event, Outcome, Store, Txn, TxnOp};
use crate::types::KeyRange;

const KEYS: u32 = 12;

fn key(random: &mut StdRng) -> String {
    format!("k{:02}", random.random_range(0..KEYS))
}

fn range(random: &mut StdRng) -> KeyRange {
    let bound = |random: &mut StdRng| key(random).into_bytes().into();
    match random.random_range(0..4) {
        0 => all(),
        1 => KeyRange::From(bound(random)),
        2 => {
            let (a, b): (bytes::Bytes, bytes::Bytes) = (bound(random), bound(random));
            let end = a.clone().max(b.clone());
            KeyRange::Span { start: a.min(b), end: [&end[..], b"~"].concat().into() }
        }
        _ => one(&key(random)),
    }
}

/// Values are long now and then, so that queues overflow.
fn value(random: &mut StdRng) -> String {
    let long = random.random_bool(0.1);
    format!("{}{}", random.random::<u32>(), "x".repeat(if long { 100_000 } else { 0 }))
}

fn command(random: &mut StdRng) -> Command {
    match random.random_range(0..10) {
        0 => Command::DeleteRange(DeleteRange { range: range(random), prev_kv: false }),
        1 | 2 => Command::DeleteRange(DeleteRange { range: one(&key(random)), prev_kv: false }),
        3 | 4 => {
            let keys: BTreeSet<String> =
                (0..random.random_range(2..6)).map(|_| key(random)).collect();
            let success = keys.iter().map(|key| TxnOp::Put(put_op(key, &value(random)))).collect();
            Command::Txn(Txn { compares: vec![], success, failure: vec![] })
        }
        _ => Command::Put(put_op(&key(random), &value(random))),
    }
}

fn spec(random: &mut StdRng, current: i64) -> WatchSpec {
    WatchSpec {
        prev_kv: random.random_bool(0.5),
        no_put: random.random_bool(0.1),
        no_delete: random.random_bool(0.1),
        ..WatchSpec::new(range(random), random.random_range(0..current + 4))
    }
}

/// What one watch was told, and what it should have been.
struct Observer {
    spec: WatchSpec,
    start: i64,
    /// Not compared with the history yet.
    seen: VecDeque<Event>,
    last_revision: i64,
    /// How much of the history was compared.
    compared: usize,
}

impl Observer {
    fn new(spec: WatchSpec, created_at: i64) -> Observer {
        let start = if spec.start_revision == 0 { created_at + 1 } else { spec.start_revision };
        Observer { spec, start, seen: VecDeque::new(), last_revision: 0, compared: 0 }
    }

    fn wants(&self, event: &Event) -> bool {
        let left_out =
            if event.record.is_tombstone() { self.spec.no_delete } else { self.spec.no_put };
        !left_out && main(event) >= self.start && self.spec.range.contains(event.record.key())
    }

    fn take(&mut self, events: Vec<Event>) {
        assert!(main(&events[0]) > self.last_revision, "a revision came in parts, or again");
        self.last_revision = main(&events[events.len() - 1]);
        self.seen.extend(events);
    }

    /// Checks that everything up to `revision` was seen, in order, each event once, and nothing
    /// else. A pair before `compacted` may be missing as the previous one.
    fn check(&mut self, history: &[Event], revision: i64, compacted: i64) {
        while let Some(wanted) = history.get(self.compared).filter(|e| main(e) <= revision) {
            self.compared += 1;
            if !self.wants(wanted) {
                continue;
            }
            let Some(event) = self.seen.pop_front() else { panic!("missing {}", show(wanted)) };
            assert_eq!(event.record, wanted.record, "wrong record");
            if event.prev.is_some() || main(wanted) > compacted {
                let prev = wanted.prev.clone().filter(|_| self.spec.prev_kv);
                assert_eq!(event.prev, prev, "wrong previous pair");
            }
        }
        if let Some(early) = self.seen.front() {
            assert!(main(early) > revision, "not in the history: {}", show(early));
        }
    }
}

fn main(event: &Event) -> i64 {
    event.record.mod_revision().main
}

/// A stream and what its watches were told.
struct Client {
    stream: WatchStream,
    observers: BTreeMap<i64, Observer>,
}

impl Client {
    fn watch(&mut self, spec: WatchSpec) {
        let created = self.stream.create(spec.clone()).unwrap();
        self.observers.insert(created.id, Observer::new(spec, created.revision));
    }

    fn take(&mut self, delivery: Delivery, history: &[Event], store: &Store) {
        match delivery {
            Delivery::Events { id, events } => {
                self.observers.get_mut(&id).expect("no events after the end").take(events);
            }
            Delivery::Compacted { id, compacted } => {
                let observer = self.observers.remove(&id).expect("a watch ends once");
                assert!(compacted <= store.compacted());
                assert!(observer.last_revision < compacted && observer.start < compacted);
            }
            Delivery::Progress { revision, .. } => self.check(history, revision, store),
        }
    }

    fn check(&mut self, history: &[Event], revision: i64, store: &Store) {
        for observer in self.observers.values_mut() {
            observer.check(history, revision, store.compacted());
        }
    }
}

fn run_schedule(seed: u64) {
    let random = &mut StdRng::seed_from_u64(seed);
    let mut fixture = Fixture::new();
    let mut unpublished: VecDeque<Outcome> = VecDeque::new();
    let mut clients: Vec<Client> =
        (0..6).map(|_| Client { stream: fixture.stream(), observers: BTreeMap::new() }).collect();
    let publish = |fixture: &Fixture, unpublished: &mut VecDeque<Outcome>| {
        while let Some(outcome) = unpublished.pop_front() {
            fixture.hub.publish(outcome.revision, &outcome.events);
        }
    };
    for _ in 0..1500 {
        let client = random.random_range(0..clients.len());
        match random.random_range(0..1000) {
            0..500 => {
                let outcome = fixture.apply(command(random));
                unpublished.push_back(outcome);
                // The applier publishes each entry before the next; others see the moment between.
                if random.random_bool(0.9) {
                    publish(&fixture, &mut unpublished);
                }
            }
            500..800 => {
                // Clients differ in how much they read.
                for _ in 0..client {
                    let Some(delivery) = ready(&mut clients[client].stream) else { break };
                    clients[client].take(delivery, &fixture.history, &fixture.store);
                }
            }
            800..900 => clients[client].watch(spec(random, fixture.store.revision())),
            900..930 => {
                if let Some(id) = clients[client].observers.keys().next().copied() {
                    assert!(clients[client].stream.cancel(id));
                    clients[client].observers.remove(&id);
                }
            }
            930..980 => clients[client].stream.request_progress(),
            980..990 => fixture.scrub(),
            990..994 => {
                publish(&fixture, &mut unpublished);
                fixture.hub.reset();
            }
            994..997 => {
                publish(&fixture, &mut unpublished);
                let oldest = fixture.store.compacted().max(0);
                let revision = random.random_range(oldest..=fixture.store.revision());
                fixture.apply(Command::Compact { revision });
            }
            _ => clients[client] = Client { stream: fixture.stream(), observers: BTreeMap::new() },
        }
    }
    publish(&fixture, &mut unpublished);
    for client in &mut clients {
        while let Some(delivery) = ready(&mut client.stream) {
            client.take(delivery, &fixture.history, &fixture.store);
        }
        client.check(&fixture.history, fixture.store.revision(), &fixture.store);
        let live = client.observers.len();
        client.stream.request_progress();
        let told = ready(&mut client.stream);
        let revision = fixture.store.revision();
        assert_eq!(told, (live > 0).then_some(Delivery::Progress { id: None, revision }));
    }
}

#[test]
fn each_watch_sees_its_part_of_the_history_exactly_once() {
    let seeds = match std::env::var("WATCH_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("WATCH_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..30,
    };
    for seed in seeds {
        let run = std::panic::catch_unwind(|| run_schedule(seed));
        assert!(run.is_ok(), "replay with WATCH_SEED={seed}");
    }
}

/// Reads until everything up to the revision in `last` was seen, now and then slowly.
async fn follow(
    mut client: Client,
    store: Store,
    mut random: StdRng,
    last: Arc<AtomicI64>,
) -> Client {
    let mut asked = false;
    loop {
        if client.observers.len() < 5 && random.random_bool(0.05) {
            client.watch(spec(&mut random, store.revision()));
        }
        if random.random_bool(0.01) {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..30))).await;
        }
        let goal = last.load(Ordering::SeqCst);
        if goal > 0 && !asked {
            asked = true;
            client.stream.request_progress();
        }
        let delivery = tokio::time::timeout(Duration::from_millis(20), client.stream.next()).await;
        match delivery {
            Ok(Delivery::Events { id, events }) => {
                client.observers.get_mut(&id).expect("nothing is cancelled").take(events);
            }
            Ok(Delivery::Progress { revision, .. }) => {
                assert!(goal > 0 && revision >= goal);
                return client;
            }
            Ok(Delivery::Compacted { .. }) => panic!("nothing is compacted"),
            Err(_idle) => {}
        }
    }
}

#[test]
fn watches_that_join_while_a_thread_writes_miss_nothing() {
    let mut fixture = Fixture::new();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(3)
        .enable_time()
        .build()
        .unwrap();
    let last = Arc::new(AtomicI64::new(0));
    let followers: Vec<_> = (0..24)
        .map(|seed| {
            let random = &mut StdRng::seed_from_u64(seed);
            let mut client = Client { stream: fixture.stream(), observers: BTreeMap::new() };
            client.watch(spec(random, 0));
            runtime.spawn(follow(client, fixture.store.clone(), random.clone(), last.clone()))
        })
        .collect();
    let random = &mut StdRng::seed_from_u64(4711);
    for n in 0..6000 {
        fixture.run(command(random));
        if n % 100 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let revision = fixture.store.revision();
    last.store(revision, Ordering::SeqCst);
    for follower in followers {
        let mut client = runtime.block_on(follower).unwrap();
        client.check(&fixture.history, revision, &fixture.store);
    }
}
