//! The bytes of a snapshot file.
//!
//! ```text
//! 0    magic "HOLDSNAP"
//! 8    u32  format version
//! 12   u32  length of the header
//! 16   u32  crc32 of bytes 0..16 and the header
//! 20   the header, JSON
//!      blocks:
//!        u32  length of the payload, not zero
//!        u32  crc32 of the block's number (u64, from zero), the length, and the payload
//!        pairs: u32 length of the key, the key, u32 length of the value, the value
//!      the end:
//!        u32  zero
//!        u32  crc32 as above
//!        u64  how many pairs there were
//!      zeros, so that what comes before the hash is a multiple of 512
//!      SHA-256 of everything before
//! ```
//!
//! Numbers are little-endian. etcd's tools take a file for a snapshot only if its length is 32 modulo
//! 512, hence the zeros. The pairs are those of the engine, as [`crate::machine::Image`] yields them.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::machine::{LARGEST_VALUE_BYTES, Pair};

pub const MAGIC: [u8; 8] = *b"HOLDSNAP";
/// The version this code writes, and the only one so far.
pub const FORMAT: u32 = 1;

/// Magic, version, length and checksum.
pub const HEAD_BYTES: usize = 20;
/// Of each block, and of the end.
pub const BLOCK_HEAD_BYTES: usize = 8;
/// A header lists a few members.
pub const LARGEST_HEADER_BYTES: usize = 1 << 20;
/// A block is at most a chunk of an image: pairs that are small together, and one that need not be.
pub const LARGEST_BLOCK_BYTES: usize = LARGEST_VALUE_BYTES + (1 << 20);

pub const HASH_BYTES: usize = 32;
const ALIGNMENT: u64 = 512;

/// What a file says of itself before the state begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The release that wrote it.
    pub release: String,
    /// Hexadecimal, as everywhere; so are the members' ids.
    pub cluster_id: String,
    pub revision: i64,
    /// The log entry up to which the state goes.
    pub applied_index: u64,
    /// The term of the member that saved it.
    pub term: u64,
    pub members: Vec<SavedMember>,
}

/// A member of the cluster that was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMember {
    pub id: String,
    pub name: String,
    pub peer_urls: Vec<String>,
    pub is_learner: bool,
}

/// Makes a file, piece by piece.
pub struct Encoder {
    hash: Sha256,
    written_bytes: u64,
    blocks: u64,
    pairs: u64,
}

impl Encoder {
    /// Begins a file; the second is its beginning.
    pub fn begin(header: &Header) -> (Encoder, Vec<u8>) {
        let mut encoder = Encoder { hash: Sha256::new(), written_bytes: 0, blocks: 0, pairs: 0 };
        let header = encode_header(header);
        let mut bytes = Vec::with_capacity(HEAD_BYTES + header.len());
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend((header.len() as u32).to_le_bytes());
        bytes.extend(head_checksum(&bytes, &header).to_le_bytes());
        bytes.extend(header);
        encoder.note(&bytes);
        (encoder, bytes)
    }

    /// The next block, with a chunk of an image: neither empty nor larger than
    /// [`LARGEST_BLOCK_BYTES`].
    pub fn block(&mut self, chunk: &[Pair]) -> Vec<u8> {
        let length = payload_bytes(chunk);
        assert!((1..=LARGEST_BLOCK_BYTES).contains(&length), "a block of {length} bytes");
        let mut bytes = Vec::with_capacity(BLOCK_HEAD_BYTES + length);
        bytes.extend([0; BLOCK_HEAD_BYTES]);
        for (key, value) in chunk {
            for part in [key, value] {
                bytes.extend((part.len() as u32).to_le_bytes());
                bytes.extend(part);
            }
        }
        self.pairs += chunk.len() as u64;
        self.seal(&mut bytes, length as u32);
        bytes
    }

