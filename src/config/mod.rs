//! How a member is configured: flags and environment in, a checked [`Config`] out.
//!
//! The flags are etcd's, with etcd's defaults and rules; where a value is refused, one line says
//! what to do. Checking touches neither network nor disk. What only those can tell (a busy port, a
//! data folder of another cluster) is refused where they are opened.

mod args;
mod cluster;
mod duration;
mod error;
mod etcd_flags;
#[cfg(test)]
mod tests;
mod urls;

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

pub use args::{ENVIRONMENT_HELP, MemberArgs, ServerArgs, one_line};
pub use cluster::{cluster_id, member_id};
pub use error::ConfigError;
pub use urls::{ListenUrl, UrlError};

use crate::concurrency::rules::Rules;
use crate::node::{AuthSettings, AutoCompaction, ChangeRules};
use crate::telemetry::{LogFormat, LogLevel};
use crate::types::{ClusterId, MemberId};
use args::flag;

const DEFAULT_CLIENT_URL: &str = "http://localhost:2379";
const DEFAULT_PEER_URL: &str = "http://localhost:2380";
const DEFAULT_SNAPSHOT_COUNT: u64 = 10_000;

/// Calls under way on one connection. A waiting Lock, a watch or a keep-alive is one each.
const DEFAULT_MAX_CONCURRENT_STREAMS: u64 = 100_000;

/// A record must fit well into one segment of the log.
const LARGEST_MAX_REQUEST_BYTES: u64 = 32 << 20;
const RECOMMENDED_MAX_REQUEST_BYTES: u64 = 10 << 20;

/// A hundred years.
const MOST_TOKEN_TTL_SECONDS: u64 = 100 * 366 * 86_400;

const DEFAULT_QUOTA_BYTES: u64 = 2 << 30;
const RECOMMENDED_QUOTA_BYTES: u64 = 8 << 30;

/// One member's configuration. All rules between the values hold.
///
/// URLs are normalised: lower case, nothing behind the port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub name: String,
    /// May not exist yet. By default `NAME.holdfast` in the working directory.
    pub data_dir: PathBuf,
    pub listen_client: Vec<ListenUrl>,
    pub advertise_client_urls: Vec<String>,
    pub listen_peer: Vec<ListenUrl>,
    pub initial_advertise_peer_urls: Vec<String>,
    /// Names with their peer URLs, sorted by name. This member is among them.
    pub initial_cluster: Vec<(String, Vec<String>)>,
    pub initial_cluster_state: InitialClusterState,
    pub initial_cluster_token: String,
    pub change_rules: ChangeRules,
    /// At most a fifth of the election timeout.
    pub heartbeat_interval: Duration,
    pub election_timeout: Duration,
    pub snapshot_count: u64,
    pub log_level: LogLevel,
    pub log_format: LogFormat,
    pub max_request_bytes: usize,
    pub max_txn_ops: usize,
    /// How much the store may take; `None`: as much as it needs.
    pub quota_bytes: Option<u64>,
    pub worker_threads: usize,
    /// Where metrics and probes are served beside the client port.
    pub listen_metrics: Vec<ListenUrl>,
    pub auto_compaction: Option<AutoCompaction>,
    /// How often an idle watch hears of its progress.
    pub progress_interval: Duration,
    /// On one connection.
    pub max_concurrent_streams: u32,
    /// Silence after which a client is asked whether it is there; `None` for never.
    pub keepalive_interval: Option<Duration>,
    pub keepalive_timeout: Duration,
    pub metrics: MetricsKind,
    /// An entry that takes this long to apply is worth a warning.
    pub slow_apply: Duration,
    pub lock_rules: Rules,
    pub auth: AuthSettings,
    /// What the operator should know, to be logged once there is a log.
    pub warnings: Vec<String>,
}

/// Whether the cluster begins with this start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum InitialClusterState {
    #[default]
    New,
    Existing,
}

impl FromStr for InitialClusterState {
    type Err = ();

    fn from_str(text: &str) -> Result<InitialClusterState, ()> {
        match text {
            "new" => Ok(InitialClusterState::New),
            "existing" => Ok(InitialClusterState::Existing),
            _ => Err(()),
        }
    }
}

/// How much is measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MetricsKind {
    #[default]
    Basic,
    /// How long each call takes, too.
    Extensive,
}

impl FromStr for MetricsKind {
    type Err = ();

    fn from_str(text: &str) -> Result<MetricsKind, ()> {
        match text {
            "basic" => Ok(MetricsKind::Basic),
            "extensive" => Ok(MetricsKind::Extensive),
            _ => Err(()),
        }
    }
}

