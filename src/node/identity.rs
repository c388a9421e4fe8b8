//! Whose data directory this is.
//!
//! The file `member.json` is written before anything else and never changed: it names the cluster
//! and the member that the log and the state belong to. The file `LOCK` is held while a process
//! uses the directory.
//!
//! A directory that is made from a saved state gets `member.json` last. So one that has a log or a
//! state and no `member.json` is half made, and no member starts with it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fs4::fs_std::FileExt;
use serde::{Deserialize, Serialize};

use crate::types::{ClusterId, MemberId};

const FORMAT: u32 = 1;

const MEMBER_FILE: &str = "member.json";
const DRAFT_FILE: &str = "member.json.new";
const LOCK_FILE: &str = "LOCK";
const LOG: &str = "log";
const STATE: &str = "state";

/// Who this member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub cluster_id: ClusterId,
    pub member_id: MemberId,
    pub name: String,
}

#[derive(Serialize, Deserialize)]
struct MemberFile {
    format: u32,
    /// Hexadecimal, as logs and `member list` show ids.
    cluster_id: String,
    member_id: String,
    name: String,
    /// The cluster that the flags describe, where this one began with a saved state and so has
    /// another id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    described_cluster_id: Option<String>,
}

/// A data directory that no other process uses.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    cluster_id: ClusterId,
    /// Released when dropped.
    _lock: File,
}

#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("data dir {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "data dir {0} is in use by another process: stop that one, or give this one another --data-dir"
    )]
    InUse(PathBuf),
    #[error(
        "data dir {path} belongs to member {found:?}, not {wanted:?}: \
         start with --name {found}, or give this member another --data-dir"
    )]
    OtherName { path: PathBuf, found: String, wanted: String },
    #[error(
        "data dir {path} belongs to cluster {found}, but --initial-cluster and \
         --initial-cluster-token describe cluster {wanted}: start with the flags the member was \
         made with, or give it another --data-dir"
    )]
    OtherCluster { path: PathBuf, found: String, wanted: String },
    #[error(
        "data dir {path} was written in format {found}, this is a program for format {FORMAT}: \
         start it with the program that wrote it, or a newer one"
    )]
    OtherFormat { path: PathBuf, found: u32 },
    #[error("data dir {path}: member.json is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "data dir {0} has data but no member.json: where a restore into it was cut off, remove it \
         and restore again; else bring member.json back"
    )]
    HalfMade(PathBuf),
    #[error("data dir {0} is not empty: give another --data-dir, or remove what is there")]
    NotEmpty(PathBuf),
}

