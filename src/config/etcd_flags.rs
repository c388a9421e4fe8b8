//! The flags of etcd that do nothing here.
//!
//! An operator who moves from etcd keeps the unit file. A flag whose absence changes nothing that
//! is promised is accepted with a warning. A flag that asks for protection, for a limit or for a
//! place, and would not get it, is refused: a member that serves plain text where TLS was asked
//! for is worse than one that does not start.

use std::collections::BTreeMap;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::ConfigError;
use super::args::variable;

/// Flags that share a reason.
struct Group {
    verdict: Verdict,
    /// Worded to follow "has no effect: " or "is not supported yet: ".
    reason: &'static str,
    flags: &'static [EtcdFlag],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ignore,
    Refuse,
}

#[derive(Debug, Clone, Copy)]
struct EtcdFlag {
    name: &'static str,
    /// Given without a value it means `true`.
    is_switch: bool,
    /// The values that ask for what happens anyway: accepted in silence.
    harmless: &'static [&'static str],
    /// What etcd 3.5 calls it, where that begins with `experimental-`.
    old_name: Option<&'static str>,
}

const fn value(name: &'static str) -> EtcdFlag {
    EtcdFlag { name, is_switch: false, harmless: &[""], old_name: None }
}

const fn switch(name: &'static str) -> EtcdFlag {
    EtcdFlag { name, is_switch: true, harmless: &["false"], old_name: None }
}

impl EtcdFlag {
    const fn unless(self, harmless: &'static [&'static str]) -> EtcdFlag {
        EtcdFlag { harmless, ..self }
    }

    /// The flag has dropped `experimental-` since, and is accepted either way.
    const fn now_plain(self) -> EtcdFlag {
        let (_, name) = self.name.split_at("experimental-".len());
        EtcdFlag { name, old_name: Some(self.name), ..self }
    }
}

const GROUPS: &[Group] = &[
    Group {
        verdict: Verdict::Refuse,
        reason: "clients and members would talk without TLS",
        flags: &[
            value("cert-file"),
            value("key-file"),
            switch("client-cert-auth"),
            value("client-cert-file"),
            value("client-key-file"),
            value("client-crl-file"),
            value("client-cert-allowed-hostname"),
            value("trusted-ca-file"),
            switch("auto-tls"),
            value("peer-cert-file"),
            value("peer-key-file"),
            switch("peer-client-cert-auth"),
            value("peer-client-cert-file"),
            value("peer-client-key-file"),
            value("peer-crl-file"),
            value("peer-trusted-ca-file"),
            switch("peer-auto-tls"),
            value("peer-cert-allowed-cn"),
            value("peer-cert-allowed-hostname"),
            switch("experimental-peer-skip-client-san-verification").now_plain(),
            value("self-signed-cert-validity").unless(&["", "1"]),
            value("cipher-suites"),
            value("tls-min-version"),
            value("tls-max-version"),
        ],
    },
    Group {
        verdict: Verdict::Refuse,
        reason: "only simple tokens are given out",
        flags: &[value("auth-token").unless(&["", "simple"])],
    },
    Group {
        verdict: Verdict::Refuse,
        reason: "every host name would be let in",
        flags: &[value("host-whitelist").unless(&["", "*"])],
    },
    Group {
        verdict: Verdict::Refuse,
        reason: "it changes what survives a crash or who belongs to the cluster",
        flags: &[switch("force-new-cluster"), switch("unsafe-no-fsync")],
    },
    Group {
        verdict: Verdict::Refuse,
        reason: "the log would not be where it is looked for; put --data-dir there instead",
        flags: &[value("wal-dir")],
    },
    Group {
        verdict: Verdict::Refuse,
        reason: "nothing would listen there; use the client port instead",
        flags: &[value("listen-client-http-urls")],
    },
    Group {
        verdict: Verdict::Refuse,
        reason: "all other flags would count for nothing; give them as flags or ETCD_ variables",
        flags: &[value("config-file")],
    },
    Group {
        verdict: Verdict::Refuse,
        reason: "members are named by --initial-cluster only",
        flags: &[
            value("discovery"),
            value("discovery-fallback").unless(&["", "proxy", "exit"]),
            value("discovery-proxy"),
            value("discovery-srv"),
            value("discovery-srv-name"),
            value("discovery-token"),
            value("discovery-endpoints"),
            value("discovery-user"),
            value("discovery-password"),
            value("discovery-cert"),
            value("discovery-key"),
            value("discovery-cacert"),
            value("proxy").unless(&["", "off"]),
        ],
    },
    Group {
        verdict: Verdict::Ignore,
        reason: "members always ask for pre-votes",
        flags: &[switch("pre-vote").unless(&["true"])],
    },
    Group {
        verdict: Verdict::Ignore,
        reason: "the log goes to standard error, through one logger",
        flags: &[
            value("log-outputs").unless(&["", "default", "stderr"]),
            value("logger").unless(&["", "zap"]),
            switch("enable-log-rotation"),
            value("log-rotation-config-json"),
        ],
    },
    Group {
        verdict: Verdict::Ignore,
        reason: "the HTTP interface is fixed",
        flags: &[
            value("cors").unless(&["", "*"]),
            switch("enable-v2"),
            value("v2-deprecation"),
            switch("enable-grpc-gateway").unless(&["true"]),
            switch("enable-pprof"),
            switch("experimental-enable-distributed-tracing").now_plain(),
            value("experimental-distributed-tracing-address").now_plain(),
            value("experimental-distributed-tracing-service-name").now_plain(),
            value("experimental-distributed-tracing-instance-id").now_plain(),
            value("experimental-distributed-tracing-sampling-rate").now_plain(),
        ],
    },
    Group {
        verdict: Verdict::Ignore,
        reason: "members always compare what they have applied, at the start and while they run",
        flags: &[
            switch("experimental-initial-corrupt-check").now_plain().unless(&["true", "false"]),
            value("experimental-corrupt-check-time").now_plain(),
            switch("experimental-compact-hash-check-enabled")
                .now_plain()
                .unless(&["true", "false"]),
            value("experimental-compact-hash-check-time").now_plain(),
        ],
    },
    Group {
        verdict: Verdict::Ignore,
        reason: "it tunes a part of etcd that has no counterpart here or cannot be tuned",
        flags: &[
            value("grpc-keepalive-min-time"),
            switch("socket-reuse-port"),
            switch("socket-reuse-address"),
            value("max-snapshots"),
            value("max-wals"),
            value("backend-bbolt-freelist-type"),
            value("backend-batch-interval"),
            value("backend-batch-limit"),
            value("raft-read-timeout"),
            value("raft-write-timeout"),
            switch("initial-election-tick-advance").unless(&["true"]),
            value("experimental-snapshot-catchup-entries").now_plain(),
            value("experimental-compaction-batch-limit").now_plain(),
            value("experimental-compaction-sleep-interval").now_plain(),
            value("experimental-warning-unary-request-duration").now_plain(),
            value("experimental-downgrade-check-time").now_plain(),
            value("experimental-bootstrap-defrag-threshold-megabytes").now_plain(),
            switch("experimental-memory-mlock").now_plain(),
            switch("experimental-enable-lease-checkpoint").now_plain(),
            switch("experimental-enable-lease-checkpoint-persist").now_plain(),
            switch("experimental-txn-mode-write-with-shared-buffer").now_plain(),
            switch("experimental-stop-grpc-service-on-defrag").now_plain(),
            value("feature-gates"),
        ],
    },
];

