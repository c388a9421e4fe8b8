//! What the callers and the writer share: the contents as they were asked to be, and the queue of
//! operations that will make the files agree.
//!
//! One lock covers both, so operations stand in the queue in the order in which the contents
//! changed. The lock is never held across I/O or a callback.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use openraft::storage::IOFlushed;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot, watch};

use super::contents::{Contents, Location, Ticket};
use crate::raft::types::{LogEntry, LogId, Raft, Vote};
use crate::vfs::VfsFile;

/// Why the log has stopped: the first error that made its files doubtful. It stays.
#[derive(Debug, Clone)]
pub struct LogFault {
    kind: io::ErrorKind,
    message: Arc<str>,
}

impl LogFault {
    fn new(error: &io::Error) -> LogFault {
        LogFault { kind: error.kind(), message: error.to_string().into() }
    }

    pub fn kind(&self) -> io::ErrorKind {
        self.kind
    }

    fn to_error(&self) -> io::Error {
        io::Error::new(self.kind, self.to_string())
    }
}

impl fmt::Display for LogFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the raft log has stopped: {}", self.message)
    }
}

impl std::error::Error for LogFault {}

/// Something for the writer to do.
pub enum Operation {
    Append { entries: Vec<LogEntry>, first_ticket: Ticket, permits: u32, flushed: IOFlushed<Raft> },
    Vote(Vote, oneshot::Sender<io::Result<()>>),
    Committed(Option<LogId>),
    Truncate(Option<LogId>),
    Purge(LogId),
}

impl Operation {
    /// Tells whoever waits for it.
    pub fn complete(self, result: io::Result<()>) {
        match self {
            Operation::Append { flushed, .. } => flushed.io_completed(result),
            Operation::Vote(_, waiter) => {
                // A caller that went away has no use for the answer.
                let _ = waiter.send(result);
            }
            Operation::Committed(_) | Operation::Truncate(_) | Operation::Purge(_) => {}
        }
    }

    pub fn permits(&self) -> usize {
        match self {
            Operation::Append { permits, .. } => *permits as usize,
            _ => 0,
        }
    }

    /// The committed index only speeds up a restart: it goes along with whatever comes next.
    fn can_wait(&self) -> bool {
        matches!(self, Operation::Committed(_))
    }
}

pub struct State {
    pub contents: Contents,
    /// The files that locations point into. Reading one that was removed meanwhile still works.
    pub files: BTreeMap<u64, Arc<dyn VfsFile>>,
    operations: Vec<Operation>,
    closed: bool,
    fault: Option<LogFault>,
}

impl State {
    fn check(&self) -> io::Result<()> {
        match &self.fault {
            Some(fault) => Err(fault.to_error()),
            None if self.closed => Err(closed()),
            None => Ok(()),
        }
    }
}

pub struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    room: Semaphore,
    room_bytes: u32,
    fault: watch::Sender<Option<LogFault>>,
}

impl Shared {
    pub fn new(
        contents: Contents,
        files: BTreeMap<u64, Arc<dyn VfsFile>>,
        room_bytes: u32,
    ) -> Shared {
        let state = State { contents, files, operations: Vec::new(), closed: false, fault: None };
        Shared {
            state: Mutex::new(state),
            wake: Condvar::new(),
            room: Semaphore::new(room_bytes as usize),
            room_bytes,
            fault: watch::Sender::new(None),
        }
    }

    /// Waits until the queue has room for `bytes`, or is empty if they are more than it ever has.
    pub async fn room_for(&self, bytes: usize) -> io::Result<SemaphorePermit<'_>> {
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.room_bytes);
        match self.room.acquire_many(permits).await {
            Ok(permit) => Ok(permit),
            Err(_) => Err(self.read(|_| Ok(())).err().unwrap_or_else(closed)),
        }
    }

    /// Changes the contents and queues the operation that does the same to the files, if the change
    /// turns out to need one. Returns whether the writer must run.
    pub fn submit(
        &self,
        change: impl FnOnce(&mut Contents) -> io::Result<Option<Operation>>,
    ) -> io::Result<bool> {
        let mut state = self.lock();
        state.check()?;
        let Some(operation) = change(&mut state.contents)? else { return Ok(false) };
        let can_wait = operation.can_wait();
        match state.operations.last_mut() {
            // Only the newest counts, which also bounds how many can wait.
            Some(last) if can_wait && last.can_wait() => *last = operation,
            _ => state.operations.push(operation),
        }
        drop(state);
        if !can_wait {
            self.wake.notify_one();
        }
        Ok(!can_wait)
    }

    /// Looks at the state, unless the log has stopped.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> io::Result<T>) -> io::Result<T> {
        let state = self.lock();
        state.check()?;
        look(&state)
    }

    /// For the writer: all that is queued, waiting for something if nothing is. `None` when the log
    /// is closed and everything has been taken.
    pub fn wait(&self) -> Option<Vec<Operation>> {
        let mut state = self.lock();
        loop {
            if state.operations.iter().any(|operation| !operation.can_wait()) {
                break;
            }
            if state.closed {
                if state.operations.is_empty() {
                    return None;
                }
                break;
            }
            state = self.wake.wait(state).expect(UNPOISONED);
        }
        Some(std::mem::take(&mut state.operations))
    }

    /// For the writer: whether nothing is queued that it would wake for.
    pub fn is_idle(&self) -> bool {
        self.lock().operations.iter().all(Operation::can_wait)
    }

    /// For the writer: all that is queued now.
    pub fn take(&self) -> Vec<Operation> {
        std::mem::take(&mut self.lock().operations)
    }

    /// For the writer: entries that can be read from their file now, and the room they gave back.
    pub fn written(
        &self,
        placed: impl IntoIterator<Item = (u64, Ticket, Location)>,
        permits: usize,
    ) {
        let mut state = self.lock();
        for (index, ticket, location) in placed {
            state.contents.place(index, ticket, location);
        }
        state.contents.evict();
        drop(state);
        self.room.add_permits(permits);
    }

    pub fn add_file(&self, sequence: u64, file: Arc<dyn VfsFile>) {
        self.lock().files.insert(sequence, file);
    }

    pub fn remove_file(&self, sequence: u64) {
        self.lock().files.remove(&sequence);
    }

    /// Stops the log for good: whoever waits, and whoever comes, gets the error.
    pub fn fail(&self, error: &io::Error) {
        let mut state = self.lock();
        let fault = state.fault.get_or_insert_with(|| LogFault::new(error)).clone();
        let abandoned = std::mem::take(&mut state.operations);
        drop(state);
        self.room.close();
        self.wake.notify_one();
        self.fault.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert_with(|| fault.clone());
            first
        });
        for operation in abandoned {
            operation.complete(Err(fault.to_error()));
        }
    }

    pub fn fault(&self) -> Option<LogFault> {
        self.lock().fault.clone()
    }

    pub fn watch_fault(&self) -> watch::Receiver<Option<LogFault>> {
        self.fault.subscribe()
    }

    /// Refuses new operations, and lets the writer end when it has done those that are queued.
    pub fn close(&self) {
        self.lock().closed = true;
        self.room.close();
        self.wake.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Poisoned means that a change was left half done. `check` cannot see that, so let the
        // panic spread: the member stops.
        self.state.lock().expect(UNPOISONED)
    }
}

const UNPOISONED: &str = "no other thread panicked while it changed the log's contents";

fn closed() -> io::Error {
    io::Error::other("the raft log is closed")
}
