//! Whether the members have done the same with the same log.
//!
//! The machine keeps a digest of all it has applied. A member keeps it at some entries, its
//! *checkpoints*, and asks the others once a second for theirs. It judges itself alone:
//!
//! - It differs from a majority of the voters: it answers nobody any more, gives up leadership,
//!   raises CORRUPT for itself, and stops. After a restart it does so again before it serves.
//! - It differs from some, and there is no majority either way: nobody can tell who is right, so it
//!   raises CORRUPT for itself, as they do, and all writes stop.
//!
//! What cannot be compared (a digest that began elsewhere, no checkpoint in common, a member that
//! does not answer) says nothing. A learner is compared with the voters and counts for none of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use super::{Node, locked, told};
use crate::machine::{Alarm, AlarmAction, AlarmKind, Command, DIGEST_VERSION, Digest, Principal};
use crate::raft::frame;
use crate::types::MemberId;

/// Entries between two checkpoints, for members that are close to each other and for those far
/// behind, and how many of each are kept.
const STEPS: [u64; 2] = [16, 4_096];
const KEPT: usize = 64;

/// Between two comparisons.
const INTERVAL: Duration = Duration::from_secs(1);
/// The same while a member waits to serve, so often at most, and how long it waits at most.
const FIRST_INTERVAL: Duration = Duration::from_millis(50);
const FIRST_ROUNDS: u32 = 60;
const FIRST_PATIENCE: Duration = Duration::from_secs(3);
/// Another member gets this long to tell its checkpoints.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);
/// Comparisons in a row without a majority before CORRUPT is raised: a third member may tell.
const UNDECIDED_ROUNDS: u32 = 3;
/// For raising CORRUPT before the end.
const RAISE_DEADLINE: Duration = Duration::from_secs(5);

/// The digest behind one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    pub index: u64,
    pub digest: Digest,
}

/// The newest checkpoints of this member: bounded, in order for each step.
#[derive(Debug, Default)]
struct Kept {
    by_step: [VecDeque<Checkpoint>; STEPS.len()],
    newest: Option<Checkpoint>,
}

impl Kept {
    fn note(&mut self, checkpoint: Checkpoint) {
        for (kept, step) in self.by_step.iter_mut().zip(STEPS) {
            if checkpoint.index.is_multiple_of(step) {
                if kept.len() == KEPT {
                    kept.pop_front();
                }
                kept.push_back(checkpoint);
            }
        }
        self.newest = Some(checkpoint);
    }

    fn all(&self) -> Vec<Checkpoint> {
        let mut all: Vec<_> = self.by_step.iter().flatten().copied().chain(self.newest).collect();
        all.sort_unstable_by_key(|checkpoint| checkpoint.index);
        all.dedup();
        all
    }
}

/// What a member knows of itself and of its agreement with the others.
#[derive(Debug, Default)]
pub struct Agreement {
    kept: Mutex<Kept>,
    /// Set when a comparison has told that this member may serve, since it was last cleared.
    compared: watch::Sender<bool>,
    /// Somebody waits for that.
    awaited: Notify,
    /// Why this member must stop.
    fault: watch::Sender<Option<String>>,
}

impl Agreement {
    /// The machine's digest behind entry `index`, after each entry.
    pub fn note(&self, index: u64, digest: Option<Digest>) {
        if let Some(digest) = digest {
            locked(&self.kept).note(Checkpoint { index, digest });
        }
    }

    /// The state was replaced.
    pub fn reset(&self) {
        *locked(&self.kept) = Kept::default();
    }
}

/// What one member tells another.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Told {
    version: u32,
    checkpoints: Vec<Checkpoint>,
}

/// How this member stands to the others.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// A majority has done the same; these have not.
    Agrees {
        but: BTreeSet<MemberId>,
    },
    /// A majority has done something else, by this entry.
    Differs {
        index: u64,
    },
    /// Some have done something else by this entry, and there is no majority.
    Undecided {
        index: u64,
        with: BTreeSet<MemberId>,
    },
    Unknown,
}

/// Compares the checkpoints of `me` with those of the others, at the newest entry that tells.
fn judge(
    me: MemberId,
    voters: &BTreeSet<MemberId>,
    mine: &[Checkpoint],
    others: &BTreeMap<MemberId, Vec<Checkpoint>>,
) -> Verdict {
    let majority = voters.len() / 2 + 1;
    let mut undecided = None;
    for Checkpoint { index, digest } in mine.iter().rev().copied() {
        let mut same = usize::from(voters.contains(&me));
        let mut differing: BTreeMap<u64, BTreeSet<MemberId>> = BTreeMap::new();
        for (id, theirs) in others.iter().filter(|(id, _)| voters.contains(id)) {
            let theirs = theirs.iter().find(|theirs| theirs.index == index);
            match theirs.map(|theirs| theirs.digest) {
                Some(theirs) if theirs == digest => same += 1,
                Some(theirs) if theirs.since == digest.since => {
                    differing.entry(theirs.value).or_default().insert(*id);
                }
                Some(_) | None => {}
            }
        }
        if differing.values().any(|members| members.len() >= majority) {
            return Verdict::Differs { index };
        }
        let differing: BTreeSet<MemberId> = differing.into_values().flatten().collect();
        if same >= majority {
            return undecided.unwrap_or(Verdict::Agrees { but: differing });
        }
        if !differing.is_empty() && voters.contains(&me) {
            undecided.get_or_insert(Verdict::Undecided { index, with: differing });
        }
    }
    undecided.unwrap_or(Verdict::Unknown)
}

