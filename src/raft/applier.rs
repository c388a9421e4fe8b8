//! openraft's state machine: applies committed entries to ours, in order.
//!
//! Applying answers from memory. What changed goes to the state writer in batches that carry the
//! place in the log, so the engine always holds a state this member was once in. A "snapshot" in
//! openraft's sense is built by flushing that engine: from then on the log up to there may go.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::EntryPayload;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};

use super::snapshot::{Outgoing, RaftState, Sending, SnapshotData, blocking, stage};
use super::types::{LogEntry, LogId, Membership, Raft, SnapshotMeta, SnapshotOf};
use crate::clock::Clock;
use crate::machine::{Entry, Fault, Machine, Outcome, Position};
use crate::metrics::Counter;
use crate::mutant;
use crate::storage::{Batch, Engine, Home, StateWriter};
use crate::types::MemberId;

/// Where [`RaftState`] stands in the engine, apart from the machine's own keys.
pub(super) const RAFT_STATE_KEY: &[u8] = b"a";

/// Entries applied between two turns of the other tasks.
const ENTRIES_A_TURN: usize = 256;

/// What the member learns of each applied entry, in order.
pub enum Applied<'a> {
    Entry {
        position: Position,
        entry: &'a Entry,
        outcome: Outcome,
    },
    /// The first entry of a term, or a change of membership.
    Other {
        position: Position,
        membership: Option<Membership>,
    },
    /// The state was replaced by a snapshot; nothing is known of the entries in between.
    Installed {
        position: Position,
        membership: Membership,
    },
}

/// Called in the order of the log, on the task that applies: it must neither block nor await. The
/// machine is as the entry left it.
pub type Observer = Box<dyn FnMut(&Machine, Applied<'_>) + Send + Sync>;

/// The machine, shared between the applier and those who read its small tables.
pub type SharedMachine = Arc<Mutex<Machine>>;

/// When applying one entry counts as slow. No outcome depends on it.
pub struct Pace {
    pub clock: Arc<dyn Clock>,
    pub slow_after: Duration,
    /// Counts the slow ones.
    pub slow: Arc<Counter>,
}

pub struct Applier {
    machine: SharedMachine,
    writer: Arc<StateWriter>,
    home: Arc<Home>,
    state: RaftState,
    observer: Observer,
    pace: Pace,
    sending: Arc<Mutex<Sending>>,
}

impl Applier {
    /// Loads the state that `home` holds.
    ///
    /// # Errors
    ///
    /// When it cannot be read: the member must not start.
    pub fn load(engine: &dyn Engine) -> Result<(Machine, RaftState), Fault> {
        let machine = Machine::load(engine)?;
        let state = match engine.get(RAFT_STATE_KEY)? {
            None => RaftState::default(),
            Some(bytes) => decode_state(&bytes)?,
        };
        Ok((machine, state))
    }

    pub fn new(
        machine: SharedMachine,
        state: RaftState,
        writer: Arc<StateWriter>,
        home: Arc<Home>,
        observer: Observer,
        pace: Pace,
    ) -> Applier {
        Applier { machine, writer, home, state, observer, pace, sending: Arc::default() }
    }

    /// [`Applier::apply_one`], with a warning when it takes long.
    fn apply_timed(&mut self, entry: &LogEntry, batch: &mut Batch) -> Result<(), Fault> {
        let begun = self.pace.clock.monotonic();
        self.apply_one(entry, batch)?;
        let took = self.pace.clock.monotonic().saturating_sub(begun);
        if took >= self.pace.slow_after {
            self.pace.slow.increment();
            let index = entry.log_id.index;
            tracing::warn!(index, took_ms = took.as_millis() as u64, "apply took too long");
        }
        Ok(())
    }

    /// Applies one entry; what it changes goes into `batch`.
    fn apply_one(&mut self, entry: &LogEntry, batch: &mut Batch) -> Result<(), Fault> {
        let position = position(entry.log_id);
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        match &entry.payload {
            EntryPayload::Normal(payload) => {
                let entry = Entry::decode(position.index, &payload.0)?;
                let outcome = machine.apply(position, &entry, batch)?;
                (self.observer)(&machine, Applied::Entry { position, entry: &entry, outcome });
            }
            EntryPayload::Blank => {
                (self.observer)(&machine, Applied::Other { position, membership: None });
            }
            EntryPayload::Membership(membership) => {
                let membership = Membership::new(Some(entry.log_id), membership.clone());
                let before = std::mem::replace(&mut self.state.membership, membership.clone());
                let stays = |id: &u64| membership.membership().get_node(id).is_some();
                let removed = before.nodes().map(|(id, _)| *id).filter(|id| !stays(id));
                machine.retire(removed.map(MemberId), batch);
                let membership = Some(membership);
                (self.observer)(&machine, Applied::Other { position, membership });
            }
        }
        self.state.applied = Some(entry.log_id);
        Ok(())
    }

    /// Hands what was applied so far to the state writer, with the place in the log.
    async fn persist(&self, mut batch: Batch) -> io::Result<()> {
        let Some(applied) = self.state.applied else { return Ok(()) };
        if mutant::is("applied-index-apart") {
            self.writer.send(applied.index, std::mem::take(&mut batch)).await?;
        }
        batch.put(RAFT_STATE_KEY, encode_state(&self.state)?);
        self.writer.send(applied.index, batch).await
    }

    /// Removes up to about `budget` compacted records. True while there are more.
    pub async fn scrub(&mut self, budget: usize) -> io::Result<bool> {
        let mut batch = Batch::default();
        let more = {
            let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
            machine.scrub(budget, &mut batch)
        };
        self.persist(batch).await?;
        Ok(more)
    }

    fn meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: self.state.applied,
            last_membership: self.state.membership.clone(),
        }
    }

    fn image(&self) -> SnapshotData {
        let machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        SnapshotData::Image(Box::new(machine.image()), Outgoing::begin(&self.sending))
    }
}

