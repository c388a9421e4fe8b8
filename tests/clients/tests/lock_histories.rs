//! Locks and leaderships under everything that happens to them, checked against the whole history.
//!
//! Clients of the Lock service, candidates, and clients that follow Go's recipe share the same names.
//! They cancel, drop their connections and end their leases; the leader is killed and comes back.
//! What each was told is then held against a watch from revision 1: see `src/holding.rs`.
//!
//! `SEED` replays the choices of the clients (what the machine does between them it cannot replay).
//! `LOCK_CLIENTS`, `LOCK_NAMES`, `LOCK_GRANTS` and `LOCK_KILLS` set the size.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use holdfast_client_tests::check::{report, spread};
use holdfast_client_tests::holders::Crowd;
use holdfast_client_tests::holding::{Limits, Rule};
use holdfast_client_tests::{Cluster, target_is_etcd};

/// Twice the election timeout, which is one second, and another; a wake-up takes a few milliseconds,
/// but less than this is not told apart from a busy machine.
const LIMITS: Limits = Limits { wake_up: Duration::from_secs(3), clean_up: Duration::from_secs(3) };

/// What etcd is known for: candidates elected after their lease ended, waiters that are not told of
/// it, and keys left behind by who goes away in the wrong moment.
const OF_ETCD: [Rule; 3] = [Rule::NoPhantom, Rule::HearsTheEnd, Rule::NoGhost];

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable} is a number")),
        Err(_) => default,
    }
}

fn size(variable: &str, default: usize) -> usize {
    usize::try_from(number(variable, default as u64)).expect("a size")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_and_leaderships_keep_their_promises_while_everything_happens() {
    let (clients, names) = (size("LOCK_CLIENTS", 30), size("LOCK_NAMES", 8));
    let (goal, kills) = (size("LOCK_GRANTS", 2000), size("LOCK_KILLS", 2));
    let seed = number("SEED", rand::random());
    report(&format!("locks under faults: SEED={seed}"));
    let mut cluster = Cluster::start(3).await;
    let crowd = Crowd::start(&cluster, clients, names, seed);
    let began = Instant::now();
    let mut faults = Vec::new();
    for kill in 1..=kills {
        // A grant at least every minute is asked for; that is what bounds the run.
        cluster.may_live(Duration::from_secs(3600));
        crowd.grants(goal * kill / (kills + 1)).await;
        let leader = cluster.leader().await;
        let from = Instant::now();
        cluster.kill(leader);
        cluster.leader().await;
        cluster.restart(leader).await;
        faults.push((from, Instant::now()));
    }
    crowd.grants(goal).await;
    let took = began.elapsed();
    let run = crowd.run.clone();
    let history = crowd.finish(&cluster, faults, LIMITS).await;
    let (summary, broken) = history.check();

    let swept = run.swept.load(Ordering::Relaxed);
    report(&format!(
        "{} grants in {took:.1?}; leases that the janitor ended: {swept}",
        summary.grants
    ));
    report(&format!("release to grant, without faults: {}", spread(&summary.wake_ups)));
    let counts =
        holdfast_client_tests::holding::Summary { wake_ups: Vec::new(), ..summary.clone() };
    report(&format!("{counts:?}"));
    let mut by_rule: BTreeMap<Rule, Vec<&str>> = BTreeMap::new();
    for b in &broken {
        by_rule.entry(b.rule).or_default().push(&b.what);
    }
    if target_is_etcd() {
        for rule in OF_ETCD {
            let found = by_rule.remove(&rule).unwrap_or_default();
            report(&format!("etcd, {rule:?}: {}, such as {:?}", found.len(), found.first()));
        }
    }
    for (rule, what) in &by_rule {
        eprintln!("{rule:?}, {} times:", what.len());
        for what in what.iter().take(5) {
            eprintln!("    {what}");
        }
    }
    assert!(by_rule.is_empty(), "promises were broken: SEED={seed}");
    // Otherwise it was no test of anything.
    assert!(summary.waited > goal / 4 && summary.guarded > goal / 4, "{counts:?}");
    assert!(summary.given_up > 0 && summary.guarded_refused > 0, "{counts:?}");
    assert!(summary.proclaimed > 0 && summary.leaders_seen > 0, "{counts:?}");
    assert!(summary.leaders_told > 0, "{counts:?}");
}
