//! `health`: whether members can answer, for health checks of containers and for people.
//!
//! A member is healthy when it answers a linearizable read: then it is up, knows a leader that a
//! quorum follows, and has applied what the leader had.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::session::SessionError;
use super::session::endpoints::{Endpoints, reason, within};
use crate::pb::etcdserverpb::RangeRequest;
use crate::pb::etcdserverpb::kv_client::KvClient;

/// Nobody need have such a key; etcdctl asks for the same.
const KEY: &str = "health";

/// The command line of `health`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Exit codes: 0 when each endpoint is healthy, 1 otherwise, 2 wrong usage.")]
pub struct Options {
    /// Client URLs of the members; each is asked
    #[arg(long, value_delimiter = ',', default_value = "127.0.0.1:2379")]
    endpoints: Vec<String>,

    /// How long a member may take to answer, as in 500ms, 3s
    #[arg(long, default_value = "3s", value_parser = super::lock::duration)]
    timeout: Duration,
}

/// Asks each endpoint once, prints a line for each, and says by the exit code how it went.
pub async fn run(options: Options) -> ExitCode {
    let members = match parse(&options.endpoints) {
        Ok(members) => members,
        Err(error) => {
            eprintln!("holdfast: {error}");
            return ExitCode::from(2);
        }
    };
    let answers = join_all(members.iter().map(|member| ask(member, options.timeout))).await;
    let mut healthy = true;
    let mut lines = String::new();
    for (endpoint, answer) in options.endpoints.iter().zip(answers) {
        healthy &= answer.is_ok();
        lines += &match answer {
            Ok(took) => format!("{endpoint} is healthy: a read took {took:.1?}\n"),
            Err(why) => format!("{endpoint} is unhealthy: {why}\n"),
        };
    }
    // The exit code tells all, should nobody read.
    let _ = io::stdout().write_all(lines.as_bytes());
    if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(urls: &[String]) -> Result<Vec<Endpoints>, SessionError> {
    urls.iter().map(|url| Endpoints::new(std::slice::from_ref(url))).collect()
}

async fn ask(member: &Endpoints, limit: Duration) -> Result<Duration, String> {
    let began = Instant::now();
    let request = RangeRequest { key: KEY.into(), count_only: true, ..RangeRequest::default() };
    let answer = within(limit, KvClient::new(member.channel()).range(request)).await;
    match answer.map_err(verdict) {
        Err(Some(why)) => Err(why),
        Ok(_) | Err(None) => Ok(began.elapsed()),
    }
}

/// Why a member that answered so is not healthy; `None` when it is: a refusal by rights has been
/// through the same confirmation as an answer.
fn verdict(status: Status) -> Option<String> {
    (status.code() != Code::PermissionDenied).then(|| reason(&status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_only_refuses_the_key_is_healthy() {
        assert_eq!(verdict(Status::permission_denied("etcdserver: permission denied")), None);
        let why = verdict(Status::unavailable("etcdserver: no leader"));
        assert_eq!(why.as_deref(), Some("etcdserver: no leader"));
    }

    #[tokio::test]
    async fn nobody_is_healthy_where_nobody_listens() {
        let members = parse(&["127.0.0.1:1".to_owned()]).expect("an address");
        assert!(ask(&members[0], Duration::from_secs(1)).await.is_err());
        assert!(parse(&["https://a:1".to_owned()]).is_err());
    }
}
