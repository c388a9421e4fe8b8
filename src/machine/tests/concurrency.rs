//! Readers on other threads, beside the one that applies.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;

/// Each entry writes the same number to all keys. So every consistent state shows one number.
#[test]
fn readers_see_whole_entries_while_history_is_written_compacted_and_scrubbed() {
    const KEYS: usize = 20;
    const ENTRIES: i64 = 3_000;
    let write = |number: i64| {
        let value = number.to_string();
        let ops = (0..KEYS).map(|n| TxnOp::Put(put(&format!("k{n:02}"), &value))).collect();
        Command::Txn(txn(vec![], ops, vec![]))
    };
    let mut member = Member::new();
    member.ok(write(2));
    let store = member.machine.store();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for reader in 0..3 {
            let (store, done) = (store.clone(), &done);
            scope.spawn(move || {
                let (mut newest, mut covered) = (0, 2);
                while !done.load(Ordering::SeqCst) {
                    let view = store.view();
                    if reader == 0 {
                        match view.changes(covered, &everything(), 64) {
                            Ok(changes) => {
                                assert_eq!(changes.events.len() % KEYS, 0);
                                for event in &changes.events {
                                    assert!(event.record.mod_revision().main >= covered);
                                }
                                covered = changes.next;
                            }
                            Err(Rejection::Compacted { oldest, .. }) => covered = oldest,
                            Err(other) => panic!("{other}"),
                        }
                        continue;
                    }
                    let reply = if reader == 1 {
                        view.range(&Range::all(everything())).unwrap()
                    } else {
                        let get = TxnOp::Range(Range::all(everything()));
                        match view
                            .read_txn(&txn(vec![], vec![get], vec![]))
                            .unwrap()
                            .responses
                            .pop()
                        {
                            Some(TxnOpReply::Range { reply, .. }) => reply,
                            other => panic!("{other:?}"),
                        }
                    };
                    assert_eq!(reply.count, KEYS as i64);
                    let seen = reply.records[0].mod_revision().main;
                    for record in &reply.records {
                        assert_eq!(record.mod_revision().main, seen);
                        assert_eq!(record.value(), seen.to_string().as_bytes());
                    }
                    assert_eq!(seen, view.revision());
                    assert!(seen >= newest);
                    newest = seen;
                }
            });
        }
        for number in 3..ENTRIES {
            member.ok(write(number));
            if number % 7 == 0 {
                member.ok(Command::Compact { revision: number });
            }
            member.scrub(100);
        }
        done.store(true, Ordering::SeqCst);
    });
    member.scrub_all();
    assert!(member.stored_records() < 10 * KEYS);
}