/// Which of these flags were given, and their values.
#[derive(Debug, Clone, Default)]
pub struct EtcdFlags {
    given: BTreeMap<&'static str, String>,
}

impl EtcdFlags {
    /// Takes the twins of these flags out of `variables`, for the flags that are not given.
    pub(super) fn fill_from(&mut self, variables: &mut BTreeMap<String, String>) {
        for flag in all() {
            let old = flag.old_name.and_then(|old_name| variables.remove(&variable(old_name)));
            if let Some(twin) = variables.remove(&variable(flag.name)).or(old) {
                self.given.entry(flag.name).or_insert(twin);
            }
        }
    }

    /// One warning for each flag that asks for something and can be ignored.
    ///
    /// # Errors
    ///
    /// For the first flag that cannot.
    pub(super) fn check(&self) -> Result<Vec<String>, ConfigError> {
        let mut warnings = Vec::new();
        for Group { verdict, reason, flags } in GROUPS {
            for flag in *flags {
                let Some(value) = self.given.get(flag.name) else { continue };
                let value = if flag.is_switch { spelled_out(value) } else { value };
                if flag.harmless.contains(&value) {
                    continue;
                }
                match verdict {
                    Verdict::Ignore => {
                        warnings.push(format!("--{} has no effect: {reason}", flag.name));
                    }
                    Verdict::Refuse => {
                        return Err(ConfigError::NotSupported {
                            flag: flag.name,
                            variable: variable(flag.name),
                            reason,
                        });
                    }
                }
            }
        }
        Ok(warnings)
    }
}

fn all() -> impl Iterator<Item = &'static EtcdFlag> {
    GROUPS.iter().flat_map(|group| group.flags)
}

/// etcd takes a switch's value in all of Go's spellings.
pub(super) fn spelled_out(value: &str) -> &str {
    match value {
        "1" | "t" | "T" | "TRUE" | "True" => "true",
        "0" | "f" | "F" | "FALSE" | "False" => "false",
        other => other,
    }
}

impl Args for EtcdFlags {
    fn augment_args(command: Command) -> Command {
        command.args(all().map(|flag| {
            let arg = Arg::new(flag.name)
                .long(flag.name)
                .hide(true)
                .action(ArgAction::Set)
                .value_parser(ValueParser::string())
                .allow_hyphen_values(!flag.is_switch);
            let arg = arg.aliases(flag.old_name);
            if flag.is_switch {
                arg.num_args(0..=1).require_equals(true).default_missing_value("true")
            } else {
                arg
            }
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        EtcdFlags::augment_args(command)
    }
}

impl FromArgMatches for EtcdFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<EtcdFlags, clap::Error> {
        let mut flags = EtcdFlags::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for flag in all() {
            if let Some(value) = matches.get_one::<String>(flag.name) {
                self.given.insert(flag.name, value.clone());
            }
        }
        Ok(())
    }
}
