//! Write-behind: batches reach the engine on one thread, behind the machine's back.
//!
//! ```text
//! applier -> send(index, batch) -> queue, bounded in bytes -> merge -> Engine::apply
//!                                                  now and then -> Engine::flush -> durable index
//! ```
//!
//! The applier never waits for the disk, only for room in the queue. The engine's batches are those
//! of the queue, merged in order and never reordered, so what a crash leaves is a state the machine
//! was once in. The log may be purged up to the durable index and no further.
//!
//! The first error or panic of the engine ends the writing: it is published as a fault, and every
//! call from then on reports it. The member stops.

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, oneshot, watch};

use super::{Batch, Engine};

/// What a change costs in the queue beside its bytes.
const CHANGE_OVERHEAD_BYTES: usize = 64;

#[derive(Clone)]
pub struct WriterOptions {
    /// The bound of the queue. When it is full, [`StateWriter::send`] waits. A single batch larger
    /// than this takes the whole queue. At most 4 GiB.
    pub queue_bytes: usize,
    /// How long a batch waits for others to be merged with, unless somebody waits for the writer.
    /// A batch of one entry costs the engine nearly as much as one of a thousand.
    pub linger: Duration,
    /// Waiting batches are merged into one until it is this large.
    pub merge_bytes: usize,
    /// A flush follows when this much was applied since the last one,
    pub flush_bytes: usize,
    /// or when the oldest change that is not durable has waited this long.
    pub flush_interval: Duration,
    /// Told how long each flush took, on the writer's thread; it must return at once.
    pub flush_observer: Option<FlushObserver>,
}

/// Is told how long each flush took.
pub type FlushObserver = Arc<dyn Fn(Duration) + Send + Sync>;

impl Default for WriterOptions {
    fn default() -> WriterOptions {
        WriterOptions {
            queue_bytes: 64 << 20,
            linger: Duration::from_millis(100),
            merge_bytes: 4 << 20,
            flush_bytes: 16 << 20,
            flush_interval: Duration::from_secs(2),
            flush_observer: None,
        }
    }
}

/// Why nothing is written any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("state storage: {message}")]
pub struct StorageFault {
    pub kind: io::ErrorKind,
    pub message: String,
}

impl From<StorageFault> for io::Error {
    fn from(fault: StorageFault) -> io::Error {
        io::Error::new(fault.kind, fault)
    }
}

/// The handle on the writer. Dropping it lets the writer finish what is queued, unobserved; see
/// [`StateWriter::close`].
pub struct StateWriter {
    hands: Hands,
    room: Arc<Semaphore>,
    queue_bytes: u32,
    /// Counts both the beginnings and the ends of waiting for room.
    waits: AtomicU64,
    shared: Arc<Shared>,
}

/// Who does the work.
enum Hands {
    Thread { queue: mpsc::Sender<Message>, thread: JoinHandle<()> },
    Caller(Mutex<Worker>),
}

/// A wait for room, until it is over or given up.
struct Wait<'a>(&'a AtomicU64);

impl Wait<'_> {
    fn begin(waits: &AtomicU64) -> Wait<'_> {
        waits.fetch_add(1, Ordering::Relaxed);
        Wait(waits)
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the writer tells everybody.
struct Shared {
    durable: watch::Sender<u64>,
    fault: watch::Sender<Option<StorageFault>>,
    size_bytes: AtomicU64,
}

type Inspection = Box<dyn FnOnce(&dyn Engine) + Send>;

enum Message {
    Batch { index: u64, batch: Batch, room: OwnedSemaphorePermit },
    Flush { done: oneshot::Sender<u64> },
    Replace { engine: Box<dyn Engine>, index: u64, old: oneshot::Sender<Box<dyn Engine>> },
    Inspect(Inspection),
    Close { engine: oneshot::Sender<Box<dyn Engine>> },
}

impl StateWriter {
    /// Starts the writer's thread. `index` is the applied index that `engine` holds, durably.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    // This is the thread the design speaks of: an engine's calls block.
    #[allow(clippy::disallowed_methods)]
    pub fn start(
        engine: Box<dyn Engine>,
        index: u64,
        options: WriterOptions,
    ) -> io::Result<StateWriter> {
        let (queue, messages) = mpsc::channel();
        let (mut worker, handle) = Worker::new(engine, index, options);
        let thread = thread::Builder::new()
            .name("state-writer".to_owned())
            .spawn(move || worker.run(&messages))?;
        Ok(handle(Hands::Thread { queue, thread }))
    }

