//! What Holdfast answers, compared with what etcd answers.

// Real processes, in real time.
#![allow(clippy::disallowed_methods)]

mod cluster;
mod differential;

// The client tests' own, so that the two never take each other's ports.
#[path = "../clients/src/ports.rs"]
#[allow(dead_code)]
mod ports;

use cluster::{Cluster, Program};
use holdfast::pb::etcdserverpb::StatusRequest;
use holdfast::pb::etcdserverpb::maintenance_client::MaintenanceClient;

#[tokio::test]
async fn a_cluster_of_either_program_serves() {
    for program in [Program::Holdfast, Program::Etcd] {
        if program.path().is_some() {
            let cluster = Cluster::start(program, 3, &[]).await;
            for member in 0..cluster.size() {
                let mut client = MaintenanceClient::new(cluster.channel(member));
                let status = client.status(StatusRequest {}).await.unwrap().into_inner();
                assert_ne!(status.leader, 0);
            }
        }
    }
}
