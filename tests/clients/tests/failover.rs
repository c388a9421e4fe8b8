//! How a leader that is gone is told from one that is only late.

use std::time::{Duration, Instant};

use holdfast_client_tests::check::{AFTER_ELECTION, report, spread};
use holdfast_client_tests::load::Load;
use holdfast_client_tests::{Cluster, target_is_etcd, within};

/// Writes before each fault.
const WRITES: usize = 100;

async fn term(cluster: &Cluster, member: usize) -> u64 {
    cluster.client(member).await.status().await.expect("a status").raft_term()
}

/// The kernel ends a dead leader's connections, so nobody has to wait for a timeout. Both followers
/// notice at the same time, and one of them leads.
#[tokio::test]
async fn a_killed_leader_is_succeeded_before_any_timeout() {
    /// After the last heartbeat nobody can be elected by timeout for nine seconds.
    const TIMEOUT: Duration = Duration::from_secs(8);
    const KILLS: usize = 5;
    if target_is_etcd() {
        report("left out: etcd waits for the election timeout");
        return;
    }
    let flags = ["--heartbeat-interval=100", "--election-timeout=10000"];
    let mut cluster = Cluster::start_with(3, &flags).await;
    let mut load = Load::start(&cluster);
    let (mut times, mut hung) = (Vec::new(), Vec::new());
    for _ in 0..KILLS {
        cluster.may_live(Duration::from_secs(120));
        load.flows(WRITES).await;
        let leader = cluster.leader().await;
        let others = cluster.others(leader);
        let before = term(&cluster, others[0]).await;
        let at_kill = Instant::now();
        cluster.kill(leader);
        let killed = Instant::now();
        let time = load.time_to_next_write(&cluster, &others, killed);
        times.push(within(TIMEOUT, "a write without the old leader", time).await);
        assert!(term(&cluster, others[0]).await > before, "the kill changed nothing");
        load.flows(WRITES).await;
        hung.push(load.longest_open_at(&others, at_kill));
        cluster.restart(leader).await;
    }
    report(&format!("{:?}", load.finish(&cluster).await));
    report(&format!("leader killed, time to the next acknowledged write: {}", spread(&times)));
    report(&format!("calls open at that moment, the longest of each kill: {}", spread(&hung)));
    assert!(hung.iter().all(|time| *time < TIMEOUT), "{hung:?}");
}

/// The connections of a leader that stands still stand, too: it may go on at any moment.
#[tokio::test]
async fn a_leader_that_stands_still_is_succeeded_by_timeout_only() {
    /// Followers wait at least 900 ms from the last message they had, some of it before the fault.
    const PATIENCE: Duration = Duration::from_millis(300);
    let mut cluster = Cluster::start(3).await;
    let mut load = Load::start(&cluster);
    load.flows(WRITES).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    let before = term(&cluster, others[0]).await;
    cluster.pause(leader);
    let stopped = Instant::now();
    let time = load.time_to_next_write(&cluster, &others, stopped);
    let time = within(AFTER_ELECTION, "a write without the old leader", time).await;
    report(&format!("leader stopped, time to the next acknowledged write: {time:?}"));
    assert!(time > PATIENCE, "succeeded after {time:?}");
    assert!(term(&cluster, others[0]).await > before, "the old leader has gone on");
    cluster.resume(leader);
    cluster.serving(leader).await;
    load.flows(WRITES).await;
    report(&format!("{:?}", load.finish(&cluster).await));
}