    /// A writer without a thread or a clock: every call does its work before it returns, and flushes
    /// follow from bytes alone. For simulations, where a thread's pace would show.
    pub fn start_inline(
        engine: Box<dyn Engine>,
        index: u64,
        options: WriterOptions,
    ) -> StateWriter {
        let (worker, handle) = Worker::new(engine, index, options);
        handle(Hands::Caller(Mutex::new(worker)))
    }

    /// Queues what entry `index` changed, after waiting for room. Returns long before it is written.
    ///
    /// One task sends, in the order of the log. Several batches may carry the same index, but the
    /// index becomes durable with the first of them: the others hold only what may be lost.
    /// Nothing was sent if the future is dropped early.
    ///
    /// # Errors
    ///
    /// The fault, if there is one.
    pub async fn send(&self, index: u64, batch: Batch) -> io::Result<()> {
        let weight = u32::try_from(weight(&batch)).unwrap_or(u32::MAX).min(self.queue_bytes);
        let room = match Arc::clone(&self.room).try_acquire_many_owned(weight) {
            Err(TryAcquireError::NoPermits) => {
                let _waits = Wait::begin(&self.waits);
                Arc::clone(&self.room).acquire_many_owned(weight).await
            }
            Ok(room) => Ok(room),
            Err(TryAcquireError::Closed) => return Err(self.shared.error()),
        };
        let room = room.map_err(|_closed| self.shared.error())?;
        self.post(Message::Batch { index, batch, room })
    }

    /// Which wait of [`StateWriter::send`] for room is under way, counting from the first.
    pub fn waits(&self) -> Option<u64> {
        let waits = self.waits.load(Ordering::Relaxed);
        (waits % 2 == 1).then_some(waits / 2)
    }

    /// Makes everything sent before durable and returns the durable index.
    ///
    /// # Errors
    ///
    /// The fault, if there is one.
    pub async fn flush(&self) -> io::Result<u64> {
        let (done, flushed) = oneshot::channel();
        self.post(Message::Flush { done })?;
        self.answer(flushed).await
    }

    /// Goes on with `engine`, which holds the state at `index`, after what was sent before. Returns
    /// the engine it replaces, not flushed. For a snapshot that was installed: the durable index
    /// is then `index`.
    ///
    /// # Errors
    ///
    /// The fault, if there is one; also that of a first flush of `engine`.
    pub async fn replace(
        &self,
        engine: Box<dyn Engine>,
        index: u64,
    ) -> io::Result<Box<dyn Engine>> {
        let (old, replaced) = oneshot::channel();
        self.post(Message::Replace { engine, index, old })?;
        self.answer(replaced).await
    }

    /// Runs `look` on the writer's thread, on an engine to which everything sent before was applied.
    /// Nothing is written meanwhile, so it should be short.
    ///
    /// # Errors
    ///
    /// The fault, if there is one. A panic in `look` is one.
    pub async fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&dyn Engine) -> T + Send + 'static,
    ) -> io::Result<T> {
        let (found, seen) = oneshot::channel();
        // The caller may have gone; then nobody needs what was found.
        let look = move |engine: &dyn Engine| {
            let _ = found.send(look(engine));
        };
        self.post(Message::Inspect(Box::new(look)))?;
        self.answer(seen).await
    }

    /// Writes and flushes everything sent before, and gives the engine back.
    ///
    /// # Errors
    ///
    /// The fault, if there is one; the engine is dropped then.
    pub async fn close(self) -> io::Result<Box<dyn Engine>> {
        let (engine, closed) = oneshot::channel();
        self.post(Message::Close { engine })?;
        let engine = self.answer(closed).await?;
        if let Hands::Thread { thread, .. } = self.hands {
            // It ends once it has sent the engine.
            thread.join().map_err(|_panic| io::Error::other("the state writer panicked"))?;
        }
        Ok(engine)
    }

    /// The highest index whose batch was applied before a flush that succeeded.
    pub fn durable(&self) -> watch::Receiver<u64> {
        self.shared.durable.subscribe()
    }

    /// `Some` once the engine has failed.
    pub fn fault(&self) -> watch::Receiver<Option<StorageFault>> {
        self.shared.fault.subscribe()
    }

    /// Bytes on disk at the last flush.
    pub fn size_bytes(&self) -> u64 {
        self.shared.size_bytes.load(Ordering::Relaxed)
    }

    fn post(&self, message: Message) -> io::Result<()> {
        match &self.hands {
            Hands::Thread { queue, thread } => {
                let urgent = !matches!(message, Message::Batch { .. });
                queue.send(message).map_err(|_| self.shared.error())?;
                if urgent {
                    thread.thread().unpark();
                }
                Ok(())
            }
            Hands::Caller(worker) => {
                let mut worker = worker.lock().map_err(|_| self.shared.error())?;
                worker.handle(message).map_err(|Stopped| self.shared.error())
            }
        }
    }

    async fn answer<T>(&self, answer: oneshot::Receiver<T>) -> io::Result<T> {
        answer.await.map_err(|_gone| self.shared.error())
    }
}

