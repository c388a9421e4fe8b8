//! The check of watches finds each kind of defect: one of each is injected into a good record.

use super::*;

fn pair(key: &str, create: i64, revision: i64, version: i64) -> KeyValue {
    KeyValue {
        key: key.to_owned().into(),
        create_revision: create,
        mod_revision: revision,
        version,
        value: format!("{key}@{revision}").into(),
        lease: 0,
    }
}

fn put(key: &str, create: i64, revision: i64, version: i64, before: Option<KeyValue>) -> Event {
    Event { kind: PUT, kv: Some(pair(key, create, revision, version)), prev_kv: before }
}

fn delete(before: KeyValue, revision: i64) -> Event {
    let kv = KeyValue { key: before.key.clone(), mod_revision: revision, ..KeyValue::default() };
    Event { kind: DELETE, kv: Some(kv), prev_kv: Some(before) }
}

/// Revision 4 writes a and c together, 5 deletes a, 6 makes it anew, 8 deletes b and c.
fn history() -> Vec<Event> {
    vec![
        put("a", 2, 2, 1, None),
        put("b", 3, 3, 1, None),
        put("a", 2, 4, 2, Some(pair("a", 2, 2, 1))),
        put("c", 4, 4, 1, None),
        delete(pair("a", 2, 4, 2), 5),
        put("a", 6, 6, 1, None),
        put("x", 7, 7, 1, None),
        delete(pair("b", 3, 3, 1), 8),
        delete(pair("c", 4, 4, 1), 8),
        put("a", 6, 9, 2, Some(pair("a", 6, 6, 1))),
    ]
}

fn witness() -> Witness {
    Witness::new(&history()).expect("a history")
}

/// What a watch of a to c should be told, an answer for each revision.
fn good() -> Record {
    let interest =
        Interest { key: "a".into(), range_end: "d".into(), prev_kv: true, ..Interest::default() };
    let own: Vec<Event> = history().into_iter().filter(|e| interest.wants(e)).collect();
    let mut record = Record::new(interest);
    record.notes.push(Note::Began { from: 1 });
    for revision in own.chunk_by(|a, b| a.revision() == b.revision()) {
        record.notes.push(answer(revision));
    }
    record
}

fn answer(events: &[Event]) -> Note {
    Note::Events { events: events.to_vec(), fragment: false, compacted: 0 }
}

fn events_of(note: &mut Note) -> &mut Vec<Event> {
    match note {
        Note::Events { events, .. } => events,
        other => panic!("no events: {other:?}"),
    }
}

/// The place of the answer with this revision.
fn place(record: &Record, revision: i64) -> usize {
    let is_it = |note: &Note| match note {
        Note::Events { events, .. } => events[0].revision() == revision,
        _ => false,
    };
    record.notes.iter().position(is_it).expect("the revision is there")
}

/// Asserts that exactly this guarantee is reported as broken.
#[track_caller]
fn finds(record: &Record, guarantee: Guarantee) {
    match record.check(&witness(), 9) {
        Ok(summary) => panic!("nothing was found: {summary:?}"),
        Err(found) => assert_eq!(found.guarantee, guarantee, "{found}"),
    }
}

#[track_caller]
fn accepts(record: &Record) -> Summary {
    record.check(&witness(), 9).unwrap_or_else(|found| panic!("{found}"))
}

#[test]
fn a_good_record_is_accepted() {
    assert_eq!(accepts(&good()), Summary { events: 9, begun: 1, progress: 0, compacted: 0 });
}

#[test]
fn answers_may_hold_several_revisions_and_several_streams_may_follow_each_other() {
    let mut record = good();
    let second = std::mem::take(events_of(&mut record.notes[2]));
    events_of(&mut record.notes[1]).extend(second);
    record.notes.remove(2);
    let at = place(&record, 6);
    record.notes.insert(at, Note::Began { from: 6 });
    record.notes.insert(at + 2, Note::Progress { revision: 7 });
    record.notes.insert(at + 3, Note::Began { from: 8 });
    assert_eq!(accepts(&record), Summary { events: 9, begun: 3, progress: 1, compacted: 0 });
}

#[test]
fn a_key_outside_the_range_breaks_the_filter() {
    let mut record = good();
    let at = place(&record, 8);
    record.notes.insert(at, answer(&[put("x", 7, 7, 1, None)]));
    finds(&record, Guarantee::Filter);
}

