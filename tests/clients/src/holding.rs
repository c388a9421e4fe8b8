//! What locks and elections guarantee, checked: what clients were told against one witness.
//!
//! The witness is the history of the queue keys and of the keys written under a fencing token, in
//! order, as a watch from revision 1 shows it, with the time at which it was seen. A queue key lives
//! from its put to its delete; the owner of a lock at a revision is the oldest key that lives then,
//! and the token of a hold is the create revision of its key. So every grant, proclamation, answer
//! about the leader and guarded write that names a revision is either true there or it is not, and
//! [`History::check`] decides exactly. Times decide only what is said of times: that a wake-up is not
//! lost and that what was given up goes away.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The queue of a lock `NAME` is `h/q/NAME/LEASE`.
pub const QUEUES: &str = "h/q/";
/// What the holders of `NAME` write under their tokens is `h/g/NAME`.
pub const GUARDED: &str = "h/g/";

/// An answer may be on its way for as long when the client that goes away did not read it: then the
/// server believes to have granted, and the key is the client's to remove.
const CROSSING: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rule {
    /// A hold's key was there, alone or the oldest: no two hold at once.
    OneHolder,
    /// Grants follow the create revisions of the keys that wait.
    InOrder,
    /// The token is the key's create revision, no two holds have the same one, and they go up.
    Token,
    /// Nobody is granted a key that never was, or that ended before its turn.
    NoPhantom,
    /// Nobody is granted a lease that had ended, and nothing of an ended lease is left.
    LeaseEnds,
    /// Writes under a token happen during its hold only, and are refused only outside of it.
    Fencing,
    /// What was given up leaves no key behind, unless its member was killed.
    NoGhost,
    /// Whoever is next is told so in time.
    NoLostWakeUp,
    /// Whoever waits on the server and can never be granted is told so in time.
    HearsTheEnd,
    /// What is said of the leader is what its queue says at that revision.
    Leader,
    /// An answer is not older than what was answered before its call began.
    RealTime,
}

/// A rule that was not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    pub rule: Rule,
    pub what: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.what)
    }
}

/// One event of the witness.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Change {
    pub revision: i64,
    pub key: String,
    /// Of the key; 0 when it was deleted.
    pub create_revision: i64,
    pub lease: i64,
    pub value: String,
    #[serde(with = "crate::moment")]
    pub seen: Instant,
}

/// What a client asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Asked {
    /// A lock or a leadership; the key it will have, unless the server makes the lease; whether the
    /// server waits, and not the client, which looks only at the key before its own.
    Enter {
        name: String,
        key: Option<String>,
        served: bool,
    },
    /// A write to `h/g/NAME` of `TOKEN TEXT` if the create revision of the key is the token.
    Guarded {
        name: String,
        key: String,
        token: i64,
        value: String,
    },
    Proclaim {
        key: String,
        token: i64,
        value: String,
    },
    Leader {
        name: String,
    },
    /// One of the leaders that a stream told of, in their order; each stream has a number.
    Observe {
        name: String,
        stream: u64,
    },
    /// The key's delete: an unlock, a resignation, a delete.
    Leave {
        key: String,
    },
    Revoke {
        lease: i64,
    },
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answered {
    /// `token` as far as it was told with the grant; `revision`, if known, is one at which it holds.
    Granted {
        key: String,
        token: Option<i64>,
        revision: Option<i64>,
    },
    Done {
        revision: i64,
    },
    /// A compare that did not hold at the revision.
    Refused {
        revision: i64,
    },
    /// The leader's pair as it is at the revision.
    Leads {
        revision: i64,
        key: String,
        create_revision: i64,
        mod_revision: i64,
        value: String,
    },
    /// The client went away without waiting any longer, while its member was up.
    GivenUp,
    /// An error, or no answer: it says nothing about what happened.
    Failed,
}

/// One call of one client. An answer without end is one that never came.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    pub asked: Asked,
    pub answered: Answered,
    #[serde(with = "crate::moment")]
    pub began: Instant,
    #[serde(with = "crate::moment")]
    pub ended: Instant,
}

