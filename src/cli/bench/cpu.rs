//! CPU time of processes, read from `/proc` as Linux shows it.

use std::fs;
use std::io::{self, ErrorKind};

use super::BenchError;

/// The unit of times in `/proc`: fixed by the kernel's interface to programs on every
/// architecture in use, whatever the kernel ticks at inside.
const TICKS_PER_SECOND: f64 = 100.0;

/// Reads the CPU time of a set of processes and of this one.
pub struct CpuMeter {
    pids: Vec<u32>,
}

/// CPU seconds, user and system together.
#[derive(Debug, Clone, Copy)]
pub struct CpuTime {
    /// All processes that were named; none if none was named.
    pub servers: Option<f64>,
    /// This process; none where there is no `/proc`.
    pub client: Option<f64>,
}

impl CpuMeter {
    /// # Errors
    ///
    /// When one of the processes cannot be read, so that a mistyped id is noticed before the run.
    pub fn new(pids: &[u32]) -> Result<CpuMeter, BenchError> {
        let meter = CpuMeter { pids: pids.to_vec() };
        meter.read()?;
        Ok(meter)
    }

    /// # Errors
    ///
    /// When one of the processes is gone: its CPU time went with it.
    pub fn read(&self) -> Result<CpuTime, BenchError> {
        let mut sum = 0.0;
        for &pid in &self.pids {
            sum += seconds_of(&format!("/proc/{pid}/stat"))
                .map_err(|source| BenchError::Cpu { pid, source })?;
        }
        let servers = (!self.pids.is_empty()).then_some(sum);
        Ok(CpuTime { servers, client: seconds_of("/proc/self/stat").ok() })
    }
}

impl CpuTime {
    /// What was used since `earlier`.
    pub fn since(self, earlier: CpuTime) -> CpuTime {
        let difference = |now: Option<f64>, then: Option<f64>| Some(now? - then?);
        CpuTime {
            servers: difference(self.servers, earlier.servers),
            client: difference(self.client, earlier.client),
        }
    }
}

fn seconds_of(path: &str) -> io::Result<f64> {
    let stat = fs::read_to_string(path)?;
    let ticks = ticks(&stat).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, stat.clone()))?;
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

/// User and system time of the process, without its children.
fn ticks(stat: &str) -> Option<u64> {
    // The second field is the program's name in parentheses, which may itself hold spaces and
    // parentheses: count the fields from behind the last one.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_ascii_whitespace().skip(11).map(str::parse::<u64>);
    Some(times.next()?.ok()? + times.next()?.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 7 7 20 0 9 0 100";
        assert_eq!(ticks(stat), Some(300));
    }

    #[test]
    fn a_process_that_does_not_exist_is_an_error() {
        assert!(CpuMeter::new(&[u32::MAX]).is_err());
    }
}
