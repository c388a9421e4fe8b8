//! How much memory a process holds, as Linux counts it.

use std::fmt;
use std::path::PathBuf;

/// A mebibyte.
pub const MIB: u64 = 1 << 20;

/// The resident memory of a process since [`Resident::watch`].
#[derive(Debug)]
pub struct Resident {
    pid: u32,
    before_bytes: u64,
}

/// What a process held before at most, holds now, and held at most between.
#[derive(Debug, Clone, Copy)]
pub struct Growth {
    pub before_bytes: u64,
    pub now_bytes: u64,
    pub peak_bytes: u64,
}

impl Resident {
    /// Takes the most that the process has held so far as the baseline, and lets its peak begin here.
    /// What it holds at this moment depends on whether it has just returned memory that it needs again.
    ///
    /// # Panics
    ///
    /// If there is no such process, or it is not of our own user.
    pub fn watch(pid: u32) -> Resident {
        let before_bytes = field(pid, "VmHWM:");
        // 5 sets the peak to what is resident now.
        std::fs::write(file(pid, "clear_refs"), "5").expect("the peak can be reset");
        Resident { pid, before_bytes }
    }

    /// What became of it.
    pub fn growth(&self) -> Growth {
        Growth {
            before_bytes: self.before_bytes,
            now_bytes: field(self.pid, "VmRSS:"),
            peak_bytes: field(self.pid, "VmHWM:"),
        }
    }

    /// Asserts that the process never held more than `bytes` above its baseline, and gives what it
    /// did hold.
    ///
    /// # Panics
    ///
    /// If it held more; `what` says meanwhile what.
    pub fn within(&self, bytes: u64, what: &str) -> Growth {
        let growth = self.growth();
        let above = growth.peak_bytes.saturating_sub(growth.before_bytes);
        assert!(above <= bytes, "{what}: more than {} MiB above: {growth}", bytes / MIB);
        growth
    }
}

impl fmt::Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        write!(
            f,
            "{:.0} MiB before, peak {:.0}, then {:.0}",
            mib(self.before_bytes),
            mib(self.peak_bytes),
            mib(self.now_bytes)
        )
    }
}

fn file(pid: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

fn field(pid: u32, name: &str) -> u64 {
    let text = std::fs::read_to_string(file(pid, "status")).expect("the process is there");
    let line = text.lines().find_map(|l| l.strip_prefix(name)).expect("Linux tells it");
    let kib = line.trim().strip_suffix(" kB").expect("in kB").parse::<u64>().expect("a number");
    kib * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_seen_after_the_memory_was_given_back() {
        let resident = Resident::watch(std::process::id());
        let block = vec![1_u8; 256 * 1024 * 1024];
        assert_eq!(std::hint::black_box(&block)[1 << 20], 1);
        drop(block);
        let growth = resident.growth();
        assert!(growth.peak_bytes > growth.before_bytes + 200 * MIB, "{growth}");
        assert!(growth.now_bytes < growth.before_bytes + 200 * MIB, "{growth}");
    }
}
