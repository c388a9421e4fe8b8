//! Hours of it: one cluster under all faults for the whole time, and beside it one cell of the rotation
//! after the other, until the time is over.
//!
//! What comes out is one table, `soak.md`, written anew after every cell, so that it is there however
//! the soak ends.

use std::collections::VecDeque;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;

use crate::Options;
use crate::cell::{Cell, Fault, Workload};
use crate::matrix::{INVALID, start, worst};
use crate::record::HISTORY;
use crate::resources::Course;
use crate::rotation;
use crate::verdict::{Judgement, Verdict};

const TABLE: &str = "soak.md";

/// The cell that lasts for the whole time.
const LONG: Cell = Cell { workload: Workload::Register, fault: Fault::All, members: None };

/// Revisions that the long cell's members keep: more than are written while one of them is away and a
/// witness of its own misses them.
const RETENTION: u32 = 30_000;

/// What a cell takes at least beside the time of its clients, to be set up and judged. What the longest
/// one took counts as soon as it is more.
const AROUND: Duration = Duration::from_secs(20);

#[derive(Args, Clone)]
pub struct Soak {
    /// How long the long cell's clients work, and by when the other cells have ended.
    #[arg(long)]
    seconds: u64,
    /// Where the records go, a directory each, and the table.
    #[arg(long)]
    out: std::path::PathBuf,
    /// Calls a second of the long cell.
    #[arg(long, default_value_t = 300)]
    rate: u32,
    /// How long the clients of each other cell work.
    #[arg(long, default_value_t = 45)]
    cell_seconds: u64,
    /// The turn of the rotation that the other cells begin with.
    #[arg(long, default_value_t = 0)]
    turn: usize,
    /// Of all choices; a new one for each cell if not given.
    #[arg(long)]
    seed: Option<u64>,
    /// The program under test: HOLDFAST_BIN or the newest build, if not given.
    #[arg(long)]
    binary: Option<std::path::PathBuf>,
    /// As of `run`, for the other cells. They share the machine with the long one.
    #[arg(long)]
    least_rate: Option<f64>,
}

/// Runs it and gives the exit code of the worst cell, as `matrix` does. A cell that was no test is run
/// once more at the end of its turn; if that does not fit in, it stays what it was.
///
/// # Errors
///
/// If this program cannot be started again, or the table cannot be written.
pub fn run(soak: &Soak) -> Result<u8, String> {
    let until = Instant::now() + Duration::from_secs(soak.seconds);
    let options = Options {
        seconds: soak.cell_seconds,
        members: crate::cell::USUAL_MEMBERS,
        seed: soak.seed,
        binary: soak.binary.clone(),
        least_rate: soak.least_rate,
        rate: None,
        retention: None,
        treat_serializable_as_linearizable: false,
    };
    let long_options = Options {
        seconds: soak.seconds,
        least_rate: Some(f64::from(soak.rate) / 2.0),
        rate: Some(soak.rate),
        retention: Some(RETENTION),
        ..options.clone()
    };
    let long_dir = soak.out.join("long");
    let mut long = start(LONG, &long_dir, &long_options)?;
    let mut table = Table::default();
    let mut waiting: VecDeque<(Cell, bool)> = VecDeque::new();
    let (mut turn, mut count) = (soak.turn, 0);
    let mut longest = Duration::from_secs(soak.cell_seconds) + AROUND;
    while Instant::now() + longest < until {
        let Some((cell, again)) = waiting.pop_front() else {
            waiting.extend(rotation::turn(turn).into_iter().map(|cell| (cell, false)));
            turn += 1;
            continue;
        };
        count += 1;
        let dir = soak.out.join(format!("{count:03}-{}", cell.file_name()));
        let began = Instant::now();
        let ended = start(cell, &dir, &options)?.wait().map_err(|e| e.to_string())?;
        longest = longest.max(began.elapsed());
        let code = ended.code();
        if code == Some(i32::from(INVALID)) && !again {
            println!("{cell}: no test, once more later");
            waiting.push_back((cell, true));
        }
        if code == Some(0) {
            // Hours of records are many GiB. The verdict, the faults and the page stay.
            fs::remove_file(dir.join(HISTORY)).map_err(|e| format!("{}: {e}", dir.display()))?;
        }
        table.add(cell, code, judgement(&dir).as_ref());
        table.write(&soak.out)?;
    }
    let ended = long.wait().map_err(|e| e.to_string())?;
    table.long = judgement(&long_dir);
    table.long_code = Some(ended.code());
    table.write(&soak.out)?;
    println!("\n{}", table.text());
    Ok(table.code())
}

fn judgement(dir: &Path) -> Option<Judgement> {
    serde_json::from_slice(&fs::read(dir.join("verdict.json")).ok()?).ok()
}

/// What came of all runs of one cell.
#[derive(Debug)]
struct Row {
    cell: Cell,
    /// The exit codes.
    codes: Vec<Option<i32>>,
    operations: usize,
    faults: usize,
}

#[derive(Debug, Default)]
struct Table {
    long: Option<Judgement>,
    /// There as soon as the long cell has ended, whatever it has left.
    long_code: Option<Option<i32>>,
    rows: Vec<Row>,
}

