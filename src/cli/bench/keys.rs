//! The keys and values that the cases work on, and how they get there before a measurement.

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use tonic::Status;

use super::channels::Channels;
use super::{BenchError, Options};
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::{PutRequest, RangeRequest, RequestOp, TxnRequest, request_op};

/// Half of what a server must accept in one transaction.
const KEYS_PER_FILL: u32 = 64;

/// Stays well below the largest request that a server must accept.
const FILL_BYTES_MAX: usize = 512 * 1024;

/// Transactions under way while keys are written beforehand.
const FILLS_UNDER_WAY: usize = 16;

/// All keys of a run in one buffer, so that choosing one allocates nothing.
#[derive(Clone)]
pub struct KeySpace {
    keys: Bytes,
    key_bytes: usize,
    pub count: u32,
}

impl KeySpace {
    pub fn new(options: &Options) -> KeySpace {
        KeySpace::named(options, "key")
    }

    /// Keys of their own for a case whose keys others must not write.
    pub fn named(options: &Options, kind: &str) -> KeySpace {
        let keys: String =
            (0..options.key_space).map(|n| format!("{}/{kind}/{n:010}", options.prefix)).collect();
        let count = options.key_space;
        KeySpace { key_bytes: keys.len() / count as usize, keys: keys.into(), count }
    }

    pub fn key(&self, number: u32) -> Bytes {
        let start = number as usize * self.key_bytes;
        self.keys.slice(start..start + self.key_bytes)
    }

    pub fn random(&self, random: &mut SmallRng) -> Bytes {
        self.key(random.random_range(0..self.count))
    }

    /// What comes right after the last key.
    pub fn end(&self) -> Bytes {
        let mut end = self.key(self.count - 1).to_vec();
        end.push(0);
        end.into()
    }

    /// How many of the keys exist.
    pub async fn existing(&self, channels: &Channels) -> Result<u32, Status> {
        let (key, range_end) = (self.key(0), self.end());
        let request = RangeRequest { key, range_end, count_only: true, ..RangeRequest::default() };
        let answer = KvClient::new(channels.of(0)).range(request).await?.into_inner();
        Ok(u32::try_from(answer.count).unwrap_or(u32::MAX))
    }

    /// Writes every key once, unless all of them exist.
    pub async fn fill(&self, channels: &Channels, value: &Bytes) -> Result<(), BenchError> {
        let failed = |source| BenchError::Prepare { what: "writing the keys", source };
        if self.existing(channels).await.map_err(failed)? == self.count {
            return Ok(());
        }
        let fit = FILL_BYTES_MAX / (self.key_bytes + value.len()).max(1);
        let step = u32::try_from(fit).unwrap_or(u32::MAX).clamp(1, KEYS_PER_FILL);
        let fills = (0..self.count).step_by(step as usize).enumerate().map(|(turn, start)| {
            let numbers = start..self.count.min(start.saturating_add(step));
            // Values of their own, so that no engine saves space by their being alike.
            let success = numbers
                .map(|number| put_op(self.key(number), &random_bytes(number as usize, value.len())))
                .collect();
            let mut kv = KvClient::new(channels.of(turn));
            async move { kv.txn(TxnRequest { success, ..TxnRequest::default() }).await.map(drop) }
        });
        stream::iter(fills)
            .map(Ok)
            .try_for_each_concurrent(FILLS_UNDER_WAY, |fill| fill)
            .await
            .map_err(failed)
    }
}

/// Bytes that do not compress; the same in every run.
pub fn value(options: &Options) -> Bytes {
    random_bytes(0, options.value_size)
}

fn random_bytes(seed: usize, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    random_of(seed).fill_bytes(&mut bytes);
    bytes.into()
}

pub fn random_of(client: usize) -> SmallRng {
    SmallRng::seed_from_u64(client as u64)
}

pub fn put_op(key: Bytes, value: &Bytes) -> RequestOp {
    let put = PutRequest { key, value: value.clone(), ..PutRequest::default() };
    RequestOp { request: Some(request_op::Request::RequestPut(put)) }
}