/// How long what must happen soon may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From the release to the next one's answer, and from the end of a lease to the waiter's.
    pub wake_up: Duration,
    /// From going away to the delete of the key.
    pub clean_up: Duration,
}

/// All that was recorded of one run.
#[derive(Debug, Clone)]
pub struct History {
    pub changes: Vec<Change>,
    pub calls: Vec<Call>,
    /// From a kill to when everything served again: limits count from its end.
    pub faults: Vec<(Instant, Instant)>,
    pub limits: Limits,
}

/// What a run was, for the test to judge whether it was one.
#[derive(Debug, Default, Clone)]
pub struct Summary {
    pub grants: usize,
    pub waited: usize,
    pub given_up: usize,
    pub failed: usize,
    pub guarded: usize,
    pub guarded_refused: usize,
    pub proclaimed: usize,
    pub leaders_seen: usize,
    pub leaders_told: usize,
    pub lives: usize,
    pub lives_of_nobody: usize,
    /// From the end of the hold before to the answer, of grants that waited, outside of faults.
    pub wake_ups: Vec<Duration>,
}

/// One life of a queue key.
#[derive(Debug)]
struct Life {
    key: String,
    lease: i64,
    token: i64,
    /// The revision of its delete, and when that was seen.
    ended: Option<(i64, Instant)>,
    born: Instant,
    /// When nobody older was left, if that came while it lived: the revision and when it was seen.
    headed: Option<(i64, Instant)>,
    /// Its puts: the mod revision and the value of each.
    values: Vec<(i64, String)>,
}

impl Life {
    fn lives_at(&self, revision: i64) -> bool {
        self.token <= revision && self.ended.is_none_or(|(end, _)| revision < end)
    }

    /// From when on its put of that revision was what its queue's first key said; `None` if it never
    /// was.
    fn said_first_at(&self, mod_revision: i64) -> Option<i64> {
        let put = self.values.iter().position(|(at, _)| *at == mod_revision)?;
        let from = self.headed?.0.max(mod_revision);
        let next = self.values.get(put + 1).map(|(at, _)| *at);
        let until = next.into_iter().chain(self.ended.map(|(at, _)| at)).min();
        until.is_none_or(|until| from < until).then_some(from)
    }

    fn heads_at(&self, revision: i64) -> bool {
        self.lives_at(revision) && self.headed.is_some_and(|(at, _)| at <= revision)
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Life { key, token, .. } = self;
        let (headed, ended) = (self.headed.map(|h| h.0), self.ended.map(|e| e.0));
        write!(f, "{key} created@{token} first@{headed:?} deleted@{ended:?}")
    }
}

/// The name of a queue key's lock.
pub fn name_of(key: &str) -> Option<&str> {
    key.strip_prefix(QUEUES)?.rsplit_once('/').map(|(name, _)| name)
}

/// The lives of one name's keys, in the order of their tokens.
#[derive(Debug, Default)]
struct Queue {
    lives: Vec<Life>,
    /// Which of them are open, while the witness is read.
    open: BTreeSet<usize>,
    /// Which of them were ever the oldest, in that order, which is also the order of the tokens.
    owners: Vec<usize>,
}

impl Queue {
    fn take(&mut self, change: &Change) {
        let open = self.open.iter().copied().find(|at| self.lives[*at].key == change.key);
        match (open, change.create_revision) {
            (None, 0) => {}
            (Some(at), 0) => {
                self.lives[at].ended = Some((change.revision, change.seen));
                self.open.remove(&at);
            }
            (Some(at), _) => self.lives[at].values.push((change.revision, change.value.clone())),
            (None, token) => {
                self.open.insert(self.lives.len());
                self.lives.push(Life {
                    key: change.key.clone(),
                    lease: change.lease,
                    token,
                    ended: None,
                    born: change.seen,
                    headed: None,
                    values: vec![(change.revision, change.value.clone())],
                });
            }
        }
        if let Some(first) = self.open.first().copied()
            && self.lives[first].headed.is_none()
        {
            self.lives[first].headed = Some((change.revision, change.seen));
            self.owners.push(first);
        }
    }

