//! etcd's Lock and Election services, where they differ from etcd's.

use tonic::{Code, Response};

use super::*;
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::lease_client::LeaseClient;
use crate::pb::etcdserverpb::{LeaseGrantRequest, LeaseTimeToLiveRequest, PutRequest};
use crate::pb::v3electionpb::election_client::ElectionClient;
use crate::pb::v3electionpb::{CampaignRequest, LeaderKey, ProclaimRequest};
use crate::pb::v3lockpb::lock_client::LockClient;
use crate::pb::v3lockpb::{LockRequest, UnlockRequest};

fn number<T>(response: &Response<T>, name: &str) -> i64 {
    response.metadata().get(name).expect(name).to_str().unwrap().parse().unwrap()
}

async fn lease(channel: &Channel, ttl: i64) -> i64 {
    let mut leases = LeaseClient::new(channel.clone());
    leases.lease_grant(LeaseGrantRequest { ttl, id: 0 }).await.unwrap().into_inner().id
}

fn plain_put(key: impl Into<bytes::Bytes>) -> PutRequest {
    PutRequest { key: key.into(), value: "an application's".into(), ..Default::default() }
}

#[tokio::test]
async fn every_answer_tells_the_lease_its_ttl_and_the_token() {
    let cluster = cluster(1, &[]).await;
    let channel = cluster[0].connect().await;
    let mine = lease(&channel, 30).await;
    let mut locks = LockClient::new(channel.clone());
    for (lease, ttl) in [(mine, 30), (0, 60)] {
        let name = format!("lock/{ttl}");
        let held = locks.lock(LockRequest { name: name.into(), lease }).await.unwrap();
        assert_eq!(number(&held, "holdfast-lease-ttl"), ttl);
        assert_eq!(number(&held, "holdfast-fence"), held.get_ref().header.unwrap().revision);
        if lease != 0 {
            assert_eq!(number(&held, "holdfast-lease-id"), lease);
        }
    }
    let campaign = CampaignRequest { name: "e".into(), lease: mine, value: "me".into() };
    let elected = ElectionClient::new(channel).campaign(campaign).await.unwrap();
    assert_eq!(number(&elected, "holdfast-lease-ttl"), 30);
    assert_eq!(number(&elected, "holdfast-lease-id"), mine);
    assert_eq!(number(&elected, "holdfast-fence"), elected.into_inner().leader.unwrap().rev);
}

#[tokio::test]
async fn a_key_that_lost_its_lease_grants_nothing_and_one_that_waits_proclaims_nothing() {
    let cluster = cluster(1, &[]).await;
    let channel = cluster[0].connect().await;
    let (alice, bob) = (lease(&channel, 60).await, lease(&channel, 60).await);
    let mut elections = ElectionClient::new(channel.clone());
    let campaign = |lease, value: &'static str| CampaignRequest {
        name: "e".into(),
        lease,
        value: value.into(),
    };
    let led = elections.campaign(campaign(alice, "alice")).await.unwrap().into_inner();
    let mut waiting = elections.clone();
    let waits = tokio::spawn(async move { waiting.campaign(campaign(bob, "bob")).await });
    let key = format!("e/{bob:x}");
    let node = cluster[0].node();
    let queued = eventually(node, "the candidate", || node.view().get(key.as_bytes())).await;
    let rev = queued.create_revision();
    let leader = LeaderKey { name: "e".into(), key: key.clone().into(), rev, lease: bob };
    let proclaim = |leader| ProclaimRequest { leader: Some(leader), value: "said".into() };
    let refused = elections.proclaim(proclaim(leader)).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unknown, "election: not leader"));
    elections.proclaim(proclaim(led.leader.clone().unwrap())).await.expect("she leads");

    // An application overwrites both keys, and with that takes them from their leases.
    let mut kv = KvClient::new(channel.clone());
    let leads = led.leader.unwrap();
    kv.put(plain_put(leads.key.clone())).await.unwrap();
    kv.put(plain_put(key)).await.unwrap();
    for attempt in [
        elections.proclaim(proclaim(leads.clone())).await.map(drop),
        elections.campaign(campaign(alice, "again")).await.map(drop),
    ] {
        let refused = attempt.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::Unknown, "election: not leader"));
    }
    let lock = LockRequest { name: "e".into(), lease: alice };
    let refused = LockClient::new(channel.clone()).lock(lock).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unknown, "mutex: session is expired"));
    // When the turn of the one that waits comes, it is not elected either.
    elections.resign(crate::pb::v3electionpb::ResignRequest { leader: Some(leads) }).await.unwrap();
    let refused = within("its turn", waits).await.unwrap().unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unknown, "election: not leader"));
}

#[tokio::test]
async fn unlock_as_etcd_has_it_deletes_any_key() {
    for (flags, deleted) in [(&["--holdfast-unlock=etcd"][..], "true"), (&[][..], "false")] {
        let cluster = cluster(1, flags).await;
        let channel = cluster[0].connect().await;
        KvClient::new(channel.clone()).put(plain_put("a")).await.unwrap();
        let mut locks = LockClient::new(channel);
        let answer = locks.unlock(UnlockRequest { key: "a".into() }).await.unwrap();
        assert_eq!(answer.metadata().get("holdfast-released").unwrap(), deleted);
        assert_eq!(cluster[0].node().view().get(b"a").is_none(), deleted == "true");
    }
}

#[tokio::test]
async fn a_lease_made_for_a_connection_is_renewed_until_that_ends() {
    let cluster = cluster(1, &["--holdfast-lease0=connection"]).await;
    let (holder, observer) = (cluster[0].connect().await, cluster[0].connect().await);
    let lock = LockRequest { name: "m".into(), lease: 0 };
    let held = LockClient::new(holder.clone()).lock(lock).await.unwrap();
    let id = number(&held, "holdfast-lease-id");
    let node = cluster[0].node();
    assert_eq!(node.background().len(), 1, "the task that renews");
    drop(holder);
    within("the end of the renewals", async {
        while !node.background().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // What is left runs out by itself: the holder may still be at work.
    let left = LeaseTimeToLiveRequest { id, keys: false };
    let left = LeaseClient::new(observer).lease_time_to_live(left).await.unwrap().into_inner();
    assert!(left.ttl > 50, "{left:?}");
}
