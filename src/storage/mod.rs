//! Ordered bytes with atomic batches: what the machine's state is kept in between restarts.
//!
//! The machine answers from memory. What an entry changed goes into a [`Batch`], and batches reach
//! an [`Engine`] behind the machine's back, in order, the applied index in the same batch as the
//! change. So whatever prefix of the batches an engine has made durable is a state the machine was
//! once in, and the log replays the rest.

mod blocks;
mod flushed;
mod home;
mod memory;
mod packed;
mod sled;
mod writer;

use std::io;

pub use home::{Engines, Home, MemoryEngines, SledEngines, Staged};
pub use memory::{Disk, Memory};
pub use packed::{Packed, RECORD_PREFIX};
pub use sled::Sled;
pub use writer::{FlushObserver, StateWriter, StorageFault, WriterOptions};

/// Changes that become visible and durable together, or not at all.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Batch {
    /// In order: a later change of a key replaces an earlier one.
    pub changes: Vec<Change>,
    /// Keys that nobody can read any more, as after a compaction. They are removed after the changes,
    /// one by one in this order, and not atomically with anything: a crash may leave any tail of
    /// them behind. The order matters: a key's tombstone comes after what it hides.
    pub garbage: Vec<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Put { key: Vec<u8>, value: Vec<u8> },
    Remove { key: Vec<u8> },
}

impl Batch {
    pub fn put(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.changes.push(Change::Put { key: key.into(), value: value.into() });
    }

    pub fn remove(&mut self, key: impl Into<Vec<u8>>) {
        self.changes.push(Change::Remove { key: key.into() });
    }

    /// The bytes of keys and values held, for bounding queues.
    pub fn len_bytes(&self) -> usize {
        let changes = self.changes.iter().map(|change| match change {
            Change::Put { key, value } => key.len() + value.len(),
            Change::Remove { key } => key.len(),
        });
        changes.chain(self.garbage.iter().map(Vec::len)).sum()
    }
}

/// A store of ordered keys. One thread at a time calls it; calls may block on the disk.
pub trait Engine: Send {
    /// Makes `batch` visible, atomically. It is durable after the next [`Engine::flush`].
    ///
    /// # Errors
    ///
    /// After an error the engine may refuse everything: the member stops.
    fn apply(&mut self, batch: Batch) -> io::Result<()>;

    /// Returns when every batch applied before the call is durable.
    fn flush(&mut self) -> io::Result<()>;

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>>;

    /// Calls `visit(key, value)` for each pair whose key begins with `prefix`, in key order, until
    /// it returns false.
    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> io::Result<()>;

    /// Bytes on disk; zero for an engine without one.
    fn size_bytes(&self) -> u64;
}
