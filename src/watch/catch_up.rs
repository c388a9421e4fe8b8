//! Reads the history for a watcher that is behind, a chunk at a time.

use super::watcher::{Watcher, event_bytes};
use crate::machine::{Event, Rejection, Store};
use crate::mutant;

/// How many records one chunk scans at most: more would hold up the other tasks of the runtime.
const MOST_RECORDS: usize = 1024;
const FEWEST_RECORDS: usize = 16;

/// What one chunk should hold. A stream keeps one chunk in memory, whatever its client does.
const CHUNK_BYTES: usize = 512 << 10;

/// How many records to scan for the next chunk of a stream: fewer where values are large.
pub struct ChunkSize(usize);

impl Default for ChunkSize {
    fn default() -> ChunkSize {
        ChunkSize(256)
    }
}

impl ChunkSize {
    fn learn(&mut self, chunk_bytes: usize) {
        if chunk_bytes > CHUNK_BYTES {
            self.0 = (self.0 / 2).max(FEWEST_RECORDS);
        } else if chunk_bytes < CHUNK_BYTES / 2 {
            self.0 = (self.0 * 2).min(MOST_RECORDS);
        }
    }
}

/// The part of the history from where the watcher stands was compacted away.
#[derive(Debug, PartialEq, Eq)]
pub struct Compacted {
    /// The oldest revision a watch may start at.
    pub revision: i64,
}

/// The next events for a watcher that is behind and has nothing queued: whole revisions, possibly
/// none. Moves the watcher past them.
pub fn read_chunk(
    store: &Store,
    watcher: &Watcher,
    size: &mut ChunkSize,
) -> Result<Vec<Event>, Compacted> {
    let next = watcher.state().next;
    let view = store.view();
    if next > view.revision() {
        return Ok(Vec::new());
    }
    let changes = match view.changes(next, watcher.range(), size.0) {
        Ok(changes) => changes,
        Err(Rejection::Compacted { oldest, .. }) => return Err(Compacted { revision: oldest }),
        Err(other) => unreachable!("revision {next} is not in the future, yet: {other}"),
    };
    assert!(changes.next > next, "a chunk from {next} ends at {}", changes.next);
    let interest = watcher.interest();
    let events: Vec<Event> =
        changes.events.iter().filter_map(|event| interest.show(event)).collect();
    size.learn(events.iter().map(event_bytes).sum());
    let mut state = watcher.state();
    state.next = changes.next + i64::from(mutant::is("watch-joins-late"));
    if !events.is_empty() {
        state.quiet = false;
    }
    Ok(events)
}
