//! Calls that the etcd-client crate cannot make or whose metadata it hides: messages of our own
//! making through tonic, and bytes of our own making through h2.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use tokio::net::TcpStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

/// Only the fields that tests look at; a decoder passes over the others.
#[derive(Clone, PartialEq, Message)]
pub struct Header {
    #[prost(int64, tag = "3")]
    pub revision: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct LockRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    #[prost(int64, tag = "2")]
    pub lease: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct LockResponse {
    #[prost(message, optional, tag = "1")]
    pub header: Option<Header>,
    #[prost(bytes = "vec", tag = "2")]
    pub key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct UnlockRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct UnlockResponse {
    #[prost(message, optional, tag = "1")]
    pub header: Option<Header>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    #[prost(int32, tag = "5")]
    pub sort_order: i32,
    #[prost(int32, tag = "6")]
    pub sort_target: i32,
}

/// Stands for any answer of which only success matters.
#[derive(Clone, PartialEq, Message)]
pub struct AnyResponse {}

#[derive(Clone, PartialEq, Message)]
pub struct KeepAliveRequest {
    #[prost(int64, tag = "1")]
    pub id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct KeepAliveResponse {
    #[prost(int64, tag = "2")]
    pub id: i64,
    #[prost(int64, tag = "3")]
    pub ttl: i64,
}

/// A connection to one member.
pub async fn channel(endpoint: &str) -> Channel {
    let endpoint = Endpoint::from_shared(endpoint.to_owned()).expect("a URL");
    endpoint.connect().await.expect("the member listens")
}

/// As [`channel`], of a client that takes no more than `bytes` before it has read them: what it does
/// not read is the member's affair.
///
/// # Errors
///
/// If the member does not listen.
pub async fn narrow_channel(endpoint: &str, bytes: u32) -> Result<Channel, Status> {
    let endpoint = Endpoint::from_shared(endpoint.to_owned()).expect("a URL");
    let endpoint = endpoint.initial_stream_window_size(bytes).initial_connection_window_size(bytes);
    endpoint.connect().await.map_err(|e| Status::unavailable(e.to_string()))
}

/// As [`channel`], connected when first used.
pub fn lazy_channel(endpoint: &str) -> Channel {
    Endpoint::from_shared(endpoint.to_owned()).expect("a URL").connect_lazy()
}

/// A client that takes answers of any size.
async fn client(channel: &Channel) -> Result<tonic::client::Grpc<Channel>, Status> {
    let grpc = tonic::client::Grpc::new(channel.clone());
    let mut grpc = grpc.max_decoding_message_size(usize::MAX);
    grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    Ok(grpc)
}

/// One unary call of `/PACKAGE.SERVICE/METHOD`.
pub async fn unary<Q, A>(channel: &Channel, path: &str, request: Q) -> Result<Response<A>, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    unary_with(channel, path, Request::new(request)).await
}

/// As [`unary`], with metadata or a deadline on the request.
pub async fn unary_with<Q, A>(
    channel: &Channel,
    path: &str,
    request: Request<Q>,
) -> Result<Response<A>, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let mut grpc = client(channel).await?;
    let path = PathAndQuery::try_from(path).expect("a path");
    grpc.unary(request, path, tonic_prost::ProstCodec::<Q, A>::default()).await
}

/// Opens a stream in both directions.
pub async fn streaming<Q, A>(
    channel: &Channel,
    path: &str,
    requests: impl tokio_stream::Stream<Item = Q> + Send + 'static,
) -> Result<Streaming<A>, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    streaming_with(channel, path, Request::new(requests)).await
}

/// As [`streaming`], with metadata on the request.
pub async fn streaming_with<Q, A>(
    channel: &Channel,
    path: &str,
    requests: Request<impl tokio_stream::Stream<Item = Q> + Send + 'static>,
) -> Result<Streaming<A>, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let mut grpc = client(channel).await?;
    let path = PathAndQuery::try_from(path).expect("a path");
    let codec = tonic_prost::ProstCodec::<Q, A>::default();
    Ok(grpc.streaming(requests, path, codec).await?.into_inner())
}

/// Sends one request and opens the stream of its answers.
pub async fn server_streaming<Q, A>(
    channel: &Channel,
    path: &str,
    request: Q,
) -> Result<Streaming<A>, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let mut grpc = client(channel).await?;
    let path = PathAndQuery::try_from(path).expect("a path");
    let codec = tonic_prost::ProstCodec::<Q, A>::default();
    Ok(grpc.server_streaming(Request::new(request), path, codec).await?.into_inner())
}

/// A metadata value of an answer, as text.
pub fn metadata<A>(response: &Response<A>, name: &str) -> Option<String> {
    let value = response.metadata().get(name)?;
    Some(value.to_str().expect("printable").to_owned())
}

/// The status that a gRPC call ended with, read from headers or trailers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawStatus {
    pub code: i32,
    pub message: String,
}

/// An HTTP/2 connection that takes any bytes as the body of a gRPC call.
#[derive(Debug)]
pub struct RawConnection {
    sender: h2::client::SendRequest<Bytes>,
    authority: String,
}

/// A call of which the server knows only that it has begun.
#[derive(Debug)]
pub struct HalfOpen {
    _response: h2::client::ResponseFuture,
    _stream: h2::SendStream<Bytes>,
}

