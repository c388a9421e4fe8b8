//! The whole state at one revision: for a member that is too far behind for the log, for a backup,
//! and for the first state of a cluster that is made from one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::mvcc::{History, Hold};
use super::state::Meta;
use super::{Fault, Lease, Machine, Record, codec, schema};
use crate::types::{LeaseId, Revision, Timestamp};

/// The kinds of pairs that say something of the members a cluster had, which a new cluster does not
/// take over: alarms, how members are reached, and which were removed.
const OF_OLD_MEMBERS: [u8; 3] =
    [schema::ALARM_PREFIX, schema::MEMBER_PREFIX, schema::RETIRED_PREFIX];

/// Bytes of keys and values in a chunk, unless one pair alone is larger.
const CHUNK_BYTES: usize = 256 * 1024;

/// An engine's key and value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// Yields the state in chunks of pairs: written to an empty engine, they are a state that
/// [`super::Machine::load`] accepts and that has the same [`super::Machine::hash`].
///
/// It is consistent although applies go on: the small tables were copied when it was made, and the
/// records up to its revision never change. They are encoded chunk by chunk. A clone yields the same
/// chunks from where the original stands.
#[derive(Clone)]
pub struct Image {
    history: Arc<History>,
    tables: Arc<[Pair]>,
    /// How many of them it has yielded.
    tables_done: usize,
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
            tables: tables.into(),
            tables_done: 0,
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
        while let Some(pair) = self.tables.get(self.tables_done) {
            self.tables_done += 1;
            room = room.saturating_sub(size_bytes(pair));
            chunk.push(pair.clone());
            if room == 0 {
                return Some(chunk);
            }
        }
        let records = self.next.take().map(|next| self.history.records(next, self.last));
        for record in records.into_iter().flatten() {
            if room == 0 {
                self.next = Some(record.mod_revision());
                break;
            }
            let key = schema::record_key(record.mod_revision()).into();
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

/// How the state that a new cluster begins with differs from the one that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Afresh {
    /// Revisions skipped, so that none is given out a second time that was given out after the state
    /// was saved. Not negative.
    pub bump_revision: i64,
    /// Whether all history up to the first revision of the new cluster counts as compacted: who
    /// watches from an earlier one is told so.
    pub mark_compacted: bool,
}

impl Afresh {
    /// `pair` of the saved state as the new one has it; `None` for what stays behind: all that is of
    /// the members of the old cluster. Cluster time goes on where it stood, so each lease keeps what
    /// it had left.
    ///
    /// # Errors
    ///
    /// A pair that this release does not know, and a revision that the bump takes beyond all
    /// numbers.
    pub fn carry(&self, (key, value): Pair) -> Result<Option<Pair>, Fault> {
        match key.first() {
            _ if key == schema::AUTH_KEY => Ok(Some((key, value))),
            _ if key == schema::META_KEY => {
                let meta = self.renew(codec::decode_meta(&value)?)?;
                Ok(Some((key, codec::encode_meta(&meta))))
            }
            Some(kind) if OF_OLD_MEMBERS.contains(kind) => Ok(None),
            Some(
                &schema::FORCED_PREFIX
                | &schema::LABEL_PREFIX
                | &schema::LEASE_PREFIX
                | &schema::RECORD_PREFIX
                | &schema::ROLE_PREFIX
                | &schema::USER_PREFIX,
            ) => Ok(Some((key, value))),
            _ => {
                let what = format!("pair at {}", key.escape_ascii());
                Err(codec::corrupt(what, "this release does not know its kind"))
            }
        }
    }

    fn renew(&self, meta: Meta) -> Result<Meta, Fault> {
        // Half of all numbers remain for the new cluster.
        let revision = meta.revision.checked_add(self.bump_revision);
        let revision = revision.filter(|revision| *revision <= i64::MAX / 2).ok_or_else(|| {
            let reason = format!("{} more is beyond all revisions", self.bump_revision);
            codec::corrupt(format!("revision {}", meta.revision), reason)
        })?;
        let compacted = if self.mark_compacted { revision } else { meta.compacted };
        Ok(Meta { revision, compacted, ..meta })
    }
}

/// The numbers of a state that comes from another store, as [`Image`] would yield them. Cluster time
/// begins with it.
pub fn foreign_numbers(revision: i64, compacted: i64) -> Pair {
    let meta = Meta { revision, compacted, ..Machine::new().meta() };
    (schema::META_KEY.into(), codec::encode_meta(&meta))
}

/// A lease of another store with `remaining` left to live.
pub fn foreign_lease(id: LeaseId, ttl_seconds: i64, remaining: Duration) -> Pair {
    let deadline = Timestamp(0).plus(remaining);
    let lease = Lease { ttl_seconds, deadline, renewed_at_index: 0, keys: BTreeSet::new() };
    (schema::lease_key(id).into(), codec::encode_lease(&lease))
}

/// The newest state of a key of another store.
pub fn foreign_record(record: &Record) -> Pair {
    (schema::record_key(record.mod_revision()).into(), codec::encode_record(record))
}
