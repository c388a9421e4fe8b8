//! Reads the files that an earlier run left, and decides what is a torn write and what is damage.
//!
//! A crash can leave the end of the last segment in any mixture of written and unwritten pages, as
//! far back as the last sync. That was never acknowledged, so it is cut off. Anything else that
//! does not read is damage to what was acknowledged: this member may have voted or confirmed with
//! it, and must not go on as if it had not. The two are told apart by the `synced` offset of each
//! record, see [`super::record`].

use std::collections::VecDeque;
use std::io;
use std::path::Path;

use super::contents::{Contents, Location, Standing};
use super::record::{Checkpoint, Frame, Place, Record};
use super::segment::{self, Header, Segment, SegmentId};
use super::writer::Tail;
use crate::vfs::{REPLACE_MEMBER, Vfs, create_dir_durably};

/// What the files amount to.
pub struct Recovered {
    pub contents: Contents,
    /// `None` for a new log. The last segment does not count as durable: a process that died without
    /// the machine leaves records that are only in memory.
    pub tail: Option<Tail>,
}

/// Replays the log in `dir`, creating the directory if it is missing.
///
/// Removes drafts of segments, cuts off a torn end, and writes again what the last sync may not have
/// covered. Otherwise the files stay as they are.
///
/// # Errors
///
/// `InvalidData` naming file and offset if something acknowledged is damaged or missing, or if a
/// segment is of another format.
pub fn recover(vfs: &dyn Vfs, dir: &Path, cache_limit_bytes: usize) -> io::Result<Recovered> {
    create_dir_durably(vfs, dir)?;
    let ids = segment_ids(vfs, dir)?;
    // The names seen now may be in memory only, as the records may.
    vfs.sync_dir(dir)?;

    let mut contents = Contents::new(Standing::default(), cache_limit_bytes);
    let mut segments = VecDeque::new();
    let mut end = 0;
    let mut capacity = 0;
    for (at, id) in ids.iter().enumerate() {
        let path = dir.join(id.file_name());
        if at > 0 && ids[at - 1].sequence + 1 != id.sequence {
            let missing = ids[at - 1].sequence + 1;
            return Err(damage(&path, 0, &format!("segment {missing} before it is missing")));
        }
        let bytes = vfs.read(&path)?;
        let file = vfs.open(&path)?;
        let mut segment = Segment { id: *id, path, file, max_index: None };
        let mut replay = Replay {
            contents: &mut contents,
            segment: &mut segment,
            bytes: &bytes,
            previous_end: (at > 0).then_some(end),
            cache_limit_bytes,
        };
        let is_last = at + 1 == ids.len();
        let ends = replay.run(is_last)?;
        end = ends.end as u64;
        if is_last {
            capacity = mend_end(&segment, &bytes, &ends)?;
        }
        segments.push_back(segment);
    }

    let complete = ids.first().is_none_or(|oldest| oldest.sequence == 1);
    if let (false, Some(missing)) = (complete, contents.first_missing()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "{}: entries from {missing} to {} are neither purged nor in any file; {REPLACE_MEMBER}",
                dir.display(),
                contents.first_index() - 1,
            ),
        ));
    }
    let tail =
        (!segments.is_empty()).then_some(Tail { segments, end, synced: 0, capacity, zeroed: end });
    Ok(Recovered { contents, tail })
}

/// Up to where a segment is known to be durable, and where its records end.
struct Ends {
    synced: usize,
    end: usize,
}

/// Prepares the last segment for what will be appended. Durable when the writer syncs, which it does
/// before it writes. Returns the length of the file.
fn mend_end(segment: &Segment, bytes: &[u8], ends: &Ends) -> io::Result<u64> {
    let torn = bytes.len() - trailing_zeros(&bytes[ends.end..]);
    if torn > ends.end {
        tracing::warn!(
            file = %segment.path.display(),
            offset = ends.end,
            "cutting off a torn write at the end of the raft log; it was never acknowledged"
        );
        // Zeros again, lest a later crash find half of this behind new records. The file keeps its
        // length at every moment: a shorter one is a damaged one.
        segment.file.write_at(ends.end as u64, &vec![0; torn - ends.end])?;
    }
    // If the last sync failed, the system may have these bytes in memory, hold them for written, and
    // never write them. Syncing again would not help, writing again does.
    segment.file.write_at(ends.synced as u64, &bytes[ends.synced..ends.end])?;
    Ok(bytes.len() as u64)
}

struct Replay<'a> {
    contents: &'a mut Contents,
    segment: &'a mut Segment,
    bytes: &'a [u8],
    /// `None` for the oldest segment there is.
    previous_end: Option<u64>,
    cache_limit_bytes: usize,
}

