//! The connections of a run.

use super::connection::Connection;
use super::{BenchError, Options};
use crate::cli::session::endpoints::with_scheme;
use crate::pb::etcdserverpb::StatusRequest;
use crate::pb::etcdserverpb::maintenance_client::MaintenanceClient;

/// Open connections, spread over the endpoints in turn.
pub struct Channels {
    channels: Vec<Connection>,
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
        Channels::connect(&endpoints, options.connections(endpoints.len())).await
    }

    async fn connect(endpoints: &[String], connections: usize) -> Result<Channels, BenchError> {
        let mut channels = Vec::with_capacity(connections);
        for text in endpoints.iter().cycle().take(connections) {
            let url = with_scheme(text).ok_or_else(|| BenchError::Scheme(text.clone()))?;
            let failed = |source| BenchError::Connect { url: text.clone(), source };
            channels.push(Connection::open(&url).await.map_err(failed)?);
        }
        Ok(Channels { channels })
    }

    /// The connection of client number `client`.
    pub fn of(&self, client: usize) -> Connection {
        self.channels[client % self.channels.len()].clone()
    }

    pub fn len(&self) -> usize {
        self.channels.len()
    }
}

/// Those of the endpoints whose member does not lead.
async fn followers(endpoints: &[String]) -> Result<Vec<String>, BenchError> {
    let channels = Channels::connect(endpoints, endpoints.len()).await?;
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
