//! One thing a client does, and the numbers in it that are only known when it is done.
//!
//! Operations are made from a seed alone, before anything runs, so they cannot name the revision the
//! store will be at. They say "two before the current one" instead, as a number far above all that a
//! test reaches, and [`Operation::settle`] puts the real one in its place. That also keeps the
//! meaning of an operation when the shrinker takes away others in front of it.

use holdfast::pb::etcdserverpb as pb;
use holdfast::pb::etcdserverpb::compare::TargetUnion;
use holdfast::pb::etcdserverpb::request_op;
use holdfast::pb::etcdserverpb::watch_request::RequestUnion;

/// `CURRENT + n` stands for the store's revision plus `n`.
pub const CURRENT: i64 = 1 << 40;

/// `COMPACTED + n` stands for the last compacted revision plus `n`.
pub const COMPACTED: i64 = 1 << 41;

/// `PICKED + n` stands for the id that a server picked for the n-th lease granted without one.
pub const PICKED: i64 = 1 << 42;

/// How far from its base a number may be.
const REACH: i64 = 1 << 30;

#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    /// Which member of Holdfast is asked, modulo their number.
    pub member: usize,
    pub request: Request,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    Range(pb::RangeRequest),
    Put(pb::PutRequest),
    DeleteRange(pb::DeleteRangeRequest),
    Txn(pb::TxnRequest),
    Compact(pb::CompactionRequest),
    Grant(pb::LeaseGrantRequest),
    Revoke(pb::LeaseRevokeRequest),
    /// On the one stream that stays open.
    KeepAlive(pb::LeaseKeepAliveRequest),
    TimeToLive(pb::LeaseTimeToLiveRequest),
    Leases,
    /// On a stream that is opened when it is not open.
    Watch {
        stream: usize,
        request: pb::WatchRequest,
    },
    CloseStream {
        stream: usize,
    },
}

/// Where the stores stand.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub current: i64,
    /// 0 before the first compaction.
    pub compacted: i64,
}

impl Operation {
    /// The same with the revisions of now.
    pub fn settle(&self, now: Now) -> Operation {
        let mut settled = self.clone();
        settled.request.visit(
            &mut |revision| {
                for (base, is) in [(CURRENT, now.current), (COMPACTED, now.compacted)] {
                    if let Some(offset) = offset(*revision, base) {
                        *revision = is + offset;
                        return;
                    }
                }
            },
            &mut |_| {},
        );
        settled
    }
}

impl Request {
    /// The same with the ids that one of the servers picked.
    pub fn with_leases(&self, picked: &[i64]) -> Request {
        let mut own = self.clone();
        own.visit(&mut |_| {}, &mut |lease| {
            let nth = offset(*lease, PICKED).and_then(|nth| usize::try_from(nth).ok());
            if let Some(id) = nth.and_then(|nth| picked.get(nth)) {
                *lease = *id;
            }
        });
        own
    }

    /// Shows every number that is a revision, and every one that is a lease id.
    fn visit(&mut self, revision: &mut dyn FnMut(&mut i64), lease: &mut dyn FnMut(&mut i64)) {
        match self {
            Request::Range(range) => visit_range(range, revision),
            Request::Put(put) => lease(&mut put.lease),
            Request::DeleteRange(_) | Request::Leases | Request::CloseStream { .. } => {}
            Request::Txn(txn) => visit_txn(txn, revision, lease),
            Request::Compact(compact) => revision(&mut compact.revision),
            Request::Grant(grant) => lease(&mut grant.id),
            Request::Revoke(revoke) => lease(&mut revoke.id),
            Request::KeepAlive(keep_alive) => lease(&mut keep_alive.id),
            Request::TimeToLive(time_to_live) => lease(&mut time_to_live.id),
            Request::Watch { request, .. } => {
                if let Some(RequestUnion::CreateRequest(create)) = &mut request.request_union {
                    revision(&mut create.start_revision);
                }
            }
        }
    }
}

fn visit_range(range: &mut pb::RangeRequest, revision: &mut dyn FnMut(&mut i64)) {
    revision(&mut range.revision);
    revision(&mut range.min_mod_revision);
    revision(&mut range.max_mod_revision);
    revision(&mut range.min_create_revision);
    revision(&mut range.max_create_revision);
}

fn visit_txn(
    txn: &mut pb::TxnRequest,
    revision: &mut dyn FnMut(&mut i64),
    lease: &mut dyn FnMut(&mut i64),
) {
    for compare in &mut txn.compare {
        match &mut compare.target_union {
            Some(TargetUnion::CreateRevision(number) | TargetUnion::ModRevision(number)) => {
                revision(number);
            }
            Some(TargetUnion::Lease(id)) => lease(id),
            Some(TargetUnion::Version(_) | TargetUnion::Value(_)) | None => {}
        }
    }
    for op in txn.success.iter_mut().chain(&mut txn.failure) {
        match &mut op.request {
            Some(request_op::Request::RequestRange(range)) => visit_range(range, revision),
            Some(request_op::Request::RequestPut(put)) => lease(&mut put.lease),
            Some(request_op::Request::RequestTxn(txn)) => visit_txn(txn, revision, lease),
            Some(request_op::Request::RequestDeleteRange(_)) | None => {}
        }
    }
}

fn offset(number: i64, base: i64) -> Option<i64> {
    let offset = number.checked_sub(base)?;
    (-REACH..REACH).contains(&offset).then_some(offset)
}

#[test]
fn numbers_are_settled_when_an_operation_is_done() {
    let range = pb::RangeRequest {
        revision: CURRENT - 2,
        min_mod_revision: COMPACTED + 1,
        max_mod_revision: 7,
        max_create_revision: i64::MIN,
        ..pb::RangeRequest::default()
    };
    let op = Operation { member: 0, request: Request::Range(range) };
    let Request::Range(settled) = op.settle(Now { current: 10, compacted: 4 }).request else {
        panic!("a range stays a range");
    };
    let numbers = (settled.revision, settled.min_mod_revision, settled.max_mod_revision);
    assert_eq!(numbers, (8, 5, 7));
    assert_eq!(settled.max_create_revision, i64::MIN);
    let put = Request::Put(pb::PutRequest { lease: PICKED + 1, ..pb::PutRequest::default() });
    let Request::Put(own) = put.with_leases(&[77, 88]) else { panic!("a put stays a put") };
    assert_eq!(own.lease, 88);
}