impl RawConnection {
    /// Connects to a port of 127.0.0.1.
    pub async fn open(port: u16) -> RawConnection {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("the member listens");
        // Wide enough that h2's guard against small frames, which follows the connection's window,
        // is not the first thing that a test with very many answers meets.
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(1 << 20).initial_connection_window_size(64 << 20);
        let (sender, connection) = builder.handshake(stream).await.expect("HTTP/2");
        tokio::spawn(async move {
            // The end of the connection shows in the calls that use it.
            let _ = connection.await;
        });
        RawConnection { sender, authority: format!("127.0.0.1:{port}") }
    }

    /// Calls a stream method and sends `message` so many times, each in a DATA frame of its own as Go's
    /// clients do, as fast as they are taken, while it reads as many answers. Gives how many came.
    ///
    /// # Errors
    ///
    /// If the connection or the stream breaks before.
    pub async fn burst(
        &mut self,
        path: &str,
        message: &[u8],
        times: usize,
    ) -> Result<usize, h2::Error> {
        let request = self.head(path).body(()).expect("a well-formed request");
        let mut sender = self.sender.clone().ready().await?;
        let (response, mut stream) = sender.send_request(request, false)?;
        let frame = grpc_frame(message);
        let sending = async {
            for n in 0..times {
                stream.reserve_capacity(frame.len());
                while stream.capacity() < frame.len() {
                    let capacity = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
                    if !matches!(capacity, Some(Ok(_))) {
                        // Why it broke is what the other half is told.
                        return;
                    }
                }
                if stream.send_data(frame.clone(), n + 1 == times).is_err() {
                    return;
                }
                if n % 64 == 0 {
                    tokio::task::yield_now().await;
                }
            }
        };
        let receiving = async {
            let mut body = response.await?.into_body();
            let (mut answers, mut unread) = (0, BytesMut::new());
            while let Some(piece) = body.data().await {
                let piece = piece?;
                body.flow_control().release_capacity(piece.len())?;
                unread.extend_from_slice(&piece);
                while let Some(length) = unread.get(1..5) {
                    let length = u32::from_be_bytes(length.try_into().expect("four")) as usize;
                    if unread.len() < 5 + length {
                        break;
                    }
                    unread.advance(5 + length);
                    answers += 1;
                }
            }
            Ok(answers)
        };
        tokio::join!(sending, receiving).1
    }

    /// Begins a call and sends nothing but its head. It stays open for as long as the result lives.
    ///
    /// # Errors
    ///
    /// If the connection takes no more calls.
    pub async fn half_open(&mut self, path: &str) -> Result<HalfOpen, h2::Error> {
        let request = self.head(path).body(()).expect("a well-formed request");
        let mut sender = self.sender.clone().ready().await?;
        let (response, stream) = sender.send_request(request, false)?;
        Ok(HalfOpen { _response: response, _stream: stream })
    }

    fn head(&self, path: &str) -> http::request::Builder {
        http::Request::post(format!("http://{}{path}", self.authority))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
    }

    /// Sends `body` as it is and reads until the call has a status.
    ///
    /// # Errors
    ///
    /// If the connection or the stream breaks without one.
    pub async fn call(&mut self, path: &str, body: Bytes) -> Result<RawStatus, h2::Error> {
        self.call_with(path, &[], body).await
    }

    /// As [`RawConnection::call`], with more headers.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn call_with(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<RawStatus, h2::Error> {
        let mut request = self.head(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(()).expect("a well-formed request");
        let mut sender = self.sender.clone().ready().await?;
        let (response, mut stream) = sender.send_request(request, false)?;
        let sending = async {
            let mut left = body;
            loop {
                stream.reserve_capacity(left.len().max(1));
                let Some(Ok(granted)) = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await
                else {
                    // Reset by the server, whose answer says why.
                    return;
                };
                let piece = left.split_to(granted.min(left.len()));
                let last = left.is_empty();
                if stream.send_data(piece, last).is_err() || last {
                    return;
                }
            }
        };
        let receiving = async {
            let (head, mut body) = response.await?.into_parts();
            while let Some(piece) = body.data().await {
                let size = piece?.len();
                body.flow_control().release_capacity(size)?;
            }
            let trailers = body.trailers().await?.unwrap_or_default();
            Ok(status_from(&head.headers).or_else(|| status_from(&trailers)).unwrap_or_else(|| {
                RawStatus { code: -1, message: format!("no grpc-status, HTTP {}", head.status) }
            }))
        };
        tokio::pin!(sending, receiving);
        tokio::select! {
            status = &mut receiving => status,
            () = &mut sending => receiving.await,
        }
    }
}

fn status_from(headers: &http::HeaderMap) -> Option<RawStatus> {
    let code = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    let message = headers.get("grpc-message").map(|m| percent_decoded(m.as_bytes()));
    Some(RawStatus { code, message: message.unwrap_or_default() })
}

fn percent_decoded(text: &[u8]) -> String {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|h| std::str::from_utf8(h).ok());
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(byte) if *first == b'%' => {
                out.push(byte);
                rest = &tail[2..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A gRPC frame around `message`: not compressed, and of the length it has.
pub fn grpc_frame(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).expect("tests send less than 4 GiB"));
    frame.put_slice(message);
    frame.freeze()
}

/// How long a raw call may take before the test fails.
pub const RAW_CALL: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::percent_decoded;

    #[test]
    fn a_status_message_is_percent_decoded() {
        assert_eq!(percent_decoded(b"a%20b%3A 100%"), "a b: 100%");
    }
}
