//! Changes of the members, asked of several members at once.

use super::*;
use crate::node::{Change, ChangeFailure, ChangeRefusal};

fn add(port: usize, learner: bool) -> Change {
    Change::Add { peer_urls: vec![format!("http://127.0.0.1:{port}")], learner }
}

/// Many at a time, on all members: each is made once, and all members list the same.
#[tokio::test]
async fn changes_at_once_are_made_one_after_the_other() {
    const EACH: usize = 4;
    let cluster = cluster(3, &["--strict-reconfig-check=false"]).await;
    let calls = (0..3 * EACH).map(|n| {
        let node = cluster[n % 3].node().clone();
        async move { node.change_members(add(n + 1, false)).await }
    });
    let made = within("the changes", futures::future::join_all(calls)).await;
    let mut ids: Vec<_> = made.into_iter().map(|changed| changed.unwrap().id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 3 * EACH);
    for member in &cluster {
        member.node().read_barrier().await.unwrap();
        let members = member.node().members();
        assert_eq!(members.len(), 3 + 3 * EACH);
        let unstarted = members.iter().filter(|member| member.name.is_empty());
        assert_eq!(unstarted.count(), 3 * EACH);
    }
    // The same one, removed through all members: by one of them.
    let removals = cluster.iter().map(|member| {
        let node = member.node().clone();
        let id = ids[0];
        async move { node.change_members(Change::Remove { id }).await }
    });
    let removals = within("the removals", futures::future::join_all(removals)).await;
    let refused = ChangeFailure::Refused(ChangeRefusal::NotFound);
    let done = removals.iter().filter(|removal| removal.is_ok()).count();
    assert_eq!(done, 1, "{removals:?}");
    assert!(removals.iter().flat_map(|removal| removal.as_ref().err()).all(|it| *it == refused));
    for member in cluster {
        member.kill().await;
    }
}

/// Only one of those who ask for the last place of a learner gets it.
#[tokio::test]
async fn rules_hold_for_changes_that_are_asked_for_at_once() {
    let flags = ["--strict-reconfig-check=false", "--max-learners=2"];
    let cluster = cluster(3, &flags).await;
    let calls = (0..6).map(|n| {
        let node = cluster[n % 3].node().clone();
        async move { node.change_members(add(n + 1, true)).await }
    });
    let made = within("the changes", futures::future::join_all(calls)).await;
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 2, "{made:?}");
    let refused = ChangeFailure::Refused(ChangeRefusal::TooManyLearners);
    assert!(made.iter().flat_map(|made| made.as_ref().err()).all(|failure| *failure == refused));
    for member in cluster {
        member.kill().await;
    }
}
