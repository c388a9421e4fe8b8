//! What a run leaves behind: `history.jsonl` and `nemesis.jsonl`, a value a line.
//!
//! The first holds what clients asked and were told, and the witness; the second what was done to the
//! members and what became of it. The verdict is a function of these two and nothing else. Times are
//! microseconds since the run began.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use holdfast_client_tests::watching::Record;
use holdfast_client_tests::{history, holding, moment};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cell::{Fault, Setup};
use crate::witness::Told;
use crate::workloads::{lease, observing, txn};

pub const HISTORY: &str = "history.jsonl";
pub const NEMESIS: &str = "nemesis.jsonl";

/// One line of the history.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// A call of `register`.
    Operation { member: usize, operation: history::Operation },
    /// A call of `txn`.
    Txn(txn::Call),
    /// A call of `lease`.
    Lease(lease::Call),
    /// A call of `lock` or `election`.
    Hold(holding::Call),
    /// What an observer of an election was told.
    Observed(observing::Seen),
    /// One revision as the witnesses of all members tell it.
    Revision(Told),
    /// One revision as this member tells it, which another does not tell so.
    Differs { member: usize, told: Told },
    /// What one watch was told, and whether it is the witness of `watch`.
    Watched { witness: bool, record: Record },
    /// A put of `watch` that was acknowledged.
    Acknowledged { revision: i64, key: String, value: String },
    /// A value that `watch` tried to write.
    Issued { value: String },
    /// One turn of a writer of `watch`.
    Wrote(Span),
    /// The revision that nothing follows in `watch`, and how soon all watches had seen it.
    End { revision: i64, compacted: i64, caught_up_ms: u64 },
    /// A client was told what it cannot go on with, or waited in vain for what had to come.
    Failed { what: String },
}

/// When a call was made, and how it ended.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Span {
    pub member: Option<usize>,
    #[serde(with = "moment")]
    pub began: Instant,
    #[serde(with = "moment")]
    pub ended: Instant,
    pub outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Done,
    Refused,
    Unknown,
}

impl Line {
    /// What the witness tells of one revision.
    pub fn told(&self) -> Option<&Told> {
        if let Line::Revision(told) = self { Some(told) } else { None }
    }

    /// The call that this line is about.
    pub fn span(&self) -> Option<Span> {
        let span = |member, began: Instant, ended: Instant, outcome| {
            Some(Span { member, began, ended, outcome })
        };
        match self {
            Line::Operation { member, operation: o } => {
                let outcome = match o.answered {
                    history::Answered::Unknown => Outcome::Unknown,
                    history::Answered::Refused { .. } => Outcome::Refused,
                    _ => Outcome::Done,
                };
                span(Some(*member), o.began, o.ended, outcome)
            }
            Line::Txn(call) => span(Some(call.member), call.began, call.ended, call.outcome()),
            Line::Lease(call) => span(Some(call.member), call.began, call.ended, call.outcome()),
            Line::Hold(call) => {
                let outcome = match call.answered {
                    holding::Answered::Failed => Outcome::Unknown,
                    holding::Answered::Refused { .. } | holding::Answered::GivenUp => {
                        Outcome::Refused
                    }
                    _ => Outcome::Done,
                };
                span(None, call.began, call.ended, outcome)
            }
            Line::Wrote(span) => Some(*span),
            _ => None,
        }
    }
}

/// One line of what was done to the members.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Deed {
    #[serde(with = "moment")]
    pub at: Instant,
    pub what: What,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// The first line.
    Setup(Setup),
    /// From here to the first fault nothing is wrong.
    Quiet,
    /// Why this fault cannot be had with this program or on this machine.
    Impossible {
        why: String,
    },
    /// A fault is about to be there: all limits count from its end.
    Begins {
        fault: Fault,
        leader: usize,
    },
    /// It was done to these.
    Began {
        targets: Vec<usize>,
        how: String,
    },
    /// What shows that the fault is there.
    TookHold {
        by: String,
    },
    DidNotTakeHold {
        why: String,
    },
    /// This many of the members that should serve meanwhile do, and how many should.
    Meanwhile {
        serving: usize,
        should: usize,
        limit_ms: u64,
    },
    Healed {
        how: String,
    },
    /// All members serve again.
    Serving,
    /// These do not, though they had this much time.
    NotServing {
        members: Vec<usize>,
        limit_ms: u64,
    },
    /// Whom a member takes for the leader, when that changes.
    Leads {
        by: usize,
        leader: Option<usize>,
        term: u64,
    },
    /// The hash of the whole store at a revision, from each member: `None` for no answer.
    Hashes {
        revision: i64,
        hashes: Vec<Option<(u32, i64)>>,
    },
    /// Nothing more is done; clients end.
    Over,
}

/// The deeds, written as they are done.
pub struct Deeds {
    file: Mutex<File>,
}

impl Deeds {
    pub fn create(dir: &Path) -> Result<Deeds, String> {
        let path = dir.join(NEMESIS);
        let file = File::create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Deeds { file: Mutex::new(file) })
    }

    pub fn note(&self, what: What) {
        let deed = Deed { at: Instant::now(), what };
        let mut line = serde_json::to_string(&deed).expect("it is plain data");
        line.push('\n');
        let mut file = self.file.lock().expect("noting does not panic");
        file.write_all(line.as_bytes()).expect("the record can be written");
    }
}

/// Writes a value a line.
pub fn write<T: Serialize>(path: &Path, values: &[T]) -> Result<(), String> {
    let io = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut file = BufWriter::new(File::create(path).map_err(io)?);
    for value in values {
        serde_json::to_writer(&mut file, value).map_err(|e| io(e.into()))?;
        file.write_all(b"\n").map_err(io)?;
    }
    file.flush().map_err(io)
}

/// Reads what [`write`] wrote.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, String> {
    let complaint = |e: String| format!("{}: {e}", path.display());
    let file = File::open(path).map_err(|e| complaint(e.to_string()))?;
    let line = |(n, line): (usize, std::io::Result<String>)| {
        let line = line.map_err(|e| complaint(e.to_string()))?;
        serde_json::from_str(&line).map_err(|e| complaint(format!("line {}: {e}", n + 1)))
    };
    BufReader::new(file).lines().enumerate().map(line).collect()
}

/// From the beginning of a fault to when all served again, for each of them.
pub fn faults(deeds: &[Deed]) -> Vec<(Fault, Instant, Instant)> {
    let mut faults = Vec::new();
    let mut open: Option<(Fault, Instant)> = None;
    for deed in deeds {
        match &deed.what {
            What::Begins { fault, .. } => open = Some((*fault, deed.at)),
            What::Serving | What::NotServing { .. } | What::Over => {
                if let Some((fault, began)) = open.take() {
                    faults.push((fault, began, deed.at));
                }
            }
            _ => {}
        }
    }
    if let (Some((fault, began)), Some(last)) = (open, deeds.last()) {
        faults.push((fault, began, last.at));
    }
    faults
}

/// A duration in whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).expect("no run is that long")
}
