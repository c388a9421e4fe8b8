//! Answers in a form in which two clusters must agree, and where they need not.
//!
//! Everything that is compared goes through [`comparable`] or [`comparable_watch`], so **this file
//! names every difference that is allowed**:
//!
//! - `cluster_id`, `member_id` and `raft_term` of a header are each cluster's own.
//! - A lease id that the server picked is named by its place among those it picked.
//! - The order of `LeaseLeases` and of the keys of `LeaseTimeToLive`: the first goes by remaining
//!   time, which differs by how long a call took, and the second is not defined in etcd.
//! - The remaining time of a lease lies below what was granted, by less than [`SLACK_SECONDS`].
//! - The header of a watch answer with events: Holdfast shows the revision of the last event in it,
//!   etcd the current one while it sends history (docs/compatibility.md). In neither may it be below
//!   an event of the answer. How events are spread over answers is free, but for what
//!   [`super::watches`] demands of it.
//! - A watch that was ended because its start is compacted is gone in Holdfast. etcd holds on to it
//!   until the client cancels it as well: its id is still in use, its cancel is answered, and the
//!   stream tells no progress. So [`super::watches`] cancels it in etcd.
//! - Pairs with equal sort keys keep key order in Holdfast. In etcd they do so among twelve at most,
//!   so [`super::generate`] makes no more.
//! - Transactions that change a key twice, which etcd should refuse and does not, are not made: see
//!   [`super::duplicates`].

use holdfast::pb::etcdserverpb as pb;
use holdfast::pb::etcdserverpb::response_op;
use holdfast::pb::mvccpb;

use super::operation::PICKED;

/// How much of its time a lease may have used up: more than a sequence of operations takes, less
/// than any lease is granted that is looked at.
const SLACK_SECONDS: i64 = 3600;

#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Range(pb::RangeResponse),
    Put(pb::PutResponse),
    DeleteRange(pb::DeleteRangeResponse),
    Txn(pb::TxnResponse),
    Compact(pb::CompactionResponse),
    Grant(pb::LeaseGrantResponse),
    Revoke(pb::LeaseRevokeResponse),
    KeepAlive(pb::LeaseKeepAliveResponse),
    TimeToLive(pb::LeaseTimeToLiveResponse),
    Leases(pb::LeaseLeasesResponse),
    Refused { code: tonic::Code, message: String },
}

impl Answer {
    pub fn header(&self) -> Option<&pb::ResponseHeader> {
        match self {
            Answer::Range(answer) => answer.header.as_ref(),
            Answer::Put(answer) => answer.header.as_ref(),
            Answer::DeleteRange(answer) => answer.header.as_ref(),
            Answer::Txn(answer) => answer.header.as_ref(),
            Answer::Compact(answer) => answer.header.as_ref(),
            Answer::Grant(answer) => answer.header.as_ref(),
            Answer::Revoke(answer) => answer.header.as_ref(),
            Answer::KeepAlive(answer) => answer.header.as_ref(),
            Answer::TimeToLive(answer) => answer.header.as_ref(),
            Answer::Leases(answer) => answer.header.as_ref(),
            Answer::Refused { .. } => None,
        }
    }
}

/// The answer of a server that has picked these lease ids, without what is its own affair.
pub fn comparable(mut answer: Answer, picked: &[i64]) -> Answer {
    match &mut answer {
        Answer::Range(range) => of_range(range, picked),
        Answer::Put(put) => of_put(put, picked),
        Answer::DeleteRange(delete) => of_delete(delete, picked),
        Answer::Txn(txn) => of_txn(txn, picked),
        Answer::Compact(compact) => of_header(&mut compact.header),
        Answer::Grant(grant) => {
            of_header(&mut grant.header);
            of_lease(&mut grant.id, picked);
        }
        Answer::Revoke(revoke) => of_header(&mut revoke.header),
        Answer::KeepAlive(keep_alive) => {
            of_header(&mut keep_alive.header);
            of_lease(&mut keep_alive.id, picked);
        }
        Answer::TimeToLive(lease) => {
            of_header(&mut lease.header);
            of_lease(&mut lease.id, picked);
            lease.keys.sort_unstable();
            if (lease.granted_ttl - SLACK_SECONDS..=lease.granted_ttl).contains(&lease.ttl)
                && lease.ttl >= 0
            {
                lease.ttl = lease.granted_ttl;
            }
        }
        Answer::Leases(leases) => {
            of_header(&mut leases.header);
            leases.leases.iter_mut().for_each(|lease| of_lease(&mut lease.id, picked));
            leases.leases.sort_unstable_by_key(|lease| lease.id);
        }
        Answer::Refused { .. } => {}
    }
    answer
}

