//! A simulated disk that loses what was not synced.
//!
//! Two pictures are kept side by side: what the running process sees, and what would be found after
//! a power cut. [`MemVfs::after_power_cut`] turns the second into a disk of its own, while every
//! call on the first fails from then on, as it would for a process that is gone.
//!
//! Between the two pictures lie the writes and the changes of names that were not synced. What
//! becomes of those is the test's choice, a [`Survival`]: none, all, or a seeded selection in which
//! writes are torn into sectors and names change in any order, since nothing orders them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Lock, Vfs, VfsFile};

/// A disk mostly writes this much or nothing. Now and then the simulated one tears even that.
const SECTOR_BYTES: usize = 512;

/// What a power cut leaves of that which was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    Nothing,
    Everything,
    /// A selection that this seed decides.
    Some(u64),
}

/// An operation that changes the disk, or promises that it has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Write,
    Sync,
    /// `allocate` and `set_len`.
    Resize,
    /// A file or directory made, renamed or removed.
    Name,
    SyncDir,
}

/// Clones share the same disk.
#[derive(Debug, Clone, Default)]
pub struct MemVfs {
    disk: Arc<Mutex<Disk>>,
}

#[derive(Debug, Default, Clone)]
struct Disk {
    files: BTreeMap<FileId, Content>,
    next_file: FileId,
    names: BTreeMap<PathBuf, Node>,
    durable_names: BTreeMap<PathBuf, Node>,
    /// Changes of names since the sync of their directory, oldest first.
    unsynced_names: Vec<NameChange>,
    power: Power,
    faults: Vec<Fault>,
    capacity_bytes: Option<u64>,
    operations: u64,
    locked: BTreeSet<PathBuf>,
    pace: Option<Pace>,
}

/// How long batches take.
#[derive(Debug, Clone)]
struct Pace {
    dice: StdRng,
    longest: Duration,
}

type FileId = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Dir,
    File(FileId),
}

#[derive(Debug, Default, Clone)]
struct Content {
    seen: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<ContentChange>,
}

#[derive(Debug, Clone)]
enum ContentChange {
    Write { offset: usize, bytes: Vec<u8> },
    Resize(usize),
}

#[derive(Debug, Clone)]
enum NameChange {
    Add(PathBuf, Node),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

#[derive(Debug, Default, Clone, Copy)]
enum Power {
    #[default]
    On,
    /// Goes off at the operation after this many more.
    OffAfter(u64),
    Off,
}

#[derive(Debug, Clone)]
struct Fault {
    operation: Operation,
    after: u64,
    kind: io::ErrorKind,
}

impl MemVfs {
    /// The disk found after cutting the power now. This one is dead from here on: each call fails.
    pub fn after_power_cut(&self, survival: Survival) -> MemVfs {
        let mut disk = self.disk();
        disk.power = Power::Off;
        let mut dice = match survival {
            Survival::Some(seed) => Some(StdRng::seed_from_u64(seed)),
            _ => None,
        };
        let survives = |dice: &mut Option<StdRng>| match survival {
            Survival::Nothing => false,
            Survival::Everything => true,
            Survival::Some(_) => dice.as_mut().is_some_and(|dice| dice.random()),
        };

        let mut names = disk.durable_names.clone();
        for change in &disk.unsynced_names {
            if survives(&mut dice) {
                change.apply(&mut names);
            }
        }
        // A name whose directory was lost is lost with it.
        let reachable = names.keys().filter(|path| is_reachable(&names, path)).cloned();
        let reachable: BTreeSet<PathBuf> = reachable.collect();
        names.retain(|path, _| reachable.contains(path));

        let mut files = BTreeMap::new();
        for node in names.values() {
            let Node::File(id) = node else { continue };
            let content = &disk.files[id];
            let mut left = content.durable.clone();
            for change in &content.unsynced {
                match change {
                    ContentChange::Resize(length) if survives(&mut dice) => left.resize(*length, 0),
                    ContentChange::Resize(_) => {}
                    ContentChange::Write { offset, bytes } => {
                        for (start, piece) in sectors(*offset, bytes) {
                            if !survives(&mut dice) {
                                continue;
                            }
                            let kept = kept_of_sector(dice.as_mut(), piece.len());
                            overwrite(&mut left, start, &piece[..kept]);
                        }
                    }
                }
            }
            files.insert(*id, Content { seen: left.clone(), durable: left, unsynced: Vec::new() });
        }
        let survivor = Disk {
            files,
            next_file: disk.next_file,
            durable_names: names.clone(),
            names,
            capacity_bytes: disk.capacity_bytes,
            pace: disk.pace.clone(),
            ..Disk::default()
        };
        MemVfs { disk: Arc::new(Mutex::new(survivor)) }
    }

