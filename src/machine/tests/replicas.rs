//! Members that apply the same entries agree, whatever else happens to each of them.

use super::model::sharpen;
use super::*;
use crate::storage::Change;

/// What happens to a member between entries.
fn disturb(random: &mut Random, member: &mut Member) {
    match random.below(30) {
        0 => member.restart(),
        1 => {
            let image = member.machine.image();
            member.install(image);
        }
        2..7 => {
            member.scrub(random.below(12) as usize);
        }
        7 => member.scrub_all(),
        _ => {}
    }
}

#[test]
fn replicas_agree_whatever_happens_between_entries() {
    for seed in 0..30 {
        let mut random = Random::new(seed);
        let mut members: Vec<_> = (0..4).map(|_| Member::new()).collect();
        let mut at = 0;
        for step in 0..200 {
            at += random.below(800);
            let mut entry = random_entry(&mut random);
            entry.at = Timestamp(at);
            sharpen(&mut random, &mut entry.command, &members[0].machine);
            let entry = Entry::decode(step, &entry.encode()).unwrap();
            let outcomes: Vec<_> =
                members.iter_mut().map(|it| format!("{:?}", it.apply_entry(&entry))).collect();
            assert!(
                outcomes.windows(2).all(|pair| pair[0] == pair[1]),
                "seed {seed}: {outcomes:#?}"
            );
            // The first member lives undisturbed.
            for member in &mut members[1..] {
                disturb(&mut random, member);
            }
            let hashes: Vec<_> = members.iter().map(|it| it.machine.hash()).collect();
            assert!(hashes.windows(2).all(|pair| pair[0] == pair[1]), "seed {seed}, step {step}");
            let digests: Vec<_> = members.iter().map(|it| it.machine.digest()).collect();
            assert!(digests[0].is_some() && digests.iter().all(|it| *it == digests[0]), "{seed}");
            for member in &members {
                let (counted, recounted) =
                    (member.machine.used_bytes(), member.machine.recount_bytes());
                assert_eq!(counted, recounted, "seed {seed}, step {step}: {entry:?}");
            }
        }
        // Clean members hold the same pairs, byte for byte.
        let mut contents: Vec<_> = members.iter_mut().map(clean_contents).collect();
        contents.dedup();
        assert_eq!(contents.len(), 1, "seed {seed}");
    }
}

fn clean_contents(member: &mut Member) -> Vec<Pair> {
    member.scrub_all();
    let mut pairs = Vec::new();
    let mut collect = |key: &[u8], value: &[u8]| {
        pairs.push((key.to_vec(), value.to_vec()));
        true
    };
    member.engine.scan(&[], &mut collect).unwrap();
    pairs
}

#[test]
fn an_image_keeps_its_state_while_the_member_goes_on() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let mut member = Member::new();
        for _ in 0..150 {
            member.apply(random_command(&mut random));
        }
        member.clear_alarms();
        let big = Put { value: Some(vec![7; 300_000].into()), ..put("big", "") };
        member.ok(Command::Put(big.clone()));
        member.ok(Command::Put(put("small", "1")));
        let hash = member.machine.hash();
        let mut image = member.machine.image();
        assert_eq!(image.revision(), member.machine.store().revision());
        let mut chunks = vec![image.next().unwrap()];
        let stored = member.stored_records();
        for _ in 0..50 {
            member.apply(random_command(&mut random));
        }
        member.clear_alarms();
        let revision = member.machine.store().revision();
        member.apply(Command::Compact { revision });
        assert!(member.scrub(1_000), "an image holds removal up, and the call says so");
        assert!(member.stored_records() >= stored);
        chunks.extend(image.by_ref());
        assert!(chunks.len() > 1);

        let mut engine = Memory::new();
        for (key, value) in chunks.into_iter().flatten() {
            let mut batch = Batch::default();
            batch.put(key, value);
            engine.apply(batch).unwrap();
        }
        assert_eq!(Machine::load(&engine).unwrap().hash(), hash, "seed {seed}");
        drop(image);
        assert!(!member.scrub(1_000_000));
    }
}

#[test]
fn garbage_that_a_crash_left_behind_stays_invisible_and_goes_later() {
    for seed in 0..30 {
        let mut random = Random::new(seed);
        let mut member = Member::new();
        let mut batch = Batch::default();
        for _ in 0..120 {
            let mut command = random_command(&mut random);
            sharpen(&mut random, &mut command, &member.machine);
            member.apply(command);
        }
        member.clear_alarms();
        let revision = member.machine.store().revision();
        member.apply(Command::Compact { revision });
        member.machine.scrub(usize::MAX, &mut batch);
        let hash = member.machine.hash();
        let kept = random.below(batch.garbage.len() as u64 + 1) as usize;
        batch.garbage.truncate(kept);
        member.engine.apply(batch).unwrap();

        let pairs = member.pairs();
        member.restart();
        assert_eq!((member.machine.hash(), member.pairs()), (hash, pairs.clone()), "seed {seed}");
        member.scrub_all();
        let live = member.view().range(&Range::all(everything())).unwrap().count;
        let at_compacted = member.view().changes(revision, &everything(), 1_000_000).unwrap();
        let deletes =
            at_compacted.events.iter().filter(|event| event.record.is_tombstone()).count();
        assert_eq!(member.stored_records(), live as usize + deletes, "seed {seed}");
        assert_eq!((member.machine.hash(), member.pairs()), (hash, pairs), "seed {seed}");
    }
}

#[test]
fn batches_of_many_entries_are_the_state_after_the_last() {
    let mut random = Random::new(4);
    let mut member = Member::new();
    let mut engine = Memory::new();
    for round in 0..40 {
        let mut batch = Batch::default();
        for _ in 0..10 {
            let entry = random_entry(&mut random);
            member.index += 1;
            let position = Position { term: 1, index: member.index };
            member.machine.apply(position, &entry, &mut batch).unwrap();
        }
        member.machine.scrub(25, &mut batch);
        engine.apply(batch).unwrap();
        let loaded = Machine::load(&engine).unwrap();
        assert_eq!(loaded.hash(), member.machine.hash(), "round {round}");
    }
}

#[test]
fn a_store_that_contradicts_itself_is_refused() {
    let mut member = Member::new();
    member.ok(grant(1, 10));
    member.ok(Command::Put(put_on("k", "v", 1)));
    let refused = |change: Change| {
        let mut engine = Memory::new();
        for chunk in member.machine.image() {
            for (key, value) in chunk {
                let mut batch = Batch::default();
                batch.put(key, value);
                engine.apply(batch).unwrap();
            }
        }
        Machine::load(&engine).unwrap();
        engine.apply(Batch { changes: vec![change], ..Batch::default() }).unwrap();
        assert!(matches!(Machine::load(&engine), Err(Fault::Corrupt { .. })));
    };
    let record = schema::record_key(crate::types::Revision::first_of(2)).to_vec();
    let beyond = schema::record_key(crate::types::Revision::first_of(3)).to_vec();
    refused(Change::Remove { key: schema::META_KEY.to_vec() });
    refused(Change::Remove { key: schema::lease_key(LeaseId(1)).to_vec() });
    refused(Change::Put { key: schema::META_KEY.to_vec(), value: vec![9, 9] });
    refused(Change::Put { key: record, value: vec![] });
    refused(Change::Put { key: beyond, value: vec![1, 0, 0, 0, 0, 0] });
    refused(Change::Put { key: vec![schema::RECORD_PREFIX, 1], value: vec![1, 0, 0, 0, 0, 0] });
}
