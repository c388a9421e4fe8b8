//! Files made, read, and turned into data directories, on a real disk.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use super::bolt::{Bolt, BoltError};
use super::etcd::{self, EtcdError, EtcdState, Left};
use super::format::{Encoder, HASH_BYTES, Header};
use super::found::{Founded, NewMember};
use super::import::{ImportError, import};
use super::reader::ReadError;
use super::restore::{RestoreError, inspect, restore};
use crate::machine::tests::{Member, Random, everything, grant, key, put, put_on, random_command};
use crate::machine::{Afresh, Command, Enqueue, Join, Machine, Range, Rejection, foreign_record};
use crate::node::Identity;
use crate::node::founding::FoundingError;
use crate::raft::applier::Applier;
use crate::raft::types::PeerNode;
use crate::storage::{Batch, Engine, Home, Memory};
use crate::types::{ClusterId, LeaseId, MemberId, Timestamp};

/// A snapshot of an etcd 3.5.30: two transactions of 60 puts each, a value of 9,000 bytes, deletes,
/// two leases of which one was revoked, a compaction, a user and a role.
const ETCD: &[u8] = include_bytes!("../../tests/data/etcd-3.5.snapshot");

const UNCHANGED: Afresh = Afresh { bump_revision: 0, mark_compacted: false };
const DEFAULT: Afresh = Afresh { bump_revision: 1_000_000_000, mark_compacted: true };

struct Scene {
    folder: tempfile::TempDir,
    made: usize,
}

impl Scene {
    fn new() -> Scene {
        Scene { folder: tempfile::tempdir().expect("a temporary folder"), made: 0 }
    }

    fn path(&mut self, what: &str) -> PathBuf {
        self.made += 1;
        self.folder.path().join(format!("{what}-{}", self.made))
    }

    fn file(&mut self, bytes: &[u8]) -> PathBuf {
        let path = self.path("file");
        fs::write(&path, bytes).expect("a file");
        path
    }

    /// The first of three members of a cluster.
    fn member(&mut self) -> NewMember {
        let node = |n: u64| PeerNode {
            name: format!("m{n}"),
            peer_urls: vec![format!("http://10.0.0.{n}:2380")],
        };
        NewMember {
            data_dir: self.path("data"),
            identity: Identity {
                cluster_id: ClusterId(5),
                member_id: MemberId(1),
                name: "m1".to_owned(),
            },
            members: (1..=3).map(|n| (n, node(n))).collect(),
        }
    }

    fn restored(&mut self, file: &Path, afresh: Afresh) -> (Founded, Machine) {
        let member = self.member();
        let founded = restore(file, true, afresh, &member).expect("a whole snapshot");
        (founded, load(&member.data_dir))
    }
}

/// The state that a member would start with in `data_dir`.
fn load(data_dir: &Path) -> Machine {
    let home = Home::on_disk(data_dir.join("state"), 1 << 20);
    let engine = home.open().expect("an engine");
    let (machine, state) = Applier::load(engine.as_ref()).expect("a state");
    assert!(state.applied.is_some_and(|applied| applied.index > 0));
    assert_eq!(state.membership.voter_ids().collect::<Vec<_>>(), [1, 2, 3]);
    machine
}

fn snapshot_of(machine: &Machine) -> Vec<u8> {
    let image = machine.image();
    let header = Header {
        release: "0.0.0".to_owned(),
        cluster_id: "1".to_owned(),
        revision: image.revision(),
        applied_index: 77,
        term: 3,
        members: Vec::new(),
    };
    let (mut encoder, mut file) = Encoder::begin(&header);
    for chunk in image {
        file.extend(encoder.block(&chunk));
    }
    file.extend(encoder.end());
    file
}

