//! Keeps the log short, in bytes.
//!
//! openraft counts entries: it has the state made durable, and the log purged up to there, once in
//! `--snapshot-count` of them. An entry may be a megabyte. So this member also looks how much the log
//! takes, and asks for both earlier. What is purged is in a snapshot, and while a member is being sent
//! one, none is made: what that member will ask for next is still there.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;

use super::Node;
use crate::raft::log_store::LogStore;

const LOOK: Duration = Duration::from_secs(1);

impl Node {
    /// Has everything purged that lies before the newest segment and the `kept` ones before it, until
    /// the log or raft stops.
    pub(super) async fn keep_log_short(self: Arc<Node>, log: LogStore, kept: u64) {
        loop {
            tokio::time::sleep(LOOK).await;
            // Whatever stopped them is told of elsewhere.
            let Ok(surplus) = log.surplus(kept) else { return };
            let Some(surplus) = surplus else { continue };
            let snapshot = self.raft.metrics().borrow_watched().snapshot;
            let covered = snapshot.map_or(0, |snapshot| snapshot.index);
            if covered < surplus && self.raft.trigger().snapshot().await.is_err() {
                return;
            }
            let purged = surplus.min(covered);
            if purged > 0 && self.raft.trigger().purge_log(purged).await.is_err() {
                return;
            }
        }
    }
}
