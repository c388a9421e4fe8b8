//! Leadership handed on because an operator asks for it.

use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;

use super::{Failure, Node};
use crate::types::MemberId;

/// The chosen member has this long to take over before it is asked again.
const TAKE_OVER: Duration = Duration::from_millis(500);
/// How many entries the chosen member may lack when it is asked. The leader takes no writes until
/// it has them.
const ENTRIES_LACKING: u64 = 1_000;

/// Why leadership stays where it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MoveFailure {
    #[error("not leader")]
    NotLeader,
    #[error("the target is no voting member")]
    BadTransferee,
    /// The target did not take over in time, or another member did.
    #[error("the target did not take over in time")]
    TooSlow,
    #[error(transparent)]
    Failed(#[from] Failure),
}

impl Node {
    /// Returns once member `target` leads. To be asked of the leader.
    ///
    /// A target that is not there, or lacks many entries, is waited for: the leader takes no writes
    /// from when it lets go until another leads.
    pub async fn move_leader(&self, target: MemberId) -> Result<(), MoveFailure> {
        let me = self.identity.member_id;
        if self.leader() != Some(me) {
            return Err(MoveFailure::NotLeader);
        }
        if !self.members().iter().any(|member| member.id == target && !member.is_learner) {
            return Err(MoveFailure::BadTransferee);
        }
        if target == me {
            return Ok(());
        }
        match tokio::time::timeout(self.limits.call_timeout, self.hand_on(target)).await {
            Ok(moved) => moved,
            Err(_) => Err(MoveFailure::TooSlow),
        }
    }

    async fn hand_on(&self, target: MemberId) -> Result<(), MoveFailure> {
        let me = self.identity.member_id;
        let mut role = self.watch_role();
        let stopped = |_| Failure::Stopping;
        loop {
            self.nearly_has_all(target).await?;
            let leads = role.borrow().leader;
            if leads == Some(me) {
                let asked = self.raft.trigger().transfer_leader(target.0).await;
                asked.map_err(|_| Failure::Stopping)?;
            }
            let taken = role.wait_for(|role| role.leader.is_some_and(|leader| leader != me));
            // Not taken in time: asked again.
            if let Ok(taken) = tokio::time::timeout(TAKE_OVER, taken).await {
                let leader = taken.map_err(stopped)?.leader;
                return if leader == Some(target) { Ok(()) } else { Err(MoveFailure::TooSlow) };
            }
        }
    }

    /// Returns when `target` lacks few entries, or this member no longer leads.
    async fn nearly_has_all(&self, target: MemberId) -> Result<(), Failure> {
        let mut metrics = self.raft.metrics();
        loop {
            {
                let now = metrics.borrow_and_update();
                let Some(progress) = &now.replication else { return Ok(()) };
                let matched = progress.get(&target.0).cloned().flatten();
                let wanted = now.last_log_index.unwrap_or(0).saturating_sub(ENTRIES_LACKING);
                let is_voter = now.membership_config.voter_ids().any(|id| id == target.0);
                let is_there = self.shared.contacts.since(target).is_some();
                if is_there && is_voter && matched.is_some_and(|matched| matched.index >= wanted) {
                    return Ok(());
                }
            }
            metrics.changed().await.map_err(|_| Failure::Stopping)?;
        }
    }
}
