//! Several cells, each a process of its own, some of them at the same time.

use std::collections::VecDeque;
use std::path::Path;
use std::process::{Child, Command};

use crate::Options;
use crate::cell::Cell;

/// The exit code of a run that was no test: too little load, or a fault that did not take hold.
pub const INVALID: u8 = 3;

/// Runs the cells and gives the exit code of the worst: a violation, then one that could not be run,
/// then one that was no test. A cell that was no test is run once more, in a folder of its own: the
/// machine may have been busy.
///
/// # Errors
///
/// If this program cannot be started again.
pub fn run(cells: &[Cell], out: &Path, at_once: usize, options: &Options) -> Result<u8, String> {
    let mut waiting: VecDeque<(Cell, bool)> = cells.iter().map(|cell| (*cell, false)).collect();
    let mut running: Vec<(Cell, bool, Child)> = Vec::new();
    let mut outcomes = Vec::new();
    loop {
        while running.len() < at_once.max(1)
            && let Some((cell, again)) = waiting.pop_front()
        {
            let dir = format!("{}{}", cell.file_name(), if again { "-again" } else { "" });
            running.push((cell, again, start(cell, &out.join(dir), options)?));
        }
        if running.is_empty() {
            break;
        }
        let mut ended = Vec::new();
        for (at, (_, _, child)) in running.iter_mut().enumerate() {
            if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
                ended.push((at, status.code()));
            }
        }
        for (at, code) in ended.into_iter().rev() {
            let (cell, again, _) = running.remove(at);
            if code == Some(i32::from(INVALID)) && !again {
                println!("{cell}: no test, once more");
                waiting.push_back((cell, true));
            } else {
                outcomes.push((cell, code));
            }
        }
        // There is no event for the end of any one of several children without more machinery.
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    println!("\n{:<32} outcome", "cell");
    for (cell, code) in &outcomes {
        let outcome = match code {
            Some(0) => "passed",
            Some(1) => "VIOLATED",
            Some(3) => "INVALID",
            _ => "could not be run",
        };
        println!("{:<32} {outcome}", cell.to_string());
    }
    let codes: Vec<Option<i32>> = outcomes.iter().map(|(_, code)| *code).collect();
    Ok(worst(&codes))
}

/// The exit code of the worst of these: a violation, then what could not be run, then no test.
pub fn worst(codes: &[Option<i32>]) -> u8 {
    let any = |wanted| codes.contains(&Some(wanted));
    let broken = codes.iter().any(|code| !matches!(code, Some(0 | 1 | 3)));
    match (any(1), broken, any(3)) {
        (true, ..) => 1,
        (_, true, _) => crate::COULD_NOT_RUN,
        (_, _, true) => INVALID,
        _ => 0,
    }
}

/// Starts the run of a cell, which leaves its record in `dir`.
///
/// # Errors
///
/// If this program cannot be started again.
pub fn start(cell: Cell, dir: &Path, options: &Options) -> Result<Child, String> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let (workload, fault) = cell.names();
    let mut command = Command::new(own);
    command.args(["run", "--workload", &workload, "--fault", &fault, "--out"]);
    command.arg(dir);
    command.args(["--seconds", &options.seconds.to_string()]);
    command.args(["--members", &cell.members.unwrap_or(options.members).to_string()]);
    if let Some(seed) = options.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    if let Some(binary) = &options.binary {
        command.arg("--binary").arg(binary);
    }
    if let Some(rate) = options.least_rate {
        command.args(["--least-rate", &rate.to_string()]);
    }
    if let Some(rate) = options.rate {
        command.args(["--rate", &rate.to_string()]);
    }
    if let Some(revisions) = options.retention {
        command.args(["--retention", &revisions.to_string()]);
    }
    if options.treat_serializable_as_linearizable {
        command.arg("--treat-serializable-as-linearizable");
    }
    command.spawn().map_err(|e| format!("{cell}: {e}"))
}
