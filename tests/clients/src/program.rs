//! Which programs the tests run: the server under test and `etcdctl`.
//!
//! A program that is missing fails the test that needs it, with a line that says how to get it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The server under test: `HOLDFAST_BIN`, else the newer one of the repository's own builds.
///
/// # Panics
///
/// If there is none.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(path) = std::env::var_os("HOLDFAST_BIN") {
            return existing(path.into(), "HOLDFAST_BIN names no file");
        }
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let built =
            ["debug", "release"].map(|p| repository.join("target").join(p).join("holdfast"));
        let modified = |path: &PathBuf| path.metadata().and_then(|m| m.modified()).ok();
        let newest = built.iter().filter(|p| p.is_file()).max_by_key(|p| modified(p));
        newest.cloned().unwrap_or_else(|| {
            panic!("no holdfast binary: run `cargo build` in the repository, or set HOLDFAST_BIN")
        })
    })
}

/// etcd's command line client: `ETCDCTL`, else the first `etcdctl` on the path.
///
/// # Panics
///
/// If there is none.
pub fn etcdctl() -> &'static Path {
    static ETCDCTL: OnceLock<PathBuf> = OnceLock::new();
    ETCDCTL.get_or_init(|| {
        if let Some(path) = std::env::var_os("ETCDCTL") {
            return existing(path.into(), "ETCDCTL names no file");
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).map(|d| d.join("etcdctl")).find(|p| p.is_file());
        found.unwrap_or_else(|| {
            panic!("no etcdctl: install Debian's etcd-client, or set ETCDCTL to where one lies")
        })
    })
}

/// An etcd server to compare with or to take data from: `ETCD`, where that is set.
///
/// # Panics
///
/// If it names no file.
pub fn etcd() -> Option<&'static Path> {
    static ETCD: OnceLock<Option<PathBuf>> = OnceLock::new();
    let found = ETCD.get_or_init(|| {
        let path = std::env::var_os("ETCD").filter(|path| !path.is_empty())?;
        Some(existing(path.into(), "ETCD names no file"))
    });
    found.as_deref()
}

/// A command that runs `path` without what the environment would configure it with: these tests set
/// everything by flags.
pub fn command(path: &Path) -> Command {
    let mut command = Command::new(path);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("ETCD") || text.starts_with("HOLDFAST") {
            command.env_remove(&name);
        }
    }
    command
}

/// Whether the server under test is etcd, whose known defects are then expected of it.
pub fn target_is_etcd() -> bool {
    static IS_ETCD: OnceLock<bool> = OnceLock::new();
    *IS_ETCD.get_or_init(|| {
        let output = command(program()).arg("--version").output().expect("program runs");
        String::from_utf8_lossy(&output.stdout).starts_with("etcd Version:")
    })
}

fn existing(path: PathBuf, complaint: &str) -> PathBuf {
    assert!(path.is_file(), "{complaint}: {}", path.display());
    // Tests run programs in directories of their own.
    path.canonicalize().expect("a file that exists has a real path")
}
