//! What a watch guarantees, checked: recorded answers against one witness.
//!
//! The witness is the whole history of the store, in order, as a watch of everything from revision 1
//! shows it. A [`Record`] is what one watch of a part of it was told, over as many streams and
//! members as it took. The nine guarantees are those of [`Guarantee`], and [`Record::check`] decides
//! exactly: every answer names its revisions, so for each there is one thing the watch may be told.
//!
//! A watch that reads too late may be told that the history it wants is compacted. It goes on from
//! the compaction revision, and only what is before that may be missing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::wire::{DELETE, Event, KeyValue, NO_DELETE, NO_PUT, PUT, WatchCreate};

/// The first revision that a write makes.
pub const FIRST_WRITE: i64 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guarantee {
    /// Only keys of the range, and no kind of event that was filtered out.
    Filter,
    /// Revisions never go backward, and within a revision the order is the witness's.
    Ordered,
    /// Nothing comes twice.
    Unique,
    /// All events of a revision come in one answer, or in fragments that say so.
    Atomic,
    /// After progress at a revision nothing at or before it comes.
    Bookmarkable,
    /// A watch that starts again after what it has seen goes on there, on any member.
    Resumable,
    /// Nothing is missing, and nothing comes that did not happen.
    Reliable,
    /// Create revision equals mod revision exactly when the put made the key.
    IsCreate,
    /// The pair before the change is the right one, and there unless compacted.
    PrevKv,
}

/// A guarantee that was not kept.
#[derive(Debug)]
pub struct Broken {
    pub guarantee: Guarantee,
    pub what: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is broken: {}", self.guarantee, self.what)
    }
}

fn broken<T>(guarantee: Guarantee, what: String) -> Result<T, Broken> {
    Err(Broken { guarantee, what })
}

/// What a watch asks for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Interest {
    #[serde(with = "crate::text")]
    pub key: Bytes,
    /// Empty for one key; one zero byte for everything from the key on.
    #[serde(with = "crate::text")]
    pub range_end: Bytes,
    pub no_put: bool,
    pub no_delete: bool,
    pub prev_kv: bool,
}

impl Interest {
    /// Everything, with the pairs before.
    pub fn everything() -> Interest {
        let zero = Bytes::from_static(&[0]);
        Interest { key: zero.clone(), range_end: zero, prev_kv: true, ..Interest::default() }
    }

    /// The request that creates such a watch.
    pub fn create(&self, watch_id: i64, start_revision: i64, fragment: bool) -> WatchCreate {
        let mut filters = Vec::new();
        if self.no_put {
            filters.push(NO_PUT);
        }
        if self.no_delete {
            filters.push(NO_DELETE);
        }
        WatchCreate {
            key: self.key.clone(),
            range_end: self.range_end.clone(),
            start_revision,
            filters,
            prev_kv: self.prev_kv,
            watch_id,
            fragment,
        }
    }

    fn wants(&self, event: &Event) -> bool {
        let kind = if event.kind == DELETE { !self.no_delete } else { !self.no_put };
        kind && self.covers(&event.pair().key)
    }

    fn covers(&self, key: &Bytes) -> bool {
        match &self.range_end[..] {
            [] => *key == self.key,
            [0] => *key >= self.key,
            end => *key >= self.key && key[..] < *end,
        }
    }
}

/// The whole history of a store, from its first write on.
#[derive(Debug)]
pub struct Witness {
    revisions: BTreeMap<i64, Vec<Event>>,
}

