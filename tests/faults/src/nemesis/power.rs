//! Faults of power and of whole disks: a power cut of some or all members, and a disk on which every
//! operation fails while its member runs.

use super::{Injected, Nemesis, Undo};
use crate::cell::Fault;

impl Nemesis<'_> {
    /// Takes the power from the disks first, whatever the processes still do.
    pub(super) fn cut_power(&mut self, fault: Fault, leader: usize) -> Result<Injected, String> {
        let targets = match fault {
            Fault::PowerCutAll => self.others(&[]),
            _ => vec![self.leader_or_follower(leader)],
        };
        for member in &targets {
            self.disks[*member].cut_power()?;
        }
        for member in &targets {
            self.members.kill(*member);
        }
        let well = self.others(&targets);
        let should = well.len();
        let how = format!("no power for {targets:?}, leader {leader}");
        Ok(Injected { undo: Undo::Power(targets.clone()), targets, how, well, should })
    }

    pub(super) fn restore_power(&mut self, members: &[usize]) -> Result<String, String> {
        let mut lost = 0;
        for member in members {
            lost += usize::from(self.disks[*member].restore_power()?);
            self.members.start(*member)?;
        }
        Ok(format!("power for {members:?}; {lost} lost a write that was not synced"))
    }

    /// Every operation of a disk fails from now on. Its member must end by itself.
    pub(super) fn break_disk(&mut self, leader: usize) -> Result<Injected, String> {
        let target = self.leader_or_follower(leader);
        self.disks[target].cut_power()?;
        let well = self.others(&[target]);
        let should = well.len();
        let how = format!("the disk of {target} fails, leader {leader}");
        Ok(Injected { targets: vec![target], how, well, should, undo: Undo::Repair(target) })
    }

    pub(super) fn confirm_broken(&mut self, member: usize) -> Result<String, String> {
        match self.members.ended(member) {
            Some(status) => Ok(format!("member {member} ended: {status}")),
            None => Err(format!("member {member} runs although its disk fails")),
        }
    }
}
