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
//! 32  length of the file
//! 40  records, the first of them a checkpoint
//! ```
//!
//! The zeros behind the last record are its normal end. A file shorter than its header says was cut
//! by somebody else. It gets its name when its header and checkpoint are durable; until then it has
//! a draft's name, so a file that has the name and does not read is damaged and not unfinished.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::mutant;
use crate::vfs::{Vfs, VfsFile};

pub const MAGIC: &[u8; 8] = b"HOLDFLOG";
pub const VERSION: u32 = 2;
pub const HEADER_BYTES: usize = 40;

const DRAFT: &str = ".new";

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
    Good {
        id: SegmentId,
        length: u64,
    },
    /// Of a format that another release writes.
    Other {
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

    /// The name of a file that is to become this segment.
    pub fn draft_name(&self) -> String {
        format!("{}{DRAFT}", self.file_name())
    }

    pub fn is_draft_name(name: &str) -> bool {
        name.strip_suffix(DRAFT).is_some_and(|name| SegmentId::from_file_name(name).is_some())
    }

    pub fn header(&self, length: u64) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        header[24..32].copy_from_slice(&self.first_index.to_le_bytes());
        header[32..].copy_from_slice(&length.to_le_bytes());
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
                let id = SegmentId { sequence: long(16), first_index: long(24) };
                Header::Good { id, length: long(32) }
            }
            VERSION => Header::Damaged,
            version => Header::Other { version },
        }
    }
}

impl Segment {
    /// Creates a draft of `bytes` zeros and writes its header. Neither is durable yet.
    pub fn draft(vfs: &dyn Vfs, dir: &Path, id: SegmentId, bytes: u64) -> io::Result<Segment> {
        let file = vfs.create(&dir.join(id.draft_name()))?;
        file.allocate(bytes)?;
        file.write_at(0, &id.header(bytes))?;
        Ok(Segment { id, path: dir.join(id.file_name()), file, max_index: None })
    }

    /// Gives a draft, whose beginning is durable, its name, durably.
    pub fn publish(&self, vfs: &dyn Vfs, dir: &Path) -> io::Result<()> {
        vfs.rename(&dir.join(self.id.draft_name()), &self.path)?;
        if mutant::is("segment-name-unsynced") {
            return Ok(());
        }
        vfs.sync_dir(dir)
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
        assert!(SegmentId::is_draft_name(&ID.draft_name()));
        assert!(!SegmentId::is_draft_name(&ID.file_name()));
        for other in ["", "12-345678.log", "0000000012-x.log", "lost+found"] {
            assert_eq!(SegmentId::from_file_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_header_is_good_or_of_another_release_or_damaged() {
        let header = ID.header(4096);
        assert_eq!(Header::parse(&header), Header::Good { id: ID, length: 4096 });
        for version in [1, 3] {
            let mut other = header;
            other[8] = version;
            assert_eq!(Header::parse(&other), Header::Other { version: u32::from(version) });
        }
        for at in (0..8).chain(12..HEADER_BYTES) {
            let mut damaged = header;
            damaged[at] ^= 1;
            assert_eq!(Header::parse(&damaged), Header::Damaged, "byte {at}");
        }
        assert_eq!(Header::parse(&header[..HEADER_BYTES - 1]), Header::Damaged);
        assert_eq!(Header::parse(&[0; HEADER_BYTES]), Header::Damaged);
    }
}
