//! Changes of keys, as they happen or from a revision in the past.
//!
//! ```text
//! applier --publish--> Hub --index by key--> Watcher's queue --+
//!                                                              +--> WatchStream::next
//! Store   --view.changes, a chunk at a time, while behind -----+
//! ```
//!
//! A watcher is *live* or *behind*. A live one stands in the hub's index and is handed each event
//! as it is published. One that is behind reads the history from views, and joins the live ones at
//! an exact revision: under the hub's lock, once it has read up to what was published. When its
//! stream's queue is full it falls behind again. So a slow client costs neither memory nor events,
//! and never delays the applier.
//!
//! What a [`WatchStream`] hands out holds whole revisions, in order, each once, for each watch.

mod catch_up;
mod census;
mod hub;
mod index;
mod intervals;
mod stream;
mod watcher;

#[cfg(test)]
mod exactness;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use census::Census;
pub use hub::Hub;
pub use stream::{Created, Delivery, Refused, WatchSpec, WatchStream};

/// How much one stream holds of what its client has not taken yet: keys, values and
/// [`EVENT_BYTES`] for each event. When the next event would pass it, the watch it is for falls
/// behind, lets go of its part of the queue, and reads it again from the history later.
pub const QUEUE_BYTES: usize = 1 << 20;

/// What an event counts for in a queue beside its keys and values.
pub const EVENT_BYTES: usize = 128;

/// Watches on one stream. Creating one more is refused.
pub const WATCHES_PER_STREAM: usize = 100_000;

/// Progress requests of one stream that wait for their answer. More are answered together with the
/// last of these.
pub const PROGRESS_REQUESTS: usize = 128;
