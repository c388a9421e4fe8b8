//! Locks across the end of a leader, with the times that it takes.
//!
//! What must hold is asserted: nobody is granted before the lease of a dead holder could have ended,
//! and everybody is granted in the end. How long it takes is printed, for `docs/performance.md`;
//! `LOCK_FAILOVERS` says how often each is done. Against etcd the same is measured.

use std::time::{Duration, Instant};

use etcd_client::{Client, LockOptions};
use holdfast_client_tests::Cluster;
use holdfast_client_tests::check::{AFTER_ELECTION, SOON, eventually, report, spread, within};
use holdfast_client_tests::crowd::size;

/// Of the holder that dies.
const LEASE: Duration = Duration::from_secs(5);

async fn lease(client: &mut Client, ttl: Duration) -> i64 {
    let ttl = i64::try_from(ttl.as_secs()).expect("a TTL");
    client.lease_grant(ttl, None).await.expect("a lease").id()
}

async fn waits_in_line(client: &Client, name: &str, length: i64) {
    eventually(SOON, "the waiter stands in line", || {
        let (mut client, prefix) = (client.clone(), format!("{name}/"));
        async move {
            let options = etcd_client::GetOptions::new().with_prefix().with_count_only();
            (client.get(prefix, Some(options)).await.ok()?.count() == length).then_some(())
        }
    })
    .await;
}

/// A waiter on `member` that asks again, as clients do, until it is granted.
fn waiter(
    cluster: &Cluster,
    member: usize,
    name: &str,
    lease: i64,
) -> tokio::task::JoinHandle<Instant> {
    let (addresses, name) = ((**cluster).clone(), name.to_owned());
    tokio::spawn(async move {
        loop {
            let mut client = addresses.client(member).await;
            let options = LockOptions::new().with_lease(lease);
            if client.lock(name.as_str(), Some(options)).await.is_ok() {
                return Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
}

/// The holder dies without a word, and right after it the leader.
#[tokio::test]
async fn the_lock_of_a_dead_holder_is_granted_after_its_lease_though_the_leader_dies_too() {
    let mut cluster = Cluster::start(3).await;
    let mut took = Vec::new();
    for round in 0..size("LOCK_FAILOVERS", 2) {
        cluster.may_live(Duration::from_secs(120));
        let leader = cluster.leader().await;
        let follower = cluster.others(leader)[0];
        let name = format!("dead/{round}");
        let mut client = cluster.client(follower).await;
        let patient = lease(&mut client, Duration::from_secs(60)).await;
        let holders = lease(&mut client, LEASE).await;
        // The lease is not renewed from here on: nothing of the holder is heard again.
        let granted = Instant::now();
        let options = LockOptions::new().with_lease(holders);
        client.lock(name.as_str(), Some(options)).await.expect("the lock");
        let waiter = waiter(&cluster, follower, &name, patient);
        waits_in_line(&client, &name, 2).await;
        cluster.kill(leader);
        let next = within(LEASE + AFTER_ELECTION, "the next grant", waiter).await;
        let after = next.expect("no panic").duration_since(granted);
        assert!(after >= LEASE, "granted {after:?} after a lease of {LEASE:?} was granted");
        took.push(after);
        cluster.restart(leader).await;
        client.lease_revoke(patient).await.expect("a revoke");
    }
    report(&format!("holder and leader dead, lease of {LEASE:?}: next grant {}", spread(&took)));
}

/// Unlock and the leader's end cross.
#[tokio::test]
async fn a_lock_that_is_handed_over_while_the_leader_dies_is_granted_once() {
    let mut cluster = Cluster::start(3).await;
    let mut took = Vec::new();
    for round in 0..size("LOCK_FAILOVERS", 2) {
        cluster.may_live(Duration::from_secs(120));
        let leader = cluster.leader().await;
        let follower = cluster.others(leader)[0];
        let name = format!("over/{round}");
        let mut client = cluster.client(follower).await;
        let (first, second) = (
            lease(&mut client, Duration::from_secs(60)).await,
            lease(&mut client, Duration::from_secs(60)).await,
        );
        let options = LockOptions::new().with_lease(first);
        let held = client.lock(name.as_str(), Some(options)).await.expect("the lock");
        let key = held.key().to_vec();
        let waiter = waiter(&cluster, follower, &name, second);
        waits_in_line(&client, &name, 2).await;
        // Sent first and not waited for, so that the two cross.
        let mut unlocker = client.clone();
        let sent = Instant::now();
        let unlocking = tokio::spawn(async move { unlocker.unlock(key).await });
        tokio::task::yield_now().await;
        cluster.kill(leader);
        let unlocked = within(AFTER_ELECTION, "the unlock ends", unlocking).await;
        if unlocked.expect("no panic").is_err() {
            // Its outcome is unknown: an Unlock may be sent again.
            eventually(AFTER_ELECTION, "an unlock", || {
                let (mut client, key) = (client.clone(), held.key().to_vec());
                async move { client.unlock(key).await.ok() }
            })
            .await;
        }
        let next = within(AFTER_ELECTION, "the next grant", waiter).await;
        took.push(next.expect("no panic").duration_since(sent));
        waits_in_line(&client, &name, 1).await;
        cluster.restart(leader).await;
        client.lease_revoke(second).await.expect("a revoke");
        client.lease_revoke(first).await.expect("a revoke");
    }
    report(&format!("handed over while the leader dies: next grant {}", spread(&took)));
}
