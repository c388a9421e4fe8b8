//! The case catch-up: one watcher that starts in the past.
//!
//! The history is as many revisions as the key space has keys, each of one put. A run that finds it
//! there does not write it again.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use tonic::Status;

use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::keys::{KeySpace, value};
use super::load::Measured;
use super::tally::{Tally, Window};
use super::watch::{WatchedRange, open};
use super::{BenchError, Options};
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::pb::etcdserverpb::{PutRequest, RangeRequest};

/// Puts under way while the history is written.
const PUTS_UNDER_WAY: usize = 64;

/// After this long without an event the rest is given up.
const PATIENCE: Duration = Duration::from_secs(10);

pub async fn run(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let keys = KeySpace::named(options, "history");
    let failed = |source| BenchError::Prepare { what: "writing the history", source };
    if keys.existing(channels).await.map_err(failed)? != keys.count {
        write(&keys, channels, &value(options)).await.map_err(failed)?;
    }
    let start_revision = first_revision(channels.of(0), &keys).await.map_err(failed)?;

    let range = WatchedRange { key: keys.key(0), range_end: keys.end(), start_revision };
    let mut tally = Tally::new();
    let before = meter.read()?;
    let window = Window::new(Duration::ZERO, Duration::ZERO, Some(0));
    if let Err(status) = read(channels.of(0), range, keys.count.into(), &window, &mut tally).await {
        tally.errors.add(&status);
    }
    let cpu = meter.read()?.since(before);
    let open = tally.last.map_or(Duration::ZERO, |last| last - window.opens);
    Ok(Measured { tally, open, cpu, notes: Default::default() })
}

/// Puts each key once, in no particular order.
async fn write(keys: &KeySpace, channels: &Channels, value: &Bytes) -> Result<(), Status> {
    let puts = (0..keys.count).map(|number| {
        let mut kv = KvClient::new(channels.of(number as usize));
        let (key, value) = (keys.key(number), value.clone());
        async move { kv.put(PutRequest { key, value, ..PutRequest::default() }).await.map(drop) }
    });
    stream::iter(puts).map(Ok).try_for_each_concurrent(PUTS_UNDER_WAY, |put| put).await
}

async fn first_revision(channel: Connection, keys: &KeySpace) -> Result<i64, Status> {
    let request = RangeRequest {
        key: keys.key(0),
        range_end: keys.end(),
        limit: 1,
        keys_only: true,
        sort_order: SortOrder::Ascend.into(),
        sort_target: SortTarget::Create.into(),
        ..RangeRequest::default()
    };
    let answer = KvClient::new(channel).range(request).await?.into_inner();
    let first = answer.kvs.first().map(|kv| kv.create_revision);
    first.ok_or_else(|| Status::not_found("the history is gone"))
}

/// Reads `count` events from the start of the watch on; each must be of a later revision than the
/// one before.
async fn read(
    channel: Connection,
    range: WatchedRange,
    count: u64,
    window: &Window,
    tally: &mut Tally,
) -> Result<(), Status> {
    let mut answers = open(channel, range).await?;
    let mut last_revision = 0;
    while tally.operations < count {
        let answer = tokio::time::timeout(PATIENCE, answers.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no event for a while"))??;
        let answer = answer.ok_or_else(|| Status::unavailable("the server ended the watch"))?;
        if answer.canceled {
            return Err(Status::cancelled(answer.cancel_reason));
        }
        let now = Instant::now();
        for event in answer.events {
            let revision = event.kv.map_or(0, |kv| kv.mod_revision);
            if revision <= last_revision {
                return Err(Status::data_loss("an event out of its order"));
            }
            last_revision = revision;
            tally.record(window, window.opens, now, Ok(()));
        }
    }
    Ok(())
}
