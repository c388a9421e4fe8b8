//! Whole clusters in a simulated world: the seed decides the network, the disks, the clocks, who
//! crashes when, and what clients do. The same seed gives the same run, to the last message.
//!
//! One process runs one seed: this program starts itself again for each (see `determinism.rs`).
//!
//! ```text
//! HOLDFAST_SIM_SEEDS=N   runs N seeds, and those of the file `corpus`   [default: 6]
//! HOLDFAST_SIM_FIRST=N   the first of them                             [default: 1]
//! HOLDFAST_SIM_SEED=N    runs this one and prints its trace
//! ```

mod client;
mod cluster;
mod determinism;
mod faults;
mod invariants;
mod member;
mod record;
mod workloads;

use std::env;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::thread;

const CHILD: &str = "HOLDFAST_SIM_CHILD";
/// Seeds that have found something, one a line, each with what it was.
const CORPUS: &str = include_str!("corpus");
/// Every so many-th seed runs twice, and must do the same twice.
const TWICE: u64 = 20;

fn main() -> ExitCode {
    if let Some(seed) = number(CHILD) {
        return run_one(seed, false);
    }
    if let Some(seed) = number("HOLDFAST_SIM_SEED") {
        return run_one(seed, true);
    }
    if !is_asked_for(env::args().skip(1)) {
        return ExitCode::SUCCESS;
    }
    let first = number("HOLDFAST_SIM_FIRST").unwrap_or(1);
    let count = number("HOLDFAST_SIM_SEEDS").unwrap_or(6);
    let known = CORPUS.lines().filter(|line| !line.starts_with('#'));
    let known = known.filter_map(|line| line.split_whitespace().next());
    let known = known.map(|seed| seed.parse().expect("a line of the corpus begins with a seed"));
    let seeds: Vec<u64> = known.chain(first..first + count).collect();
    let failed = run_all(&seeds);
    println!("{} seeds, {} failed: {failed:?}", seeds.len(), failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether the filter of `cargo test FILTER` is for this, if there is one.
fn is_asked_for(arguments: impl Iterator<Item = String>) -> bool {
    let mut filters = arguments.filter(|a| a.starts_with(|c: char| c.is_alphabetic()));
    filters.next().is_none_or(|filter| "simulation".contains(&filter))
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// Runs `seed` in this process.
fn run_one(seed: u64, tell: bool) -> ExitCode {
    determinism::begin(seed);
    if let Ok(filter) = env::var("HOLDFAST_SIM_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).without_time().init();
    }
    let outcome = cluster::run(seed);
    if tell {
        print!("{}", outcome.record.trace());
    }
    println!("seed {seed} trace {:016x}", outcome.record.trace_hash());
    for violation in &outcome.violations {
        println!("seed {seed}: {violation}");
    }
    // Without taking the simulation apart: hosts that are dropped outside of it cannot look around.
    std::process::exit(i32::from(!outcome.violations.is_empty()));
}

/// Runs each in a process of its own, as many at a time as there are processors. Those that failed.
#[allow(clippy::disallowed_methods, reason = "the threads only wait for processes")]
fn run_all(seeds: &[u64]) -> Vec<u64> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let waiting = Mutex::new(seeds.iter().copied());
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = waiting.lock().expect("nobody panics with it").next();
                    let Some(seed) = seed else { return };
                    if !passes(seed) {
                        failed.lock().expect("nobody panics with it").push(seed);
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().expect("nobody panicked with it");
    failed.sort_unstable();
    failed
}

fn passes(seed: u64) -> bool {
    let run = || {
        let program = env::current_exe().expect("this program has a path");
        let child = Command::new(program).env(CHILD, seed.to_string()).output();
        child.expect("this program can be run")
    };
    let first = run();
    let text = String::from_utf8_lossy(&first.stdout);
    if !first.status.success() {
        let errors = String::from_utf8_lossy(&first.stderr);
        println!("seed {seed} FAILED ({})\n{text}{errors}", first.status);
        println!("replay: HOLDFAST_SIM_SEED={seed} cargo test --test sim");
        return false;
    }
    if seed.is_multiple_of(TWICE) {
        let second = run();
        if second.stdout != first.stdout {
            let second = String::from_utf8_lossy(&second.stdout);
            println!("seed {seed} FAILED: two runs of it differ:\n{text}{second}");
            return false;
        }
    }
    true
}
