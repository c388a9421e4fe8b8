//! Each defect, put into a good history by hand, is found.

use super::*;

const MS: Duration = Duration::from_millis(1);

/// A history in which the time in milliseconds after the start is ten times the revision.
struct Story {
    start: Instant,
    history: History,
}

impl Story {
    fn new() -> Story {
        let limits = Limits { wake_up: 500 * MS, clean_up: 500 * MS };
        let (changes, calls, faults) = (Vec::new(), Vec::new(), Vec::new());
        Story { start: Instant::now(), history: History { changes, calls, faults, limits } }
    }

    fn at(&self, revision: i64) -> Instant {
        self.start + MS * 10 * u32::try_from(revision).expect("small")
    }

    fn change(&mut self, revision: i64, key: &str, create_revision: i64, value: &str) {
        let lease = key.rsplit('/').next().and_then(|hex| i64::from_str_radix(hex, 16).ok());
        let (key, value) = (key.to_owned(), value.to_owned());
        let (lease, seen) = (lease.unwrap_or(0), self.at(revision));
        self.history.changes.push(Change { revision, key, create_revision, lease, value, seen });
    }

    /// A queue key is made at this revision.
    fn enters(&mut self, revision: i64, key: &str) {
        self.change(revision, key, revision, "");
    }

    fn leaves(&mut self, revision: i64, key: &str) {
        self.change(revision, key, 0, "");
    }

    fn call(&mut self, began: i64, ended: i64, asked: Asked, answered: Answered) {
        let (began, ended) = (self.at(began), self.at(ended));
        self.history.calls.push(Call { asked, answered, began, ended });
    }

    fn asks(&mut self, began: i64, ended: i64, key: &str, answered: Answered) {
        let name = name_of(key).expect("a queue key").to_owned();
        self.call(
            began,
            ended,
            Asked::Enter { name, key: Some(key.to_owned()), served: true },
            answered,
        );
    }

    /// Asked at `began`, granted at `revision` with `token`, answered at once.
    fn granted(&mut self, began: i64, key: &str, token: i64, revision: i64) {
        let (key, granted) = (key.to_owned(), (Some(token), Some(revision)));
        let answered =
            Answered::Granted { key: key.clone(), token: granted.0, revision: granted.1 };
        self.asks(began, revision + 1, &key, answered);
    }

    fn writes(&mut self, revision: i64, key: &str, token: i64, answered: Answered) {
        let (name, value) = ("m".to_owned(), format!("{token} at {revision}"));
        if matches!(answered, Answered::Done { .. }) {
            self.change(revision, "h/g/m", 1, &value);
        }
        let asked = Asked::Guarded { name, key: key.to_owned(), token, value };
        self.call(revision, revision, asked, answered);
    }

    fn leader(&mut self, revision: i64, key: &str, token: i64, mod_revision: i64, value: &str) {
        let (key, value) = (key.to_owned(), value.to_owned());
        let leads = Answered::Leads { revision, key, create_revision: token, mod_revision, value };
        self.call(revision, revision, Asked::Leader { name: "m".to_owned() }, leads);
    }

    #[track_caller]
    fn good(&self) -> Summary {
        let (summary, broken) = self.history.check();
        assert_eq!(broken, []);
        summary
    }

    #[track_caller]
    fn finds(&self, rule: Rule) {
        let (_, broken) = self.history.check();
        assert!(broken.iter().any(|b| b.rule == rule), "{rule:?} in {broken:?}");
    }
}

const A: &str = "h/q/m/a";
const B: &str = "h/q/m/b";
const C: &str = "h/q/m/c";

/// A holds, B and C wait; A leaves at 10. What becomes of B and C is for the test to say.
fn three() -> Story {
    let mut story = Story::new();
    story.enters(2, A);
    story.granted(1, A, 2, 2);
    story.enters(3, B);
    story.enters(4, C);
    story.writes(5, A, 2, Answered::Done { revision: 5 });
    story
}

fn a_leaves(story: &mut Story) {
    story.leaves(10, A);
    story.call(9, 10, Asked::Leave { key: A.to_owned() }, Answered::Done { revision: 10 });
}

/// As [`three`], with B and C granted in turn and gone in the end.
fn in_turn() -> Story {
    let mut story = three();
    a_leaves(&mut story);
    story.granted(2, B, 3, 10);
    story.writes(12, B, 3, Answered::Done { revision: 12 });
    story.leaves(15, B);
    story.granted(3, C, 4, 15);
    story.writes(16, C, 4, Answered::Done { revision: 16 });
    story.leaves(18, C);
    story
}

#[test]
fn a_good_history_is_accepted_and_counted() {
    let mut story = in_turn();
    story.writes(19, C, 4, Answered::Refused { revision: 19 });
    story.asks(2, 19, "h/q/other/d", Answered::Failed);
    let summary = story.good();
    assert_eq!((summary.grants, summary.waited, summary.lives), (3, 2, 3));
    assert_eq!((summary.guarded, summary.guarded_refused, summary.failed), (3, 1, 1));
    assert_eq!(summary.wake_ups, [10 * MS; 2]);
}