impl Replay<'_> {
    /// Replays the segment's records.
    fn run(&mut self, is_last: bool) -> io::Result<Ends> {
        match Header::parse(self.bytes) {
            Header::Good { id, length } if id == self.segment.id => {
                let found = self.bytes.len();
                if (found as u64) < length {
                    let what = format!("the file ends there, it was {length} bytes long");
                    return Err(self.damage(found, &what));
                }
            }
            Header::Good { .. } => {
                return Err(self.damage(0, "the header is that of another file"));
            }
            Header::Other { version } => return Err(self.other(version)),
            Header::Damaged => return Err(self.damage(0, "the header is damaged")),
        }
        let mut at = segment::HEADER_BYTES;
        let mut synced = 0;
        while let Some(frame) = self.frame(at) {
            synced = frame.synced as usize;
            let record =
                frame.decode().map_err(|e| self.damage(at, &format!("{e}, checksum right")))?;
            let length = frame.len();
            self.replay(at, length, record)?;
            at += length;
        }
        if at == segment::HEADER_BYTES {
            return Err(self.damage(at, "the checkpoint is damaged"));
        }
        if is_last {
            self.check_torn(at)?;
        } else if !is_zero(&self.bytes[at..]) {
            return Err(self.damage(at, "a record is damaged, and a later segment exists"));
        }
        Ok(Ends { synced, end: at })
    }

    fn replay(&mut self, at: usize, length: usize, record: Record) -> io::Result<()> {
        let is_first = at == segment::HEADER_BYTES;
        if is_first != matches!(record, Record::Checkpoint(_)) {
            return Err(self.damage(at, "a checkpoint is at the wrong place, or missing"));
        }
        match record {
            Record::Entry(entry) => {
                let index = entry.log_id.index;
                let location = Location {
                    segment: self.segment.id.sequence,
                    offset: at as u32,
                    length: length as u32,
                };
                let result = self.contents.append_found(entry, location);
                result.map_err(|e| self.damage(at, &e.to_string()))?;
                self.segment.max_index = self.segment.max_index.max(Some(index));
            }
            Record::Vote(vote) => self.contents.set_vote(vote),
            Record::Committed(committed) => self.contents.set_committed(committed),
            Record::Truncate(after) => {
                self.contents.truncate_after(after);
            }
            Record::Purge(upto) => {
                self.contents.purge(upto);
            }
            Record::Checkpoint(Checkpoint { standing, previous_end }) => match self.previous_end {
                None => *self.contents = Contents::new(standing, self.cache_limit_bytes),
                Some(end) if end != previous_end || *self.contents.standing() != standing => {
                    let what = format!(
                        "the segment before it ends at offset {end} with {:?}, but this one goes on \
                         from offset {previous_end} with {standing:?}",
                        self.contents.standing(),
                    );
                    return Err(self.damage(at, &what));
                }
                Some(_) => {}
            },
            Record::Seal => {}
        }
        Ok(())
    }

    /// Whether the end of the last segment, from `at` on, may be what a crash left.
    fn check_torn(&self, at: usize) -> io::Result<()> {
        match first_frame_after_sync_of(self.bytes, self.segment.id.sequence, at) {
            Some(later) => Err(self.damage(
                at,
                &format!(
                    "a record is damaged, and it is no torn write: the record at offset {later} was \
                     written after this one was durable"
                ),
            )),
            None => Ok(()),
        }
    }

    fn frame(&self, at: usize) -> Option<Frame<'_>> {
        frame_at(self.bytes, self.segment.id.sequence, at)
    }

    fn damage(&self, offset: usize, what: &str) -> io::Error {
        damage(&self.segment.path, offset, what)
    }

    fn other(&self, version: u32) -> io::Error {
        let newer = if version > segment::VERSION { ", or a later one" } else { "" };
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "{}: format version {version}, this release reads version {}; start the release \
                 that wrote it{newer}",
                self.segment.path.display(),
                segment::VERSION
            ),
        )
    }
}

fn damage(path: &Path, offset: usize, what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{}: damaged at offset {offset}: {what}; {REPLACE_MEMBER}", path.display()),
    )
}

/// The segments in `dir`, in order. Drafts are removed: nothing was acknowledged in one.
fn segment_ids(vfs: &dyn Vfs, dir: &Path) -> io::Result<Vec<SegmentId>> {
    let mut ids = Vec::new();
    for name in vfs.list(dir)? {
        if SegmentId::is_draft_name(&name) {
            tracing::warn!(dir = %dir.display(), name, "removing an unfinished log segment");
            vfs.remove_file(&dir.join(&name))?;
            continue;
        }
        match SegmentId::from_file_name(&name) {
            Some(id) => ids.push(id),
            None => tracing::warn!(dir = %dir.display(), name, "ignoring what is no log segment"),
        }
    }
    ids.sort();
    Ok(ids)
}

fn frame_at(bytes: &[u8], sequence: u64, at: usize) -> Option<Frame<'_>> {
    let offset = u32::try_from(at).ok()?;
    Frame::parse(bytes.get(at..)?, Place { segment: sequence, offset })
}

/// The offset of the first good record behind `at` that was written when `at` was durable already.
fn first_frame_after_sync_of(bytes: &[u8], sequence: u64, at: usize) -> Option<usize> {
    let end = at + bytes[at..].len() - trailing_zeros(&bytes[at..]);
    // The last record may end in zeros, but not begin with a whole header of them.
    (at + 1..end).find(|later| {
        frame_at(bytes, sequence, *later).is_some_and(|frame| frame.synced as usize > at)
    })
}

fn is_zero(bytes: &[u8]) -> bool {
    trailing_zeros(bytes) == bytes.len()
}

/// How many zeros `bytes` ends in. Compares by the page: nearly all of a fresh segment is zero.
fn trailing_zeros(bytes: &[u8]) -> usize {
    const PAGE: [u8; 4096] = [0; 4096];
    let mut zeros = 0;
    for page in bytes.rchunks(PAGE.len()) {
        if *page != PAGE[..page.len()] {
            return zeros + page.iter().rev().take_while(|byte| **byte == 0).count();
        }
        zeros += page.len();
    }
    zeros
}
