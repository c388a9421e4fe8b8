//! Snapshots of a member that goes on, and a member that starts with one.

use std::io::Cursor;

use futures::StreamExt;
use tonic::Code;

use super::*;
use crate::backup::found::NewMember;
use crate::backup::reader::Reader;
use crate::backup::restore;
use crate::backup::save::{MOST_AT_ONCE, Piece, Saves};
use crate::machine::{Afresh, Command, Put};
use crate::node::Failure;
use crate::pb::etcdserverpb::SnapshotRequest;
use crate::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::types::LeaseId;

/// More than all the buffers on the way of a snapshot hold.
const VALUE_BYTES: usize = 1 << 20;

fn put(key: &str, bytes: usize) -> Command {
    Command::Put(Put {
        key: key.to_owned().into(),
        value: Some(vec![b'v'; bytes].into()),
        lease: Some(LeaseId::NONE),
        prev_kv: false,
    })
}

async fn filled() -> Running {
    let member = cluster(1, &[]).await.pop().unwrap();
    for n in 0..4 {
        member.node().propose(None, put(&format!("big/{n}"), VALUE_BYTES)).await.unwrap();
    }
    member
}

#[tokio::test]
async fn a_snapshot_holds_while_its_member_goes_on() {
    let member = filled().await;
    let node = member.node();
    let begun_at = node.header().revision;
    let mut client = MaintenanceClient::new(member.connect().await);
    let mut stream = client.snapshot(SnapshotRequest {}).await.unwrap().into_inner();
    let first = within("the first piece", stream.message()).await.unwrap().unwrap();
    // Everything that the snapshot has yet to tell is overwritten, deleted and compacted.
    for n in 0..4 {
        node.propose(None, put(&format!("big/{n}"), 1)).await.unwrap();
    }
    let compacted = node.propose(None, put("more", 1)).await.unwrap().revision;
    node.propose(None, Command::Compact { revision: compacted }).await.unwrap();

    let mut left = first.remaining_bytes;
    let mut file = first.blob.to_vec();
    assert_eq!(first.version, "3.7.0");
    while let Some(piece) = within("a piece", stream.message()).await.unwrap() {
        assert_eq!(piece.remaining_bytes, left - piece.blob.len() as u64);
        left = piece.remaining_bytes;
        file.extend(piece.blob);
    }
    assert_eq!((left, file.len() % 512), (0, 32));

    let mut reader = Reader::new(Cursor::new(&file), true).unwrap();
    while reader.next_block().unwrap().is_some() {}
    assert_eq!(reader.header().revision, begun_at);
    assert_eq!(reader.header().cluster_id, node.identity().cluster_id.to_string());
    reader.finish().unwrap();
    let saved = TempDir::new().unwrap();
    let path = saved.path().join("file");
    std::fs::write(&path, &file).unwrap();
    let contents = restore::inspect(&path).unwrap();
    assert_eq!((contents.standing.keys, contents.standing.compacted), (4, -1));
    member.kill().await;
}

#[tokio::test]
async fn few_snapshots_run_at_once_and_each_that_ends_makes_room() {
    let member = filled().await;
    let saves = Saves::default();
    let mut running: Vec<_> =
        (0..MOST_AT_ONCE).map(|_| Box::pin(saves.begin(member.node()).unwrap())).collect();
    assert!(matches!(saves.begin(member.node()), Err(Failure::TooManyRequests)));
    let refused = tonic::Status::from(Failure::TooManyRequests);
    assert_eq!(refused.code(), Code::ResourceExhausted);

    // One client goes away; another one takes all it is given.
    drop(running.pop());
    within("room", async {
        while saves.begin(member.node()).is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let pieces: Vec<Result<Piece, Failure>> =
        within("a whole file", running.pop().unwrap().collect()).await;
    assert_eq!(pieces.last().unwrap().as_ref().unwrap().remaining_bytes, 0);
    drop(running);
    within("the end of all", async {
        while !member.node().background().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    member.kill().await;
}

#[tokio::test]
async fn a_snapshot_that_nobody_takes_and_one_of_a_member_that_stops_end_as_failures() {
    let member = filled().await;
    let node = member.node();
    let impatient = Saves::with_patience(Duration::from_millis(50));
    let ignored = impatient.begin(node).unwrap();
    within("the end of the one that is ignored", async {
        while !node.background().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let pieces: Vec<_> = within("what was sent", ignored.collect()).await;
    assert!(matches!(pieces.last(), Some(Err(Failure::TimedOut))), "{:?}", pieces.last());

    let cut_off = Saves::default().begin(node).unwrap();
    node.stop();
    let pieces: Vec<_> = within("what was sent", cut_off.collect()).await;
    assert!(matches!(pieces.last(), Some(Err(Failure::Stopping))), "{:?}", pieces.last());
    assert!(matches!(Saves::default().begin(node), Err(Failure::Stopping)));
    member.kill().await;
}

#[tokio::test]
async fn a_restored_member_starts_with_the_state_and_under_an_id_of_its_own() {
    let member = filled().await;
    let saved = TempDir::new().unwrap();
    let path = saved.path().join("file");
    let mut pieces = Box::pin(Saves::default().begin(member.node()).unwrap());
    let mut file = Vec::new();
    while let Some(piece) = within("a piece", pieces.next()).await {
        file.extend(piece.unwrap().bytes);
    }
    std::fs::write(&path, &file).unwrap();
    let revision = member.node().header().revision;
    let index = member.node().applied_index();
    member.kill().await;

    let data_dir = saved.path().join("data");
    let data_dir_flag = format!("--data-dir={}", data_dir.display());
    let flags = ["holdfast", "--name=m0", &data_dir_flag];
    let config = Program::try_parse_from(flags).unwrap().server.check_with([], 2).unwrap();
    let Settings { identity, initial_members: members, .. } = settings(&config);
    let new = NewMember { data_dir, identity, members };
    let afresh = Afresh { bump_revision: 1_000, mark_compacted: true };
    let founded = restore::restore(&path, true, afresh, &new).unwrap();
    for start in 1..3 {
        let world = World {
            engines: Arc::new(SledEngines { cache_bytes: bootstrap::ENGINE_CACHE_BYTES }),
            dial: Arc::new(Tcp),
            clock: Arc::new(SystemClock::new()),
            entropy: Arc::new(SystemEntropy),
            vfs: Arc::new(OsVfs),
        };
        let (member, _faults) = bootstrap::start(&settings(&config), world).await.unwrap();
        within("a leader", member.node.recovered()).await.unwrap();
        assert_eq!(member.node.identity().cluster_id, founded.cluster_id);
        assert_ne!(founded.cluster_id, config.cluster_id());
        assert!(member.node.applied_index() > index, "indexes go on: leases remember them");
        let put = member.node.propose(None, put("new", 1)).await.unwrap();
        assert_eq!(put.revision, revision + 1_000 + start);
        assert_eq!(member.node.machine().live_keys(), 5);
        member.stop().await;
    }
}
