//! The cases that grant and revoke leases.

use bytes::Bytes;
use tonic::Status;

use super::cases::drive;
use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::keys::value;
use super::leases::{grant, revoke};
use super::load::{Client, Measured};
use super::{BenchError, Options};
use crate::pb::etcdserverpb::PutRequest;
use crate::pb::etcdserverpb::kv_client::KvClient;

/// Longer than the comparison of a case, so that no end of a lease disturbs it.
const TTL_SECONDS: i64 = 600;

/// Keys put with each lease of case lease-cycle.
const KEYS_A_LEASE: u32 = 10;

struct Grant {
    channel: Connection,
}

impl Client for Grant {
    async fn operate(&mut self) -> Result<(), Status> {
        grant(self.channel.clone(), TTL_SECONDS).await.map(drop)
    }
}

/// Grants only.
pub async fn grant_only(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    drive(options, meter, |number| Grant { channel: channels.of(number) }).await
}

struct Cycle {
    channel: Connection,
    keys: Vec<Bytes>,
    value: Bytes,
}

impl Client for Cycle {
    async fn operate(&mut self) -> Result<(), Status> {
        let lease = grant(self.channel.clone(), TTL_SECONDS).await?;
        let mut kv = KvClient::new(self.channel.clone());
        for key in &self.keys {
            let (key, value) = (key.clone(), self.value.clone());
            kv.put(PutRequest { key, value, lease, ..PutRequest::default() }).await?;
        }
        revoke(self.channel.clone(), lease).await
    }
}

/// The whole life of a lease with ten keys.
pub async fn cycle(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let value = value(options);
    drive(options, meter, |number| Cycle {
        channel: channels.of(number),
        keys: (0..KEYS_A_LEASE)
            .map(|n| format!("{}/cycle/{number:06}/{n:02}", options.prefix).into())
            .collect(),
        value: value.clone(),
    })
    .await
}