fn position(log_id: LogId) -> Position {
    Position { term: log_id.committed_leader_id().term, index: log_id.index }
}

pub(super) fn encode_state(state: &RaftState) -> io::Result<Vec<u8>> {
    bincode::serde::encode_to_vec(state, bincode::config::standard()).map_err(io::Error::other)
}

fn decode_state(bytes: &[u8]) -> Result<RaftState, Fault> {
    // A membership lists URLs: far below this limit.
    let config = bincode::config::standard().with_limit::<{ 1 << 20 }>();
    match bincode::serde::decode_from_slice(bytes, config) {
        Ok((state, _)) => Ok(state),
        Err(error) => {
            Err(Fault::Corrupt { what: "raft state".to_owned(), reason: error.to_string() })
        }
    }
}

impl RaftStateMachine<Raft> for Applier {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, Membership), io::Error> {
        Ok((self.state.applied, self.state.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<Raft>, io::Error>> + Unpin + openraft::OptionalSend,
    {
        let mut batch = Batch::default();
        let mut since_turn = 0;
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            self.apply_timed(&entry, &mut batch).map_err(io::Error::other)?;
            if let Some(responder) = responder {
                responder.send(());
            }
            since_turn += 1;
            if since_turn == ENTRIES_A_TURN {
                since_turn = 0;
                self.persist(std::mem::take(&mut batch)).await?;
                tokio::task::yield_now().await;
            }
        }
        if since_turn > 0 {
            self.persist(batch).await?;
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Builder> {
        let needs_log = self.sending.lock().unwrap_or_else(PoisonError::into_inner).needs_log();
        if needs_log && !force {
            return None;
        }
        Some(self.get_snapshot_builder().await)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder { meta: self.meta(), writer: self.writer.clone() }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let state =
            RaftState { applied: meta.last_log_id, membership: meta.last_membership.clone() };
        let home = self.home.clone();
        let stored = encode_state(&state)?;
        let simulated = home.is_simulated();
        let (engine, machine) = blocking(simulated, move || {
            let mut staged = match snapshot {
                SnapshotData::Staged(staged) => {
                    staged.into_inner().unwrap_or_else(PoisonError::into_inner)
                }
                SnapshotData::Image(image, _) => stage(*image, &home)?,
                SnapshotData::Durable => {
                    return Err(io::Error::other("a state of its own is not installed"));
                }
            };
            let mut batch = Batch::default();
            batch.put(RAFT_STATE_KEY, stored);
            staged.engine().apply(batch)?;
            if !mutant::is("snapshot-unsynced") {
                staged.engine().flush()?;
            }
            let machine = Machine::load(staged.engine()).map_err(io::Error::other)?;
            Ok((home.activate(staged)?, machine))
        })
        .await
        .map_err(io::Error::other)?;
        let index = state.applied.map_or(0, |applied| applied.index);
        let old = self.writer.replace(engine, index).await?;
        let home = self.home.clone();
        blocking(simulated, move || {
            drop(old);
            home.sweep()
        })
        .await
        .map_err(io::Error::other)?;

        self.state = state;
        let mut shared = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        shared.replace(machine);
        if let Some(applied) = self.state.applied {
            let membership = self.state.membership.clone();
            let position = position(applied);
            (self.observer)(&shared, Applied::Installed { position, membership });
        }
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<SnapshotOf>, io::Error> {
        if self.state.applied.is_none() {
            return Ok(None);
        }
        Ok(Some(SnapshotOf { meta: self.meta(), snapshot: self.image() }))
    }
}

/// Makes a state durable that the machine was in when the builder was made.
pub struct Builder {
    meta: SnapshotMeta,
    writer: Arc<StateWriter>,
}

impl RaftSnapshotBuilder<Raft> for Builder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<SnapshotOf, io::Error> {
        let wanted = self.meta.last_log_id.map_or(0, |id| id.index);
        if mutant::is("purge-before-flush") {
            return Ok(SnapshotOf { meta: self.meta.clone(), snapshot: SnapshotData::Durable });
        }
        let durable = self.writer.flush().await?;
        if durable < wanted {
            return Err(io::Error::other(format!(
                "the state is durable up to entry {durable}, not {wanted}"
            )));
        }
        Ok(SnapshotOf { meta: self.meta.clone(), snapshot: SnapshotData::Durable })
    }
}
