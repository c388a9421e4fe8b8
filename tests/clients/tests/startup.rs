//! Starting: how soon a member serves, and how it refuses what it cannot start with.
//!
//! Whoever gave a wrong flag or started a member twice must learn it from the exit code and from one
//! clear line, and the member that was there first must not notice.

use std::process::Stdio;
use std::time::{Duration, Instant};

use etcd_client::Client;
use holdfast_client_tests::addresses::connect;
use holdfast_client_tests::check::{SOON, report, within};
use holdfast_client_tests::ports::Port;
use holdfast_client_tests::process::{Exit, Finished, run_to_end};
use holdfast_client_tests::program::{command, program};
use holdfast_client_tests::{Cluster, Etcdctl, eventually, target_is_etcd};

/// How long a refusal may take. etcd's own refusals come at once or, for a locked directory, never.
const REFUSAL: Duration = Duration::from_secs(5);

/// The flags of a member with some of them replaced or added.
fn with(arguments: &[String], changes: &[(&str, &str)]) -> Vec<String> {
    let mut arguments = arguments.to_vec();
    for (flag, value) in changes {
        match arguments.iter().position(|a| a == flag) {
            Some(at) => arguments[at + 1] = (*value).to_owned(),
            None => arguments.extend([(*flag).to_owned(), (*value).to_owned()]),
        }
    }
    arguments
}

/// Asserts a refusal: an exit code of its own, and a line on standard error that names the culprit,
/// with nothing after it.
#[track_caller]
fn refuses(finished: Option<Finished>, culprit: &str) {
    let finished = finished.expect("it goes on as if nothing were wrong");
    let Exit::Code(code) = finished.exit else { panic!("killed by a signal: {finished:?}") };
    assert_ne!(code, 0, "{finished:?}");
    assert!(!finished.stderr.contains("panicked at"), "{finished:?}");
    let named = |line: &str| line.contains(culprit);
    if target_is_etcd() {
        // etcd goes on with its usage or with the log of its shutdown.
        assert!(finished.stderr.lines().any(named), "{culprit}: {finished:?}");
    } else {
        assert!(finished.stderr.lines().next_back().is_some_and(named), "{culprit}: {finished:?}");
    }
}

async fn works(cluster: &Cluster) {
    writes(&mut cluster.client(0).await).await;
}

async fn writes(client: &mut Client) {
    client.put("works", "yes", None).await.expect("a put");
    let answer = client.get("works", None).await.expect("a range");
    assert_eq!(answer.kvs()[0].value(), b"yes");
}

/// A member with other ports but all else as it was given to the first.
fn twin(cluster: &Cluster, ports: &[Port; 2], changes: &[(&str, &str)]) -> Vec<String> {
    let url = |port: &Port| format!("http://127.0.0.1:{}", port.number());
    let (client, peer) = (url(&ports[0]), url(&ports[1]));
    let initial = format!("m1={peer}");
    let mut all = vec![
        ("--listen-client-urls", client.as_str()),
        ("--advertise-client-urls", &client),
        ("--listen-peer-urls", &peer),
        ("--initial-advertise-peer-urls", &peer),
        ("--initial-cluster", &initial),
    ];
    all.extend(changes);
    with(cluster.arguments(0), &all)
}

#[tokio::test]
async fn a_second_process_on_the_same_data_is_refused() {
    let cluster = Cluster::start(1).await;
    works(&cluster).await;
    let ports = [Port::reserve(), Port::reserve()];
    let second = twin(&cluster, &ports, &[]);
    let finished = run_to_end(cluster.dir(), &second, REFUSAL).await;
    if target_is_etcd() {
        // etcd waits for the lock, for ever.
        assert!(finished.is_none(), "{finished:?}");
    } else {
        refuses(finished, &cluster.dir().join("m1").to_string_lossy());
    }
    works(&cluster).await;
}

#[tokio::test]
async fn data_of_another_member_or_cluster_is_refused() {
    let mut cluster = Cluster::start(1).await;
    works(&cluster).await;
    cluster.kill(0);
    // Everything is as before but the name, or the token.
    let initial = format!("stranger=http://127.0.0.1:{}", cluster.peer_port(0));
    let name = [("--name", "stranger"), ("--initial-cluster", initial.as_str())];
    let token = [("--initial-cluster-token", "another-cluster")];
    for (changes, culprit) in [(&name[..], "stranger"), (&token[..], "initial-cluster-token")] {
        let second = with(cluster.arguments(0), changes);
        let finished = run_to_end(cluster.dir(), &second, REFUSAL).await;
        if target_is_etcd() {
            // etcd goes by its data and never looks at the flags again.
            assert!(finished.is_none(), "{finished:?}");
        } else {
            refuses(finished, culprit);
        }
    }
    cluster.restart(0).await;
    works(&cluster).await;
}