impl fmt::Debug for StateWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateWriter")
            .field("durable", &*self.shared.durable.borrow())
            .field("fault", &*self.shared.fault.borrow())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// What a call reports that the writer did not answer.
    fn error(&self) -> io::Error {
        match &*self.fault.borrow() {
            Some(fault) => fault.clone().into(),
            None => io::Error::other("the state writer has ended"),
        }
    }
}

fn weight(batch: &Batch) -> usize {
    batch.len_bytes() + CHANGE_OVERHEAD_BYTES * (1 + batch.changes.len() + batch.garbage.len())
}

/// The engine failed or was given back: there is nothing more to do. A fault has been published
/// before this is returned, so whoever misses an answer finds it.
struct Stopped;

/// The side that owns the engine.
struct Worker {
    /// `None` once it was given back or failed.
    engine: Option<Box<dyn Engine>>,
    options: WriterOptions,
    room: Arc<Semaphore>,
    shared: Arc<Shared>,
    /// The highest index applied, durable or not.
    applied: u64,
    unflushed_bytes: usize,
}

impl Worker {
    /// The worker, and its handle once it is known who does the work.
    fn new(
        engine: Box<dyn Engine>,
        index: u64,
        options: WriterOptions,
    ) -> (Worker, impl FnOnce(Hands) -> StateWriter) {
        let queue_bytes = u32::try_from(options.queue_bytes).unwrap_or(u32::MAX);
        let room = Arc::new(Semaphore::new(queue_bytes as usize));
        let shared = Arc::new(Shared {
            durable: watch::Sender::new(index),
            fault: watch::Sender::new(None),
            size_bytes: AtomicU64::new(engine.size_bytes()),
        });
        let worker = Worker {
            engine: Some(engine),
            options,
            room: Arc::clone(&room),
            shared: Arc::clone(&shared),
            applied: index,
            unflushed_bytes: 0,
        };
        (worker, move |hands| StateWriter {
            hands,
            room,
            queue_bytes,
            waits: AtomicU64::new(0),
            shared,
        })
    }

    /// The thread: until the handle is dropped, the engine given back, or a fault.
    // The flush rule is a matter of this thread alone, and no outcome depends on its clock.
    #[allow(clippy::disallowed_methods)]
    fn run(&mut self, messages: &mpsc::Receiver<Message>) {
        let mut unflushed_since = None;
        let mut next = None;
        let mut behind = false;
        loop {
            let message = match (next.take(), unflushed_since) {
                (Some(message), _) => Ok(message),
                (None, None) => messages.recv().map_err(|_| RecvTimeoutError::Disconnected),
                (None, Some(since)) => {
                    let deadline: Instant = since + self.options.flush_interval;
                    messages.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                }
            };
            let step = match message {
                Ok(Message::Batch { index, batch, room }) => {
                    let mut merged = Merged::new(index, batch, room);
                    if !behind {
                        // Not woken by the batches that follow, only by other messages.
                        thread::park_timeout(self.options.linger);
                    }
                    next = merged.take_more(messages, self.options.merge_bytes);
                    behind = merged.weight >= self.options.merge_bytes;
                    unflushed_since.get_or_insert_with(Instant::now);
                    self.apply(merged)
                }
                Ok(message) => self.handle(message),
                Err(RecvTimeoutError::Timeout) => self.flush(),
                // The handle is gone, but what it sent counts.
                Err(RecvTimeoutError::Disconnected) => self.flush().and(Err(Stopped)),
            };
            if step.is_err() || self.engine.is_none() {
                return;
            }
            if unflushed_since.is_some_and(|since| since.elapsed() >= self.options.flush_interval)
                && self.flush().is_err()
            {
                return;
            }
            if self.unflushed_bytes == 0 {
                unflushed_since = None;
            }
        }
    }

