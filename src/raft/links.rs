//! The connections to the other members.
//!
//! Each peer has two: one for what is small and urgent (votes, appends, forwarded calls), one for
//! snapshots, so that a bulk transfer does not hold up a heartbeat. Both connect when first used
//! and again after a failure. They end when the member is removed or moves to other URLs; openraft,
//! which keeps the URLs it began with, then gets connections to the new ones.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{self, Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::frame::MAX_FRAME_BYTES;
use super::traffic::{Outgoing, PeerTraffic, Traffic};
use super::types::PeerNode;
use crate::clock::Clock;
use crate::pb::peer::forward_client::ForwardClient;
use crate::pb::peer::introduction_client::IntroductionClient;
use crate::pb::peer::membership_client::MembershipClient;
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

/// What a member that was removed is told, whatever it calls.
const REMOVED: &str = "the member has been permanently removed from the cluster";

/// Whether `status` says that the caller was removed from the cluster.
pub fn says_removed(status: &Status) -> bool {
    status.code() == Code::PermissionDenied && status.message() == REMOVED
}

const OTHER_CLUSTER: &str = "etcdserver: cluster ID mismatch";

/// Whether `status` comes from a member of another cluster than the caller's.
pub fn says_other_cluster(status: &Status) -> bool {
    status.code() == Code::FailedPrecondition && status.message() == OTHER_CLUSTER
}

/// The members that were removed, for the layer that lets calls in.
#[derive(Debug, Default)]
pub struct Retired(RwLock<BTreeSet<MemberId>>);

impl Retired {
    pub fn replace(&self, members: &BTreeSet<MemberId>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).clone_from(members);
    }

    pub fn contains(&self, member: MemberId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&member)
    }
}

/// How connections are made.
pub trait Dial: Send + Sync {
    /// A channel to `endpoint` that connects when first used and again after a failure.
    fn lazily(&self, endpoint: Endpoint) -> Channel;

    /// A channel to `endpoint` that stands on return.
    fn now(&self, endpoint: Endpoint) -> BoxFuture<'static, Result<Channel, transport::Error>>;
}

/// Over the operating system's TCP.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tcp;

impl Dial for Tcp {
    fn lazily(&self, endpoint: Endpoint) -> Channel {
        endpoint.connect_lazy()
    }

    fn now(&self, endpoint: Endpoint) -> BoxFuture<'static, Result<Channel, transport::Error>> {
        Box::pin(async move { endpoint.connect().await })
    }
}

/// Whom this member is and knows; hands out connections to the others.
pub struct Links {
    cluster: ClusterId,
    origin: MemberId,
    clock: Arc<dyn Clock>,
    dial: Arc<dyn Dial>,
    traffic: Arc<Traffic>,
    channels: Mutex<Channels>,
}

#[derive(Default)]
struct Channels {
    /// As the newest membership has it.
    members: BTreeMap<u64, PeerNode>,
    peers: BTreeMap<u64, (Vec<String>, Peer)>,
}

/// The connections to one member. Cheap to clone.
#[derive(Clone)]
pub struct Peer {
    control: Outgoing<Channel>,
    bulk: Outgoing<Channel>,
    identity: PeerIdentity,
    closed: CancellationToken,
}

pub type Signed = InterceptedService<Outgoing<Channel>, PeerIdentity>;

impl Links {
    pub fn new(cluster: ClusterId, origin: MemberId, clock: Arc<dyn Clock>) -> Links {
        let (traffic, channels) = (Arc::default(), Mutex::default());
        Links { cluster, origin, clock, dial: Arc::new(Tcp), traffic, channels }
    }

    /// The same, with connections that `dial` makes.
    pub fn over(self, dial: Arc<dyn Dial>) -> Links {
        Links { dial, ..self }
    }

    /// What went between this member and the others, whoever called.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// For how long peers take to answer.
    pub fn now(&self) -> Duration {
        self.clock.monotonic()
    }

    /// Takes note of who belongs to the cluster: ends the connections to members that were removed
    /// or have other URLs now, and forgets the traffic with those removed.
    pub fn update(&self, members: BTreeMap<u64, PeerNode>) {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.peers.retain(|id, (urls, peer)| {
            let stays = members.get(id).is_some_and(|node| node.peer_urls == *urls);
            if !stays {
                peer.closed.cancel();
            }
            stays
        });
        self.traffic.retain(|member| members.contains_key(&member.0));
        channels.members = members;
    }

    /// The connections to member `target`. `node` says how to reach it while the newest membership
    /// does not.
    ///
    /// # Errors
    ///
    /// UNAVAILABLE when the node has no URL that can be used.
    pub fn peer(&self, target: u64, node: &PeerNode) -> Result<Peer, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let node = channels.members.get(&target).unwrap_or(node).clone();
        if let Some((urls, peer)) = channels.peers.get(&target) {
            if *urls == node.peer_urls {
                return Ok(peer.clone());
            }
            peer.closed.cancel();
        }
        let traffic = self.traffic.with(MemberId(target));
        let peer = Peer {
            control: connect(&node, self.dial.as_ref(), &traffic)?,
            bulk: connect(&node, self.dial.as_ref(), &traffic)?,
            identity: PeerIdentity::new(self.cluster, MemberId(target), self.origin),
            closed: CancellationToken::new(),
        };
        channels.peers.insert(target, (node.peer_urls, peer.clone()));
        Ok(peer)
    }

    /// A connection to member `target` that nothing else uses, and that stands on return.
    ///
    /// # Errors
    ///
    /// Why the first URL failed that did not refuse the connection; if all did, the refusal.
    pub async fn connect_anew(
        &self,
        target: u64,
        node: &PeerNode,
    ) -> Result<RaftClient<InterceptedService<Channel, PeerIdentity>>, Status> {
        let mut refusal = Status::unavailable(format!("member {} has no peer URL", node.name));
        for url in &node.peer_urls {
            match self.dial.now(endpoint(url)?).await {
                Ok(channel) => {
                    let identity = PeerIdentity::new(self.cluster, MemberId(target), self.origin);
                    return Ok(RaftClient::with_interceptor(channel, identity));
                }
                Err(error) => {
                    refusal = Status::unavailable(format!("peer URL {url}: {error}"));
                    refusal.set_source(Arc::new(error));
                    if !is_refusal(&refusal) {
                        break;
                    }
                }
            }
        }
        Err(refusal)
    }
}

