//! A member's data directory, made from a state that was saved elsewhere.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::Identity;
use super::identity::{DataDirError, NewDataDir};
use crate::machine::{Fault, Machine, Pair};
use crate::raft::founding::Beginning;
use crate::raft::log_store::{LogOptions, LogStore};
use crate::raft::types::PeerNode;
use crate::storage::{Batch, Engine, Home};
use crate::types::ClusterId;
use crate::vfs::Vfs;

/// What the engine caches while the state is written.
const CACHE_BYTES: usize = 8 << 20;
/// Made durable in pieces of about this size, so that it does not all wait in memory.
const FLUSH_BYTES: usize = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum FoundingError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("writing the state: {0}")]
    State(io::Error),
    #[error("writing the log: {0}")]
    Log(io::Error),
    /// What was written is no state that a member starts with.
    #[error("the state does not hold together: {0}")]
    Fault(#[from] Fault),
}

/// The data directory of a member of a cluster that begins with a state. Nobody starts with it
/// before it is finished, and dropped before that it is removed.
pub struct Founding {
    /// Closed before the directory may be removed.
    engine: Box<dyn Engine>,
    unflushed_bytes: usize,
    directory: NewDataDir,
}

impl Founding {
    /// `path` must be absent or empty.
    pub fn begin(path: &Path) -> Result<Founding, FoundingError> {
        let directory = NewDataDir::begin(path)?;
        let home = Home::on_disk(directory.state(), CACHE_BYTES);
        let engine = home.open().map_err(FoundingError::State)?;
        Ok(Founding { directory, engine, unflushed_bytes: 0 })
    }

    /// Adds to the state, in any order but for records, which come as they were made.
    pub fn write(&mut self, pairs: impl IntoIterator<Item = Pair>) -> Result<(), FoundingError> {
        let mut batch = Batch::default();
        for (key, value) in pairs {
            batch.put(key, value);
        }
        self.unflushed_bytes += batch.len_bytes();
        self.engine.apply(batch).map_err(FoundingError::State)?;
        if self.unflushed_bytes >= FLUSH_BYTES {
            self.engine.flush().map_err(FoundingError::State)?;
            self.unflushed_bytes = 0;
        }
        Ok(())
    }

    /// Loads what was written, as a member would.
    pub fn load(&self) -> Result<Machine, FoundingError> {
        Ok(Machine::load(self.engine.as_ref())?)
    }

    /// Makes it the directory of `identity`, one of `members`, all voters. The log begins behind
    /// `index`. All is durable on return. `described`: the cluster that the members' flags describe.
    pub fn finish(
        mut self,
        identity: &Identity,
        described: ClusterId,
        members: &BTreeMap<u64, PeerNode>,
        index: u64,
        vfs: Arc<dyn Vfs>,
    ) -> Result<(), FoundingError> {
        let beginning = Beginning { index };
        let pair = beginning.pair(members).map_err(FoundingError::State)?;
        self.write([pair])?;
        self.engine.flush().map_err(FoundingError::State)?;
        drop(self.engine);
        let log = LogStore::open(vfs, self.directory.log(), LogOptions::default());
        let log = log.map_err(FoundingError::Log)?;
        beginning.mark(&log).map_err(FoundingError::Log)?;
        log.close().map_err(FoundingError::Log)?;
        Ok(self.directory.finish(identity, described)?)
    }
}
