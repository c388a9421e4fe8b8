//! The process around a member: its listeners, its start, and its end.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use http::{Request, Response};
use sd_notify::NotifyState;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::codegen::StdError;
use tonic::service::Routes;
use tonic::transport::server::{Server, TcpIncoming};
use tower::Service;

use crate::api::connection::Tracked;
use crate::api::{self, Api};
use crate::clock::{SystemClock, SystemEntropy};
use crate::concurrency::peer_service::QueueService;
use crate::config::{Config, InitialClusterState, ListenUrl, MetricsKind};
use crate::gather::Gathered;
use crate::node::bootstrap;
use crate::node::{
    ForwardService, Identity, IntroductionService, Limits, MembersService, RunningMember, Settings,
    Sizes, World, told,
};
use crate::pb::peer::forward_server::ForwardServer;
use crate::pb::peer::introduction_server::IntroductionServer;
use crate::pb::peer::membership_server::MembershipServer;
use crate::pb::peer::queue_server::QueueServer;
use crate::pb::peer::raft_server::RaftServer;
use crate::raft::frame::MAX_FRAME_BYTES;
use crate::raft::links::{PeerCheck, Tcp};
use crate::raft::traffic::Incoming;
use crate::raft::types::PeerNode;
use crate::storage::SledEngines;
use crate::vfs::OsVfs;

/// Calls of one member to another under way at a time.
const PEER_STREAMS: u32 = 100_000;
/// How much a client may send on one stream, and on all of a connection, before we have read it.
///
/// The HTTP/2 library ends a connection on which small frames wait unread, each counted as 256
/// bytes, for more than half of the second. Clients send each keep-alive in a frame of its own, so
/// the first must stop one stream long before that: fifteen of them can be full of such frames.
const STREAM_WINDOW_BYTES: u32 = 128 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// The same for another member, whose frames are large.
const PEER_STREAM_WINDOW_BYTES: u32 = 1 << 20;
const PEER_CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// A member that is silent for this long is asked whether it is there, sooner than a client: it may
/// hold a snapshot half received.
const PEER_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const PEER_KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// What is under way gets this long to end when the member stops.
const GRACE: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on {address}: {source}; {hint}")]
    Listen { address: SocketAddr, source: std::io::Error, hint: &'static str },
    #[error(transparent)]
    Start(#[from] bootstrap::StartError),
    #[error("signals: {0}")]
    Signals(std::io::Error),
    #[error("stopped before it was ready")]
    NotReady,
    /// The member cannot go on.
    #[error("this member stops: {0}")]
    Fault(String),
}

/// Runs a member until it is told to stop (SIGTERM, SIGINT) or cannot go on.
pub async fn run(config: Config) -> Result<(), ServerError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServerError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServerError::Signals)?;

    let clients = listen(&config.listen_client, "--listen-client-urls").await?;
    let peers = listen(&config.listen_peer, "--listen-peer-urls").await?;
    let metrics = listen(&config.listen_metrics, "--listen-metrics-urls").await?;
    let world = World {
        dial: Arc::new(Tcp),
        clock: Arc::new(SystemClock::new()),
        entropy: Arc::new(SystemEntropy),
        vfs: Arc::new(OsVfs),
        engines: Arc::new(SledEngines { cache_bytes: bootstrap::ENGINE_CACHE_BYTES }),
    };
    let (member, mut faults) = bootstrap::start(&settings(&config), world).await?;
    let (stop, stopped) = watch::channel(false);
    let api = Api::new(member.node.clone(), api_options(&config));
    // From now on: whoever looks learns why the member is not ready yet.
    let mut metrics_servers = JoinSet::new();
    let clients_settings = client_connections(&config);
    let routes = Routes::from(api.metrics_router());
    serve(&mut metrics_servers, metrics, &routes, &stopped, clients_settings);
    let mut peer_servers = serve_peers(&member, peers);

    let terminated = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::pin!(terminated);
    let mut removed = member.node.removed();
    let ready = Cell::new(false);
    let node = member.node.clone();
    let mut client_servers = JoinSet::new();
    let serve = async {
        node.recovered().await.map_err(|_| ServerError::NotReady)?;
        node.agreed().await;
        serve(&mut client_servers, clients, &api.everything(), &stopped, clients_settings);
        tracing::info!(
            name = %config.name,
            member_id = %node.identity().member_id,
            cluster_id = %node.identity().cluster_id,
            client_urls = %config.advertise_client_urls.join(","),
            "ready to serve client requests"
        );
        tell_service_manager(NotifyState::Ready);
        ready.set(true);
        std::future::pending::<Result<(), ServerError>>().await
    };
    let ended = tokio::select! {
        failed = serve => failed,
        reason = faults.wait() => Err(ServerError::Fault(reason)),
        () = &mut terminated => Ok(()),
        () = told(&mut removed) => if ready.get() {
            // As in etcd, no error: it was asked for.
            tracing::error!("the member has been permanently removed from the cluster");
            Ok(())
        } else {
            Err(ServerError::Start(bootstrap::StartError::Removed))
        },
    };
    if let Err(error) = ended {
        // Nothing more may be answered: what is in memory may not be what is on disk.
        client_servers.abort_all();
        peer_servers.abort_all();
        metrics_servers.abort_all();
        return Err(error);
    }
    tracing::info!("stopping");
    tell_service_manager(NotifyState::Stopping);
    member.node.hand_over().await;
    member.node.stop();
    stop.send_replace(true);
    if tokio::time::timeout(GRACE, drain(&mut client_servers)).await.is_err() {
        tracing::warn!("some calls did not end in time");
        client_servers.shutdown().await;
    }
    member.node.background().close();
    if tokio::time::timeout(GRACE, member.node.background().wait()).await.is_err() {
        tracing::warn!("some queue keys are left to their leases");
    }
    peer_servers.shutdown().await;
    metrics_servers.shutdown().await;
    member.stop().await;
    tracing::info!("stopped");
    Ok(())
}

