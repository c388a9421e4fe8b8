//! What is known of places in lock queues that were taken through our own API, and of locks that
//! were taken from their holders by force.
//!
//! A label stands beside a queue key: who the client says it is, where it called from, and since
//! when it waits and holds, in cluster time. It goes with the key. Keys that other clients made have
//! none.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::apply::Edit;
use super::queueing::is_attached;
use super::{
    AskRelease, Effect, Enqueue, Join, Machine, Record, Rejection, Release, Reply, codec, queue,
    schema,
};
use crate::storage::Batch;
use crate::types::Timestamp;

/// How many releases by force are remembered.
const FORCED_KEPT: usize = 1_000;

/// Keys that are looked at to tell whether a queue is a lock's.
const KEYS_LOOKED_AT: usize = 16;

/// What the client of a place in a queue said of itself, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    pub owner: String,
    /// The client's address, as the member that was asked saw it.
    pub client: String,
    /// The lease was made for this place alone: it ends when the place is given up.
    pub session: bool,
    pub joined_at: Timestamp,
    pub granted_at: Option<Timestamp>,
    pub asked: Option<Asked>,
}

/// A wish that the holder give up its lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    pub by: String,
    pub reason: String,
    pub at: Timestamp,
    /// Whether a stream of the holder has passed it on.
    pub told: bool,
}

/// A lock that was taken from its holder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForcedRelease {
    pub name: Bytes,
    pub token: i64,
    /// Of the label, empty where there was none.
    pub owner: String,
    pub client: String,
    pub by: String,
    pub reason: String,
    pub at: Timestamp,
}

#[derive(Debug, Default)]
pub(super) struct Holds {
    pub labels: BTreeMap<Bytes, Label>,
    /// The newest last, with their numbers.
    pub forced: VecDeque<(u64, ForcedRelease)>,
}

impl Holds {
    pub fn insert(&mut self, key: Bytes, label: Label, batch: &mut Batch) {
        batch.put(schema::label_key(&key), codec::encode_label(&label));
        self.labels.insert(key, label);
    }

    /// Changes the label of `key`, if it has one.
    pub fn update(
        &mut self,
        key: &[u8],
        batch: &mut Batch,
        change: impl FnOnce(&mut Label),
    ) -> bool {
        let Some(label) = self.labels.get_mut(key) else { return false };
        change(label);
        batch.put(schema::label_key(key), codec::encode_label(label));
        true
    }

    pub fn remove(&mut self, key: &[u8], batch: &mut Batch) {
        // Most keys have no label, and most clusters no labels at all.
        if self.labels.remove(key).is_some() {
            batch.remove(schema::label_key(key));
        }
    }

    fn remember(&mut self, forced: ForcedRelease, batch: &mut Batch) {
        let number = self.forced.back().map_or(0, |(last, _)| last + 1);
        batch.put(schema::forced_key(number), codec::encode_forced(&forced));
        self.forced.push_back((number, forced));
        if self.forced.len() > FORCED_KEPT
            && let Some((oldest, _)) = self.forced.pop_front()
        {
            batch.remove(schema::forced_key(oldest));
        }
    }
}

