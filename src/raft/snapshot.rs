//! A member's state on its way to another one.
//!
//! The state travels as the pairs its engine would store, so that installing it is writing them
//! into a fresh engine. The sender streams from an image that holds while it goes on applying; the
//! receiver writes each chunk away as it comes.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::frame;
use super::types::{Membership, SnapshotMeta, SnapshotOf, Vote};
use crate::machine::Image;
use crate::pb::peer::Frame;
use crate::storage::{Batch, Home, Staged};

/// A sender that is silent for longer has gone.
const PART_DEADLINE: Duration = Duration::from_secs(10);
/// What is received is made durable in pieces of this many chunks, so that it does not all wait in
/// memory.
const CHUNKS_A_FLUSH: u64 = 256;
/// How long a member that was sent a snapshot may take to ask for the entries after it.
const CATCH_UP: Duration = Duration::from_secs(30);

/// What openraft hands around as a snapshot.
pub enum SnapshotData {
    /// Of this member's own state, to be sent.
    Image(Box<Image>, Outgoing),
    /// What this member has made durable in its own engine. Nobody reads it again.
    Durable,
    /// Received, durable, not yet in use.
    Staged(Mutex<Staged>),
}

/// Held while a snapshot is on its way to another member, until that one has installed it: the log
/// behind the snapshot must not be purged meanwhile, or the member would need the next snapshot as
/// soon as it has this one.
#[derive(Clone)]
pub struct Outgoing {
    end: Arc<OutgoingEnd>,
}

struct OutgoingEnd {
    sending: Arc<Mutex<Sending>>,
    delivered: AtomicBool,
}

/// The snapshots that are on their way.
#[derive(Default)]
pub struct Sending {
    under_way: usize,
    last_delivery: Option<tokio::time::Instant>,
}

impl Outgoing {
    pub fn begin(sending: &Arc<Mutex<Sending>>) -> Outgoing {
        sending.lock().unwrap_or_else(PoisonError::into_inner).under_way += 1;
        let end = OutgoingEnd { sending: sending.clone(), delivered: AtomicBool::new(false) };
        Outgoing { end: Arc::new(end) }
    }

    /// The other member has installed it, and will ask for the entries behind it.
    pub fn delivered(&self) {
        self.end.delivered.store(true, Ordering::Relaxed);
    }
}

impl Drop for OutgoingEnd {
    fn drop(&mut self) {
        let mut sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        sending.under_way -= 1;
        // openraft tries again and again to send one to a member that is down. Were the log held for
        // that, it would grow for as long.
        if *self.delivered.get_mut() {
            sending.last_delivery = Some(tokio::time::Instant::now());
        }
    }
}

impl Sending {
    /// Whether a member may still need the log behind a snapshot that it was sent.
    pub fn needs_log(&self) -> bool {
        self.under_way > 0 || self.last_delivery.is_some_and(|end| end.elapsed() < CATCH_UP)
    }
}

#[derive(Serialize, Deserialize)]
enum Part {
    Begin {
        vote: Vote,
        meta: SnapshotMeta,
    },
    /// Numbered from zero.
    Chunk {
        number: u64,
        pairs: Vec<(ByteBuf, ByteBuf)>,
    },
    End {
        chunks: u64,
    },
}

/// Sends `snapshot` into `chunks`, part by part, as fast as the peer takes them.
///
/// # Errors
///
/// When the peer takes none for `deadline`, or has stopped listening.
pub async fn send(
    vote: Vote,
    snapshot: SnapshotOf,
    chunks: mpsc::Sender<Frame>,
    deadline: Duration,
) -> Result<(), Status> {
    let SnapshotData::Image(mut image, _outgoing) = snapshot.snapshot else {
        return Err(Status::internal("a received snapshot is not sent on"));
    };
    let put = async |part: Part| {
        let sent = tokio::time::timeout(deadline, chunks.send(frame::encode(&part)?)).await;
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::unavailable("the peer stopped taking the snapshot")),
            Err(_) => Err(Status::unavailable("the peer takes the snapshot too slowly")),
        }
    };
    put(Part::Begin { vote, meta: snapshot.meta }).await?;
    let mut number = 0;
    for chunk in image.by_ref() {
        let pairs = chunk.into_iter().map(|(k, v)| (ByteBuf::from(k), ByteBuf::from(v))).collect();
        put(Part::Chunk { number, pairs }).await?;
        number += 1;
        // Encoding a chunk takes long enough for others to want their turn.
        tokio::task::yield_now().await;
    }
    put(Part::End { chunks: number }).await
}

