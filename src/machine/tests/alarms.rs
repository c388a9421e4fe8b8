//! Alarms and the account of space.

use super::*;

pub fn raise(member: u64, kind: AlarmKind) -> Command {
    Command::Alarm(AlarmAction::Raise(Alarm { member: MemberId(member), kind }))
}

pub fn clear(member: u64, kind: AlarmKind) -> Command {
    Command::Alarm(AlarmAction::Clear(Alarm { member: MemberId(member), kind }))
}

fn enqueue(name: &str, lease: i64) -> Enqueue {
    Enqueue { name: key(name), lease: LeaseId(lease), value: Bytes::new(), rewrite: false }
}

/// A store with a pair, two leases, and a place in the queue `m`.
fn prepared() -> Member {
    let mut member = Member::new();
    member.ok(Command::Put(put("k", "v")));
    member.ok(grant(1, 10));
    member.ok(grant(2, 10));
    member.ok(Command::Enqueue(enqueue("m", 1)));
    member
}

/// Every kind of command that makes the store larger.
fn growing() -> Vec<Command> {
    let puts = || vec![TxnOp::Put(put("k", "w"))];
    let fence = || vec![Fence { name: key("m"), token: 3 }];
    let nested = txn(vec![], vec![TxnOp::Txn(txn(vec![], puts(), vec![]))], vec![]);
    let join = Join {
        enqueue: enqueue("m", 2),
        owner: String::new(),
        client: String::new(),
        session: false,
        only_if_free: false,
    };
    let proclaim =
        Proclaim { key: key("m/1"), create_revision: 3, value: key("x"), lease: LeaseId::NONE };
    let fenced = |write| Command::Fenced(Fenced { fences: fence(), write });
    vec![
        Command::Put(put("k", "w")),
        Command::Txn(txn(vec![], puts(), vec![])),
        // Not taken, but who is to know before.
        Command::Txn(txn(vec![], vec![], puts())),
        Command::Txn(nested.clone()),
        fenced(FencedWrite::Put(put("k", "w"))),
        fenced(FencedWrite::Txn(nested)),
        grant(3, 10),
        // Also where its key is there already: etcd looks at the request, not at the queue.
        Command::Enqueue(enqueue("m", 1)),
        Command::Join(join),
        Command::Proclaim(proclaim),
    ]
}

/// Commands that change the store and do not make it larger, each of which does something.
fn shrinking() -> Vec<Command> {
    vec![
        Command::DeleteRange(delete(one("k"))),
        Command::Txn(txn(vec![], vec![TxnOp::DeleteRange(delete(one("k")))], vec![])),
        Command::Compact { revision: 2 },
        Command::LeaseRevoke { id: LeaseId(2) },
        Command::LeaseExpire {
            term: 1,
            leases: vec![ExpiredLease { id: LeaseId(2), renewed_at_index: 3 }],
        },
        Command::Leave { key: key("m/1"), create_revision: 3 },
        Command::Unlock { key: key("m/1") },
        Command::Release(Release { name: key("m"), token: 3, forced: None }),
    ]
}

#[test]
fn without_space_only_what_grows_is_refused() {
    for command in growing() {
        let mut member = prepared();
        member.ok(raise(7, AlarmKind::NoSpace));
        assert_eq!(member.rejected(command.clone()), Rejection::NoSpace, "{command:?}");
        member.restart();
        assert_eq!(member.rejected(command.clone()), Rejection::NoSpace, "after a restart");
        member.ok(clear(7, AlarmKind::NoSpace));
        member.ok(command);
    }
    for command in shrinking() {
        let mut member = prepared();
        member.ok(raise(7, AlarmKind::NoSpace));
        let before = member.machine.hash();
        member.apply_at(10_001, command.clone()).reply.unwrap();
        assert_ne!(member.machine.hash(), before, "{command:?}");
    }
}

#[test]
fn a_corrupt_cluster_changes_nothing_but_the_time_of_leases() {
    for command in growing().into_iter().chain(shrinking()) {
        let mut member = prepared();
        member.ok(raise(7, AlarmKind::NoSpace));
        member.ok(raise(7, AlarmKind::Corrupt));
        assert_eq!(member.rejected(command.clone()), Rejection::Corrupt, "{command:?}");
    }
    let mut member = prepared();
    member.ok(raise(7, AlarmKind::Corrupt));
    let renewed = member.ok(Command::LeaseRenew { ids: vec![LeaseId(1)] });
    assert_eq!(renewed, Reply::LeaseRenewed(vec![Some(10)]));
    member.ok(clear(7, AlarmKind::Corrupt));
    member.ok(Command::Put(put("k", "w")));
}

