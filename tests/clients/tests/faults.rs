//! What holds while members die: nothing acknowledged is lost, nothing happens twice, whoever waits
//! goes on waiting in the same order.
//!
//! `FAULT_KILLS` sets how often the leader is killed under load, 20 times by default, and
//! `LOCK_LEADER_KILLS` how often while calls wait on each member, 4 times.

use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions, LockOptions, ProclaimOptions, PutOptions};
use holdfast_client_tests::addresses::connect;
use holdfast_client_tests::check::{AFTER_ELECTION, SOON, eventually, report, silent, spread};
use holdfast_client_tests::crowd::size;
use holdfast_client_tests::load::Load;
use holdfast_client_tests::process::Exit;
use holdfast_client_tests::{Cluster, target_is_etcd, within};

/// The promise is much shorter; this only tells slow from broken on a busy machine.
const SERVICE_IS_BACK: Duration = Duration::from_secs(10);

/// Writes between two kills. With fewer, the run would not have tested anything.
const WRITES_A_ROUND: usize = 100;

async fn term(client: &mut Client) -> u64 {
    client.status().await.expect("a status").raft_term()
}

async fn lease(client: &mut Client) -> i64 {
    client.lease_grant(120, None).await.expect("a lease").id()
}

async fn queue(client: &mut Client, prefix: &str) -> Vec<String> {
    let options = GetOptions::new().with_prefix().with_keys_only();
    let answer = client.get(prefix, Some(options)).await.expect("a range");
    answer.kvs().iter().map(|kv| kv.key_str().expect("text").to_owned()).collect()
}

async fn wait_for_queue(client: &Client, prefix: &str, length: usize) {
    eventually(SOON, &format!("{length} keys under {prefix}"), || {
        let mut client = client.clone();
        async move { (queue(&mut client, prefix).await.len() == length).then_some(()) }
    })
    .await;
}

#[tokio::test]
async fn killing_the_leader_under_load_loses_nothing_and_repeats_nothing() {
    let kills: usize = match std::env::var("FAULT_KILLS") {
        Ok(number) => number.parse().expect("FAULT_KILLS is a number"),
        Err(_) => 20,
    };
    let mut cluster = Cluster::start(3).await;
    let mut load = Load::start(&cluster);
    let mut times = Vec::new();
    for _ in 0..kills {
        cluster.may_live(Duration::from_secs(120));
        load.flows(WRITES_A_ROUND).await;
        let leader = cluster.leader().await;
        let others = cluster.others(leader);
        let before = term(&mut cluster.client(others[0]).await).await;
        cluster.kill(leader);
        let killed = Instant::now();
        let time = load.time_to_next_write(&cluster, &others, killed);
        let time = within(AFTER_ELECTION, "a write without the old leader", time).await;
        let after = term(&mut cluster.client(others[0]).await).await;
        assert!(after > before, "the kill changed nothing: term {before}, then {after}");
        assert!(time < SERVICE_IS_BACK, "no write for {time:?}");
        times.push(time);
        cluster.restart(leader).await;
    }
    let summary = load.finish(&cluster).await;
    report(&format!("leader killed, time to the next acknowledged write: {}", spread(&times)));
    report(&format!("{summary:?}"));
    assert!(summary.writes_done >= kills * WRITES_A_ROUND && summary.reads > 0);
}

#[tokio::test]
async fn after_a_kill_all_members_have_the_same_hash_of_every_revision() {
    let mut cluster = Cluster::start(3).await;
    let load = Load::start(&cluster);
    load.flows(WRITES_A_ROUND).await;
    let leader = cluster.leader().await;
    cluster.kill(leader);
    cluster.restart(leader).await;
    load.flows(WRITES_A_ROUND).await;
    // Only when the load has ended has every member applied the same.
    load.finish(&cluster).await;
    let mut clients = Vec::new();
    for member in 0..cluster.size() {
        clients.push(cluster.client(member).await);
    }
    let answer = clients[0].get("x", None).await.expect("a range");
    let last = answer.header().expect("a header").revision();
    for revision in [last, last - 1, last / 2, 2] {
        let mut hashes = Vec::new();
        for client in &mut clients {
            hashes.push(client.hash_kv(revision).await.expect("a hash").hash());
        }
        assert!(hashes.iter().all(|h| *h == hashes[0]), "at revision {revision}: {hashes:?}");
    }
}

