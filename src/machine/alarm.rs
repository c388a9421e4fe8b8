//! Alarms: why the cluster takes no more writes until an operator says that it may.
//!
//! An alarm is raised for one member and binds all of them, because a write that one member cannot
//! take must not happen on any. It is a command like any other, so every member begins to refuse at
//! the same entry: also what was proposed before the alarm and applied after it.
//!
//! | alarm | refuses | leaves |
//! | --- | --- | --- |
//! | [`AlarmKind::NoSpace`] | what makes the store larger | deletes, compaction, renewals and the end of leases |
//! | [`AlarmKind::Corrupt`] | every change of keys, leases and history | renewals of leases |

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::apply::Edit;
use super::mvcc::RECORD_OVERHEAD_BYTES;
use super::{
    Command, Enqueue, FencedWrite, Join, Machine, Proclaim, Put, Rejection, Reply, Txn, TxnOp,
    schema,
};
use crate::types::MemberId;

/// How many alarms may be raised: the ids of members are whatever a client says.
const MOST_ALARMS: usize = 1_000;

/// What a lease, and an entry of another small table, counts for in [`Machine::used_bytes`].
const ROW_BYTES: u64 = 256;

/// What is wrong. The order is part of the stored format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AlarmKind {
    /// The store has grown beyond the quota.
    NoSpace,
    /// The members' states differ.
    Corrupt,
}

/// An alarm, and the member that it was raised for: any number, as in etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Alarm {
    pub member: MemberId,
    pub kind: AlarmKind,
}

/// What an entry does to the alarms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AlarmAction {
    /// Raises it; one that is raised already stays as it is.
    Raise(Alarm),
    Clear(Alarm),
    /// The [`Digest`](super::Digest) by which the members find out that an alarm is due begins anew
    /// behind this entry.
    BeginDigest,
}

/// The alarms that are raised.
#[derive(Debug, Default, Clone)]
pub(super) struct Alarms {
    pub raised: BTreeSet<Alarm>,
}

impl Alarms {
    pub fn any(&self, kind: AlarmKind) -> bool {
        self.raised.iter().any(|alarm| alarm.kind == kind)
    }

    /// Why `command` must not change anything now.
    pub fn refusal(&self, command: &Command) -> Option<Rejection> {
        if self.raised.is_empty() {
            return None;
        }
        self.kinds().refusal(command)
    }

    pub fn kinds(&self) -> AlarmKinds {
        AlarmKinds { no_space: self.any(AlarmKind::NoSpace), corrupt: self.any(AlarmKind::Corrupt) }
    }
}

/// Which kinds of alarms are raised, for whichever members.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct AlarmKinds {
    pub no_space: bool,
    pub corrupt: bool,
}

impl AlarmKinds {
    /// Why a command is refused while these are raised.
    pub fn refusal(self, command: &Command) -> Option<Rejection> {
        if self.corrupt && command.changes_data() {
            Some(Rejection::Corrupt)
        } else if self.no_space && command.growth_bytes() > 0 {
            Some(Rejection::NoSpace)
        } else {
            None
        }
    }
}

impl Command {
    /// By how much applying it may make the store larger, as [`Machine::used_bytes`] counts. Zero
    /// for what serves to make it smaller, although a delete leaves a tombstone.
    pub fn growth_bytes(&self) -> u64 {
        match self {
            Command::Put(put) => of_put(put),
            Command::Txn(txn) => of_txn(txn),
            Command::Fenced(fenced) => match &fenced.write {
                FencedWrite::Put(put) => of_put(put),
                FencedWrite::DeleteRange(_) => 0,
                FencedWrite::Txn(txn) => of_txn(txn),
            },
            Command::LeaseGrant { .. } => ROW_BYTES,
            Command::Enqueue(enqueue) | Command::Join(Join { enqueue, .. }) => of_place(enqueue),
            Command::Proclaim(Proclaim { key, value, .. }) => of_pair(key.len(), value.len()),
            Command::DeleteRange(_)
            | Command::Compact { .. }
            | Command::LeaseRevoke { .. }
            | Command::LeaseRenew { .. }
            | Command::LeaseExpire { .. }
            | Command::Tick
            | Command::Leave { .. }
            | Command::Unlock { .. }
            | Command::PublishMember { .. }
            | Command::Release(_)
            | Command::AskRelease(_)
            | Command::Told { .. }
            | Command::Alarm(_)
            | Command::Auth(_) => 0,
        }
    }

