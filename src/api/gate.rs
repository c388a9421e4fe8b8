//! What all gRPC services have in common, around the generated servers.
//!
//! On the way in, the gate turns away what is not gRPC, and calls that ask to fail without a leader
//! while there is none; streams that ask for it are ended when the leader is lost. On a learner it
//! turns away nearly everything. On the way out it
//! words tonic's own refusals as etcd's clients know them. It counts the calls and their messages.

use std::convert::Infallible;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::uri::PathAndQuery;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body::{Frame, SizeHint};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};
use tower::Service;

use super::calls::{Call, Calls, Frames, Receiver, code_of};
use super::status::{self, Refusal};

/// The metadata by which a caller asks to fail rather than wait when there is no leader.
const REQUIRES_LEADER: &str = "hasleader";

/// What the content type of every gRPC call begins with.
const GRPC: &[u8] = b"application/grpc";

/// What a learner answers, as in etcd. Of ranges only serializable ones, which `kv.rs` sees to.
const OPEN_TO_LEARNERS: [&str; 3] = [
    "/etcdserverpb.KV/Range",
    "/etcdserverpb.Maintenance/Status",
    "/etcdserverpb.Maintenance/Snapshot",
];

/// A generated server `S` behind the gate.
#[derive(Clone)]
pub struct Gate<S> {
    service: S,
    // Behind an `Arc` because services are cloned for each call, and a receiver is not cheap to clone.
    keeper: Arc<Keeper>,
    methods: Range<usize>,
}

/// What the gates of all services share.
pub struct Keeper {
    pub has_leader: watch::Receiver<bool>,
    /// Whether this member is a learner.
    pub learner: watch::Receiver<bool>,
    pub calls: Arc<Calls>,
}

impl<S: NamedService> Gate<S> {
    pub fn new(service: S, keeper: Arc<Keeper>) -> Gate<S> {
        let methods = keeper.calls.service(S::NAME);
        Gate { service, keeper, methods }
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
    type Response = Response<Answer>;
    type Error = Infallible;
    type Future = Passage<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if !is_grpc(request.headers()) {
            return Passage::Refused(Some(not_found()));
        }
        let path = request.uri().path();
        let call = self.keeper.calls.begin(self.methods.clone(), path, request.headers());
        if *self.keeper.learner.borrow() && !OPEN_TO_LEARNERS.contains(&path) {
            return refused(call, Refusal::Learner);
        }
        let mut lost = None;
        if requires_leader(request.headers()) {
            let has_leader = &self.keeper.has_leader;
            if !*has_leader.borrow() {
                return refused(call, Refusal::NoLeader);
            }
            lost = call
                .as_ref()
                .is_some_and(|call| call.shape().is_stream())
                .then(|| leader_lost(has_leader.clone()));
        }
        let path = request.uri().path_and_query().cloned();
        let request = match &call {
            Some(call) => {
                let receiver = call.receiver();
                request.map(|body| Body::new(Question { body, receiver }))
            }
            None => request,
        };
        Passage::Called { answer: self.service.call(request), service: S::NAME, path, call, lost }
    }
}

fn refused<F>(mut call: Option<Call>, refusal: Refusal) -> Passage<F> {
    let status = Status::from(refusal);
    if let Some(call) = &mut call {
        call.end(status.code());
    }
    Passage::Refused(Some(status.into_http()))
}

/// Ready once the leader is lost.
type Lost = BoxFuture<'static, ()>;

fn leader_lost(mut has_leader: watch::Receiver<bool>) -> Lost {
    // A closed channel means that the node is gone, and the leader with it as far as we can tell.
    async move {
        let _ = has_leader.wait_for(|has_leader| !has_leader).await;
    }
    .boxed()
}

/// The answer of a [`Gate`], when it is there.
pub enum Passage<F> {
    Refused(Option<Response<Body>>),
    Called {
        answer: F,
        service: &'static str,
        path: Option<PathAndQuery>,
        /// `None` for a method that does not exist.
        call: Option<Call>,
        /// For a stream that is to end with the leader.
        lost: Option<Lost>,
    },
}

