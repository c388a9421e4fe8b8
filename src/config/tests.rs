//! What an operator writes, and what comes of it.

use std::collections::BTreeSet;
use std::ffi::OsString;

use clap::{CommandFactory, Parser};

use super::args::variable;
use super::*;
use crate::concurrency::rules::{Lease0, UnlockRule};
use crate::fuzz::{mutants, pick};

#[derive(Debug, Parser)]
#[command(name = "holdfast", args_conflicts_with_subcommands = true)]
struct Program {
    #[command(flatten)]
    server: ServerArgs,
    #[command(subcommand)]
    command: Option<Subcommand>,
}

#[derive(Debug, clap::Subcommand)]
enum Subcommand {
    Bench,
}

fn parse(flags: &[&str]) -> ServerArgs {
    Program::try_parse_from(["holdfast"].iter().chain(flags)).unwrap().server
}

fn check_in(flags: &[&str], environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let environment = environment.iter().map(|(name, value)| (name.into(), value.into()));
    parse(flags).check_with(environment, 2)
}

fn config(flags: &[&str]) -> Config {
    check_in(flags, &[]).unwrap()
}

/// The line with which `flags` are refused.
fn refusal(flags: &[&str]) -> String {
    let line = check_in(flags, &[]).unwrap_err().to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

const THREE: &str = "a=http://a:2380,b=http://b:2380,c=http://c:2380";

#[test]
fn without_flags_a_single_member_listens_on_this_machine() {
    let config = config(&[]);
    assert_eq!(
        config,
        Config {
            name: "default".into(),
            data_dir: "default.holdfast".into(),
            listen_client: vec![ListenUrl { address: "127.0.0.1:2379".parse().unwrap() }],
            advertise_client_urls: vec!["http://localhost:2379".into()],
            listen_peer: vec![ListenUrl { address: "127.0.0.1:2380".parse().unwrap() }],
            initial_advertise_peer_urls: vec!["http://localhost:2380".into()],
            initial_cluster: vec![("default".into(), vec!["http://localhost:2380".into()])],
            initial_cluster_state: InitialClusterState::New,
            initial_cluster_token: "etcd-cluster".into(),
            change_rules: ChangeRules { strict: true, max_learners: 1 },
            heartbeat_interval: Duration::from_millis(100),
            election_timeout: Duration::from_millis(1_000),
            snapshot_count: 10_000,
            log_level: LogLevel::Info,
            log_format: LogFormat::Json,
            max_request_bytes: 1_572_864,
            max_txn_ops: 128,
            quota_bytes: Some(2 << 30),
            worker_threads: 1,
            listen_metrics: vec![],
            auto_compaction: None,
            progress_interval: Duration::from_secs(600),
            max_concurrent_streams: 100_000,
            keepalive_interval: Some(Duration::from_secs(7_200)),
            keepalive_timeout: Duration::from_secs(20),
            metrics: MetricsKind::Basic,
            slow_apply: Duration::from_millis(100),
            lock_rules: Rules::default(),
            auth: AuthSettings::default(),
            warnings: vec![],
        }
    );
    assert_eq!(config.initial_member_ids(), [config.member_id()]);
    assert_eq!(config.cluster_id(), cluster_id(&[config.member_id()]));
}

#[test]
fn every_flag_reaches_its_setting() {
    let config = config(&[
        "--name=b",
        "--data-dir",
        "/var/lib/holdfast",
        "--listen-client-urls=http://0.0.0.0:1379,http://[::1]:1379",
        "--advertise-client-urls=http://b:1379",
        "--listen-peer-urls=http://0.0.0.0:2380",
        "--initial-advertise-peer-urls",
        "http://B:2380/",
        "--initial-cluster",
        THREE,
        "--initial-cluster-state=existing",
        "--initial-cluster-token=t",
        "--heartbeat-interval=50",
        "--election-timeout=250",
        "--snapshot-count=7",
        "--log-level=error",
        "--log-format=console",
        "--max-request-bytes=4096",
        "--max-txn-ops=8",
        "--holdfast-worker-threads=3",
        "--listen-metrics-urls=http://0.0.0.0:2381",
        "--auto-compaction-mode=revision",
        "--auto-compaction-retention=1000",
        "--watch-progress-notify-interval=5s",
        "--max-concurrent-streams=70",
        "--grpc-keepalive-interval=0",
        "--grpc-keepalive-timeout=7s",
        "--metrics=extensive",
        "--warning-apply-duration=1s",
        "--holdfast-lease0=connection",
        "--holdfast-unlock=etcd",
    ]);
    assert_eq!(config.name, "b");
    assert_eq!(config.data_dir, PathBuf::from("/var/lib/holdfast"));
    let listening: Vec<String> = config.listen_client.iter().map(ListenUrl::to_string).collect();
    assert_eq!(listening, ["http://0.0.0.0:1379", "http://[::1]:1379"]);
    assert_eq!(config.advertise_client_urls, ["http://b:1379"]);
    assert_eq!(config.listen_peer[0].to_string(), "http://0.0.0.0:2380");
    assert_eq!(config.initial_advertise_peer_urls, ["http://b:2380"]);
    let names: Vec<&str> = config.initial_cluster.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(config.initial_cluster_state, InitialClusterState::Existing);
    assert_eq!(config.initial_cluster_token, "t");
    assert_eq!(config.heartbeat_interval, Duration::from_millis(50));
    assert_eq!(config.election_timeout, Duration::from_millis(250));
    assert_eq!(config.snapshot_count, 7);
    assert_eq!((config.log_level, config.log_format), (LogLevel::Error, LogFormat::Console));
    assert_eq!((config.max_request_bytes, config.max_txn_ops), (4096, 8));
    assert_eq!(config.worker_threads, 3);
    assert_eq!(config.listen_metrics[0].to_string(), "http://0.0.0.0:2381");
    assert_eq!(config.auto_compaction, Some(AutoCompaction::Revision(1_000)));
    assert_eq!(config.progress_interval, Duration::from_secs(5));
    assert_eq!(config.max_concurrent_streams, 70);
    assert_eq!(config.keepalive_interval, None);
    assert_eq!(config.keepalive_timeout, Duration::from_secs(7));
    assert_eq!(config.metrics, MetricsKind::Extensive);
    assert_eq!(config.slow_apply, Duration::from_secs(1));
    let rules = Rules { lease0: Lease0::Connection, unlock: UnlockRule::Etcd };
    assert_eq!(config.lock_rules, rules);
    assert_eq!(config.initial_member_ids()[1], config.member_id());
}

#[test]
fn every_flag_has_a_twin_in_the_environment_and_beats_it() {
    let twins = [("ETCD_NAME", "env"), ("HOLDFAST_WORKER_THREADS", "5"), ("ETCD_MAX_TXN_OPS", "9")];
    let config = check_in(&[], &twins).unwrap();
    assert_eq!((config.name.as_str(), config.worker_threads, config.max_txn_ops), ("env", 5, 9));
    let config = check_in(&["--name", "flag", "--max-txn-ops=10"], &twins).unwrap();
    assert_eq!((config.name.as_str(), config.worker_threads, config.max_txn_ops), ("flag", 5, 10));
    assert!(config.warnings.is_empty());
}

#[test]
fn the_settings_with_twins_are_exactly_the_flags_in_the_help() {
    let shown: BTreeSet<String> = Program::command()
        .get_arguments()
        .filter(|arg| !arg.is_hide_set())
        .filter_map(|arg| arg.get_long().map(str::to_owned))
        .filter(|long| long != "help")
        .collect();
    let mut args = ServerArgs::default();
    let with_twins: BTreeSet<String> =
        args.settings().iter().map(|(flag, _)| (*flag).to_owned()).collect();
    assert_eq!(shown, with_twins);
    // A flag also lands in the setting that its name promises.
    for flag in with_twins {
        let mut args = parse(&[&format!("--{flag}=x")]);
        let set: Vec<&str> = args
            .settings()
            .into_iter()
            .filter(|(_, setting)| setting.is_some())
            .map(|(name, _)| name)
            .collect();
        assert_eq!(set, [flag.as_str()]);
    }
    assert_eq!(variable("initial-cluster"), "ETCD_INITIAL_CLUSTER");
}

#[test]
fn an_empty_variable_counts_as_not_set() {
    let config = check_in(&[], &[("ETCD_NAME", ""), ("ETCD_CERT_FILE", "")]).unwrap();
    assert_eq!(config.name, "default");
}

#[test]
fn an_unknown_variable_warns_and_a_stranger_is_left_alone() {
    let config =
        check_in(&[], &[("ETCD_NO_SUCH_FLAG", "1"), ("ETCDCTL_API", "3"), ("PATH", "/")]).unwrap();
    assert_eq!(config.warnings, ["unrecognized environment variable ETCD_NO_SUCH_FLAG"]);
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_no_text_is_refused() {
    use std::os::unix::ffi::OsStringExt as _;
    let variable = (OsString::from("ETCD_NAME"), OsString::from_vec(vec![0xff]));
    let error = parse(&[]).check_with([variable], 2).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the environment variable ETCD_NAME is not valid UTF-8; set it again or unset it"
    );
}

#[test]
fn an_unknown_flag_is_refused_on_one_line() {
    let error = Program::try_parse_from(["holdfast", "--nmae=x"]).unwrap_err();
    let line = one_line(&error);
    assert!(line.starts_with("unexpected argument '--nmae' found"), "{line}");
    assert!(line.contains("'--name'") && line.contains("--help"), "{line}");
    assert!(!line.contains('\n'), "{line}");
}

#[test]
fn the_last_of_a_repeated_flag_counts() {
    assert_eq!(config(&["--name=a", "--name=b"]).name, "b");
}

#[test]
fn flags_and_subcommands_do_not_mix() {
    let program = Program::try_parse_from(["holdfast", "bench"]).unwrap();
    assert!(matches!(program.command, Some(Subcommand::Bench)));
    assert!(Program::try_parse_from(["holdfast", "--name=a", "bench"]).is_err());
    Program::command().debug_assert();
}

#[test]
fn flags_that_ask_for_protection_are_refused() {
    assert_eq!(
        refusal(&["--cert-file=/tls/server.crt"]),
        "--cert-file is not supported yet: clients and members would talk without TLS; remove it \
         (and ETCD_CERT_FILE)"
    );
    for flag in [
        "--key-file=k",
        "--client-cert-auth",
        "--client-cert-auth=true",
        "--trusted-ca-file=c",
        "--auto-tls=1",
        "--peer-cert-file=c",
        "--peer-key-file=k",
        "--peer-client-cert-auth",
        "--peer-trusted-ca-file=c",
        "--peer-auto-tls",
        "--peer-cert-allowed-cn=cn",
        "--experimental-peer-skip-client-san-verification",
        "--tls-min-version=TLS1.3",
        "--auth-token=jwt,pub-key=a,priv-key=b,sign-method=RS256",
        "--host-whitelist=example.org",
        "--force-new-cluster",
        "--unsafe-no-fsync",
        "--wal-dir=w",
        "--config-file=etcd.yaml",
        "--discovery=https://discovery.example",
    ] {
        let line = refusal(&[flag]);
        assert!(line.contains("is not supported yet: "), "{flag}: {line}");
        let (name, value) = flag.trim_start_matches("--").split_once('=').unwrap_or((flag, "true"));
        let name = variable(name.trim_start_matches("--"));
        let error = check_in(&[], &[(&name, value)]).unwrap_err();
        assert_eq!(error.to_string(), line, "{name}");
    }
}

#[test]
fn the_quota_is_etcds() {
    for (flag, bytes) in [
        ("--quota-backend-bytes=0", Some(2 << 30)),
        ("--quota-backend-bytes=8589934592", Some(8 << 30)),
        ("--quota-backend-bytes=-1", None),
    ] {
        let config = config(&[flag]);
        assert_eq!((config.quota_bytes, config.warnings.len()), (bytes, 0), "{flag}");
    }
    assert_eq!(config(&["--quota-backend-bytes", "-5"]).quota_bytes, None);
    assert_eq!(config(&["--quota-backend-bytes=8589934593"]).warnings.len(), 1);
    assert!(refusal(&["--quota-backend-bytes=2GB"]).contains("is not a whole number"));
}

#[test]
fn flags_that_ask_for_what_happens_anyway_are_accepted_in_silence() {
    let config = config(&[
        "--client-cert-auth=false",
        "--unsafe-no-fsync=f",
        "--auth-token",
        "simple",
        "--quota-backend-bytes=0",
        "--pre-vote",
        "--strict-reconfig-check=true",
        "--log-outputs=stderr",
        "--logger=zap",
        "--cert-file=",
    ]);
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
}

#[test]
fn changes_of_the_members_have_rules() {
    let rules = |flags: &[&str]| config(flags).change_rules;
    assert_eq!(rules(&[]), ChangeRules { strict: true, max_learners: 1 });
    assert_eq!(
        rules(&["--strict-reconfig-check=f", "--experimental-max-learners", "3"]),
        ChangeRules { strict: false, max_learners: 3 }
    );
    assert!(rules(&["--strict-reconfig-check"]).strict);
    let refusal = |flag| check_in(&[flag], &[]).unwrap_err().to_string();
    assert!(refusal("--strict-reconfig-check=maybe").contains("true, false"));
    assert!(refusal("--max-learners=0").contains("out of range"));
}

#[test]
fn members_without_names_are_listed_only_where_a_cluster_waits_for_them() {
    let listed = "default=http://localhost:2380,=http://b:2380";
    let flags = ["--initial-cluster", listed, "--initial-cluster-state"];
    let with = |state| check_in(&[flags.as_slice(), &[state]].concat(), &[]);
    let names: Vec<_> =
        with("existing").unwrap().initial_cluster.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["", "default"]);
    assert!(with("new").unwrap_err().to_string().contains("is not NAME=URL"));
}

