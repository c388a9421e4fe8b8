//! A machine with a hub beside it, as the applier has them, for tests.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;

use super::{Delivery, Hub, WatchStream};
use crate::machine::{
    Command, DeleteRange, Entry, Event, Machine, Origin, Outcome, Position, Put, Store, Txn, TxnOp,
};
use crate::storage::Batch;
use crate::types::{KeyRange, LeaseId, Timestamp};

pub struct Fixture {
    machine: Machine,
    pub store: Store,
    pub hub: Hub,
    index: u64,
    /// All events ever applied.
    pub history: Vec<Event>,
}

impl Fixture {
    pub fn new() -> Fixture {
        let machine = Machine::new();
        let store = machine.store();
        Fixture { hub: Hub::new(store.clone()), store, machine, index: 0, history: Vec::new() }
    }

    /// Applies an entry, and leaves publishing to the caller.
    pub fn apply(&mut self, command: Command) -> Outcome {
        self.index += 1;
        let position = Position { term: 1, index: self.index };
        let entry = Entry { at: Timestamp(0), origin: Origin::default(), command, principal: None };
        let outcome = self.machine.apply(position, &entry, &mut Batch::default()).unwrap();
        self.history.extend_from_slice(&outcome.events);
        outcome
    }

    /// Applies and publishes an entry; returns the revision after it.
    pub fn run(&mut self, command: Command) -> i64 {
        let outcome = self.apply(command);
        outcome.reply.unwrap();
        self.hub.publish(outcome.revision, &outcome.events);
        outcome.revision
    }

    pub fn put(&mut self, key: &str, value: &str) -> i64 {
        self.run(put(key, value))
    }

    pub fn delete(&mut self, range: KeyRange) -> i64 {
        self.run(Command::DeleteRange(DeleteRange { range, prev_kv: false }))
    }

    /// Puts all pairs in one revision.
    pub fn put_all(&mut self, pairs: &[(&str, &str)]) -> i64 {
        let success = pairs.iter().map(|(key, value)| TxnOp::Put(put_op(key, value))).collect();
        self.run(Command::Txn(Txn { compares: vec![], success, failure: vec![] }))
    }

    pub fn compact(&mut self, revision: i64) {
        self.run(Command::Compact { revision });
    }

    /// Removes part of what compaction left behind.
    pub fn scrub(&mut self) {
        self.machine.scrub(100, &mut Batch::default());
    }

    /// A stream whose idle watches would tell their progress in an hour.
    pub fn stream(&self) -> WatchStream {
        self.hub.stream(Duration::from_secs(3600))
    }

    /// What a snapshot install does: another member's machine takes the place of this one.
    pub fn install(&mut self, other: Fixture) {
        self.index = other.index;
        self.history = other.history;
        self.machine.replace(other.machine);
        self.hub.reset();
    }
}

pub fn put(key: &str, value: &str) -> Command {
    Command::Put(put_op(key, value))
}

pub fn put_op(key: &str, value: &str) -> Put {
    Put {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Some(Bytes::copy_from_slice(value.as_bytes())),
        lease: Some(LeaseId::NONE),
        prev_kv: false,
    }
}

pub fn one(key: &str) -> KeyRange {
    KeyRange::One(Bytes::copy_from_slice(key.as_bytes()))
}

pub fn all() -> KeyRange {
    KeyRange::From(Bytes::from_static(b"\0"))
}

/// What the stream has to say without waiting for anything to happen.
pub fn ready(stream: &mut WatchStream) -> Option<Delivery> {
    // A stream gives the other tasks a turn now and then, also here where there are none.
    (0..64).find_map(|_| stream.next().now_or_never())
}

/// Everything the stream has to say now.
pub fn drain(stream: &mut WatchStream) -> Vec<Delivery> {
    std::iter::from_fn(|| ready(stream)).collect()
}

/// An event as `REVISION PUT KEY=VALUE` or `REVISION DELETE KEY`, with ` was VALUE` behind it.
pub fn show(event: &Event) -> String {
    let record = &event.record;
    let (main, key) = (record.mod_revision().main, String::from_utf8_lossy(record.key()));
    let change = if record.is_tombstone() {
        format!("{main} DELETE {key}")
    } else {
        format!("{main} PUT {key}={}", String::from_utf8_lossy(record.value()))
    };
    match &event.prev {
        Some(prev) => format!("{change} was {}", String::from_utf8_lossy(prev.value())),
        None => change,
    }
}

/// The events among `deliveries`, by watch.
pub fn shown(deliveries: &[Delivery]) -> BTreeMap<i64, Vec<String>> {
    let mut by_watch: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    for delivery in deliveries {
        if let Delivery::Events { id, events } = delivery {
            by_watch.entry(*id).or_default().extend(events.iter().map(show));
        }
    }
    by_watch
}
