//! The service Lease.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::machine::{Command, Rejection, Reply, Right};
use crate::node::{Applied, Caller, Failure, Node};
use crate::pb::etcdserverpb::lease_server::Lease;
use crate::pb::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};
use crate::types::{KeyRange, LeaseId};

use super::{callers, convert, header, status};

/// How many keep-alives of one stream are under way at a time. Further ones wait in the stream,
/// and with it the client.
const KEEP_ALIVES_IN_FLIGHT: usize = 512;

/// How often an id of our own choice is tried before the grant is refused. Ids are random, so a
/// second try is already hardly ever needed.
const ID_ATTEMPTS: usize = 4;

pub struct LeaseService {
    node: Arc<Node>,
}

impl LeaseService {
    pub fn new(node: Arc<Node>) -> LeaseService {
        LeaseService { node }
    }
}

#[tonic::async_trait]
impl Lease for LeaseService {
    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let min_seconds = self.node.limits().min_lease_ttl_seconds;
        let ttl_seconds = convert::lease_ttl_seconds(request.ttl, min_seconds)?;
        let caller = callers::caller(&self.node, &metadata).await?;
        let Applied { revision, reply: Reply::LeaseGranted { id, ttl_seconds } } =
            self.grant(caller, LeaseId(request.id), ttl_seconds).await?
        else {
            return Err(status::misplaced_reply());
        };
        Ok(Response::new(LeaseGrantResponse {
            header: Some(header::at(&self.node, revision)),
            id: id.0,
            ttl: ttl_seconds,
            error: String::new(),
        }))
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        let caller = callers::caller(&self.node, request.metadata()).await?;
        let id = LeaseId(request.into_inner().id);
        let applied = self.node.propose_for(caller, Command::LeaseRevoke { id }).await?;
        let header = header::at(&self.node, applied.revision);
        Ok(Response::new(LeaseRevokeResponse { header: Some(header) }))
    }

    type LeaseKeepAliveStream =
        Pin<Box<dyn Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send>>;

    /// Renews leases as long as the client asks, with one answer for each request, in order. A
    /// client that closes its side gets the answers to what it has asked, and then the end.
    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let node = self.node.clone();
        let (metadata, _, requests) = request.into_parts();
        let metadata = Arc::new(metadata);
        let answers = requests
            .map(move |request| keep_alive(node.clone(), metadata.clone(), request))
            .buffered(KEEP_ALIVES_IN_FLIGHT);
        Ok(Response::new(answers.boxed()))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let caller = callers::up_to_date(&self.node, &metadata).await?;
        caller.check_user()?;
        let info = self.node.lease_info(LeaseId(request.id), request.keys).await?;
        let access = caller.access()?;
        for key in info.iter().flat_map(|info| &info.keys) {
            access.range(Right::Read, &KeyRange::One(key.clone()))?;
        }
        self.node.check_unchanged(&caller)?;
        let header = header::current(&self.node);
        Ok(Response::new(convert::lease_time_to_live_response(request.id, info, header)))
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        let caller = callers::up_to_date(&self.node, request.metadata()).await?;
        caller.check_user()?;
        let leases = self.node.lease_list().await?;
        for lease in &leases {
            self.node.check_lease(&caller, Right::Read, *lease)?;
        }
        self.node.check_unchanged(&caller)?;
        Ok(Response::new(LeaseLeasesResponse {
            header: Some(header::current(&self.node)),
            leases: leases.into_iter().map(|lease| LeaseStatus { id: lease.0 }).collect(),
        }))
    }
}

impl LeaseService {
    /// Grants `wanted`, or a lease with an id of the node's choice when `wanted` is none.
    async fn grant(
        &self,
        caller: Caller,
        wanted: LeaseId,
        ttl_seconds: i64,
    ) -> Result<Applied, Failure> {
        if !wanted.is_none() {
            let grant = Command::LeaseGrant { id: wanted, ttl_seconds };
            return self.node.propose_for(caller, grant).await;
        }
        let mut attempts = 0;
        loop {
            attempts += 1;
            let id = self.node.new_lease_id();
            let grant = Command::LeaseGrant { id, ttl_seconds };
            match self.node.propose_for(caller.clone(), grant).await {
                Err(Failure::Rejected(Rejection::LeaseExists(_))) if attempts < ID_ATTEMPTS => {}
                other => return other,
            }
        }
    }
}

async fn keep_alive(
    node: Arc<Node>,
    metadata: Arc<MetadataMap>,
    request: Result<LeaseKeepAliveRequest, Status>,
) -> Result<LeaseKeepAliveResponse, Status> {
    let id = request.map_err(status::of_stream)?.id;
    // Who renews a lease keeps the keys on it.
    let caller = callers::caller(&node, &metadata).await?;
    caller.check_user()?;
    node.check_lease(&caller, Right::Write, LeaseId(id))?;
    // Taken before the renewal: a client may rely on the lease having lived at this revision.
    let header = header::current(&node);
    let ttl_seconds = node.lease_renew(LeaseId(id)).await?;
    Ok(LeaseKeepAliveResponse { header: Some(header), id, ttl: ttl_seconds.unwrap_or(0) })
}
