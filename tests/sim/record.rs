//! What happened in a run: each call with what came back, and a trace whose hash tells two runs apart.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// What a client asked for. Values are unique: no two calls write the same.
#[derive(Debug, Clone)]
#[allow(dead_code, reason = "some of it is for the trace alone")]
pub enum Asked {
    Put {
        key: String,
        value: String,
    },
    /// Puts `value` at both keys, in one transaction.
    PutBoth {
        keys: [String; 2],
        value: String,
    },
    /// Puts `value` if the key's mod revision is still `if_at`.
    Swap {
        key: String,
        value: String,
        if_at: i64,
    },
    Read {
        key: String,
        serializable: bool,
    },
    Lock {
        name: String,
        lease: i64,
    },
    /// A put that counts only while `owner` is the key of `token`.
    Guarded {
        key: String,
        value: String,
        owner: String,
        token: i64,
    },
    Unlock {
        key: String,
    },
    Grant {
        ttl_seconds: i64,
    },
    KeepAlive {
        lease: i64,
    },
    Compact {
        revision: i64,
    },
}

/// What came back.
#[derive(Debug, Clone)]
#[allow(dead_code, reason = "some of it is for the trace alone")]
pub enum Answered {
    /// Of a write: it stands at the revision.
    Done,
    /// The compare did not hold.
    Refused,
    /// `mod_revision` is zero where there is no such key.
    Found {
        mod_revision: i64,
        value: String,
    },
    Locked {
        key: String,
    },
    Lease {
        id: i64,
        ttl_seconds: i64,
    },
    /// An error or no answer in time: a write may have happened or not.
    Unknown(String),
}

#[derive(Debug, Clone)]
pub struct Call {
    pub client: String,
    pub member: usize,
    pub asked: Asked,
    pub answered: Answered,
    /// Of the header; zero where nothing came back.
    pub revision: i64,
    pub began: Duration,
    pub ended: Duration,
}

/// A change of a key, as a watch tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub revision: i64,
    pub key: String,
    pub value: String,
    pub deleted: bool,
    pub create_revision: i64,
    pub version: i64,
    pub lease: i64,
}

/// The history of the store, and when the one who watches learned of each revision.
#[derive(Debug, Default)]
pub struct Witnessed {
    pub changes: Vec<Change>,
    pub seen_at: BTreeMap<i64, Duration>,
}

impl Witnessed {
    pub fn revision(&self) -> i64 {
        self.changes.last().map_or(1, |change| change.revision)
    }
}

/// Shared by all that is simulated. One thread runs it all.
#[derive(Default)]
pub struct Record {
    pub calls: RefCell<Vec<Call>>,
    pub witnessed: RefCell<Witnessed>,
    /// The member that leads, as far as anybody knows.
    pub leader: Cell<Option<usize>>,
    /// Set when the workloads are to end.
    pub enough: Cell<bool>,
    /// The revision to which all have to come in the end.
    pub last_revision: Cell<Option<i64>>,
    pub violations: RefCell<Vec<String>>,
    trace: RefCell<String>,
}

impl Record {
    pub fn note(&self, text: &str) {
        let at = turmoil::sim_elapsed().unwrap_or_default();
        self.note_at(at, text);
    }

    pub fn note_at(&self, at: Duration, text: &str) {
        writeln!(self.trace.borrow_mut(), "{:>10.3} {text}", at.as_secs_f64() * 1e3)
            .expect("a string takes all");
    }

    /// Notes a call that has begun; its place, for [`Record::end`]. One that never ends, as where the
    /// run ends first, is one of unknown outcome.
    pub fn begin(&self, call: Call) -> usize {
        let mut calls = self.calls.borrow_mut();
        calls.push(call);
        calls.len() - 1
    }

    pub fn end(&self, place: usize, call: Call) {
        let Call { client, member, asked, answered, revision, began, ended } = &call;
        let took = ended.saturating_sub(*began).as_millis();
        self.note(&format!("{client} m{member} {asked:?} -> {answered:?} @{revision} {took} ms"));
        self.calls.borrow_mut()[place] = call;
    }

    /// Notes that something is not as it must be.
    pub fn violation(&self, text: String) {
        self.note(&format!("VIOLATION {text}"));
        self.violations.borrow_mut().push(text);
    }

    pub fn trace(&self) -> String {
        self.trace.borrow().clone()
    }

    /// FNV-1a of the trace.
    pub fn trace_hash(&self) -> u64 {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        self.trace.borrow().bytes().fold(0xcbf2_9ce4_8422_2325, step)
    }
}
