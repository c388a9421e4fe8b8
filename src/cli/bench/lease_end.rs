//! The case lease-end: leases that end together, each with a key, and how late their ends show.
//!
//! The leases are renewed all at once, and then left alone. A lease may not end before its time to
//! live, counted from the *sending* of that renewal; from the same moment its delay is counted, so
//! the delay includes the time the renewal took to reach the cluster, and is never shown too short.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use tonic::{Status, Streaming};

use super::channels::Channels;
use super::cpu::CpuMeter;
use super::keep_alive::{KeepAlive, open_all};
use super::keys::value;
use super::leases::{grant_many, revoke_many};
use super::load::{Client, Measured};
use super::tally::{Tally, Window};
use super::watch::{WatchedRange, open};
use super::{BenchError, Options};
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::{PutRequest, WatchResponse};
use crate::pb::mvccpb::event::EventType;

/// Long enough to put the keys and to open the streams, before the renewal that counts.
const TTL_SECONDS: i64 = 8;
const TTL: Duration = Duration::from_secs(TTL_SECONDS as u64);

/// Of the leases that stay alive.
const OTHERS_TTL_SECONDS: i64 = 600;

/// Puts and renewals under way.
const CALLS_UNDER_WAY: usize = 64;

/// How long after its time a lease may end before it is given up.
const PATIENCE: Duration = Duration::from_secs(20);

pub async fn run(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let others = grant_many(channels, options.others as usize, OTHERS_TTL_SECONDS).await?;
    let ids = grant_many(channels, options.clients as usize, TTL_SECONDS).await?;
    let streams = open_all(channels, &ids).await?;
    let prepared = |what| move |source| BenchError::Prepare { what, source };
    let key = |number: usize| Bytes::from(format!("{}/ending/{number:06}", options.prefix));
    let range = WatchedRange::prefix(format!("{}/ending/", options.prefix));
    let mut deletes = open(channels.of(0), range).await.map_err(prepared("opening the watch"))?;
    let value = value(options);
    let puts = ids.iter().enumerate().map(|(number, &lease)| {
        let (mut kv, key, value) = (KvClient::new(channels.of(number)), key(number), value.clone());
        async move { kv.put(PutRequest { key, value, lease, ..PutRequest::default() }).await }
    });
    stream::iter(puts)
        .buffer_unordered(CALLS_UNDER_WAY)
        .try_for_each(|_| async { Ok(()) })
        .await
        .map_err(prepared("putting a key"))?;

    let renewed: Vec<Instant> = stream::iter(streams)
        .map(renew)
        .buffered(CALLS_UNDER_WAY)
        .try_collect()
        .await
        .map_err(prepared("renewing a lease"))?;
    let ends: HashMap<Bytes, Instant> =
        renewed.iter().enumerate().map(|(number, sent)| (key(number), *sent + TTL)).collect();

    let first = *renewed.iter().min().expect("there is at least one client") + TTL;
    let last = *renewed.iter().max().expect("there is at least one client") + TTL;
    let before = meter.read()?;
    let mut tally = Tally::new();
    let seen = tokio::time::timeout_at(
        (last + PATIENCE).into(),
        see_ends(&mut deletes, &ends, &mut tally),
    )
    .await
    .unwrap_or_else(|_| Err(Status::deadline_exceeded("a lease has not ended")));
    if let Err(status) = seen {
        tally.errors.add(&status);
    }
    let cpu = meter.read()?.since(before);
    let open = tally.last.map_or(Duration::ZERO, |last| last.saturating_duration_since(first));
    let mut measured = Measured { tally, open, cpu, notes: Default::default() };
    measured.notes.insert("ends_within_ms", (last - first).as_secs_f64() * 1_000.0);
    measured.tally.errors.merge(&revoke_many(channels, &others).await);
    Ok(measured)
}

/// Renews a lease for the last time; returns when that was sent.
async fn renew(mut stream: KeepAlive) -> Result<Instant, Status> {
    let sent = Instant::now();
    stream.operate().await?;
    Ok(sent)
}

/// Takes in delete events until each key of `ends` has had one.
async fn see_ends(
    deletes: &mut Streaming<WatchResponse>,
    ends: &HashMap<Bytes, Instant>,
    tally: &mut Tally,
) -> Result<(), Status> {
    let window = Window::new(Duration::ZERO, Duration::ZERO, Some(0));
    let mut waiting = ends.clone();
    while !waiting.is_empty() {
        let answer = deletes.message().await?;
        let answer = answer.ok_or_else(|| Status::unavailable("the server ended the watch"))?;
        if answer.canceled {
            return Err(Status::cancelled(answer.cancel_reason));
        }
        let now = Instant::now();
        for event in answer.events {
            if event.r#type() != EventType::Delete {
                continue;
            }
            let key = event.kv.map(|kv| kv.key).unwrap_or_default();
            match waiting.remove(&key) {
                None => tally.errors.add(&Status::data_loss("a delete of no waiting key")),
                Some(end) if now < end => tally.errors.add(&Status::aborted("a lease ended early")),
                Some(end) => tally.record(&window, end, now, Ok(())),
            }
        }
    }
    Ok(())
}
