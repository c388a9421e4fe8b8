//! The connections of a run.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use super::{BenchError, Options};
use crate::cli::session::endpoints::with_scheme;
use crate::pb::etcdserverpb::StatusRequest;
use crate::pb::etcdserverpb::maintenance_client::MaintenanceClient;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Large enough that flow control never holds an answer back.
const STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// Open connections, spread over the endpoints in turn.
pub struct Channels {
    channels: Vec<Channel>,
}

impl Channels {
    /// Opens the connections that `options` ask for.
    ///
    /// # Errors
    ///
    /// The first endpoint that is malformed, or does not answer within 5 s; when only followers are
    /// wanted, also that there is none.
    pub async fn open(options: &Options) -> Result<Channels, BenchError> {
        let endpoints = if options.followers {
            followers(&options.endpoints).await?
        } else {
            options.endpoints.clone()
        };
        let connections = options.connections(endpoints.len());
        Channels::connect(&endpoints, connections, options.clients as usize).await
    }

    /// Opens `connections` connections, fit for `clients` calls at once on each.
    async fn connect(
        endpoints: &[String],
        connections: usize,
        clients: usize,
    ) -> Result<Channels, BenchError> {
        let mut channels = Vec::with_capacity(connections);
        for text in endpoints.iter().cycle().take(connections) {
            let url = with_scheme(text).ok_or_else(|| BenchError::Scheme(text.clone()))?;
            let failed = |source| BenchError::Connect { url: text.clone(), source };
            let endpoint = Endpoint::from_shared(url)
                .map_err(failed)?
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .buffer_size(clients.max(1024));
            channels.push(endpoint.connect().await.map_err(failed)?);
        }
        Ok(Channels { channels })
    }

    /// The connection of client number `client`.
    pub fn of(&self, client: usize) -> Channel {
        self.channels[client % self.channels.len()].clone()
    }

    pub fn len(&self) -> usize {
        self.channels.len()
    }
}

/// Those of the endpoints whose member does not lead.
async fn followers(endpoints: &[String]) -> Result<Vec<String>, BenchError> {
    let channels = Channels::connect(endpoints, endpoints.len(), 1).await?;
    let mut followers = Vec::new();
    for (number, endpoint) in endpoints.iter().enumerate() {
        let mut member = MaintenanceClient::new(channels.of(number));
        let status = member.status(StatusRequest::default()).await;
        let status = status
            .map_err(|source| BenchError::Prepare { what: "asking who leads", source })?
            .into_inner();
        let id = status.header.map_or(0, |header| header.member_id);
        if id != status.leader {
            followers.push(endpoint.clone());
        }
    }
    if followers.is_empty() { Err(BenchError::NoFollower) } else { Ok(followers) }
}
