//! Reads a snapshot file, and takes nothing in it on trust.
//!
//! A file is read once, from front to end; no more than one block of it is in memory, and no length
//! in it makes more memory be taken than the file has bytes.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::format::{
    BLOCK_HEAD_BYTES, FORMAT, HASH_BYTES, HEAD_BYTES, Header, LARGEST_BLOCK_BYTES,
    LARGEST_HEADER_BYTES, MAGIC, block_checksum, head_checksum, may_have_hash,
};
use crate::machine::Pair;

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("this is no snapshot of Holdfast; for a file of etcd use `holdfast import`")]
    NotOurs,
    #[error(
        "the snapshot is in format {found}, this is a program for format {FORMAT}: use the program \
         that wrote it, or a newer one"
    )]
    OtherFormat { found: u32 },
    #[error("the file has no hash at its end: {bytes} bytes are no whole snapshot")]
    NoHash { bytes: u64 },
    #[error("damaged at byte {at}: {what}")]
    Damaged { at: u64, what: String },
    #[error("the content is not what the hash at the end says")]
    WrongHash,
}

/// A file that is being read. It yields its blocks, and [`Reader::finish`] says whether all is well.
pub struct Reader<R> {
    input: BufReader<R>,
    /// Where it stands.
    at: u64,
    /// Where the content ends: at the hash, or with the file.
    end: u64,
    /// `None` where nobody wants it checked.
    expected_hash: Option<[u8; HASH_BYTES]>,
    hash: Sha256,
    header: Header,
    blocks: u64,
    pairs: u64,
    /// The last block was read.
    done: bool,
}

/// Opens the snapshot `path`. `check_hash`: refuse a file that is not as the hash at its end says;
/// checksums inside are looked at in any case.
pub fn open(path: &Path, check_hash: bool) -> Result<Reader<File>, ReadError> {
    Reader::new(File::open(path)?, check_hash)
}

