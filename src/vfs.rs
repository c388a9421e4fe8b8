//! Files, handed in as a value.
//!
//! Whatever must survive a power cut goes through a [`Vfs`]: the raft log, the file that says whose
//! data directory this is, and the directories that a snapshot is installed into. The one exception
//! is what sled writes inside a directory of its own. [`OsVfs`] is the real file system. [`MemVfs`] is one that forgets:
//! it keeps apart what was written from what was synced, so a test can cut the power between any
//! two operations and look at what is left.
//!
//! The contract is what POSIX promises and no more:
//!
//! - bytes are durable after [`VfsFile::sync`] of their file, and may or may not be before;
//! - a new, renamed or removed name is durable after [`Vfs::sync_dir`] of its directory, and syncing
//!   the file does not make its name durable;
//! - after a failed sync nothing is known about the bytes since the last good one, and trying again
//!   proves nothing. Whoever sees one stops.
//!
//! All calls block. None belongs on an async runtime's thread, except in a simulation.

mod mem;

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fs4::fs_std::FileExt as _;

use crate::mutant;

pub use mem::{MemVfs, Operation, Survival};

/// What to do about files that are damaged or missing: the same for all of them.
pub const REPLACE_MEMBER: &str = "keep the directory for examination, then either restore this \
    member's disk, or replace the member: `etcdctl member remove`, an empty data dir, `etcdctl \
    member add`; do not delete or edit single files, acknowledged writes would be lost";

/// What to do about a disk that failed with an error of this kind, while nothing acknowledged is lost.
pub fn remedy(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room on the disk and start this member again"
        }
        _ => "repair the disk and start this member again, or replace the member",
    }
}

/// A file system, or the part of one that a member lives in.
pub trait Vfs: Debug + Send + Sync {
    /// Creates `dir` and what is missing above it. Sync the parent of each to make them durable.
    fn create_dir_all(&self, dir: &Path) -> io::Result<()>;

    /// Creates an empty file for reading and writing; `AlreadyExists` if `path` is taken.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>>;

    /// Opens an existing file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>>;

    /// Gives the file or directory `from` the name `to`, in place of a file that has it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes the name of a file. Handles that are open keep reading it.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes `dir` and everything below it.
    fn remove_dir_all(&self, dir: &Path) -> io::Result<()>;

    /// The names of the files and directories directly in `dir`, in order.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// Makes the names in `dir` durable, as they are now.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Creates `path` if it is missing, and locks it until the answer is dropped or this process
    /// ends. `None` while somebody else holds the lock.
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>>;

    /// How much more the file system of `dir` takes from this process.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64>;

    /// `None` for a disk whose calls block, which therefore has threads of its own. A simulated one
    /// says how long it takes over the next batch of the log: nothing that uses it has a thread.
    fn simulated_time(&self) -> Option<Duration> {
        None
    }

    /// The whole content of the file `path`.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(path)?;
        let length = usize::try_from(file.len()?).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        file.read_exact_at(0, &mut bytes)?;
        Ok(bytes)
    }
}

/// Held as long as the value lives.
pub trait Lock: Debug + Send + Sync {}

/// Creates what is missing of `dir`, durably, from the top. So whatever exists has a durable parent,
/// except perhaps the deepest: an earlier run may have been killed between making and syncing it.
pub fn create_dir_durably(vfs: &dyn Vfs, dir: &Path) -> io::Result<()> {
    let mut missing = Vec::new();
    let mut existing = None;
    for ancestor in dir.ancestors().filter(|ancestor| !ancestor.as_os_str().is_empty()) {
        if vfs.exists(ancestor)? {
            existing = Some(ancestor);
            break;
        }
        missing.push(ancestor);
    }
    if let Some(parent) = existing.and_then(Path::parent) {
        match vfs.sync_dir(parent) {
            // A directory that this process may not open is not one where it made something.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
            result => result?,
        }
    }
    for made in missing.into_iter().rev() {
        vfs.create_dir_all(made)?;
        if let Some(parent) = made.parent() {
            vfs.sync_dir(parent)?;
        }
    }
    Ok(())
}

/// Gives the file `path` the content `bytes`, durably: after a crash it has the old content or the
/// new one. Leaves behind at most `path` with the extension `new`, which the next call replaces.
pub fn replace_file(vfs: &dyn Vfs, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("new");
    if vfs.exists(&draft)? {
        vfs.remove_file(&draft)?;
    }
    let file = vfs.create(&draft)?;
    file.write_at(0, bytes)?;
    file.sync()?;
    vfs.rename(&draft, path)?;
    if mutant::is("renamed-file-unsynced") {
        return Ok(());
    }
    vfs.sync_dir(path.parent().unwrap_or(Path::new("")))
}

/// An open file, shared between threads. It has no cursor.
pub trait VfsFile: Debug + Send + Sync {
    /// Writes all of `bytes` at `offset`, extending the file where it is shorter.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Fills `bytes` from `offset`; `UnexpectedEof` if the file ends before.
    fn read_exact_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts the file to `length` bytes, or extends it with zeros that need not have disk space.
    fn set_len(&self, length: u64) -> io::Result<()>;

