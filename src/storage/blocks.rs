//! Blocks: many records of the history under one key of the engine.
//!
//! An engine asks about a hundred bytes and a microsecond for each pair, and its leaves are rounded
//! up to the sizes it has slots for. So the history, whose records come in ascending order and never
//! change, lies in blocks of about [`BLOCK_BYTES`]:
//!
//! ```text
//! 'z' first revision (12)   format byte 1, then for each record
//!                             main revision, from the first one's
//!                             sub revision
//!                             length of the value
//!                             the value
//! 'y' first revision (12)   format byte 1, then for each record of that block that is gone
//!                             main revision, from the first one's
//!                             sub revision
//! ```
//!
//! Numbers are LEB128. A block keeps its key when records are taken out of it, the first one too.
//! This module only knows the bytes; which blocks there are is `packed.rs`'s.

use std::collections::BTreeSet;
use std::io;

use crate::types::Revision;

/// The key prefix of blocks: behind all others, where ascending keys fill an engine's leaves.
pub const BLOCK_PREFIX: u8 = b'z';
/// The key prefix of the notes on what is gone from a block.
pub const GONE_PREFIX: u8 = b'y';

/// A block is closed before it grows beyond this, unless one record alone is larger. Thirty of them,
/// which is what a leaf of the engine holds, fill a slot of 256 KiB.
pub const BLOCK_BYTES: usize = 8_680;

const FORMAT: u8 = 1;

/// Two numbers of ten bytes at most, and one of five.
const LARGEST_HEAD_BYTES: usize = 20;

pub fn block_key(first: Revision) -> [u8; 13] {
    key(BLOCK_PREFIX, first)
}

pub fn gone_key(first: Revision) -> [u8; 13] {
    key(GONE_PREFIX, first)
}

/// The revision in a key of either kind.
pub fn first_revision(key: &[u8]) -> io::Result<Revision> {
    let revision = key.get(1..).and_then(Revision::from_bytes);
    revision.ok_or_else(|| damaged(key, "it names no revision"))
}

fn key(prefix: u8, first: Revision) -> [u8; 13] {
    let mut key = [prefix; 13];
    key[1..].copy_from_slice(&first.to_bytes());
    key
}

/// A block that is being filled.
#[derive(Debug, Clone)]
pub struct Block {
    first: Revision,
    records: u32,
    bytes: Vec<u8>,
}

impl Block {
    pub fn new(first: Revision) -> Block {
        Block { first, records: 0, bytes: vec![FORMAT] }
    }

    /// Goes on with a stored block that has `records`.
    pub fn resume(first: Revision, records: u32, bytes: Vec<u8>) -> Block {
        Block { first, records, bytes }
    }

    pub fn first(&self) -> Revision {
        self.first
    }

