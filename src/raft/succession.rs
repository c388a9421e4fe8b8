//! The end of a leader, noticed before any timeout, and the vote of confidence for the next one.
//!
//! When the leader's process dies, its kernel closes its connections at once. A member that sees
//! that looks whether the leader is still there. If it is not, openraft's lease, the time for which
//! a member that has heard the leader votes for nobody else, has lost its reason:
//!
//! 1. The member asks all voters for a pre-vote. It says what openraft's own says: would you vote
//!    for me, with this log? Nothing changes by it.
//! 2. Whoever is asked and has a lease looks for itself whether the leader is there, and refuses
//!    if it is, or if the leader's streams to it stand. It refuses a shorter log, too, and anyone but the first who asks within a while: of
//!    two who ask at the same time one gets a majority at most.
//! 3. With a majority the member stands for election, as if the leader had named it, if by then it
//!    follows no other.
//!
//! Terms and votes are openraft's alone, so nothing here can make two leaders of a term. A false
//! alarm is ended by the leader's next message, and a member that is cut off alone raises no term.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use openraft::ServerState;
use openraft::raft::{TransferLeaderRequest, VoteRequest, VoteResponse};
use tokio::sync::Notify;
use tonic::{Code, Status};

use super::frame;
use super::links::{Links, io_error, is_refusal};
use super::peer_service::{LeaderContact, RaftHandle};
use super::types::{LogId, PeerNode, Raft, Vote};
use crate::metrics::Counter;
use crate::types::MemberId;

/// Between two looks at a leader whose connection was refused in an unclear way.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What one look at the leader has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Leads,
    /// It says so itself, or its machine says that nobody listens there.
    Gone,
    /// No answer in time.
    Silent,
}

/// How this member stands, as openraft has it at one moment.
#[derive(Debug, Clone)]
struct Standing {
    vote: Vote,
    leads: bool,
    last: Option<LogId>,
    /// More than one set while the membership changes: each needs a majority of its own.
    voters: Vec<BTreeSet<u64>>,
    nodes: Vec<(u64, PeerNode)>,
}

impl Standing {
    /// The leader whose lease holds this member's vote back.
    fn leader(&self) -> Option<u64> {
        self.vote.committed.then_some(self.vote.leader_id.voted_for)
    }

    fn is_voter(&self, member: u64) -> bool {
        self.voters.iter().any(|voters| voters.contains(&member))
    }

    fn has_majority(&self, granted: &BTreeSet<u64>) -> bool {
        self.voters.iter().all(|voters| voters.intersection(granted).count() > voters.len() / 2)
    }
}

#[derive(Default)]
struct State {
    /// The leader that was found gone, and how many of its messages had come by then.
    gone: Option<(Vote, u64)>,
    /// How many messages from a leader had come when one of its streams last ended,
    ended_at: Option<u64>,
    /// and when a connection with it was last seen to break.
    lost_at: Option<u64>,
    /// Who has this member's pre-vote, and since when: nobody else gets it for a while.
    favoured: Option<(u64, Duration)>,
}

/// What this member has found out about the end of its leader, and what it and the others do then.
pub struct Succession {
    me: u64,
    raft: RaftHandle,
    links: Arc<Links>,
    contact: Arc<LeaderContact>,
    /// How long one look at the leader, or one member's pre-vote, may take.
    patience: Duration,
    state: Mutex<State>,
    suspected: Notify,
    ended: Notify,
    outrun: Notify,
    counts: Counts,
}

/// How often this member has done what.
#[derive(Debug, Default)]
pub struct Counts {
    /// Looked whether the leader is there.
    pub looks: Counter,
    /// Found it gone.
    pub gone: Counter,
    /// Asked the others for their pre-vote.
    pub ballots: Counter,
}

/// What became of asking for the others' confidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ballot {
    /// This member stands for election.
    Stands,
    /// The leader is there, or there is another, or this member has no vote.
    Pointless,
    /// No majority so far.
    Refused,
}

