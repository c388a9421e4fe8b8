//! `holdfast lock`, `elect` and `locks` as processes, against a member that is a process too.

// Real processes, in real time.
#![allow(clippy::disallowed_methods)]

#[path = "semantics/cluster.rs"]
#[allow(dead_code)]
mod cluster;
// The client tests' own, so that the two never take each other's ports.
#[path = "clients/src/ports.rs"]
#[allow(dead_code)]
mod ports;
#[path = "cli_lock/proxy.rs"]
mod proxy;

use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use holdfast::pb::etcdserverpb::LeaseRevokeRequest;
use holdfast::pb::etcdserverpb::lease_client::LeaseClient;
use holdfast::pb::holdfastpb::locks_client::LocksClient;
use holdfast::pb::holdfastpb::{GetRequest, Lock, Place};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tonic::transport::Channel;

use cluster::{Cluster, Program};
use ports::Port;
use proxy::Proxy;

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(30);

/// A member of Holdfast; of etcd, found through `ETCD`, when `HOLDFAST_LOCK_CLUSTER` is `etcd`. The
/// commands fall back to etcd's own services then.
async fn member() -> (Cluster, String) {
    let program = if is_etcd() { Program::Etcd } else { Program::Holdfast };
    let cluster = Cluster::start(program, 1, &[]).await;
    let endpoint = format!("127.0.0.1:{}", cluster.client_port(0));
    (cluster, endpoint)
}

fn is_etcd() -> bool {
    std::env::var("HOLDFAST_LOCK_CLUSTER").is_ok_and(|program| program == "etcd")
}

fn holdfast(endpoints: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
    let split = arguments.iter().position(|argument| *argument == "--");
    let (own, rest) = arguments.split_at(split.unwrap_or(arguments.len()));
    command.args(own).arg("--endpoints").arg(endpoints).args(rest);
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn run(endpoints: &str, arguments: &[&str]) -> Output {
    let output = holdfast(endpoints, arguments).output();
    let output = tokio::time::timeout(LIMIT, output).await.expect("it ends");
    output.expect("the program runs")
}

fn code(output: &Output) -> Option<i32> {
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    output.status.code()
}

/// A command that has begun, and what it prints.
struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn begin(endpoints: &str, arguments: &[&str]) -> Running {
        let mut command = holdfast(endpoints, arguments);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the program runs");
        let stdout = child.stdout.take().expect("it is piped");
        Running { child, lines: BufReader::new(stdout).lines() }
    }

    /// The next line that it prints; `None` at the end.
    async fn line(&mut self) -> Option<String> {
        let line = tokio::time::timeout(LIMIT, self.lines.next_line());
        line.await.expect("it prints or ends").expect("it is text")
    }

    async fn says(&mut self, expected: &str) {
        assert_eq!(self.line().await.as_deref(), Some(expected));
    }

    /// Lets a command end that reads from its standard input.
    async fn let_go(&mut self) {
        let mut stdin = self.child.stdin.take().expect("it is piped");
        stdin.write_all(b"go\n").await.expect("it reads");
    }

    async fn code(mut self) -> Option<i32> {
        let status = tokio::time::timeout(LIMIT, self.child.wait()).await.expect("it ends");
        status.expect("it can be waited for").code()
    }
}

async fn lock(channel: &Channel, name: &str) -> Lock {
    let request = GetRequest { name: name.to_owned().into() };
    let answer = LocksClient::new(channel.clone()).get(request).await.expect("it answers");
    answer.into_inner().lock.expect("a lock is always shown")
}

async fn holder(channel: &Channel, name: &str) -> Place {
    lock(channel, name).await.holder.expect("somebody holds it")
}

async fn revoke(channel: &Channel, key: &str) {
    let (_, lease) = key.rsplit_once('/').expect("the key names its lease");
    let id = i64::from_str_radix(lease, 16).expect("in hexadecimal");
    let revoked = LeaseClient::new(channel.clone()).lease_revoke(LeaseRevokeRequest { id }).await;
    revoked.expect("the lease is there");
}

/// Says that it runs, then TERM when it gets that. Ends by itself if the test does not end it.
const TELLS_TERM: &str = "trap 'echo TERM; exit 5' TERM; echo $ETCD_LOCK_KEY; \
    for i in $(seq 600); do sleep 0.05; done";
