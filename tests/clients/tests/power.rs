//! What holds while disks fail: power cuts, full disks, broken disks, damaged files.
//!
//! Each member has a disk of its own ([`disks`](holdfast_client_tests::disks)), which takes root and
//! loop mounts; without them these tests say so and do nothing. `POWER_CUTS_ONE` and
//! `POWER_CUTS_ALL` set how often the power of one member and of all is cut under load, 8 and 4 times
//! by default.

use std::path::Path;
use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions};
use holdfast_client_tests::check::{AFTER_ELECTION, Code, SOON, eventually, report, spread};
use holdfast_client_tests::disks::{Disk, Machines};
use holdfast_client_tests::load::Load;
use holdfast_client_tests::process::run_to_end;
use holdfast_client_tests::{Cluster, Exit, status_of, target_is_etcd};

/// Writes between two faults. With fewer, the run would not have tested anything.
const WRITES_A_ROUND: usize = 100;

/// A member that cannot go on must end by then.
const ENDS: Duration = Duration::from_secs(10);

const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";

/// Whether these tests can run here. How etcd behaves with a broken disk is not the question.
fn left_out() -> bool {
    !Disk::available() || target_is_etcd()
}

fn times(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(number) => number.parse().unwrap_or_else(|_| panic!("{variable} is a number")),
        Err(_) => default,
    }
}

#[tokio::test]
async fn power_cuts_of_one_member_lose_nothing_acknowledged() {
    if left_out() {
        return;
    }
    let mut machines = Machines::start(3).await;
    let load = Load::start(&machines.cluster);
    let mut serving = Vec::new();
    for round in 0..times("POWER_CUTS_ONE", 8) {
        machines.cluster.may_live(Duration::from_secs(120));
        load.flows(WRITES_A_ROUND).await;
        // The leader every other time, else each member in turn.
        let victim = if round % 2 == 0 { machines.cluster.leader().await } else { (round / 2) % 3 };
        machines.cut_power(&[victim]);
        load.flows(WRITES_A_ROUND).await;
        machines.restore_power(&[victim]);
        let restored = Instant::now();
        machines.cluster.serving(victim).await;
        serving.push(restored.elapsed());
    }
    machines.assert_cuts_were_real();
    let summary = load.finish(&machines.cluster).await;
    report(&format!("one power cut, start to serving: {}", spread(&serving)));
    report(&format!("{summary:?}"));
}

#[tokio::test]
async fn power_cuts_of_all_members_at_once_lose_nothing_acknowledged() {
    if left_out() {
        return;
    }
    let mut machines = Machines::start(3).await;
    let load = Load::start(&machines.cluster);
    let mut serving = Vec::new();
    for _ in 0..times("POWER_CUTS_ALL", 4) {
        machines.cluster.may_live(Duration::from_secs(120));
        load.flows(WRITES_A_ROUND).await;
        machines.cut_power(&[0, 1, 2]);
        machines.restore_power(&[0, 1, 2]);
        let restored = Instant::now();
        for member in 0..3 {
            machines.cluster.serving(member).await;
        }
        serving.push(restored.elapsed());
    }
    load.flows(WRITES_A_ROUND).await;
    machines.assert_cuts_were_real();
    let summary = load.finish(&machines.cluster).await;
    report(&format!("all without power, start to serving: {}", spread(&serving)));
    report(&format!("{summary:?}"));
}

#[tokio::test]
async fn a_member_whose_disk_fails_or_turns_read_only_stops_and_comes_back() {
    if left_out() {
        return;
    }
    let mut machines = Machines::start(3).await;
    let load = Load::start(&machines.cluster);
    for round in 0..4 {
        load.flows(WRITES_A_ROUND).await;
        let leader = machines.cluster.leader().await;
        let victim = if round < 2 { leader } else { machines.cluster.others(leader)[0] };
        let said_before = machines.cluster.printed(victim).len();
        let read_only = round % 2 == 0;
        if read_only {
            machines.disks[victim].make_read_only();
        } else {
            machines.disks[victim].cut_power();
        }
        let failed = Instant::now();
        let exit = machines.cluster.ended(victim, ENDS).await;
        report(&format!("read-only {read_only}: ended after {:?}", failed.elapsed()));
        assert_eq!(exit, Exit::Code(2));
        let said = machines.cluster.printed(victim).split_off(said_before);
        // What else fails of the disk at that moment may be logged behind it.
        let why = said.lines().rfind(|line| line.starts_with("holdfast: this member stops: "));
        assert!(why.is_some_and(|why| why.contains("start this member again")), "{said}");
        load.flows(WRITES_A_ROUND).await;
        machines.disks[victim].make_writable();
        machines.cluster.restart(victim).await;
    }
    report(&format!("{:?}", load.finish(&machines.cluster).await));
}

