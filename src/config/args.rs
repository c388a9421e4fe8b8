//! The server's flags as given, and their twins in the environment.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::ConfigError;
use super::etcd_flags::EtcdFlags;

/// What to add to the command's help about the environment.
pub const ENVIRONMENT_HELP: &str = "\
Every flag can also be set in the environment: --initial-cluster as ETCD_INITIAL_CLUSTER,
--holdfast-worker-threads as HOLDFAST_WORKER_THREADS. A flag beats the environment.";

/// The names of the flags of [`ServerArgs`], as errors and the environment use them.
pub(super) mod flag {
    pub const NAME: &str = "name";
    pub const DATA_DIR: &str = "data-dir";
    pub const LISTEN_CLIENT_URLS: &str = "listen-client-urls";
    pub const ADVERTISE_CLIENT_URLS: &str = "advertise-client-urls";
    pub const LISTEN_PEER_URLS: &str = "listen-peer-urls";
    pub const INITIAL_ADVERTISE_PEER_URLS: &str = "initial-advertise-peer-urls";
    pub const INITIAL_CLUSTER: &str = "initial-cluster";
    pub const INITIAL_CLUSTER_STATE: &str = "initial-cluster-state";
    pub const INITIAL_CLUSTER_TOKEN: &str = "initial-cluster-token";
    pub const STRICT_RECONFIG_CHECK: &str = "strict-reconfig-check";
    pub const MAX_LEARNERS: &str = "max-learners";
    pub const HEARTBEAT_INTERVAL: &str = "heartbeat-interval";
    pub const ELECTION_TIMEOUT: &str = "election-timeout";
    pub const SNAPSHOT_COUNT: &str = "snapshot-count";
    pub const LOG_LEVEL: &str = "log-level";
    pub const LOG_FORMAT: &str = "log-format";
    pub const MAX_REQUEST_BYTES: &str = "max-request-bytes";
    pub const MAX_TXN_OPS: &str = "max-txn-ops";
    pub const QUOTA: &str = "quota-backend-bytes";
    pub const LISTEN_METRICS_URLS: &str = "listen-metrics-urls";
    pub const AUTO_COMPACTION_MODE: &str = "auto-compaction-mode";
    pub const AUTO_COMPACTION_RETENTION: &str = "auto-compaction-retention";
    pub const PROGRESS_INTERVAL: &str = "watch-progress-notify-interval";
    pub const MAX_CONCURRENT_STREAMS: &str = "max-concurrent-streams";
    pub const KEEPALIVE_INTERVAL: &str = "grpc-keepalive-interval";
    pub const KEEPALIVE_TIMEOUT: &str = "grpc-keepalive-timeout";
    pub const METRICS: &str = "metrics";
    pub const WARNING_APPLY_DURATION: &str = "warning-apply-duration";
    pub const AUTH_TOKEN_TTL: &str = "auth-token-ttl";
    pub const BCRYPT_COST: &str = "bcrypt-cost";
    pub const WORKER_THREADS: &str = "holdfast-worker-threads";
    pub const LEASE0: &str = "holdfast-lease0";
    pub const UNLOCK: &str = "holdfast-unlock";
}

/// What etcd 3.5 calls a flag, where that begins with `experimental-`. The old name does as well.
const OLD_NAMES: [(&str, &str); 3] = [
    (flag::PROGRESS_INTERVAL, "experimental-watch-progress-notify-interval"),
    (flag::WARNING_APPLY_DURATION, "experimental-warning-apply-duration"),
    (flag::MAX_LEARNERS, "experimental-max-learners"),
];

/// The server's flags, not yet checked. Made to be flattened into a command that has subcommands.
///
/// All are text here: a value from the environment is then refused in the same words as one from
/// the command line, and the environment cannot disturb a subcommand. A repeated flag counts last,
/// as in etcd.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(args_override_self = true, about = None, long_about = None)]
pub struct ServerArgs {
    /// This member's name in the cluster [default: default]
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<String>,

