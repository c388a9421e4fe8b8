//! What applying an entry produced.

use bytes::Bytes;

use super::{Alarm, AuthRefusal, Record};
use crate::types::{LeaseId, Timestamp};

/// One change that watchers see. The kind is the record's: a put or a tombstone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub record: Record,
    /// The pair before this change; `None` when there was none.
    pub prev: Option<Record>,
}

/// The result of one entry, equal on all members.
#[derive(Debug)]
pub struct Outcome {
    /// The store's revision after the entry.
    pub revision: i64,
    pub reply: Result<Reply, Rejection>,
    /// In the order of the changes; all of one main revision.
    pub events: Vec<Event>,
    pub effects: Vec<Effect>,
}

/// The answer to the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Put(PutReply),
    DeleteRange(DeleteReply),
    Txn(TxnReply),
    Compacted,
    LeaseGranted {
        id: LeaseId,
        ttl_seconds: i64,
    },
    LeaseRevoked,
    /// For each lease asked for, in order: its granted TTL, `None` where there is no such lease.
    LeaseRenewed(Vec<Option<i64>>),
    /// How many leases of the command ended; the others were renewed in the meantime or gone.
    LeaseExpired(usize),
    Enqueued(Enqueued),
    /// Whether a key was deleted by `Leave` or `Unlock`.
    Left(bool),
    /// Whether the key leads, and has the value now.
    Proclaimed(bool),
    /// A lock that was to be taken only if free is not.
    Busy,
    /// The key and create revision of the holder that was asked; `None` when nobody holds the lock
    /// with the token.
    Asked(Option<(Bytes, i64)>),
    /// The alarm that is raised now, or that was cleared; `None` when there was none to clear.
    Alarm(Option<Alarm>),
    /// The revision of users and roles after the entry.
    AuthChanged {
        auth_revision: u64,
    },
    /// For commands that have nothing to say.
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutReply {
    pub prev: Option<Record>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeleteReply {
    pub deleted: i64,
    /// In key order; empty unless asked for.
    pub prev: Vec<Record>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeReply {
    pub records: Vec<Record>,
    /// Whether the limit cut something off.
    pub more: bool,
    /// All keys in the range at the revision read, whatever limit and filters left out.
    pub count: i64,
    /// The values are to be left out of the answer.
    pub keys_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnReply {
    pub succeeded: bool,
    /// One for each operation of the branch taken.
    pub responses: Vec<TxnOpReply>,
}

/// The reply of one operation in a transaction, with the revision its header shows: the one before
/// the transaction until its first write, the transaction's own from then on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOpReply {
    Range { revision: i64, reply: RangeReply },
    Put { revision: i64, reply: PutReply },
    DeleteRange { revision: i64, reply: DeleteReply },
    Txn(TxnReply),
}

/// A place in the queue of a lock or an election.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enqueued {
    pub key: Bytes,
    /// Of the queue key: the place in the queue, and the fencing token.
    pub create_revision: i64,
    /// Whether this entry made the key.
    pub created: bool,
    /// Whether the key is first in its queue.
    pub first: bool,
    /// As granted.
    pub lease_ttl_seconds: i64,
}

/// What the members' own services learn from an entry, beside the events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// The lease was granted or renewed; it ends at `deadline` unless renewed again.
    LeaseHeld {
        id: LeaseId,
        deadline: Timestamp,
        renewed_at_index: u64,
    },
    LeaseEnded {
        id: LeaseId,
    },
    /// `key` has become the first of its queue because the one before it left.
    /// `lease_alive`: the key is attached to the lease that its name says, and that lease exists.
    QueueHead {
        key: Bytes,
        create_revision: i64,
        lease_alive: bool,
    },
    /// What is known beside the queue key `key` has changed.
    LabelChanged {
        key: Bytes,
    },
    /// `key` has left its queue.
    QueueLeft {
        key: Bytes,
        create_revision: i64,
    },
}

/// Why the state machine refused a command. All members reach the same refusal from the same log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("revision {requested} is compacted, the oldest readable is {oldest}")]
    Compacted { requested: i64, oldest: i64 },
    #[error("revision {requested} is in the future, the current one is {current}")]
    FutureRevision { requested: i64, current: i64 },
    /// `ignore_value` or `ignore_lease` on a key that is not there.
    #[error("the key does not exist")]
    KeyNotFound,
    #[error("lease {0} does not exist")]
    LeaseNotFound(LeaseId),
    #[error("lease {0} already exists")]
    LeaseExists(LeaseId),
    /// The key of a queue is there, but does not end with the lease that its name says.
    #[error("the queue key of lease {0} is not attached to it")]
    Detached(LeaseId),
    /// A fenced write by one who does not hold the lock, or no longer.
    #[error("token {token} does not hold the lock")]
    StaleFence { token: i64 },
    /// The alarm of that name is raised, and the command would make the store larger.
    #[error("the store is larger than its quota")]
    NoSpace,
    #[error("there are {0} alarms")]
    TooManyAlarms(usize),
    /// The alarm of that name is raised.
    #[error("the members' states differ")]
    Corrupt,
    #[error(transparent)]
    Auth(#[from] AuthRefusal),
}

/// Why this member cannot go on: its state is not what the log says it must be.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("stored record {what} cannot be read: {reason}")]
    Corrupt { what: String, reason: String },
    #[error("entry {index} cannot be decoded: {reason}")]
    Undecodable { index: u64, reason: String },
    #[error("storage: {0}")]
    Storage(#[from] std::io::Error),
}