#[test]
fn flags_that_cannot_change_safety_warn() {
    let config = check_in(
        &["--pre-vote=false", "--grpc-keepalive-min-time=5s", "--cors=http://a"],
        &[("ETCD_EXPERIMENTAL_MAX_LEARNERS", "2"), ("ETCD_MAX_SNAPSHOTS", "5")],
    )
    .unwrap();
    assert_eq!(config.warnings[0], "--pre-vote has no effect: members always ask for pre-votes");
    let warned: Vec<&str> = config
        .warnings
        .iter()
        .map(|warning| warning.split_once(" has no effect: ").unwrap().0)
        .collect();
    assert_eq!(warned, ["--pre-vote", "--cors", "--grpc-keepalive-min-time", "--max-snapshots"]);
}

#[test]
fn a_flag_beats_the_environment_for_unsupported_flags_too() {
    assert!(check_in(&["--auto-tls=false"], &[("ETCD_AUTO_TLS", "true")]).is_ok());
}

#[test]
fn a_malformed_url_is_refused_with_its_flag() {
    assert_eq!(
        refusal(&["--listen-peer-urls=127.0.0.1:2380"]),
        r#"--listen-peer-urls: "127.0.0.1:2380" is not a URL; write it like http://10.0.0.1:2379"#
    );
    assert_eq!(
        refusal(&["--advertise-client-urls=https://a:2379"]),
        r#"--advertise-client-urls: "https://a:2379" asks for TLS, which is not supported yet; use http"#
    );
    assert_eq!(
        refusal(&["--listen-client-urls=unix:///run/e.sock", "--advertise-client-urls=http://a:1"]),
        "--listen-client-urls: \"unix:///run/e.sock\" is a unix socket, which is not supported; \
         use http://HOST:PORT"
    );
    assert_eq!(
        refusal(&["--initial-advertise-peer-urls="]),
        "--initial-advertise-peer-urls is empty; give at least one URL, like \
         --initial-advertise-peer-urls=http://localhost:2380"
    );
    assert_eq!(
        refusal(&["--advertise-client-urls=http://a:1,http://A:1"]),
        "--advertise-client-urls lists http://a:1 twice; remove one of them"
    );
}

