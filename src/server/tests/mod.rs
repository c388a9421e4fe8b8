//! What clients of whole members see, in one process: real listeners, logs and engines.

mod agreement;
mod auth;
mod backup;
mod elections;
mod failover;
mod fences;
mod locks;
mod members;
mod queues;
mod space;

use std::future::Future;
use std::time::Duration;

use clap::Parser;
use tempfile::TempDir;
use tonic::transport::Channel;

use super::*;
use crate::config::ServerArgs;
use crate::node::Node;
use crate::vfs::Vfs;

#[derive(Debug, clap::Parser)]
struct Program {
    #[command(flatten)]
    server: ServerArgs,
}

/// How long a test waits for what must happen.
const SOON: Duration = Duration::from_secs(30);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let Ok(value) = tokio::time::timeout(SOON, future).await else { panic!("too late: {what}") };
    value
}

/// A member with its listeners.
struct Running {
    member: RunningMember,
    faults: bootstrap::Faults,
    servers: [JoinSet<()>; 2],
    endpoint: String,
    _stop: watch::Sender<bool>,
    _data: TempDir,
}

impl Running {
    fn node(&self) -> &Arc<Node> {
        &self.member.node
    }

    /// A connection of its own.
    async fn connect(&self) -> Channel {
        let endpoint = tonic::transport::Endpoint::from_shared(self.endpoint.clone()).unwrap();
        within("a connection", endpoint.connect()).await.unwrap()
    }

    /// Ends it as a crash would: nobody is told.
    async fn kill(mut self) {
        for servers in &mut self.servers {
            servers.shutdown().await;
        }
        self.member.stop().await;
    }
}

/// Where a member is, before it starts.
struct Place {
    /// Where it serves the others, and the URL by which they know it.
    peer: SocketAddr,
    peer_url: String,
    vfs: Arc<dyn Vfs>,
}

/// `count` members of one cluster, ready to serve, each with these flags.
async fn cluster(count: usize, flags: &[&str]) -> Vec<Running> {
    cluster_of(count, flags, async |_| {}).await
}

/// As [`cluster`], with places that `prepare` may change.
async fn cluster_of(
    count: usize,
    flags: &[&str],
    mut prepare: impl AsyncFnMut(&mut Place),
) -> Vec<Running> {
    let mut listeners = Vec::new();
    for _ in 0..count {
        let bind = || TcpListener::bind("127.0.0.1:0");
        listeners.push((bind().await.unwrap(), bind().await.unwrap()));
    }
    let url = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
    let mut places = Vec::new();
    for (_, peers) in &listeners {
        let peer = peers.local_addr().unwrap();
        let mut place = Place { peer, peer_url: url(peers), vfs: Arc::new(OsVfs) };
        prepare(&mut place).await;
        places.push(place);
    }
    let peers = places.iter().enumerate();
    let peers = peers.map(|(n, place)| format!("m{n}={}", place.peer_url));
    let initial = peers.collect::<Vec<_>>().join(",");
    let starts = listeners.into_iter().zip(places).enumerate();
    let starts = starts.map(|(n, ((clients, peers), place))| {
        let data = TempDir::new().unwrap();
        let own = [
            format!("--name=m{n}"),
            format!("--data-dir={}", data.path().join("data").display()),
            format!("--listen-client-urls={}", url(&clients)),
            format!("--advertise-client-urls={}", url(&clients)),
            format!("--listen-peer-urls={}", url(&peers)),
            format!("--initial-advertise-peer-urls={}", place.peer_url),
            format!("--initial-cluster={initial}"),
        ];
        let own = own.iter().map(String::as_str);
        let arguments = ["holdfast"].into_iter().chain(own).chain(flags.iter().copied());
        let config = Program::try_parse_from(arguments).unwrap().server.check_with([], 2).unwrap();
        async move {
            let world = World {
                dial: Arc::new(Tcp),
                engines: Arc::new(SledEngines { cache_bytes: bootstrap::ENGINE_CACHE_BYTES }),
                clock: Arc::new(SystemClock::new()),
                entropy: Arc::new(SystemEntropy),
                vfs: place.vfs,
            };
            let (member, faults) = bootstrap::start(&settings(&config), world).await.unwrap();
            let endpoint = url(&clients);
            let peer_servers = serve_peers(&member, vec![peers]);
            member.node.recovered().await.unwrap();
            let (stop, stopped) = watch::channel(false);
            let services = Api::new(member.node.clone(), api_options(&config)).everything();
            let mut servers = JoinSet::new();
            let connections = client_connections(&config);
            serve(&mut servers, vec![clients], &services, &stopped, connections);
            let servers = [servers, peer_servers];
            Running { member, faults, servers, endpoint, _stop: stop, _data: data }
        }
    });
    within("a cluster", futures::future::join_all(starts)).await
}

/// Waits until `found` returns something, looking again whenever an entry is applied.
async fn eventually<T>(node: &Node, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    within(what, async {
        loop {
            let seen = node.applied_index();
            if let Some(value) = found() {
                return value;
            }
            node.applied_up_to_entry(seen + 1).await.ok();
        }
    })
    .await
}
