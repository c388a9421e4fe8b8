//! Which changes of the members are refused, in etcd's order and with etcd's arithmetic.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::Change;
use crate::node::Member;
use crate::types::MemberId;

/// Why a change is not made. The members stay as they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ChangeRefusal {
    #[error("the URLs are malformed")]
    BadUrls,
    #[error("a member has this id")]
    IdExists,
    #[error("a member has one of these URLs")]
    UrlExists,
    #[error("there is no such member")]
    NotFound,
    #[error("the member is no learner")]
    NotLearner,
    #[error("the learner lacks too much")]
    LearnerNotReady,
    #[error("there are too many learners")]
    TooManyLearners,
    #[error("too few members have started")]
    NotEnoughStarted,
    #[error("too few members are connected")]
    Unhealthy,
}

/// What an operator may choose about changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangeRules {
    /// Refuse what may cost the quorum.
    pub strict: bool,
    pub max_learners: usize,
}

/// What the rules look at.
pub struct Situation<'s> {
    pub rules: ChangeRules,
    pub members: &'s [Member],
    /// Those that count in a quorum: a voter that was added counts once it has caught up.
    pub counted: &'s BTreeSet<u64>,
    /// The member that decides.
    pub me: MemberId,
    /// The other members that answer now.
    pub present: &'s dyn Fn(MemberId) -> bool,
    /// The other members that have been answering long enough.
    pub connected: &'s dyn Fn(MemberId) -> bool,
    /// The member's log reaches as far as a learner's must to be promoted.
    pub in_sync: &'s dyn Fn(MemberId) -> bool,
}

impl Situation<'_> {
    /// # Errors
    ///
    /// The first rule that `change` breaks. `new_id` is the id that an added member would get.
    pub fn check(&self, change: &Change, new_id: MemberId) -> Result<(), ChangeRefusal> {
        match change {
            Change::Add { peer_urls, learner } => self.check_add(peer_urls, *learner, new_id),
            Change::Remove { id } => self.check_remove(*id),
            Change::Update { id, peer_urls } => {
                self.member(*id).ok_or(ChangeRefusal::NotFound)?;
                if peer_urls.is_empty() {
                    return Err(ChangeRefusal::BadUrls);
                }
                self.check_urls(peer_urls, Some(*id))
            }
            Change::Promote { id } => self.check_promote(*id),
        }
    }

    fn check_add(
        &self,
        peer_urls: &[String],
        learner: bool,
        new_id: MemberId,
    ) -> Result<(), ChangeRefusal> {
        if self.rules.strict {
            let (started, voting) = self.started_of(None);
            // One alone may always get a second: how a cluster grows from a single survivor.
            let grows_from_one = started == 1 && voting == 1;
            if !learner && !grows_from_one && started < quorum(voting + 1) {
                return Err(ChangeRefusal::NotEnoughStarted);
            }
            if voting > 1 && self.connected() < quorum(voting + 1) {
                return Err(ChangeRefusal::Unhealthy);
            }
        }
        if self.member(new_id).is_some() {
            return Err(ChangeRefusal::IdExists);
        }
        self.check_urls(peer_urls, None)?;
        let learners = self.members.iter().filter(|member| member.is_learner).count();
        if learner && learners >= self.rules.max_learners {
            return Err(ChangeRefusal::TooManyLearners);
        }
        Ok(())
    }

    fn check_remove(&self, id: MemberId) -> Result<(), ChangeRefusal> {
        let member = self.member(id);
        if member.is_some_and(|member| member.is_learner) {
            return Ok(());
        }
        if self.rules.strict {
            let (started, voting) = self.started_of(Some(id));
            if started < quorum(voting) {
                return Err(ChangeRefusal::NotEnoughStarted);
            }
            // One that is down is no part of the quorum: it may go.
            let is_down = id != self.me && !(self.present)(id);
            let voting = self.voting().count();
            if !is_down && self.connected().saturating_sub(1) < 1 + (voting - 1) / 2 {
                return Err(ChangeRefusal::Unhealthy);
            }
        }
        member.ok_or(ChangeRefusal::NotFound)?;
        // Whatever is asked: without it nobody could ever lead again.
        if self.counted.iter().all(|counted| *counted == id.0) {
            return Err(ChangeRefusal::NotEnoughStarted);
        }
        Ok(())
    }

    fn check_promote(&self, id: MemberId) -> Result<(), ChangeRefusal> {
        let member = self.member(id);
        if member.is_some() && !(self.in_sync)(id) {
            return Err(ChangeRefusal::LearnerNotReady);
        }
        let (started, voting) = self.started_of(None);
        // The learner is taken to be started.
        if self.rules.strict && started + 1 < quorum(voting + 1) {
            return Err(ChangeRefusal::NotEnoughStarted);
        }
        match member {
            None => Err(ChangeRefusal::NotFound),
            Some(member) if !member.is_learner => Err(ChangeRefusal::NotLearner),
            Some(_) => Ok(()),
        }
    }

    /// No other member than `owner` may have one of these URLs.
    fn check_urls(
        &self,
        peer_urls: &[String],
        owner: Option<MemberId>,
    ) -> Result<(), ChangeRefusal> {
        let mut others = self.members.iter().filter(|member| Some(member.id) != owner);
        if others.any(|other| other.peer_urls.iter().any(|url| peer_urls.contains(url))) {
            return Err(ChangeRefusal::UrlExists);
        }
        Ok(())
    }

    fn member(&self, id: MemberId) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    fn voting(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| !member.is_learner)
    }

    /// How many voting members have started, and how many there are, not counting `without`.
    fn started_of(&self, without: Option<MemberId>) -> (usize, usize) {
        let counted = self.voting().filter(|member| Some(member.id) != without);
        counted.fold((0, 0), |(started, all), member| {
            (started + usize::from(!member.name.is_empty()), all + 1)
        })
    }

    /// How many voting members have been connected for long enough, this one included.
    fn connected(&self) -> usize {
        let is_there = |member: &&Member| member.id == self.me || (self.connected)(member.id);
        self.voting().filter(is_there).count()
    }
}

