//! The watches of one client stream.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::time::{Instant, Sleep};

use super::catch_up::{ChunkSize, Compacted, read_chunk};
use super::census;
use super::hub::Hub;
use super::watcher::{Interest, Mailbox, Mode, Watcher};
use super::{PROGRESS_REQUESTS, WATCHES_PER_STREAM};
use crate::machine::Event;
use crate::types::KeyRange;

/// A watch to be created.
#[derive(Debug, Clone)]
pub struct WatchSpec {
    /// `None` lets the stream pick one.
    pub id: Option<i64>,
    pub range: KeyRange,
    /// The first revision of interest; 0 is the one after the current.
    pub start_revision: i64,
    /// Whether events carry the pair before the change.
    pub prev_kv: bool,
    /// Leaves puts out.
    pub no_put: bool,
    /// Leaves deletes out.
    pub no_delete: bool,
    /// Whether the watch tells its progress when it had no events for an interval.
    pub progress_notify: bool,
}

impl WatchSpec {
    /// Every change in `range` from `start_revision` on.
    pub fn new(range: KeyRange, start_revision: i64) -> WatchSpec {
        WatchSpec {
            id: None,
            range,
            start_revision,
            prev_kv: false,
            no_put: false,
            no_delete: false,
            progress_notify: false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    pub id: i64,
    /// The store's revision at the creation. Start revision 0 means the one after it.
    pub revision: i64,
}

/// Why a watch was not created. The other watches of the stream go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the start revision is negative")]
    NegativeStart,
    #[error("no key can be in the range")]
    EmptyRange,
    #[error("the watch id is in use on the stream")]
    DuplicateId,
    #[error("the stream has {WATCHES_PER_STREAM} watches")]
    TooMany,
}

/// What a stream tells its client next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// Events of one watch: whole revisions, in order, at least one event.
    Events { id: i64, events: Vec<Event> },
    /// The history the watch has yet to read is gone before `compacted`; the watch has ended.
    Compacted { id: i64, compacted: i64 },
    /// Everything up to `revision` was delivered: for one watch, or (`None`) for all of the stream.
    Progress { id: Option<i64>, revision: i64 },
}

/// The watches of one client, for one task. Dropping it ends them.
pub struct WatchStream {
    hub: Hub,
    mailbox: Arc<Mailbox>,
    watches: BTreeMap<i64, Watch>,
    next_id: i64,
    chunk_size: ChunkSize,
    /// Whether the other tasks should have a turn first: set after reading from the history.
    owes_yield: bool,
    /// Whether events were handed out as they came since the last pause.
    handed_out: bool,
    /// Until then events are gathered; see [`Hub::pause`].
    gathers_until: Option<Instant>,
    /// Runs up to there when there is something to hand out.
    pause: Option<Pin<Box<Sleep>>>,
    /// For each progress request that waits: the store's revision when it was made.
    progress_requests: VecDeque<i64>,
    /// How many watchers to serve before looking again whether progress is due.
    progress_patience: usize,
    progress_interval: Duration,
    /// Runs while there may be a watch that wants progress.
    progress_timer: Option<Pin<Box<Sleep>>>,
    /// Watches that were idle for an interval and have not told yet.
    progress_due: VecDeque<Arc<Watcher>>,
}

struct Watch {
    watcher: Arc<Watcher>,
    /// As asked for: 0 is the revision after the one of its creation.
    start_revision: i64,
    progress_notify: bool,
}

impl WatchStream {
    pub(super) fn new(hub: Hub, progress_interval: Duration) -> WatchStream {
        census::add(&hub.tally().streams, 1);
        WatchStream {
            hub,
            mailbox: Arc::default(),
            watches: BTreeMap::new(),
            next_id: 0,
            chunk_size: ChunkSize::default(),
            owes_yield: false,
            handed_out: false,
            gathers_until: None,
            pause: None,
            progress_requests: VecDeque::new(),
            progress_patience: 0,
            progress_interval: progress_interval.max(Duration::from_millis(1)),
            progress_timer: None,
            progress_due: VecDeque::new(),
        }
    }

