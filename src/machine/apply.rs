//! One entry's effect, command by command.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::alarm::Alarms;
use super::auth::Auth;
use super::holds::Holds;
use super::lease::{self, Lease};
use super::mvcc::Writer;
use super::queue::{Place, Queues};
use super::queueing;
use super::state::PublishedMember;
use super::txn::{self, Path};
use super::{
    Command, DeleteRange, DeleteReply, Digest, Effect, Entry, Event, ExpiredLease, Fault, Fenced,
    FencedWrite, LeaseTable, Machine, Outcome, Position, Put, PutReply, Record, Rejection, Reply,
    Txn, TxnOp, TxnOpReply, TxnReply, codec, digest, schema,
};
use crate::mutant;
use crate::storage::Batch;
use crate::types::{LeaseId, MemberId, Timestamp};

impl Machine {
    /// Applies the entry at `position`: entries come in the order of the log, each once. What is to
    /// be stored is added to `batch`, which may hold what earlier entries added. When this returns,
    /// readers see the change.
    ///
    /// # Errors
    ///
    /// None as long as all values are kept in memory. After a fault the machine must not be used
    /// further.
    pub fn apply(
        &mut self,
        position: Position,
        entry: &Entry,
        batch: &mut Batch,
    ) -> Result<Outcome, Fault> {
        self.now = self.now.max(entry.at);
        let mut edit = Edit {
            writer: Writer::new(&self.history, &mut self.live, &mut self.space, batch),
            leases: &mut self.leases,
            queues: &mut self.queues,
            holds: &mut self.holds,
            members: &mut self.members,
            retired: &self.retired,
            alarms: &mut self.alarms,
            auth: &mut self.auth,
            now: self.now,
            index: position.index,
            effects: Vec::new(),
            left: Vec::new(),
            first_before: BTreeMap::new(),
        };
        let refusal = edit.alarms.refusal(&entry.command);
        let refusal = refusal.or_else(|| edit.auth.refusal(entry, edit.leases));
        let reply = match (refusal, &entry.command) {
            (Some(refusal), _) => Err(refusal),
            // It is about the history itself, which an edit only adds to.
            (None, Command::Compact { revision }) => {
                edit.writer.compact(*revision).map(|()| Reply::Compacted)
            }
            (None, command) => edit.run(command),
        };
        let (revision, events, effects) = edit.finish();
        let outcome = Outcome { revision, reply, events, effects };
        self.digest = if digest::begins_behind(entry) {
            Some(Digest { since: position.index, ..Digest::BEGIN })
        } else {
            let compacted = self.history.compacted();
            self.digest.map(|digest| digest.with(position, self.now, compacted, &outcome))
        };
        self.store_meta(batch);
        Ok(outcome)
    }
}

/// The machine while one entry is applied to it. All changes of an entry share one main revision,
/// also when the entry ends several leases: each lease's keys are then deleted in that one revision,
/// all in key order.
pub(super) struct Edit<'m> {
    pub(super) writer: Writer<'m>,
    pub(super) leases: &'m mut LeaseTable,
    pub(super) queues: &'m mut Queues,
    pub(super) holds: &'m mut Holds,
    members: &'m mut BTreeMap<MemberId, PublishedMember>,
    retired: &'m BTreeSet<MemberId>,
    pub(super) alarms: &'m mut Alarms,
    pub(super) auth: &'m mut Arc<Auth>,
    pub(super) now: Timestamp,
    index: u64,
    pub(super) effects: Vec<Effect>,
    /// The places in queues that the entry has emptied.
    left: Vec<Place>,
    /// For each queue that lost a key: which one was first before.
    first_before: BTreeMap<Bytes, Place>,
}