    /// The folder for this member's data, created if absent [default: NAME.holdfast]
    #[arg(long, value_name = "PATH")]
    pub(super) data_dir: Option<String>,

    /// Where to listen for clients, comma-separated [default: http://localhost:2379]
    #[arg(long, value_name = "URLS")]
    pub(super) listen_client_urls: Option<String>,

    /// Where clients reach this member; required with --listen-client-urls [default:
    /// http://localhost:2379]
    #[arg(long, value_name = "URLS")]
    pub(super) advertise_client_urls: Option<String>,

    /// Where to listen for other members [default: http://localhost:2380]
    #[arg(long, value_name = "URLS")]
    pub(super) listen_peer_urls: Option<String>,

    /// Where other members reach this one [default: http://localhost:2380]
    #[arg(long, value_name = "URLS")]
    pub(super) initial_advertise_peer_urls: Option<String>,

    /// All members of the new cluster, as a=URL,b=URL,c=URL [default: this member alone]
    #[arg(long, value_name = "MEMBERS")]
    pub(super) initial_cluster: Option<String>,

    /// Whether the cluster begins now ('new') or this member joins one ('existing') [default: new]
    #[arg(long, value_name = "STATE")]
    pub(super) initial_cluster_state: Option<String>,

    /// Keeps clusters with equal URLs apart [default: etcd-cluster]
    #[arg(long, value_name = "TOKEN")]
    pub(super) initial_cluster_token: Option<String>,

    /// Refuse changes of the members that may cost the quorum [default: true]
    #[arg(
        long,
        value_name = "BOOL",
        num_args(0..=1),
        require_equals = true,
        default_missing_value = "true"
    )]
    pub(super) strict_reconfig_check: Option<String>,

    /// The most learners at a time [default: 1]
    #[arg(long, value_name = "COUNT", alias = OLD_NAMES[2].1)]
    pub(super) max_learners: Option<String>,

    /// Time between two heartbeats of the leader, in milliseconds [default: 100]
    #[arg(long, value_name = "MS")]
    pub(super) heartbeat_interval: Option<String>,

    /// Time without a heartbeat after which members elect anew, in milliseconds [default: 1000]
    #[arg(long, value_name = "MS")]
    pub(super) election_timeout: Option<String>,

    /// Entries applied between two snapshots [default: 10000]
    #[arg(long, value_name = "COUNT")]
    pub(super) snapshot_count: Option<String>,

    /// debug, info, warn, error, panic or fatal [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub(super) log_level: Option<String>,

    /// json or console [default: json]
    #[arg(long, value_name = "FORMAT")]
    pub(super) log_format: Option<String>,

    /// The largest client request, in bytes [default: 1572864]
    #[arg(long, value_name = "BYTES")]
    pub(super) max_request_bytes: Option<String>,

    /// The most operations in one branch of a transaction [default: 128]
    #[arg(long, value_name = "COUNT")]
    pub(super) max_txn_ops: Option<String>,

    /// How much the store may take before it refuses to grow; 0 for 2 GiB, below for no limit
    /// [default: 0]
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub(super) quota_backend_bytes: Option<String>,

    /// Where to serve metrics and probes beside the client port, comma-separated [default: nowhere]
    #[arg(long, value_name = "URLS")]
    pub(super) listen_metrics_urls: Option<String>,

    /// Whether auto-compaction keeps a time ('periodic') or a number of revisions ('revision')
    /// [default: periodic]
    #[arg(long, value_name = "MODE")]
    pub(super) auto_compaction_mode: Option<String>,

    /// The history that auto-compaction keeps: 30m, hours without a unit, or revisions; 0 for all
    /// [default: 0]
    #[arg(long, value_name = "RETENTION")]
    pub(super) auto_compaction_retention: Option<String>,

    /// How often an idle watch hears of its progress [default: 10m]
    #[arg(long, value_name = "DURATION", alias = OLD_NAMES[0].1)]
    pub(super) watch_progress_notify_interval: Option<String>,

    /// The most calls at a time on one connection [default: 100000]
    #[arg(long, value_name = "COUNT")]
    pub(super) max_concurrent_streams: Option<String>,

    /// Silence after which a client is asked whether it is there, 0 for never [default: 2h]
    #[arg(long, value_name = "DURATION")]
    pub(super) grpc_keepalive_interval: Option<String>,

    /// How long it may take to answer that [default: 20s]
    #[arg(long, value_name = "DURATION")]
    pub(super) grpc_keepalive_timeout: Option<String>,

    /// basic, or extensive to time each call [default: basic]
    #[arg(long, value_name = "KIND")]
    pub(super) metrics: Option<String>,

    /// An entry that takes this long to apply is worth a warning [default: 100ms]
    #[arg(long, value_name = "DURATION", alias = OLD_NAMES[1].1)]
    pub(super) warning_apply_duration: Option<String>,

    /// Seconds after which a login that was not used ends; 0 for the default [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub(super) auth_token_ttl: Option<String>,

    /// How costly it is to hash a password: one more doubles it [default: 10]
    #[arg(long, value_name = "COST")]
    pub(super) bcrypt_cost: Option<String>,

    /// Threads that serve requests [default: 1, or half the cores where there are more than 4]
    #[arg(long, value_name = "COUNT")]
    pub(super) holdfast_worker_threads: Option<String>,

    /// How long a lease lives that the server made for a Lock without one: 'etcd' (60 s, whatever
    /// the caller does) or 'connection' (as long as the caller's connection) [default: etcd]
    #[arg(long, value_name = "RULE")]
    pub(super) holdfast_lease0: Option<String>,

    /// What Unlock deletes: 'strict' (a lock's key only) or 'etcd' (any key) [default: strict]
    #[arg(long, value_name = "RULE")]
    pub(super) holdfast_unlock: Option<String>,

    #[command(flatten)]
    pub(super) etcd_flags: EtcdFlags,
}

