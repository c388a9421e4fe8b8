//! No branch of a transaction may change a key twice.
//!
//! A key put twice, or put and also inside a deleted range, in whichever order, is refused; deleting
//! twice is harmless. A nested transaction counts with all it might do. Its two branches never run
//! together, so they may touch the same keys, and so may the two branches of the outermost one.
//!
//! As in etcd, a range without an end is not looked at: a transaction may delete everything and put
//! a key. Its operations run in their order.
//!
//! Transactions nest, and a request may hold tens of thousands of operations in all. Each key is
//! looked up in ordered sets, and sets are joined small into large.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::ops::Bound;

use crate::api::status::Refusal;
use crate::machine::TxnOp;
use crate::types::KeyRange;

/// Refuses a branch that would change a key twice.
pub fn check(branch: &[TxnOp]) -> Result<(), Refusal> {
    changes_of(branch).map(drop)
}

fn changes_of(branch: &[TxnOp]) -> Result<Changes<'_>, Refusal> {
    let mut all = Changes::default();
    for op in branch {
        match op {
            TxnOp::Range(_) => {}
            TxnOp::Put(put) => {
                if all.deletes.covers(&put.key) || !all.puts.insert(&put.key) {
                    return Err(Refusal::DuplicateKey);
                }
            }
            TxnOp::DeleteRange(delete) => {
                if let Some(span) = Span::of(&delete.range) {
                    if all.puts_within(span) {
                        return Err(Refusal::DuplicateKey);
                    }
                    all.deletes.add(span);
                }
            }
            TxnOp::Txn(txn) => {
                let mut either = changes_of(&txn.success)?;
                either.absorb(changes_of(&txn.failure)?);
                if all.meets(&either) {
                    return Err(Refusal::DuplicateKey);
                }
                all.absorb(either);
            }
        }
    }
    Ok(all)
}

/// What a list of operations may put and delete.
#[derive(Default)]
struct Changes<'a> {
    puts: BTreeSet<&'a [u8]>,
    deletes: Spans<'a>,
}

impl<'a> Changes<'a> {
    /// Whether a key is changed on both sides, deleted on both excepted.
    fn meets(&self, other: &Changes<'a>) -> bool {
        let (few, many) = if self.puts.len() < other.puts.len() {
            (&self.puts, &other.puts)
        } else {
            (&other.puts, &self.puts)
        };
        few.iter().any(|key| many.contains(key))
            || self.puts_meet(&other.deletes)
            || other.puts_meet(&self.deletes)
    }

    fn puts_meet(&self, deletes: &Spans<'a>) -> bool {
        if self.puts.len() < deletes.0.len() {
            self.puts.iter().any(|key| deletes.covers(key))
        } else {
            deletes.iter().any(|span| self.puts_within(span))
        }
    }

    fn puts_within(&self, span: Span<'_>) -> bool {
        let End { key, included } = span.end;
        let end = if included { Bound::Included(key) } else { Bound::Excluded(key) };
        self.puts.range::<[u8], _>((Bound::Included(span.start), end)).next().is_some()
    }

    fn absorb(&mut self, mut other: Changes<'a>) {
        if self.puts.len() < other.puts.len() {
            mem::swap(&mut self.puts, &mut other.puts);
        }
        self.puts.extend(other.puts);
        if self.deletes.0.len() < other.deletes.0.len() {
            mem::swap(&mut self.deletes, &mut other.deletes);
        }
        for span in other.deletes.iter() {
            self.deletes.add(span);
        }
    }
}

/// A range that counts: it has an end, and at least one possible key.
#[derive(Clone, Copy)]
struct Span<'a> {
    start: &'a [u8],
    end: End<'a>,
}

/// Where a span ends. The order is that of how far it reaches.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct End<'a> {
    key: &'a [u8],
    included: bool,
}

impl<'a> Span<'a> {
    fn of(range: &'a KeyRange) -> Option<Span<'a>> {
        if range.is_empty() {
            return None;
        }
        let end = match range {
            KeyRange::One(key) => End { key, included: true },
            KeyRange::Span { end, .. } => End { key: end, included: false },
            KeyRange::From(_) => return None,
        };
        Some(Span { start: range.start(), end })
    }
}

impl End<'_> {
    /// Whether a span that starts at or before `key` and ends here has `key` in it.
    fn reaches(self, key: &[u8]) -> bool {
        self >= End { key, included: true }
    }
}

/// Spans that do not overlap, by their starts.
#[derive(Default)]
struct Spans<'a>(BTreeMap<&'a [u8], End<'a>>);

