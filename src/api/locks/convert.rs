//! What is known of locks, as messages.

use std::time::Duration;

use crate::concurrency::hold::Tell;
use crate::concurrency::locks::{LockState, NotGranted, Standing};
use crate::machine::{Asked, ForcedRelease, QueueKey};
use crate::node::Node;
use crate::pb::holdfastpb as pb;
use crate::pb::holdfastpb::check_response;
use crate::pb::holdfastpb::hold_response::{self, Response};
use crate::types::Timestamp;

/// An answer of this member.
pub struct Moment<'a> {
    pub node: &'a Node,
}

/// The header of an answer that is true at `revision`.
pub fn header(node: &Node, revision: i64) -> Option<pb::Header> {
    let header = node.header();
    Some(pb::Header {
        cluster_id: header.cluster_id.0,
        member_id: header.member_id.0,
        revision,
        term: header.raft_term,
    })
}

pub fn count(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

pub fn standing(standing: Standing) -> i32 {
    use check_response::Standing as Wire;
    i32::from(match standing {
        Standing::Current => Wire::Current,
        Standing::Stale => Wire::Stale,
        Standing::Future => Wire::Future,
        Standing::Unknown => Wire::Unknown,
    })
}

fn whole_ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

impl Moment<'_> {
    pub fn header(&self) -> Option<pb::Header> {
        header(self.node, self.node.header().revision)
    }

    pub fn lock(&self, state: &LockState) -> pb::Lock {
        let holders = usize::from(state.holder().is_some());
        let waiters = state.queue.iter().enumerate().skip(holders);
        pb::Lock {
            name: state.name.clone(),
            holder: state.holder().map(|holder| self.place(holder, 0, state.now)),
            waiters: waiters.map(|(ahead, key)| self.place(key, ahead, state.now)).collect(),
            waiting: count(state.length - holders),
            forced: state.forced.iter().map(|forced| wire_forced(forced, state.now)).collect(),
        }
    }

    /// A key with `ahead` others before it.
    pub fn place(&self, key: &QueueKey, ahead: usize, now: Timestamp) -> pb::Place {
        let label = key.label.as_ref();
        let joined_at = label.map(|label| label.joined_at);
        let granted_at = label.and_then(|label| label.granted_at);
        let waited = joined_at.map(|joined| granted_at.unwrap_or(now).since(joined));
        let held = granted_at.map(|granted| now.since(granted));
        let wall_ms = i64::try_from(self.node.clock().wall_ms()).unwrap_or(i64::MAX);
        pb::Place {
            position: count(ahead),
            key: bytes::Bytes::copy_from_slice(key.record.key()),
            token: key.record.create_revision(),
            lease: key.record.lease().0,
            live: key.attached,
            inferred: label.is_none(),
            owner: label.map(|label| label.owner.clone()).unwrap_or_default(),
            client: label.map(|label| label.client.clone()).unwrap_or_default(),
            ttl_seconds: key.lease.map_or(0, |(ttl_seconds, _)| ttl_seconds),
            left_ms: key.lease.map_or(0, |(_, deadline)| whole_ms(deadline.since(now))),
            waited_ms: waited.map_or(0, whole_ms),
            held_ms: held.map_or(0, whole_ms),
            held_since_unix_ms: held.map_or(0, |held| wall_ms.saturating_sub(whole_ms(held))),
            asked: label.and_then(|label| label.asked.as_ref()).map(|asked| wish(asked, now)),
        }
    }

    pub fn hold_response(&self, tell: Tell) -> pb::HoldResponse {
        let holder = |not: &NotGranted| not.holder.as_ref().map(|key| self.place(key, 0, not.now));
        let response = match tell {
            Tell::Queued { lease, place } => Response::Queued(hold_response::Queued {
                position: count(place.ahead),
                holder: holder(&place),
                lease: lease.0,
            }),
            Tell::Granted { granted, left } => Response::Granted(hold_response::Granted {
                token: granted.create_revision,
                key: granted.key,
                lease: granted.lease.0,
                ttl_seconds: granted.lease_ttl_seconds,
                left_ms: whole_ms(left),
            }),
            Tell::Renewed { ping, ttl_seconds } => {
                Response::Renewed(hold_response::Renewed { ping_id: ping, ttl_seconds })
            }
            Tell::RevokeRequested { by, reason } => {
                Response::RevokeRequested(hold_response::RevokeRequested { by, reason })
            }
            Tell::Uncertain { left } => {
                Response::Uncertain(hold_response::Uncertain { left_ms: whole_ms(left) })
            }
            Tell::Lost { reason } => Response::Lost(hold_response::Lost { reason }),
            Tell::Released { released } => Response::Released(hold_response::Released { released }),
            Tell::NotGranted(not) => Response::NotGranted(hold_response::NotGranted {
                holder: holder(&not),
                position: count(not.ahead),
            }),
        };
        pb::HoldResponse { header: self.header(), response: Some(response) }
    }
}

fn wish(asked: &Asked, now: Timestamp) -> pb::ReleaseWish {
    pb::ReleaseWish {
        by: asked.by.clone(),
        reason: asked.reason.clone(),
        age_ms: whole_ms(now.since(asked.at)),
        told: asked.told,
    }
}

fn wire_forced(forced: &ForcedRelease, now: Timestamp) -> pb::Forced {
    pb::Forced {
        token: forced.token,
        owner: forced.owner.clone(),
        client: forced.client.clone(),
        by: forced.by.clone(),
        reason: forced.reason.clone(),
        age_ms: whole_ms(now.since(forced.at)),
    }
}
