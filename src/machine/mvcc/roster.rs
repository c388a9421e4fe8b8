//! The keys that are there, counted.
//!
//! A B+ tree whose inner nodes know how many keys lie below each child, so that the number of keys
//! in a range is the difference of two ranks. A clone is one reference; whoever changes a roster
//! copies the nodes on the way to the change unless nobody else holds them.
//!
//! ```text
//!              [ 3 |d| 2 ]           three keys before d, two from d on
//!             /           \
//!       [ a b c ]       [ d e ]
//! ```
//!
//! A node holds its keys one behind the other in one buffer rather than as [`bytes::Bytes`]: to copy a
//! leaf of references, as each created key makes necessary, would be a cache miss for each of its keys.
//! The price is that a key is in memory once more, and for this leaves are bounded in bytes too.

use std::sync::Arc;

use crate::types::KeyRange;

/// A leaf that grows beyond either is split, unless it holds one key only.
const LEAF_KEYS: usize = 64;
const LEAF_BYTES: usize = 4096;

/// An inner node that grows beyond this many children is split.
const CHILDREN: usize = 24;

/// A node that shrinks below this part of its limits joins a neighbour.
const SCANT: usize = 4;

/// A set of keys that can tell how many of them lie in a range.
#[derive(Clone, Default)]
pub struct Roster {
    root: Arc<Node>,
    keys: usize,
}

impl Roster {
    /// All of `keys`, which are in order.
    pub fn of_sorted<'a>(keys: impl Iterator<Item = &'a [u8]>) -> Roster {
        let mut count = 0;
        let mut leaves = vec![Keys::default()];
        for key in keys {
            count += 1;
            let leaf = leaves.last_mut().expect("there is one from the beginning");
            leaf.insert(leaf.len(), key);
            if leaf.is_full() {
                let next = leaf.split_off(leaf.len() - 1);
                leaf.shrink();
                leaves.push(next);
            }
        }
        let mut splits: Vec<Vec<u8>> =
            leaves.windows(2).map(|pair| split_between(&pair[0], &pair[1])).collect();
        let mut level: Vec<Child> = leaves
            .into_iter()
            .map(|keys| Child { keys: keys.len(), node: Arc::new(Node::Leaf(keys)) })
            .collect();
        while level.len() > 1 {
            (level, splits) = join(level, splits);
        }
        let root = level.pop().expect("there is one leaf at least").node;
        Roster { root, keys: count }
    }

    /// Adds `key`, which must not be there.
    pub fn insert(&mut self, key: &[u8]) {
        self.keys += 1;
        if let Some((split, right)) = insert(&mut self.root, key) {
            let mut splits = Keys::default();
            splits.insert(0, &split);
            let left = Child { keys: self.keys - right.keys, node: std::mem::take(&mut self.root) };
            self.root = Arc::new(Node::Inner(Inner { splits, children: vec![left, right] }));
        }
    }

    /// Removes `key`, which must be there.
    pub fn remove(&mut self, key: &[u8]) {
        self.keys -= 1;
        remove(&mut self.root, key);
        // The root is the only node that has no neighbour to join.
        while let Node::Inner(inner) = &*self.root
            && let [only] = &inner.children[..]
        {
            self.root = only.node.clone();
        }
    }

    pub fn contains(&self, key: &[u8]) -> bool {
        let mut node = &*self.root;
        loop {
            match node {
                Node::Leaf(keys) => return keys.find(key).is_ok(),
                Node::Inner(inner) => node = &*inner.children[inner.child_of(key)].node,
            }
        }
    }

    /// How many keys are smaller than `key`.
    pub fn rank(&self, key: &[u8]) -> usize {
        let (mut node, mut rank) = (&*self.root, 0);
        loop {
            match node {
                Node::Leaf(keys) => return rank + keys.find(key).unwrap_or_else(|at| at),
                Node::Inner(inner) => {
                    let at = inner.child_of(key);
                    rank += inner.children[..at].iter().map(|child| child.keys).sum::<usize>();
                    node = &*inner.children[at].node;
                }
            }
        }
    }

    /// The key that `rank` others are smaller than.
    pub fn at_rank(&self, mut rank: usize) -> Option<&[u8]> {
        if rank >= self.keys {
            return None;
        }
        let mut node = &*self.root;
        loop {
            match node {
                Node::Leaf(keys) => return Some(keys.get(rank)),
                Node::Inner(inner) => {
                    let mut children = inner.children.iter();
                    let below = children.find(|child| {
                        let is_below = rank < child.keys;
                        rank -= if is_below { 0 } else { child.keys };
                        is_below
                    });
                    node = &*below.expect("the counts of the children add up").node;
                }
            }
        }
    }

    /// How many keys lie in `range`.
    pub fn count(&self, range: &KeyRange) -> usize {
        match range {
            KeyRange::One(key) => usize::from(self.contains(key)),
            KeyRange::Span { .. } if range.is_empty() => 0,
            KeyRange::Span { start, end } => self.rank(end) - self.rank(start),
            KeyRange::From(start) => self.keys - self.rank(start),
        }
    }
}

