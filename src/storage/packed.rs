//! The engine that packs the history into blocks.
//!
//! To its user it is an engine of pairs like any other, with one rule: the keys of records
//! ([`RECORD_PREFIX`]) are written once, in ascending order. Below it an engine holds blocks
//! ([`super::blocks`]) instead of records, and all other pairs as they are.
//!
//! The last block is written again with every batch until it is full. A record that is removed is
//! noted beside its block, which costs a few bytes and no look at the block; once half of a block is
//! gone, what is left is written again, or the block removed. So what removal costs does not depend
//! on where in the history it happens, and no more than half of what blocks hold is garbage.
//!
//! ```text
//! [ 2 3 4 ] [ 5 7 8 9 ] [ 11            the last one is open
//!             5 9 gone: 7 8 are written again, under the key of 5
//! ```

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::blocks::{
    self, BLOCK_PREFIX, Block, GONE_PREFIX, block_key, decode_gone, encode_gone, first_revision,
    gone_key,
};
use super::{Batch, Change, Engine};
use crate::types::Revision;

/// What the keys of records begin with. A revision follows, as [`Revision::to_bytes`] gives it.
pub const RECORD_PREFIX: u8 = b'r';

/// [`Engine`] over another, which holds the records in blocks.
pub struct Packed {
    engine: Box<dyn Engine>,
    /// `None` until the blocks were read for the first time.
    directory: RefCell<Option<Directory>>,
}

/// The blocks that the engine holds.
#[derive(Default)]
struct Directory {
    /// By their first revisions.
    blocks: BTreeMap<Revision, Contents>,
    /// The last block while there may be room in it.
    open: Option<Block>,
    /// The newest record ever written.
    newest: Option<Revision>,
}

struct Contents {
    records: usize,
    gone: BTreeSet<Revision>,
}

impl Packed {
    pub fn new(engine: Box<dyn Engine>) -> Packed {
        Packed { engine, directory: RefCell::default() }
    }

    /// Reads all blocks and calls `visit` with each record, in order, until it returns false; the
    /// directory is complete in any case.
    fn read(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> io::Result<()> {
        let mut gone_from = BTreeMap::new();
        self.scan_decoding(GONE_PREFIX, |key, bytes| {
            let first = first_revision(key)?;
            gone_from.insert(first, decode_gone(first, bytes)?);
            Ok(())
        })?;
        let mut directory = Directory::default();
        let mut wanted = true;
        self.scan_decoding(BLOCK_PREFIX, |key, bytes| {
            let first = first_revision(key)?;
            let noted = gone_from.remove(&first).unwrap_or_default();
            let (mut records, mut gone) = (0, BTreeSet::new());
            blocks::read(first, bytes, |revision, value| {
                records += 1;
                directory.newest = Some(revision);
                if noted.contains(&revision) {
                    gone.insert(revision);
                } else if wanted {
                    wanted = visit(&record_key(revision), value);
                }
                true
            })?;
            directory.blocks.insert(first, Contents { records, gone });
            Ok(())
        })?;
        directory.open = self.open_block(&directory)?;
        self.directory.replace(Some(directory));
        Ok(())
    }

    /// The last of the blocks, if it is whole and there may be room in it.
    fn open_block(&self, directory: &Directory) -> io::Result<Option<Block>> {
        let Some((first, contents)) = directory.blocks.last_key_value() else { return Ok(None) };
        let Some(records) =
            u32::try_from(contents.records).ok().filter(|_| contents.gone.is_empty())
        else {
            return Ok(None);
        };
        let bytes = self.engine.get(&block_key(*first))?;
        let block = bytes.map(|bytes| Block::resume(*first, records, bytes));
        Ok(block.filter(|block| block.has_room(0)))
    }

    fn scan_decoding(
        &self,
        prefix: u8,
        mut decode: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut result = Ok(());
        self.engine.scan(&[prefix], &mut |key, bytes| {
            result = decode(key, bytes);
            result.is_ok()
        })?;
        result
    }

    fn ensure_read(&self) -> io::Result<()> {
        let is_read = self.directory.borrow().is_some();
        if is_read { Ok(()) } else { self.read(&mut |_, _| false) }
    }

    fn get_record(&self, revision: Revision) -> io::Result<Option<Vec<u8>>> {
        self.ensure_read()?;
        let directory = self.directory.borrow();
        let directory = directory.as_ref().expect("it was just read");
        let Some((first, contents)) = directory.block_of(revision) else { return Ok(None) };
        if contents.gone.contains(&revision) {
            return Ok(None);
        }
        let bytes = self.engine.get(&block_key(*first))?.ok_or_else(|| lost(*first))?;
        let mut found = None;
        blocks::read(*first, &bytes, |at, value| {
            found = (at == revision).then(|| value.to_vec());
            at < revision
        })?;
        Ok(found)
    }
}

impl Directory {
    fn block_of(&self, revision: Revision) -> Option<(&Revision, &Contents)> {
        self.blocks.range(..=revision).next_back()
    }