/// It would vote as if it had confirmed nothing, and what it confirmed would be lost.
#[tokio::test]
async fn a_member_that_lost_its_data_is_refused() {
    let mut cluster = Cluster::start(3).await;
    cluster.kill(2);
    std::fs::remove_dir_all(cluster.dir().join("m3")).expect("the data can be removed");
    let culprit = if target_is_etcd() { "already been bootstrapped" } else { "lost its data" };
    for _ in 0..2 {
        let arguments = cluster.arguments(2).to_vec();
        refuses(run_to_end(cluster.dir(), &arguments, REFUSAL).await, culprit);
    }
    works(&cluster).await;
}

#[tokio::test]
async fn wrong_flags_are_refused() {
    // With ports of its own, should the flag be taken after all.
    let cluster = Cluster::prepare(1, &[]);
    for (flag, value, culprit) in [
        ("--no-such-flag", "1", "no-such-flag"),
        ("--listen-client-urls", "not a url", "not a url"),
        ("--listen-peer-urls", "http://127.0.0.1:port", "127.0.0.1:port"),
        ("--election-timeout", "soon", "soon"),
        ("--initial-cluster-state", "perhaps", "perhaps"),
    ] {
        let flags = with(cluster.arguments(0), &[(flag, value)]);
        refuses(run_to_end(cluster.dir(), &flags, REFUSAL).await, culprit);
    }
}

#[tokio::test]
async fn a_busy_client_port_is_refused() {
    let cluster = Cluster::start(1).await;
    let ports = [Port::reserve(), Port::reserve()];
    let busy = cluster.endpoint(0);
    let data = cluster.dir().join("second").to_string_lossy().into_owned();
    let second =
        twin(&cluster, &ports, &[("--listen-client-urls", &busy), ("--data-dir", data.as_str())]);
    let finished = run_to_end(cluster.dir(), &second, REFUSAL).await;
    refuses(finished, &cluster.client_port(0).to_string());
    works(&cluster).await;
}

#[tokio::test]
async fn without_arguments_it_serves_on_the_default_port() {
    let limit = Duration::from_secs(60);
    let (client, peer) = (Port::reserve_exactly(2379, limit), Port::reserve_exactly(2380, limit));
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let began = Instant::now();
    let mut child = command(program())
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program runs");
    let ready = tokio::spawn(async {
        eventually(SOON, "a put works", || async {
            let mut client = connect("http://127.0.0.1:2379").await;
            let put = tokio::time::timeout(Duration::from_secs(1), client.put("k", "v", None));
            put.await.ok()?.ok().map(|_| ())
        })
        .await;
    })
    .await;
    let took = began.elapsed();
    child.kill().expect("a child can be killed");
    child.wait().expect("a child can be waited for");
    drop((client, peer));
    ready.expect("it serves");
    report(&format!("started without arguments, the first put worked after {took:?}"));
    assert!(took < SOON);
}

#[tokio::test]
async fn a_restart_keeps_the_data_and_the_identity() {
    let mut cluster = Cluster::start(1).await;
    let before = Etcdctl::member(&cluster, 0).json(&["put", "k", "v"]);
    cluster.kill(0);
    let began = Instant::now();
    cluster.restart(0).await;
    report(&format!("restarted and serving after {:?}", began.elapsed()));
    let after = Etcdctl::member(&cluster, 0).json(&["put", "k", "w", "--prev-kv"]);
    for id in ["cluster_id", "member_id"] {
        assert_eq!(before["header"][id], after["header"][id]);
    }
    let revision = |answer: &serde_json::Value| answer["header"]["revision"].as_i64();
    assert_eq!(revision(&after), revision(&before).map(|r| r + 1));
}

#[tokio::test]
async fn a_member_asked_to_end_ends_well() {
    for signal_to in [1, 3] {
        let mut cluster = Cluster::start(signal_to).await;
        let exit = cluster.terminate(0, SOON).await;
        let expected = if target_is_etcd() { Exit::Signal(15) } else { Exit::Code(0) };
        assert_eq!(exit, expected);
    }
}

/// What systemd's `Type=notify` and `deploy/systemd/holdfast.service` stand on.
#[tokio::test]
async fn the_service_manager_is_told_when_the_member_serves() {
    let mut cluster = Cluster::prepare(1, &[]);
    let path = cluster.dir().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).expect("a socket");
    cluster.spawn_with(0, &[("NOTIFY_SOCKET", path.as_os_str())]);
    let mut told = [0; 256];
    let length = within(SOON, "READY=1", socket.recv(&mut told)).await.expect("a message");
    assert!(told[..length].starts_with(b"READY=1"), "{:?}", told[..length].escape_ascii());
    assert!(cluster.serves(0).await, "ready is said only then");
}
