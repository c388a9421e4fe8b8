//! Leases: granting and revoking many, and one for each client that is kept alive meanwhile.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::stream::{self, StreamExt, TryStreamExt};
use tokio::task::JoinSet;
use tokio_stream::wrappers::IntervalStream;
use tonic::Status;

use super::BenchError;
use super::channels::Channels;
use super::connection::Connection;
use super::tally::Errors;
use crate::pb::etcdserverpb::lease_client::LeaseClient;
use crate::pb::etcdserverpb::{LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest};

const TTL_SECONDS: i64 = 60;
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// Grants or revocations under way while many are made.
const CALLS_UNDER_WAY: usize = 64;

/// The leases of a run. Dropping them ends the keep-alives; the leases then run out by themselves.
pub struct Leases {
    ids: Vec<i64>,
    errors: Arc<Mutex<Errors>>,
    // Aborts the tasks when it is dropped.
    _keep_alives: JoinSet<()>,
}

impl Leases {
    /// Grants `count` leases and keeps them alive, over one stream for each connection.
    pub async fn grant(channels: &Channels, count: usize) -> Result<Leases, BenchError> {
        let ids = grant_many(channels, count, TTL_SECONDS).await?;
        let errors = Arc::new(Mutex::new(Errors::default()));
        let mut keep_alives = JoinSet::new();
        for connection in 0..channels.len() {
            let ids: Vec<_> =
                ids.iter().copied().skip(connection).step_by(channels.len()).collect();
            let (channel, errors) = (channels.of(connection), Arc::clone(&errors));
            keep_alives.spawn(async move {
                if let Err(status) = keep_alive(channel, ids).await {
                    let mut errors = errors.lock().unwrap_or_else(PoisonError::into_inner);
                    errors.add_kind(format!("keep-alive: {}", status.message()), 1);
                }
            });
        }
        Ok(Leases { ids, errors, _keep_alives: keep_alives })
    }

    /// The lease of client number `client`.
    pub fn of(&self, client: usize) -> i64 {
        self.ids[client]
    }

    /// Revokes all leases, and with them what failed operations may have left behind.
    ///
    /// Returns what went wrong here or with the keep-alives.
    pub async fn revoke(self, channels: &Channels) -> Errors {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone();
        errors.merge(&revoke_many(channels, &self.ids).await);
        errors
    }
}

/// Grants `count` leases, a few at a time, over all connections.
pub async fn grant_many(
    channels: &Channels,
    count: usize,
    ttl_seconds: i64,
) -> Result<Vec<i64>, BenchError> {
    stream::iter(0..count)
        .map(|client| grant(channels.of(client), ttl_seconds))
        .buffered(CALLS_UNDER_WAY)
        .try_collect()
        .await
        .map_err(|source| BenchError::Prepare { what: "granting a lease", source })
}

/// Revokes leases, a few at a time, up to the first that cannot be: what went wrong.
pub async fn revoke_many(channels: &Channels, ids: &[i64]) -> Errors {
    let revoked = stream::iter(ids.iter().enumerate())
        .map(|(client, &id)| revoke(channels.of(client), id))
        .buffer_unordered(CALLS_UNDER_WAY)
        .try_collect::<()>()
        .await;
    let mut errors = Errors::default();
    if let Err(status) = revoked {
        errors.add_kind(format!("revoking a lease: {}", status.message()), 1);
    }
    errors
}

pub async fn grant(channel: Connection, ttl: i64) -> Result<i64, Status> {
    let request = LeaseGrantRequest { ttl, id: 0 };
    Ok(LeaseClient::new(channel).lease_grant(request).await?.into_inner().id)
}

pub async fn revoke(channel: Connection, id: i64) -> Result<(), Status> {
    LeaseClient::new(channel).lease_revoke(LeaseRevokeRequest { id }).await.map(drop)
}

/// Returns only when the leases can no longer be kept alive.
async fn keep_alive(channel: Connection, ids: Vec<i64>) -> Result<(), Status> {
    let ticks = IntervalStream::new(tokio::time::interval(KEEP_ALIVE_INTERVAL));
    let requests =
        ticks.flat_map(move |_| stream::iter(ids.clone())).map(|id| LeaseKeepAliveRequest { id });
    let mut answers = LeaseClient::new(channel).lease_keep_alive(requests).await?.into_inner();
    while let Some(answer) = answers.message().await? {
        if answer.ttl <= 0 {
            return Err(Status::not_found("a lease expired"));
        }
    }
    Err(Status::unavailable("the server ended the stream"))
}
