//! The one that writes: takes what is queued, writes it, makes it durable with one sync, and only
//! then tells whoever waits. While it syncs, the next batch gathers; no timer decides its size.
//!
//! Everything goes to the end of the last segment in the order of the queue. Truncating and purging
//! are records too: a file is never cut while the member runs, and it is removed only when a
//! durable purge covers all that is in it.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::contents::{Location, Standing, Ticket};
use super::queue::{Operation, Shared};
use super::record::{Checkpoint, Encoded, MAX_RECORD_BYTES, Place};
use super::segment::{self, Segment, SegmentId};
use crate::mutant;
use crate::vfs::{Vfs, remedy};

/// A batch is handed to the file system in pieces of about this size.
const WRITE_BYTES: usize = 1 << 20;

/// How far ahead of the records a segment is filled with zeros.
///
/// Preallocated room that was never written has to be marked as written when it is, and a sync then
/// waits for that too. Where zeros lie already a sync has only the records to write.
const ZEROS_AHEAD_BYTES: usize = 256 << 10;

/// Is told how long each sync took.
pub type SyncObserver = Arc<dyn Fn(Duration) + Send + Sync>;

pub struct Writer {
    vfs: Arc<dyn Vfs>,
    dir: PathBuf,
    segment_bytes: u64,
    sync_observer: Option<SyncObserver>,
    tail: Tail,
    standing: Standing,
    /// Bytes that belong at `tail.end - buffer.len()`.
    buffer: Vec<u8>,
    placed: Vec<(u64, Ticket, Location)>,
    /// Whether the last record says that all before it is durable.
    sealed: bool,
    under_way: Arc<UnderWay>,
}

/// Since when the writer has been at a batch, for whoever watches over the disk.
#[derive(Debug, Default)]
pub struct UnderWay {
    /// What `since_us` counts from. Not set where the writer has no thread, hence no clock.
    started: OnceLock<Instant>,
    /// Zero while nothing is under way.
    since_us: AtomicU64,
}

impl UnderWay {
    /// How long the write or sync that is under way has taken so far, `None` if there is none.
    pub fn time(&self) -> Option<Duration> {
        let since_us = self.since_us.load(Ordering::Relaxed);
        let started = self.started.get().filter(|_| since_us > 0)?;
        Some(now().saturating_duration_since(*started + Duration::from_micros(since_us)))
    }

    pub(super) fn start_clock(&self) {
        self.started.get_or_init(now);
    }

    fn begin(&self) {
        if let Some(started) = self.started.get() {
            let since_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.since_us.store(since_us.max(1), Ordering::Relaxed);
        }
    }

    fn end(&self) {
        self.since_us.store(0, Ordering::Relaxed);
    }
}

/// Where the log ends.
#[derive(Debug, Default)]
pub struct Tail {
    /// Oldest first; records go to the last.
    pub segments: VecDeque<Segment>,
    /// Where the next record goes, counting what is still in the writer's buffer.
    pub end: u64,
    /// Everything before is durable.
    pub synced: u64,
    /// The length of the last segment's file.
    pub capacity: u64,
    /// Everything before was written in this process, as zeros at least. No more than `capacity`.
    pub zeroed: u64,
}

impl Writer {
    /// Goes on at `tail`, or begins a new log if there is none.
    pub fn new(
        vfs: Arc<dyn Vfs>,
        dir: PathBuf,
        segment_bytes: u64,
        sync_observer: Option<SyncObserver>,
        tail: Option<Tail>,
        standing: Standing,
    ) -> io::Result<Writer> {
        let new = tail.is_none();
        let tail = tail.unwrap_or_default();
        let (buffer, placed) = (Vec::new(), Vec::new());
        let mut writer = Writer {
            vfs,
            dir,
            segment_bytes,
            sync_observer,
            tail,
            standing,
            buffer,
            placed,
            sealed: false,
            under_way: Arc::default(),
        };
        if new {
            writer.add_segment(0)?;
        }
        Ok(writer)
    }

    pub fn under_way(&self) -> &Arc<UnderWay> {
        &self.under_way
    }

