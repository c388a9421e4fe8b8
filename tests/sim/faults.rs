//! What goes wrong, and when, as the seed says. Between two faults all is well for a while.

use std::net::IpAddr;
use std::time::Duration;

use holdfast::vfs::Survival;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use turmoil::Sim;

use crate::cluster::Cluster;
use crate::member;

const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_millis(5_000);
/// Too short for an election, and long enough to lose what is under way.
const MOMENT: std::ops::Range<Duration> = Duration::from_millis(20)..Duration::from_millis(400);

/// How a process ends.
#[derive(Debug, Clone, Copy)]
pub enum End {
    /// What was not synced is lost, or some of it.
    PowerCut(Survival),
    /// The files are as they were left.
    Kill,
    /// The disk stops taking anything in the midst of what it does, then the power is cut.
    TornWrite { operations: u64, survival: Survival },
}

#[derive(Debug, Clone)]
pub enum Fault {
    /// These end and start again.
    Crash(Vec<usize>, End),
    /// Nothing passes between these and the others; what was on its way is lost.
    Partition(Vec<usize>),
    /// The same for a moment: connections break, and whoever leads goes on.
    Glitch(usize),
    /// These hear nobody, but are heard; or the other way round.
    Deaf(usize),
    Mute(usize),
    /// What is sent between these and the others arrives when this is over.
    Hold(Vec<usize>),
    /// Each message takes up to so long.
    Slow(Duration),
}

/// A fault that is on, and how long it lasts.
pub struct Trouble {
    pub fault: Fault,
    pub lasts: Duration,
}

impl Trouble {
    pub fn draw(dice: &mut StdRng, cluster: &Cluster) -> Trouble {
        let mut lasts = dice.random_range(SHORTEST..LONGEST);
        let members = cluster.members();
        let minority = (members - 1) / 2;
        let one = match cluster.record.leader.get() {
            Some(leader) if dice.random_ratio(1, 2) => leader,
            _ => dice.random_range(0..members),
        };
        let mut several: Vec<usize> = (0..members).collect();
        several.shuffle(dice);
        several.retain(|member| *member != one);
        several.truncate(minority - 1);
        several.push(one);
        let all = (0..members).collect();
        let seed = dice.random();
        let survival = match dice.random_range(0..3) {
            0 => Survival::Nothing,
            _ => Survival::Some(seed),
        };
        let fault = match dice.random_range(0..15) {
            0 => Fault::Crash(vec![one], End::Kill),
            1 => Fault::Crash(several, End::PowerCut(survival)),
            torn @ (2 | 3) => {
                let operations = dice.random_range(0..12);
                let members = if torn == 2 { vec![one] } else { all };
                Fault::Crash(members, End::TornWrite { operations, survival })
            }
            4 => Fault::Crash((0..members).collect(), End::PowerCut(survival)),
            5 => Fault::Crash((0..members).collect(), End::Kill),
            6 | 7 => Fault::Partition(several),
            8 => Fault::Deaf(one),
            9 => Fault::Mute(one),
            10 => Fault::Hold(several),
            11..14 => {
                lasts = dice.random_range(MOMENT);
                Fault::Glitch(one)
            }
            _ => Fault::Slow(
                dice.random_range(Duration::from_millis(20)..Duration::from_millis(400)),
            ),
        };
        Trouble { fault, lasts }
    }

    pub fn begin(&self, sim: &mut Sim<'_>, cluster: &Cluster) {
        match &self.fault {
            Fault::Crash(members, End::TornWrite { operations, .. }) => {
                members
                    .iter()
                    .for_each(|member| cluster.disk(*member).cut_power_after(*operations));
            }
            Fault::Crash(members, end) => cluster.crash(sim, members, *end),
            Fault::Partition(members) => {
                for (a, b) in cluster.across(members) {
                    sim.partition(a, b);
                }
            }
            Fault::Glitch(member) => {
                for (a, b) in cluster.across(&[*member]) {
                    sim.partition(a, b);
                }
            }
            Fault::Deaf(member) => {
                for (a, b) in cluster.across(&[*member]) {
                    sim.partition_oneway(b, a);
                }
            }
            Fault::Mute(member) => {
                for (a, b) in cluster.across(&[*member]) {
                    sim.partition_oneway(a, b);
                }
            }
            Fault::Hold(members) => {
                for (a, b) in cluster.across(members) {
                    sim.hold(a, b);
                }
            }
            Fault::Slow(up_to) => slow(sim, cluster, *up_to),
        }
    }

    pub fn end(&self, sim: &mut Sim<'_>, cluster: &Cluster) {
        match &self.fault {
            Fault::Crash(members, end) => {
                if let End::TornWrite { .. } = end {
                    cluster.crash(sim, members, *end);
                }
                for member in members {
                    sim.bounce(member::address(*member));
                }
            }
            Fault::Partition(members) => repair(sim, cluster, members),
            Fault::Glitch(member) | Fault::Deaf(member) | Fault::Mute(member) => {
                repair(sim, cluster, &[*member]);
            }
            Fault::Hold(members) => {
                for (a, b) in cluster.across(members) {
                    sim.release(a, b);
                }
            }
            Fault::Slow(_) => slow(sim, cluster, crate::cluster::LATENCY),
        }
    }
}

fn repair(sim: &Sim<'_>, cluster: &Cluster, members: &[usize]) {
    for (a, b) in cluster.across(members) {
        sim.repair(a, b);
        sim.repair_oneway(a, b);
        sim.repair_oneway(b, a);
    }
}

fn slow(sim: &Sim<'_>, cluster: &Cluster, up_to: Duration) {
    let all: Vec<IpAddr> = (0..cluster.members()).map(member::address).collect();
    for a in &all {
        for b in all.iter().filter(|b| *b > a) {
            sim.set_link_max_message_latency(*a, *b, up_to);
        }
    }
}
