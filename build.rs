//! Turns `proto/` into Rust, without a `protoc` on the machine.
//!
//! Paths are relative: cargo runs this in the folder of the package.

use std::error::Error;

const FILES: [&str; 14] = [
    "etcd/mvccpb.proto",
    "etcd/authpb.proto",
    "etcd/header.proto",
    "etcd/kv.proto",
    "etcd/watch.proto",
    "etcd/lease.proto",
    "etcd/cluster.proto",
    "etcd/maintenance.proto",
    "etcd/auth.proto",
    "etcd/v3lockpb.proto",
    "etcd/v3electionpb.proto",
    "holdfast/peer.proto",
    "holdfast/v1/locks.proto",
    "holdfast/v1/elections.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=build.rs");
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .bytes(".")
        .codec_path("crate::codec::LeanCodec")
        .extern_path(".etcdserverpb.WatchResponse", "crate::pb::WatchResponse")
        .compile_fds(descriptors)?;
    Ok(())
}
