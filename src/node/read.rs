//! The point from which a linearizable read may be answered.
//!
//! All reads that wait on this member share one question: the leader confirms once, for all of
//! them, that it still leads. Reads that arrive while a round is under way wait for the next: an
//! answer to a question asked before a read began proves nothing for it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::ReadPolicy;
use tokio::sync::{Notify, oneshot};

use super::forward::ReadPoint;
use super::{Failure, Node, locked};
use crate::machine::HashKv;
use crate::mutant;
use crate::raft::snapshot::blocking;
use crate::types::Timestamp;

/// Between two rounds that found no leader, unless one turns up earlier.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// A round that takes this long counts as slow: etcd asks again after as much.
const SLOW_ROUND: Duration = Duration::from_millis(500);

type Waiting = oneshot::Sender<Result<ReadPoint, Failure>>;

/// Reads that wait for the next round; bounded by the calls that make them, each of which has one
/// deadline.
#[derive(Default)]
pub struct Reader {
    waiting: Mutex<Vec<Waiting>>,
    arrived: Notify,
}

impl Node {
    /// Returns when everything that any member acknowledged before this call is applied here.
    ///
    /// # Errors
    ///
    /// [`Failure::ReadTimedOut`] when no leader confirmed itself in time.
    pub async fn read_barrier(&self) -> Result<(), Failure> {
        self.read_point().await.map(drop)
    }

    /// As [`Node::read_barrier`]; returns the cluster time of the moment.
    pub async fn read_time(&self) -> Result<Timestamp, Failure> {
        let point = self.read_point().await?;
        Ok(point.now.max(self.machine().now()))
    }

    pub(super) async fn read_point(&self) -> Result<ReadPoint, Failure> {
        if *self.stopping.borrow() {
            return Err(Failure::Stopping);
        }
        let (answer, receiver) = oneshot::channel();
        locked(&self.reader.waiting).push(answer);
        self.reader.arrived.notify_one();
        match self.patiently(async { receiver.await.map_err(|_| Failure::Stopping)? }).await {
            Err(Failure::TimedOut) => {
                self.meters().reads_failed.increment();
                Err(Failure::ReadTimedOut)
            }
            other => other,
        }
    }

    /// Answers the reads that wait, round by round: runs as long as the member.
    pub(super) async fn keep_reading(self: Arc<Self>) {
        loop {
            self.reader.arrived.notified().await;
            let mut waiting = std::mem::take(&mut *locked(&self.reader.waiting));
            waiting.retain(|read| !read.is_closed());
            if waiting.is_empty() {
                continue;
            }
            let begun = self.clock.monotonic();
            let result = self.patiently(self.round()).await;
            if self.clock.monotonic().saturating_sub(begun) >= SLOW_ROUND {
                self.meters().slow_reads.increment();
            }
            match result {
                Ok(point) => {
                    for read in waiting {
                        // The caller may be gone by now.
                        let _ = read.send(Ok(point));
                    }
                }
                Err(_) => {
                    // They keep their place; each gives up at its own deadline.
                    locked(&self.reader.waiting).append(&mut waiting);
                    let mut role = self.shared.role.subscribe();
                    role.mark_unchanged();
                    tokio::select! {
                        _ = role.changed() => {}
                        () = tokio::time::sleep(RETRY_PAUSE) => {}
                    }
                    self.reader.arrived.notify_one();
                }
            }
        }
    }

    /// The hash of the history here up to `revision`; zero and below: the current one.
    pub async fn hash_kv(&self, revision: i64) -> Result<HashKv, Failure> {
        let view = self.view();
        // It reads all there is, which takes too long for the runtime.
        let hashed = blocking(false, move || Ok(view.hash_kv(revision))).await;
        Ok(hashed.map_err(|_| Failure::Stopping)??)
    }

    /// Makes the state durable, and its size on disk known.
    pub async fn flush_state(&self) -> Result<(), Failure> {
        self.writer.flush().await.map(drop).map_err(|_| Failure::Stopping)
    }

    async fn round(&self) -> Result<ReadPoint, Failure> {
        let role = self.role();
        let leader = role.leader.ok_or(Failure::NoLeader)?;
        let point = if leader == self.identity.member_id {
            self.confirm_leadership().await?
        } else {
            // One that is gone does not answer; there is no need to wait for that.
            let mut changes = self.shared.role.subscribe();
            let other = |now: &super::Role| now.term != role.term || now.leader != role.leader;
            tokio::select! {
                point = self.ask_read_point(leader) => point?,
                _ = changes.wait_for(other) => return Err(Failure::NoLeader),
            }
        };
        if !mutant::is("read-before-apply") {
            self.applied_up_to(point.index).await?;
        }
        Ok(point)
    }

    /// Confirms with a quorum that this member leads, for reads here or on a follower.
    pub(super) async fn confirm_leadership(&self) -> Result<ReadPoint, Failure> {
        let role = self.role();
        let leading = role.leading.ok_or(Failure::NoLeader)?;
        let now = leading.now(self.clock.as_ref());
        if mutant::is("read-unconfirmed") {
            return Ok(ReadPoint { index: self.applied_index(), now });
        }
        let linearizer = self.raft.get_read_linearizer(ReadPolicy::ReadIndex).await;
        let linearizer = linearizer.map_err(|_| Failure::NoLeader)?;
        Ok(ReadPoint { index: linearizer.read_log_id().index(), now })
    }

    /// Waits until entry `index` is applied here.
    pub(super) async fn applied_up_to(&self, index: u64) -> Result<(), Failure> {
        if *self.shared.applied.borrow() >= index {
            return Ok(());
        }
        let mut applied = self.shared.applied.subscribe();
        applied.wait_for(|applied| *applied >= index).await.map_err(|_| Failure::Stopping)?;
        Ok(())
    }

    /// The index of the newest entry applied here.
    pub(crate) fn applied_index(&self) -> u64 {
        *self.shared.applied.borrow()
    }

    /// Waits until entry `index` is applied here.
    pub(crate) async fn applied_up_to_entry(&self, index: u64) -> Result<(), Failure> {
        self.patiently(self.applied_up_to(index)).await
    }
}
