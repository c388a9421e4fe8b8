//! What each member's process uses: memory, file descriptors, disk. And the rule that a run of some
//! length, whose history is compacted, uses no more towards its end than when it was well under way.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use holdfast_client_tests::moment;
use serde::{Deserialize, Serialize};

use crate::members::{Members, Processes};

pub const RESOURCES: &str = "resources.jsonl";

/// Between two samples of a member.
const INTERVAL: Duration = Duration::from_secs(5);

/// What the median of the last quarter may be above that of the second, beside the slack.
const GROWTH_PERCENT: u64 = 25;
/// A store that holds more for a while; one more connection each way and their streams; the log
/// segments and files of the state that wait for their removal.
const MEMORY_SLACK_BYTES: u64 = 32 << 20;
const DESCRIPTORS_SLACK: u64 = 64;
const DISK_SLACK_BYTES: u64 = 128 << 20;

/// What one process used at one moment. A member that does not run has no sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    #[serde(with = "moment")]
    pub at: Instant,
    pub member: usize,
    /// Resident.
    pub memory_bytes: u64,
    pub descriptors: u64,
    /// Allocated to the files of its data directory.
    pub disk_bytes: u64,
}

/// How one quantity went in one member. Medians, `None` where the member never ran.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Course {
    pub first_quarter: Option<u64>,
    pub second_quarter: Option<u64>,
    pub last_quarter: Option<u64>,
    pub peak: u64,
}

/// How all of them went in one member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    pub member: usize,
    pub samples: usize,
    pub memory_bytes: Course,
    pub descriptors: Course,
    pub disk_bytes: Course,
}

