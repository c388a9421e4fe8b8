//! What is in the log: where each entry lies, and the recent ones themselves.
//!
//! ```text
//!            first                                  last
//!   purged |  slot slot slot slot slot slot slot slot
//!                              [ cached entries     ]
//! ```
//!
//! A slot for each entry tells where its record is. The cache holds a tail of them within a byte
//! bound, and beyond that bound whatever has no place yet: an entry is readable from the moment it
//! is appended, so it leaves the cache only when it can be read from a file.
//!
//! This module performs no I/O. Appending, truncating and purging change it the same way whether
//! they were asked for just now or are replayed from a file.

use std::collections::VecDeque;
use std::io;

use openraft::EntryPayload;
use serde::{Deserialize, Serialize};

use crate::raft::types::{LogEntry, LogId, Payload, Vote};

/// What the log says apart from its entries.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    pub vote: Option<Vote>,
    pub committed: Option<LogId>,
    pub purged: Option<LogId>,
    /// The last entry, or `purged` if there is none.
    pub last: Option<LogId>,
}

impl Standing {
    /// The index that the next entry must have. A log that never had an entry takes any.
    pub fn next_index(&self) -> Option<u64> {
        self.last.map(|last| last.index + 1)
    }

    /// Makes `id` the last entry.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if that would leave a hole or write over an entry.
    pub fn append(&mut self, id: LogId) -> io::Result<()> {
        match self.next_index() {
            Some(next) if next != id.index => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("entry {id} does not follow the last one, whose successor is {next}"),
            )),
            _ => {
                self.last = Some(id);
                Ok(())
            }
        }
    }

    /// Forgets the entries after `after`, all of them for `None`. False if there are none.
    pub fn truncate_after(&mut self, after: Option<LogId>) -> bool {
        let Some(last) = self.last else { return false };
        if after.is_some_and(|after| after.index >= last.index) || self.last == self.purged {
            return false;
        }
        let purged_index = self.purged.map(|purged| purged.index);
        self.last = match after {
            Some(after) if Some(after.index) > purged_index => Some(after),
            _ => self.purged,
        };
        true
    }

    /// Forgets the entries up to `upto`, inclusive. False if an earlier purge covers it.
    pub fn purge(&mut self, upto: LogId) -> bool {
        if self.purged.is_some_and(|purged| purged.index >= upto.index) {
            return false;
        }
        self.purged = Some(upto);
        if self.last.is_none_or(|last| last.index <= upto.index) {
            self.last = Some(upto);
        }
        true
    }
}

/// Where the record of an entry lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    pub segment: u64,
    pub offset: u32,
    pub length: u32,
}

/// Identifies one append of one entry. An entry that is truncated and appended again is another one
/// here, though raft gives it the same id.
pub type Ticket = u64;

#[derive(Debug)]
enum Slot {
    /// Waiting for the writer.
    Queued(Ticket),
    At(Location),
}

#[derive(Debug)]
pub struct Contents {
    standing: Standing,
    /// The index of the first slot, or of the next entry if there is none.
    first: u64,
    slots: VecDeque<Slot>,
    cache: VecDeque<LogEntry>,
    cached_bytes: usize,
    cache_limit_bytes: usize,
    next_ticket: Ticket,
}

/// The answer to a read: entries whose records must be fetched, and those that follow them.
#[derive(Debug, Default)]
pub struct Found {
    pub located: Vec<(u64, Location)>,
    pub cached: Vec<LogEntry>,
}

impl Contents {
    /// `standing` is what is known before the first record that will be replayed.
    pub fn new(standing: Standing, cache_limit_bytes: usize) -> Contents {
        Contents {
            first: standing.next_index().unwrap_or(0),
            standing,
            slots: VecDeque::new(),
            cache: VecDeque::new(),
            cached_bytes: 0,
            cache_limit_bytes,
            next_ticket: 0,
        }
    }

    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    pub fn set_vote(&mut self, vote: Vote) {
        self.standing.vote = Some(vote);
    }

