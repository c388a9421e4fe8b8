//! Real members, real faults: one command that runs a cluster in network namespaces, does to it what
//! happens in data centers, and checks what clients were told.
//!
//! ```text
//! faults run --workload lock --fault partition-leader --seconds 45 --out DIR
//! faults matrix --cells "lock:partition-leader register:kill@5" --seconds 45 --out DIR
//! faults matrix --turn 17 --seconds 45 --out DIR
//! faults soak --seconds 7200 --out DIR
//! faults check DIR
//! faults report DIR
//! ```
//!
//! Exit codes: 0 passed, 1 violated, 2 wrong command line, 3 invalid (it was no test: too little
//! load, or a fault that did not take hold), 4 it could not be run.

mod cell;
mod disks;
mod inside;
mod late;
mod matrix;
mod members;
mod nemesis;
mod net;
mod record;
mod report;
mod resources;
mod rotation;
mod run;
mod shell;
mod soak;
mod verdict;
mod witness;
mod workloads;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use holdfast_client_tests::{moment, program};

use cell::{Cell, Fault, Setup, Workload};
use record::{HISTORY, NEMESIS};
use resources::{RESOURCES, Sample};
use soak::Soak;
use verdict::{Judgement, Verdict};

/// The exit code of what could not be run.
const COULD_NOT_RUN: u8 = 4;

#[derive(Parser)]
#[command(about = "Runs a cluster under real faults and checks what clients were told")]
struct Cli {
    #[command(subcommand)]
    what: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs one cell.
    Run {
        #[arg(long)]
        workload: Workload,
        #[arg(long)]
        fault: Fault,
        /// Where the record goes.
        #[arg(long)]
        out: PathBuf,
        #[command(flatten)]
        options: Options,
    },
    /// Runs several cells and says of each what came out.
    Matrix {
        /// WORKLOAD:FAULT or WORKLOAD:FAULT@MEMBERS, with spaces between them.
        #[arg(long, required_unless_present = "turn", default_value = "")]
        cells: String,
        /// Without cells: eight of all there are, those of this turn.
        #[arg(long)]
        turn: Option<usize>,
        /// Where the records go, a directory each.
        #[arg(long)]
        out: PathBuf,
        /// How many run at the same time.
        #[arg(long, default_value_t = 1)]
        at_once: usize,
        #[command(flatten)]
        options: Options,
    },
    /// One long cell under all faults, and the cells of the rotation beside it; a table of both.
    Soak(Soak),
    /// Judges a record again.
    Check { dir: PathBuf },
    /// Writes the page about a record again.
    Report { dir: PathBuf },
}

#[derive(Args, Clone)]
pub struct Options {
    /// How long clients work.
    #[arg(long, default_value_t = 45)]
    seconds: u64,
    #[arg(long, default_value_t = cell::USUAL_MEMBERS)]
    members: usize,
    /// Of all choices; a new one if not given.
    #[arg(long)]
    seed: Option<u64>,
    /// The program under test: HOLDFAST_BIN or the newest build, if not given.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Acknowledged operations a second before the first fault, below which it is no test; depends on
    /// the workload, if not given.
    #[arg(long)]
    least_rate: Option<f64>,
    /// No more calls a second than these; `register` only.
    #[arg(long)]
    rate: Option<u32>,
    /// A long run: have the members compact their history to so many revisions.
    #[arg(long)]
    retention: Option<u32>,
    /// Hold serializable reads to be linearizable, which they are not: shows that the check finds it.
    #[arg(long)]
    treat_serializable_as_linearizable: bool,
}

fn main() -> ExitCode {
    match execute(Cli::parse().what) {
        Ok(code) => ExitCode::from(code),
        Err(complaint) => {
            eprintln!("{complaint}");
            ExitCode::from(COULD_NOT_RUN)
        }
    }
}

fn execute(command: Command) -> Result<u8, String> {
    match command {
        Command::Run { workload, fault, out, options } => {
            run_cell(Cell { workload, fault, members: Some(options.members) }, &out, &options)
        }
        Command::Matrix { cells, turn, out, at_once, options } => {
            let cells: Result<Vec<Cell>, String> =
                cells.split_whitespace().map(str::parse).collect();
            let mut cells = cells?;
            if let Some(turn) = turn.filter(|_| cells.is_empty()) {
                cells = rotation::turn(turn);
            }
            matrix::run(&cells, &out, at_once, &options)
        }
        Command::Soak(soak) => soak::run(&soak),
        Command::Check { dir } => {
            let judgement = judge(&dir)?;
            print(&judgement);
            Ok(judgement.verdict.code())
        }
        Command::Report { dir } => {
            let judgement = judge(&dir)?;
            write_page(&dir, &judgement)?;
            Ok(0)
        }
    }
}