    fn of_token(&self, key: &str, token: i64) -> Option<&Life> {
        let at = self.lives.binary_search_by_key(&token, |l| l.token).ok()?;
        Some(&self.lives[at]).filter(|l| l.key == key)
    }

    fn owner_at(&self, revision: i64) -> Option<&Life> {
        let headed = |at: &usize| self.lives[*at].headed.is_some_and(|(h, _)| h <= revision);
        let after = self.owners.partition_point(headed);
        let owner = &self.lives[self.owners[after.checked_sub(1)?]];
        owner.lives_at(revision).then_some(owner)
    }
}

/// One hold of a lock or one leadership, as the witness tells it: the time in which a key was the
/// oldest of its queue.
#[derive(Debug, Clone)]
pub struct Tenure {
    pub name: String,
    pub key: String,
    pub token: i64,
    /// The revision from which on it was the oldest, and when that was seen.
    pub from: (i64, Instant),
    /// The revision of its delete.
    pub until: Option<(i64, Instant)>,
    /// The mod revision and value of each of its puts, those before it was the oldest too.
    pub values: Vec<(i64, String)>,
}

/// All tenures, those of one name in order.
pub fn tenures(changes: &[Change]) -> Vec<Tenure> {
    let mut queues: std::collections::BTreeMap<&str, Queue> = Default::default();
    for change in changes {
        if let Some(name) = name_of(&change.key) {
            queues.entry(name).or_default().take(change);
        }
    }
    let mut tenures = Vec::new();
    for (name, queue) in queues {
        for life in queue.owners.iter().map(|at| &queue.lives[*at]) {
            tenures.push(Tenure {
                name: name.to_owned(),
                key: life.key.clone(),
                token: life.token,
                from: life.headed.expect("an owner was the oldest"),
                until: life.ended,
                values: life.values.clone(),
            });
        }
    }
    tenures
}

/// The witness, put in order for questions, and what was found against it.
struct Check<'a> {
    history: &'a History,
    queues: HashMap<&'a str, Queue>,
    /// Where the lives of a key are: its queue's name and their places there.
    keys: HashMap<&'a str, (&'a str, Vec<usize>)>,
    /// Tokens that were granted to somebody, with their keys.
    granted: HashSet<(String, i64)>,
    summary: Summary,
    broken: Vec<Broken>,
}

impl History {
    /// Checks that what the clients were told fits the witness, and gives all that does not.
    pub fn check(&self) -> (Summary, Vec<Broken>) {
        let mut queues: HashMap<&str, Queue> = HashMap::new();
        for change in &self.changes {
            if let Some(name) = name_of(&change.key) {
                queues.entry(name).or_default().take(change);
            }
        }
        let mut check = Check {
            history: self,
            keys: HashMap::new(),
            queues: HashMap::new(),
            granted: HashSet::new(),
            summary: Summary::default(),
            broken: Vec::new(),
        };
        for change in &self.changes {
            if let Some(name) = name_of(&change.key) {
                check.keys.entry(change.key.as_str()).or_insert((name, Vec::new()));
            }
        }
        for queue in queues.values() {
            for (at, life) in queue.lives.iter().enumerate() {
                check.keys.get_mut(life.key.as_str()).expect("from the witness").1.push(at);
            }
        }
        check.queues = queues;
        check.grants();
        check.waits();
        check.guarded_writes();
        check.answers();
        check.left_behind();
        check.real_time();
        (check.summary, check.broken)
    }

    /// Whether something that began at `since` and was to take `limit` was late at `at`.
    fn late(&self, since: Instant, at: Instant, limit: Duration) -> bool {
        let mut deadline = since + limit;
        for (from, to) in &self.faults {
            if *from < deadline && *to > since {
                deadline = deadline.max(*to + limit);
            }
        }
        at > deadline
    }

    /// Whether a member was killed between the two.
    fn killed_within(&self, from: Instant, to: Instant) -> bool {
        self.faults.iter().any(|(killed, _)| (from..to).contains(killed))
    }