    pub fn set_committed(&mut self, committed: Option<LogId>) {
        self.standing.committed = committed;
    }

    /// Appends all of `entries` or, if they would leave a hole, none. Returns the ticket of the
    /// first; the others have the numbers that follow.
    pub fn append(&mut self, entries: &[LogEntry]) -> io::Result<Ticket> {
        let mut after = self.standing.clone();
        for entry in entries {
            after.append(entry.log_id)?;
        }
        let first_ticket = self.next_ticket;
        for entry in entries {
            self.push(entry.clone(), Slot::Queued(self.next_ticket));
            self.next_ticket += 1;
        }
        self.standing = after;
        self.evict();
        Ok(first_ticket)
    }

    /// Appends an entry that was found in a file.
    pub fn append_found(&mut self, entry: LogEntry, location: Location) -> io::Result<()> {
        self.standing.append(entry.log_id)?;
        self.push(entry, Slot::At(location));
        self.evict();
        Ok(())
    }

    /// See [`Standing::truncate_after`].
    pub fn truncate_after(&mut self, after: Option<LogId>) -> bool {
        let changed = self.standing.truncate_after(after);
        let end = self.standing.next_index().unwrap_or(0);
        if !changed {
            return false;
        }
        self.slots.truncate(usize::try_from(end.saturating_sub(self.first)).unwrap_or(usize::MAX));
        if self.slots.is_empty() {
            self.first = end;
        }
        while self.cache.back().is_some_and(|entry| entry.log_id.index >= end) {
            if let Some(entry) = self.cache.pop_back() {
                self.cached_bytes -= cost_bytes(&entry);
            }
        }
        true
    }

    /// See [`Standing::purge`].
    pub fn purge(&mut self, upto: LogId) -> bool {
        if !self.standing.purge(upto) {
            return false;
        }
        let begin = upto.index + 1;
        while self.first < begin && self.slots.pop_front().is_some() {
            self.first += 1;
        }
        self.first = self.first.max(begin);
        while self.cache.len() > self.slots.len() {
            self.pop_oldest_cached();
        }
        true
    }

    /// Notes where the entry `index` was written, if it is still the one appended with `ticket`.
    pub fn place(&mut self, index: u64, ticket: Ticket, location: Location) {
        let at = index.checked_sub(self.first).and_then(|at| usize::try_from(at).ok());
        // It may have been truncated or purged since it was queued.
        if let Some(slot) = at.and_then(|at| self.slots.get_mut(at))
            && matches!(slot, Slot::Queued(queued) if *queued == ticket)
        {
            *slot = Slot::At(location);
        }
    }

    /// Takes entries out of the cache, oldest first, until it is within its bound or the next one
    /// has no place yet.
    pub fn evict(&mut self) {
        while self.cached_bytes > self.cache_limit_bytes {
            let oldest = self.slots.len() - self.cache.len();
            match self.slots.get(oldest) {
                Some(Slot::At(_)) => self.pop_oldest_cached(),
                _ => return,
            }
        }
    }

    /// The entries of `begin..end` that the log has, as many of the first as fit into `limit_bytes`
    /// but at least one.
    pub fn find(&self, begin: u64, end: u64, limit_bytes: usize) -> Found {
        let end = end.min(self.first + self.slots.len() as u64);
        let begin = begin.max(self.first);
        let cached_from = self.first + (self.slots.len() - self.cache.len()) as u64;
        let mut found = Found::default();
        let mut bytes = 0;
        for index in begin..end {
            if index >= cached_from {
                let entry = &self.cache[(index - cached_from) as usize];
                bytes += cost_bytes(entry);
                if bytes > limit_bytes && index > begin {
                    break;
                }
                found.cached.push(entry.clone());
            } else {
                let Slot::At(location) = self.slots[(index - self.first) as usize] else {
                    unreachable!("entry {index} left the cache before it had a place");
                };
                bytes += location.length as usize;
                if bytes > limit_bytes && index > begin {
                    break;
                }
                found.located.push((index, location));
            }
        }
        found
    }