#[test]
fn clients_and_members_need_listeners_of_their_own() {
    assert_eq!(
        refusal(&["--listen-peer-urls=http://0.0.0.0:2379"]),
        "--listen-client-urls and --listen-peer-urls both listen on 0.0.0.0:2379; give one of \
         them another port"
    );
}

#[test]
fn listening_elsewhere_needs_an_advertised_url() {
    let line = refusal(&["--listen-client-urls=http://0.0.0.0:2379"]);
    assert!(
        line.starts_with(
            "--advertise-client-urls is required when --listen-client-urls is set explicitly"
        ),
        "{line}"
    );
}

#[test]
fn advertising_every_interface_warns() {
    let config = config(&["--advertise-client-urls=http://0.0.0.0:2379"]);
    assert_eq!(
        config.warnings,
        ["--advertise-client-urls: nobody can connect to http://0.0.0.0:2379 from elsewhere"]
    );
}

#[test]
fn without_initial_cluster_the_advertised_urls_are_the_cluster() {
    let config = config(&["--name=a", "--initial-advertise-peer-urls=http://a:1,http://a:2"]);
    let urls = vec!["http://a:1".to_owned(), "http://a:2".to_owned()];
    assert_eq!(config.initial_cluster, [("a".to_owned(), urls)]);
}

