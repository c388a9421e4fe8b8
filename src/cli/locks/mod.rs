//! `locks`: who holds what, who waits, and taking a lock away.
//!
//! A plain etcd has no such service. There `ls` and `show` read the keys `NAME/LEASEHEX` that are
//! attached to the lease they name, and say so.

mod inferred;
mod table;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::lock::default_owner;
use super::session::SessionError;
use super::session::endpoints::{Endpoints, reason};
use crate::pb::holdfastpb::locks_client::LocksClient;
use crate::pb::holdfastpb::{ForceReleaseRequest, GetRequest, ListRequest, Lock, WatchRequest};

/// After this long without an answer the cluster is out of reach.
const LIMIT: Duration = Duration::from_secs(5);
const OUT_OF_REACH: u8 = 76;

/// The command line of `locks`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Clone, Subcommand)]
enum Action {
    /// Locks and elections, one a line
    Ls {
        /// Only those whose names begin so
        #[arg(default_value = "")]
        prefix: String,
        #[command(flatten)]
        shared: Shared,
    },
    /// One lock: its holder, then those who wait
    Show {
        /// The lock
        name: String,
        #[command(flatten)]
        shared: Shared,
    },
    /// One lock now, and whenever it has changed, until a signal
    Watch {
        /// The lock
        name: String,
        #[command(flatten)]
        shared: Shared,
    },
    /// Take a lock from its holder, who may be at work still: only fences keep its writes out
    Release {
        /// The lock
        name: String,
        /// The holder's, so that nobody else loses it
        #[arg(long)]
        token: i64,
        /// Recorded, and told to the holder
        #[arg(long)]
        reason: String,
        /// Who does it, recorded too [default: HOST:PID]
        #[arg(long)]
        by: Option<String>,
        #[command(flatten)]
        endpoints: EndpointList,
    },
}

#[derive(Debug, Clone, Args)]
struct Shared {
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    endpoints: EndpointList,
}

#[derive(Debug, Clone, Args)]
struct EndpointList {
    /// Client URLs of the members, tried in turn
    #[arg(long, value_delimiter = ',', default_value = "127.0.0.1:2379")]
    endpoints: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
enum LocksError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("{0} is not available: the members have no holdfast.v1.Locks")]
    NotAvailable(&'static str),
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Does what is asked; the exit code is 1 when it is refused.
pub async fn run(options: Options) -> ExitCode {
    match act(options.action).await {
        Ok(()) => ExitCode::SUCCESS,
        // Who reads has seen enough.
        Err(LocksError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("holdfast: {error}");
            match error {
                LocksError::Session(SessionError::OutOfReach(_)) => ExitCode::from(OUT_OF_REACH),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

async fn act(action: Action) -> Result<(), LocksError> {
    match action {
        Action::Ls { prefix, shared } => {
            let mut endpoints = Endpoints::new(&shared.endpoints.endpoints)?;
            let locks = match list(&mut endpoints, &prefix).await {
                Err(error) if error.is_unimplemented() => {
                    inferred::say();
                    inferred::list(&mut endpoints, &prefix).await?
                }
                listed => listed?,
            };
            print(&locks, shared.json, table::of_locks)
        }
        Action::Show { name, shared } => {
            let mut endpoints = Endpoints::new(&shared.endpoints.endpoints)?;
            let shown = endpoints.ask(LIMIT, |channel| {
                let request = GetRequest { name: name.clone().into() };
                async move { LocksClient::new(channel).get(request).await }
            });
            let lock = match shown.await {
                Err(error) if error.is_unimplemented() => {
                    inferred::say();
                    inferred::get(&mut endpoints, &name).await?
                }
                shown => shown?.lock.unwrap_or_default(),
            };
            print(&[lock], shared.json, |locks| locks.iter().map(table::of_places).collect())
        }
        Action::Watch { name, shared } => {
            let endpoints = Endpoints::new(&shared.endpoints.endpoints)?;
            watch(endpoints, &name, shared.json).await
        }
        Action::Release { name, token, reason, by, endpoints } => {
            let mut endpoints = Endpoints::new(&endpoints.endpoints)?;
            let by = by.unwrap_or_else(default_owner);
            let released = endpoints.ask(LIMIT, |channel| {
                let request = ForceReleaseRequest {
                    name: name.clone().into(),
                    token,
                    by: by.clone(),
                    reason: reason.clone(),
                };
                async move { LocksClient::new(channel).force_release(request).await }
            });
            match released.await {
                Err(error) if error.is_unimplemented() => Err(LocksError::NotAvailable("release")),
                released => Ok(released.map(|_| ())?),
            }
        }
    }
}

async fn list(endpoints: &mut Endpoints, prefix: &str) -> Result<Vec<Lock>, SessionError> {
    let (mut locks, mut after) = (Vec::new(), bytes::Bytes::new());
    loop {
        let page = endpoints.ask(LIMIT, |channel| {
            let prefix = prefix.to_owned().into();
            let request = ListRequest { prefix, limit: 0, after: after.clone() };
            async move { LocksClient::new(channel).list(request).await }
        });
        let page = page.await?;
        locks.extend(page.locks);
        if page.next.is_empty() {
            return Ok(locks);
        }
        after = page.next;
    }
}

/// Prints states until a signal ends the process. When the member goes, the next one is asked, and
/// tells the present state again.
async fn watch(mut endpoints: Endpoints, name: &str, json: bool) -> Result<(), LocksError> {
    let mut header = !json;
    loop {
        let opened = endpoints.ask(LIMIT, |channel| {
            let request = WatchRequest { name: name.to_owned().into(), prefix: false };
            async move { LocksClient::new(channel).watch(request).await }
        });
        let mut answers = match opened.await {
            Err(error) if error.is_unimplemented() => {
                return Err(LocksError::NotAvailable("watch"));
            }
            opened => opened?,
        };
        let why = loop {
            match answers.message().await {
                Ok(Some(answer)) => {
                    let Some(lock) = answer.lock else { continue };
                    print(&[lock], json, |locks| {
                        let text = table::of_locks(locks);
                        let rows = if header { 0 } else { text.find('\n').map_or(0, |at| at + 1) };
                        header = false;
                        text[rows..].to_owned()
                    })?;
                }
                Ok(None) => break "the stream ended".to_owned(),
                Err(status) => break reason(&status),
            }
        };
        eprintln!("holdfast: the watch is opened again: {why}");
        endpoints.turn();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn print(
    locks: &[Lock],
    json: bool,
    table: impl FnOnce(&[Lock]) -> String,
) -> Result<(), LocksError> {
    let text = match json {
        true => locks.iter().map(|lock| format!("{}\n", table::json(lock))).collect(),
        false => table(locks),
    };
    let mut out = io::stdout();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn parse(arguments: &[&str]) -> Result<Action, clap::Error> {
        let arguments = std::iter::once(&"locks").chain(arguments);
        Line::try_parse_from(arguments).map(|line| line.options.action)
    }

    #[test]
    fn a_release_names_the_token_and_a_reason() {
        assert!(parse(&["release", "a", "--token", "5", "--reason", "stuck"]).is_ok());
        assert!(parse(&["release", "a", "--reason", "stuck"]).is_err());
        assert!(parse(&["release", "a", "--token", "5"]).is_err());
    }

    #[test]
    fn without_a_prefix_all_locks_are_listed() {
        let Action::Ls { prefix, shared } = parse(&["ls", "--json"]).unwrap() else {
            panic!("it is ls");
        };
        assert_eq!((prefix.as_str(), shared.json), ("", true));
    }
}
