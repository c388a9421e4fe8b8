//! Power cuts at every operation of a member's life on disk: the first start, votes, appends,
//! truncation, apply, flush, purge, and a state that takes the place of the old one.
//!
//! The real parts over a simulated disk: data directory, home of the states, log, applier. Only the
//! engine is a simple one, which loses what it has not flushed.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use openraft::EntryPayload;
use openraft::alias::CommittedLeaderIdOf;
use openraft::storage::{
    RaftLogReader, RaftLogStorage, RaftLogStorageExt, RaftSnapshotBuilder, RaftStateMachine,
};

use super::identity::DataDir;
use super::*;
use crate::clock::ManualClock;
use crate::machine::{Entry, Origin, Position, Put};
use crate::raft::applier::{Applier, Pace};
use crate::raft::log_store::{Drive, LogOptions, LogStore};
use crate::raft::types::{LogEntry, LogId, Payload, Raft, Vote};
use crate::storage::{Batch, Home, Memory, MemoryEngines, WriterOptions};
use crate::types::Timestamp;
use crate::vfs::{MemVfs, Survival};

/// The entries of the whole cluster.
const ENTRIES: u64 = 40;

fn log_id(term: u64, index: u64) -> LogId {
    LogId { leader_id: CommittedLeaderIdOf::<Raft>::new(term), index }
}

fn command(index: u64) -> Command {
    let text = |text: String| Bytes::from(text);
    let value = Some(text(format!("value {index} {}", "x".repeat(index as usize * 7 % 90))));
    let key = text(format!("k{}", index % 5));
    Command::Put(Put { key, value, lease: Some(LeaseId::NONE), prev_kv: false })
}

/// The entry that was committed at `index`, in the term of its leader.
fn entry(index: u64) -> LogEntry {
    let term = if index < 10 { 1 } else { 3 };
    let entry = Entry {
        at: Timestamp(index),
        origin: Origin::default(),
        command: command(index),
        principal: None,
    };
    let payload = EntryPayload::Normal(Payload(entry.encode()));
    LogEntry { log_id: log_id(term, index), payload }
}

/// One that an old leader appended and nobody committed.
fn abandoned(index: u64) -> LogEntry {
    LogEntry { log_id: log_id(2, index), payload: entry(index + 100).payload }
}

/// The hash of the state after each entry.
fn reference() -> Vec<u64> {
    let mut machine = Machine::load(&Memory::new()).expect("an empty state");
    let mut hashes = vec![machine.hash()];
    for index in 1..=ENTRIES {
        let entry = Entry {
            at: Timestamp(index),
            origin: Origin::default(),
            command: command(index),
            principal: None,
        };
        let term = if index < 10 { 1 } else { 3 };
        machine.apply(Position { term, index }, &entry, &mut Batch::default()).expect("applied");
        hashes.push(machine.hash());
    }
    hashes
}

/// A member's disk, opened.
struct Life {
    log: LogStore,
    applier: Applier,
    machine: SharedMachine,
    _data_dir: DataDir,
}

impl Life {
    fn start(vfs: &MemVfs) -> Result<Life, String> {
        let files: Arc<dyn crate::vfs::Vfs> = Arc::new(vfs.clone());
        let identity =
            Identity { cluster_id: ClusterId(1), member_id: MemberId(7), name: "a".to_owned() };
        let text = |error: io::Error| error.to_string();
        let path = Path::new("/var/holdfast");
        let data_dir = DataDir::open(files.clone(), path, &identity);
        let mut data_dir = data_dir.map_err(|error| error.to_string())?;
        let engines = Arc::new(MemoryEngines(files.clone()));
        let home = Arc::new(Home::new(data_dir.state(), files.clone(), engines));
        let engine = home.open().map_err(text)?;
        let (machine, state) = Applier::load(engine.as_ref()).map_err(|error| error.to_string())?;
        let applied = state.applied.map_or(0, |applied| applied.index);
        let options = WriterOptions { flush_bytes: 1_500, ..WriterOptions::default() };
        let writer = Arc::new(StateWriter::start_inline(engine, applied, options));
        let options =
            LogOptions { segment_bytes: 1_024, drive: Drive::Inline, ..LogOptions::default() };
        let log = LogStore::open(files, data_dir.log(), options).map_err(text)?;
        data_dir.log_begun().map_err(|error| error.to_string())?;
        let machine = Arc::new(Mutex::new(machine));
        let pace = Pace {
            clock: Arc::new(ManualClock::default()),
            slow_after: Duration::from_secs(1),
            slow: Arc::default(),
        };
        let observer = Box::new(|_: &Machine, _: crate::raft::applier::Applied<'_>| {});
        let applier = Applier::new(machine.clone(), state, writer, home, observer, pace);
        Ok(Life { log, applier, machine, _data_dir: data_dir })
    }

    async fn append(&mut self, entries: Vec<LogEntry>) -> io::Result<()> {
        self.log.clone().blocking_append(entries).await.map_err(io::Error::other)
    }

    async fn apply(&mut self, indices: std::ops::RangeInclusive<u64>) -> io::Result<()> {
        self.log.save_committed(Some(entry(*indices.end()).log_id)).await?;
        let entries = self.log.try_get_log_entries(indices).await?;
        let entries = entries.into_iter().map(|entry| Ok((entry, None)));
        self.applier.apply(stream::iter(entries.collect::<Vec<_>>())).await
    }

    fn hash(&self) -> u64 {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner).hash()
    }
}

