//! The case watch-prefix: writers as fast as they get answers, and a watcher on each connection that
//! must see all of it.
//!
//! Each value tells when its write was sent, by which client, and which of that client's writes it
//! is. A client has one write under way, so a watcher sees its writes in order: one that comes again
//! or behind a later one is an error at once, one that never came is missing at the end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, BytesMut};
use rand::rngs::SmallRng;
use tokio::task::JoinSet;
use tonic::{Status, Streaming};

use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::keys::{KeySpace, random_of};
use super::load::{Client, Measured, closed_loop};
use super::tally::{Tally, Window};
use super::watch::{WatchedRange, await_events, open};
use super::{BenchError, Options};
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::{PutRequest, WatchResponse};
use crate::pb::mvccpb;

/// The time of sending, the client, and the number of its write.
const MARK_BYTES: usize = 8 + 4 + 8;

/// For each client, when each of its writes was answered, in nanoseconds since the start: zero where
/// none was.
type Answered = Vec<Mutex<Vec<u64>>>;

struct Writer {
    kv: KvClient<Connection>,
    keys: KeySpace,
    random: SmallRng,
    value_bytes: usize,
    origin: Instant,
    client: usize,
    written: u64,
    answered: Arc<Answered>,
    acknowledged: Arc<AtomicU64>,
}

impl Client for Writer {
    async fn operate(&mut self) -> Result<(), Status> {
        self.written += 1;
        let mut value = BytesMut::with_capacity(self.value_bytes.max(MARK_BYTES));
        value.put_u64(nanoseconds(self.origin));
        value.put_u32(u32::try_from(self.client).unwrap_or(u32::MAX));
        value.put_u64(self.written);
        value.resize(self.value_bytes.max(MARK_BYTES), 0);
        let (key, value) = (self.keys.random(&mut self.random), value.freeze());
        self.kv.put(PutRequest { key, value, ..PutRequest::default() }).await?;
        let mut answered = lock(&self.answered[self.client]);
        answered.resize(usize::try_from(self.written).unwrap_or(usize::MAX), 0);
        if let Some(last) = answered.last_mut() {
            *last = nanoseconds(self.origin);
        }
        drop(answered);
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

struct Watcher {
    answers: Streaming<WatchResponse>,
    origin: Instant,
    window: Arc<Window>,
    answered: Arc<Answered>,
    /// The newest write seen of each client.
    newest: Vec<u64>,
    seen: Arc<AtomicU64>,
    results: Arc<Mutex<Results>>,
}

struct Results {
    tally: Tally,
    /// How long after the answer to its write an event came; zero where it came before.
    lag: Tally,
}

impl Watcher {
    async fn run(mut self) {
        loop {
            let answer = match self.answers.message().await {
                Ok(Some(answer)) if !answer.canceled => answer,
                Ok(Some(answer)) => return self.failed(&Status::cancelled(answer.cancel_reason)),
                Ok(None) => return self.failed(&Status::unavailable("the server ended the watch")),
                Err(status) => return self.failed(&status),
            };
            let now = Instant::now();
            for event in answer.events {
                if let Err(status) = self.take(event, now) {
                    self.failed(&status);
                }
            }
        }
    }

    fn take(&mut self, event: mvccpb::Event, now: Instant) -> Result<(), Status> {
        let mut mark = event.kv.map(|kv| kv.value).unwrap_or_default();
        if mark.len() < MARK_BYTES {
            return Err(Status::data_loss("an event that was not written"));
        }
        let began = self.origin + Duration::from_nanos(mark.get_u64());
        let (client, number) = (mark.get_u32() as usize, mark.get_u64());
        let newest = self
            .newest
            .get_mut(client)
            .ok_or_else(|| Status::data_loss("an event of no client of this run"))?;
        if number <= *newest {
            return Err(Status::data_loss("an event twice or out of its order"));
        }
        *newest = number;
        self.seen.fetch_add(1, Ordering::Relaxed);
        let index = usize::try_from(number - 1).unwrap_or(usize::MAX);
        let answer = match lock(&self.answered[client]).get(index) {
            None | Some(0) => now,
            Some(&at) => self.origin + Duration::from_nanos(at),
        };
        let mut results = lock(&self.results);
        results.tally.record(&self.window, began, now, Ok(()));
        results.lag.record(&self.window, answer.min(now), now, Ok(()));
        Ok(())
    }

    fn failed(&self, status: &Status) {
        lock(&self.results).tally.errors.add(status);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nanoseconds(origin: Instant) -> u64 {
    u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

pub async fn run(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let clients = options.clients as usize;
    let keys = KeySpace::named(options, "prefix");
    let range = WatchedRange { key: keys.key(0), range_end: keys.end(), start_revision: 0 };
    let plan = options.plan();
    let (window, origin) = (Arc::new(plan.window()), Instant::now());
    let answered: Arc<Answered> = Arc::new((0..clients).map(|_| Mutex::default()).collect());
    let results = Arc::new(Mutex::new(Results { tally: Tally::new(), lag: Tally::new() }));
    let mut seen = Vec::new();
    let mut running = JoinSet::new();
    for number in 0..channels.len() {
        let answers = open(channels.of(number), range.clone())
            .await
            .map_err(|source| BenchError::Prepare { what: "opening a watch", source })?;
        let count = Arc::new(AtomicU64::new(0));
        seen.push(count.clone());
        let watcher = Watcher {
            answers,
            origin,
            window: window.clone(),
            answered: answered.clone(),
            newest: vec![0; clients],
            seen: count,
            results: results.clone(),
        };
        running.spawn(watcher.run());
    }

    let acknowledged = Arc::new(AtomicU64::new(0));
    let writers = (0..clients)
        .map(|client| Writer {
            kv: KvClient::new(channels.of(client)),
            keys: keys.clone(),
            random: random_of(client),
            value_bytes: options.value_size,
            origin,
            client,
            written: 0,
            answered: answered.clone(),
            acknowledged: acknowledged.clone(),
        })
        .collect();
    let mut measured = closed_loop(writers, &plan, window, meter).await?;
    let missing = await_events(&seen, acknowledged.load(Ordering::Relaxed)).await;
    drop(running);

    let writes = std::mem::replace(&mut measured.tally, Tally::new());
    let results = lock(&results);
    measured.tally.merge(&results.tally);
    measured.tally.errors.merge(&writes.errors);
    if missing > 0 {
        measured.tally.errors.add_kind("events not delivered".to_owned(), missing);
    }
    let seconds = measured.open.as_secs_f64().max(f64::EPSILON);
    let lag_ms = |quantile| results.lag.latencies.value_at_quantile(quantile) as f64 / 1_000.0;
    measured.notes.insert("writes_per_second", writes.operations as f64 / seconds);
    measured.notes.insert("lag_after_answer_p50_ms", lag_ms(0.5));
    measured.notes.insert("lag_after_answer_p99_ms", lag_ms(0.99));
    Ok(measured)
}
