//! `lock` and `elect`: run a command while a lock is held, or while an election is won.
//!
//! What is lost when this process is killed with SIGKILL is the supervision, not the command: it
//! goes on, and others get the lock when the lease has run out. Fenced writes are for that.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::session::endpoints::Endpoints;
use super::session::{Grip, Left, Session, SessionError, Standing, Taken, Wanted};
use super::supervise::{self, End, OnLost, Rule, Signals};

/// The lock was lost while the command ran.
const LOST: u8 = 74;
/// Somebody else has it.
const NOT_ACQUIRED: u8 = 75;
const OUT_OF_REACH: u8 = 76;
/// As shells have it.
const NOT_RUNNABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

const MAX_TTL_SECONDS: u64 = 9_000_000_000;

/// The command line of `lock`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXIT_CODES)]
pub struct LockOptions {
    /// The lock
    name: String,
    #[command(flatten)]
    guard: Guard,
}

/// The command line of `elect`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXIT_CODES)]
pub struct ElectOptions {
    /// The election
    name: String,
    /// What the leader proclaims
    value: String,
    #[command(flatten)]
    guard: Guard,
}

const EXIT_CODES: &str = "\
The command finds in its environment: ETCD_LOCK_KEY, the key; ETCD_LOCK_REV, the revision of the
grant; HOLDFAST_FENCE, NAME=TOKEN for the metadata holdfast-fence.

Exit codes: that of the command (128 and the signal that ended it), 74 lost, 75 not acquired,
76 cluster out of reach, 126 and 127 the command cannot be run, 1 refused, 2 wrong usage.";

/// What `lock` and `elect` have in common.
#[derive(Debug, Clone, Args)]
struct Guard {
    /// Wait at most this long, as in 500ms, 30s, 5m [default: as long as it takes]
    #[arg(long, value_parser = duration)]
    wait: Option<Duration>,

    /// Do not wait
    #[arg(long = "try", conflicts_with = "wait")]
    only_try: bool,

    /// How long it stays taken when this process or its network fails, in whole seconds
    #[arg(long, default_value = "10s", value_parser = ttl_seconds)]
    ttl: i64,

    /// What happens to the command first when the lock is lost, or may be
    #[arg(long, value_enum, default_value = "term")]
    on_lost: OnLost,

    /// From SIGTERM to SIGKILL; less if the lease may end earlier
    #[arg(long, default_value = "5s", value_parser = duration)]
    grace: Duration,

    /// Client URLs of the members, tried in turn
    #[arg(long, value_delimiter = ',', default_value = "127.0.0.1:2379")]
    endpoints: Vec<String>,

    /// Shown to others [default: HOST:PID]
    #[arg(long)]
    owner: Option<String>,

    /// What to run; without it, print the key and NAME=TOKEN, and hold until told to end
    #[arg(last = true)]
    command: Vec<OsString>,
}

/// Runs `lock` to its end.
pub async fn lock(options: LockOptions) -> ExitCode {
    run(options.name, None, options.guard).await
}

/// Runs `elect` to its end.
pub async fn elect(options: ElectOptions) -> ExitCode {
    run(options.name, Some(options.value), options.guard).await
}

/// How this process is shown to others unless it is told otherwise.
pub fn default_owner() -> String {
    let host = rustix::system::uname();
    format!("{}:{}", host.nodename().to_string_lossy(), std::process::id())
}

async fn run(name: String, value: Option<String>, guard: Guard) -> ExitCode {
    let wanted = Wanted {
        name,
        value,
        ttl_seconds: guard.ttl,
        owner: guard.owner.clone().unwrap_or_else(default_owner),
        wait: if guard.only_try { Some(Duration::ZERO) } else { guard.wait },
    };
    let failed = |error: &dyn std::fmt::Display, code| {
        eprintln!("holdfast: {error}");
        ExitCode::from(code)
    };
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return failed(&error, 1),
    };
    let name = wanted.name.clone();
    let mut session = match Endpoints::new(&guard.endpoints) {
        Ok(endpoints) => Session::new(endpoints, wanted),
        Err(error) => return failed(&error, 2),
    };
    let taken = tokio::select! {
        taken = session.take() => taken,
        signal = signals.next() => {
            session.abandon().await;
            return ExitCode::from(128 + u8::try_from(signal.as_raw()).unwrap_or(0));
        }
    };
    match taken {
        Ok(Taken::Granted(grip)) => hold(&name, grip, &guard, &mut signals).await,
        Ok(Taken::Busy(holder)) => failed(&format!("{name} not acquired: {holder}"), NOT_ACQUIRED),
        Err(error @ SessionError::OutOfReach(_)) => failed(&error, OUT_OF_REACH),
        Err(error) => failed(&error, 1),
    }
}