impl Edit<'_> {
    fn run(&mut self, command: &Command) -> Result<Reply, Rejection> {
        match command {
            Command::Put(put) => self.checked_put(put),
            Command::DeleteRange(delete) => Ok(Reply::DeleteRange(self.delete_range(delete))),
            Command::Txn(txn) => self.txn(txn).map(Reply::Txn),
            Command::Fenced(fenced) => self.fenced(fenced),
            Command::LeaseGrant { id, ttl_seconds } => self.grant(*id, *ttl_seconds),
            Command::LeaseRevoke { id } => {
                if !self.leases.contains(*id) {
                    return Err(Rejection::LeaseNotFound(*id));
                }
                self.end_leases([*id]);
                Ok(Reply::LeaseRevoked)
            }
            Command::LeaseRenew { ids } => {
                Ok(Reply::LeaseRenewed(ids.iter().map(|id| self.renew(*id)).collect()))
            }
            // The term needs no check of its own: cluster time is replicated, so a deadline that has
            // passed has passed for every leader, and a renewal elsewhere shows in its index.
            Command::LeaseExpire { term: _, leases } => Ok(self.expire(leases)),
            Command::Enqueue(enqueue) => self.enqueue(enqueue),
            Command::Leave { key, create_revision } => Ok(self.leave(key, *create_revision)),
            Command::Unlock { key } => Ok(self.unlock(key)),
            Command::Proclaim(proclaim) => self.proclaim(proclaim),
            Command::Join(join) => self.join(join),
            Command::Release(release) => Ok(self.release(release)),
            Command::AskRelease(ask) => Ok(self.ask_release(ask)),
            Command::Told { key, create_revision } => Ok(self.told(key, *create_revision)),
            // It was under way when the member was removed.
            Command::PublishMember { id, .. } if self.retired.contains(id) => Ok(Reply::Done),
            Command::PublishMember { id, name, client_urls } => {
                let member =
                    PublishedMember { name: name.clone(), client_urls: client_urls.clone() };
                self.writer.batch().put(schema::member_key(*id), codec::encode_member(&member));
                self.members.insert(*id, member);
                Ok(Reply::Done)
            }
            Command::Tick => Ok(Reply::Done),
            Command::Alarm(action) => self.alarm(*action),
            Command::Auth(change) => self.change_auth(change),
            Command::Compact { .. } => unreachable!("compaction is no edit"),
        }
    }

    fn checked_put(&mut self, put: &Put) -> Result<Reply, Rejection> {
        txn::check_lease(self.leases, put)?;
        txn::check_present(self.writer.snapshot(), put)?;
        Ok(Reply::Put(self.put(put)))
    }

    /// The fences are looked at before the write and see nothing of it.
    fn fenced(&mut self, fenced: &Fenced) -> Result<Reply, Rejection> {
        let stale = fenced.fences.iter().find(|fence| !self.holds(fence));
        if let Some(stale) = stale.filter(|_| !mutant::is("fence-unchecked")) {
            return Err(Rejection::StaleFence { token: stale.token });
        }
        match &fenced.write {
            FencedWrite::Put(put) => self.checked_put(put),
            FencedWrite::DeleteRange(delete) => Ok(Reply::DeleteRange(self.delete_range(delete))),
            FencedWrite::Txn(txn) => self.txn(txn).map(Reply::Txn),
        }
    }

    fn put(&mut self, put: &Put) -> PutReply {
        let prev = self.writer.get(&put.key);
        // Only a transaction that deletes a key before it puts it can get here without a pair to
        // keep something of; such transactions are refused before they are proposed.
        let value = match (&put.value, &prev) {
            (Some(value), _) => &value[..],
            (None, Some(prev)) => prev.value(),
            (None, None) => &[][..],
        };
        let lease = match (put.lease, &prev) {
            (Some(lease), _) => lease,
            (None, Some(prev)) => prev.lease(),
            (None, None) => LeaseId::NONE,
        };
        let reply = PutReply { prev: if put.prev_kv { prev.clone() } else { None } };
        self.write(&put.key, value, lease, prev.clone());
        reply
    }

    fn delete_range(&mut self, delete: &DeleteRange) -> DeleteReply {
        let mut found = Vec::new();
        self.writer.snapshot().scan(&delete.range, |record| {
            found.push(record.clone());
            true
        });
        for record in &found {
            self.delete(record.clone());
        }
        let deleted = found.len() as i64;
        DeleteReply { deleted, prev: if delete.prev_kv { found } else { Vec::new() } }
    }

    fn txn(&mut self, txn: &Txn) -> Result<TxnReply, Rejection> {
        let before = self.writer.snapshot();
        let path = Path::choose(before, txn);
        path.check(before, self.leases, txn)?;
        Ok(self.run_branch(txn, &path))
    }

    fn run_branch(&mut self, txn: &Txn, path: &Path) -> TxnReply {
        let mut nested = path.nested.iter();
        let mut responses = Vec::with_capacity(path.branch(txn).len());
        for op in path.branch(txn) {
            responses.push(match op {
                TxnOp::Range(query) => txn::range(self.writer.snapshot(), query),
                TxnOp::Put(put) => {
                    let reply = self.put(put);
                    TxnOpReply::Put { revision: self.writer.revision(), reply }
                }
                TxnOp::DeleteRange(delete) => {
                    let reply = self.delete_range(delete);
                    TxnOpReply::DeleteRange { revision: self.writer.revision(), reply }
                }
                TxnOp::Txn(txn) => {
                    let path = nested.next().expect("a path has a place for each nested");
                    TxnOpReply::Txn(self.run_branch(txn, path))
                }
            });
        }
        TxnReply { succeeded: path.succeeded, responses }
    }

    fn grant(&mut self, id: LeaseId, ttl_seconds: i64) -> Result<Reply, Rejection> {
        // Zero is no id. It is never proposed, and in use in the sense that nobody can have it.
        if id.is_none() || self.leases.contains(id) {
            return Err(Rejection::LeaseExists(id));
        }
        let lease = Lease {
            ttl_seconds,
            deadline: lease::deadline(self.now, ttl_seconds),
            renewed_at_index: self.index,
            keys: Default::default(),
        };
        held(&mut self.effects, self.writer.batch(), id, &lease);
        self.leases.insert(id, lease);
        Ok(Reply::LeaseGranted { id, ttl_seconds })
    }

    /// The granted TTL, `None` when there is no such lease.
    fn renew(&mut self, id: LeaseId) -> Option<i64> {
        let lease = self.leases.renew(id, self.now, self.index)?;
        held(&mut self.effects, self.writer.batch(), id, lease);
        Some(lease.ttl_seconds)
    }

    fn expire(&mut self, expired: &[ExpiredLease]) -> Reply {
        let over = expired.iter().filter(|lease| self.leases.is_over(lease, self.now));
        let over: Vec<LeaseId> = over.map(|lease| lease.id).collect();
        Reply::LeaseExpired(self.end_leases(over))
    }

    /// Ends leases that exist, with their keys; one named twice counts once. Returns how many ended.
    pub(super) fn end_leases(&mut self, ids: impl IntoIterator<Item = LeaseId>) -> usize {
        let mut keys = Vec::new();
        let mut ended = 0;
        for id in ids {
            let Some(lease) = self.leases.remove(id) else { continue };
            self.writer.batch().remove(schema::lease_key(id));
            self.effects.push(Effect::LeaseEnded { id });
            keys.extend(lease.keys);
            ended += 1;
        }
        // A key has one lease, so none comes twice.
        keys.sort_unstable();
        for key in keys {
            let record = self.writer.get(&key).expect("an attached key is there");
            self.delete(record);
        }
        ended
    }

    /// Writes a pair whose lease exists, and keeps attachments and queues in step.
    pub(super) fn write(
        &mut self,
        key: &[u8],
        value: &[u8],
        lease: LeaseId,
        prev: Option<Record>,
    ) -> Record {
        let attached_to = prev.as_ref().map_or(LeaseId::NONE, |prev| prev.lease());
        let created = prev.is_none();
        let record = self.writer.put(key, value, lease, prev);
        if attached_to != lease {
            if !mutant::is("lease-keeps-moved-key") {
                self.leases.detach(attached_to, key);
            }
            if !lease.is_none() {
                let exists = self.leases.attach(lease, Bytes::copy_from_slice(record.key()));
                assert!(exists, "lease {lease} was checked before");
            }
        }
        if created {
            self.queues.add(record.key(), record.create_revision());
        }
        record
    }

    /// Deletes a pair that is there, and keeps attachments and queues in step.
    pub(super) fn delete(&mut self, record: Record) {
        self.leases.detach(record.lease(), record.key());
        if let Some((name, first)) = self.queues.remove(record.key(), record.create_revision()) {
            self.left.push((record.create_revision(), Bytes::copy_from_slice(record.key())));
            self.first_before.entry(name).or_insert(first);
            self.holds.remove(record.key(), self.writer.batch());
        }
        self.writer.delete(record);
    }

    /// Publishes the changes. Effects come in this order: leases, keys that left their queues in the
    /// order of the deletes, new first keys in the order of queue names.
    fn finish(mut self) -> (i64, Vec<Event>, Vec<Effect>) {
        for (create_revision, key) in self.left {
            self.effects.push(Effect::QueueLeft { key, create_revision });
        }
        for (name, before) in self.first_before {
            if self.queues.contains(&name, &before) {
                continue;
            }
            if let Some((create_revision, key)) = self.queues.first(&name).cloned() {
                let record = self.writer.get(&key).expect("a queued key is there");
                let lease_alive = queueing::is_attached(&record);
                let now = self.now;
                self.holds.update(&key, self.writer.batch(), |label| label.granted_at = Some(now));
                self.effects.push(Effect::QueueHead { key, create_revision, lease_alive });
            }
        }
        let (revision, events) = self.writer.publish();
        (revision, events, self.effects)
    }
}

/// Stores a lease that was granted or renewed, and tells of it.
fn held(effects: &mut Vec<Effect>, batch: &mut Batch, id: LeaseId, lease: &Lease) {
    batch.put(schema::lease_key(id), codec::encode_lease(lease));
    let &Lease { deadline, renewed_at_index, .. } = lease;
    effects.push(Effect::LeaseHeld { id, deadline, renewed_at_index });
}
