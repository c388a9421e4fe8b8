//! The engine of tests and simulations: a map, and a "disk" that holds what was flushed.
//!
//! What is applied and not flushed is kept apart, so a test can lose it ([`Memory::crash`]) as a
//! machine without power would. The disk outlives the engine: [`Memory::open`] on the same [`Disk`]
//! is a restart, and takes it away from the engine that had it before. [`Memory::open_in`] keeps
//! what was flushed in a file, so that it lives and dies with the simulated disk around it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Batch, Change, Engine};
use crate::vfs::{Vfs, replace_file};

const ENCODING: bincode::config::Configuration = bincode::config::standard();

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, Default)]
pub struct Memory {
    visible: Pairs,
    /// Applied since the last flush, in order.
    unflushed: Vec<Batch>,
    disk: Disk,
    /// Which opening of the disk this engine is.
    opening: u64,
    /// Where each flush leaves everything.
    file: Option<(Arc<dyn Vfs>, PathBuf)>,
}

/// What survives a [`Memory`]. Clones are the same disk.
#[derive(Debug, Default, Clone)]
pub struct Disk(Arc<Mutex<DiskContent>>);

#[derive(Debug, Default)]
struct DiskContent {
    flushed: Pairs,
    opening: u64,
}

impl Memory {
    /// An empty engine on a disk of its own.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Starts with what was flushed to `disk`. An engine that had the disk open gets an error from
    /// its next flush: a process that was declared dead writes no more.
    pub fn open(disk: &Disk) -> Memory {
        let mut content = disk.lock();
        content.opening += 1;
        let (visible, opening) = (content.flushed.clone(), content.opening);
        drop(content);
        Memory { visible, unflushed: Vec::new(), disk: disk.clone(), opening, file: None }
    }

    /// Starts with what was flushed into the directory `dir`, which exists.
    ///
    /// # Errors
    ///
    /// `InvalidData` if the file there was changed by somebody else.
    pub fn open_in(vfs: Arc<dyn Vfs>, dir: &Path) -> io::Result<Memory> {
        let path = dir.join("pairs");
        let flushed: Pairs = match vfs.read(&path) {
            Ok(bytes) => match bincode::serde::decode_from_slice(&bytes, ENCODING) {
                Ok((pairs, _)) => pairs,
                Err(error) => {
                    let text = format!("{}: {error}", path.display());
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Pairs::default(),
            Err(error) => return Err(error),
        };
        let disk = Disk::default();
        disk.lock().flushed = flushed;
        Ok(Memory { file: Some((vfs, path)), ..Memory::open(&disk) })
    }

    pub fn disk(&self) -> Disk {
        self.disk.clone()
    }

    /// Loses what was applied and not flushed.
    pub fn crash(&mut self) {
        self.unflushed.clear();
        self.visible = self.disk.lock().flushed.clone();
    }
}

impl Disk {
    fn lock(&self) -> MutexGuard<'_, DiskContent> {
        self.0.lock().expect("nothing panics while it holds the disk")
    }
}

impl Engine for Memory {
    fn apply(&mut self, batch: Batch) -> io::Result<()> {
        write(&mut self.visible, &batch);
        self.unflushed.push(batch);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut disk = self.disk.lock();
        if disk.opening != self.opening {
            return Err(io::Error::other("the disk was opened by another engine"));
        }
        for batch in self.unflushed.drain(..) {
            write(&mut disk.flushed, &batch);
        }
        if let Some((vfs, path)) = &self.file {
            let bytes = bincode::serde::encode_to_vec(&disk.flushed, ENCODING);
            replace_file(vfs.as_ref(), path, &bytes.map_err(io::Error::other)?)?;
        }
        Ok(())
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.visible.get(key).cloned())
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> io::Result<()> {
        let from_prefix = (Bound::Included(prefix), Bound::Unbounded);
        for (key, value) in self.visible.range::<[u8], _>(from_prefix) {
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

fn write(pairs: &mut Pairs, batch: &Batch) {
    for change in &batch.changes {
        match change {
            Change::Put { key, value } => pairs.insert(key.clone(), value.clone()),
            Change::Remove { key } => pairs.remove(key),
        };
    }
    for key in &batch.garbage {
        pairs.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(engine: &mut Memory, key: &str) {
        let mut batch = Batch::default();
        batch.put(key, "value");
        engine.apply(batch).unwrap();
    }

    #[test]
    fn a_crash_loses_exactly_what_was_not_flushed() {
        let mut engine = Memory::new();
        put(&mut engine, "kept");
        engine.flush().unwrap();
        put(&mut engine, "lost");
        assert!(engine.get(b"lost").unwrap().is_some());
        engine.crash();
        assert!(engine.get(b"kept").unwrap().is_some());
        assert!(engine.get(b"lost").unwrap().is_none());
    }

    #[test]
    fn an_engine_whose_disk_was_opened_again_writes_no_more() {
        let mut old = Memory::new();
        put(&mut old, "flushed");
        old.flush().unwrap();
        let new = Memory::open(&old.disk());
        put(&mut old, "late");
        old.flush().unwrap_err();
        assert!(new.get(b"flushed").unwrap().is_some());
        assert!(Memory::open(&new.disk()).get(b"late").unwrap().is_none());
    }
}
