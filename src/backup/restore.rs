//! From a snapshot file to a new cluster, and what a snapshot file holds.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use super::format::Header;
use super::found::{Founded, NewMember, Standing, finish};
use super::reader::{self, ReadError};
use crate::machine::{Afresh, Fault, HashKv, Machine};
use crate::node::founding::{Founding, FoundingError};
use crate::storage::{Batch, Change, Engine};

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: ReadError },
    #[error("{}: {source}", path.display())]
    State { path: PathBuf, source: Fault },
    #[error("{}: its header says revision {said}, its state is at {found}", path.display())]
    OtherRevision { path: PathBuf, said: i64, found: i64 },
    #[error(transparent)]
    Founding(#[from] FoundingError),
}

/// Makes the data directory of `member` from the snapshot `file`; nothing remains of it on failure.
///
/// # Errors
///
/// A directory that is in use or not empty, a damaged file, a file of another format, the disk's.
pub fn restore(
    file: &Path,
    check_hash: bool,
    afresh: Afresh,
    member: &NewMember,
) -> Result<Founded, RestoreError> {
    let of_file = |source| RestoreError::File { path: file.to_owned(), source };
    let of_state = |source| RestoreError::State { path: file.to_owned(), source };
    // First of all: who gave the wrong file should not find a directory for it.
    let mut reader = reader::open(file, check_hash).map_err(of_file)?;
    let mut founding = Founding::begin(&member.data_dir)?;
    while let Some(block) = reader.next_block().map_err(of_file)? {
        let mut pairs = Vec::with_capacity(block.len());
        for pair in block {
            pairs.extend(afresh.carry(pair).map_err(of_state)?);
        }
        founding.write(pairs)?;
    }
    let header = reader.header().clone();
    let content = reader.finish().map_err(of_file)?;
    let standing = Standing::of(&founding.load()?);
    check_revision(file, &header, standing.revision - afresh.bump_revision)?;
    // An index of zero would be that of an empty log.
    let index = header.applied_index.max(1);
    Ok(finish(founding, member, standing, &content, afresh, index)?)
}

/// What a snapshot file holds.
#[derive(Debug)]
pub struct Contents {
    pub header: Header,
    pub bytes: u64,
    pub standing: Standing,
    /// As every member that was at this revision, and had compacted alike, tells it.
    pub hash: HashKv,
}

/// Reads all of the snapshot `file`, loads its state as a member would, and tells what it is.
///
/// # Errors
///
/// Whatever would keep it from being restored.
pub fn inspect(file: &Path) -> Result<Contents, RestoreError> {
    let of_file = |source| RestoreError::File { path: file.to_owned(), source };
    let of_state = |source| RestoreError::State { path: file.to_owned(), source };
    let mut reader = reader::open(file, true).map_err(of_file)?;
    let unchanged = Afresh { bump_revision: 0, mark_compacted: false };
    let mut pairs = Pairs::default();
    while let Some(block) = reader.next_block().map_err(of_file)? {
        for pair in block {
            pairs.0.extend(unchanged.carry(pair).map_err(of_state)?);
        }
    }
    let header = reader.header().clone();
    reader.finish().map_err(of_file)?;
    let machine = Machine::load(&pairs).map_err(of_state)?;
    drop(pairs);
    let standing = Standing::of(&machine);
    check_revision(file, &header, standing.revision)?;
    let bytes = std::fs::metadata(file).map_err(|source| of_file(source.into()))?.len();
    let hash = machine.store().view().hash_kv(0).expect("the present revision can be read");
    Ok(Contents { header, bytes, standing, hash })
}

fn check_revision(file: &Path, header: &Header, found: i64) -> Result<(), RestoreError> {
    let said = header.revision;
    if said == found {
        return Ok(());
    }
    Err(RestoreError::OtherRevision { path: file.to_owned(), said, found })
}

/// The pairs of a file, for a machine to load.
#[derive(Default)]
struct Pairs(BTreeMap<Vec<u8>, Vec<u8>>);

impl Engine for Pairs {
    fn apply(&mut self, batch: Batch) -> io::Result<()> {
        for change in batch.changes {
            match change {
                Change::Put { key, value } => self.0.insert(key, value),
                Change::Remove { key } => self.0.remove(&key),
            };
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.get(key).cloned())
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> io::Result<()> {
        let from = (Bound::Included(prefix), Bound::Unbounded);
        for (key, value) in self.0.range::<[u8], _>(from) {
            if !key.starts_with(prefix) || !visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        0
    }
}
