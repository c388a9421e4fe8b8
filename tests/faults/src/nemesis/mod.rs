//! What is done to the members: one fault after the other, each begun, shown to be there, undone, and
//! followed by the members serving again.
//!
//! ```text
//! began -> took hold -> meanwhile -> healed -> serving -> quiet -> began ...
//! ```
//!
//! Everything is noted as it happens. A fault that cannot be shown to be there makes the run invalid.

mod clock;
mod membership;
mod network;
mod power;
mod process;
mod storage;

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

pub use clock::prepare as prepare_clocks;

use crate::cell::{Fault, Setup};
use crate::disks::Disk;
use crate::members::Members;
use crate::net::Net;
use crate::record::{Deeds, What, millis};
use crate::witness::Witnesses;

/// How long a fault lasts at least, in milliseconds.
const HOLD_MS: std::ops::Range<u64> = 2500..4500;
/// Between two faults.
const BETWEEN_MS: std::ops::Range<u64> = 500..1500;
/// While a majority is well, it serves within this time: two election timeouts and a second are
/// promised, and the rest is for connections that must notice and a machine that is busy.
const MEANWHILE: Duration = Duration::from_secs(10);
/// All members serve this soon after the fault has gone.
const RECOVERY: Duration = Duration::from_secs(20);

/// The next one under `all`.
const EACH: &[Fault] = &[
    Fault::Kill,
    Fault::Pause,
    Fault::PartitionLeader,
    Fault::PartitionMinority,
    Fault::PartitionOneWay,
    Fault::PartitionRing,
    Fault::Lossy,
    Fault::SlowNet,
    Fault::SlowDisk,
    Fault::FullDisk,
    Fault::IoError,
    Fault::PowerCut,
    Fault::PowerCutAll,
    Fault::Member,
    Fault::Corruption,
    Fault::Snapshot,
];

pub struct Nemesis<'a> {
    pub members: &'a mut Members,
    pub net: &'a Net,
    pub disks: &'a [Disk],
    pub witnesses: Option<&'a Witnesses>,
    pub deeds: &'a Deeds,
    random: StdRng,
    setup: &'a Setup,
    rounds: usize,
    /// What `all` still has to do before it begins anew.
    left: Vec<Fault>,
}

/// A fault that is there.
struct Injected {
    targets: Vec<usize>,
    how: String,
    /// Of these members at least so many should serve meanwhile.
    well: Vec<usize>,
    should: usize,
    /// To be done to end it.
    undo: Undo,
}

enum Undo {
    Restart(Vec<usize>),
    Resume(Vec<usize>),
    Connect,
    /// Packets between these two, and maybe others, come on time.
    OnTime(usize, usize),
    /// The disk of this member is fast again.
    Fast(usize),
    /// There is space again, for this member.
    Free(usize),
    SetClock(usize),
    /// These have power again.
    Power(Vec<usize>),
    /// This member has a disk that works.
    Repair(usize),
    /// Nothing: a new member is in the place of this one, whose id was this.
    Replaced(usize, u64),
    /// A member that was damaged: if it refused to start, it gets its files back from here.
    Restore(usize, std::path::PathBuf),
    /// A member that has to be sent a snapshot when it comes back, and what it has now.
    Snapshot(usize, String),
}

