//! Records in which nothing is wrong, and what is made of them when something is.

use std::time::Duration;

use holdfast_client_tests::history::{Answered, Asked, Operation};
use holdfast_client_tests::moment;

use super::*;
use crate::witness::Change;

const KEY: &str = "load/k";

fn at(millis: u64) -> Instant {
    moment::at(millis * 1000)
}

fn deed(millis: u64, what: What) -> Deed {
    Deed { at: at(millis), what }
}

/// A run of `register` with one kill, 100 puts a second before it, and nothing wrong.
fn good() -> (Vec<Line>, Vec<Deed>) {
    let setup = Setup {
        workload: Workload::Register,
        fault: Fault::Kill,
        seconds: 10,
        members: 3,
        seed: 7,
        least_rate: 50.0,
        treat_serializable_as_linearizable: false,
        rate: None,
        retention: None,
        binary: String::new(),
        version: String::new(),
    };
    let mut lines = Vec::new();
    for n in 0..500 {
        let (began, revision) = (n * 10, i64::try_from(n).expect("few") + 2);
        let value = format!("v{n}");
        let asked = Asked::Put { key: KEY.to_owned(), value: value.clone() };
        let answered = Answered::Done { revision };
        let ended = at(began + 5);
        let operation = Operation { asked, answered, began: at(began), ended };
        lines.push(Line::Operation { member: 0, operation });
        let change = Change {
            key: KEY.to_owned(),
            value: Some(value),
            create_revision: 2,
            version: revision - 1,
            lease: 0,
        };
        let seen = vec![began * 1000 + 4000; 3];
        lines.push(Line::Revision(Told { revision, changes: vec![change], seen }));
    }
    let hashes = vec![Some((1, -1)), Some((1, -1)), Some((1, -1))];
    let deeds = vec![
        deed(0, What::Setup(setup)),
        deed(0, What::Quiet),
        deed(5000, What::Begins { fault: Fault::Kill, leader: 0 }),
        deed(5001, What::Began { targets: vec![0], how: String::new() }),
        deed(6000, What::Meanwhile { serving: 2, should: 2, limit_ms: 10_000 }),
        deed(7000, What::TookHold { by: String::new() }),
        deed(7001, What::Healed { how: String::new() }),
        deed(8000, What::Serving),
        deed(8100, What::Hashes { revision: 3, hashes }),
        deed(10_000, What::Over),
    ];
    (lines, deeds)
}

fn verdict(lines: &[Line], deeds: &[Deed]) -> Verdict {
    judge(lines, deeds, &[]).expect("it is a record").verdict
}

fn read(began: u64, revision: i64, mod_revision: i64, value: &str) -> Line {
    let asked = Asked::Read { key: KEY.to_owned() };
    let answered = Answered::Found { revision, mod_revision, value: value.to_owned() };
    let ended = at(began) + Duration::from_millis(1);
    Line::Operation { member: 1, operation: Operation { asked, answered, began: at(began), ended } }
}

