//! The standard gRPC health service, as load balancers and orchestrators ask it.
//!
//! It speaks of the server as a whole, which has no name, and answers that it serves for as long as
//! there is anybody to answer. Whether the cluster has a leader is what `/health` and `/readyz` tell.

use std::pin::Pin;

use futures::{Stream, StreamExt, stream};
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::status;

pub struct HealthService;

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match state_of(&request.get_ref().service) {
            ServingStatus::ServiceUnknown => Err(status::unknown_health_service()),
            state => Ok(Response::new(HealthCheckResponse { status: state.into() })),
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    /// Tells the state once and then keeps the stream open: it never changes. A service that is not
    /// known might become known, by the health protocol, and is no error here.
    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let state = state_of(&request.get_ref().service);
        let first = stream::iter([Ok(HealthCheckResponse { status: state.into() })]);
        Ok(Response::new(first.chain(stream::pending()).boxed()))
    }
}

fn state_of(service: &str) -> ServingStatus {
    if service.is_empty() { ServingStatus::Serving } else { ServingStatus::ServiceUnknown }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn about(service: &str) -> Request<HealthCheckRequest> {
        Request::new(HealthCheckRequest { service: service.to_owned() })
    }

    #[tokio::test]
    async fn only_the_server_as_a_whole_is_known() {
        let answer = HealthService.check(about("")).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
        let refused = HealthService.check(about("etcdserverpb.KV")).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::NotFound, "unknown service"));
    }

    #[tokio::test]
    async fn a_watch_tells_the_state_at_once() {
        let mut watch = HealthService.watch(about("")).await.unwrap().into_inner();
        let first = watch.next().await.unwrap().unwrap();
        assert_eq!(first.status(), ServingStatus::Serving);
    }
}
