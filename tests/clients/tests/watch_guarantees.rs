//! What a watch guarantees, held against a run with faults: the nine guarantees of
//! [`holdfast_client_tests::watching`].
//!
//! The clients are those of `src/watchers.rs`. Meanwhile members are killed and restarted, and leaders
//! change.
//!
//! `SEED` replays the choices of all clients (what the machine does between them it cannot replay);
//! `WATCH_ROUNDS` sets how often each fault happens, once by default.

use std::time::{Duration, Instant};

use holdfast_client_tests::Cluster;
use holdfast_client_tests::check::{SOON, report};
use holdfast_client_tests::watchers::{READERS, Watchers};

const MEMBERS: usize = 3;

/// Revisions between two faults. With fewer, the run would not have tested anything.
const REVISIONS_A_FAULT: i64 = 400;

/// All watches see the last revision this soon after the last fault and the last write. The promise
/// is 2 s; the rest is for a machine busy with other tests.
const CAUGHT_UP: Duration = Duration::from_secs(8);

fn seed() -> u64 {
    match std::env::var("SEED") {
        Ok(seed) => seed.parse().expect("SEED is a number"),
        Err(_) => rand::random::<u64>(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_keep_all_nine_guarantees_while_members_die() {
    let rounds: usize = match std::env::var("WATCH_ROUNDS") {
        Ok(number) => number.parse().expect("WATCH_ROUNDS is a number"),
        Err(_) => 1,
    };
    let seed = seed();
    report(&format!("watches under faults: SEED={seed}"));
    let mut cluster = Cluster::start(MEMBERS).await;
    let start = Instant::now();
    let watchers = Watchers::start(&cluster, seed);
    for _ in 0..rounds {
        cluster.may_live(Duration::from_secs(120));
        faults(&mut cluster, &watchers).await;
    }
    watchers.flows(REVISIONS_A_FAULT).await;
    let told = watchers.stop().await;
    let total = told.check().unwrap_or_else(|found| panic!("SEED={seed}: {found}"));
    let (last, compacted, caught_up) = (told.last, told.compacted, told.caught_up);
    report(&format!("{last} revisions, compacted up to {compacted}, in {:?}", start.elapsed()));
    report(&format!("{total:?}; all watches at the end after {caught_up:?}"));
    assert!(caught_up < CAUGHT_UP, "the last watch took {caught_up:?}");
    // A run in which these did not happen has not tested what it is for.
    assert!(total.compacted > 0, "the sleeper was never overtaken");
    assert!(total.begun > 2 * READERS && total.progress > READERS, "{total:?}");
    assert!(
        compacted > last / 2 && last > 3 * REVISIONS_A_FAULT,
        "compacted {compacted} of {last}"
    );
}

/// A follower dies, the leader dies, and the leader leaves in good order; each comes back.
async fn faults(cluster: &mut Cluster, watchers: &Watchers) {
    for leads in [false, true] {
        watchers.flows(REVISIONS_A_FAULT).await;
        let leader = cluster.leader().await;
        let victim = if leads { leader } else { cluster.others(leader)[0] };
        cluster.kill(victim);
        watchers.flows(REVISIONS_A_FAULT).await;
        cluster.restart(victim).await;
    }
    watchers.flows(REVISIONS_A_FAULT).await;
    let leader = cluster.leader().await;
    cluster.terminate(leader, SOON).await;
    watchers.flows(REVISIONS_A_FAULT).await;
    assert_ne!(cluster.leader().await, leader, "the leader did not change");
    cluster.restart(leader).await;
}
