//! One HTTP/2 connection, and nothing around it.
//!
//! tonic's own channel queues each call for a task of its own, and reconnects. Here both would only be
//! measured: a quarter of what a small call costs the generator, on the cores that it shares with the
//! members.

use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tonic::body::Body;
use tower::Service;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Large enough that flow control never holds an answer back.
const STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// A client's share of a connection.
#[derive(Clone)]
pub struct Connection {
    requests: SendRequest<Body>,
    authority: Authority,
}

impl Connection {
    /// Connects to `url`, which is plain HTTP.
    ///
    /// # Errors
    ///
    /// A malformed URL, and a server that cannot be reached within 5 s.
    pub async fn open(url: &str) -> io::Result<Connection> {
        let malformed = |reason| io::Error::new(io::ErrorKind::InvalidInput, reason);
        let uri: Uri = url.parse().map_err(|error| malformed(format!("{error}")))?;
        let authority = uri.authority().cloned();
        let authority = authority.ok_or_else(|| malformed("it names no host".to_owned()))?;
        let address =
            (authority.host().trim_matches(['[', ']']), authority.port_u16().unwrap_or(80));
        let connecting = TcpStream::connect(address);
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer within 5 s"))??;
        stream.set_nodelay(true)?;
        let (requests, connection) = Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // When it ends, every call on it ends with its error.
        tokio::spawn(connection.map(drop));
        Ok(Connection { requests, authority })
    }

    fn uri(&self, path: Option<&PathAndQuery>) -> Uri {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path.cloned().unwrap_or(PathAndQuery::from_static("/")));
        Uri::from_parts(parts).expect("all three parts are there")
    }
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, Result<Response<Incoming>, hyper::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.requests.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        *request.uri_mut() = self.uri(request.uri().path_and_query());
        self.requests.send_request(request).boxed()
    }
}
