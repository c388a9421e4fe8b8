//! What a member has applied, as one number.
//!
//! Each entry changes the number by where it stands and by what it did: the records it wrote, what
//! happened to leases and queues, and what it answered. So two members that have the same number at
//! the same entry have done the same since the digest began, and one that has once done something
//! else differs from then on. It is stored with the state and goes with it to other members.
//!
//! A digest says at which entry it began. One that a release without it, or with another function,
//! has left behind does not compare, and the members begin anew together, with an entry.

use serde::{Deserialize, Serialize};

use super::mvcc::Hasher;
use super::{
    Command, Effect, Entry, Outcome, Position, Record, Rejection, Reply, TxnOpReply, TxnReply,
    schema,
};
use crate::types::Timestamp;

/// Values from here on count with their CRC, which takes a tenth of the time.
const LONG_VALUE_BYTES: usize = 512;

/// Of the function below. A digest of another version does not compare.
pub const DIGEST_VERSION: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest {
    /// The index of the entry it began after.
    pub since: u64,
    pub value: u64,
}

impl Digest {
    /// Of a cluster that has applied nothing.
    pub(super) const BEGIN: Digest = Digest { since: 0, value: 0 };

    /// After one more entry.
    pub(super) fn with(
        self,
        position: Position,
        now: Timestamp,
        compacted: i64,
        outcome: &Outcome,
    ) -> Digest {
        let mut hasher = Hasher::resume(self.value);
        hasher.number(position.index);
        hasher.number(position.term);
        hasher.number(now.0);
        hasher.number(compacted as u64);
        hasher.number(outcome.revision as u64);
        for event in &outcome.events {
            add_record(&mut hasher, &event.record);
            hasher.number(event.prev.as_ref().map_or(0, |prev| prev.mod_revision().main as u64));
        }
        outcome.effects.iter().for_each(|effect| add_effect(&mut hasher, effect));
        match &outcome.reply {
            Ok(reply) => add_reply(&mut hasher, reply),
            Err(rejection) => add_rejection(&mut hasher, rejection),
        }
        Digest { value: hasher.finish(), ..self }
    }
}

/// Whether the digest begins anew behind `entry`.
pub(super) fn begins_behind(entry: &Entry) -> bool {
    matches!(entry.command, Command::Alarm(super::AlarmAction::BeginDigest))
}

fn add_record(hasher: &mut Hasher, record: &Record) {
    hasher.bytes(record.key());
    if record.value().len() < LONG_VALUE_BYTES {
        hasher.bytes(record.value());
    } else {
        hasher.number(record.value().len() as u64);
        hasher.number(u64::from(crc32fast::hash(record.value())));
    }
    for number in [record.create_revision(), record.version(), record.lease().0] {
        hasher.number(number as u64);
    }
    hasher.number(u64::from(record.mod_revision().sub));
}

fn add_effect(hasher: &mut Hasher, effect: &Effect) {
    match effect {
        Effect::LeaseHeld { id, deadline, renewed_at_index } => {
            hasher.number(1);
            hasher.number(id.0 as u64);
            hasher.number(deadline.0);
            hasher.number(*renewed_at_index);
        }
        Effect::LeaseEnded { id } => {
            hasher.number(2);
            hasher.number(id.0 as u64);
        }
        Effect::QueueHead { key, create_revision, lease_alive } => {
            hasher.number(3 + u64::from(*lease_alive));
            hasher.bytes(key);
            hasher.number(*create_revision as u64);
        }
        Effect::LabelChanged { key } => {
            hasher.number(5);
            hasher.bytes(key);
        }
        Effect::QueueLeft { key, create_revision } => {
            hasher.number(6);
            hasher.bytes(key);
            hasher.number(*create_revision as u64);
        }
    }
}

fn add_reply(hasher: &mut Hasher, reply: &Reply) {
    match reply {
        // What was there before is in the event.
        Reply::Put(_) => hasher.number(1),
        Reply::DeleteRange(reply) => {
            hasher.number(2);
            hasher.number(reply.deleted as u64);
        }
        Reply::Txn(txn) => {
            hasher.number(3);
            add_txn(hasher, txn);
        }
        Reply::Compacted => hasher.number(4),
        Reply::LeaseGranted { id, ttl_seconds } => {
            hasher.number(5);
            hasher.number(id.0 as u64);
            hasher.number(*ttl_seconds as u64);
        }
        Reply::LeaseRevoked => hasher.number(6),
        Reply::LeaseRenewed(ttls) => {
            hasher.number(7);
            ttls.iter().for_each(|ttl| hasher.number(ttl.map_or(0, |ttl| ttl as u64)));
        }
        Reply::LeaseExpired(ended) => {
            hasher.number(8);
            hasher.number(*ended as u64);
        }
        Reply::Enqueued(queued) => {
            hasher.number(9);
            hasher.number(queued.create_revision as u64);
            hasher.number(u64::from(queued.created) << 1 | u64::from(queued.first));
            hasher.number(queued.lease_ttl_seconds as u64);
        }
        Reply::Left(left) => hasher.number(10 + u64::from(*left)),
        Reply::Proclaimed(proclaimed) => hasher.number(12 + u64::from(*proclaimed)),
        Reply::Busy => hasher.number(14),
        Reply::Asked(asked) => {
            hasher.number(15);
            if let Some((key, create_revision)) = asked {
                hasher.bytes(key);
                hasher.number(*create_revision as u64);
            }
        }
        Reply::Alarm(alarm) => {
            hasher.number(16);
            if let Some(alarm) = alarm {
                hasher.bytes(&schema::alarm_key(*alarm));
            }
        }
        Reply::Done => hasher.number(17),
        Reply::AuthChanged { auth_revision } => {
            hasher.number(18);
            hasher.number(*auth_revision);
        }
    }
}

fn add_txn(hasher: &mut Hasher, txn: &TxnReply) {
    hasher.number(u64::from(txn.succeeded));
    for response in &txn.responses {
        match response {
            TxnOpReply::Range { revision, reply } => {
                hasher.number(1);
                hasher.number(*revision as u64);
                hasher.number(reply.count as u64);
                for record in &reply.records {
                    hasher.number(record.mod_revision().main as u64);
                }
            }
            TxnOpReply::Put { .. } => hasher.number(2),
            TxnOpReply::DeleteRange { reply, .. } => {
                hasher.number(3);
                hasher.number(reply.deleted as u64);
            }
            TxnOpReply::Txn(nested) => {
                hasher.number(4);
                add_txn(hasher, nested);
            }
        }
    }
}

fn add_rejection(hasher: &mut Hasher, rejection: &Rejection) {
    let (kind, number) = match rejection {
        Rejection::Compacted { oldest, .. } => (1, *oldest),
        Rejection::FutureRevision { current, .. } => (2, *current),
        Rejection::KeyNotFound => (3, 0),
        Rejection::LeaseNotFound(id) => (4, id.0),
        Rejection::LeaseExists(id) => (5, id.0),
        Rejection::Detached(id) => (6, id.0),
        Rejection::StaleFence { token } => (7, *token),
        Rejection::NoSpace => (8, 0),
        Rejection::Corrupt => (9, 0),
        Rejection::TooManyAlarms(most) => (10, *most as i64),
        Rejection::Auth(refusal) => (11, refusal.number()),
    };
    hasher.number(1_000 + kind);
    hasher.number(number as u64);
}
