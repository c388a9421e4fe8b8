//! All cells in an order of turns, eight each: whoever runs every turn runs everything, and each turn
//! has all workloads, eight faults, and clusters of three members and of five.

use clap::ValueEnum;

use crate::cell::{Cell, Fault, Workload};
use crate::{disks, late};

/// Cells of one turn.
const TURN: usize = 8;
/// Every so many-th cell has five members; in the next cycle, it is others.
const FIVE: usize = 4;

/// The cells of the turn with this number, whatever it is.
pub fn turn(number: usize) -> Vec<Cell> {
    let faults: Vec<Fault> = Fault::value_variants().iter().copied().filter(belongs).collect();
    (number * TURN..(number + 1) * TURN).map(|place| cell(&faults, place)).collect()
}

/// What a program that is linked statically can be tested with, on this machine.
fn belongs(fault: &Fault) -> bool {
    match fault {
        Fault::None | Fault::ClockJump => false,
        Fault::SlowDisk => disks::can_be_slow(),
        Fault::SlowNet => late::can_be_had(),
        _ => true,
    }
}

fn cell(faults: &[Fault], place: usize) -> Cell {
    let workloads = Workload::value_variants();
    let cycle = place / (workloads.len() * faults.len());
    let (row, column) = (place / workloads.len() % faults.len(), place % workloads.len());
    // In each row each workload is under another fault, and in the next row under the next one.
    let fault = faults[(row + column * faults.len() / workloads.len()) % faults.len()];
    let five = (place + cycle).is_multiple_of(FIVE);
    Cell { workload: workloads[column], fault, members: five.then_some(5) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn in_one_cycle_every_workload_is_under_every_fault_once() {
        for count in [14, 15, 16, 17] {
            let faults = &Fault::value_variants()[..count];
            let all = 0..count * Workload::value_variants().len();
            let pairs = all.map(|place| cell(faults, place)).map(|c| Cell { members: None, ..c });
            let pairs: HashSet<String> = pairs.map(|cell| cell.to_string()).collect();
            assert_eq!(pairs.len(), count * Workload::value_variants().len());
        }
    }

    #[test]
    fn a_turn_has_all_workloads_and_both_sizes() {
        for number in 0..40 {
            let cells = turn(number);
            for workload in Workload::value_variants() {
                assert!(cells.iter().any(|c| c.workload == *workload), "{number}: {cells:?}");
            }
            for members in [None, Some(5)] {
                assert!(cells.iter().any(|c| c.members == members), "{number}: {cells:?}");
            }
        }
    }
}