/// Takes samples until it is dropped.
#[derive(Debug)]
pub struct Sampler {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    /// Begins `resources.jsonl` in `dir`.
    pub fn start(dir: &Path, members: &Members) -> Result<Sampler, String> {
        let path = dir.join(RESOURCES);
        let mut file = File::create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let processes = members.processes().clone();
        let directories: Vec<PathBuf> =
            (0..members.size()).map(|member| members.data_dir(member)).collect();
        let program = members.program().to_owned();
        let (stop, stopped) = mpsc::channel();
        // A thread: looking into the files of a slow disk takes as long as it takes.
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                for (member, data) in directories.iter().enumerate() {
                    let Some(sample) = sample(member, &processes, &program, data) else { continue };
                    let line = serde_json::to_string(&sample).expect("it is plain data");
                    file.write_all(format!("{line}\n").as_bytes()).expect("it can be written");
                }
            }
        });
        Ok(Sampler { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// `None` if there is no process, it ends meanwhile, or its disk cannot be read.
fn sample(member: usize, processes: &Processes, program: &Path, data: &Path) -> Option<Sample> {
    let process = PathBuf::from(format!("/proc/{}", processes.pid(member)?));
    // On its way to becoming the member it is other programs for a moment.
    if fs::read_link(process.join("exe")).ok()? != program {
        return None;
    }
    let status = fs::read_to_string(process.join("status")).ok()?;
    let resident = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = resident.split_whitespace().next()?.parse().ok()?;
    let descriptors = fs::read_dir(process.join("fd")).ok()?.count();
    Some(Sample {
        at: Instant::now(),
        member,
        memory_bytes: kib << 10,
        descriptors: u64::try_from(descriptors).expect("few"),
        disk_bytes: allocated(data).ok()?,
    })
}

fn allocated(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        bytes += match entry.metadata() {
            Ok(data) if data.is_dir() => allocated(&entry.path())?,
            // `st_blocks` counts these, whatever the blocks of the file system are.
            Ok(data) => data.blocks() * 512,
            // Files go while one looks.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => 0,
            Err(e) => return Err(e),
        };
    }
    Ok(bytes)
}

/// How the members fared between two moments.
pub fn uses(samples: &[Sample], from: Instant, until: Instant) -> Vec<Use> {
    let members = samples.iter().map(|s| s.member + 1).max().unwrap_or(0);
    let within = |s: &&Sample| (from..=until).contains(&s.at);
    let mut uses = Vec::new();
    for member in 0..members {
        let own = samples.iter().filter(|s| s.member == member).filter(within);
        let own: Vec<&Sample> = own.collect();
        let course = |quantity: fn(&Sample) -> u64| {
            let quarter = |number: u32| {
                let length = until.saturating_duration_since(from) / 4;
                let (begin, end) = (from + length * number, from + length * (number + 1));
                let inside = own.iter().filter(|s| s.at >= begin && (s.at < end || number == 3));
                median(inside.map(|s| quantity(s)).collect())
            };
            Course {
                first_quarter: quarter(0),
                second_quarter: quarter(1),
                last_quarter: quarter(3),
                peak: own.iter().map(|s| quantity(s)).max().unwrap_or(0),
            }
        };
        uses.push(Use {
            member,
            samples: own.len(),
            memory_bytes: course(|s| s.memory_bytes),
            descriptors: course(|s| s.descriptors),
            disk_bytes: course(|s| s.disk_bytes),
        });
    }
    uses
}

fn median(mut values: Vec<u64>) -> Option<u64> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

/// The rule "flat": what grew, a sentence each.
///
/// # Errors
///
/// If there are too few samples to tell.
pub fn growth(uses: &[Use], members: usize) -> Result<Vec<String>, String> {
    let mut grown = Vec::new();
    for member in 0..members {
        let own = uses.iter().find(|u| u.member == member);
        let own = own.ok_or_else(|| format!("no samples of what member {member} uses"))?;
        for (what, course, slack) in [
            ("bytes of memory", own.memory_bytes, MEMORY_SLACK_BYTES),
            ("descriptors", own.descriptors, DESCRIPTORS_SLACK),
            ("bytes on disk", own.disk_bytes, DISK_SLACK_BYTES),
        ] {
            let (Some(second), Some(last)) = (course.second_quarter, course.last_quarter) else {
                return Err(format!("a quarter without samples of what member {member} uses"));
            };
            let limit = second + second * GROWTH_PERCENT / 100 + slack;
            if last > limit {
                grown.push(format!(
                    "growth: member {member} used {second} {what} in the second quarter and {last} in \
                     the last one, more than {limit}"
                ));
            }
        }
    }
    Ok(grown)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A sample every 5 s for 1,600 s, of one member; memory as the function says.
    fn samples(memory_bytes: impl Fn(u64) -> u64) -> Vec<Sample> {
        let sample = |second| Sample {
            at: moment::at(second * 1_000_000),
            member: 0,
            memory_bytes: memory_bytes(second),
            descriptors: 40,
            disk_bytes: 100 * MIB,
        };
        (0..320).map(|n| sample(n * 5)).collect()
    }

    fn grown(samples: &[Sample]) -> Result<Vec<String>, String> {
        growth(&uses(samples, moment::at(0), moment::at(1_600_000_000)), 1)
    }

    #[test]
    fn medians_are_those_of_the_quarters() {
        let uses = uses(&samples(|s| s), moment::at(0), moment::at(1_600_000_000));
        let expected = Course {
            first_quarter: Some(200),
            second_quarter: Some(600),
            last_quarter: Some(1400),
            peak: 1595,
        };
        assert_eq!((uses[0].samples, uses[0].memory_bytes), (320, expected));
    }

    #[test]
    fn what_stays_within_a_quarter_more_and_the_slack_is_flat() {
        // Up to its level by the second quarter; one moment far above it; 25 % and 32 MiB more.
        for memory in [
            |s: u64| if s < 300 { 10 * MIB } else { 200 * MIB },
            |s: u64| if s == 1500 { 2000 * MIB } else { 200 * MIB },
            |s: u64| if s < 1000 { 200 * MIB } else { 282 * MIB },
        ] {
            assert_eq!(grown(&samples(memory)), Ok(vec![]));
        }
    }

    #[test]
    fn what_keeps_growing_is_a_violation() {
        let found = grown(&samples(|s| 100 * MIB + s * MIB / 4)).expect("enough samples");
        assert!(found.len() == 1 && found[0].starts_with("growth: member 0"), "{found:?}");
        let mut leaking = samples(|_| MIB);
        for (n, sample) in leaking.iter_mut().enumerate() {
            sample.descriptors += n as u64;
            sample.disk_bytes += n as u64 * 4 * MIB;
        }
        let found = grown(&leaking).expect("enough samples");
        assert!(found.len() == 2 && found[0].contains("descriptors"), "{found:?}");
    }

    #[test]
    fn without_samples_nothing_can_be_told() {
        assert!(grown(&[]).is_err());
        assert!(grown(&samples(|_| 1)[..200]).is_err());
    }
}
