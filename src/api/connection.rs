//! What a call may know of the connection that it came over: who is at the other end, and whether
//! it still lives.
//!
//! The server wraps each stream that it accepts in [`Tracked`]; tonic then hands a [`Connection`] to
//! every call on it. The life ends when the stream is dropped, however the connection ended. A peer
//! that falls silent is found out by the keep-alive of the transport.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tonic::transport::server::Connected;

/// The connection of a call. Nothing is known of one that did not come through [`Tracked`].
#[derive(Debug, Clone, Default)]
pub struct Connection {
    pub peer: Option<SocketAddr>,
    /// Closed when the connection is.
    pub life: Option<watch::Receiver<()>>,
}

impl Connection {
    pub fn of(extensions: &http::Extensions) -> Connection {
        extensions.get::<Connection>().cloned().unwrap_or_default()
    }

    /// The other end as text; empty when it is not known.
    pub fn peer_text(&self) -> String {
        self.peer.map(|peer| peer.to_string()).unwrap_or_default()
    }
}

/// A stream whose end its calls can see.
pub struct Tracked<S = TcpStream> {
    stream: S,
    connection: Connection,
    /// Dropped with the stream.
    _alive: watch::Sender<()>,
}

impl Tracked {
    pub fn new(stream: TcpStream) -> Tracked {
        let peer = stream.peer_addr().ok();
        Tracked::from_peer(stream, peer)
    }
}

impl<S> Tracked<S> {
    /// A stream of whatever kind that came from `peer`.
    pub fn from_peer(stream: S, peer: Option<SocketAddr>) -> Tracked<S> {
        let (alive, life) = watch::channel(());
        let connection = Connection { peer, life: Some(life) };
        Tracked { stream, connection, _alive: alive }
    }
}

impl<S> Connected for Tracked<S> {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Tracked<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tracked<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_life_ends_with_its_stream_and_not_with_a_call() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let client = client.unwrap();
        let tracked = Tracked::new(accepted.unwrap().0);
        let mut extensions = http::Extensions::new();
        extensions.insert(tracked.connect_info());
        let connection = Connection::of(&extensions);
        assert_eq!(connection.peer_text(), client.local_addr().unwrap().to_string());
        let mut life = connection.life.unwrap();
        drop(extensions);
        assert!(futures::poll!(Box::pin(life.changed())).is_pending());
        drop(tracked);
        life.changed().await.unwrap_err();
        assert_eq!(Connection::of(&http::Extensions::new()).peer_text(), "");
    }
}
