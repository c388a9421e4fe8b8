//! Random operations, answered by Holdfast as by etcd.
//!
//! ```text
//! generate    a seed becomes a sequence of operations     operation, show
//! pair        does them on both clusters                  side: one cluster; watches: the streams
//! answer      what of an answer must be the same         duplicates: what etcd is not asked
//! shrink      makes a failing sequence short
//! ```
//!
//! Operations are made one at a time, each at a random one of three members, so every answer is
//! determined and every field of it is compared, except where [`answer`] names the reason. After
//! each round the leases, the whole store at every revision, and the whole history must be equal;
//! then both clusters are emptied for the next.

mod answer;
mod duplicates;
mod generate;
mod operation;
mod pair;
mod show;
mod shrink;
mod side;
mod watches;

use std::fmt::Write;
use std::str::FromStr;

use rand::TryRngCore;
use rand::rngs::OsRng;

use crate::cluster::Program;
use generate::operations;
use pair::{Pair, Stopped};
use shrink::{Bench, Failing, no_answer};
use watches::{Different, Trouble};

/// Replays rounds from this seed on; each round's is one more than the last one's.
const SEED: &str = "HOLDFAST_DIFFERENTIAL_SEED";

/// How many operations to do in all.
const OPS: &str = "HOLDFAST_DIFFERENTIAL_OPS";

const DEFAULT_OPS: usize = 10_000;

/// Half of the operations come from here, always the same, half from a fresh seed.
const FIXED_SEED: u64 = 1;

/// After so many operations both clusters are compared as a whole and begin anew.
const ROUND_OPS: usize = 250;

/// How often in one test a round may be done again because a member gave no answer that can be
/// compared: a leader changed, on a machine that was held up.
const MOST_INTERRUPTIONS: usize = 3;

/// How many operations go by between two lines about how far the test has come.
const TELL_EVERY: usize = 10_000;

/// How much of two answers is shown in front of what differs, and of that.
const CONTEXT_LINES: usize = 12;
const MOST_LINES: usize = 40;
const MOST_CHARACTERS: usize = 300;

#[tokio::test]
async fn random_operations_get_the_answers_that_etcd_gives() {
    if Program::Etcd.path().is_none() {
        println!("skipped: ETCD names no etcd to compare with");
        return;
    }
    let ops = from_environment(OPS).unwrap_or(DEFAULT_OPS);
    let runs = match from_environment(SEED) {
        Some(seed) => vec![(seed, ops)],
        None => {
            let fresh = u64::from(OsRng.try_next_u32().expect("the system has random numbers"));
            vec![(FIXED_SEED, ops / 2), (fresh, ops - ops / 2)]
        }
    };
    for (seed, ops) in runs {
        println!("{ops} operations, {SEED}={seed}");
        Run { seed, ops }.check().await;
    }
}

fn from_environment<T: FromStr>(variable: &str) -> Option<T> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number that fits")))
}

/// Rounds one after the other on the same clusters.
struct Run {
    seed: u64,
    ops: usize,
}

impl Run {
    async fn check(&self) {
        let mut pair = Pair::start().await;
        let (mut done, mut seed, mut interruptions) = (0, self.seed, 0);
        let mut is_empty = true;
        while done < self.ops {
            let round = operations(seed, ROUND_OPS.min(self.ops - done));
            let outcome = match is_empty {
                true => pair.run(&round).await,
                false => match pair.reset().await {
                    Ok(()) => pair.run(&round).await,
                    stopped => stopped,
                },
            };
            is_empty = false;
            match outcome {
                Ok(()) => {
                    let before = done;
                    (done, seed) = (done + round.len(), seed.wrapping_add(1));
                    if done / TELL_EVERY > before / TELL_EVERY {
                        println!("{done} of {} operations", self.ops);
                    }
                }
                Err(Stopped { operations: shown, trouble }) => {
                    let (difference, wants_answers) = match trouble {
                        Trouble::Different(difference) => (difference, false),
                        Trouble::Interrupted(interrupted) => {
                            println!("interrupted in the round of seed {seed}: {interrupted}");
                            interruptions += 1;
                            if interruptions <= MOST_INTERRUPTIONS {
                                pair = Pair::start().await;
                                is_empty = true;
                                continue;
                            }
                            (no_answer(&interrupted), true)
                        }
                    };
                    println!("a difference in the round of seed {seed}, to be made shorter");
                    let long = format!("{SEED}={} {OPS}={}", self.seed, done + round.len());
                    let found = Failing { operations: round, shown, difference };
                    panic!("{}", report(found, pair, wants_answers, seed, &long).await);
                }
            }
        }
    }
}

