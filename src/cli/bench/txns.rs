//! The cases with transactions: compare-and-swap of one key, and many writes at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rand::Rng;
use rand::rngs::SmallRng;
use tonic::Status;

use super::cases::drive;
use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::keys::{KeySpace, put_op, random_of, value};
use super::load::{Client, Measured};
use super::{BenchError, Options};
use crate::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::{
    Compare, RangeRequest, RequestOp, TxnRequest, request_op, response_op,
};

/// Puts in one transaction of case txn10.
const TXN_PUTS: u32 = 10;

struct Txn {
    kv: KvClient<Connection>,
    key: Bytes,
    value: Bytes,
    /// Where the key was last modified, as far as this client knows.
    known: i64,
    seen: Arc<Compares>,
}

/// How the compares of all clients came out, those of the warm-up included.
#[derive(Default)]
struct Compares {
    made: AtomicU64,
    failed: AtomicU64,
}

impl Txn {
    fn request(&self) -> TxnRequest {
        let read = RangeRequest { key: self.key.clone(), ..RangeRequest::default() };
        TxnRequest {
            compare: vec![Compare {
                result: CompareResult::Equal.into(),
                target: CompareTarget::Mod.into(),
                key: self.key.clone(),
                target_union: Some(TargetUnion::ModRevision(self.known)),
                ..Compare::default()
            }],
            success: vec![put_op(self.key.clone(), &self.value)],
            failure: vec![RequestOp { request: Some(request_op::Request::RequestRange(read)) }],
        }
    }
}

impl Client for Txn {
    async fn operate(&mut self) -> Result<(), Status> {
        let answer = self.kv.txn(self.request()).await?.into_inner();
        self.seen.made.fetch_add(1, Ordering::Relaxed);
        if answer.succeeded {
            self.known = answer.header.map_or(0, |header| header.revision);
            return Ok(());
        }
        self.seen.failed.fetch_add(1, Ordering::Relaxed);
        let read = answer.responses.into_iter().next().and_then(|op| op.response);
        let Some(response_op::Response::ResponseRange(mut range)) = read else {
            return Err(Status::internal("the branch that ran is not in the answer"));
        };
        self.known = range.kvs.pop().map_or(0, |kv| kv.mod_revision);
        Ok(())
    }
}

/// Compare-and-swap, each client on one key.
pub async fn compare_and_swap(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let (keys, value) = (KeySpace::new(options), value(options));
    let seen = Arc::new(Compares::default());
    let mut measured = drive(options, meter, |number| Txn {
        kv: KvClient::new(channels.of(number)),
        key: keys.key(u32::try_from(number).unwrap_or(u32::MAX) % keys.count),
        value: value.clone(),
        known: 0,
        seen: Arc::clone(&seen),
    })
    .await?;
    let (made, failed) = (seen.made.load(Ordering::Relaxed), seen.failed.load(Ordering::Relaxed));
    measured.notes.insert("compares_failed_percent", failed as f64 * 100.0 / made.max(1) as f64);
    Ok(measured)
}

struct ManyPuts {
    kv: KvClient<Connection>,
    keys: KeySpace,
    value: Bytes,
    random: SmallRng,
}

impl Client for ManyPuts {
    async fn operate(&mut self) -> Result<(), Status> {
        // Neighbours from a random key on: no key may be put twice in one transaction.
        let puts = TXN_PUTS.min(self.keys.count);
        let first = self.random.random_range(0..=self.keys.count - puts);
        let success: Vec<_> =
            (first..first + puts).map(|n| put_op(self.keys.key(n), &self.value)).collect();
        let answer = self.kv.txn(TxnRequest { success, ..TxnRequest::default() }).await?;
        if answer.get_ref().responses.len() == puts as usize {
            Ok(())
        } else {
            Err(Status::internal("a put is not in the answer"))
        }
    }
}

/// Transactions of ten puts and no compare.
pub async fn ten_puts(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let (keys, value) = (KeySpace::new(options), value(options));
    drive(options, meter, |number| ManyPuts {
        kv: KvClient::new(channels.of(number)),
        keys: keys.clone(),
        value: value.clone(),
        random: random_of(number),
    })
    .await
}
