//! Power cuts at every operation, and what may be left after them.

use std::ops::RangeInclusive;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::vfs::{Operation, Survival};

/// Each state a log has been in, so that the one found after a crash can be looked up.
struct History {
    /// One for each record: an append of three entries passes through three.
    states: Vec<Answers>,
    /// The states from here on may be found: those before were acknowledged to be over.
    acknowledged: usize,
}

impl History {
    fn new(now: Answers) -> History {
        History { states: vec![now], acknowledged: 0 }
    }

    fn now(&self) -> &Answers {
        self.states.last().unwrap()
    }

    fn pass(&mut self, change: impl FnOnce(&mut Answers)) {
        let mut next = self.now().clone();
        change(&mut next);
        self.states.push(next);
    }

    fn acknowledge(&mut self) {
        self.acknowledged = self.states.len() - 1;
    }

    fn allows(&self, found: &Answers) -> bool {
        self.states[self.acknowledged..].contains(found)
    }
}

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<LogEntry>),
    Vote(Vote),
    Committed(LogId),
    Truncate(Option<LogId>),
    Purge(LogId),
}

impl Step {
    /// A step that raft could ask for when the log is as `now` says.
    fn random(dice: &mut StdRng, now: &Answers) -> Step {
        let last = now.last;
        let (term, next) = last.map_or((1, 0), |last| (last.leader_id.term, last.index + 1));
        let pick = |dice: &mut StdRng| {
            let at = dice.random_range(0..now.entries.len());
            now.entries[at].log_id
        };
        match dice.random_range(0..20) {
            0..=1 => Step::Vote(Vote::new(dice.random_range(1..99), dice.random_range(1..4))),
            2..=4 if last.is_some() => Step::Committed(last.unwrap()),
            5..=6 if !now.entries.is_empty() => Step::Truncate(Some(pick(dice))),
            7 => Step::Truncate(now.purged),
            8..=9 if !now.entries.is_empty() => Step::Purge(pick(dice)),
            10 if dice.random_ratio(1, 4) => Step::Purge(log_id(term, next + 7)),
            _ => {
                let term = term + u64::from(dice.random_ratio(1, 3));
                let count = dice.random_range(1..4);
                let mut length = || match dice.random_range(0..10) {
                    0 => 0,
                    // Longer than a segment.
                    1 => 1500,
                    _ => dice.random_range(1..200),
                };
                Step::Append((next..next + count).map(|i| entry_of(term, i, length())).collect())
            }
        }
    }

    fn note(&self, history: &mut History) {
        match self.clone() {
            Step::Append(entries) => {
                for entry in entries {
                    history.pass(|now| {
                        now.last = Some(entry.log_id);
                        now.entries.push(entry);
                    });
                }
            }
            Step::Vote(vote) => history.pass(|now| now.vote = Some(vote)),
            Step::Committed(id) => history.pass(|now| now.committed = Some(id)),
            Step::Truncate(after) => history.pass(|now| {
                let end = after.map_or(0, |after| after.index + 1);
                now.entries.retain(|entry| entry.log_id.index < end);
                now.last = now.entries.last().map(|entry| entry.log_id).or(now.purged);
            }),
            Step::Purge(upto) => history.pass(|now| {
                now.entries.retain(|entry| entry.log_id.index > upto.index);
                now.purged = Some(upto);
                now.last = now.entries.last().map(|entry| entry.log_id).or(now.purged);
            }),
        }
    }

    /// True if the log said that it is durable.
    fn run(self, log: &LogStore) -> io::Result<bool> {
        let mut log = log.clone();
        match self {
            Step::Append(entries) => try_append(&log, entries).map(|()| true),
            Step::Vote(vote) => wait(log.save_vote(&vote)).map(|()| true),
            Step::Committed(id) => wait(log.save_committed(Some(id))).map(|()| false),
            Step::Truncate(after) => wait(log.truncate_after(after)).map(|()| false),
            Step::Purge(upto) => wait(log.purge(upto)).map(|()| false),
        }
    }
}

/// Runs random steps until the power goes or there were `steps` of them.
fn live(log: &LogStore, history: &mut History, dice: &mut StdRng, steps: usize) -> io::Result<()> {
    for _ in 0..steps {
        let step = Step::random(dice, history.now());
        step.note(history);
        if step.run(log)? {
            history.acknowledge();
        }
        assert_eq!(&wait(ask(log))?, history.now());
    }
    Ok(())
}

/// Opens what a crash left and checks it against `history`. Fails only if the power goes meanwhile.
fn reopen(vfs: &MemVfs, history: &mut History) -> io::Result<LogStore> {
    let log = open(vfs)?;
    let found = wait(ask(&log))?;
    assert!(
        history.allows(&found),
        "found {found:?}\nwhich is none of {:?}",
        &history.states[history.acknowledged..]
    );
    *history = History::new(found);
    Ok(log)
}