#[test]
fn a_member_must_be_listed_at_the_urls_it_announces() {
    assert_eq!(
        refusal(&["--name=d", "--initial-cluster", THREE]),
        "--initial-cluster does not list this member, --name=d, only a,b,c; add d=PEER_URL or \
         correct --name"
    );
    assert_eq!(
        refusal(&["--name=a", "--initial-cluster", THREE]),
        "--initial-cluster has a at http://a:2380, but --initial-advertise-peer-urls is \
         http://localhost:2380; make them equal as text (localhost is not 127.0.0.1)"
    );
    let two = "--initial-advertise-peer-urls=http://a:2,http://a:1";
    assert!(
        check_in(&["--name=a", two, "--initial-cluster=a=http://a:1,a=http://a:2"], &[]).is_ok()
    );
    assert!(check_in(&["--name=a", two, "--initial-cluster=a=http://a:1"], &[]).is_err());
}

#[test]
fn an_even_cluster_warns_and_an_odd_one_does_not() {
    let warnings = |size: u16| {
        let members: Vec<String> =
            (1..=size).map(|member| format!("m{member}=http://h:{member}")).collect();
        config(&[
            "--name=m1",
            "--initial-advertise-peer-urls=http://h:1",
            &format!("--initial-cluster={}", members.join(",")),
        ])
        .warnings
    };
    for size in [1, 3, 5, 7] {
        assert!(warnings(size).is_empty(), "{size}");
    }
    assert_eq!(
        warnings(4),
        ["a cluster of 4 survives no more failures than one of 3; use an odd number"]
    );
    assert_eq!(warnings(9), ["a cluster of 9 is slow to agree; use 3, 5 or 7 members"]);
}

