//! The verdict on a run: a function of its record.

use std::fmt;
use std::time::{Duration, Instant};

use holdfast_client_tests::watchers::Told as Watched;
use holdfast_client_tests::{history, holding, load};
use serde::{Deserialize, Serialize};

use crate::cell::{Fault, Setup, Workload};
use crate::record::{Deed, Line, Outcome, What, faults, millis};
use crate::resources::{Sample, Use, growth, uses};
use crate::witness::{Told, held, written};
use crate::workloads::{lease, observing, txn};

/// Twice the election timeout, which is one second, and another.
const LIMITS: holding::Limits =
    holding::Limits { wake_up: Duration::from_secs(3), clean_up: Duration::from_secs(3) };

/// The promise is two seconds; the rest is for a machine that is busy with the run itself.
const CAUGHT_UP_MS: u64 = 8000;

/// With fewer faults than this a run of at least [`LONG_SECONDS`] has not tested what it is for.
const LEAST_FAULTS: usize = 2;
const LONG_SECONDS: u64 = 30;

/// A run of this length that compacts its history must not grow.
const FLAT_SECONDS: u64 = 20 * 60;

/// In a run that compacts its history, which is made of hundreds of faults, one in so many may fail to
/// take hold.
const ONE_IN: usize = 20;

/// A kind of violation is listed with this many examples.
const EXAMPLES: usize = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Everything that was promised was kept.
    Passed,
    /// Something that was promised was not kept.
    Violated,
    /// It was no test: too little happened, or the fault did not take hold.
    Invalid,
}

impl Verdict {
    /// The exit code; 2 is that of a wrong command line, 4 of a run that could not be set up.
    pub fn code(self) -> u8 {
        match self {
            Verdict::Passed => 0,
            Verdict::Violated => 1,
            Verdict::Invalid => 3,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Passed => "PASSED",
            Verdict::Violated => "VIOLATED",
            Verdict::Invalid => "INVALID",
        })
    }
}

/// The verdict and its reasons.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    pub verdict: Verdict,
    pub cell: String,
    pub seed: u64,
    /// Promises that were not kept.
    pub violations: Vec<String>,
    /// Why it was no test.
    pub invalid: Vec<String>,
    /// What the run was.
    pub facts: Vec<String>,
    /// Acknowledged operations a second before the first fault.
    pub rate: f64,
    pub acknowledged: usize,
    pub faults: usize,
    /// What each member used, from the end of the warm-up on.
    #[serde(default)]
    pub resources: Vec<Use>,
}

/// Judges a record.
///
/// # Errors
///
/// If it is no record of a run.
pub fn judge(lines: &[Line], deeds: &[Deed], samples: &[Sample]) -> Result<Judgement, String> {
    let setup = deeds.iter().find_map(|d| match &d.what {
        What::Setup(setup) => Some(setup.clone()),
        _ => None,
    });
    let setup = setup.ok_or("the record says nothing of what was run")?;
    let mut judge = Judge {
        setup,
        lines,
        deeds,
        violations: Vec::new(),
        invalid: Vec::new(),
        facts: Vec::new(),
        compared: false,
    };
    let (rate, acknowledged) = judge.load();
    let faults = judge.nemesis();
    let resources = judge.resources(samples);
    judge.clients();
    judge.workload();
    let Judge { setup, mut violations, invalid, facts, .. } = judge;
    let more = violations.len().saturating_sub(EXAMPLES);
    if more > 0 {
        violations.truncate(EXAMPLES);
        violations.push(format!("and {more} more"));
    }
    let verdict = match (violations.is_empty(), invalid.is_empty()) {
        (false, _) => Verdict::Violated,
        (true, false) => Verdict::Invalid,
        (true, true) => Verdict::Passed,
    };
    let (cell, seed) = (setup.cell().to_string(), setup.seed);
    Ok(Judgement {
        verdict,
        cell,
        seed,
        violations,
        invalid,
        facts,
        rate,
        acknowledged,
        faults,
        resources,
    })
}

struct Judge<'a> {
    setup: Setup,
    lines: &'a [Line],
    deeds: &'a [Deed],
    violations: Vec<String>,
    invalid: Vec<String>,
    facts: Vec<String>,
    /// Whether the hashes of two members were compared at all.
    compared: bool,
}