#[test]
fn a_good_record_passes_and_is_the_same_when_it_is_read_back() {
    let (lines, deeds) = good();
    let judgement = judge(&lines, &deeds, &[]).expect("it is a record");
    assert_eq!((judgement.verdict, judgement.faults), (Verdict::Passed, 1), "{judgement:?}");
    assert!((judgement.rate - 100.0).abs() < 1.0, "{judgement:?}");
    let dir = std::env::temp_dir().join(format!("holdfast-faults-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let (history, nemesis) = (dir.join("h"), dir.join("n"));
    crate::record::write(&history, &lines).expect("written");
    crate::record::write(&nemesis, &deeds).expect("written");
    let read: (Vec<Line>, Vec<Deed>) = (
        crate::record::read(&history).expect("read"),
        crate::record::read(&nemesis).expect("read"),
    );
    std::fs::remove_dir_all(&dir).expect("removed");
    assert_eq!(judge(&read.0, &read.1, &[]).expect("a record"), judgement);
}

#[test]
fn what_clients_must_not_see_is_a_violation() {
    let (good, deeds) = good();
    let with = |line| [&good[..], &[line]].concat();
    assert_eq!(verdict(&with(read(5000, 501, 501, "v499")), &deeds), Verdict::Passed);
    // Stale; of a value that never was; a client that gave up; a member with another history.
    assert_eq!(verdict(&with(read(5000, 400, 400, "v398")), &deeds), Verdict::Violated);
    assert_eq!(verdict(&with(read(5000, 501, 501, "other")), &deeds), Verdict::Violated);
    let failed = Line::Failed { what: "no answer".to_owned() };
    assert_eq!(verdict(&with(failed), &deeds), Verdict::Violated);
    let told = Told { revision: 600, changes: vec![], seen: vec![0] };
    assert_eq!(verdict(&with(Line::Differs { member: 2, told }), &deeds), Verdict::Violated);
}

#[test]
fn what_the_cluster_must_not_do_is_a_violation() {
    let (lines, good) = good();
    let hashes = vec![Some((1, -1)), Some((2, -1)), None];
    for what in [
        What::Meanwhile { serving: 1, should: 2, limit_ms: 10_000 },
        What::NotServing { members: vec![1], limit_ms: 20_000 },
        What::Hashes { revision: 3, hashes },
    ] {
        let deeds = [&good[..9], &[deed(9000, what)], &good[9..]].concat();
        assert_eq!(verdict(&lines, &deeds), Verdict::Violated);
    }
}

#[test]
fn what_was_no_test_is_invalid_and_never_passed() {
    let (lines, good) = good();
    let without = |at: usize| [&good[..at], &good[at + 1..]].concat();
    // No fault took hold; the hashes were never compared; it did not come to its end.
    assert_eq!(verdict(&lines, &without(5)), Verdict::Invalid);
    assert_eq!(verdict(&lines, &without(8)), Verdict::Invalid);
    assert_eq!(verdict(&lines, &without(9)), Verdict::Invalid);
    // A fault that did not take hold beside one that did.
    let weak = deed(9000, What::DidNotTakeHold { why: String::new() });
    assert_eq!(verdict(&lines, &[&good[..9], &[weak], &good[9..]].concat()), Verdict::Invalid);
    // A quarter of the load.
    let few: Vec<Line> = lines
        .iter()
        .enumerate()
        .filter(|(n, line)| line.span().is_none() || n % 8 == 0)
        .map(|(_, line)| line.clone())
        .collect();
    let judgement = judge(&few, &good, &[]).expect("a record");
    assert!(judgement.invalid.iter().any(|why| why.contains("a second")), "{judgement:?}");
}

/// Samples of all members, every 10 s for the time of a long run, descriptors as the function says.
fn samples(descriptors: impl Fn(u64) -> u64) -> Vec<Sample> {
    let sample = |n: u64, member| Sample {
        at: at(n * 10_000),
        member,
        memory_bytes: 50 << 20,
        descriptors: descriptors(n),
        disk_bytes: 50 << 20,
    };
    (0..FLAT_SECONDS / 10).flat_map(|n| (0..3).map(move |member| sample(n, member))).collect()
}

#[test]
fn a_long_run_that_compacts_its_history_must_not_grow() {
    let (lines, mut deeds) = good();
    // A run of this length has more than one fault.
    deeds.insert(9, deed(9000, What::TookHold { by: String::new() }));
    let last = deeds.len() - 1;
    deeds[last] = deed(FLAT_SECONDS * 1000, What::Over);
    let (flat, growing) = (samples(|_| 40), samples(|n| 40 + 2 * n));
    let mut setup = |seconds, retention| {
        let What::Setup(setup) = &mut deeds[0].what else { panic!("the first line") };
        (setup.seconds, setup.retention) = (seconds, retention);
        deeds.clone()
    };
    let verdict =
        |deeds: &[Deed], samples: &[Sample]| judge(&lines, deeds, samples).expect("it is a record");
    let long = setup(FLAT_SECONDS, Some(10_000));
    let passed = verdict(&long, &flat);
    assert_eq!(passed.verdict, Verdict::Passed, "{passed:?}");
    assert_eq!(passed.resources[2].descriptors.last_quarter, Some(40));
    let violated = verdict(&long, &growing);
    assert_eq!(violated.verdict, Verdict::Violated);
    assert!(violated.violations.iter().all(|v| v.starts_with("growth: ")), "{violated:?}");
    // Nobody looked; a history that is kept takes room; a short run tells nothing.
    assert_eq!(verdict(&long, &[]).verdict, Verdict::Invalid);
    assert_eq!(verdict(&setup(FLAT_SECONDS, None), &growing).verdict, Verdict::Passed);
    assert_eq!(verdict(&setup(600, Some(10_000)), &growing).verdict, Verdict::Passed);
}