#[derive(Clone)]
enum Node {
    Leaf(Keys),
    Inner(Inner),
}

impl Default for Node {
    fn default() -> Node {
        Node::Leaf(Keys::default())
    }
}

/// `splits[n]` is larger than every key below child `n`, and no larger than any below child `n + 1`.
#[derive(Clone)]
struct Inner {
    splits: Keys,
    children: Vec<Child>,
}

#[derive(Clone)]
struct Child {
    /// How many keys are below it.
    keys: usize,
    node: Arc<Node>,
}

impl Inner {
    fn child_of(&self, key: &[u8]) -> usize {
        match self.splits.find(key) {
            Ok(at) => at + 1,
            Err(at) => at,
        }
    }

    fn keys(&self) -> usize {
        self.children.iter().map(|child| child.keys).sum()
    }

    /// Keeps the first `at` children; returns the others, and the split before them.
    fn split_off(&mut self, at: usize) -> (Vec<u8>, Inner) {
        let inner =
            Inner { children: self.children.split_off(at), splits: self.splits.split_off(at) };
        (self.splits.take(at - 1), inner)
    }

    /// Joins child `at`, which has become scant, with a neighbour, and parts them again in the
    /// middle when they are too large for one.
    fn mend(&mut self, at: usize) {
        let left = at.saturating_sub(1);
        let split = self.splits.take(left);
        let right = self.children.remove(left + 1);
        let child = &mut self.children[left];
        child.keys += right.keys;
        let parted = match (Arc::make_mut(&mut child.node), &*right.node) {
            (Node::Leaf(keys), Node::Leaf(more)) => {
                keys.append(more);
                keys.is_full().then(|| part_leaf(keys, keys.len() / 2))
            }
            (Node::Inner(inner), Node::Inner(more)) => {
                inner.splits.insert(inner.splits.len(), &split);
                inner.splits.append(&more.splits);
                inner.children.extend_from_slice(&more.children);
                (inner.children.len() > CHILDREN)
                    .then(|| part_inner(inner, inner.children.len() / 2))
            }
            _ => unreachable!("all leaves are at the same depth"),
        };
        if let Some((split, right)) = parted {
            self.adopt(left, split, right);
        }
    }

    /// Takes in what was parted from child `at`.
    fn adopt(&mut self, at: usize, split: Vec<u8>, right: Child) {
        self.children[at].keys -= right.keys;
        self.splits.insert(at, &split);
        self.children.insert(at + 1, right);
    }
}

/// The upper part of a node that was too large, and the split before it.
type Parted = (Vec<u8>, Child);

/// As few bytes as tell the two apart: inner nodes are copied more often than any leaf.
fn split_between(left: &Keys, right: &Keys) -> Vec<u8> {
    let (last, first) = (left.get(left.len() - 1), right.get(0));
    let common = last.iter().zip(first).take_while(|(a, b)| a == b).count();
    first[..=common].to_vec()
}

