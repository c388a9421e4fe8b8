//! Whose data directory this is.
//!
//! The file `member.json` is written before anything else: it names the cluster and the member that
//! the log and the state belong to. It is written once more when the log has begun, so that a log
//! that was removed is not taken for one that never was. The file `LOCK` is held while a process
//! uses the directory.
//!
//! A directory that is made from a saved state gets `member.json` last. So one that has a log or a
//! state and no `member.json` is half made, and no member starts with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::types::{ClusterId, MemberId};
use crate::vfs::{Lock, OsVfs, REPLACE_MEMBER, Vfs, create_dir_durably, replace_file};

/// The state of format 1 has a pair for each record; nothing that was released wrote it.
const FORMAT: u32 = 2;
const MEMBER_FILE: &str = "member.json";
const DRAFT_FILE: &str = "member.new";
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

#[derive(Debug, Clone, Serialize, Deserialize)]
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
    /// Whether the log has begun: without one, this member has lost its data.
    log_begun: bool,
    /// CRC-32 of the fields above, in hexadecimal: see [`MemberFile::sum`].
    checksum: String,
}

/// What tells the format of a `member.json` of which nothing else is known.
#[derive(Deserialize)]
struct AnyMemberFile {
    format: u32,
}

/// A data directory that no other process uses.
#[derive(Debug)]
pub struct DataDir {
    vfs: Arc<dyn Vfs>,
    path: PathBuf,
    file: MemberFile,
    cluster_id: ClusterId,
    /// Released when dropped.
    _lock: Box<dyn Lock>,
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
    #[error(
        "data dir {path} was written in format {found}, before the first release, and this is a program \
         for format {FORMAT}: save a snapshot with the program that wrote it, and restore that"
    )]
    OldFormat { path: PathBuf, found: u32 },
    #[error("{path}: damaged: {reason}; {REPLACE_MEMBER}")]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "data dir {path}: the raft log that this member has written is not there: mount or restore \
         it; {REPLACE_MEMBER}"
    )]
    LogGone { path: PathBuf },
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
    /// When another process uses it, or it is another member's, or its log was removed. Nothing in
    /// it is changed then.
    pub fn open(
        vfs: Arc<dyn Vfs>,
        path: &Path,
        identity: &Identity,
    ) -> Result<DataDir, DataDirError> {
        let failed = |source| DataDirError::Io { path: path.to_owned(), source };
        let lock = lock(vfs.as_ref(), path)?;
        let (file, cluster_id) = match vfs.read(&path.join(MEMBER_FILE)) {
            Ok(bytes) => {
                // Seen is not durable yet if an earlier run was killed between renaming and syncing.
                vfs.sync_dir(path).map_err(failed)?;
                check(path, &bytes, identity)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                for folder in [LOG, STATE] {
                    if vfs.exists(&path.join(folder)).map_err(failed)? {
                        return Err(DataDirError::HalfMade(path.to_owned()));
                    }
                }
                let file = MemberFile::new(identity, None, false);
                file.write(vfs.as_ref(), path).map_err(failed)?;
                (file, identity.cluster_id)
            }
            Err(error) => return Err(failed(error)),
        };
        let dir = DataDir { vfs, path: path.to_owned(), file, cluster_id, _lock: lock };
        if dir.file.log_begun && !dir.has_log().map_err(failed)? {
            return Err(DataDirError::LogGone { path: dir.path });
        }
        Ok(dir)
    }

    /// Notes that the log has begun. To be called before anything in it is acknowledged.
    pub fn log_begun(&mut self) -> Result<(), DataDirError> {
        if self.file.log_begun {
            return Ok(());
        }
        self.file.log_begun = true;
        self.file.checksum = self.file.sum();
        let written = self.file.write(self.vfs.as_ref(), &self.path);
        written.map_err(|source| DataDirError::Io { path: self.path.clone(), source })
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

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    pub fn state(&self) -> PathBuf {
        self.path.join(STATE)
    }

    fn has_log(&self) -> io::Result<bool> {
        let log = self.log();
        Ok(self.vfs.exists(&log)? && self.vfs.list(&log)?.iter().any(|name| name.ends_with(".log")))
    }
}

