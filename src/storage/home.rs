//! Where a member's state lives, and how a whole new state takes its place.
//!
//! ```text
//! state/CURRENT      the name of the directory in use, e.g. "state-3", and its CRC-32
//! state/state-3/     the engine's files
//! ```
//!
//! A state that arrives from another member is built in a fresh directory and made durable there.
//! Then `CURRENT` is replaced by rename, and only then the old directory goes. A crash at any point
//! leaves either the old state or the new one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Engine, Memory, Packed, Sled};
use crate::mutant;
use crate::vfs::{OsVfs, REPLACE_MEMBER, Vfs, create_dir_durably, replace_file};

const CURRENT: &str = "CURRENT";
const PREFIX: &str = "state-";

/// Opens the engine in a directory of its own. Only it looks into that directory.
pub trait Engines: Send + Sync {
    /// The engine in `dir`, which exists; empty if nothing was flushed there.
    fn open(&self, dir: &Path) -> io::Result<Box<dyn Engine>>;
}

/// [`Sled`] on the operating system's files.
#[derive(Debug, Clone, Copy)]
pub struct SledEngines {
    pub cache_bytes: usize,
}

impl Engines for SledEngines {
    fn open(&self, dir: &Path) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(Sled::open(dir, self.cache_bytes)?))
    }
}

/// [`Memory`] over simulated files.
#[derive(Debug, Clone)]
pub struct MemoryEngines(pub Arc<dyn Vfs>);

impl Engines for MemoryEngines {
    fn open(&self, dir: &Path) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(Memory::open_in(self.0.clone(), dir)?))
    }
}

/// Opens the present state, and stages the next. The engines that it hands out pack the history into
/// blocks ([`Packed`]).
pub struct Home {
    /// Directories below this one.
    root: PathBuf,
    vfs: Arc<dyn Vfs>,
    engines: Arc<dyn Engines>,
}

/// A state under construction. Its directory is removed when it is dropped before it was put to
/// use.
pub struct Staged {
    /// Taken when it is put to use or dropped.
    engine: Option<Box<dyn Engine>>,
    name: String,
    path: PathBuf,
    vfs: Arc<dyn Vfs>,
}

impl Staged {
    pub fn engine(&mut self) -> &mut dyn Engine {
        self.engine.as_deref_mut().expect("taken only by what consumes the staged state")
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.take() {
            drop(engine);
            // What cannot be removed now is at the next start.
            let _ = self.vfs.remove_dir_all(&self.path);
        }
    }
}

impl Home {
    /// Whether its disk is a simulated one, whose calls return at once.
    pub fn is_simulated(&self) -> bool {
        self.vfs.simulated_time().is_some()
    }

    /// States below `root`, in engines of this kind. `vfs` is the file system that they are on.
    pub fn new(root: PathBuf, vfs: Arc<dyn Vfs>, engines: Arc<dyn Engines>) -> Home {
        Home { root, vfs, engines }
    }

    /// States below `root` on this machine's disk.
    pub fn on_disk(root: PathBuf, cache_bytes: usize) -> Home {
        Home::new(root, Arc::new(OsVfs), Arc::new(SledEngines { cache_bytes }))
    }

    /// The engine that holds the present state, empty on a first start. What a crash left of a
    /// state that never became the present one is removed.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read or made; `InvalidData` if `CURRENT` is damaged, or names a
    /// state that is not there.
    pub fn open(&self) -> io::Result<Box<dyn Engine>> {
        create_dir_durably(self.vfs.as_ref(), &self.root)?;
        let current = match self.current()? {
            Some(name) => name,
            None => {
                let first = format!("{PREFIX}1");
                self.vfs.create_dir_all(&self.root.join(&first))?;
                self.vfs.sync_dir(&self.root)?;
                self.point_to(&first)?;
                first
            }
        };
        if !self.vfs.exists(&self.root.join(&current))? {
            return Err(self.damaged(&format!("it names {current}, which is not there")));
        }
        // What was seen may not be durable yet, and now something is built on it.
        self.vfs.sync_dir(&self.root)?;
        self.remove(|name| name != current)?;
        Ok(Box::new(Packed::new(self.engines.open(&self.root.join(current))?)))
    }