fn run_cell(cell: Cell, out: &Path, options: &Options) -> Result<u8, String> {
    if !(3..=5).contains(&options.members) {
        return Err("three to five members".to_owned());
    }
    if options.rate.is_some() && cell.workload != Workload::Register {
        return Err("only register can be given a rate".to_owned());
    }
    let binary = match &options.binary {
        Some(binary) => binary.canonicalize().map_err(|e| format!("{}: {e}", binary.display()))?,
        None => program::program().to_owned(),
    };
    inside::enter(&binary)?;
    moment::origin();
    let setup = Setup {
        workload: cell.workload,
        fault: cell.fault,
        seconds: options.seconds,
        members: options.members,
        seed: options.seed.unwrap_or_else(|| u64::from(rand::random::<u32>())),
        least_rate: options.least_rate.unwrap_or_else(|| cell.workload.least_rate()),
        treat_serializable_as_linearizable: options.treat_serializable_as_linearizable,
        rate: options.rate,
        retention: options.retention,
        version: run::version_of(&binary)?,
        binary: binary.to_string_lossy().into_owned(),
    };
    println!("{} for {} s, seed {}, {}", setup.cell(), setup.seconds, setup.seed, setup.version);
    std::fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let out = out.canonicalize().map_err(|e| e.to_string())?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let ran = runtime.map_err(|e| e.to_string())?.block_on(async {
        tokio::select! {
            ran = run::run(&setup, &out) => ran,
            _ = tokio::signal::ctrl_c() => Err("interrupted".to_owned()),
        }
    });
    if let Err(complaint) = ran {
        remove_data(&out)?;
        return Err(complaint);
    }
    let judgement = judge(&out)?;
    let text = serde_json::to_string_pretty(&judgement).map_err(|e| e.to_string())?;
    std::fs::write(out.join("verdict.json"), text).map_err(|e| e.to_string())?;
    write_page(&out, &judgement)?;
    print(&judgement);
    println!("    {}", out.display());
    if judgement.verdict != Verdict::Violated {
        // What the members kept is of use only with a violation, and large.
        remove_data(&out)?;
    }
    Ok(judgement.verdict.code())
}

fn remove_data(out: &Path) -> Result<(), String> {
    for entry in std::fs::read_dir(out).map_err(|e| e.to_string())? {
        let path = entry.map_err(|e| e.to_string())?.path();
        let removed = if path.ends_with("data") {
            std::fs::remove_dir_all(&path)
        } else if path.extension().is_some_and(|e| e == "img") {
            std::fs::remove_file(&path)
        } else {
            Ok(())
        };
        removed.map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

fn judge(dir: &Path) -> Result<Judgement, String> {
    let lines: Vec<record::Line> = record::read(&dir.join(HISTORY))?;
    verdict::judge(&lines, &record::read(&dir.join(NEMESIS))?, &samples(dir)?)
}

/// None in records of a time before there were any.
fn samples(dir: &Path) -> Result<Vec<Sample>, String> {
    let path = dir.join(RESOURCES);
    if path.exists() { record::read(&path) } else { Ok(Vec::new()) }
}

fn write_page(dir: &Path, judgement: &Judgement) -> Result<(), String> {
    let lines: Vec<record::Line> = record::read(&dir.join(HISTORY))?;
    let deeds: Vec<record::Deed> = record::read(&dir.join(NEMESIS))?;
    let path = dir.join("report.html");
    std::fs::write(&path, report::page(judgement, &lines, &deeds, &samples(dir)?))
        .map_err(|e| format!("{}: {e}", path.display()))
}

fn print(judgement: &Judgement) {
    let Judgement { verdict, cell, seed, rate, acknowledged, faults, .. } = judgement;
    println!(
        "{verdict} {cell}: {rate:.0}/s before the first of {faults} faults, {acknowledged} acknowledged, seed {seed}"
    );
    for fact in &judgement.facts {
        println!("    {fact}");
    }
    for why in &judgement.invalid {
        println!("    INVALID: {why}");
    }
    for what in &judgement.violations {
        println!("    VIOLATED: {what}");
    }
}
