//! openraft's own suite for storage, on our log and our state machine, on real files.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use holdfast::clock::SystemClock;
use holdfast::raft::applier::{Applier, Pace};
use holdfast::raft::log_store::{LogOptions, LogStore};
use holdfast::raft::types::Raft;
use holdfast::storage::{Home, StateWriter, WriterOptions};
use holdfast::vfs::OsVfs;
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;

struct Builder;

impl StoreBuilder<Raft, LogStore, Applier, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, Applier), StorageError<Raft>> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let options = LogOptions { segment_bytes: 1 << 20, ..LogOptions::default() };
        let log = LogStore::open(Arc::new(OsVfs), directory.path().join("log"), options)
            .expect("an empty log opens");
        let home = Home::on_disk(directory.path().join("state"), 1 << 20);
        let engine = home.open().expect("an empty state opens");
        let (machine, state) = Applier::load(engine.as_ref()).expect("an empty state loads");
        let writer =
            StateWriter::start(engine, 0, WriterOptions::default()).expect("a thread starts");
        let observer = Box::new(|_: &_, _: holdfast::raft::applier::Applied<'_>| {});
        let applier = Applier::new(
            Arc::new(Mutex::new(machine)),
            state,
            Arc::new(writer),
            Arc::new(home),
            observer,
            Pace {
                clock: Arc::new(SystemClock::new()),
                slow_after: Duration::from_secs(1),
                slow: Arc::default(),
            },
        );
        Ok((directory, log, applier))
    }
}

#[tokio::test]
async fn openrafts_storage_suite_passes() {
    Suite::<Raft, LogStore, Applier, Builder, TempDir>::test_all(Builder)
        .await
        .expect("the suite passes");
}