/// What the auto-compaction's number means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum CompactionMode {
    #[default]
    Periodic,
    Revision,
}

impl FromStr for CompactionMode {
    type Err = ();

    fn from_str(text: &str) -> Result<CompactionMode, ()> {
        match text {
            "periodic" => Ok(CompactionMode::Periodic),
            "revision" => Ok(CompactionMode::Revision),
            _ => Err(()),
        }
    }
}

impl Config {
    /// This member's id, if the cluster begins with `initial_cluster`.
    pub fn member_id(&self) -> MemberId {
        member_id(&self.initial_advertise_peer_urls, &self.initial_cluster_token)
    }

    /// The id of each initial member, in the order of `initial_cluster`.
    pub fn initial_member_ids(&self) -> Vec<MemberId> {
        self.initial_cluster
            .iter()
            .map(|(_, peer_urls)| member_id(peer_urls, &self.initial_cluster_token))
            .collect()
    }

    /// The cluster's id, if it begins with `initial_cluster`.
    pub fn cluster_id(&self) -> ClusterId {
        cluster_id(&self.initial_member_ids())
    }

    /// The smallest lease TTL granted: one and a half election timeouts, in whole seconds rounded
    /// up, so that a lease can outlive an election.
    pub fn min_lease_ttl_seconds(&self) -> i64 {
        let seconds = (3 * self.election_timeout_ms()).div_ceil(2_000);
        i64::try_from(seconds).expect("the election timeout is bounded")
    }

    /// The shortest and the longest time without a heartbeat after which this member stands for
    /// election, in milliseconds: 0.3 and 0.6 of the election timeout, rounded up.
    ///
    /// It is less than the timeout itself because openraft first waits out the leader's lease,
    /// which it takes to be the longest timeout, and then the random one on top: together 0.9 to
    /// 1.2 of the timeout. The range is wide so that two members seldom stand at once: with 0.5 to
    /// 0.6, one failover in twenty took a second round of 600 ms.
    ///
    /// The first is smaller than the second and larger than the heartbeat interval.
    pub fn raft_election_range_ms(&self) -> (u64, u64) {
        let timeout_ms = self.election_timeout_ms();
        ((timeout_ms * 3).div_ceil(10), (timeout_ms * 3).div_ceil(5))
    }

    fn election_timeout_ms(&self) -> u64 {
        u64::try_from(self.election_timeout.as_millis()).expect("the election timeout is bounded")
    }
}

impl ServerArgs {
    /// Checks these flags, with the process's environment for those that are not given.
    ///
    /// # Errors
    ///
    /// For the first thing that is wrong.
    pub fn check(self) -> Result<Config, ConfigError> {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        self.check_with(std::env::vars_os(), cores)
    }

