//! Which service a call goes to: the path of a gRPC call names it. All else is plain HTTP.
//!
//! A router of patterns would do the same, but looks each path up among all it knows, and boxes the
//! call and its bodies once more: a twentieth of what a small call costs here.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::Router;
use axum::routing::future::RouteFuture;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use tonic::body::Body;
use tonic::codegen::StdError;
use tower::Service;

use super::gate::{Answer, Passage};

/// A call on its way through a gated service. All generated servers return the same type.
pub type GatedCall = Passage<BoxFuture<'static, Result<Response<Body>, Infallible>>>;

/// The gRPC services of a port.
pub trait Services: Send + Sync + 'static {
    /// Hands `request` to the service `name`, or back when there is none.
    fn call(&self, name: &str, request: Request<Body>) -> Result<GatedCall, Box<Request<Body>>>;
}

/// Everything on a port, as a server takes it.
pub struct Dispatch<S> {
    services: Arc<S>,
    http: Router,
}

impl<S> Dispatch<S> {
    pub fn new(services: S, http: Router) -> Dispatch<S> {
        Dispatch { services: Arc::new(services), http }
    }
}

// Derived, it would ask the same of the services.
impl<S> Clone for Dispatch<S> {
    fn clone(&self) -> Dispatch<S> {
        Dispatch { services: self.services.clone(), http: self.http.clone() }
    }
}

/// The name of the service in `/SERVICE/METHOD`.
fn service_name(path: &str) -> Option<&str> {
    path.strip_prefix('/')?.split_once('/').map(|(service, _)| service)
}

impl<S: Services> Service<Request<Body>> for Dispatch<S> {
    type Response = Response<Sent>;
    type Error = Infallible;
    type Future = Way;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Neither the generated servers nor the router are ever busy.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Way {
        // Cheap to clone, and what is borrowed from the request could not go along with it.
        let uri = request.uri().clone();
        let called = match service_name(uri.path()) {
            Some(name) => self.services.call(name, request),
            None => Err(Box::new(request)),
        };
        match called {
            Ok(call) => Way::Grpc(call),
            Err(request) => {
                let request = request.map(axum::body::Body::new);
                Way::Http(Box::pin(self.http.call(request)))
            }
        }
    }
}

/// The answer of a [`Dispatch`], when it is there.
pub enum Way {
    Grpc(GatedCall),
    Http(Pin<Box<RouteFuture<Infallible>>>),
}

impl Future for Way {
    type Output = Result<Response<Sent>, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match self.get_mut() {
            Way::Grpc(call) => ready!(Pin::new(call).poll(context)).map(|it| it.map(Sent::Grpc)),
            Way::Http(call) => ready!(call.as_mut().poll(context)).map(|it| it.map(Sent::Http)),
        })
    }
}

/// What is sent in answer to a call.
pub enum Sent {
    Grpc(Answer),
    Http(axum::body::Body),
}

impl http_body::Body for Sent {
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StdError>>> {
        Poll::Ready(match self.get_mut() {
            Sent::Grpc(body) => {
                ready!(Pin::new(body).poll_frame(context)).map(|frame| frame.map_err(Into::into))
            }
            Sent::Http(body) => {
                ready!(Pin::new(body).poll_frame(context)).map(|frame| frame.map_err(Into::into))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Sent::Grpc(body) => body.is_end_stream(),
            Sent::Http(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Sent::Grpc(body) => body.size_hint(),
            Sent::Http(body) => body.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::service_name;

    #[test]
    fn only_a_path_of_two_parts_names_a_service() {
        assert_eq!(service_name("/etcdserverpb.KV/Put"), Some("etcdserverpb.KV"));
        assert_eq!(service_name("/etcdserverpb.KV/Put/more"), Some("etcdserverpb.KV"));
        assert_eq!(service_name("/etcdserverpb.KV"), None);
        assert_eq!(service_name("*"), None);
        assert_eq!(service_name(""), None);
    }
}