    /// The last entry that lies before the newest segment and the `kept` ones before that.
    pub fn surplus(&self, kept: u64) -> Option<u64> {
        let newest = self.slots.iter().rev().find_map(|slot| match slot {
            Slot::At(location) => Some(location.segment),
            Slot::Queued(_) => None,
        })?;
        let is_surplus =
            |slot: &Slot| matches!(slot, Slot::At(location) if location.segment + kept < newest);
        let surplus = self.slots.partition_point(is_surplus) as u64;
        (surplus > 0).then(|| self.first + surplus - 1)
    }

    /// The first index that `standing` promises and no record was found for.
    pub fn first_missing(&self) -> Option<u64> {
        let needed = self.standing.purged.map_or(0, |purged| purged.index + 1);
        (self.standing.last.is_some() && self.first > needed).then_some(needed)
    }

    /// The index of the first entry, or of the next if there is none.
    pub fn first_index(&self) -> u64 {
        self.first
    }

    fn push(&mut self, entry: LogEntry, slot: Slot) {
        if self.slots.is_empty() {
            self.first = entry.log_id.index;
        }
        self.slots.push_back(slot);
        self.cached_bytes += cost_bytes(&entry);
        self.cache.push_back(entry);
    }

    fn pop_oldest_cached(&mut self) {
        if let Some(entry) = self.cache.pop_front() {
            self.cached_bytes -= cost_bytes(&entry);
        }
    }
}