/// The shortest form of a round that showed a difference, and how to see it again: with the seed of
/// the round, or, when it takes what the rounds before have left in these clusters, as in `long`.
async fn report(found: Failing, pair: Pair, wants_answers: bool, seed: u64, long: &str) -> String {
    let round = &found.operations;
    let mut replay = format!("{SEED}={seed} {OPS}={}", round.len());
    let mut bench = Bench::new(None).wants_answers(wants_answers);
    let again = match bench.try_out(round).await {
        Some(again) => {
            if bench.try_out(round).await.is_none() {
                bench = bench.always_fresh();
            }
            Some(again)
        }
        None => {
            long.clone_into(&mut replay);
            bench = Bench::new(Some(pair)).wants_answers(wants_answers);
            bench.try_out(round).await
        }
    };
    let mut text = String::new();
    let shortest = match again {
        Some(again) => {
            let shortest = bench.shrink(again).await;
            writeln!(text, "Holdfast differs from etcd; found shorter in {} tries:", bench.tries)
                .expect("a string takes all");
            shortest
        }
        None => {
            text.push_str("Holdfast differed from etcd once, and not when tried again:\n");
            found
        }
    };
    text.push('\n');
    for (nth, line) in (1..).zip(&shortest.shown) {
        writeln!(text, "{nth:>4}  {line}").expect("a string takes all");
    }
    text.push_str(&described(&shortest.difference));
    write!(text, "\nto see it again: {replay}\n").expect("a string takes all");
    text
}

/// The lines of the two answers from the first that differs to the last.
fn described(difference: &Different) -> String {
    let etcd: Vec<&str> = difference.etcd.lines().collect();
    let holdfast: Vec<&str> = difference.holdfast.lines().collect();
    let before = etcd.iter().zip(&holdfast).take_while(|(a, b)| a == b).count();
    let ends = etcd[before..].iter().rev().zip(holdfast[before..].iter().rev());
    let after = ends.take_while(|(a, b)| a == b).count();
    let what: String = difference.what.chars().take(MOST_CHARACTERS).collect();
    let mut text = format!("\ndifferent: {what}\n");
    for line in &etcd[before.saturating_sub(CONTEXT_LINES)..before] {
        writeln!(text, "             {line}").expect("a string takes all");
    }
    for (name, lines) in [("etcd", &etcd), ("holdfast", &holdfast)] {
        let own = &lines[before..lines.len() - after];
        for line in own.iter().take(MOST_LINES) {
            writeln!(text, "  {name:>9}: {line}").expect("a string takes all");
        }
        if own.len() > MOST_LINES {
            writeln!(text, "  {name:>9}: ... {} lines", own.len()).expect("a string takes all");
        }
    }
    text
}

#[test]
fn a_difference_is_described_by_the_lines_that_differ() {
    let difference = Different {
        what: "get".to_owned(),
        etcd: "a\nb\nc\nd".to_owned(),
        holdfast: "a\nx\nd".to_owned(),
    };
    let expected =
        "\ndifferent: get\n             a\n       etcd: b\n       etcd: c\n   holdfast: x\n";
    assert_eq!(described(&difference), expected);
}
