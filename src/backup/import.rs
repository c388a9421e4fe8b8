//! From a file of etcd to a new cluster.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::bolt::Bolt;
use super::etcd::{self, EtcdError, Left};
use super::format::{HASH_BYTES, may_have_hash};
use super::found::{Founded, NewMember, Standing, finish};
use crate::machine::{Afresh, Fault, Record, foreign_lease, foreign_numbers, foreign_record};
use crate::node::founding::{Founding, FoundingError};

/// Pairs written at once, and their keys and values together unless one pair alone is larger.
const PAIRS_AT_ONCE: usize = 1_000;
const BYTES_AT_ONCE: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "{}: the content is not what the hash at the end says; a member's db has no hash: give \
         --skip-hash-check if it is one", path.display()
    )]
    WrongHash { path: PathBuf },
    #[error("{}: {source}", path.display())]
    Etcd { path: PathBuf, source: EtcdError },
    #[error("{}: {source}", path.display())]
    State { path: PathBuf, source: Fault },
    #[error(transparent)]
    Founding(#[from] FoundingError),
}

/// What came of an import.
#[derive(Debug)]
pub struct Imported {
    pub founded: Founded,
    /// etcd's newest.
    pub etcd_revision: i64,
    pub hash_checked: bool,
    /// Keys that named a lease which is not there; they have none now.
    pub orphans: usize,
    pub left: Left,
}

/// Makes the data directory of `member` from `file`, a snapshot of etcd or a member's `db`. Nothing
/// remains of it on failure.
///
/// Only the newest state is taken, so all before the first revision of the new cluster counts as
/// compacted.
pub fn import(
    file: &Path,
    check_hash: bool,
    bump_revision: i64,
    member: &NewMember,
) -> Result<Imported, ImportError> {
    let of_io = |source| ImportError::Io { path: file.to_owned(), source };
    let of_etcd = |source| ImportError::Etcd { path: file.to_owned(), source };
    let mut input = File::open(file).map_err(of_io)?;
    let bytes = input.metadata().map_err(of_io)?.len();
    let has_hash = may_have_hash(bytes);
    let content_bytes = if has_hash { bytes - HASH_BYTES as u64 } else { bytes };
    let (content, at_end) = hash(&mut input, content_bytes).map_err(of_io)?;
    let hash_checked = has_hash && check_hash;
    if hash_checked && at_end != content {
        return Err(ImportError::WrongHash { path: file.to_owned() });
    }
    let mut bolt = Bolt::open(input, content_bytes).map_err(|error| of_etcd(error.into()))?;
    let state = etcd::read(&mut bolt).map_err(of_etcd)?;
    drop(bolt);

    let afresh = Afresh { bump_revision, mark_compacted: true };
    let numbers = afresh.carry(foreign_numbers(state.revision, state.revision));
    let numbers = numbers.map_err(|source| ImportError::State { path: file.to_owned(), source })?;
    let leases = state
        .leases
        .iter()
        .map(|(id, lease)| foreign_lease(*id, lease.ttl_seconds, lease.remaining));
    // As they were made, which is how an engine takes them.
    let mut records: Vec<Record> = state.records.into_values().collect();
    records.sort_unstable_by_key(|record| record.mod_revision());
    let records = records.iter().map(foreign_record);
    let mut founding = Founding::begin(&member.data_dir)?;
    let (mut batch, mut batch_bytes) = (Vec::new(), 0);
    for pair in numbers.into_iter().chain(leases).chain(records) {
        batch_bytes += pair.0.len() + pair.1.len();
        batch.push(pair);
        if batch.len() >= PAIRS_AT_ONCE || batch_bytes >= BYTES_AT_ONCE {
            founding.write(std::mem::take(&mut batch))?;
            batch_bytes = 0;
        }
    }
    founding.write(batch)?;
    let standing = Standing::of(&founding.load()?);
    let founded = finish(founding, member, standing, &content, afresh, 1)?;
    Ok(Imported {
        founded,
        etcd_revision: state.revision,
        hash_checked,
        orphans: state.orphans,
        left: state.left,
    })
}

/// The SHA-256 of the first `bytes`, and what stands behind them, as far as it fits.
fn hash(file: &mut File, bytes: u64) -> std::io::Result<([u8; HASH_BYTES], [u8; HASH_BYTES])> {
    let mut hash = Sha256::new();
    let mut content = BufReader::with_capacity(1 << 16, &mut *file).take(bytes);
    let mut piece = vec![0; 1 << 16];
    loop {
        match content.read(&mut piece)? {
            0 => break,
            read => hash.update(&piece[..read]),
        }
    }
    file.seek(SeekFrom::Start(bytes))?;
    let mut rest = Vec::new();
    file.take(HASH_BYTES as u64).read_to_end(&mut rest)?;
    let mut at_end = [0; HASH_BYTES];
    at_end[..rest.len()].copy_from_slice(&rest);
    Ok((hash.finalize().into(), at_end))
}
