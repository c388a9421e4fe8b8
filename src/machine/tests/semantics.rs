//! etcd's rules, one by one.

use super::*;
use crate::storage::Change;
use crate::types::Revision;

fn put_command(name: &str, value: &str) -> Command {
    Command::Put(put(name, value))
}

fn delete_command(name: &str) -> Command {
    Command::DeleteRange(delete(one(name)))
}

fn compact(revision: i64) -> Command {
    Command::Compact { revision }
}

fn compare(name: &str, result: CompareResult, target: CompareTarget) -> Compare {
    Compare { range: one(name), result, target }
}

fn get(name: &str) -> TxnOp {
    TxnOp::Range(Range::all(one(name)))
}

fn txn_reply(reply: Reply) -> TxnReply {
    match reply {
        Reply::Txn(reply) => reply,
        other => panic!("{other:?}"),
    }
}

/// `key@revision` for a put, `key!revision` for a delete, each with the revision before in brackets.
fn told(events: &[Event]) -> String {
    let tell = |event: &Event| {
        let record = &event.record;
        let sign = if record.is_tombstone() { '!' } else { '@' };
        let prev = event.prev.as_ref().map(|prev| format!("[{}]", prev.mod_revision().main));
        let name = String::from_utf8_lossy(record.key());
        format!("{name}{sign}{}{}", record.mod_revision().main, prev.unwrap_or_default())
    };
    events.iter().map(tell).collect::<Vec<_>>().join(" ")
}

fn changes(member: &Member, from: i64) -> String {
    told(&member.view().changes(from, &everything(), usize::MAX).unwrap().events)
}

#[test]
fn a_fresh_store_is_at_revision_1_and_the_first_write_makes_2() {
    let mut member = Member::new();
    assert_eq!(member.view().revision(), 1);
    let outcome = member.apply(put_command("k", "v"));
    assert_eq!(outcome.revision, 2);
    let record = member.view().get(b"k").unwrap();
    assert_eq!(
        (record.create_revision(), record.mod_revision(), record.version()),
        (2, Revision::new(2, 0), 1)
    );
}

#[test]
fn a_delete_ends_the_generation() {
    let mut member = Member::new();
    member.ok(put_command("k", "a"));
    member.ok(put_command("k", "a"));
    let outcome = member.apply(delete_command("k"));
    assert_eq!(told(&outcome.events), "k!4[3]");
    let tombstone = &outcome.events[0].record;
    assert_eq!((tombstone.version(), tombstone.create_revision()), (0, 0));
    member.ok(put_command("k", "b"));
    let record = member.view().get(b"k").unwrap();
    assert_eq!((record.create_revision(), record.version()), (5, 1));
    assert_eq!(changes(&member, 2), "k@2 k@3[2] k!4[3] k@5");
}