/// An answer of a watch stream that tells of a watch's beginning or end, or of progress.
pub fn comparable_watch(mut answer: pb::WatchResponse) -> pb::WatchResponse {
    of_header(&mut answer.header);
    answer
}

pub fn comparable_event(mut event: mvccpb::Event, picked: &[i64]) -> mvccpb::Event {
    for pair in event.kv.iter_mut().chain(&mut event.prev_kv) {
        of_lease(&mut pair.lease, picked);
    }
    event
}

fn of_header(header: &mut Option<pb::ResponseHeader>) {
    if let Some(header) = header {
        header.cluster_id = 0;
        header.member_id = 0;
        header.raft_term = 0;
    }
}

fn of_lease(id: &mut i64, picked: &[i64]) {
    if let Some(nth) = (0..).zip(picked).find_map(|(nth, own)| (own == id).then_some(nth)) {
        *id = PICKED + nth;
    }
}

fn of_pairs<'a>(pairs: impl IntoIterator<Item = &'a mut mvccpb::KeyValue>, picked: &[i64]) {
    pairs.into_iter().for_each(|pair| of_lease(&mut pair.lease, picked));
}

fn of_range(range: &mut pb::RangeResponse, picked: &[i64]) {
    of_header(&mut range.header);
    of_pairs(&mut range.kvs, picked);
}

fn of_put(put: &mut pb::PutResponse, picked: &[i64]) {
    of_header(&mut put.header);
    of_pairs(&mut put.prev_kv, picked);
}

fn of_delete(delete: &mut pb::DeleteRangeResponse, picked: &[i64]) {
    of_header(&mut delete.header);
    of_pairs(&mut delete.prev_kvs, picked);
}

fn of_txn(txn: &mut pb::TxnResponse, picked: &[i64]) {
    of_header(&mut txn.header);
    for response in txn.responses.iter_mut().filter_map(|response| response.response.as_mut()) {
        match response {
            response_op::Response::ResponseRange(range) => of_range(range, picked),
            response_op::Response::ResponsePut(put) => of_put(put, picked),
            response_op::Response::ResponseDeleteRange(delete) => of_delete(delete, picked),
            response_op::Response::ResponseTxn(txn) => of_txn(txn, picked),
        }
    }
}

#[test]
fn what_is_not_named_stays_different() {
    let kv = mvccpb::KeyValue { key: "k".into(), lease: 70, ..mvccpb::KeyValue::default() };
    let answer = |member_id, revision, lease| {
        let header = pb::ResponseHeader { member_id, revision, ..pb::ResponseHeader::default() };
        let kvs = vec![mvccpb::KeyValue { lease, ..kv.clone() }];
        Answer::Range(pb::RangeResponse { header: Some(header), kvs, more: false, count: 1 })
    };
    let first = comparable(answer(1, 5, 70), &[70]);
    assert_eq!(first, comparable(answer(2, 5, 80), &[80]));
    assert_ne!(first, comparable(answer(2, 6, 80), &[80]));
    assert_ne!(first, comparable(answer(2, 5, 70), &[80]));
}

#[test]
fn remaining_time_is_bounded() {
    let answer = |ttl| {
        let lease = pb::LeaseTimeToLiveResponse {
            ttl,
            granted_ttl: 100_000,
            ..pb::LeaseTimeToLiveResponse::default()
        };
        comparable(Answer::TimeToLive(lease), &[])
    };
    assert_eq!(answer(100_000), answer(99_000));
    assert_ne!(answer(100_000), answer(100_001));
    assert_ne!(answer(100_000), answer(50_000));
    assert_ne!(answer(100_000), answer(-1));
}
