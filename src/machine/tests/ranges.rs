//! Ranges over more keys than a few: pages, counts that nobody walks for, old revisions.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::model::{Pairs, naive_range};
use super::*;

const KEYS: u64 = 900;

fn numbered(number: u64) -> String {
    format!("key/{:04}", number * 7919 % 10_000)
}

fn some_range(random: &mut Random) -> KeyRange {
    let any = |random: &mut Random| key(&numbered(random.below(KEYS)));
    match random.below(5) {
        0 => everything(),
        1 => KeyRange::From(any(random)),
        2 => KeyRange::One(any(random)),
        _ => KeyRange::Span { start: any(random), end: any(random) },
    }
}

fn some_query(random: &mut Random, revision: i64) -> Range {
    let newest = revision as u64 + 1;
    let mut filter = || if random.one_in(6) { random.below(newest) as i64 } else { 0 };
    let mut query = Range {
        min_mod_revision: filter(),
        max_mod_revision: filter(),
        min_create_revision: filter(),
        max_create_revision: filter(),
        revision,
        ..Range::all(some_range(random))
    };
    query.limit = random.pick(&[0, 1, 2, 30, 100, 250, 5_000]);
    query.count_only = random.one_in(5);
    query.order = random.pick(&[SortOrder::None, SortOrder::Ascend, SortOrder::Descend]);
    query.target = random.pick(&[
        SortTarget::Key,
        SortTarget::Key,
        SortTarget::Version,
        SortTarget::Create,
        SortTarget::Mod,
        SortTarget::Value,
    ]);
    query
}

fn some_entry(random: &mut Random, deletes_of_ten: u64) -> Command {
    let name = numbered(random.below(KEYS));
    if random.below(10) >= deletes_of_ten {
        return Command::Put(put(&name, random.pick(&["x", "y", "z"])));
    }
    match random.below(8) {
        0 => Command::DeleteRange(delete(KeyRange::prefix(&name.as_bytes()[..6]))),
        1 => {
            let ops = vec![
                TxnOp::DeleteRange(delete(one(&name))),
                TxnOp::Put(put(&numbered(random.below(KEYS)), "t")),
                TxnOp::Range(Range { limit: 3, ..Range::all(everything()) }),
            ];
            Command::Txn(txn(vec![], ops, vec![]))
        }
        _ => Command::DeleteRange(delete(one(&name))),
    }
}

fn apply_to(pairs: &mut Pairs, outcome: &Outcome) {
    for event in &outcome.events {
        if event.record.is_tombstone() {
            pairs.remove(event.record.key());
        } else {
            pairs.insert(Bytes::copy_from_slice(event.record.key()), event.record.clone());
        }
    }
}

/// Every page and count of now and of a while ago is what walking through all pairs gives: just
/// after they changed, many changes later, after compaction, after a restart.
#[test]
fn pages_and_counts_are_those_of_a_walk_at_any_revision() {
    let mut random = Random::new(7_001);
    let mut member = Member::new();
    let mut pairs = Pairs::new();
    let mut states: BTreeMap<i64, Pairs> = BTreeMap::new();
    for round in 0..6_000 {
        // Many keys come first, then they dwindle, then they come again.
        let outcome = member.apply(some_entry(&mut random, [1, 8, 2][round / 2_000]));
        apply_to(&mut pairs, &outcome);
        if let Reply::Txn(reply) = outcome.reply.as_ref().unwrap() {
            let Some(TxnOpReply::Range { reply, .. }) = reply.responses.last() else {
                panic!("the transaction ends with a range")
            };
            assert_eq!(reply.count, pairs.len() as i64);
        }
        if round % 20 != 0 {
            continue;
        }
        states.insert(outcome.revision, pairs.clone());
        if states.len() > 60 {
            let (oldest, _) = states.pop_first().unwrap();
            if random.one_in(10) {
                member.ok(Command::Compact { revision: oldest + 1 });
                member.scrub_all();
            }
        }
        if random.one_in(60) {
            member.restart();
        }
        let view = member.view();
        for (revision, pairs) in [states.last_key_value(), states.iter().nth(states.len() / 2)]
            .into_iter()
            .chain([states.first_key_value()])
            .flatten()
        {
            for _ in 0..4 {
                let query = some_query(&mut random, *revision);
                let reply = view.range(&query).unwrap();
                assert_eq!(reply, naive_range(pairs, &query), "at {revision}: {query:?}");
            }
        }
    }
    assert!(states.values().any(|pairs| pairs.len() > 400));
    assert!(member.machine.store().compacted() > 1);
}