    pub fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.tail.segments.iter()
    }

    /// Does `operations` durably and completes them in order. An error stops the log; then this and
    /// every later call completes with it.
    pub fn run(&mut self, operations: Vec<Operation>, shared: &Shared) {
        self.under_way.begin();
        self.run_timed(operations, shared);
        self.under_way.end();
    }

    fn run_timed(&mut self, operations: Vec<Operation>, shared: &Shared) {
        let result = match shared.fault() {
            Some(fault) => Err(io::Error::new(fault.kind(), fault)),
            None => self.write_batch(&operations, shared),
        };
        if let Err(error) = &result {
            shared.fail(error);
        }
        let permits = operations.iter().map(Operation::permits).sum();
        let purged = operations.iter().any(|operation| matches!(operation, Operation::Purge(_)));
        for operation in operations {
            operation.complete(match &result {
                Ok(()) => Ok(()),
                Err(_) if mutant::is("log-error-swallowed") => Ok(()),
                Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
            });
        }
        if result.is_err() {
            return;
        }
        shared.written(self.placed.drain(..), permits);
        let mut finished = if purged { self.remove_purged(shared) } else { Ok(()) };
        if finished.is_ok() && shared.is_idle() {
            finished = self.note_synced();
        }
        if let Err(error) = finished {
            shared.fail(&error);
        }
    }

    /// Says in the log that what was just acknowledged is durable, without waiting for the disk: the
    /// next batch would say so too, but here none is waiting. So damage to the last batch is told from
    /// a torn write as soon as this reaches the disk, and at once if only the process dies.
    fn note_synced(&mut self) -> io::Result<()> {
        let seal = Encoded::seal();
        let fits = self.tail.end + seal.len() as u64 <= self.tail.capacity;
        if self.sealed || !fits {
            return Ok(());
        }
        self.put(self.next_place(), &seal);
        self.flush()
    }

    /// Makes all that was written so far recognizable as durable. What follows a sync does so for
    /// what went before it, so this is for the beginning and the end.
    pub fn seal(&mut self) -> io::Result<()> {
        // Durable first: the seal's `synced` is what says so.
        self.sync()?;
        let place = self.make_room(&Encoded::seal(), None)?;
        self.put(place, &Encoded::seal());
        self.sync()
    }

    fn write_batch(&mut self, operations: &[Operation], shared: &Shared) -> io::Result<()> {
        self.placed.clear();
        for operation in operations {
            match operation {
                Operation::Append { entries, first_ticket, .. } => {
                    for (entry, ticket) in entries.iter().zip(*first_ticket..) {
                        let record = Encoded::entry(entry)?;
                        let place = self.append(&record, shared)?;
                        let index = entry.log_id.index;
                        let location = Location {
                            segment: place.segment,
                            offset: place.offset,
                            length: record.len() as u32,
                        };
                        self.placed.push((index, ticket, location));
                        let segment = self.last_segment();
                        segment.max_index = segment.max_index.max(Some(index));
                        self.standing.append(entry.log_id)?;
                    }
                }
                Operation::Vote(vote, _) => {
                    self.append(&Encoded::vote(vote)?, shared)?;
                    self.standing.vote = Some(*vote);
                }
                Operation::Committed(committed) => {
                    self.append(&Encoded::committed(committed)?, shared)?;
                    self.standing.committed = *committed;
                }
                Operation::Truncate(after) => {
                    if !mutant::is("truncation-unwritten") {
                        self.append(&Encoded::truncate(after)?, shared)?;
                    }
                    self.standing.truncate_after(*after);
                }
                Operation::Purge(upto) => {
                    self.append(&Encoded::purge(upto)?, shared)?;
                    self.standing.purge(*upto);
                }
            }
        }
        if mutant::is("vote-unsynced")
            && operations.iter().any(|operation| matches!(operation, Operation::Vote(..)))
        {
            return self.flush();
        }
        // A vote that is lost lets this member vote again: it is never taken for a torn write.
        if operations.iter().any(|operation| matches!(operation, Operation::Vote(..))) {
            self.sync()?;
            self.append(&Encoded::seal(), shared)?;
        }
        self.sync()
    }

    fn append(&mut self, record: &Encoded<'_>, shared: &Shared) -> io::Result<Place> {
        let place = self.make_room(record, Some(shared))?;
        self.put(place, record);
        if self.buffer.len() >= WRITE_BYTES {
            self.flush()?;
        }
        Ok(place)
    }

    /// Where `record` goes: to the end of the last segment, or into a new one if it does not fit.
    fn make_room(&mut self, record: &Encoded<'_>, shared: Option<&Shared>) -> io::Result<Place> {
        let length = record.len();
        if length > MAX_RECORD_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a log record of {length} bytes is over the bound of {MAX_RECORD_BYTES}"),
            ));
        }
        if self.tail.end + length as u64 > self.tail.capacity {
            // Only the last segment may have anything that is not durable.
            self.sync()?;
            self.add_segment(length)?;
            if let Some(shared) = shared {
                let segment = self.last_segment();
                shared.add_file(segment.id.sequence, segment.file.clone());
            }
        }
        Ok(self.next_place())
    }

    fn put(&mut self, place: Place, record: &Encoded<'_>) {
        record.write(place, self.tail.synced as u32, &mut self.buffer);
        self.tail.end += record.len() as u64;
        self.sealed = record.is_seal();
    }

    fn next_place(&self) -> Place {
        let offset = u32::try_from(self.tail.end)
            .expect("a segment is as long as the options or one record bid, both far below 4 GiB");
        let last = self.tail.segments.back().expect(HAS_SEGMENT);
        Place { segment: last.id.sequence, offset }
    }

    /// Begins a segment with room for a record of `length` bytes. It is durable on return: no record
    /// is acknowledged in a file that a power cut might lose.
    fn add_segment(&mut self, length: usize) -> io::Result<()> {
        let sequence = self.tail.segments.back().map_or(1, |last| last.id.sequence + 1);
        let id = SegmentId { sequence, first_index: self.standing.next_index().unwrap_or(0) };
        let checkpoint =
            Checkpoint { standing: self.standing.clone(), previous_end: self.tail.end };
        let checkpoint = Encoded::checkpoint(&checkpoint)?;
        let needed = (segment::HEADER_BYTES + checkpoint.len() + length) as u64;
        let capacity = self.segment_bytes.max(needed);
        let segment = Segment::draft(self.vfs.as_ref(), &self.dir, id, capacity)
            .map_err(|e| about(&self.dir.join(id.draft_name()), "create", e))?;
        self.tail.segments.push_back(segment);
        self.tail.end = segment::HEADER_BYTES as u64;
        self.tail.synced = 0;
        self.tail.capacity = capacity;
        self.tail.zeroed = 0;
        let place = self.next_place();
        self.put(place, &checkpoint);
        self.sync()?;
        let segment = self.tail.segments.back().expect(HAS_SEGMENT);
        segment
            .publish(self.vfs.as_ref(), &self.dir)
            .map_err(|e| about(&segment.path, "publish", e))
    }

    /// Hands the buffer to the file system.
    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let offset = self.tail.end - self.buffer.len() as u64;
        let mut buffer = std::mem::take(&mut self.buffer);
        if self.tail.end > self.tail.zeroed {
            let left = usize::try_from(self.tail.capacity - self.tail.end).unwrap_or(usize::MAX);
            let zeros = left.min(ZEROS_AHEAD_BYTES);
            buffer.resize(buffer.len() + zeros, 0);
            self.tail.zeroed = self.tail.end + zeros as u64;
        }
        let segment = self.last_segment();
        segment.file.write_at(offset, &buffer).map_err(|e| about(&segment.path, "write", e))?;
        self.buffer = buffer;
        self.buffer.clear();
        // A single huge record must not keep its memory.
        self.buffer.shrink_to(2 * WRITE_BYTES);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        if self.tail.synced == self.tail.end {
            return Ok(());
        }
        let started = self.sync_observer.as_ref().map(|_| now());
        let segment = self.last_segment();
        if !mutant::is("log-unsynced") {
            segment.file.sync().map_err(|e| about(&segment.path, "sync", e))?;
        }
        if let (Some(observer), Some(started)) = (&self.sync_observer, started) {
            observer(started.elapsed());
        }
        self.tail.synced = self.tail.end;
        Ok(())
    }

    /// Removes the oldest segments as far as a durable purge covers them.
    pub fn remove_purged(&mut self, shared: &Shared) -> io::Result<()> {
        let Some(purged) = self.standing.purged else { return Ok(()) };
        while self.tail.segments.len() > 1 {
            let oldest = &self.tail.segments[0];
            if oldest.max_index.is_some_and(|index| index > purged.index) {
                break;
            }
            let removed = self.vfs.remove_file(&oldest.path);
            removed.map_err(|e| about(&oldest.path, "remove", e))?;
            // One by one, oldest first: a power cut must not bring an older segment back without
            // its successor.
            self.vfs.sync_dir(&self.dir).map_err(|e| about(&self.dir, "sync", e))?;
            shared.remove_file(oldest.id.sequence);
            self.tail.segments.pop_front();
        }
        Ok(())
    }

    fn last_segment(&mut self) -> &mut Segment {
        self.tail.segments.back_mut().expect(HAS_SEGMENT)
    }
}

/// Says which file failed, at what, and what to do.
fn about(path: &Path, what: &str, error: io::Error) -> io::Error {
    let remedy = remedy(error.kind());
    io::Error::new(error.kind(), format!("{}: cannot {what}: {error}; {remedy}", path.display()))
}

const HAS_SEGMENT: &str = "a segment is created before the writer is handed out";

#[allow(
    clippy::disallowed_methods,
    reason = "for observers and the thread; a simulation has neither"
)]
fn now() -> Instant {
    Instant::now()
}
