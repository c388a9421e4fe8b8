//! A new leader as soon as the old one's process has died, not after the election timeout.
//!
//! `raft/succession.rs` finds out that the leader is gone and asks the others for their confidence;
//! here is who asks when. The voters take turns in the order of their ids, so that two do not ask at
//! once. One that is asked by a member whose log is shorter than its own need not wait for its turn.

use std::sync::Arc;
use std::time::Duration;

use super::Node;
use crate::raft::succession::Ballot;

/// A turn is this part of the election timeout: a few messages and no sync.
const TURNS_IN_ELECTION_TIMEOUT: u32 = 50;

impl Node {
    /// Stands for election whenever the leader is found gone: runs as long as the member.
    pub(super) async fn keep_succeeding(self: Arc<Self>) {
        loop {
            self.succession.suspected().await;
            // It could not even note its own vote.
            if self.disk_stalled() {
                continue;
            }
            if let Some(rank) = self.succession.rank().await {
                let patience = self.limits.election_timeout;
                if tokio::time::timeout(patience, self.stand(rank)).await.is_err() {
                    // openraft's own timeouts go on from here.
                    tracing::info!("no majority for a successor of the leader that is gone");
                }
            }
        }
    }

    /// Asks the others, `rank` turns from now and again, until this member stands for election or
    /// there is no need to.
    async fn stand(&self, rank: usize) {
        let turn = self.limits.election_timeout / TURNS_IN_ELECTION_TIMEOUT;
        let rank = u32::try_from(rank).unwrap_or(u32::MAX);
        let mut pause = turn.saturating_mul(rank);
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.succession.outrun() => {}
            }
            if self.succession.favours_another() {
                pause = turn;
                continue;
            }
            match self.succession.ask().await {
                Ballot::Stands | Ballot::Pointless => return,
                // Not in step with another that is refused each time, too.
                Ballot::Refused => {
                    pause = turn.saturating_mul(rank.saturating_add(1)) + self.part_of(turn);
                }
            }
        }
    }

    /// A random time up to `turn`.
    fn part_of(&self, turn: Duration) -> Duration {
        turn.mul_f64(self.entropy.random_u64() as f64 / u64::MAX as f64)
    }
}