impl Witness {
    /// Takes the events of a watch of everything from revision 1, with the pairs before.
    ///
    /// # Errors
    ///
    /// If they are no history: a revision is missing or comes twice, a pair does not follow from the
    /// one before, or the pair before is not the one shown.
    pub fn new(events: &[Event]) -> Result<Witness, String> {
        let mut revisions: BTreeMap<i64, Vec<Event>> = BTreeMap::new();
        let mut state: HashMap<Bytes, KeyValue> = HashMap::new();
        let own = events.chunk_by(|a, b| a.revision() == b.revision());
        for (expected, own) in (FIRST_WRITE..).zip(own) {
            let revision = own[0].revision();
            if revision != expected {
                return Err(format!("revision {revision} where {expected} should be"));
            }
            let mut changed = HashSet::new();
            for event in own {
                let pair = event.pair();
                if !changed.insert(pair.key.clone()) {
                    return Err(format!("one revision changes a key twice: {event:?}"));
                }
                let before = state.get(&pair.key);
                if event.prev_kv.as_ref() != before {
                    return Err(format!("{event:?}, but before it was {before:?}"));
                }
                follows(event, before)?;
                match event.kind {
                    PUT => state.insert(pair.key.clone(), pair.clone()),
                    _ => state.remove(&pair.key),
                };
            }
            revisions.insert(revision, own.to_vec());
        }
        Ok(Witness { revisions })
    }

    /// The revision of the last write; 1 when there was none.
    pub fn last(&self) -> i64 {
        self.revisions.keys().next_back().copied().unwrap_or(FIRST_WRITE - 1)
    }

    /// Checks what writers were told: each acknowledged pair (revision, key, value) was put at that
    /// revision, every value was written once at most, and only by those who `issued` it.
    ///
    /// # Errors
    ///
    /// A sentence about the first thing that does not fit.
    pub fn check_writes(
        &self,
        acknowledged: &[(i64, Bytes, Bytes)],
        issued: &HashSet<Bytes>,
    ) -> Result<(), String> {
        let mut written: HashMap<&Bytes, (i64, &Bytes)> = HashMap::new();
        for (revision, events) in &self.revisions {
            for pair in events.iter().filter(|e| e.kind == PUT).map(Event::pair) {
                if !issued.contains(&pair.value) {
                    return Err(format!("nobody wrote {pair:?}"));
                }
                if let Some(earlier) = written.insert(&pair.value, (*revision, &pair.key)) {
                    return Err(format!("applied twice: {earlier:?} and {pair:?}"));
                }
            }
        }
        for (revision, key, value) in acknowledged {
            if written.get(value) != Some(&(*revision, key)) {
                let instead = written.get(value);
                return Err(format!("{key:?}={value:?} of {revision} is lost: {instead:?}"));
            }
        }
        Ok(())
    }

    fn at<'a>(&'a self, revision: i64, interest: &'a Interest) -> Vec<&'a Event> {
        let events = self.revisions.get(&revision).into_iter().flatten();
        events.filter(|e| interest.wants(e)).collect()
    }

    /// The first event of interest in a span of revisions, both ends included.
    fn first(&self, from: i64, to: i64, interest: &Interest) -> Option<&Event> {
        if from > to {
            return None;
        }
        self.revisions.range(from..=to).flat_map(|(_, e)| e).find(|e| interest.wants(e))
    }
}

fn follows(event: &Event, before: Option<&KeyValue>) -> Result<(), String> {
    let pair = event.pair();
    let fits = match (event.kind, before) {
        (PUT, None) => pair.version == 1 && pair.create_revision == pair.mod_revision,
        (PUT, Some(before)) => {
            pair.version == before.version + 1 && pair.create_revision == before.create_revision
        }
        (DELETE, Some(_)) => {
            let KeyValue { key, mod_revision, .. } = pair.clone();
            *pair == KeyValue { key, mod_revision, ..KeyValue::default() }
        }
        _ => false,
    };
    if fits { Ok(()) } else { Err(format!("{event:?} does not follow from {before:?}")) }
}

/// What a watch was told, in the order it was told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Note {
    /// It was created, again or for the first time, to start at this revision.
    Began { from: i64 },
    /// An answer with events, while nothing above `compacted` had been asked to be compacted.
    Events { events: Vec<Event>, fragment: bool, compacted: i64 },
    /// Everything up to this revision has been told.
    Progress { revision: i64 },
    /// It was cancelled: the history it wants is gone before this revision.
    Compacted { revision: i64 },
}

/// One watch and all it was told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub interest: Interest,
    pub notes: Vec<Note>,
}