/// What an entry takes in memory, for the bounds of cache and queue. Memberships are few and small,
/// so a flat figure does.
pub fn cost_bytes(entry: &LogEntry) -> usize {
    size_of::<LogEntry>()
        + match &entry.payload {
            EntryPayload::Blank => 0,
            EntryPayload::Normal(Payload(bytes)) => bytes.len(),
            EntryPayload::Membership(_) => 1024,
        }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use openraft::alias::CommittedLeaderIdOf;

    use super::*;
    use crate::raft::types::Raft;

    fn log_id(term: u64, index: u64) -> LogId {
        LogId { leader_id: CommittedLeaderIdOf::<Raft>::new(term), index }
    }

    fn entry(term: u64, index: u64) -> LogEntry {
        let payload = EntryPayload::Normal(Payload(Bytes::from(vec![0; 100])));
        LogEntry { log_id: log_id(term, index), payload }
    }

    fn entries(term: u64, indices: std::ops::RangeInclusive<u64>) -> Vec<LogEntry> {
        indices.map(|index| entry(term, index)).collect()
    }

    fn location(offset: u32) -> Location {
        Location { segment: 1, offset, length: 133 }
    }

    fn ids(found: &Found) -> Vec<LogId> {
        found.cached.iter().map(|entry| entry.log_id).collect()
    }

    #[test]
    fn an_entry_leaves_the_cache_only_when_it_has_a_place() {
        let mut contents = Contents::new(Standing::default(), 0);
        let ticket = contents.append(&entries(1, 1..=3)).unwrap();
        assert_eq!(contents.find(1, 9, usize::MAX).cached.len(), 3);
        contents.place(1, ticket, location(10));
        contents.place(3, ticket + 2, location(30));
        contents.evict();
        let found = contents.find(1, 9, usize::MAX);
        assert_eq!(found.located, [(1, location(10))]);
        assert_eq!(ids(&found), [log_id(1, 2), log_id(1, 3)]);
    }

    #[test]
    fn a_place_for_a_truncated_entry_is_not_taken_for_its_successor() {
        let mut contents = Contents::new(Standing::default(), 0);
        let old = contents.append(&entries(1, 1..=3)).unwrap();
        assert!(contents.truncate_after(Some(log_id(1, 1))));
        let new = contents.append(&entries(1, 2..=2)).unwrap();
        contents.place(1, old, location(10));
        contents.place(2, old + 1, location(20));
        contents.place(3, old + 2, location(30));
        contents.evict();
        assert_eq!(ids(&contents.find(2, 3, usize::MAX)), [log_id(1, 2)]);
        contents.place(2, new, location(40));
        contents.evict();
        assert_eq!(contents.find(2, 3, usize::MAX).located, [(2, location(40))]);
    }

    #[test]
    fn a_hole_is_refused_and_changes_nothing() {
        let mut contents = Contents::new(Standing::default(), usize::MAX);
        contents.append(&entries(1, 5..=6)).unwrap();
        for wrong in [vec![entry(1, 8)], vec![entry(1, 6)], vec![entry(1, 7), entry(1, 9)]] {
            let error = contents.append(&wrong).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        assert_eq!(contents.standing().last, Some(log_id(1, 6)));
        assert_eq!(ids(&contents.find(0, 99, usize::MAX)), [log_id(1, 5), log_id(1, 6)]);
    }

    #[test]
    fn purging_beyond_the_end_leaves_an_empty_log_that_goes_on_after_it() {
        let mut contents = Contents::new(Standing::default(), usize::MAX);
        contents.append(&entries(1, 1..=3)).unwrap();
        assert!(contents.purge(log_id(2, 9)));
        assert_eq!(contents.standing().last, Some(log_id(2, 9)));
        assert_eq!(contents.cached_bytes, 0);
        assert!(contents.append(&[entry(2, 4)]).is_err());
        contents.append(&[entry(2, 10)]).unwrap();
        assert!(!contents.purge(log_id(1, 2)), "an older purge changes nothing");
        assert_eq!(ids(&contents.find(0, 99, usize::MAX)), [log_id(2, 10)]);
    }

    #[test]
    fn truncation_never_reaches_below_the_purged() {
        let mut contents = Contents::new(Standing::default(), usize::MAX);
        contents.append(&entries(1, 1..=5)).unwrap();
        contents.purge(log_id(1, 3));
        assert!(!contents.truncate_after(Some(log_id(1, 5))));
        assert!(contents.truncate_after(None));
        assert_eq!(contents.standing().last, Some(log_id(1, 3)));
        assert!(!contents.truncate_after(None));
        contents.append(&[entry(2, 4)]).unwrap();
        assert_eq!(ids(&contents.find(0, 99, usize::MAX)), [log_id(2, 4)]);
    }

    #[test]
    fn what_lies_in_old_segments_is_surplus() {
        let mut contents = Contents::new(Standing::default(), 0);
        for index in 1..=9 {
            let location = Location { segment: 5 + index / 3, ..location(10) };
            contents.append_found(entry(1, index), location).unwrap();
        }
        contents.append(&entries(1, 10..=12)).unwrap();
        assert_eq!(contents.surplus(0), Some(8));
        assert_eq!(contents.surplus(1), Some(5));
        assert_eq!(contents.surplus(2), Some(2));
        assert_eq!(contents.surplus(3), None);
        contents.purge(log_id(1, 4));
        assert_eq!(contents.surplus(1), Some(5));
        assert_eq!(contents.surplus(2), None);
        assert_eq!(Contents::new(Standing::default(), 0).surplus(0), None);
    }

    #[test]
    fn a_read_stops_at_its_limit_but_has_at_least_one() {
        let mut contents = Contents::new(Standing::default(), usize::MAX);
        contents.append(&entries(1, 1..=9)).unwrap();
        let one = cost_bytes(&entry(1, 1));
        assert_eq!(contents.find(1, 10, 3 * one).cached.len(), 3);
        assert_eq!(contents.find(1, 10, 0).cached.len(), 1);
        assert_eq!(contents.find(4, 4, 0).cached.len(), 0);
    }
}
