//! The connections of a run.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use super::BenchError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Large enough that flow control never holds an answer back.
const STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// Open connections, spread over the endpoints in turn.
pub struct Channels {
    channels: Vec<Channel>,
}

impl Channels {
    /// Opens `connections` connections, fit for `clients` calls at once on each.
    ///
    /// # Errors
    ///
    /// The first endpoint that is malformed, or does not answer within 5 s.
    pub async fn connect(
        endpoints: &[String],
        connections: usize,
        clients: usize,
    ) -> Result<Channels, BenchError> {
        let mut channels = Vec::with_capacity(connections);
        for text in endpoints.iter().cycle().take(connections) {
            let url = with_scheme(text)?;
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

fn with_scheme(endpoint: &str) -> Result<String, BenchError> {
    match endpoint.split_once("://") {
        None => Ok(format!("http://{endpoint}")),
        Some(("http", _)) => Ok(endpoint.to_owned()),
        Some(_) => Err(BenchError::Scheme(endpoint.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_may_leave_out_its_scheme() {
        assert_eq!(with_scheme("127.0.0.1:2379").unwrap(), "http://127.0.0.1:2379");
        assert_eq!(with_scheme("http://a:1").unwrap(), "http://a:1");
        assert!(with_scheme("https://a:1").is_err());
    }
}