/// What a record that keeps all guarantees consists of, for the test to judge whether it was a test.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    pub events: usize,
    pub begun: usize,
    pub progress: usize,
    pub compacted: usize,
}

impl std::ops::AddAssign for Summary {
    fn add_assign(&mut self, other: Summary) {
        self.events += other.events;
        self.begun += other.begun;
        self.progress += other.progress;
        self.compacted += other.compacted;
    }
}

impl Record {
    pub fn new(interest: Interest) -> Record {
        Record { interest, notes: Vec::new() }
    }

    /// All events it was told, in order.
    pub fn events(&self) -> Vec<Event> {
        let mut all = Vec::new();
        for note in &self.notes {
            if let Note::Events { events, .. } = note {
                all.extend_from_slice(events);
            }
        }
        all
    }

    /// Checks the record of a watch that was read until it had seen revision `last`.
    ///
    /// # Errors
    ///
    /// The first guarantee that was not kept.
    ///
    /// # Panics
    ///
    /// If the reader itself began again elsewhere than after what it had seen.
    pub fn check(&self, witness: &Witness, last: i64) -> Result<Summary, Broken> {
        let mut check = Check {
            witness,
            interest: &self.interest,
            next: None,
            from: 0,
            bookmark: 0,
            fresh: false,
            fragments: Vec::new(),
            summary: Summary::default(),
        };
        for (n, note) in self.notes.iter().enumerate() {
            check.note(note, &self.notes[n + 1..])?;
        }
        check.missing(last, &[])?;
        Ok(check.summary)
    }
}

struct Check<'a> {
    witness: &'a Witness,
    interest: &'a Interest,
    /// The first revision whose events are still to come. `None` before it began.
    next: Option<i64>,
    /// Where the present stream started.
    from: i64,
    bookmark: i64,
    /// Whether nothing has come since it began again.
    fresh: bool,
    fragments: Vec<Event>,
    summary: Summary,
}

