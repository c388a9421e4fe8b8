//! What whoever watches over this member may want to know of it, read when asked.

use openraft::async_runtime::watch::WatchReceiver;

use super::{DiskState, Node};
use crate::machine::Alarm;
use crate::watch::Census;

/// How this member stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub has_leader: bool,
    pub is_leader: bool,
    pub is_learner: bool,
    /// Of the log, as far as this member knows.
    pub committed_index: u64,
    pub applied_index: u64,
    pub proposals_pending: usize,
    pub db_size_bytes: u64,
    pub db_size_in_use_bytes: u64,
    /// What the state's files take, compressed.
    pub disk_bytes: u64,
    pub quota_bytes: Option<u64>,
    pub alarms: Vec<Alarm>,
    pub revision: i64,
    /// -1 before the first compaction.
    pub compacted: i64,
    /// Without those deleted.
    pub keys: usize,
    pub watches: Census,
    pub disk: DiskState,
}

impl Node {
    pub fn facts(&self) -> Facts {
        let status = self.status();
        let committed = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            let known = metrics.cluster_committed.map(|committed| committed.index);
            known.unwrap_or(0).max(status.applied_index)
        };
        let role = self.role();
        let (keys, alarms) = {
            let machine = self.machine();
            (machine.live_keys(), machine.alarms().collect())
        };
        Facts {
            has_leader: status.leader.is_some(),
            is_leader: status.leader.is_some() && role.leader == Some(self.identity.member_id),
            is_learner: status.is_learner,
            committed_index: committed,
            applied_index: status.applied_index,
            proposals_pending: self.shared.calls.len(),
            db_size_bytes: status.db_size_bytes,
            db_size_in_use_bytes: status.db_size_in_use_bytes,
            disk_bytes: self.writer.size_bytes(),
            quota_bytes: status.quota_bytes,
            alarms,
            revision: self.store.revision(),
            compacted: self.store.compacted(),
            keys,
            watches: self.hub().census(),
            disk: self.disk(),
        }
    }
}