    /// [`ServerArgs::check`] with another environment, on a machine with `cores` cores.
    pub fn check_with(
        mut self,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        cores: usize,
    ) -> Result<Config, ConfigError> {
        let mut warnings: Vec<String> = self
            .fill_from(environment)?
            .into_iter()
            .map(|variable| format!("unrecognized environment variable {variable}"))
            .collect();
        warnings.extend(self.etcd_flags.check()?);

        let name = self.name.unwrap_or_else(|| "default".to_owned());
        check_name(&name)?;
        let data_dir = match self.data_dir {
            Some(path) if !path.is_empty() => PathBuf::from(path),
            _ => PathBuf::from(format!("{name}.holdfast")),
        };

        if self.listen_client_urls.is_some() && self.advertise_client_urls.is_none() {
            return Err(ConfigError::AdvertiseClientUrlsMissing);
        }
        let listen_client =
            listen(flag::LISTEN_CLIENT_URLS, self.listen_client_urls, DEFAULT_CLIENT_URL)?;
        let listen_peer = listen(flag::LISTEN_PEER_URLS, self.listen_peer_urls, DEFAULT_PEER_URL)?;
        let listen_metrics = match &self.listen_metrics_urls {
            Some(urls) if !urls.is_empty() => {
                urls::listen_urls(flag::LISTEN_METRICS_URLS, urls, "http://0.0.0.0:2381")?
            }
            _ => Vec::new(),
        };
        check_listeners(&[
            (flag::LISTEN_CLIENT_URLS, &listen_client),
            (flag::LISTEN_PEER_URLS, &listen_peer),
            (flag::LISTEN_METRICS_URLS, &listen_metrics),
        ])?;
        let advertise_client_urls =
            advertise(flag::ADVERTISE_CLIENT_URLS, self.advertise_client_urls, DEFAULT_CLIENT_URL)?;
        let initial_advertise_peer_urls = advertise(
            flag::INITIAL_ADVERTISE_PEER_URLS,
            self.initial_advertise_peer_urls,
            DEFAULT_PEER_URL,
        )?;
        for (flag, urls) in [
            (flag::ADVERTISE_CLIENT_URLS, &advertise_client_urls),
            (flag::INITIAL_ADVERTISE_PEER_URLS, &initial_advertise_peer_urls),
        ] {
            for url in urls.iter().filter(|url| urls::is_unspecified(url)) {
                warnings.push(format!("--{flag}: nobody can connect to {url} from elsewhere"));
            }
        }

        let initial_cluster_state =
            choice(flag::INITIAL_CLUSTER_STATE, self.initial_cluster_state, "new, existing")?;
        let strict = match &self.strict_reconfig_check {
            None => true,
            Some(text) => switch(flag::STRICT_RECONFIG_CHECK, text)?,
        };
        // One learner at most, as in etcd, until somebody asks for more.
        let max_learners = number(flag::MAX_LEARNERS, self.max_learners, 1, 1..=1_000)?;
        let initial_cluster = match self.initial_cluster {
            Some(text) => cluster::initial_cluster(&text, initial_cluster_state)?,
            None => vec![(name.clone(), initial_advertise_peer_urls.clone())],
        };
        check_membership(&name, &initial_advertise_peer_urls, &initial_cluster)?;
        warnings.extend(odd_size_warning(initial_cluster.len()));

        let heartbeat_ms =
            number(flag::HEARTBEAT_INTERVAL, self.heartbeat_interval, 100, 1..=10_000)?;
        let election_ms = number(flag::ELECTION_TIMEOUT, self.election_timeout, 1_000, 1..=50_000)?;
        if election_ms < 5 * heartbeat_ms {
            return Err(ConfigError::ElectionTooShort { election_ms, heartbeat_ms });
        }

        let snapshot_count = match number(
            flag::SNAPSHOT_COUNT,
            self.snapshot_count,
            DEFAULT_SNAPSHOT_COUNT,
            0..=u64::MAX,
        )? {
            // As in etcd: zero asks for the default.
            0 => DEFAULT_SNAPSHOT_COUNT,
            count => count,
        };
        let max_request_bytes = number(
            flag::MAX_REQUEST_BYTES,
            self.max_request_bytes,
            1_572_864,
            1..=LARGEST_MAX_REQUEST_BYTES,
        )?;
        if max_request_bytes > RECOMMENDED_MAX_REQUEST_BYTES {
            warnings.push(format!(
                "--max-request-bytes={max_request_bytes} is more than the recommended \
                 {RECOMMENDED_MAX_REQUEST_BYTES}"
            ));
        }
        let max_txn_ops = number(flag::MAX_TXN_OPS, self.max_txn_ops, 128, 1..=1_000_000)?;
        let quota_bytes = quota(self.quota_backend_bytes)?;
        if let Some(bytes) = quota_bytes.filter(|bytes| *bytes > RECOMMENDED_QUOTA_BYTES) {
            warnings.push(format!(
                "--quota-backend-bytes={bytes} is more than the recommended \
                 {RECOMMENDED_QUOTA_BYTES}: all of it is kept in memory"
            ));
        }
        let auto_compaction =
            auto_compaction(self.auto_compaction_mode, self.auto_compaction_retention)?;
        let max_concurrent_streams = number(
            flag::MAX_CONCURRENT_STREAMS,
            self.max_concurrent_streams,
            DEFAULT_MAX_CONCURRENT_STREAMS,
            1..=u64::from(u32::MAX),
        )?;
        let keepalive_interval =
            duration(flag::KEEPALIVE_INTERVAL, self.grpc_keepalive_interval, "2h")?;
        let keepalive_timeout =
            duration(flag::KEEPALIVE_TIMEOUT, self.grpc_keepalive_timeout, "20s")?;
        let worker_threads = number(
            flag::WORKER_THREADS,
            self.holdfast_worker_threads,
            default_worker_threads(cores),
            1..=1_024,
        )?;

        Ok(Config {
            name,
            data_dir,
            listen_client,
            advertise_client_urls,
            listen_peer,
            initial_advertise_peer_urls,
            initial_cluster,
            initial_cluster_state,
            initial_cluster_token: self
                .initial_cluster_token
                .unwrap_or_else(|| "etcd-cluster".to_owned()),
            change_rules: ChangeRules { strict, max_learners: bounded_usize(max_learners) },
            heartbeat_interval: Duration::from_millis(heartbeat_ms),
            election_timeout: Duration::from_millis(election_ms),
            snapshot_count,
            log_level: choice(
                flag::LOG_LEVEL,
                self.log_level,
                "debug, info, warn, error, panic, fatal",
            )?,
            log_format: choice(flag::LOG_FORMAT, self.log_format, "json, console")?,
            max_request_bytes: bounded_usize(max_request_bytes),
            max_txn_ops: bounded_usize(max_txn_ops),
            quota_bytes,
            worker_threads: bounded_usize(worker_threads),
            listen_metrics,
            auto_compaction,
            progress_interval: duration(
                flag::PROGRESS_INTERVAL,
                self.watch_progress_notify_interval,
                "10m",
            )?,
            max_concurrent_streams: u32::try_from(max_concurrent_streams)
                .expect("the flag's range fits into 32 bits"),
            // As in etcd: either one turns both off.
            keepalive_interval: Some(keepalive_interval)
                .filter(|interval| !interval.is_zero() && !keepalive_timeout.is_zero()),
            keepalive_timeout,
            metrics: choice(flag::METRICS, self.metrics, "basic, extensive")?,
            slow_apply: duration(
                flag::WARNING_APPLY_DURATION,
                self.warning_apply_duration,
                "100ms",
            )?,
            auth: auth(self.auth_token_ttl, self.bcrypt_cost)?,
            lock_rules: Rules {
                lease0: choice(flag::LEASE0, self.holdfast_lease0, "etcd, connection")?,
                unlock: choice(flag::UNLOCK, self.holdfast_unlock, "strict, etcd")?,
            },
            warnings,
        })
    }
}