/// The value of a metric without labels.
async fn metric(cluster: &Cluster, member: usize, name: &str) -> Option<f64> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let address = ("127.0.0.1", cluster.client_port(member));
    let mut stream = tokio::net::TcpStream::connect(address).await.ok()?;
    let ask = b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(ask).await.ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).await.ok()?;
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

async fn refuses_puts(client: &Client) {
    eventually(SOON, "puts are refused for want of room", || async {
        let answer = client.clone().put("full/probe", "x", None).await;
        let refused =
            answer.is_err() && status_of(answer) == (Code::ResourceExhausted, NO_SPACE.to_owned());
        refused.then_some(())
    })
    .await;
}

async fn takes_puts(client: &Client) {
    eventually(SOON, "puts are taken", || async {
        client.clone().put("full/probe", "x", None).await.ok()
    })
    .await;
}

async fn value(client: &Client, key: &str, serializable: bool) -> Option<String> {
    let options = serializable.then(|| GetOptions::new().with_serializable());
    let answer = client.clone().get(key, options).await.ok()?;
    Some(answer.kvs().first()?.value_str().expect("text").to_owned())
}

#[tokio::test]
async fn a_member_with_a_full_disk_refuses_writes_keeps_reading_and_goes_on_when_there_is_room() {
    if left_out() {
        return;
    }
    let mut machines = Machines::start(3).await;
    let load = Load::start(&machines.cluster);
    load.flows(WRITES_A_ROUND).await;
    let leader = machines.cluster.leader().await;
    let victim = machines.cluster.others(leader)[0];
    let pid = machines.cluster.pid(victim);
    let client = machines.cluster.client(victim).await;
    let elsewhere = machines.cluster.client(leader).await;

    machines.disks[victim].fill(200);
    refuses_puts(&client).await;
    elsewhere.clone().put("full/a", "low", None).await.expect("others have room");
    assert_eq!(value(&client, "full/a", false).await.as_deref(), Some("low"));
    client.clone().delete("full/a", None).await.expect("a delete makes room");
    let status = client.clone().status().await.expect("a status");
    let said = errors(&status);
    assert!(said.contains("nearly full"), "{said}");
    assert_eq!(metric(&machines.cluster, victim, "holdfast_disk_low").await, Some(1.0));
    assert!(machines.cluster.printed(victim).contains("the disk is nearly full"));

    machines.disks[victim].fill(100);
    eventually(SOON, "the member says that its disk is full", || async {
        machines.cluster.printed(victim).contains("the disk is full").then_some(())
    })
    .await;
    elsewhere.clone().put("full/b", "stored elsewhere", None).await.expect("a quorum has room");
    load.flows(WRITES_A_ROUND).await;
    assert_eq!(value(&client, "full/b", true).await, None, "what cannot be stored is not taken");

    machines.disks[victim].empty();
    takes_puts(&client).await;
    assert_eq!(value(&client, "full/b", false).await.as_deref(), Some("stored elsewhere"));
    assert_eq!(metric(&machines.cluster, victim, "holdfast_disk_low").await, Some(0.0));
    assert_eq!(machines.cluster.pid(victim), pid, "without a restart");
    report(&format!("{:?}", load.finish(&machines.cluster).await));
}

/// What a member says is wrong with it.
fn errors(status: &etcd_client::StatusResponse) -> String {
    status.errors().join("; ")
}