/// The state without what stays behind on purpose: alarms, and what is known of members.
fn without_members(machine: &Machine) -> Machine {
    let mut engine = Memory::new();
    for chunk in machine.image() {
        let mut batch = Batch::default();
        for (key, value) in chunk.into_iter().filter(|(key, _)| !b"cpx".contains(&key[0])) {
            batch.put(key, value);
        }
        engine.apply(batch).expect("memory takes everything");
    }
    Machine::load(&engine).expect("a state")
}

#[test]
fn a_restored_state_is_the_saved_one() {
    let mut scene = Scene::new();
    let mut labels = 0;
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let mut member = Member::new();
        let mut at = 0;
        for _ in 0..150 {
            at += random.below(500);
            member.apply_at(at, random_command(&mut random));
            labels += member.machine.label(b"n/1").is_some() as usize;
            if random.one_in(20) {
                member.scrub(5);
            }
        }
        let file = scene.file(&snapshot_of(&member.machine));
        let (founded, machine) = scene.restored(&file, UNCHANGED);
        assert_eq!(machine.hash(), without_members(&member.machine).hash(), "seed {seed}");
        assert_eq!(founded.standing.keys, member.machine.live_keys());

        let contents = inspect(&file).expect("a whole snapshot");
        let hash = member.view().hash_kv(0).expect("the present");
        assert_eq!(contents.hash, hash, "seed {seed}");
        assert_eq!(contents.standing, founded.standing);

        let (founded, fresh) = scene.restored(&file, DEFAULT);
        let revision = member.machine.store().revision() + DEFAULT.bump_revision;
        assert_eq!(founded.standing.revision, revision);
        assert_eq!(founded.standing.compacted, revision);
        let pairs = |machine: &Machine| {
            machine.store().view().range(&Range::all(everything())).expect("the present").records
        };
        assert_eq!(pairs(&fresh), pairs(&member.machine), "seed {seed}");
        assert!(fresh.leases().iter().eq(member.machine.leases().iter()), "seed {seed}");
        assert_eq!(fresh.now(), member.machine.now());
        let oldest = fresh.store().view().changes(revision - 1, &everything(), 1);
        assert!(matches!(oldest, Err(Rejection::Compacted { .. })), "{oldest:?}");
    }
    assert!(labels > 0, "no seed made a label");
}

#[test]
fn leases_keep_what_they_had_left_and_locks_their_holders() {
    let mut scene = Scene::new();
    let mut member = Member::new();
    member.apply_at(1_000, grant(7, 60));
    member.apply_at(31_000, Command::Put(put_on("with", "lease", 7)));
    let join = Join {
        enqueue: Enqueue { name: key("n"), lease: LeaseId(7), value: key(""), rewrite: false },
        owner: "alice".to_owned(),
        client: "10.0.0.9:1".to_owned(),
        session: true,
        only_if_free: false,
    };
    member.apply_at(41_000, Command::Join(join));
    let file = scene.file(&snapshot_of(&member.machine));
    let (_, machine) = scene.restored(&file, DEFAULT);
    let lease = machine.leases().get(LeaseId(7)).expect("the lease");
    assert_eq!((machine.now(), lease.deadline), (Timestamp(41_000), Timestamp(61_000)));
    assert_eq!(lease.keys.len(), 2);
    let holder = machine.queue_head(b"n").expect("the lock is held");
    assert_eq!(holder.key(), key("n/7"));
    assert_eq!(machine.label(holder.key()).expect("its label").owner, "alice");
}

#[test]
fn members_restored_from_one_file_agree_and_from_two_do_not() {
    let mut scene = Scene::new();
    let mut member = Member::new();
    member.apply(Command::Put(put("a", "1")));
    let file = scene.file(&snapshot_of(&member.machine));
    let (first, _) = scene.restored(&file, DEFAULT);
    let (second, _) = scene.restored(&file, DEFAULT);
    assert_eq!(first, second);
    assert_ne!(first.cluster_id, ClusterId(5), "who starts empty is in another cluster");
    member.apply(Command::Put(put("a", "2")));
    let later = scene.file(&snapshot_of(&member.machine));
    assert_ne!(scene.restored(&later, DEFAULT).0.cluster_id, first.cluster_id);
}

