//! Quota and alarms, as clients meet them.

use tonic::{Code, Status};

use super::*;
use crate::pb::etcdserverpb::alarm_request::AlarmAction;
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::pb::etcdserverpb::request_op::Request;
use crate::pb::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmType, CompactionRequest, DefragmentRequest, DeleteRangeRequest,
    PutRequest, RequestOp, StatusRequest, StatusResponse, TxnRequest,
};
use crate::pb::holdfastpb::AcquireRequest;
use crate::pb::holdfastpb::locks_client::LocksClient;
use crate::pb::v3lockpb::LockRequest;
use crate::pb::v3lockpb::lock_client::LockClient;

const QUOTA_BYTES: i64 = 1 << 20;

fn put(key: impl Into<bytes::Bytes>, value_bytes: usize) -> PutRequest {
    PutRequest { key: key.into(), value: vec![7; value_bytes].into(), ..Default::default() }
}

fn said(status: Status) -> (Code, String) {
    (status.code(), status.message().to_owned())
}

async fn status(channel: &Channel) -> StatusResponse {
    MaintenanceClient::new(channel.clone()).status(StatusRequest {}).await.unwrap().into_inner()
}

fn request(action: AlarmAction, member_id: u64, alarm: AlarmType) -> AlarmRequest {
    AlarmRequest { action: action.into(), member_id, alarm: alarm.into() }
}

#[tokio::test]
async fn a_full_store_takes_nothing_until_it_was_compacted_and_the_alarm_disarmed() {
    let cluster = cluster(3, &["--quota-backend-bytes=1048576"]).await;
    let mut channels = Vec::new();
    for member in &cluster {
        channels.push(member.connect().await);
    }
    let no_space =
        (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded".to_owned());
    // At a follower, so that the alarm comes from elsewhere than the leader.
    let leads = |n: usize| cluster[n].node().role().leader;
    let asked = (0..3).find(|n| leads(*n) != Some(cluster[*n].node().identity().member_id));
    let asked = asked.expect("a follower");
    let mut kv = KvClient::new(channels[asked].clone());
    let mut written = 0;
    let refused = loop {
        match kv.put(put("k", 50_000)).await {
            Ok(_) => written += 1,
            Err(status) => break said(status),
        }
    };
    assert_eq!(refused, no_space);
    assert_eq!(written, QUOTA_BYTES / 50_257, "as many as fit");
    let raised = AlarmMember {
        member_id: cluster[asked].node().identity().member_id.0,
        alarm: AlarmType::Nospace.into(),
    };
    let error = format!("memberID:{} alarm:NOSPACE ", raised.member_id);
    for (member, channel) in cluster.iter().zip(&channels) {
        let mut alarms = MaintenanceClient::new(channel.clone());
        let listed = alarms.alarm(request(AlarmAction::Get, 0, AlarmType::None)).await.unwrap();
        assert_eq!(listed.into_inner().alarms, [raised]);
        let shown = status(channel).await;
        assert_eq!((shown.errors, shown.db_size_quota), (vec![error.clone()], QUOTA_BYTES));
        assert!(shown.db_size_in_use <= shown.db_size && shown.db_size_in_use <= QUOTA_BYTES);
        assert_eq!(
            said(KvClient::new(channel.clone()).put(put("s", 0)).await.unwrap_err()),
            no_space
        );
        let lock = LockRequest { name: "m".into(), lease: 0 };
        let refused = LockClient::new(channel.clone()).lock(lock).await.unwrap_err();
        assert_eq!(said(refused), (Code::Unknown, no_space.1.clone()));
        let acquire = AcquireRequest { name: "m".into(), ttl_seconds: 10, ..Default::default() };
        let refused = LocksClient::new(channel.clone()).acquire(acquire).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        assert!(refused.message().contains("NOSPACE"), "{refused}");
        assert_eq!(member.node().used_bytes(), cluster[asked].node().used_bytes());
    }

    // What frees space works, at once, and the alarm stays all the same.
    let delete = DeleteRangeRequest { key: "k".into(), ..Default::default() };
    let deleted = kv.delete_range(delete).await.unwrap().into_inner();
    let revision = deleted.header.unwrap().revision;
    kv.compact(CompactionRequest { revision, physical: false }).await.unwrap();
    assert!(status(&channels[asked]).await.db_size_in_use < 10_000);
    assert_eq!(said(kv.put(put("k", 0)).await.unwrap_err()), no_space);
    let mut alarms = MaintenanceClient::new(channels[asked].clone());
    alarms.defragment(DefragmentRequest {}).await.unwrap();
    let disarm = request(AlarmAction::Deactivate, raised.member_id, AlarmType::Nospace);
    assert_eq!(alarms.alarm(disarm).await.unwrap().into_inner().alarms, [raised]);
    for channel in &channels {
        KvClient::new(channel.clone()).put(put("k", 50_000)).await.expect("at every member");
    }
    assert!(status(&channels[asked]).await.errors.is_empty());
}

#[tokio::test]
async fn without_a_quota_nothing_is_refused() {
    let cluster = cluster(1, &["--quota-backend-bytes=-1"]).await;
    let channel = cluster[0].connect().await;
    for _ in 0..3 {
        KvClient::new(channel.clone()).put(put("k", 1 << 20)).await.unwrap();
    }
    assert_eq!(status(&channel).await.db_size_quota, 0);
}

/// Bytes that do not compress.
fn noise(seed: &mut u64, len: usize) -> bytes::Bytes {
    let next = |_| {
        *seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (*seed >> 40) as u8
    };
    (0..len).map(next).collect()
}

#[tokio::test]
async fn what_is_compacted_leaves_the_disk_without_a_restart() {
    const TXNS: usize = 400;
    const PUTS: usize = 100;
    let cluster = cluster(1, &[]).await;
    let channel = cluster[0].connect().await;
    let mut kv = KvClient::new(channel.clone());
    let mut maintenance = MaintenanceClient::new(channel.clone());
    let mut seed = 1;
    for n in 0..TXNS {
        let operation = |at: usize| {
            let key = format!("k{:06}", n * PUTS + at).into();
            let put = PutRequest { key, value: noise(&mut seed, 400), ..put("", 0) };
            RequestOp { request: Some(Request::RequestPut(put)) }
        };
        let success = (0..PUTS).map(operation).collect();
        kv.txn(TxnRequest { success, ..Default::default() }).await.unwrap();
    }
    let disk_bytes = || cluster[0].node().facts().disk_bytes;
    maintenance.defragment(DefragmentRequest {}).await.unwrap();
    let full = disk_bytes();
    assert!(full > (TXNS * PUTS * 400) as u64, "{full}");
    let delete =
        DeleteRangeRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
    kv.delete_range(delete).await.unwrap();
    let after = kv.put(put("rest", 1)).await.unwrap().into_inner().header.unwrap().revision;
    kv.compact(CompactionRequest { revision: after, physical: false }).await.unwrap();
    assert!(status(&channel).await.db_size_in_use < 10_000, "at once");
    let begun = tokio::time::Instant::now();
    within("the disk to be given back", async {
        while disk_bytes() > full / 4 {
            kv.put(put("rest", 1)).await.unwrap();
            maintenance.defragment(DefragmentRequest {}).await.unwrap();
        }
    })
    .await;
    let (left, took) = (disk_bytes(), begun.elapsed());
    println!("of {full} bytes on disk {left} are left after {took:?}");
    assert!(status(&channel).await.db_size <= left as i64);
}
