//! The pairs of a range at one revision: counted, filtered, sorted, cut.
//!
//! With a limit of L, a range that needs no order but that of its keys costs a seek and L steps,
//! from either end; another order looks at every pair and keeps about 2 L of them at a time.

use std::cmp::Ordering;

use bytes::Bytes;

use super::{History, Roster};
use crate::machine::{Range, RangeReply, Record, Rejection, SortOrder, SortTarget};
use crate::types::{KeyRange, Revision};

/// How many pairs a walk back from the end of a range takes at a time at least, and at most unless
/// the caller wants more.
const STRETCH: usize = 64;
const LONGEST_STRETCH: usize = 4096;

/// The state at one revision. Who makes one sees to it that the revision stays readable.
#[derive(Clone, Copy)]
pub struct Snapshot<'a> {
    history: &'a History,
    revision: i64,
    /// The keys of exactly this state, where the writer takes it before readers can.
    roster: Option<&'a Roster>,
}

impl<'a> Snapshot<'a> {
    /// At a published revision.
    pub fn new(history: &'a History, revision: i64) -> Snapshot<'a> {
        Snapshot { history, revision, roster: None }
    }

    /// In the middle of an entry that will make `revision`, with the keys that are there so far.
    pub fn of_writer(history: &'a History, revision: i64, roster: &'a Roster) -> Snapshot<'a> {
        Snapshot { history, revision, roster: Some(roster) }
    }

    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The state at another revision, which must be readable.
    pub fn at(&self, revision: i64) -> Snapshot<'a> {
        if revision == self.revision { *self } else { Snapshot::new(self.history, revision) }
    }

    /// The pair of `key`.
    pub fn get(&self, key: &[u8]) -> Option<Record> {
        let newest = self.history.index.newest(key, Revision::last_of(self.revision))?;
        (!newest.is_tombstone()).then_some(newest)
    }

    /// Calls `visit` with each pair in `range`, in key order, until it returns false.
    pub fn scan(&self, range: &KeyRange, visit: impl FnMut(&Record) -> bool) {
        self.history.index.scan(range, Revision::last_of(self.revision), visit);
    }

    /// Calls `visit` with each pair in `range`, against key order, until it returns false: most
    /// likely after `likely` of them.
    ///
    /// The index leads forward only, so the range is walked through stretch by stretch from its end.
    /// The roster says where a stretch of some length begins; one that is older or newer than the
    /// snapshot only makes stretches longer or shorter.
    fn scan_back(&self, range: &KeyRange, likely: usize, mut visit: impl FnMut(&Record) -> bool) {
        if range.is_empty() {
            return;
        }
        let mut rest = range.clone();
        let mut length = likely.max(STRETCH);
        let longest = length.max(LONGEST_STRETCH);
        let mut pairs = Vec::new();
        loop {
            let start = self.with_roster(|roster| stretch_from_end(roster, &rest, length));
            let stretch = match (&rest, &start) {
                (_, None) | (KeyRange::One(_), _) => rest.clone(),
                (KeyRange::From(_), Some(start)) => KeyRange::From(start.clone()),
                (KeyRange::Span { end, .. }, Some(start)) => {
                    KeyRange::Span { start: start.clone(), end: end.clone() }
                }
            };
            self.scan(&stretch, |record| {
                pairs.push(record.clone());
                true
            });
            while let Some(record) = pairs.pop() {
                if !visit(&record) {
                    return;
                }
            }
            let Some(end) = start else { return };
            rest = KeyRange::Span { start: range.start().clone(), end };
            length = length.saturating_mul(2).min(longest);
        }
    }

    fn with_roster<T>(&self, look: impl FnOnce(&Roster) -> T) -> T {
        match self.roster {
            Some(roster) => look(roster),
            None => self.history.with_roster(look),
        }
    }

    /// How many pairs are in `range`.
    pub fn count(&self, range: &KeyRange) -> i64 {
        let counted = match (range, self.roster) {
            (KeyRange::One(key), _) => Some(i64::from(self.get(key).is_some())),
            (_, Some(roster)) => Some(roster.count(range) as i64),
            (_, None) => self.history.count(range, self.revision),
        };
        counted.unwrap_or_else(|| {
            let mut count = 0;
            self.scan(range, |_| {
                count += 1;
                true
            });
            count
        })
    }

    /// The revision that `query` is to be answered at, given that this snapshot is the present.
    pub fn resolve(&self, query: &Range) -> Result<i64, Rejection> {
        if query.revision <= 0 { Ok(self.revision) } else { self.resolve_exactly(query.revision) }
    }

    /// As [`Snapshot::resolve`], for a query inside a transaction: there only 0 stands for the
    /// present. In etcd a negative revision is one that was compacted, except that -1 is what it
    /// takes for the oldest revision of a store that never was.
    pub fn resolve_in_txn(&self, query: &Range) -> Result<i64, Rejection> {
        let readable = match query.revision {
            0 => self.revision,
            revision => self.resolve_exactly(revision)?,
        };
        Ok(if readable > 0 { readable } else { self.revision })
    }

    fn resolve_exactly(&self, requested: i64) -> Result<i64, Rejection> {
        let (current, oldest) = (self.revision, self.history.compacted());
        if requested > current {
            Err(Rejection::FutureRevision { requested, current })
        } else if requested < oldest {
            Err(Rejection::Compacted { requested, oldest })
        } else {
            Ok(requested)
        }
    }

    /// Answers `query` at this snapshot's revision, whichever it asks for.
    pub fn range(&self, query: &Range) -> RangeReply {
        if query.count_only {
            return RangeReply { count: self.count(&query.range), ..RangeReply::default() };
        }
        let limit = usize::try_from(query.limit).ok().filter(|limit| *limit > 0);
        // One more tells whether there is more.
        let wanted = limit.map_or(usize::MAX, |limit| limit.saturating_add(1));
        let mut records = Vec::new();
        let mut seen = 0;
        match Walk::of(query) {
            Walk::Forward => self.scan(&query.range, |record| {
                seen += 1;
                if passes(query, record) {
                    records.push(record.clone());
                }
                records.len() < wanted
            }),
            Walk::Back => self.scan_back(&query.range, wanted, |record| {
                seen += 1;
                if passes(query, record) {
                    records.push(record.clone());
                }
                records.len() < wanted
            }),
            Walk::Through => {
                let most = wanted.saturating_mul(2).max(STRETCH);
                self.scan(&query.range, |record| {
                    seen += 1;
                    if passes(query, record) {
                        records.push(record.clone());
                    }
                    if records.len() == most {
                        sort(&mut records, query);
                        records.truncate(wanted);
                    }
                    true
                });
            }
        }
        let count = if records.len() < wanted || matches!(Walk::of(query), Walk::Through) {
            seen
        } else {
            self.count(&query.range)
        };
        sort(&mut records, query);
        let more = limit.is_some_and(|limit| records.len() > limit);
        if more {
            records.truncate(wanted - 1);
        }
        RangeReply { records, more, count, keys_only: query.keys_only }
    }
}

