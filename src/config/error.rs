//! What is wrong with a configuration, and what to do about it.

use super::urls::UrlError;

/// Why the server does not start with the flags and the environment it was given. One line each.
///
/// A message names the flag. The value may have come from the flag's environment twin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("the environment variable {0} is not valid UTF-8; set it again or unset it")]
    NotUnicode(String),
    #[error("--{flag} is not supported yet: {reason}; remove it (and {variable})")]
    NotSupported { flag: &'static str, variable: String, reason: &'static str },
    #[error("--{flag}={value:?} is not a whole number; write it like --{flag}={example}")]
    NotANumber { flag: &'static str, value: String, example: u64 },
    #[error("--{flag}={value:?} is not a duration; write it like --{flag}={example}")]
    NotADuration { flag: &'static str, value: String, example: &'static str },
    #[error("--{flag}={value} is out of range; choose {least} to {most}")]
    OutOfRange { flag: &'static str, value: u64, least: u64, most: u64 },
    #[error("--{flag}={value:?} is not one of {choices}; choose one of them")]
    NotAChoice { flag: &'static str, value: String, choices: &'static str },

    #[error(
        "--name={0:?} cannot name a member; choose a name without comma, equals sign, slash or \
         control character"
    )]
    Name(String),
    #[error(
        "--election-timeout={election_ms} must be at least 5 times --heartbeat-interval=\
         {heartbeat_ms}; raise it to {} or lower the heartbeat interval", 5 * heartbeat_ms
    )]
    ElectionTooShort { election_ms: u64, heartbeat_ms: u64 },

    #[error("--{flag}: {url:?} {problem}")]
    Url { flag: &'static str, url: String, problem: UrlError },
    #[error("--{flag} is empty; give at least one URL, like --{flag}={example}")]
    NoUrl { flag: &'static str, example: &'static str },
    #[error("--{flag} lists {url} twice; remove one of them")]
    RepeatedUrl { flag: &'static str, url: String },
    #[error("--{one} and --{other} both listen on {address}; give one of them another port")]
    SharedListener { one: &'static str, other: &'static str, address: String },
    #[error(
        "--advertise-client-urls is required when --listen-client-urls is set explicitly; set it \
         to the URLs at which clients reach this member"
    )]
    AdvertiseClientUrlsMissing,

    #[error("--initial-cluster: {0:?} is not NAME=URL; write it like a=http://10.0.0.1:2380")]
    NotAMember(String),
    #[error("--initial-cluster gives {url} to both {first} and {second}; correct one of them")]
    SharedPeerUrl { url: String, first: String, second: String },
    #[error(
        "--initial-cluster does not list this member, --name={name}, only {listed}; add \
         {name}=PEER_URL or correct --name"
    )]
    NotListed { name: String, listed: String },
    #[error(
        "--initial-cluster has {name} at {in_cluster}, but --initial-advertise-peer-urls is \
         {advertised}; make them equal as text (localhost is not 127.0.0.1)"
    )]
    PeerUrlsDiffer { name: String, in_cluster: String, advertised: String },
}