/// What a member is told of what its flags say.
pub fn settings(config: &Config) -> Settings {
    let ids = config.initial_member_ids();
    let members = config.initial_cluster.iter().zip(ids);
    Settings {
        identity: Identity {
            cluster_id: config.cluster_id(),
            member_id: config.member_id(),
            name: config.name.clone(),
        },
        data_dir: config.data_dir.clone(),
        initial_members: members
            .map(|((name, peer_urls), id)| {
                (id.0, PeerNode { name: name.clone(), peer_urls: peer_urls.clone() })
            })
            .collect(),
        joins: config.initial_cluster_state == InitialClusterState::Existing,
        change_rules: config.change_rules,
        client_urls: config.advertise_client_urls.clone(),
        heartbeat_interval: config.heartbeat_interval,
        election_range_ms: config.raft_election_range_ms(),
        snapshot_count: config.snapshot_count,
        auto_compaction: config.auto_compaction,
        slow_apply: config.slow_apply,
        limits: Limits {
            max_request_bytes: config.max_request_bytes,
            max_txn_ops: config.max_txn_ops,
            min_lease_ttl_seconds: config.min_lease_ttl_seconds(),
            call_timeout: Duration::from_secs(5) + 2 * config.election_timeout,
            election_timeout: config.election_timeout,
            quota_bytes: config.quota_bytes,
        },
        auth: config.auth,
        sizes: Sizes::default(),
    }
}

fn api_options(config: &Config) -> api::Options {
    api::Options {
        progress_interval: config.progress_interval,
        extensive_metrics: config.metrics == MetricsKind::Extensive,
        lock_rules: config.lock_rules,
    }
}

fn client_connections(config: &Config) -> Connections {
    Connections {
        streams: config.max_concurrent_streams,
        stream_window_bytes: STREAM_WINDOW_BYTES,
        connection_window_bytes: CONNECTION_WINDOW_BYTES,
        keepalive_interval: config.keepalive_interval,
        keepalive_timeout: config.keepalive_timeout,
    }
}

/// For systemd's `Type=notify`; without `NOTIFY_SOCKET` in the environment nobody is told.
fn tell_service_manager(state: NotifyState) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager cannot be told how far this member is");
    }
}

async fn drain(servers: &mut JoinSet<()>) {
    while servers.join_next().await.is_some() {}
}

