//! Disks of their own for the members, which can be cut off, filled, and made read-only.
//!
//! Each is an ext4 file system in a sparse file, mounted through a loop device. It commits its
//! journal every five minutes only, so what a member did not sync is lost when the power goes. That
//! takes root and loop mounts: where there are none, [`Disk::available`] says so and why.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rustix::ioctl::{Setter, ioctl};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::check::{SOON, eventually_now, report};
use crate::process::Cluster;

/// Takes as much as a member asks for and costs as much as is written.
const DISK_MIB: u64 = 1024;

/// `EXT4_IOC_SHUTDOWN`: from now on the file system does nothing but fail.
const EXT4_SHUTDOWN: u32 = 0x8004_587D;
/// Is there when the power goes, and not synced.
const CANARY: &str = "canary";
/// Without writing the journal first.
const NO_LOG_FLUSH: u32 = 2;

/// A mounted file system. Dropping it unmounts it and removes the file it is in.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mount: PathBuf,
    mounted: bool,
}

impl Disk {
    /// Whether this process can make such disks. Reports the reason if not.
    pub fn available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            let dir = tempfile::tempdir().expect("a temporary directory can be made");
            let tried = Disk::make(&dir.path().join("disk"));
            if let Err(reason) = &tried {
                report(&format!("left out: no loop-mounted disks here: {reason}"));
            }
            tried.is_ok()
        })
    }

    /// Makes an empty disk and mounts it at `mount`, which is made.
    ///
    /// # Panics
    ///
    /// If that does not work; [`Disk::available`] tells beforehand.
    pub fn new(mount: &Path) -> Disk {
        Disk::make(mount)
            .unwrap_or_else(|reason| panic!("no disk at {}: {reason}", mount.display()))
    }

    fn make(mount: &Path) -> Result<Disk, String> {
        own_mounts()?;
        let image = mount.with_extension("img");
        let file = std::fs::File::create(&image).map_err(|e| e.to_string())?;
        file.set_len(DISK_MIB << 20).map_err(|e| e.to_string())?;
        std::fs::create_dir_all(mount).map_err(|e| e.to_string())?;
        let mut disk = Disk { image, mount: mount.to_owned(), mounted: false };
        let image = disk.image.to_string_lossy().into_owned();
        run("mkfs.ext4", &["-q", "-F", "-m", "0", &image])?;
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&mut self) -> Result<(), String> {
        let (image, mount) = (self.image.to_string_lossy(), self.mount.to_string_lossy());
        run("mount", &["-o", "loop,commit=300", &image, &mount])?;
        self.mounted = true;
        Ok(())
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// Cuts its power: every operation fails from now on, and what was not synced is gone.
    ///
    /// # Panics
    ///
    /// If the fault does not take hold.
    pub fn cut_power(&self) {
        shut_down(&self.mount).expect("its power can be cut");
    }

    /// Mounts it again after its power was cut. No process may use it. Returns whether a write was
    /// lost that nobody had synced. Mostly one is, but somebody else's sync may have taken it along.
    pub fn restore_power(&mut self) -> bool {
        self.unmount();
        self.mount().expect("the disk can be mounted");
        has_lost(&self.mount)
    }

    /// The kernel's answer to a broken disk: from now on it is read-only.
    pub fn make_read_only(&self) {
        run("mount", &["-o", "remount,abort", &self.mount.to_string_lossy()]).expect("remounted");
        assert!(std::fs::write(self.mount.join("more"), "x").is_err(), "it can still be written");
    }

    /// Mounts it again, writable. No process may use it.
    pub fn make_writable(&mut self) {
        self.unmount();
        self.mount().expect("the disk can be mounted");
    }

    /// Takes all but about `left_mib` of what is free.
    pub fn fill(&self, left_mib: u64) {
        let free = self.free_mib();
        assert!(free > left_mib, "only {free} MiB are free");
        // Two files, for it may have been filled in part before.
        let name = format!("ballast{left_mib}");
        let length = format!("{}M", free - left_mib);
        let path = self.mount.join(name);
        run("fallocate", &["-l", &length, &path.to_string_lossy()]).expect("filled");
    }

    /// Gives back what [`Disk::fill`] took.
    pub fn empty(&self) {
        for entry in std::fs::read_dir(&self.mount).expect("the disk is mounted") {
            let entry = entry.expect("the disk is readable");
            if entry.file_name().to_string_lossy().starts_with("ballast") {
                std::fs::remove_file(entry.path()).expect("removed");
            }
        }
    }

    pub fn free_mib(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.mount).expect("the disk is mounted");
        (stat.f_bavail * stat.f_frsize) >> 20
    }

    fn unmount(&mut self) {
        let mount = self.mount.to_string_lossy().into_owned();
        // A child of a killed member may be about to begin its own program.
        eventually_now(SOON, "the disk is not in use", || run("umount", &[&mount]).ok());
        self.mounted = false;
        // While anything still holds it, in whichever mount namespace, mounting it again would give
        // the dead file system back.
        let image = self.image.to_string_lossy().into_owned();
        eventually_now(SOON, "the loop device is released", || {
            let output = Command::new("losetup").args(["-j", &image]).output().ok()?;
            (output.status.success() && output.stdout.is_empty()).then_some(())
        });
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mount = self.mount.to_string_lossy().into_owned();
        // A test that failed may leave it in use: then it goes with its last user.
        if self.mounted
            && run("umount", &[&mount]).or_else(|_| run("umount", &["-l", &mount])).is_err()
        {
            report(&format!("{mount} is left mounted"));
        }
        // A file that is gone already needs no removal.
        let _ = std::fs::remove_file(&self.image);
    }
}