/// A count, a first page, and all pairs, read one after the other in one view, belong to one
/// revision, whatever the writer does in between.
#[test]
fn counts_agree_with_walks_while_keys_come_and_go() {
    let mut member = Member::new();
    for number in 0..KEYS / 2 {
        member.ok(Command::Put(put(&numbered(number), "x")));
    }
    let store = member.machine.store();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for seed in 0..2 {
            let (store, done) = (store.clone(), &done);
            scope.spawn(move || {
                let mut random = Random::new(seed);
                while !done.load(Ordering::SeqCst) {
                    let view = store.view();
                    let range = some_range(&mut random);
                    let count = Range { count_only: true, ..Range::all(range.clone()) };
                    let page = Range { limit: 2, ..Range::all(range.clone()) };
                    let last =
                        Range { order: SortOrder::Descend, limit: 2, ..Range::all(range.clone()) };
                    let count = view.range(&count).unwrap().count;
                    let page = view.range(&page).unwrap();
                    let last = view.range(&last).unwrap();
                    let all = view.range(&Range::all(range.clone())).unwrap();
                    assert_eq!(count, all.records.len() as i64, "{range:?}");
                    assert_eq!((page.count, last.count, all.count), (count, count, count));
                    let first: Vec<_> = all.records.iter().take(2).cloned().collect();
                    assert_eq!(page.records, first);
                    let backwards: Vec<_> = all.records.iter().rev().take(2).cloned().collect();
                    assert_eq!(last.records, backwards);
                    assert_eq!(page.more, all.records.len() > 2);
                }
            });
        }
        let mut random = Random::new(99);
        for _ in 0..20_000 {
            member.apply(some_entry(&mut random, 4));
        }
        done.store(true, Ordering::SeqCst);
    });
}

/// Reads all pages, calling `between` after each; returns the answer they make together.
fn read_pages(mut pages: Pages, mut between: impl FnMut()) -> Result<(RangeReply, i64), Rejection> {
    let mut reply = RangeReply::default();
    let mut end = None;
    while let Some(page) = pages.next_page()? {
        assert_eq!(end, None, "nothing follows the last page");
        let bytes = |record: &Record| record.key().len() + record.value().len();
        let total: usize = page.records.iter().map(bytes).sum();
        assert!(total <= PAGE_BYTES || page.records.len() == 1);
        reply.records.extend(page.records);
        end = page.end;
        between();
    }
    let end = end.expect("the last page says that it is");
    (reply.more, reply.count) = (end.more, end.count);
    Ok((reply, end.revision))
}

/// Fifty pairs that fill about thirteen pages, one of them larger than a page.
fn large_pairs(member: &mut Member) {
    for number in 0..50 {
        let bytes = if number == 20 { PAGE_BYTES + 1 } else { PAGE_BYTES / 4 - number };
        member.ok(Command::Put(put(&format!("p/{number:02}"), &"v".repeat(bytes))));
    }
}

#[test]
fn pages_together_are_the_range_at_the_first_ones_revision_whatever_is_written_meanwhile() {
    for limit in [0, 1, 4, 20, 49, 50, 51, -1] {
        let mut member = Member::new();
        large_pairs(&mut member);
        let current = member.view().revision();
        let ranges = [
            everything(),
            KeyRange::prefix(b"p/1"),
            one("p/20"),
            one("absent"),
            KeyRange::Span { start: key("p/3"), end: key("p/1") },
        ];
        for range in ranges {
            for revision in [0, current - 1] {
                let query = Range { limit, revision, ..Range::all(range.clone()) };
                let expected = member.view().range(&query).unwrap();
                let current = member.view().revision();
                let pages = Pages::new(member.view(), query.clone());
                let (reply, shown) = read_pages(pages, || {
                    member.ok(Command::Put(put("p/99", "new")));
                    member.ok(Command::DeleteRange(delete(one("p/99"))));
                    member.ok(Command::Put(put("p/49", "changed")));
                })
                .unwrap();
                assert_eq!(reply, expected, "{limit} {range:?} {revision}");
                assert_eq!(shown, current);
            }
        }
    }
}

#[test]
fn a_count_and_bare_keys_take_one_page() {
    let mut member = Member::new();
    large_pairs(&mut member);
    let first = |query| Pages::new(member.view(), query).next_page().unwrap().unwrap();
    let count = first(Range { count_only: true, limit: 3, ..Range::all(everything()) });
    let end = PagesEnd { revision: 51, more: false, count: 50 };
    assert_eq!(count, Page { records: vec![], end: Some(end) });
    let keys = first(Range { keys_only: true, ..Range::all(everything()) });
    assert_eq!((keys.records.len(), keys.end), (50, Some(end)));
}