#[test]
fn a_name_that_cannot_stand_in_a_list_is_refused() {
    assert_eq!(
        refusal(&["--name=a,b"]),
        "--name=\"a,b\" cannot name a member; choose a name without comma, equals sign, slash or \
         control character"
    );
    for name in ["", " ", " a", "a=b", "../a", "a\nb"] {
        assert!(refusal(&["--name", name]).contains("cannot name a member"), "{name:?}");
    }
}

#[test]
fn a_malformed_number_or_choice_is_refused() {
    assert_eq!(
        refusal(&["--heartbeat-interval=100ms"]),
        "--heartbeat-interval=\"100ms\" is not a whole number; write it like \
         --heartbeat-interval=100"
    );
    assert_eq!(
        refusal(&["--heartbeat-interval=0"]),
        "--heartbeat-interval=0 is out of range; choose 1 to 10000"
    );
    assert_eq!(
        refusal(&["--election-timeout=50001"]),
        "--election-timeout=50001 is out of range; choose 1 to 50000"
    );
    assert_eq!(
        refusal(&["--max-request-bytes=99999999"]),
        "--max-request-bytes=99999999 is out of range; choose 1 to 33554432"
    );
    for flag in ["--max-txn-ops=0", "--max-request-bytes=0", "--holdfast-worker-threads=0"] {
        assert!(refusal(&[flag]).contains("is out of range; choose 1 to "), "{flag}");
    }
    assert_eq!(
        refusal(&["--log-level=verbose"]),
        "--log-level=\"verbose\" is not one of debug, info, warn, error, panic, fatal; choose one \
         of them"
    );
    assert!(refusal(&["--log-format=xml"]).contains("is not one of json, console"));
    assert!(refusal(&["--initial-cluster-state=old"]).contains("is not one of new, existing"));
    assert_eq!(config(&["--snapshot-count=0"]).snapshot_count, 10_000);
    assert_eq!(config(&["--max-request-bytes=20000000"]).warnings.len(), 1);
}

