//! Faults of processes: killed, and stopped.

use rand::Rng;
use rustix::process::Signal;

use super::{Injected, Nemesis, Undo};

impl Nemesis<'_> {
    /// Kills the leader, a follower, or all members at once.
    pub(super) fn kill(&mut self, leader: usize) -> Injected {
        let all = self.rounds > 0 && self.random.random_range(0..4) == 0;
        let targets: Vec<usize> = match all {
            true => (0..self.members.size()).collect(),
            false => vec![self.leader_or_follower(leader)],
        };
        for member in &targets {
            self.members.kill(*member);
        }
        let well = self.others(&targets);
        let should = well.len();
        let how = format!("SIGKILL to {targets:?}, leader {leader}");
        Injected { undo: Undo::Restart(targets.clone()), targets, how, well, should }
    }

    pub(super) fn confirm_killed(&mut self, targets: &[usize]) -> Result<String, String> {
        match targets.iter().find(|m| self.members.pid(**m).is_some()) {
            None => Ok(format!("no process of {targets:?}")),
            Some(member) => Err(format!("member {member} runs")),
        }
    }

    /// Stops the leader, a follower, or a majority with SIGSTOP.
    pub(super) fn pause(&mut self, leader: usize) -> Result<Injected, String> {
        let many = self.rounds > 0 && self.random.random_range(0..4) == 0;
        let mut targets = vec![self.leader_or_follower(leader)];
        if many {
            let more = self.others(&targets);
            targets.extend(&more[..self.minority()]);
        }
        for member in &targets {
            self.members.signal(*member, Signal::STOP)?;
        }
        let well = if many { Vec::new() } else { self.others(&targets) };
        let should = well.len();
        let how = format!("SIGSTOP to {targets:?}, leader {leader}");
        Ok(Injected { undo: Undo::Resume(targets.clone()), targets, how, well, should })
    }

    pub(super) fn confirm_paused(&self, targets: &[usize]) -> Result<String, String> {
        let states: Vec<_> = targets.iter().map(|m| (*m, self.members.state(*m))).collect();
        match states.iter().all(|(_, state)| *state == Some('T')) {
            true => Ok(format!("process states {states:?}")),
            false => Err(format!("process states {states:?}")),
        }
    }

    pub(super) fn resume(&self, targets: &[usize]) -> Result<String, String> {
        for member in targets {
            self.members.signal(*member, Signal::CONT)?;
        }
        Ok(format!("SIGCONT to {targets:?}"))
    }
}