    /// Whether a fault was going on at some time between the two.
    fn disturbed(&self, from: Instant, to: Instant) -> bool {
        self.faults.iter().any(|(began, ended)| *began < to && *ended > from)
    }
}

impl Check<'_> {
    fn broke(&mut self, rule: Rule, what: String) {
        self.broken.push(Broken { rule, what });
    }

    fn lives_of(&self, key: &str) -> impl DoubleEndedIterator<Item = &Life> {
        let place = self.keys.get(key);
        place.into_iter().flat_map(|(name, at)| at.iter().map(|at| &self.queues[name].lives[*at]))
    }

    fn of_token(&self, key: &str, token: i64) -> Option<&Life> {
        self.queues.get(name_of(key)?)?.of_token(key, token)
    }

    /// The life that a grant speaks of.
    fn granted_life(&self, key: &str, token: Option<i64>, revision: Option<i64>) -> Option<&Life> {
        match (token, revision) {
            (Some(token), _) => self.of_token(key, token),
            (None, Some(revision)) => self.lives_of(key).find(|l| l.lives_at(revision)),
            (None, None) => self.lives_of(key).last(),
        }
    }

    fn revoked_by(&self, key: &str, revision: i64) -> bool {
        let Some(lease) = self.lives_of(key).map(|l| l.lease).next() else { return false };
        self.history.calls.iter().any(|call| {
            matches!((&call.asked, &call.answered),
                (Asked::Revoke { lease: l }, Answered::Done { revision: at })
                    if *l == lease && *at <= revision)
        })
    }

    fn grants(&mut self) {
        for call in &self.history.calls {
            let Answered::Granted { key, token, revision } = &call.answered else { continue };
            if let Some(life) = self.granted_life(key, *token, *revision) {
                let token = life.token;
                self.granted.insert((key.clone(), token));
            }
        }
        for call in &self.history.calls {
            let (Asked::Enter { name, key: own, .. }, Answered::Granted { key, token, revision }) =
                (&call.asked, &call.answered)
            else {
                continue;
            };
            self.summary.grants += 1;
            if name_of(key) != Some(name) || own.as_ref().is_some_and(|own| own != key) {
                self.broke(Rule::NoPhantom, format!("asked for {name} as {own:?}, got {key}"));
                continue;
            }
            if let Some((rule, why)) = self.judge_grant(key, *token, *revision) {
                let what = format!("{key} granted with token {token:?} at {revision:?}: {why}");
                self.broke(rule, what);
            }
        }
    }

    /// What is wrong with a grant.
    fn judge_grant(
        &self,
        key: &str,
        token: Option<i64>,
        revision: Option<i64>,
    ) -> Option<(Rule, String)> {
        let ended = |at: i64| match self.revoked_by(key, at) {
            true => Rule::LeaseEnds,
            false => Rule::NoPhantom,
        };
        let queue = name_of(key).and_then(|name| self.queues.get(name));
        let Some(queue) = queue else { return Some((Rule::NoPhantom, "no such queue".to_owned())) };
        let now = revision.and_then(|at| self.lives_of(key).find(|l| l.lives_at(at)));
        let Some(life) = self.granted_life(key, token, revision) else {
            return Some(match (now, revision) {
                (Some(now), _) => (Rule::Token, format!("in fact {now}")),
                (None, Some(at)) => (ended(at), "no such key then".to_owned()),
                (None, None) => (Rule::NoPhantom, "no such key ever".to_owned()),
            });
        };
        let Some(at) = revision else {
            // Not said when; there must have been a time.
            return match (life.headed, life.ended) {
                (Some(_), _) => None,
                (None, Some(_)) => {
                    Some((Rule::NoPhantom, format!("it ended before its turn: {life}")))
                }
                (None, None) => Some((Rule::InOrder, format!("never its turn: {life}"))),
            };
        };
        if !life.lives_at(at) {
            return Some(match now {
                Some(now) => (Rule::Token, format!("that of an earlier hold, now {now}")),
                None => (ended(at), format!("it does not exist then: {life}")),
            });
        }
        match queue.owner_at(at) {
            Some(owner) if owner.token == life.token => None,
            Some(owner) if self.granted.contains(&(owner.key.clone(), owner.token)) => {
                Some((Rule::OneHolder, format!("held by {owner}")))
            }
            owner => {
                let owner = owner.map(ToString::to_string);
                Some((Rule::InOrder, format!("it is the turn of {owner:?}")))
            }
        }
    }

    /// Who waited, how long, and whether anybody waited too long.
    fn waits(&mut self) {
        let history = self.history;
        let Limits { wake_up, clean_up } = history.limits;
        for call in &history.calls {
            let Asked::Enter { key: own, served, .. } = &call.asked else { continue };
            let life = match (&call.answered, own) {
                (Answered::Granted { key, token, revision }, _) => {
                    self.granted_life(key, *token, *revision)
                }
                (_, Some(key)) => self.lives_of(key).rfind(|l| l.born <= call.ended),
                (_, None) => None,
            };
            let mut found = Vec::new();
            let mut waited = None;
            if let Some(life) = life {
                if let Some((at, seen)) = life.headed {
                    let since = seen.max(call.began);
                    let until = life.ended.map_or(call.ended, |(_, e)| e.min(call.ended));
                    if history.late(since, until, wake_up) {
                        let took = until.duration_since(since);
                        found.push((Rule::NoLostWakeUp, format!("{life} waited for {took:?}")));
                    }
                    let granted = matches!(call.answered, Answered::Granted { .. });
                    if granted && at > life.token {
                        waited = Some((since, call.ended));
                    }
                }
                if let Some((_, seen)) = life.ended
                    && *served
                    && history.late(seen.max(call.began), call.ended, wake_up)
                {
                    let took = call.ended.duration_since(seen);
                    found.push((Rule::HearsTheEnd, format!("{life} was told after {took:?}")));
                }
                // A grant that crossed with the going away is the client's to give back.
                let crossed = life.headed.is_some_and(|(_, seen)| seen <= call.ended + CROSSING);
                // A member that is killed cannot clean up.
                let killed = history.killed_within(call.began, call.ended + clean_up);
                if call.answered == Answered::GivenUp && !crossed && !killed {
                    let gone = life.ended.map(|(_, seen)| seen);
                    if gone.is_none_or(|gone| history.late(call.ended, gone, clean_up)) {
                        let took = gone.map(|gone| gone.duration_since(call.ended));
                        found.push((Rule::NoGhost, format!("{life} stayed for {took:?}")));
                    }
                }
            }
            for (rule, what) in found {
                self.broke(rule, what);
            }
            if let Some((since, answered)) = waited {
                self.summary.waited += 1;
                if !history.disturbed(since, answered) {
                    self.summary.wake_ups.push(answered.saturating_duration_since(since));
                }
            }
            match call.answered {
                Answered::GivenUp => self.summary.given_up += 1,
                Answered::Failed => self.summary.failed += 1,
                _ => {}
            }
        }
    }

    /// Each write under a token that is in the witness was made by the owner of its time.
    fn guarded_writes(&mut self) {
        let mut newest: HashMap<&str, i64> = HashMap::new();
        // Who wrote what, whatever the answer.
        let mut writers: HashMap<(&str, &str), &str> = HashMap::new();
        for call in &self.history.calls {
            if let Asked::Guarded { name, value, key, .. } = &call.asked {
                writers.insert((name, value), key);
            }
        }
        for change in &self.history.changes {
            let Some(name) = change.key.strip_prefix(GUARDED) else { continue };
            let token = change.value.split(' ').next().and_then(|t| t.parse().ok()).unwrap_or(0);
            let last = newest.entry(name).or_default();
            if token < *last {
                let what = format!("{name}: {} written after token {last}", change.value);
                self.broke(Rule::Fencing, what);
            }
            *last = token.max(*last);
            let writer = writers.get(&(name, change.value.as_str()));
            let life = writer.and_then(|key| self.of_token(key, token));
            if !life.is_some_and(|life| life.heads_at(change.revision)) {
                let life = life.map(ToString::to_string);
                let what =
                    format!("{name}: {} written at {} by {life:?}", change.value, change.revision);
                self.broke(Rule::Fencing, what);
            }
        }
    }

    fn answers(&mut self) {
        let history = self.history;
        let written: HashMap<(&str, i64), &str> =
            history.changes.iter().map(|c| ((&*c.key, c.revision), &*c.value)).collect();
        let mut by_lease: HashMap<i64, Vec<(&str, usize)>> = HashMap::new();
        for (key, (_, at)) in &self.keys {
            for (nth, _) in at.iter().enumerate() {
                let lease = self.lives_of(key).nth(nth).expect("counted").lease;
                by_lease.entry(lease).or_default().push((key, nth));
            }
        }
        // How far each stream has come.
        let mut told: HashMap<u64, i64> = HashMap::new();
        let mut found = Vec::new();
        for call in &history.calls {
            let what = || format!("{:?} answered {:?}", call.asked, call.answered);
            match (&call.asked, &call.answered) {
                (Asked::Guarded { name, value, .. }, Answered::Done { revision }) => {
                    self.summary.guarded += 1;
                    let key = format!("{GUARDED}{name}");
                    if written.get(&(key.as_str(), *revision)) != Some(&value.as_str()) {
                        found.push((Rule::Fencing, format!("{}, but it is not there", what())));
                    }
                }
                (Asked::Guarded { key, token, .. }, Answered::Refused { revision }) => {
                    self.summary.guarded_refused += 1;
                    if self.of_token(key, *token).is_some_and(|l| l.lives_at(*revision)) {
                        found.push((Rule::Fencing, format!("{}, but it was held", what())));
                    }
                }
                (Asked::Proclaim { key, token, value }, answered) => {
                    let life = self.of_token(key, *token);
                    let at = life.and_then(|l| l.values.iter().find(|(_, v)| v == value));
                    let at = at.map(|(at, _)| *at);
                    let led = at.is_none_or(|at| life.is_some_and(|l| l.heads_at(at)));
                    let done = match answered {
                        Answered::Done { revision } => at == Some(*revision),
                        _ => true,
                    };
                    let life = life.map(ToString::to_string);
                    self.summary.proclaimed += usize::from(at.is_some());
                    if !led || !done {
                        found.push((Rule::Leader, format!("{}, but {life:?}", what())));
                    }
                }
                (
                    Asked::Leader { name },
                    Answered::Leads { revision, key, create_revision, mod_revision, value },
                ) => {
                    self.summary.leaders_seen += 1;
                    let leader = self.queues.get(name.as_str()).and_then(|q| q.owner_at(*revision));
                    let fits = leader.is_some_and(|l| {
                        let now = l.values.iter().rfind(|(at, _)| at <= revision);
                        (&l.key, l.token) == (key, *create_revision)
                            && now.is_some_and(|(at, v)| (at, v) == (mod_revision, value))
                    });
                    if !fits {
                        let leader = leader.map(ToString::to_string);
                        found.push((Rule::Leader, format!("{}, but {leader:?}", what())));
                    }
                }
                (
                    Asked::Observe { name, stream },
                    Answered::Leads { revision, key, create_revision, mod_revision, value },
                ) => {
                    self.summary.leaders_told += 1;
                    let life = self
                        .queues
                        .get(name.as_str())
                        .and_then(|queue| queue.of_token(key, *create_revision));
                    let said = life.filter(|l| l.values.contains(&(*mod_revision, value.clone())));
                    let from = said.and_then(|life| life.said_first_at(*mod_revision));
                    let before = told.get(stream).copied().unwrap_or(0);
                    match from {
                        Some(from) if before < from && from <= *revision => {
                            told.insert(*stream, from);
                        }
                        _ => {
                            let what = format!("{}, but {from:?} after {before}", what());
                            found.push((Rule::Leader, what));
                        }
                    }
                }
                (Asked::Leave { key }, Answered::Done { revision }) => {
                    if let Some(life) = self.lives_of(key).find(|l| l.lives_at(*revision)) {
                        found.push((Rule::NoGhost, format!("{}, but {life}", what())));
                    }
                }
                (Asked::Revoke { lease }, Answered::Done { revision }) => {
                    for (key, nth) in by_lease.get(lease).into_iter().flatten() {
                        let life = self.lives_of(key).nth(*nth).expect("counted");
                        if life.lives_at(*revision) || life.token > *revision {
                            let late = life.ended.map(|e| e.1.duration_since(call.ended));
                            let what = format!("{}, but {life}, {late:?} later", what());
                            found.push((Rule::LeaseEnds, what));
                        }
                    }
                }
                _ => {}
            }
        }
        for (rule, what) in found {
            self.broke(rule, what);
        }
    }

    /// Keys that are there in the end, and keys of nobody that the others had to wait for.
    fn left_behind(&mut self) {
        let history = self.history;
        let mut claimed: HashSet<&str> = HashSet::new();
        // Calls whose key nobody was told of: when each went away, by name.
        let mut went: HashMap<&str, Vec<(Instant, Instant)>> = HashMap::new();
        for call in &history.calls {
            match &call.asked {
                Asked::Enter { key: Some(key), .. } => {
                    claimed.insert(key);
                }
                Asked::Enter { name, key: None, .. } if call.answered == Answered::GivenUp => {
                    went.entry(name).or_default().push((call.began, call.ended + CROSSING));
                }
                _ => {}
            }
            if let Answered::Granted { key, .. } = &call.answered {
                claimed.insert(key);
            }
        }
        let end = history.changes.last().map(|change| change.seen);
        let mut found = Vec::new();
        let mut nobody = 0;
        for (name, life) in
            self.queues.iter().flat_map(|(n, q)| q.lives.iter().map(move |l| (n, l)))
        {
            self.summary.lives += 1;
            let claimed = claimed.contains(life.key.as_str());
            let Some((_, gone)) = life.ended else {
                // That of a call whose member was killed goes with its lease, and the next of them
                // has to wait for that.
                if claimed || !end.is_some_and(|end| history.disturbed(life.born, end)) {
                    found.push(format!("{life} is there in the end"));
                }
                continue;
            };
            if claimed {
                continue;
            }
            nobody += 1;
            let crossed = |(began, ended): &(Instant, Instant)| {
                *began <= life.born && life.headed.is_some_and(|(_, seen)| seen <= *ended)
            };
            // A member that is killed cannot clean up for those who asked it.
            if history.disturbed(life.born, gone) {
                continue;
            }
            if let Some((_, since)) = life.headed
                && !went.get(name).is_some_and(|calls| calls.iter().any(crossed))
                && history.late(since, gone, history.limits.clean_up)
            {
                let took = gone.duration_since(since);
                found.push(format!("{life} is nobody's and was waited for {took:?}"));
            }
        }
        self.summary.lives_of_nobody = nobody;
        for what in found {
            self.broke(Rule::NoGhost, what);
        }
    }

    /// No answer is older than one that had come before its call began.
    fn real_time(&mut self) {
        let placed = |call: &Call| match &call.answered {
            Answered::Granted { revision, .. } => *revision,
            Answered::Done { revision }
            | Answered::Refused { revision }
            | Answered::Leads { revision, .. } => Some(*revision),
            Answered::GivenUp | Answered::Failed => None,
        };
        let calls = &self.history.calls;
        let calls = calls.iter().filter_map(|call| Some((call, placed(call)?)));
        let mut begins: Vec<(&Call, i64)> = calls.collect();
        let mut ends = begins.clone();
        begins.sort_by_key(|(call, _)| call.began);
        ends.sort_by_key(|(call, _)| call.ended);
        let mut ends = ends.into_iter().peekable();
        let mut floor = 0;
        for (call, revision) in begins {
            while let Some((_, at)) = ends.next_if(|(earlier, _)| earlier.ended < call.began) {
                floor = floor.max(at);
            }
            if revision < floor {
                self.broke(
                    Rule::RealTime,
                    format!("{:?} answered {:?} after {floor}", call.asked, call.answered),
                );
            }
        }
    }
}

#[cfg(test)]
#[path = "holding_tests.rs"]
mod tests;
