//! How much room this member's disk has, and what it does when there is little.
//!
//! ```text
//! free space   enough          | low                             | full
//!                           256 MiB                           128 MiB
//! writes       taken           | refused, deletes are taken      | the same
//! leadership   kept            | handed to a member with room    | the same
//! replication  taken           | taken                           | not taken, hence not confirmed
//! reads        answered        | answered                        | answered
//! ```
//!
//! Refusing begins before the log or the engine meets an error of the disk: the engine is of no use
//! after one, so the member would have to stop. When there is room again, it goes on by itself. It is
//! a condition of this member alone, beside the quota of the cluster.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::Duration;

use tokio::sync::watch;

use super::{Node, told};
use crate::machine::{Command, FencedWrite, Txn, TxnOp};
use crate::vfs::Vfs;

/// Below this, writes are refused. In between there is room for entries that were taken before, on
/// whichever member, and for the removal of data.
const LOW_BYTES: u64 = 256 << 20;
/// Below this, no entries are taken. What was taken has room: a segment of the log, the queue of the
/// state writer, and what the engine has not flushed.
const FULL_BYTES: u64 = 128 << 20;
/// So much more is needed before either is over, lest it come and go with each file.
const MARGIN_BYTES: u64 = 32 << 20;

/// How often the disk is looked at. In that time this member writes far less than lies between the
/// bounds.
const LOOK: Duration = Duration::from_millis(500);
/// How often a leader without room looks for a successor.
const HAND_OVER_LOOK: Duration = Duration::from_secs(1);
/// The others get this long to say whether they have room.
const ROOM_DEADLINE: Duration = Duration::from_millis(500);

/// What there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Room {
    Full,
    Low,
    Enough,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskState {
    pub room: Room,
    pub free_bytes: u64,
}

impl DiskState {
    fn after(before: Room, free_bytes: u64) -> DiskState {
        // A bound that is passed downward has to be passed upward with a margin.
        let bound = |bytes, passed: bool| if passed { bytes + MARGIN_BYTES } else { bytes };
        let room = if free_bytes < bound(FULL_BYTES, before == Room::Full) {
            Room::Full
        } else if free_bytes < bound(LOW_BYTES, before != Room::Enough) {
            Room::Low
        } else {
            Room::Enough
        };
        DiskState { room, free_bytes }
    }
}

/// Looks at the disk as long as it lives.
#[derive(Debug)]
pub struct Disk {
    state: watch::Receiver<DiskState>,
    _stop: mpsc::Sender<()>,
}

impl Disk {
    /// Looks at the file system of `dir` once, and from then on in a thread.
    ///
    /// # Errors
    ///
    /// When the file system does not tell, or there is no thread.
    #[allow(
        clippy::disallowed_methods,
        reason = "asking a file system may block; nothing follows from its pace"
    )]
    pub fn watch(vfs: Arc<dyn Vfs>, dir: PathBuf) -> io::Result<Disk> {
        let first = DiskState::after(Room::Enough, vfs.free_bytes(&dir)?);
        let (sender, state) = watch::channel(first);
        let (stop, stopped) = mpsc::channel();
        let simulated = vfs.simulated_time().is_some();
        if first.room < Room::Enough {
            tell(first);
        }
        let look = move || {
            // A disk that cannot be asked fails its writes, which tells more.
            let Ok(free_bytes) = vfs.free_bytes(&dir) else { return };
            let before = sender.borrow().room;
            let now = DiskState::after(before, free_bytes);
            if now.room != before {
                tell(now);
            }
            sender.send_replace(now);
        };
        if simulated {
            tokio::spawn(async move {
                while stopped.try_recv() == Err(TryRecvError::Empty) {
                    tokio::time::sleep(LOOK).await;
                    look();
                }
            });
        } else {
            thread::Builder::new().name("disk-room".to_owned()).spawn(move || {
                while stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                    look();
                }
            })?;
        }
        Ok(Disk { state, _stop: stop })
    }

    pub fn state(&self) -> DiskState {
        *self.state.borrow()
    }

    pub fn subscribe(&self) -> watch::Receiver<DiskState> {
        self.state.clone()
    }
}

fn tell(state: DiskState) {
    let free_bytes = state.free_bytes;
    match state.room {
        Room::Enough => tracing::info!(free_bytes, "the disk has room again: taking writes"),
        Room::Low => tracing::warn!(
            free_bytes,
            low_bytes = LOW_BYTES,
            "the disk is nearly full: refusing writes until there is room again"
        ),
        Room::Full => tracing::error!(
            free_bytes,
            full_bytes = FULL_BYTES,
            "the disk is full: taking no more entries until there is room again"
        ),
    }
}

