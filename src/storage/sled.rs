//! The engine on disk: one sled tree.
//!
//! What sled's present alpha asks of its user, learnt from its source:
//!
//! - Only a batch on one tree is atomic, so there is one tree.
//! - A leaf that `apply_batch` empties stays for ever; `remove` merges it into its neighbour, but may
//!   deadlock beside a concurrent batch. So garbage goes through `remove`, on the thread that applies.
//! - A leaf that was once written is never evicted from the cache, whatever its capacity, and of what
//!   a long scan has read half may stay. So the database is reopened after enough of either.
//! - A flush that failed leaves the next one, and with it every drop of a handle, waiting for ever.
//!   So nothing is called after an error or a panic, and the handle is leaked.
//! - A handle that was dropped may hold the directory's lock a moment longer: sled's compactor thread
//!   does, and so does a child between fork and exec, such as the `sync` that another opening runs.
//!   So opening is patient.
//! - Damage in its metadata log looks to it like the end of that log, and it goes on with what was
//!   before, into pages that have been written over. So that log is looked at first, see
//!   [`flushed`].
//! - Without its own flusher, sled flushes whenever an iterator is dropped. So it gets a flusher
//!   with an interval that does not come to pass.

use std::cell::Cell;
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::{Batch, Change, Engine, flushed};
use crate::vfs::{OsVfs, REPLACE_MEMBER, remedy};

/// Sled's leaves hold this many pairs; fixed when a database is created. A leaf is written and kept in
/// memory as a whole, so with blocks of records in it (`blocks.rs`) it must not hold many.
const LEAF_FANOUT: usize = 32;

type Db = ::sled::Db<LEAF_FANOUT>;

/// A year: sled's own flusher has nothing to do before shutdown.
const FLUSHER_INTERVAL_MS: usize = 365 * 24 * 60 * 60 * 1000;

/// How often and how far apart opening tries again while the directory is locked.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// How often files are looked at before they count as damaged.
const DAMAGE_TRIES: u32 = 5;

const ZSTD_LEVEL: i32 = 1;

/// The database is reopened after this many times the cache's size has been written or scanned.
const REOPEN_AFTER_CACHES: u64 = 4;

/// A scan is read ahead in pieces of so many pairs, and by so many pieces: a few leaves.
const PIECE_PAIRS: usize = 32;
const PIECES_AHEAD: usize = 4;

/// [`Engine`] over a directory, which it locks.
pub struct Sled {
    /// `None` only after reopening has failed.
    db: Option<Db>,
    path: PathBuf,
    cache_bytes: usize,
    /// Bytes written and scanned since the last opening: about what is in the cache.
    cached_since_open: Cell<u64>,
    /// Set while sled works, so an error or a panic in there leaves it set: then the handle is
    /// neither used nor dropped any more.
    poisoned: Cell<bool>,
    size_bytes: Cell<u64>,
}

impl Sled {
    /// What `cache_bytes` of [`Sled::open`] is unless configured.
    pub const DEFAULT_CACHE_BYTES: usize = 8 << 20;

    /// Opens or creates the database in directory `path`. After a crash it holds every batch up to
    /// some point at or after the last successful flush, and none beyond.
    ///
    /// Opening waits for the whole machine's dirty pages, because sled calls `sync`.
    ///
    /// # Errors
    ///
    /// Besides those of the file system: `InvalidData` if its files are damaged, and
    /// `WouldBlock` if another handle has the directory open and keeps it for a second.
    pub fn open(path: &Path, cache_bytes: usize) -> io::Result<Sled> {
        let db = open_db(path, cache_bytes)?;
        let sled = Sled {
            db: Some(db),
            path: path.to_owned(),
            cache_bytes,
            cached_since_open: Cell::new(0),
            poisoned: Cell::new(false),
            size_bytes: Cell::new(0),
        };
        sled.size_bytes();
        Ok(sled)
    }

