//! The cluster that users start from, `deploy/docker-compose.yml`: registers, locks and elections
//! through it while its containers are killed, paused and disconnected.
//!
//! Ignored unless asked for: it needs a Docker engine and a static binary.

use std::time::{Duration, Instant};

use etcd_client::LockOptions;
use holdfast_client_tests::check::{SOON, eventually, report, within};
use holdfast_client_tests::compose::{Compose, Fault};
use holdfast_client_tests::holders::Crowd;
use holdfast_client_tests::holding::{Limits, Rule};
use holdfast_client_tests::load::Load;

const FAULTS: [Fault; 3] = [Fault::Kill, Fault::Pause, Fault::Disconnect];

/// As in `lock_histories.rs`.
const LIMITS: Limits = Limits { wake_up: Duration::from_secs(3), clean_up: Duration::from_secs(3) };

/// How long a member goes on with a call at default flags: 5 s and two election timeouts.
const OPEN_CALLS: Duration = Duration::from_secs(7);

#[tokio::test]
#[ignore = "needs Docker and a static binary"]
async fn containers_come_healthy_and_keep_a_lock_when_they_are_replaced() {
    let compose = Compose::up().await;
    for member in 0..3 {
        compose.health_is(member, "healthy").await;
    }
    let mut client = compose.addresses.client(0).await;
    let lease = client.lease_grant(120, None).await.expect("a lease").id();
    let held = client.lock("kept", Some(LockOptions::new().with_lease(lease))).await;
    let held = held.expect("the lock").key().to_vec();

    compose.replace_all().await;

    let mut client = compose.addresses.client(2).await;
    let found = client.get(held.clone(), None).await.expect("a range");
    assert_eq!(found.kvs().first().map(|kv| kv.lease()), Some(lease), "the volumes keep the lock");
    let mut contender = compose.addresses.client(1).await;
    let contends = tokio::spawn(async move { contender.lock("kept", None).await });
    eventually(SOON, "the contender stands behind", || {
        let mut client = client.clone();
        async move {
            let options = etcd_client::GetOptions::new().with_prefix().with_count_only();
            (client.get("kept/", Some(options)).await.ok()?.count() == 2).then_some(())
        }
    })
    .await;
    assert!(!contends.is_finished(), "it is still held");
    client.unlock(held).await.expect("unlocked");
    within(SOON, "the contender's turn", contends).await.expect("no panic").expect("granted");

    // One member alone has no quorum, and its own health check says so.
    compose.inject(Fault::Kill, 0);
    compose.inject(Fault::Kill, 1);
    compose.health_is(2, "unhealthy").await;
    compose.heal(Fault::Kill, 0);
    compose.health_is(2, "healthy").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Docker and a static binary"]
async fn registers_keep_their_history_while_containers_fail() {
    let compose = Compose::up().await;
    let load = Load::start(&compose.addresses);
    load.flows(200).await;
    for fault in FAULTS {
        for leads in [true, false] {
            fail(&compose, fault, leads, async || load.flows(150).await).await;
            load.flows(100).await;
        }
    }
    report(&format!("registers: {:?}", load.finish(&compose.addresses).await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Docker and a static binary"]
async fn locks_and_elections_keep_their_promises_while_containers_fail() {
    let seed = rand::random();
    let compose = Compose::up().await;
    let crowd = Crowd::start(&compose.addresses, 24, 6, seed);
    let (mut faults, mut kinds) = (Vec::new(), Vec::new());
    let mut goal = 100;
    crowd.grants(goal).await;
    for fault in FAULTS {
        for leads in [true, false] {
            let from = Instant::now();
            goal += 60;
            fail(&compose, fault, leads, async || crowd.grants(goal).await).await;
            faults.push((from, Instant::now()));
            kinds.push(fault);
            goal += 60;
            crowd.grants(goal).await;
        }
    }
    let history = crowd.finish(&compose.addresses, faults, LIMITS).await;
    let (summary, mut broken) = history.check();
    // A member that is cut off from a client does not hear that it goes. What that client had asked for
    // may be done once the member is back, and stays until its lease ends.
    let mut unheard = history.clone();
    for (fault, window) in kinds.iter().zip(&mut unheard.faults) {
        if *fault == Fault::Disconnect {
            window.1 += OPEN_CALLS;
        }
    }
    broken.retain(|broken| broken.rule != Rule::NoGhost);
    broken.extend(unheard.check().1.into_iter().filter(|broken| broken.rule == Rule::NoGhost));
    report(&format!("SEED={seed}: {} grants", summary.grants));
    for broken in broken.iter().take(20) {
        eprintln!("{:?}: {}", broken.rule, broken.what);
    }
    assert!(broken.is_empty(), "{} promises were broken", broken.len());
    assert!(summary.waited > goal / 4 && summary.guarded > goal / 4, "{summary:?}");
}

/// Lets one container fail, the leader's or another's, and heals it once the others have gone on.
async fn fail(compose: &Compose, fault: Fault, leads: bool, goes_on: impl AsyncFnOnce()) {
    let addresses = &compose.addresses;
    let leader = addresses.leader_among(&[0, 1, 2]).await;
    let member = if leads { leader } else { addresses.others(leader)[0] };
    let began = Instant::now();
    compose.inject(fault, member);
    addresses.leader_among(&addresses.others(member)).await;
    let role = if leads { "the leader" } else { "a follower" };
    report(&format!("{fault:?} of {role}: the others agree again after {:?}", began.elapsed()));
    goes_on().await;
    assert!(!addresses.serves(member).await, "{fault:?} must have taken hold");
    compose.heal(fault, member);
    compose.serving(member).await;
}
