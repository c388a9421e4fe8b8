//! What all gRPC services have in common, around the generated servers.
//!
//! On the way in, the gate turns away what is not gRPC, and calls that ask to fail without a leader
//! while there is none. On the way out it words tonic's own refusals as etcd's clients know them.
//! It allocates nothing for a call that succeeds.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::{FutureExt, Stream, StreamExt, stream};
use http::uri::PathAndQuery;
use http::{HeaderMap, Request, Response, StatusCode, header};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};
use tower::Service;

use super::status::{self, Refusal};

/// The metadata by which a caller asks to fail rather than wait when there is no leader.
const REQUIRES_LEADER: &str = "hasleader";

/// What the content type of every gRPC call begins with.
const GRPC: &[u8] = b"application/grpc";

/// A generated server `S` behind the gate.
#[derive(Clone)]
pub struct Gate<S> {
    service: S,
    // Behind an `Arc` because services are cloned for each call, and a receiver is not cheap to clone.
    has_leader: Arc<watch::Receiver<bool>>,
}

impl<S> Gate<S> {
    pub fn new(service: S, has_leader: Arc<watch::Receiver<bool>>) -> Gate<S> {
        Gate { service, has_leader }
    }
}

impl<S: NamedService> NamedService for Gate<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + NamedService,
    S::Future: Unpin,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Passage<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if !is_grpc(request.headers()) {
            return Passage::Refused(Some(not_found()));
        }
        if requires_leader(request.headers()) && !*self.has_leader.borrow() {
            return Passage::Refused(Some(Status::from(Refusal::NoLeader).into_http()));
        }
        let path = request.uri().path_and_query().cloned();
        Passage::Called { call: self.service.call(request), service: S::NAME, path }
    }
}

/// The answer of a [`Gate`], when it is there.
pub enum Passage<F> {
    Refused(Option<Response<Body>>),
    Called { call: F, service: &'static str, path: Option<PathAndQuery> },
}

impl<F> Future for Passage<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>> + Unpin,
{
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Passage::Refused(response) => {
                Poll::Ready(Ok(response.take().expect("a future is not polled after its end")))
            }
            Passage::Called { call, service, path } => {
                let response = ready!(Pin::new(call).poll(context))?;
                Poll::Ready(Ok(reworded(response, service, path.as_ref())))
            }
        }
    }
}

/// `response`, or what etcd would say instead where tonic refused the call by itself.
fn reworded(
    response: Response<Body>,
    service: &str,
    path: Option<&PathAndQuery>,
) -> Response<Body> {
    // A status among the headers means a refusal: that of an answer comes after its messages.
    if !response.headers().contains_key("grpc-status") {
        return response;
    }
    let Some(status) = Status::from_header_map(response.headers()) else { return response };
    // The generated servers answer a method they do not know with a bare code.
    let instead = if status.code() == Code::Unimplemented && status.message().is_empty() {
        path.map(|path| status::unknown_path(path.path(), Some(service)))
    } else {
        status::instead_of_tonic(&status)
    };
    instead.map_or(response, |status| status.into_http())
}

/// Answers whatever no service and no HTTP endpoint is there for.
pub async fn unknown(request: Request<axum::body::Body>) -> Response<Body> {
    if is_grpc(request.headers()) {
        status::unknown_path(request.uri().path(), None).into_http()
    } else {
        not_found()
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(GRPC))
}

