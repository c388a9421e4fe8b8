//! An ordered map from key spans to values that finds all spans around a key.
//!
//! A treap ordered by (start, end) whose nodes also know the furthest end below them: a subtree
//! that ends before the key is skipped as a whole. Inserting, removing and finding one span take
//! O(log n) expected; visiting the m spans around a key takes O(m log n) at worst.

use std::cmp::Ordering;
use std::hash::{BuildHasher, RandomState};

use bytes::Bytes;

/// Where a span ends. Ordered as the keys are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// Before this key.
    Before(Bytes),
    Never,
}

impl End {
    fn is_after(&self, key: &[u8]) -> bool {
        match self {
            End::Before(end) => key < end.as_ref(),
            End::Never => true,
        }
    }
}

/// The keys `start <= key < end`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    pub start: Bytes,
    pub end: End,
}

pub struct Intervals<V> {
    root: Link<V>,
    /// Draws the priorities. Random, so that nobody can choose spans that unbalance the tree; what
    /// a caller sees does not depend on them.
    random: RandomState,
    inserted: u64,
}

type Link<V> = Option<Box<Node<V>>>;

struct Node<V> {
    span: Span,
    value: V,
    /// No child has a higher one.
    priority: u64,
    /// The largest end in this subtree.
    furthest: End,
    left: Link<V>,
    right: Link<V>,
}

impl<V> Node<V> {
    fn refresh(&mut self) {
        let below = [&self.left, &self.right].into_iter().flatten().map(|node| &node.furthest);
        self.furthest = below.fold(&self.span.end, std::cmp::max).clone();
    }
}

impl<V> Default for Intervals<V> {
    fn default() -> Intervals<V> {
        Intervals { root: None, random: RandomState::new(), inserted: 0 }
    }
}

impl<V> Intervals<V> {
    pub fn is_empty(&self) -> bool {
        self.root.is_none()
    }

    pub fn get_mut(&mut self, span: &Span) -> Option<&mut V> {
        let mut link = self.root.as_deref_mut();
        while let Some(node) = link {
            link = match span.cmp(&node.span) {
                Ordering::Less => node.left.as_deref_mut(),
                Ordering::Greater => node.right.as_deref_mut(),
                Ordering::Equal => return Some(&mut node.value),
            };
        }
        None
    }

    /// Adds a span that is not in the map.
    pub fn insert(&mut self, span: Span, value: V) {
        self.inserted += 1;
        let priority = self.random.hash_one(self.inserted);
        let furthest = span.end.clone();
        let node = Box::new(Node { span, value, priority, furthest, left: None, right: None });
        self.root = Some(insert(self.root.take(), node));
    }

    pub fn remove(&mut self, span: &Span) -> Option<V> {
        let mut removed = None;
        self.root = remove(self.root.take(), span, &mut removed);
        removed
    }

    /// Calls `visit` with the value of each span that `key` is in, in span order.
    pub fn visit_around<'a>(&'a self, key: &[u8], visit: &mut impl FnMut(&'a V)) {
        visit_around(&self.root, key, visit);
    }

    /// Calls `visit` with every value, in span order.
    pub fn visit_all<'a>(&'a self, visit: &mut impl FnMut(&'a V)) {
        visit_all(&self.root, visit);
    }
}

fn insert<V>(link: Link<V>, new: Box<Node<V>>) -> Box<Node<V>> {
    let Some(mut node) = link else { return new };
    if new.span < node.span {
        let left = insert(node.left.take(), new);
        if left.priority > node.priority {
            return rotate_right(node, left);
        }
        node.left = Some(left);
    } else {
        let right = insert(node.right.take(), new);
        if right.priority > node.priority {
            return rotate_left(node, right);
        }
        node.right = Some(right);
    }
    node.refresh();
    node
}

fn rotate_right<V>(mut node: Box<Node<V>>, mut left: Box<Node<V>>) -> Box<Node<V>> {
    node.left = left.right.take();
    node.refresh();
    left.right = Some(node);
    left.refresh();
    left
}