#[test]
fn a_refused_file_leaves_nothing_and_a_full_directory_is_left_alone() {
    let mut scene = Scene::new();
    let mut machine = Member::new();
    machine.apply(Command::Put(put("a", "1")));
    let mut bytes = snapshot_of(&machine.machine);
    let whole = scene.file(&bytes);
    let member = scene.member();

    bytes[250] ^= 1;
    let damaged = scene.file(&bytes);
    let refused = restore(&damaged, true, DEFAULT, &member).expect_err("damaged");
    assert!(matches!(refused, RestoreError::File { .. }), "{refused}");
    assert!(inspect(&damaged).is_err());
    assert!(!member.data_dir.exists());

    fs::create_dir(&member.data_dir).expect("a folder");
    fs::write(member.data_dir.join("precious"), "data").expect("a file");
    let refused = restore(&whole, true, DEFAULT, &member).expect_err("not empty");
    assert!(refused.to_string().contains("is not empty"), "{refused}");
    assert_eq!(fs::read_dir(&member.data_dir).expect("as it was").count(), 1);
    fs::remove_file(member.data_dir.join("precious")).expect("removed");
    restore(&whole, true, DEFAULT, &member).expect("a whole file, an empty folder");
    let again = restore(&whole, true, DEFAULT, &member).expect_err("a member's by now");
    assert!(matches!(again, RestoreError::Founding(FoundingError::DataDir(_))), "{again}");

    let beyond = Afresh { bump_revision: i64::MAX - 1, mark_compacted: true };
    let refused = restore(&whole, true, beyond, &scene.member()).expect_err("no such revision");
    assert!(matches!(refused, RestoreError::State { .. }), "{refused}");
    let etcd = scene.file(ETCD);
    let refused = restore(&etcd, true, DEFAULT, &scene.member()).expect_err("etcd's");
    let source = match refused {
        RestoreError::File { source, .. } => source,
        other => panic!("{other}"),
    };
    assert!(matches!(source, ReadError::NotOurs));
}

#[test]
fn a_pair_that_this_release_does_not_know_is_refused() {
    let pair = |key: &[u8]| (key.to_vec(), vec![1]);
    for known in [b"f12345678".as_slice(), b"hkey", b"l12345678", b"r123456789012"] {
        assert_eq!(DEFAULT.carry(pair(known)).expect("known"), Some(pair(known)));
    }
    for left_behind in [b"c123456781".as_slice(), b"p12345678", b"x12345678"] {
        assert_eq!(DEFAULT.carry(pair(left_behind)).expect("known"), None);
    }
    for unknown in [b"".as_slice(), b"a", b"z1", b"mm"] {
        assert!(DEFAULT.carry(pair(unknown)).is_err(), "{unknown:?}");
    }
}

fn read_etcd(file: &[u8]) -> Result<EtcdState, EtcdError> {
    let mut bolt = Bolt::open(Cursor::new(file), file.len() as u64)?;
    etcd::read(&mut bolt)
}

#[test]
fn an_etcd_snapshot_is_read_as_etcd_reads_it() {
    let state = read_etcd(&ETCD[..ETCD.len() - HASH_BYTES]).expect("whole");
    assert_eq!(state.revision, 8);
    // What `etcdctl get` showed of that etcd.
    assert_eq!(state.records.len(), 53);
    let small: Vec<_> = state.records.keys().filter(|key| key.starts_with(b"k/0")).collect();
    assert_eq!(small.len(), 51);
    let again = &state.records[&key("k/005")];
    assert_eq!((again.create_revision(), again.mod_revision().main, again.version()), (5, 5, 1));
    assert_eq!(state.records[&key("big")].value(), vec![b'b'; 9_000]);
    let leased = &state.records[&key("leased")];
    assert_eq!(leased.lease(), LeaseId(7533855901250696451));
    let lease = state.leases[&leased.lease()];
    assert_eq!((lease.ttl_seconds, lease.remaining.as_secs()), (500, 500));
    assert_eq!((state.leases.len(), state.orphans), (1, 0));
    let left = Left { auth_enabled: false, users: 1, roles: 1, alarms: 0 };
    assert_eq!(state.left, left);
    for record in state.records.values() {
        foreign_record(record);
    }
}