/// Does not end when it is told to.
const STUBBORN: &str = "trap '' TERM; echo $ETCD_LOCK_KEY; \
    for i in $(seq 600); do sleep 0.05; done";
const WAITS: &str = "echo $ETCD_LOCK_KEY; read -r line; echo done";

#[tokio::test]
async fn a_command_runs_with_the_lock_in_its_environment_and_its_code_is_passed_on() {
    let (_cluster, at) = member().await;
    let script = "echo $ETCD_LOCK_KEY $ETCD_LOCK_REV $HOLDFAST_FENCE; exit 3";
    for arguments in [
        &["lock", "a=b", "--", "sh", "-c", script][..],
        &["elect", "a=b", "value", "--", "sh", "-c", script],
    ] {
        let output = run(&at, arguments).await;
        assert_eq!(code(&output), Some(3));
        let text = String::from_utf8(output.stdout).unwrap();
        let [key, revision, fence] = text.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("three words were expected: {text:?}");
        };
        assert!(key.starts_with("a=b/"), "{key}");
        let token = fence.strip_prefix("a=b=").and_then(|token| token.parse::<i64>().ok());
        let token = token.unwrap_or_else(|| panic!("no fence: {fence}"));
        assert!(token > 0 && token <= revision.parse().unwrap(), "{fence} at {revision}");
    }
    let killed = run(&at, &["lock", "a=b", "--", "sh", "-c", "kill -9 $$"]).await;
    assert_eq!(code(&killed), Some(128 + 9));
    let missing = run(&at, &["lock", "a=b", "--", "/no/such/program"]).await;
    assert_eq!(code(&missing), Some(127));
}

#[tokio::test]
async fn one_that_only_tries_is_told_who_holds_the_lock_and_the_next_one_gets_it() {
    let (_cluster, at) = member().await;
    for (first, second) in [
        (
            &["lock", "jobs", "--owner", "me", "--", "sh", "-c", WAITS][..],
            &["lock", "jobs", "--try", "--", "true"][..],
        ),
        (
            &["elect", "jobs", "v", "--owner", "me", "--", "sh", "-c", WAITS],
            &["elect", "jobs", "w", "--wait", "300ms", "--", "true"],
        ),
    ] {
        let mut holding = Running::begin(&at, first);
        let key = holding.line().await.expect("it says that it runs");
        let output = run(&at, second).await;
        assert_eq!(code(&output), Some(75));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.starts_with("holdfast: jobs not acquired: held by "), "{text}");
        assert!(text.contains("me") || text.contains(&key), "{text}");

        let waiting = ["lock", "jobs", "--wait", "20s", "--", "echo", "mine"];
        let mut waiting = Running::begin(&at, &waiting);
        holding.let_go().await;
        holding.says("done").await;
        assert_eq!(holding.code().await, Some(0));
        waiting.says("mine").await;
        assert_eq!(waiting.code().await, Some(0));
    }
}

#[tokio::test]
async fn a_command_is_told_to_end_when_its_lease_is_revoked() {
    let (cluster, at) = member().await;
    for arguments in [
        &["lock", "jobs", "--", "sh", "-c", TELLS_TERM][..],
        &["elect", "jobs", "v", "--", "sh", "-c", TELLS_TERM],
    ] {
        let mut running = Running::begin(&at, arguments);
        let key = running.line().await.expect("it says that it runs");
        let begun = Instant::now();
        revoke(&cluster.channel(0), &key).await;
        running.says("TERM").await;
        assert!(begun.elapsed() < Duration::from_secs(5), "told at once, not after the TTL");
        assert_eq!(running.code().await, Some(74));
    }
}

#[tokio::test]
async fn what_does_not_end_is_killed_after_the_grace() {
    let (cluster, at) = member().await;
    for options in [&["--grace", "300ms"][..], &["--on-lost", "kill", "--grace", "1h"]] {
        let arguments = [&["lock", "jobs"], options, &["--", "sh", "-c", STUBBORN]].concat();
        let mut running = Running::begin(&at, &arguments);
        let key = running.line().await.expect("it says that it runs");
        revoke(&cluster.channel(0), &key).await;
        // Nothing of the group keeps the pipe open.
        assert_eq!(running.line().await, None);
        assert_eq!(running.code().await, Some(74));
    }
}