impl Judge<'_> {
    /// Whether there was enough to do: the rate before the first fault, and all acknowledged.
    fn load(&mut self) -> (f64, usize) {
        let quiet = self.deeds.iter().find(|d| matches!(d.what, What::Quiet)).map(|d| d.at);
        let until = self
            .deeds
            .iter()
            .find(|d| matches!(d.what, What::Begins { .. } | What::Over | What::Impossible { .. }));
        let (mut acknowledged, mut early) = (0, 0);
        for span in self.lines.iter().filter_map(Line::span) {
            if span.outcome == Outcome::Unknown {
                continue;
            }
            acknowledged += 1;
            if let (Some(from), Some(until)) = (quiet, until) {
                early += usize::from((from..until.at).contains(&span.ended));
            }
        }
        let time = match (quiet, until) {
            (Some(from), Some(until)) => until.at.saturating_duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let rate = if time > 0.0 { early as f64 / time } else { 0.0 };
        let least = self.setup.least_rate;
        if rate < least {
            self.invalid.push(format!(
                "{rate:.0} operations a second before the first fault, at least {least:.0} are asked for"
            ));
        }
        (rate, acknowledged)
    }

    /// Whether every fault took hold, and the cluster served as it must.
    fn nemesis(&mut self) -> usize {
        let mut missed = Vec::new();
        for deed in self.deeds {
            match &deed.what {
                What::Impossible { why } => missed.push(why.clone()),
                What::DidNotTakeHold { why } => {
                    missed.push(format!("a fault did not take hold: {why}"));
                }
                What::Meanwhile { serving, should, limit_ms } if serving < should => {
                    self.violations.push(format!(
                        "{serving} members served {limit_ms} ms into a fault at {}, not {should}",
                        seconds(deed.at)
                    ));
                }
                What::NotServing { members, limit_ms } => self.violations.push(format!(
                    "members {members:?} do not serve {limit_ms} ms after a fault at {}",
                    seconds(deed.at)
                )),
                What::Hashes { revision, hashes } => {
                    let told: Vec<(u32, i64)> = hashes.iter().copied().flatten().collect();
                    self.compared |= told.len() > 1;
                    // Where compaction stands may differ for a moment, and then so do the hashes.
                    let apart = |a: &(u32, i64), b: &(u32, i64)| a.1 == b.1 && a.0 != b.0;
                    if told.iter().any(|a| told.iter().any(|b| apart(a, b))) {
                        self.violations
                            .push(format!("members differ at revision {revision}: {hashes:?}"));
                    }
                }
                _ => {}
            }
        }
        let count = self.deeds.iter().filter(|d| matches!(d.what, What::TookHold { .. })).count();
        if self.setup.retention.is_some() && missed.len() * ONE_IN <= count {
            self.facts.extend(missed);
        } else {
            self.invalid.extend(missed);
        }
        let began = self.deeds.iter().find(|d| matches!(d.what, What::Begins { .. }));
        let over = self.deeds.iter().find(|d| matches!(d.what, What::Over));
        if let (Some(began), Some(over)) = (began, over) {
            let hours = over.at.saturating_duration_since(began.at).as_secs_f64() / 3600.0;
            self.facts.push(format!("{count} faults, {:.0} an hour", count as f64 / hours));
        }
        let least = match (self.setup.fault, self.setup.seconds >= LONG_SECONDS) {
            (Fault::None, _) => 0,
            (Fault::Snapshot, _) => 1,
            (_, true) => LEAST_FAULTS,
            (_, false) => 1,
        };
        if count < least {
            self.invalid.push(format!("{count} faults took hold, at least {least} are asked for"));
        }
        if !self.compared {
            self.invalid.push("no two members' hashes were compared".to_owned());
        }
        if !self.deeds.iter().any(|d| matches!(d.what, What::Over)) {
            self.invalid.push("the run did not come to its end".to_owned());
        }
        count
    }

    /// What the members used, and whether it was flat where it has to be.
    fn resources(&mut self, samples: &[Sample]) -> Vec<Use> {
        let at = |wanted: fn(&What) -> bool| self.deeds.iter().find(|d| wanted(&d.what));
        let from = at(|what| matches!(what, What::Quiet)).map(|d| d.at);
        let until = at(|what| matches!(what, What::Over)).map(|d| d.at);
        let (Some(from), Some(until)) = (from, until) else { return Vec::new() };
        let uses = uses(samples, from, until);
        if self.setup.retention.is_some() && self.setup.seconds >= FLAT_SECONDS {
            match growth(&uses, self.setup.members) {
                Ok(grown) => self.violations.extend(grown),
                Err(why) => self.invalid.push(why),
            }
        }
        uses
    }

    fn clients(&mut self) {
        for line in self.lines {
            match line {
                Line::Failed { what } => self.violations.push(what.clone()),
                Line::Differs { member, told } => self.violations.push(format!(
                    "members tell different histories: member {member} at {}: {:?}",
                    told.revision, told.changes
                )),
                _ => {}
            }
        }
    }

    fn told(&self) -> Vec<&Told> {
        self.lines.iter().filter_map(Line::told).collect()
    }

    fn workload(&mut self) {
        match self.setup.workload {
            Workload::Register => self.register(),
            Workload::Txn => self.txn(),
            Workload::Watch => self.watch(),
            Workload::Lease => self.lease(),
            Workload::Lock | Workload::Election => self.hold(),
        }
    }

    fn register(&mut self) {
        let operation = |l: &Line| match l {
            Line::Operation { operation, .. } => Some(operation.clone()),
            _ => None,
        };
        let operations: Vec<_> = self.lines.iter().filter_map(operation).collect();
        let checked = written(&self.told(), load::PREFIX).and_then(|history| {
            let summary = history::check(&operations, &history)?;
            load::check_counters(&operations, &history)?;
            Ok(summary)
        });
        match checked {
            Ok(summary) => self.facts.push(format!("{summary:?}")),
            Err(what) => self.violations.push(what),
        }
    }

    fn txn(&mut self) {
        let call = |l: &Line| if let Line::Txn(call) = l { Some(call.clone()) } else { None };
        let calls: Vec<txn::Call> = self.lines.iter().filter_map(call).collect();
        match txn::check(&calls, &self.told()) {
            Ok(summary) => self.facts.push(format!("{summary:?}")),
            Err(what) => self.violations.push(what),
        }
    }

    fn watch(&mut self) {
        let mut told = Watched::default();
        let mut ended = false;
        for line in self.lines {
            match line {
                Line::Watched { witness: true, record } => told.witnesses.push(record.clone()),
                Line::Watched { witness: false, record } => told.readers.push(record.clone()),
                Line::Acknowledged { revision, key, value } => {
                    let (key, value) = (key.clone().into(), value.clone().into());
                    told.acknowledged.push((*revision, key, value));
                }
                Line::Issued { value } => {
                    told.issued.insert(value.clone().into());
                }
                Line::End { revision, compacted, caught_up_ms } => {
                    ended = true;
                    (told.last, told.compacted) = (*revision, *compacted);
                    if *caught_up_ms > CAUGHT_UP_MS {
                        let what = format!("the last watch caught up after {caught_up_ms} ms");
                        self.violations.push(what);
                    }
                }
                _ => {}
            }
        }
        if !ended {
            self.invalid.push("the watches did not come to an end".to_owned());
            return;
        }
        match told.check() {
            Ok(summary) => self.facts.push(format!("{summary:?}, up to {}", told.last)),
            Err(what) => self.violations.push(what),
        }
    }

    fn lease(&mut self) {
        let call = |l: &Line| if let Line::Lease(call) = l { Some(call.clone()) } else { None };
        let calls: Vec<lease::Call> = self.lines.iter().filter_map(call).collect();
        let mut disturbed: Vec<(Instant, Instant)> =
            faults(self.deeds).into_iter().map(|(_, from, to)| (from, to)).collect();
        let elected = self.deeds.iter().filter(|d| matches!(d.what, What::Leads { .. }));
        disturbed.extend(elected.map(|d| (d.at, d.at)));
        let over = self.deeds.last().expect("there is a setup").at;
        match lease::check(&calls, &self.told(), &disturbed, over) {
            Ok(summary) => {
                if summary.ran_out < 10 {
                    self.invalid.push(format!("{} leases ran out", summary.ran_out));
                }
                self.facts.push(format!("{summary:?}"));
            }
            Err(found) => self.violations.extend(found),
        }
    }

    fn hold(&mut self) {
        let call = |l: &Line| if let Line::Hold(call) = l { Some(call.clone()) } else { None };
        let calls: Vec<holding::Call> = self.lines.iter().filter_map(call).collect();
        let faults = faults(self.deeds).into_iter().map(|(_, from, to)| (from, to)).collect();
        let changes = held(&self.told());
        let seen = |l: &Line| if let Line::Observed(seen) = l { Some(seen.clone()) } else { None };
        let seen: Vec<_> = self.lines.iter().filter_map(seen).collect();
        self.violations.extend(observing::check(&seen, &changes));
        let history = holding::History { changes, calls, faults, limits: LIMITS };
        let (summary, broken) = history.check();
        self.violations.extend(broken.iter().map(ToString::to_string));
        if summary.waited < 20 {
            self.invalid.push(format!("only {} grants waited", summary.waited));
        }
        if self.setup.workload == Workload::Election {
            self.facts.push(format!("{} sights of leaders", seen.len()));
            if seen.len() < 20 {
                self.invalid.push(format!("observers were told {} times", seen.len()));
            }
        }
        if let Some(longest) = summary.wake_ups.iter().max() {
            let longest = millis(*longest);
            self.facts.push(format!("longest from release to grant: {longest} ms, without faults"));
        }
        let counts = holding::Summary { wake_ups: Vec::new(), ..summary };
        self.facts.push(format!("{counts:?}"));
    }
}

fn seconds(at: Instant) -> String {
    format!("{:.1} s", holdfast_client_tests::moment::micros(at) as f64 / 1e6)
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
