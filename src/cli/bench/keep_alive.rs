//! The case keep-alive: as many leases as clients, each kept alive over a stream of its own.
//!
//! So the servers see what as many separate programs with a lease each give them, but for the
//! connections. Each client asks again as soon as it has its answer, which no program would: the
//! rate is how many renewals the cluster takes in.

use futures::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::leases::{grant_many, revoke_many};
use super::load::{Client, Measured, closed_loop};
use super::{BenchError, Options};
use crate::pb::etcdserverpb::lease_client::LeaseClient;
use crate::pb::etcdserverpb::{LeaseKeepAliveRequest, LeaseKeepAliveResponse};

/// Longer than any run, so that no lease ends for want of a turn.
const TTL_SECONDS: i64 = 600;

/// Streams whose first answer is awaited at a time.
const OPENED_TOGETHER: usize = 64;

/// A stream that keeps one lease alive.
pub struct KeepAlive {
    id: i64,
    requests: mpsc::Sender<LeaseKeepAliveRequest>,
    answers: Streaming<LeaseKeepAliveResponse>,
}

impl KeepAlive {
    /// Opens the stream with a first renewal, and waits for its answer.
    pub async fn open(channel: Connection, id: i64) -> Result<KeepAlive, Status> {
        let (requests, outgoing) = mpsc::channel(1);
        let gone = |_| Status::unavailable("the stream of requests is gone");
        requests.send(LeaseKeepAliveRequest { id }).await.map_err(gone)?;
        let answers =
            LeaseClient::new(channel).lease_keep_alive(ReceiverStream::new(outgoing)).await?;
        let mut opened = KeepAlive { id, requests, answers: answers.into_inner() };
        opened.answer().await?;
        Ok(opened)
    }

    async fn answer(&mut self) -> Result<(), Status> {
        match self.answers.message().await? {
            Some(answer) if answer.id == self.id && answer.ttl > 0 => Ok(()),
            Some(answer) if answer.id == self.id => Err(Status::not_found("the lease ended")),
            Some(_) => Err(Status::internal("an answer for another lease")),
            None => Err(Status::unavailable("the server ended the stream")),
        }
    }
}

impl Client for KeepAlive {
    async fn operate(&mut self) -> Result<(), Status> {
        let gone = |_| Status::unavailable("the stream has ended");
        self.requests.send(LeaseKeepAliveRequest { id: self.id }).await.map_err(gone)?;
        self.answer().await
    }
}

/// Opens a stream for each lease, a few at a time, over all connections.
pub async fn open_all(channels: &Channels, ids: &[i64]) -> Result<Vec<KeepAlive>, BenchError> {
    stream::iter(ids.iter().enumerate())
        .map(|(client, &id)| KeepAlive::open(channels.of(client), id))
        .buffered(OPENED_TOGETHER)
        .try_collect()
        .await
        .map_err(|source| BenchError::Prepare { what: "keeping a lease alive", source })
}

pub async fn run(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let ids = grant_many(channels, options.clients as usize, TTL_SECONDS).await?;
    let clients = open_all(channels, &ids).await?;
    let plan = options.plan();
    let mut measured = closed_loop(clients, &plan, plan.window().into(), meter).await?;
    measured.tally.errors.merge(&revoke_many(channels, &ids).await);
    Ok(measured)
}