#[tokio::test]
async fn signals_are_passed_on_to_the_command() {
    let (_cluster, at) = member().await;
    let mut running = Running::begin(&at, &["lock", "jobs", "--", "sh", "-c", TELLS_TERM]);
    running.line().await.expect("it says that it runs");
    terminate(&running.child);
    running.says("TERM").await;
    assert_eq!(running.code().await, Some(5));
    let next = run(&at, &["lock", "jobs", "--try", "--", "true"]).await;
    assert_eq!(code(&next), Some(0));
}

#[tokio::test]
async fn without_a_command_the_lock_is_held_until_a_signal() {
    let (_cluster, at) = member().await;
    let mut running = Running::begin(&at, &["lock", "jobs"]);
    let key = running.line().await.expect("the key");
    assert!(key.starts_with("jobs/"), "{key}");
    let fence = running.line().await.expect("the fence");
    assert!(fence.starts_with("jobs="), "{fence}");
    let second = run(&at, &["lock", "jobs", "--try"]).await;
    assert_eq!(code(&second), Some(75));
    terminate(&running.child);
    assert_eq!(running.code().await, Some(0));
    let next = run(&at, &["lock", "jobs", "--try", "--", "true"]).await;
    assert_eq!(code(&next), Some(0));
}

#[tokio::test]
async fn a_cluster_out_of_reach_has_a_code_of_its_own() {
    let nobody = (Port::reserve(), Port::reserve());
    let at = format!("127.0.0.1:{},127.0.0.1:{}", nobody.0.number(), nobody.1.number());
    for arguments in [
        &["lock", "jobs", "--try", "--", "true"][..],
        &["lock", "jobs", "--wait", "500ms", "--", "true"],
        &["elect", "jobs", "v", "--try", "--", "true"],
    ] {
        let output = run(&at, arguments).await;
        assert_eq!(code(&output), Some(76));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.starts_with("holdfast: the cluster is out of reach: "), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[tokio::test]
async fn a_lock_outlives_the_endpoint_it_was_taken_through() {
    let (_cluster, at) = member().await;
    let outlives = async |arguments: &[&str]| {
        let proxy = Proxy::start(&at).await;
        let endpoints = format!("{},{at}", proxy.address());
        let mut running = Running::begin(&endpoints, arguments);
        running.line().await.expect("it says that it runs");
        proxy.silence();
        // Longer than the lease would last without a renewal.
        tokio::time::sleep(Duration::from_secs(8)).await;
        running.let_go().await;
        running.says("done").await;
        assert_eq!(running.code().await, Some(0));
    };
    tokio::join!(
        outlives(&["lock", "a", "--ttl", "6s", "--", "sh", "-c", WAITS]),
        outlives(&["elect", "b", "v", "--ttl", "6s", "--", "sh", "-c", WAITS]),
    );
}

#[tokio::test]
async fn a_command_ends_before_the_lease_of_one_that_is_cut_off() {
    let (_cluster, at) = member().await;
    let ends = async |name: &str, arguments: &[&str]| {
        let proxy = Proxy::start(&at).await;
        let mut running = Running::begin(&proxy.address(), arguments);
        running.line().await.expect("it says that it runs");
        proxy.silence();
        // The next in the queue begins when the lease has ended, and not before the other's end.
        let mut next = Running::begin(&at, &["lock", name, "--", "echo", "mine"]);
        tokio::select! {
            line = running.line() => assert_eq!(line.as_deref(), Some("TERM")),
            line = next.line() => panic!("two hold the lock: {line:?}"),
        }
        next.says("mine").await;
        assert_eq!(running.code().await, Some(74));
        assert_eq!(next.code().await, Some(0));
    };
    tokio::join!(
        ends("a", &["lock", "a", "--ttl", "6s", "--", "sh", "-c", TELLS_TERM]),
        ends("b", &["elect", "b", "v", "--ttl", "6s", "--", "sh", "-c", TELLS_TERM]),
    );
}

/// A process that stands still cannot stop its command: fences are for that. But the moment it goes on
/// it must know.
#[tokio::test]
async fn one_that_stood_still_for_too_long_ends_its_command_as_soon_as_it_goes_on() {
    let (_cluster, at) = member().await;
    let ends = async |name: &str, arguments: &[&str]| {
        let mut running = Running::begin(&at, arguments);
        running.line().await.expect("it says that it runs");
        signal(&running.child, Signal::STOP);
        let mut next = Running::begin(&at, &["lock", name, "--", "echo", "mine"]);
        next.says("mine").await;
        signal(&running.child, Signal::CONT);
        // Told to end where the member's word is read first; where the clock is, there is no time
        // left for that, and it is killed without a word.
        let last = running.line().await;
        assert!(last.as_deref().is_none_or(|line| line == "TERM"), "{last:?}");
        assert_eq!(running.code().await, Some(74));
        assert_eq!(next.code().await, Some(0));
    };
    tokio::join!(
        ends("a", &["lock", "a", "--ttl", "3s", "--", "sh", "-c", TELLS_TERM]),
        ends("b", &["elect", "b", "v", "--ttl", "3s", "--", "sh", "-c", TELLS_TERM]),
    );
}

#[tokio::test]
async fn locks_are_listed_shown_watched_and_taken_by_force() {
    let (cluster, at) = member().await;
    let channel = cluster.channel(0);
    let begin = ["lock", "jobs/a", "--owner", "me", "--", "sh", "-c", TELLS_TERM];
    let mut running = Running::begin(&at, &begin);
    let key = running.line().await.expect("it says that it runs");
    if is_etcd() {
        return an_etcd_tells_less(&at, &key).await;
    }
    let token = holder(&channel, "jobs/a").await.token.to_string();

    for arguments in [&["locks", "ls", "jobs/"][..], &["locks", "show", "jobs/a"]] {
        let output = run(&at, arguments).await;
        assert_eq!(code(&output), Some(0));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.starts_with("NAME "), "{text}");
        let row: Vec<&str> = text.lines().nth(1).expect("a lock").split_whitespace().collect();
        assert_eq!((row[0], row[1]), ("jobs/a", "me"), "{text}");
        assert!(row.contains(&token.as_str()), "{text}");
        let output = run(&at, &[arguments, &["--json"]].concat()).await;
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
        assert_eq!(shown["holder"]["owner"], "me");
        assert_eq!(shown["holder"]["token"].to_string(), token);
    }

    let mut watching = Running::begin(&at, &["locks", "watch", "jobs/a", "--json"]);
    let first = watching.line().await.expect("the present state");
    assert!(first.contains("\"me\""), "{first}");
    let release = ["locks", "release", "jobs/a", "--token", &token, "--reason", "test"];
    assert_eq!(code(&run(&at, &release).await), Some(0));
    running.says("TERM").await;
    assert_eq!(running.code().await, Some(74));
    let then = watching.line().await.expect("what has changed");
    assert!(then.contains("\"holder\":null"), "{then}");
    assert_eq!(code(&run(&at, &release).await), Some(1));
    let shown = lock(&channel, "jobs/a").await;
    assert_eq!(shown.forced[0].reason, "test");
}

/// What the keys tell of the lock `jobs/a`; what they do not tell is refused.
async fn an_etcd_tells_less(at: &str, key: &str) {
    for arguments in [&["locks", "ls", "jobs/"][..], &["locks", "show", "jobs/a"]] {
        let output = run(at, arguments).await;
        assert_eq!(code(&output), Some(0));
        let text = String::from_utf8(output.stdout).unwrap();
        let row: Vec<&str> = text.lines().nth(1).expect("a lock").split_whitespace().collect();
        assert_eq!((row[0], row[1]), ("jobs/a", "(inferred)"), "{text}");
        assert!(key.ends_with(row[3]), "{text}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("inferred from keys"), "{said}");
    }
    let release = ["locks", "release", "jobs/a", "--token", "1", "--reason", "test"];
    for arguments in [&["locks", "watch", "jobs/a"][..], &release] {
        let output = run(at, arguments).await;
        assert_eq!(code(&output), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("is not available"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

fn terminate(child: &Child) {
    signal(child, Signal::TERM);
}

fn signal(child: &Child, signal: Signal) {
    let id = child.id().expect("it runs").cast_signed();
    let pid = Pid::from_raw(id).expect("a process has a number");
    kill_process(pid, signal).expect("it is ours");
}