impl Node {
    /// Becomes `Some` when this member must stop.
    pub(super) fn watch_agreement_fault(&self) -> watch::Receiver<Option<String>> {
        self.shared.agreement.fault.subscribe()
    }

    /// This member's checkpoints, for another one.
    pub(super) fn tell_checkpoints(&self) -> Told {
        let checkpoints = locked(&self.shared.agreement.kept).all();
        Told { version: DIGEST_VERSION, checkpoints }
    }

    /// Returns once the others' checkpoints have told that this member may serve, or after a while
    /// in which they told nothing. Does not return for a member that must stop.
    pub async fn agreed(&self) {
        self.shared.agreement.compared.send_replace(false);
        self.shared.agreement.awaited.notify_one();
        let mut compared = self.shared.agreement.compared.subscribe();
        let _ = tokio::time::timeout(FIRST_PATIENCE, told(&mut compared)).await;
        if self.shared.agreement.fault.borrow().is_some() {
            std::future::pending().await
        }
    }

    /// Compares this member with the others, again and again: runs until it must stop.
    pub(super) async fn keep_agreeing(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        let mut undecided_rounds = 0;
        let mut first_rounds = 0;
        let mut known_to_differ = BTreeSet::new();
        loop {
            if self.machine().digest().is_none() {
                self.begin_digest().await;
            }
            let verdict = self.compare().await;
            undecided_rounds = match &verdict {
                Verdict::Undecided { .. } => undecided_rounds + 1,
                _ => 0,
            };
            match verdict {
                Verdict::Agrees { but } => {
                    self.shared.agreement.compared.send_replace(true);
                    for member in but.difference(&known_to_differ) {
                        tracing::error!(%member, "a member's state differs from the majority's");
                    }
                    known_to_differ = but;
                }
                Verdict::Differs { index } => return self.end_differing(index).await,
                Verdict::Undecided { index, with } if undecided_rounds >= UNDECIDED_ROUNDS => {
                    self.report_undecided(index, &with).await;
                }
                Verdict::Undecided { .. } | Verdict::Unknown => {}
            }
            let awaited = first_rounds > 0 && !*self.shared.agreement.compared.borrow();
            first_rounds = if awaited { first_rounds - 1 } else { 0 };
            tokio::select! {
                () = tokio::time::sleep(if awaited { FIRST_INTERVAL } else { INTERVAL }) => {}
                () = self.shared.agreement.awaited.notified() => first_rounds = FIRST_ROUNDS,
                () = told(&mut stopping) => return,
            }
        }
    }

    async fn compare(&self) -> Verdict {
        let me = self.identity.member_id;
        let (voters, others) = {
            let metrics = self.raft.server_metrics();
            let membership = metrics.borrow_watched().membership_config.clone();
            let voters: BTreeSet<MemberId> = membership.voter_ids().map(MemberId).collect();
            let others: Vec<MemberId> = voters.iter().copied().filter(|id| *id != me).collect();
            (voters, others)
        };
        let asked = others.into_iter().map(async |id| {
            let mut client = self.links_to(id)?.forward();
            let question = frame::encode(&()).ok()?;
            let answer = tokio::time::timeout(ANSWER_DEADLINE, client.checkpoints(question)).await;
            let told: Told = frame::decode(answer.ok()?.ok()?.get_ref()).ok()?;
            (told.version == DIGEST_VERSION).then_some((id, told.checkpoints))
        });
        let others = futures::future::join_all(asked).await.into_iter().flatten().collect();
        // Taken last, so that it holds what the others have told of.
        let mine = locked(&self.shared.agreement.kept).all();
        judge(me, &voters, &mine, &others)
    }

    /// A release without the digest has left this state: the members begin one together.
    async fn begin_digest(&self) {
        let begin = Command::Alarm(AlarmAction::BeginDigest);
        if let Err(failure) = self.propose(None, begin).await {
            tracing::debug!(%failure, "the digest has not begun yet");
        }
    }

    /// Ends this member: a majority has done something else.
    async fn end_differing(&self, index: u64) {
        let member = self.identity.member_id;
        tracing::error!(
            index,
            %member,
            "this member's state differs from the majority's: raising alarm CORRUPT and stopping; \
             remove this member, empty its data directory, add it anew, and disarm the alarm"
        );
        self.stop();
        self.hand_over().await;
        self.raise_corrupt().await;
        let reason = format!("its state differs from the majority's, seen at entry {index}");
        self.shared.agreement.fault.send_replace(Some(reason));
    }

