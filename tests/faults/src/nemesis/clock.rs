//! Jumps of a member's wall clock, by libfaketime. The monotonic clock goes on as it does.

use std::path::{Path, PathBuf};

use rand::Rng;

use super::{Injected, Nemesis, Undo};
use crate::members::Members;
use crate::shell::run;

const LIBRARIES: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
];

const JUMP_SECONDS: i64 = 300;

/// Has the members start with clocks that can jump.
pub fn prepare(members: &mut Members) -> Result<(), String> {
    let library = library()?;
    for member in 0..members.size() {
        let file = offset_file(members, member);
        std::fs::create_dir_all(members.data(member)).map_err(|e| e.to_string())?;
        std::fs::write(&file, "+0").map_err(|e| e.to_string())?;
        for (variable, value) in variables(&library, &file) {
            members.set(member, variable, &value);
        }
    }
    Ok(())
}

fn library() -> Result<String, String> {
    let found = LIBRARIES.iter().find(|l| Path::new(l).exists());
    found.map(|l| (*l).to_owned()).ok_or("there is no libfaketime".to_owned())
}

fn variables(library: &str, file: &Path) -> [(&'static str, String); 4] {
    [
        ("LD_PRELOAD", library.to_owned()),
        ("FAKETIME_TIMESTAMP_FILE", file.to_string_lossy().into_owned()),
        ("FAKETIME_NO_CACHE", "1".to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ]
}

fn offset_file(members: &Members, member: usize) -> PathBuf {
    members.data(member).join("clock-offset")
}

impl Nemesis<'_> {
    pub(super) fn jump(&mut self, leader: usize) -> Result<Injected, String> {
        let target = self.leader_or_follower(leader);
        let pid = self.members.pid(target).ok_or("the member does not run")?;
        let maps =
            std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|e| e.to_string())?;
        if !maps.contains("libfaketime") {
            return Err("the program is linked statically: its clock cannot be set".to_owned());
        }
        let jump = if self.random.random_bool(0.5) { JUMP_SECONDS } else { -JUMP_SECONDS };
        std::fs::write(offset_file(self.members, target), format!("{jump:+}"))
            .map_err(|e| e.to_string())?;
        let how = format!("the wall clock of {target} jumps by {jump} s, leader {leader}");
        let well = self.others(&[]);
        let should = well.len();
        Ok(Injected { targets: vec![target], how, well, should, undo: Undo::SetClock(target) })
    }

    /// A program that runs with the same clock tells the time of it.
    pub(super) fn confirm_jumped(&self, member: usize) -> Result<String, String> {
        let seconds = |printed: String| printed.trim().parse::<i64>().map_err(|e| e.to_string());
        let now = seconds(run("date", &["+%s"])?)?;
        let set = variables(&library()?, &offset_file(self.members, member));
        let mut arguments: Vec<String> = set.iter().map(|(n, v)| format!("{n}={v}")).collect();
        arguments.extend(["date".to_owned(), "+%s".to_owned()]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let theirs = seconds(run("env", &arguments)?)?;
        match (theirs - now).abs() >= JUMP_SECONDS - 5 {
            true => Ok(format!("its clock is {} s off", theirs - now)),
            false => Err(format!("its clock is only {} s off", theirs - now)),
        }
    }

    pub(super) fn set_clock_right(&self, member: usize) -> Result<String, String> {
        let file = offset_file(self.members, member);
        std::fs::write(file, "+0").map_err(|e| e.to_string())?;
        Ok(format!("the clock of {member} is right"))
    }
}
