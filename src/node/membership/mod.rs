//! Who belongs to the cluster, and how that changes.
//!
//! The leader makes all changes, one at a time, each by one entry in the log that adds, removes or
//! renews one member: there is never a joint configuration, so a leader that dies leaves a change
//! either made or not. A quorum of the voters before always has a member in common with one of the
//! voters after.
//!
//! A voter that is added does not count in quorums at once: the entry would need its vote before it
//! has even been started. It is a learner of openraft's until its log reaches near enough, and the
//! leader then makes it a voter by itself ([`Node::keep_promoting`]). Clients see a voter all along.
//!
//! A change that another member is asked for is passed on to the leader, and again only when the
//! leader says that it has done nothing.

mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::raft::Precondition;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

pub use rules::{ChangeRefusal, ChangeRules};

use super::{Failure, Member, Node};
use crate::raft::frame;
use crate::raft::types::{Membership, PeerNode, is_learner};
use crate::types::{ClusterId, MemberId};

/// A member counts as connected once it has answered for this long.
const HEALTHY_AFTER: Duration = Duration::from_secs(5);
/// How many entries a voter may lack when it begins to count.
const ENTRIES_LACKING: u64 = 5_000;
/// Before openraft is asked again for what it refused without doing anything.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// A change of one member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    Add {
        peer_urls: Vec<String>,
        learner: bool,
    },
    Remove {
        id: MemberId,
    },
    /// Other members reach it at `peer_urls` from now on. Empty: URLs that cannot be used.
    Update {
        id: MemberId,
        peer_urls: Vec<String>,
    },
    /// Gives a learner its vote.
    Promote {
        id: MemberId,
    },
}

/// A change that was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Changed {
    /// Its entry in the log.
    index: u64,
    pub id: MemberId,
    pub members: Vec<Member>,
}

/// Why a change was not made, or may not have been.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeFailure {
    #[error(transparent)]
    Refused(#[from] ChangeRefusal),
    /// After [`Failure::TimedOut`] and [`Failure::Unknown`] it may or may not be made.
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// What the leader says of a change that it was asked for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Verdict {
    Done(Changed),
    Refused(ChangeRefusal),
    /// Nothing was done, and will not be by this member.
    NotLeading,
    Unknown,
    TimedOut,
    Stopping,
}

/// What becomes of an attempt that did not end the matter.
enum Attempt {
    Again,
    Ends(Verdict),
}

impl Node {
    /// Makes `change` and returns once it is committed, and applied here.
    ///
    /// # Errors
    ///
    /// See [`ChangeRefusal`]: the change is not made. See [`ChangeFailure::Failed`] for when it may
    /// be.
    pub async fn change_members(&self, change: Change) -> Result<Changed, ChangeFailure> {
        if self.leader().is_none() {
            // Who cannot reach a leader can still tell that the cluster is not whole.
            if let Err(refusal) = self.check(&change, self.new_id(&change))
                && matches!(refusal, ChangeRefusal::Unhealthy | ChangeRefusal::NotEnoughStarted)
            {
                return Err(refusal.into());
            }
        }
        match tokio::time::timeout(self.limits.call_timeout, self.change_somewhere(&change)).await {
            Ok(result) => result,
            Err(_) => Err(Failure::TimedOut.into()),
        }
    }

    async fn change_somewhere(&self, change: &Change) -> Result<Changed, ChangeFailure> {
        loop {
            // There is a leader, it answers, and what it knows is known here.
            self.read_barrier().await?;
            let Some(leader) = self.role().leader else { continue };
            let verdict = if leader == self.identity.member_id {
                self.change_here(change).await
            } else {
                self.ask_leader(leader, change).await
            };
            match verdict {
                Verdict::Done(changed) => {
                    let stays = changed.members.iter().any(|it| it.id == self.identity.member_id);
                    // Nobody sends it its own removal.
                    if stays {
                        self.applied_up_to(changed.index).await?;
                    }
                    return Ok(changed);
                }
                Verdict::Refused(refusal) => return Err(refusal.into()),
                Verdict::NotLeading => tokio::time::sleep(RETRY_PAUSE).await,
                Verdict::Unknown => return Err(Failure::Unknown.into()),
                Verdict::TimedOut => return Err(Failure::TimedOut.into()),
                Verdict::Stopping => return Err(Failure::Stopping.into()),
            }
        }
    }