impl<'a> Spans<'a> {
    fn iter(&self) -> impl Iterator<Item = Span<'a>> {
        self.0.iter().map(|(start, end)| Span { start, end: *end })
    }

    fn covers(&self, key: &[u8]) -> bool {
        self.last_from(key).is_some_and(|span| span.end.reaches(key))
    }

    /// The last span that starts at or before `key`.
    fn last_from(&self, key: &[u8]) -> Option<Span<'a>> {
        let (start, end) =
            self.0.range::<[u8], _>((Bound::Unbounded, Bound::Included(key))).next_back()?;
        Some(Span { start, end: *end })
    }

    fn add(&mut self, mut span: Span<'a>) {
        if let Some(before) = self.last_from(span.start)
            && before.end.reaches(span.start)
        {
            span = Span { start: before.start, end: before.end.max(span.end) };
        }
        while let Some((next, end)) =
            self.0.range::<[u8], _>((Bound::Excluded(span.start), Bound::Unbounded)).next()
            && span.end.reaches(next)
        {
            let next = *next;
            span.end = span.end.max(*end);
            self.0.remove(next);
        }
        self.0.insert(span.start, span.end);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::machine::{DeleteRange, Put, Txn};
    use crate::types::LeaseId;

    fn put(key: &str) -> TxnOp {
        TxnOp::Put(Put {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Some(Bytes::new()),
            lease: Some(LeaseId::NONE),
            prev_kv: false,
        })
    }

    fn delete(key: &str, end: &str) -> TxnOp {
        let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        let range = KeyRange::from_wire(bytes(key), bytes(end));
        TxnOp::DeleteRange(DeleteRange { range, prev_kv: false })
    }

    fn txn(success: Vec<TxnOp>, failure: Vec<TxnOp>) -> TxnOp {
        TxnOp::Txn(Txn { compares: vec![], success, failure })
    }

    fn allowed(branch: &[TxnOp]) -> bool {
        check(branch).is_ok()
    }

    #[test]
    fn a_key_is_put_only_once() {
        assert!(allowed(&[put("a"), put("b")]));
        assert!(!allowed(&[put("a"), put("b"), put("a")]));
    }

    #[test]
    fn a_key_is_not_put_inside_a_deleted_range_in_either_order() {
        for branch in [
            [put("a"), delete("a", "")],
            [put("b"), delete("a", "c")],
            [put("a"), delete("a", "c")],
        ] {
            assert!(!allowed(&branch), "{branch:?}");
            let [first, second] = branch;
            let turned = [second, first];
            assert!(!allowed(&turned), "{turned:?}");
        }
        assert!(allowed(&[put("c"), delete("a", "c")]));
        assert!(allowed(&[delete("a", ""), put("aa")]));
        assert!(allowed(&[delete("c", "a"), put("b")]));
    }

    #[test]
    fn a_range_without_an_end_is_not_looked_at() {
        for (start, end) in [("\0", "\0"), ("a", "\0"), ("b", "\0")] {
            assert!(allowed(&[put("b"), delete(start, end)]), "{start}");
            assert!(allowed(&[delete(start, end), put("b")]), "{start}");
        }
    }

    #[test]
    fn deleting_twice_is_harmless() {
        assert!(allowed(&[delete("a", ""), delete("a", ""), delete("a", "z"), delete("b", "\0")]));
    }

    #[test]
    fn nested_operations_count_as_the_outer_ones_do() {
        assert!(!allowed(&[put("a"), txn(vec![put("a")], vec![])]));
        assert!(!allowed(&[put("a"), txn(vec![], vec![put("a")])]));
        assert!(!allowed(&[txn(vec![put("a")], vec![]), put("a")]));
        assert!(!allowed(&[txn(vec![put("a")], vec![]), txn(vec![], vec![put("a")])]));
        assert!(!allowed(&[delete("a", "z"), txn(vec![put("b")], vec![])]));
        assert!(!allowed(&[put("b"), txn(vec![], vec![delete("a", "z")])]));
        assert!(!allowed(&[txn(vec![put("b")], vec![]), txn(vec![], vec![delete("a", "z")])]));
        assert!(!allowed(&[txn(vec![txn(vec![put("a"), put("a")], vec![])], vec![])]));
        assert!(!allowed(&[put("a"), txn(vec![txn(vec![], vec![put("a")])], vec![])]));
    }

    #[test]
    fn the_two_branches_of_a_nested_transaction_may_touch_the_same_key() {
        assert!(allowed(&[txn(vec![put("a")], vec![put("a")])]));
        assert!(allowed(&[txn(vec![put("a")], vec![delete("a", "")])]));
        assert!(allowed(&[delete("c", ""), txn(vec![put("a"), delete("c", "")], vec![put("a")])]));
    }

    #[test]
    fn joined_spans_cover_what_the_single_ones_cover() {
        let seed = 7;
        let mut random = StdRng::seed_from_u64(seed);
        for round in 0..2000 {
            let mut letter = || String::from(random.random_range(b'a'..b'k') as char);
            let ranges: Vec<TxnOp> = (0..6)
                .map(|pick| match pick % 3 {
                    0 => delete(&letter(), ""),
                    1 => delete(&letter(), &letter()),
                    _ => delete(&letter(), if letter() == "a" { "\0" } else { "b" }),
                })
                .collect();
            let mut spans = Spans::default();
            for op in &ranges {
                let TxnOp::DeleteRange(delete) = op else { unreachable!() };
                if let Some(span) = Span::of(&delete.range) {
                    spans.add(span);
                }
            }
            for key in (b'`'..b'm').flat_map(|first| [vec![first], vec![first, b'x']]) {
                let expected = ranges.iter().any(|op| match op {
                    TxnOp::DeleteRange(DeleteRange { range: KeyRange::From(_), .. }) => false,
                    TxnOp::DeleteRange(delete) => delete.range.contains(&key),
                    _ => false,
                });
                assert_eq!(spans.covers(&key), expected, "seed {seed} round {round}: {ranges:?}");
            }
        }
    }
}
