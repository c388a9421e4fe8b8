//! The whole state at one revision, for a member that is too far behind for the log.

use std::sync::Arc;

use super::codec;
use super::mvcc::{History, Hold};
use super::schema;
use crate::types::Revision;

/// Bytes of keys and values in a chunk, unless one pair alone is larger.
const CHUNK_BYTES: usize = 256 * 1024;

/// An engine's key and value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// Yields the state in chunks of pairs: written to an empty engine, they are a state that
/// [`super::Machine::load`] accepts and that has the same [`super::Machine::hash`].
///
/// It is consistent although applies go on: the small tables were copied when it was made, and the
/// records up to its revision never change. They are encoded chunk by chunk.
pub struct Image {
    history: Arc<History>,
    tables: std::vec::IntoIter<Pair>,
    next: Option<Revision>,
    last: Revision,
    /// Keeps the records that the image has yet to yield.
    _hold: Hold,
}

impl Image {
    /// `tables`: all pairs beside the records.
    pub(super) fn new(history: &Arc<History>, tables: Vec<Pair>) -> Image {
        Image {
            _hold: history.hold(),
            tables: tables.into_iter(),
            next: Some(Revision::default()),
            last: Revision::last_of(history.published()),
            history: history.clone(),
        }
    }

    /// The revision of the state.
    pub fn revision(&self) -> i64 {
        self.last.main
    }
}

impl Iterator for Image {
    type Item = Vec<Pair>;

    fn next(&mut self) -> Option<Vec<Pair>> {
        let mut chunk = Vec::new();
        let mut room = CHUNK_BYTES;
        for pair in self.tables.by_ref() {
            room = room.saturating_sub(size_bytes(&pair));
            chunk.push(pair);
            if room == 0 {
                return Some(chunk);
            }
        }
        let records = self.next.take().map(|next| self.history.records(next, self.last));
        for record in records.into_iter().flatten() {
            if room == 0 {
                self.next = Some(record.mod_revision);
                break;
            }
            let key = schema::record_key(record.mod_revision).into();
            let pair = (key, codec::encode_record(&record));
            room = room.saturating_sub(size_bytes(&pair));
            chunk.push(pair);
        }
        (!chunk.is_empty()).then_some(chunk)
    }
}

fn size_bytes((key, value): &Pair) -> usize {
    key.len() + value.len()
}
