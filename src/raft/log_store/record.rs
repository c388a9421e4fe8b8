//! The bytes of one record.
//!
//! ```text
//! 0   crc32 of the place (segment, offset) and of everything below
//! 4   length of the payload
//! 8   synced: the offset up to which this segment was durable when the record was written
//! 12  kind, and three zero bytes
//! 16  payload
//! ```
//!
//! Numbers are little-endian. An entry's payload is its term, index and form, then the proposed
//! bytes as they are; the rest is bincode. The place is part of the checksum so that bytes which
//! are a record somewhere else, in a client's backup for example, are none here.
//!
//! `synced` is what tells a torn write from damage. Between two syncs a disk may write pages in any
//! order, so a good record after a bad one proves nothing by itself. But if the good one was written
//! after the bad one's place was durable, then the bad one was once good.

use std::io;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bytes::Bytes;
use openraft::EntryPayload;
use openraft::alias::CommittedLeaderIdOf;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::contents::Standing;
use crate::mutant;
use crate::raft::types::{LogEntry, LogId, Payload, Raft, Vote};

pub const HEADER_BYTES: usize = 16;

/// No record is longer. A proposal is held far below this by the limit on requests.
pub const MAX_RECORD_BYTES: usize = 256 << 20;

const ENTRY_HEAD_BYTES: usize = 17;

/// Bounds what decoding may allocate, should a checksum ever vouch for nonsense.
type Format = Configuration<LittleEndian, Fixint, Limit<{ 64 << 20 }>>;
const FORMAT: Format = bincode::config::legacy().with_limit();

/// What a log is made of, in the order in which it was asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    Entry(LogEntry),
    Vote(Vote),
    Committed(Option<LogId>),
    /// Entries after this one are gone.
    Truncate(Option<LogId>),
    /// Entries up to this one are gone.
    Purge(LogId),
    /// Opens every segment.
    Checkpoint(Checkpoint),
    /// Says nothing but that all before it is durable.
    Seal,
}

/// What earlier segments amount to, so that they can be removed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    pub standing: Standing,
    /// Where the records of the segment before end; zero in the first.
    pub previous_end: u64,
}

/// Where a record is, or will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub segment: u64,
    pub offset: u32,
}

/// A record ready to be written, in pieces, so that the bytes of a proposal are copied only once.
#[derive(Debug)]
pub struct Encoded<'a> {
    kind: Kind,
    head: Vec<u8>,
    tail: &'a [u8],
}

/// A record whose checksum is right.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    kind: Kind,
    pub synced: u32,
    payload: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Entry = 1,
    Vote = 2,
    Committed = 3,
    Truncate = 4,
    Purge = 5,
    Checkpoint = 6,
    Seal = 7,
}

impl Kind {
    const ALL: [Kind; 7] = [
        Kind::Entry,
        Kind::Vote,
        Kind::Committed,
        Kind::Truncate,
        Kind::Purge,
        Kind::Checkpoint,
        Kind::Seal,
    ];

    fn from_byte(byte: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

const FORM_BLANK: u8 = 0;
const FORM_NORMAL: u8 = 1;
const FORM_MEMBERSHIP: u8 = 2;

impl<'a> Encoded<'a> {
    pub fn entry(entry: &'a LogEntry) -> io::Result<Encoded<'a>> {
        let (form, membership, tail): (u8, Vec<u8>, &[u8]) = match &entry.payload {
            EntryPayload::Blank => (FORM_BLANK, Vec::new(), &[]),
            EntryPayload::Normal(Payload(bytes)) => (FORM_NORMAL, Vec::new(), bytes),
            EntryPayload::Membership(membership) => (FORM_MEMBERSHIP, to_bytes(membership)?, &[]),
        };
        let mut head = Vec::with_capacity(ENTRY_HEAD_BYTES + membership.len());
        head.extend_from_slice(&entry.log_id.leader_id.term.to_le_bytes());
        head.extend_from_slice(&entry.log_id.index.to_le_bytes());
        head.push(form);
        head.extend_from_slice(&membership);
        Ok(Encoded { kind: Kind::Entry, head, tail })
    }

    pub fn vote(vote: &Vote) -> io::Result<Encoded<'static>> {
        Encoded::small(Kind::Vote, vote)
    }

    pub fn committed(committed: &Option<LogId>) -> io::Result<Encoded<'static>> {
        Encoded::small(Kind::Committed, committed)
    }

    pub fn truncate(after: &Option<LogId>) -> io::Result<Encoded<'static>> {
        Encoded::small(Kind::Truncate, after)
    }

