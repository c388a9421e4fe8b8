//! Torn writes are cut off, damage is refused.

use super::super::record;
use super::*;
use crate::vfs::Survival;

/// A log of one segment, left by a power cut after the last of these entries was acknowledged.
fn cut_after(count: u64) -> MemVfs {
    let vfs = MemVfs::default();
    let log = open(&vfs).unwrap();
    for index in 0..count {
        append(&log, vec![entry(1, index)]);
    }
    vfs.after_power_cut(Survival::Nothing)
}

fn refusal(vfs: &MemVfs) -> String {
    let Err(error) = open(vfs) else { panic!("a damaged log was opened") };
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    error.to_string()
}

#[test]
fn a_last_record_torn_at_any_byte_is_cut_off() {
    let vfs = cut_after(3);
    let path = &segment_paths(&vfs)[0];
    let (start, (length, _)) = records(&vfs, path).pop_last().unwrap();
    for cut in start..start + length {
        type Tear = fn(&mut Vec<u8>, usize, usize);
        let tears: [Tear; 2] = [
            |bytes, cut, end| bytes[cut..end].fill(0),
            |bytes, cut, end| bytes[cut..end].iter_mut().for_each(|byte| *byte ^= 0x5a),
        ];
        for tear in tears {
            let vfs = cut_after(3);
            vfs.tamper(path, |bytes| tear(bytes, cut, start + length));
            let log = open(&vfs).unwrap();
            assert_eq!(wait(ask(&log)).unwrap().entries, entries(1, 0..=1), "cut at {cut}");
            append(&log, vec![entry(2, 2)]);
            let again = open(&vfs.after_power_cut(Survival::Nothing)).unwrap();
            let expected = [entries(1, 0..=1), entries(2, 2..=2)].concat();
            assert_eq!(wait(ask(&again)).unwrap().entries, expected, "cut at {cut}");
        }
    }
}

#[test]
fn a_flipped_bit_before_the_last_sync_is_refused() {
    let vfs = cut_after(4);
    let path = &segment_paths(&vfs)[0];
    // The last batch is the note about the one before it, and an entry.
    let (last, _) = records(&vfs, path).into_iter().nth_back(1).unwrap();
    for at in 0..last {
        let vfs = cut_after(4);
        vfs.tamper(path, |bytes| bytes[at] ^= 1 << (at % 8));
        let message = refusal(&vfs);
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        // Another version is the exception: there the message says which release to take.
        let version = (8..12).contains(&at);
        assert_eq!(message.contains("offset"), !version, "byte {at}: {message}");
        assert_eq!(message.contains("member add"), !version, "byte {at}: {message}");
    }
}

#[test]
fn after_a_proper_close_every_flipped_bit_is_refused() {
    let log_of_one_batch = || {
        let vfs = MemVfs::default();
        let log = open(&vfs).unwrap();
        append(&log, entries(1, 0..=5));
        log.close().unwrap();
        vfs
    };
    let vfs = log_of_one_batch();
    let path = &segment_paths(&vfs)[0];
    let (seal, (_, record)) = records(&vfs, path).pop_last().unwrap();
    assert_eq!(record, Record::Seal);
    for at in HEADER_BYTES..seal {
        let vfs = log_of_one_batch();
        vfs.tamper(path, |bytes| bytes[at] ^= 0x10);
        refusal(&vfs);
    }
}

#[test]
fn a_batch_whose_first_sector_never_reached_the_disk_is_a_torn_write() {
    let vfs = MemVfs::default();
    let log = open(&vfs).unwrap();
    append(&log, vec![entry(1, 0)]);
    append(&log, entries(1, 1..=6));
    let left = vfs.after_power_cut(Survival::Nothing);
    let path = &segment_paths(&left)[0];
    let found = records(&left, path);
    let is_first = |record: &Record| matches!(record, Record::Entry(e) if e.log_id.index == 1);
    let (at, (length, _)) = found.iter().find(|(_, (_, record))| is_first(record)).unwrap();
    left.tamper(path, |bytes| bytes[*at..at + length].fill(0));
    // Good records follow, but nothing says that the batch was ever durable.
    let log = open(&left).unwrap();
    assert_eq!(wait(ask(&log)).unwrap().entries, entries(1, 0..=0));
    // With the seal before it, exactly as long as the record that was lost: the good one behind
    // that must not be taken for its successor.
    append(&log, vec![entry_of(2, 1, 40 - record::HEADER_BYTES)]);
    let again = open(&left.after_power_cut(Survival::Nothing)).unwrap();
    assert_eq!(ids(&wait(ask(&again)).unwrap().entries), [(1, 0), (2, 1)]);
}