impl DataDir {
    /// Takes `path` for `identity`, and says so in it on the first start.
    ///
    /// # Errors
    ///
    /// When another process uses it, or it is another member's. Nothing in it is changed then.
    pub fn open(path: &Path, identity: &Identity) -> Result<DataDir, DataDirError> {
        let failed = |source| DataDirError::Io { path: path.to_owned(), source };
        let lock = lock(path)?;
        let cluster_id = match fs::read(path.join(MEMBER_FILE)) {
            Ok(bytes) => check(path, &bytes, identity)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if [LOG, STATE].iter().any(|folder| path.join(folder).exists()) {
                    return Err(DataDirError::HalfMade(path.to_owned()));
                }
                write(path, identity, None).map_err(failed)?;
                identity.cluster_id
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(DataDir { path: path.to_owned(), cluster_id, _lock: lock })
    }

    /// The cluster's own id, which is not the one that the flags describe where the cluster began
    /// with a saved state.
    pub fn cluster_id(&self) -> ClusterId {
        self.cluster_id
    }

    /// Whose directory `path` is; `None` where no member has started yet.
    ///
    /// # Errors
    ///
    /// When that cannot be read.
    pub fn identity(path: &Path) -> Result<Option<Identity>, DataDirError> {
        let bytes = match fs::read(path.join(MEMBER_FILE)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(DataDirError::Io { path: path.to_owned(), source }),
        };
        let file = decode(path, &bytes)?;
        let id = |text: &str| {
            u64::from_str_radix(text, 16).map_err(|error| DataDirError::Damaged {
                path: path.to_owned(),
                reason: error.to_string(),
            })
        };
        Ok(Some(Identity {
            cluster_id: ClusterId(id(&file.cluster_id)?),
            member_id: MemberId(id(&file.member_id)?),
            name: file.name,
        }))
    }

    pub fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    pub fn state(&self) -> PathBuf {
        self.path.join(STATE)
    }
}

/// A data directory under construction. Dropped before it is finished, it takes away what was made.
#[derive(Debug)]
pub struct NewDataDir {
    path: PathBuf,
    was_there: bool,
    finished: bool,
    _lock: File,
}

impl NewDataDir {
    /// Takes `path`, which must be absent or empty.
    pub fn begin(path: &Path) -> Result<NewDataDir, DataDirError> {
        let failed = |source| DataDirError::Io { path: path.to_owned(), source };
        let was_there = match fs::read_dir(path) {
            Ok(mut entries) => {
                // The root of a file system of its own has such a folder.
                let counts = |entry: &io::Result<fs::DirEntry>| {
                    entry.as_ref().is_ok_and(|entry| entry.file_name() != "lost+found")
                };
                if entries.any(|entry| counts(&entry)) {
                    return Err(DataDirError::NotEmpty(path.to_owned()));
                }
                true
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(failed(error)),
        };
        let lock = lock(path)?;
        Ok(NewDataDir { path: path.to_owned(), was_there, finished: false, _lock: lock })
    }

    pub fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    pub fn state(&self) -> PathBuf {
        self.path.join(STATE)
    }

    /// Makes it a member's, once all in it is durable; durable itself on return. `described`: the
    /// cluster that the member's flags describe.
    pub fn finish(mut self, identity: &Identity, described: ClusterId) -> Result<(), DataDirError> {
        let failed = |source| DataDirError::Io { path: self.path.clone(), source };
        File::open(&self.path).and_then(|folder| folder.sync_all()).map_err(failed)?;
        write(&self.path, identity, Some(described)).map_err(failed)?;
        if let Some(parent) = self.path.canonicalize().map_err(failed)?.parent() {
            File::open(parent).and_then(|folder| folder.sync_all()).map_err(failed)?;
        }
        self.finished = true;
        Ok(())
    }
}

impl Drop for NewDataDir {
    fn drop(&mut self) {
        if !self.finished {
            // No member starts with what cannot be removed.
            let _ = fs::remove_file(self.path.join(MEMBER_FILE));
            let _ = fs::remove_file(self.path.join(DRAFT_FILE));
            let _ = fs::remove_dir_all(self.log());
            let _ = fs::remove_dir_all(self.state());
            let _ = fs::remove_file(self.path.join(LOCK_FILE));
            if !self.was_there {
                let _ = fs::remove_dir(&self.path);
            }
        }
    }
}

fn lock(path: &Path) -> Result<File, DataDirError> {
    let failed = |source| DataDirError::Io { path: path.to_owned(), source };
    fs::create_dir_all(path).map_err(failed)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path.join(LOCK_FILE))
        .map_err(failed)?;
    if !FileExt::try_lock_exclusive(&lock).map_err(failed)? {
        return Err(DataDirError::InUse(path.to_owned()));
    }
    Ok(lock)
}

fn decode(path: &Path, bytes: &[u8]) -> Result<MemberFile, DataDirError> {
    let path = path.to_owned();
    let file: MemberFile = match serde_json::from_slice(bytes) {
        Ok(file) => file,
        Err(error) => return Err(DataDirError::Damaged { path, reason: error.to_string() }),
    };
    if file.format != FORMAT {
        return Err(DataDirError::OtherFormat { path, found: file.format });
    }
    Ok(file)
}

/// The cluster's id, if the file fits to `identity`.
fn check(path: &Path, bytes: &[u8], identity: &Identity) -> Result<ClusterId, DataDirError> {
    let file = decode(path, bytes)?;
    let path = path.to_owned();
    if file.name != identity.name {
        let wanted = identity.name.clone();
        return Err(DataDirError::OtherName { path, found: file.name, wanted });
    }
    let wanted = identity.cluster_id.to_string();
    // Whoever knows the cluster's own id has it from this file or from another member.
    let is_known = file.cluster_id == wanted || file.described_cluster_id.as_ref() == Some(&wanted);
    if !is_known || file.member_id != identity.member_id.to_string() {
        return Err(DataDirError::OtherCluster { path, found: file.cluster_id, wanted });
    }
    match u64::from_str_radix(&file.cluster_id, 16) {
        Ok(id) => Ok(ClusterId(id)),
        Err(error) => Err(DataDirError::Damaged { path, reason: error.to_string() }),
    }
}

fn write(path: &Path, identity: &Identity, described: Option<ClusterId>) -> io::Result<()> {
    let file = MemberFile {
        format: FORMAT,
        cluster_id: identity.cluster_id.to_string(),
        member_id: identity.member_id.to_string(),
        name: identity.name.clone(),
        described_cluster_id: described.map(|id| id.to_string()),
    };
    let draft = path.join(DRAFT_FILE);
    let mut out = File::create(&draft)?;
    out.write_all(&serde_json::to_vec_pretty(&file)?)?;
    out.sync_all()?;
    fs::rename(&draft, path.join(MEMBER_FILE))?;
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str, cluster: u64) -> Identity {
        Identity { cluster_id: ClusterId(cluster), member_id: MemberId(7), name: name.to_owned() }
    }