    /// Creates a watch. A start in the past is read from the history by [`WatchStream::next`], which
    /// also tells when it is compacted.
    ///
    /// # Errors
    ///
    /// [`Refused`]; the stream is as it was.
    pub fn create(&mut self, spec: WatchSpec) -> Result<Created, Refused> {
        if spec.start_revision < 0 {
            return Err(Refused::NegativeStart);
        }
        if spec.range.is_empty() {
            return Err(Refused::EmptyRange);
        }
        if spec.id.is_some_and(|id| self.watches.contains_key(&id)) {
            return Err(Refused::DuplicateId);
        }
        if self.watches.len() >= WATCHES_PER_STREAM {
            return Err(Refused::TooMany);
        }
        let id = spec.id.unwrap_or_else(|| self.pick_id());
        let revision = self.hub.store().revision();
        let next = if spec.start_revision == 0 { revision + 1 } else { spec.start_revision };
        let interest = Interest {
            range: spec.range,
            puts: !spec.no_put,
            deletes: !spec.no_delete,
            prev_kv: spec.prev_kv,
        };
        let watcher = self.hub.create(id, interest, next, &self.mailbox);
        let (start_revision, progress_notify) = (spec.start_revision, spec.progress_notify);
        self.watches.insert(id, Watch { watcher, start_revision, progress_notify });
        if spec.progress_notify && self.progress_timer.is_none() {
            self.progress_timer = Some(Box::pin(tokio::time::sleep(self.progress_interval)));
        }
        Ok(Created { id, revision })
    }