    pub fn purge(upto: &LogId) -> io::Result<Encoded<'static>> {
        Encoded::small(Kind::Purge, upto)
    }

    pub fn checkpoint(checkpoint: &Checkpoint) -> io::Result<Encoded<'static>> {
        Encoded::small(Kind::Checkpoint, checkpoint)
    }

    pub fn seal() -> Encoded<'static> {
        Encoded { kind: Kind::Seal, head: Vec::new(), tail: &[] }
    }

    fn small(kind: Kind, value: &impl Serialize) -> io::Result<Encoded<'static>> {
        Ok(Encoded { kind, head: to_bytes(value)?, tail: &[] })
    }

    pub fn is_seal(&self) -> bool {
        self.kind == Kind::Seal
    }

    /// Bytes it will take in the file.
    pub fn len(&self) -> usize {
        HEADER_BYTES + self.head.len() + self.tail.len()
    }

    /// Appends the record to `buffer`, to be written at `place`.
    pub fn write(&self, place: Place, synced: u32, buffer: &mut Vec<u8>) {
        let length = u32::try_from(self.head.len() + self.tail.len())
            .expect("the writer refuses what is longer than MAX_RECORD_BYTES");
        let start = buffer.len();
        buffer.extend_from_slice(&[0; 4]);
        buffer.extend_from_slice(&length.to_le_bytes());
        buffer.extend_from_slice(&synced.to_le_bytes());
        buffer.extend_from_slice(&[self.kind as u8, 0, 0, 0]);
        buffer.extend_from_slice(&self.head);
        buffer.extend_from_slice(self.tail);
        let crc = checksum(place, &buffer[start + 4..]);
        buffer[start..start + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

impl<'a> Frame<'a> {
    /// The record at the start of `bytes`, which were read from `place` and may go on after it.
    ///
    /// `None` when there is none: nothing is allocated and nothing decoded before the checksum of
    /// exactly that place is found right.
    pub fn parse(bytes: &'a [u8], place: Place) -> Option<Frame<'a>> {
        let header = bytes.get(..HEADER_BYTES)?;
        let kind = Kind::from_byte(header[12])?;
        let number = |at: usize| {
            u32::from_le_bytes(header[at..at + 4].try_into().expect("a slice of four bytes"))
        };
        let (crc, length, synced) = (number(0), number(4) as usize, number(8));
        if header[13..] != [0; 3] || length > MAX_RECORD_BYTES {
            return None;
        }
        let record = bytes.get(..HEADER_BYTES + length)?;
        let sound = checksum(place, &record[4..]) == crc || mutant::is("log-checksum-unchecked");
        sound.then(|| Frame { kind, synced, payload: &record[HEADER_BYTES..] })
    }

    /// Bytes it takes in the file.
    pub fn len(&self) -> usize {
        HEADER_BYTES + self.payload.len()
    }

    /// # Errors
    ///
    /// `InvalidData` if the payload, though its checksum is right, is not of this format.
    pub fn decode(&self) -> io::Result<Record> {
        Ok(match self.kind {
            Kind::Entry => Record::Entry(decode_entry(self.payload)?),
            Kind::Vote => Record::Vote(from_bytes(self.payload)?),
            Kind::Committed => Record::Committed(from_bytes(self.payload)?),
            Kind::Truncate => Record::Truncate(from_bytes(self.payload)?),
            Kind::Purge => Record::Purge(from_bytes(self.payload)?),
            Kind::Checkpoint => Record::Checkpoint(from_bytes(self.payload)?),
            Kind::Seal => Record::Seal,
        })
    }
}

fn decode_entry(payload: &[u8]) -> io::Result<LogEntry> {
    let (head, body) = payload
        .split_at_checked(ENTRY_HEAD_BYTES)
        .ok_or_else(|| invalid("an entry is shorter than its head"))?;
    let number =
        |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("a slice of eight"));
    let payload = match head[16] {
        FORM_BLANK if body.is_empty() => EntryPayload::Blank,
        // A copy of its own: a slice would pin whatever was read together with it.
        FORM_NORMAL => EntryPayload::Normal(Payload(Bytes::copy_from_slice(body))),
        FORM_MEMBERSHIP => EntryPayload::Membership(from_bytes(body)?),
        form => return Err(invalid(&format!("an entry has the unknown form {form}"))),
    };
    let leader_id = CommittedLeaderIdOf::<Raft>::new(number(0));
    Ok(LogEntry { log_id: LogId { leader_id, index: number(8) }, payload })
}

fn checksum(place: Place, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&place.segment.to_le_bytes());
    hasher.update(&place.offset.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

fn to_bytes(value: &impl Serialize) -> io::Result<Vec<u8>> {
    bincode::serde::encode_to_vec(value, FORMAT).map_err(io::Error::other)
}

fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, FORMAT)
        .map_err(|e| invalid(&format!("a record cannot be decoded: {e}")))?;
    if used != bytes.len() {
        return Err(invalid("a record is longer than its content"));
    }
    Ok(value)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use openraft::Membership;

    use super::*;
    use crate::raft::types::PeerNode;

    const PLACE: Place = Place { segment: 3, offset: 4096 };

    fn log_id(term: u64, index: u64) -> LogId {
        LogId { leader_id: CommittedLeaderIdOf::<Raft>::new(term), index }
    }

    fn encode(record: &Record) -> Vec<u8> {
        let encoded = match record {
            Record::Entry(entry) => Encoded::entry(entry),
            Record::Vote(vote) => Encoded::vote(vote),
            Record::Committed(committed) => Encoded::committed(committed),
            Record::Truncate(after) => Encoded::truncate(after),
            Record::Purge(upto) => Encoded::purge(upto),
            Record::Checkpoint(checkpoint) => Encoded::checkpoint(checkpoint),
            Record::Seal => Ok(Encoded::seal()),
        }
        .unwrap();
        let mut buffer = Vec::new();
        encoded.write(PLACE, 4000, &mut buffer);
        assert_eq!(buffer.len(), encoded.len());
        buffer
    }

    fn records() -> Vec<Record> {
        let entry = |payload| Record::Entry(LogEntry { log_id: log_id(7, 9), payload });
        let node = PeerNode { name: "m1".into(), peer_urls: vec!["http://m1:2380".into()] };
        let nodes = BTreeMap::from([(1, node)]);
        let membership = Membership::new(vec![BTreeSet::from([1])], nodes).unwrap();
        let standing = Standing {
            vote: Some(Vote::new(3, 1)),
            committed: None,
            purged: Some(log_id(1, 5)),
            last: Some(log_id(2, 8)),
        };
        vec![
            entry(EntryPayload::Blank),
            entry(EntryPayload::Normal(Payload(Bytes::from_static(b"a proposal")))),
            entry(EntryPayload::Normal(Payload(Bytes::new()))),
            entry(EntryPayload::Membership(membership)),
            Record::Vote(Vote::new_committed(8, 2)),
            Record::Committed(Some(log_id(7, 8))),
            Record::Truncate(None),
            Record::Purge(log_id(6, 6)),
            Record::Checkpoint(Checkpoint { standing, previous_end: 77 }),
            Record::Seal,
        ]
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        for record in records() {
            let mut bytes = encode(&record);
            bytes.extend_from_slice(b"what follows");
            let frame = Frame::parse(&bytes, PLACE).unwrap();
            assert_eq!((frame.synced, frame.len()), (4000, bytes.len() - 12));
            assert_eq!(frame.decode().unwrap(), record);
        }
    }

    #[test]
    fn no_flipped_bit_goes_unnoticed() {
        for record in records() {
            let bytes = encode(&record);
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(Frame::parse(&flipped, PLACE).is_none(), "{record:?}, bit {bit}");
            }
        }
    }

    #[test]
    fn a_record_is_none_at_another_place() {
        let bytes = encode(&Record::Seal);
        assert!(Frame::parse(&bytes, Place { offset: 4097, ..PLACE }).is_none());
        assert!(Frame::parse(&bytes, Place { segment: 4, ..PLACE }).is_none());
    }

    #[test]
    fn a_shortened_record_is_none() {
        let bytes = encode(&records()[1]);
        for length in 0..bytes.len() {
            assert!(Frame::parse(&bytes[..length], PLACE).is_none());
        }
    }
}