/// A data directory under construction. Dropped before it is finished, it takes away what was made.
#[derive(Debug)]
pub struct NewDataDir {
    path: PathBuf,
    was_there: bool,
    finished: bool,
    _lock: Box<dyn Lock>,
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
        let lock = lock(&OsVfs, path)?;
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
        OsVfs.sync_dir(&self.path).map_err(failed)?;
        let file = MemberFile::new(identity, Some(described), true);
        file.write(&OsVfs, &self.path).map_err(failed)?;
        if let Some(parent) = self.path.canonicalize().map_err(failed)?.parent() {
            OsVfs.sync_dir(parent).map_err(failed)?;
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

fn lock(vfs: &dyn Vfs, path: &Path) -> Result<Box<dyn Lock>, DataDirError> {
    let failed = |source| DataDirError::Io { path: path.to_owned(), source };
    create_dir_durably(vfs, path).map_err(failed)?;
    let lock = vfs.lock(&path.join(LOCK_FILE)).map_err(failed)?;
    lock.ok_or_else(|| DataDirError::InUse(path.to_owned()))
}

impl MemberFile {
    fn new(identity: &Identity, described: Option<ClusterId>, log_begun: bool) -> MemberFile {
        let mut file = MemberFile {
            format: FORMAT,
            cluster_id: identity.cluster_id.to_string(),
            member_id: identity.member_id.to_string(),
            name: identity.name.clone(),
            described_cluster_id: described.map(|id| id.to_string()),
            log_begun,
            checksum: String::new(),
        };
        file.checksum = file.sum();
        file
    }

    /// Of the values, each on a line of its own in the order of the fields, so that only a change of
    /// a value counts.
    fn sum(&self) -> String {
        let MemberFile { format, cluster_id, member_id, name, .. } = self;
        let log_begun = self.log_begun;
        let mut text = format!("{format}\n{cluster_id}\n{member_id}\n{name}\n{log_begun}\n");
        if let Some(described) = &self.described_cluster_id {
            text.push_str(described);
            text.push('\n');
        }
        format!("{:08x}", crc32fast::hash(text.as_bytes()))
    }

    fn write(&self, vfs: &dyn Vfs, dir: &Path) -> io::Result<()> {
        replace_file(vfs, &dir.join(MEMBER_FILE), &serde_json::to_vec_pretty(self)?)
    }
}

fn decode(path: &Path, bytes: &[u8]) -> Result<MemberFile, DataDirError> {
    let damaged = |reason: String| DataDirError::Damaged { path: path.join(MEMBER_FILE), reason };
    let AnyMemberFile { format } =
        serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
    if format > FORMAT {
        return Err(DataDirError::OtherFormat { path: path.to_owned(), found: format });
    }
    if format < FORMAT {
        return Err(DataDirError::OldFormat { path: path.to_owned(), found: format });
    }
    let file: MemberFile =
        serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
    let sum = file.sum();
    if file.checksum != sum {
        return Err(damaged(format!("its checksum is {}, not {sum}", file.checksum)));
    }
    Ok(file)
}

/// The file and the cluster's id, if the file fits to `identity`.
fn check(
    path: &Path,
    bytes: &[u8],
    identity: &Identity,
) -> Result<(MemberFile, ClusterId), DataDirError> {
    let damaged = |reason: String| DataDirError::Damaged { path: path.join(MEMBER_FILE), reason };
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
        Ok(id) => Ok((file, ClusterId(id))),
        Err(error) => Err(damaged(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfs::{MemVfs, Survival};

    fn identity(name: &str, cluster: u64) -> Identity {
        Identity { cluster_id: ClusterId(cluster), member_id: MemberId(7), name: name.to_owned() }
    }

    #[test]
    fn a_data_dir_serves_one_process_of_one_member_of_one_cluster() {
        let directory = tempfile::tempdir().expect("tempdir");
        let path = directory.path().join("data");
        let open = |identity: &Identity| DataDir::open(Arc::new(OsVfs), &path, identity);
        let first = open(&identity("a", 1)).expect("first start");
        let second = open(&identity("a", 1));
        assert!(matches!(second, Err(DataDirError::InUse(_))), "{second:?}");
        drop(first);
        let other = open(&identity("b", 1));
        assert!(matches!(other, Err(DataDirError::OtherName { .. })), "{other:?}");
        let other = open(&identity("a", 2));
        assert!(matches!(other, Err(DataDirError::OtherCluster { .. })), "{other:?}");
        open(&identity("a", 1)).expect("restart");
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
        let started = DataDir::open(Arc::new(OsVfs), &path, &described);
        assert!(matches!(started, Err(DataDirError::InUse(_))), "{started:?}");
        let again = NewDataDir::begin(&path);
        assert!(matches!(again, Err(DataDirError::NotEmpty(_))), "{again:?}");
        fs::remove_file(path.join(LOCK_FILE)).expect("what a kill does to the lock");
        let started = DataDir::open(Arc::new(OsVfs), &path, &described);
        assert!(matches!(started, Err(DataDirError::HalfMade(_))), "{started:?}");
        fs::remove_dir_all(&path).expect("as the message says");

        let abandoned = NewDataDir::begin(&path).expect("an absent directory");
        fs::create_dir(abandoned.state()).expect("a state");
        drop(abandoned);
        let finished = NewDataDir::begin(&path).expect("what was abandoned is gone");
        fs::create_dir(finished.state()).expect("a state");
        fs::create_dir(finished.log()).expect("a log");
        fs::write(finished.log().join("1.log"), "a segment").expect("a segment");
        finished.finish(&own, described.cluster_id).expect("finished");
        let opened = DataDir::open(Arc::new(OsVfs), &path, &described).expect("started");
        assert_eq!(opened.cluster_id(), own.cluster_id);
        drop(opened);
        DataDir::open(Arc::new(OsVfs), &path, &own).expect("started by one who knows the cluster");
        let other = DataDir::open(Arc::new(OsVfs), &path, &identity("a", 2));
        assert!(matches!(other, Err(DataDirError::OtherCluster { .. })), "{other:?}");
    }

    const PATH: &str = "/var/data";

    fn open(vfs: &MemVfs) -> Result<DataDir, DataDirError> {
        DataDir::open(Arc::new(vfs.clone()), Path::new(PATH), &identity("a", 1))
    }

    #[test]
    fn a_power_cut_at_any_operation_of_the_first_start_leaves_nothing_or_a_member() {
        let begin = |vfs: &MemVfs| {
            let mut dir = open(vfs)?;
            vfs.create_dir_all(&dir.log()).and_then(|()| vfs.create(&dir.log().join("1.log"))).ok();
            vfs.sync_dir(&dir.log()).and_then(|()| vfs.sync_dir(dir.path())).ok();
            dir.log_begun()
        };
        let whole = MemVfs::default();
        begin(&whole).expect("nothing is in the way");
        for cut in 0..whole.operations() {
            for survival in [Survival::Nothing, Survival::Everything, Survival::Some(cut)] {
                let vfs = MemVfs::default();
                vfs.cut_power_after(cut);
                begin(&vfs).expect_err("the power went");
                let left = vfs.after_power_cut(survival);
                let found = open(&left);
                found.unwrap_or_else(|error| panic!("cut at {cut}, {survival:?}: {error}"));
                let next = left.after_kill();
                begin(&next).expect("the next start");
                open(&next.after_power_cut(Survival::Nothing)).expect("and the one after");
            }
        }
    }

    #[test]
    fn a_log_that_was_removed_is_missed() {
        let vfs = MemVfs::default();
        let mut dir = open(&vfs).expect("first start");
        vfs.create_dir_all(&dir.log()).expect("a directory");
        vfs.create(&dir.log().join("1.log")).expect("a file");
        dir.log_begun().expect("noted");
        drop(dir);
        open(&vfs).expect("all is there");
        vfs.remove_file(&Path::new(PATH).join("log/1.log")).expect("removed");
        let refused = open(&vfs).expect_err("without its log").to_string();
        assert!(refused.contains(PATH) && refused.contains("member remove"), "{refused}");
    }

    #[test]
    fn whatever_byte_of_the_member_file_changes_the_start_is_refused() {
        let file = Path::new(PATH).join(MEMBER_FILE);
        let vfs = MemVfs::default();
        open(&vfs).expect("first start");
        let bytes = vfs.read(&file).expect("written");
        for at in 0..bytes.len() {
            for change in [
                |bytes: &mut Vec<u8>, at: usize| bytes[at] ^= 1 << (at % 8),
                |bytes: &mut Vec<u8>, at: usize| bytes.truncate(at),
            ] {
                vfs.tamper(&file, |content| change(content, at));
                match open(&vfs) {
                    Err(DataDirError::Damaged { path, .. }) => assert_eq!(path, file),
                    Err(DataDirError::OtherFormat { found, .. }) => assert!(found > FORMAT),
                    Err(DataDirError::OldFormat { found, .. }) => assert!(found < FORMAT),
                    // White space between the values says nothing.
                    Ok(_) => assert!(b" \n".contains(&bytes[at]), "byte {at} went unnoticed"),
                    Err(other) => panic!("byte {at}: {other}"),
                }
                vfs.tamper(&file, |content| content.clone_from(&bytes));
            }
        }
    }

    /// A member file of format 2, as it must stay readable.
    const GOLDEN: &str = r#"{
  "format": 2,
  "cluster_id": "1",
  "member_id": "7",
  "name": "a",
  "log_begun": false,
  "checksum": "cea80b57"
}"#;

    #[test]
    fn the_member_file_of_format_2_is_read_and_written() {
        let vfs = MemVfs::default();
        open(&vfs).expect("first start");
        let file = Path::new(PATH).join(MEMBER_FILE);
        let written = String::from_utf8(vfs.read(&file).expect("written")).expect("text");
        assert_eq!(written, GOLDEN);
        vfs.tamper(&file, |bytes| *bytes = GOLDEN.replacen("2", "3", 1).into_bytes());
        let refused = open(&vfs).expect_err("a later format").to_string();
        assert!(refused.contains("format 3") && refused.contains("newer"), "{refused}");
        vfs.tamper(&file, |bytes| *bytes = GOLDEN.replacen("2", "1", 1).into_bytes());
        let refused = open(&vfs).expect_err("an earlier format").to_string();
        assert!(refused.contains("format 1") && refused.contains("snapshot"), "{refused}");
    }
}