/// The parents of a level of nodes, and the splits between them; `splits` are those between the nodes.
fn join(level: Vec<Child>, splits: Vec<Vec<u8>>) -> (Vec<Child>, Vec<Vec<u8>>) {
    // As even as can be, so that no parent has less than two.
    let (nodes, groups) = (level.len(), level.len().div_ceil(CHILDREN));
    let (mut level, mut splits) = (level.into_iter(), splits.into_iter());
    let (mut parents, mut between) = (Vec::with_capacity(groups), Vec::with_capacity(groups));
    for group in 0..groups {
        let size = nodes / groups + usize::from(group < nodes % groups);
        let children: Vec<Child> = level.by_ref().take(size).collect();
        let mut keys = Keys::default();
        splits.by_ref().take(size - 1).for_each(|split| keys.insert(keys.len(), &split));
        between.extend(splits.next());
        let inner = Inner { splits: keys, children };
        parents.push(Child { keys: inner.keys(), node: Arc::new(Node::Inner(inner)) });
    }
    (parents, between)
}

fn part_leaf(keys: &mut Keys, at: usize) -> Parted {
    let right = keys.split_off(at);
    let split = split_between(keys, &right);
    (split, Child { keys: right.len(), node: Arc::new(Node::Leaf(right)) })
}

fn part_inner(inner: &mut Inner, at: usize) -> Parted {
    let (split, right) = inner.split_off(at);
    (split, Child { keys: right.keys(), node: Arc::new(Node::Inner(right)) })
}

fn insert(node: &mut Arc<Node>, key: &[u8]) -> Option<Parted> {
    // Keys often come in ascending order: then the part that gets no more of them is left full.
    let middle = |at: usize, len: usize| if at + 1 == len { at } else { len / 2 };
    match Arc::make_mut(node) {
        Node::Leaf(keys) => {
            let at = keys.find(key).expect_err("the key is not there");
            keys.insert(at, key);
            keys.is_full().then(|| part_leaf(keys, middle(at, keys.len())))
        }
        Node::Inner(inner) => {
            let at = inner.child_of(key);
            let child = &mut inner.children[at];
            child.keys += 1;
            let (split, right) = insert(&mut child.node, key)?;
            inner.adopt(at, split, right);
            let len = inner.children.len();
            // Not less than two children, so that each has a neighbour.
            (len > CHILDREN).then(|| part_inner(inner, middle(at + 1, len).min(len - 2)))
        }
    }
}

/// Returns whether the node has become scant.
fn remove(node: &mut Arc<Node>, key: &[u8]) -> bool {
    match Arc::make_mut(node) {
        Node::Leaf(keys) => {
            let at = keys.find(key).expect("the key is there");
            keys.take(at);
            keys.len() < LEAF_KEYS / SCANT && keys.bytes.len() < LEAF_BYTES / SCANT
        }
        Node::Inner(inner) => {
            let at = inner.child_of(key);
            let child = &mut inner.children[at];
            child.keys -= 1;
            if remove(&mut child.node, key) {
                inner.mend(at);
            }
            inner.children.len() < CHILDREN / SCANT
        }
    }
}

/// Sorted keys, one behind the other in one buffer.
#[derive(Default)]
struct Keys {
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<u32>,
}

impl Clone for Keys {
    /// With room for one key more: a node is cloned to be changed.
    fn clone(&self) -> Keys {
        let room = self.bytes.len() / self.ends.len().max(1) + 16;
        let mut bytes = Vec::with_capacity(self.bytes.len() + room);
        bytes.extend_from_slice(&self.bytes);
        let mut ends = Vec::with_capacity(self.ends.len() + 1);
        ends.extend_from_slice(&self.ends);
        Keys { bytes, ends }
    }
}

impl Keys {
    fn len(&self) -> usize {
        self.ends.len()
    }

    fn is_full(&self) -> bool {
        self.len() > LEAF_KEYS || self.len() > 1 && self.bytes.len() > LEAF_BYTES
    }

    fn start(&self, at: usize) -> usize {
        if at == 0 { 0 } else { self.ends[at - 1] as usize }
    }

    fn get(&self, at: usize) -> &[u8] {
        &self.bytes[self.start(at)..self.ends[at] as usize]
    }

