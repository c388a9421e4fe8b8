//! Which keys a request speaks of.

use std::ops::Bound;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// A set of neighbouring keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyRange {
    /// Exactly this key.
    One(Bytes),
    /// The keys `start <= key < end`; none when `end <= start`.
    Span { start: Bytes, end: Bytes },
    /// All keys `>= start`.
    From(Bytes),
}

impl KeyRange {
    /// The range etcd's wire form means: no `range_end` is one key, a single zero byte is "all keys
    /// from `key`", anything else is the half-open span.
    pub fn from_wire(key: Bytes, range_end: Bytes) -> KeyRange {
        match range_end.as_ref() {
            [] => KeyRange::One(key),
            [0] => KeyRange::From(key),
            _ => KeyRange::Span { start: key, end: range_end },
        }
    }

    /// All keys that begin with `prefix`.
    pub fn prefix(prefix: &[u8]) -> KeyRange {
        let start = Bytes::copy_from_slice(prefix);
        match prefix.iter().rposition(|byte| *byte != 0xff) {
            Some(last) => {
                let mut end = prefix[..=last].to_vec();
                end[last] += 1;
                KeyRange::Span { start, end: end.into() }
            }
            None => KeyRange::From(start),
        }
    }

    /// The smallest key that may be in the range.
    pub fn start(&self) -> &Bytes {
        match self {
            KeyRange::One(key) => key,
            KeyRange::Span { start, .. } | KeyRange::From(start) => start,
        }
    }

    pub fn contains(&self, key: &[u8]) -> bool {
        match self {
            KeyRange::One(one) => one == key,
            KeyRange::Span { start, end } => start <= key && key < end.as_ref(),
            KeyRange::From(start) => start <= key,
        }
    }

    /// Whether `key`, known to be at or after the start, lies behind the end.
    pub fn ends_before(&self, key: &[u8]) -> bool {
        match self {
            KeyRange::One(one) => key > one.as_ref(),
            KeyRange::Span { end, .. } => key >= end.as_ref(),
            KeyRange::From(_) => false,
        }
    }

    /// Whether no key can be in the range.
    pub fn is_empty(&self) -> bool {
        matches!(self, KeyRange::Span { start, end } if end <= start)
    }

    /// The range as bounds for an ordered map. Only for a range that is not empty: a map may panic
    /// on bounds that cross.
    pub fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        match self {
            KeyRange::One(key) => (Bound::Included(key), Bound::Included(key)),
            KeyRange::Span { start, end } => (Bound::Included(start), Bound::Excluded(end)),
            KeyRange::From(start) => (Bound::Included(start), Bound::Unbounded),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_forms_mean_what_etcd_means() {
        let range = |key: &'static [u8], end: &'static [u8]| {
            KeyRange::from_wire(Bytes::from_static(key), Bytes::from_static(end))
        };
        assert!(range(b"a", b"").contains(b"a"));
        assert!(!range(b"a", b"").contains(b"aa"));
        assert!(range(b"a", b"\0").contains(b"zzz"));
        assert!(!range(b"b", b"\0").contains(b"a"));
        assert!(range(b"a", b"c").contains(b"b"));
        assert!(!range(b"a", b"c").contains(b"c"));
        assert!(range(b"c", b"a").is_empty());
        assert!(range(b"\0", b"\0").contains(b"\0"));
    }

    #[test]
    fn a_prefix_ends_where_its_last_byte_that_can_grow_grows() {
        assert!(KeyRange::prefix(b"a\xff").contains(b"a\xff\xff\xff"));
        assert!(!KeyRange::prefix(b"a\xff").contains(b"b"));
        assert_eq!(KeyRange::prefix(b"\xff\xff"), KeyRange::From(Bytes::from_static(b"\xff\xff")));
        assert!(KeyRange::prefix(b"").contains(b""));
    }
}
