//! What the Election service has beyond queueing: who leads, and following who leads.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;

use crate::machine::{Range, RangeReply, Record, Store};
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
pub async fn leader(node: &Node, name: &[u8]) -> Result<(Option<Record>, i64), Failure> {
    node.read_barrier().await?;
    let machine = node.machine();
    Ok((machine.queue_head(name), machine.store().revision()))
}

/// The candidates of one election, by age.
struct Candidates {
    name: Bytes,
    /// By create revision and key: one transaction may create several.
    by_age: BTreeMap<(i64, Bytes), Record>,
}

impl Candidates {
    /// The candidates at a revision, and that revision.
    fn now(name: Bytes, store: &Store) -> (Candidates, i64) {
        let query = Range::all(children(&name));
        loop {
            let view = store.view();
            // Refused only when compaction has overtaken the view: a newer one will do.
            let Ok(reply) = view.range(&query) else { continue };
            return (Candidates::of(name, reply), view.revision());
        }
    }

    /// The candidates at `revision`; `None` when that cannot be read, or not any more.
    fn at(name: Bytes, store: &Store, revision: i64) -> Option<Candidates> {
        let query = Range { revision, ..Range::all(children(&name)) };
        Some(Candidates::of(name, store.view().range(&query).ok()?))
    }

    fn of(name: Bytes, reply: RangeReply) -> Candidates {
        let by_age = reply
            .records
            .into_iter()
            .filter(|record| in_queue(&name, record.key()))
            .map(|record| {
                ((record.create_revision(), Bytes::copy_from_slice(record.key())), record)
            })
            .collect();
        Candidates { name, by_age }
    }

    fn leader(&self) -> Option<&Record> {
        self.by_age.values().next()
    }

    fn change(&mut self, record: &Record) {
        if !in_queue(&self.name, record.key()) {
            return;
        }
        if record.is_tombstone() {
            self.by_age.retain(|_, candidate| candidate.key() != record.key());
        } else {
            self.by_age.insert(
                (record.create_revision(), Bytes::copy_from_slice(record.key())),
                record.clone(),
            );
        }
    }
}

/// Follows an election: the present first, then each proclamation, each new leader, and when nobody
/// leads any more.
pub struct Observer {
    candidates: Candidates,
    watch: WatchStream,
    /// To be told next.
    pending: VecDeque<Seen>,
}

/// What [`Observer::next`] tells: how an election stood at a revision.
#[derive(Debug, Clone)]
pub struct Seen {
    /// `None` when nobody leads.
    pub leader: Option<Record>,
    /// Whether the one before was another, or is not known.
    pub is_new: bool,
    pub revision: i64,
}

impl Observer {
    /// Begins with what is true now.
    pub async fn begin(node: &Node, name: Bytes) -> Result<Observer, Failure> {
        Observer::begin_after(node, name, 0).await
    }

    /// Goes on after `revision`, on any member; begins with what is true now where that cannot be
    /// read, and for zero.
    pub async fn begin_after(node: &Node, name: Bytes, revision: i64) -> Result<Observer, Failure> {
        node.read_barrier().await?;
        let store = node.store();
        let known = match revision {
            1.. => Candidates::at(name.clone(), &store, revision),
            _ => None,
        };
        let mut pending = VecDeque::new();
        let (candidates, revision) = match known {
            Some(candidates) => (candidates, revision),
            None => {
                let (candidates, revision) = Candidates::now(name.clone(), &store);
                let leader = candidates.leader().cloned();
                pending.push_back(Seen { leader, is_new: true, revision });
                (candidates, revision)
            }
        };
        let mut watch = node.hub().stream(Duration::from_secs(600));
        let spec = WatchSpec::new(children(&name), revision + 1);
        watch.create(spec).map_err(|_| Failure::TooManyRequests)?;
        Ok(Observer { candidates, watch, pending })
    }

    /// The next thing to tell; `None` when the history it needs was compacted away: begin anew.
    pub async fn next(&mut self) -> Option<Seen> {
        loop {
            if let Some(seen) = self.pending.pop_front() {
                return Some(seen);
            }
            match self.watch.next().await {
                Delivery::Events { events, .. } => {
                    let main = |event: &crate::machine::Event| event.record.mod_revision().main;
                    for events in events.chunk_by(|a, b| main(a) == main(b)) {
                        let before = self.candidates.leader().cloned();
                        for event in events {
                            self.candidates.change(&event.record);
                        }
                        let leader = self.candidates.leader().cloned();
                        if leader == before {
                            continue;
                        }
                        let term = |it: &Option<Record>| {
                            it.as_ref()
                                .map(|it| (it.create_revision(), Bytes::copy_from_slice(it.key())))
                        };
                        let is_new = term(&leader) != term(&before);
                        self.pending.push_back(Seen { leader, is_new, revision: main(&events[0]) });
                    }
                }
                Delivery::Compacted { .. } => return None,
                Delivery::Progress { .. } => {}
            }
        }
    }
}

/// Whether a candidate's key ends with the lease that it names: one that does not leads nobody.
pub fn is_attached(record: &Record) -> bool {
    let hex = record.key().rsplit(|byte| *byte == b'/').next();
    hex.and_then(LeaseId::from_hex) == Some(record.lease())
}