#[test]
fn an_event_of_a_kind_left_out_breaks_the_filter() {
    let mut record = good();
    record.interest.no_delete = true;
    finds(&record, Guarantee::Filter);
    let mut record = good();
    record.interest.no_put = true;
    finds(&record, Guarantee::Filter);
}

#[test]
fn two_answers_in_the_wrong_order() {
    let mut record = good();
    let at = place(&record, 5);
    record.notes.swap(at, at + 1);
    finds(&record, Guarantee::Ordered);
}

#[test]
fn events_of_one_revision_in_the_wrong_order() {
    let mut record = good();
    let at = place(&record, 8);
    events_of(&mut record.notes[at]).reverse();
    finds(&record, Guarantee::Ordered);
}

#[test]
fn an_answer_that_comes_twice() {
    let mut record = good();
    let at = place(&record, 5);
    record.notes.insert(at + 1, record.notes[at].clone());
    finds(&record, Guarantee::Unique);
}

#[test]
fn an_event_that_comes_twice_in_its_answer() {
    let mut record = good();
    let at = place(&record, 5);
    let events = events_of(&mut record.notes[at]);
    events.push(events[0].clone());
    finds(&record, Guarantee::Unique);
}

#[test]
fn a_revision_in_two_answers_is_not_atomic() {
    let mut record = good();
    let at = place(&record, 4);
    let rest = events_of(&mut record.notes[at]).split_off(1);
    record.notes.insert(at + 1, answer(&rest));
    finds(&record, Guarantee::Atomic);
}

#[test]
fn a_revision_in_fragments_is_atomic_unless_progress_comes_between() {
    let mut record = good();
    let at = place(&record, 4);
    let rest = events_of(&mut record.notes[at]).split_off(1);
    record.notes.insert(at + 1, answer(&rest));
    match &mut record.notes[at] {
        Note::Events { fragment, .. } => *fragment = true,
        other => panic!("{other:?}"),
    }
    accepts(&record);
    let mut cut = record.clone();
    cut.notes.insert(at + 1, Note::Began { from: 4 });
    cut.notes.insert(at + 2, answer(&history()[2..4]));
    cut.notes.remove(at + 3);
    accepts(&cut);
    record.notes.insert(at + 1, Note::Progress { revision: 3 });
    finds(&record, Guarantee::Bookmarkable);
}

#[test]
fn progress_that_comes_too_early() {
    let mut record = good();
    let at = place(&record, 6);
    record.notes.insert(at, Note::Progress { revision: 6 });
    finds(&record, Guarantee::Bookmarkable);
}

#[test]
fn progress_that_covers_a_lost_event() {
    let mut record = good();
    let at = place(&record, 6);
    record.notes[at] = Note::Progress { revision: 6 };
    finds(&record, Guarantee::Reliable);
}

#[test]
fn a_revision_told_again_after_its_bookmark() {
    let mut record = good();
    let at = place(&record, 6);
    record.notes.insert(at + 1, Note::Progress { revision: 6 });
    record.notes.insert(at + 2, record.notes[at].clone());
    finds(&record, Guarantee::Bookmarkable);
}

#[test]
fn a_gap_where_a_watch_begins_again() {
    let mut record = good();
    let at = place(&record, 5);
    record.notes[at] = Note::Began { from: 5 };
    finds(&record, Guarantee::Resumable);
}

#[test]
fn a_watch_that_begins_again_and_is_told_what_it_knew() {
    let mut record = good();
    let at = place(&record, 5);
    record.notes.insert(at + 1, Note::Began { from: 6 });
    record.notes.insert(at + 2, record.notes[at].clone());
    finds(&record, Guarantee::Resumable);
}

#[test]
fn an_event_before_the_start() {
    let mut record = good();
    record.notes[0] = Note::Began { from: 3 };
    finds(&record, Guarantee::Resumable);
}

#[test]
fn a_lost_event_in_the_middle_at_the_end_and_in_a_revision() {
    let mut record = good();
    record.notes.remove(place(&record, 5));
    finds(&record, Guarantee::Reliable);
    let mut record = good();
    record.notes.pop();
    finds(&record, Guarantee::Reliable);
    let mut record = good();
    let at = place(&record, 4);
    events_of(&mut record.notes[at]).pop();
    finds(&record, Guarantee::Reliable);
}

