//! The packed engine against a plain one, and cut short wherever it writes.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::storage::Memory;

type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

fn pairs(engine: &dyn Engine, prefix: &[u8]) -> Pairs {
    let mut found = Vec::new();
    let mut collect = |key: &[u8], value: &[u8]| {
        found.push((key.to_vec(), value.to_vec()));
        true
    };
    engine.scan(prefix, &mut collect).unwrap();
    found
}

fn key(main: i64) -> Vec<u8> {
    record_key(Revision::new(main, 0)).into()
}

/// A batch of the next few records and other pairs; some of `alive` go, the oldest first.
fn random_batch(random: &mut StdRng, next: &mut i64, alive: &mut Vec<Vec<u8>>) -> Batch {
    let mut batch = Batch::default();
    for _ in 0..random.random_range(0..60) {
        match random.random_range(0..10) {
            0 => batch.put([b'l', random.random_range(0..9)], *b"lease"),
            1 => batch.remove([b'l', random.random_range(0..9)]),
            2 => batch.put([b'x', random.random_range(0..9)], *b"retired"),
            kind => {
                *next += random.random_range(1..4);
                let revision = Revision::new(*next, random.random_range(0..2) * 7);
                let record = record_key(revision).to_vec();
                let longest = if kind == 3 { 20_000 } else { 400 };
                batch.put(record.clone(), vec![*next as u8; random.random_range(0..longest)]);
                alive.push(record);
            }
        }
    }
    if random.random_bool(0.4) {
        let percent = random.random_range(0..100);
        alive.retain(|key| {
            let stays = random.random_range(0..100) >= percent || batch.garbage.len() > 500;
            if !stays {
                batch.garbage.push(key.clone());
            }
            stays
        });
    }
    batch
}

#[test]
fn it_holds_what_a_plain_engine_holds_also_after_reopening() {
    for seed in 1..=6 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut plain, below) = (Memory::new(), Memory::new());
        let disk = below.disk();
        let mut packed = Packed::new(Box::new(below));
        let (mut next, mut alive) = (1, Vec::new());
        for round in 0..120 {
            let batch = random_batch(&mut random, &mut next, &mut alive);
            plain.apply(batch.clone()).unwrap();
            packed.apply(batch).unwrap();
            if random.random_bool(0.2) {
                packed.flush().unwrap();
                packed = Packed::new(Box::new(Memory::open(&disk)));
            }
            if round % 10 == 0 {
                for prefix in [&b""[..], b"l", b"r", b"r\0\0\0\0\0\0\x01", b"x", b"z"] {
                    assert_eq!(pairs(&packed, prefix), pairs(&plain, prefix), "seed {seed}");
                }
            }
            let some = key(random.random_range(1..=next));
            assert_eq!(packed.get(&some).unwrap(), plain.get(&some).unwrap(), "seed {seed}");
        }
    }
}

#[test]
fn a_scan_ends_when_it_is_told_to() {
    let mut packed = Packed::new(Box::new(Memory::new()));
    let mut batch = Batch::default();
    (1..100).for_each(|main| batch.put(key(main), vec![0; 900]));
    batch.put(*b"x", *b"");
    packed.apply(batch).unwrap();
    for prefix in [&b""[..], b"r"] {
        let mut seen = 0;
        packed
            .scan(prefix, &mut |_, _| {
                seen += 1;
                seen < 20
            })
            .unwrap();
        assert_eq!(seen, 20);
    }
}