fn log_of_several_segments() -> MemVfs {
    let vfs = MemVfs::default();
    let log = open(&vfs).unwrap();
    for index in 0..40 {
        append(&log, vec![entry(1, index)]);
    }
    log.close().unwrap();
    assert!(segment_paths(&vfs).len() > 3);
    vfs
}

#[test]
fn damage_in_any_segment_but_the_last_is_refused() {
    let path = segment_paths(&log_of_several_segments())[1].clone();
    let vfs = log_of_several_segments();
    let (last, (length, _)) = records(&vfs, &path).pop_last().unwrap();
    for at in [last, last + length - 1] {
        let vfs = log_of_several_segments();
        vfs.tamper(&path, |bytes| bytes[at] ^= 1);
        assert!(refusal(&vfs).contains(path.to_str().unwrap()));
    }
    // A record that vanishes without a trace is missed by the segment after it.
    vfs.tamper(&path, |bytes| bytes[last..last + length].fill(0));
    refusal(&vfs);
}

#[test]
fn a_missing_segment_is_refused() {
    for (at, what) in [(0, "neither purged nor in any file"), (1, "is missing")] {
        let vfs = log_of_several_segments();
        vfs.remove_file(&segment_paths(&vfs)[at]).unwrap();
        let message = refusal(&vfs);
        assert!(message.contains(what), "{message}");
    }
}

#[test]
fn a_segment_of_a_later_format_is_refused() {
    let vfs = log_of_several_segments();
    let path = segment_paths(&vfs).pop().unwrap();
    vfs.tamper(&path, |bytes| bytes[8] = 3);
    let message = refusal(&vfs);
    assert!(message.contains("format version 3") && message.contains("later one"), "{message}");
}

#[test]
fn a_segment_whose_creation_was_interrupted_is_made_again() {
    let torn_header = [b"HOLDFLOG".to_vec(), vec![0; 1016]].concat();
    for content in [Vec::new(), vec![0; 1024], torn_header] {
        let vfs = log_of_several_segments();
        let paths = segment_paths(&vfs);
        let id = SegmentId { sequence: paths.len() as u64 + 1, first_index: 40 };
        let draft = Path::new(DIR).join(id.draft_name());
        vfs.create(&draft).unwrap().write_at(0, &content).unwrap();
        let log = open(&vfs).unwrap();
        assert!(!vfs.exists(&draft).unwrap());
        append(&log, entries(1, 40..=80));
        assert_eq!(wait(ask(&log)).unwrap().entries, entries(1, 0..=80));
        assert!(segment_paths(&vfs).len() > paths.len());
    }
}

#[test]
fn a_segment_that_was_cut_at_any_byte_is_refused() {
    let vfs = cut_after(3);
    let path = &segment_paths(&vfs)[0];
    for length in 0..vfs.read(path).unwrap().len() {
        let vfs = cut_after(3);
        vfs.tamper(path, |bytes| bytes.truncate(length));
        let message = refusal(&vfs);
        assert!(message.contains(path.to_str().unwrap()), "{message}");
    }
}

#[test]
fn after_a_kill_every_flipped_bit_is_refused_even_in_the_last_batch() {
    let killed = || {
        let vfs = MemVfs::default();
        let log = open(&vfs).unwrap();
        append(&log, vec![entry(1, 0)]);
        append(&log, entries(1, 1..=3));
        vfs.after_kill()
    };
    let vfs = killed();
    let path = &segment_paths(&vfs)[0];
    let (note, (_, record)) = records(&vfs, path).pop_last().unwrap();
    assert_eq!(record, Record::Seal);
    for at in HEADER_BYTES..note {
        let vfs = killed();
        vfs.tamper(path, |bytes| bytes[at] ^= 1 << (at % 8));
        refusal(&vfs);
    }
}

#[test]
fn a_vote_that_was_confirmed_is_never_taken_for_a_torn_write() {
    let voted = || {
        let vfs = MemVfs::default();
        let mut log = open(&vfs).unwrap();
        append(&log, vec![entry(1, 0)]);
        wait(log.save_vote(&Vote::new(2, 3))).unwrap();
        vfs.after_power_cut(Survival::Nothing)
    };
    let vfs = voted();
    let path = &segment_paths(&vfs)[0];
    let found = records(&vfs, path);
    let is_vote = |record: &Record| matches!(record, Record::Vote(_));
    let (at, (length, _)) = found.iter().find(|(_, (_, record))| is_vote(record)).unwrap();
    for byte in *at..at + length {
        let vfs = voted();
        vfs.tamper(path, |bytes| bytes[byte] ^= 1 << (byte % 8));
        refusal(&vfs);
    }
}

#[test]
fn other_files_in_the_directory_are_left_alone() {
    let vfs = log_of_several_segments();
    let other = Path::new(DIR).join("lost+found");
    vfs.create(&other).unwrap();
    open(&vfs).unwrap();
    assert!(vfs.exists(&other).unwrap());
}