#[test]
fn pages_end_when_their_revision_is_compacted_and_not_before() {
    let mut member = Member::new();
    large_pairs(&mut member);
    let mut pages = Pages::new(member.view(), Range::all(everything()));
    member.ok(Command::Put(put("later", "x")));
    assert!(pages.next_page().unwrap().unwrap().end.is_none());
    member.ok(Command::Compact { revision: 51 });
    member.scrub_all();
    assert!(
        pages.next_page().unwrap().unwrap().end.is_none(),
        "the compacted revision is readable"
    );
    member.ok(Command::Compact { revision: 52 });
    member.scrub_all();
    assert_eq!(pages.next_page().unwrap_err(), Rejection::Compacted { requested: 51, oldest: 52 });
    assert_eq!(pages.next_page(), Ok(None));
}

#[test]
fn the_first_page_of_the_current_state_moves_on_when_compaction_overtakes_it() {
    let mut member = Member::new();
    member.ok(Command::Put(put("k", "old")));
    let mut pages = Pages::new(member.view(), Range::all(everything()));
    member.ok(Command::Put(put("k", "new")));
    member.ok(Command::Compact { revision: 3 });
    member.scrub_all();
    let page = pages.next_page().unwrap().unwrap();
    assert_eq!(page.records[0].value(), b"new");
    assert_eq!(page.end, Some(PagesEnd { revision: 3, more: false, count: 1 }));
}

#[test]
fn pages_refuse_the_revisions_a_range_refuses() {
    let mut member = Member::new();
    large_pairs(&mut member);
    member.ok(Command::Compact { revision: 9 });
    for revision in [8, 52] {
        let query = Range { revision, ..Range::all(everything()) };
        let refused = member.view().range(&query).unwrap_err();
        assert_eq!(Pages::new(member.view(), query).next_page().unwrap_err(), refused);
    }
}

/// Reads everything that changed from `from` on, so many records at a time.
fn all_changes(view: &View, from: i64, range: &KeyRange, limit: usize) -> Vec<Event> {
    let (mut events, mut next) = (Vec::new(), from);
    while next <= view.revision() {
        let changes = view.changes(next, range, limit).unwrap();
        assert!(changes.next > next);
        for event in &changes.events {
            let main = event.record.mod_revision().main;
            assert!(next <= main && main < changes.next, "revisions come whole");
        }
        next = changes.next;
        events.extend(changes.events);
    }
    events
}

#[test]
fn the_changes_of_few_keys_are_found_by_key_and_are_those_of_the_journal() {
    let mut random = Random::new(31);
    let mut member = Member::new();
    for round in 0..1_500_i64 {
        let command = match random.below(8) {
            0 => Command::Put(put("hot", &round.to_string())),
            1 => Command::DeleteRange(delete(KeyRange::prefix(b"ho"))),
            2 => Command::Txn(txn(
                vec![],
                vec![TxnOp::Put(put("hos", "x")), TxnOp::Put(put("hot", "y"))],
                vec![],
            )),
            _ => some_entry(&mut random, 3),
        };
        member.ok(command);
        if round % 500 == 499 {
            let view = member.view();
            member.ok(Command::Compact { revision: view.revision() - 300 });
            member.scrub(random.below(200) as usize);
        }
        if round % 50 != 0 {
            continue;
        }
        let view = member.view();
        let oldest = member.machine.store().compacted().max(1);
        let from = oldest + random.below((view.revision() - oldest + 2) as u64) as i64;
        let journal = all_changes(&view, from, &everything(), 1_024);
        for range in [one("hot"), one("absent"), KeyRange::prefix(b"ho"), some_range(&mut random)] {
            let expected: Vec<_> = journal
                .iter()
                .filter(|event| range.contains(event.record.key()))
                .cloned()
                .collect();
            for limit in [1, 5, 64, 256] {
                assert_eq!(all_changes(&view, from, &range, limit), expected, "{range:?} {limit}");
            }
        }
    }
}

#[test]
fn a_key_that_changed_once_is_found_in_one_step_however_long_the_history() {
    let mut member = Member::new();
    member.ok(Command::Put(put("quiet", "x")));
    for number in 0..2_000 {
        member.ok(Command::Put(put(&format!("busy/{}", number % 50), "x")));
    }
    let view = member.view();
    for range in [one("quiet"), KeyRange::prefix(b"q"), one("absent"), KeyRange::prefix(b"ab")] {
        let changes = view.changes(2, &range, 256).unwrap();
        assert_eq!(changes.next, view.revision() + 1, "{range:?}");
        assert_eq!(changes.events.len(), usize::from(range.contains(b"quiet")));
    }
    assert_eq!(view.changes(2, &everything(), 256).unwrap().next, 2 + 256);
}