    async fn report_undecided(&self, index: u64, with: &BTreeSet<MemberId>) {
        let member = self.identity.member_id;
        let alarm = Alarm { member, kind: AlarmKind::Corrupt };
        if self.machine().alarms().any(|raised| raised == alarm) {
            return;
        }
        tracing::error!(
            index,
            %member,
            ?with,
            "members' states differ, and no majority tells whose is right: raising alarm CORRUPT; \
             find out by hand, replace the wrong member, and disarm the alarm"
        );
        self.raise_corrupt().await;
    }

    async fn raise_corrupt(&self) {
        let alarm = Alarm { member: self.identity.member_id, kind: AlarmKind::Corrupt };
        let raise = self
            .propose_patiently(Some(Principal::Server), Command::Alarm(AlarmAction::Raise(alarm)));
        match tokio::time::timeout(RAISE_DEADLINE, raise).await {
            Ok(Ok(_)) => {}
            Ok(Err(failure)) => tracing::warn!(%failure, "alarm CORRUPT is not raised"),
            Err(_) => tracing::warn!("alarm CORRUPT is not raised in time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(index: u64, value: u64) -> Checkpoint {
        Checkpoint { index, digest: Digest { since: 0, value } }
    }

    fn ids<const N: usize>(ids: [u64; N]) -> BTreeSet<MemberId> {
        ids.map(MemberId).into()
    }

    fn verdict<const N: usize>(
        me: u64,
        voters: &BTreeSet<MemberId>,
        mine: &[Checkpoint],
        others: [(u64, &[Checkpoint]); N],
    ) -> Verdict {
        let others = others.map(|(id, theirs)| (MemberId(id), theirs.to_vec()));
        judge(MemberId(me), voters, mine, &others.into())
    }

    #[test]
    fn a_majority_tells_who_is_right() {
        let (three, right, wrong) = (&ids([1, 2, 3]), &[at(16, 7)][..], &[at(16, 8)][..]);
        let agrees = |but| Verdict::Agrees { but };
        assert_eq!(verdict(1, three, right, [(2, right), (3, right)]), agrees(ids([])));
        assert_eq!(verdict(1, three, right, [(2, right), (3, wrong)]), agrees(ids([3])));
        assert_eq!(
            verdict(3, three, wrong, [(1, right), (2, right)]),
            Verdict::Differs { index: 16 }
        );
        assert_eq!(verdict(1, three, right, [(2, right)]), agrees(ids([])), "one does not answer");
        assert_eq!(verdict(1, &ids([1]), right, []), agrees(ids([])), "alone");
    }

    #[test]
    fn without_a_majority_nobody_is_right() {
        let (right, wrong) = (&[at(16, 7)][..], &[at(16, 8)][..]);
        let undecided = |with| Verdict::Undecided { index: 16, with };
        assert_eq!(verdict(1, &ids([1, 2]), right, [(2, wrong)]), undecided(ids([2])));
        assert_eq!(verdict(1, &ids([1, 2, 3]), right, [(3, wrong)]), undecided(ids([3])));
        let third = &[at(16, 9)][..];
        let all_differ = verdict(1, &ids([1, 2, 3]), right, [(2, wrong), (3, third)]);
        assert_eq!(all_differ, undecided(ids([2, 3])));
    }

    #[test]
    fn what_does_not_compare_says_nothing() {
        let three = &ids([1, 2, 3]);
        let other_begin = [Checkpoint { index: 16, digest: Digest { since: 5, value: 1 } }];
        let elsewhere = [at(32, 1)];
        let others = [(2, &other_begin[..]), (3, &elsewhere[..])];
        assert_eq!(verdict(1, three, &[at(16, 7)], others), Verdict::Unknown);
        // At an older entry all three compare, but what differs later counts.
        let (mine, theirs) = ([at(16, 7), at(32, 8)], [at(16, 7), at(32, 9)]);
        let others = [(2, &theirs[..]), (3, &[at(16, 7)][..])];
        let with = ids([2]);
        assert_eq!(verdict(1, three, &mine, others), Verdict::Undecided { index: 32, with });
    }

    #[test]
    fn a_learner_is_judged_and_does_not_judge() {
        let (three, right, wrong) = (&ids([1, 2, 3]), &[at(16, 7)][..], &[at(16, 8)][..]);
        let differs = Verdict::Differs { index: 16 };
        assert_eq!(verdict(9, three, wrong, [(1, right), (2, right)]), differs);
        assert_eq!(verdict(9, three, wrong, [(1, right)]), Verdict::Unknown);
        let agrees = Verdict::Agrees { but: ids([]) };
        assert_eq!(verdict(1, three, right, [(2, right), (9, wrong)]), agrees);
    }

    #[test]
    fn few_checkpoints_are_kept_near_and_far() {
        let mut kept = Kept::default();
        (1..=1_000_003).for_each(|index| kept.note(at(index, index)));
        let all: Vec<u64> = kept.all().iter().map(|checkpoint| checkpoint.index).collect();
        assert!(all.is_sorted() && all.len() <= STEPS.len() * KEPT + 1);
        assert_eq!(*all.last().unwrap(), 1_000_003);
        assert!(all.contains(&1_000_000) && all.contains(&(200 * 4_096)));
    }
}