fn quorum(members: usize) -> usize {
    members / 2 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: ChangeRules = ChangeRules { strict: true, max_learners: 1 };

    /// Members 1, 2, ...: a letter each, 's'tarted, 'u'nstarted, 'd'own or 'l'earner. Member 1
    /// decides.
    fn check(rules: ChangeRules, kinds: &str, change: Change) -> Result<(), ChangeRefusal> {
        let members: Vec<Member> = (1..).zip(kinds.chars()).map(member).collect();
        let is = |id: MemberId, kind: char| {
            id.0.checked_sub(1).and_then(|at| kinds.chars().nth(at as usize)) == Some(kind)
        };
        let counted = members.iter().filter(|member| is(member.id, 's') || is(member.id, 'd'));
        let counted = counted.map(|member| member.id.0).collect();
        let there = |id| is(id, 's') || is(id, 'l');
        Situation {
            rules,
            members: &members,
            counted: &counted,
            me: MemberId(1),
            present: &there,
            connected: &there,
            in_sync: &|id| is(id, 'l') || is(id, 's'),
        }
        .check(&change, MemberId(99))
    }

    fn member((id, kind): (u64, char)) -> Member {
        Member {
            id: MemberId(id),
            name: if kind == 'u' { String::new() } else { format!("m{id}") },
            peer_urls: vec![format!("http://m{id}:2380")],
            client_urls: Vec::new(),
            is_learner: kind == 'l',
        }
    }

    fn add(learner: bool) -> Change {
        Change::Add { peer_urls: vec!["http://new:2380".to_owned()], learner }
    }

    fn remove(id: u64) -> Change {
        Change::Remove { id: MemberId(id) }
    }

    fn promote(id: u64) -> Change {
        Change::Promote { id: MemberId(id) }
    }

    #[test]
    fn a_voter_is_added_while_enough_have_started_and_are_connected() {
        let add = |kinds| check(STRICT, kinds, add(false));
        for kinds in ["s", "ss", "sss", "sssu", "sssss"] {
            assert_eq!(add(kinds), Ok(()), "{kinds}");
        }
        // Two more may be added unstarted to three, a third not; one to one, a second not.
        for kinds in ["sssuu", "su"] {
            assert_eq!(add(kinds), Err(ChangeRefusal::NotEnoughStarted), "{kinds}");
        }
        for kinds in ["sd", "ssd", "sssddd"] {
            assert_eq!(add(kinds), Err(ChangeRefusal::Unhealthy), "{kinds}");
        }
    }

    #[test]
    fn a_learner_needs_a_healthy_cluster_and_room() {
        let add = |kinds| check(STRICT, kinds, add(true));
        assert_eq!(add("sss"), Ok(()));
        assert_eq!(add("s"), Ok(()));
        assert_eq!(add("sssuu"), Err(ChangeRefusal::Unhealthy));
        assert_eq!(add("sssl"), Err(ChangeRefusal::TooManyLearners));
    }

    #[test]
    fn a_member_is_removed_only_if_the_rest_keeps_its_quorum() {
        let remove = |kinds, id| check(STRICT, kinds, remove(id));
        assert_eq!(remove("sss", 1), Ok(()));
        assert_eq!(remove("ssd", 3), Ok(()), "it is down");
        assert_eq!(remove("ssd", 2), Err(ChangeRefusal::Unhealthy));
        assert_eq!(remove("ss", 2), Ok(()));
        assert_eq!(remove("sd", 2), Ok(()), "it is down");
        assert_eq!(remove("su", 1), Err(ChangeRefusal::NotEnoughStarted));
        assert_eq!(remove("s", 1), Err(ChangeRefusal::NotEnoughStarted));
        assert_eq!(remove("sdl", 3), Ok(()), "a learner");
        assert_eq!(remove("sss", 7), Err(ChangeRefusal::NotFound));
    }

    #[test]
    fn without_strict_checks_only_the_last_voter_stays() {
        let loose = ChangeRules { strict: false, ..STRICT };
        assert_eq!(check(loose, "sdd", add(false)), Ok(()));
        assert_eq!(check(loose, "sdd", remove(1)), Ok(()));
        assert_eq!(check(loose, "su", remove(1)), Err(ChangeRefusal::NotEnoughStarted));
        assert_eq!(check(loose, "s", remove(1)), Err(ChangeRefusal::NotEnoughStarted));
    }

    #[test]
    fn only_a_learner_that_has_caught_up_is_promoted() {
        assert_eq!(check(STRICT, "sssl", promote(4)), Ok(()));
        assert_eq!(check(STRICT, "sssl", promote(2)), Err(ChangeRefusal::NotLearner));
        assert_eq!(check(STRICT, "sssu", promote(4)), Err(ChangeRefusal::LearnerNotReady));
        assert_eq!(check(STRICT, "sss", promote(9)), Err(ChangeRefusal::NotFound));
    }

    #[test]
    fn a_url_has_one_owner_and_an_unknown_member_is_complained_of_first() {
        let update = |id, url: &str| Change::Update {
            id: MemberId(id),
            peer_urls: if url.is_empty() { Vec::new() } else { vec![url.to_owned()] },
        };
        let check = |change| check(STRICT, "sss", change);
        assert_eq!(check(update(2, "http://m2:2380")), Ok(()));
        assert_eq!(check(update(2, "http://m3:2380")), Err(ChangeRefusal::UrlExists));
        assert_eq!(check(update(2, "")), Err(ChangeRefusal::BadUrls));
        assert_eq!(check(update(9, "")), Err(ChangeRefusal::NotFound));
        let taken = Change::Add { peer_urls: vec!["http://m1:2380".to_owned()], learner: false };
        assert_eq!(check(taken), Err(ChangeRefusal::UrlExists));
    }
}
