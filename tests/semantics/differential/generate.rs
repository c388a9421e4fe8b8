//! Random operations from a seed.
//!
//! The key space is small, so that operations meet: keys that are each other's prefixes, neighbours
//! and extremes. About half of the choices in a request are plain ones, because a request that is
//! wrong in three ways tests only the first.

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use holdfast::pb::etcdserverpb as pb;
use holdfast::pb::etcdserverpb::compare::{CompareTarget, TargetUnion};
use holdfast::pb::etcdserverpb::request_op;
use holdfast::pb::etcdserverpb::watch_request::RequestUnion;

use super::operation::{COMPACTED, CURRENT, Operation, PICKED, Request};

/// With the marker of [`super::pair`] there are never more than twelve pairs: etcd sorts more than
/// that by a method that leaves pairs with equal sort keys in any order.
const KEYS: [&[u8]; 11] =
    [b"a", b"a\0", b"aa", b"ab", b"b", b"b/1", b"b/2", b"c", b"\0", b"\xff", b"\xff\xff"];

/// Ends of ranges that are no keys.
const ENDS: [&[u8]; 5] = [b"b0", b"b/\xff", b"a\x01", b"\xff\xff\xff", b"\x01"];

const LEASES: [i64; 4] = [1, 2, 3, -7];

/// A lease nobody grants.
const NO_LEASE: i64 = 404;

/// How many leases with picked ids are referred to.
const PICKED_LEASES: i64 = 3;

/// Long enough not to run out while a test runs, on however slow a machine.
const LONG_TTL_SECONDS: [i64; 2] = [100_000, 9_000_000_000];

/// What is granted for these is over soon, so the lease is revoked at once.
const SHORT_TTL_SECONDS: [i64; 5] = [0, 1, 2, -5, i64::MIN];

/// More than may be granted.
const TOO_LONG_TTL_SECONDS: [i64; 2] = [9_000_000_001, i64::MAX];

pub const STREAMS: usize = 3;

const WATCH_IDS: [i64; 6] = [1, 2, 3, 9, -2, i64::MAX];

/// `--max-txn-ops`.
const MOST_TXN_OPS: usize = 128;

const TXN_DEPTH: usize = 3;

/// Above `--max-request-bytes`, and above the largest message.
const TOO_LARGE: [usize; 2] = [1_600_000, 2_200_000];

/// The numbers an enum of the protocol does not have.
const UNKNOWN: [i32; 3] = [7, -1, i32::MAX];

/// `count` operations, the same for the same seed.
pub fn operations(seed: u64, count: usize) -> Vec<Operation> {
    let mut generator = Generator { rng: StdRng::seed_from_u64(seed) };
    (0..count).map(|_| generator.operation()).collect()
}

struct Generator {
    rng: StdRng,
}

impl Generator {
    fn operation(&mut self) -> Operation {
        let member = self.rng.random_range(0..6);
        let request = match self.rng.random_range(0..1000) {
            0..300 => Request::Put(self.put()),
            300..480 => Request::Range(self.range()),
            480..560 => Request::DeleteRange(self.delete_range()),
            560..745 => Request::Txn(self.txn(TXN_DEPTH)),
            745..765 => Request::Compact(self.compact()),
            765..810 => Request::Grant(self.grant()),
            810..832 => Request::Revoke(pb::LeaseRevokeRequest { id: self.lease() }),
            832..850 => Request::KeepAlive(pb::LeaseKeepAliveRequest { id: self.lease() }),
            850..875 => {
                let (id, keys) = (self.lease(), self.rng.random_bool(0.8));
                Request::TimeToLive(pb::LeaseTimeToLiveRequest { id, keys })
            }
            875..885 => Request::Leases,
            885..899 => Request::CloseStream { stream: self.stream() },
            899..901 => self.too_large(),
            901..904 => Request::Txn(self.large_txn()),
            _ => Request::Watch { stream: self.stream(), request: self.watch() },
        };
        Operation { member, request }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        *from.choose(&mut self.rng).expect("there is something to choose from")
    }

    fn often(&mut self) -> bool {
        self.rng.random_bool(0.7)
    }

    fn rarely(&mut self) -> bool {
        self.rng.random_bool(0.08)
    }

    fn stream(&mut self) -> usize {
        self.rng.random_range(0..STREAMS)
    }

