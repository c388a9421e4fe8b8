//! The queues of locks and elections.
//!
//! The queue of NAME holds every key of the form `NAME/HEX`, HEX a lease id as
//! [`LeaseId::to_hex`] prints it, ordered by create revision (then by key, for keys that one
//! transaction made). NAME may contain slashes and may be empty. Whoever wrote a key, it stands in
//! line: recipe clients use the same layout through plain transactions.
//!
//! The queues follow from the keys, so they are not stored.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use bytes::Bytes;

use crate::mutant;
use crate::types::LeaseId;

/// A key's place: its create revision and the key.
pub(super) type Place = (i64, Bytes);

#[derive(Debug, Default)]
pub(super) struct Queues {
    by_name: BTreeMap<Bytes, BTreeSet<Place>>,
}

impl Queues {
    /// The first key of the queue.
    pub fn first(&self, name: &[u8]) -> Option<&Place> {
        let queue = self.by_name.get(name)?;
        if mutant::is("queue-by-lease") {
            return queue.iter().min_by_key(|(_, key)| key);
        }
        queue.first()
    }

    /// All places of the queue, in order.
    pub fn places(&self, name: &[u8]) -> impl Iterator<Item = &Place> {
        self.by_name.get(name).into_iter().flatten()
    }

    pub fn length(&self, name: &[u8]) -> usize {
        self.by_name.get(name).map_or(0, BTreeSet::len)
    }

    /// The place with this create revision, the first of them where one transaction made several.
    pub fn at(&self, name: &[u8], create_revision: i64) -> Option<&Place> {
        let place = self.by_name.get(name)?.range((create_revision, Bytes::new())..).next()?;
        (place.0 == create_revision).then_some(place)
    }

    /// Names of queues, in order.
    pub fn names_from(&self, start: Bound<&[u8]>) -> impl Iterator<Item = &Bytes> {
        self.by_name.range::<[u8], _>((start, Bound::Unbounded)).map(|(name, _)| name)
    }

    pub fn contains(&self, name: &[u8], place: &Place) -> bool {
        self.by_name.get(name).is_some_and(|queue| queue.contains(place))
    }

    /// Adds a new key to its queue, if it is a queue's.
    pub fn add(&mut self, key: &[u8], create_revision: i64) {
        let Some((name, _)) = split(key) else { return };
        let key = Bytes::copy_from_slice(key);
        let name_bytes = name.len();
        let place = (create_revision, key.clone());
        match self.by_name.get_mut(name) {
            Some(queue) => {
                queue.insert(place);
            }
            None => {
                let name = key.slice(..name_bytes);
                self.by_name.insert(name, BTreeSet::from([place]));
            }
        }
    }

    /// Takes a deleted key from its queue. Returns the queue's name when it was in one, and what
    /// was first before.
    pub fn remove(&mut self, key: &[u8], create_revision: i64) -> Option<(Bytes, Place)> {
        let (name, _) = split(key)?;
        let queue = self.by_name.get_mut(name)?;
        let first = queue.first()?.clone();
        if !queue.remove(&(create_revision, Bytes::copy_from_slice(key))) {
            return None;
        }
        if queue.is_empty() {
            self.by_name.remove(name);
        }
        Some((Bytes::copy_from_slice(name), first))
    }
}

/// The name of the queue that `key` stands in, and the lease its last part names.
pub(super) fn split(key: &[u8]) -> Option<(&[u8], LeaseId)> {
    let slash = key.iter().rposition(|byte| *byte == b'/')?;
    Some((&key[..slash], LeaseId::from_hex(&key[slash + 1..])?))
}

/// The key with which `lease` stands in the queue of `name`.
pub(super) fn key_of(name: &[u8], lease: LeaseId) -> Bytes {
    let hex = lease.to_hex();
    let mut key = Vec::with_capacity(name.len() + 1 + hex.len());
    key.extend_from_slice(name);
    key.push(b'/');
    key.extend_from_slice(hex.as_bytes());
    key.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    #[test]
    fn a_queue_holds_direct_children_that_name_a_lease() {
        assert_eq!(split(b"jobs/4d"), Some((&b"jobs"[..], LeaseId(0x4d))));
        assert_eq!(split(b"jobs/1/4d"), Some((&b"jobs/1"[..], LeaseId(0x4d))));
        assert_eq!(split(b"/4d"), Some((&b""[..], LeaseId(0x4d))));
        assert_eq!(split(b"jobs/-4d"), Some((&b"jobs"[..], LeaseId(-0x4d))));
        for other in ["jobs", "4d", "jobs/", "jobs/4D", "jobs/04d", "jobs/0", "jobs/x"] {
            assert_eq!(split(other.as_bytes()), None, "{other}");
        }
        assert_eq!(key_of(b"jobs", LeaseId(0x4d)), "jobs/4d");
        assert_eq!(key_of(b"", LeaseId(-1)), "/-1");
    }

    #[test]
    fn the_oldest_key_is_first() {
        let mut queues = Queues::default();
        queues.add(&key("n/2"), 5);
        queues.add(&key("n/1"), 6);
        queues.add(&key("n/9"), 4);
        queues.add(&key("n/x/1"), 1);
        queues.add(&key("no"), 1);
        assert_eq!(queues.first(b"n"), Some(&(4, key("n/9"))));
        assert_eq!(queues.first(b"n/x"), Some(&(1, key("n/x/1"))));

        assert_eq!(queues.remove(&key("n/1"), 6), Some((key("n"), (4, key("n/9")))));
        assert_eq!(queues.remove(&key("n/1"), 6), None);
        assert_eq!(queues.remove(&key("n/9"), 4), Some((key("n"), (4, key("n/9")))));
        assert_eq!(queues.first(b"n"), Some(&(5, key("n/2"))));
        queues.remove(&key("n/2"), 5).unwrap();
        assert_eq!(queues.first(b"n"), None);
    }
}