#[test]
fn an_imported_state_goes_on_where_etcd_was() {
    let mut scene = Scene::new();
    let file = scene.file(ETCD);
    let member = scene.member();
    let imported = import(&file, true, 100, &member).expect("whole");
    assert!(imported.hash_checked);
    assert_eq!(imported.founded.standing.revision, 108);
    assert_eq!(imported.founded.standing.compacted, 108);
    let machine = load(&member.data_dir);
    assert_eq!(machine.live_keys(), 53);
    let lease = machine.leases().get(LeaseId(7533855901250696451)).expect("the lease");
    assert_eq!((lease.deadline, lease.keys.len()), (Timestamp(500_000), 1));

    let mut damaged = ETCD.to_vec();
    damaged[40_000] ^= 1;
    let damaged = scene.file(&damaged);
    let member = scene.member();
    let refused = import(&damaged, true, 0, &member).expect_err("the hash does not fit");
    assert!(matches!(refused, ImportError::WrongHash { .. }), "{refused}");
    assert!(!member.data_dir.exists());
    // A member's db is the same without the hash.
    let db = scene.file(&ETCD[..ETCD.len() - HASH_BYTES]);
    let imported = import(&db, true, 0, &scene.member()).expect("whole");
    assert!(!imported.hash_checked);
}

#[test]
fn of_two_metas_the_newer_whole_one_counts() {
    let content = &ETCD[..ETCD.len() - HASH_BYTES];
    let revision = |file: &[u8]| read_etcd(file).map(|state| state.revision);
    for meta in [0, 4_096] {
        let mut damaged = content.to_vec();
        damaged[meta + 16 + 48] ^= 1;
        assert_eq!(revision(&damaged).expect("the other is whole"), 8, "meta at {meta}");
    }
    let mut damaged = content.to_vec();
    damaged[64] ^= 1;
    damaged[4_096 + 64] ^= 1;
    let refused = revision(&damaged).expect_err("none is whole");
    assert!(matches!(refused, EtcdError::Bolt(BoltError::NotBolt)), "{refused}");
}

#[test]
fn a_damaged_etcd_file_is_an_error_at_worst() {
    let content = &ETCD[..ETCD.len() - HASH_BYTES];
    let (mut errors, mut reads) = (BTreeMap::<String, usize>::new(), 0);
    for seed in 0..4_000 {
        let mut random = Random::new(seed);
        let mut file = content.to_vec();
        for _ in 0..=random.below(4) {
            // Where pages begin there is most to break.
            let page = random.below(file.len() as u64 / 4_096) * 4_096;
            let within = if random.one_in(2) { random.below(96) } else { random.below(4_096) };
            let at = (page + within) as usize;
            match random.below(3) {
                0 => file[at] ^= 1 << random.below(8),
                1 => file[at] = random.next() as u8,
                _ => file[at..at + 8.min(content.len() - at)].fill(random.pick(&[0, 0x7f, 0xff])),
            }
        }
        if random.one_in(4) {
            file.truncate(random.below(file.len() as u64 + 1) as usize);
        }
        match read_etcd(&file) {
            Ok(state) => {
                reads += 1;
                let bytes: usize =
                    state.records.values().map(|it| it.key().len() + it.value().len()).sum();
                assert!(bytes <= file.len(), "seed {seed}");
            }
            Err(error) => {
                let text = error.to_string();
                let kind = text.split([':', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9']);
                *errors.entry(kind.collect()).or_default() += 1;
            }
        }
    }
    assert!(reads > 100, "{reads} of the files were read");
    assert!(errors.len() > 8, "{errors:#?}");
}