#[test]
fn an_alarm_holds_until_it_is_cleared_for_each_member() {
    let mut member = prepared();
    let (no_space, corrupt) = (AlarmKind::NoSpace, AlarmKind::Corrupt);
    let alarm = |member, kind| Alarm { member: MemberId(member), kind };
    let raised = Reply::Alarm(Some(alarm(7, no_space)));
    assert_eq!(member.ok(raise(7, no_space)), raised);
    assert_eq!(member.ok(raise(7, no_space)), raised, "twice is once");
    member.ok(raise(3, no_space));
    member.ok(raise(3, corrupt));
    let image = member.machine.image();
    member.install(image);
    let listed: Vec<_> = member.machine.alarms().collect();
    assert_eq!(listed, [alarm(3, no_space), alarm(3, corrupt), alarm(7, no_space)]);
    assert_eq!(member.ok(clear(5, no_space)), Reply::Alarm(None));
    assert_eq!(member.ok(clear(3, corrupt)), Reply::Alarm(Some(alarm(3, corrupt))));
    member.ok(clear(7, no_space));
    assert_eq!(member.rejected(Command::Put(put("k", "w"))), Rejection::NoSpace);
    member.ok(clear(3, no_space));
    member.ok(Command::Put(put("k", "w")));
}

#[test]
fn alarms_are_bounded() {
    let mut member = Member::new();
    (0..1_000).for_each(|id| drop(member.ok(raise(id, AlarmKind::NoSpace))));
    let refused = member.rejected(raise(1_000, AlarmKind::NoSpace));
    assert_eq!(refused, Rejection::TooManyAlarms(1_000));
    member.ok(raise(999, AlarmKind::NoSpace));
    member.ok(clear(0, AlarmKind::NoSpace));
    member.ok(raise(1_000, AlarmKind::NoSpace));
}

#[test]
fn a_compaction_gives_space_back_before_anything_is_removed() {
    let mut member = Member::new();
    let empty = member.machine.used_bytes();
    let big = Put { value: Some(vec![7; 10_000].into()), ..put("k", "") };
    for _ in 0..10 {
        member.ok(Command::Put(big.clone()));
    }
    let one = (member.machine.used_bytes() - empty) / 10;
    assert!((10_000..11_000).contains(&one));
    member.ok(Command::Compact { revision: 9 });
    assert_eq!(member.machine.used_bytes(), empty + 3 * one);
    assert_eq!(member.stored_records(), 10, "all are there still");
    member.ok(Command::DeleteRange(delete(everything())));
    member.ok(Command::Put(put("other", "")));
    member.ok(Command::Compact { revision: 13 });
    member.scrub_all();
    assert!(member.machine.used_bytes() < empty + 1_000, "the tombstone is gone, too");
    assert_eq!(member.stored_records(), 1);
}

#[test]
fn a_compaction_where_no_record_is_counts_the_tombstones_before_it() {
    // As a restored backup leaves it, whose revision was raised.
    let mut member = Member::new();
    member.ok(Command::Put(put("a", "1")));
    member.ok(Command::Put(put("b", "1")));
    member.ok(Command::DeleteRange(delete(one("b"))));
    let meta = codec::decode_meta(&member.engine.get(&schema::META_KEY).unwrap().unwrap()).unwrap();
    let mut batch = Batch::default();
    let meta = super::super::state::Meta { revision: 1_000, ..meta };
    batch.put(schema::META_KEY, codec::encode_meta(&meta));
    member.engine.apply(batch).unwrap();
    member.restart();
    for revision in [3, 4, 500, 1_000] {
        member.ok(Command::Compact { revision });
        assert_eq!(member.machine.used_bytes(), member.machine.recount_bytes(), "{revision}");
        member.scrub_all();
    }
    assert_eq!(member.stored_records(), 1);
}

#[test]
fn whoever_has_once_done_something_else_differs_from_then_on() {
    fn agree(members: &mut [Member; 2], command: Command) -> bool {
        let [first, second] = members;
        first.apply(command.clone());
        second.apply(command);
        first.machine.digest().unwrap() == second.machine.digest().unwrap()
    }
    let both = &mut [Member::new(), Member::new()];
    agree(both, Command::Put(put("k", "1")));
    assert!(agree(both, Command::Put(put("l", "1"))));
    both[1].machine.lose(b"k");
    assert!(agree(both, Command::Put(put("l", "2"))), "nothing shows of it yet");
    assert!(!agree(both, Command::Put(put("k", "2"))), "one has made it, the other changed it");
    assert!(!agree(both, Command::Tick));
    both[1].restart();
    assert!(!agree(both, Command::Tick), "also after a restart");
    assert!(agree(both, Command::Alarm(AlarmAction::BeginDigest)));
    assert!(agree(both, Command::Tick));
    assert!(both[1].machine.digest().unwrap().since > 0);
}
