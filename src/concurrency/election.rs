//! What the Election service has beyond queueing: who leads, and following who leads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::machine::{Range, Record, Store};
use crate::node::{Failure, Node};
use crate::types::{KeyRange, LeaseId};
use crate::watch::{Delivery, WatchSpec, WatchStream};

/// Whether `key` stands in the queue of `name`: a direct child that ends in a lease id.
pub(super) fn in_queue(name: &[u8], key: &[u8]) -> bool {
    key.strip_prefix(name)
        .and_then(|rest| rest.strip_prefix(b"/"))
        .is_some_and(|hex| LeaseId::from_hex(hex).is_some())
}

pub(super) fn children(name: &[u8]) -> KeyRange {
    let mut prefix = name.to_vec();
    prefix.push(b'/');
    KeyRange::prefix(&prefix)
}

/// The leader of election `name`: the oldest key of its queue. `None` when there is none.
pub async fn leader(node: &Node, name: &[u8]) -> Result<(Option<Arc<Record>>, i64), Failure> {
    node.read_barrier().await?;
    let machine = node.machine();
    Ok((machine.queue_head(name), machine.store().revision()))
}

/// The candidates of one election, by age.
struct Candidates {
    name: Bytes,
    /// By create revision and key: one transaction may create several.
    by_age: BTreeMap<(i64, Bytes), Arc<Record>>,
}

impl Candidates {
    /// The candidates at a revision, and that revision.
    fn now(name: Bytes, store: &Store) -> (Candidates, i64) {
        let query = Range::all(children(&name));
        loop {
            let view = store.view();
            // Refused only when compaction has overtaken the view: a newer one will do.
            let Ok(reply) = view.range(&query) else { continue };
            let by_age = reply
                .records
                .into_iter()
                .filter(|record| in_queue(&name, &record.key))
                .map(|record| ((record.create_revision, record.key.clone()), record))
                .collect();
            return (Candidates { name, by_age }, view.revision());
        }
    }

    fn leader(&self) -> Option<&Arc<Record>> {
        self.by_age.values().next()
    }

    fn change(&mut self, record: &Arc<Record>) {
        if !in_queue(&self.name, &record.key) {
            return;
        }
        if record.is_tombstone() {
            self.by_age.retain(|_, candidate| candidate.key != record.key);
        } else {
            self.by_age.insert((record.create_revision, record.key.clone()), record.clone());
        }
    }
}

/// Follows an election: the present leader first, then each proclamation and each new leader.
pub struct Observer {
    candidates: Candidates,
    watch: WatchStream,
    /// To be told next.
    pending: Vec<Leader>,
}

/// What [`Observer::next`] tells: a leader, as it was at a revision.
#[derive(Debug, Clone)]
pub struct Leader {
    pub record: Arc<Record>,
    pub revision: i64,
}

impl Observer {
    /// Begins with what is true now.
    pub async fn begin(node: &Node, name: Bytes) -> Result<Observer, Failure> {
        node.read_barrier().await?;
        let (candidates, revision) = Candidates::now(name.clone(), &node.store());
        let mut watch = node.hub().stream(Duration::from_secs(600));
        let spec = WatchSpec::new(children(&name), revision + 1);
        watch.create(spec).map_err(|_| Failure::TooManyRequests)?;
        let pending = candidates.leader().map(|record| Leader { record: record.clone(), revision });
        Ok(Observer { candidates, watch, pending: pending.into_iter().collect() })
    }

    /// The next thing to tell; `None` when the history it needs was compacted away: begin anew.
    pub async fn next(&mut self) -> Option<Leader> {
        loop {
            if !self.pending.is_empty() {
                return Some(self.pending.remove(0));
            }
            match self.watch.next().await {
                Delivery::Events { events, .. } => {
                    let main = |event: &crate::machine::Event| event.record.mod_revision.main;
                    for events in events.chunk_by(|a, b| main(a) == main(b)) {
                        let before = self.candidates.leader().cloned();
                        for event in events {
                            self.candidates.change(&event.record);
                        }
                        let after = self.candidates.leader().cloned();
                        if let Some(record) = after.filter(|after| Some(after) != before.as_ref()) {
                            self.pending.push(Leader { record, revision: main(&events[0]) });
                        }
                    }
                }
                Delivery::Compacted { .. } => return None,
                Delivery::Progress { .. } => {}
            }
        }
    }
}
