//! The service Lock.

use bytes::Bytes;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::concurrency::Queues;
use crate::concurrency::client::{self, ConnectionLife, EnterFailure, Granted};
use crate::concurrency::rules::{Lease0, Rules};
use crate::pb::v3lockpb::lock_server::Lock;
use crate::pb::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse};
use crate::types::LeaseId;

use super::connection::Connection;
use super::status::{self, Refusal, as_unknown};
use super::{callers, header};

/// Metadata of an answer: the lease behind the key, its TTL in seconds, and the fencing token.
const LEASE_ID: &str = "holdfast-lease-id";
const LEASE_TTL: &str = "holdfast-lease-ttl";
const FENCE: &str = "holdfast-fence";
/// Whether an Unlock deleted a key.
const RELEASED: &str = "holdfast-released";

pub struct LockService {
    queues: Queues,
}

impl LockService {
    pub fn new(queues: Queues) -> LockService {
        LockService { queues }
    }
}

#[tonic::async_trait]
impl Lock for LockService {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        let keep_while = lease0_life(self.queues.rules, &request);
        let caller = callers::caller(&self.queues.node, request.metadata()).await;
        let caller = caller.map_err(as_unknown)?;
        let request = request.into_inner();
        let enter = client::Request {
            caller,
            name: request.name,
            lease: LeaseId(request.lease),
            value: Bytes::new(),
            rewrite: false,
            keep_while,
            own: None,
        };
        let granted =
            client::enter(&self.queues, enter).await.map_err(|failure| match failure {
                EnterFailure::Expired => Refusal::SessionExpired.into(),
                failure => entering(failure),
            })?;
        let header = Some(header::at(&self.queues.node, granted.revision));
        let mut response = Response::new(LockResponse { header, key: granted.key.clone() });
        describe(response.metadata_mut(), &granted);
        Ok(response)
    }

    async fn unlock(
        &self,
        request: Request<UnlockRequest>,
    ) -> Result<Response<UnlockResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let key = request.key;
        if key.is_empty() {
            return Err(as_unknown(Refusal::EmptyKey));
        }
        let caller = callers::caller(&self.queues.node, &metadata).await.map_err(as_unknown)?;
        let released = client::unlock(&self.queues, caller, key).await.map_err(as_unknown)?;
        let header = Some(header::current(&self.queues.node));
        let mut response = Response::new(UnlockResponse { header });
        let text = if released { "true" } else { "false" };
        response
            .metadata_mut()
            .insert(RELEASED, tonic::metadata::AsciiMetadataValue::from_static(text));
        Ok(response)
    }
}

/// How a queue call failed, where Lock and Campaign agree.
pub(super) fn entering(failure: EnterFailure) -> Status {
    match failure {
        EnterFailure::LeaseNotFound => status::unknown_lease(),
        // Only calls of our own API ask not to wait.
        EnterFailure::Expired | EnterFailure::Busy => Refusal::NotElected.into(),
        EnterFailure::Failed(failure) => as_unknown(failure),
    }
}

/// The life of the caller's connection, where a lease that the server makes is to last as long.
pub(super) fn lease0_life<T>(rules: Rules, request: &Request<T>) -> Option<ConnectionLife> {
    match rules.lease0 {
        Lease0::Etcd => None,
        Lease0::Connection => Connection::of(request.extensions()).life,
    }
}

/// Says in the answer's metadata what a holder needs to know: all decimal integers.
pub(super) fn describe(metadata: &mut MetadataMap, granted: &Granted) {
    metadata.insert(LEASE_ID, granted.lease.0.into());
    metadata.insert(LEASE_TTL, granted.lease_ttl_seconds.into());
    metadata.insert(FENCE, granted.create_revision.into());
}