    #[test]
    fn a_data_dir_serves_one_process_of_one_member_of_one_cluster() {
        let directory = tempfile::tempdir().expect("tempdir");
        let path = directory.path().join("data");
        let first = DataDir::open(&path, &identity("a", 1)).expect("first start");
        let second = DataDir::open(&path, &identity("a", 1));
        assert!(matches!(second, Err(DataDirError::InUse(_))), "{second:?}");
        drop(first);
        let other = DataDir::open(&path, &identity("b", 1));
        assert!(matches!(other, Err(DataDirError::OtherName { .. })), "{other:?}");
        let other = DataDir::open(&path, &identity("a", 2));
        assert!(matches!(other, Err(DataDirError::OtherCluster { .. })), "{other:?}");
        DataDir::open(&path, &identity("a", 1)).expect("restart");
        assert_eq!(DataDir::identity(&path).expect("read"), Some(identity("a", 1)));
        let nobodys = directory.path().join("other");
        assert_eq!(DataDir::identity(&nobodys).expect("read"), None);
    }

    #[test]
    fn a_data_dir_made_from_a_state_is_used_under_its_own_cluster_id_and_only_when_finished() {
        let directory = tempfile::tempdir().expect("tempdir");
        let path = directory.path().join("data");
        let (described, own) = (identity("a", 1), identity("a", 99));

        let half_made = NewDataDir::begin(&path).expect("an absent directory");
        fs::create_dir(half_made.state()).expect("a state");
        std::mem::forget(half_made);
        let started = DataDir::open(&path, &described);
        assert!(matches!(started, Err(DataDirError::InUse(_))), "{started:?}");
        let again = NewDataDir::begin(&path);
        assert!(matches!(again, Err(DataDirError::NotEmpty(_))), "{again:?}");
        fs::remove_file(path.join(LOCK_FILE)).expect("what a kill does to the lock");
        let started = DataDir::open(&path, &described);
        assert!(matches!(started, Err(DataDirError::HalfMade(_))), "{started:?}");
        fs::remove_dir_all(&path).expect("as the message says");

        let abandoned = NewDataDir::begin(&path).expect("an absent directory");
        fs::create_dir(abandoned.state()).expect("a state");
        drop(abandoned);
        let finished = NewDataDir::begin(&path).expect("what was abandoned is gone");
        fs::create_dir(finished.state()).expect("a state");
        finished.finish(&own, described.cluster_id).expect("finished");
        let opened = DataDir::open(&path, &described).expect("started");
        assert_eq!(opened.cluster_id(), own.cluster_id);
        drop(opened);
        DataDir::open(&path, &own).expect("started by one who knows the cluster");
        let other = DataDir::open(&path, &identity("a", 2));
        assert!(matches!(other, Err(DataDirError::OtherCluster { .. })), "{other:?}");
    }
}