fn rotate_left<V>(mut node: Box<Node<V>>, mut right: Box<Node<V>>) -> Box<Node<V>> {
    node.right = right.left.take();
    node.refresh();
    right.left = Some(node);
    right.refresh();
    right
}

fn remove<V>(link: Link<V>, span: &Span, removed: &mut Option<V>) -> Link<V> {
    let mut node = link?;
    match span.cmp(&node.span) {
        Ordering::Less => node.left = remove(node.left.take(), span, removed),
        Ordering::Greater => node.right = remove(node.right.take(), span, removed),
        Ordering::Equal => {
            let Node { value, left, right, .. } = *node;
            *removed = Some(value);
            return merge(left, right);
        }
    }
    node.refresh();
    Some(node)
}

/// Joins two trees, all of `left` before all of `right`.
fn merge<V>(left: Link<V>, right: Link<V>) -> Link<V> {
    match (left, right) {
        (None, link) | (link, None) => link,
        (Some(mut left), Some(mut right)) => {
            if left.priority > right.priority {
                left.right = merge(left.right.take(), Some(right));
                left.refresh();
                Some(left)
            } else {
                right.left = merge(Some(left), right.left.take());
                right.refresh();
                Some(right)
            }
        }
    }
}

fn visit_around<'a, V>(link: &'a Link<V>, key: &[u8], visit: &mut impl FnMut(&'a V)) {
    let Some(node) = link else { return };
    if !node.furthest.is_after(key) {
        return;
    }
    visit_around(&node.left, key, visit);
    // Everything to the right starts later still.
    if node.span.start.as_ref() <= key {
        if node.span.end.is_after(key) {
            visit(&node.value);
        }
        visit_around(&node.right, key, visit);
    }
}

fn visit_all<'a, V>(link: &'a Link<V>, visit: &mut impl FnMut(&'a V)) {
    let Some(node) = link else { return };
    visit_all(&node.left, visit);
    visit(&node.value);
    visit_all(&node.right, visit);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn depth<V>(link: &Link<V>) -> usize {
        link.as_ref().map_or(0, |node| 1 + depth(&node.left).max(depth(&node.right)))
    }

    #[test]
    fn finds_exactly_the_spans_around_a_key() {
        for seed in 0..20 {
            let mut random = StdRng::seed_from_u64(seed);
            let key = |n: u32| Bytes::from(format!("{n:03}"));
            let mut tree = Intervals::default();
            let mut model = BTreeMap::new();
            for step in 0..600 {
                let start = random.random_range(0..200);
                let end = match random.random_range(0..20) {
                    0 => End::Never,
                    _ => End::Before(key(start + random.random_range(1..60))),
                };
                let span = Span { start: key(start), end };
                if random.random_bool(0.6) {
                    if tree.get_mut(&span).is_none() {
                        tree.insert(span.clone(), step);
                        model.insert(span, step);
                    }
                } else if let Some((span, _)) = model.range(&span..).next() {
                    let span = span.clone();
                    assert_eq!(tree.remove(&span), model.remove(&span), "seed {seed}");
                } else {
                    assert_eq!(tree.remove(&span), None, "seed {seed}");
                }
                let wanted = key(random.random_range(0..260));
                let mut found = Vec::new();
                tree.visit_around(&wanted, &mut |step| found.push(*step));
                let around = model
                    .iter()
                    .filter(|(span, _)| span.start <= wanted && span.end.is_after(&wanted));
                assert_eq!(found, around.map(|(_, step)| *step).collect::<Vec<_>>(), "seed {seed}");
            }
            let mut all = Vec::new();
            tree.visit_all(&mut |step| all.push(*step));
            assert_eq!(all, model.into_values().collect::<Vec<_>>(), "seed {seed}");
        }
    }

    #[test]
    fn stays_shallow_when_spans_come_in_order() {
        let mut tree = Intervals::default();
        for n in 0..10_000u32 {
            let start = Bytes::copy_from_slice(&n.to_be_bytes());
            tree.insert(Span { start, end: End::Never }, n);
        }
        assert!(depth(&tree.root) < 60, "depth {}", depth(&tree.root));
    }
}