impl<'a> Nemesis<'a> {
    pub fn new(
        members: &'a mut Members,
        net: &'a Net,
        disks: &'a [Disk],
        witnesses: Option<&'a Witnesses>,
        deeds: &'a Deeds,
        setup: &'a Setup,
    ) -> Nemesis<'a> {
        let random = StdRng::seed_from_u64(setup.seed.wrapping_mul(31));
        Nemesis {
            members,
            net,
            disks,
            witnesses,
            deeds,
            random,
            setup,
            rounds: 0,
            left: Vec::new(),
        }
    }

    /// One fault from its beginning to when all members serve again; whether another makes sense.
    pub async fn round(&mut self) -> bool {
        let fault = match self.setup.fault {
            Fault::All => self.next_of_all(),
            fault => fault,
        };
        let everyone: Vec<usize> = (0..self.members.size()).collect();
        let Some(leader) = self.members.leader(&everyone, RECOVERY / 2).await else {
            let limit_ms = millis(RECOVERY / 2);
            self.deeds.note(What::NotServing { members: everyone, limit_ms });
            return false;
        };
        // Also a fault that is only half there has begun.
        self.deeds.note(What::Begins { fault, leader });
        let injected = match self.inject(fault, leader).await {
            Ok(injected) => injected,
            Err(why) => {
                self.deeds.note(What::Impossible { why: format!("{fault:?}: {why}") });
                return self.mend().await;
            }
        };
        let Injected { targets, how, well, should, undo } = injected;
        self.deeds.note(What::Began { targets: targets.clone(), how });
        let hold = Duration::from_millis(self.random.random_range(HOLD_MS));
        let hold = tokio::time::sleep(hold);
        let meanwhile = async {
            if should > 0 {
                let serving = self.served(&well, should).await;
                let limit_ms = millis(MEANWHILE);
                self.deeds.note(What::Meanwhile { serving, should, limit_ms });
            }
        };
        tokio::join!(hold, meanwhile);
        self.confirm(fault, &targets, &undo).await;
        let after = match self.undo(undo).await {
            Ok((how, after)) => {
                self.deeds.note(What::Healed { how });
                after
            }
            Err(why) => {
                self.deeds.note(What::Impossible { why: format!("{fault:?}, undone: {why}") });
                return self.mend().await;
            }
        };
        let left = self.members.not_serving(&everyone, RECOVERY).await;
        let served = left.is_empty();
        if served {
            self.deeds.note(What::Serving);
            if let Some((member, before)) = after {
                self.confirm_snapshot(member, &before);
            }
            self.hashes().await;
        } else {
            self.deeds.note(What::NotServing { members: left, limit_ms: millis(RECOVERY) });
        }
        self.rounds += 1;
        let between = self.random.random_range(BETWEEN_MS);
        tokio::time::sleep(Duration::from_millis(between)).await;
        // Who has sent a snapshot keeps its log for half a minute: a second one would be chance.
        served && self.setup.fault != Fault::Snapshot
    }

    /// After a fault that could not be had, which makes most runs invalid: a long one goes on, with
    /// whatever was left half done undone. Whether it can.
    async fn mend(&mut self) -> bool {
        let everyone = self.others(&[]);
        if self.setup.retention.is_none() || self.net.heal().is_err() {
            return false;
        }
        for member in &everyone {
            if self.members.ended(*member).is_some() && self.members.start(*member).is_err() {
                return false;
            }
        }
        let left = self.members.not_serving(&everyone, RECOVERY).await;
        let served = left.is_empty();
        self.deeds.note(match served {
            true => What::Serving,
            false => What::NotServing { members: left, limit_ms: millis(RECOVERY) },
        });
        served
    }

    fn next_of_all(&mut self) -> Fault {
        if self.left.is_empty() {
            self.left = EACH.to_vec();
            self.left.retain(|fault| match fault {
                Fault::SlowDisk => crate::disks::can_be_slow(),
                Fault::SlowNet => crate::late::can_be_had(),
                _ => true,
            });
            self.left.shuffle(&mut self.random);
        }
        self.left.pop().expect("just filled")
    }

    async fn inject(&mut self, fault: Fault, leader: usize) -> Result<Injected, String> {
        match fault {
            Fault::None | Fault::All => {
                unreachable!("nothing is done under none, one of all at once")
            }
            Fault::Kill => Ok(self.kill(leader)),
            Fault::Pause => self.pause(leader),
            Fault::PartitionLeader
            | Fault::PartitionMinority
            | Fault::PartitionOneWay
            | Fault::PartitionRing
            | Fault::Lossy => self.disconnect(fault, leader),
            Fault::SlowNet => self.slow_net(leader),
            Fault::SlowDisk => self.slow_disk(leader),
            Fault::FullDisk => self.fill_disk(leader),
            Fault::IoError => self.break_disk(leader),
            Fault::PowerCut | Fault::PowerCutAll => self.cut_power(fault, leader),
            Fault::Member => self.replace(leader).await,
            Fault::ClockJump => self.jump(leader),
            Fault::Corruption => self.corrupt(leader).await,
            Fault::Snapshot => self.leave_behind(leader).await,
        }
    }

    /// How many of these answer a linearizable read, as soon as it is enough or the time is up.
    async fn served(&self, well: &[usize], should: usize) -> usize {
        let deadline = tokio::time::Instant::now() + MEANWHILE;
        loop {
            let mut serving = 0;
            for member in well {
                serving += usize::from(self.members.serves(*member).await);
            }
            if serving >= should || tokio::time::Instant::now() > deadline {
                return serving;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Notes what shows that the fault is there, while it is.
    async fn confirm(&mut self, fault: Fault, targets: &[usize], undo: &Undo) {
        let shown = match undo {
            Undo::Restart(_) | Undo::Power(_) => self.confirm_killed(targets),
            Undo::Resume(_) => self.confirm_paused(targets),
            Undo::Connect => self.confirm_disconnected(),
            Undo::OnTime(from, to) => self.confirm_late(*from, *to),
            Undo::Fast(member) => self.confirm_slow(*member),
            Undo::Free(member) => self.confirm_full(*member),
            Undo::SetClock(member) => self.confirm_jumped(*member),
            Undo::Repair(member) => self.confirm_broken(*member),
            Undo::Replaced(member, old) => self.confirm_replaced(*member, *old).await,
            Undo::Restore(member, _) => self.confirm_corrupted(*member),
            // It shows when the member is back.
            Undo::Snapshot(..) => return,
        };
        self.note_shown(shown.map_err(|why| format!("{fault:?}: {why}")));
    }

    fn note_shown(&self, shown: Result<String, String>) {
        match shown {
            Ok(by) => self.deeds.note(What::TookHold { by }),
            Err(why) => self.deeds.note(What::DidNotTakeHold { why }),
        }
    }

    /// Ends it; what was done, and of a snapshot the member and what it had before.
    async fn undo(&mut self, undo: Undo) -> Result<(String, Option<(usize, String)>), String> {
        let how = match undo {
            Undo::Restart(members) => {
                for member in &members {
                    self.members.start(*member)?;
                }
                format!("started {members:?}")
            }
            Undo::Resume(members) => self.resume(&members)?,
            Undo::Connect => {
                self.net.heal()?;
                "everyone is connected".to_owned()
            }
            Undo::OnTime(..) => {
                self.net.heal()?;
                "packets come on time".to_owned()
            }
            Undo::Fast(member) => {
                self.disks[member].limit(0)?;
                format!("the disk of {member} is fast")
            }
            Undo::Free(member) => self.free_disk(member)?,
            Undo::SetClock(member) => self.set_clock_right(member)?,
            Undo::Power(members) => self.restore_power(&members)?,
            Undo::Repair(member) => {
                self.members.kill(member);
                self.restore_power(&[member])?
            }
            Undo::Replaced(member, _) => format!("{member} is another member"),
            Undo::Restore(member, saved) => self.restore(member, &saved)?,
            Undo::Snapshot(member, before) => {
                self.members.start(member)?;
                return Ok((format!("started {member}"), Some((member, before))));
            }
        };
        Ok((how, None))
    }

    /// Notes every member's hash of the store at one revision.
    pub async fn hashes(&self) {
        let read = self.members.client(0).await;
        let mut read = read.kv_client();
        let Ok(Ok(answer)) = tokio::time::timeout(RECOVERY / 10, read.get("hash", None)).await
        else {
            return;
        };
        let revision = answer.header().map_or(0, |h| h.revision());
        let mut hashes = Vec::new();
        for member in 0..self.members.size() {
            // After it has served a read it has this revision.
            let hash = async {
                if !self.members.serves(member).await {
                    return None;
                }
                let mut client = self.members.client(member).await.maintenance_client();
                let answer = client.hash_kv(revision).await.ok()?;
                Some((answer.hash(), answer.compact_version()))
            };
            hashes.push(tokio::time::timeout(RECOVERY / 5, hash).await.ok().flatten());
        }
        self.deeds.note(What::Hashes { revision, hashes });
    }

    fn others(&self, targets: &[usize]) -> Vec<usize> {
        (0..self.members.size()).filter(|m| !targets.contains(m)).collect()
    }

    fn a_follower(&mut self, leader: usize) -> usize {
        *self.others(&[leader]).choose(&mut self.random).expect("there are followers")
    }

    /// The leader first, then one or the other.
    fn leader_or_follower(&mut self, leader: usize) -> usize {
        if self.rounds == 0 || self.random.random_bool(0.5) {
            leader
        } else {
            self.a_follower(leader)
        }
    }

    /// How many members may be gone with the others still a majority.
    fn minority(&self) -> usize {
        (self.members.size() - 1) / 2
    }
}