impl Check<'_> {
    fn note(&mut self, note: &Note, later: &[Note]) -> Result<(), Broken> {
        match note {
            Note::Began { from } => {
                assert!(self.next.is_none_or(|n| n == *from), "began at {from}: {:?}", self.next);
                self.fresh = self.next.is_some();
                (self.next, self.from) = (Some(*from), *from);
                // A revision of which only a part came is told again.
                self.fragments.clear();
                self.summary.begun += 1;
                Ok(())
            }
            Note::Events { events, fragment, compacted } => {
                self.fragments.extend_from_slice(events);
                if *fragment {
                    return Ok(());
                }
                let whole = std::mem::take(&mut self.fragments);
                for revision in whole.chunk_by(|a, b| a.revision() == b.revision()) {
                    self.revision(revision, *compacted, later)?;
                }
                Ok(())
            }
            Note::Progress { revision } => {
                if !self.fragments.is_empty() {
                    let what = format!("progress at {revision} between fragments");
                    return broken(Guarantee::Bookmarkable, what);
                }
                let next = self.started();
                if let Some(event) = self.witness.first(next, *revision, self.interest) {
                    let what = format!("progress at {revision}, but not yet: {event:?}");
                    return match arrives(event, later) {
                        true => broken(Guarantee::Bookmarkable, what),
                        false => broken(Guarantee::Reliable, what),
                    };
                }
                self.next = Some(next.max(revision + 1));
                self.bookmark = self.bookmark.max(*revision);
                self.summary.progress += 1;
                Ok(())
            }
            Note::Compacted { revision } => {
                let next = self.started();
                if *revision <= next {
                    let what = format!("cancelled for {revision}, but it was at {next}");
                    return broken(Guarantee::Reliable, what);
                }
                self.next = Some(*revision);
                self.summary.compacted += 1;
                Ok(())
            }
        }
    }

    fn started(&self) -> i64 {
        self.next.expect("a watch begins before it is told anything")
    }

    /// Takes the events of one revision, which came together.
    fn revision(&mut self, events: &[Event], compacted: i64, later: &[Note]) -> Result<(), Broken> {
        let (revision, next) = (events[0].revision(), self.started());
        if let Some(event) = events.iter().find(|e| !self.interest.wants(e)) {
            return broken(Guarantee::Filter, format!("not asked for: {event:?}"));
        }
        if revision < next {
            let what = format!("{revision} came at {next}: {:?}", events[0]);
            return if revision < self.from {
                broken(Guarantee::Resumable, what)
            } else if revision <= self.bookmark {
                broken(Guarantee::Bookmarkable, what)
            } else if self.witness.at(revision, self.interest).contains(&&events[0]) {
                broken(Guarantee::Unique, what)
            } else {
                broken(Guarantee::Reliable, what)
            };
        }
        self.missing(revision - 1, later)?;
        let expected = self.witness.at(revision, self.interest);
        for (n, event) in events.iter().enumerate() {
            let key = &event.pair().key;
            if events[..n].iter().any(|e| e.pair().key == *key) {
                return broken(Guarantee::Unique, format!("twice in one answer: {event:?}"));
            }
            let Some(theirs) = expected.iter().find(|e| e.pair().key == *key) else {
                return broken(Guarantee::Reliable, format!("this did not happen: {event:?}"));
            };
            self.same(event, theirs, compacted)?;
        }
        let came = |e: &&&Event| events.iter().any(|ours| ours.pair().key == e.pair().key);
        if let Some(event) = expected.iter().find(|e| !came(e)) {
            let what = format!("a part of revision {revision} came without {event:?}");
            return match arrives(event, later) {
                true => broken(Guarantee::Atomic, what),
                false => broken(Guarantee::Reliable, what),
            };
        }
        if events.iter().zip(&expected).any(|(a, b)| a.pair().key != b.pair().key) {
            return broken(Guarantee::Ordered, format!("within {revision}: {events:?}"));
        }
        self.next = Some(revision + 1);
        self.fresh = false;
        self.summary.events += events.len();
        Ok(())
    }

    /// Nothing may be still to come up to `to`.
    fn missing(&self, to: i64, later: &[Note]) -> Result<(), Broken> {
        let next = self.started();
        let Some(event) = self.witness.first(next, to, self.interest) else { return Ok(()) };
        let what = format!("at {next}, before {}, this did not come: {event:?}", to + 1);
        if arrives(event, later) {
            broken(Guarantee::Ordered, what)
        } else if self.fresh {
            broken(Guarantee::Resumable, what)
        } else {
            broken(Guarantee::Reliable, what)
        }
    }

    fn same(&self, ours: &Event, theirs: &Event, compacted: i64) -> Result<(), Broken> {
        let what = || format!("{ours:?} should be {theirs:?}");
        let is_create =
            |e: &Event| e.kind == PUT && e.pair().create_revision == e.pair().mod_revision;
        if is_create(ours) != is_create(theirs) {
            return broken(Guarantee::IsCreate, what());
        }
        if (ours.kind, ours.pair()) != (theirs.kind, theirs.pair()) {
            return broken(Guarantee::Reliable, what());
        }
        // The pair before is read just before the revision, where it may be compacted.
        let gone = ours.prev_kv.is_none() && ours.revision() <= compacted;
        let right = match self.interest.prev_kv {
            true => ours.prev_kv == theirs.prev_kv || gone,
            false => ours.prev_kv.is_none(),
        };
        if right { Ok(()) } else { broken(Guarantee::PrevKv, what()) }
    }
}

/// Whether this event comes later, before the watch begins again.
fn arrives(event: &Event, later: &[Note]) -> bool {
    let until = |note: &&Note| !matches!(note, Note::Began { .. });
    let same = |e: &Event| (e.revision(), &e.pair().key) == (event.revision(), &event.pair().key);
    later.iter().take_while(until).any(|note| match note {
        Note::Events { events, .. } => events.iter().any(same),
        _ => false,
    })
}

#[cfg(test)]
#[path = "watching_tests.rs"]
mod tests;