/// Where the last `length` keys of `range` begin, by this roster; `None` when it has no more there.
fn stretch_from_end(roster: &Roster, range: &KeyRange, length: usize) -> Option<Bytes> {
    let first = roster.rank(range.start());
    let start = (first + roster.count(range)).checked_sub(length)?;
    (start > first).then(|| roster.at_rank(start).map(Bytes::copy_from_slice)).flatten()
}

/// How the pairs of a query are found.
enum Walk {
    /// In key order, up to the limit.
    Forward,
    /// Against key order, up to the limit.
    Back,
    /// All of them.
    Through,
}

impl Walk {
    fn of(query: &Range) -> Walk {
        match (query.order, query.target) {
            (SortOrder::None | SortOrder::Ascend, SortTarget::Key) => Walk::Forward,
            (SortOrder::Descend, SortTarget::Key) => Walk::Back,
            // Without order and filters the limit cuts in key order, before the sort that the target
            // implies. As etcd does, one more takes part in the sort and can displace another.
            (SortOrder::None, _) if !query.has_filters() => Walk::Forward,
            _ => Walk::Through,
        }
    }
}

impl Range {
    /// Whether revisions leave pairs out.
    pub fn has_filters(&self) -> bool {
        self.min_mod_revision != 0
            || self.max_mod_revision != 0
            || self.min_create_revision != 0
            || self.max_create_revision != 0
    }

    /// Whether no order is asked for but that of the keys. (Without any order a target still sorts
    /// what the limit has left.)
    pub fn is_in_key_order(&self) -> bool {
        matches!(
            (self.order, self.target),
            (SortOrder::None, _) | (SortOrder::Ascend, SortTarget::Key)
        )
    }
}

fn passes(query: &Range, record: &Record) -> bool {
    let within =
        |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
    within(record.mod_revision().main, query.min_mod_revision, query.max_mod_revision)
        && within(record.create_revision(), query.min_create_revision, query.max_create_revision)
}

