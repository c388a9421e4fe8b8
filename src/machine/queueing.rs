//! What commands do to the queues of locks and elections, and who owns one.
//!
//! A key owns its queue while it is the first and attached to the lease that its name says. A first
//! key that is not (an application has put it anew, without the lease) holds the others up, and
//! owns nothing.

use bytes::Bytes;

use super::apply::Edit;
use super::queue;
use super::{Enqueue, Enqueued, Fence, Proclaim, Record, Rejection, Reply};
use crate::mutant;

impl Edit<'_> {
    pub(super) fn enqueue(&mut self, enqueue: &Enqueue) -> Result<Reply, Rejection> {
        let Enqueue { name, lease, value, rewrite } = enqueue;
        let Some(held) = self.leases.get(*lease) else {
            return Err(Rejection::LeaseNotFound(*lease));
        };
        let lease_ttl_seconds = held.ttl_seconds;
        let key = queue::key_of(name, *lease);
        let present = self.writer.get(&key);
        let created = present.is_none();
        let record = match present {
            Some(record) if record.lease() != *lease => return Err(Rejection::Detached(*lease)),
            Some(record) if *rewrite && record.value() != value => {
                self.write(&key, value, *lease, Some(record))
            }
            Some(record) => record,
            None => self.write(&key, value, *lease, None),
        };
        let first = self.is_first(name, &record);
        let create_revision = record.create_revision();
        Ok(Reply::Enqueued(Enqueued { key, create_revision, created, first, lease_ttl_seconds }))
    }

    pub(super) fn leave(&mut self, key: &Bytes, create_revision: i64) -> Reply {
        let present = self.writer.get(key);
        let any = mutant::is("leave-unchecked");
        self.remove(present.filter(|record| any || record.create_revision() == create_revision))
    }

    pub(super) fn unlock(&mut self, key: &Bytes) -> Reply {
        let present = self.writer.get(key);
        let any = mutant::is("unlock-unchecked");
        self.remove(present.filter(|record| any || is_attached(record)))
    }

    pub(super) fn proclaim(&mut self, proclaim: &Proclaim) -> Result<Reply, Rejection> {
        let Proclaim { key, create_revision, value, lease } = proclaim;
        let leads = |record: &Record| {
            record.create_revision() == *create_revision
                && queue::split(key).is_some_and(|(name, _)| self.is_first(name, record))
        };
        let Some(record) = self.writer.get(key).filter(leads) else {
            return Ok(Reply::Proclaimed(false));
        };
        if !lease.is_none() && !self.leases.contains(*lease) {
            return Err(Rejection::LeaseNotFound(*lease));
        }
        // With another lease it would stop leading.
        let stays = lease.is_none() || *lease == record.lease();
        if !stays || !is_attached(&record) {
            return Ok(Reply::Proclaimed(false));
        }
        let lease = record.lease();
        self.write(key, value, lease, Some(record));
        Ok(Reply::Proclaimed(true))
    }

    pub(super) fn holds(&self, fence: &Fence) -> bool {
        self.queues.first(&fence.name).is_some_and(|(create_revision, key)| {
            *create_revision == fence.token
                && self.writer.get(key).is_some_and(|record| is_attached(&record))
        })
    }

    fn is_first(&self, name: &[u8], record: &Record) -> bool {
        self.queues.first(name).is_some_and(|(_, first)| *first == record.key())
    }

    /// Deletes the pair, if it is the one to go.
    fn remove(&mut self, record: Option<Record>) -> Reply {
        let found = record.is_some();
        if let Some(record) = record {
            self.delete(record);
        }
        Reply::Left(found)
    }
}

/// Whether the pair ends with the lease that its key names. (A pair's lease exists as long as the
/// pair does.)
pub(super) fn is_attached(record: &Record) -> bool {
    queue::split(record.key()).is_some_and(|(_, lease)| lease == record.lease())
}