#[tokio::test]
async fn waiting_locks_survive_the_leader_and_are_granted_in_order() {
    const WAITERS: usize = 6;
    let mut cluster = Cluster::start(3).await;
    for round in 0..3 {
        let leader = cluster.leader().await;
        let followers = cluster.others(leader);
        let name = format!("lock{round}");
        let prefix = format!("{name}/");
        let mut client = cluster.client(followers[0]).await;
        let lock = async |client: &mut Client, lease| {
            let options = LockOptions::new().with_lease(lease);
            client.lock(name.as_str(), Some(options)).await
        };
        let holder = lease(&mut client).await;
        let mut held = lock(&mut client, holder).await.expect("a free lock").key().to_vec();
        let (granted, mut grants) = tokio::sync::mpsc::unbounded_channel();
        for waiter in 0..WAITERS {
            let mut asked = cluster.client(followers[waiter % 2]).await;
            let id = lease(&mut asked).await;
            let (granted, name) = (granted.clone(), name.clone());
            tokio::spawn(async move {
                let options = LockOptions::new().with_lease(id);
                let answer = asked.lock(name, Some(options)).await;
                granted.send((waiter, answer)).expect("the test listens");
            });
            wait_for_queue(&client, &prefix, waiter + 2).await;
        }
        if target_is_etcd() {
            // A waiter of etcd still reads through the leader after its key shows, and fails with
            // "leader changed" when the leader dies just then.
            silent(Duration::from_millis(500), "the lock is held", grants.recv()).await;
        }
        cluster.kill(leader);
        cluster.leader().await;
        let mut newest = 0;
        for waiter in 0..WAITERS {
            silent(Duration::from_millis(50), "the lock is held", grants.recv()).await;
            client.unlock(held.as_slice()).await.expect("unlocked");
            let next = within(AFTER_ELECTION, "the next grant", grants.recv()).await;
            let (who, answer) = next.expect("the waiters are there");
            let answer = answer.expect("no waiter sees an error");
            assert_eq!(who, waiter, "not in the order of asking");
            held = answer.key().to_vec();
            let kv = client.get(held.clone(), None).await.expect("a range").take_kvs().remove(0);
            assert!(kv.create_revision() > newest, "tokens go up");
            newest = kv.create_revision();
        }
        cluster.restart(leader).await;
    }
}

