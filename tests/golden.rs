//! Bytes as this release writes them, which every later one must read.
//!
//! Each file in `tests/golden/` holds lines of a name and the bytes in hexadecimal. A change of one
//! of them is a change of a stored or sent format: raise its version, keep reading the old one, and
//! add lines rather than change them. `HOLDFAST_GOLDEN=record` writes the files anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::executor::block_on;
use holdfast::machine::{
    Alarm, AlarmAction, AlarmKind, AskRelease, AuthChange, Command, Compare, CompareResult,
    CompareTarget, DeleteRange, Enqueue, Entry, ExpiredLease, Fence, Fenced, FencedWrite, Force,
    Join, Machine, Origin, PasswordHash, Permission, PermissionKind, Position, Principal, Proclaim,
    Put, Range, Release, Txn, TxnOp,
};
use holdfast::raft::frame;
use holdfast::raft::log_store::{Drive, LogOptions, LogStore};
use holdfast::raft::snapshot::RaftState;
use holdfast::raft::types::{LogEntry, LogId, Payload, PeerNode, Raft, SnapshotMeta, Vote};
use holdfast::storage::{Batch, Engine, Memory};
use holdfast::types::{KeyRange, LeaseId, MemberId, Timestamp};
use holdfast::vfs::{MemVfs, Vfs};
use openraft::alias::{CommittedLeaderIdOf, StoredMembershipOf};
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest, VoteRequest};
use openraft::storage::{RaftLogReader, RaftLogStorage, RaftLogStorageExt};
use openraft::{EntryPayload, Membership};

type Lines = Vec<(String, Vec<u8>)>;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn golden(file: &str) -> Lines {
    let text = std::fs::read_to_string(path(file)).expect("a golden file");
    let line = |line: &str| {
        let (name, digits) = line.split_once(' ').expect("a name and bytes");
        let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal");
        (name.to_owned(), (0..digits.len()).step_by(2).map(byte).collect())
    };
    text.lines().map(line).collect()
}

