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

/// How members reach a member.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerNode {
    /// Empty until the member has started once.
    pub name: String,
    pub peer_urls: Vec<String>,
}