/// Sorts pairs by a target that is not their key, equal ones as they stand, also when descending. A
/// walk leaves them in key order; one through all pairs comes here again and again, with pairs that
/// are sorted already followed by ones with larger keys.
fn sort(records: &mut [Record], query: &Range) {
    let by_target: fn(&Record, &Record) -> Ordering = match query.target {
        SortTarget::Key => return,
        SortTarget::Version => |a, b| a.version().cmp(&b.version()),
        SortTarget::Create => |a, b| a.create_revision().cmp(&b.create_revision()),
        SortTarget::Mod => |a, b| a.mod_revision().main.cmp(&b.mod_revision().main),
        SortTarget::Value => |a, b| a.value().cmp(b.value()),
    };
    match query.order {
        SortOrder::None | SortOrder::Ascend => records.sort_by(by_target),
        SortOrder::Descend => records.sort_by(|a, b| by_target(b, a)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Parts;
    use crate::types::LeaseId;

    /// Keys a..e, made at 2..6, with values and versions that order otherwise.
    fn history() -> History {
        let history = History::new(6, super::super::NEVER_COMPACTED);
        let mut roster = Roster::default();
        let pairs = [("a", "3", 2), ("b", "1", 1), ("c", "0", 2), ("d", "2", 1), ("e", "1", 1)];
        for (main, (key, value, version)) in (2..).zip(pairs) {
            history.insert(
                Record::new(Parts {
                    key: key.as_bytes(),
                    value: value.as_bytes(),
                    create_revision: main,
                    mod_revision: Revision::first_of(main),
                    version,
                    lease: LeaseId::NONE,
                }),
                0,
                None,
            );
            roster.insert(key.as_bytes());
        }
        history.publish_roster(6, roster);
        history
    }

    fn all() -> Range {
        Range::all(KeyRange::From("".into()))
    }

    fn keys(query: &Range) -> (String, bool, i64) {
        let history = history();
        let reply = Snapshot::new(&history, history.published()).range(query);
        let keys = reply.records.iter().map(|record| String::from_utf8_lossy(record.key()));
        (keys.collect(), reply.more, reply.count)
    }

    #[test]
    fn a_limit_cuts_and_the_count_does_not_notice() {
        assert_eq!(keys(&all()), ("abcde".into(), false, 5));
        assert_eq!(keys(&Range { limit: 2, ..all() }), ("ab".into(), true, 5));
        assert_eq!(keys(&Range { limit: 5, ..all() }), ("abcde".into(), false, 5));
        assert_eq!(keys(&Range { limit: -1, ..all() }), ("abcde".into(), false, 5));
        assert_eq!(keys(&Range { limit: i64::MAX, ..all() }), ("abcde".into(), false, 5));
    }

    #[test]
    fn filters_reduce_the_pairs_and_not_the_count() {
        let query = Range { min_mod_revision: 3, max_create_revision: 5, ..all() };
        assert_eq!(keys(&query), ("bcd".into(), false, 5));
        assert_eq!(keys(&Range { limit: 3, ..query.clone() }), ("bcd".into(), false, 5));
        assert_eq!(keys(&Range { limit: 2, ..query }), ("bc".into(), true, 5));
        assert_eq!(keys(&Range { max_mod_revision: -1, ..all() }), ("".into(), false, 5));
        assert_eq!(keys(&Range { max_create_revision: -1, ..all() }), ("".into(), false, 5));
        assert_eq!(keys(&Range { min_create_revision: 6, ..all() }), ("e".into(), false, 5));
        assert_eq!(keys(&Range { max_mod_revision: 2, ..all() }), ("a".into(), false, 5));
    }

    #[test]
    fn counting_only_leaves_pairs_and_more_out() {
        let query =
            Range { count_only: true, keys_only: true, limit: 1, min_mod_revision: 4, ..all() };
        assert_eq!(keys(&query), ("".into(), false, 5));
    }

    #[test]
    fn equal_sort_keys_stay_in_key_order() {
        let by = |order, target| keys(&Range { order, target, ..all() }).0;
        assert_eq!(by(SortOrder::Ascend, SortTarget::Value), "cbeda");
        assert_eq!(by(SortOrder::Descend, SortTarget::Value), "adbec");
        assert_eq!(by(SortOrder::Descend, SortTarget::Version), "acbde");
        assert_eq!(by(SortOrder::Descend, SortTarget::Key), "edcba");
        assert_eq!(by(SortOrder::Ascend, SortTarget::Key), "abcde");
        assert_eq!(by(SortOrder::Descend, SortTarget::Create), "edcba");
        assert_eq!(by(SortOrder::Ascend, SortTarget::Mod), "abcde");
    }

    #[test]
    fn an_ordered_range_is_cut_after_the_sort() {
        let query =
            Range { order: SortOrder::Ascend, target: SortTarget::Value, limit: 2, ..all() };
        assert_eq!(keys(&query), ("cb".into(), true, 5));
    }

    #[test]
    fn without_an_order_the_limit_comes_first_and_one_more_pair_takes_part_in_the_sort() {
        let query = Range { target: SortTarget::Value, limit: 2, ..all() };
        assert_eq!(keys(&query), ("cb".into(), true, 5));
        let query = Range { target: SortTarget::Value, limit: 1, ..all() };
        assert_eq!(keys(&query), ("b".into(), true, 5));
        let filtered = Range { target: SortTarget::Value, limit: 1, min_mod_revision: 1, ..all() };
        assert_eq!(keys(&filtered), ("c".into(), true, 5));
    }
}
