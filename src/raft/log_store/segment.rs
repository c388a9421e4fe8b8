//! A segment: one file of the log.
//!
//! Its name is `SEQUENCE-FIRSTINDEX.log`: the sequence number orders the files, the index of the
//! first entry that may be in it is for people and tools. It is preallocated, so that appending
//! changes no metadata, and opens with
//!
//! ```text
//! 0   magic "HOLDFLOG"
//! 8   format version
//! 12  crc32 of the numbers below
//! 16  sequence number
//! 24  index of the first entry that may be in it
//! 32  records, the first of them a checkpoint
//! ```
//!
//! The zeros behind the last record are its normal end.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::vfs::{Vfs, VfsFile};

pub const MAGIC: &[u8; 8] = b"HOLDFLOG";
pub const VERSION: u32 = 1;
pub const HEADER_BYTES: usize = 32;

/// What a segment's name and header say of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentId {
    /// Counts from one, without gaps.
    pub sequence: u64,
    pub first_index: u64,
}

/// A segment in use.
#[derive(Debug)]
pub struct Segment {
    pub id: SegmentId,
    pub path: PathBuf,
    pub file: Arc<dyn VfsFile>,
    /// The greatest index of an entry that was ever written to it. Once that is purged, so is all
    /// the segment holds.
    pub max_index: Option<u64>,
}

/// What the first bytes of a file are.
#[derive(Debug, PartialEq, Eq)]
pub enum Header {
    Good(SegmentId),
    /// Of a format that a later release writes.
    Future {
        version: u32,
    },
    Damaged,
}

impl SegmentId {
    pub fn file_name(&self) -> String {
        format!("{:010}-{:020}.log", self.sequence, self.first_index)
    }

    pub fn from_file_name(name: &str) -> Option<SegmentId> {
        let (sequence, first_index) = name.strip_suffix(".log")?.split_once('-')?;
        let id =
            SegmentId { sequence: sequence.parse().ok()?, first_index: first_index.parse().ok()? };
        (id.file_name() == name).then_some(id)
    }

    pub fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        header[24..].copy_from_slice(&self.first_index.to_le_bytes());
        let crc = crc32fast::hash(&header[16..]);
        header[12..16].copy_from_slice(&crc.to_le_bytes());
        header
    }
}

impl Header {
    pub fn parse(bytes: &[u8]) -> Header {
        let Some(header) = bytes.get(..HEADER_BYTES) else { return Header::Damaged };
        let number = |at: usize| {
            u32::from_le_bytes(header[at..at + 4].try_into().expect("a slice of four bytes"))
        };
        let long = |at: usize| {
            u64::from_le_bytes(header[at..at + 8].try_into().expect("a slice of eight bytes"))
        };
        if header[..8] != *MAGIC {
            return Header::Damaged;
        }
        // What follows the version is for that version to say.
        match number(8) {
            VERSION if number(12) == crc32fast::hash(&header[16..]) => {
                Header::Good(SegmentId { sequence: long(16), first_index: long(24) })
            }
            version if version > VERSION => Header::Future { version },
            _ => Header::Damaged,
        }
    }
}

impl Segment {
    /// Creates a segment of `bytes` zeros and writes its header. Neither is durable yet.
    pub fn create(vfs: &dyn Vfs, dir: &Path, id: SegmentId, bytes: u64) -> io::Result<Segment> {
        let path = dir.join(id.file_name());
        let file = vfs.create(&path)?;
        file.allocate(bytes)?;
        file.write_at(0, &id.header())?;
        Ok(Segment { id, path, file, max_index: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SegmentId = SegmentId { sequence: 12, first_index: 345_678 };

    #[test]
    fn the_name_orders_and_identifies() {
        assert_eq!(ID.file_name(), "0000000012-00000000000000345678.log");
        assert_eq!(SegmentId::from_file_name(&ID.file_name()), Some(ID));
        for other in ["", "12-345678.log", "0000000012-x.log", "lost+found"] {
            assert_eq!(SegmentId::from_file_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_header_is_good_or_of_the_future_or_damaged() {
        let header = ID.header();
        assert_eq!(Header::parse(&header), Header::Good(ID));
        let mut future = header;
        future[8] = 2;
        assert_eq!(Header::parse(&future), Header::Future { version: 2 });
        for at in (0..8).chain(12..HEADER_BYTES) {
            let mut damaged = header;
            damaged[at] ^= 1;
            assert_eq!(Header::parse(&damaged), Header::Damaged, "byte {at}");
        }
        assert_eq!(Header::parse(&header[..31]), Header::Damaged);
        assert_eq!(Header::parse(&[0; 32]), Header::Damaged);
    }
}
