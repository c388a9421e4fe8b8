//! What a client asks to replicate.
//!
//! A [`Command`] has passed every check that needs no state, and holds everything its effect depends
//! on: ids are chosen, time is in the [`Entry`]. Applying one therefore gives the same answer on
//! every member.
//!
//! The order of enum variants is part of the stored format (`docs/formats.md`): append, never
//! reorder.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{AlarmAction, AuthChange, Principal};
use crate::types::{KeyRange, LeaseId, MemberId, Timestamp};

/// One place in the log, as the machine sees it. Its index and term travel beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Cluster time, by the leader that appended it. Eight bytes wherever it is encoded, so that
    /// the leader can stamp what another member has encoded.
    #[serde(with = "eight_bytes")]
    pub at: Timestamp,
    /// Who waits for the outcome.
    pub origin: Origin,
    pub command: Command,
    /// In whose name; `None` for a client that has not said who it is, as none has to while
    /// authentication is off. Encoded behind everything else, and only if it is there.
    #[serde(skip)]
    pub principal: Option<Principal>,
}

impl Entry {
    /// A copy of an encoded entry, with another time. `None` for bytes too short to be one.
    pub fn stamp(encoded: &[u8], at: Timestamp) -> Option<Bytes> {
        // A format byte comes first.
        const AT: std::ops::Range<usize> = 1..9;
        let mut stamped = encoded.to_vec();
        stamped.get_mut(AT)?.copy_from_slice(&at.0.to_le_bytes());
        Some(stamped.into())
    }
}

mod eight_bytes {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::types::Timestamp;

    pub fn serialize<S: Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
        at.0.to_le_bytes().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        <[u8; 8]>::deserialize(deserializer).map(|bytes| Timestamp(u64::from_le_bytes(bytes)))
    }
}

/// The call that proposed an entry: the member it was made on, and that member's number for it,
/// which is unique among all its incarnations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    pub member: MemberId,
    pub call: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    Put(Put),
    DeleteRange(DeleteRange),
    Txn(Txn),
    /// Forgets the history before `revision`.
    Compact {
        revision: i64,
    },
    /// `ttl_seconds` is already raised to the smallest TTL the cluster grants.
    LeaseGrant {
        id: LeaseId,
        ttl_seconds: i64,
    },
    LeaseRevoke {
        id: LeaseId,
    },
    /// Refills the time to live of each lease that exists.
    LeaseRenew {
        ids: Vec<LeaseId>,
    },
    /// Ends leases whose time has run out, as the leader of `term` saw it.
    LeaseExpire {
        term: u64,
        leases: Vec<ExpiredLease>,
    },
    /// Carries nothing but its time, so that a new leader knows how far leases have run.
    Tick,
    Enqueue(Enqueue),
    /// Deletes `key` if its create revision is still `create_revision`.
    Leave {
        key: Bytes,
        create_revision: i64,
    },
    /// Deletes a lock's key: only one of the form `NAME/HEX` that is attached to the lease HEX.
    Unlock {
        key: Bytes,
    },
    /// Tells the cluster how clients reach a member.
    PublishMember {
        id: MemberId,
        name: String,
        client_urls: Vec<String>,
    },
    /// Gives the key of an election's leader another value: only while it leads.
    Proclaim(Proclaim),
    /// A write that happens only while locks are held.
    Fenced(Fenced),
    Join(Join),
    /// Gives up the place with this token in the queue of a lock.
    Release(Release),
    /// Asks the holder of a lock to give it up.
    AskRelease(AskRelease),
    /// A stream of the holder has passed on what was asked.
    Told {
        key: Bytes,
        create_revision: i64,
    },
    Alarm(AlarmAction),
    /// Changes users and roles.
    Auth(AuthChange),
}

/// A lease the leader found out of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpiredLease {
    pub id: LeaseId,
    /// The log index of the grant or renewal the leader had seen last. A later renewal makes the
    /// expiry void.
    pub renewed_at_index: u64,
}

/// Joins the queue of `name` with the key `NAME/LEASEHEX`, attached to `lease`. A key that is there
/// already keeps its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enqueue {
    pub name: Bytes,
    pub lease: LeaseId,
    pub value: Bytes,
    /// Whether a key that is there already takes the new value when it differs: a campaign does, a
    /// lock does not.
    pub rewrite: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proclaim {
    pub key: Bytes,
    pub create_revision: i64,
    pub value: Bytes,
    /// As whose key the caller speaks; [`LeaseId::NONE`] when it does not say.
    pub lease: LeaseId,
}