#[test]
fn a_double_grant_is_found() {
    let mut story = in_turn();
    story.granted(2, B, 3, 8);
    story.finds(Rule::OneHolder);
}

#[test]
fn a_reordered_grant_is_found() {
    let mut story = three();
    a_leaves(&mut story);
    story.granted(3, C, 4, 11);
    story.leaves(15, C);
    story.leaves(16, B);
    story.finds(Rule::InOrder);
}

#[test]
fn a_token_that_was_another_holds_is_found() {
    let mut story = in_turn();
    story.enters(20, A);
    story.granted(19, A, 2, 20);
    story.leaves(21, A);
    story.finds(Rule::Token);
    let mut story = in_turn();
    story.enters(20, A);
    story.granted(19, A, 7, 20);
    story.leaves(21, A);
    story.finds(Rule::Token);
}

#[test]
fn a_lock_taken_again_has_the_same_token() {
    let mut story = in_turn();
    story.granted(6, A, 2, 7);
    story.good();
}

#[test]
fn a_grant_of_a_key_that_never_was_is_found() {
    let mut story = in_turn();
    story.granted(2, "h/q/m/d", 9, 16);
    story.finds(Rule::NoPhantom);
    let mut story = in_turn();
    story.granted(2, "h/q/nowhere/d", 9, 16);
    story.finds(Rule::NoPhantom);
}

#[test]
fn a_phantom_leader_is_found_even_when_its_grant_names_no_revision() {
    let mut story = three();
    // B's lease ends while it waits.
    story.leaves(6, B);
    a_leaves(&mut story);
    let granted = Answered::Granted { key: B.to_owned(), token: Some(3), revision: None };
    story.asks(2, 11, B, granted);
    story.granted(3, C, 4, 10);
    story.leaves(18, C);
    story.finds(Rule::NoPhantom);
}

#[test]
fn a_grant_after_the_end_of_the_lease_is_found() {
    let mut story = in_turn();
    story.call(14, 16, Asked::Revoke { lease: 0xb }, Answered::Done { revision: 15 });
    story.good();
    story.granted(2, B, 3, 17);
    story.finds(Rule::LeaseEnds);
}

#[test]
fn a_key_of_a_lease_that_ended_is_found() {
    let mut story = in_turn();
    story.call(12, 13, Asked::Revoke { lease: 0xb }, Answered::Done { revision: 13 });
    story.finds(Rule::LeaseEnds);
}

#[test]
fn a_ghost_key_is_found() {
    let stays_until = |gone: Option<i64>| {
        let mut story = in_turn();
        story.enters(19, A);
        story.granted(18, A, 19, 19);
        story.enters(20, "h/q/m/d");
        story.asks(19, 21, "h/q/m/d", Answered::GivenUp);
        if let Some(gone) = gone {
            story.leaves(gone, "h/q/m/d");
        }
        story.leaves(90, A);
        story
    };
    stays_until(None).finds(Rule::NoGhost);
    stays_until(Some(80)).finds(Rule::NoGhost);
    stays_until(Some(30)).good();
    // A member killed meanwhile may have been the one to remove it; one killed before was not.
    let mut story = stays_until(Some(80));
    story.history.faults.push((story.at(22), story.at(23)));
    story.good();
    let mut story = stays_until(Some(80));
    story.history.faults.push((story.at(10), story.at(12)));
    story.finds(Rule::NoGhost);
}

#[test]
fn a_key_of_nobody_that_others_wait_for_is_found() {
    let mut story = in_turn();
    story.enters(20, "h/q/m/d");
    story.leaves(30, "h/q/m/d");
    assert_eq!(story.good().lives_of_nobody, 1);
    story.enters(31, "h/q/m/d");
    story.leaves(100, "h/q/m/d");
    story.finds(Rule::NoGhost);
    // Unless the grant crossed with its going away.
    let asked = Asked::Enter { name: "m".to_owned(), key: None, served: true };
    story.call(31, 33, asked, Answered::GivenUp);
    story.good();
}

#[test]
fn a_key_that_its_holder_was_told_is_gone_is_found() {
    let mut story = three();
    story.call(8, 9, Asked::Leave { key: A.to_owned() }, Answered::Done { revision: 9 });
    story.finds(Rule::NoGhost);
}

#[test]
fn a_lost_wake_up_is_found_and_a_fault_excuses_it() {
    let mut story = three();
    a_leaves(&mut story);
    story.asks(2, 80, B, Answered::Failed);
    story.leaves(80, B);
    story.granted(3, C, 4, 80);
    story.leaves(90, C);
    story.finds(Rule::NoLostWakeUp);
    story.history.faults.push((story.at(9), story.at(40)));
    assert_eq!(story.good().wake_ups, [10 * MS]);
}