    /// Extends the file to at least `length` bytes of zeros and reserves the disk space, so that
    /// later writes below `length` do not fail for want of it where the file system can promise so.
    fn allocate(&self, length: u64) -> io::Result<()>;

    /// Returns when the content, and the length needed to read it, are durable (`fdatasync`).
    fn sync(&self) -> io::Result<()>;
}

/// The operating system's files.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsVfs;

impl Vfs for OsVfs {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok(Arc::new(OsFile(file)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Arc::new(OsFile(file)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir_all(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name().into_string().map_err(|name| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{}: file name {name:?} is not UTF-8", dir.display()),
                )
            })?;
            names.push(name);
        }
        names.sort();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        fs::exists(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        // The parent of a relative path of one component is the empty path.
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        File::open(dir)?.sync_all()
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        let locked = file.try_lock_exclusive()?;
        Ok(locked.then(|| Box::new(OsLock { _file: file }) as Box<dyn Lock>))
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        fs4::available_space(dir)
    }
}

/// Released by closing the file.
#[derive(Debug)]
struct OsLock {
    _file: File,
}

impl Lock for OsLock {}

#[derive(Debug)]
struct OsFile(File);

impl VfsFile for OsFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn read_exact_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        match self.0.allocate(length) {
            // Some file systems cannot reserve. Then a full disk shows at a write instead.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                if self.len()? < length {
                    self.0.set_len(length)
                } else {
                    Ok(())
                }
            }
            result => result,
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a caller may rely on without a power cut, on the real and the simulated file system.
    fn behaves_like_a_file_system(vfs: &dyn Vfs, root: &Path) {
        let dir = root.join("a/b");
        vfs.create_dir_all(&dir).unwrap();
        vfs.create_dir_all(&dir).unwrap();
        let path = dir.join("one");
        let file = vfs.create(&path).unwrap();
        assert_eq!(vfs.create(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(file.is_empty().unwrap());

        file.allocate(10).unwrap();
        file.allocate(5).unwrap();
        assert_eq!(file.len().unwrap(), 10);
        file.write_at(8, b"xyz").unwrap();
        file.sync().unwrap();
        assert_eq!(vfs.read(&path).unwrap(), b"\0\0\0\0\0\0\0\0xyz");
        let mut two = [0; 2];
        vfs.open(&path).unwrap().read_exact_at(9, &mut two).unwrap();
        assert_eq!(&two, b"yz");
        let beyond = file.read_exact_at(10, &mut two).unwrap_err();
        assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
        file.set_len(9).unwrap();
        assert_eq!(vfs.read(&path).unwrap(), b"\0\0\0\0\0\0\0\0x");

        vfs.create(&dir.join("two")).unwrap().write_at(0, b"2").unwrap();
        assert_eq!(vfs.list(&dir).unwrap(), ["one", "two"]);
        vfs.rename(&dir.join("two"), &path).unwrap();
        assert_eq!(vfs.list(&dir).unwrap(), ["one"]);
        assert_eq!(vfs.read(&path).unwrap(), b"2");
        vfs.remove_file(&path).unwrap();
        assert!(!vfs.exists(&path).unwrap());
        assert_eq!(vfs.open(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(vfs.remove_file(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(file.len().unwrap(), 9, "an open handle outlives the name");

        vfs.create(&dir.join("three")).unwrap();
        vfs.rename(&dir, &root.join("c")).unwrap();
        assert_eq!(vfs.list(&root.join("c")).unwrap(), ["three"]);
        assert_eq!(vfs.list(root).unwrap(), ["a", "c"]);
        vfs.sync_dir(root).unwrap();
        vfs.remove_dir_all(&root.join("c")).unwrap();
        assert!(!vfs.exists(&root.join("c/three")).unwrap());

        let path = root.join("whole");
        replace_file(vfs, &path, b"first").unwrap();
        vfs.create(&path.with_extension("new")).unwrap().write_at(0, b"left by a crash").unwrap();
        replace_file(vfs, &path, b"next").unwrap();
        assert_eq!(vfs.read(&path).unwrap(), b"next");
        assert_eq!(vfs.list(root).unwrap(), ["a", "whole"]);

        let lock = vfs.lock(&root.join("LOCK")).unwrap();
        assert!(lock.is_some() && vfs.lock(&root.join("LOCK")).unwrap().is_none());
        drop(lock);
        assert!(vfs.lock(&root.join("LOCK")).unwrap().is_some());
        assert!(vfs.free_bytes(root).unwrap() > 0);
    }

    #[test]
    fn the_operating_system_behaves_like_a_file_system() {
        let dir = tempfile::tempdir().unwrap();
        behaves_like_a_file_system(&OsVfs, dir.path());
    }

    #[test]
    fn the_simulation_behaves_like_a_file_system() {
        let vfs = MemVfs::default();
        vfs.create_dir_all(Path::new("/data")).unwrap();
        behaves_like_a_file_system(&vfs, Path::new("/data"));
    }
}
