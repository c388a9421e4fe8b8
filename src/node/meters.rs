//! What a member counts while it runs, for whoever watches over it.
//!
//! What can be read when somebody asks (the revision, who leads, how large the store is) is not
//! here: see [`Facts`](super::Facts).

use std::sync::Arc;

use crate::machine::{Reply, TxnOpReply, TxnReply};
use crate::metrics::{Counter, DISK_BOUNDS_US, Histogram};

/// Counted from the start of the process.
#[derive(Debug)]
pub struct Meters {
    pub proposals_failed: Counter,
    /// How often a leader became known, other than the one known before.
    pub leader_changes: Counter,
    pub slow_applies: Arc<Counter>,
    /// Rounds of linearizable reads that took long to be confirmed.
    pub slow_reads: Counter,
    /// Linearizable reads that no leader confirmed in time.
    pub reads_failed: Counter,
    pub health_successes: Counter,
    pub health_failures: Counter,

    // Of the entries applied here, whoever proposed them.
    pub puts: Counter,
    /// Only those inside transactions: other ranges are no entries.
    pub ranges: Counter,
    pub deletes: Counter,
    pub txns: Counter,
    pub leases_granted: Counter,
    pub leases_revoked: Counter,
    pub leases_renewed: Counter,
    pub leases_expired: Counter,

    /// How often the disk was at one write for longer than an election takes.
    pub disk_stalls: Counter,
    /// Of the log's syncs.
    pub log_sync: Arc<Histogram>,
    /// Of the syncs of the state behind it.
    pub state_flush: Arc<Histogram>,
}

impl Default for Meters {
    fn default() -> Meters {
        Meters {
            proposals_failed: Counter::default(),
            leader_changes: Counter::default(),
            slow_applies: Arc::default(),
            slow_reads: Counter::default(),
            reads_failed: Counter::default(),
            health_successes: Counter::default(),
            health_failures: Counter::default(),
            puts: Counter::default(),
            ranges: Counter::default(),
            deletes: Counter::default(),
            txns: Counter::default(),
            leases_granted: Counter::default(),
            leases_revoked: Counter::default(),
            leases_renewed: Counter::default(),
            leases_expired: Counter::default(),
            disk_stalls: Counter::default(),
            log_sync: Arc::new(Histogram::new(DISK_BOUNDS_US)),
            state_flush: Arc::new(Histogram::new(DISK_BOUNDS_US)),
        }
    }
}

impl Meters {
    /// Counts what an applied entry did.
    pub(super) fn count(&self, reply: &Reply) {
        match reply {
            Reply::Put(_) => self.puts.increment(),
            Reply::DeleteRange(_) => self.deletes.increment(),
            Reply::Txn(txn) => self.count_txn(txn),
            Reply::LeaseGranted { .. } => self.leases_granted.increment(),
            Reply::LeaseRevoked => self.leases_revoked.increment(),
            Reply::LeaseRenewed(leases) => {
                self.leases_renewed.add(leases.iter().flatten().count() as u64);
            }
            // In etcd the end of a lease is a revocation by the server.
            Reply::LeaseExpired(leases) => {
                self.leases_expired.add(*leases as u64);
                self.leases_revoked.add(*leases as u64);
            }
            Reply::Enqueued(enqueued) => self.puts.add(u64::from(enqueued.created)),
            Reply::Left(deleted) => self.deletes.add(u64::from(*deleted)),
            Reply::Proclaimed(proclaimed) => self.puts.add(u64::from(*proclaimed)),
            Reply::Compacted
            | Reply::Busy
            | Reply::Asked(_)
            | Reply::Alarm(_)
            | Reply::AuthChanged { .. }
            | Reply::Done => {}
        }
    }

    /// Counts the operations of a transaction, and the transaction itself if it had several.
    pub fn count_txn(&self, txn: &TxnReply) {
        if self.count_operations(txn) > 1 {
            self.txns.increment();
        }
    }

    fn count_operations(&self, txn: &TxnReply) -> usize {
        let count = |operation: &TxnOpReply| match operation {
            TxnOpReply::Range { .. } => {
                self.ranges.increment();
                1
            }
            TxnOpReply::Put { .. } => {
                self.puts.increment();
                1
            }
            TxnOpReply::DeleteRange { .. } => {
                self.deletes.increment();
                1
            }
            TxnOpReply::Txn(inner) => self.count_operations(inner),
        };
        txn.responses.iter().map(count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{PutReply, RangeReply};

    fn put() -> TxnOpReply {
        TxnOpReply::Put { revision: 2, reply: PutReply { prev: None } }
    }

    fn txn(responses: Vec<TxnOpReply>) -> TxnReply {
        TxnReply { succeeded: true, responses }
    }

    #[test]
    fn a_transaction_counts_by_its_operations() {
        let meters = Meters::default();
        let range = TxnOpReply::Range { revision: 2, reply: RangeReply::default() };
        meters.count(&Reply::Txn(txn(vec![put()])));
        meters.count(&Reply::Txn(txn(vec![range, TxnOpReply::Txn(txn(vec![put()]))])));
        let counts =
            [&meters.puts, &meters.ranges, &meters.deletes, &meters.txns].map(Counter::get);
        assert_eq!(counts, [2, 1, 0, 1], "a transaction of one operation is that operation");
    }

    #[test]
    fn an_expired_lease_is_a_revoked_one_too() {
        let meters = Meters::default();
        meters.count(&Reply::LeaseRenewed(vec![Some(5), None, Some(6)]));
        meters.count(&Reply::LeaseExpired(3));
        let counts = [&meters.leases_renewed, &meters.leases_expired, &meters.leases_revoked];
        assert_eq!(counts.map(Counter::get), [2, 3, 3]);
    }
}