#[test]
fn auto_compaction_keeps_hours_durations_or_revisions() {
    let kept = |flags: &[&str]| config(flags).auto_compaction;
    let periodic = |minutes: u64| Some(AutoCompaction::Periodic(Duration::from_secs(60 * minutes)));
    assert_eq!(kept(&["--auto-compaction-retention=2"]), periodic(120));
    assert_eq!(kept(&["--auto-compaction-retention=1h30m"]), periodic(90));
    let mode = "--auto-compaction-mode=periodic";
    assert_eq!(kept(&[mode, "--auto-compaction-retention=10m"]), periodic(10));
    let mode = "--auto-compaction-mode=revision";
    let revisions = Some(AutoCompaction::Revision(5));
    assert_eq!(kept(&[mode, "--auto-compaction-retention=5"]), revisions);
    for zero in ["0", "0s", ""] {
        assert_eq!(kept(&[&format!("--auto-compaction-retention={zero}")]), None);
    }
    assert_eq!(kept(&[mode, "--auto-compaction-retention=0"]), None);
    assert_eq!(
        refusal(&[mode, "--auto-compaction-retention=1h"]),
        "--auto-compaction-retention=\"1h\" is not a whole number; write it like \
         --auto-compaction-retention=1000"
    );
    assert_eq!(
        refusal(&["--auto-compaction-retention=soon"]),
        "--auto-compaction-retention=\"soon\" is not a duration; write it like \
         --auto-compaction-retention=1h"
    );
    assert!(refusal(&["--auto-compaction-mode=never"]).contains("periodic, revision"));
}

