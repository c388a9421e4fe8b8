//! The connections to the other members.
//!
//! Each peer has two: one for what is small and urgent (votes, appends, forwarded calls), one for
//! snapshots, so that a bulk transfer does not hold up a heartbeat. Both connect when first used
//! and again after a failure.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::frame::MAX_FRAME_BYTES;
use super::traffic::{Outgoing, PeerTraffic, Traffic};
use super::types::PeerNode;
use crate::clock::Clock;
use crate::pb::peer::forward_client::ForwardClient;
use crate::pb::peer::queue_client::QueueClient;
use crate::pb::peer::raft_client::RaftClient;
use crate::types::{ClusterId, MemberId};

/// Metadata that every call between members carries: whose cluster the caller believes in, and whom
/// it believes to reach. A member answers only when both are right.
pub const CLUSTER_KEY: &str = "holdfast-cluster";
pub const TARGET_KEY: &str = "holdfast-member";
/// The caller.
pub const ORIGIN_KEY: &str = "holdfast-origin";

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
const STREAM_WINDOW_BYTES: u32 = 4 << 20;

/// Whom this member is and knows; hands out connections to the others.
pub struct Links {
    cluster: ClusterId,
    origin: MemberId,
    clock: Arc<dyn Clock>,
    traffic: Arc<Traffic>,
    channels: Mutex<BTreeMap<u64, (PeerNode, Peer)>>,
}

/// The connections to one member. Cheap to clone.
#[derive(Clone)]
pub struct Peer {
    control: Outgoing<Channel>,
    bulk: Outgoing<Channel>,
    identity: PeerIdentity,
}

pub type Signed = InterceptedService<Outgoing<Channel>, PeerIdentity>;

impl Links {
    pub fn new(cluster: ClusterId, origin: MemberId, clock: Arc<dyn Clock>) -> Links {
        let (traffic, channels) = (Arc::default(), Mutex::default());
        Links { cluster, origin, clock, traffic, channels }
    }

    /// What went between this member and the others, whoever called.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// For how long peers take to answer.
    pub fn now(&self) -> Duration {
        self.clock.monotonic()
    }

    /// The connections to member `target`, made anew when its URLs have changed.
    ///
    /// # Errors
    ///
    /// UNAVAILABLE when the node has no URL that can be used.
    pub fn peer(&self, target: u64, node: &PeerNode) -> Result<Peer, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, peer)) = channels.get(&target)
            && known == node
        {
            return Ok(peer.clone());
        }
        let traffic = self.traffic.with(MemberId(target));
        let peer = Peer {
            control: connect(node, &traffic)?,
            bulk: connect(node, &traffic)?,
            identity: PeerIdentity::new(self.cluster, MemberId(target), self.origin),
        };
        channels.insert(target, (node.clone(), peer.clone()));
        Ok(peer)
    }
}

fn connect(node: &PeerNode, traffic: &Arc<PeerTraffic>) -> Result<Outgoing<Channel>, Status> {
    let mut endpoints = Vec::new();
    for url in &node.peer_urls {
        let endpoint = Endpoint::from_shared(url.clone())
            .map_err(|error| Status::unavailable(format!("peer URL {url}: {error}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3))
            .keep_alive_while_idle(true);
        endpoints.push(endpoint);
    }
    let channel = match endpoints.len() {
        0 => return Err(Status::unavailable(format!("member {} has no peer URL", node.name))),
        1 => endpoints.remove(0).connect_lazy(),
        _ => Channel::balance_list(endpoints.into_iter()),
    };
    Ok(Outgoing::new(channel, traffic.clone()))
}

impl Peer {
    pub fn raft(&self) -> RaftClient<Signed> {
        RaftClient::with_interceptor(self.control.clone(), self.identity.clone())
            .max_decoding_message_size(MAX_FRAME_BYTES)
            .max_encoding_message_size(MAX_FRAME_BYTES)
    }

    /// For snapshots.
    pub fn raft_bulk(&self) -> RaftClient<Signed> {
        RaftClient::with_interceptor(self.bulk.clone(), self.identity.clone())
            .max_decoding_message_size(MAX_FRAME_BYTES)
            .max_encoding_message_size(MAX_FRAME_BYTES)
    }

    pub fn queue(&self) -> QueueClient<Signed> {
        QueueClient::with_interceptor(self.control.clone(), self.identity.clone())
    }

    pub fn forward(&self) -> ForwardClient<Signed> {
        ForwardClient::with_interceptor(self.control.clone(), self.identity.clone())
            .max_decoding_message_size(MAX_FRAME_BYTES)
            .max_encoding_message_size(MAX_FRAME_BYTES)
    }
}

/// Signs calls to a peer with who calls whom.
#[derive(Clone)]
pub struct PeerIdentity {
    cluster: AsciiMetadataValue,
    target: AsciiMetadataValue,
    origin: AsciiMetadataValue,
}

impl PeerIdentity {
    fn new(cluster: ClusterId, target: MemberId, origin: MemberId) -> PeerIdentity {
        PeerIdentity {
            cluster: AsciiMetadataValue::from(cluster.0),
            target: AsciiMetadataValue::from(target.0),
            origin: AsciiMetadataValue::from(origin.0),
        }
    }
}

impl Interceptor for PeerIdentity {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert(CLUSTER_KEY, self.cluster.clone());
        metadata.insert(TARGET_KEY, self.target.clone());
        metadata.insert(ORIGIN_KEY, self.origin.clone());
        Ok(request)
    }
}

/// Checks on the other side what [`PeerIdentity`] signed.
#[derive(Clone)]
pub struct PeerCheck {
    pub cluster: ClusterId,
    pub member: MemberId,
}

impl Interceptor for PeerCheck {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let number =
            |key: &str| -> Option<u64> { request.metadata().get(key)?.to_str().ok()?.parse().ok() };
        if number(CLUSTER_KEY) != Some(self.cluster.0) {
            return Err(Status::failed_precondition("etcdserver: cluster ID mismatch"));
        }
        if number(TARGET_KEY) != Some(self.member.0) {
            return Err(Status::failed_precondition(format!(
                "this is member {}, not the one called",
                self.member
            )));
        }
        Ok(request)
    }
}

/// Who makes a call from another member; zero when it does not say.
pub fn origin_of<T>(request: &Request<T>) -> MemberId {
    let origin = request.metadata().get(ORIGIN_KEY);
    MemberId(origin.and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0))
}
