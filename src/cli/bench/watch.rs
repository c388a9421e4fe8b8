//! The case watch: many watchers on one key, one writer as fast as it gets answers.
//!
//! Each value begins with the time at which its write was sent, so the delay of every single
//! delivery is known. At the end each watcher must have seen as many events as writes were
//! acknowledged: a missing event is an error.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use futures::stream::{self, StreamExt};
use tokio::task::JoinSet;
use tonic::{Status, Streaming};

use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::load::{Client, Measured, closed_loop};
use super::tally::{Tally, Window};
use super::{BenchError, Options};
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::watch_client::WatchClient;
use crate::pb::etcdserverpb::watch_request::RequestUnion;
use crate::pb::etcdserverpb::{PutRequest, WatchCreateRequest, WatchRequest, WatchResponse};

const STAMP_BYTES: usize = size_of::<u64>();

/// How long the watchers may take for what was written before the window closed.
const CATCH_UP: Duration = Duration::from_secs(5);
const CATCH_UP_POLL: Duration = Duration::from_millis(10);

struct Writer {
    kv: KvClient<Connection>,
    key: Bytes,
    value_bytes: usize,
    origin: Instant,
    acknowledged: Arc<AtomicU64>,
}

impl Client for Writer {
    async fn operate(&mut self) -> Result<(), Status> {
        let mut value = BytesMut::zeroed(self.value_bytes.max(STAMP_BYTES));
        let stamp = u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        value[..STAMP_BYTES].copy_from_slice(&stamp.to_be_bytes());
        let (key, value) = (self.key.clone(), value.freeze());
        self.kv.put(PutRequest { key, value, ..PutRequest::default() }).await?;
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

struct Watcher {
    answers: Streaming<WatchResponse>,
    origin: Instant,
    window: Arc<Window>,
    tally: Arc<Mutex<Tally>>,
    seen: Arc<AtomicU64>,
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
            let ended = Instant::now();
            let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
            for event in &answer.events {
                let value = event.kv.as_ref().map(|kv| &kv.value[..]);
                match value.and_then(<[u8]>::first_chunk::<STAMP_BYTES>) {
                    Some(stamp) => {
                        let began = self.origin + Duration::from_nanos(u64::from_be_bytes(*stamp));
                        tally.record(&self.window, began, ended, Ok(()));
                    }
                    None => tally.errors.add(&Status::data_loss("an event that was not written")),
                }
            }
            drop(tally);
            self.seen.fetch_add(answer.events.len() as u64, Ordering::Relaxed);
        }
    }

    fn failed(&self, status: &Status) {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).errors.add(status);
    }
}

/// What a watch is on.
#[derive(Clone)]
pub struct WatchedRange {
    pub key: Bytes,
    /// Empty for the one key.
    pub range_end: Bytes,
    /// Zero for what is yet to come.
    pub start_revision: i64,
}

impl WatchedRange {
    fn one(key: Bytes) -> WatchedRange {
        WatchedRange { key, range_end: Bytes::new(), start_revision: 0 }
    }

    /// All keys that begin with `prefix`, which ends in no 0xff byte.
    pub fn prefix(prefix: String) -> WatchedRange {
        let mut end = prefix.clone().into_bytes();
        *end.last_mut().expect("a prefix has a byte") += 1;
        WatchedRange { key: prefix.into(), range_end: end.into(), start_revision: 0 }
    }
}

/// Opens a watch that is in force when this returns.
pub async fn open(
    channel: Connection,
    range: WatchedRange,
) -> Result<Streaming<WatchResponse>, Status> {
    let WatchedRange { key, range_end, start_revision } = range;
    let create =
        WatchCreateRequest { key, range_end, start_revision, ..WatchCreateRequest::default() };
    let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    // The stream of requests must not end: that would end the watch.
    let requests = stream::iter([request]).chain(stream::pending());
    let mut answers = WatchClient::new(channel).watch(requests).await?.into_inner();
    match answers.message().await? {
        Some(answer) if answer.created && !answer.canceled => Ok(answers),
        _ => Err(Status::unavailable("the watch was not created")),
    }
}

/// Measures deliveries: `options.clients` watchers, and one writer of its own connection's turn.
pub async fn run(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let watchers = options.clients as usize;
    let key = Bytes::from(format!("{}/watched", options.prefix));
    let streams = try_join_all(
        (0..watchers).map(|number| open(channels.of(number), WatchedRange::one(key.clone()))),
    )
    .await
    .map_err(|source| BenchError::Prepare { what: "opening a watch", source })?;

    let plan = options.plan();
    let (window, origin) = (Arc::new(plan.window()), Instant::now());
    let tallies: Vec<_> = (0..plan.shards).map(|_| Arc::new(Mutex::new(Tally::new()))).collect();
    let seen: Vec<_> = (0..watchers).map(|_| Arc::new(AtomicU64::new(0))).collect();
    let mut running = JoinSet::new();
    for (number, answers) in streams.into_iter().enumerate() {
        let (window, seen) = (Arc::clone(&window), Arc::clone(&seen[number]));
        let tally = Arc::clone(&tallies[number % tallies.len()]);
        running.spawn(Watcher { answers, origin, window, tally, seen }.run());
    }

    let acknowledged = Arc::new(AtomicU64::new(0));
    let writer = Writer {
        kv: KvClient::new(channels.of(watchers)),
        key,
        value_bytes: options.value_size,
        origin,
        acknowledged: Arc::clone(&acknowledged),
    };
    let mut measured = closed_loop(vec![writer], &plan, window, meter).await?;
    let written = acknowledged.load(Ordering::Relaxed);
    let missing = await_events(&seen, written).await;
    drop(running);

    let writes = std::mem::replace(&mut measured.tally, Tally::new());
    for shard in &tallies {
        measured.tally.merge(&shard.lock().unwrap_or_else(PoisonError::into_inner));
    }
    measured.tally.errors.merge(&writes.errors);
    if missing > 0 {
        measured.tally.errors.add_kind("events not delivered".to_owned(), missing);
    }
    let seconds = measured.open.as_secs_f64().max(f64::EPSILON);
    measured.notes.insert("writes_per_second", writes.operations as f64 / seconds);
    Ok(measured)
}

/// Waits until every watcher has seen `written` events; how many are missing after [`CATCH_UP`].
pub async fn await_events(seen: &[Arc<AtomicU64>], written: u64) -> u64 {
    let deadline = Instant::now() + CATCH_UP;
    loop {
        // A write without an answer may have been made all the same, so there may be more.
        let missing =
            seen.iter().map(|seen| written.saturating_sub(seen.load(Ordering::Relaxed))).sum();
        if missing == 0 || Instant::now() >= deadline {
            return missing;
        }
        tokio::time::sleep(CATCH_UP_POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_beyond_the_acknowledged_writes_hide_no_missing_ones() {
        let seen = [Arc::new(AtomicU64::new(12)), Arc::new(AtomicU64::new(10))];
        assert_eq!(await_events(&seen, 10).await, 0);
    }
}
