//! Whose data directory this is.
//!
//! The file `member.json` is written before anything else and never changed: it names the cluster
//! and the member that the log and the state belong to. The file `LOCK` is held while a process
//! uses the directory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fs4::fs_std::FileExt;
use serde::{Deserialize, Serialize};

use crate::types::{ClusterId, MemberId};

const FORMAT: u32 = 1;

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
}

/// A data directory that no other process uses.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
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
}

impl DataDir {
    /// Takes `path` for `identity`, and says so in it on the first start.
    ///
    /// # Errors
    ///
    /// When another process uses it, or it is another member's. Nothing in it is changed then.
    pub fn open(path: &Path, identity: &Identity) -> Result<DataDir, DataDirError> {
        let failed = |source| DataDirError::Io { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(failed)?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("LOCK"))
            .map_err(failed)?;
        if !FileExt::try_lock_exclusive(&lock).map_err(failed)? {
            return Err(DataDirError::InUse(path.to_owned()));
        }
        match fs::read(path.join("member.json")) {
            Ok(bytes) => check(path, &bytes, identity)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                write(path, identity).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
        Ok(DataDir { path: path.to_owned(), _lock: lock })
    }

    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    pub fn state(&self) -> PathBuf {
        self.path.join("state")
    }
}

fn check(path: &Path, bytes: &[u8], identity: &Identity) -> Result<(), DataDirError> {
    let path = path.to_owned();
    let file: MemberFile = match serde_json::from_slice(bytes) {
        Ok(file) => file,
        Err(error) => return Err(DataDirError::Damaged { path, reason: error.to_string() }),
    };
    if file.format != FORMAT {
        return Err(DataDirError::OtherFormat { path, found: file.format });
    }
    if file.name != identity.name {
        let wanted = identity.name.clone();
        return Err(DataDirError::OtherName { path, found: file.name, wanted });
    }
    let wanted = identity.cluster_id.to_string();
    if file.cluster_id != wanted || file.member_id != identity.member_id.to_string() {
        return Err(DataDirError::OtherCluster { path, found: file.cluster_id, wanted });
    }
    Ok(())
}

fn write(path: &Path, identity: &Identity) -> io::Result<()> {
    let file = MemberFile {
        format: FORMAT,
        cluster_id: identity.cluster_id.to_string(),
        member_id: identity.member_id.to_string(),
        name: identity.name.clone(),
    };
    let draft = path.join("member.json.new");
    let mut out = File::create(&draft)?;
    out.write_all(&serde_json::to_vec_pretty(&file)?)?;
    out.sync_all()?;
    fs::rename(&draft, path.join("member.json"))?;
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
    }
}
