//! The cases: what each client does in one operation, and what must exist before.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use tonic::Status;
use tonic::transport::Channel;

use super::channels::Channels;
use super::cpu::CpuMeter;
use super::leases::Leases;
use super::load::{Client, Measured, closed_loop};
use super::{BenchError, Case, Options, watch};
use crate::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::{
    Compare, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op, response_op,
};
use crate::pb::v3electionpb::election_client::ElectionClient;
use crate::pb::v3electionpb::{CampaignRequest, ResignRequest};
use crate::pb::v3lockpb::lock_client::LockClient;
use crate::pb::v3lockpb::{LockRequest, UnlockRequest};

/// Half of what a server must accept in one transaction.
const KEYS_PER_FILL: u32 = 64;

/// Stays well below the largest request that a server must accept.
const FILL_BYTES_MAX: usize = 512 * 1024;

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
        Case::Range => range(options, channels, meter, false).await,
        Case::RangeSerializable => range(options, channels, meter, true).await,
        Case::Txn => txn(options, channels, meter).await,
        Case::Lock => lock(options, channels, meter).await,
        Case::Campaign => campaign(options, channels, meter).await,
        Case::Watch => watch::run(options, channels, meter).await,
    }
}

/// One client for each number, run in a closed loop.
async fn drive<C: Client>(
    options: &Options,
    meter: &CpuMeter,
    client: impl FnMut(usize) -> C,
) -> Result<Measured, BenchError> {
    let clients = (0..options.clients as usize).map(client).collect();
    let plan = options.plan();
    closed_loop(clients, &plan, Arc::new(plan.window()), meter).await
}

/// All keys of a run in one buffer, so that choosing one allocates nothing.
#[derive(Clone)]
struct KeySpace {
    keys: Bytes,
    key_bytes: usize,
    count: u32,
}

impl KeySpace {
    fn new(options: &Options) -> KeySpace {
        let keys: String =
            (0..options.key_space).map(|n| format!("{}/key/{n:010}", options.prefix)).collect();
        let count = options.key_space;
        KeySpace { key_bytes: keys.len() / count as usize, keys: keys.into(), count }
    }

    fn key(&self, number: u32) -> Bytes {
        let start = number as usize * self.key_bytes;
        self.keys.slice(start..start + self.key_bytes)
    }

    fn random(&self, random: &mut SmallRng) -> Bytes {
        self.key(random.random_range(0..self.count))
    }

    /// Writes every key once.
    async fn fill(&self, channel: Channel, value: &Bytes) -> Result<(), BenchError> {
        let fit = FILL_BYTES_MAX / (self.key_bytes + value.len()).max(1);
        let step = u32::try_from(fit).unwrap_or(u32::MAX).clamp(1, KEYS_PER_FILL);
        let mut kv = KvClient::new(channel);
        for start in (0..self.count).step_by(step as usize) {
            let numbers = start..self.count.min(start.saturating_add(step));
            let success = numbers.map(|number| put_op(self.key(number), value)).collect();
            kv.txn(TxnRequest { success, ..TxnRequest::default() })
                .await
                .map_err(|source| BenchError::Prepare { what: "writing the keys", source })?;
        }
        Ok(())
    }
}

/// Bytes that do not compress; the same in every run.
fn value(options: &Options) -> Bytes {
    let mut value = vec![0; options.value_size];
    random_of(0).fill_bytes(&mut value);
    value.into()
}

fn random_of(client: usize) -> SmallRng {
    SmallRng::seed_from_u64(client as u64)
}

fn put_op(key: Bytes, value: &Bytes) -> RequestOp {
    let put = PutRequest { key, value: value.clone(), ..PutRequest::default() };
    RequestOp { request: Some(request_op::Request::RequestPut(put)) }
}

struct Put {
    kv: KvClient<Channel>,
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
    drive(options, meter, |number| Put {
        kv: KvClient::new(channels.of(number)),
        keys: keys.clone(),
        value: value.clone(),
        random: random_of(number),
    })
    .await
}

struct Range {
    kv: KvClient<Channel>,
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

async fn range(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
    serializable: bool,
) -> Result<Measured, BenchError> {
    let keys = KeySpace::new(options);
    keys.fill(channels.of(0), &value(options)).await?;
    drive(options, meter, |number| Range {
        kv: KvClient::new(channels.of(number)),
        keys: keys.clone(),
        random: random_of(number),
        serializable,
    })
    .await
}

struct Txn {
    kv: KvClient<Channel>,
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

async fn txn(
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

/// The lock or election that client number `number` works on.
fn name(options: &Options, kind: &str, number: usize) -> Bytes {
    let names = options.names.unwrap_or(options.clients) as usize;
    format!("{}/{kind}/{:06}", options.prefix, number % names).into()
}

struct Lock {
    locks: LockClient<Channel>,
    request: LockRequest,
}

impl Client for Lock {
    async fn operate(&mut self) -> Result<(), Status> {
        let key = self.locks.lock(self.request.clone()).await?.into_inner().key;
        self.locks.unlock(UnlockRequest { key }).await?;
        Ok(())
    }
}

async fn lock(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let leases = Leases::grant(channels, options.clients as usize).await?;
    let mut measured = drive(options, meter, |number| Lock {
        locks: LockClient::new(channels.of(number)),
        request: LockRequest { name: name(options, "lock", number), lease: leases.of(number) },
    })
    .await?;
    measured.tally.errors.merge(&leases.revoke(channels).await);
    Ok(measured)
}

struct Campaign {
    elections: ElectionClient<Channel>,
    request: CampaignRequest,
}

impl Client for Campaign {
    async fn operate(&mut self) -> Result<(), Status> {
        let answer = self.elections.campaign(self.request.clone()).await?.into_inner();
        self.elections.resign(ResignRequest { leader: answer.leader }).await?;
        Ok(())
    }
}

async fn campaign(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let leases = Leases::grant(channels, options.clients as usize).await?;
    let value = value(options);
    let mut measured = drive(options, meter, |number| Campaign {
        elections: ElectionClient::new(channels.of(number)),
        request: CampaignRequest {
            name: name(options, "election", number),
            lease: leases.of(number),
            value: value.clone(),
        },
    })
    .await?;
    measured.tally.errors.merge(&leases.revoke(channels).await);
    Ok(measured)
}