    fn handle(&mut self, message: Message) -> Result<(), Stopped> {
        match message {
            Message::Batch { index, batch, room } => self.apply(Merged::new(index, batch, room))?,
            Message::Flush { done } => {
                self.flush()?;
                // Here and below: an asker who has gone does not matter.
                let _ = done.send(*self.shared.durable.borrow());
            }
            Message::Replace { engine, index, old } => {
                let replaced = self.engine.replace(engine).ok_or(Stopped)?;
                self.applied = index;
                // Also without unflushed bytes of ours: whoever built it need not have flushed it.
                self.unflushed_bytes = 1;
                self.flush()?;
                let _ = old.send(replaced);
            }
            Message::Inspect(look) => self.call(|engine| {
                look(engine);
                Ok(())
            })?,
            Message::Close { engine } => {
                self.flush()?;
                self.room.close();
                let _ = engine.send(self.engine.take().ok_or(Stopped)?);
            }
        }
        Ok(())
    }

    fn apply(&mut self, merged: Merged) -> Result<(), Stopped> {
        let Merged { first_index, index, batch, weight, room } = merged;
        let applied = self.applied;
        self.call(|engine| {
            if first_index < applied {
                let text = format!("a batch of index {first_index} came after index {applied}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            engine.apply(batch)
        })?;
        drop(room);
        self.applied = index;
        self.unflushed_bytes += weight;
        if self.unflushed_bytes >= self.options.flush_bytes { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Stopped> {
        if self.unflushed_bytes == 0 {
            return if self.engine.is_some() { Ok(()) } else { Err(Stopped) };
        }
        let observer = self.options.flush_observer.clone();
        let size_bytes = self.call(|engine| {
            match observer {
                Some(observer) => {
                    let started = now();
                    engine.flush()?;
                    observer(started.elapsed());
                }
                None => engine.flush()?,
            }
            Ok(engine.size_bytes())
        })?;
        self.shared.size_bytes.store(size_bytes, Ordering::Relaxed);
        self.unflushed_bytes = 0;
        self.shared.durable.send_replace(self.applied);
        Ok(())
    }

    /// The one way to the engine. An error or a panic in there is a fault.
    fn call<T>(
        &mut self,
        work: impl FnOnce(&mut dyn Engine) -> io::Result<T>,
    ) -> Result<T, Stopped> {
        let engine = self.engine.as_deref_mut().ok_or(Stopped)?;
        let error = match catch_unwind(AssertUnwindSafe(|| work(engine))) {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error,
            Err(panic) => io::Error::other(format!("the engine panicked: {}", text_of(&*panic))),
        };
        let fault = StorageFault { kind: error.kind(), message: error.to_string() };
        self.shared.fault.send_replace(Some(fault));
        self.room.close();
        self.engine = None;
        Err(Stopped)
    }
}

#[allow(clippy::disallowed_methods, reason = "only for an observer, which a simulation has not")]
fn now() -> Instant {
    Instant::now()
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a text")
}

/// Consecutive batches of the queue, as one.
struct Merged {
    first_index: u64,
    index: u64,
    batch: Batch,
    weight: usize,
    /// Kept until the batch is applied, so that the bound counts it.
    room: OwnedSemaphorePermit,
}

impl Merged {
    fn new(index: u64, batch: Batch, room: OwnedSemaphorePermit) -> Merged {
        Merged { first_index: index, index, weight: weight(&batch), batch, room }
    }

    /// Adds what is queued, up to `limit_bytes`, without waiting. Returns the message it cannot add.
    fn take_more(
        &mut self,
        messages: &mpsc::Receiver<Message>,
        limit_bytes: usize,
    ) -> Option<Message> {
        // Garbage is removed after the changes of its batch, so a later batch that writes such a key
        // again has to stay apart.
        while self.weight < limit_bytes && self.batch.garbage.is_empty() {
            match messages.try_recv() {
                // Left to `apply`, which calls it a fault.
                Ok(Message::Batch { index, batch, room }) if index < self.index => {
                    return Some(Message::Batch { index, batch, room });
                }
                Ok(Message::Batch { index, batch, room }) => {
                    self.weight += weight(&batch);
                    self.index = index;
                    self.batch.changes.extend(batch.changes);
                    self.batch.garbage = batch.garbage;
                    self.room.merge(room);
                }
                Ok(message) => return Some(message),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return None,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
