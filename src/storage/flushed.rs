//! Whether sled's metadata is all there, looked at before sled opens it.
//!
//! sled replays its metadata log up to the first frame that does not read, says nothing, and goes on
//! with an older mapping of its pages, into places that have been written over since. What it then
//! reads may be wrong, or send it around in circles. So the file `FLUSHED` beside sled's own tells
//! how far that log was durable after the last flush:
//!
//! ```text
//! holdfast flushed 1, log 7, length 4711, crc 0badcafe
//! ```
//!
//! and up to there every frame must be whole. What follows may be torn: nobody was told of it.
//!
//! sled's frames: the length of the content in six bytes, the low half of their CRC-32 in two, the
//! content, and the CRC-32 of all that, with its lowest byte turned by `0xaf`. Little-endian. Each
//! opening writes all logs into one snapshot, named for the last of them, and begins the next log.

use std::io;
use std::path::{Path, PathBuf};

use crate::vfs::{REPLACE_MEMBER, Vfs, replace_file};

const NOTE: &str = "FLUSHED";
const NOTE_HEAD: &str = "holdfast flushed 1, ";
const METADATA: &str = "metadata";
const LOG: &str = "log_";
const SNAPSHOT: &str = "snapshot_";

const FRAME_HEAD_BYTES: usize = 8;
const FRAME_SUM_BYTES: usize = 4;

/// A place in sled's metadata: a length of one of its logs, and all logs before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Position {
    log: u64,
    length: u64,
}

/// Notes that all that sled has written so far, in the database in `dir`, is durable.
pub fn note(vfs: &dyn Vfs, dir: &Path) -> io::Result<()> {
    let files = Metadata::list(vfs, dir)?;
    let Some(log) = files.logs.last().copied() else { return Ok(()) };
    let length = vfs.open(&files.log(log))?.len()?;
    // sled makes the next log after it has synced the directory.
    vfs.sync_dir(&files.dir)?;
    let position = Position { log, length };
    replace_file(vfs, &dir.join(NOTE), position.to_text().as_bytes())
}

/// Checks that whatever was noted of the database in `dir` is still there.
///
/// # Errors
///
/// `InvalidData` that names the file and the offset where it is damaged.
pub fn check(vfs: &dyn Vfs, dir: &Path) -> io::Result<()> {
    let path = dir.join(NOTE);
    let note = match vfs.read(&path) {
        Ok(bytes) => bytes,
        // Nothing was flushed yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let noted = std::str::from_utf8(&note).ok().and_then(Position::from_text);
    let noted = noted.ok_or_else(|| damaged(&path, 0, "this is no note of a flush"))?;
    let files = Metadata::list(vfs, dir)?;
    for id in &files.snapshots {
        let path = files.snapshot(*id);
        let bytes = vfs.read(&path)?;
        if frame(&bytes) != Some(bytes.len()) {
            return Err(damaged(&path, 0, "its frame is not whole"));
        }
    }
    let covered = files.snapshots.last().copied().unwrap_or(0);
    let needed = covered + 1..=noted.log;
    for id in needed {
        let path = files.log(id);
        if !files.logs.contains(&id) {
            return Err(damaged(&path, 0, "it is missing"));
        }
        let bytes = vfs.read(&path)?;
        let whole = whole_frames(&bytes);
        let wanted = if id == noted.log { noted.length } else { bytes.len() as u64 };
        if (whole as u64) < wanted {
            return Err(damaged(&path, whole, "a frame that was durable does not read"));
        }
    }
    Ok(())
}

/// The names of sled's metadata files.
struct Metadata {
    dir: PathBuf,
    snapshots: Vec<u64>,
    logs: Vec<u64>,
}

impl Metadata {
    fn list(vfs: &dyn Vfs, dir: &Path) -> io::Result<Metadata> {
        let dir = dir.join(METADATA);
        let names = if vfs.exists(&dir)? { vfs.list(&dir)? } else { Vec::new() };
        let ids = |prefix: &str| {
            let of_kind = names.iter().filter_map(|name| name.strip_prefix(prefix));
            let mut ids: Vec<u64> =
                of_kind.filter_map(|digits| u64::from_str_radix(digits, 16).ok()).collect();
            ids.sort_unstable();
            ids
        };
        Ok(Metadata { snapshots: ids(SNAPSHOT), logs: ids(LOG), dir })
    }

    fn log(&self, id: u64) -> PathBuf {
        self.dir.join(format!("{LOG}{id:016x}"))
    }

    fn snapshot(&self, id: u64) -> PathBuf {
        self.dir.join(format!("{SNAPSHOT}{id:016x}"))
    }
}

impl Position {
    fn to_text(self) -> String {
        let place = format!("log {}, length {}", self.log, self.length);
        format!("{NOTE_HEAD}{place}, crc {:08x}\n", crc32fast::hash(place.as_bytes()))
    }

    fn from_text(text: &str) -> Option<Position> {
        let place = text.strip_prefix(NOTE_HEAD)?.strip_prefix("log ")?;
        let (log, rest) = place.split_once(", length ")?;
        let (length, _) = rest.split_once(", crc ")?;
        let position = Position { log: log.parse().ok()?, length: length.parse().ok()? };
        (position.to_text() == text).then_some(position)
    }
}

/// The length of the frame at the beginning of `bytes`, if it is whole.
fn frame(bytes: &[u8]) -> Option<usize> {
    let head: [u8; FRAME_HEAD_BYTES] = bytes.get(..FRAME_HEAD_BYTES)?.try_into().ok()?;
    let sum_of_length = (crc32fast::hash(&head[..6]) as u16).to_le_bytes();
    if sum_of_length != head[6..] {
        return None;
    }
    let content = u64::from_le_bytes(head) & 0xffff_ffff_ffff;
    let summed = usize::try_from(content).ok()?.checked_add(FRAME_HEAD_BYTES)?;
    let sum = bytes.get(summed..summed.checked_add(FRAME_SUM_BYTES)?)?;
    let expected = crc32fast::hash(&bytes[..summed]) ^ 0xaf;
    (sum == expected.to_le_bytes()).then_some(summed + FRAME_SUM_BYTES)
}

/// How far `bytes` are whole frames.
fn whole_frames(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(length) = frame(&bytes[at..]) {
        at += length;
    }
    at
}

fn damaged(file: &Path, offset: usize, what: &str) -> io::Error {
    let text = format!("{}: damaged at offset {offset}: {what}; {REPLACE_MEMBER}", file.display());
    io::Error::new(io::ErrorKind::InvalidData, text)
}
