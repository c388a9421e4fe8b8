//! The members that a command may ask, one after the other.

use std::error::Error;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::{RETRY_PAUSE, Reach, SessionError};

const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long one endpoint may take to answer a call that does not wait for anybody.
pub const CALL_LIMIT: Duration = Duration::from_secs(3);
/// Finds out that a silent member is gone while a call waits. An etcd allows it every 5 s.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Lazily opened connections, of which one is in use.
#[derive(Clone)]
pub struct Endpoints {
    channels: Vec<Channel>,
    at: usize,
}

impl Endpoints {
    /// # Errors
    ///
    /// The first endpoint that is malformed. Connections are opened by the first call.
    pub fn new(urls: &[String]) -> Result<Endpoints, SessionError> {
        let channels = urls.iter().map(|text| {
            let url = with_scheme(text).ok_or_else(|| SessionError::Scheme(text.clone()))?;
            let endpoint = Endpoint::from_shared(url).map_err(|error| SessionError::Endpoint {
                url: text.clone(),
                reason: root_cause(&error),
            })?;
            Ok(endpoint
                .connect_timeout(CONNECT_LIMIT)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(KEEP_ALIVE)
                .keep_alive_timeout(KEEP_ALIVE)
                .keep_alive_while_idle(true)
                .connect_lazy())
        });
        Ok(Endpoints { channels: channels.collect::<Result<_, _>>()?, at: 0 })
    }

    pub fn channel(&self) -> Channel {
        self.channels[self.at].clone()
    }

    pub fn len(&self) -> usize {
        self.channels.len()
    }

    /// The next one is in use from now on.
    pub fn turn(&mut self) {
        self.at = (self.at + 1) % self.channels.len();
    }

    /// Makes a call that does not wait for anybody, on one endpoint after the other until one
    /// answers; gives up when each was tried and `limit` is over.
    ///
    /// # Errors
    ///
    /// [`SessionError::Refused`] with the first answer that another endpoint would give too,
    /// [`SessionError::OutOfReach`] otherwise.
    pub async fn ask<T, C, F>(&mut self, limit: Duration, call: C) -> Result<T, SessionError>
    where
        C: Fn(Channel) -> F,
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let mut reach = Reach::new(Some(limit));
        loop {
            let why = match within(CALL_LIMIT, call(self.channel())).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) if !is_elsewhere(&status) => return Err(SessionError::Refused(status)),
                Err(status) => reason(&status),
            };
            self.turn();
            if reach.is_over_after_failure(self.len()) {
                return Err(SessionError::OutOfReach(why));
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }
}

/// `call`, or DEADLINE_EXCEEDED.
pub async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let late = |_| Err(Status::deadline_exceeded(format!("no answer within {limit:?}")));
    tokio::time::timeout(limit, call).await.unwrap_or_else(late)
}

/// Whether another member, or the same one later, may answer otherwise.
pub fn is_elsewhere(status: &Status) -> bool {
    // Etcd's lock and election services say UNKNOWN whatever the matter is.
    matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Internal
            | Code::Aborted
    )
}

/// The transport's own text says only that something failed; what failed is at the end.
pub fn reason(status: &Status) -> String {
    match status.source() {
        Some(source) => root_cause(source),
        None => status.message().trim_start_matches("holdfast: ").to_owned(),
    }
}

pub fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// The URL of an endpoint, whose scheme may be left out; `None` for any but plain http.
pub fn with_scheme(endpoint: &str) -> Option<String> {
    match endpoint.split_once("://") {
        None => Some(format!("http://{endpoint}")),
        Some(("http", _)) => Some(endpoint.to_owned()),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_may_leave_out_its_scheme() {
        assert_eq!(with_scheme("127.0.0.1:2379").unwrap(), "http://127.0.0.1:2379");
        assert_eq!(with_scheme("http://a:1").unwrap(), "http://a:1");
        assert_eq!(with_scheme("https://a:1"), None);
    }

    #[tokio::test]
    async fn endpoints_are_used_in_turn() {
        let mut endpoints = Endpoints::new(&["a:1".into(), "http://b:2".into()]).unwrap();
        endpoints.turn();
        assert_eq!(endpoints.at, 1);
        endpoints.turn();
        assert_eq!(endpoints.at, 0);
        assert!(Endpoints::new(&["https://a:1".into()]).is_err());
    }
}
