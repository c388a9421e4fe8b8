//! What the system knows of this process.

use std::fs;

/// The unit of times in `/proc`, in ticks a second: fixed on Linux, whatever the kernel's own.
const TICKS_A_SECOND: f64 = 100.0;

/// Read from `/proc`; what cannot be read is `None`.
#[derive(Debug, Default)]
pub struct Process {
    pub cpu_seconds: Option<f64>,
    /// Since 1970.
    pub start_seconds: Option<f64>,
    pub resident_bytes: Option<u64>,
    pub virtual_bytes: Option<u64>,
    pub open_files: Option<u64>,
    pub max_files: Option<u64>,
}

impl Process {
    pub fn read() -> Process {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mut process = Process::parse(
            &text("/proc/self/stat"),
            &text("/proc/self/status"),
            &text("/proc/self/limits"),
            &text("/proc/stat"),
        );
        // One of them is open only to count them.
        process.open_files = fs::read_dir("/proc/self/fd")
            .ok()
            .map(|files| u64::try_from(files.count()).unwrap_or(u64::MAX).saturating_sub(1));
        process
    }

    fn parse(stat: &str, status: &str, limits: &str, system: &str) -> Process {
        // The name in parentheses may hold anything: the fields are counted from behind it, where
        // the third one of the page proc(5) comes first.
        let fields: Vec<&str> = stat
            .rsplit_once(") ")
            .map(|(_, fields)| fields.split_whitespace().collect())
            .unwrap_or_default();
        let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
        let seconds = |ticks: f64| ticks / TICKS_A_SECOND;
        let boot = word(system, "btime ").and_then(|seconds| seconds.parse::<f64>().ok());
        let bytes = |name| Some(word(status, name)?.parse::<u64>().ok()? * 1024);
        Process {
            cpu_seconds: ticks(14).zip(ticks(15)).map(|(user, system)| seconds(user + system)),
            start_seconds: boot.zip(ticks(22)).map(|(boot, start)| boot + seconds(start)),
            resident_bytes: bytes("VmRSS:"),
            virtual_bytes: bytes("VmSize:"),
            open_files: None,
            max_files: word(limits, "Max open files").and_then(|limit| limit.parse().ok()),
        }
    }
}

/// The first word after `start` on the line that begins with it.
fn word<'a>(text: &'a str, start: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(start))?.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_any_name() {
        let stat = "77 (hold) fast) S 1 77 77 0 -1 4194560 20 0 0 0 150 50 0 0 20 0 9 0 1234 99 8";
        let status = "Name:\thold) fast\nVmSize:\t  2000 kB\nVmRSS:\t  1000 kB\n";
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max open files            20000                524288               files\n";
        let process = Process::parse(stat, status, limits, "cpu 1 2\nbtime 1700000000\n");
        assert_eq!(process.cpu_seconds, Some(2.0));
        assert_eq!(process.start_seconds, Some(1_700_000_012.34));
        assert_eq!(process.resident_bytes, Some(1_024_000));
        assert_eq!(process.virtual_bytes, Some(2_048_000));
        assert_eq!(process.max_files, Some(20_000));
    }

    #[test]
    fn nothing_is_made_up() {
        let process = Process::parse("", "", "", "");
        assert_eq!(process.cpu_seconds, None);
        assert_eq!(process.start_seconds, None);
        assert_eq!(process.resident_bytes, None);
        assert_eq!(process.max_files, None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_found() {
        let process = Process::read();
        assert!(process.resident_bytes.is_some_and(|bytes| bytes > 1 << 20), "{process:?}");
        assert!(process.open_files.is_some_and(|files| files > 2), "{process:?}");
        assert!(process.start_seconds.is_some_and(|at| at > 1.6e9), "{process:?}");
        assert!(process.cpu_seconds.is_some() && process.max_files.is_some(), "{process:?}");
    }
}
