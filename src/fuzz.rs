//! Hostile bytes, for the tests of whatever reads bytes that somebody else wrote.
//!
//! Random bytes hardly get past the first length they claim to have. So a *mutant* begins as valid
//! bytes, and a few things are done to it that tend to confuse readers. Whoever reads it may refuse
//! it or make sense of it, but may not panic.
//!
//! `HOLDFAST_FUZZ_RUNS` says how many mutants each test makes, `HOLDFAST_FUZZ_SEED` from where on. A
//! failure prints the mutant's own seed, with which it comes first, and its bytes.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::clock::{Entropy, SeededEntropy, SystemEntropy};

const RUNS: u64 = 4_000;

/// Numbers at which lengths, tags and signs turn over, in protobuf and in bincode.
const EDGES: [u8; 12] = [0, 1, 2, 0x7f, 0x80, 0x81, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff];

/// Makes mutants of `valid` and hands each to `read`, with chance of its own.
pub fn mutants(valid: &[Vec<u8>], mut read: impl FnMut(&[u8], &dyn Entropy)) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let first = number("HOLDFAST_FUZZ_SEED").unwrap_or_else(|| SystemEntropy.random_u64());
    for seed in (0..number("HOLDFAST_FUZZ_RUNS").unwrap_or(RUNS)).map(|n| first.wrapping_add(n)) {
        let chance = SeededEntropy::new(seed);
        let mut bytes = pick(valid, &chance).clone();
        for _ in 0..=below(5, &chance) {
            mutate(&mut bytes, valid, &chance);
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| read(&bytes, &chance))) {
            eprintln!("HOLDFAST_FUZZ_SEED={seed}: {}", bytes.escape_ascii());
            resume_unwind(panic);
        }
    }
}

pub fn below(end: usize, chance: &dyn Entropy) -> usize {
    (chance.random_u64() % end.max(1) as u64) as usize
}

pub fn pick<'a, T>(from: &'a [T], chance: &dyn Entropy) -> &'a T {
    &from[below(from.len(), chance)]
}

fn mutate(bytes: &mut Vec<u8>, others: &[Vec<u8>], chance: &dyn Entropy) {
    let at = below(bytes.len() + 1, chance);
    let end = (at + 1 + below(8, chance)).min(bytes.len());
    match below(8, chance) {
        0 if at < bytes.len() => bytes[at] ^= 1 << below(8, chance),
        1 if at < bytes.len() => bytes[at] = *pick(&EDGES, chance),
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at.min(end)..end)),
        4 => bytes.insert(at, *pick(&EDGES, chance)),
        // The longest number of either format, and an end that is none.
        5 => drop(bytes.splice(at.min(end)..end, [0xff; 9])),
        6 => {
            let again = bytes[at.min(end)..end].repeat(1 + below(40, chance));
            drop(bytes.splice(at..at, again));
        }
        _ => {
            let other = pick(others, chance);
            let from = below(other.len() + 1, chance);
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
    }
}

#[test]
fn the_same_seed_makes_the_same_mutant() {
    let valid = [b"one valid text".to_vec(), b"and another one".to_vec()];
    let made = |seed| {
        let chance = SeededEntropy::new(seed);
        let mut bytes = pick(&valid, &chance).clone();
        (0..5).for_each(|_| mutate(&mut bytes, &valid, &chance));
        bytes
    };
    assert_eq!(made(7), made(7));
    let different: std::collections::BTreeSet<_> = (0..100).map(made).collect();
    assert!(different.len() > 90, "{}", different.len());
}