    /// The disk as the next process finds it after `kill -9` now: everything is there, but what was
    /// not synced can still be lost in a later power cut. This one is dead from here on.
    pub fn after_kill(&self) -> MemVfs {
        let mut disk = self.disk();
        disk.power = Power::Off;
        let mut survivor = disk.clone();
        survivor.power = Power::On;
        survivor.faults.clear();
        survivor.operations = 0;
        survivor.locked.clear();
        MemVfs { disk: Arc::new(Mutex::new(survivor)) }
    }

    /// Cuts the power at the operation after `operations` more: that one fails and has no effect,
    /// and so does every call after it.
    pub fn cut_power_after(&self, operations: u64) {
        self.disk().power = Power::OffAfter(operations);
    }

    /// How many [`Operation`]s there have been.
    pub fn operations(&self) -> u64 {
        self.disk().operations
    }

    /// Fails one `operation` with `kind`, after letting `after` more of its sort pass.
    ///
    /// A sync that fails forgets what it should have made durable, as Linux does: the process still
    /// sees the bytes, no later sync will write them.
    pub fn fail(&self, operation: Operation, after: u64, kind: io::ErrorKind) {
        self.disk().faults.push(Fault { operation, after, kind });
    }

    /// From now on a write or an allocation fails with `StorageFull` when the files together would
    /// be longer than this.
    pub fn set_capacity(&self, bytes: u64) {
        self.disk().capacity_bytes = Some(bytes);
    }

    /// From now on, on this disk and on what a power cut leaves of it, nobody has a thread for it, and
    /// each batch of the log takes a time up to `longest` that `seed` decides: mostly a tenth of it.
    pub fn simulate_time(&self, seed: u64, longest: Duration) {
        self.disk().pace = Some(Pace { dice: StdRng::seed_from_u64(seed), longest });
    }

    /// Changes bytes behind the back of whoever uses the file, durably.
    ///
    /// # Panics
    ///
    /// If `path` is no file.
    pub fn tamper(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.disk();
        let Some(Node::File(id)) = disk.names.get(path).copied() else {
            panic!("{} is no file", path.display());
        };
        let content = disk.files.get_mut(&id).expect("every name of a file has a content");
        change(&mut content.seen);
        content.durable = content.seen.clone();
        content.unsynced.clear();
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        // A panic while the lock is held can only come from an assertion of a test.
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, id: FileId) -> Arc<dyn VfsFile> {
        Arc::new(MemFile { vfs: self.clone(), id })
    }
}

impl Disk {
    fn check_power(&self) -> io::Result<()> {
        match self.power {
            Power::Off => Err(io::Error::other("simulated power cut")),
            Power::On | Power::OffAfter(_) => Ok(()),
        }
    }

    /// Counts `operation`, and fails it if the power goes or a fault is due.
    fn begin(&mut self, operation: Operation) -> io::Result<()> {
        if let Power::OffAfter(left) = &mut self.power {
            match left.checked_sub(1) {
                Some(fewer) => *left = fewer,
                None => self.power = Power::Off,
            }
        }
        self.check_power()?;
        self.operations += 1;
        let mut due = None;
        self.faults.retain_mut(|fault| {
            if fault.operation != operation || due.is_some() {
                return true;
            }
            match fault.after.checked_sub(1) {
                Some(fewer) => {
                    fault.after = fewer;
                    true
                }
                None => {
                    due = Some(fault.kind);
                    false
                }
            }
        });
        match due {
            Some(kind) => Err(io::Error::new(kind, format!("simulated fault of {operation:?}"))),
            None => Ok(()),
        }
    }

    /// What the files take that have a name, apart from `except`.
    fn used_bytes(&self, except: Option<FileId>) -> u64 {
        let named = self.names.values().filter_map(|node| match node {
            Node::File(id) if Some(*id) != except => Some(self.files[id].seen.len() as u64),
            _ => None,
        });
        named.sum()
    }