/// What the member has promised.
#[derive(Debug, Clone, Copy, Default)]
struct Promised {
    vote: u64,
    /// Entries up to here are stored.
    stored: u64,
}

/// The state of another member, at entry 25.
async fn donor() -> Life {
    let mut donor = Life::start(&MemVfs::default()).expect("an undisturbed disk");
    donor.append((1..=25).map(entry).collect()).await.expect("appended");
    donor.apply(1..=25).await.expect("applied");
    donor
}

async fn live(vfs: &MemVfs, promised: &mut Promised) -> Result<(), String> {
    let mut life = Life::start(vfs)?;
    let text = |error: io::Error| error.to_string();
    life.log.save_vote(&Vote::new(1, 7)).await.map_err(text)?;
    promised.vote = 1;
    for index in 1..=9 {
        life.append(vec![entry(index)]).await.map_err(text)?;
        promised.stored = index;
    }
    life.apply(1..=6).await.map_err(text)?;
    // An old leader's entries give way to those of the new one.
    life.append((10..=12).map(abandoned).collect()).await.map_err(text)?;
    life.log.save_vote(&Vote::new(3, 2)).await.map_err(text)?;
    promised.vote = 3;
    life.log.truncate_after(Some(entry(9).log_id)).await.map_err(text)?;
    life.append((10..=14).map(entry).collect()).await.map_err(text)?;
    promised.stored = 14;
    life.apply(7..=14).await.map_err(text)?;
    let mut builder = life.applier.get_snapshot_builder().await;
    let built = builder.build_snapshot().await.map_err(text)?;
    drop(built);
    life.log.purge(entry(12).log_id).await.map_err(text)?;
    // Too far behind for the log of the others: the whole state takes the place of the old one.
    let mut donor = donor().await;
    let state = donor.applier.get_current_snapshot().await.map_err(text)?.expect("a state");
    life.applier.install_snapshot(&state.meta, state.snapshot).await.map_err(text)?;
    promised.stored = 25;
    life.log.purge(entry(25).log_id).await.map_err(text)?;
    for index in 26..=ENTRIES {
        life.append(vec![entry(index)]).await.map_err(text)?;
        promised.stored = index;
    }
    life.apply(26..=ENTRIES).await.map_err(text)
}

/// What a start finds must hold all that was promised, and be a state the member was in.
async fn check(vfs: &MemVfs, promised: Promised, hashes: &[u64]) -> Result<(), String> {
    let mut life = Life::start(vfs)?;
    let text = |error: io::Error| error.to_string();
    let vote = life.log.read_vote().await.map_err(text)?.map_or(0, |vote| vote.leader_id.term);
    if vote < promised.vote {
        return Err(format!("vote {vote}, {} was confirmed", promised.vote));
    }
    let (applied, _) = life.applier.applied_state().await.map_err(text)?;
    let applied = applied.map_or(0, |applied| applied.index);
    if life.hash() != hashes[applied as usize] {
        return Err(format!("the state is not that of entry {applied}"));
    }
    let log = life.log.get_log_state().await.map_err(text)?;
    let purged = log.last_purged_log_id.map_or(0, |purged| purged.index);
    if purged > applied {
        return Err(format!("the log begins after {purged}, the state ends at {applied}"));
    }
    let wanted = promised.stored.max(applied);
    let found = life.log.try_get_log_entries(applied + 1..wanted + 1).await.map_err(text)?;
    if found != (applied + 1..=wanted).map(entry).collect::<Vec<_>>() {
        let found: Vec<u64> = found.iter().map(|entry| entry.log_id.index).collect();
        return Err(format!("state at {applied}, log {found:?}, {wanted} was stored"));
    }
    if wanted > applied {
        life.apply(applied + 1..=wanted).await.map_err(text)?;
    }
    if life.hash() != hashes[wanted as usize] {
        return Err(format!("the state after replaying is not that of entry {wanted}"));
    }
    Ok(())
}

#[tokio::test]
async fn whatever_was_promised_survives_a_power_cut_at_any_operation() {
    let hashes = reference();
    let whole = MemVfs::default();
    let mut promised = Promised::default();
    live(&whole, &mut promised).await.expect("nothing is in the way");
    assert_eq!((promised.vote, promised.stored), (3, ENTRIES));
    let operations = whole.operations();
    assert!(operations > 150, "{operations}");
    for cut in 0..operations {
        let survivals = [Survival::Nothing, Survival::Everything, Survival::Some(cut)];
        for survival in survivals {
            let vfs = MemVfs::default();
            vfs.cut_power_after(cut);
            let mut promised = Promised::default();
            if live(&vfs, &mut promised).await.is_ok() {
                assert_eq!(promised.stored, ENTRIES, "it was closing when the power went");
            }
            let mut left = vfs.after_power_cut(survival);
            if cut % 3 == 0 {
                // And once more while it recovers.
                left.cut_power_after(cut / 3 % 12);
                drop(Life::start(&left));
                left = left.after_power_cut(survival);
            }
            if let Err(error) = check(&left, promised, &hashes).await {
                panic!("cut at {cut}, {survival:?} survives, {promised:?}: {error}");
            }
        }
    }
}