#[tokio::test]
async fn a_leader_with_a_full_disk_hands_over_to_a_member_with_room() {
    if left_out() {
        return;
    }
    let mut machines = Machines::start(3).await;
    let load = Load::start(&machines.cluster);
    load.flows(WRITES_A_ROUND).await;
    let old = machines.cluster.leader().await;
    let others = machines.cluster.others(old);
    // One of the others has no room either: the third it must be.
    machines.disks[others[0]].fill(200);
    refuses_puts(&machines.cluster.client(others[0]).await).await;
    machines.disks[old].fill(200);
    let filled = Instant::now();
    let cluster = &mut machines.cluster;
    tokio::time::timeout(AFTER_ELECTION, async {
        while cluster.leader().await != others[1] {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the member with room leads");
    report(&format!("another leads {:?} after the disk was full", filled.elapsed()));
    takes_puts(&machines.cluster.client(others[1]).await).await;
    machines.disks[old].empty();
    machines.disks[others[0]].empty();
    for member in 0..3 {
        takes_puts(&machines.cluster.client(member).await).await;
    }
    report(&format!("{:?}", load.finish(&machines.cluster).await));
}

/// The disk is full from one moment to the next, so the member may meet the error itself.
#[tokio::test]
async fn a_disk_that_is_full_at_once_loses_nothing() {
    if left_out() {
        return;
    }
    let mut machines = Machines::start(3).await;
    let load = Load::start(&machines.cluster);
    for round in 0..2 {
        load.flows(WRITES_A_ROUND).await;
        let leader = machines.cluster.leader().await;
        let victim = if round == 0 { leader } else { machines.cluster.others(leader)[0] };
        machines.disks[victim].fill(0);
        // Long enough for the state to be flushed into what is not there.
        tokio::time::sleep(Duration::from_secs(5)).await;
        load.flows(WRITES_A_ROUND).await;
        machines.disks[victim].empty();
        if machines.cluster.runs(victim) {
            report("the member stayed");
        } else {
            assert_eq!(machines.cluster.ended(victim, ENDS).await, Exit::Code(2));
            let said = machines.cluster.printed(victim);
            let last = said.lines().last().expect("it said why");
            report(last);
            assert!(last.contains("make room on the disk"), "{last}");
            machines.cluster.spawn(victim);
        }
        machines.cluster.serving(victim).await;
        takes_puts(&machines.cluster.client(victim).await).await;
    }
    report(&format!("{:?}", load.finish(&machines.cluster).await));
}

/// How a file is damaged while the member is down.
#[derive(Debug, Clone, Copy)]
enum Damage {
    Flip(usize),
    Cut(usize),
}

/// The files below `dir` whose path contains `part`, the largest first.
fn files(dir: &Path, part: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).expect("a readable directory") {
            let path = entry.expect("a readable directory").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.to_string_lossy().contains(part) {
                found.push(path);
            }
        }
    }
    found.sort_by_key(|path| std::cmp::Reverse(path.metadata().map_or(0, |m| m.len())));
    found
}

#[tokio::test]
async fn a_minority_with_damaged_files_refuses_to_start_and_the_others_go_on() {
    if target_is_etcd() {
        return;
    }
    let mut cluster = Cluster::start(3).await;
    let load = Load::start(&cluster);
    load.flows(10 * WRITES_A_ROUND).await;
    // Long enough for the state to be flushed at least once.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let victim = 1;
    cluster.kill(victim);
    let dir = cluster.data_dir(victim);
    let mut refused = 0;
    for (part, damages) in [
        ("member.json", vec![Damage::Flip(40), Damage::Cut(20)]),
        ("CURRENT", vec![Damage::Flip(6), Damage::Cut(3)]),
        ("FLUSHED", vec![Damage::Flip(25), Damage::Cut(0)]),
        ("metadata/snapshot_", vec![Damage::Flip(20), Damage::Cut(9)]),
        ("metadata/log_", vec![Damage::Flip(30), Damage::Cut(0)]),
        (
            ".log",
            vec![
                Damage::Flip(20),
                Damage::Flip(60),
                Damage::Flip(5_000),
                Damage::Cut(0),
                Damage::Cut(5_000),
                Damage::Cut(1 << 20),
            ],
        ),
    ] {
        let file = files(&dir, part).into_iter().next();
        let file = file.unwrap_or_else(|| panic!("no {part} in {}", dir.display()));
        let whole = std::fs::read(&file).expect("readable");
        for damage in damages {
            let mut bytes = whole.clone();
            match damage {
                Damage::Flip(at) => bytes[at] ^= 0x10,
                Damage::Cut(length) => bytes.truncate(length),
            }
            std::fs::write(&file, &bytes).expect("writable");
            let arguments = cluster.arguments(victim).to_vec();
            let ended = run_to_end(cluster.dir(), &arguments, SOON).await;
            let ended = ended.unwrap_or_else(|| panic!("{part} {damage:?}: it started"));
            let last = ended.stderr.lines().last().expect("it said why").to_owned();
            assert_eq!(ended.exit, Exit::Code(2), "{part} {damage:?}: {last}");
            let name = file.file_name().expect("a name").to_string_lossy();
            assert!(last.contains(&*name), "{part} {damage:?}: {last}");
            assert!(last.contains("member remove"), "{part} {damage:?}: {last}");
            refused += 1;
            std::fs::write(&file, &whole).expect("writable");
        }
    }
    report(&format!("{refused} kinds of damage refused"));
    // What was removed is missed, too.
    let (log, away) = (dir.join("log"), dir.join("elsewhere"));
    std::fs::rename(&log, &away).expect("renamed");
    let arguments = cluster.arguments(victim).to_vec();
    let ended = run_to_end(cluster.dir(), &arguments, SOON).await.expect("it does not start");
    assert_eq!(ended.exit, Exit::Code(2));
    assert!(ended.stderr.contains("is not there"), "{}", ended.stderr);
    std::fs::rename(&away, &log).expect("renamed");

    load.flows(WRITES_A_ROUND).await;
    cluster.restart(victim).await;
    load.flows(WRITES_A_ROUND).await;
    report(&format!("{:?}", load.finish(&cluster).await));
}
