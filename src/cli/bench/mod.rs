//! `bench`: a closed-loop load generator for any etcd v3 endpoints.
//!
//! Each client has one operation under way at a time and begins the next when it has the answer.
//! So the throughput shown is what that many clients get from the cluster; it is not a rate that
//! was asked for, and the latency under a fixed rate may be worse.
//!
//! Only the generated clients are used, so a real etcd can be measured with the same generator.
//! The keys that a run writes stay behind, under `--prefix`.

// This measures real time by intent and is never part of a simulation.
#![allow(clippy::disallowed_methods)]

mod cases;
mod catch_up;
mod channels;
mod connection;
mod cpu;
mod elections;
mod keep_alive;
mod keys;
mod lease_calls;
mod lease_end;
mod leases;
mod load;
mod queues;
mod reads;
mod report;
mod tally;
mod txns;
mod watch;
mod watch_prefix;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::runtime::{Builder, Runtime};

use super::session::endpoints::root_cause;
use channels::Channels;
use cpu::CpuMeter;
use load::Plan;
use report::Report;

/// Which operation is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// Write a random key of the key space, all of which exist
    Put,
    /// Read a random key, linearizable
    Range,
    /// Read a random key from what the asked member has
    RangeSerializable,
    /// Read 1,000 keys from a random one on, with the number of all that follow, linearizable
    Page,
    /// Count the whole key space, linearizable
    Count,
    /// Compare-and-swap by modification revision; a client works on one key
    Txn,
    /// Put ten neighbouring keys in one transaction
    Txn10,
    /// Lock and Unlock, together one operation; where clients share names, also how long a lock took
    /// from one to the next
    Lock,
    /// Campaign and Resign, together one operation, as with locks
    Campaign,
    /// Each client leads an election of its own, and gives its key another value
    Proclaim,
    /// Every client observes the one election whose leader proclaims as fast as it gets answers; an
    /// operation is one leader told, its latency counts from the sending of the proclamation
    Observe,
    /// Fan-out: every client watches the one key that a further client writes; an operation is
    /// one event delivered, its latency counts from the sending of the write
    Watch,
    /// Every client writes random keys of a prefix that one watcher on each connection watches; an
    /// operation is one event delivered, its latency counts from the sending of the write
    WatchPrefix,
    /// One watcher reads as many past events as the key space has keys, once; an operation is one
    /// event, its latency counts from the request
    CatchUp,
    /// Every client keeps one lease alive over a stream of its own, asking again at each answer
    KeepAlive,
    /// Grant a lease; they run out by themselves in ten minutes
    LeaseGrant,
    /// Grant a lease, put ten keys with it one by one, and revoke it, together one operation
    LeaseCycle,
    /// Every client lets a lease with one key end, all at the same time, once; an operation is one
    /// delete event, its latency counts from the moment the lease's time had run out
    LeaseEnd,
}

/// The command line of `bench`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// What to measure
    #[arg(value_enum)]
    case: Case,

    /// Client URLs of the members; the connections are spread over them in turn
    #[arg(long, value_delimiter = ',', default_value = "127.0.0.1:2379")]
    endpoints: Vec<String>,

    /// Clients, each with one operation under way at a time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    clients: u32,

    /// Connections that the clients share in turn [default: one for each endpoint]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    connections: Option<u32>,

    /// Seconds to measure
    #[arg(long, default_value = "10", value_parser = seconds, conflicts_with = "total")]
    duration: Duration,

    /// Measure this many operations instead of a time; in case watch this many writes
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    total: Option<u64>,

    /// Seconds under load before the measurement begins
    #[arg(long, default_value = "1", value_parser = seconds)]
    warmup: Duration,

    /// Seconds after which an operation is given up and counted as an error
    #[arg(long, default_value = "10", value_parser = seconds)]
    timeout: Duration,

    /// Bytes of each value
    #[arg(long, default_value_t = 256)]
    value_size: usize,

    /// How many keys the operations are spread over
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    key_space: u32,

    /// How many locks or elections the clients share [default: one for each client]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    names: Option<u32>,

    /// Leases alive beside the ones that end, in case lease-end
    #[arg(long, default_value_t = 0)]
    others: u32,

    /// Use only those endpoints whose member does not lead at the start
    #[arg(long)]
    followers: bool,

    /// What every key begins with
    #[arg(long, default_value = "bench")]
    prefix: String,

    /// Processes on this machine whose CPU time is to be measured
    #[arg(long, value_delimiter = ',')]
    pids: Vec<u32>,

    /// Threads of the generator
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    threads: u32,

    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