/// Whether what `command` leaves behind takes more room than it gives back.
pub fn grows(command: &Command) -> bool {
    match command {
        Command::Put(_)
        | Command::LeaseGrant { .. }
        | Command::Enqueue(_)
        | Command::Proclaim(_)
        | Command::Join(_) => true,
        Command::Txn(txn) => puts(txn),
        Command::Fenced(fenced) => match &fenced.write {
            FencedWrite::Put(_) => true,
            FencedWrite::DeleteRange(_) => false,
            FencedWrite::Txn(txn) => puts(txn),
        },
        _ => false,
    }
}

fn puts(txn: &Txn) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match op {
        TxnOp::Put(_) => true,
        TxnOp::Range(_) | TxnOp::DeleteRange(_) => false,
        TxnOp::Txn(txn) => puts(txn),
    })
}

impl Node {
    pub fn disk(&self) -> DiskState {
        self.disk.state()
    }

    /// Hands leadership to a member whose disk has room, as long as this one has little and leads.
    pub(super) async fn keep_room_for_leader(self: Arc<Self>) {
        let mut disk = self.disk.subscribe();
        let mut stopping = self.stopping.subscribe();
        let me = self.identity.member_id;
        let attempts = async {
            while disk.wait_for(|state| state.room < Room::Enough).await.is_ok() {
                if self.role().leader == Some(me) {
                    let willing = self.voters_with_room().await;
                    if !willing.is_empty() {
                        tracing::warn!("handing leadership to a member whose disk has room");
                        self.hand_over_to_one(|id| willing.contains(&id)).await;
                    }
                }
                tokio::time::sleep(HAND_OVER_LOOK).await;
            }
        };
        tokio::select! {
            () = attempts => {}
            () = told(&mut stopping) => {}
        }
    }

    /// The other voters that answer, and have room.
    async fn voters_with_room(&self) -> BTreeSet<u64> {
        let questions = self.other_voters().into_iter().map(|(id, node)| async move {
            let mut client = self.links.peer(id, &node).ok()?.forward();
            let question = crate::raft::frame::encode(&()).ok()?;
            let answer = tokio::time::timeout(ROOM_DEADLINE, client.room(question)).await;
            let room = crate::raft::frame::decode::<bool>(answer.ok()?.ok()?.get_ref()).ok()?;
            room.then_some(id)
        });
        futures::future::join_all(questions).await.into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::machine::{Put, Range};
    use crate::types::KeyRange;
    use crate::vfs::MemVfs;

    #[test]
    fn a_bound_is_passed_upward_with_a_margin() {
        let mut room = Room::Enough;
        let mib = 1 << 20;
        for (free, expected) in [
            (256, Room::Enough),
            (255, Room::Low),
            (287, Room::Low),
            (288, Room::Enough),
            (127, Room::Full),
            (159, Room::Full),
            (160, Room::Low),
            (256, Room::Low),
            (0, Room::Full),
            (300, Room::Enough),
        ] {
            let state = DiskState::after(room, free * mib);
            assert_eq!(state.room, expected, "{free} MiB free after {room:?}");
            room = state.room;
        }
    }

    #[tokio::test]
    async fn room_that_goes_and_comes_back_is_seen() {
        let vfs = MemVfs::default();
        vfs.set_capacity(LOW_BYTES + MARGIN_BYTES);
        let disk = Disk::watch(Arc::new(vfs.clone()), PathBuf::from("/")).expect("a disk");
        assert_eq!(disk.state().room, Room::Enough);
        let mut seen = disk.subscribe();
        for (capacity, expected) in
            [(LOW_BYTES - 1, Room::Low), (10, Room::Full), (1 << 30, Room::Enough)]
        {
            vfs.set_capacity(capacity);
            seen.wait_for(|state| state.room == expected).await.expect("it is looked at");
        }
    }

    #[test]
    fn only_what_leaves_more_behind_grows() {
        let key = Bytes::from_static(b"k");
        let put = Put { key: key.clone(), value: None, lease: None, prev_kv: false };
        let txn = |success, failure| Txn { compares: Vec::new(), success, failure };
        let range = TxnOp::Range(Range::all(KeyRange::prefix(&key)));
        let nested = TxnOp::Txn(txn(Vec::new(), vec![TxnOp::Put(put.clone())]));
        assert!(grows(&Command::Put(put)));
        assert!(grows(&Command::Txn(txn(vec![range.clone()], vec![nested]))));
        assert!(!grows(&Command::Txn(txn(vec![range], Vec::new()))));
        assert!(!grows(&Command::Compact { revision: 4 }));
    }
}