impl<F> Future for Passage<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>> + Unpin,
{
    type Output = Result<Response<Answer>, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Passage::Refused(response) => {
                let response = response.take().expect("a future is not polled after its end");
                Poll::Ready(Ok(response.map(Answer::uncounted)))
            }
            Passage::Called { answer, service, path, call, lost } => {
                let response = if is_ready(lost, context) {
                    Status::from(Refusal::NoLeader).into_http()
                } else {
                    let response = ready!(Pin::new(answer).poll(context))?;
                    reworded(response, service, path.as_ref())
                };
                let (mut call, mut lost) = (call.take(), lost.take());
                // A status among the headers means a refusal: that of an answer comes after its
                // messages.
                if let Some(code) = code_of(response.headers()) {
                    lost = None;
                    if let Some(call) = &mut call {
                        call.end(code);
                    }
                }
                let frames = Frames::default();
                Poll::Ready(Ok(response.map(|body| Answer { body, call, frames, lost })))
            }
        }
    }
}

fn is_ready(lost: &mut Option<Lost>, context: &mut Context<'_>) -> bool {
    lost.as_mut().is_some_and(|lost| lost.poll_unpin(context).is_ready())
}

/// What the client sends in a call.
struct Question {
    body: Body,
    receiver: Receiver,
}

impl http_body::Body for Question {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            this.receiver.pass(data);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What the server sends in a call: the messages, and the status at the end.
pub struct Answer {
    body: Body,
    call: Option<Call>,
    frames: Frames,
    lost: Option<Lost>,
}

impl Answer {
    fn uncounted(body: Body) -> Answer {
        Answer { body, call: None, frames: Frames::default(), lost: None }
    }

