//! The raft log on disk.
//!
//! ```text
//! append ──> contents (readable at once) ──> queue ──> writer thread ──> segment files
//!                 ^                                        │ one sync a batch
//! read ───────────┘  older entries: from their file        └──> flushed
//! ```
//!
//! The log is a sequence of records in append-only segments: entries, votes, the committed index,
//! truncations and purges, in the order openraft asked for them. Replaying it from the oldest
//! segment gives the state back, and what a crash cut off is always an end of that sequence. So
//! order is all there is to keep, and one writer keeps it.
//!
//! The first write or sync error stops the log for good: each waiting and each later call fails with
//! it, and [`LogStore::watch_fault`] tells the member, which must stop. After a failed sync nobody
//! knows what is on disk; only reading it again, in a new process, tells.
//!
//! The directory belongs to one `LogStore` at a time. The caller holds the lock on it.

mod contents;
mod queue;
mod read;
mod record;
mod recover;
mod segment;
#[cfg(test)]
mod tests;
mod writer;

use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use futures::{Stream, TryStreamExt, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, alias::LogIdOf};
use tokio::sync::{Notify, oneshot, watch};

use self::contents::cost_bytes;
use self::queue::{Operation, Shared};
use self::recover::Recovered;
use self::writer::Writer;
use super::types::{LogEntry, LogId, Raft, Vote};
use crate::vfs::Vfs;

pub use self::queue::LogFault;
pub use self::writer::{SyncObserver, UnderWay};

/// What one read for replication returns at most, and one step of applying reads.
const READ_LIMIT_BYTES: usize = 1 << 20;

#[derive(Clone)]
pub struct LogOptions {
    /// Preallocated length of a segment; longer where a single record is. At most 1 GiB.
    pub segment_bytes: u64,
    /// Recent entries kept in memory. Reads of older ones cost a file read.
    pub cache_bytes: usize,
    /// Entries that wait for the writer. When it is full, `append` waits.
    pub queue_bytes: u32,
    pub drive: Drive,
    /// Called on the writer's thread after each sync; it must return at once.
    pub sync_observer: Option<SyncObserver>,
}

/// Who runs the writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drive {
    /// A thread of its own, and tokio's blocking threads for reads.
    Thread,
    /// Whoever calls, before the call returns: for simulations, which must be deterministic and
    /// whose files do not block.
    Inline,
    /// A task, after the time that the disk says it takes: for simulations of whole members.
    Task,
}

impl Default for LogOptions {
    fn default() -> LogOptions {
        LogOptions {
            segment_bytes: 16 << 20,
            cache_bytes: 16 << 20,
            queue_bytes: 16 << 20,
            drive: Drive::Thread,
            sync_observer: None,
        }
    }
}

/// The durable raft log. Clones are handles on the same log, and readers of it.
#[derive(Clone)]
pub struct LogStore {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    running: Running,
    under_way: Arc<UnderWay>,
}

enum Running {
    Thread(Mutex<Option<JoinHandle<io::Result<()>>>>),
    Inline(InlineWriter),
    Task { writer: InlineWriter, wake: Arc<Notify> },
}

/// `None` once it is closed.
type InlineWriter = Arc<Mutex<Option<Box<Writer>>>>;