    /// Adds a record to the last block. A block that is full goes into `batch`.
    fn append(&mut self, revision: Revision, value: &[u8], batch: &mut Batch) -> io::Result<()> {
        if self.newest.is_some_and(|newest| newest >= revision) {
            let text = format!("record {}.{} comes late", revision.main, revision.sub);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if let Some(full) = self.open.take_if(|block| !block.has_room(value.len())) {
            batch.put(block_key(full.first()), full.bytes());
        }
        let block = self.open.get_or_insert_with(|| Block::new(revision));
        block.push(revision, value);
        let contents = Contents { records: 0, gone: BTreeSet::new() };
        self.blocks.entry(block.first()).or_insert(contents).records = block.records() as usize;
        self.newest = Some(revision);
        Ok(())
    }

    /// Notes in `batch` what is gone. Returns the blocks that are to be written again.
    fn strike(&mut self, gone: Vec<Revision>, batch: &mut Batch) -> Vec<Revision> {
        let mut touched = BTreeSet::new();
        for revision in gone {
            if let Some((first, contents)) = self.blocks.range_mut(..=revision).next_back() {
                contents.gone.insert(revision);
                touched.insert(*first);
            }
        }
        for first in &touched {
            batch.put(gone_key(*first), encode_gone(*first, &self.blocks[first].gone));
        }
        let is_scant = |first: &Revision| {
            let contents = &self.blocks[first];
            contents.gone.len() * 2 >= contents.records
        };
        touched.into_iter().filter(is_scant).collect()
    }

    /// Takes out of the block `bytes` what is gone; what is left goes into `batch`.
    fn rewrite(&mut self, first: Revision, bytes: &[u8], batch: &mut Batch) -> io::Result<()> {
        let contents = self.blocks.get_mut(&first).expect("it was just struck from");
        let mut left = Block::new(first);
        blocks::read(first, bytes, |revision, value| {
            if !contents.gone.contains(&revision) {
                left.push(revision, value);
            }
            true
        })?;
        contents.gone.clear();
        contents.records = left.records() as usize;
        self.open.take_if(|open| open.first() == first);
        // The note goes last: a crash in between leaves one that says nothing new.
        if left.records() > 0 {
            batch.put(block_key(first), left.bytes());
        } else {
            self.blocks.remove(&first);
            batch.garbage.push(block_key(first).into());
        }
        batch.garbage.push(gone_key(first).into());
        Ok(())
    }
}

impl Engine for Packed {
    /// # Errors
    ///
    /// Besides those of the engine: `InvalidInput` for a record that does not come after all others,
    /// and for keys that only this engine writes.
    fn apply(&mut self, batch: Batch) -> io::Result<()> {
        self.ensure_read()?;
        let Packed { engine, directory } = self;
        let directory = directory.get_mut().as_mut().expect("it was just read");
        let mut below = Batch::default();
        let mut gone = Vec::new();
        let mut appended = false;
        for change in batch.changes {
            let (Change::Put { key, .. } | Change::Remove { key }) = &change;
            match (kind_of(key)?, change) {
                (Kind::Record(revision), Change::Put { value, .. }) => {
                    directory.append(revision, &value, &mut below)?;
                    appended = true;
                }
                (Kind::Record(revision), Change::Remove { .. }) => gone.push(revision),
                (Kind::Other, change) => below.changes.push(change),
            }
        }
        for key in batch.garbage {
            match kind_of(&key)? {
                Kind::Record(revision) => gone.push(revision),
                Kind::Other => below.garbage.push(key),
            }
        }
        if let Some(open) = directory.open.as_ref().filter(|_| appended) {
            below.put(block_key(open.first()), open.bytes());
        }
        let scant = directory.strike(gone, &mut below);
        engine.apply(below)?;
        if scant.is_empty() {
            return Ok(());
        }
        let mut below = Batch::default();
        for first in scant {
            let bytes = engine.get(&block_key(first))?.ok_or_else(|| lost(first))?;
            directory.rewrite(first, &bytes, &mut below)?;
        }
        engine.apply(below)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.engine.flush()
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        match kind_of(key)? {
            Kind::Record(revision) => self.get_record(revision),
            Kind::Other => self.engine.get(key),
        }
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> io::Result<()> {
        match prefix.first() {
            Some(&RECORD_PREFIX) => self.read(&mut |key, value| {
                let is_before = key < prefix;
                is_before || key.starts_with(prefix) && visit(key, value)
            }),
            Some(&(BLOCK_PREFIX | GONE_PREFIX)) => Ok(()),
            Some(_) => self.engine.scan(prefix, visit),
            None => {
                let mut wanted = true;
                for first in 0..=u8::MAX {
                    self.scan(&[first], &mut |key, value| {
                        wanted = visit(key, value);
                        wanted
                    })?;
                    if !wanted {
                        break;
                    }
                }
                Ok(())
            }
        }
    }

    fn size_bytes(&self) -> u64 {
        self.engine.size_bytes()
    }
}

enum Kind {
    Record(Revision),
    Other,
}

fn kind_of(key: &[u8]) -> io::Result<Kind> {
    let refused = match key.first() {
        Some(&RECORD_PREFIX) => match Revision::from_bytes(&key[1..]) {
            Some(revision) => return Ok(Kind::Record(revision)),
            None => "names no revision",
        },
        Some(&(BLOCK_PREFIX | GONE_PREFIX)) => "is for blocks alone",
        _ => return Ok(Kind::Other),
    };
    let text = format!("the key {} {refused}", key.escape_ascii());
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

fn record_key(revision: Revision) -> [u8; 13] {
    let mut key = [RECORD_PREFIX; 13];
    key[1..].copy_from_slice(&revision.to_bytes());
    key
}

fn lost(first: Revision) -> io::Error {
    let text = format!("the block at {}.{} is not there any more", first.main, first.sub);
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests;
