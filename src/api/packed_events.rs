//! Events encoded once for all who watch them.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use super::convert::key_value;
use crate::machine::Event;
use crate::pb::{mvccpb, pack};
use crate::types::Revision;

/// How many events are kept: what the streams of a member have not sent yet is mostly of the last
/// few revisions.
const EVENTS_KEPT: usize = 256;

/// Larger events are encoded for each stream. So at most 1 MiB is kept.
const LARGEST_KEPT_BYTES: usize = 4096;

/// The newest events in the form they travel in. One for a whole member.
pub struct PackedEvents {
    /// An event has one place only, which the next one that belongs there takes.
    kept: Mutex<Vec<Option<Kept>>>,
}

struct Kept {
    revision: Revision,
    /// Some watches show the pair before, and others do not.
    with_prev: bool,
    packed: Bytes,
}

impl Default for PackedEvents {
    fn default() -> PackedEvents {
        PackedEvents { kept: Mutex::new((0..EVENTS_KEPT).map(|_| None).collect()) }
    }
}

impl PackedEvents {
    /// Each of `events` as a field of an answer.
    pub fn pack(&self, events: &[Event]) -> Vec<Bytes> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().map(|event| pack_one(&mut kept, event)).collect()
    }
}

fn pack_one(kept: &mut [Option<Kept>], event: &Event) -> Bytes {
    let (revision, with_prev) = (event.record.mod_revision(), event.prev.is_some());
    let place = (revision.main as usize).wrapping_add(revision.sub as usize) % EVENTS_KEPT;
    if let Some(kept) = &kept[place]
        && kept.revision == revision
        && kept.with_prev == with_prev
    {
        return kept.packed.clone();
    }
    let packed = pack(&convert(event));
    if packed.len() <= LARGEST_KEPT_BYTES {
        kept[place] = Some(Kept { revision, with_prev, packed: packed.clone() });
    }
    packed
}

fn convert(event: &Event) -> mvccpb::Event {
    let record = &event.record;
    let (kind, kv) = if record.is_tombstone() {
        let kv = mvccpb::KeyValue {
            key: Bytes::copy_from_slice(record.key()),
            mod_revision: record.mod_revision().main,
            ..mvccpb::KeyValue::default()
        };
        (mvccpb::event::EventType::Delete, kv)
    } else {
        (mvccpb::event::EventType::Put, key_value(record))
    };
    let prev_kv = event.prev.as_ref().map(key_value);
    mvccpb::Event { r#type: kind.into(), kv: Some(kv), prev_kv }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Parts, Record};
    use crate::types::LeaseId;

    fn record(main: i64, sub: u32, value_bytes: usize) -> Record {
        Record::new(Parts {
            key: format!("{main}.{sub}").as_bytes(),
            value: &vec![b'v'; value_bytes],
            create_revision: 1,
            mod_revision: Revision::new(main, sub),
            version: 2,
            lease: LeaseId(0),
        })
    }

    fn event(main: i64, sub: u32, value_bytes: usize, prev: bool) -> Event {
        let prev = prev.then(|| record(main - 1, 0, 9));
        Event { record: record(main, sub, value_bytes), prev }
    }

    #[test]
    fn whatever_was_packed_before_each_event_comes_as_itself() {
        let events = PackedEvents::default();
        let kept = EVENTS_KEPT as i64;
        let all = [
            event(7, 0, 3, false),
            event(7, 0, 3, true),
            event(7 + kept, 0, 3, false),
            event(6, 1, 3, false),
            event(7, 1, 3, false),
            event(7, 0, 3, false),
            event(8, 0, LARGEST_KEPT_BYTES, false),
        ];
        for _ in 0..2 {
            let packed = events.pack(&all);
            let expected: Vec<Bytes> = all.iter().map(|event| pack(&convert(event))).collect();
            assert_eq!(packed, expected);
        }
    }

    #[test]
    fn an_event_is_encoded_once() {
        let events = PackedEvents::default();
        let first = events.pack(&[event(7, 0, 3, false)]);
        let second = events.pack(&[event(7, 0, 3, false)]);
        assert_eq!(first[0].as_ptr(), second[0].as_ptr());
        let large = event(8, 0, LARGEST_KEPT_BYTES, false);
        events.pack(&[large]);
        let kept = events.kept.lock().expect("nobody panicked");
        assert!(kept.iter().flatten().all(|kept| kept.packed.len() <= LARGEST_KEPT_BYTES));
    }
}