/// The flags that say who a member is, for commands that make its data directory.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct MemberArgs {
    /// The member's name in the cluster [default: default]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// The folder to make for its data, absent or empty [default: NAME.holdfast]
    #[arg(long, value_name = "PATH")]
    data_dir: Option<String>,

    /// Where other members will reach it [default: http://localhost:2380]
    #[arg(long, value_name = "URLS")]
    initial_advertise_peer_urls: Option<String>,

    /// All members of the new cluster, as a=URL,b=URL,c=URL [default: this member alone]
    #[arg(long, value_name = "MEMBERS")]
    initial_cluster: Option<String>,

    /// Keeps clusters with equal URLs apart [default: etcd-cluster]
    #[arg(long, value_name = "TOKEN")]
    initial_cluster_token: Option<String>,
}

impl From<MemberArgs> for ServerArgs {
    fn from(member: MemberArgs) -> ServerArgs {
        ServerArgs {
            name: member.name,
            data_dir: member.data_dir,
            initial_advertise_peer_urls: member.initial_advertise_peer_urls,
            initial_cluster: member.initial_cluster,
            initial_cluster_token: member.initial_cluster_token,
            ..ServerArgs::default()
        }
    }
}

impl ServerArgs {
    /// Gives each flag that is not set the value of its twin in `environment`, and returns the
    /// variables that are no flag's twin. An empty variable counts as not set, as in etcd.
    ///
    /// # Errors
    ///
    /// When a variable of ours is not UTF-8.
    pub(super) fn fill_from(
        &mut self,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Vec<String>, ConfigError> {
        let mut variables = BTreeMap::new();
        for (variable, value) in environment {
            // A name that is not UTF-8 is no flag's.
            let Ok(variable) = variable.into_string() else { continue };
            let ours = variable.starts_with("ETCD_") || variable.starts_with("HOLDFAST_");
            if !ours || value.is_empty() {
                continue;
            }
            match value.into_string() {
                Ok(value) => variables.insert(variable, value),
                Err(_) => return Err(ConfigError::NotUnicode(variable)),
            };
        }
        for (flag, setting) in self.settings() {
            let old_name = OLD_NAMES.iter().find(|(name, _)| *name == flag);
            let old = old_name.and_then(|(_, old)| variables.remove(&variable(old)));
            let twin = variables.remove(&variable(flag)).or(old);
            if setting.is_none() {
                *setting = twin;
            }
        }
        self.etcd_flags.fill_from(&mut variables);
        Ok(variables.into_keys().collect())
    }

    pub(super) fn settings(&mut self) -> [(&'static str, &mut Option<String>); 33] {
        [
            (flag::NAME, &mut self.name),
            (flag::DATA_DIR, &mut self.data_dir),
            (flag::LISTEN_CLIENT_URLS, &mut self.listen_client_urls),
            (flag::ADVERTISE_CLIENT_URLS, &mut self.advertise_client_urls),
            (flag::LISTEN_PEER_URLS, &mut self.listen_peer_urls),
            (flag::INITIAL_ADVERTISE_PEER_URLS, &mut self.initial_advertise_peer_urls),
            (flag::INITIAL_CLUSTER, &mut self.initial_cluster),
            (flag::INITIAL_CLUSTER_STATE, &mut self.initial_cluster_state),
            (flag::INITIAL_CLUSTER_TOKEN, &mut self.initial_cluster_token),
            (flag::STRICT_RECONFIG_CHECK, &mut self.strict_reconfig_check),
            (flag::MAX_LEARNERS, &mut self.max_learners),
            (flag::HEARTBEAT_INTERVAL, &mut self.heartbeat_interval),
            (flag::ELECTION_TIMEOUT, &mut self.election_timeout),
            (flag::SNAPSHOT_COUNT, &mut self.snapshot_count),
            (flag::LOG_LEVEL, &mut self.log_level),
            (flag::LOG_FORMAT, &mut self.log_format),
            (flag::MAX_REQUEST_BYTES, &mut self.max_request_bytes),
            (flag::MAX_TXN_OPS, &mut self.max_txn_ops),
            (flag::QUOTA, &mut self.quota_backend_bytes),
            (flag::LISTEN_METRICS_URLS, &mut self.listen_metrics_urls),
            (flag::AUTO_COMPACTION_MODE, &mut self.auto_compaction_mode),
            (flag::AUTO_COMPACTION_RETENTION, &mut self.auto_compaction_retention),
            (flag::PROGRESS_INTERVAL, &mut self.watch_progress_notify_interval),
            (flag::MAX_CONCURRENT_STREAMS, &mut self.max_concurrent_streams),
            (flag::KEEPALIVE_INTERVAL, &mut self.grpc_keepalive_interval),
            (flag::KEEPALIVE_TIMEOUT, &mut self.grpc_keepalive_timeout),
            (flag::METRICS, &mut self.metrics),
            (flag::WARNING_APPLY_DURATION, &mut self.warning_apply_duration),
            (flag::AUTH_TOKEN_TTL, &mut self.auth_token_ttl),
            (flag::BCRYPT_COST, &mut self.bcrypt_cost),
            (flag::WORKER_THREADS, &mut self.holdfast_worker_threads),
            (flag::LEASE0, &mut self.holdfast_lease0),
            (flag::UNLOCK, &mut self.holdfast_unlock),
        ]
    }
}

/// The environment variable that is the twin of `flag`.
pub(super) fn variable(flag: &str) -> String {
    let upper = flag.to_ascii_uppercase().replace('-', "_");
    if flag.starts_with("holdfast-") { upper } else { format!("ETCD_{upper}") }
}

/// A refusal of the command line by clap, on one line. Not for its help and version texts.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let told: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty())
        .collect();
    let told = told.join(" ");
    let told = told.strip_prefix("error: ").unwrap_or(&told);
    format!("{told}; see --help for what is accepted")
}
