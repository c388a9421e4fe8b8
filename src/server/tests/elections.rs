//! The service Elections, asked of any member.

use tonic::{Code, Streaming};

use super::*;
use crate::pb::etcdserverpb::CompactionRequest;
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::holdfastpb::elections_client::ElectionsClient;
use crate::pb::holdfastpb::observe_response::Response as Seen;
use crate::pb::holdfastpb::*;

fn campaign(owner: &str, wait_ms: Option<i64>) -> CampaignRequest {
    let value = owner.to_owned().into();
    CampaignRequest {
        name: "job".into(),
        owner: owner.into(),
        value,
        wait_ms,
        ..Default::default()
    }
}

async fn next(stream: &mut Streaming<ObserveResponse>) -> (i64, String) {
    let told = within("a message", stream.message()).await.unwrap().expect("the stream goes on");
    let text = |leader: &observe_response::Leader| {
        format!("{}@{} of {}", leader.value.escape_ascii(), leader.term, leader.owner)
    };
    let said = match told.response.unwrap() {
        Seen::Leader(leader) => format!("leader {}", text(&leader)),
        Seen::Updated(leader) => format!("updated {}", text(&leader)),
        Seen::Vacant(_) => "vacant".to_owned(),
    };
    (told.header.unwrap().revision, said)
}

#[tokio::test]
async fn an_election_is_won_seen_and_given_up_and_observers_go_on_where_they_were() {
    let cluster = cluster(1, &[]).await;
    let channel = cluster[0].connect().await;
    let mut elections = ElectionsClient::new(channel.clone());
    let observe = |after_revision| ObserveRequest { name: "job".into(), after_revision };
    let mut seen = elections.observe(observe(0)).await.unwrap().into_inner();
    assert_eq!(next(&mut seen).await, (1, "vacant".into()));

    let alice = elections.campaign(campaign("alice", None)).await.unwrap().into_inner();
    assert!(alice.elected, "{alice:?}");
    let term = alice.term;
    assert_eq!(next(&mut seen).await, (term, format!("leader alice@{term} of alice")));
    let tried = elections.campaign(campaign("bob", Some(0))).await.unwrap().into_inner();
    assert_eq!((tried.elected, tried.leader.unwrap().owner.as_str()), (false, "alice"));
    let mut waiting = elections.clone();
    let waits = tokio::spawn(async move { waiting.campaign(campaign("bob", None)).await });
    let node = cluster[0].node();
    eventually(node, "bob stands in line", || {
        (node.machine().queue(b"job", 2).1 == 2).then_some(())
    })
    .await;
    let all = elections.candidates(CandidatesRequest { name: "job".into() }).await.unwrap();
    let all = all.into_inner();
    assert_eq!((&all.leader.unwrap().value[..], all.count), (&b"alice"[..], 1));
    assert_eq!(all.waiting[0].place.as_ref().unwrap().owner, "bob");

    let proclaim = |term, value: &'static str| ProclaimRequest {
        name: "job".into(),
        term,
        value: value.into(),
    };
    let bobs = all.waiting[0].place.as_ref().unwrap().token;
    let refused = elections.proclaim(proclaim(bobs, "me")).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::FailedPrecondition, "holdfast: stale token")
    );
    let said = elections.proclaim(proclaim(term, "still")).await.unwrap().into_inner();
    let at = said.header.unwrap().revision;
    assert_eq!(next(&mut seen).await, (at, format!("updated still@{term} of alice")));

    let resign = |term| ResignRequest { name: "job".into(), term };
    assert!(elections.resign(resign(term)).await.unwrap().into_inner().resigned);
    assert!(!elections.resign(resign(term)).await.unwrap().into_inner().resigned);
    let bob = within("bob is elected", waits).await.unwrap().unwrap().into_inner();
    assert!(bob.elected && bob.term == bobs, "{bob:?}");
    let (changed, said) = next(&mut seen).await;
    assert_eq!((changed > at, said), (true, format!("leader bob@{bobs} of bob")));

    // Another observer goes on after the proclamation, and sees nothing of what was before it.
    let mut resumed = elections.observe(observe(at)).await.unwrap().into_inner();
    assert_eq!(next(&mut resumed).await, (changed, format!("leader bob@{bobs} of bob")));
    assert!(elections.resign(resign(bobs)).await.unwrap().into_inner().resigned);
    for stream in [&mut seen, &mut resumed] {
        assert_eq!(next(stream).await.1, "vacant");
    }
    // When that history is gone, the present comes first.
    let revision = node.store().revision();
    let compact = CompactionRequest { revision, physical: false };
    KvClient::new(channel).compact(compact).await.unwrap();
    let mut late = elections.observe(observe(at)).await.unwrap().into_inner();
    assert_eq!(next(&mut late).await, (revision, "vacant".into()));
}