fn survivals(seeds: RangeInclusive<u64>) -> impl Iterator<Item = Survival> {
    [Survival::Nothing, Survival::Everything].into_iter().chain(seeds.map(Survival::Some))
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_at_any_operation() {
    let run = |cut: Option<u64>| {
        let vfs = MemVfs::default();
        if let Some(operations) = cut {
            vfs.cut_power_after(operations);
        }
        let mut history = History::new(Answers::default());
        let mut dice = StdRng::seed_from_u64(7);
        if let Ok(log) = open(&vfs) {
            let _ = live(&log, &mut history, &mut dice, 60);
        }
        (vfs, history)
    };
    let operations = run(None).0.operations();
    assert!(operations > 200);
    for cut in 0..operations {
        let (vfs, history) = run(Some(cut));
        for survival in survivals(1..=4) {
            println!("power cut at operation {cut}, {survival:?} survives");
            let mut history =
                History { states: history.states.clone(), acknowledged: history.acknowledged };
            let left = vfs.after_power_cut(survival);
            let log = reopen(&left, &mut history).unwrap();
            live(&log, &mut history, &mut StdRng::seed_from_u64(cut), 5).unwrap();
        }
    }
}

#[test]
fn a_log_survives_many_crashes_in_a_row() {
    for seed in 0..300 {
        println!("seed {seed}");
        let mut dice = StdRng::seed_from_u64(seed);
        let mut history = History::new(Answers::default());
        let mut vfs = MemVfs::default();
        for _life in 0..8 {
            if dice.random_ratio(4, 5) {
                // Often early enough to hit the recovery itself.
                let bound = if dice.random() { 12 } else { 120 };
                vfs.cut_power_after(dice.random_range(0..bound));
            }
            if dice.random_ratio(1, 4) {
                let faults = [Operation::Sync, Operation::Write, Operation::SyncDir];
                let fault = faults[dice.random_range(0..faults.len())];
                vfs.fail(fault, dice.random_range(0..20), io::ErrorKind::Other);
            }
            if let Ok(log) = reopen(&vfs, &mut history) {
                let steps = dice.random_range(0..40);
                let _ = live(&log, &mut history, &mut dice, steps);
                if dice.random() && log.close().is_ok() {
                    history.acknowledge();
                }
            }
            vfs = match dice.random_range(0..5) {
                0 => vfs.after_power_cut(Survival::Nothing),
                1..=2 => vfs.after_kill(),
                _ => vfs.after_power_cut(Survival::Some(dice.random())),
            };
        }
    }
}

#[test]
fn what_a_failed_sync_left_in_memory_only_is_made_durable_before_it_is_believed() {
    let vfs = MemVfs::default();
    let log = open(&vfs).unwrap();
    append(&log, entries(1, 0..=1));
    vfs.fail(Operation::Sync, 0, io::ErrorKind::Other);
    assert!(try_append(&log, entries(1, 2..=3)).is_err());
    let next = vfs.after_kill();
    let found = wait(ask(&open(&next).unwrap())).unwrap();
    assert_eq!(found.entries, entries(1, 0..=3));
    let left = next.after_power_cut(Survival::Nothing);
    assert_eq!(wait(ask(&open(&left).unwrap())).unwrap(), found);
}

#[test]
fn truncated_entries_do_not_come_back_behind_newer_ones() {
    for survival in survivals(1..=20) {
        let vfs = MemVfs::default();
        let mut log = open(&vfs).unwrap();
        append(&log, entries(1, 0..=30));
        wait(log.truncate_after(Some(log_id(1, 12)))).unwrap();
        append(&log, entries(2, 13..=14));
        let left = vfs.after_power_cut(survival);
        let found = wait(ask(&open(&left).unwrap())).unwrap();
        let expected = [entries(1, 0..=12), entries(2, 13..=14)].concat();
        assert_eq!(ids(&found.entries), ids(&expected));
        assert_eq!(found.entries, expected);
    }
}

#[test]
fn the_committed_index_survives_closing_without_a_later_write() {
    let vfs = MemVfs::default();
    let mut log = open(&vfs).unwrap();
    append(&log, entries(1, 0..=3));
    wait(log.save_committed(Some(log_id(1, 2)))).unwrap();
    log.close().unwrap();
    let left = vfs.after_power_cut(Survival::Nothing);
    assert_eq!(wait(ask(&open(&left).unwrap())).unwrap().committed, Some(log_id(1, 2)));
}

#[test]
fn purged_segments_go_and_what_they_said_of_vote_and_committed_stays() {
    let vfs = MemVfs::default();
    let mut log = open(&vfs).unwrap();
    let vote = Vote::new_committed(1, 3);
    wait(log.save_vote(&vote)).unwrap();
    wait(log.save_committed(Some(log_id(1, 0)))).unwrap();
    for index in 0..200 {
        append(&log, vec![entry(1, index)]);
    }
    let before = segment_paths(&vfs);
    wait(log.purge(log_id(1, 150))).unwrap();
    let after = segment_paths(&vfs);
    assert!(after.len() < before.len() / 2);
    assert!(before.ends_with(&after), "the oldest go");
    for survival in survivals(1..=5) {
        let left = vfs.after_power_cut(survival);
        let found = wait(ask(&open(&left).unwrap())).unwrap();
        assert_eq!(found.entries, entries(1, 151..=199));
        assert_eq!(found.purged, Some(log_id(1, 150)));
        assert_eq!((found.vote, found.committed), (Some(vote), Some(log_id(1, 0))));
    }
}

#[test]
fn purging_beyond_the_end_is_remembered() {
    let vfs = MemVfs::default();
    let mut log = open(&vfs).unwrap();
    append(&log, entries(1, 0..=50));
    wait(log.purge(log_id(3, 70))).unwrap();
    append(&log, entries(3, 71..=72));
    let left = vfs.after_power_cut(Survival::Nothing);
    let found = wait(ask(&open(&left).unwrap())).unwrap();
    assert_eq!(found.entries, entries(3, 71..=72));
    assert_eq!(found.purged, Some(log_id(3, 70)));
}