async fn listen(urls: &[ListenUrl], flag: &str) -> Result<Vec<TcpListener>, ServerError> {
    let hint = match flag {
        "--listen-client-urls" => {
            "stop what uses the port, or choose another with --listen-client-urls"
        }
        "--listen-peer-urls" => {
            "stop what uses the port, or choose another with --listen-peer-urls"
        }
        _ => "stop what uses the port, or choose another with --listen-metrics-urls",
    };
    let mut listeners = Vec::new();
    for url in urls {
        let address = url.address;
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| ServerError::Listen { address, source, hint })?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// What a connection is made of.
pub trait Wire: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Wire for S {}

const PEER_CONNECTIONS: Connections = Connections {
    streams: PEER_STREAMS,
    stream_window_bytes: PEER_STREAM_WINDOW_BYTES,
    connection_window_bytes: PEER_CONNECTION_WINDOW_BYTES,
    keepalive_interval: Some(PEER_KEEP_ALIVE_INTERVAL),
    keepalive_timeout: PEER_KEEP_ALIVE_TIMEOUT,
};

/// What the connections of a listener may do.
#[derive(Clone, Copy)]
struct Connections {
    streams: u32,
    stream_window_bytes: u32,
    connection_window_bytes: u32,
    keepalive_interval: Option<Duration>,
    keepalive_timeout: Duration,
}

fn builder(connections: Connections) -> Server {
    Server::builder()
        .max_concurrent_streams(connections.streams)
        .initial_stream_window_size(connections.stream_window_bytes)
        .initial_connection_window_size(connections.connection_window_bytes)
        .http2_keepalive_interval(connections.keepalive_interval)
        .http2_keepalive_timeout(Some(connections.keepalive_timeout))
        .accept_http1(true)
}

fn serve<T, B>(
    servers: &mut JoinSet<()>,
    listeners: Vec<TcpListener>,
    services: &T,
    stopped: &watch::Receiver<bool>,
    connections: Connections,
) where
    T: Service<Request<Body>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    T::Future: Send,
    B: http_body::Body<Data = Bytes, Error: Into<StdError>> + Send + 'static,
{
    for listener in listeners {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let incoming = incoming.map_ok(Tracked::new);
        servers.spawn(serve_one(incoming, services.clone(), stopped.clone(), connections));
    }
}

async fn serve_one<S, T, B>(
    incoming: impl Stream<Item = io::Result<Tracked<S>>>,
    services: T,
    mut stopped: watch::Receiver<bool>,
    connections: Connections,
) where
    S: Wire,
    T: Service<Request<Body>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    T::Future: Send,
    B: http_body::Body<Data = Bytes, Error: Into<StdError>> + Send + 'static,
{
    let stop = async move {
        if stopped.wait_for(|stopped| *stopped).await.is_err() {
            std::future::pending().await
        }
    };
    let server = builder(connections);
    let incoming = incoming.map_ok(Gathered);
    if let Err(error) = server.serve_with_incoming_shutdown(services, incoming, stop).await {
        tracing::error!(%error, "a listener ended");
    }
}

fn serve_peers(member: &RunningMember, listeners: Vec<TcpListener>) -> JoinSet<()> {
    let mut servers = JoinSet::new();
    // Peers are served until the member has stopped.
    let (_, never) = watch::channel(false);
    serve(&mut servers, listeners, &peer_routes(member), &never, PEER_CONNECTIONS);
    servers
}

fn peer_routes(member: &RunningMember) -> Routes {
    let identity = member.node.identity();
    let check = PeerCheck {
        cluster: identity.cluster_id,
        member: identity.member_id,
        retired: member.node.retired().clone(),
    };
    let raft = RaftServer::from_arc(member.peer_service.clone())
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES);
    let forward = ForwardServer::new(ForwardService { node: member.node.clone() })
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES);
    let queue = QueueServer::new(QueueService { node: member.node.clone() });
    let membership = MembershipServer::new(MembersService { node: member.node.clone() });
    let introduction = IntroductionServer::new(IntroductionService { node: member.node.clone() });
    let traffic = member.node.traffic();
    let checked = |check: PeerCheck| tonic::service::InterceptorLayer::new(check);
    let raft = Incoming::new(raft, traffic.clone());
    let forward = Incoming::new(forward, traffic.clone());
    let queue = Incoming::new(queue, traffic.clone());
    let membership = Incoming::new(membership, traffic.clone());
    Routes::new(tower::Layer::layer(&checked(check.clone()), raft))
        .add_service(tower::Layer::layer(&checked(check.clone()), forward))
        .add_service(tower::Layer::layer(&checked(check.clone()), queue))
        .add_service(tower::Layer::layer(&checked(check), membership))
        // Who asks for it cannot sign yet.
        .add_service(introduction)
}

/// Runs a member in a world of the caller's until it cannot go on, and returns why: for simulations.
/// Dropped, it is gone as a process that was killed.
///
/// # Errors
///
/// When it cannot start.
pub async fn run_in<S: Wire>(
    config: &Config,
    settings: &Settings,
    world: World,
    clients: impl Stream<Item = io::Result<Tracked<S>>> + Send + 'static,
    peers: impl Stream<Item = io::Result<Tracked<S>>> + Send + 'static,
) -> Result<String, ServerError> {
    let (member, mut faults) = bootstrap::start(settings, world).await?;
    let (_stop, stopped) = watch::channel(false);
    let mut servers = JoinSet::new();
    servers.spawn(serve_one(peers, peer_routes(&member), stopped.clone(), PEER_CONNECTIONS));
    let node = member.node.clone();
    let serve = async {
        node.recovered().await.map_err(|_| ServerError::NotReady)?;
        let services = Api::new(node.clone(), api_options(config)).everything();
        servers.spawn(serve_one(clients, services, stopped, client_connections(config)));
        std::future::pending().await
    };
    tokio::select! {
        biased;
        reason = faults.wait() => Ok(reason),
        failed = serve => failed,
    }
}

#[cfg(test)]
mod tests;
