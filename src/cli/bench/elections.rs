//! The cases proclaim and observe: what a leader says, and how soon others hear it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::task::JoinSet;
use tonic::{Status, Streaming};

use super::cases::drive;
use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::keys::value;
use super::leases::Leases;
use super::load::{Client, Measured, closed_loop};
use super::queues::name;
use super::tally::{Tally, Window};
use super::{BenchError, Options};
use crate::pb::v3electionpb::election_client::ElectionClient;
use crate::pb::v3electionpb::{
    CampaignRequest, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
};

const STAMP_BYTES: usize = size_of::<u64>();

/// How long the observers may take to be told of the last proclamation.
const CATCH_UP: Duration = Duration::from_secs(5);
const CATCH_UP_POLL: Duration = Duration::from_millis(10);

/// Makes the holder of `lease` the leader of an election that nobody else stands for.
async fn elect(channel: Connection, name: Bytes, lease: i64) -> Result<LeaderKey, BenchError> {
    let failed = |source| BenchError::Prepare { what: "campaigning", source };
    let request = CampaignRequest { name, lease, value: Bytes::from_static(&[0; STAMP_BYTES]) };
    let answer = ElectionClient::new(channel).campaign(request).await.map_err(failed)?;
    answer.into_inner().leader.ok_or_else(|| failed(Status::internal("an answer without a key")))
}

struct Leader {
    elections: ElectionClient<Connection>,
    request: ProclaimRequest,
}

impl Client for Leader {
    async fn operate(&mut self) -> Result<(), Status> {
        self.elections.proclaim(self.request.clone()).await.map(drop)
    }
}

pub async fn proclaim(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let clients = options.clients as usize;
    let leases = Leases::grant(channels, clients).await?;
    let value = value(options);
    let mut leaders = Vec::with_capacity(clients);
    for number in 0..clients {
        // One each, whatever `--names` says: a second candidate would wait.
        let name = format!("{}/proclaim/{number:06}", options.prefix).into();
        leaders.push(elect(channels.of(number), name, leases.of(number)).await?);
    }
    let mut measured = drive(options, meter, |number| Leader {
        elections: ElectionClient::new(channels.of(number)),
        request: ProclaimRequest { leader: Some(leaders[number].clone()), value: value.clone() },
    })
    .await?;
    measured.tally.errors.merge(&leases.revoke(channels).await);
    Ok(measured)
}

/// Proclaims when it does so, and the number of the proclamation.
struct Herald {
    elections: ElectionClient<Connection>,
    leader: LeaderKey,
    value_bytes: usize,
    origin: Instant,
    newest: Arc<AtomicU64>,
}

impl Client for Herald {
    async fn operate(&mut self) -> Result<(), Status> {
        let mut value = BytesMut::zeroed(self.value_bytes.max(STAMP_BYTES));
        let stamp = nanoseconds(self.origin);
        value[..STAMP_BYTES].copy_from_slice(&stamp.to_be_bytes());
        let request = ProclaimRequest { leader: Some(self.leader.clone()), value: value.freeze() };
        self.elections.proclaim(request).await?;
        self.newest.store(stamp, Ordering::Relaxed);
        Ok(())
    }
}

struct Observer {
    answers: Streaming<LeaderResponse>,
    origin: Instant,
    window: Arc<Window>,
    tally: Arc<Mutex<Tally>>,
    /// The stamp heard last.
    newest: Arc<AtomicU64>,
}

impl Observer {
    async fn run(mut self) {
        loop {
            let heard = match self.answers.message().await {
                Ok(Some(answer)) => answer.kv.map(|kv| kv.value).unwrap_or_default(),
                Ok(None) => {
                    return self.failed(&Status::unavailable("the server ended the stream"));
                }
                Err(status) => return self.failed(&status),
            };
            let now = Instant::now();
            let stamp = heard.first_chunk::<STAMP_BYTES>().map_or(0, |s| u64::from_be_bytes(*s));
            let before = self.newest.swap(stamp, Ordering::Relaxed);
            let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
            if stamp < before {
                tally.errors.add(&Status::data_loss("an older proclamation after a newer one"));
            } else if stamp > 0 {
                let began = self.origin + Duration::from_nanos(stamp);
                tally.record(&self.window, began, now, Ok(()));
            }
        }
    }

    fn failed(&self, status: &Status) {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).errors.add(status);
    }
}

/// Measures `options.clients` observers of one leader. An observer need not hear of every
/// proclamation, but of the last one it must.
pub async fn observe(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let observers = options.clients as usize;
    let leases = Leases::grant(channels, 1).await?;
    let election = name(options, "observed", 0);
    let leader = elect(channels.of(observers), election.clone(), leases.of(0)).await?;
    let plan = options.plan();
    let (window, origin) = (Arc::new(plan.window()), Instant::now());
    let tallies: Vec<_> = (0..plan.shards).map(|_| Arc::new(Mutex::new(Tally::new()))).collect();
    let heard: Vec<_> = (0..observers).map(|_| Arc::new(AtomicU64::new(0))).collect();
    let mut running = JoinSet::new();
    for (number, newest) in heard.iter().enumerate() {
        let request = LeaderRequest { name: election.clone() };
        let answers = ElectionClient::new(channels.of(number))
            .observe(request)
            .await
            .map_err(|source| BenchError::Prepare { what: "observing", source })?
            .into_inner();
        let observer = Observer {
            answers,
            origin,
            window: Arc::clone(&window),
            tally: Arc::clone(&tallies[number % tallies.len()]),
            newest: Arc::clone(newest),
        };
        running.spawn(observer.run());
    }
    let newest = Arc::new(AtomicU64::new(0));
    let herald = Herald {
        elections: ElectionClient::new(channels.of(observers)),
        leader,
        value_bytes: options.value_size,
        origin,
        newest: Arc::clone(&newest),
    };
    let mut measured = closed_loop(vec![herald], &plan, window, meter).await?;
    let behind = await_last(&heard, newest.load(Ordering::Relaxed)).await;
    drop(running);

    let proclaimed = std::mem::replace(&mut measured.tally, Tally::new());
    for shard in &tallies {
        measured.tally.merge(&shard.lock().unwrap_or_else(PoisonError::into_inner));
    }
    measured.tally.errors.merge(&proclaimed.errors);
    if behind > 0 {
        measured.tally.errors.add_kind("not told of the last value".to_owned(), behind);
    }
    let seconds = measured.open.as_secs_f64().max(f64::EPSILON);
    measured.notes.insert("proclaims_per_second", proclaimed.operations as f64 / seconds);
    measured.tally.errors.merge(&leases.revoke(channels).await);
    Ok(measured)
}

/// Waits until every observer has heard what was acknowledged last; how many have not after
/// [`CATCH_UP`].
async fn await_last(heard: &[Arc<AtomicU64>], last: u64) -> u64 {
    let deadline = Instant::now() + CATCH_UP;
    loop {
        let behind = heard.iter().filter(|heard| heard.load(Ordering::Relaxed) < last).count();
        if behind == 0 || Instant::now() >= deadline {
            return behind as u64;
        }
        tokio::time::sleep(CATCH_UP_POLL).await;
    }
}

fn nanoseconds(origin: Instant) -> u64 {
    u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