    /// Runs `work` unless something failed before.
    fn guarded<T>(&self, work: impl FnOnce(&Db) -> io::Result<T>) -> io::Result<T> {
        let usable = !self.poisoned.replace(true);
        let Some(db) = self.db.as_ref().filter(|_| usable) else {
            return Err(io::Error::other("the database failed earlier and has to be reopened"));
        };
        let answer = catch_unwind(AssertUnwindSafe(|| work(db)));
        let answer = answer.unwrap_or_else(|_| Err(io::ErrorKind::InvalidData.into()));
        let answer = answer.map_err(|error| explain(&self.path, error))?;
        self.poisoned.set(false);
        Ok(answer)
    }

    /// Makes everything durable, and notes up to where that is.
    fn flush_and_note(&self) -> io::Result<()> {
        self.guarded(|db| {
            db.flush()?;
            flushed::note(&OsVfs, &self.path)
        })
    }

    fn note_cached(&self, bytes: usize) {
        self.cached_since_open.set(self.cached_since_open.get() + bytes as u64);
    }

    /// Gives back the memory of all leaves in the cache. Everything is flushed.
    fn reopen(&mut self) -> io::Result<()> {
        drop(self.db.take());
        self.db = Some(open_db(&self.path, self.cache_bytes)?);
        self.cached_since_open.set(0);
        Ok(())
    }
}

/// Says which database failed, and what to do if it is damaged.
fn explain(path: &Path, error: io::Error) -> io::Error {
    let path = path.display();
    let text = match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            format!("the database in {path} is damaged: {error}; {REPLACE_MEMBER}")
        }
        kind => format!("the database in {path}: {error}; {}", remedy(kind)),
    };
    io::Error::new(error.kind(), text)
}

