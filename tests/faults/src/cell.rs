//! What a run consists of: a workload, a fault, and how much of both.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How many members a cluster has if nothing is said.
pub const USUAL_MEMBERS: usize = 3;

/// What clients do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Puts, swaps and reads of single keys.
    Register,
    /// Transfers between accounts, and reads of all accounts at once.
    Txn,
    /// All kinds of writes, and watches that move from member to member.
    Watch,
    /// Leases that are renewed, left to run out, and revoked.
    Lease,
    /// The Lock service and the recipe of Go's `concurrency` package.
    Lock,
    /// Candidates and observers.
    Election,
}

/// What happens to the members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    None,
    /// SIGKILL to the leader, a follower, or all.
    Kill,
    /// SIGSTOP to the leader, a follower, or a majority.
    Pause,
    /// The leader is cut off from the others.
    PartitionLeader,
    /// A follower, of five members two of them, cut off from the others.
    PartitionMinority,
    /// The leader's packets reach nobody, or nobody's reach the leader.
    PartitionOneWay,
    /// Each member still talks with two others, of three members only one does.
    PartitionRing,
    /// A fifth of all packets between members is lost.
    Lossy,
    /// Packets of the leader, a follower, or all arrive late, some twice and some out of order.
    SlowNet,
    /// The disk of the leader or a follower makes few writes a second.
    SlowDisk,
    /// The disk of the leader or a follower has no space left.
    FullDisk,
    /// Every operation of the leader's or a follower's disk fails.
    IoError,
    /// The leader or a follower loses its power, and what it had not synced.
    PowerCut,
    /// All of them do, at one moment.
    PowerCutAll,
    /// The leader or a follower is removed, and a new member takes its place.
    Member,
    /// The wall clock of a member jumps by minutes, back and forth.
    ClockJump,
    /// A minority comes back with flipped bits in its files.
    Corruption,
    /// A member comes back so late that it must be sent a snapshot, while the history is compacted.
    Snapshot,
    /// One of those after the other, at random.
    All,
}

/// A workload under a fault: `lock:partition-leader`; with so many members: `lock:kill@5`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    pub workload: Workload,
    pub fault: Fault,
    /// As many as the command line says, if not given.
    pub members: Option<usize>,
}

impl FromStr for Cell {
    type Err = String;

    fn from_str(text: &str) -> Result<Cell, String> {
        let (workload, fault) = text.split_once(':').ok_or("a cell is WORKLOAD:FAULT[@MEMBERS]")?;
        let (fault, members) = match fault.split_once('@') {
            None => (fault, None),
            Some((fault, members)) => {
                (fault, Some(members.parse().map_err(|_| format!("{members}: how many?"))?))
            }
        };
        let workload = Workload::from_str(workload, false)?;
        Ok(Cell { workload, fault: Fault::from_str(fault, false)?, members })
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (workload, fault) = self.names();
        write!(f, "{workload}:{fault}")?;
        self.members.map_or(Ok(()), |members| write!(f, "@{members}"))
    }
}

impl Cell {
    /// What its parts are called on the command line.
    pub fn names(self) -> (String, String) {
        let name = |value: Option<clap::builder::PossibleValue>| {
            value.expect("each value has a name").get_name().to_owned()
        };
        (name(self.workload.to_possible_value()), name(self.fault.to_possible_value()))
    }

    /// A name for files.
    pub fn file_name(&self) -> String {
        self.to_string().replace([':', '@'], "-")
    }
}

impl Fault {
    /// Whether it happens to a disk, of which each member then has its own.
    pub fn needs_disks(self) -> bool {
        matches!(
            self,
            Fault::SlowDisk
                | Fault::FullDisk
                | Fault::IoError
                | Fault::PowerCut
                | Fault::PowerCutAll
                | Fault::All
        )
    }
}

impl Workload {
    /// How many acknowledged operations a second, while nothing is wrong, make a run a run. Leases
    /// mostly wait for time to pass.
    pub fn least_rate(self) -> f64 {
        match self {
            Workload::Lease => 200.0,
            _ => 300.0,
        }
    }
}

/// All that a run depends on, and what it ran with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Setup {
    pub workload: Workload,
    pub fault: Fault,
    pub seconds: u64,
    pub members: usize,
    pub seed: u64,
    pub least_rate: f64,
    /// The reads of `register` are serializable, but are held to be linearizable.
    pub treat_serializable_as_linearizable: bool,
    /// Clients make no more than so many calls a second.
    #[serde(default)]
    pub rate: Option<u32>,
    /// A long run: the members compact their history to so many revisions.
    #[serde(default)]
    pub retention: Option<u32>,
    pub binary: String,
    pub version: String,
}

impl Setup {
    pub fn cell(&self) -> Cell {
        let members = (self.members != USUAL_MEMBERS).then_some(self.members);
        Cell { workload: self.workload, fault: self.fault, members }
    }
}
