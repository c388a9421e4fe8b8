//! What clients see: etcd's gRPC services, our own, and plain HTTP beside them on the same port.
//!
//! Each service turns protobuf into checked commands ([`convert`]), asks the [`Node`], and turns the
//! reply back. Protobuf types of the public API stop here, and so do gRPC codes and etcd's texts
//! ([`status`]).

pub mod auth;
mod callers;
pub mod calls;
pub mod cluster;
pub mod connection;
pub mod convert;
pub mod dispatch;
pub mod election;
pub mod elections;
pub mod fence;
pub mod gate;
pub mod header;
pub mod health;
pub mod http;
pub mod kv;
pub mod lease;
pub mod lock;
pub mod locks;
pub mod maintenance;
pub mod metrics;
mod packed_events;
pub mod range_stream;
pub mod status;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use ::http::Request;
use axum::Router;
use futures::FutureExt;
use tonic::body::Body;
use tonic::codec::CompressionEncoding;
use tonic::server::NamedService;
use tonic_health::pb::health_server::HealthServer;
use tower::Service;

use crate::concurrency::Queues;
use crate::concurrency::rules::Rules;
use crate::machine::Right;
use crate::node::Node;
use crate::pb::etcdserverpb::auth_server::AuthServer;
use crate::pb::etcdserverpb::cluster_server::ClusterServer;
use crate::pb::etcdserverpb::kv_server::KvServer;
use crate::pb::etcdserverpb::lease_server::LeaseServer;
use crate::pb::etcdserverpb::maintenance_server::MaintenanceServer;
use crate::pb::etcdserverpb::watch_server::WatchServer;
use crate::pb::holdfastpb::elections_server::ElectionsServer;
use crate::pb::holdfastpb::locks_server::LocksServer;
use crate::pb::v3electionpb::election_server::ElectionServer;
use crate::pb::v3lockpb::lock_server::LockServer;

use self::calls::Calls;
use self::dispatch::{Dispatch, GatedCall, Services};
use self::gate::{Gate, Keeper};

/// The release of etcd whose API this is. Clients and tools ask for it to know what they may use.
pub const ETCD_VERSION: &str = "3.7.0";

/// How much larger than the largest request a message may be: so that a request which is only
/// slightly too large is refused by us, with etcd's text, and not by the transport.
const RECEIVE_HEADROOM_BYTES: usize = 512 * 1024;

/// What an operator may choose about the API.
#[derive(Debug, Clone)]
pub struct Options {
    /// How often an idle watch that asks for it hears of its progress.
    pub progress_interval: Duration,
    /// Whether calls are timed for `/metrics`, too.
    pub extensive_metrics: bool,
    pub lock_rules: Rules,
}

/// What a member serves, and the counters behind it.
pub struct Api {
    node: Arc<Node>,
    calls: Arc<Calls>,
    queues: Queues,
    options: Options,
}

impl Api {
    pub fn new(node: Arc<Node>, options: Options) -> Api {
        let calls = Arc::new(Calls::new(node.clock().clone(), options.extensive_metrics));
        let queues = Queues::new(node.clone(), options.lock_rules);
        Api { node, calls, queues, options }
    }

    /// Everything on the client port, for a server that speaks HTTP/1.1 and HTTP/2.
    pub fn everything(&self) -> Dispatch<ClientServices> {
        let http = http::routes(self.node.clone()).merge(self.metrics()).fallback(gate::unknown);
        Dispatch::new(ClientServices::new(self), http)
    }

    /// What is served on the ports for metrics: those, and the probes.
    pub fn metrics_router(&self) -> Router {
        http::probes(self.node.clone()).merge(self.metrics()).fallback(gate::unknown)
    }

    fn keeper(&self) -> Keeper {
        let (has_leader, learner) = (self.node.has_leader(), self.node.learner());
        Keeper { has_leader, learner, calls: self.calls.clone() }
    }

    fn metrics(&self) -> Router {
        let (queues, calls) = (self.queues.clone(), self.calls.clone());
        http::metrics_route(move || metrics::page(&queues, &calls))
    }
}

// The generated servers have no trait in common for their limits, hence a macro.
macro_rules! client_services {
    ($($field:ident: $server:ident<$service:ty> = $make:expr;)*) => {
        /// The gRPC services on the client port, each behind the gate.
        pub struct ClientServices {
            $($field: Gate<$server<$service>>,)*
        }

        impl ClientServices {
            fn new(api: &Api) -> ClientServices {
                let keeper = Arc::new(api.keeper());
                let receive_bytes = api.node.limits().max_request_bytes + RECEIVE_HEADROOM_BYTES;
                $(
                    let make: fn(&Api) -> $service = $make;
                    let server = $server::new(make(api))
                        .max_decoding_message_size(receive_bytes)
                        .accept_compressed(CompressionEncoding::Gzip);
                    let $field = Gate::new(server, keeper.clone());
                )*
                ClientServices { $($field,)* }
            }
        }

        impl Services for ClientServices {
            fn call(
                &self,
                name: &str,
                request: Request<Body>,
            ) -> Result<GatedCall, Box<Request<Body>>> {
                match name {
                    $(<$server<$service> as NamedService>::NAME => {
                        Ok(self.$field.clone().call(request))
                    })*
                    _ => Err(Box::new(request)),
                }
            }
        }
    };
}

client_services! {
    kv: KvServer<kv::KvService> = |api| kv::KvService::new(api.node.clone());
    watch: WatchServer<watch::WatchService> = watch_service;
    lock: LockServer<lock::LockService> = |api| lock::LockService::new(api.queues.clone());
    election: ElectionServer<election::ElectionService> =
        |api| election::ElectionService::new(api.queues.clone());
    locks: LocksServer<locks::LocksService> = |api| locks::LocksService::new(api.queues.clone());
    elections: ElectionsServer<elections::ElectionsService> =
        |api| elections::ElectionsService::new(api.queues.clone());
    lease: LeaseServer<lease::LeaseService> = |api| lease::LeaseService::new(api.node.clone());
    cluster: ClusterServer<cluster::ClusterService> =
        |api| cluster::ClusterService::new(api.node.clone());
    maintenance: MaintenanceServer<maintenance::MaintenanceService> =
        |api| maintenance::MaintenanceService::new(api.node.clone());
    auth: AuthServer<auth::AuthService> = |api| auth::AuthService::new(api.node.clone());
    health: HealthServer<health::HealthService> = |_| health::HealthService;
}

fn watch_service(api: &Api) -> watch::WatchService {
    let node = &api.node;
    let (headers, authorizing, arriving) = (node.clone(), node.clone(), node.clone());
    watch::WatchService {
        hub: node.hub().clone(),
        store: node.store(),
        header: Arc::new(move |revision| header::at(&headers, revision)),
        authorize: Arc::new(move |metadata, range| {
            let caller = callers::caller_now(&authorizing, metadata)?;
            Ok(caller.access()?.range(Right::Read, range)?)
        }),
        arrive: Arc::new(move |metadata| {
            let (node, metadata) = (arriving.clone(), metadata.clone());
            async move { callers::arrive(&node, &metadata).await }.boxed()
        }),
        has_leader: node.has_leader(),
        max_request_bytes: node.limits().max_request_bytes,
        packed_events: Arc::default(),
        progress_interval: api.options.progress_interval,
    }
}

#[cfg(test)]
mod fuzz_tests;