    fn check_capacity(&self, id: FileId, new_length: usize) -> io::Result<()> {
        let Some(capacity_bytes) = self.capacity_bytes else { return Ok(()) };
        let grows = new_length > self.files[&id].seen.len();
        if grows && self.used_bytes(Some(id)) + new_length as u64 > capacity_bytes {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "simulated disk is full"));
        }
        Ok(())
    }

    fn content(&mut self, id: FileId) -> &mut Content {
        self.files.get_mut(&id).expect("a handle keeps the content of its file")
    }

    fn parent_exists(&self, path: &Path) -> io::Result<()> {
        match parent(path) {
            Some(parent) if self.names.get(parent) != Some(&Node::Dir) => Err(not_found(parent)),
            _ => Ok(()),
        }
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.unsynced_names.push(change);
    }
}

impl Vfs for MemVfs {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        let mut missing = Vec::new();
        let mut at = Some(dir);
        while let Some(path) = at {
            match disk.names.get(path) {
                Some(Node::Dir) => break,
                Some(Node::File(_)) => return Err(io::ErrorKind::NotADirectory.into()),
                None => missing.push(path.to_owned()),
            }
            at = parent(path);
        }
        for path in missing.into_iter().rev() {
            disk.begin(Operation::Name)?;
            disk.change_name(NameChange::Add(path, Node::Dir));
        }
        disk.check_power()
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        let mut disk = self.disk();
        disk.begin(Operation::Name)?;
        disk.parent_exists(path)?;
        if disk.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = disk.next_file;
        disk.next_file += 1;
        disk.files.insert(id, Content::default());
        disk.change_name(NameChange::Add(path.to_owned(), Node::File(id)));
        Ok(self.handle(id))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        let disk = self.disk();
        disk.check_power()?;
        match disk.names.get(path) {
            Some(Node::File(id)) => Ok(self.handle(*id)),
            Some(Node::Dir) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(not_found(path)),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.begin(Operation::Name)?;
        disk.parent_exists(to)?;
        if !disk.names.contains_key(from) {
            return Err(not_found(from));
        }
        disk.change_name(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.begin(Operation::Name)?;
        match disk.names.get(path) {
            Some(Node::File(_)) => {
                disk.change_name(NameChange::Remove(path.to_owned()));
                Ok(())
            }
            Some(Node::Dir) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(not_found(path)),
        }
    }

    fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        if !disk.names.contains_key(dir) {
            return Err(not_found(dir));
        }
        let below: Vec<PathBuf> =
            disk.names.keys().filter(|path| path.starts_with(dir)).cloned().collect();
        for path in below.into_iter().rev() {
            disk.begin(Operation::Name)?;
            disk.change_name(NameChange::Remove(path));
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let disk = self.disk();
        disk.check_power()?;
        if disk.names.get(dir) != Some(&Node::Dir) {
            return Err(not_found(dir));
        }
        let here = disk.names.keys().filter(|path| parent(path) == Some(dir));
        Ok(here.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let disk = self.disk();
        disk.check_power()?;
        Ok(is_root(path) || disk.names.contains_key(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.begin(Operation::SyncDir)?;
        let Disk { unsynced_names, durable_names, .. } = &mut *disk;
        unsynced_names.retain(|change| {
            let here = change.is_in(dir);
            if here {
                change.apply(durable_names);
            }
            !here
        });
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        if !self.exists(path)? {
            self.create(path)?;
        }
        if !self.disk().locked.insert(path.to_owned()) {
            return Ok(None);
        }
        Ok(Some(Box::new(MemLock { vfs: self.clone(), path: path.to_owned() })))
    }

    fn simulated_time(&self) -> Option<Duration> {
        let pace = &mut self.disk().pace;
        let Pace { dice, longest } = pace.as_mut()?;
        let usual = if dice.random_ratio(9, 10) { *longest / 10 } else { *longest };
        Some(usual.mul_f64(dice.random()))
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        let disk = self.disk();
        disk.check_power()?;
        let capacity_bytes = disk.capacity_bytes.unwrap_or(u64::MAX);
        Ok(capacity_bytes.saturating_sub(disk.used_bytes(None)))
    }
}

#[derive(Debug)]
struct MemLock {
    vfs: MemVfs,
    path: PathBuf,
}

impl Lock for MemLock {}

impl Drop for MemLock {
    fn drop(&mut self) {
        self.vfs.disk().locked.remove(&self.path);
    }
}

#[derive(Debug)]
struct MemFile {
    vfs: MemVfs,
    id: FileId,
}

impl MemFile {
    fn resize(&self, length: u64, may_shrink: bool) -> io::Result<()> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let mut disk = self.vfs.disk();
        disk.begin(Operation::Resize)?;
        disk.check_capacity(self.id, length)?;
        let content = disk.content(self.id);
        if may_shrink || length > content.seen.len() {
            content.seen.resize(length, 0);
            content.unsynced.push(ContentChange::Resize(length));
        }
        Ok(())
    }
}

impl VfsFile for MemFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let mut disk = self.vfs.disk();
        disk.begin(Operation::Write)?;
        disk.check_capacity(self.id, offset + bytes.len())?;
        let content = disk.content(self.id);
        overwrite(&mut content.seen, offset, bytes);
        content.unsynced.push(ContentChange::Write { offset, bytes: bytes.to_vec() });
        Ok(())
    }

    fn read_exact_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut disk = self.vfs.disk();
        disk.check_power()?;
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let content = disk.content(self.id);
        let end = offset.checked_add(bytes.len());
        match end.and_then(|end| content.seen.get(offset..end)) {
            Some(found) => {
                bytes.copy_from_slice(found);
                Ok(())
            }
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn len(&self) -> io::Result<u64> {
        let mut disk = self.vfs.disk();
        disk.check_power()?;
        Ok(disk.content(self.id).seen.len() as u64)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.resize(length, true)
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        self.resize(length, false)
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.vfs.disk();
        let result = disk.begin(Operation::Sync);
        if disk.check_power().is_err() {
            return result;
        }
        let content = disk.content(self.id);
        for change in std::mem::take(&mut content.unsynced) {
            match (&result, change) {
                (Err(_), _) => {}
                (Ok(()), ContentChange::Resize(length)) => content.durable.resize(length, 0),
                (Ok(()), ContentChange::Write { offset, bytes }) => {
                    overwrite(&mut content.durable, offset, &bytes);
                }
            }
        }
        result
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, Node>) {
        match self {
            NameChange::Add(path, node) => {
                names.insert(path.clone(), *node);
            }
            NameChange::Remove(path) => {
                names.remove(path);
            }
            NameChange::Rename(from, to) => {
                // Whatever is below a directory moves with it.
                let moved: Vec<PathBuf> =
                    names.keys().filter(|path| path.starts_with(from)).cloned().collect();
                for path in moved {
                    let node = names.remove(&path).expect("collected from the same map");
                    let below = path.strip_prefix(from).expect("filtered by this prefix");
                    let target =
                        if below.as_os_str().is_empty() { to.clone() } else { to.join(below) };
                    names.insert(target, node);
                }
            }
        }
    }

    /// Whether syncing `dir` makes this durable. A rename between directories, which no caller here
    /// makes, counts for the one it goes to.
    fn is_in(&self, dir: &Path) -> bool {
        match self {
            NameChange::Add(path, _) | NameChange::Remove(path) | NameChange::Rename(_, path) => {
                path.parent() == Some(dir)
            }
        }
    }
}

fn is_reachable(names: &BTreeMap<PathBuf, Node>, path: &Path) -> bool {
    match parent(path) {
        Some(parent) => names.get(parent) == Some(&Node::Dir) && is_reachable(names, parent),
        None => true,
    }
}

/// The directory of `path`, unless that is the root, which always exists.
fn parent(path: &Path) -> Option<&Path> {
    path.parent().filter(|parent| !is_root(parent))
}

fn is_root(path: &Path) -> bool {
    path.as_os_str().is_empty() || path == Path::new("/")
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

fn overwrite(content: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(bytes);
}

/// How many of the `length` bytes of a sector that survives are there.
fn kept_of_sector(dice: Option<&mut StdRng>, length: usize) -> usize {
    match dice {
        Some(dice) => {
            let torn = dice.random_ratio(1, 4);
            if torn { dice.random_range(0..=length) } else { length }
        }
        None => length,
    }
}

/// The pieces of a write that the disk makes durable one by one.
fn sectors(offset: usize, bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let first = (SECTOR_BYTES - offset % SECTOR_BYTES).min(bytes.len());
    let (head, tail) = bytes.split_at(first);
    let rest = tail.chunks(SECTOR_BYTES).enumerate();
    std::iter::once((offset, head))
        .chain(rest.map(move |(i, piece)| (offset + first + i * SECTOR_BYTES, piece)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk_with_file() -> (MemVfs, Arc<dyn VfsFile>, PathBuf) {
        let vfs = MemVfs::default();
        let dir = Path::new("/data");
        vfs.create_dir_all(dir).unwrap();
        vfs.sync_dir(Path::new("/")).unwrap();
        let path = dir.join("file");
        let file = vfs.create(&path).unwrap();
        (vfs, file, path)
    }

    #[test]
    fn a_power_cut_loses_what_was_written_after_the_last_sync() {
        let (vfs, file, path) = disk_with_file();
        vfs.sync_dir(Path::new("/data")).unwrap();
        file.write_at(0, b"kept").unwrap();
        file.sync().unwrap();
        file.write_at(0, b"lost").unwrap();
        let after = vfs.after_power_cut(Survival::Nothing);
        assert_eq!(after.read(&path).unwrap(), b"kept");
        assert!(file.write_at(0, b"dead").is_err(), "the process died with the power");
        let after = vfs.after_power_cut(Survival::Everything);
        assert_eq!(after.read(&path).unwrap(), b"lost");
    }

    #[test]
    fn a_power_cut_loses_a_name_whose_directory_was_not_synced() {
        let (vfs, file, path) = disk_with_file();
        file.write_at(0, b"content").unwrap();
        file.sync().unwrap();
        let lost = vfs.after_power_cut(Survival::Nothing);
        assert!(!lost.exists(&path).unwrap());
        assert!(lost.exists(Path::new("/data")).unwrap());
        let kept = vfs.after_power_cut(Survival::Everything);
        assert_eq!(kept.read(&path).unwrap(), b"content");
    }

    #[test]
    fn a_removed_name_comes_back_unless_its_directory_was_synced() {
        let (vfs, _, path) = disk_with_file();
        vfs.sync_dir(Path::new("/data")).unwrap();
        vfs.remove_file(&path).unwrap();
        assert!(vfs.after_power_cut(Survival::Nothing).exists(&path).unwrap());
    }

    #[test]
    fn a_seed_decides_which_sectors_survive() {
        let (vfs, file, path) = disk_with_file();
        vfs.sync_dir(Path::new("/data")).unwrap();
        file.allocate(8 * SECTOR_BYTES as u64).unwrap();
        file.sync().unwrap();
        file.write_at(100, &[1; 7 * SECTOR_BYTES]).unwrap();
        let left = |seed| vfs.after_power_cut(Survival::Some(seed)).read(&path).unwrap();
        assert_eq!(left(3), left(3));
        let partly = |content: &Vec<u8>| content.contains(&1) && content[100..3000].contains(&0);
        assert!((0..16).map(left).filter(partly).count() > 8);
    }

    #[test]
    fn a_failed_sync_forgets_the_bytes_for_good() {
        let (vfs, file, path) = disk_with_file();
        vfs.sync_dir(Path::new("/data")).unwrap();
        vfs.fail(Operation::Sync, 0, io::ErrorKind::Other);
        file.write_at(0, b"gone").unwrap();
        assert!(file.sync().is_err());
        file.sync().unwrap();
        assert_eq!(vfs.read(&path).unwrap(), b"gone");
        assert_eq!(vfs.after_power_cut(Survival::Everything).read(&path).unwrap(), b"");
    }

    #[test]
    fn a_killed_process_leaves_everything_but_nothing_more_durable() {
        let (vfs, file, path) = disk_with_file();
        file.write_at(0, b"seen").unwrap();
        let next = vfs.after_kill();
        assert!(file.sync().is_err());
        assert_eq!(next.read(&path).unwrap(), b"seen");
        assert!(!next.after_power_cut(Survival::Nothing).exists(&path).unwrap());
    }

    #[test]
    fn a_full_disk_refuses_growth_but_not_overwriting() {
        let (vfs, file, _) = disk_with_file();
        vfs.set_capacity(100);
        file.allocate(100).unwrap();
        file.write_at(90, &[1; 10]).unwrap();
        assert_eq!(file.write_at(91, &[1; 10]).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn power_goes_off_at_the_chosen_operation() {
        let (vfs, file, _) = disk_with_file();
        vfs.cut_power_after(1);
        file.write_at(0, b"a").unwrap();
        assert!(file.write_at(1, b"b").is_err());
        assert!(file.len().is_err());
    }
}
