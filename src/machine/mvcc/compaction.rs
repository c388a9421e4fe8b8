//! The physical half of compaction: removing what no reader can see any more.
//!
//! A compaction at revision C leaves of each key the newest record at or before C, unless that is a
//! tombstone older than C. A pass walks the journal from where the previous one ended to C. Each
//! record it meets makes the one before it (of the same key) garbage, and a tombstone is garbage
//! itself once what it hid is gone:
//!
//! ```text
//! put@2  put@5  delete@7  | C = 8       garbage, in this order: 2 5 7
//! put@2  put@5  delete@8  | C = 8       garbage: 2 5; the next pass begins at 8 and takes the rest
//! ```
//!
//! So a key's records go oldest first, in memory and in storage. That order is what makes an
//! interrupted removal harmless: no put ever outlives the tombstone that ended it.

use super::{History, NEVER_COMPACTED};
use crate::machine::{Record, schema};
use crate::mutant;
use crate::storage::Batch;
use crate::types::Revision;

pub struct Scrubber {
    /// The compacted revision that is scrubbed completely.
    clean_to: i64,
    pass: Option<Pass>,
}

struct Pass {
    target: i64,
    next: Revision,
}

impl Scrubber {
    /// For a history of which nobody knows how far it was scrubbed: a fresh or a loaded one.
    pub fn new() -> Scrubber {
        Scrubber { clean_to: NEVER_COMPACTED, pass: None }
    }

    /// Looks at up to `budget` records (at least one) and removes what they make garbage; adds the
    /// engine's keys to `batch`. Returns whether more remains to be looked at. While the history is
    /// held, does nothing.
    pub fn run(&mut self, history: &History, budget: usize, batch: &mut Batch) -> bool {
        if history.is_held() {
            return self.clean_to < history.compacted();
        }
        let mut left = budget.max(1);
        while self.clean_to < history.compacted() {
            let pass = self.pass.get_or_insert_with(|| Pass {
                target: history.compacted(),
                next: Revision::first_of(self.clean_to),
            });
            let end = Revision::last_of(pass.target);
            for record in history.records(pass.next, end) {
                if left == 0 {
                    pass.next = record.mod_revision();
                    return true;
                }
                left -= 1;
                scrub(history, &record, pass.target, batch);
            }
            self.clean_to = pass.target;
            self.pass = None;
        }
        false
    }
}

/// Removes what `record`, at or before the compacted revision `target`, makes garbage.
fn scrub(history: &History, record: &Record, target: i64, batch: &mut Batch) {
    let remove = |record: &Record, batch: &mut Batch| {
        history.journal.remove(record);
        batch.garbage.push(schema::record_key(record.mod_revision()).into());
    };
    for older in history.index.remove_before(record).iter().rev() {
        remove(older, batch);
    }
    let spared = i64::from(!mutant::is("compaction-takes-the-delete"));
    if record.is_tombstone() && record.mod_revision().main + spared <= target {
        history.index.remove_oldest(record);
        remove(record, batch);
    }
}