fn endpoint(url: &str) -> Result<Endpoint, Status> {
    let endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|error| Status::unavailable(format!("peer URL {url}: {error}")))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(3))
        .keep_alive_while_idle(true))
}

/// A client for whoever answers at `urls`, before either side knows the other.
///
/// # Errors
///
/// UNAVAILABLE when none of the URLs can be used.
pub fn introduction(urls: &[String]) -> Result<IntroductionClient<Channel>, Status> {
    open(urls, &Tcp).map(IntroductionClient::new)
}

fn connect(
    node: &PeerNode,
    dial: &dyn Dial,
    traffic: &Arc<PeerTraffic>,
) -> Result<Outgoing<Channel>, Status> {
    Ok(Outgoing::new(open(&node.peer_urls, dial)?, traffic.clone()))
}

fn open(urls: &[String], dial: &dyn Dial) -> Result<Channel, Status> {
    let mut endpoints = Vec::new();
    for url in urls {
        endpoints.push(endpoint(url)?);
    }
    match endpoints.len() {
        0 => Err(Status::unavailable("the member has no peer URL")),
        1 => Ok(dial.lazily(endpoints.remove(0))),
        _ => Ok(Channel::balance_list(endpoints.into_iter())),
    }
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

    /// Fires when these connections are of no more use: the member is gone, or elsewhere.
    pub fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    pub fn membership(&self) -> MembershipClient<Signed> {
        MembershipClient::with_interceptor(self.control.clone(), self.identity.clone())
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

/// What the network said, if `status` came from there.
pub fn io_error(status: &Status) -> Option<&io::Error> {
    let mut source = status.source();
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return Some(error);
        }
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.get_io();
        }
        source = error.source();
    }
    None
}

/// Whether nobody listens there.
pub fn is_refusal(status: &Status) -> bool {
    io_error(status).is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
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
    pub retired: Arc<Retired>,
}

impl Interceptor for PeerCheck {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let number =
            |key: &str| -> Option<u64> { request.metadata().get(key)?.to_str().ok()?.parse().ok() };
        if number(CLUSTER_KEY) != Some(self.cluster.0) {
            return Err(Status::failed_precondition(OTHER_CLUSTER));
        }
        // It must neither ask for votes nor take part in anything else.
        if number(ORIGIN_KEY).is_some_and(|origin| self.retired.contains(MemberId(origin))) {
            return Err(Status::permission_denied(REMOVED));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    fn signed(origin: u64, target: u64) -> Request<()> {
        let mut identity = PeerIdentity::new(ClusterId(1), MemberId(target), MemberId(origin));
        identity.call(Request::new(())).unwrap()
    }

    #[test]
    fn a_removed_member_is_refused_whatever_it_calls_and_whomever_it_takes_us_for() {
        let retired = Arc::new(Retired::default());
        let mut check = PeerCheck { cluster: ClusterId(1), member: MemberId(2), retired };
        check.call(signed(3, 2)).unwrap();
        let mistaken = check.call(signed(3, 9)).unwrap_err();
        assert_eq!(mistaken.code(), Code::FailedPrecondition);
        check.retired.replace(&BTreeSet::from([MemberId(3)]));
        for target in [2, 9] {
            assert!(says_removed(&check.call(signed(3, target)).unwrap_err()));
        }
        check.call(signed(4, 2)).unwrap();
    }

    #[tokio::test]
    async fn connections_end_with_the_member_or_its_urls_and_go_by_the_newest_membership() {
        let links = Links::new(ClusterId(1), MemberId(1), Arc::new(ManualClock::default()));
        let node = |port: u16| PeerNode {
            name: "m".to_owned(),
            peer_urls: vec![format!("http://127.0.0.1:{port}")],
        };
        let members = |ports: &[(u64, u16)]| {
            ports.iter().map(|(id, port)| (*id, node(*port))).collect::<BTreeMap<_, _>>()
        };
        links.update(members(&[(2, 1), (3, 1)]));
        let (two, three) = (links.peer(2, &node(1)).unwrap(), links.peer(3, &node(1)).unwrap());
        links.update(members(&[(2, 2)]));
        assert!(two.closed().is_cancelled(), "it has moved");
        assert!(three.closed().is_cancelled(), "it was removed");
        let met = links.traffic().all();
        assert_eq!(met.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [MemberId(2)]);
        // openraft still names the old URL.
        let moved = links.peer(2, &node(1)).unwrap();
        links.peer(2, &node(2)).unwrap();
        links.update(members(&[(2, 2)]));
        assert!(!moved.closed().is_cancelled());
    }
}
