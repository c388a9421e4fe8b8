//! Where openraft meets our log, our machine and our network.
//!
//! - [`types`]: what openraft is instantiated with;
//! - [`log_store`]: the durable log;
//! - [`applier`] and [`snapshot`]: the state machine, and a whole state on its way to another member;
//! - [`founding`]: the log and the membership of a cluster that begins with a state;
//! - [`links`], [`frame`], [`network`], [`peer_service`], [`traffic`]: how members talk, and how much;
//! - [`succession`]: the end of a leader, noticed before any timeout.

pub mod applier;
pub mod founding;
pub mod frame;
pub mod links;
pub mod log_store;
pub mod network;
pub mod peer_service;
pub mod snapshot;
pub mod succession;
pub mod traffic;
pub mod types;
