//! The types openraft is instantiated with.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use bytes::Bytes;
use openraft::error::ClientWriteError;
use openraft::raft::ClientWriteResult;
use openraft::raft::responder::Responder;
use serde::{Deserialize, Serialize};

/// One leader a term, entries as encoded bytes, answers outside openraft: whoever proposed an
/// entry learns its outcome where this member applies it (`node/propose.rs`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Raft;

impl openraft::RaftTypeConfig for Raft {
    type D = Payload;
    type R = ();
    type NodeId = u64;
    type Node = PeerNode;
    type Term = u64;
    type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<Payload, u64, PeerNode>;
    type Entry =
        openraft::Entry<<Self::LeaderId as openraft::vote::RaftLeaderId>::Committed, Self::Payload>;
    type AsyncRuntime = openraft::impls::TokioRuntime;
    type Responder<T>
        = ProposalResponder<T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

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

/// Told the call and the term of a proposal that was not appended, and never will be.
pub type OnRefused = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// Listens for openraft's refusal of one proposal. A success is told where the entry is applied,
/// and the loss of an appended entry by the log itself.
pub struct ProposalResponder<T> {
    call: u64,
    term: u64,
    on_refused: OnRefused,
    result: PhantomData<fn(T)>,
}

impl<T> ProposalResponder<T> {
    pub fn new(call: u64, term: u64, on_refused: OnRefused) -> ProposalResponder<T> {
        ProposalResponder { call, term, on_refused, result: PhantomData }
    }
}

impl<T: Send + 'static> Responder<Raft, T> for ProposalResponder<T> {
    fn on_complete(self, result: T) {
        // openraft makes responders for one type of result alone, but is generic in it.
        let result: &dyn Any = &result;
        if let Some(Err(ClientWriteError::ForwardToLeader(_))) =
            result.downcast_ref::<ClientWriteResult<Raft>>()
        {
            (self.on_refused)(self.call, self.term);
        }
    }
}

/// How members reach a member, and as what it came.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerNode {
    /// Of a member that the cluster began with. One that was added makes its name known itself;
    /// until then it has none here, or the mark of a learner.
    pub name: String,
    pub peer_urls: Vec<String>,
}

/// What a learner has instead of a name. No name has a slash in it.
const LEARNER: &str = "/learner";

impl PeerNode {
    pub fn added(peer_urls: Vec<String>, learner: bool) -> PeerNode {
        let name = if learner { LEARNER } else { "" };
        PeerNode { name: name.to_owned(), peer_urls }
    }

    /// Whether it came as a learner. It is one as long as it is no voter.
    pub fn came_as_learner(&self) -> bool {
        self.name == LEARNER
    }

    /// Empty for a member that was added.
    pub fn first_name(&self) -> &str {
        if self.came_as_learner() { "" } else { &self.name }
    }
}

/// Whether `id` belongs to the cluster without a vote. One that was added as a voter and has none
/// yet does not count.
pub fn is_learner(membership: &Membership, id: u64) -> bool {
    let node = membership.membership().get_node(&id);
    node.is_some_and(PeerNode::came_as_learner) && !membership.voter_ids().any(|voter| voter == id)
}
