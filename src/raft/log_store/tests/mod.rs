//! The log as a whole, against simulated and real files.

mod crash;
mod damage;
mod running;

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use openraft::EntryPayload;
use openraft::alias::CommittedLeaderIdOf;
use openraft::storage::{RaftLogReader, RaftLogStorage, RaftLogStorageExt};

use super::record::{Frame, Place, Record};
use super::segment::{HEADER_BYTES, SegmentId};
use super::{Drive, LogOptions, LogStore};
use crate::raft::types::{LogEntry, LogId, Payload, Raft, Vote};
use crate::vfs::{MemVfs, Vfs};

const DIR: &str = "/data/log";

fn log_id(term: u64, index: u64) -> LogId {
    LogId { leader_id: CommittedLeaderIdOf::<Raft>::new(term), index }
}

/// An entry that no other can be mistaken for, of `length` bytes.
fn entry_of(term: u64, index: u64, length: usize) -> LogEntry {
    let text = format!("<{term}.{index}>");
    let bytes: Vec<u8> = text.bytes().cycle().take(length).collect();
    LogEntry {
        log_id: log_id(term, index),
        payload: EntryPayload::Normal(Payload(Bytes::from(bytes))),
    }
}

fn entry(term: u64, index: u64) -> LogEntry {
    entry_of(term, index, 40)
}

fn entries(term: u64, indices: std::ops::RangeInclusive<u64>) -> Vec<LogEntry> {
    indices.map(|index| entry(term, index)).collect()
}

/// Small enough that a few entries fill a segment, with a cache that holds none of them.
fn small(drive: Drive) -> LogOptions {
    LogOptions { segment_bytes: 1024, cache_bytes: 0, drive, ..LogOptions::default() }
}

fn open(vfs: &MemVfs) -> io::Result<LogStore> {
    LogStore::open(Arc::new(vfs.clone()), PathBuf::from(DIR), small(Drive::Inline))
}

/// An inline log never waits for another thread, so no runtime is needed.
fn wait<T>(future: impl Future<Output = T>) -> T {
    futures::executor::block_on(future)
}

fn append(log: &LogStore, entries: Vec<LogEntry>) {
    try_append(log, entries).unwrap();
}

fn try_append(log: &LogStore, entries: Vec<LogEntry>) -> io::Result<()> {
    wait(log.clone().blocking_append(entries)).map_err(io::Error::other)
}

/// What a log says when it is asked.
#[derive(Debug, Clone, Default, PartialEq)]
struct Answers {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    last: Option<LogId>,
    entries: Vec<LogEntry>,
}

async fn ask(log: &LogStore) -> io::Result<Answers> {
    let mut log = log.clone();
    let state = log.get_log_state().await?;
    Ok(Answers {
        vote: log.read_vote().await?,
        committed: log.read_committed().await?,
        purged: state.last_purged_log_id,
        last: state.last_log_id,
        entries: log.try_get_log_entries(..).await?,
    })
}

fn ids(entries: &[LogEntry]) -> Vec<(u64, u64)> {
    entries.iter().map(|entry| (entry.log_id.leader_id.term, entry.log_id.index)).collect()
}

fn segment_paths(vfs: &MemVfs) -> Vec<PathBuf> {
    vfs.list(Path::new(DIR)).unwrap().iter().map(|name| Path::new(DIR).join(name)).collect()
}

/// The records of a segment, by their offset, with their length.
fn records(vfs: &MemVfs, path: &Path) -> BTreeMap<usize, (usize, Record)> {
    let bytes = vfs.read(path).unwrap();
    let id = SegmentId::from_file_name(path.file_name().unwrap().to_str().unwrap()).unwrap();
    let mut records = BTreeMap::new();
    let mut at = HEADER_BYTES;
    let place = |at: usize| Place { segment: id.sequence, offset: at as u32 };
    while let Some(frame) = Frame::parse(&bytes[at..], place(at)) {
        records.insert(at, (frame.len(), frame.decode().unwrap()));
        at += frame.len();
    }
    records
}
