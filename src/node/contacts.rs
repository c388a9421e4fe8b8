//! Whether the other members are there.
//!
//! Every member calls every other one twice a second, whoever leads. So it knows since when each
//! has been answering, and a member that was removed learns of it: nobody sends it the entry that
//! removes it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use tonic::Status;

use super::{Node, locked, told};
use crate::raft::frame;
use crate::raft::links::says_removed;
use crate::raft::types::PeerNode;
use crate::types::MemberId;

/// Between two rounds of calls.
const INTERVAL: Duration = Duration::from_millis(500);
/// A member that takes longer to answer is not there.
const DEADLINE: Duration = Duration::from_secs(2);

/// Since when each of the other members has answered without a break, on the monotonic clock. One
/// that does not answer is not in it.
#[derive(Default)]
pub struct Contacts {
    since: Mutex<BTreeMap<MemberId, Duration>>,
}

impl Contacts {
    pub fn since(&self, member: MemberId) -> Option<Duration> {
        locked(&self.since).get(&member).copied()
    }

    /// The members that answered a round that ended at `now`.
    fn answered(&self, members: &[MemberId], now: Duration) {
        let mut since = locked(&self.since);
        since.retain(|member, _| members.contains(member));
        for member in members {
            since.entry(*member).or_insert(now);
        }
    }
}

impl Node {
    /// Calls the others, round by round: runs as long as the member.
    pub(super) async fn keep_in_touch(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        let mut rounds = tokio::time::interval(INTERVAL);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = rounds.tick() => {}
                () = told(&mut stopping) => return,
            }
            self.call_others().await;
        }
    }

    /// One round: when it returns, it is known who is there now.
    pub(super) async fn call_others(&self) {
        let membership = {
            let metrics = self.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.clone()
        };
        let others = membership.nodes().filter(|(id, _)| **id != self.identity.member_id.0);
        let calls = others.map(|(id, node)| async { (MemberId(*id), self.ping(*id, node).await) });
        let answers = futures::future::join_all(calls).await;
        if answers.iter().any(|(_, answer)| answer.as_ref().is_err_and(says_removed)) {
            self.shared.removed.send_replace(true);
        }
        let present = answers.into_iter().filter_map(|(id, answer)| answer.ok().map(|()| id));
        self.shared.contacts.answered(&present.collect::<Vec<_>>(), self.clock.monotonic());
    }

    async fn ping(&self, id: u64, node: &PeerNode) -> Result<(), Status> {
        let mut client = self.links.peer(id, node)?.membership();
        let call = client.ping(frame::encode(&())?);
        match tokio::time::timeout(DEADLINE, call).await {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(Status::deadline_exceeded("no answer within the deadline")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_missed_round_begins_a_contact_anew() {
        let contacts = Contacts::default();
        let (one, two) = (MemberId(1), MemberId(2));
        let at = Duration::from_secs;
        contacts.answered(&[one, two], at(1));
        contacts.answered(&[one], at(2));
        assert_eq!((contacts.since(one), contacts.since(two)), (Some(at(1)), None));
        contacts.answered(&[one, two], at(3));
        assert_eq!((contacts.since(one), contacts.since(two)), (Some(at(1)), Some(at(3))));
    }
}