    pub fn records(&self) -> u32 {
        self.records
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether a value of that length may still go in.
    pub fn has_room(&self, value_bytes: usize) -> bool {
        self.records == 0 || self.bytes.len() + LARGEST_HEAD_BYTES + value_bytes <= BLOCK_BYTES
    }

    /// Adds a record, later than all that are in.
    pub fn push(&mut self, revision: Revision, value: &[u8]) {
        put_revision(&mut self.bytes, self.first, revision);
        put_number(&mut self.bytes, value.len() as u64);
        self.bytes.extend_from_slice(value);
        self.records += 1;
    }
}

/// Calls `visit` with each record of a stored block, in order, until it returns false. Returns whether
/// it never did.
///
/// # Errors
///
/// `InvalidData` for bytes that [`Block`] does not produce.
pub fn read(
    first: Revision,
    bytes: &[u8],
    mut visit: impl FnMut(Revision, &[u8]) -> bool,
) -> io::Result<bool> {
    let damaged = |what: &str| damaged(&block_key(first), what);
    let mut rest = body(bytes).ok_or_else(|| damaged("its format is not known"))?;
    while !rest.is_empty() {
        let revision = take_revision(&mut rest, first);
        let length = take_number(&mut rest).and_then(|length| usize::try_from(length).ok());
        let value = length.and_then(|length| rest.split_at_checked(length));
        let (Some(revision), Some((value, behind))) = (revision, value) else {
            return Err(damaged("a record does not read"));
        };
        rest = behind;
        if !visit(revision, value) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The note that `gone` are gone from the block.
pub fn encode_gone(first: Revision, gone: &BTreeSet<Revision>) -> Vec<u8> {
    let mut bytes = vec![FORMAT];
    gone.iter().for_each(|revision| put_revision(&mut bytes, first, *revision));
    bytes
}

/// The inverse of [`encode_gone`].
pub fn decode_gone(first: Revision, bytes: &[u8]) -> io::Result<BTreeSet<Revision>> {
    let damaged = |what: &str| damaged(&gone_key(first), what);
    let mut rest = body(bytes).ok_or_else(|| damaged("its format is not known"))?;
    let mut gone = BTreeSet::new();
    while !rest.is_empty() {
        let revision = take_revision(&mut rest, first);
        gone.insert(revision.ok_or_else(|| damaged("a revision does not read"))?);
    }
    Ok(gone)
}

fn body(bytes: &[u8]) -> Option<&[u8]> {
    bytes.split_first().filter(|(format, _)| **format == FORMAT).map(|(_, body)| body)
}

fn damaged(key: &[u8], what: &str) -> io::Error {
    let text = format!("block at {}: {what}", key.escape_ascii());
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn put_revision(bytes: &mut Vec<u8>, first: Revision, revision: Revision) {
    put_number(bytes, revision.main.wrapping_sub(first.main) as u64);
    put_number(bytes, u64::from(revision.sub));
}

fn take_revision(bytes: &mut &[u8], first: Revision) -> Option<Revision> {
    let main = i64::try_from(take_number(bytes)?).ok()?;
    let sub = u32::try_from(take_number(bytes)?).ok()?;
    Some(Revision::new(first.main.checked_add(main)?, sub))
}

fn put_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn records(first: Revision, bytes: &[u8]) -> io::Result<Vec<(Revision, Vec<u8>)>> {
        let mut found = Vec::new();
        read(first, bytes, |revision, value| {
            found.push((revision, value.to_vec()));
            true
        })?;
        Ok(found)
    }

    #[test]
    fn a_block_gives_back_what_went_in() {
        let first = Revision::new(i64::MAX / 2, 3);
        let mut block = Block::new(first);
        let all = [
            (first, vec![]),
            (Revision::new(first.main, u32::MAX), vec![7; 300]),
            (Revision::new(first.main + 1_000_000, 0), b"value".to_vec()),
        ];
        all.iter().for_each(|(revision, value)| block.push(*revision, value));
        assert_eq!(block.records(), 3);
        assert_eq!(records(first, block.bytes()).unwrap(), all);
    }

    #[test]
    fn a_block_has_room_up_to_its_bound_and_for_one_record_of_any_size() {
        let mut block = Block::new(Revision::new(2, 0));
        assert!(block.has_room(1 << 20));
        let mut main = 2;
        while block.has_room(256) {
            block.push(Revision::new(main, 0), &[1; 256]);
            main += 1;
        }
        assert!((BLOCK_BYTES - 300..=BLOCK_BYTES).contains(&block.bytes().len()));
    }

    #[test]
    fn damaged_bytes_are_refused_without_a_panic() {
        let mut random = StdRng::seed_from_u64(5);
        let first = Revision::new(9, 0);
        let mut block = Block::new(first);
        (9..40).for_each(|main| block.push(Revision::new(main, 1), &[3; 9]));
        let gone = (9..40).map(|main| Revision::new(main, 1)).collect();
        for _ in 0..20_000 {
            for original in [block.bytes(), &encode_gone(first, &gone)] {
                let mut bytes = original.to_vec();
                for _ in 0..random.random_range(0..3) {
                    let at = random.random_range(0..bytes.len());
                    bytes[at] = random.random();
                }
                bytes.truncate(random.random_range(0..=bytes.len()));
                let _ = records(first, &bytes);
                let _ = decode_gone(first, &bytes);
            }
        }
        assert!(records(first, &[2]).unwrap_err().to_string().contains("format"));
        assert!(records(first, &[]).is_err());
    }

    #[test]
    fn the_bytes_never_change() {
        let first = Revision::new(300, 0);
        let mut block = Block::new(first);
        block.push(first, b"one");
        block.push(Revision::new(300, 200), b"");
        block.push(Revision::new(445, 1), b"two");
        assert_eq!(block.bytes(), b"\x01\0\0\x03one\0\xc8\x01\0\x91\x01\x01\x03two");
        let gone = BTreeSet::from([first, Revision::new(445, 1)]);
        assert_eq!(encode_gone(first, &gone), b"\x01\0\0\x91\x01\x01");
        assert_eq!(block_key(first), *b"z\0\0\0\0\0\0\x01\x2c\0\0\0\0");
        assert_eq!(gone_key(first), *b"y\0\0\0\0\0\0\x01\x2c\0\0\0\0");
    }

    #[test]
    fn what_is_gone_survives_its_bytes() {
        let first = Revision::new(5, 1);
        let gone = BTreeSet::from([first, Revision::new(5, 2), Revision::new(900, 0)]);
        assert_eq!(decode_gone(first, &encode_gone(first, &gone)).unwrap(), gone);
    }
}