    /// The end of the file, hash included.
    pub fn end(mut self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_HEAD_BYTES];
        bytes.extend(self.pairs.to_le_bytes());
        let end = self.written_bytes + bytes.len() as u64;
        let zeros = end.next_multiple_of(ALIGNMENT) - end;
        self.seal(&mut bytes, 0);
        let padding = vec![0; zeros as usize];
        self.note(&padding);
        bytes.extend(padding);
        bytes.extend(self.hash.finalize());
        bytes
    }

    /// Fills the head of a block.
    fn seal(&mut self, bytes: &mut [u8], length: u32) {
        let (head, payload) = bytes.split_at_mut(BLOCK_HEAD_BYTES);
        head[..4].copy_from_slice(&length.to_le_bytes());
        head[4..].copy_from_slice(&block_checksum(self.blocks, length, payload).to_le_bytes());
        self.blocks += 1;
        self.note(bytes);
    }

    fn note(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.written_bytes += bytes.len() as u64;
    }
}

/// Counts the bytes of a file before it is made.
pub struct Size(u64);

impl Size {
    pub fn of(header: &Header) -> Size {
        Size((HEAD_BYTES + encode_header(header).len()) as u64)
    }

    pub fn add(&mut self, chunk: &[Pair]) {
        self.0 += (BLOCK_HEAD_BYTES + payload_bytes(chunk)) as u64;
    }

    /// The bytes of the whole file.
    pub fn total(self) -> u64 {
        (self.0 + BLOCK_HEAD_BYTES as u64 + 8).next_multiple_of(ALIGNMENT) + HASH_BYTES as u64
    }
}

/// Whether a file of `bytes` may end with a hash.
pub fn may_have_hash(bytes: u64) -> bool {
    bytes % ALIGNMENT == HASH_BYTES as u64
}

pub fn head_checksum(head: &[u8], header: &[u8]) -> u32 {
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(head);
    checksum.update(header);
    checksum.finalize()
}

pub fn block_checksum(number: u64, length: u32, payload: &[u8]) -> u32 {
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&number.to_le_bytes());
    checksum.update(&length.to_le_bytes());
    checksum.update(payload);
    checksum.finalize()
}

fn encode_header(header: &Header) -> Vec<u8> {
    serde_json::to_vec(header).expect("a plain structure goes into JSON")
}

fn payload_bytes(chunk: &[Pair]) -> usize {
    chunk.iter().map(|(key, value)| 8 + key.len() + value.len()).sum()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A small file, always the same.
    pub fn example() -> (Header, Vec<Vec<Pair>>) {
        let header = Header {
            release: "0.2.0".to_owned(),
            cluster_id: "6103f92ab146184a".to_owned(),
            revision: 7,
            applied_index: 12,
            term: 3,
            members: vec![SavedMember {
                id: "481fba086925ee75".to_owned(),
                name: "m1".to_owned(),
                peer_urls: vec!["http://10.0.0.1:2380".to_owned()],
                is_learner: false,
            }],
        };
        let pair = |key: &[u8], value: &[u8]| (key.to_vec(), value.to_vec());
        let blocks = vec![
            vec![pair(b"m", b"\x01numbers"), pair(b"l12345678", b"")],
            vec![pair(b"r", &[9; 600])],
        ];
        (header, blocks)
    }

    pub fn encode(header: &Header, blocks: &[Vec<Pair>]) -> Vec<u8> {
        let (mut encoder, mut file) = Encoder::begin(header);
        for block in blocks {
            file.extend(encoder.block(block));
        }
        file.extend(encoder.end());
        file
    }

    #[test]
    fn the_format_is_what_it_was() {
        let (header, blocks) = example();
        let golden = include_bytes!("../../tests/data/snapshot-v1.holdsnap");
        assert!(encode(&header, &blocks) == golden, "a changed format needs a new version");
    }

    #[test]
    fn the_size_is_known_before_and_is_one_that_etcds_tools_take() {
        let (header, blocks) = example();
        for count in 0..=blocks.len() {
            let blocks = &blocks[..count];
            let mut size = Size::of(&header);
            blocks.iter().for_each(|block| size.add(block));
            let file = encode(&header, blocks);
            assert_eq!(size.total(), file.len() as u64);
            assert!(may_have_hash(file.len() as u64));
            let (content, hash) = file.split_at(file.len() - HASH_BYTES);
            assert_eq!(Sha256::digest(content).as_slice(), hash);
        }
    }
}