impl LogStore {
    /// Opens the log in `dir`, or begins one. All that is found is durable on return.
    ///
    /// Blocks: it reads every segment there is.
    ///
    /// # Errors
    ///
    /// `InvalidData` naming file and offset if something acknowledged is damaged or missing, or if
    /// another release wrote the log. A torn write at the end is no error, it is cut off.
    pub fn open(vfs: Arc<dyn Vfs>, dir: PathBuf, options: LogOptions) -> io::Result<LogStore> {
        let LogOptions { segment_bytes, cache_bytes, queue_bytes, drive, sync_observer } = options;
        if segment_bytes > 1 << 30 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("log segments of {segment_bytes} bytes are over the bound of 1 GiB"),
            ));
        }
        let Recovered { contents, tail } = recover::recover(vfs.as_ref(), &dir, cache_bytes)?;
        let standing = contents.standing().clone();
        let mut writer =
            Writer::new(vfs.clone(), dir, segment_bytes, sync_observer, tail, standing)?;
        // After a kill -9 the records just read may be in the page cache only.
        writer.seal()?;
        let files = writer.segments().map(|segment| (segment.id.sequence, segment.file.clone()));
        let shared = Arc::new(Shared::new(contents, files.collect(), queue_bytes));
        writer.remove_purged(&shared)?;
        let under_way = writer.under_way().clone();
        let running = match drive {
            Drive::Inline => Running::Inline(inline(writer)),
            Drive::Task => {
                let (writer, wake) = (inline(writer), Arc::new(Notify::new()));
                tokio::spawn(write_at_a_pace(vfs, writer.clone(), shared.clone(), wake.clone()));
                Running::Task { writer, wake }
            }
            Drive::Thread => {
                under_way.start_clock();
                Running::Thread(Mutex::new(Some(spawn_writer(writer, shared.clone())?)))
            }
        };
        Ok(LogStore { inner: Arc::new(Inner { shared, running, under_way }) })
    }

    /// Becomes `Some` when the log has stopped. The member must stop then.
    pub fn watch_fault(&self) -> watch::Receiver<Option<LogFault>> {
        self.inner.shared.watch_fault()
    }

    /// Tells, without a lock, how long the writer has been at what it writes or syncs now. Never
    /// anything where it is driven inline.
    pub fn under_way(&self) -> Arc<UnderWay> {
        self.inner.under_way.clone()
    }

    /// Makes durable what is queued and ends the writer. Every later call fails. Blocks for about
    /// one sync; dropping the last handle does the same.
    ///
    /// # Errors
    ///
    /// What stopped the log, or kept the last records from becoming durable.
    pub fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    /// The last entry that lies before the newest segment and the `kept` ones before that, if there is
    /// one.
    ///
    /// # Errors
    ///
    /// The fault, once the log has stopped.
    pub fn surplus(&self, kept: u64) -> io::Result<Option<u64>> {
        self.inner.shared.read(|state| Ok(state.contents.surplus(kept)))
    }

    /// Removes the entries up to `log_id`; where there are none, the log begins behind it.
    pub(super) fn remove_up_to(&self, log_id: LogId) -> io::Result<()> {
        self.submit(|contents| Ok(contents.purge(log_id).then_some(Operation::Purge(log_id))))
    }

    fn submit(
        &self,
        change: impl FnOnce(&mut contents::Contents) -> io::Result<Option<Operation>>,
    ) -> io::Result<()> {
        if self.inner.shared.submit(change)? {
            match &self.inner.running {
                Running::Thread(_) => {}
                Running::Inline(writer) => run_inline(writer, &self.inner.shared),
                Running::Task { wake, .. } => wake.notify_one(),
            }
        }
        Ok(())
    }

    /// The entries of `begin..end`, as many of the first as fit into `limit_bytes`, at least one.
    async fn read(&self, begin: u64, end: u64, limit_bytes: usize) -> io::Result<Vec<LogEntry>> {
        let shared = &self.inner.shared;
        let (found, files) = shared.read(|state| {
            let found = state.contents.find(begin, end, limit_bytes);
            // The handles are taken under the same lock, so that a purge cannot come between.
            let files: read::Files = match (found.located.first(), found.located.last()) {
                (Some((_, first)), Some((_, last))) => state
                    .files
                    .range(first.segment..=last.segment)
                    .map(|(sequence, file)| (*sequence, file.clone()))
                    .collect(),
                _ => read::Files::new(),
            };
            Ok((found, files))
        })?;
        if found.located.is_empty() {
            return Ok(found.cached);
        }
        let located = found.located;
        let fetched = match self.inner.running {
            Running::Inline(_) | Running::Task { .. } => read::fetch(&located, &files),
            Running::Thread(_) => off_the_runtime(move || read::fetch(&located, &files)).await?,
        };
        match fetched {
            Ok(mut entries) => {
                entries.extend(found.cached);
                Ok(entries)
            }
            Err(error) => {
                // What was durable and good no longer reads: this disk is not to be trusted.
                shared.fail(&error);
                Err(error)
            }
        }
    }
}

impl Inner {
    fn close(&self) -> io::Result<()> {
        self.shared.close();
        match &self.running {
            Running::Thread(thread) => {
                let thread = thread.lock().unwrap_or_else(PoisonError::into_inner).take();
                match thread.map(JoinHandle::join) {
                    None => Ok(()),
                    Some(Ok(result)) => result,
                    Some(Err(_)) => Err(io::Error::other("the raft log's writer panicked")),
                }
            }
            Running::Inline(writer) | Running::Task { writer, .. } => {
                run_inline(writer, &self.shared);
                if let Running::Task { wake, .. } = &self.running {
                    wake.notify_one();
                }
                let writer = writer.lock().unwrap_or_else(PoisonError::into_inner).take();
                writer.map_or(Ok(()), |writer| finish(*writer, &self.shared))
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let told = self.shared.fault().is_some();
        if let Err(error) = self.close()
            && !told
        {
            tracing::error!(%error, "closing the raft log");
        }
    }
}

fn inline(writer: Writer) -> InlineWriter {
    Arc::new(Mutex::new(Some(Box::new(writer))))
}

fn run_inline(writer: &InlineWriter, shared: &Shared) {
    let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(writer) = writer.as_mut() else { return };
    let operations = shared.take();
    if !operations.is_empty() {
        writer.run(operations, shared);
    }
}

/// Does what has gathered, again and again, each time after as long as the disk takes.
async fn write_at_a_pace(
    vfs: Arc<dyn Vfs>,
    writer: InlineWriter,
    shared: Arc<Shared>,
    wake: Arc<Notify>,
) {
    while writer.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
        if shared.is_idle() {
            wake.notified().await;
        } else {
            tokio::time::sleep(vfs.simulated_time().unwrap_or_default()).await;
            run_inline(&writer, &shared);
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "the log writer's thread; a simulation drives inline")]
fn spawn_writer(writer: Writer, shared: Arc<Shared>) -> io::Result<JoinHandle<io::Result<()>>> {
    thread::Builder::new()
        .name("raft-log".to_owned())
        .spawn(move || write_until_closed(writer, &shared))
}

fn write_until_closed(mut writer: Writer, shared: &Shared) -> io::Result<()> {
    /// A bug in the writer must stop the member, not leave it waiting for ever.
    struct StopOnPanic<'a>(&'a Shared);
    impl Drop for StopOnPanic<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.fail(&io::Error::other("the raft log's writer panicked"));
            }
        }
    }
    let _guard = StopOnPanic(shared);
    while let Some(operations) = shared.wait() {
        writer.run(operations, shared);
    }
    finish(writer, shared)
}

