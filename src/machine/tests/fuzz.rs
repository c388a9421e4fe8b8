//! Damaged entries and damaged stores: refused, or taken for what they then say, without a panic.

use super::*;
use crate::fuzz::{below, mutants, pick};

/// A member that has lived a little.
fn member(seed: u64) -> Member {
    let mut random = Random::new(seed);
    let mut member = Member::new();
    for _ in 0..150 {
        let at = Timestamp(member.at + random.below(800));
        member.apply_entry(&Entry { at, ..random_entry(&mut random) });
    }
    member
}

#[test]
fn a_damaged_entry_is_refused_or_applied() {
    let mut random = Random::new(1);
    let valid: Vec<Vec<u8>> =
        (0..400).map(|_| random_entry(&mut random).encode().to_vec()).collect();
    let mut applied = member(2);
    let mut understood = 0;
    mutants(&valid, |bytes, _| {
        let Ok(entry) = Entry::decode(1, bytes) else { return };
        assert_eq!(Entry::decode(1, &entry.encode()).unwrap(), entry);
        understood += 1;
        // Its bytes are behind a checksum and its command has been checked by who proposed it. So it
        // is applied to one that is thrown away should it come to a fault.
        let position = Position { term: 1, index: applied.index + 1 };
        let mut batch = Batch::default();
        match applied.machine.apply(position, &entry, &mut batch) {
            Ok(_) => {
                applied.index += 1;
                applied.engine.apply(batch).unwrap();
            }
            Err(_) => applied = member(2),
        }
    });
    assert!(understood > 0, "nothing got past the decoder");
}

#[test]
fn a_damaged_store_is_refused_or_loaded() {
    let mut pairs = Vec::new();
    for chunk in member(3).machine.image() {
        pairs.extend(chunk);
    }
    let valid: Vec<Vec<u8>> = pairs.iter().map(|(_, value)| value.clone()).collect();
    mutants(&valid, |bytes, chance| {
        let mut engine = Memory::new();
        let mut batch = Batch::default();
        let damaged = below(pairs.len(), chance);
        for (number, (key, value)) in pairs.iter().enumerate() {
            match number == damaged {
                // A value in its own place, in another's, or taken for a key.
                true if below(10, chance) > 0 => batch.put(key.clone(), bytes),
                true => batch.put(
                    pick(&pairs, chance).0[..1].iter().chain(bytes).copied().collect::<Vec<_>>(),
                    bytes,
                ),
                false => batch.put(key.clone(), value.clone()),
            }
        }
        engine.apply(batch).unwrap();
        if let Ok(machine) = Machine::load(&engine) {
            machine.store().view().range(&Range::all(everything())).unwrap();
        }
    });
}
