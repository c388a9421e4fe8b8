//! Members whose states differ although their logs do not.

use tonic::Code;

use super::*;
use crate::machine::{Alarm, AlarmKind};
use crate::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::pb::etcdserverpb::request_op::Request;
use crate::pb::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, HashKvRequest, PutRequest, RequestOp,
    TxnRequest,
};

fn put(key: impl Into<bytes::Bytes>) -> PutRequest {
    PutRequest { key: key.into(), value: "v".into(), ..Default::default() }
}

fn corrupt(member: &Running) -> Alarm {
    Alarm { member: member.node().identity().member_id, kind: AlarmKind::Corrupt }
}

fn alarms(node: &Node) -> Vec<Alarm> {
    node.machine().alarms().collect()
}

/// Which of the members leads, as all of them see it.
fn leader(cluster: &[Running]) -> usize {
    let leader = cluster[0].node().leader().expect("a leader");
    let leads = |member: &Running| member.node().identity().member_id == leader;
    cluster.iter().position(leads).expect("a member of the cluster")
}

async fn refused(channel: Channel) -> (Code, String) {
    let status = KvClient::new(channel).put(put("other")).await.unwrap_err();
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn a_member_that_differs_stops_and_all_writes_with_it() {
    for differing_leads in [false, true] {
        let mut cluster = cluster(3, &[]).await;
        let leads = leader(&cluster);
        let differing = cluster.remove(if differing_leads { leads } else { (leads + 1) % 3 });
        let (mut faults, node) = (differing.faults, differing.member.node.clone());
        let alarm = Alarm { member: node.identity().member_id, kind: AlarmKind::Corrupt };

        let channel = cluster[0].connect().await;
        let mut kv = KvClient::new(channel.clone());
        let written = kv.put(put("k")).await.unwrap().into_inner().header.unwrap().revision;
        eventually(&node, "the key", || (node.store().revision() >= written).then_some(())).await;
        node.machine().lose(b"k");
        kv.put(put("k")).await.expect("nobody knows yet");

        let reason = within("the end of the member", faults.wait()).await;
        assert!(reason.contains("differs from the majority's"), "{reason}");
        assert!(*node.stopping().borrow(), "clients are not served any more");
        for member in &cluster {
            let node = member.node();
            let raised = || (alarms(node) == [alarm]).then_some(());
            eventually(node, "its alarm, and no other", raised).await;
            let refused = refused(member.connect().await).await;
            assert_eq!(refused, (Code::DataLoss, "etcdserver: corrupt cluster".to_owned()));
            assert_ne!(node.leader(), Some(alarm.member));
        }
    }
}

#[tokio::test]
async fn two_that_differ_both_raise_the_alarm_and_go_on() {
    let cluster = cluster(2, &[]).await;
    let channel = cluster[0].connect().await;
    let mut kv = KvClient::new(channel.clone());
    kv.put(put("k")).await.unwrap();
    let node = cluster[1].node();
    eventually(node, "the key", || node.view().get(b"k")).await;
    node.machine().lose(b"k");
    kv.put(put("k")).await.expect("nobody knows yet");
    let mut both = [corrupt(&cluster[0]), corrupt(&cluster[1])];
    both.sort_unstable();
    for member in &cluster {
        let node = member.node();
        eventually(node, "both alarms", || (alarms(node) == both).then_some(())).await;
        let refused = refused(member.connect().await).await;
        assert_eq!(refused, (Code::DataLoss, "etcdserver: corrupt cluster".to_owned()));
        assert!(!*node.stopping().borrow(), "nobody knows who is right");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_history_hashes_alike_on_all_members_at_every_readable_revision() {
    const WRITES: i64 = 150;
    let cluster = cluster(3, &["--snapshot-count=100"]).await;
    let writers = cluster.iter().enumerate().map(async |(writer, member)| {
        let mut kv = KvClient::new(member.connect().await);
        for n in 0..WRITES {
            let key = format!("k{}", (n * 7 + writer as i64) % 13);
            match n % 5 {
                0 => {
                    let key = key.into();
                    let range_end = "k5".into();
                    let delete = DeleteRangeRequest { key, range_end, ..Default::default() };
                    kv.delete_range(delete).await.map(drop).unwrap();
                }
                1 => {
                    let operation =
                        |request| vec![RequestOp { request: Some(Request::RequestPut(request)) }];
                    let compare = Compare {
                        key: key.clone().into(),
                        target: CompareTarget::Version.into(),
                        result: CompareResult::Greater.into(),
                        target_union: Some(TargetUnion::Version(1)),
                        ..Default::default()
                    };
                    let txn = TxnRequest {
                        compare: vec![compare],
                        success: operation(put("changed")),
                        failure: operation(put(key)),
                    };
                    kv.txn(txn).await.map(drop).unwrap();
                }
                _ => kv.put(put(key)).await.map(drop).unwrap(),
            }
            if n == WRITES / 2 && writer == 0 {
                let revision = member.node().store().revision() - 20;
                let compact = CompactionRequest { revision, physical: false };
                kv.compact(compact).await.unwrap();
            }
        }
    });
    within("the writes", futures::future::join_all(writers)).await;
    for member in &cluster {
        member.node().read_barrier().await.unwrap();
    }
    let mut clients = Vec::new();
    for member in &cluster {
        clients.push(MaintenanceClient::new(member.connect().await));
    }
    let store = cluster[0].node().store();
    assert!(store.compacted() > 0);
    for revision in store.compacted()..=store.revision() {
        let mut hashes = Vec::new();
        for client in &mut clients {
            let answer = client.hash_kv(HashKvRequest { revision }).await.unwrap().into_inner();
            hashes.push((answer.hash, answer.compact_revision));
        }
        hashes.dedup();
        assert_eq!(hashes.len(), 1, "at revision {revision}");
    }
    let applied = cluster.iter().map(|member| member.node().applied_index()).max().unwrap();
    let mut digests = Vec::new();
    for member in &cluster {
        member.node().applied_up_to_entry(applied).await.unwrap();
        digests.push((member.node().applied_index(), member.node().machine().digest()));
    }
    digests.dedup();
    assert_eq!(digests.len(), 1);
}