    async fn ask_leader(&self, leader: MemberId, change: &Change) -> Verdict {
        let Some(peer) = self.links_to(leader) else { return Verdict::NotLeading };
        let Ok(question) = frame::encode(change) else { return Verdict::Stopping };
        let mut client = peer.membership();
        // The caller has a deadline for all of this.
        let answer = client.change(question).await;
        // Whatever broke: the leader may have got it.
        let answer = answer.and_then(|answer| frame::decode(answer.get_ref()));
        answer.unwrap_or(Verdict::Unknown)
    }

    /// The leader's side: makes `change` if this member leads.
    pub(super) async fn change_here(&self, change: &Change) -> Verdict {
        let made = async {
            let _turn = self.changes.lock().await;
            // The rules ask who is there at this moment.
            self.call_others().await;
            loop {
                if let Attempt::Ends(verdict) = self.attempt(change).await {
                    return verdict;
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        };
        let made = tokio::time::timeout(self.limits.call_timeout, made).await;
        made.unwrap_or(Verdict::TimedOut)
    }

    async fn attempt(&self, change: &Change) -> Attempt {
        if self.role().leading.is_none() {
            return Attempt::Ends(Verdict::NotLeading);
        }
        let Some(membership) = self.settled() else { return Attempt::Again };
        let new_id = self.new_id(change);
        if let Err(refusal) = self.check(change, new_id) {
            return Attempt::Ends(Verdict::Refused(refusal));
        }
        let (id, proposal) = match change {
            Change::Add { peer_urls, learner } => {
                let node = PeerNode::added(peer_urls.clone(), *learner);
                (new_id, Proposal::Whole(Members::of(&membership).with(new_id, node)))
            }
            Change::Remove { id } if *id == self.identity.member_id => {
                // The next leader does it: one that is no member must not go on leading.
                self.hand_over().await;
                let leads = self.role().leader == Some(*id);
                return Attempt::Ends(if leads { Verdict::TimedOut } else { Verdict::NotLeading });
            }
            Change::Remove { id } => (*id, Proposal::Whole(Members::of(&membership).without(*id))),
            Change::Promote { id } => (*id, Proposal::Whole(Members::of(&membership).voting(*id))),
            Change::Update { id, peer_urls } => {
                let node = membership.membership().get_node(&id.0).cloned().unwrap_or_default();
                let node = PeerNode { peer_urls: peer_urls.clone(), ..node };
                (*id, Proposal::Node(*id, node))
            }
        };
        match self.propose_members(&membership, proposal).await {
            Ok(index) => {
                let members = self.members();
                Attempt::Ends(Verdict::Done(Changed { index, id, members }))
            }
            Err(attempt) => attempt,
        }
    }

    /// The membership, if what openraft goes by is committed and applied here.
    fn settled(&self) -> Option<Membership> {
        let applied = self.shared.membership.borrow().clone();
        let metrics = self.raft.server_metrics();
        let effective = metrics.borrow_watched().membership_config.clone();
        (effective.log_id() == applied.log_id()).then_some(applied)
    }

    /// Appends one entry, unless the membership is not `before` any more. Returns its index once it
    /// is applied here.
    async fn propose_members(
        &self,
        before: &Membership,
        proposal: Proposal,
    ) -> Result<u64, Attempt> {
        let unchanged =
            [Precondition::LastMembershipLogId { last_membership_log_id: *before.log_id() }];
        let result = match proposal {
            Proposal::Whole(members) => {
                let nodes = members.nodes;
                let Ok(membership) = openraft::Membership::new(vec![members.voters], nodes) else {
                    return Err(Attempt::Ends(Verdict::Refused(ChangeRefusal::NotEnoughStarted)));
                };
                let blank = openraft::EntryPayload::Blank;
                self.raft.append_membership(membership, blank, unchanged).await
            }
            Proposal::Node(id, node) => {
                let change = ChangeMembers::SetNodes(BTreeMap::from([(id.0, node)]));
                self.raft.change_membership_if(change, true, unchanged).await
            }
        };
        match result {
            Ok(done) => {
                // openraft tells after it has applied the entry.
                Ok(done.log_id.index)
            }
            Err(RaftError::Fatal(_)) => Err(Attempt::Ends(Verdict::Stopping)),
            Err(RaftError::APIError(error)) => Err(match error {
                // Not appended: this member is not sure of its leadership, or something else is
                // under way.
                ClientWriteError::ForwardToLeader(_)
                | ClientWriteError::PreconditionFailed(_)
                | ClientWriteError::ChangeMembershipError(
                    ChangeMembershipError::InProgress(_)
                    | ChangeMembershipError::UncommittedLeaderLog(_),
                ) => Attempt::Again,
                ClientWriteError::LogEntryDiscarded(_) => Attempt::Ends(Verdict::Unknown),
                ClientWriteError::ChangeMembershipError(refused) => {
                    tracing::error!(%refused, "openraft refuses a change of membership");
                    Attempt::Ends(Verdict::Unknown)
                }
            }),
        }
    }

    /// # Errors
    ///
    /// The first rule that `change` breaks, as far as this member knows.
    fn check(&self, change: &Change, new_id: MemberId) -> Result<(), ChangeRefusal> {
        let now = self.clock.monotonic();
        let contacts = &self.shared.contacts;
        let long_enough = |since: Duration| now.saturating_sub(since) >= HEALTHY_AFTER;
        let membership = self.shared.membership.borrow().clone();
        let metrics = self.raft.metrics();
        let (reached, last) = {
            let metrics = metrics.borrow_watched();
            (metrics.replication.clone(), metrics.last_log_index.unwrap_or(0))
        };
        let reached = |id: MemberId| {
            let reached = reached.as_ref()?.get(&id.0).cloned().flatten();
            Some(reached.map_or(0, |log_id| log_id.index))
        };
        rules::Situation {
            rules: self.change_rules,
            members: &self.members(),
            counted: &membership.voter_ids().collect(),
            me: self.identity.member_id,
            present: &|id| contacts.since(id).is_some(),
            connected: &|id| contacts.since(id).is_some_and(long_enough),
            // As etcd has it: nine tenths of the leader's log.
            in_sync: &|id| {
                id == self.identity.member_id
                    || reached(id).is_some_and(|reached| reached * 10 >= last * 9)
            },
        }
        .check(change, new_id)
    }

    /// The id for the member that `change` adds.
    fn new_id(&self, change: &Change) -> MemberId {
        let Change::Add { peer_urls, .. } = change else { return MemberId::default() };
        let second = self.clock.wall_ms() / 1_000;
        let machine = self.machine();
        new_id(self.identity.cluster_id, peer_urls, second, machine.retired_members())
    }

    /// All members, as of the newest change applied here.
    pub fn members(&self) -> Vec<Member> {
        let membership = self.shared.membership.borrow().clone();
        let machine = self.machine();
        let published = machine.published_members();
        let member = |(id, node): (&u64, &PeerNode)| {
            let known = published.get(&MemberId(*id));
            let name = known.map_or_else(|| node.first_name(), |known| known.name.as_str());
            Member {
                id: MemberId(*id),
                name: name.to_owned(),
                peer_urls: node.peer_urls.clone(),
                client_urls: known.map(|known| known.client_urls.clone()).unwrap_or_default(),
                is_learner: is_learner(&membership, *id),
            }
        };
        membership.nodes().map(member).collect()
    }

    /// Who votes by this member's log, be the change committed or not.
    pub(super) fn voters_of_the_log(&self) -> Vec<MemberId> {
        let metrics = self.raft.server_metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        membership.voter_ids().map(MemberId).collect()
    }

    /// Whether this member belongs to the cluster without a vote, as of the newest change applied.
    pub fn learner(&self) -> watch::Receiver<bool> {
        self.shared.learner.subscribe()
    }

    /// Turns true when this member learns that it was removed from the cluster.
    pub fn removed(&self) -> watch::Receiver<bool> {
        self.shared.removed.subscribe()
    }

    /// Gives voters that were added their vote, once they have caught up: runs as long as the
    /// member, and does something while it leads.
    pub(super) async fn keep_promoting(self: Arc<Self>) {
        let mut membership = self.shared.membership.subscribe();
        let mut role = self.shared.role.subscribe();
        let mut metrics = self.raft.metrics();
        loop {
            let waiting = {
                let membership = membership.borrow_and_update();
                let leads = role.borrow_and_update().leading.is_some();
                if leads { without_vote(&membership) } else { Vec::new() }
            };
            if waiting.is_empty() {
                tokio::select! {
                    changed = membership.changed() => if changed.is_err() { return },
                    changed = role.changed() => if changed.is_err() { return },
                }
                continue;
            }
            let caught_up = {
                let metrics = metrics.borrow_and_update();
                let wanted = metrics.last_log_index.unwrap_or(0).saturating_sub(ENTRIES_LACKING);
                let reached = |id: &u64| metrics.replication.as_ref()?.get(id).cloned().flatten();
                waiting.into_iter().find(|id| {
                    self.shared.contacts.since(MemberId(*id)).is_some()
                        && reached(id).is_some_and(|log_id| log_id.index >= wanted)
                })
            };
            if let Some(id) = caught_up {
                let _turn = self.changes.lock().await;
                if let Some(before) = self.settled() {
                    let members = Members::of(&before).voting(MemberId(id));
                    // Should it fail, the next round sees why.
                    if self.propose_members(&before, Proposal::Whole(members)).await.is_ok() {
                        tracing::info!(member_id = %MemberId(id), "an added member votes now");
                        continue;
                    }
                }
            }
            // Metrics change with every entry and heartbeat: no need to look at each.
            tokio::time::sleep(RETRY_PAUSE).await;
            tokio::select! {
                changed = metrics.changed() => if changed.is_err() { return },
                changed = membership.changed() => if changed.is_err() { return },
                changed = role.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// What openraft is asked for.
enum Proposal {
    Whole(Members),
    Node(MemberId, PeerNode),
}

struct Members {
    voters: BTreeSet<u64>,
    nodes: BTreeMap<u64, PeerNode>,
}

impl Members {
    fn of(membership: &Membership) -> Members {
        let nodes = membership.nodes().map(|(id, node)| (*id, node.clone())).collect();
        Members { voters: membership.voter_ids().collect(), nodes }
    }

    fn with(mut self, id: MemberId, node: PeerNode) -> Members {
        self.nodes.insert(id.0, node);
        self
    }

    fn without(mut self, id: MemberId) -> Members {
        self.nodes.remove(&id.0);
        self.voters.remove(&id.0);
        self
    }

    fn voting(mut self, id: MemberId) -> Members {
        self.voters.insert(id.0);
        self
    }
}

/// The members that were added as voters and have no vote yet.
fn without_vote(membership: &Membership) -> Vec<u64> {
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let waits = |(id, node): &(&u64, &PeerNode)| !voters.contains(id) && !node.came_as_learner();
    membership.nodes().filter(waits).map(|(id, _)| *id).collect()
}

/// An id that depends on the second, so that a member that is removed and added again is another
/// one. Never zero, and never that of a member that was removed.
fn new_id(
    cluster: ClusterId,
    peer_urls: &[String],
    second: u64,
    retired: &BTreeSet<MemberId>,
) -> MemberId {
    let mut sorted: Vec<&str> = peer_urls.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    let sorted = sorted.join(",");
    let ids = (0u64..).map(|attempt| {
        let digest = Sha256::digest(format!("{sorted}\n{cluster}\n{second}\n{attempt}"));
        let (first, _) = digest.split_first_chunk().expect("SHA-256 gives 32 bytes");
        MemberId(u64::from_be_bytes(*first))
    });
    let mut usable = ids.filter(|id| id.0 != 0 && !retired.contains(id));
    usable.next().expect("few ids are retired")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_id_never_comes_back_and_a_second_makes_another() {
        let urls = ["http://b:1".to_owned(), "http://a:1".to_owned()];
        let swapped = [urls[1].clone(), urls[0].clone()];
        let mut retired = BTreeSet::new();
        let first = new_id(ClusterId(7), &urls, 100, &retired);
        assert_eq!(new_id(ClusterId(7), &swapped, 100, &retired), first);
        assert_ne!(new_id(ClusterId(7), &urls, 101, &retired), first);
        assert_ne!(new_id(ClusterId(8), &urls, 100, &retired), first);
        retired.insert(first);
        assert_ne!(new_id(ClusterId(7), &urls, 100, &retired), first);
    }
}
