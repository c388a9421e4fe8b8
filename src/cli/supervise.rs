//! Runs a command for as long as a lock is ours.
//!
//! The command has a process group of its own, so that a signal reaches all that it has started.
//! The signals that ask this process to end are passed on. When the lock is lost, or it is no
//! longer sure that it is not, the group is asked to end, and then made to.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};
use tokio::signal::unix::{self, SignalKind};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::session::Standing;

/// What happens to the command first when the lock is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnLost {
    /// SIGTERM, and SIGKILL after the grace
    Term,
    /// SIGKILL at once
    Kill,
}

/// How a command is stopped.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub on_lost: OnLost,
    pub grace: Duration,
}

impl Rule {
    /// How long after the last confirmation the command is stopped without another one: so early
    /// that it has its grace before the lease can end, but not before two thirds of its TTL.
    fn stop_after(self, ttl: Duration) -> Duration {
        let notice = match self.on_lost {
            OnLost::Term => self.grace,
            OnLost::Kill => Duration::ZERO,
        };
        ttl - notice.clamp(ttl / 10, ttl / 3)
    }

    /// How long after the last confirmation nothing of the command may run any more.
    fn kill_after(ttl: Duration) -> Duration {
        ttl - ttl / 20
    }

    /// When a command that was asked to end at `asked` is killed.
    fn kill_at(self, asked: Instant, standing: &Standing) -> Instant {
        let patient = asked + self.grace;
        match standing {
            Standing::Held { since, ttl } => patient.min(*since + Rule::kill_after(*ttl)),
            // Others may be at work already, or not: what is left to protect is the command.
            Standing::Unconfirmed | Standing::Lost(_) => patient,
        }
    }
}

/// The signals that ask this process to end. From the first of it on, they no longer do.
pub struct Signals {
    interrupt: unix::Signal,
    terminate: unix::Signal,
    hangup: unix::Signal,
}

impl Signals {
    pub fn new() -> io::Result<Signals> {
        Ok(Signals {
            interrupt: unix::signal(SignalKind::interrupt())?,
            terminate: unix::signal(SignalKind::terminate())?,
            hangup: unix::signal(SignalKind::hangup())?,
        })
    }

    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.hangup.recv() => Signal::HUP,
        }
    }
}

/// How it came to an end.
#[derive(Debug)]
pub enum End {
    /// The command ended by itself.
    Exited(ExitStatus),
    /// This process was told to end, and there was no command.
    Signalled,
    /// The lock was lost, or might have been: the user knows why. Nothing of the command runs any
    /// more.
    Lost,
}

/// Starts `command` with `environment` beside what this process has.
pub fn start(command: &[OsString], environment: &[(&str, String)]) -> io::Result<Child> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    Command::new(program)
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .process_group(0)
        .spawn()
}

/// Waits for the end of `child`; without one, for a signal. Ends it when `standing` demands that.
pub async fn supervise(
    mut child: Option<Child>,
    standing: &mut watch::Receiver<Standing>,
    signals: &mut Signals,
    rule: Rule,
) -> io::Result<End> {
    let group = child.as_ref().and_then(Child::id).and_then(|id| Pid::from_raw(id.cast_signed()));
    // Since when the command is being stopped.
    let mut stopping: Option<Instant> = None;
    let mut killed = false;
    let mut kept = true;
    loop {
        let now = standing.borrow_and_update().clone();
        let act_at = match (&stopping, &now) {
            (None, Standing::Lost(_)) => Some(Instant::now()),
            (None, Standing::Held { since, ttl }) => Some(*since + rule.stop_after(*ttl)),
            (None, Standing::Unconfirmed) => None,
            (Some(asked), standing) if !killed => Some(rule.kill_at(*asked, standing)),
            (Some(_), _) => None,
        };
        let act = async {
            match act_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let ended = async {
            match &mut child {
                Some(child) => child.wait().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            status = ended => {
                let status = status?;
                return Ok(match stopping {
                    Some(_) => {
                        // What it has started may be at work still.
                        signal(group, Signal::KILL);
                        End::Lost
                    }
                    None => End::Exited(status),
                });
            }
            changed = standing.changed(), if kept => kept = changed.is_ok(),
            () = act => {
                let first = stopping.is_none();
                if first {
                    let reason = match &now {
                        Standing::Lost(reason) => reason,
                        _ => "its lease was not confirmed in time",
                    };
                    eprintln!("holdfast: the lock is lost: {reason}");
                    stopping = Some(Instant::now());
                }
                if child.is_none() {
                    return Ok(End::Lost);
                }
                if first && rule.on_lost == OnLost::Term {
                    signal(group, Signal::TERM);
                } else {
                    killed = true;
                    signal(group, Signal::KILL);
                }
            }
            received = signals.next() => match child {
                Some(_) => signal(group, received),
                None => return Ok(End::Signalled),
            },
        }
    }
}

fn signal(group: Option<Pid>, signal: Signal) {
    if let Some(group) = group {
        // It fails only for a group that has ended, which is what signals here are for.
        let _ = kill_process_group(group, signal);
    }
}

/// The exit code of a command, as shells tell it.
pub fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn rule(on_lost: OnLost, grace: Duration) -> Rule {
        Rule { on_lost, grace }
    }

    #[test]
    fn a_command_has_its_grace_before_the_lease_can_end() {
        let stop = |grace| rule(OnLost::Term, grace).stop_after(30 * SECOND);
        assert_eq!(stop(5 * SECOND), 25 * SECOND);
        // Two attempts to renew are always allowed to fail.
        assert_eq!(stop(60 * SECOND), 20 * SECOND);
        // A machine is not always prompt.
        assert_eq!(stop(Duration::ZERO), 27 * SECOND);
        assert_eq!(rule(OnLost::Kill, 5 * SECOND).stop_after(30 * SECOND), 27 * SECOND);
    }

    #[test]
    fn nothing_runs_when_the_lease_may_end_however_long_the_grace() {
        let rule = rule(OnLost::Term, 60 * SECOND);
        let since = Instant::now();
        let held = Standing::Held { since, ttl: 10 * SECOND };
        let asked = since + rule.stop_after(10 * SECOND);
        assert_eq!(rule.kill_at(asked, &held), since + Duration::from_millis(9500));
        // A renewal that came too late to keep the command gives it more time to end.
        let later = Standing::Held { since: asked, ttl: 10 * SECOND };
        assert_eq!(rule.kill_at(asked, &later), asked + Duration::from_millis(9500));
    }

    #[test]
    fn a_lost_lock_leaves_the_command_its_grace() {
        let rule = rule(OnLost::Term, 5 * SECOND);
        let asked = Instant::now();
        assert_eq!(rule.kill_at(asked, &Standing::Lost(String::new())), asked + 5 * SECOND);
    }

    #[test]
    fn a_command_is_stopped_and_killed_before_its_lease_ends() {
        for ttl in [1, 2, 3, 10, 60, 86_400].map(|seconds| seconds * SECOND) {
            for grace in [0, 1, 5, 600].map(|seconds| seconds * SECOND) {
                let stop = rule(OnLost::Term, grace).stop_after(ttl);
                assert!(stop < Rule::kill_after(ttl) && Rule::kill_after(ttl) < ttl);
                assert!(stop >= ttl * 2 / 3);
            }
        }
    }

    #[test]
    fn exit_codes_are_those_of_shells() {
        assert_eq!(code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(code(ExitStatus::from_raw(15)), 128 + 15);
    }
}
