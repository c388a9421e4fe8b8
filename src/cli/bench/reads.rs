//! The cases that read: one key, a page of keys, a count.

use bytes::Bytes;
use rand::Rng;
use rand::rngs::SmallRng;
use tonic::Status;

use super::cases::drive;
use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::keys::{KeySpace, random_of, value};
use super::load::{Client, Measured};
use super::{BenchError, Options};
use crate::pb::etcdserverpb::RangeRequest;
use crate::pb::etcdserverpb::kv_client::KvClient;

/// Keys in a page.
const PAGE_KEYS: u32 = 1_000;

struct Range {
    kv: KvClient<Connection>,
    keys: KeySpace,
    random: SmallRng,
    serializable: bool,
}

impl Client for Range {
    async fn operate(&mut self) -> Result<(), Status> {
        let key = self.keys.random(&mut self.random);
        let serializable = self.serializable;
        let request = RangeRequest { key, serializable, ..RangeRequest::default() };
        let answer = self.kv.range(request).await?.into_inner();
        // A fast wrong answer must not look like a good result.
        if answer.kvs.len() == 1 { Ok(()) } else { Err(Status::not_found("key is missing")) }
    }
}

/// Reads of one random key.
pub async fn range(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
    serializable: bool,
) -> Result<Measured, BenchError> {
    let keys = KeySpace::new(options);
    keys.fill(channels, &value(options)).await?;
    drive(options, meter, |number| Range {
        kv: KvClient::new(channels.of(number)),
        keys: keys.clone(),
        random: random_of(number),
        serializable,
    })
    .await
}

struct Page {
    kv: KvClient<Connection>,
    keys: KeySpace,
    end: Bytes,
    random: SmallRng,
}

impl Client for Page {
    async fn operate(&mut self) -> Result<(), Status> {
        let wanted = PAGE_KEYS.min(self.keys.count);
        let first = self.random.random_range(0..=self.keys.count - wanted);
        let request = RangeRequest {
            key: self.keys.key(first),
            range_end: self.end.clone(),
            limit: wanted.into(),
            ..RangeRequest::default()
        };
        let answer = self.kv.range(request).await?.into_inner();
        let count = i64::from(self.keys.count - first);
        if answer.kvs.len() == wanted as usize && answer.count == count {
            Ok(())
        } else {
            Err(Status::not_found("the page is not what was written"))
        }
    }
}

/// Linearizable reads of 1,000 keys from a random one on, as a client pages through all of them.
pub async fn page(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let keys = KeySpace::new(options);
    keys.fill(channels, &value(options)).await?;
    drive(options, meter, |number| Page {
        kv: KvClient::new(channels.of(number)),
        end: keys.end(),
        keys: keys.clone(),
        random: random_of(number),
    })
    .await
}

struct Count {
    kv: KvClient<Connection>,
    keys: KeySpace,
    end: Bytes,
}

impl Client for Count {
    async fn operate(&mut self) -> Result<(), Status> {
        let request = RangeRequest {
            key: self.keys.key(0),
            range_end: self.end.clone(),
            count_only: true,
            ..RangeRequest::default()
        };
        let answer = self.kv.range(request).await?.into_inner();
        if answer.count == i64::from(self.keys.count) {
            Ok(())
        } else {
            Err(Status::not_found("the count is not what was written"))
        }
    }
}

/// Linearizable counts of the whole key space.
pub async fn count(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let keys = KeySpace::new(options);
    keys.fill(channels, &value(options)).await?;
    drive(options, meter, |number| Count {
        kv: KvClient::new(channels.of(number)),
        end: keys.end(),
        keys: keys.clone(),
    })
    .await
}