    fn key(&mut self) -> Bytes {
        if self.rng.random_bool(0.01) {
            return Bytes::new();
        }
        Bytes::from_static(self.pick(&KEYS))
    }

    /// What makes one key, a prefix, everything above, everything, or nothing of a key.
    fn range_end(&mut self, key: &[u8]) -> Bytes {
        match self.rng.random_range(0..10) {
            0..3 => Bytes::new(),
            3..5 => Bytes::from_static(b"\0"),
            5 => [key, b"\0"].concat().into(),
            6 => prefix_end(key),
            7 => Bytes::from_static(self.pick(&ENDS)),
            _ => self.key(),
        }
    }

    fn key_range(&mut self) -> (Bytes, Bytes) {
        if self.rng.random_bool(0.15) {
            return (Bytes::from_static(b"\0"), Bytes::from_static(b"\0"));
        }
        let key = self.key();
        let end = self.range_end(&key);
        (key, end)
    }

    fn value(&mut self) -> Bytes {
        match self.rng.random_range(0..20) {
            0..3 => Bytes::new(),
            3 => vec![b'x'; self.rng.random_range(100..2000)].into(),
            4 => (0..4).map(|_| self.rng.random::<u8>()).collect(),
            number => Bytes::from(format!("v{}", number % 5)),
        }
    }

    fn lease(&mut self) -> i64 {
        match self.rng.random_range(0..20) {
            0 => 0,
            1 => NO_LEASE,
            2..7 => PICKED + self.rng.random_range(0..PICKED_LEASES),
            _ => self.pick(&LEASES),
        }
    }

    fn revision(&mut self) -> i64 {
        match self.rng.random_range(0..100) {
            0..20 => 0,
            20..65 => CURRENT - self.rng.random_range(0..20),
            65..75 => CURRENT + self.rng.random_range(1..6),
            75..92 => COMPACTED + self.rng.random_range(-1..6),
            92..97 => self.rng.random_range(1..30),
            97 => -1,
            98 => i64::MIN,
            _ => i64::MAX,
        }
    }

    fn put(&mut self) -> pb::PutRequest {
        let key = self.key();
        let (ignore_value, ignore_lease) = (self.rarely(), self.rarely());
        // Mostly what goes with the flags; at times what is refused.
        let value = if ignore_value && self.often() { Bytes::new() } else { self.value() };
        let no_lease = if ignore_lease { self.often() } else { self.rng.random_bool(0.6) };
        let lease = if no_lease { 0 } else { self.lease() };
        let prev_kv = self.rng.random_bool(0.4);
        pb::PutRequest { key, value, lease, prev_kv, ignore_value, ignore_lease }
    }

    fn range(&mut self) -> pb::RangeRequest {
        let (key, range_end) = self.key_range();
        let mut range = pb::RangeRequest { key, range_end, ..pb::RangeRequest::default() };
        range.serializable = self.rng.random_bool(0.3);
        range.revision = if self.often() { 0 } else { self.revision() };
        if !self.often() {
            range.limit = match self.rng.random_range(0..10) {
                0 => -1,
                1 => i64::MAX,
                _ => self.rng.random_range(0..6),
            };
        }
        if !self.often() {
            // An unknown target crashes etcd; an unknown order does not.
            range.sort_target = self.rng.random_range(0..=4);
            range.sort_order = match self.rng.random_range(0..10) {
                0 => self.pick(&UNKNOWN),
                _ => self.rng.random_range(0..=2),
            };
        }
        range.keys_only = self.rng.random_bool(0.15);
        range.count_only = self.rng.random_bool(0.1);
        if self.rng.random_bool(0.2) {
            let filters = [
                &mut range.min_mod_revision,
                &mut range.max_mod_revision,
                &mut range.min_create_revision,
                &mut range.max_create_revision,
            ];
            for filter in filters {
                if self.rng.random_bool(0.4) {
                    *filter = self.revision();
                }
            }
        }
        range
    }

    fn delete_range(&mut self) -> pb::DeleteRangeRequest {
        let key = self.key();
        // Of few keys, mostly: an empty store answers everything alike.
        let range_end = match self.rng.random_range(0..10) {
            0..6 => Bytes::new(),
            6 => [&*key, b"\0"].concat().into(),
            7 => prefix_end(&key),
            _ => self.range_end(&key),
        };
        pb::DeleteRangeRequest { key, range_end, prev_kv: self.rng.random_bool(0.5) }
    }

