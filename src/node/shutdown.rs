//! How a member stops: it hands leadership over, answers what is under way, and makes its state
//! durable.

use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;

use super::Node;
use super::bootstrap::Member;
use crate::types::MemberId;

/// The next leader gets this long to take over.
const HAND_OVER: Duration = Duration::from_millis(1_500);
/// Between two attempts to hand over.
const HAND_OVER_RETRY: Duration = Duration::from_millis(500);

impl Node {
    /// Hands leadership to the voter whose log reaches furthest, and returns when it leads, or when
    /// nobody takes over in time.
    pub async fn hand_over(&self) {
        self.hand_over_to_one(|_| true).await;
    }

    /// [`Node::hand_over`], to one of those that are `willing`.
    pub(super) async fn hand_over_to_one(&self, willing: impl Fn(u64) -> bool) {
        let me = self.identity.member_id;
        let mut role = self.watch_role();
        let attempts = async {
            loop {
                let target = {
                    let metrics = self.raft.metrics();
                    let metrics = metrics.borrow_watched();
                    if metrics.current_leader != Some(me.0) {
                        break;
                    }
                    let voters: Vec<u64> = metrics.membership_config.voter_ids().collect();
                    let progress = metrics.replication.iter().flatten();
                    // One that answers first, however near another one's log had come.
                    let answers = |id| self.shared.contacts.since(MemberId(id)).is_some();
                    progress
                        .filter(|(id, _)| **id != me.0 && voters.contains(id) && willing(**id))
                        .max_by_key(|(id, matched)| {
                            (answers(**id), matched.as_ref().map(|log_id| log_id.index))
                        })
                        .map(|(id, _)| *id)
                };
                let Some(target) = target else { return };
                if self.raft.trigger().transfer_leader(target).await.is_err() {
                    return;
                }
                let taken = role.wait_for(|role| role.leader.is_some_and(|leader| leader != me));
                // Not taken in time: asked again.
                if let Ok(Ok(_)) = tokio::time::timeout(HAND_OVER_RETRY, taken).await {
                    return;
                }
            }
        };
        if tokio::time::timeout(HAND_OVER, attempts).await.is_err() {
            tracing::warn!("nobody took over the leadership");
        }
    }

    /// Begins to stop: streams end, new calls are refused.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }
}

impl Member {
    /// Ends the member's tasks and makes log and state durable. Clients and peers are no longer
    /// served.
    pub async fn stop(mut self) {
        self.node.stop();
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "raft did not end in order");
        }
        self.tasks.shutdown().await;
        if let Err(error) = self.writer.flush().await {
            tracing::error!(%error, "the state is not flushed; the log will replay it");
        }
        if let Err(error) = self.log.close() {
            tracing::error!(%error, "the log is not closed in order");
        }
    }
}
