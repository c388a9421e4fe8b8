//! Holdfast: locks, leader election and replicated configuration behind etcd's v3 API.
//!
//! `docs/architecture.md` tells how the layers fit together.

pub mod api;
pub mod backup;
pub mod cli;
pub mod clock;
mod codec;
pub mod concurrency;
pub mod config;
#[cfg(test)]
mod fuzz;
mod gather;
pub mod machine;
pub mod metrics;
pub(crate) mod mutant;
pub mod node;
pub mod pb;
pub mod raft;
pub mod server;
pub mod storage;
pub mod telemetry;
pub mod types;
pub mod vfs;
pub mod watch;
