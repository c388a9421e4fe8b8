//! Which case does what, and the case that writes.

use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::SmallRng;
use tonic::Status;

use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::keys::{KeySpace, random_of, value};
use super::load::{Client, Measured, closed_loop};
use super::{
    BenchError, Case, Options, catch_up, elections, keep_alive, lease_calls, lease_end, queues,
    reads, txns, watch, watch_prefix,
};
use crate::pb::etcdserverpb::PutRequest;
use crate::pb::etcdserverpb::kv_client::KvClient;

/// Runs the case that `options` name.
///
/// # Errors
///
/// What went wrong before the measurement; errors of operations are part of the result.
pub async fn run(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    match options.case {
        Case::Put => put(options, channels, meter).await,
        Case::Range => reads::range(options, channels, meter, false).await,
        Case::RangeSerializable => reads::range(options, channels, meter, true).await,
        Case::Page => reads::page(options, channels, meter).await,
        Case::Count => reads::count(options, channels, meter).await,
        Case::Txn => txns::compare_and_swap(options, channels, meter).await,
        Case::Txn10 => txns::ten_puts(options, channels, meter).await,
        Case::Lock => queues::lock(options, channels, meter).await,
        Case::Campaign => queues::campaign(options, channels, meter).await,
        Case::Proclaim => elections::proclaim(options, channels, meter).await,
        Case::Observe => elections::observe(options, channels, meter).await,
        Case::Watch => watch::run(options, channels, meter).await,
        Case::WatchPrefix => watch_prefix::run(options, channels, meter).await,
        Case::CatchUp => catch_up::run(options, channels, meter).await,
        Case::KeepAlive => keep_alive::run(options, channels, meter).await,
        Case::LeaseGrant => lease_calls::grant_only(options, channels, meter).await,
        Case::LeaseCycle => lease_calls::cycle(options, channels, meter).await,
        Case::LeaseEnd => lease_end::run(options, channels, meter).await,
    }
}

/// One client for each number, run in a closed loop.
pub async fn drive<C: Client>(
    options: &Options,
    meter: &CpuMeter,
    client: impl FnMut(usize) -> C,
) -> Result<Measured, BenchError> {
    let clients = (0..options.clients as usize).map(client).collect();
    let plan = options.plan();
    closed_loop(clients, &plan, Arc::new(plan.window()), meter).await
}

struct Put {
    kv: KvClient<Connection>,
    keys: KeySpace,
    value: Bytes,
    random: SmallRng,
}

impl Client for Put {
    async fn operate(&mut self) -> Result<(), Status> {
        let key = self.keys.random(&mut self.random);
        let value = self.value.clone();
        self.kv.put(PutRequest { key, value, ..PutRequest::default() }).await?;
        Ok(())
    }
}

async fn put(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let (keys, value) = (KeySpace::new(options), value(options));
    keys.fill(channels, &value).await?;
    drive(options, meter, |number| Put {
        kv: KvClient::new(channels.of(number)),
        keys: keys.clone(),
        value: value.clone(),
        random: random_of(number),
    })
    .await
}