    /// Where `key` is, or where it belongs.
    fn find(&self, key: &[u8]) -> Result<usize, usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = (low + high) / 2;
            match self.get(middle).cmp(key) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Ok(middle),
            }
        }
        Err(low)
    }

    fn insert(&mut self, at: usize, key: &[u8]) {
        let (start, len) = (self.start(at), self.bytes.len());
        self.bytes.extend_from_slice(key);
        self.bytes.copy_within(start..len, start + key.len());
        self.bytes[start..start + key.len()].copy_from_slice(key);
        let size = offset(key.len());
        self.ends.insert(at, offset(start));
        self.ends[at..].iter_mut().for_each(|end| *end += size);
    }

    /// Removes the key at `at` and returns it.
    fn take(&mut self, at: usize) -> Vec<u8> {
        let key: Vec<u8> = self.bytes.drain(self.start(at)..self.ends[at] as usize).collect();
        let size = offset(key.len());
        self.ends.remove(at);
        self.ends[at..].iter_mut().for_each(|end| *end -= size);
        key
    }

    fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.ends.shrink_to_fit();
    }

    fn append(&mut self, more: &Keys) {
        let start = offset(self.bytes.len());
        self.bytes.extend_from_slice(&more.bytes);
        self.ends.extend(more.ends.iter().map(|end| start + end));
    }

    /// Keeps the first `at` keys and returns the others.
    fn split_off(&mut self, at: usize) -> Keys {
        let start = self.start(at);
        let mut ends = self.ends.split_off(at);
        ends.iter_mut().for_each(|end| *end -= offset(start));
        Keys { bytes: self.bytes.split_off(start), ends }
    }
}