/// [`Enqueue`] with what the client says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    pub enqueue: Enqueue,
    pub owner: String,
    pub client: String,
    /// The lease was made for this place alone.
    pub session: bool,
    /// Joins an empty queue only.
    pub only_if_free: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    pub name: Bytes,
    /// The create revision of the key.
    pub token: i64,
    /// Set when somebody else than the holder does it.
    pub forced: Option<Force>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Force {
    pub by: String,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskRelease {
    pub name: Bytes,
    /// Zero: whoever holds it.
    pub token: i64,
    pub by: String,
    pub reason: String,
}

/// Refused unless every fence holds, in the same step as the write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fenced {
    pub fences: Vec<Fence>,
    pub write: FencedWrite,
}

/// Holds while `token` is the create revision of the key that owns lock `name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    pub name: Bytes,
    pub token: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FencedWrite {
    Put(Put),
    DeleteRange(DeleteRange),
    Txn(Txn),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Put {
    pub key: Bytes,
    /// `None` keeps the present value (`ignore_value`).
    pub value: Option<Bytes>,
    /// `None` keeps the present lease (`ignore_lease`); [`LeaseId::NONE`] detaches.
    pub lease: Option<LeaseId>,
    /// Whether the answer holds the pair that was there before.
    pub prev_kv: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteRange {
    pub range: KeyRange,
    /// Whether the answer holds the deleted pairs.
    pub prev_kv: bool,
}

/// A read of a range, alone or inside a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    pub range: KeyRange,
    /// Zero and below: no limit.
    pub limit: i64,
    /// Zero and below: the current revision.
    pub revision: i64,
    pub order: SortOrder,
    pub target: SortTarget,
    pub keys_only: bool,
    pub count_only: bool,
    /// Zero: not set, for each of the four.
    pub min_mod_revision: i64,
    pub max_mod_revision: i64,
    pub min_create_revision: i64,
    pub max_create_revision: i64,
}

impl Range {
    /// Everything in `range`, current, in key order.
    pub fn all(range: KeyRange) -> Range {
        Range {
            range,
            limit: 0,
            revision: 0,
            order: SortOrder::None,
            target: SortTarget::Key,
            keys_only: false,
            count_only: false,
            min_mod_revision: 0,
            max_mod_revision: 0,
            min_create_revision: 0,
            max_create_revision: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SortOrder {
    None,
    Ascend,
    Descend,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SortTarget {
    Key,
    Version,
    Create,
    Mod,
    Value,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub success: Vec<TxnOp>,
    pub failure: Vec<TxnOp>,
}

impl Txn {
    /// Whether neither branch, at any depth, can write.
    pub fn is_read_only(&self) -> bool {
        self.success.iter().chain(&self.failure).all(|op| match op {
            TxnOp::Range(_) => true,
            TxnOp::Put(_) | TxnOp::DeleteRange(_) => false,
            TxnOp::Txn(txn) => txn.is_read_only(),
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TxnOp {
    Range(Range),
    Put(Put),
    DeleteRange(DeleteRange),
    Txn(#[serde(deserialize_with = "super::codec::nested_txn")] Txn),
}

/// Holds when every key of `range` passes; an empty range counts as one absent key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compare {
    pub range: KeyRange,
    pub result: CompareResult,
    pub target: CompareTarget,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CompareResult {
    Equal,
    Greater,
    Less,
    NotEqual,
    /// A number we do not know: etcd lets such a compare pass.
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CompareTarget {
    Version(i64),
    Create(i64),
    Mod(i64),
    /// Never holds for an absent key, whatever the result asked for.
    Value(Bytes),
    Lease(i64),
    /// A number we do not know: etcd takes a present key as equal.
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_changes_the_time_of_an_encoded_entry_and_nothing_else() {
        let origin = Origin { member: MemberId(7), call: u64::MAX };
        let command = Command::Compact { revision: 300 };
        let entry = Entry { at: Timestamp(0), origin, command, principal: None };
        for at in [0, 1, 251, 70_000, u64::MAX].map(Timestamp) {
            let stamped = Entry::stamp(&entry.encode(), at).expect("long enough");
            let decoded = Entry::decode(1, &stamped).expect("still an entry");
            assert_eq!(decoded, Entry { at, ..entry.clone() });
        }
        assert_eq!(Entry::stamp(&[1; 8], Timestamp(1)), None);
    }
}
