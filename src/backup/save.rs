//! A running member's state on its way into a file.
//!
//! The size is told with the first piece, so the image is gone through twice: once to count, once to
//! encode. It holds while applies go on, and physical removal of old history waits for it
//! meanwhile. So a client must take each piece in time, and few may come at once.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use super::format::{Encoder, Header, SavedMember, Size};
use crate::machine::Image;
use crate::node::{Failure, Node, told};

/// Snapshots under way on a member; one more is refused.
pub const MOST_AT_ONCE: usize = 4;
/// A client that takes no piece for so long has its snapshot ended.
const TAKE_WITHIN: Duration = Duration::from_secs(10);
/// The most of the file that is handed out at once.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces that wait for the client.
const PIECES_AHEAD: usize = 4;

/// A part of the file.
#[derive(Debug)]
pub struct Piece {
    pub bytes: Bytes,
    /// What is still to come after it; zero in the last.
    pub remaining_bytes: u64,
}

/// Hands out snapshots of a member's state.
pub struct Saves {
    places: Arc<Semaphore>,
    take_within: Duration,
}

impl Default for Saves {
    fn default() -> Saves {
        Saves::with_patience(TAKE_WITHIN)
    }
}

impl Saves {
    /// Gives clients this long to take a piece.
    pub fn with_patience(take_within: Duration) -> Saves {
        Saves { places: Arc::new(Semaphore::new(MOST_AT_ONCE)), take_within }
    }

    /// The state applied on `node` now, as the pieces of a file.
    ///
    /// # Errors
    ///
    /// [`Failure::TooManyRequests`] while [`MOST_AT_ONCE`] are under way. The stream ends with
    /// [`Failure::Stopping`] when the member stops, and with [`Failure::TimedOut`] when the client
    /// does not take what there is.
    pub fn begin(
        &self,
        node: &Arc<Node>,
    ) -> Result<impl Stream<Item = Result<Piece, Failure>> + Send + 'static, Failure> {
        let mut stopping = node.stopping();
        if *stopping.borrow() {
            return Err(Failure::Stopping);
        }
        let place = self.places.clone().try_acquire_owned();
        let place = place.map_err(|_| Failure::TooManyRequests)?;
        let (image, applied_index) = node.image();
        let header = header_of(node, image.revision(), applied_index);
        let take_within = self.take_within;
        let (pieces, taken) = mpsc::channel(PIECES_AHEAD);
        let (end, ended) = oneshot::channel();
        node.background().spawn(async move {
            let end_of = tokio::select! {
                result = send(image, header, Pieces { pieces, take_within, remaining_bytes: 0 }, place) => result,
                () = told(&mut stopping) => Err(Failure::Stopping),
            };
            // A client that has gone does not ask how it ended.
            let _ = end.send(end_of);
        });
        // Without this, a file that was cut off would look like one that has ended.
        let end = stream::once(ended).filter_map(async |ended| match ended {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => Some(Err(failure)),
            Err(_) => Some(Err(Failure::Unknown)),
        });
        Ok(ReceiverStream::new(taken).map(Ok).chain(end))
    }
}

fn header_of(node: &Node, revision: i64, applied_index: u64) -> Header {
    let members = node.members().into_iter().map(|member| SavedMember {
        id: member.id.to_string(),
        name: member.name,
        peer_urls: member.peer_urls,
        is_learner: member.is_learner,
    });
    Header {
        release: env!("CARGO_PKG_VERSION").to_owned(),
        cluster_id: node.identity().cluster_id.to_string(),
        revision,
        applied_index,
        term: node.role().term,
        members: members.collect(),
    }
}

/// Where the pieces go.
struct Pieces {
    pieces: mpsc::Sender<Piece>,
    take_within: Duration,
    remaining_bytes: u64,
}

impl Pieces {
    async fn put(&mut self, bytes: Vec<u8>) -> Result<(), Failure> {
        let mut bytes = Bytes::from(bytes);
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
            self.remaining_bytes -= piece.len() as u64;
            let piece = Piece { bytes: piece, remaining_bytes: self.remaining_bytes };
            match tokio::time::timeout(self.take_within, self.pieces.send(piece)).await {
                Ok(Ok(())) => {}
                // The client has gone: nobody hears what is told.
                Ok(Err(_)) => return Err(Failure::Stopping),
                Err(_) => return Err(Failure::TimedOut),
            }
        }
        Ok(())
    }
}

/// Counts `image`, then encodes it; a block a turn, so that others go on.
async fn send(
    image: Image,
    header: Header,
    mut to: Pieces,
    _place: OwnedSemaphorePermit,
) -> Result<(), Failure> {
    let mut size = Size::of(&header);
    for chunk in image.clone() {
        size.add(&chunk);
        if to.pieces.is_closed() {
            return Err(Failure::Stopping);
        }
        tokio::task::yield_now().await;
    }
    to.remaining_bytes = size.total();
    let (mut encoder, bytes) = Encoder::begin(&header);
    to.put(bytes).await?;
    for chunk in image {
        to.put(encoder.block(&chunk)).await?;
        tokio::task::yield_now().await;
    }
    to.put(encoder.end()).await
}