/// [`Engine::scan`]. A thread of its own reads and unpacks what comes next, for a member that starts
/// has nothing else to do meanwhile.
fn scan(db: &Db, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> io::Result<()> {
    thread::scope(|scope| {
        let (pieces, ahead) = mpsc::sync_channel(PIECES_AHEAD);
        let db = db.clone();
        let reader = scope.spawn(move || {
            let mut piece = Vec::new();
            for pair in db.range::<&[u8], _>(prefix..) {
                let (key, value) = pair?;
                if !key.starts_with(prefix) {
                    break;
                }
                piece.push((key, value));
                if piece.len() == PIECE_PAIRS && pieces.send(mem::take(&mut piece)).is_err() {
                    return Ok(());
                }
            }
            // Refused by one who has seen enough.
            _ = pieces.send(piece);
            Ok(())
        });
        // Dropped here, so that the reader ends when the visitor has seen enough.
        ahead.into_iter().flatten().all(|(key, value)| visit(&key, &value));
        reader.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

fn open_db(path: &Path, cache_bytes: usize) -> io::Result<Db> {
    let config = ::sled::Config::new()
        .path(path)
        .cache_capacity_bytes(cache_bytes)
        .zstd_compression_level(ZSTD_LEVEL)
        .flush_every_ms(Some(FLUSHER_INTERVAL_MS));
    let open = || {
        // What a killed process has written and not synced is read back from memory, and recovery
        // builds on it: so it has to be on the disk first. sled runs the program `sync` for that,
        // which an image with nothing but a static binary has not.
        if path.is_dir() {
            rustix::fs::syncfs(std::fs::File::open(path)?)?;
        }
        flushed::check(&OsVfs, path)?;
        let opened = catch_unwind(AssertUnwindSafe(|| config.open()));
        let opened = opened.unwrap_or_else(|_| Err(io::ErrorKind::InvalidData.into()));
        opened.map_err(|error| explain(path, error))
    };
    for attempt in 1..LOCK_TRIES {
        match open() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(LOCK_PAUSE),
            // A handle that was just dropped may still be putting its files in order.
            Err(error) if error.kind() == io::ErrorKind::InvalidData && attempt < DAMAGE_TRIES => {
                thread::sleep(LOCK_PAUSE);
            }
            answer => return answer,
        }
    }
    open()
}

impl Engine for Sled {
    fn apply(&mut self, batch: Batch) -> io::Result<()> {
        self.note_cached(batch.len_bytes());
        self.guarded(|db| {
            // `apply_batch` is the one call that does not look for an earlier error by itself.
            db.check_error()?;
            let mut atomic = ::sled::Batch::default();
            for change in batch.changes {
                match change {
                    Change::Put { key, value } => atomic.insert(key, value),
                    Change::Remove { key } => atomic.remove(key),
                }
            }
            db.apply_batch(atomic)?;
            for key in batch.garbage {
                db.remove(key)?;
            }
            Ok(())
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flush_and_note()?;
        if self.cached_since_open.get() > REOPEN_AFTER_CACHES * self.cache_bytes as u64 {
            self.reopen()?;
        }
        Ok(())
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.guarded(|db| Ok(db.get(key)?.map(|value| value.to_vec())))
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> io::Result<()> {
        let mut visit_counted = |key: &[u8], value: &[u8]| {
            self.note_cached(key.len() + value.len());
            visit(key, value)
        };
        self.guarded(|db| scan(db, prefix, &mut visit_counted))
    }

    /// What the directory's files take. When they cannot be listed, because sled replaces one just
    /// then, this is what they took when last asked.
    fn size_bytes(&self) -> u64 {
        if let Some(Ok(bytes)) = self.db.as_ref().map(Db::size_on_disk) {
            self.size_bytes.set(bytes);
        }
        self.size_bytes.get()
    }
}

impl Drop for Sled {
    fn drop(&mut self) {
        // Flushed here, because where sled's own flusher fails at shutdown it aborts the process.
        if self.flush_and_note().is_err() {
            mem::forget(self.db.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::super::Memory;
    use super::*;

    type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

    const CACHE_BYTES: usize = 1 << 20;

    fn pairs(engine: &dyn Engine, prefix: &[u8]) -> Pairs {
        let mut found = Vec::new();
        let mut collect = |key: &[u8], value: &[u8]| {
            found.push((key.to_vec(), value.to_vec()));
            true
        };
        engine.scan(prefix, &mut collect).unwrap();
        found
    }

    /// Over a few thousand keys of three prefixes, some of them empty or a prefix of others.
    fn random_batch(random: &mut StdRng) -> Batch {
        let key = |random: &mut StdRng| {
            let mut key = vec![b"abc"[random.random_range(0..3)]];
            let number = random.random_range(0..4000_u32).to_be_bytes();
            key.extend(&number[random.random_range(0..4)..]);
            key
        };
        let mut batch = Batch::default();
        for _ in 0..random.random_range(0..400) {
            match random.random_range(0..10) {
                0..6 => batch.put(key(random), vec![7; random.random_range(0..600)]),
                6..9 => batch.remove(key(random)),
                _ => batch.garbage.push(key(random)),
            }
        }
        batch
    }

    #[test]
    fn it_holds_what_the_memory_engine_holds_also_after_reopening() {
        (1..=3).for_each(mirror);
    }

    #[test]
    fn a_scan_ends_where_its_visitor_has_seen_enough() {
        let directory = tempfile::tempdir().unwrap();
        let mut sled = Sled::open(directory.path(), CACHE_BYTES).unwrap();
        // More than is ever read ahead.
        let pairs = 2 * PIECE_PAIRS * (PIECES_AHEAD + 2);
        let mut batch = Batch::default();
        (0..pairs).for_each(|n| batch.put(n.to_be_bytes(), [7]));
        sled.apply(batch).unwrap();
        for enough in [1, 3, PIECE_PAIRS, PIECE_PAIRS + 1, pairs] {
            let mut seen = 0;
            let mut visit = |_: &[u8], _: &[u8]| {
                seen += 1;
                seen < enough
            };
            sled.scan(&[], &mut visit).unwrap();
            assert_eq!(seen, enough);
        }
    }

    fn mirror(seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let directory = tempfile::tempdir().unwrap();
        let mut memory = Memory::new();
        let mut sled = Sled::open(directory.path(), CACHE_BYTES).unwrap();
        for round in 0..40 {
            let batch = random_batch(&mut random);
            memory.apply(batch.clone()).unwrap();
            sled.apply(batch).unwrap();
            match random.random_range(0..6) {
                0 => sled.flush().unwrap(),
                1 => {
                    drop(sled);
                    sled = Sled::open(directory.path(), CACHE_BYTES).unwrap();
                }
                2 => sled.reopen().unwrap(),
                _ => {}
            }
            for prefix in [&b""[..], b"a", b"b\0\0", b"d"] {
                assert_eq!(
                    pairs(&memory, prefix),
                    pairs(&sled, prefix),
                    "seed {seed} round {round}"
                );
            }
        }
        for (key, value) in pairs(&memory, b"") {
            assert_eq!(sled.get(&key).unwrap(), Some(value));
        }
        assert_eq!(sled.get(b"absent").unwrap(), None);
        assert!(sled.size_bytes() > 0);
    }

    #[test]
    fn garbage_gives_its_leaves_back() {
        let directory = tempfile::tempdir().unwrap();
        let mut sled = Sled::open(directory.path(), CACHE_BYTES).unwrap();
        let keys = || (0..40_000_u32).map(|number| number.to_be_bytes().to_vec());
        let mut batch = Batch::default();
        keys().for_each(|key| batch.put(key, *b"value"));
        sled.apply(batch).unwrap();
        sled.flush().unwrap();
        let garbage: Vec<_> = keys().skip(1).collect();
        sled.apply(Batch { garbage, ..Batch::default() }).unwrap();
        assert!(sled.db.as_ref().unwrap().stats().cache.tree_leaves_merged > 30);
        assert_eq!(pairs(&sled, b"").len(), 1);
    }

    #[test]
    fn a_directory_is_opened_once_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let first = Sled::open(directory.path(), CACHE_BYTES).unwrap();
        let second = Sled::open(directory.path(), CACHE_BYTES).err().unwrap();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        drop(first);
        Sled::open(directory.path(), CACHE_BYTES).unwrap();
    }

    #[test]
    fn after_an_error_everything_is_refused_and_dropping_does_not_hang() {
        let directory = tempfile::tempdir().unwrap();
        let mut sled = Sled::open(directory.path(), CACHE_BYTES).unwrap();
        sled.guarded(|_| Err::<(), _>(io::Error::other("disk on fire"))).unwrap_err();
        sled.apply(Batch::default()).unwrap_err();
        sled.flush().unwrap_err();
        sled.get(b"key").unwrap_err();
        sled.scan(b"", &mut |_, _| true).unwrap_err();
    }

    /// The files below `dir` that have any content.
    fn files_below(dir: &Path) -> Vec<std::path::PathBuf> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                files.extend(files_below(&entry.path()));
            } else if entry.metadata().unwrap().len() > 0 {
                files.push(entry.path());
            }
        }
        files.sort();
        files
    }

    /// Opens and reads everything, as a member does at its start.
    fn open_and_read(dir: &Path) -> io::Result<Pairs> {
        let sled = Sled::open(dir, CACHE_BYTES)?;
        let mut found = Vec::new();
        sled.scan(b"", &mut |key, value| {
            found.push((key.to_vec(), value.to_vec()));
            true
        })?;
        Ok(found)
    }

    #[test]
    fn whatever_file_is_damaged_the_state_is_right_or_refused() {
        let original = tempfile::tempdir().unwrap();
        let mut sled = Sled::open(original.path(), CACHE_BYTES).unwrap();
        for round in 0..30_u64 {
            let mut batch = Batch::default();
            // Written over again and again, so that places on the disk are used again.
            for slot in 0..400_u64 {
                batch.put((slot * 7919 % 6000).to_be_bytes(), (round * 1000 + slot).to_be_bytes());
            }
            for slot in 0..200_u64 {
                batch.put((10_000 + round * 200 + slot).to_be_bytes(), vec![round as u8; 100]);
            }
            sled.apply(batch).unwrap();
            sled.flush().unwrap();
            if round == 14 {
                drop(sled);
                sled = Sled::open(original.path(), CACHE_BYTES).unwrap();
            }
        }
        let expected = pairs(&sled, b"");
        drop(sled);
        let files = files_below(original.path());
        let mut random = StdRng::seed_from_u64(1);
        let mut refused = 0;
        for file in &files {
            let name = file.strip_prefix(original.path()).unwrap();
            let bytes = std::fs::read(file).unwrap();
            for turn in 0..6 {
                let mut damaged = bytes.clone();
                let at = random.random_range(0..bytes.len());
                match turn {
                    0 => damaged.truncate(at),
                    1 => damaged.clear(),
                    _ => damaged[at] ^= 1 << random.random_range(0..8),
                }
                let copy = tempfile::tempdir().unwrap();
                for from in &files {
                    let to = copy.path().join(from.strip_prefix(original.path()).unwrap());
                    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                    std::fs::copy(from, to).unwrap();
                }
                std::fs::write(copy.path().join(name), &damaged).unwrap();
                match open_and_read(copy.path()) {
                    Ok(found) => assert!(found == expected, "{name:?}, turn {turn}: wrong pairs"),
                    Err(error) => {
                        refused += 1;
                        println!("{name:?} at {at}, turn {turn}: {error}");
                        let path = copy.path().to_str().unwrap();
                        assert!(error.to_string().contains(path), "{name:?}: {error}");
                        assert!(error.to_string().contains("member add"), "{name:?}: {error}");
                    }
                }
            }
        }
        assert!(refused > 20, "{refused}");
    }

    const VICTIM_DIRECTORY: &str = "HOLDFAST_TEST_SLED_VICTIM";

    /// Not a test of its own: the process that the next test kills.
    #[test]
    fn victim_of_the_kill_test() {
        let Some(directory) = std::env::var_os(VICTIM_DIRECTORY) else { return };
        let mut sled = Sled::open(Path::new(&directory), CACHE_BYTES).unwrap();
        for round in 0_u64.. {
            let mut batch = Batch::default();
            (0..300_u64).for_each(|slot| {
                batch.put((slot * 7919 % 3000).to_be_bytes(), round.to_be_bytes());
            });
            sled.apply(batch).unwrap();
            if round % 3 == 0 {
                sled.flush().unwrap();
                println!("flushed {round}");
            }
        }
    }

    #[test]
    fn a_killed_process_leaves_whole_batches_and_all_that_it_flushed() {
        use std::io::{BufRead, BufReader};
        use std::process::{Command, Stdio};

        for lines in [1, 5, 30, 90] {
            let directory = tempfile::tempdir().unwrap();
            let mut victim = Command::new(std::env::current_exe().unwrap())
                .args(["victim_of_the_kill_test", "--nocapture", "--test-threads=1"])
                .env(VICTIM_DIRECTORY, directory.path())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let output = BufReader::new(victim.stdout.take().unwrap());
            let flushed: Vec<u64> = output
                .lines()
                .filter_map(|line| Some(line.unwrap().split_once("flushed ")?.1.parse().unwrap()))
                .take(lines)
                .collect();
            victim.kill().unwrap();
            victim.wait().unwrap();

            let sled = Sled::open(directory.path(), CACHE_BYTES).unwrap();
            let found = pairs(&sled, b"");
            assert_eq!(found.len(), 300);
            assert!(found.iter().all(|pair| pair.1 == found[0].1), "half a batch");
            let round = u64::from_be_bytes(found[0].1.as_slice().try_into().unwrap());
            assert!(round >= *flushed.last().unwrap());
        }
    }
}