    fn pick_id(&mut self) -> i64 {
        while self.watches.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    /// Ends a watch; its id may be used again, and nothing more is delivered for it. False when
    /// there is no such watch.
    pub fn cancel(&mut self, id: i64) -> bool {
        match self.watches.remove(&id) {
            Some(watch) => {
                self.hub.leave(&watch.watcher);
                true
            }
            None => false,
        }
    }

    /// Asks for one [`Delivery::Progress`] of the whole stream, at the store's present revision or
    /// later. It comes when all watches have been delivered that far; not at all when there is
    /// none.
    pub fn request_progress(&mut self) {
        if self.watches.is_empty() {
            return;
        }
        let revision = self.hub.store().revision();
        if self.progress_requests.len() >= PROGRESS_REQUESTS {
            self.progress_requests.pop_back();
        }
        self.progress_requests.push_back(revision);
        self.progress_patience = 0;
        self.hub.wake_at(revision, &self.mailbox);
    }

    /// Waits for the next delivery. Watches that have something are served in turn. Dropping the
    /// future loses nothing.
    pub async fn next(&mut self) -> Delivery {
        loop {
            // A stream that always has something ready lets the other tasks run all the same.
            tokio::task::consume_budget().await;
            if std::mem::take(&mut self.owes_yield) {
                tokio::task::yield_now().await;
            }
            if let Some(progress) = self.watch_progress() {
                return progress;
            }
            if self.progress_patience == 0
                && let Some(progress) = self.stream_progress()
            {
                return progress;
            }
            self.progress_patience = self.progress_patience.saturating_sub(1);
            if self.must_gather() {
                self.idle().await;
                continue;
            }
            match self.mailbox.pop() {
                Some(watcher) => {
                    if let Some(delivery) = self.serve(&watcher) {
                        return delivery;
                    }
                }
                None => {
                    // Between the last look and now the last watcher may have caught up.
                    if let Some(progress) = self.stream_progress() {
                        return progress;
                    }
                    if std::mem::take(&mut self.handed_out) {
                        let pause = self.hub.pause();
                        self.gathers_until = (!pause.is_zero()).then(|| Instant::now() + pause);
                    }
                    self.idle().await;
                }
            }
        }
    }

    /// Whether what is there has to wait: then `pause` runs.
    fn must_gather(&mut self) -> bool {
        if self.pause.is_some() {
            return true;
        }
        let Some(until) = self.gathers_until else { return false };
        if self.mailbox.ring_len() == 0 {
            return false;
        }
        self.gathers_until = None;
        if Instant::now() < until {
            self.pause = Some(Box::pin(tokio::time::sleep_until(until)));
        }
        self.pause.is_some()
    }

    /// Gives a watcher from the ring its turn: what is queued, or else a chunk of the history.
    fn serve(&mut self, watcher: &Arc<Watcher>) -> Option<Delivery> {
        let id = watcher.id();
        let (queued, mode) = watcher.take();
        match mode {
            Mode::Ended => None,
            Mode::Live => {
                self.handed_out |= !queued.is_empty();
                self.events(id, queued)
            }
            Mode::Behind if !queued.is_empty() => {
                self.hub.join(watcher);
                self.events(id, queued)
            }
            Mode::Behind => {
                self.owes_yield = true;
                match read_chunk(self.hub.store(), watcher, &mut self.chunk_size) {
                    Ok(read) => {
                        self.hub.join(watcher);
                        self.events(id, read)
                    }
                    Err(Compacted { revision }) => {
                        self.cancel(id);
                        Some(Delivery::Compacted { id, compacted: revision })
                    }
                }
            }
        }
    }

    fn events(&self, id: i64, events: Vec<Event>) -> Option<Delivery> {
        self.hub.tally().events.add(events.len() as u64);
        (!events.is_empty()).then_some(Delivery::Events { id, events })
    }

    /// The answer to the oldest progress request, when all watches have come that far.
    ///
    /// A request that finds a watch with a start still to come is dropped: a client takes progress
    /// for the place to resume all its watches behind, and would have that one begin too early.
    fn stream_progress(&mut self) -> Option<Delivery> {
        if self.watches.is_empty() {
            self.progress_requests.clear();
        }
        while let Some(wanted) = self.progress_requests.front() {
            // Read before the mailbox: everything up to it is there or was delivered.
            let published = self.hub.published();
            let revision = self.mailbox.delivered_up_to(published);
            if revision < *wanted {
                // Looking costs a walk over the ring, so look once a round.
                self.progress_patience = self.mailbox.ring_len();
                return None;
            }
            self.progress_requests.pop_front();
            if self.watches.values().all(|watch| watch.start_revision <= revision) {
                return Some(Delivery::Progress { id: None, revision });
            }
        }
        None
    }

    /// The next progress of a watch that was idle for an interval, and is still.
    fn watch_progress(&mut self) -> Option<Delivery> {
        if self.progress_timer.as_mut().is_some_and(|timer| timer.now_or_never().is_some()) {
            self.end_interval();
        }
        while let Some(watcher) = self.progress_due.pop_front() {
            let revision = self.hub.published();
            let state = watcher.state();
            if state.mode == Mode::Live && state.quiet && !state.has_queue() {
                return Some(Delivery::Progress { id: Some(watcher.id()), revision });
            }
        }
        None
    }

    fn end_interval(&mut self) {
        let mut wanted = false;
        let published = self.hub.published();
        for watch in self.watches.values().filter(|watch| watch.progress_notify) {
            wanted = true;
            // As in `stream_progress`.
            if watch.start_revision > published {
                continue;
            }
            if std::mem::replace(&mut watch.watcher.state().quiet, true) {
                self.progress_due.push_back(watch.watcher.clone());
            }
        }
        self.progress_timer = wanted.then(|| Box::pin(tokio::time::sleep(self.progress_interval)));
    }

    #[cfg(test)]
    pub(super) fn gather_for(&mut self, pause: Duration) {
        self.gathers_until = Some(Instant::now() + pause);
        self.pause = None;
    }

    #[cfg(test)]
    pub(super) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// Waits for the end of the pause, or else for something in the mailbox, and for the progress
    /// timer. What comes into the mailbox during a pause wakes nobody.
    async fn idle(&mut self) {
        let WatchStream { pause, mailbox, .. } = self;
        let more = async {
            match pause {
                Some(running) => {
                    running.as_mut().await;
                    *pause = None;
                }
                None => mailbox.woken().await,
            }
        };
        match &mut self.progress_timer {
            None => more.await,
            Some(timer) => tokio::select! {
                biased;
                () = more => {}
                () = timer => self.end_interval(),
            },
        }
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        for watch in self.watches.values() {
            self.hub.leave(&watch.watcher);
        }
        census::subtract(&self.hub.tally().streams, 1);
        // Watchers hold the mailbox, and the mailbox those in its ring.
        self.mailbox.clear();
    }
}
