//! On the leader: the wait of a Lock or Campaign call until its key is first in its queue.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::mutant;
use crate::node::{Node, WaitingFor, told};
use crate::types::LeaseId;

/// A key's place in its queue, as the entry that made or found it told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub key: Bytes,
    pub create_revision: i64,
    /// The entry up to which a member must have applied the log to know of the key.
    pub index: u64,
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Turn {
    Granted {
        /// A revision at which the key is the first of its queue: where it became so, as far as
        /// the leader saw it happen.
        revision: i64,
        /// The entry up to which this is known.
        index: u64,
    },
    /// The key or its lease went away.
    Gone,
    /// This member does not lead, or no longer: ask the one that does.
    Moved,
}

/// Waits until `place` is the first of its queue. Changes nothing, so it may be asked again and of
/// several members.
pub async fn wait(node: &Node, place: &Place) -> Turn {
    let role = node.role();
    if role.leading.is_none() || node.applied_up_to_entry(place.index).await.is_err() {
        return Turn::Moved;
    }
    // Listening begins before the state is looked at, so that nothing is missed in between.
    let mut waiter = node.waiters().listen(place.key.clone());
    if let Some(turn) = turn_now(node, place) {
        return turn;
    }
    let mine = place.create_revision;
    let mut roles = node.watch_role();
    let mut stopping = node.stopping();
    loop {
        match waiter.news.borrow_and_update().latest {
            WaitingFor::First { create_revision, revision, lease_alive }
                if create_revision == mine =>
            {
                return if lease_alive || mutant::is("grant-without-lease") {
                    Turn::Granted { revision, index: node.applied_index() }
                } else {
                    Turn::Gone
                };
            }
            WaitingFor::Left { create_revision }
                if create_revision == mine && mutant::is("grant-of-a-lost-key") =>
            {
                let revision = node.view().revision();
                return Turn::Granted { revision, index: node.applied_index() };
            }
            WaitingFor::Left { create_revision } if create_revision == mine => return Turn::Gone,
            // News of an earlier key of the same name.
            _ => {}
        }
        tokio::select! {
            biased;
            changed = waiter.news.changed() => if changed.is_err() { return Turn::Moved },
            _ = roles.wait_for(|now| now.term != role.term || now.leading.is_none()) => {
                return Turn::Moved;
            }
            () = told(&mut stopping) => return Turn::Moved,
        }
    }
}

/// Whether the wait is over as things are; `None` while others stand before `place`.
fn turn_now(node: &Node, place: &Place) -> Option<Turn> {
    let slash = place.key.iter().rposition(|byte| *byte == b'/')?;
    let (name, hex) = (&place.key[..slash], &place.key[slash + 1..]);
    let machine = node.machine();
    let view = machine.store().view();
    let record = view.get(&place.key).filter(|it| it.create_revision() == place.create_revision);
    let Some(record) = record else { return Some(Turn::Gone) };
    if machine.queue_head(name)?.key() != place.key {
        return None;
    }
    let attached = LeaseId::from_hex(hex).is_some_and(|lease| lease == record.lease());
    if !attached || machine.leases().get(record.lease()).is_none() {
        return Some(Turn::Gone);
    }
    Some(Turn::Granted { revision: view.revision(), index: node.applied_index() })
}
