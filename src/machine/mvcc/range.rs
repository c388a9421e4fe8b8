//! The pairs of a range at one revision: filtered, sorted, cut.

use std::cmp::Ordering;
use std::sync::Arc;

use super::History;
use crate::machine::{Range, RangeReply, Record, Rejection, SortOrder, SortTarget};
use crate::types::{KeyRange, Revision};

/// The state at one revision. Who makes one sees to it that the revision stays readable.
#[derive(Clone, Copy)]
pub struct Snapshot<'a> {
    history: &'a History,
    revision: i64,
}

impl<'a> Snapshot<'a> {
    pub fn new(history: &'a History, revision: i64) -> Snapshot<'a> {
        Snapshot { history, revision }
    }

    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The state at another revision, which must be readable.
    pub fn at(&self, revision: i64) -> Snapshot<'a> {
        Snapshot { revision, ..*self }
    }

    /// The pair of `key`.
    pub fn get(&self, key: &[u8]) -> Option<Arc<Record>> {
        let newest = self.history.index.newest(key, Revision::last_of(self.revision))?;
        (!newest.is_tombstone()).then_some(newest)
    }

    /// Calls `visit` with each pair in `range`, in key order, until it returns false.
    pub fn scan(&self, range: &KeyRange, visit: impl FnMut(&Arc<Record>) -> bool) {
        self.history.index.scan(range, Revision::last_of(self.revision), visit);
    }

    /// The revision that `query` is to be answered at, given that this snapshot is the present.
    pub fn resolve(&self, query: &Range) -> Result<i64, Rejection> {
        if query.revision <= 0 {
            return Ok(self.revision);
        }
        let (requested, current, oldest) =
            (query.revision, self.revision, self.history.compacted());
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
        let mut reply = RangeReply { keys_only: query.keys_only, ..RangeReply::default() };
        if query.count_only {
            reply.keys_only = false;
            self.scan(&query.range, |_| {
                reply.count += 1;
                true
            });
            return reply;
        }
        let limit = usize::try_from(query.limit).ok().filter(|limit| *limit > 0);
        // Without order and filters the limit cuts in key order, before an implied sort. One more is
        // taken than asked for, as etcd does: with a sort target that one can displace another.
        let unordered = query.order == SortOrder::None && !has_filters(query);
        let wanted = match limit {
            Some(limit) if unordered => limit.saturating_add(1),
            _ => usize::MAX,
        };
        self.scan(&query.range, |record| {
            reply.count += 1;
            if reply.records.len() < wanted && passes(query, record) {
                reply.records.push(record.clone());
            }
            true
        });
        sort(&mut reply.records, query);
        if let Some(limit) = limit
            && reply.records.len() > limit
        {
            reply.records.truncate(limit);
            reply.more = true;
        }
        reply
    }
}

fn has_filters(query: &Range) -> bool {
    query.min_mod_revision != 0
        || query.max_mod_revision != 0
        || query.min_create_revision != 0
        || query.max_create_revision != 0
}

fn passes(query: &Range, record: &Record) -> bool {
    let within =
        |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
    within(record.mod_revision.main, query.min_mod_revision, query.max_mod_revision)
        && within(record.create_revision, query.min_create_revision, query.max_create_revision)
}

/// Sorts pairs that are in key order. Equal ones stay in key order, also when descending.
fn sort(records: &mut [Arc<Record>], query: &Range) {
    let by_target = |a: &Record, b: &Record| match query.target {
        SortTarget::Key => a.key.cmp(&b.key),
        SortTarget::Version => a.version.cmp(&b.version),
        SortTarget::Create => a.create_revision.cmp(&b.create_revision),
        SortTarget::Mod => a.mod_revision.main.cmp(&b.mod_revision.main),
        SortTarget::Value => a.value.cmp(&b.value),
    };
    match (query.order, query.target) {
        (SortOrder::None | SortOrder::Ascend, SortTarget::Key) => {}
        (SortOrder::None | SortOrder::Ascend, _) => records.sort_by(|a, b| by_target(a, b)),
        (SortOrder::Descend, SortTarget::Key) => records.reverse(),
        (SortOrder::Descend, _) => {
            records.sort_by(|a, b| Ordering::reverse(by_target(a, b)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LeaseId;

    /// Keys a..e, made at 2..6, with values and versions that order otherwise.
    fn history() -> History {
        let history = History::new(6, super::super::NEVER_COMPACTED);
        let pairs = [("a", "3", 2), ("b", "1", 1), ("c", "0", 2), ("d", "2", 1), ("e", "1", 1)];
        for (main, (key, value, version)) in (2..).zip(pairs) {
            history.insert(Arc::new(Record {
                key: key.into(),
                value: value.into(),
                create_revision: main,
                mod_revision: Revision::first_of(main),
                version,
                lease: LeaseId::NONE,
            }));
        }
        history
    }

    fn all() -> Range {
        Range::all(KeyRange::From("".into()))
    }

    fn keys(query: &Range) -> (String, bool, i64) {
        let history = history();
        let reply = history.current().range(query);
        let keys = reply.records.iter().map(|record| String::from_utf8_lossy(&record.key));
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
