//! Leases: how long each lives, and which keys end with it.
//!
//! Deadlines are cluster time, which entries carry, so every member holds the same ones. Nothing
//! here ends a lease because its time has run out: the leader proposes that, and
//! [`LeaseTable::is_over`] tells whether the proposal still holds when it is applied.
//!
//! Each attachment follows from a record (the live record of a key names its lease), so only the
//! leases themselves are stored.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;

use super::ExpiredLease;
use crate::mutant;
use crate::types::{LeaseId, Timestamp};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub ttl_seconds: i64,
    /// When it may be ended, unless it is renewed before.
    pub deadline: Timestamp,
    /// The log index of the grant or of the latest renewal.
    pub renewed_at_index: u64,
    /// The keys attached to it.
    pub keys: BTreeSet<Bytes>,
}

#[derive(Debug, Default)]
pub struct LeaseTable {
    leases: BTreeMap<LeaseId, Lease>,
    by_deadline: BTreeSet<(Timestamp, LeaseId)>,
}

impl LeaseTable {
    pub fn get(&self, id: LeaseId) -> Option<&Lease> {
        self.leases.get(&id)
    }

    pub fn contains(&self, id: LeaseId) -> bool {
        self.leases.contains_key(&id)
    }

    pub fn len(&self) -> usize {
        self.leases.len()
    }

    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// All leases in order of id.
    pub fn iter(&self) -> impl Iterator<Item = (LeaseId, &Lease)> {
        self.leases.iter().map(|(id, lease)| (*id, lease))
    }

    /// All leases, the one that runs out first first; in order of id where deadlines are equal.
    pub fn iter_by_deadline(&self) -> impl Iterator<Item = (LeaseId, &Lease)> {
        self.by_deadline.iter().map(|(_, id)| (*id, &self.leases[id]))
    }

    /// The keys attached to `id` in key order; none when there is no such lease.
    pub fn keys(&self, id: LeaseId) -> impl Iterator<Item = &Bytes> {
        self.leases.get(&id).into_iter().flat_map(|lease| &lease.keys)
    }

    /// Whether the leader's view of an expired lease holds at `now`: the lease exists, was not
    /// renewed since, and its time has run out.
    pub(super) fn is_over(&self, expired: &ExpiredLease, now: Timestamp) -> bool {
        let unchecked = mutant::is("expire-unchecked");
        self.get(expired.id).is_some_and(|lease| {
            unchecked || lease.renewed_at_index == expired.renewed_at_index && lease.deadline <= now
        })
    }

    /// Adds a lease whose id is free, as [`LeaseTable::contains`] said.
    pub(super) fn insert(&mut self, id: LeaseId, lease: Lease) {
        self.by_deadline.insert((lease.deadline, id));
        let earlier = self.leases.insert(id, lease);
        assert!(earlier.is_none(), "lease {id} is granted twice");
    }

    /// Gives the lease its full time to live from `now`. `None` when there is no such lease.
    pub(super) fn renew(&mut self, id: LeaseId, now: Timestamp, index: u64) -> Option<&Lease> {
        let lease = self.leases.get_mut(&id)?;
        self.by_deadline.remove(&(lease.deadline, id));
        lease.deadline = deadline(now, lease.ttl_seconds);
        lease.renewed_at_index = index;
        self.by_deadline.insert((lease.deadline, id));
        Some(lease)
    }

    /// Takes a lease away, with the keys that were attached to it.
    pub(super) fn remove(&mut self, id: LeaseId) -> Option<Lease> {
        let lease = self.leases.remove(&id)?;
        self.by_deadline.remove(&(lease.deadline, id));
        Some(lease)
    }

    /// Attaches `key`. False when there is no such lease.
    pub(super) fn attach(&mut self, id: LeaseId, key: Bytes) -> bool {
        match self.leases.get_mut(&id) {
            Some(lease) => {
                lease.keys.insert(key);
                true
            }
            None => false,
        }
    }

    /// Detaches `key`; nothing happens when the lease is gone already.
    pub(super) fn detach(&mut self, id: LeaseId, key: &[u8]) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.keys.remove(key);
        }
    }
}

/// When a lease of `ttl_seconds` that is granted or renewed at `now` runs out.
pub(super) fn deadline(now: Timestamp, ttl_seconds: i64) -> Timestamp {
    now.plus(Duration::from_secs(u64::try_from(ttl_seconds).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(ttl_seconds: i64, index: u64) -> Lease {
        Lease {
            ttl_seconds,
            deadline: deadline(Timestamp(0), ttl_seconds),
            renewed_at_index: index,
            keys: BTreeSet::new(),
        }
    }

    fn order(table: &LeaseTable) -> Vec<i64> {
        table.iter_by_deadline().map(|(id, _)| id.0).collect()
    }

    #[test]
    fn leases_come_in_the_order_they_run_out() {
        let mut table = LeaseTable::default();
        table.insert(LeaseId(1), lease(30, 1));
        table.insert(LeaseId(2), lease(10, 2));
        table.insert(LeaseId(3), lease(20, 3));
        assert_eq!(order(&table), [2, 3, 1]);
        table.renew(LeaseId(2), Timestamp(15_000), 4).unwrap();
        assert_eq!(order(&table), [3, 2, 1]);
        table.remove(LeaseId(3)).unwrap();
        assert_eq!(order(&table), [2, 1]);
        assert!(table.renew(LeaseId(3), Timestamp(0), 5).is_none());
    }

    #[test]
    fn a_lease_is_over_only_at_its_deadline_and_without_a_later_renewal() {
        let mut table = LeaseTable::default();
        table.insert(LeaseId(1), lease(10, 7));
        let seen = ExpiredLease { id: LeaseId(1), renewed_at_index: 7 };
        assert!(!table.is_over(&seen, Timestamp(9_999)));
        assert!(table.is_over(&seen, Timestamp(10_000)));
        table.renew(LeaseId(1), Timestamp(0), 8).unwrap();
        assert!(!table.is_over(&seen, Timestamp(99_000)));
        assert!(!table.is_over(&ExpiredLease { id: LeaseId(2), ..seen }, Timestamp(99_000)));
    }

    #[test]
    fn a_ttl_beyond_all_time_does_not_wrap() {
        assert_eq!(deadline(Timestamp(5), i64::MAX), Timestamp(u64::MAX));
        assert_eq!(deadline(Timestamp(5), -1), Timestamp(5));
    }
}