#[test]
fn a_waiter_that_is_not_told_of_its_end_is_found() {
    let mut story = three();
    story.leaves(6, B);
    a_leaves(&mut story);
    story.asks(2, 70, B, Answered::Failed);
    story.granted(3, C, 4, 10);
    story.leaves(18, C);
    story.finds(Rule::HearsTheEnd);
    // A client that waits by itself has only itself to ask.
    for call in &mut story.history.calls {
        if let Asked::Enter { served, .. } = &mut call.asked {
            *served = false;
        }
    }
    story.good();
}

#[test]
fn a_write_outside_of_its_hold_is_found() {
    // After it, between the others' writes, and before it.
    for revision in [13, 17] {
        let mut story = in_turn();
        story.writes(revision, A, 2, Answered::Done { revision });
        story.history.changes.sort_by_key(|c| c.revision);
        story.finds(Rule::Fencing);
    }
    let mut story = three();
    story.writes(6, B, 3, Answered::Done { revision: 6 });
    story.finds(Rule::Fencing);
}

#[test]
fn a_write_that_was_wrongly_refused_or_lost_is_found() {
    let mut story = in_turn();
    story.writes(13, B, 3, Answered::Refused { revision: 13 });
    story.finds(Rule::Fencing);
    let mut story = in_turn();
    story.writes(13, B, 3, Answered::Done { revision: 13 });
    story.history.changes.retain(|c| c.revision != 13);
    story.finds(Rule::Fencing);
}

#[test]
fn what_is_wrong_about_the_leader_is_found() {
    let proclaim = |story: &mut Story, revision, key: &str, token, value: &str| {
        story.change(revision, key, token, value);
        story.history.changes.sort_by_key(|c| c.revision);
        let (key, value) = (key.to_owned(), value.to_owned());
        let asked = Asked::Proclaim { key, token, value };
        story.call(revision, revision, asked, Answered::Done { revision });
    };
    let mut story = in_turn();
    proclaim(&mut story, 13, B, 3, "mine");
    story.leader(11, B, 3, 3, "");
    story.leader(13, B, 3, 13, "mine");
    assert_eq!(story.good().leaders_seen, 2);
    for (revision, key, token, mod_revision, value) in
        [(12, B, 3, 13, "mine"), (13, B, 3, 3, ""), (16, B, 3, 13, "mine"), (9, B, 3, 3, "")]
    {
        let mut story = in_turn();
        proclaim(&mut story, 13, B, 3, "mine");
        story.leader(revision, key, token, mod_revision, value);
        story.finds(Rule::Leader);
    }
    // It waits still.
    let mut story = in_turn();
    proclaim(&mut story, 13, C, 4, "theirs");
    story.finds(Rule::Leader);
}

#[test]
fn a_stream_that_tells_of_who_did_not_lead_or_goes_backward_is_found() {
    let tells = |story: &mut Story, at: i64, key: &str, token: i64, modified: i64, value: &str| {
        let (key, value) = (key.to_owned(), value.to_owned());
        let (create_revision, mod_revision) = (token, modified);
        let leads = Answered::Leads { revision: at, key, create_revision, mod_revision, value };
        story.call(at, at, Asked::Observe { name: "m".to_owned(), stream: 1 }, leads);
    };
    let proclaimed = || {
        let mut story = in_turn();
        story.change(13, B, 3, "mine");
        story.history.changes.sort_by_key(|c| c.revision);
        let asked = Asked::Proclaim { key: B.to_owned(), token: 3, value: "mine".to_owned() };
        story.call(13, 13, asked, Answered::Done { revision: 13 });
        story
    };
    let mut story = proclaimed();
    tells(&mut story, 5, A, 2, 2, "");
    tells(&mut story, 11, B, 3, 3, "");
    tells(&mut story, 14, B, 3, 13, "mine");
    assert_eq!(story.good().leaders_told, 3);
    // Before its time, with a value it never had, of another key's token.
    for (at, key, token, modified, value) in
        [(9, B, 3, 3, ""), (13, B, 3, 13, "yours"), (13, B, 4, 13, "mine")]
    {
        let mut story = proclaimed();
        tells(&mut story, at, key, token, modified, value);
        story.finds(Rule::Leader);
    }
    for (first, second) in [((14, 13, "mine"), (14, 3, "")), ((14, 13, "mine"), (14, 13, "mine"))] {
        let mut story = proclaimed();
        tells(&mut story, first.0, B, 3, first.1, first.2);
        tells(&mut story, second.0, B, 3, second.1, second.2);
        story.finds(Rule::Leader);
    }
}

#[test]
fn an_answer_from_the_past_is_found() {
    let mut story = in_turn();
    story.call(9, 12, Asked::Revoke { lease: 9 }, Answered::Done { revision: 12 });
    story.granted(13, B, 3, 11);
    let call = story.history.calls.last_mut().expect("there is one");
    call.ended = call.began + MS;
    story.finds(Rule::RealTime);
}
