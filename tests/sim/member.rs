//! One member on a simulated host: its listeners, its disk and its clock.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use futures::future::BoxFuture;
use futures::stream;
use holdfast::api::connection::Tracked;
use holdfast::clock::{Clock, SeededEntropy};
use holdfast::config::ServerArgs;
use holdfast::node::{Sizes, World};
use holdfast::raft::links::Dial;
use holdfast::server;
use holdfast::storage::MemoryEngines;
use holdfast::vfs::MemVfs;
use hyper_util::rt::TokioIo;
use tonic::transport::{self, Channel, Endpoint};
use turmoil::net::{TcpListener, TcpStream};

pub const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

/// What the seed decides about all members.
#[derive(Debug, Clone)]
pub struct Shape {
    pub members: usize,
    pub snapshot_count: u64,
    pub sizes: Sizes,
}

/// What the seed decides about one start of one member.
#[derive(Debug, Clone)]
pub struct Start {
    pub number: usize,
    pub entropy: u64,
    /// How far its clock is off after a million.
    pub drift_ppm: i32,
    pub wall_ms: u64,
    pub disk: MemVfs,
}

#[derive(Debug, clap::Parser)]
struct Program {
    #[command(flatten)]
    server: ServerArgs,
}

pub fn address(number: usize) -> IpAddr {
    let last = u8::try_from(number + 11).expect("a cluster is small");
    IpAddr::V4(Ipv4Addr::new(192, 168, 1, last))
}

/// Runs until it cannot go on, and tells why.
pub async fn run(shape: Shape, start: Start) -> String {
    let own = address(start.number);
    let members = (0..shape.members).map(|n| format!("m{n}=http://{}:{PEER_PORT}", address(n)));
    let arguments = [
        "holdfast".to_owned(),
        format!("--name=m{}", start.number),
        "--data-dir=/data".to_owned(),
        format!("--listen-client-urls=http://{own}:{CLIENT_PORT}"),
        format!("--advertise-client-urls=http://{own}:{CLIENT_PORT}"),
        format!("--listen-peer-urls=http://{own}:{PEER_PORT}"),
        format!("--initial-advertise-peer-urls=http://{own}:{PEER_PORT}"),
        format!("--initial-cluster={}", members.collect::<Vec<_>>().join(",")),
        format!("--snapshot-count={}", shape.snapshot_count),
    ];
    let config = Program::try_parse_from(arguments).expect("the flags are right");
    let config = config.server.check_with([], 1).expect("the configuration is right");
    let mut settings = server::settings(&config);
    settings.sizes = shape.sizes;
    let disk = Arc::new(start.disk);
    let world = World {
        clock: Arc::new(SimulatedClock::new(start.drift_ppm, start.wall_ms)),
        entropy: Arc::new(SeededEntropy::new(start.entropy)),
        vfs: disk.clone(),
        engines: Arc::new(MemoryEngines(disk)),
        dial: Arc::new(SimulatedDial),
    };
    let (clients, peers) = (listen(CLIENT_PORT).await, listen(PEER_PORT).await);
    match server::run_in(&config, &settings, world, clients, peers).await {
        Ok(reason) => reason,
        Err(error) => format!("start: {error}"),
    }
}

async fn listen(
    port: u16,
) -> impl futures::Stream<Item = std::io::Result<Tracked<TcpStream>>> + Send {
    let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    let listener = TcpListener::bind(any).await.expect("a port of a host of its own");
    stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await;
        let accepted = accepted.map(|(stream, peer)| Tracked::from_peer(stream, Some(peer)));
        Some((accepted, listener))
    })
}

/// Connections over the simulated network.
pub struct SimulatedDial;

impl Dial for SimulatedDial {
    fn lazily(&self, endpoint: Endpoint) -> Channel {
        endpoint.connect_with_connector_lazy(tower::service_fn(connect))
    }

    fn now(&self, endpoint: Endpoint) -> BoxFuture<'static, Result<Channel, transport::Error>> {
        Box::pin(async move { endpoint.connect_with_connector(tower::service_fn(connect)).await })
    }
}

async fn connect(uri: http::Uri) -> io::Result<TokioIo<TcpStream>> {
    let host = uri.host().unwrap_or_default().to_owned();
    let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(80))).await?;
    Ok(TokioIo::new(stream))
}

/// Runs a little fast or slow.
struct SimulatedClock {
    began: tokio::time::Instant,
    drift_ppm: i32,
    wall_ms: u64,
}

impl SimulatedClock {
    fn new(drift_ppm: i32, wall_ms: u64) -> SimulatedClock {
        SimulatedClock { began: tokio::time::Instant::now(), drift_ppm, wall_ms }
    }
}

impl Clock for SimulatedClock {
    fn monotonic(&self) -> Duration {
        self.began.elapsed().mul_f64(1.0 + f64::from(self.drift_ppm) / 1e6)
    }

    fn wall_ms(&self) -> u64 {
        let since = u64::try_from(self.monotonic().as_millis()).expect("a simulation is short");
        self.wall_ms + since
    }
}
