//! A log at work: reads, bounds, faults, and the writer's thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use openraft::storage::IOFlushed;
use openraft::type_config::TypeConfigExt;

use super::*;
use crate::vfs::{Operation, OsVfs};

fn open_threaded(vfs: impl Vfs + 'static, dir: &Path, options: LogOptions) -> LogStore {
    LogStore::open(Arc::new(vfs), dir.to_owned(), options).unwrap()
}

/// What tells when an append is durable.
type Done = tokio::sync::oneshot::Receiver<io::Result<()>>;

async fn append_later(log: &LogStore, entries: Vec<LogEntry>) -> io::Result<Done> {
    let (tx, rx) = Raft::oneshot();
    log.clone().append(entries, IOFlushed::signal(tx)).await?;
    Ok(rx)
}

#[tokio::test]
async fn entries_that_left_the_cache_are_read_from_their_files() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open_threaded(OsVfs, dir.path(), small(Drive::Thread));
    for index in 0..100 {
        append_later(&log, vec![entry(1, index)]).await.unwrap().await.unwrap().unwrap();
    }
    log.truncate_after(Some(log_id(1, 89))).await.unwrap();
    append_later(&log, entries(2, 90..=94)).await.unwrap().await.unwrap().unwrap();
    let expected = [entries(1, 0..=89), entries(2, 90..=94)].concat();
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), expected);
    assert_eq!(log.try_get_log_entries(88..=91).await.unwrap(), expected[88..=91]);
    assert_eq!(log.try_get_log_entries(95..200).await.unwrap(), []);
    let stream: Vec<_> = log.entries_stream(3..900).await.try_collect().await.unwrap();
    assert_eq!(stream, expected[3..]);
}

#[tokio::test]
async fn a_limited_read_returns_about_a_mebibyte_but_at_least_one_entry() {
    for cache_bytes in [0, 64 << 20] {
        let vfs = MemVfs::default();
        let options = LogOptions { cache_bytes, segment_bytes: 8 << 20, ..small(Drive::Thread) };
        let mut log = open_threaded(vfs, Path::new(DIR), options);
        let big = 600 << 10;
        let all: Vec<_> = (0..10)
            .map(|index| entry_of(1, index, if index == 9 { 3 << 20 } else { big }))
            .collect();
        append_later(&log, all.clone()).await.unwrap().await.unwrap().unwrap();
        assert_eq!(log.limited_get_log_entries(0, 10).await.unwrap(), all[..1]);
        assert_eq!(log.limited_get_log_entries(9, 10).await.unwrap(), all[9..]);
        let stream: Vec<_> = log.entries_stream(0..10).await.try_collect().await.unwrap();
        assert_eq!(stream, all);
        assert_eq!(log.try_get_log_entries(0..10).await.unwrap(), all);
    }
}

#[tokio::test]
async fn an_entry_is_readable_when_append_returns_and_later_appends_wait_for_room() {
    let (release, held) = mpsc::channel::<()>();
    let (held, holding) = (Mutex::new(held), Arc::new(AtomicBool::new(false)));
    let hold = holding.clone();
    // Holds the writer up after each sync, until the test lets it go on.
    let observer = move |_| {
        if hold.load(Ordering::Relaxed) {
            let _ = held.lock().unwrap().recv();
        }
    };
    let options = LogOptions {
        queue_bytes: 4096,
        sync_observer: Some(Arc::new(observer)),
        ..LogOptions::default()
    };
    let log = open_threaded(MemVfs::default(), Path::new(DIR), options);
    holding.store(true, Ordering::Relaxed);
    let first = append_later(&log, vec![entry_of(1, 0, 3000)]).await.unwrap();
    assert_eq!(ids(&log.clone().try_get_log_entries(..).await.unwrap()), [(1, 0)]);

    let mut second = Box::pin(append_later(&log, vec![entry_of(1, 1, 9000)]));
    let early = tokio::time::timeout(Duration::from_millis(50), &mut second).await;
    assert!(early.is_err(), "the queue is full");
    drop(release);
    first.await.unwrap().unwrap();
    second.await.unwrap().await.unwrap().unwrap();
    assert_eq!(ids(&log.clone().try_get_log_entries(..).await.unwrap()), [(1, 0), (1, 1)]);
}

