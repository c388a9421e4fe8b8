//! Which live watchers want the events of a key, without looking at the others.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::intervals::{End, Intervals, Span};
use super::watcher::Watcher;
use crate::types::KeyRange;

/// The live watchers: those of one key by that key, the others by their span. Watchers of the same
/// range stand together.
#[derive(Default)]
pub struct Index {
    /// Only looked up, never iterated in its own order.
    keys: HashMap<Bytes, Members>,
    spans: Intervals<Members>,
}

impl Index {
    /// Adds a watcher that is not in the index and whose range is not empty.
    pub fn insert(&mut self, watcher: Arc<Watcher>) {
        match place(watcher.range()) {
            Place::Key(key) => self.keys.entry(key.clone()).or_default().insert(watcher),
            Place::Span(span) => match self.spans.get_mut(&span) {
                Some(members) => members.insert(watcher),
                None => {
                    let mut members = Members::default();
                    members.insert(watcher);
                    self.spans.insert(span, members);
                }
            },
        }
    }

    /// Removes a watcher that is in the index.
    pub fn remove(&mut self, watcher: &Watcher) {
        match place(watcher.range()) {
            Place::Key(key) => {
                let members = self.keys.get_mut(key).expect("a live watcher is in the index");
                members.remove(watcher);
                if members.0.is_empty() {
                    self.keys.remove(key);
                }
            }
            Place::Span(span) => {
                let members = self.spans.get_mut(&span).expect("a live watcher is in the index");
                members.remove(watcher);
                if members.0.is_empty() {
                    self.spans.remove(&span);
                }
            }
        }
    }

    /// Calls `visit` with each watcher whose range has `key`.
    pub fn visit<'a>(&'a self, key: &[u8], mut visit: impl FnMut(&'a Arc<Watcher>)) {
        if let Some(members) = self.keys.get(key) {
            members.0.iter().for_each(&mut visit);
        }
        if !self.spans.is_empty() {
            self.spans.visit_around(key, &mut |members| members.0.iter().for_each(&mut visit));
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        let mut len = self.keys.values().map(|members| members.0.len()).sum();
        self.spans.visit_all(&mut |members| len += members.0.len());
        len
    }

    /// Takes all watchers out, in the order they were created.
    pub fn drain(&mut self) -> Vec<Arc<Watcher>> {
        let mut all: Vec<_> = self.keys.drain().flat_map(|(_, members)| members.0).collect();
        std::mem::take(&mut self.spans).visit_all(&mut |members| all.extend_from_slice(&members.0));
        all.sort_unstable_by_key(|watcher| watcher.serial());
        all
    }
}

enum Place<'a> {
    Key(&'a Bytes),
    Span(Span),
}

fn place(range: &KeyRange) -> Place<'_> {
    match range {
        KeyRange::One(key) => Place::Key(key),
        KeyRange::Span { start, end } => {
            Place::Span(Span { start: start.clone(), end: End::Before(end.clone()) })
        }
        KeyRange::From(start) => Place::Span(Span { start: start.clone(), end: End::Never }),
    }
}

/// The watchers of one range. Each knows its slot here, so that one of many leaves in O(1).
#[derive(Default)]
struct Members(Vec<Arc<Watcher>>);

impl Members {
    fn insert(&mut self, watcher: Arc<Watcher>) {
        watcher.set_slot(self.0.len());
        self.0.push(watcher);
    }

    fn remove(&mut self, watcher: &Watcher) {
        let slot = watcher.slot();
        let removed = self.0.swap_remove(slot);
        assert_eq!(removed.serial(), watcher.serial(), "a watcher knows its slot");
        if let Some(moved) = self.0.get(slot) {
            moved.set_slot(slot);
        }
    }
}