impl Succession {
    /// `patience` bounds each look at the leader, and each question to another member.
    pub fn new(
        me: MemberId,
        raft: RaftHandle,
        links: Arc<Links>,
        contact: Arc<LeaderContact>,
        patience: Duration,
    ) -> Succession {
        Succession {
            me: me.0,
            raft,
            links,
            contact,
            patience,
            state: Mutex::default(),
            suspected: Notify::new(),
            ended: Notify::new(),
            counts: Counts::default(),
            outrun: Notify::new(),
        }
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// A stream from or to the leader has ended, for the reason in `status` if there was one.
    pub fn suspect(&self, status: Option<&Status>) {
        {
            let mut state = self.lock();
            state.ended_at = Some(self.contact.messages());
            if status.is_some_and(|status| io_error(status).is_some()) {
                state.lost_at = state.ended_at;
            }
        }
        self.ended.notify_waiters();
        self.suspected.notify_one();
    }

    /// Returns when there is reason to look whether the leader is there.
    pub async fn suspected(&self) {
        self.suspected.notified().await;
    }

    /// Returns when a member with a shorter log than this one has asked for its pre-vote.
    pub async fn outrun(&self) {
        self.outrun.notified().await;
    }

    /// Looks whether the leader that this member follows is gone. If so, says how many voters other
    /// than the leader come before this one, by their ids; `None` if there is nothing to do.
    pub async fn rank(&self) -> Option<usize> {
        let standing = self.standing().await?;
        if !standing.is_voter(self.me) || !self.leader_gone(&standing).await {
            return None;
        }
        let leader = standing.leader();
        let mut voters: Vec<u64> = standing.voters.into_iter().flatten().collect();
        voters.sort_unstable();
        voters.dedup();
        voters.retain(|voter| Some(*voter) != leader);
        voters.iter().position(|voter| *voter == self.me)
    }

    /// Whether another member has this one's pre-vote, and so comes first.
    pub fn favours_another(&self) -> bool {
        let now = self.links.now();
        self.lock().favours(now, self.patience).is_some_and(|favoured| favoured != self.me)
    }

    /// Asks all voters for their pre-vote, and stands for election if a majority gives it.
    pub async fn ask(&self) -> Ballot {
        let Some(standing) = self.standing().await else { return Ballot::Pointless };
        if !standing.is_voter(self.me) || !self.is_known_gone(&standing.vote) {
            return Ballot::Pointless;
        }
        if !self.favour(self.me, false) {
            return Ballot::Refused;
        }
        self.counts.ballots.increment();
        let mut ballot = self.count(&standing).await;
        let of_this = |favoured: &mut (u64, Duration)| favoured.0 == self.me;
        // Meanwhile it may have given way to a better one.
        if ballot == Ballot::Stands && !self.lock().favoured.as_mut().is_some_and(of_this) {
            ballot = Ballot::Refused;
        }
        if ballot != Ballot::Stands {
            self.lock().favoured.take_if(of_this);
            return ballot;
        }
        // Taken for a transfer by the leader that is gone: openraft makes sure that this member
        // still follows it, raises the term, and the others need not wait for their leases.
        let request = TransferLeaderRequest::new(standing.vote, self.me, standing.last);
        match self.raft.handle_transfer_leader(request).await {
            Ok(Ok(())) => Ballot::Stands,
            Ok(Err(reason)) => {
                tracing::debug!(%reason, "does not stand for election");
                Ballot::Refused
            }
            Err(_) => Ballot::Pointless,
        }
    }

    async fn count(&self, standing: &Standing) -> Ballot {
        let vote = Vote::new(standing.vote.leader_id.term + 1, self.me);
        let mut request = VoteRequest::<Raft>::new(vote, standing.last);
        // Tells these pre-votes from openraft's own, whose elections ask for votes that the lease of
        // the dead leader still stands against.
        request.leadership_transfer = true;
        let mut granted = BTreeSet::from([self.me]);
        let others = standing.nodes.iter();
        let others = others.filter(|(id, _)| *id != self.me && standing.is_voter(*id));
        let mut answers: FuturesUnordered<_> = others
            .map(|(id, node)| async { (*id, self.ask_one(*id, node, &request).await) })
            .collect();
        while !standing.has_majority(&granted) {
            match answers.next().await {
                Some((id, Ok(answer))) => {
                    tracing::debug!(member = %MemberId(id), %answer, "pre-vote");
                    if answer.vote_granted {
                        granted.insert(id);
                    }
                }
                Some((id, Err(status))) => {
                    tracing::debug!(member = %MemberId(id), %status, "no pre-vote");
                }
                None => return Ballot::Refused,
            }
        }
        // While that was counted, the leader may have spoken.
        if self.is_known_gone(&standing.vote) { Ballot::Stands } else { Ballot::Pointless }
    }

    async fn ask_one(
        &self,
        member: u64,
        node: &PeerNode,
        request: &VoteRequest<Raft>,
    ) -> Result<VoteResponse<Raft>, Status> {
        let mut client = self.links.peer(member, node)?.raft();
        let question = frame::encode(request)?;
        // The other looks at the leader first.
        let answer = tokio::time::timeout(2 * self.patience, client.pre_vote(question)).await;
        let answer = answer.map_err(|_| Status::unavailable("no answer within the deadline"))??;
        frame::decode(answer.get_ref())
    }

    /// Answers another member's pre-vote: as openraft does, unless only the lease of a leader that
    /// is gone stands against it.
    pub async fn on_pre_vote(
        &self,
        mut request: VoteRequest<Raft>,
    ) -> Result<VoteResponse<Raft>, Status> {
        let candidate = request.vote.leader_id.voted_for;
        // To openraft it would mean that the lease does not count at all.
        let for_succession = std::mem::take(&mut request.leadership_transfer);
        let answer = self.raft.pre_vote(request.clone()).await;
        let answer = answer.map_err(|error| Status::unavailable(error.to_string()))?;
        if answer.vote_granted || !for_succession {
            return Ok(answer);
        }
        let Some(standing) = self.standing().await else { return Ok(answer) };
        let of_this_term = request.vote.leader_id.term <= standing.vote.leader_id.term;
        if of_this_term || standing.leader().is_none_or(|leader| leader == self.me) {
            return Ok(answer);
        }
        if request.last_log_id < standing.last {
            // Better this one, and better now.
            self.outrun.notify_one();
            self.suspected.notify_one();
            return Ok(answer);
        }
        // Of two that ask each other at the same time, one has to.
        let better = request.last_log_id > standing.last || candidate < self.me;
        if !self.leader_gone(&standing).await || !self.favour(candidate, better) {
            return Ok(answer);
        }
        Ok(VoteResponse::new(standing.vote, standing.last, true))
    }

    /// Answers another member that looks whether this one leads `term`.
    pub async fn leads(&self, term: u64) -> Result<bool, Status> {
        let standing = self.standing().await.ok_or_else(|| Status::unavailable("stopping"))?;
        Ok(standing.leads && standing.vote.leader_id.term == term)
    }

    /// Whether the leader that this member follows is gone, after a look if that is not known.
    async fn leader_gone(&self, standing: &Standing) -> bool {
        if self.is_known_gone(&standing.vote) {
            return true;
        }
        let Some(leader) = standing.leader().filter(|leader| *leader != self.me) else {
            return false;
        };
        let Some((_, node)) = standing.nodes.iter().find(|(id, _)| *id == leader) else {
            return false;
        };
        self.counts.looks.increment();
        let heard = self.contact.messages();
        let look = self.look(leader, node, standing.vote.leader_id.term);
        let found = match tokio::time::timeout(self.patience, look).await {
            Ok(Found::Leads) => return false,
            Ok(found) => found,
            Err(_) => Found::Silent,
        };
        // One whose streams stand is there, even if it takes no new connections.
        if tokio::time::timeout(self.patience, self.ended_after(heard)).await.is_err() {
            return false;
        }
        let mut state = self.lock();
        // One that is only slow ends streams, but breaks no connection.
        if found == Found::Silent && state.lost_at != Some(heard) {
            return false;
        }
        if self.contact.messages() == heard && state.gone != Some((standing.vote, heard)) {
            tracing::info!(leader = %MemberId(leader), ?found, "the leader is gone");
            self.counts.gone.increment();
            state.gone = Some((standing.vote, heard));
        }
        drop(state);
        self.is_known_gone(&standing.vote)
    }

    /// Returns once a stream of the leader has ended after `heard` messages.
    async fn ended_after(&self, heard: u64) {
        loop {
            let mut ended = pin!(self.ended.notified());
            ended.as_mut().enable();
            if self.lock().ended_at == Some(heard) {
                return;
            }
            ended.await;
        }
    }

    async fn look(&self, leader: u64, node: &PeerNode, term: u64) -> Found {
        loop {
            match self.look_once(leader, node, term).await {
                Ok(true) => return Found::Leads,
                Ok(false) => return Found::Gone,
                Err(status) => {
                    tracing::debug!(leader = %MemberId(leader), %status, "no answer");
                    match status.code() {
                        _ if is_refusal(&status) => return Found::Gone,
                        // An earlier release is there, and cannot say more.
                        Code::Unimplemented => return Found::Leads,
                        _ => tokio::time::sleep(LOOK_AGAIN).await,
                    }
                }
            }
        }
    }

    /// Over a connection of its own: an old one may not have noticed yet.
    async fn look_once(&self, leader: u64, node: &PeerNode, term: u64) -> Result<bool, Status> {
        let mut client = self.links.connect_anew(leader, node).await?;
        let answer = client.leads(frame::encode(&term)?).await?;
        frame::decode(answer.get_ref())
    }

    /// Whether the leader with `vote` was found gone, and nothing was heard of any since.
    fn is_known_gone(&self, vote: &Vote) -> bool {
        let heard = self.contact.messages();
        self.lock().gone.is_some_and(|(gone, then)| gone == *vote && then == heard)
    }

    /// Gives `candidate` this member's pre-vote, unless another has it. This member itself gives way
    /// to one that is `better`: with a longer log, or as long a one and a smaller id.
    fn favour(&self, candidate: u64, better: bool) -> bool {
        let now = self.links.now();
        self.lock().favour(candidate, now, self.patience, better.then_some(self.me))
    }

    async fn standing(&self) -> Option<Standing> {
        let standing = self.raft.with_raft_state(|state| {
            let membership = state.membership_state.effective();
            Standing {
                vote: *state.vote_ref(),
                leads: state.server_state == ServerState::Leader,
                last: state.log_ids.last().copied(),
                voters: membership.get_joint_config().clone(),
                nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
            }
        });
        // Only a member that stops has no answer.
        standing.await.ok()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn favours(&self, now: Duration, patience: Duration) -> Option<u64> {
        let (candidate, since) = self.favoured?;
        // Its election takes a few messages and a sync or two.
        (now.saturating_sub(since) <= 2 * patience).then_some(candidate)
    }

    /// Favours `candidate` from `now` on, unless somebody else but `gives_way` is.
    fn favour(
        &mut self,
        candidate: u64,
        now: Duration,
        patience: Duration,
        gives_way: Option<u64>,
    ) -> bool {
        let favoured = self.favours(now, patience);
        if favoured.is_some() && favoured != Some(candidate) && favoured != gives_way {
            return false;
        }
        self.favoured = Some((candidate, now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_candidate_at_a_time_is_favoured_for_a_while() {
        let at = Duration::from_millis;
        let patience = at(100);
        let mut state = State::default();
        assert!(state.favour(1, at(1_000), patience, None));
        assert!(!state.favour(2, at(1_010), patience, None), "1 has it");
        assert!(state.favour(1, at(1_020), patience, None), "it may ask again");
        assert!(!state.favour(3, at(1_030), patience, Some(2)), "2 gives way, not 1");
        assert!(state.favour(3, at(1_040), patience, Some(1)), "1 itself gives way");
        assert_eq!(state.favours(at(1_240), patience), Some(3));
        assert_eq!(state.favours(at(1_241), patience), None, "it had time enough");
        assert!(state.favour(2, at(1_300), patience, None));
    }

    #[test]
    fn a_majority_is_one_of_each_set_of_voters() {
        let standing = Standing {
            vote: Vote::new_committed(3, 1),
            leads: false,
            last: None,
            voters: vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([3, 4, 5])],
            nodes: Vec::new(),
        };
        assert!(!standing.has_majority(&BTreeSet::from([2, 3])));
        assert!(!standing.has_majority(&BTreeSet::from([1, 2, 4])));
        assert!(standing.has_majority(&BTreeSet::from([2, 3, 4])));
        assert_eq!(standing.leader(), Some(1));
        assert!(!standing.is_voter(6));
    }
}