#[tokio::test]
async fn completions_come_in_the_order_of_the_appends() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open_threaded(OsVfs, dir.path(), small(Drive::Thread));
    let mut flushed = Vec::new();
    for index in 0..500 {
        flushed.push(append_later(&log, vec![entry(1, index)]).await.unwrap());
    }
    // Having its answer means that everything before is durable too.
    log.save_vote(&Vote::new(1, 1)).await.unwrap();
    for mut one in flushed {
        one.try_recv().expect("completed before the vote").unwrap();
    }
    log.close().unwrap();
    let mut again = open_threaded(OsVfs, dir.path(), small(Drive::Thread));
    assert_eq!(again.try_get_log_entries(..).await.unwrap(), entries(1, 0..=499));
}

#[tokio::test]
async fn the_first_error_stops_the_log_for_good() {
    let faults =
        [Operation::Write, Operation::Sync, Operation::Resize, Operation::Name, Operation::SyncDir];
    for (operation, drive) in
        faults.into_iter().flat_map(|fault| [(fault, Drive::Thread), (fault, Drive::Inline)])
    {
        let vfs = MemVfs::default();
        let mut log = open_threaded(vfs.clone(), Path::new(DIR), small(drive));
        let mut fault = log.watch_fault();
        append_later(&log, vec![entry(1, 0)]).await.unwrap().await.unwrap().unwrap();
        assert!(fault.borrow().is_none());

        vfs.fail(operation, 0, io::ErrorKind::Other);
        // Enough for a new segment, which has operations of every kind.
        let doomed = append_later(&log, entries(1, 1..=40)).await.unwrap();
        let message = doomed.await.unwrap().unwrap_err().to_string();
        assert!(message.contains("simulated fault"), "{operation:?}: {message}");
        let seen = fault.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert!(seen.to_string().contains("simulated fault"));

        // The disk is well again. The log is not.
        assert!(append_later(&log, vec![entry(1, 41)]).await.is_err());
        assert!(log.save_vote(&Vote::new(1, 1)).await.is_err());
        assert!(log.save_committed(None).await.is_err());
        assert!(log.truncate_after(None).await.is_err());
        assert!(log.purge(log_id(1, 0)).await.is_err());
        assert!(log.read_vote().await.is_err());
        assert!(log.get_log_state().await.is_err());
        assert!(log.try_get_log_entries(0..1).await.is_err());
        assert!(log.entries_stream(0..1).await.next().await.unwrap().is_err());
        assert!(log.close().is_err());

        // What was acknowledged before is there after a restart.
        let again = vfs.after_power_cut(crate::vfs::Survival::Nothing);
        let found = ask(&open(&again).unwrap()).await.unwrap();
        assert_eq!(found.entries[0], entry(1, 0), "{operation:?}");
    }
}

#[tokio::test]
async fn a_vote_that_could_not_be_synced_is_not_confirmed() {
    let vfs = MemVfs::default();
    let mut log = open_threaded(vfs.clone(), Path::new(DIR), small(Drive::Thread));
    vfs.fail(Operation::Sync, 0, io::ErrorKind::Other);
    assert!(log.save_vote(&Vote::new(1, 1)).await.is_err());
    assert!(log.watch_fault().borrow().is_some());
}

#[test]
fn a_full_disk_stops_the_log_and_loses_nothing_that_was_acknowledged() {
    let vfs = MemVfs::default();
    let log = open(&vfs).unwrap();
    vfs.set_capacity(4 * 1024);
    let mut acknowledged = 0;
    while try_append(&log, vec![entry(1, acknowledged)]).is_ok() {
        acknowledged += 1;
    }
    assert!(acknowledged > 10);
    let fault = log.watch_fault().borrow().clone().unwrap();
    assert_eq!(fault.kind(), io::ErrorKind::StorageFull);
    vfs.set_capacity(1 << 20);
    drop(log);
    let left = vfs.after_power_cut(crate::vfs::Survival::Nothing);
    let found = wait(ask(&open(&left).unwrap())).unwrap();
    assert_eq!(found.entries, entries(1, 0..=acknowledged - 1));
}