/// Receives what [`send`] sent, into a staged state that is durable when this returns.
///
/// # Errors
///
/// When a part is missing, damaged or out of order, the disk fails, or `has_room` turns false.
/// Nothing is in use then, and the next start removes what was staged.
pub async fn receive(
    mut parts: Streaming<Frame>,
    home: Arc<Home>,
    has_room: impl Fn() -> bool,
) -> Result<(Vote, SnapshotOf), Status> {
    let next = async |parts: &mut Streaming<Frame>| match tokio::time::timeout(
        PART_DEADLINE,
        parts.message(),
    )
    .await
    {
        Ok(part) => match part? {
            Some(part) => frame::decode::<Part>(&part),
            None => Err(Status::data_loss("the snapshot ends early")),
        },
        Err(_) => Err(Status::deadline_exceeded("the snapshot has stopped coming")),
    };
    let Part::Begin { vote, meta } = next(&mut parts).await? else {
        return Err(Status::data_loss("the snapshot has no beginning"));
    };
    let simulated = home.is_simulated();
    let mut staged = blocking(simulated, move || home.stage()).await?;
    let mut received = 0;
    loop {
        let part = next(&mut parts).await?;
        if !has_room() {
            return Err(Status::unavailable("the disk of this member is full"));
        }
        match part {
            Part::Chunk { number, pairs } if number == received => {
                received += 1;
                staged = blocking(simulated, move || {
                    if received % CHUNKS_A_FLUSH == 0 {
                        staged.engine().flush()?;
                    }
                    write(
                        &mut staged,
                        pairs.into_iter().map(|(k, v)| (k.into_vec(), v.into_vec())),
                    )?;
                    Ok(staged)
                })
                .await?;
            }
            Part::End { chunks } if chunks == received => break,
            _ => return Err(Status::data_loss("the snapshot's parts are out of order")),
        }
    }
    let staged = blocking(simulated, move || {
        staged.engine().flush()?;
        Ok(staged)
    })
    .await?;
    Ok((vote, SnapshotOf { meta, snapshot: SnapshotData::Staged(Mutex::new(staged)) }))
}

/// Stages an image of another state of this process: what the tests of the storage do.
pub fn stage(image: Image, home: &Home) -> io::Result<Staged> {
    let mut staged = home.stage()?;
    for chunk in image {
        write(&mut staged, chunk.into_iter())?;
    }
    Ok(staged)
}

fn write(staged: &mut Staged, pairs: impl Iterator<Item = (Vec<u8>, Vec<u8>)>) -> io::Result<()> {
    let mut batch = Batch::default();
    for (key, value) in pairs {
        batch.put(key, value);
    }
    staged.engine().apply(batch)
}

/// The place in the log and the membership that go with a state, as stored in its engine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RaftState {
    pub applied: Option<super::types::LogId>,
    pub membership: Membership,
}

/// Runs what blocks on the disk away from the runtime; at once if `simulated`, where nothing does.
#[allow(clippy::disallowed_methods, reason = "an install blocks on the disk for seconds")]
pub async fn blocking<T: Send + 'static>(
    simulated: bool,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Status> {
    let done = if simulated { Ok(work()) } else { tokio::task::spawn_blocking(work).await };
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Status::internal(format!("snapshot: {error}"))),
        Err(error) => Err(Status::internal(format!("snapshot: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_on_its_way_holds_the_log_back_and_a_delivered_one_for_a_while_after() {
        let sending = Arc::<Mutex<Sending>>::default();
        let needs_log = || sending.lock().expect("nobody panicked").needs_log();
        assert!(!needs_log(), "nothing was sent");
        let outgoing = Outgoing::begin(&sending);
        let held_by_the_network = outgoing.clone();
        drop(outgoing);
        assert!(needs_log(), "it is on its way");
        drop(held_by_the_network);
        assert!(!needs_log(), "who is not reached holds nothing back");
        let outgoing = Outgoing::begin(&sending);
        outgoing.delivered();
        drop(outgoing);
        assert_eq!(sending.lock().expect("nobody panicked").under_way, 0);
        assert!(needs_log(), "its receiver still has to ask for what follows");
    }
}
