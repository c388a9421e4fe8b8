//! Tests of the machine as a whole, and what they share.

mod alarms;
mod auth;
mod concurrency;
mod fuzz;
mod holds;
mod model;
mod ranges;
mod replicas;
mod semantics;

use bytes::Bytes;

use super::*;
use crate::storage::{Batch, Engine, Memory};
use crate::types::{KeyRange, LeaseId, MemberId, Timestamp};

/// A generator that gives the same numbers from the same seed in every build.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}

/// A machine with an engine behind it, as a member has them.
pub struct Member {
    pub machine: Machine,
    pub engine: Memory,
    index: u64,
    at: u64,
}

impl Member {
    pub fn new() -> Member {
        Member { machine: Machine::new(), engine: Memory::new(), index: 0, at: 0 }
    }

    pub fn apply_entry(&mut self, entry: &Entry) -> Outcome {
        self.index += 1;
        self.at = self.at.max(entry.at.0);
        let mut batch = Batch::default();
        let position = Position { term: 1, index: self.index };
        let outcome = self.machine.apply(position, entry, &mut batch).unwrap();
        assert!(batch.garbage.is_empty());
        self.engine.apply(batch).unwrap();
        outcome
    }

    /// Applies `command` at the time of the entry before.
    pub fn apply(&mut self, command: Command) -> Outcome {
        self.apply_entry(&Entry {
            at: Timestamp(self.at),
            origin: Origin::default(),
            command,
            principal: None,
        })
    }

    pub fn apply_at(&mut self, at: u64, command: Command) -> Outcome {
        self.apply_entry(&Entry {
            at: Timestamp(at),
            origin: Origin::default(),
            command,
            principal: None,
        })
    }

    pub fn ok(&mut self, command: Command) -> Reply {
        self.apply(command).reply.unwrap()
    }

    pub fn rejected(&mut self, command: Command) -> Rejection {
        let (revision, hash) = (self.machine.store().revision(), self.machine.hash());
        let outcome = self.apply(command);
        assert_eq!(outcome.revision, revision, "a rejection makes no revision");
        assert_eq!(self.machine.hash(), hash, "a rejection leaves no trace");
        assert_eq!((outcome.events.len(), outcome.effects.len()), (0, 0));
        outcome.reply.unwrap_err()
    }

    /// Lets everything happen again, after random commands.
    pub fn clear_alarms(&mut self) {
        let raised: Vec<Alarm> = self.machine.alarms().collect();
        for alarm in raised {
            self.ok(Command::Alarm(AlarmAction::Clear(alarm)));
        }
    }

    pub fn view(&self) -> View {
        self.machine.store().view()
    }

    /// The pairs as `key=value`, in key order.
    pub fn pairs(&self) -> String {
        let reply = self.view().range(&Range::all(everything())).unwrap();
        let pairs = reply.records.iter().map(|record| {
            format!("{}={}", record.key().escape_ascii(), record.value().escape_ascii())
        });
        pairs.collect::<Vec<_>>().join(" ")
    }

    pub fn scrub(&mut self, budget: usize) -> bool {
        let mut batch = Batch::default();
        let more = self.machine.scrub(budget, &mut batch);
        self.engine.apply(batch).unwrap();
        more
    }

    pub fn scrub_all(&mut self) {
        while self.scrub(3) {}
    }

    pub fn restart(&mut self) {
        self.machine = Machine::load(&self.engine).unwrap();
    }

    /// Replaces everything by an image of another member.
    pub fn install(&mut self, image: Image) {
        self.engine = Memory::new();
        for chunk in image {
            let mut batch = Batch::default();
            for (key, value) in chunk {
                batch.put(key, value);
            }
            self.engine.apply(batch).unwrap();
        }
        self.restart();
    }

    /// How many records there are, readable or not.
    pub fn stored_records(&self) -> usize {
        let mut count = 0;
        self.engine
            .scan(&[schema::RECORD_PREFIX], &mut |_, _| {
                count += 1;
                true
            })
            .unwrap();
        count
    }
}

pub fn everything() -> KeyRange {
    KeyRange::From(Bytes::new())
}