fn not_found() -> Response<Body> {
    let mut response = Response::new(Body::new("404 page not found\n".to_owned()));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

/// Whether a call asks to fail rather than wait when there is no leader. The gate sees to that when
/// the call begins; a stream goes on with [`until_no_leader`].
pub fn requires_leader(headers: &HeaderMap) -> bool {
    headers.get(REQUIRES_LEADER).is_some_and(|value| value == "true")
}

/// `answers`, ended by "no leader" as soon as `has_leader` turns false.
pub fn until_no_leader<T>(
    answers: impl Stream<Item = Result<T, Status>> + Send + 'static,
    mut has_leader: watch::Receiver<bool>,
) -> impl Stream<Item = Result<T, Status>> + Send + 'static
where
    T: Send + 'static,
{
    // A closed channel means that the node is gone, and the leader with it as far as we can tell.
    let mut lost =
        async move { has_leader.wait_for(|has_leader| !has_leader).await.map(drop).ok() }
            .boxed()
            .fuse();
    let mut answers = answers.boxed().fuse();
    let mut ended = false;
    stream::poll_fn(move |context| {
        if ended {
            return Poll::Ready(None);
        }
        if lost.poll_unpin(context).is_ready() {
            ended = true;
            return Poll::Ready(Some(Err(Refusal::NoLeader.into())));
        }
        let answer = ready!(answers.poll_next_unpin(context));
        ended = answer.is_none();
        Poll::Ready(answer)
    })
}

#[cfg(test)]
mod tests {
    use tonic_health::pb::health_server::HealthServer;

    use super::*;
    use crate::api::health::HealthService;

    const CHECK: &str = "/grpc.health.v1.Health/Check";

    /// A message without content.
    const EMPTY: &str = "\0\0\0\0\0";

    /// Calls a gated health service that takes messages of at most 100 bytes.
    async fn call(leader: bool, request: http::request::Builder, body: &str) -> Response<Body> {
        let (_, has_leader) = watch::channel(leader);
        let server = HealthServer::new(HealthService).max_decoding_message_size(100);
        let request = request.method("POST").body(Body::new(body.to_owned())).unwrap();
        Gate::new(server, Arc::new(has_leader)).call(request).await.unwrap()
    }

    fn grpc(path: &str) -> http::request::Builder {
        Request::builder().uri(path).header("content-type", "application/grpc")
    }

    fn refusal(response: &Response<Body>) -> Option<(Code, String)> {
        let status = Status::from_header_map(response.headers())?;
        Some((status.code(), status.message().to_owned()))
    }

    #[tokio::test]
    async fn a_call_passes_unchanged() {
        let response = call(false, grpc(CHECK), EMPTY).await;
        assert_eq!((response.status(), refusal(&response)), (StatusCode::OK, None));
    }

    #[tokio::test]
    async fn a_refusal_of_the_service_passes_unchanged() {
        let response = call(true, grpc(CHECK), "\0\0\0\0\x03\x0a\x01x").await;
        assert_eq!(refusal(&response), Some((Code::NotFound, "unknown service".into())));
    }

    #[tokio::test]
    async fn without_a_leader_only_calls_that_require_one_are_refused() {
        let request = || grpc(CHECK).header("hasleader", "true");
        let response = call(false, request(), EMPTY).await;
        assert_eq!(refusal(&response), Some((Code::Unavailable, "etcdserver: no leader".into())));
        assert_eq!(refusal(&call(true, request(), EMPTY).await), None);
        let request = grpc(CHECK).header("hasleader", "false");
        assert_eq!(refusal(&call(false, request, EMPTY).await), None);
    }

    #[tokio::test]
    async fn an_unknown_method_is_named() {
        let response = call(true, grpc("/grpc.health.v1.Health/Nope"), EMPTY).await;
        let text = "unknown method Nope for service grpc.health.v1.Health";
        assert_eq!(refusal(&response), Some((Code::Unimplemented, text.into())));
    }

    #[tokio::test]
    async fn a_message_above_the_limit_is_refused_as_the_go_library_does() {
        let response = call(true, grpc(CHECK), "\0\0\0\x01\x01").await;
        let text = "grpc: received message larger than max (257 vs. 100)";
        assert_eq!(refusal(&response), Some((Code::ResourceExhausted, text.into())));
    }

    #[tokio::test]
    async fn undecodable_bytes_are_an_internal_error() {
        let response = call(true, grpc(CHECK), "\0\0\0\0\x01\x0a").await;
        assert_eq!(refusal(&response).map(|(code, _)| code), Some(Code::Internal));
    }

    #[tokio::test]
    async fn what_is_not_grpc_is_not_found() {
        let request = Request::builder().uri(CHECK).header("content-type", "application/json");
        let response = call(true, request, "{}").await;
        assert_eq!((response.status(), refusal(&response)), (StatusCode::NOT_FOUND, None));
    }

    #[tokio::test]
    async fn a_path_without_a_service_is_answered_in_kind() {
        let request = |request: http::request::Builder| {
            request.body(axum::body::Body::empty()).expect("the request is well formed")
        };
        let response = unknown(request(grpc("/a.B/C"))).await;
        assert_eq!(refusal(&response), Some((Code::Unimplemented, "unknown service a.B".into())));
        let response = unknown(request(Request::builder().uri("/v2/keys"))).await;
        assert_eq!((response.status(), refusal(&response)), (StatusCode::NOT_FOUND, None));
    }

    #[tokio::test]
    async fn a_stream_ends_when_the_leader_is_lost() {
        let (leader, has_leader) = watch::channel(true);
        let answers = stream::iter([Ok(1)]).chain(stream::pending());
        let mut answers = Box::pin(until_no_leader(answers, has_leader));
        assert_eq!(answers.next().await.unwrap().unwrap(), 1);
        assert!(futures::poll!(answers.next()).is_pending());
        leader.send_replace(false);
        let end = answers.next().await.unwrap().unwrap_err();
        assert_eq!((end.code(), end.message()), (Code::Unavailable, "etcdserver: no leader"));
        assert!(answers.next().await.is_none());
    }

    #[tokio::test]
    async fn a_stream_that_ends_by_itself_ends_well() {
        let (_leader, has_leader) = watch::channel(true);
        let answers = until_no_leader(stream::iter([Ok::<_, Status>(1)]), has_leader);
        let answers: Vec<_> = answers.map(Result::unwrap).collect().await;
        assert_eq!(answers, [1]);
    }
}
