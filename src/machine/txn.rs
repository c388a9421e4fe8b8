//! Transactions: which branches are taken, and whether they can be.
//!
//! All compares, those of nested transactions too, look at the state before the transaction. So the
//! branches are chosen first, then everything in them that may be refused is checked, and only then
//! is anything written: a refused transaction leaves no trace.

use std::cmp::Ordering;

use super::lease::LeaseTable;
use super::mvcc::Snapshot;
use super::{
    Compare, CompareResult, CompareTarget, Put, Range, Record, Rejection, Txn, TxnOp, TxnOpReply,
    TxnReply,
};
use crate::mutant;

/// The branches taken by a transaction and by those nested in its branch, in order.
pub(super) struct Path {
    pub succeeded: bool,
    pub nested: Vec<Path>,
}

impl Path {
    pub fn choose(before: Snapshot<'_>, txn: &Txn) -> Path {
        let late = mutant::is("txn-compares-late");
        let compared = if late { before.at((before.revision() - 1).max(1)) } else { before };
        let succeeded = txn.compares.iter().all(|compare| holds(compared, compare));
        let mut path = Path { succeeded, nested: Vec::new() };
        path.nested = path
            .branch(txn)
            .iter()
            .filter_map(|op| match op {
                TxnOp::Txn(nested) => Some(Path::choose(before, nested)),
                TxnOp::Range(_) | TxnOp::Put(_) | TxnOp::DeleteRange(_) => None,
            })
            .collect();
        path
    }

    /// The operations of the branch taken.
    pub fn branch<'t>(&self, txn: &'t Txn) -> &'t [TxnOp] {
        if self.succeeded { &txn.success } else { &txn.failure }
    }

    /// Calls `visit` with each operation that will run, those of nested transactions in their place.
    fn each<'t>(
        &self,
        txn: &'t Txn,
        visit: &mut dyn FnMut(&'t TxnOp) -> Result<(), Rejection>,
    ) -> Result<(), Rejection> {
        let mut nested = self.nested.iter();
        for op in self.branch(txn) {
            match op {
                TxnOp::Txn(txn) => {
                    nested.next().expect("a path has a place for each nested").each(txn, visit)?;
                }
                TxnOp::Range(_) | TxnOp::Put(_) | TxnOp::DeleteRange(_) => visit(op)?,
            }
        }
        Ok(())
    }

    /// Refuses what the branches taken must not do, the puts first, as etcd does.
    pub fn check(
        &self,
        before: Snapshot<'_>,
        leases: &LeaseTable,
        txn: &Txn,
    ) -> Result<(), Rejection> {
        self.each(txn, &mut |op| match op {
            TxnOp::Put(put) => {
                check_present(before, put)?;
                check_lease(leases, put)
            }
            _ => Ok(()),
        })?;
        self.check_ranges(before, txn).map(|_| ())
    }

    /// Refuses unreadable revisions; returns the oldest that the transaction reads.
    fn check_ranges(&self, before: Snapshot<'_>, txn: &Txn) -> Result<i64, Rejection> {
        let mut oldest = before.revision();
        self.each(txn, &mut |op| {
            if let TxnOp::Range(query) = op {
                oldest = oldest.min(before.resolve_in_txn(query)?);
            }
            Ok(())
        })?;
        Ok(oldest)
    }
}

/// `ignore_value` and `ignore_lease` need a pair that is there.
pub(super) fn check_present(before: Snapshot<'_>, put: &Put) -> Result<(), Rejection> {
    let needs_pair = put.value.is_none() || put.lease.is_none();
    if needs_pair && before.get(&put.key).is_none() {
        return Err(Rejection::KeyNotFound);
    }
    Ok(())
}

pub(super) fn check_lease(leases: &LeaseTable, put: &Put) -> Result<(), Rejection> {
    match put.lease {
        Some(id) if !id.is_none() && !leases.contains(id) => Err(Rejection::LeaseNotFound(id)),
        _ => Ok(()),
    }
}

/// Answers a checked range inside a transaction that has come to `present`.
pub(super) fn range(present: Snapshot<'_>, query: &Range) -> TxnOpReply {
    let at = if query.revision > 0 { present.at(query.revision) } else { present };
    TxnOpReply::Range { revision: present.revision(), reply: at.range(query) }
}

/// Runs a read-only transaction. Also returns the oldest revision it read.
pub(super) fn read(present: Snapshot<'_>, txn: &Txn) -> (Result<TxnReply, Rejection>, i64) {
    assert!(txn.is_read_only(), "a transaction that writes needs an entry");
    let path = Path::choose(present, txn);
    match path.check_ranges(present, txn) {
        Ok(oldest) => (Ok(read_branch(present, txn, &path)), oldest),
        Err(rejection) => (Err(rejection), i64::MAX),
    }
}

fn read_branch(present: Snapshot<'_>, txn: &Txn, path: &Path) -> TxnReply {
    let mut nested = path.nested.iter();
    let responses = path.branch(txn).iter().map(|op| match op {
        TxnOp::Range(query) => range(present, query),
        TxnOp::Txn(txn) => {
            let path = nested.next().expect("a path has a place for each nested");
            TxnOpReply::Txn(read_branch(present, txn, path))
        }
        TxnOp::Put(_) | TxnOp::DeleteRange(_) => unreachable!("the transaction is read-only"),
    });
    TxnReply { succeeded: path.succeeded, responses: responses.collect() }
}

fn holds(before: Snapshot<'_>, compare: &Compare) -> bool {
    let (mut found, mut all) = (false, true);
    before.scan(&compare.range, |record| {
        found = true;
        all = passes(compare, Some(record));
        all
    });
    if found { all } else { passes(compare, None) }
}

fn passes(compare: &Compare, record: Option<&Record>) -> bool {
    let number = |of: fn(&Record) -> i64| record.map_or(0, of);
    let order = match &compare.target {
        CompareTarget::Version(version) => number(|record| record.version()).cmp(version),
        CompareTarget::Create(revision) => number(|record| record.create_revision()).cmp(revision),
        CompareTarget::Mod(revision) => number(|record| record.mod_revision().main).cmp(revision),
        CompareTarget::Lease(id) => number(|record| record.lease().0).cmp(id),
        CompareTarget::Value(value) => match record {
            Some(record) => record.value().cmp(value),
            None => return false,
        },
        CompareTarget::Unknown => Ordering::Equal,
    };
    match compare.result {
        CompareResult::Equal => order.is_eq(),
        CompareResult::NotEqual => order.is_ne(),
        CompareResult::Greater => order.is_gt(),
        CompareResult::Less => order.is_lt(),
        CompareResult::Unknown => true,
    }
}