/// Two calls wait on each member, the leader among them, while one leader after the other is killed.
/// Whose member dies asks elsewhere with the same lease, which brings its place back.
#[tokio::test]
async fn blocked_locks_on_each_member_outlive_several_leaders_and_are_granted_once() {
    let kills = size("LOCK_LEADER_KILLS", 4);
    let waiters = kills + 2;
    let mut cluster = Cluster::start(3).await;
    cluster.may_live(Duration::from_secs(60 + 10 * kills as u64));
    let endpoints: Vec<String> = (0..3).map(|member| cluster.endpoint(member)).collect();
    let mut client = cluster.client(0).await;
    let holder = lease(&mut client).await;
    let options = LockOptions::new().with_lease(holder);
    let mut held = client.lock("many", Some(options)).await.expect("the lock").key().to_vec();
    let (told, mut hears) = tokio::sync::mpsc::unbounded_channel();
    let (failed, mut failures) = tokio::sync::mpsc::unbounded_channel();
    for waiter in 0..waiters {
        let id = lease(&mut client).await;
        let (told, failed, endpoints) = (told.clone(), failed.clone(), endpoints.clone());
        tokio::spawn(async move {
            for member in (waiter..).map(|n| n % 3) {
                let mut asked = connect(&endpoints[member]).await;
                let options = LockOptions::new().with_lease(id);
                match asked.lock("many", Some(options)).await {
                    Ok(answer) => {
                        told.send((waiter, answer.key().to_vec())).expect("the test listens");
                        return;
                    }
                    Err(error) => {
                        failed.send((member, error)).expect("the test listens");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }
        });
        wait_for_queue(&client, "many/", waiter + 2).await;
    }
    let mut order = Vec::new();
    let mut newest = 0;
    for round in 0..waiters {
        if round < kills {
            let leader = cluster.leader().await;
            cluster.kill(leader);
            cluster.leader().await;
            silent(Duration::from_millis(50), "the lock is held", hears.recv()).await;
            while let Ok((member, error)) = failures.try_recv() {
                assert!(member == leader || target_is_etcd(), "on {member}, which lives: {error}");
            }
            cluster.restart(leader).await;
            client = cluster.client(0).await;
            // All are back in the queue, be it because they never left it.
            wait_for_queue(&client, "many/", waiters + 1 - round).await;
        }
        client.unlock(held.as_slice()).await.expect("unlocked");
        let next = within(AFTER_ELECTION, "the next grant", hears.recv()).await;
        let (waiter, key) = next.expect("the waiters are there");
        let kv = client.get(key.clone(), None).await.expect("a range").take_kvs().remove(0);
        assert!(kv.create_revision() > newest, "tokens go up");
        newest = kv.create_revision();
        held = key;
        order.push(waiter);
    }
    client.unlock(held).await.expect("unlocked");
    assert_eq!(queue(&mut client, "many/").await, [""; 0]);
    drop((told, failed));
    assert_eq!(hears.recv().await, None, "each was granted once");
    if target_is_etcd() {
        // A waiter of etcd that hears of another leader loses its place.
        order.sort_unstable();
    }
    assert_eq!(order, Vec::from_iter(0..waiters));
}

#[tokio::test]
async fn an_observer_on_a_follower_outlives_the_leader() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let followers = cluster.others(leader);
    let mut candidate = cluster.client(followers[0]).await;
    let mut observer = cluster.client(followers[1]).await;
    let id = lease(&mut candidate).await;
    let won = candidate.campaign("job", "first", id).await.expect("elected");
    let key = won.leader().expect("a leader key").clone();
    let mut stream = observer.observe("job").await.expect("a stream");
    let mut newest = 0;
    let mut observed = async |what: &str| {
        let next = within(AFTER_ELECTION, what, stream.message()).await;
        let next = next.expect("the stream has no error").expect("the stream does not end");
        let kv = next.kv().expect("a pair").clone();
        assert!(kv.mod_revision() > newest, "never backward: {kv:?} after {newest}");
        newest = kv.mod_revision();
        kv.value_str().expect("text").to_owned()
    };
    assert_eq!(observed("the leader").await, "first");
    cluster.kill(leader);
    cluster.leader().await;
    let proclaim = async |client: &mut Client, value: &str| {
        let options = ProclaimOptions::new().with_leader(key.clone());
        client.proclaim(value, Some(options)).await.expect("proclaimed");
    };
    proclaim(&mut candidate, "second").await;
    assert_eq!(observed("the proclaim after the kill").await, "second");
    cluster.restart(leader).await;
    proclaim(&mut candidate, "third").await;
    assert_eq!(observed("the proclaim after the restart").await, "third");
    let now = cluster.client(leader).await.leader("job").await.expect("a leader");
    assert_eq!(now.kv().expect("a pair").value(), b"third");
}

#[tokio::test]
async fn killing_everything_at_once_keeps_writes_leases_and_locks() {
    let mut cluster = Cluster::start(3).await;
    let mut client = cluster.client(0).await;
    let id = lease(&mut client).await;
    for key in ["kept/a", "kept/b"] {
        let options = PutOptions::new().with_lease(id);
        client.put(key, "v", Some(options)).await.expect("a put");
    }
    let options = LockOptions::new().with_lease(id);
    let held = client.lock("crash", Some(options)).await.expect("the lock").key().to_vec();
    let load = Load::start(&cluster);
    load.flows(500).await;

    cluster.kill_all();
    for member in 0..cluster.size() {
        cluster.spawn(member);
    }
    let restarted = Instant::now();
    for member in 0..cluster.size() {
        cluster.serving(member).await;
    }
    report(&format!("all killed, restarted and serving after {:?}", restarted.elapsed()));
    load.flows(100).await;
    let summary = load.finish(&cluster).await;
    report(&format!("{summary:?}"));

    let mut client = cluster.client(1).await;
    let options = etcd_client::LeaseTimeToLiveOptions::new().with_keys();
    let left = client.lease_time_to_live(id, Some(options)).await.expect("an answer");
    assert!(left.ttl() > 0 && left.granted_ttl() == 120, "{left:?}");
    let mut attached = left.keys().to_vec();
    attached.sort();
    assert_eq!(attached, [held.clone(), b"kept/a".to_vec(), b"kept/b".to_vec()]);
    let mut contender = cluster.client(2).await;
    let other = lease(&mut contender).await;
    let waits = tokio::spawn(async move {
        contender.lock("crash", Some(LockOptions::new().with_lease(other))).await
    });
    wait_for_queue(&client, "crash/", 2).await;
    assert!(!waits.is_finished(), "the lock is still held");
    client.unlock(held).await.expect("unlocked");
    let granted = within(SOON, "the contender's turn", waits).await.expect("no panic");
    assert_eq!(granted.expect("granted").key(), format!("crash/{other:x}").as_bytes());
    client.lease_revoke(id).await.expect("a revoke");
    assert_eq!(queue(&mut client, "kept/").await, [""; 0]);
}

#[tokio::test]
async fn a_leader_asked_to_end_ends_well_and_writes_go_on() {
    let mut cluster = Cluster::start(3).await;
    let mut load = Load::start(&cluster);
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    load.probe(&cluster, &others).await;
    load.flows(WRITES_A_ROUND).await;
    let asked = Instant::now();
    let exit = cluster.terminate(leader, Duration::from_secs(10)).await;
    report(&format!("SIGTERM to the leader: {exit:?} after {:?}", asked.elapsed()));
    if target_is_etcd() {
        // etcd cleans up, then gives itself the same signal again.
        assert_eq!(exit, Exit::Signal(15));
    } else {
        assert_eq!(exit, Exit::Code(0));
    }
    load.flows(3 * WRITES_A_ROUND).await;
    let gap = load.longest_gap(&others, asked);
    report(&format!("longest time without an acknowledged write on the others: {gap:?}"));
    assert!(gap < SERVICE_IS_BACK);
    cluster.restart(leader).await;
    report(&format!("{:?}", load.finish(&cluster).await));
}

/// The leader's lease runs out while it stands still, but not long enough for another to be
/// elected: what it is asked next it must refuse for a moment, and nobody may be left waiting.
#[tokio::test]
async fn a_leader_that_stood_still_for_a_moment_leaves_no_write_waiting() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    for round in 0..5 {
        let pause = signal(cluster.pid(leader), "STOP");
        assert!(pause, "the leader can be paused");
        let mut writes = tokio::task::JoinSet::new();
        for member in 0..cluster.size() {
            let mut client = cluster.client(member).await;
            writes.spawn(async move {
                for n in 0..20 {
                    client.put(format!("{round}/{member}/{n}"), "v", None).await?;
                }
                Ok::<_, etcd_client::Error>(())
            });
        }
        // Long enough for the lease, too short for an election.
        tokio::time::sleep(Duration::from_millis(750)).await;
        assert!(signal(cluster.pid(leader), "CONT"), "the leader can go on");
        let all = async {
            while let Some(done) = writes.join_next().await {
                done.expect("no panic").expect("a put");
            }
        };
        within(Duration::from_secs(4), "writes after a pause of the leader", all).await;
    }
}