#[test]
fn a_delete_of_nothing_makes_no_revision() {
    let mut member = Member::new();
    let outcome = member.apply(delete_command("k"));
    assert_eq!(outcome.revision, 1);
    assert_eq!(
        outcome.reply.unwrap(),
        Reply::DeleteRange(DeleteReply { deleted: 0, prev: vec![] })
    );
    member.ok(put_command("b", "1"));
    member.ok(put_command("a", "1"));
    let outcome =
        member.apply(Command::DeleteRange(DeleteRange { range: everything(), prev_kv: true }));
    assert_eq!(told(&outcome.events), "a!4[3] b!4[2]");
    match outcome.reply.unwrap() {
        Reply::DeleteRange(reply) => {
            assert_eq!(reply.deleted, 2);
            assert_eq!(reply.prev.len(), 2);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn ignore_value_and_ignore_lease_keep_what_is_there() {
    let mut member = Member::new();
    let keep_value = |lease| Put { value: None, ..put_on("k", "", lease) };
    let keep_lease = |value| Put { lease: None, ..put("k", value) };
    assert_eq!(member.rejected(Command::Put(keep_value(0))), Rejection::KeyNotFound);
    assert_eq!(member.rejected(Command::Put(keep_lease("v"))), Rejection::KeyNotFound);
    // A plain put complains of its lease first, one in a transaction of its key.
    assert_eq!(member.rejected(Command::Put(keep_value(9))), Rejection::LeaseNotFound(LeaseId(9)));
    let in_txn = txn(vec![], vec![TxnOp::Put(keep_value(9))], vec![]);
    assert_eq!(member.rejected(Command::Txn(in_txn)), Rejection::KeyNotFound);

    member.ok(grant(1, 10));
    member.ok(Command::Put(put_on("k", "v", 1)));
    member.ok(Command::Put(keep_lease("w")));
    assert_eq!(member.view().get(b"k").unwrap().lease(), LeaseId(1));
    member.ok(Command::Put(keep_value(0)));
    let record = member.view().get(b"k").unwrap();
    assert_eq!((record.value(), record.lease(), record.version()), (&b"w"[..], LeaseId::NONE, 3));
    assert_eq!(member.machine.leases().keys(LeaseId(1)).count(), 0);
}

#[test]
fn compares_treat_an_absent_key_as_zeroes_and_never_match_its_value() {
    let mut member = Member::new();
    member.ok(put_command("p1", "x"));
    member.ok(put_command("p2", "y"));
    use CompareResult::*;
    use CompareTarget::{Create, Lease, Mod, Value, Version};
    let mut holds = |compare: Compare| {
        txn_reply(member.ok(Command::Txn(txn(vec![compare], vec![], vec![])))).succeeded
    };
    for target in [Version(0), Create(0), Mod(0), Lease(0)] {
        assert!(holds(compare("absent", Equal, target)));
    }
    for result in [Equal, Greater, Less, NotEqual, Unknown] {
        assert!(!holds(compare("absent", result, Value(Bytes::new()))));
    }
    assert!(holds(compare("p1", Equal, Create(2))));
    assert!(holds(compare("p1", Greater, Mod(1))));
    assert!(holds(compare("p1", Less, Value("y".into()))));
    assert!(holds(compare("p1", Unknown, Version(77))));
    assert!(holds(compare("p1", Equal, CompareTarget::Unknown)));
    assert!(!holds(compare("p1", Greater, CompareTarget::Unknown)));

    let range = |range, result, target| Compare { range, result, target };
    let prefix = KeyRange::prefix(b"p");
    assert!(holds(range(prefix.clone(), Equal, Version(1))));
    assert!(holds(range(prefix.clone(), NotEqual, Value("z".into()))));
    assert!(!holds(range(prefix.clone(), Equal, Value("x".into()))));
    assert!(!holds(range(prefix, Greater, Create(2))));
    let crossed = KeyRange::Span { start: "z".into(), end: "a".into() };
    assert!(holds(range(crossed.clone(), Equal, Version(0))));
    assert!(!holds(range(crossed, NotEqual, Value("x".into()))));
}

#[test]
fn ranges_in_a_transaction_see_its_writes_and_compares_do_not() {
    let mut member = Member::new();
    member.ok(put_command("k", "old"));
    let absent_other = compare("other", CompareResult::Equal, CompareTarget::Version(0));
    let nested = txn(vec![absent_other], vec![get("k")], vec![]);
    let outer = txn(
        vec![],
        vec![
            get("k"),
            TxnOp::Put(put("k", "new")),
            TxnOp::Put(put("other", "1")),
            TxnOp::Txn(nested),
            TxnOp::Range(Range { revision: 2, ..Range::all(one("k")) }),
        ],
        vec![],
    );
    let outcome = member.apply(Command::Txn(outer));
    assert_eq!(outcome.revision, 3);
    assert_eq!(told(&outcome.events), "k@3[2] other@3");
    let subs: Vec<_> = outcome.events.iter().map(|event| event.record.mod_revision().sub).collect();
    assert_eq!(subs, [0, 1]);

    let value = |reply: &RangeReply| reply.records[0].value().to_vec();
    let reply = txn_reply(outcome.reply.unwrap());
    match &reply.responses[..] {
        [
            TxnOpReply::Range { revision: 2, reply: first },
            TxnOpReply::Put { revision: 3, .. },
            TxnOpReply::Put { revision: 3, .. },
            TxnOpReply::Txn(nested),
            TxnOpReply::Range { revision: 3, reply: past },
        ] => {
            assert_eq!((value(first), value(past)), ("old".into(), "old".into()));
            assert!(nested.succeeded);
            match &nested.responses[..] {
                [TxnOpReply::Range { revision: 3, reply }] => assert_eq!(value(reply), b"new"),
                other => panic!("{other:?}"),
            }
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_refused_transaction_leaves_no_trace() {
    let mut member = Member::new();
    member.ok(put_command("k", "v"));
    let after_put = |op| Command::Txn(txn(vec![], vec![TxnOp::Put(put("k", "w")), op], vec![]));
    let at = |revision| TxnOp::Range(Range { revision, ..Range::all(one("k")) });
    assert_eq!(
        member.rejected(after_put(at(3))),
        Rejection::FutureRevision { requested: 3, current: 2 }
    );
    assert_eq!(
        member.rejected(after_put(TxnOp::Put(put_on("l", "", 5)))),
        Rejection::LeaseNotFound(LeaseId(5))
    );
    let only_here = TxnOp::Put(Put { value: None, ..put("fresh", "") });
    let nested = TxnOp::Txn(txn(vec![], vec![TxnOp::Put(put("fresh", "")), only_here], vec![]));
    assert_eq!(member.rejected(after_put(nested)), Rejection::KeyNotFound);
    // In the branch that is not taken, nothing is looked at.
    let outcome = member.apply(Command::Txn(txn(vec![], vec![], vec![at(99)])));
    assert!(outcome.reply.is_ok());

    member.ok(put_command("k", "v"));
    member.ok(compact(3));
    assert_eq!(member.rejected(after_put(at(2))), Rejection::Compacted { requested: 2, oldest: 3 });
}

#[test]
fn a_transaction_that_writes_nothing_makes_no_revision() {
    let mut member = Member::new();
    let ops = vec![get("k"), TxnOp::DeleteRange(delete(everything()))];
    let outcome = member.apply(Command::Txn(txn(vec![], ops, vec![])));
    assert_eq!(outcome.revision, 1);
    let reply = txn_reply(outcome.reply.unwrap());
    assert!(matches!(reply.responses[1], TxnOpReply::DeleteRange { revision: 1, .. }));
}

#[test]
fn a_read_only_transaction_needs_no_entry() {
    let mut member = Member::new();
    member.ok(put_command("k", "v"));
    let is_there = compare("k", CompareResult::Greater, CompareTarget::Version(0));
    let read = txn(vec![is_there], vec![get("k")], vec![]);
    let reply = member.view().read_txn(&read).unwrap();
    assert_eq!(reply, txn_reply(member.ok(Command::Txn(read))));
    let future = Range { revision: 9, ..Range::all(one("k")) };
    let read =
        txn(vec![], vec![TxnOp::Txn(txn(vec![], vec![TxnOp::Range(future)], vec![]))], vec![]);
    assert_eq!(
        member.view().read_txn(&read).unwrap_err(),
        Rejection::FutureRevision { requested: 9, current: 2 }
    );
}

#[test]
fn a_range_in_a_transaction_takes_a_negative_revision_for_a_compacted_one() {
    let mut member = Member::new();
    member.ok(put_command("k", "1"));
    let in_txn = |revision| {
        let range = TxnOp::Range(Range { revision, ..Range::all(everything()) });
        let nested = TxnOp::Txn(txn(vec![], vec![range], vec![]));
        Command::Txn(txn(vec![], vec![TxnOp::Put(put("other", "")), nested], vec![]))
    };
    let compacted = |requested, oldest| Rejection::Compacted { requested, oldest };
    assert_eq!(member.rejected(in_txn(-2)), compacted(-2, NEVER_COMPACTED));
    let reply = txn_reply(member.ok(in_txn(-1)));
    let TxnOpReply::Txn(nested) = &reply.responses[1] else { panic!("{reply:?}") };
    let TxnOpReply::Range { reply, .. } = &nested.responses[0] else { panic!("{nested:?}") };
    assert_eq!(reply.count, 2, "the present, with what the transaction wrote");
    member.ok(compact(1));
    assert_eq!(member.rejected(in_txn(-1)), compacted(-1, 1));
    let read = |revision| {
        let range = TxnOp::Range(Range { revision, ..Range::all(everything()) });
        member.view().read_txn(&txn(vec![], vec![range], vec![])).map(drop)
    };
    assert_eq!(read(-1), Err(compacted(-1, 1)));
    assert_eq!(read(0), Ok(()));
}

#[test]
fn compaction_refuses_what_etcd_refuses() {
    let mut member = Member::new();
    member.ok(put_command("k", "1"));
    let compacted = |requested, oldest| Rejection::Compacted { requested, oldest };
    assert_eq!(member.machine.store().compacted(), NEVER_COMPACTED);
    assert_eq!(member.rejected(compact(-1)), compacted(-1, -1));
    assert_eq!(member.rejected(compact(3)), Rejection::FutureRevision { requested: 3, current: 2 });
    assert_eq!(member.ok(compact(0)), Reply::Compacted);
    assert_eq!(member.rejected(compact(0)), compacted(0, 0));
    let outcome = member.apply(compact(2));
    assert_eq!((outcome.revision, outcome.reply), (2, Ok(Reply::Compacted)));
    assert_eq!(member.rejected(compact(2)), compacted(2, 2));
    assert_eq!(member.rejected(compact(-7)), compacted(-7, 2));

    let at = |revision| Range { revision, ..Range::all(everything()) };
    assert_eq!(member.view().range(&at(1)).unwrap_err(), compacted(1, 2));
    assert_eq!(member.view().range(&at(2)).unwrap().count, 1);
    assert_eq!(member.view().range(&at(-1)).unwrap().count, 1);
}

#[test]
fn compaction_keeps_the_state_at_its_revision_and_the_deletes_made_there() {
    let mut member = Member::new();
    member.ok(put_command("gone", "1")); // 2
    member.ok(put_command("live", "1")); // 3
    member.ok(delete_command("gone")); // 4
    member.ok(put_command("live", "2")); // 5
    member.ok(put_command("late", "1")); // 6
    member.ok(delete_command("late")); // 7
    member.ok(put_command("live", "3")); // 8
    for physical in [false, true] {
        if !physical {
            member.ok(compact(7));
        } else {
            member.scrub_all();
        }
        let at_7 = Range { revision: 7, ..Range::all(everything()) };
        let reply = member.view().range(&at_7).unwrap();
        assert_eq!((reply.count, reply.records[0].value()), (1, &b"2"[..]));
        assert_eq!(changes(&member, 7), "late!7 live@8[5]");
        assert_eq!(
            member.view().changes(6, &everything(), 9).unwrap_err(),
            Rejection::Compacted { requested: 6, oldest: 7 }
        );
    }
    // live@5, late!7, live@8.
    assert_eq!(member.stored_records(), 3);
    member.ok(compact(8));
    member.scrub_all();
    assert_eq!(member.stored_records(), 1);
    assert_eq!(changes(&member, 8), "live@8");
}

#[test]
fn changes_come_in_whole_revisions() {
    let mut member = Member::new();
    let two = vec![TxnOp::Put(put("a", "")), TxnOp::Put(put("b", ""))];
    for _ in 0..3 {
        member.ok(Command::Txn(txn(vec![], two.clone(), vec![])));
    }
    let view = member.view();
    let page = |from, limit| view.changes(from, &everything(), limit).unwrap();
    let first = page(2, 1);
    assert_eq!((told(&first.events).as_str(), first.next), ("a@2 b@2", 3));
    let second = page(first.next, 3);
    assert_eq!((told(&second.events).as_str(), second.next), ("a@3[2] b@3[2] a@4[3] b@4[3]", 5));
    assert_eq!(page(5, 3), Changes { events: vec![], next: 5 });
    assert_eq!(page(9, 3), Changes { events: vec![], next: 9 });
    let only_b = view.changes(3, &one("b"), 0).unwrap();
    assert_eq!((told(&only_b.events).as_str(), only_b.next), ("b@3[2]", 4));
    // A later write does not show in a view made before.
    member.ok(put_command("c", ""));
    assert_eq!(page(5, 3), Changes { events: vec![], next: 5 });
}

#[test]
fn a_view_that_compaction_overtook_moves_on() {
    let mut member = Member::new();
    member.ok(put_command("k", "1"));
    let view = member.view();
    member.ok(put_command("k", "2"));
    assert_eq!(view.get(b"k").unwrap().value(), b"1");
    assert_eq!(view.revision(), 2);
    member.ok(compact(3));
    member.scrub_all();
    assert_eq!(view.clone().get(b"k").unwrap().value(), b"2");
    let reply = view.range(&Range::all(everything())).unwrap();
    assert_eq!((reply.records[0].value(), view.revision()), (&b"2"[..], 3));
}

#[test]
fn a_put_moves_a_key_between_leases() {
    let mut member = Member::new();
    member.ok(grant(1, 10));
    member.ok(grant(2, 10));
    assert_eq!(member.rejected(grant(2, 5)), Rejection::LeaseExists(LeaseId(2)));
    member.ok(Command::Put(put_on("k", "", 1)));
    member.ok(Command::Put(put_on("k", "", 2)));
    member.ok(Command::Put(put_on("j", "", 2)));
    member.ok(Command::Put(put_on("i", "", 2)));
    member.ok(put_command("i", ""));
    let keys = |member: &Member, id| -> Vec<Bytes> {
        member.machine.leases().keys(LeaseId(id)).cloned().collect()
    };
    assert_eq!((keys(&member, 1).len(), keys(&member, 2)), (0, vec![key("j"), key("k")]));

    let outcome = member.apply(Command::LeaseRevoke { id: LeaseId(1) });
    assert_eq!((outcome.revision, outcome.events.len()), (6, 0));
    let outcome = member.apply(Command::LeaseRevoke { id: LeaseId(2) });
    assert_eq!(told(&outcome.events), "j!7[4] k!7[3]");
    assert_eq!(outcome.effects, [Effect::LeaseEnded { id: LeaseId(2) }]);
    assert_eq!(
        member.rejected(Command::LeaseRevoke { id: LeaseId(2) }),
        Rejection::LeaseNotFound(LeaseId(2))
    );
    assert_eq!(member.pairs(), "i=");
}

#[test]
fn an_expiry_that_a_renewal_overtook_is_void() {
    let mut member = Member::new();
    let granted = member.apply_at(1_000, grant(1, 10));
    let held = |deadline, renewed_at_index| {
        [Effect::LeaseHeld { id: LeaseId(1), deadline: Timestamp(deadline), renewed_at_index }]
    };
    assert_eq!(granted.effects, held(11_000, 1));
    let expire = |index| Command::LeaseExpire {
        term: 1,
        leases: vec![ExpiredLease { id: LeaseId(1), renewed_at_index: index }; 2],
    };
    member.ok(Command::Put(put_on("k", "", 1)));
    let renew = Command::LeaseRenew { ids: vec![LeaseId(9), LeaseId(1)] };
    let renewed = member.apply_at(9_000, renew);
    assert_eq!(renewed.reply.unwrap(), Reply::LeaseRenewed(vec![None, Some(10)]));
    assert_eq!(renewed.effects, held(19_000, 3));
    assert_eq!(member.apply_at(30_000, expire(1)).reply.unwrap(), Reply::LeaseExpired(0));
    // An entry with an older time does not turn time back.
    let outcome = member.apply_at(5, expire(3));
    assert_eq!(outcome.reply.unwrap(), Reply::LeaseExpired(1));
    assert_eq!(told(&outcome.events), "k!3[2]");
    assert_eq!(member.machine.now(), Timestamp(30_000));
    assert!(member.machine.leases().is_empty());
}

#[test]
fn several_leases_end_in_one_revision_with_their_keys_in_order() {
    let mut member = Member::new();
    for (id, name) in [(1, "c"), (2, "b"), (3, "a")] {
        member.ok(grant(id, 1));
        member.ok(Command::Put(put_on(name, "", id)));
    }
    let leases = [(1, 1), (2, 3), (3, 5)]
        .map(|(id, renewed_at_index)| ExpiredLease { id: LeaseId(id), renewed_at_index });
    let expire = Command::LeaseExpire { term: 1, leases: leases.to_vec() };
    let early = member.apply_at(999, expire.clone());
    assert_eq!((early.reply.unwrap(), early.revision), (Reply::LeaseExpired(0), 4));
    let outcome = member.apply_at(1_000, expire);
    assert_eq!(outcome.reply.unwrap(), Reply::LeaseExpired(3));
    assert_eq!(told(&outcome.events), "a!5[4] b!5[3] c!5[2]");
    let subs: Vec<_> = outcome.events.iter().map(|event| event.record.mod_revision().sub).collect();
    assert_eq!(subs, [0, 1, 2]);
}

fn enqueue(name: &str, lease: i64, value: &str, rewrite: bool) -> Command {
    let (name, value) = (key(name), key(value));
    Command::Enqueue(Enqueue { name, lease: LeaseId(lease), value, rewrite })
}

fn enqueued(reply: Reply) -> (String, i64, bool, bool) {
    match reply {
        Reply::Enqueued(Enqueued { key, create_revision, created, first, lease_ttl_seconds }) => {
            assert_eq!(lease_ttl_seconds, 60);
            (String::from_utf8(key.to_vec()).unwrap(), create_revision, created, first)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_queue_grants_in_order_and_keeps_places() {
    let mut member = Member::new();
    assert_eq!(member.rejected(enqueue("n", 1, "", false)), Rejection::LeaseNotFound(LeaseId(1)));
    for id in [1, 2, 0x4d] {
        member.ok(grant(id, 60));
    }
    assert_eq!(enqueued(member.ok(enqueue("n", 0x4d, "", false))), ("n/4d".into(), 2, true, true));
    assert_eq!(enqueued(member.ok(enqueue("n", 1, "", false))), ("n/1".into(), 3, true, false));
    assert_eq!(enqueued(member.ok(enqueue("n", 2, "", false))), ("n/2".into(), 4, true, false));
    // Again: the same place, no revision, whatever the value says.
    let again = member.apply(enqueue("n", 1, "other", false));
    assert_eq!(again.revision, 4);
    assert_eq!(enqueued(again.reply.unwrap()), ("n/1".into(), 3, false, false));
    // A campaign takes its new value along and keeps its place.
    let rewritten = member.apply(enqueue("n", 1, "other", true));
    assert_eq!(told(&rewritten.events), "n/1@5[3]");
    assert_eq!(enqueued(rewritten.reply.unwrap()), ("n/1".into(), 3, false, false));
    assert_eq!(member.apply(enqueue("n", 1, "other", true)).revision, 5);
    assert_eq!(member.machine.queue_head(b"n").unwrap().key(), b"n/4d");

    let left = |name, create_revision| Effect::QueueLeft { key: key(name), create_revision };
    let head = |name, create_revision, lease_alive| Effect::QueueHead {
        key: key(name),
        create_revision,
        lease_alive,
    };
    let outcome = member.apply(Command::Unlock { key: key("n/4d") });
    assert_eq!(outcome.reply.unwrap(), Reply::Left(true));
    assert_eq!(outcome.effects, [left("n/4d", 2), head("n/1", 3, true)]);
    // One that waits leaves: nobody becomes first.
    let leave = |revision| Command::Leave { key: key("n/2"), create_revision: revision };
    assert_eq!(member.ok(leave(3)), Reply::Left(false));
    let outcome = member.apply(leave(4));
    assert_eq!(outcome.effects, [left("n/2", 4)]);
    let outcome = member.apply(Command::LeaseRevoke { id: LeaseId(1) });
    assert_eq!(outcome.effects, [Effect::LeaseEnded { id: LeaseId(1) }, left("n/1", 3)]);
    assert!(member.machine.queue_head(b"n").is_none());
}

#[test]
fn the_next_in_line_is_found_after_the_whole_entry() {
    let mut member = Member::new();
    for id in [1, 2, 3] {
        member.ok(grant(id, 60));
        member.ok(enqueue("n", id, "", false));
    }
    // A plain key of the same shape stands in line too; nobody holds its lease.
    member.ok(put_command("n/5", ""));
    let both = vec![TxnOp::DeleteRange(delete(one("n/2"))), TxnOp::DeleteRange(delete(one("n/1")))];
    let outcome = member.apply(Command::Txn(txn(vec![], both, vec![])));
    let expected = [
        Effect::QueueLeft { key: key("n/2"), create_revision: 3 },
        Effect::QueueLeft { key: key("n/1"), create_revision: 2 },
        Effect::QueueHead { key: key("n/3"), create_revision: 4, lease_alive: true },
    ];
    assert_eq!(outcome.effects, expected);
    let outcome = member.apply(Command::LeaseRevoke { id: LeaseId(3) });
    assert_eq!(
        outcome.effects[2..],
        [Effect::QueueHead { key: key("n/5"), create_revision: 5, lease_alive: false }]
    );
}

#[test]
fn unlock_deletes_only_a_key_that_holds_its_own_lease() {
    let mut member = Member::new();
    member.ok(grant(1, 60));
    member.ok(grant(2, 60));
    member.ok(put_command("plain", ""));
    member.ok(put_command("n/1", ""));
    member.ok(Command::Put(put_on("n/2", "", 1)));
    for name in ["plain", "n/1", "n/2", "n/3", ""] {
        let outcome = member.apply(Command::Unlock { key: key(name) });
        assert_eq!((outcome.reply, outcome.revision), (Ok(Reply::Left(false)), 4), "{name}");
    }
    member.ok(Command::Put(put_on("n/2", "", 2)));
    assert_eq!(member.ok(Command::Unlock { key: key("n/2") }), Reply::Left(true));
}

#[test]
fn a_queue_key_without_its_lease_is_nobodys_place() {
    let mut member = Member::new();
    member.ok(grant(1, 60));
    member.ok(grant(2, 60));
    member.ok(enqueue("n", 1, "", false));
    member.ok(put_command("n/1", "an application's"));
    for rewrite in [false, true] {
        let refused = member.rejected(enqueue("n", 1, "mine", rewrite));
        assert_eq!(refused, Rejection::Detached(LeaseId(1)));
    }
    // Another lease's is not its own either, and it holds the next one up.
    member.ok(Command::Put(put_on("n/1", "", 2)));
    assert_eq!(member.rejected(enqueue("n", 1, "", false)), Rejection::Detached(LeaseId(1)));
    assert_eq!(enqueued(member.ok(enqueue("n", 2, "", false))), ("n/2".into(), 5, true, false));
}

#[test]
fn only_the_leader_proclaims() {
    let mut member = Member::new();
    for id in [1, 2] {
        member.ok(grant(id, 60));
        member.ok(enqueue("n", id, "first", false));
    }
    let proclaim = |name: &str, create_revision, lease| {
        let (key, value) = (key(name), key("said"));
        Command::Proclaim(Proclaim { key, create_revision, value, lease: LeaseId(lease) })
    };
    for (name, revision, lease) in [("n/2", 3, 2), ("n/1", 3, 1), ("n/1", 2, 2), ("x", 0, 0)] {
        let reply = member.ok(proclaim(name, revision, lease));
        assert_eq!(reply, Reply::Proclaimed(false), "{name}@{revision} lease {lease}");
    }
    assert_eq!(member.rejected(proclaim("n/1", 2, 9)), Rejection::LeaseNotFound(LeaseId(9)));
    assert_eq!(member.pairs(), "n/1=first n/2=first");
    for lease in [0, 1] {
        assert_eq!(member.ok(proclaim("n/1", 2, lease)), Reply::Proclaimed(true));
    }
    assert_eq!(member.pairs(), "n/1=said n/2=first");
    assert_eq!(member.machine.queue_head(b"n").unwrap().lease(), LeaseId(1));
    // Without its lease the key is first and leads nobody.
    member.ok(put_command("n/1", "an application's"));
    assert_eq!(member.ok(proclaim("n/1", 2, 0)), Reply::Proclaimed(false));
    member.ok(Command::Leave { key: key("n/1"), create_revision: 2 });
    assert_eq!(member.ok(proclaim("n/2", 3, 2)), Reply::Proclaimed(true));
}

#[test]
fn a_fenced_write_happens_only_while_all_its_locks_are_held() {
    let mut member = Member::new();
    for id in [1, 2] {
        member.ok(grant(id, 60));
        member.ok(enqueue("n", id, "", false));
    }
    member.ok(enqueue("a=b", 2, "", false));
    let fence = |name: &str, token| Fence { name: key(name), token };
    let fenced = |fences: &[Fence], write| Command::Fenced(Fenced { fences: fences.into(), write });
    let write = || FencedWrite::Put(put("x", "1"));
    let stale = |token| Rejection::StaleFence { token };

    assert_eq!(member.apply(fenced(&[fence("n", 2)], write())).revision, 5);
    assert_eq!(member.rejected(fenced(&[fence("n", 3)], write())), stale(3), "it waits");
    assert_eq!(member.rejected(fenced(&[fence("m", 2)], write())), stale(2), "nobody has it");
    let both = [fence("n", 2), fence("a=b", 4)];
    assert_eq!(member.apply(fenced(&both, write())).revision, 6);
    let one_of_two = [fence("a=b", 4), fence("n", 7)];
    assert_eq!(member.rejected(fenced(&one_of_two, write())), stale(7));
    // The check comes first, also when the write itself is to release the lock.
    let release = FencedWrite::DeleteRange(delete(one("n/1")));
    assert_eq!(member.apply(fenced(&[fence("n", 2)], release)).revision, 7);
    let next = FencedWrite::Txn(txn(vec![], vec![TxnOp::Put(put("x", "2"))], vec![]));
    assert_eq!(member.rejected(fenced(&[fence("n", 2)], next.clone())), stale(2));
    assert_eq!(member.apply(fenced(&[fence("n", 3)], next)).revision, 8);
    // A read is refused as well, and one that is not makes no revision.
    let read = FencedWrite::Txn(txn(vec![], vec![TxnOp::Range(Range::all(one("x")))], vec![]));
    assert_eq!(member.rejected(fenced(&[fence("n", 2)], read.clone())), stale(2));
    assert_eq!(member.apply(fenced(&[fence("n", 3)], read)).revision, 8);
    // A key that lost its lease owns nothing.
    member.ok(put_command("n/2", ""));
    assert_eq!(member.rejected(fenced(&[fence("n", 3)], write())), stale(3));
}

#[test]
fn a_renewal_stores_the_lease_and_the_time_and_nothing_else() {
    let mut member = Member::new();
    member.ok(grant(1, 60));
    for name in ["a", "b", "c"] {
        member.ok(Command::Put(put_on(name, "value", 1)));
    }
    let mut batch = Batch::default();
    let entry = Entry {
        at: Timestamp(5_000),
        origin: Origin::default(),
        command: Command::LeaseRenew { ids: vec![LeaseId(1)] },
        principal: None,
    };
    member.machine.apply(Position { term: 1, index: 9 }, &entry, &mut batch).unwrap();
    assert_eq!(batch.changes.len(), 2);
    assert!(batch.len_bytes() < 64, "{}", batch.len_bytes());
}

#[test]
fn an_entry_that_changes_nothing_stores_nothing_but_that_it_was_applied() {
    let mut member = Member::new();
    member.ok(put_command("a", ""));
    let mut batch = Batch::default();
    let entry = Entry {
        at: Timestamp(0),
        origin: Origin::default(),
        command: Command::Tick,
        principal: None,
    };
    member.machine.apply(Position { term: 1, index: 2 }, &entry, &mut batch).unwrap();
    assert!(matches!(&batch.changes[..], [Change::Put { key, .. }] if *key == schema::META_KEY));
    assert!(batch.len_bytes() < 64, "{}", batch.len_bytes());
}

#[test]
fn a_published_member_survives_a_restart() {
    let mut member = Member::new();
    let publish = Command::PublishMember {
        id: MemberId(7),
        name: "m7".into(),
        client_urls: vec!["http://h:2379".into()],
    };
    assert_eq!(member.ok(publish), Reply::Done);
    member.restart();
    assert_eq!(member.machine.published_members()[&MemberId(7)].name, "m7");
}

#[test]
fn a_removed_member_is_remembered_and_stays_unpublished() {
    let mut member = Member::new();
    let publish = || Command::PublishMember {
        id: MemberId(7),
        name: "m7".into(),
        client_urls: vec!["http://h:2379".into()],
    };
    member.ok(publish());
    let before = member.machine.hash();
    let mut batch = Batch::default();
    member.machine.retire([MemberId(7)], &mut batch);
    member.engine.apply(batch).unwrap();
    assert_ne!(member.machine.hash(), before);
    // Its own word comes too late.
    member.ok(publish());
    let mut other = Member::new();
    other.install(member.machine.image());
    member.restart();
    for member in [&member, &other] {
        assert!(member.machine.retired_members().contains(&MemberId(7)));
        assert!(member.machine.published_members().is_empty());
    }
    assert_eq!(member.machine.hash(), other.machine.hash());
}

#[test]
fn a_member_may_be_removed_before_anything_is_written() {
    let mut member = Member::new();
    let mut batch = Batch::default();
    member.machine.retire([MemberId(7)], &mut batch);
    member.engine.apply(batch).unwrap();
    member.restart();
    assert!(member.machine.retired_members().contains(&MemberId(7)));
}

#[test]
fn hash_kv_stays_the_same_when_more_is_written() {
    let mut member = Member::new();
    member.ok(put_command("a", "1"));
    member.ok(put_command("a", "2"));
    let then = member.view().hash_kv(0).unwrap();
    assert_eq!((then.compact_revision, then.hash_revision), (-1, 3));
    member.ok(put_command("b", "1"));
    assert_eq!(member.view().hash_kv(3).unwrap(), then);
    assert_ne!(member.view().hash_kv(0).unwrap().hash, then.hash);
    member.ok(compact(3));
    let compacted = member.view().hash_kv(3).unwrap();
    assert_eq!(compacted.compact_revision, 3);
    member.scrub_all();
    assert_eq!(member.view().hash_kv(3).unwrap(), compacted);
    assert!(member.view().hash_kv(2).is_err());
    assert!(member.view().hash_kv(5).is_err());
}