fn offset(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a node is far below 4 GiB: no key is larger than a request")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bytes::Bytes;

    use super::*;
    use crate::machine::tests::Random;

    /// Sees that counts, splits and limits are right below `node`; returns its depth.
    fn check(node: &Node, is_root: bool, from: Option<&[u8]>, to: Option<&[u8]>) -> usize {
        match node {
            Node::Leaf(keys) => {
                assert!(is_root || keys.len() > 0, "a leaf is not empty");
                assert!(keys.len() <= LEAF_KEYS);
                let all: Vec<&[u8]> = (0..keys.len()).map(|at| keys.get(at)).collect();
                assert!(all.is_sorted_by(|a, b| a < b));
                assert!(all.iter().all(|key| from.is_none_or(|from| from <= *key)));
                assert!(all.iter().all(|key| to.is_none_or(|to| *key < to)));
                0
            }
            Node::Inner(Inner { splits, children }) => {
                assert!((2..=CHILDREN).contains(&children.len()));
                assert_eq!(splits.len() + 1, children.len());
                let depths = children.iter().enumerate().map(|(at, child)| {
                    let from = if at == 0 { from } else { Some(splits.get(at - 1)) };
                    let to = if at == splits.len() { to } else { Some(splits.get(at)) };
                    assert_eq!(child.keys, keys_below(&child.node));
                    check(&child.node, false, from, to)
                });
                let depths: BTreeSet<usize> = depths.collect();
                assert_eq!(depths.len(), 1, "all leaves are at the same depth");
                1 + depths.first().expect("there are children")
            }
        }
    }

    fn keys_below(node: &Node) -> usize {
        match node {
            Node::Leaf(keys) => keys.len(),
            Node::Inner(inner) => inner.keys(),
        }
    }

    fn assert_same(roster: &Roster, model: &BTreeSet<Bytes>, random: &mut Random) {
        check(&roster.root, true, None, None);
        assert_eq!(roster.keys, model.len());
        for _ in 0..20 {
            let (start, end) = (any_key(random), any_key(random));
            assert_eq!(roster.contains(&start), model.contains(&start));
            assert_eq!(roster.rank(&start), model.range(..start.clone()).count());
            let rank = random.below(model.len() as u64 + 2) as usize;
            assert_eq!(roster.at_rank(rank), model.iter().nth(rank).map(|key| &key[..]));
            for range in [
                KeyRange::One(start.clone()),
                KeyRange::From(start.clone()),
                KeyRange::Span { start, end },
            ] {
                let counted = model.iter().filter(|key| range.contains(key)).count();
                assert_eq!(roster.count(&range), counted, "{range:?}");
            }
        }
    }

    /// Short and long, with and without much in common.
    fn any_key(random: &mut Random) -> Bytes {
        let number = random.below(3_000);
        match random.below(4) {
            0 => format!("{number}"),
            1 => format!("a/rather/long/prefix/that/is/the/same/for/many/{number:08}"),
            2 => format!("{}{number}", "x".repeat(random.below(3) as usize * 700)),
            _ => format!("{:04}", number % 40),
        }
        .into()
    }

    #[test]
    fn a_roster_counts_as_a_plain_set_does_while_older_ones_stay_as_they_were() {
        let mut random = Random::new(20_251);
        let (mut roster, mut model) = (Roster::default(), BTreeSet::new());
        let mut older = Vec::new();
        // It grows, shrinks to nothing, and grows again.
        for (rounds, inserts_of_ten) in [(9_000, 8), (14_000, 1), (3_000, 7)] {
            for round in 0..rounds {
                if random.below(10) < inserts_of_ten {
                    let key = any_key(&mut random);
                    if model.insert(key.clone()) {
                        roster.insert(&key);
                    }
                } else if let Some(key) =
                    model.range(any_key(&mut random)..).next().or(model.first()).cloned()
                {
                    model.remove(&key);
                    roster.remove(&key);
                }
                if round % 500 == 0 {
                    assert_same(&roster, &model, &mut random);
                    older.push((roster.clone(), model.clone()));
                }
            }
        }
        assert!(older.iter().any(|(_, model)| model.is_empty()));
        for (roster, model) in &older {
            assert_same(roster, model, &mut random);
        }
    }

    #[test]
    fn a_roster_made_of_sorted_keys_is_like_one_that_grew() {
        let mut random = Random::new(7);
        for size in [0, 1, 2, 63, 64, 65, 66, 64 * 24, 64 * 24 + 1, 64 * 25, 2_700] {
            let mut model = BTreeSet::new();
            while model.len() < size {
                model.insert(any_key(&mut random));
            }
            let mut roster = Roster::of_sorted(model.iter().map(|key| &key[..]));
            assert_same(&roster, &model, &mut random);
            for _ in 0..200 {
                let key = any_key(&mut random);
                if model.remove(&key) {
                    roster.remove(&key);
                } else {
                    roster.insert(&key);
                    model.insert(key);
                }
            }
            assert_same(&roster, &model, &mut random);
        }
        let numbers: Vec<String> = (0..10_000).map(|number| format!("key/{number:08}")).collect();
        let roster = Roster::of_sorted(numbers.iter().map(String::as_bytes));
        check(&roster.root, true, None, None);
        assert_eq!(roster.rank(b"key/00005000"), 5_000);
    }

    #[test]
    fn ascending_and_descending_keys_make_full_nodes() {
        for descending in [false, true] {
            let mut roster = Roster::default();
            for number in 0..10_000 {
                let number = if descending { 9_999 - number } else { number };
                roster.insert(format!("key/{number:08}").as_bytes());
            }
            check(&roster.root, true, None, None);
            assert_eq!(roster.rank(b"key/00005000"), 5_000);
            for number in 0..10_000 {
                roster.remove(format!("key/{number:08}").as_bytes());
            }
            assert_eq!(roster.keys, 0);
            assert!(matches!(&*roster.root, Node::Leaf(keys) if keys.len() == 0));
        }
    }

    #[test]
    fn large_keys_do_not_gather_in_one_leaf() {
        let mut roster = Roster::default();
        for number in 0..100 {
            roster.insert(format!("{}{number:03}", "k".repeat(LEAF_BYTES)).as_bytes());
        }
        check(&roster.root, true, None, None);
        let Node::Inner(inner) = &*roster.root else { panic!("a hundred leaves have a parent") };
        assert!(roster.keys == 100 && inner.children.len() > 1);
        let mut node = &inner.children[0].node;
        while let Node::Inner(inner) = &**node {
            node = &inner.children[0].node;
        }
        assert_eq!(keys_below(node), 1);
    }
}