/// A member that was away for longer than the log reaches back gets the whole state.
#[tokio::test]
async fn a_member_far_behind_catches_up_by_a_snapshot() {
    // The flag is etcd's too; both keep another 5,000 entries behind a snapshot.
    const WRITES: usize = 12_000;
    let mut cluster = Cluster::start_with(3, &["--snapshot-count=1000"]).await;
    let leader = cluster.leader().await;
    let away = cluster.others(leader)[0];
    let mut client = cluster.client(leader).await;
    let id = lease(&mut client).await;
    let leased = PutOptions::new().with_lease(id);
    client.put("leased", "v", Some(leased)).await.expect("a put");
    cluster.kill(away);
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..64 {
        let mut client = client.clone();
        writers.spawn(async move {
            for n in 0..WRITES / 64 {
                client.put(format!("{writer}/{}", n % 100), n.to_string(), None).await?;
            }
            Ok::<_, etcd_client::Error>(())
        });
    }
    while let Some(done) = writers.join_next().await {
        done.expect("no panic").expect("a put");
    }
    cluster.restart(away).await;
    let mut behind = cluster.client(away).await;
    let answer = behind.get("leased", None).await.expect("a linearizable range");
    assert_eq!(answer.kvs()[0].lease(), id);
    let revision = answer.header().expect("a header").revision();
    let ours = behind.hash_kv(revision).await.expect("a hash").hash();
    let theirs = client.hash_kv(revision).await.expect("a hash").hash();
    assert_eq!(ours, theirs, "at revision {revision}");
    client.lease_revoke(id).await.expect("a revoke");
    eventually(SOON, "the key of the revoked lease goes there too", || {
        let mut behind = behind.clone();
        async move { behind.get("leased", None).await.ok()?.kvs().is_empty().then_some(()) }
    })
    .await;
}

/// Sends `kill -NAME` to a process of the test's own.
fn signal(pid: u32, name: &str) -> bool {
    let mut kill = std::process::Command::new("kill");
    let status = kill.args([format!("-{name}"), pid.to_string()]).status();
    status.is_ok_and(|status| status.success())
}