impl Table {
    fn add(&mut self, cell: Cell, code: Option<i32>, judgement: Option<&Judgement>) {
        let at = self.rows.iter().position(|row| row.cell == cell).unwrap_or_else(|| {
            self.rows.push(Row { cell, codes: Vec::new(), operations: 0, faults: 0 });
            self.rows.len() - 1
        });
        let row = &mut self.rows[at];
        row.codes.push(code);
        row.operations += judgement.map_or(0, |j| j.acknowledged);
        row.faults += judgement.map_or(0, |j| j.faults);
    }

    /// Of a cell that was no test and then was one, only what it then was counts.
    fn code(&self) -> u8 {
        let mut codes: Vec<Option<i32>> = self.long_code.into_iter().collect();
        for row in &self.rows {
            let last = row.codes.last().copied();
            let worse = row.codes.iter().copied().filter(|c| *c != Some(i32::from(INVALID)));
            codes.extend(worse.chain(last));
        }
        worst(&codes)
    }

    fn write(&self, out: &Path) -> Result<(), String> {
        let path = out.join(TABLE);
        fs::write(&path, self.text()).map_err(|e| format!("{}: {e}", path.display()))
    }

    fn text(&self) -> String {
        let mut text =
            "| cell | runs | passed | violated | invalid | not run | operations | faults |\n\
                        | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
                .to_owned();
        if let Some(code) = self.long_code {
            let name = format!("**{LONG}**, for the whole time");
            let (operations, faults) =
                self.long.as_ref().map_or((0, 0), |long| (long.acknowledged, long.faults));
            line(&mut text, &name, &[code], operations, faults);
        }
        for row in &self.rows {
            line(&mut text, &row.cell.to_string(), &row.codes, row.operations, row.faults);
        }
        let codes: Vec<_> = self.rows.iter().flat_map(|row| row.codes.iter().copied()).collect();
        let operations = self.rows.iter().map(|row| row.operations).sum();
        let faults = self.rows.iter().map(|row| row.faults).sum();
        line(&mut text, "all cells beside it", &codes, operations, faults);
        if let Some(long) = &self.long {
            resources(&mut text, long);
        }
        text
    }
}

fn line(text: &mut String, name: &str, codes: &[Option<i32>], operations: usize, faults: usize) {
    let count = |verdict: Verdict| {
        codes.iter().filter(|code| **code == Some(i32::from(verdict.code()))).count()
    };
    let counts = [Verdict::Passed, Verdict::Violated, Verdict::Invalid].map(count);
    let [passed, violated, invalid] = counts;
    let runs = codes.len();
    let broken = runs - counts.iter().sum::<usize>();
    let _ = writeln!(
        text,
        "| {name} | {runs} | {passed} | {violated} | {invalid} | {broken} | {operations} | {faults} |"
    );
}

/// What the members of the long cell used.
fn resources(text: &mut String, long: &Judgement) {
    text.push_str(
        "\n| member | what | first quarter | second | last | peak |\n\
         | --- | --- | ---: | ---: | ---: | ---: |\n",
    );
    let number = |value: Option<u64>, unit: u64| {
        value.map_or_else(|| "none".to_owned(), |value| (value / unit).to_string())
    };
    for own in &long.resources {
        let rows: [(&str, Course, u64); 3] = [
            ("memory, MiB", own.memory_bytes, 1 << 20),
            ("descriptors", own.descriptors, 1),
            ("disk, MiB", own.disk_bytes, 1 << 20),
        ];
        for (what, course, unit) in rows {
            let _ = writeln!(
                text,
                "| m{} | {what} | {} | {} | {} | {} |",
                own.member,
                number(course.first_quarter, unit),
                number(course.second_quarter, unit),
                number(course.last_quarter, unit),
                number(Some(course.peak), unit)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(text: &str) -> Cell {
        text.parse().expect("a cell")
    }

    #[test]
    fn a_cell_that_was_no_test_at_first_counts_as_what_it_then_was() {
        let mut table = Table { long_code: Some(Some(0)), ..Table::default() };
        table.add(cell("lock:kill"), Some(0), None);
        table.add(cell("txn:kill@5"), Some(3), None);
        assert_eq!(table.code(), 3);
        table.add(cell("txn:kill@5"), Some(0), None);
        assert_eq!(table.code(), 0);
        table.add(cell("lock:kill"), Some(1), None);
        table.add(cell("lock:kill"), Some(0), None);
        assert_eq!(table.code(), 1);
        let text = table.text();
        assert!(text.contains("| txn:kill@5 | 2 | 1 | 0 | 1 | 0 | 0 | 0 |"), "{text}");
        assert!(text.contains("| lock:kill | 3 | 2 | 1 | 0 | 0 | 0 | 0 |"), "{text}");
        assert!(text.contains("| all cells beside it | 5 | 3 | 1 | 1 | 0 | 0 | 0 |"), "{text}");
    }

    #[test]
    fn a_run_that_ended_without_a_word_is_told() {
        let mut table = Table { long_code: Some(None), ..Table::default() };
        table.add(cell("lock:kill"), Some(0), None);
        assert_eq!(table.code(), 4);
        assert!(table.text().contains("whole time | 1 | 0 | 0 | 0 | 1 | 0 | 0 |"));
    }
}
