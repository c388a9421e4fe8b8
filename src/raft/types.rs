//! The types openraft is instantiated with.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

openraft::declare_raft_types!(
    /// One leader a term, entries as encoded bytes, answers outside openraft: whoever proposed an
    /// entry learns its outcome where this member applies it (`node/propose.rs`).
    pub Raft:
        D = Payload,
        R = (),
        NodeId = u64,
        Node = PeerNode,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
);

pub type LogId = openraft::alias::LogIdOf<Raft>;
pub type Vote = openraft::alias::VoteOf<Raft>;
pub type LogEntry = openraft::alias::EntryOf<Raft>;
pub type Membership = openraft::alias::StoredMembershipOf<Raft>;
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<Raft>;
pub type SnapshotOf = openraft::alias::SnapshotOf<Raft, super::snapshot::SnapshotData>;

/// An encoded [`crate::machine::Entry`]. It is encoded once, where it is proposed; log, network and
/// every copy share the bytes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload(pub Bytes);

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes)", self.0.len())
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// How members reach a member.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerNode {
    /// Empty until the member has started once.
    pub name: String,
    pub peer_urls: Vec<String>,
}