#[test]
fn the_old_names_of_flags_and_their_twins_do_as_well() {
    let interval = |config: Config| config.progress_interval.as_secs();
    assert_eq!(interval(config(&["--experimental-watch-progress-notify-interval=5s"])), 5);
    let old = ("ETCD_EXPERIMENTAL_WATCH_PROGRESS_NOTIFY_INTERVAL", "6s");
    let new = ("ETCD_WATCH_PROGRESS_NOTIFY_INTERVAL", "7s");
    assert_eq!(interval(check_in(&[], &[old]).unwrap()), 6);
    let both = check_in(&[], &[old, new]).unwrap();
    assert!(both.warnings.is_empty(), "{:?}", both.warnings);
    assert_eq!(interval(both), 7);
}

#[test]
fn the_election_timeout_is_at_least_five_heartbeats() {
    assert_eq!(
        refusal(&["--heartbeat-interval=250"]),
        "--election-timeout=1000 must be at least 5 times --heartbeat-interval=250; raise it to \
         1250 or lower the heartbeat interval"
    );
    assert!(check_in(&["--heartbeat-interval=200"], &[]).is_ok());
}

#[test]
fn raft_timeouts_are_a_true_range_above_the_heartbeat() {
    assert_eq!(config(&[]).raft_election_range_ms(), (300, 600));
    let mut config = config(&[]);
    for heartbeat_ms in (1..50).chain([100, 777, 10_000]) {
        for slack_ms in 0..20 {
            config.heartbeat_interval = Duration::from_millis(heartbeat_ms);
            config.election_timeout = Duration::from_millis(5 * heartbeat_ms + slack_ms);
            let (least_ms, most_ms) = config.raft_election_range_ms();
            assert!(heartbeat_ms < least_ms && least_ms < most_ms, "{heartbeat_ms} {slack_ms}");
        }
    }
}

#[test]
fn a_lease_outlives_one_and_a_half_election_timeouts() {
    for (election_ms, seconds) in
        [(1_000, 2), (500, 1), (666, 1), (667, 2), (2_000, 3), (50_000, 75)]
    {
        let flag = format!("--election-timeout={election_ms}");
        assert_eq!(config(&[&flag]).min_lease_ttl_seconds(), seconds, "{election_ms}");
    }
}

#[test]
fn few_cores_get_one_thread_and_many_get_half() {
    for (cores, threads) in [(1, 1), (2, 1), (4, 1), (5, 2), (8, 4), (64, 32)] {
        let config = parse(&[]).check_with([], cores).unwrap();
        assert_eq!(config.worker_threads, threads, "{cores} cores");
    }
}

/// What a mistyped flag or URL may look like: one line says what is wrong, or it is understood.
#[test]
fn damaged_flags_are_refused_in_one_line_or_understood() {
    let valid = [
        "http://127.0.0.1:2379,http://[::1]:2379",
        "https://user:secret@host.example:1/path?query#part",
        THREE,
        "1h30m5s",
        "100ms",
        "18446744073709551615",
        "-1",
        "periodic",
    ];
    let flags = Program::command();
    let names: Vec<String> = flags
        .get_arguments()
        .filter_map(|argument| argument.get_long().map(|long| format!("--{long}")))
        .filter(|long| !["--help", "--version"].contains(&long.as_str()))
        .collect();
    let mut understood = 0;
    mutants(&valid.map(|text| text.as_bytes().to_vec()), |bytes, chance| {
        let value = String::from_utf8_lossy(bytes).into_owned();
        let flag = format!("{}={value}", pick(&names, chance));
        // Two flags at once also meet the rules between them.
        let other = format!("{}={}", pick(&names, chance), pick(&valid, chance));
        let arguments = ["holdfast", &flag, &other].map(str::to_owned);
        match Program::try_parse_from(&arguments) {
            Ok(program) => match program.server.check_with([], 2) {
                Ok(_) => understood += 1,
                Err(error) => {
                    let line = error.to_string();
                    assert!(!line.is_empty() && !line.contains('\n'), "{arguments:?}: {line}");
                }
            },
            Err(error) => assert!(!one_line(&error).contains('\n'), "{arguments:?}"),
        }
    });
    assert!(understood > 0, "nothing was understood");
}
