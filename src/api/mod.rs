//! What clients see: etcd's gRPC services, and plain HTTP beside them on the same port.
//!
//! Each service turns protobuf into checked commands ([`convert`]), asks the [`Node`], and turns the
//! reply back. Protobuf types of the public API stop here, and so do gRPC codes and etcd's texts
//! ([`status`]).

pub mod auth;
pub mod cluster;
pub mod convert;
pub mod election;
pub mod gate;
pub mod header;
pub mod health;
pub mod http;
pub mod kv;
pub mod lease;
pub mod lock;
pub mod maintenance;
pub mod status;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;
use tonic_health::pb::health_server::HealthServer;

use crate::node::Node;
use crate::pb::etcdserverpb::auth_server::AuthServer;
use crate::pb::etcdserverpb::cluster_server::ClusterServer;
use crate::pb::etcdserverpb::kv_server::KvServer;
use crate::pb::etcdserverpb::lease_server::LeaseServer;
use crate::pb::etcdserverpb::maintenance_server::MaintenanceServer;
use crate::pb::etcdserverpb::watch_server::WatchServer;
use crate::pb::v3electionpb::election_server::ElectionServer;
use crate::pb::v3lockpb::lock_server::LockServer;

use self::gate::Gate;

/// The release of etcd whose API this is. Clients and tools ask for it to know what they may use.
pub const ETCD_VERSION: &str = "3.6.0";

/// How much larger than the largest request a message may be: so that a request which is only
/// slightly too large is refused by us, with etcd's text, and not by the transport.
const RECEIVE_HEADROOM_BYTES: usize = 512 * 1024;

/// How often an idle watch that asks for it hears of its progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(600);

/// Everything on the client port of `node`, for a server that speaks HTTP/1.1 and HTTP/2.
pub fn router(node: Arc<Node>) -> Router {
    let receive_bytes = node.limits().max_request_bytes + RECEIVE_HEADROOM_BYTES;
    let has_leader = Arc::new(node.has_leader());

    // The generated servers have no trait in common for their limits, hence a macro.
    macro_rules! gated {
        ($server:ident, $service:expr) => {
            Gate::new(
                $server::new($service)
                    .max_decoding_message_size(receive_bytes)
                    .accept_compressed(CompressionEncoding::Gzip),
                has_leader.clone(),
            )
        };
    }

    Routes::new(gated!(KvServer, kv::KvService::new(node.clone())))
        .add_service(gated!(WatchServer, watch_service(&node)))
        .add_service(gated!(LockServer, lock::LockService::new(node.clone())))
        .add_service(gated!(ElectionServer, election::ElectionService::new(node.clone())))
        .add_service(gated!(LeaseServer, lease::LeaseService::new(node.clone())))
        .add_service(gated!(ClusterServer, cluster::ClusterService::new(node.clone())))
        .add_service(gated!(MaintenanceServer, maintenance::MaintenanceService::new(node.clone())))
        .add_service(gated!(AuthServer, auth::AuthService::new(node.clone())))
        .add_service(gated!(HealthServer, health::HealthService))
        .into_axum_router()
        .merge(http::routes(node))
        .fallback(gate::unknown)
}

fn watch_service(node: &Arc<Node>) -> watch::WatchService {
    let headers = node.clone();
    watch::WatchService {
        hub: node.hub().clone(),
        store: node.store(),
        header: Arc::new(move |revision| header::at(&headers, revision)),
        authorize: Arc::new(|_, _| Ok(())),
        has_leader: node.has_leader(),
        max_request_bytes: node.limits().max_request_bytes,
        progress_interval: PROGRESS_INTERVAL,
    }
}
