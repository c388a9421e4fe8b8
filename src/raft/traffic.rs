//! What goes between this member and each other one, counted on both sides of every call.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

use super::links;
use crate::metrics::{Counter, Histogram, ROUND_TRIP_BOUNDS_US};
use crate::types::MemberId;

/// What went to and came from one other member. Bytes are those of messages with their frames, not
/// of HTTP's headers.
#[derive(Debug)]
pub struct PeerTraffic {
    pub sent_bytes: Counter,
    pub received_bytes: Counter,
    /// Calls of ours that broke, or never got there.
    pub sent_failures: Counter,
    /// From a heartbeat to its answer. Only a leader has some.
    pub round_trip: Histogram,
}

/// The traffic with the members that were met and not removed since, in order of id.
#[derive(Debug, Default)]
pub struct Traffic {
    peers: Mutex<BTreeMap<MemberId, Arc<PeerTraffic>>>,
}

impl Traffic {
    pub fn with(&self, peer: MemberId) -> Arc<PeerTraffic> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            Arc::new(PeerTraffic {
                sent_bytes: Counter::default(),
                received_bytes: Counter::default(),
                sent_failures: Counter::default(),
                round_trip: Histogram::new(ROUND_TRIP_BOUNDS_US),
            })
        };
        peers.entry(peer).or_insert_with(new).clone()
    }

    /// Forgets the members that `stays` is false for.
    pub fn retain(&self, stays: impl Fn(MemberId) -> bool) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|id, _| stays(*id));
    }

    pub fn all(&self) -> Vec<(MemberId, Arc<PeerTraffic>)> {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.iter().map(|(id, traffic)| (*id, traffic.clone())).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Out,
    In,
}

/// A body on its way to or from a peer.
struct Counted {
    body: Body,
    traffic: Arc<PeerTraffic>,
    way: Way,
    /// Whether this is the answer to a call of ours.
    is_answer: bool,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
                match this.way {
                    Way::Out => this.traffic.sent_bytes.add(bytes),
                    Way::In => this.traffic.received_bytes.add(bytes),
                }
            }
            Some(Err(_)) if this.is_answer => this.traffic.sent_failures.increment(),
            Some(Err(_)) | None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// A channel to one peer.
#[derive(Clone)]
pub struct Outgoing<S> {
    service: S,
    traffic: Arc<PeerTraffic>,
}

impl<S> Outgoing<S> {
    pub fn new(service: S, traffic: Arc<PeerTraffic>) -> Outgoing<S> {
        Outgoing { service, traffic }
    }
}

impl<S> Service<Request<Body>> for Outgoing<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let traffic = self.traffic.clone();
        let call = self.service.call(request.map(|body| {
            let traffic = traffic.clone();
            Body::new(Counted { body, traffic, way: Way::Out, is_answer: false })
        }));
        call.map(move |answer| match answer {
            Ok(response) => Ok(response
                .map(|body| Body::new(Counted { body, traffic, way: Way::In, is_answer: true }))),
            Err(error) => {
                traffic.sent_failures.increment();
                Err(error)
            }
        })
        .boxed()
    }
}

/// A service that peers call.
#[derive(Clone)]
pub struct Incoming<S> {
    service: S,
    traffic: Arc<Traffic>,
}

impl<S> Incoming<S> {
    pub fn new(service: S, traffic: Arc<Traffic>) -> Incoming<S> {
        Incoming { service, traffic }
    }
}

impl<S: NamedService> NamedService for Incoming<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Incoming<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Some(caller) = caller(request.headers()) else {
            return self.service.call(request).boxed();
        };
        let traffic = self.traffic.with(caller);
        let call = self.service.call(request.map(|body| {
            let traffic = traffic.clone();
            Body::new(Counted { body, traffic, way: Way::In, is_answer: false })
        }));
        call.map(move |answer| {
            answer.map(|response| {
                response.map(|body| {
                    Body::new(Counted { body, traffic, way: Way::Out, is_answer: false })
                })
            })
        })
        .boxed()
    }
}

fn caller(headers: &HeaderMap) -> Option<MemberId> {
    headers.get(links::ORIGIN_KEY)?.to_str().ok()?.parse().ok().map(MemberId)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::StreamExt;
    use http_body::Body as _;

    use super::*;

    fn body(text: &'static str) -> Body {
        Body::new(text.to_owned())
    }

    async fn read(body: Body) -> usize {
        let mut body = Box::pin(body);
        let frames = futures::stream::poll_fn(move |context| body.as_mut().poll_frame(context));
        frames.map(|frame| frame.unwrap().into_data().map_or(0, |data| data.len())).count().await
    }

    async fn answer(request: Request<Body>) -> Result<Response<Body>, Infallible> {
        read(request.into_body()).await;
        Ok(Response::new(body("four")))
    }

    #[tokio::test]
    async fn both_ends_of_a_call_count_what_goes_each_way() {
        let (here, there) = (Traffic::default(), Arc::new(Traffic::default()));
        let served = Incoming::new(tower::service_fn(answer), there.clone());
        let mut channel = Outgoing::new(served, here.with(MemberId(2)));
        let request = Request::builder().header(links::ORIGIN_KEY, "1");
        let response = channel.call(request.body(body("sixsix")).unwrap()).await.unwrap();
        read(response.into_body()).await;
        let counts =
            |traffic: &PeerTraffic| (traffic.sent_bytes.get(), traffic.received_bytes.get());
        assert_eq!(counts(&here.with(MemberId(2))), (6, 4));
        assert_eq!(counts(&there.with(MemberId(1))), (4, 6));
        assert_eq!(there.all().len(), 1);
    }

    #[tokio::test]
    async fn a_call_that_does_not_get_there_is_a_failure() {
        let traffic = Traffic::default().with(MemberId(2));
        let refused =
            tower::service_fn(|_: Request<Body>| async { Err::<Response<Body>, _>("no") });
        let mut channel = Outgoing::new(refused, traffic.clone());
        channel.call(Request::new(body("x"))).await.unwrap_err();
        assert_eq!(traffic.sent_failures.get(), 1);
    }
}
