//! Faults of the network between members. Clients reach all of them all the time.

use rand::Rng;

use super::{Injected, Nemesis, Undo};
use crate::cell::Fault;
use crate::late::LEAST;
use crate::net::{Way, between, ring};

const LOST_PERCENT: u32 = 20;

impl Nemesis<'_> {
    pub(super) fn disconnect(&mut self, fault: Fault, leader: usize) -> Result<Injected, String> {
        let size = self.members.size();
        let everyone: Vec<usize> = (0..size).collect();
        let (targets, ways, how): (Vec<usize>, Vec<Way>, String) = match fault {
            Fault::PartitionLeader => {
                let ways = between(&[leader], &self.others(&[leader]));
                (vec![leader], ways, format!("leader {leader} is alone"))
            }
            Fault::PartitionMinority => {
                let mut targets = vec![self.a_follower(leader)];
                while targets.len() < self.minority() {
                    let beside: Vec<usize> = [&targets[..], &[leader]].concat();
                    targets.push(self.others(&beside)[0]);
                }
                let ways = between(&targets, &self.others(&targets));
                let how = format!("{targets:?} are apart from leader {leader}");
                (targets, ways, how)
            }
            Fault::PartitionOneWay => {
                let deaf = self.random.random_bool(0.5);
                let to = |other: usize| if deaf { (other, leader) } else { (leader, other) };
                let ways = self.others(&[leader]).into_iter().map(to).collect();
                let what = if deaf { "hears nobody" } else { "is heard by nobody" };
                (vec![leader], ways, format!("leader {leader} {what}"))
            }
            Fault::PartitionRing => {
                // Followers have nothing to say to each other: a leader that kept all its links would
                // not notice.
                let keep = self.a_follower(leader);
                let how = format!("{keep} keeps its links, leader {leader} does not");
                (everyone.clone(), ring(size, keep), how)
            }
            Fault::Lossy => {
                self.net.lose(LOST_PERCENT)?;
                let how = format!("{LOST_PERCENT} % of all packets are lost");
                let undo = Undo::Connect;
                return Ok(Injected { targets: everyone, how, well: vec![], should: 0, undo });
            }
            other => unreachable!("{other:?} is no fault of the network"),
        };
        self.net.cut(&ways)?;
        // In a ring the leader has a majority, but not everybody reaches the leader.
        let (well, should) = match fault {
            Fault::PartitionRing => (everyone, size / 2 + 1),
            _ => (self.others(&targets), size - targets.len()),
        };
        Ok(Injected { targets, how, well, should, undo: Undo::Connect })
    }

    /// Everything stays connected, so all must serve all the time.
    pub(super) fn slow_net(&mut self, leader: usize) -> Result<Injected, String> {
        let everyone = self.others(&[]);
        let (targets, whose) = match self.random.random_range(0..3) {
            0 => (everyone.clone(), "everybody's".to_owned()),
            1 => {
                let target = self.a_follower(leader);
                (vec![target], format!("follower {target}'s"))
            }
            _ => (vec![leader], format!("leader {leader}'s")),
        };
        let mut ways = between(&targets, &self.others(&[]));
        ways.retain(|(from, to)| from != to);
        ways.sort_unstable();
        ways.dedup();
        self.net.delay(&ways, self.random.random())?;
        let how = format!("{whose} packets come late, leader {leader}");
        let (from, to) = ways[0];
        let should = everyone.len();
        Ok(Injected { targets, how, well: everyone, should, undo: Undo::OnTime(from, to) })
    }

    pub(super) fn confirm_late(&self, from: usize, to: usize) -> Result<String, String> {
        let took = self.net.round_trip(from, to)?;
        let text = format!("{took:.1?} from {from} to {to} and back; {}", self.net.late());
        if took >= 2 * LEAST { Ok(text) } else { Err(text) }
    }

    pub(super) fn confirm_disconnected(&self) -> Result<String, String> {
        match self.net.dropped()? {
            0 => Err("no packet was dropped".to_owned()),
            packets => Ok(format!("{packets} packets dropped")),
        }
    }
}