/// Runs the command under `grip`, and gives that up at the end.
async fn hold(name: &str, mut grip: Grip, guard: &Guard, signals: &mut Signals) -> ExitCode {
    let rule = Rule { on_lost: guard.on_lost, grace: guard.grace };
    let mut early = None;
    tokio::select! {
        () = grip.confirmed() => {}
        signal = signals.next() => early = Some(signal),
    }
    if let Some(signal) = early {
        grip.release().await;
        return ExitCode::from(128 + u8::try_from(signal.as_raw()).unwrap_or(0));
    }
    // One that is lost already starts nothing.
    let lost = match &*grip.standing.borrow() {
        Standing::Lost(reason) => Some(reason.clone()),
        Standing::Held { .. } | Standing::Unconfirmed => None,
    };
    let end = match lost {
        Some(reason) => {
            eprintln!("holdfast: the lock is lost: {reason}");
            Ok(End::Lost)
        }
        None => match begin(name, &grip, guard) {
            Ok(child) => supervise::supervise(child, &mut grip.standing, signals, rule).await,
            Err(error) => Err(error),
        },
    };
    let code = match &end {
        Ok(End::Exited(status)) => supervise::code(*status),
        Ok(End::Signalled) => 0,
        Ok(End::Lost) => LOST,
        Err(error) => {
            let program = guard.command.first().map(|program| program.to_string_lossy());
            eprintln!("holdfast: {}: {error}", program.unwrap_or("standard output".into()));
            if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUNNABLE }
        }
    };
    match grip.release().await {
        Left::Released => ExitCode::from(code),
        Left::Gone(_) if code == LOST => ExitCode::from(LOST),
        Left::Gone(reason) => {
            eprintln!("holdfast: {name} was lost before the end: {reason}");
            ExitCode::from(LOST)
        }
        Left::Unknown(reason) => {
            eprintln!("holdfast: {name} stays taken until its lease runs out: {reason}");
            ExitCode::from(code)
        }
    }
}

/// Starts the command, or says what is held if there is none.
fn begin(name: &str, grip: &Grip, guard: &Guard) -> io::Result<Option<tokio::process::Child>> {
    let fence = format!("{name}={}", grip.token);
    let key = String::from_utf8_lossy(&grip.key).into_owned();
    if guard.command.is_empty() {
        let mut out = io::stdout();
        writeln!(out, "{key}\n{fence}")?;
        out.flush()?;
        return Ok(None);
    }
    let environment = [
        ("ETCD_LOCK_KEY", key),
        ("ETCD_LOCK_REV", grip.revision.to_string()),
        ("HOLDFAST_FENCE", fence),
    ];
    supervise::start(&guard.command, &environment).map(Some)
}

/// A number with `ms`, `s`, `m` or `h`; without a unit it counts seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("the unit is none of ms, s, m and h".to_owned()),
    };
    let number: f64 = digits.parse().map_err(|_| format!("{digits:?} is not a number"))?;
    Duration::try_from_secs_f64(number * unit).map_err(|error| error.to_string())
}

fn ttl_seconds(text: &str) -> Result<i64, String> {
    let ttl = duration(text)?;
    let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
    match i64::try_from(seconds) {
        Ok(whole) if (1..=MAX_TTL_SECONDS).contains(&seconds) => Ok(whole),
        _ => Err(format!("it is not between 1s and {MAX_TTL_SECONDS}s")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct LockLine {
        #[command(flatten)]
        options: LockOptions,
    }

    #[derive(Parser)]
    struct ElectLine {
        #[command(flatten)]
        options: ElectOptions,
    }

    fn lock(arguments: &[&str]) -> Result<LockOptions, clap::Error> {
        let arguments = std::iter::once(&"lock").chain(arguments);
        LockLine::try_parse_from(arguments).map(|line| line.options)
    }

    #[test]
    fn what_follows_the_dashes_is_the_command_whatever_it_looks_like() {
        let options = lock(&["jobs", "--ttl", "30s", "--", "sh", "--try", "-c"]).unwrap();
        assert_eq!(options.name, "jobs");
        assert_eq!(options.guard.ttl, 30);
        assert!(!options.guard.only_try);
        assert_eq!(options.guard.command, ["sh", "--try", "-c"]);
        assert!(lock(&["jobs", "sh"]).is_err());
        assert!(lock(&["jobs"]).unwrap().guard.command.is_empty());
    }

    #[test]
    fn to_try_and_to_wait_exclude_each_other() {
        assert!(lock(&["jobs", "--try"]).unwrap().guard.only_try);
        let waits = lock(&["jobs", "--wait", "1.5s"]).unwrap().guard.wait;
        assert_eq!(waits, Some(Duration::from_millis(1500)));
        assert!(lock(&["jobs", "--try", "--wait", "1s"]).is_err());
    }

    #[test]
    fn an_election_has_a_value() {
        let line = ["elect", "db", "host:1", "--on-lost", "kill", "--", "true"];
        let options = ElectLine::try_parse_from(line).map(|line| line.options).unwrap();
        assert_eq!((options.name.as_str(), options.value.as_str()), ("db", "host:1"));
        assert_eq!(options.guard.on_lost, OnLost::Kill);
        assert!(ElectLine::try_parse_from(["elect", "db", "--", "true"]).is_err());
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("7"), Ok(Duration::from_secs(7)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
        for wrong in ["", "s", "-1s", "1d", "1 s", "infs"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_ttl_is_rounded_up_to_whole_seconds() {
        assert_eq!(ttl_seconds("1500ms"), Ok(2));
        assert!(ttl_seconds("0").is_err());
        assert!(ttl_seconds("10000000000s").is_err());
    }
}