    /// Whether it may change keys, leases or history. Renewing a lease changes no more than how long
    /// it has left.
    fn changes_data(&self) -> bool {
        match self {
            Command::LeaseRenew { .. }
            | Command::Tick
            | Command::PublishMember { .. }
            | Command::Told { .. }
            | Command::Alarm(_)
            | Command::Auth(_) => false,
            Command::Put(_)
            | Command::DeleteRange(_)
            | Command::Txn(_)
            | Command::Compact { .. }
            | Command::LeaseGrant { .. }
            | Command::LeaseRevoke { .. }
            | Command::LeaseExpire { .. }
            | Command::Enqueue(_)
            | Command::Leave { .. }
            | Command::Unlock { .. }
            | Command::Proclaim(_)
            | Command::Fenced(_)
            | Command::Join(_)
            | Command::Release(_)
            | Command::AskRelease(_) => true,
        }
    }
}

fn of_pair(key_bytes: usize, value_bytes: usize) -> u64 {
    (key_bytes + value_bytes) as u64 + RECORD_OVERHEAD_BYTES
}

fn of_put(put: &Put) -> u64 {
    of_pair(put.key.len(), put.value.as_ref().map_or(0, |value| value.len()))
}

/// Of the larger branch: which one is taken nobody knows yet.
fn of_txn(txn: &Txn) -> u64 {
    of_branch(&txn.success).max(of_branch(&txn.failure))
}

fn of_branch(operations: &[TxnOp]) -> u64 {
    let growth = operations.iter().map(|operation| match operation {
        TxnOp::Put(put) => of_put(put),
        TxnOp::Txn(txn) => of_txn(txn),
        TxnOp::Range(_) | TxnOp::DeleteRange(_) => 0,
    });
    growth.sum()
}

fn of_place(enqueue: &Enqueue) -> u64 {
    const HEX_DIGITS: usize = 17;
    of_pair(enqueue.name.len() + HEX_DIGITS, enqueue.value.len())
}

impl Edit<'_> {
    pub(super) fn alarm(&mut self, action: AlarmAction) -> Result<Reply, Rejection> {
        Ok(match action {
            AlarmAction::Raise(alarm) => {
                let raised = &self.alarms.raised;
                if raised.len() >= MOST_ALARMS && !raised.contains(&alarm) {
                    return Err(Rejection::TooManyAlarms(MOST_ALARMS));
                }
                if self.alarms.raised.insert(alarm) {
                    self.writer.batch().put(schema::alarm_key(alarm), []);
                }
                Reply::Alarm(Some(alarm))
            }
            AlarmAction::Clear(alarm) => {
                let was_raised = self.alarms.raised.remove(&alarm);
                if was_raised {
                    self.writer.batch().remove(schema::alarm_key(alarm));
                }
                Reply::Alarm(was_raised.then_some(alarm))
            }
            AlarmAction::BeginDigest => Reply::Done,
        })
    }
}

impl Machine {
    /// The alarms that are raised, in order of the members they were raised for.
    pub fn alarms(&self) -> impl Iterator<Item = Alarm> {
        self.alarms.raised.iter().copied()
    }

    /// Which kinds of alarms are raised.
    pub fn alarm_kinds(&self) -> AlarmKinds {
        self.alarms.kinds()
    }

    /// What keys, history, leases and the small tables take, in bytes: equal on all members that
    /// have applied the same entries, however far each has removed what was compacted.
    pub fn used_bytes(&self) -> u64 {
        self.space.used_bytes() + self.rows_bytes()
    }

    /// The part of it that is no history.
    pub(super) fn rows_bytes(&self) -> u64 {
        let holds = self.holds.labels.len() + self.holds.forced.len();
        let rows = self.leases.len() + self.members.len() + holds + self.auth.rows();
        rows as u64 * ROW_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::{delete, one, put, txn};
    use crate::types::LeaseId;

    #[test]
    fn a_transaction_grows_by_its_larger_branch_at_any_depth() {
        let put = |value: &str| TxnOp::Put(put("k", value));
        let nested = |ops: Vec<TxnOp>| TxnOp::Txn(txn(vec![], ops, vec![]));
        let growth = |success: Vec<TxnOp>, failure: Vec<TxnOp>| {
            Command::Txn(txn(vec![], success, failure)).growth_bytes()
        };
        let deleted = || TxnOp::DeleteRange(delete(one("k")));
        let of_one = RECORD_OVERHEAD_BYTES + 2;
        assert_eq!(growth(vec![deleted()], vec![nested(vec![deleted()])]), 0);
        assert_eq!(growth(vec![deleted()], vec![put("v")]), of_one);
        assert_eq!(growth(vec![nested(vec![put("v"), put("v")])], vec![put("v")]), 2 * of_one);
        assert_eq!(Command::LeaseRevoke { id: LeaseId(1) }.growth_bytes(), 0);
    }
}