impl<R: Read + Seek> Reader<R> {
    /// See [`open`].
    pub fn new(mut input: R, check_hash: bool) -> Result<Reader<R>, ReadError> {
        let bytes = input.seek(SeekFrom::End(0))?;
        let has_hash = may_have_hash(bytes);
        let end = if has_hash { bytes - HASH_BYTES as u64 } else { bytes };
        let mut expected_hash = None;
        if has_hash && check_hash {
            let mut hash = [0; HASH_BYTES];
            input.seek(SeekFrom::Start(end))?;
            input.read_exact(&mut hash)?;
            expected_hash = Some(hash);
        }
        input.rewind()?;
        let header = Header {
            release: String::new(),
            cluster_id: String::new(),
            revision: 0,
            applied_index: 0,
            term: 0,
            members: Vec::new(),
        };
        let mut reader = Reader {
            input: BufReader::with_capacity(1 << 16, input),
            at: 0,
            end,
            expected_hash,
            hash: Sha256::new(),
            header,
            blocks: 0,
            pairs: 0,
            done: false,
        };
        reader.header = reader.read_header()?;
        // Only now: what is no snapshot at all is told so.
        if check_hash && !has_hash {
            return Err(ReadError::NoHash { bytes });
        }
        Ok(reader)
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next block; `None` after the last.
    ///
    /// # Errors
    ///
    /// Damage, with the place. Nothing more is to be read then.
    pub fn next_block(&mut self) -> Result<Option<Vec<Pair>>, ReadError> {
        if self.done {
            return Ok(None);
        }
        let at = self.at;
        let head: [u8; BLOCK_HEAD_BYTES] = self.read_array()?;
        let (length, checksum) = (u32_at(&head, 0), u32_at(&head, 4));
        self.done = length == 0;
        // The end carries the number of pairs.
        let payload_bytes = if self.done { 8 } else { length as usize };
        if payload_bytes > LARGEST_BLOCK_BYTES {
            return Err(damaged(at, format!("a block of {payload_bytes} bytes")));
        }
        let payload = self.read_bytes(payload_bytes)?;
        if block_checksum(self.blocks, length, &payload) != checksum {
            return Err(damaged(at, "a block's checksum does not fit".to_owned()));
        }
        self.blocks += 1;
        if self.done {
            self.check_end(at, &payload)?;
            return Ok(None);
        }
        let pairs = split_pairs(&payload)
            .ok_or_else(|| damaged(at, "a block is not made of pairs".to_owned()))?;
        self.pairs += pairs.len() as u64;
        Ok(Some(pairs))
    }

    /// Compares the hash, once all blocks were read. Returns the SHA-256 of the content.
    pub fn finish(self) -> Result<[u8; HASH_BYTES], ReadError> {
        assert!(self.done, "the blocks come first");
        let hash: [u8; HASH_BYTES] = self.hash.finalize().into();
        match self.expected_hash {
            Some(expected) if expected != hash => Err(ReadError::WrongHash),
            _ => Ok(hash),
        }
    }

    fn read_header(&mut self) -> Result<Header, ReadError> {
        if self.end < HEAD_BYTES as u64 {
            return Err(ReadError::NotOurs);
        }
        let head: [u8; HEAD_BYTES] = self.read_array()?;
        if head[..8] != MAGIC {
            return Err(ReadError::NotOurs);
        }
        let (format, length, checksum) = (u32_at(&head, 8), u32_at(&head, 12), u32_at(&head, 16));
        if format != FORMAT {
            return Err(ReadError::OtherFormat { found: format });
        }
        if length as usize > LARGEST_HEADER_BYTES {
            return Err(damaged(12, format!("a header of {length} bytes")));
        }
        let header = self.read_bytes(length as usize)?;
        if head_checksum(&head[..16], &header) != checksum {
            return Err(damaged(16, "the header's checksum does not fit".to_owned()));
        }
        serde_json::from_slice(&header)
            .map_err(|error| damaged(HEAD_BYTES as u64, format!("the header: {error}")))
    }

    fn check_end(&mut self, at: u64, payload: &[u8]) -> Result<(), ReadError> {
        let pairs = u64::from_le_bytes(payload.try_into().expect("it was read with eight bytes"));
        if pairs != self.pairs {
            return Err(damaged(at, format!("{} pairs where there were {pairs}", self.pairs)));
        }
        let at = self.at;
        if self.end - at >= 512 {
            return Err(damaged(at, format!("{} bytes behind the end", self.end - at)));
        }
        let padding = self.read_bytes((self.end - at) as usize)?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(damaged(at, "something stands behind the end".to_owned()));
        }
        Ok(())
    }

    fn read_array<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let bytes = self.read_bytes(N)?;
        Ok(bytes.try_into().expect("as many as were asked for"))
    }

    fn read_bytes(&mut self, count: usize) -> Result<Vec<u8>, ReadError> {
        if self.end - self.at < count as u64 {
            return Err(damaged(self.end, "the file ends early".to_owned()));
        }
        let mut bytes = vec![0; count];
        match self.input.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(damaged(self.at, "the file has become shorter".to_owned()));
            }
            Err(error) => return Err(error.into()),
        }
        self.at += count as u64;
        self.hash.update(&bytes);
        Ok(bytes)
    }
}

fn damaged(at: u64, what: String) -> ReadError {
    ReadError::Damaged { at, what }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let four = bytes[at..at + 4].try_into().expect("four bytes");
    u32::from_le_bytes(four)
}

fn split_pairs(payload: &[u8]) -> Option<Vec<Pair>> {
    let mut pairs = Vec::new();
    let mut rest = payload;
    while !rest.is_empty() {
        let (key, after_key) = split_part(rest)?;
        let (value, after_value) = split_part(after_key)?;
        pairs.push((key.to_vec(), value.to_vec()));
        rest = after_value;
    }
    Some(pairs)
}