pub fn key(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

pub fn one(text: &str) -> KeyRange {
    KeyRange::One(key(text))
}

pub fn put(name: &str, value: &str) -> Put {
    Put { key: key(name), value: Some(key(value)), lease: Some(LeaseId::NONE), prev_kv: false }
}

pub fn put_on(name: &str, value: &str, lease: i64) -> Put {
    Put { lease: Some(LeaseId(lease)), ..put(name, value) }
}

pub fn delete(range: KeyRange) -> DeleteRange {
    DeleteRange { range, prev_kv: false }
}

pub fn grant(id: i64, ttl_seconds: i64) -> Command {
    Command::LeaseGrant { id: LeaseId(id), ttl_seconds }
}

pub fn txn(compares: Vec<Compare>, success: Vec<TxnOp>, failure: Vec<TxnOp>) -> Txn {
    Txn { compares, success, failure }
}

const NAMES: [&str; 12] =
    ["a", "b", "c", "ca", "d", "n/1", "n/2", "n/3", "n/x/1", "n/x/2", "/1", "n/-4"];

fn random_key(random: &mut Random) -> Bytes {
    key(random.pick(&NAMES))
}

fn random_value(random: &mut Random) -> Bytes {
    key(random.pick(&["", "x", "y", "z", "a longer value"]))
}

fn random_lease(random: &mut Random) -> LeaseId {
    LeaseId(random.pick(&[1, 2, 3, -4, 7]))
}

fn random_range(random: &mut Random) -> KeyRange {
    match random.below(6) {
        0 => KeyRange::From(random_key(random)),
        1 | 2 => KeyRange::Span { start: random_key(random), end: random_key(random) },
        3 => KeyRange::prefix(b"n/"),
        _ => KeyRange::One(random_key(random)),
    }
}

fn random_query(random: &mut Random) -> Range {
    let mut number = |odds: u64, end: u64| match random.one_in(odds) {
        true => random.below(end) as i64 - 2,
        false => 0,
    };
    let mut query = Range {
        limit: number(3, 6),
        revision: number(3, 80),
        min_mod_revision: number(6, 60),
        max_mod_revision: number(6, 60),
        min_create_revision: number(6, 60),
        max_create_revision: number(6, 60),
        ..Range::all(everything())
    };
    query.range = random_range(random);
    query.order = random.pick(&[SortOrder::None, SortOrder::Ascend, SortOrder::Descend]);
    query.target = random.pick(&[
        SortTarget::Key,
        SortTarget::Version,
        SortTarget::Create,
        SortTarget::Mod,
        SortTarget::Value,
    ]);
    query.keys_only = random.one_in(8);
    query.count_only = random.one_in(8);
    query
}

fn random_put(random: &mut Random) -> Put {
    let lease = match random.below(8) {
        0 => None,
        1 | 2 => Some(random_lease(random)),
        _ => Some(LeaseId::NONE),
    };
    Put {
        key: random_key(random),
        value: if random.one_in(10) { None } else { Some(random_value(random)) },
        lease,
        prev_kv: random.one_in(2),
    }
}

fn random_compare(random: &mut Random) -> Compare {
    let number = random.below(20) as i64;
    Compare {
        range: random_range(random),
        result: random.pick(&[
            CompareResult::Equal,
            CompareResult::Greater,
            CompareResult::Less,
            CompareResult::NotEqual,
            CompareResult::Unknown,
        ]),
        target: match random.below(6) {
            0 => CompareTarget::Version(number % 3),
            1 => CompareTarget::Create(number),
            2 => CompareTarget::Mod(number),
            3 => CompareTarget::Value(random_value(random)),
            4 => CompareTarget::Lease(number % 4),
            _ => CompareTarget::Unknown,
        },
    }
}

/// A transaction that may break the rules that are checked before proposing, as putting a key twice.
fn random_txn(random: &mut Random, depth: usize) -> Txn {
    let mut ops = || {
        (0..random.below(4))
            .map(|_| match random.below(if depth > 0 { 8 } else { 7 }) {
                0 | 1 => TxnOp::Range(random_query(random)),
                2..5 => TxnOp::Put(random_put(random)),
                5 | 6 => TxnOp::DeleteRange(DeleteRange {
                    range: random_range(random),
                    prev_kv: random.one_in(2),
                }),
                _ => TxnOp::Txn(random_txn(random, depth - 1)),
            })
            .collect()
    };
    let (success, failure) = (ops(), ops());
    let compares = (0..random.below(3)).map(|_| random_compare(random)).collect();
    Txn { compares, success, failure }
}

fn random_enqueue(random: &mut Random) -> Enqueue {
    Enqueue {
        name: key(random.pick(&["n", "n/x", "", "m"])),
        lease: random_lease(random),
        value: random_value(random),
        rewrite: random.one_in(2),
    }
}

pub fn random_command(random: &mut Random) -> Command {
    match random.below(64) {
        0..12 => Command::Put(random_put(random)),
        12..16 => Command::DeleteRange(DeleteRange {
            range: random_range(random),
            prev_kv: random.one_in(2),
        }),
        16..24 => Command::Txn(random_txn(random, 2)),
        24 => Command::Compact { revision: random.below(70) as i64 - 2 },
        25 | 26 => {
            Command::LeaseGrant { id: random_lease(random), ttl_seconds: random.below(5) as i64 }
        }
        27 => Command::LeaseRevoke { id: random_lease(random) },
        28 => Command::LeaseRenew { ids: vec![random_lease(random), random_lease(random)] },
        29 | 30 => Command::LeaseExpire {
            term: 1,
            leases: (0..2)
                .map(|_| ExpiredLease {
                    id: random_lease(random),
                    renewed_at_index: random.below(60),
                })
                .collect(),
        },
        31 => Command::Tick,
        32..36 => Command::Enqueue(random_enqueue(random)),
        36 | 37 => {
            Command::Leave { key: random_key(random), create_revision: random.below(60) as i64 }
        }
        38 => Command::Unlock { key: random_key(random) },
        40 | 41 => Command::Proclaim(Proclaim {
            key: random_key(random),
            create_revision: random.below(60) as i64,
            value: random_value(random),
            lease: if random.one_in(2) { LeaseId::NONE } else { random_lease(random) },
        }),
        46..50 => Command::Join(Join {
            enqueue: random_enqueue(random),
            owner: random.pick(&["", "alice", "bob"]).to_owned(),
            client: "127.0.0.1:7".to_owned(),
            session: random.one_in(2),
            only_if_free: random.one_in(3),
        }),
        50 | 51 => Command::Release(Release {
            name: key(random.pick(&["n", "n/x", "", "m"])),
            token: random.below(60) as i64,
            forced: random
                .one_in(2)
                .then(|| Force { by: "an operator".into(), reason: "x".into() }),
        }),
        52 => Command::AskRelease(AskRelease {
            name: key(random.pick(&["n", "n/x", "", "m"])),
            token: if random.one_in(2) { 0 } else { random.below(60) as i64 },
            by: "bob".to_owned(),
            reason: random.pick(&["", "maintenance"]).to_owned(),
        }),
        // Cleared far more often than raised: a raised one refuses nearly all.
        54 => alarms::raise(1, random.pick(&[AlarmKind::NoSpace, AlarmKind::Corrupt])),
        55..63 => alarms::clear(1, random.pick(&[AlarmKind::NoSpace, AlarmKind::Corrupt])),
        53 => Command::Told { key: random_key(random), create_revision: 2 },
        42..46 => Command::Fenced(Fenced {
            fences: (0..random.below(3))
                .map(|_| Fence { name: key(random.pick(&["n", "n/x", ""])), token: 2 })
                .collect(),
            write: match random.below(3) {
                0 => FencedWrite::Put(random_put(random)),
                1 => FencedWrite::DeleteRange(delete(random_range(random))),
                _ => FencedWrite::Txn(random_txn(random, 1)),
            },
        }),
        _ => Command::PublishMember {
            id: MemberId(random.below(3)),
            name: "m".repeat(random.below(3) as usize),
            client_urls: vec!["http://127.0.0.1:2379".into(); random.below(3) as usize],
        },
    }
}

/// A change of users and roles. Rights are such that much is allowed and some is not.
pub fn random_auth_change(random: &mut Random) -> Command {
    let role = |random: &mut Random| random.pick(&["root", "r", "s", ""]).to_owned();
    let user = random.pick(&USERS).to_owned();
    let hash = PasswordHash(random.pick(&["", "one", "another"]).to_owned());
    Command::Auth(match random.below(16) {
        0 | 1 => AuthChange::Enable,
        2 => AuthChange::Disable,
        3 => AuthChange::Authenticate {
            user,
            token_sha256: [random.next() as u8; 32],
            auth_revision: random.below(12),
        },
        4 | 5 => AuthChange::UserAdd {
            name: user,
            password_hash: Some(hash).filter(|_| random.one_in(2)),
        },
        6 => AuthChange::UserDelete { name: user },
        7 => AuthChange::UserChangePassword { name: user, password_hash: hash },
        8 | 9 => AuthChange::UserGrantRole { user, role: role(random) },
        10 => AuthChange::UserRevokeRole { user, role: role(random) },
        11 => AuthChange::RoleAdd { name: role(random) },
        12 => AuthChange::RoleDelete { name: role(random) },
        13 | 14 => {
            let kind = random.pick(&[
                PermissionKind::Read,
                PermissionKind::Write,
                PermissionKind::ReadWrite,
                PermissionKind::Unknown(7),
            ]);
            let permission = Permission { range: random_range(random), kind };
            AuthChange::RoleGrantPermission { role: role(random), permission }
        }
        _ => AuthChange::RoleRevokePermission { role: role(random), range: random_range(random) },
    })
}

const USERS: [&str; 4] = ["root", "alice", "bob", ""];

/// Somebody, in whose name an entry may have been proposed.
pub fn random_principal(random: &mut Random) -> Option<Principal> {
    match random.below(4) {
        0 => None,
        1 => Some(Principal::Server),
        _ => {
            let name = random.pick(&USERS).to_owned();
            let auth_revision = if random.one_in(3) { random.below(12) } else { u64::MAX };
            Some(Principal::User { name, auth_revision })
        }
    }
}

pub fn random_entry(random: &mut Random) -> Entry {
    Entry {
        at: Timestamp(random.below(30_000)),
        origin: Origin { member: MemberId(random.next()), call: random.next() },
        command: match random.one_in(6) {
            true => random_auth_change(random),
            false => random_command(random),
        },
        principal: random_principal(random),
    }
}