impl Options {
    /// How many connections to open to `endpoints` members.
    fn connections(&self, endpoints: usize) -> usize {
        let default = self.clients.min(u32::try_from(endpoints).unwrap_or(u32::MAX));
        self.connections.unwrap_or(default) as usize
    }

    fn plan(&self) -> Plan {
        Plan {
            warmup: self.warmup,
            duration: self.duration,
            total: self.total,
            timeout: self.timeout,
            shards: self.threads as usize,
        }
    }
}

/// Why a run could not be started or carried to its end.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error("endpoint {0}: only plain http is supported")]
    Scheme(String),
    #[error("endpoint {url}: {}", root_cause(source))]
    Connect { url: String, source: std::io::Error },
    #[error("{what}: {source}")]
    Prepare { what: &'static str, source: tonic::Status },
    #[error("none of the members follows")]
    NoFollower,
    #[error("CPU time of process {pid}: {source}")]
    Cpu { pid: u32, source: std::io::Error },
    #[error("runtime: {0}")]
    Runtime(std::io::Error),
}

/// Runs one case and prints what was measured.
///
/// Success means that at least one operation succeeded, not that none failed.
pub fn run(options: &Options) -> ExitCode {
    let report = runtime(options).and_then(|runtime| runtime.block_on(measure(options)));
    match report {
        Ok(report) => {
            if options.json {
                println!("{}", report.json());
            } else {
                print!("{report}");
            }
            if report.operations > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn runtime(options: &Options) -> Result<Runtime, BenchError> {
    let mut builder = match options.threads {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    builder
        .worker_threads(options.threads as usize)
        .enable_all()
        .build()
        .map_err(BenchError::Runtime)
}

async fn measure(options: &Options) -> Result<Report, BenchError> {
    let meter = CpuMeter::new(&options.pids)?;
    let channels = Channels::open(options).await?;
    let measured = cases::run(options, &channels, &meter).await?;
    Ok(Report::new(options, channels.len(), measured))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text} is not a number"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        options: Options,
    }

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        let arguments = std::iter::once(&"bench").chain(arguments);
        CommandLine::try_parse_from(arguments).map(|line| line.options)
    }

    #[test]
    fn lists_are_separated_by_commas() {
        let options = parse(&["put", "--endpoints", "a:1,b:2,c:3", "--pids", "7,8"]).unwrap();
        assert_eq!(options.endpoints, ["a:1", "b:2", "c:3"]);
        assert_eq!(options.pids, [7, 8]);
    }

    #[test]
    fn one_client_needs_only_one_connection() {
        let options = parse(&["put", "--endpoints", "a,b,c", "--clients", "1"]).unwrap();
        assert_eq!(options.connections(3), 1);
        let options = parse(&["put", "--endpoints", "a,b,c", "--clients", "64"]).unwrap();
        assert_eq!(options.connections(3), 3);
    }

    #[test]
    fn a_time_and_a_number_of_operations_exclude_each_other() {
        assert!(parse(&["put", "--total", "10"]).is_ok());
        assert!(parse(&["put", "--total", "10", "--duration", "3"]).is_err());
    }

    #[test]
    fn cases_are_named_with_hyphens() {
        assert_eq!(parse(&["range-serializable"]).unwrap().case, Case::RangeSerializable);
    }
}