fn split_part(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::format::tests::{encode, example};
    use super::*;
    use crate::fuzz::mutants;

    fn read(file: &[u8], check_hash: bool) -> Result<(Header, Vec<Vec<Pair>>), ReadError> {
        let mut reader = Reader::new(Cursor::new(file), check_hash)?;
        let mut blocks = Vec::new();
        while let Some(block) = reader.next_block()? {
            blocks.push(block);
        }
        let header = reader.header().clone();
        reader.finish()?;
        Ok((header, blocks))
    }

    #[test]
    fn what_was_written_is_read() {
        let (header, blocks) = example();
        let file = encode(&header, &blocks);
        assert_eq!(read(&file, true).expect("whole"), (header.clone(), blocks.clone()));
        assert_eq!(read(&file, false).expect("whole"), (header.clone(), blocks));
        let empty = encode(&header, &[]);
        assert_eq!(read(&empty, true).expect("whole"), (header, Vec::new()));
    }

    #[test]
    fn every_changed_byte_is_noticed_and_every_missing_one() {
        let (header, blocks) = example();
        let file = encode(&header, &blocks);
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut damaged = file.clone();
                damaged[at] ^= 1 << bit;
                let read = read(&damaged, true);
                assert!(read.is_err(), "byte {at}, bit {bit}");
            }
        }
        for length in 0..file.len() {
            assert!(read(&file[..length], true).is_err(), "{length} bytes");
        }
        let longer = [file.as_slice(), &[0; 512]].concat();
        assert!(matches!(read(&longer, true), Err(ReadError::Damaged { .. })));
        assert!(matches!(read(&longer, false), Err(ReadError::Damaged { .. })));
    }

    #[test]
    fn without_the_hash_checksums_still_tell_where_a_block_is_damaged() {
        let (header, blocks) = example();
        let mut file = encode(&header, &blocks);
        let hash_at = file.len() - HASH_BYTES;
        file[hash_at] ^= 1;
        assert!(matches!(read(&file, true), Err(ReadError::WrongHash)));
        assert!(read(&file, false).is_ok());
        assert!(read(&file[..hash_at], false).is_ok(), "nor is it needed then");
        assert!(matches!(read(&file[..hash_at], true), Err(ReadError::NoHash { .. })));

        let second = file.windows(8).position(|bytes| bytes == [9; 8]).expect("the second block");
        file[second] ^= 1;
        // Before its bytes come its head, two lengths and a key of one byte.
        let begins = second as u64 - 17;
        match read(&file, false) {
            Err(ReadError::Damaged { at, .. }) => assert_eq!(at, begins),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn other_files_and_other_formats_are_told_apart() {
        assert!(matches!(read(b"", true), Err(ReadError::NotOurs)));
        assert!(matches!(read(&[0; 1024], true), Err(ReadError::NotOurs)));
        let (header, blocks) = example();
        let mut file = encode(&header, &blocks);
        file[8] = 2;
        assert!(matches!(read(&file, true), Err(ReadError::OtherFormat { found: 2 })));
    }

    #[test]
    fn mutants_of_files_and_of_blocks_are_refused_or_read() {
        let (header, blocks) = example();
        let file = encode(&header, &blocks);
        let payload_at = HEAD_BYTES + u32_at(&file, 12) as usize + BLOCK_HEAD_BYTES;
        let payload_bytes = u32_at(&file, payload_at - BLOCK_HEAD_BYTES) as usize;
        let payload = file[payload_at..payload_at + payload_bytes].to_vec();
        assert!(split_pairs(&payload).is_some(), "a whole block");
        let mut split = 0;
        mutants(&[file, payload], |bytes, _| {
            // Nobody restores what does not load, and what loads has a good checksum.
            let _ = read(bytes, false);
            if let Some(pairs) = split_pairs(bytes) {
                split += 1;
                let size = |(key, value): &Pair| 8 + key.len() + value.len();
                assert_eq!(pairs.iter().map(size).sum::<usize>(), bytes.len());
            }
        });
        assert!(split > 0, "no block got through");
    }

    #[test]
    fn a_length_from_outer_space_takes_no_memory() {
        let (header, blocks) = example();
        let file = encode(&header, &blocks);
        let header_bytes = u32_at(&file, 12) as usize;
        for (at, length) in [(12, u32::MAX), (12, 1 << 19), (20 + header_bytes, u32::MAX)] {
            let mut file = file.clone();
            file[at..at + 4].copy_from_slice(&length.to_le_bytes());
            assert!(matches!(read(&file, false), Err(ReadError::Damaged { .. })), "{at} {length}");
        }
    }
}
