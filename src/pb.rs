//! The generated protobuf types, clients and servers of `proto/`, and one type of our own.
//!
//! A module per package, named like the package, so that the paths between packages resolve.

// The linter's taste does not apply to code that nobody wrote.
#![allow(clippy::all, missing_docs)]

mod watch_response;

pub use watch_response::{WatchResponse, pack};

/// Keys, values and their changes.
pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}

/// Users, roles and permissions.
pub mod authpb {
    tonic::include_proto!("authpb");
}

/// The services KV, Watch, Lease, Cluster, Maintenance and Auth.
pub mod etcdserverpb {
    pub use super::WatchResponse;
    tonic::include_proto!("etcdserverpb");
}

/// The service Lock.
pub mod v3lockpb {
    tonic::include_proto!("v3lockpb");
}

/// The service Election.
pub mod v3electionpb {
    tonic::include_proto!("v3electionpb");
}

pub use holdfast::peer::v1 as peer;
pub use holdfast::v1 as holdfastpb;

/// Our own: member to member, and what clients call beside etcd's services.
pub mod holdfast {
    pub mod v1 {
        tonic::include_proto!("holdfast.v1");
    }
    pub mod peer {
        pub mod v1 {
            tonic::include_proto!("holdfast.peer.v1");
        }
    }
}