#[test]
fn an_event_that_never_happened() {
    let mut record = good();
    let at = place(&record, 8);
    record.notes.insert(at, answer(&[put("b", 3, 7, 2, Some(pair("b", 3, 3, 1)))]));
    finds(&record, Guarantee::Reliable);
}

#[test]
fn a_wrong_value() {
    let mut record = good();
    let at = place(&record, 9);
    events_of(&mut record.notes[at])[0].kv.as_mut().expect("a pair").value = "other".into();
    finds(&record, Guarantee::Reliable);
}

#[test]
fn a_put_that_falsely_made_its_key_or_falsely_did_not() {
    for (revision, create) in [(9, 9), (6, 2)] {
        let mut record = good();
        let at = place(&record, revision);
        let pair = events_of(&mut record.notes[at])[0].kv.as_mut().expect("a pair");
        pair.create_revision = create;
        finds(&record, Guarantee::IsCreate);
    }
}

#[test]
fn a_wrong_absent_or_unasked_pair_before() {
    let mut record = good();
    let at = place(&record, 9);
    events_of(&mut record.notes[at])[0].prev_kv = Some(pair("a", 2, 4, 2));
    finds(&record, Guarantee::PrevKv);
    events_of(&mut record.notes[at])[0].prev_kv = None;
    finds(&record, Guarantee::PrevKv);
    match &mut record.notes[at] {
        Note::Events { compacted, .. } => *compacted = 9,
        other => panic!("{other:?}"),
    }
    accepts(&record);
    let mut record = good();
    record.interest.prev_kv = false;
    finds(&record, Guarantee::PrevKv);
}

#[test]
fn compaction_excuses_what_is_before_it_and_nothing_else() {
    let mut record = good();
    let (at, compacted) = (place(&record, 5), Note::Compacted { revision: 6 });
    record.notes[at] = compacted;
    record.notes.insert(at + 1, Note::Began { from: 6 });
    accepts(&record);
    let mut lost = record.clone();
    lost.notes.remove(at + 2);
    finds(&lost, Guarantee::Resumable);
    record.notes[at] = Note::Compacted { revision: 5 };
    finds(&record, Guarantee::Reliable);
}

#[test]
fn a_witness_must_be_a_history() {
    type Defect = fn(&mut Vec<Event>);
    let defects: [(&str, Defect); 7] = [
        ("a lost revision", |h| drop(h.remove(1))),
        ("a revision twice", |h| h.insert(1, h[1].clone())),
        ("revisions in the wrong order", |h| h.swap(5, 6)),
        ("a wrong pair before", |h| h[4].prev_kv = Some(pair("a", 2, 2, 1))),
        ("a delete of nothing", |h| {
            let gone = delete(pair("q", 2, 2, 1), 10);
            h.push(Event { prev_kv: None, ..gone });
        }),
        ("a wrong version", |h| h[9].kv.as_mut().expect("a pair").version = 3),
        ("a wrong create revision", |h| h[5].kv.as_mut().expect("a pair").create_revision = 2),
    ];
    for (name, defect) in defects {
        let mut history = history();
        defect(&mut history);
        assert!(Witness::new(&history).is_err(), "not found: {name}");
    }
}

#[test]
fn writes_must_be_where_their_answers_say() {
    let witness = witness();
    let key = |k: &str| Bytes::from(k.to_owned());
    let issued: HashSet<Bytes> =
        history().iter().filter(|e| e.kind == PUT).map(|e| e.pair().value.clone()).collect();
    let done = (4, key("c"), key("c@4"));
    witness.check_writes(std::slice::from_ref(&done), &issued).expect("it is there");
    let elsewhere = (5, done.1.clone(), done.2.clone());
    witness.check_writes(&[elsewhere], &issued).expect_err("it is at another revision");
    let lost = (10, key("c"), key("c@10"));
    witness.check_writes(&[lost], &issued).expect_err("it is lost");
    let mut fewer = issued.clone();
    fewer.remove(&done.2);
    witness.check_writes(&[], &fewer).expect_err("nobody wrote it");
    let mut twice = history();
    twice.push(put("b", 10, 10, 1, None));
    twice.last_mut().expect("one").kv.as_mut().expect("a pair").value = "a@2".into();
    let witness = Witness::new(&twice).expect("a history");
    witness.check_writes(&[], &issued).expect_err("it was applied twice");
}
