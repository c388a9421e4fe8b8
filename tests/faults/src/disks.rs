//! A file system for each member's data, small and in a file: it can be made slow, filled, and cut off.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use holdfast_client_tests::disks;
use rustix::fs::{FallocateFlags, fallocate};

use crate::shell::run;

/// Where writes of a device are limited; a kernel that manages all resources by cgroup v2 has not.
const THROTTLE: &str = "/sys/fs/cgroup/blkio/blkio.throttle.write_iops_device";

/// A file system that nobody uses any more can be unmounted by then.
const RELEASED: Duration = Duration::from_secs(10);

/// What fills a disk.
const BALLAST: &str = "ballast";

/// Removed and unmounted with the runner's mount namespace.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mount: PathBuf,
    /// Another one after each mount.
    device: Mutex<String>,
}

impl Disk {
    /// Makes a file system of so many MiB in `image` and mounts it at `mount`.
    pub fn make(image: &Path, mount: &Path, mib: u64) -> Result<Disk, String> {
        let io = |e: std::io::Error| format!("{}: {e}", image.display());
        File::create(image).map_err(io)?.set_len(mib << 20).map_err(io)?;
        fs::create_dir_all(mount).map_err(io)?;
        // Without reserved blocks, which root could still write to when it is full.
        run("mkfs.ext4", &["-q", "-F", "-m", "0", &image.to_string_lossy()])?;
        let (image, mount) = (image.to_owned(), mount.to_owned());
        let disk = Disk { image, mount, device: Mutex::default() };
        disk.mount()?;
        Ok(disk)
    }

    /// It writes its journal every five minutes only, so that a power cut loses what was not synced.
    fn mount(&self) -> Result<(), String> {
        let (image, place) = (self.image.to_string_lossy(), self.mount.to_string_lossy());
        run("mount", &["-o", "loop,commit=300", &image, &place])?;
        let device = run("findmnt", &["-n", "-o", "MAJ:MIN", "--mountpoint", &place])?;
        *self.device.lock().expect("nothing panics with it") = device.trim().to_owned();
        if Path::new(THROTTLE).exists() {
            // A run that was killed may have left its limit on the same device.
            self.limit(0)?;
        }
        Ok(())
    }

    /// From now on every operation fails, and what was not synced is gone.
    pub fn cut_power(&self) -> Result<(), String> {
        disks::shut_down(&self.mount).map_err(|e| format!("{}: {e}", self.mount.display()))
    }

    /// Mounts it again. Nobody may use it any more. Whether a write was lost that was not synced.
    pub fn restore_power(&self) -> Result<bool, String> {
        let place = self.mount.to_string_lossy();
        let deadline = Instant::now() + RELEASED;
        // A process that was killed may still be about to let go of it.
        while let Err(why) = run("umount", &[&place]) {
            if Instant::now() > deadline {
                return Err(why);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // While the loop device lives, mounting would give the dead file system back.
        while !run("losetup", &["-j", &self.image.to_string_lossy()])?.is_empty() {
            if Instant::now() > deadline {
                return Err(format!("the loop device of {} stays", self.image.display()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.mount()?;
        Ok(disks::has_lost(&self.mount))
    }

    /// Lets through so many writes a second, all of them with 0.
    pub fn limit(&self, writes_a_second: u32) -> Result<(), String> {
        let device = self.device.lock().expect("nothing panics with it").clone();
        let text = format!("{device} {writes_a_second}");
        fs::write(THROTTLE, text).map_err(|e| format!("{THROTTLE}: {e}"))
    }

    /// How long it takes to make a small write durable.
    pub fn sync_time(&self) -> Result<Duration, String> {
        let path = self.mount.join("probe");
        let began = Instant::now();
        let io = |e: std::io::Error| format!("{}: {e}", path.display());
        let mut file = File::create(&path).map_err(io)?;
        file.write_all(&[7; 4096]).map_err(io)?;
        file.sync_all().map_err(io)?;
        Ok(began.elapsed())
    }

    /// Takes all the space there is, and makes sure that there is none.
    pub fn fill(&self) -> Result<String, String> {
        let path = self.mount.join(BALLAST);
        let io = |e: std::io::Error| format!("{}: {e}", path.display());
        let mut file = File::create(&path).map_err(io)?;
        let mut length = 0;
        // Space is taken in smaller and smaller pieces, without being written to.
        for piece in [64 << 20, 1 << 20, 64 << 10, 4096] {
            let more = |at| fallocate(&file, FallocateFlags::empty(), at, piece).is_ok();
            while more(length) {
                length += piece;
            }
        }
        file.seek(SeekFrom::End(0)).map_err(io)?;
        match file.write_all(&[1; 8192]) {
            Err(error) if error.raw_os_error() == Some(28) => Ok(format!("a write: {error}")),
            other => Err(format!("the disk is not full: {other:?}")),
        }
    }

    /// Gives back what [`Disk::fill`] took.
    pub fn free(&self) -> Result<(), String> {
        fs::remove_file(self.mount.join(BALLAST)).map_err(|e| e.to_string())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Left over, the limit would meet whoever has the device next; the mount goes by itself.
        if Path::new(THROTTLE).exists()
            && let Err(complaint) = self.limit(0)
        {
            eprintln!("{complaint}");
        }
        let _ = run("umount", &["--lazy", &self.mount.to_string_lossy()]);
    }
}

/// Whether devices can be made slow here.
pub fn can_be_slow() -> bool {
    Path::new(THROTTLE).exists()
}