    fn end(&mut self, code: Code) {
        self.lost = None;
        if let Some(call) = &mut self.call {
            call.end(code);
        }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if is_ready(&mut this.lost, context) {
            this.body = Body::empty();
            let status = Status::from(Refusal::NoLeader);
            this.end(status.code());
            let mut trailers = HeaderMap::new();
            return Poll::Ready(Some(match status.add_header(&mut trailers) {
                Ok(()) => Ok(Frame::trailers(trailers)),
                Err(unprintable) => Err(unprintable),
            }));
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(data), Some(call)) = (frame.data_ref(), &this.call) {
                    call.sent(this.frames.pass(data));
                }
                if let Some(trailers) = frame.trailers_ref() {
                    this.end(code_of(trailers).unwrap_or(Code::Unknown));
                }
            }
            Some(Err(status)) => this.end(status.code()),
            None => this.end(Code::Unknown),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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

/// Whether a call asks to fail rather than wait when there is no leader.
fn requires_leader(headers: &HeaderMap) -> bool {
    headers.get(REQUIRES_LEADER).is_some_and(|value| value == "true")
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tonic_health::pb::health_server::HealthServer;

    use super::*;
    use crate::api::health::HealthService;
    use crate::clock::ManualClock;
    use crate::metrics::Page;

    const CHECK: &str = "/grpc.health.v1.Health/Check";
    const WATCH: &str = "/grpc.health.v1.Health/Watch";

    /// A message without content.
    const EMPTY: &str = "\0\0\0\0\0";

    struct Fixture {
        leader: watch::Sender<bool>,
        calls: Arc<Calls>,
    }

    impl Fixture {
        fn new(leader: bool) -> Fixture {
            let calls = Arc::new(Calls::new(Arc::new(ManualClock::default()), false));
            Fixture { leader: watch::Sender::new(leader), calls }
        }

        /// Calls a gated health service that takes messages of at most 100 bytes.
        async fn call(&self, request: http::request::Builder, body: &str) -> Response<Answer> {
            let keeper = Keeper {
                has_leader: self.leader.subscribe(),
                learner: watch::channel(false).1,
                calls: self.calls.clone(),
            };
            let server = HealthServer::new(HealthService).max_decoding_message_size(100);
            let request = request.method("POST").body(Body::new(body.to_owned())).unwrap();
            Gate::new(server, Arc::new(keeper)).call(request).await.unwrap()
        }

        /// The counts of the health service that are not zero.
        fn counted(&self) -> Vec<String> {
            let mut page = Page::default();
            self.calls.write(&mut page);
            let text = page.into_text();
            let lines = text.lines().filter(|line| !line.starts_with('#') && !line.ends_with(" 0"));
            lines
                .map(|line| {
                    line.replace(",grpc_service=\"grpc.health.v1.Health\"", "")
                        .replace(['"', '{', '}'], " ")
                        .replace("grpc_", "")
                })
                .collect()
        }
    }

    async fn call(leader: bool, request: http::request::Builder, body: &str) -> Response<Answer> {
        Fixture::new(leader).call(request, body).await
    }

    fn grpc(path: &str) -> http::request::Builder {
        Request::builder().uri(path).header("content-type", "application/grpc")
    }

    fn refusal<B>(response: &Response<B>) -> Option<(Code, String)> {
        let status = Status::from_header_map(response.headers())?;
        Some((status.code(), status.message().to_owned()))
    }

    /// The frames of an answer.
    fn frames(
        response: Response<Answer>,
    ) -> impl futures::Stream<Item = Result<Frame<Bytes>, Status>> + Unpin {
        let mut body = response.into_body();
        futures::stream::poll_fn(move |context| {
            http_body::Body::poll_frame(Pin::new(&mut body), context)
        })
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
    async fn a_stream_that_requires_a_leader_ends_when_it_is_lost() {
        let fixture = Fixture::new(true);
        let requiring = fixture.call(grpc(WATCH).header("hasleader", "true"), EMPTY).await;
        let mut requiring = frames(requiring);
        let mut other = frames(fixture.call(grpc(WATCH), EMPTY).await);
        assert!(requiring.next().await.unwrap().unwrap().is_data());
        assert!(other.next().await.unwrap().unwrap().is_data());
        assert!(futures::poll!(requiring.next()).is_pending());

        fixture.leader.send_replace(false);
        let trailers = requiring.next().await.unwrap().unwrap().into_trailers().unwrap();
        let status = Status::from_header_map(&trailers).unwrap();
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));
        assert!(requiring.next().await.is_none());
        assert!(futures::poll!(other.next()).is_pending(), "it did not ask for it");
    }

    #[tokio::test]
    async fn a_call_is_counted_when_its_answer_has_ended() {
        let fixture = Fixture::new(true);
        let mut answer = frames(fixture.call(grpc(CHECK), EMPTY).await);
        let begun = fixture.counted();
        assert!(begun.iter().all(|line| !line.starts_with("server_handled")), "{begun:?}");
        while answer.next().await.is_some() {}
        assert_eq!(
            fixture.counted(),
            [
                "etcd_network_client_sent_bytes_total 2",
                "server_started_total method= Check ,type= unary   1",
                "server_msg_received_total method= Check ,type= unary   1",
                "server_msg_sent_total method= Check ,type= unary   1",
                "server_handled_total code= OK ,method= Check ,type= unary   1",
            ]
        );
    }

    #[tokio::test]
    async fn refusals_and_broken_off_streams_are_counted_as_what_they_are() {
        let fixture = Fixture::new(false);
        fixture.call(grpc(CHECK), "\0\0\0\0\x03\x0a\x01x").await;
        fixture.call(grpc(CHECK).header("hasleader", "true"), EMPTY).await;
        drop(fixture.call(grpc(WATCH), EMPTY).await);
        let handled = fixture.counted();
        let handled: Vec<_> =
            handled.iter().filter_map(|line| line.strip_prefix("server_handled_total ")).collect();
        assert_eq!(
            handled,
            [
                "code= NotFound ,method= Check ,type= unary   1",
                "code= Unavailable ,method= Check ,type= unary   1",
                "code= Canceled ,method= Watch ,type= server_stream   1",
            ]
        );
    }
}