/// Has the ext4 file system at `mount` do nothing but fail from now on, and forget what was not
/// synced. Leaves a file behind for [`has_lost`].
///
/// # Errors
///
/// If the fault does not take hold.
pub fn shut_down(mount: &Path) -> Result<(), String> {
    std::fs::write(mount.join(CANARY), "not synced").map_err(|e| e.to_string())?;
    let dir = std::fs::File::open(mount).map_err(|e| e.to_string())?;
    // SAFETY: the call reads one `u32`, which `Setter` points to.
    let done = unsafe { ioctl(&dir, Setter::<EXT4_SHUTDOWN, u32>::new(NO_LOG_FLUSH)) };
    done.map_err(|e| format!("ext4 does not shut down: {e}"))?;
    match std::fs::write(mount.join("more"), "x") {
        Ok(()) => Err("the disk still works".to_owned()),
        Err(_) => Ok(()),
    }
}

/// Whether [`shut_down`] lost a write that nobody had synced, once the file system is mounted again.
/// Mostly it did, but somebody else's sync may have taken it along.
pub fn has_lost(mount: &Path) -> bool {
    std::fs::remove_file(mount.join(CANARY)).is_err()
}

/// Gives this thread mounts of its own, and with it what it starts. A namespace that somebody else
/// makes meanwhile would get a copy of ours, and hold on to a file system that we unmount.
fn own_mounts() -> Result<(), String> {
    thread_local! {
        static DONE: Cell<bool> = const { Cell::new(false) };
    }
    if DONE.get() {
        return Ok(());
    }
    // SAFETY: only mounts are unshared; the files this process has open stay as they are.
    let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWNS) };
    unshared.map_err(|error| format!("no mounts of its own: {error}"))?;
    run("mount", &["--make-rprivate", "/"])?;
    DONE.set(true);
    Ok(())
}

/// Runs a program to its end; the error is what it said.
fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(format!("{program}: {said}"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("{program} is not installed"))
        }
        Err(error) => Err(format!("{program}: {error}")),
    }
}

/// A cluster whose members have a disk each.
#[derive(Debug)]
pub struct Machines {
    pub cluster: Cluster,
    pub disks: Vec<Disk>,
    cuts: usize,
    losses: usize,
}

impl Machines {
    /// Starts `size` members and waits until each of them serves.
    pub async fn start(size: usize) -> Machines {
        let cluster = Cluster::prepare(size, &[]);
        let disks = (0..size).map(|member| Disk::new(&cluster.data_dir(member))).collect();
        let mut machines = Machines { cluster, disks, cuts: 0, losses: 0 };
        for member in 0..size {
            machines.cluster.spawn(member);
        }
        for member in 0..size {
            machines.cluster.serving(member).await;
        }
        machines
    }

    /// Cuts the power of these members, all disks before any process.
    pub fn cut_power(&mut self, members: &[usize]) {
        for member in members {
            self.disks[*member].cut_power();
        }
        for member in members {
            self.cluster.kill(*member);
        }
    }

    /// # Panics
    ///
    /// If less than half of the power cuts lost what was not synced: then they were none.
    pub fn assert_cuts_were_real(&self) {
        let Machines { cuts, losses, .. } = self;
        report(&format!("{losses} of {cuts} power cuts lost a write that was not synced"));
        assert!(2 * losses >= *cuts && *losses > 0, "the power cuts lost nothing");
    }

    /// Gives these members power again, and starts them.
    pub fn restore_power(&mut self, members: &[usize]) {
        for member in members {
            self.cuts += 1;
            self.losses += usize::from(self.disks[*member].restore_power());
            self.cluster.spawn(*member);
        }
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        // The processes first, then the disks, then what they are mounted in.
        self.cluster.kill_all();
        self.disks.clear();
    }
}
