//! A range of any size, read piece by piece at one revision.
//!
//! Nothing is kept between two pages but the place to go on from, so a reader that takes its time
//! costs no memory. For the same reason a compaction does not wait for it: when it passes the
//! revision of the pages, the next one is refused, as a page asked for at that revision would be.

use bytes::Bytes;

use super::{Snapshot, View};
use crate::machine::{Range, Record, Rejection};
use crate::types::KeyRange;

/// What a page holds at most, unless one pair alone is larger: little enough to be encoded and sent
/// between two turns of other tasks, and below what any gRPC library takes in one message.
pub const PAGE_BYTES: usize = 256 << 10;

/// What a pair takes beside its key and value: five numbers and the lengths, when these are large.
const PAIR_BYTES: usize = 48;

/// A range that is being read.
pub struct Pages {
    view: View,
    /// What is still to be read; at a fixed revision after the first page.
    rest: Range,
    /// How many pairs the limit leaves.
    left: usize,
    state: State,
}

enum State {
    /// No page was read.
    Fresh,
    /// `current`: the store's revision when the first page was read. `count`: how many pairs the
    /// range has; without a limit they are counted as they are read.
    Begun {
        current: i64,
        count: i64,
    },
    Ended,
}

/// Some pairs of a range, in key order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub records: Vec<Record>,
    /// On the last page only.
    pub end: Option<PagesEnd>,
}

/// What a range as a whole is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagesEnd {
    /// The revision of the store when the first page was read.
    pub revision: i64,
    /// Whether the limit cut something off.
    pub more: bool,
    /// All pairs in the range, whatever the limit left out.
    pub count: i64,
}

impl Pages {
    /// # Panics
    ///
    /// When `query` has filters or an order other than that of the keys.
    pub fn new(view: View, query: Range) -> Pages {
        assert!(query.is_in_key_order() && !query.has_filters(), "it takes all pairs to answer");
        let left = usize::try_from(query.limit).ok().filter(|limit| *limit > 0);
        Pages { view, left: left.unwrap_or(usize::MAX), rest: query, state: State::Fresh }
    }

    /// The next page; after the last one, which says that it is, there is none. Every page but an
    /// only one has pairs in it.
    ///
    /// # Errors
    ///
    /// As [`View::range`]; [`Rejection::Compacted`] also when the revision of the pages before was
    /// compacted since. No more pages follow.
    pub fn next_page(&mut self) -> Result<Option<Page>, Rejection> {
        if matches!(self.state, State::Ended) {
            return Ok(None);
        }
        let read = self.view.read(|present| match present.resolve(&self.rest) {
            Ok(revision) => (Ok((revision, self.take(present.at(revision)))), revision),
            Err(rejection) => (Err(rejection), i64::MAX),
        });
        let (revision, Taken { records, counted, next }) = match read {
            Ok(read) => read,
            Err(rejection) => {
                self.state = State::Ended;
                return Err(rejection);
            }
        };
        let (current, count) = match self.state {
            State::Begun { current, count } => (current, count + counted),
            _ => (self.view.revision(), counted),
        };
        self.left -= records.len();
        self.rest.revision = revision;
        let more = next.is_some() && self.left == 0;
        match next {
            Some(next) if !more => {
                self.state = State::Begun { current, count };
                self.rest.range = match &self.rest.range {
                    KeyRange::Span { end, .. } => KeyRange::Span { start: next, end: end.clone() },
                    KeyRange::One(_) | KeyRange::From(_) => KeyRange::From(next),
                };
                Ok(Some(Page { records, end: None }))
            }
            _ => {
                self.state = State::Ended;
                Ok(Some(Page { records, end: Some(PagesEnd { revision: current, more, count }) }))
            }
        }
    }

    fn take(&self, present: Snapshot<'_>) -> Taken {
        let is_first = matches!(self.state, State::Fresh);
        let Range { range, limit, keys_only, count_only, .. } = &self.rest;
        let mut taken = Taken::default();
        let mut room = PAGE_BYTES;
        if !count_only {
            present.scan(range, |record| {
                let value_bytes = if *keys_only { 0 } else { record.value().len() };
                let bytes = record.key().len() + value_bytes + PAIR_BYTES;
                let fits = bytes <= room || taken.records.is_empty();
                if !fits || taken.records.len() == self.left {
                    taken.next = Some(Bytes::copy_from_slice(record.key()));
                    return false;
                }
                room = room.saturating_sub(bytes);
                taken.records.push(record.clone());
                true
            });
        }
        if *limit <= 0 && !count_only {
            taken.counted = taken.records.len() as i64;
        } else if is_first {
            taken.counted = present.count(range);
        }
        taken
    }
}

/// What was read for a page.
#[derive(Default)]
struct Taken {
    records: Vec<Record>,
    /// What it adds to the count of the range.
    counted: i64,
    /// The first key in the range that was left out.
    next: Option<Bytes>,
}