fn listen(
    flag: &'static str,
    given: Option<String>,
    default: &'static str,
) -> Result<Vec<ListenUrl>, ConfigError> {
    urls::listen_urls(flag, given.as_deref().unwrap_or(default), default)
}

fn advertise(
    flag: &'static str,
    given: Option<String>,
    default: &'static str,
) -> Result<Vec<String>, ConfigError> {
    urls::advertised_urls(flag, given.as_deref().unwrap_or(default), default)
}

/// A name stands in `--initial-cluster` and, by default, in the data folder's path.
fn check_name(name: &str) -> Result<(), ConfigError> {
    let is_bad = |character: char| matches!(character, ',' | '=' | '/') || character.is_control();
    if name.trim().is_empty() || name.trim() != name || name.contains(is_bad) {
        return Err(ConfigError::Name(name.to_owned()));
    }
    Ok(())
}

fn check_listeners(listeners: &[(&'static str, &[ListenUrl])]) -> Result<(), ConfigError> {
    for (at, (other, theirs)) in listeners.iter().enumerate() {
        for (one, ours) in &listeners[..at] {
            if let Some(shared) =
                theirs.iter().find(|url| ours.iter().any(|our| our.overlaps(**url)))
            {
                let address = shared.address.to_string();
                return Err(ConfigError::SharedListener { one, other, address });
            }
        }
    }
    Ok(())
}

/// A number without a unit is hours or revisions, by the mode.
fn auto_compaction(
    mode: Option<String>,
    retention: Option<String>,
) -> Result<Option<AutoCompaction>, ConfigError> {
    let flag = flag::AUTO_COMPACTION_RETENTION;
    let mode = choice(flag::AUTO_COMPACTION_MODE, mode, "periodic, revision")?;
    let Some(text) = retention.filter(|text| !text.is_empty()) else { return Ok(None) };
    Ok(match mode {
        CompactionMode::Revision => {
            let keep = number(flag, Some(text), 1_000, 0..=i64::MAX.unsigned_abs())?;
            let keep = i64::try_from(keep).expect("the range ends there");
            (keep > 0).then_some(AutoCompaction::Revision(keep))
        }
        CompactionMode::Periodic => {
            let with_unit = match text.parse::<u64>() {
                Ok(hours) => format!("{hours}h"),
                Err(_) => text,
            };
            let keep = duration(flag, Some(with_unit), "1h")?;
            (!keep.is_zero()).then_some(AutoCompaction::Periodic(keep))
        }
    })
}

/// This member must be listed, at exactly the URLs it announces: its id is derived from them, by
/// itself and by every other member.
fn check_membership(
    name: &str,
    advertised: &[String],
    initial_cluster: &[(String, Vec<String>)],
) -> Result<(), ConfigError> {
    let Some((_, in_cluster)) = initial_cluster.iter().find(|(listed, _)| listed == name) else {
        let listed: Vec<&str> = initial_cluster.iter().map(|(name, _)| name.as_str()).collect();
        return Err(ConfigError::NotListed { name: name.to_owned(), listed: listed.join(",") });
    };
    if in_cluster.len() != advertised.len()
        || in_cluster.iter().any(|url| !advertised.contains(url))
    {
        return Err(ConfigError::PeerUrlsDiffer {
            name: name.to_owned(),
            in_cluster: in_cluster.join(","),
            advertised: advertised.join(","),
        });
    }
    Ok(())
}

fn odd_size_warning(members: usize) -> Option<String> {
    if members.is_multiple_of(2) {
        Some(format!(
            "a cluster of {members} survives no more failures than one of {}; use an odd number",
            members - 1
        ))
    } else if members > 7 {
        Some(format!("a cluster of {members} is slow to agree; use 3, 5 or 7 members"))
    } else {
        None
    }
}

fn number(
    flag: &'static str,
    given: Option<String>,
    default: u64,
    range: RangeInclusive<u64>,
) -> Result<u64, ConfigError> {
    let Some(text) = given else { return Ok(default) };
    let Ok(value) = text.trim().parse() else {
        return Err(ConfigError::NotANumber { flag, value: text, example: default });
    };
    if !range.contains(&value) {
        let (least, most) = range.into_inner();
        return Err(ConfigError::OutOfRange { flag, value, least, most });
    }
    Ok(value)
}

/// As in etcd: a time of zero asks for the default.
fn auth(token_ttl: Option<String>, cost: Option<String>) -> Result<AuthSettings, ConfigError> {
    let AuthSettings { token_ttl: default, bcrypt_cost } = AuthSettings::default();
    let default = default.as_secs();
    let seconds =
        match number(flag::AUTH_TOKEN_TTL, token_ttl, default, 0..=MOST_TOKEN_TTL_SECONDS)? {
            0 => default,
            seconds => seconds,
        };
    let cost = number(flag::BCRYPT_COST, cost, u64::from(bcrypt_cost), 4..=31)?;
    Ok(AuthSettings {
        token_ttl: Duration::from_secs(seconds),
        bcrypt_cost: u32::try_from(cost).expect("the flag's range fits into 32 bits"),
    })
}

/// As in etcd: zero asks for the default, a negative number for no quota.
fn quota(given: Option<String>) -> Result<Option<u64>, ConfigError> {
    let Some(text) = given else { return Ok(Some(DEFAULT_QUOTA_BYTES)) };
    match text.trim().parse::<i64>() {
        Ok(0) => Ok(Some(DEFAULT_QUOTA_BYTES)),
        Ok(bytes) => Ok(u64::try_from(bytes).ok()),
        Err(_) => Err(ConfigError::NotANumber {
            flag: flag::QUOTA,
            value: text,
            example: DEFAULT_QUOTA_BYTES,
        }),
    }
}

/// `default` is an example, too.
fn duration(
    flag: &'static str,
    given: Option<String>,
    default: &'static str,
) -> Result<Duration, ConfigError> {
    let text = given.as_deref().map_or(default, str::trim);
    duration::parse(text).ok_or_else(|| ConfigError::NotADuration {
        flag,
        value: text.to_owned(),
        example: default,
    })
}

fn switch(flag: &'static str, text: &str) -> Result<bool, ConfigError> {
    match etcd_flags::spelled_out(text) {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(ConfigError::NotAChoice { flag, value: text.to_owned(), choices: "true, false" }),
    }
}

fn choice<T: FromStr + Default>(
    flag: &'static str,
    given: Option<String>,
    choices: &'static str,
) -> Result<T, ConfigError> {
    let Some(text) = given else { return Ok(T::default()) };
    text.parse().map_err(|_| ConfigError::NotAChoice { flag, value: text, choices })
}

/// One thread beats several where the clients and the disk need the other cores; measured on two.
fn default_worker_threads(cores: usize) -> u64 {
    let threads = if cores <= 4 { 1 } else { cores / 2 };
    // A machine may have more cores than the flag allows threads.
    u64::try_from(threads).unwrap_or(u64::MAX).min(1_024)
}

fn bounded_usize(value: u64) -> usize {
    usize::try_from(value).expect("the flag's range fits into 32 bits")
}