impl Edit<'_> {
    pub(super) fn join(&mut self, join: &Join) -> Result<Reply, Rejection> {
        let Join { enqueue, owner, client, session, only_if_free } = join;
        let Enqueue { name, lease, .. } = enqueue;
        if !self.leases.contains(*lease) {
            return Err(Rejection::LeaseNotFound(*lease));
        }
        let key = queue::key_of(name, *lease);
        if *only_if_free && self.queues.first(name).is_some_and(|(_, first)| *first != key) {
            return Ok(Reply::Busy);
        }
        let reply = self.enqueue(enqueue)?;
        let Reply::Enqueued(queued) = &reply else {
            unreachable!("an enqueue is answered with its place")
        };
        let now = self.now;
        let key = &queued.key;
        // One who comes again, through another member perhaps, keeps what it has.
        let known = self.holds.update(key, self.writer.batch(), |label| {
            label.owner.clone_from(owner);
            label.client.clone_from(client);
        });
        if !known {
            let label = Label {
                owner: owner.clone(),
                client: client.clone(),
                session: *session,
                joined_at: now,
                granted_at: queued.first.then_some(now),
                asked: None,
            };
            self.holds.insert(key.clone(), label, self.writer.batch());
        }
        self.effects.push(Effect::LabelChanged { key: key.clone() });
        Ok(reply)
    }

    /// Gives up a place; by force also one whose key has lost its lease.
    pub(super) fn release(&mut self, release: &Release) -> Reply {
        let Release { name, token, forced } = release;
        let place = self.queues.at(name, *token);
        let record = place.and_then(|(_, key)| self.writer.get(key));
        let Some(record) = record.filter(|record| forced.is_some() || is_attached(record)) else {
            return Reply::Left(false);
        };
        let label = self.holds.labels.get(record.key());
        let ends_lease = label.is_some_and(|label| label.session) && is_attached(&record);
        if let Some(force) = forced {
            let forced = ForcedRelease {
                name: name.clone(),
                token: *token,
                owner: label.map(|label| label.owner.clone()).unwrap_or_default(),
                client: label.map(|label| label.client.clone()).unwrap_or_default(),
                by: force.by.clone(),
                reason: force.reason.clone(),
                at: self.now,
            };
            self.holds.remember(forced, self.writer.batch());
        }
        if ends_lease {
            self.end_leases([record.lease()]);
        } else {
            self.delete(record);
        }
        Reply::Left(true)
    }

    pub(super) fn ask_release(&mut self, ask: &AskRelease) -> Reply {
        let AskRelease { name, token, by, reason } = ask;
        let first = self.queues.first(name).cloned();
        let Some((create_revision, key)) = first.filter(|(it, _)| *token == 0 || token == it)
        else {
            return Reply::Asked(None);
        };
        let at = self.now;
        let asked = Asked { by: by.clone(), reason: reason.clone(), at, told: false };
        if self.holds.update(&key, self.writer.batch(), |label| label.asked = Some(asked)) {
            self.effects.push(Effect::LabelChanged { key: key.clone() });
        }
        Reply::Asked(Some((key, create_revision)))
    }

    pub(super) fn told(&mut self, key: &Bytes, create_revision: i64) -> Reply {
        let same = |record: Record| record.create_revision() == create_revision;
        if self.writer.get(key).is_some_and(same) {
            self.holds.update(key, self.writer.batch(), |label| {
                if let Some(asked) = &mut label.asked {
                    asked.told = true;
                }
            });
            self.effects.push(Effect::LabelChanged { key: key.clone() });
        }
        Reply::Done
    }
}

/// One key of a queue, with everything that is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueKey {
    pub record: Record,
    /// Whether it ends with the lease that it names. One that does not owns nothing.
    pub attached: bool,
    /// Granted TTL in seconds and deadline of the lease it is attached to.
    pub lease: Option<(i64, Timestamp)>,
    pub label: Option<Label>,
}

impl Machine {
    /// The first `limit` keys of the queue `name`, in order, and how many there are.
    pub fn queue(&self, name: &[u8], limit: usize) -> (Vec<QueueKey>, usize) {
        let keys = self.queues.places(name).take(limit).map(|(_, key)| {
            let record = self.live.get(key).expect("a queued key is there");
            let lease = self.leases.get(record.lease());
            QueueKey {
                attached: is_attached(&record),
                lease: lease.map(|lease| (lease.ttl_seconds, lease.deadline)),
                label: self.holds.labels.get(key).cloned(),
                record,
            }
        });
        (keys.collect(), self.queues.length(name))
    }

    /// How many stand before the key with this create revision in the queue `name`; `None` when it
    /// is not in it.
    pub fn queue_ahead(&self, name: &[u8], create_revision: i64) -> Option<usize> {
        self.queues.at(name, create_revision)?;
        Some(self.queues.places(name).take_while(|(it, _)| *it < create_revision).count())
    }

    /// The label of a queue key.
    pub fn label(&self, key: &[u8]) -> Option<&Label> {
        self.holds.labels.get(key)
    }

    /// Names of queues in which somebody stands with a lease, in order: those that begin with
    /// `prefix` and come after `after`. Looks at `look_at` queues at most; where it has stopped
    /// short of the end it tells the last name looked at.
    pub fn queue_names(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
        look_at: usize,
    ) -> (Vec<Bytes>, Option<Bytes>) {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let mut names = Vec::new();
        let mut last = None;
        let queues = self.queues.names_from(start).take_while(|name| name.starts_with(prefix));
        for (looked, name) in queues.enumerate() {
            if looked == look_at || names.len() == limit {
                return (names, last);
            }
            if self.is_lock(name) {
                names.push(name.clone());
            }
            last = Some(name.clone());
        }
        (names, None)
    }

    /// Whether anybody stands in the queue with a lease: a key of an application may look like a
    /// queue's.
    pub fn is_lock(&self, name: &[u8]) -> bool {
        let mut keys = self.queues.places(name).take(KEYS_LOOKED_AT);
        keys.any(|(_, key)| self.live.get(key).is_some_and(|record| is_attached(&record)))
    }

    /// The releases by force that are remembered, the newest first.
    pub fn forced_releases(&self) -> impl Iterator<Item = &ForcedRelease> {
        self.holds.forced.iter().rev().map(|(_, forced)| forced)
    }
}
