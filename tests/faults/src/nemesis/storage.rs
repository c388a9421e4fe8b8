//! Faults of disks and files: slow, full, damaged, and a log that the others no longer have.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_client_tests::program::target_is_etcd;
use holdfast_client_tests::wire::Wire;
use rand::Rng;
use rand::seq::IndexedRandom;
use rustix::process::Signal;

use super::{Injected, Nemesis, RECOVERY, Undo};
use crate::shell::run;

/// What a slow disk lets through.
const WRITES_A_SECOND: u32 = 20;
/// The least time that a sync then takes; a fast one takes a few milliseconds.
const SLOW_SYNC: Duration = Duration::from_millis(40);

/// How long a member with damaged files may take to refuse or to serve.
const REFUSAL: Duration = Duration::from_secs(8);

/// More entries than the others keep behind a snapshot, which is 5,000.
const ENTRIES_BEHIND: usize = 8000;
const FILLERS: usize = 32;
/// In which a follower makes the snapshots that are due and drops its log behind them.
const UNTIL_PURGED: Duration = Duration::from_millis(2500);

impl Nemesis<'_> {
    pub(super) fn slow_disk(&mut self, leader: usize) -> Result<Injected, String> {
        if !crate::disks::can_be_slow() {
            return Err("there is no blkio controller of cgroup v1".to_owned());
        }
        let target = self.leader_or_follower(leader);
        self.disks[target].limit(WRITES_A_SECOND)?;
        let how = format!("{WRITES_A_SECOND} writes a second for {target}, leader {leader}");
        // With a slow leader everything may be slow.
        let well = if target == leader { vec![] } else { self.others(&[target]) };
        let should = well.len();
        Ok(Injected { targets: vec![target], how, well, should, undo: Undo::Fast(target) })
    }

    pub(super) fn confirm_slow(&self, member: usize) -> Result<String, String> {
        let took = self.disks[member].sync_time()?;
        let text = format!("a sync takes {took:.1?}");
        if took >= SLOW_SYNC { Ok(text) } else { Err(text) }
    }

    pub(super) fn fill_disk(&mut self, leader: usize) -> Result<Injected, String> {
        let target = self.leader_or_follower(leader);
        let seen = self.disks[target].fill()?;
        let how = format!("no space for {target}, leader {leader}; {seen}");
        // It may go on for as long as it finds space in its files: the others serve all the same.
        let well = self.others(&[target]);
        let should = well.len();
        Ok(Injected { targets: vec![target], how, well, should, undo: Undo::Free(target) })
    }

    pub(super) fn confirm_full(&mut self, member: usize) -> Result<String, String> {
        let seen = self.disks[member].fill()?;
        let ended = self.members.ended(member);
        Ok(format!("{seen}; the member {}", ended.unwrap_or_else(|| "runs".to_owned())))
    }

    pub(super) fn free_disk(&mut self, member: usize) -> Result<String, String> {
        self.disks[member].free()?;
        if self.members.ended(member).is_some() {
            self.members.start(member)?;
            return Ok(format!("space for {member}, which was started again"));
        }
        Ok(format!("space for {member}"))
    }

    /// Stops a follower, flips bits in its files, and starts it again.
    pub(super) async fn corrupt(&mut self, leader: usize) -> Result<Injected, String> {
        let target = self.a_follower(leader);
        self.members.kill(target);
        let data = self.members.data(target).to_owned();
        let saved = data.with_extension("saved");
        let (from, to) = (data.to_string_lossy(), saved.to_string_lossy());
        run("rm", &["-rf", &to])?;
        run("cp", &["-a", "--sparse=always", &from, &to])?;
        let mut files = Vec::new();
        find_files(&data, &mut files).map_err(|e| e.to_string())?;
        let mut how = Vec::new();
        for _ in 0..self.random.random_range(1..4) {
            let path = files.choose(&mut self.random).ok_or("it has no files")?.clone();
            how.push(self.flip(&path)?);
        }
        self.members.start(target)?;
        let deadline = tokio::time::Instant::now() + REFUSAL;
        while self.members.ended(target).is_none() && tokio::time::Instant::now() < deadline {
            if self.members.serves(target).await {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let well = self.others(&[target]);
        let should = well.len();
        let how = format!("member {target}: {}", how.join(", "));
        Ok(Injected {
            targets: vec![target],
            how,
            well,
            should,
            undo: Undo::Restore(target, saved),
        })
    }

    /// Flips some bits of a file, before its end of nothing but zeros.
    fn flip(&mut self, path: &Path) -> Result<String, String> {
        let io = |e: std::io::Error| format!("{}: {e}", path.display());
        let mut bytes = fs::read(path).map_err(io)?;
        let written = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        if written == 0 {
            return Ok(format!("{} is empty", path.display()));
        }
        let at: Vec<usize> = (0..4).map(|_| self.random.random_range(0..written)).collect();
        for at in &at {
            bytes[*at] ^= 1 << self.random.random_range(0..8);
        }
        fs::write(path, bytes).map_err(io)?;
        Ok(format!("bits of {} at {at:?} of {written}", path.display()))
    }

    pub(super) fn confirm_corrupted(&mut self, member: usize) -> Result<String, String> {
        match self.members.ended(member) {
            Some(_) => {
                let printed = self.members.printed(member);
                let last = printed.lines().rev().find(|l| !l.trim().is_empty());
                Ok(format!("it refused: {}", last.unwrap_or_default()))
            }
            None => Ok("it runs".to_owned()),
        }
    }

    pub(super) fn restore(&mut self, member: usize, saved: &Path) -> Result<String, String> {
        let data = self.members.data(member).to_owned();
        let refused = self.members.ended(member).is_some();
        let (from, to) = (saved.to_string_lossy(), data.to_string_lossy());
        if refused {
            // The mount stays, if it is one.
            run("find", &[&to, "-mindepth", "1", "-delete"])?;
            run("cp", &["-a", &format!("{from}/."), &to])?;
            self.members.start(member)?;
        }
        run("rm", &["-rf", &from])?;
        Ok(match refused {
            true => format!("member {member} has its files back"),
            false => format!("member {member} went on with what it had"),
        })
    }

    /// Stops a follower, has the others go so far on that they no longer keep what it misses, and
    /// compacts the history behind the witnesses.
    pub(super) async fn leave_behind(&mut self, leader: usize) -> Result<Injected, String> {
        let target = self.a_follower(leader);
        let before = self.state_of(target)?;
        // The witnesses must have seen what is compacted, and the target's will see no more.
        let revision = self.witnesses.map_or(0, |w| w.seen_by_all());
        self.members.kill(target);
        let mut fillers = tokio::task::JoinSet::new();
        for _ in 0..FILLERS {
            let wire = Wire::lazy(&self.members.endpoint(leader));
            fillers.spawn(async move {
                for _ in 0..ENTRIES_BEHIND / FILLERS + 1 {
                    // An entry without a revision: nobody has this key.
                    wire.delete("nobody has this key", "").await.map_err(|e| e.to_string())?;
                }
                Ok::<(), String>(())
            });
        }
        for filled in fillers.join_all().await {
            filled.map_err(|e| format!("the log could not be made longer: {e}"))?;
        }
        let mut how = format!("{ENTRIES_BEHIND} entries without member {target}");
        if revision > 1 {
            let compacted = Wire::lazy(&self.members.endpoint(leader)).compact(revision).await;
            compacted.map_err(|e| format!("compaction: {e}"))?;
            how += &format!(", compacted to {revision}");
        }
        // Nothing tells from outside how far a member's log goes back.
        tokio::time::sleep(UNTIL_PURGED).await;
        // The leader may keep for the target what it still tries to send. Another, which was a follower
        // until now, has kept nothing.
        self.hand_over(leader).await?;
        let well = self.others(&[target]);
        let should = well.len();
        let undo = Undo::Snapshot(target, before);
        Ok(Injected { targets: vec![target], how, well, should, undo })
    }

    /// Has the leader hand over and go, and starts it again.
    async fn hand_over(&mut self, leader: usize) -> Result<(), String> {
        self.members.signal(leader, Signal::TERM)?;
        let deadline = tokio::time::Instant::now() + RECOVERY;
        while self.members.ended(leader).is_none() {
            if tokio::time::Instant::now() > deadline {
                return Err(format!("leader {leader} did not end within {RECOVERY:?} of SIGTERM"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.members.start(leader)
    }

    /// Which state a member uses. A snapshot makes it use another.
    fn state_of(&self, member: usize) -> Result<String, String> {
        if target_is_etcd() {
            let count = self.members.printed(member).matches("applied snapshot").count();
            return Ok(count.to_string());
        }
        let mut files = Vec::new();
        find_files(self.members.data(member), &mut files).map_err(|e| e.to_string())?;
        let current = files.iter().find(|f| f.file_name().is_some_and(|n| n == "CURRENT"));
        let current = current.ok_or("it has no state")?;
        fs::read_to_string(current).map_err(|e| e.to_string())
    }

    pub(super) fn confirm_snapshot(&self, member: usize, before: &str) {
        self.note_shown(match self.state_of(member) {
            Ok(now) if now != before => {
                Ok(format!("member {member} went from {} to {}", before.trim(), now.trim()))
            }
            Ok(_) => Err(format!("member {member} was sent no snapshot")),
            Err(why) => Err(why),
        });
    }
}

fn find_files(dir: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() && entry.file_name() != "lost+found" {
            find_files(&entry.path(), files)?;
        } else if kind.is_file() && entry.metadata()?.len() > 0 {
            files.push(entry.path());
        }
    }
    files.sort_unstable();
    Ok(())
}
