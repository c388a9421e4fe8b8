//! Locks and elections: who waits for which queue, and how a waiting call survives its leader.
//!
//! The queue itself is replicated state (`machine/queue.rs`): the keys `NAME/LEASEHEX`, in the
//! order of their create revisions. A Lock or Campaign call joins it with one command, and is
//! granted by the entry that makes its key the first: the leader's waiters (`node/waiters.rs`)
//! learn of it as the leader applies that entry, and this one call wakes.
//!
//! - [`server`]: the wait, on the leader;
//! - [`client`]: the call on the member that the client asked, which joins the queue, finds the
//!   leader, asks again when another one takes over, and cleans up when the client goes away;
//! - [`peer_service`]: the way from one to the other;
//! - [`locks`]: plain locks as our own API shows them, and what it does to them;
//! - [`hold`]: a session, a lock and an alarm in one stream;
//! - [`rules`]: what an operator may choose, and the leases that the server makes;
//! - [`election`]: what the Election service has beyond queueing.

pub mod client;
pub mod election;
pub mod hold;
pub mod locks;
pub mod peer_service;
pub mod rules;
pub mod server;

use std::sync::Arc;

use crate::node::Node;
use rules::{Rules, ServerLeases};

/// What the services for locks and elections work with. Clones share everything.
#[derive(Clone)]
pub struct Queues {
    pub node: Arc<Node>,
    pub rules: Rules,
    pub server_leases: Arc<ServerLeases>,
}

impl Queues {
    pub fn new(node: Arc<Node>, rules: Rules) -> Queues {
        Queues { node, rules, server_leases: Arc::default() }
    }
}