#[test]
fn damage_under_a_running_log_stops_it_when_it_is_read() {
    let vfs = MemVfs::default();
    let log = open(&vfs).unwrap();
    append(&log, entries(1, 0..=3));
    let path = &segment_paths(&vfs)[0];
    let found = records(&vfs, path);
    let is_entry = |record: &Record| matches!(record, Record::Entry(_));
    let (last, _) = found.iter().rfind(|(_, (_, record))| is_entry(record)).unwrap();
    vfs.tamper(path, |bytes| bytes[last + 30] ^= 1);
    let error = wait(ask(&log)).unwrap_err();
    assert!(error.to_string().contains("entry 3"), "{error}");
    assert!(log.watch_fault().borrow().is_some());
}

#[tokio::test]
async fn how_long_the_writer_is_at_a_batch_can_be_read() {
    let (release, held) = mpsc::channel::<()>();
    let held = Mutex::new(held);
    let hold = Arc::new(AtomicBool::new(false));
    let holding = hold.clone();
    let observer = move |_| {
        if holding.load(Ordering::Relaxed) {
            let _ = held.lock().unwrap().recv();
        }
    };
    let options = LogOptions { sync_observer: Some(Arc::new(observer)), ..small(Drive::Thread) };
    let log = open_threaded(MemVfs::default(), Path::new(DIR), options);
    let under_way = log.under_way();
    hold.store(true, Ordering::Relaxed);
    let done = append_later(&log, vec![entry(1, 0)]).await.unwrap();
    let pause = Duration::from_millis(2);
    while under_way.time().is_none_or(|time| time < 5 * pause) {
        tokio::time::sleep(pause).await;
    }
    hold.store(false, Ordering::Relaxed);
    drop(release);
    done.await.unwrap().unwrap();
    while under_way.time().is_some() {
        tokio::time::sleep(pause).await;
    }
    log.close().unwrap();
}

#[tokio::test]
async fn a_closed_log_refuses_and_closes_again_in_peace() {
    let mut log = open_threaded(MemVfs::default(), Path::new(DIR), LogOptions::default());
    append_later(&log, vec![entry(1, 0)]).await.unwrap().await.unwrap().unwrap();
    log.close().unwrap();
    log.close().unwrap();
    assert!(append_later(&log, vec![entry(1, 1)]).await.is_err());
    assert!(log.save_vote(&Vote::new(1, 1)).await.is_err());
}

/// Prints what the disk under the temporary directory allows. Run it in a release build.
#[tokio::test(flavor = "current_thread")]
#[ignore = "a measurement, not a check"]
#[allow(clippy::disallowed_methods, reason = "measures real time")]
async fn durable_entries_per_second() {
    let dir = tempfile::tempdir().unwrap();
    let syncs = Arc::new(AtomicU64::new(0));
    let counter = syncs.clone();
    let options = LogOptions {
        sync_observer: Some(Arc::new(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
        })),
        ..LogOptions::default()
    };
    let log = open_threaded(OsVfs, dir.path(), options);
    let mut next = 0;
    for in_flight in [1, 64] {
        let mut waiting = std::collections::VecDeque::new();
        let mut latencies = Vec::new();
        let count = 300 * in_flight * if in_flight == 1 { 10 } else { 5 };
        let before = syncs.load(Ordering::Relaxed);
        let started = Instant::now();
        for _ in 0..count {
            if waiting.len() == in_flight {
                let (sent, done): (Instant, Done) = waiting.pop_front().unwrap();
                done.await.unwrap().unwrap();
                latencies.push(sent.elapsed());
            }
            let done = append_later(&log, vec![entry_of(1, next, 256)]).await.unwrap();
            waiting.push_back((Instant::now(), done));
            next += 1;
        }
        for (_, done) in waiting {
            done.await.unwrap().unwrap();
        }
        let elapsed = started.elapsed();
        latencies.sort();
        println!(
            "{in_flight} in flight: {:.0} entries/s, median {:?}, p99 {:?}, {} syncs",
            count as f64 / elapsed.as_secs_f64(),
            latencies[latencies.len() / 2],
            latencies[latencies.len() * 99 / 100],
            syncs.load(Ordering::Relaxed) - before,
        );
    }
}