/// Marks the end of a log that was closed properly. Damage to any record before it is then told
/// from a torn write for certain.
fn finish(mut writer: Writer, shared: &Shared) -> io::Result<()> {
    match shared.fault() {
        Some(fault) => Err(io::Error::new(fault.kind(), fault)),
        None => writer.seal(),
    }
}

/// Runs `read` where blocking is allowed. Reads that miss the cache are those of a member that
/// catches up, so they are few and large, and tokio's own blocking threads do.
#[allow(clippy::disallowed_methods, reason = "blocks on the disk; a simulation reads inline")]
async fn off_the_runtime<T: Send + 'static>(
    read: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)
}

impl RaftLogReader<Raft> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<LogEntry>> {
        let (begin, end) = read::bounds(range);
        self.read(begin, end, usize::MAX).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        self.inner.shared.read(|state| Ok(state.contents.standing().vote))
    }

    async fn limited_get_log_entries(&mut self, begin: u64, end: u64) -> io::Result<Vec<LogEntry>> {
        self.read(begin, end, READ_LIMIT_BYTES).await
    }

    /// Unlike the default, this holds no more than about 1 MiB of the range at a time: a member that
    /// was away may have a million entries to apply.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<LogEntry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (begin, end) = read::bounds(range);
        let within = self.inner.shared.read(|state| {
            let first = state.contents.first_index();
            let next = state.contents.standing().next_index().unwrap_or(first);
            Ok((begin.max(first), end.min(next)))
        });
        let store = self.clone();
        let pieces = stream::try_unfold((store, within), |(store, within)| async move {
            let (begin, end) = within?;
            if begin >= end {
                return Ok(None);
            }
            let entries = store.read(begin, end, READ_LIMIT_BYTES).await?;
            match (entries.first(), entries.last()) {
                (Some(first), Some(last)) if first.log_id.index == begin => {
                    let rest = Ok((last.log_id.index + 1, end));
                    Ok(Some((stream::iter(entries.into_iter().map(Ok)), (store, rest))))
                }
                _ => Err(io::Error::other(format!(
                    "entry {begin} was removed from the log while it was being read"
                ))),
            }
        });
        Box::pin(pieces.try_flatten())
    }
}

impl RaftLogStorage<Raft> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<Raft>> {
        self.inner.shared.read(|state| {
            let standing = state.contents.standing();
            Ok(LogState { last_purged_log_id: standing.purged, last_log_id: standing.last })
        })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    /// Returns when the vote is durable, and with it everything that was asked for before.
    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let (durable, done) = oneshot::channel();
        self.submit(|contents| {
            contents.set_vote(*vote);
            Ok(Some(Operation::Vote(*vote, durable)))
        })?;
        done.await.map_err(|_| io::Error::other("the raft log's writer went away"))?
    }

    /// Returns at once. The record is written with whatever comes next, in order; a crash before
    /// that costs a restart some waiting and nothing else.
    async fn save_committed(&mut self, committed: Option<LogIdOf<Raft>>) -> io::Result<()> {
        self.submit(|contents| {
            contents.set_committed(committed);
            Ok(Some(Operation::Committed(committed)))
        })
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogIdOf<Raft>>> {
        self.inner.shared.read(|state| Ok(state.contents.standing().committed))
    }

    /// Returns when the entries are readable, and calls `flushed` when they are durable. Waits for
    /// room while `queue_bytes` of entries wait for the disk.
    async fn append<I>(&mut self, entries: I, flushed: IOFlushed<Raft>) -> io::Result<()>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<LogEntry> = entries.into_iter().collect();
        let bytes = entries.iter().map(cost_bytes).sum();
        let room = self.inner.shared.room_for(bytes).await?;
        let permits = room.num_permits() as u32;
        self.submit(|contents| {
            let first_ticket = contents.append(&entries)?;
            // The writer gives it back when they are written.
            room.forget();
            Ok(Some(Operation::Append { entries, first_ticket, permits, flushed }))
        })
    }

    /// Returns at once. Whatever is appended later is durable only together with the truncation.
    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        self.submit(|contents| {
            let changed = contents.truncate_after(last_log_id);
            Ok(changed.then_some(Operation::Truncate(last_log_id)))
        })
    }

    /// Returns at once. Files go when the purge is durable and covers all that is in them.
    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        self.remove_up_to(log_id)
    }
}