    /// An empty engine in a place of its own.
    pub fn stage(&self) -> io::Result<Staged> {
        let names = self.directories()?;
        let highest = names.iter().filter_map(|name| number(name)).max().unwrap_or(0);
        let name = format!("{PREFIX}{}", highest + 1);
        let path = self.root.join(&name);
        self.vfs.create_dir_all(&path)?;
        let engine = Box::new(Packed::new(self.engines.open(&path)?));
        Ok(Staged { engine: Some(engine), name, path, vfs: self.vfs.clone() })
    }

    /// Makes what was staged, and is durable in its engine, the present state. The old directory
    /// is removed by [`Home::sweep`], once its engine is closed.
    pub fn activate(&self, mut staged: Staged) -> io::Result<Box<dyn Engine>> {
        if !self.vfs.exists(&staged.path)? {
            let text = format!("{} has gone", staged.path.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        if !mutant::is("state-directory-unsynced") {
            self.vfs.sync_dir(&self.root)?;
        }
        self.point_to(&staged.name)?;
        Ok(staged.engine.take().expect("taken only by what consumes the staged state"))
    }

    /// Removes the states before the present one. Later ones may be under construction.
    pub fn sweep(&self) -> io::Result<()> {
        let present = self.current()?.as_deref().and_then(number);
        self.remove(|name| number(name) < present)
    }

    /// The name of the present state, if there is one.
    fn current(&self) -> io::Result<Option<String>> {
        let bytes = match self.vfs.read(&self.root.join(CURRENT)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let text = String::from_utf8_lossy(&bytes);
        match text.split_once(' ') {
            Some((name, _)) if number(name).is_some() && text == pointer(name) => {
                Ok(Some(name.to_owned()))
            }
            _ => Err(self.damaged("it is not the name of a state and its checksum")),
        }
    }

    fn point_to(&self, name: &str) -> io::Result<()> {
        let vfs = self.vfs.as_ref();
        replace_file(vfs, &self.root.join(CURRENT), pointer(name).as_bytes())
    }

    fn directories(&self) -> io::Result<Vec<String>> {
        let names = self.vfs.list(&self.root)?;
        Ok(names.into_iter().filter(|name| number(name).is_some()).collect())
    }

    fn remove(&self, unwanted: impl Fn(&str) -> bool) -> io::Result<()> {
        for name in self.directories()?.iter().filter(|name| unwanted(name)) {
            self.vfs.remove_dir_all(&self.root.join(name))?;
        }
        Ok(())
    }

    fn damaged(&self, what: &str) -> io::Error {
        let file = self.root.join(CURRENT);
        let text = format!("{}: damaged at offset 0: {what}; {REPLACE_MEMBER}", file.display());
        io::Error::new(io::ErrorKind::InvalidData, text)
    }
}

fn number(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// What stands in `CURRENT`.
fn pointer(name: &str) -> String {
    format!("{name} {:08x}\n", crc32fast::hash(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Batch;
    use crate::vfs::{MemVfs, Survival};

    fn put(engine: &mut dyn Engine, value: &str) -> io::Result<()> {
        let mut batch = Batch::default();
        batch.put("k", value);
        engine.apply(batch)?;
        engine.flush()
    }

    fn value(engine: &dyn Engine) -> String {
        let value = engine.get(b"k").expect("get");
        value.map_or(String::new(), |value| String::from_utf8(value).expect("text"))
    }

    fn simulated(vfs: &MemVfs) -> Home {
        let vfs = Arc::new(vfs.clone());
        Home::new(PathBuf::from("/data/state"), vfs.clone(), Arc::new(MemoryEngines(vfs)))
    }

    fn staged_replaces_old_only_when_activated(home: &Home) {
        let mut engine = home.open().expect("open");
        put(engine.as_mut(), "old").expect("put");
        drop(engine);

        let mut staged = home.stage().expect("stage");
        put(staged.engine(), "abandoned").expect("put");
        drop(staged);
        let engine = home.open().expect("open");
        assert_eq!(value(engine.as_ref()), "old");
        drop(engine);

        let mut staged = home.stage().expect("stage");
        put(staged.engine(), "new").expect("put");
        let mut next = home.stage().expect("another, begun before this one is in use");
        drop(home.activate(staged).expect("activate"));
        home.sweep().expect("sweep");
        put(next.engine(), "under construction still").expect("put");
        drop(next);
        let engine = home.open().expect("open");
        assert_eq!(value(engine.as_ref()), "new");
        assert_eq!(home.directories().expect("list").len(), 1);
    }

    #[test]
    fn a_staged_state_replaces_the_old_one_only_when_activated() {
        let directory = tempfile::tempdir().expect("tempdir");
        let home = Home::on_disk(directory.path().join("state"), 1 << 20);
        staged_replaces_old_only_when_activated(&home);
        staged_replaces_old_only_when_activated(&simulated(&MemVfs::default()));
    }

    /// What a member does, noting in `acknowledged` what it may rely on from then on.
    fn live(home: &Home, acknowledged: &mut &str) -> io::Result<()> {
        put(home.open()?.as_mut(), "old")?;
        *acknowledged = "old";
        let mut staged = home.stage()?;
        put(staged.engine(), "abandoned")?;
        drop(staged);
        let mut staged = home.stage()?;
        put(staged.engine(), "new")?;
        drop(home.activate(staged)?);
        *acknowledged = "new";
        home.sweep()
    }

    #[test]
    fn a_power_cut_at_any_operation_leaves_the_old_state_or_the_new() {
        let whole = MemVfs::default();
        live(&simulated(&whole), &mut "").expect("nothing is in the way");
        assert!(whole.operations() > 30);
        for cut in 0..whole.operations() {
            let seeds = (0..6).map(|seed| Survival::Some(cut * 6 + seed));
            for survival in [Survival::Nothing, Survival::Everything].into_iter().chain(seeds) {
                let vfs = MemVfs::default();
                vfs.cut_power_after(cut);
                let mut acknowledged = "";
                live(&simulated(&vfs), &mut acknowledged).expect_err("the power went");
                let left = vfs.after_power_cut(survival);
                // Cut again while it recovers, wherever that is.
                left.cut_power_after(cut % 7);
                drop(simulated(&left).open());
                let left = left.after_power_cut(survival);

                let home = simulated(&left);
                let context = format!("cut at {cut}, {survival:?}, {acknowledged:?} acknowledged");
                let engine = home.open().unwrap_or_else(|error| panic!("{context}: {error}"));
                let allowed: &[&str] = match acknowledged {
                    "" => &["", "old"],
                    "old" => &["old", "new"],
                    _ => &["new"],
                };
                let found = value(engine.as_ref());
                assert!(allowed.contains(&found.as_str()), "{context}: found {found:?}");
                drop(engine);
                assert_eq!(home.directories().expect("list").len(), 1, "{context}");
                live(&home, &mut "").expect("it goes on");
                assert_eq!(value(home.open().expect("open").as_ref()), "new");
            }
        }
    }

    #[test]
    fn whatever_byte_of_current_changes_the_start_is_refused() {
        let vfs = MemVfs::default();
        let home = simulated(&vfs);
        put(home.open().expect("open").as_mut(), "kept").expect("put");
        vfs.create_dir_all(Path::new("/data/state/state-3")).expect("another directory");
        let file = Path::new("/data/state/CURRENT");
        let bytes = vfs.read(file).expect("written");
        for at in 0..bytes.len() {
            for bit in 0..8 {
                vfs.tamper(file, |content| content[at] ^= 1 << bit);
                let error = home.open().err().expect("damaged");
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                assert!(error.to_string().contains("/data/state/CURRENT: damaged"), "{error}");
                vfs.tamper(file, |content| content.clone_from(&bytes));
            }
            vfs.tamper(file, |content| content.truncate(at));
            home.open().err().expect("cut off");
            vfs.tamper(file, |content| content.clone_from(&bytes));
        }
        assert_eq!(value(home.open().expect("whole again").as_ref()), "kept");
    }
}