#[test]
fn many_records_are_few_pairs_and_what_is_gone_takes_no_room() {
    let below = Memory::new();
    let disk = below.disk();
    let mut packed = Packed::new(Box::new(below));
    for from in 0..100 {
        let mut batch = Batch::default();
        (0..30).for_each(|at| batch.put(key(1 + from * 30 + at), vec![at as u8; 280]));
        packed.apply(batch).unwrap();
    }
    let stored = |packed: &mut Packed| {
        packed.flush().unwrap();
        pairs(&Memory::open(&disk), b"")
    };
    let blocks = stored(&mut packed);
    assert!(blocks.len() <= 105, "{}", blocks.len());
    assert!(blocks.iter().all(|(_, value)| value.len() <= blocks::BLOCK_BYTES));

    let mut packed = Packed::new(Box::new(Memory::open(&disk)));
    let garbage = (1..=3_000).filter(|main| main % 10 != 0).map(key).collect();
    packed.apply(Batch { garbage, ..Batch::default() }).unwrap();
    let left = pairs(&packed, b"r");
    assert_eq!(left.len(), 300);
    let stored_bytes: usize = stored(&mut packed).iter().map(|(_, value)| value.len()).sum();
    assert!(stored_bytes < 300 * 290 + 3_000, "{stored_bytes}");

    let mut packed = Packed::new(Box::new(Memory::open(&disk)));
    let garbage = left.into_iter().map(|(key, _)| key).collect();
    packed.apply(Batch { garbage, ..Batch::default() }).unwrap();
    assert_eq!(stored(&mut packed), []);
}

/// An engine that takes only so many batches, and of the last one only the changes.
struct Stops {
    memory: Memory,
    batches: usize,
}

impl Engine for Stops {
    fn apply(&mut self, batch: Batch) -> io::Result<()> {
        if self.batches == 0 {
            return Err(io::Error::other("the power is gone"));
        }
        self.batches -= 1;
        let garbage = if self.batches == 0 { Vec::new() } else { batch.garbage };
        self.memory.apply(Batch { garbage, ..batch })?;
        self.memory.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.memory.flush()
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.memory.get(key)
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> io::Result<()> {
        self.memory.scan(prefix, visit)
    }

    fn size_bytes(&self) -> u64 {
        0
    }
}

#[test]
fn wherever_it_is_cut_short_no_record_outlives_one_that_was_to_go_after_it() {
    for seed in 1..=3 {
        for batches in 1..60 {
            let mut random = StdRng::seed_from_u64(seed);
            let memory = Memory::new();
            let disk = memory.disk();
            let mut packed = Packed::new(Box::new(Stops { memory, batches }));
            let (mut next, mut alive) = (1, Vec::new());
            let (mut before, mut garbage) = (Pairs::new(), Vec::new());
            for _ in 0..40 {
                let batch = random_batch(&mut random, &mut next, &mut alive);
                let was_there = |key: &Vec<u8>| before.iter().any(|(found, _)| found == key);
                garbage = batch.garbage.iter().filter(|key| was_there(key)).cloned().collect();
                if packed.apply(batch).is_err() {
                    break;
                }
                before = pairs(&packed, b"r");
            }
            let found = pairs(&Packed::new(Box::new(Memory::open(&disk))), b"r");
            let is_there = |key: &Vec<u8>| found.iter().any(|(found, _)| found == key);
            // All of the last batch came or nothing, and of what was to go a beginning is gone.
            let first_left = garbage.iter().position(is_there).unwrap_or(garbage.len());
            assert!(garbage[first_left..].iter().all(is_there), "seed {seed}, {batches}");
            let lost = before.iter().find(|(key, _)| !garbage.contains(key) && !is_there(key));
            assert_eq!(lost, None, "seed {seed}, {batches}");
        }
    }
}

#[test]
fn a_record_that_comes_late_and_keys_of_its_own_are_refused() {
    let mut packed = Packed::new(Box::new(Memory::new()));
    let mut put = |key: Vec<u8>| {
        let mut batch = Batch::default();
        batch.put(key, *b"");
        packed.apply(batch).map_err(|error| error.kind())
    };
    put(key(5)).unwrap();
    for wrong in [key(5), key(4), b"r".to_vec(), b"z1".to_vec(), b"y".to_vec()] {
        assert_eq!(put(wrong), Err(io::ErrorKind::InvalidInput));
    }
    put(key(6)).unwrap();
}