    /// A transaction with `depth - 1` more of them in it, at most.
    fn txn(&mut self, depth: usize) -> pb::TxnRequest {
        let compares = self.pick(&[0, 0, 1, 1, 1, 2, 3]);
        // Valid ones write each key once; a few leave it to chance.
        let mut unwritten =
            self.rng.random_bool(0.9).then(|| KEYS.map(Bytes::from_static).to_vec());
        pb::TxnRequest {
            compare: (0..compares).map(|_| self.compare()).collect(),
            success: self.branch(depth, &mut unwritten.clone()),
            failure: self.branch(depth, &mut unwritten),
        }
    }

    fn branch(&mut self, depth: usize, unwritten: &mut Option<Vec<Bytes>>) -> Vec<pb::RequestOp> {
        let length = self.pick(&[0, 1, 1, 2, 2, 3, 5]);
        (0..length).map(|_| self.txn_op(depth, unwritten)).collect()
    }

    fn txn_op(&mut self, depth: usize, unwritten: &mut Option<Vec<Bytes>>) -> pb::RequestOp {
        let request = match self.rng.random_range(0..100) {
            0..45 => {
                let mut put = self.put();
                if let Some(key) = self.take(unwritten) {
                    put.key = key;
                }
                request_op::Request::RequestPut(put)
            }
            45..70 => request_op::Request::RequestRange(self.range()),
            70..85 => {
                let mut delete = self.delete_range();
                if let Some(key) = self.take(unwritten) {
                    delete = pb::DeleteRangeRequest { key, range_end: Bytes::new(), ..delete };
                }
                request_op::Request::RequestDeleteRange(delete)
            }
            85 => return pb::RequestOp { request: None },
            _ if depth > 1 => request_op::Request::RequestTxn(self.nested_txn(depth, unwritten)),
            _ => request_op::Request::RequestRange(self.range()),
        };
        pb::RequestOp { request: Some(request) }
    }

    /// What it writes, the branch around it does not.
    fn nested_txn(&mut self, depth: usize, unwritten: &mut Option<Vec<Bytes>>) -> pb::TxnRequest {
        let compares = self.pick(&[0, 1, 2]);
        pb::TxnRequest {
            compare: (0..compares).map(|_| self.compare()).collect(),
            success: self.branch(depth - 1, unwritten),
            failure: self.branch(depth - 1, unwritten),
        }
    }

    fn take(&mut self, unwritten: &mut Option<Vec<Bytes>>) -> Option<Bytes> {
        let keys = unwritten.as_mut().filter(|keys| !keys.is_empty())?;
        let nth = self.rng.random_range(0..keys.len());
        Some(keys.swap_remove(nth))
    }

    fn compare(&mut self) -> pb::Compare {
        let key = self.key();
        let range_end =
            if self.rng.random_bool(0.25) { self.range_end(&key) } else { Bytes::new() };
        let mut result = self.rng.random_range(0..=3);
        let target = if self.rng.random_bool(0.03) {
            self.pick(&UNKNOWN)
        } else {
            self.rng.random_range(0..=4)
        };
        let of = if self.rarely() { self.rng.random_range(0..=5) } else { target };
        let target_union = match CompareTarget::try_from(of) {
            Ok(CompareTarget::Version) => Some(TargetUnion::Version(self.small())),
            Ok(CompareTarget::Create) => Some(TargetUnion::CreateRevision(self.revision())),
            Ok(CompareTarget::Mod) => Some(TargetUnion::ModRevision(self.revision())),
            Ok(CompareTarget::Value) => Some(TargetUnion::Value(self.value())),
            Ok(CompareTarget::Lease) => {
                let lease = self.lease();
                if lease >= PICKED {
                    // Which of two picked ids is larger is for the server to pick.
                    result = self.pick(&[0, 3]);
                }
                Some(TargetUnion::Lease(lease))
            }
            Err(_) => None,
        };
        if self.rng.random_bool(0.02) {
            result = self.pick(&UNKNOWN);
        }
        pb::Compare { result, target, key, range_end, target_union }
    }

    fn small(&mut self) -> i64 {
        self.rng.random_range(-1..5)
    }