/// What is written now must be what was written then.
fn compare(file: &str, written: &Lines) {
    if std::env::var("HOLDFAST_GOLDEN").is_ok_and(|value| value == "record") {
        let mut text = String::new();
        for (name, bytes) in written {
            let digits = bytes.iter().fold(String::new(), |mut digits, byte| {
                write!(digits, "{byte:02x}").expect("text grows");
                digits
            });
            writeln!(text, "{name} {digits}").expect("text grows");
        }
        std::fs::write(path(file), text).expect("written");
    }
    assert_eq!(&golden(file), written, "{file}");
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn put() -> Put {
    let (key, value) = (bytes("key"), Some(bytes("value")));
    Put { key, value, lease: Some(LeaseId(0x1234)), prev_kv: true }
}

fn delete() -> DeleteRange {
    DeleteRange { range: KeyRange::prefix(b"pre"), prev_kv: false }
}

fn txn() -> Txn {
    let compare = |target| Compare {
        range: KeyRange::from_wire(bytes("key"), Bytes::new()),
        result: CompareResult::NotEqual,
        target,
    };
    let targets = [
        CompareTarget::Version(1),
        CompareTarget::Create(2),
        CompareTarget::Mod(300),
        CompareTarget::Value(bytes("value")),
        CompareTarget::Lease(-5),
    ];
    let nested =
        Txn { compares: Vec::new(), success: vec![TxnOp::Put(put())], failure: Vec::new() };
    Txn {
        compares: targets.map(compare).into(),
        success: vec![TxnOp::Range(Range::all(KeyRange::prefix(b""))), TxnOp::Txn(nested)],
        failure: vec![TxnOp::DeleteRange(delete())],
    }
}

fn enqueue() -> Enqueue {
    Enqueue { name: bytes("lock"), lease: LeaseId(7), value: bytes("v"), rewrite: true }
}

/// One of each command, in the order of their numbers.
fn commands() -> Vec<(&'static str, Command)> {
    let (by, reason) = ("ops".to_owned(), "stuck".to_owned());
    let key = bytes("lock/7");
    let urls = vec!["http://m1:2379".to_owned()];
    let proclaim = Proclaim {
        key: key.clone(),
        create_revision: 9,
        value: bytes("new"),
        lease: LeaseId::NONE,
    };
    let join = Join {
        enqueue: enqueue(),
        owner: "job".to_owned(),
        client: "10.0.0.1:5".to_owned(),
        session: true,
        only_if_free: false,
    };
    let forced = Some(Force { by: by.clone(), reason: reason.clone() });
    vec![
        ("0-put", Command::Put(put())),
        ("1-delete-range", Command::DeleteRange(delete())),
        ("2-txn", Command::Txn(txn())),
        ("3-compact", Command::Compact { revision: 300 }),
        ("4-lease-grant", Command::LeaseGrant { id: LeaseId(7), ttl_seconds: 60 }),
        ("5-lease-revoke", Command::LeaseRevoke { id: LeaseId(-7) }),
        ("6-lease-renew", Command::LeaseRenew { ids: vec![LeaseId(7), LeaseId(8)] }),
        (
            "7-lease-expire",
            Command::LeaseExpire {
                term: 3,
                leases: vec![ExpiredLease { id: LeaseId(7), renewed_at_index: 70_000 }],
            },
        ),
        ("8-tick", Command::Tick),
        ("9-enqueue", Command::Enqueue(enqueue())),
        ("10-leave", Command::Leave { key: key.clone(), create_revision: 9 }),
        ("11-unlock", Command::Unlock { key: key.clone() }),
        (
            "12-publish-member",
            Command::PublishMember { id: MemberId(1), name: "m1".to_owned(), client_urls: urls },
        ),
        ("13-proclaim", Command::Proclaim(proclaim)),
        (
            "14-fenced",
            Command::Fenced(Fenced {
                fences: vec![Fence { name: bytes("lock"), token: 9 }],
                write: FencedWrite::DeleteRange(delete()),
            }),
        ),
        ("15-join", Command::Join(join)),
        ("16-release", Command::Release(Release { name: bytes("lock"), token: 9, forced })),
        (
            "17-ask-release",
            Command::AskRelease(AskRelease { name: bytes("lock"), token: 0, by, reason }),
        ),
        ("18-told", Command::Told { key, create_revision: 9 }),
        ("19-alarm", Command::Alarm(AlarmAction::Raise(alarm()))),
    ]
}

fn alarm() -> Alarm {
    Alarm { member: MemberId(0x1122), kind: AlarmKind::NoSpace }
}

fn entry_of(command: Command) -> Entry {
    let origin = Origin { member: MemberId(0x1122_3344_5566_7788), call: 99 };
    Entry { at: Timestamp(1_000_000), origin, command, principal: None }
}

/// One of each, in the order of their numbers.
fn auth_changes() -> Vec<(&'static str, AuthChange)> {
    let (user, role) = ("alice".to_owned(), "r".to_owned());
    let password_hash = PasswordHash("$2a$04$hash".to_owned());
    let permission = |start: &'static str, end: &'static str, kind| Permission {
        range: KeyRange::from_wire(bytes(start), bytes(end)),
        kind,
    };
    let token_sha256 = [0xab; 32];
    let grant = |permission| AuthChange::RoleGrantPermission { role: role.clone(), permission };
    vec![
        ("20.0-auth-enable", AuthChange::Enable),
        ("20.1-auth-disable", AuthChange::Disable),
        (
            "20.2-authenticate",
            AuthChange::Authenticate { user: user.clone(), token_sha256, auth_revision: 300 },
        ),
        (
            "20.3-user-add",
            AuthChange::UserAdd { name: user.clone(), password_hash: Some(password_hash.clone()) },
        ),
        ("20.4-user-delete", AuthChange::UserDelete { name: user.clone() }),
        (
            "20.5-user-change-password",
            AuthChange::UserChangePassword { name: user.clone(), password_hash },
        ),
        (
            "20.6-user-grant-role",
            AuthChange::UserGrantRole { user: user.clone(), role: role.clone() },
        ),
        ("20.7-user-revoke-role", AuthChange::UserRevokeRole { user, role: role.clone() }),
        ("20.8-role-add", AuthChange::RoleAdd { name: role.clone() }),
        ("20.9-role-delete", AuthChange::RoleDelete { name: role.clone() }),
        ("20.10-grant-read", grant(permission("k", "", PermissionKind::Read))),
        ("20.10-grant-write", grant(permission("k", "z", PermissionKind::Write))),
        ("20.10-grant-both", grant(permission("k", "\0", PermissionKind::ReadWrite))),
        ("20.10-grant-unknown", grant(permission("q", "", PermissionKind::Unknown(7)))),
        (
            "20.11-role-revoke-permission",
            AuthChange::RoleRevokePermission { role, range: KeyRange::prefix(b"k") },
        ),
    ]
}

/// All commands, and one in the name of each kind of principal.
fn entries() -> Vec<(&'static str, Entry)> {
    let changes = auth_changes().into_iter().map(|(name, it)| (name, Command::Auth(it)));
    let commands = commands().into_iter().chain(changes);
    let mut entries: Vec<_> = commands.map(|(name, command)| (name, entry_of(command))).collect();
    let put = entry_of(Command::Put(put()));
    let user = Principal::User { name: "alice".to_owned(), auth_revision: 300 };
    let by = |principal| Entry { principal: Some(principal), ..put.clone() };
    entries.push(("0-put-by-server", by(Principal::Server)));
    entries.push(("0-put-by-user", by(user)));
    entries
}

#[test]
fn entries_of_each_command() {
    let encoded = |(name, entry): (&str, Entry)| (name.to_owned(), entry.encode().to_vec());
    compare("entries.txt", &entries().into_iter().map(encoded).collect());
    for ((name, entry), (_, bytes)) in entries().into_iter().zip(golden("entries.txt")) {
        assert_eq!(Entry::decode(1, &bytes).expect(name), entry, "{name}");
        let later = [&[3], &bytes[1..]].concat();
        let refused = Entry::decode(1, &later).expect_err("a later format").to_string();
        assert!(refused.contains("format"), "{refused}");
    }
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId { leader_id: CommittedLeaderIdOf::<Raft>::new(term), index }
}

fn membership() -> Membership<u64, PeerNode> {
    let node = |n: u64| {
        let peer_urls = vec![format!("http://m{n}:2380")];
        (n, PeerNode { name: format!("m{n}"), peer_urls })
    };
    let nodes: BTreeMap<u64, PeerNode> = (1..=3).map(node).collect();
    Membership::new(vec![BTreeSet::from([1, 2])], nodes).expect("a membership")
}

fn log_entries() -> Vec<LogEntry> {
    let normal = EntryPayload::Normal(Payload(bytes("a proposal")));
    [EntryPayload::Membership(membership()), EntryPayload::Blank, normal]
        .into_iter()
        .zip(0..)
        .map(|(payload, index)| LogEntry { log_id: log_id(1, index), payload })
        .collect()
}

fn open_log(vfs: &MemVfs) -> std::io::Result<LogStore> {
    let options = LogOptions { segment_bytes: 1024, drive: Drive::Inline, ..LogOptions::default() };
    LogStore::open(Arc::new(vfs.clone()), PathBuf::from("/log"), options)
}

fn wait<T>(future: impl Future<Output = std::io::Result<T>>) -> T {
    block_on(future).expect("the log works")
}

const SEGMENT: &str = "/log/0000000001-00000000000000000000.log";

#[test]
fn a_log_segment_with_each_record() {
    let vfs = MemVfs::default();
    let mut log = open_log(&vfs).expect("a new log");
    wait(log.save_vote(&Vote::new(1, 2)));
    block_on(log.clone().blocking_append(log_entries())).expect("appended");
    wait(log.save_committed(Some(log_id(1, 1))));
    wait(log.truncate_after(Some(log_id(1, 1))));
    wait(log.purge(log_id(1, 0)));
    log.close().expect("closed");
    let mut written = vfs.read(Path::new(SEGMENT)).expect("a segment");
    let length = written.len();
    written.truncate(length - written.iter().rev().take_while(|byte| **byte == 0).count());
    compare("log_segment.txt", &vec![("segment-2".to_owned(), written)]);

    let (_, mut found) = golden("log_segment.txt").remove(0);
    found.resize(length, 0);
    let vfs = MemVfs::default();
    vfs.create_dir_all(Path::new("/log")).expect("made");
    vfs.create(Path::new(SEGMENT)).expect("made").write_at(0, &found).expect("written");
    let mut log = open_log(&vfs).expect("the golden log opens");
    assert_eq!(wait(log.read_vote()), Some(Vote::new(1, 2)));
    assert_eq!(wait(log.read_committed()), Some(log_id(1, 1)));
    assert_eq!(wait(log.get_log_state()).last_purged_log_id, Some(log_id(1, 0)));
    assert_eq!(wait(log.try_get_log_entries(..)), log_entries()[1..2]);
}

#[test]
fn stored_pairs_of_each_table() {
    let mut machine = Machine::load(&Memory::new()).expect("an empty state");
    let mut engine = Memory::new();
    let of = |name: &str| {
        let mut named = commands().into_iter().filter(|(known, _)| *known == name);
        named.next().expect("a command of that name").1
    };
    let plain = Command::Put(Put { lease: Some(LeaseId::NONE), prev_kv: false, ..put() });
    let force = Command::Release(Release {
        name: bytes("lock"),
        token: 3,
        forced: Some(Force { by: "ops".to_owned(), reason: "stuck".to_owned() }),
    });
    let other = Command::LeaseGrant { id: LeaseId(8), ttl_seconds: 30 };
    let Command::Join(join) = of("15-join") else { unreachable!("it is a join") };
    let next =
        Command::Join(Join { enqueue: Enqueue { lease: LeaseId(8), ..enqueue() }, ..join.clone() });
    let changes = auth_changes();
    let change = |at: usize| Command::Auth(changes[at].1.clone());
    let steps = [
        Command::Alarm(AlarmAction::BeginDigest),
        plain,
        of("4-lease-grant"),
        of("15-join"),
        other,
        next,
        force,
        of("12-publish-member"),
        Command::DeleteRange(DeleteRange {
            range: KeyRange::from_wire(bytes("key"), Bytes::new()),
            prev_kv: false,
        }),
        // Before the alarm is raised: a user with a role, and what the role allows.
        change(3),
        change(8),
        change(6),
        change(10),
        change(11),
        change(12),
        change(13),
        of("19-alarm"),
    ];
    for (command, index) in steps.into_iter().zip(1..) {
        let mut batch = Batch::default();
        let entry = Entry { at: Timestamp(index * 1_000), ..entry_of(command) };
        let outcome = machine.apply(Position { term: 1, index }, &entry, &mut batch);
        let outcome = outcome.expect("applied");
        assert!(outcome.reply.is_ok(), "{outcome:?}");
        engine.apply(batch).expect("stored");
    }
    let mut batch = Batch::default();
    machine.retire([MemberId(0x3344)], &mut batch);
    engine.apply(batch).expect("stored");
    let mut written = Lines::new();
    let mut collect = |key: &[u8], value: &[u8]| {
        let table = char::from(key[0]);
        written.push((format!("{table}-key"), key.to_vec()));
        written.push((format!("{table}-value"), value.to_vec()));
        true
    };
    engine.scan(b"", &mut collect).expect("scanned");
    let tables: BTreeSet<&str> = written.iter().map(|(name, _)| &name[..1]).collect();
    assert_eq!(tables, BTreeSet::from(["c", "f", "g", "h", "l", "m", "o", "p", "r", "u", "x"]));
    compare("stored_pairs.txt", &written);

    let mut engine = Memory::new();
    let mut batch = Batch::default();
    for pair in golden("stored_pairs.txt").chunks(2) {
        batch.put(pair[0].1.clone(), pair[1].1.clone());
    }
    engine.apply(batch).expect("stored");
    let loaded = Machine::load(&engine).expect("the golden state loads");
    assert_eq!((loaded.hash(), loaded.digest()), (machine.hash(), machine.digest()));
    assert_eq!(loaded.alarms().collect::<Vec<_>>(), [alarm()]);
    assert_eq!(loaded.auth(), machine.auth());
    assert_eq!(loaded.retired_members(), &BTreeSet::from([MemberId(0x3344)]));
}

#[test]
fn messages_between_members() {
    let append = AppendEntriesRequest::<Raft> {
        vote: Vote::new_committed(1, 2),
        prev_log_id: Some(log_id(1, 4)),
        entries: log_entries(),
        leader_commit: Some(log_id(1, 3)),
    };
    let stored = StoredMembershipOf::<Raft>::new(Some(log_id(1, 0)), membership());
    let meta = SnapshotMeta { last_log_id: Some(log_id(1, 4)), last_membership: stored.clone() };
    let state = RaftState { applied: Some(log_id(1, 4)), membership: stored };
    let vote = VoteRequest::<Raft>::new(Vote::new(2, 1), Some(log_id(1, 4)));
    let transfer =
        TransferLeaderRequest::<Raft>::new(Vote::new_committed(1, 2), 3, Some(log_id(1, 4)));
    let mut written = Lines::new();
    let mut add = |name: &str, frame: holdfast::pb::peer::Frame| {
        written.push((name.to_owned(), prost::Message::encode_to_vec(&frame)));
    };
    add("append", frame::encode(&append).expect("small"));
    add("vote", frame::encode(&vote).expect("small"));
    add("transfer-leader", frame::encode(&transfer).expect("small"));
    add("snapshot-meta", frame::encode(&meta).expect("small"));
    add("raft-state", frame::encode(&state).expect("small"));
    add("known", frame::encode(&MemberId(0x1122)).expect("small"));
    add("yes", frame::encode(&true).expect("small"));
    compare("peer_frames.txt", &written);
    for (name, bytes) in golden("peer_frames.txt") {
        let frame =
            <holdfast::pb::peer::Frame as prost::Message>::decode(&bytes[..]).expect("a frame");
        match name.as_str() {
            "append" => {
                let read: AppendEntriesRequest<Raft> = frame::decode(&frame).expect("read");
                assert_eq!(read.entries, log_entries());
            }
            "vote" => assert_eq!(frame::decode::<VoteRequest<Raft>>(&frame).expect("read"), vote),
            "raft-state" => {
                let read: RaftState = frame::decode(&frame).expect("read");
                assert_eq!(read.applied, state.applied);
            }
            _ => {}
        }
    }
}
