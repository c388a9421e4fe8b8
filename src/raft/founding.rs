//! Where the log of a cluster begins that is made from a saved state.
//!
//! Its members begin with the same state, applied up to the same place, and an empty log behind it.
//! To openraft such a cluster has begun: it is not initialized again, and elects a leader. The place
//! is of term 0, before each term in which anybody is elected.

use std::collections::BTreeMap;
use std::io;

use openraft::alias::CommittedLeaderIdOf;

use super::applier::{RAFT_STATE_KEY, encode_state};
use super::log_store::LogStore;
use super::snapshot::RaftState;
use super::types::{LogId, Membership, PeerNode, Raft};
use crate::machine::Pair;

/// Where the log begins: all up to this index is in the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beginning {
    pub index: u64,
}

impl Beginning {
    fn log_id(self) -> LogId {
        LogId { leader_id: CommittedLeaderIdOf::<Raft>::new(0), index: self.index }
    }

    /// What stands in the engine beside the machine's own pairs. `members`: all voters.
    ///
    /// # Errors
    ///
    /// When there is no member.
    pub fn pair(self, members: &BTreeMap<u64, PeerNode>) -> io::Result<Pair> {
        let voters = members.keys().copied().collect();
        let membership = openraft::Membership::new(vec![voters], members.clone());
        let membership = membership.map_err(io::Error::other)?;
        let at = Some(self.log_id());
        let state = RaftState { applied: at, membership: Membership::new(at, membership) };
        Ok((RAFT_STATE_KEY.to_vec(), encode_state(&state)?))
    }

    /// Lets an empty log begin here. Durable once the log is closed.
    pub fn mark(self, log: &LogStore) -> io::Result<()> {
        log.remove_up_to(self.log_id())
    }
}