    /// About as many operations as allowed, or one too many, somewhere in a transaction.
    fn large_txn(&mut self) -> pb::TxnRequest {
        let count = self.rng.random_range(MOST_TXN_OPS - 2..=MOST_TXN_OPS + 1);
        let range = pb::RangeRequest { key: "a".into(), ..pb::RangeRequest::default() };
        let range = pb::RequestOp { request: Some(request_op::Request::RequestRange(range)) };
        let ranges = vec![range; count];
        let large = match self.rng.random_range(0..3) {
            0 => pb::TxnRequest { success: ranges, ..pb::TxnRequest::default() },
            1 => pb::TxnRequest { failure: ranges, ..pb::TxnRequest::default() },
            _ => {
                // They hold: its version is 0.
                let compare = pb::Compare { key: "none".into(), ..pb::Compare::default() };
                pb::TxnRequest { compare: vec![compare; count], ..pb::TxnRequest::default() }
            }
        };
        if self.rng.random() {
            return large;
        }
        let nested = pb::RequestOp { request: Some(request_op::Request::RequestTxn(large)) };
        let compare = (0..self.rng.random_range(0..4)).map(|_| self.compare()).collect();
        pb::TxnRequest { compare, success: vec![nested], ..pb::TxnRequest::default() }
    }

    fn too_large(&mut self) -> Request {
        let value = Bytes::from(vec![b'x'; self.pick(&TOO_LARGE)]);
        let put = pb::PutRequest { key: self.key(), value, ..pb::PutRequest::default() };
        if self.often() {
            return Request::Put(put);
        }
        let op = pb::RequestOp { request: Some(request_op::Request::RequestPut(put)) };
        Request::Txn(pb::TxnRequest { success: vec![op], ..pb::TxnRequest::default() })
    }

    fn compact(&mut self) -> pb::CompactionRequest {
        let revision = match self.rng.random_range(0..10) {
            0..5 => CURRENT - self.rng.random_range(0..40),
            5 => CURRENT,
            6 => CURRENT + self.rng.random_range(1..3),
            7 => COMPACTED + self.rng.random_range(-1..2),
            _ => self.revision(),
        };
        pb::CompactionRequest { revision, physical: self.rng.random_bool(0.2) }
    }

    fn grant(&mut self) -> pb::LeaseGrantRequest {
        let id = if self.rng.random_bool(0.3) { 0 } else { self.pick(&LEASES) };
        let ttl = match self.rng.random_range(0..20) {
            0..3 => self.pick(&SHORT_TTL_SECONDS),
            3 => self.pick(&TOO_LONG_TTL_SECONDS),
            _ => self.pick(&LONG_TTL_SECONDS),
        };
        pb::LeaseGrantRequest { ttl, id }
    }

    fn watch(&mut self) -> pb::WatchRequest {
        let request_union = match self.rng.random_range(0..20) {
            0 => None,
            1..6 => {
                let watch_id =
                    if self.often() { self.rng.random_range(0..4) } else { self.pick(&WATCH_IDS) };
                Some(RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id }))
            }
            _ => Some(RequestUnion::CreateRequest(self.watch_create())),
        };
        pb::WatchRequest { request_union }
    }

    fn watch_create(&mut self) -> pb::WatchCreateRequest {
        let (key, range_end) = self.key_range();
        let filters = match self.rng.random_range(0..10) {
            0 => vec![0],
            1 => vec![1],
            2 => vec![1, 0, 1],
            3 => vec![self.pick(&UNKNOWN)],
            _ => Vec::new(),
        };
        pb::WatchCreateRequest {
            key,
            range_end,
            start_revision: self.revision(),
            progress_notify: self.rarely(),
            filters,
            prev_kv: self.rng.random_bool(0.5),
            watch_id: if self.often() { 0 } else { self.pick(&WATCH_IDS) },
            fragment: self.rarely(),
        }
    }
}

/// The first key behind all that begin with `prefix`.
fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(b"\0")
}

#[test]
fn a_seed_gives_the_same_operations_again() {
    assert_eq!(operations(5, 300), operations(5, 300));
    assert_ne!(operations(5, 300), operations(6, 300));
    // What is added to a sequence leaves its beginning as it was: a count belongs to no seed.
    assert_eq!(operations(5, 300)[..100], operations(5, 100));
}
