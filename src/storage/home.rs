//! Where a member's state lives, and how a whole new state takes its place.
//!
//! ```text
//! state/CURRENT      the name of the directory in use, e.g. "state-3"
//! state/state-3/     the engine's files
//! ```
//!
//! A state that arrives from another member is built in a fresh directory and made durable there.
//! Then `CURRENT` is replaced by rename, and only then the old directory goes. A crash at any point
//! leaves either the old state or the new one.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{Engine, Memory, Sled};

const CURRENT: &str = "CURRENT";
const PREFIX: &str = "state-";

/// Opens the present state, and stages the next.
pub enum Home {
    /// Directories below this one.
    Disk { root: PathBuf, cache_bytes: usize },
    /// For tests: nothing survives.
    Memory,
}

/// A state under construction. Its directory is removed when it is dropped before it was put to
/// use.
pub struct Staged {
    /// Taken when it is put to use or dropped.
    engine: Option<Box<dyn Engine>>,
    /// `None` in memory.
    place: Option<Place>,
}

struct Place {
    name: String,
    path: PathBuf,
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
            if let Some(place) = &self.place {
                // What cannot be removed now is at the next start.
                let _ = fs::remove_dir_all(&place.path);
            }
        }
    }
}

impl Home {
    /// The engine that holds the present state, empty on a first start. What a crash left of a
    /// state that never became the present one is removed.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read or made, or `CURRENT` names one that is not there.
    pub fn open(&self) -> io::Result<Box<dyn Engine>> {
        let Home::Disk { root, cache_bytes } = self else {
            return Ok(Box::new(Memory::default()));
        };
        fs::create_dir_all(root)?;
        let current = match fs::read_to_string(root.join(CURRENT)) {
            Ok(name) => name.trim().to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let first = format!("{PREFIX}1");
                fs::create_dir_all(root.join(&first))?;
                point_to(root, &first)?;
                first
            }
            Err(error) => return Err(error),
        };
        if !root.join(&current).is_dir() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!(
                    "{} names {current}, which is not there: the state of this member is lost; \
                     remove the member from the cluster and add it again with an empty data dir",
                    root.join(CURRENT).display()
                ),
            ));
        }
        remove_others(root, &current)?;
        Ok(Box::new(Sled::open(&root.join(current), *cache_bytes)?))
    }

    /// An empty engine in a place of its own.
    pub fn stage(&self) -> io::Result<Staged> {
        let Home::Disk { root, cache_bytes } = self else {
            return Ok(Staged { engine: Some(Box::new(Memory::default())), place: None });
        };
        let highest = directories(root)?.iter().filter_map(|name| number(name)).max().unwrap_or(0);
        let name = format!("{PREFIX}{}", highest + 1);
        let path = root.join(&name);
        fs::create_dir(&path)?;
        let engine: Box<dyn Engine> = Box::new(Sled::open(&path, *cache_bytes)?);
        Ok(Staged { engine: Some(engine), place: Some(Place { name, path }) })
    }

    /// Makes what was staged, and is durable in its engine, the present state. The old directory
    /// is removed by [`Home::sweep`], once its engine is closed.
    pub fn activate(&self, mut staged: Staged) -> io::Result<Box<dyn Engine>> {
        if let (Home::Disk { root, .. }, Some(place)) = (self, &staged.place) {
            if !place.path.is_dir() {
                let text = format!("{} has gone", place.path.display());
                return Err(io::Error::new(io::ErrorKind::NotFound, text));
            }
            sync_dir(root)?;
            point_to(root, &place.name)?;
        }
        Ok(staged.engine.take().expect("taken only by what consumes the staged state"))
    }

    /// Removes the states before the present one. Later ones may be under construction.
    pub fn sweep(&self) -> io::Result<()> {
        let Home::Disk { root, .. } = self else { return Ok(()) };
        let current = fs::read_to_string(root.join(CURRENT))?;
        let present = number(current.trim());
        for name in directories(root)? {
            if number(&name) < present {
                fs::remove_dir_all(root.join(name))?;
            }
        }
        Ok(())
    }
}

fn number(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

fn directories(root: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root)? {
        if let Ok(name) = entry?.file_name().into_string()
            && number(&name).is_some()
        {
            names.push(name);
        }
    }
    Ok(names)
}

fn remove_others(root: &Path, current: &str) -> io::Result<()> {
    for name in directories(root)? {
        if name != current {
            fs::remove_dir_all(root.join(name))?;
        }
    }
    Ok(())
}

fn point_to(root: &Path, name: &str) -> io::Result<()> {
    let draft = root.join("CURRENT.new");
    let mut file = fs::File::create(&draft)?;
    file.write_all(name.as_bytes())?;
    file.sync_all()?;
    fs::rename(&draft, root.join(CURRENT))?;
    sync_dir(root)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Batch;

    fn put(engine: &mut dyn Engine, value: &str) {
        let mut batch = Batch::default();
        batch.put("k", value);
        engine.apply(batch).expect("apply");
        engine.flush().expect("flush");
    }

    #[test]
    fn a_staged_state_replaces_the_old_one_only_when_activated() {
        let directory = tempfile::tempdir().expect("tempdir");
        let home = Home::Disk { root: directory.path().join("state"), cache_bytes: 1 << 20 };
        let mut engine = home.open().expect("open");
        put(engine.as_mut(), "old");
        drop(engine);

        let mut staged = home.stage().expect("stage");
        put(staged.engine(), "abandoned");
        drop(staged);
        let engine = home.open().expect("open");
        assert_eq!(engine.get(b"k").expect("get"), Some(b"old".to_vec()));
        drop(engine);

        let mut staged = home.stage().expect("stage");
        put(staged.engine(), "new");
        let mut next = home.stage().expect("another, begun before this one is in use");
        drop(home.activate(staged).expect("activate"));
        home.sweep().expect("sweep");
        put(next.engine(), "under construction still");
        drop(next);
        let engine = home.open().expect("open");
        assert_eq!(engine.get(b"k").expect("get"), Some(b"new".to_vec()));
        let Home::Disk { root, .. } = &home else { unreachable!() };
        assert_eq!(directories(root).expect("list").len(), 1);
    }
}
