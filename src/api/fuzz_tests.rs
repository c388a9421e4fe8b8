//! Requests that no client library would send: each is refused or becomes a command that applies.

use bytes::Bytes;
use prost::Message;

use super::convert;
use crate::fuzz::mutants;
use crate::machine::{Command, Entry, Machine, Origin, Position};
use crate::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcdserverpb::request_op::Request;
use crate::pb::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use crate::storage::Batch;
use crate::types::Timestamp;

const MAX_OPS: usize = 128;

fn put() -> PutRequest {
    let (key, value) = (Bytes::from_static(b"k"), Bytes::from_static(b"value"));
    PutRequest { key, value, prev_kv: true, ..PutRequest::default() }
}

fn range() -> RangeRequest {
    let (key, range_end) = (Bytes::from_static(b"a"), Bytes::from_static(b"z"));
    RangeRequest { key, range_end, limit: 5, revision: 1, ..RangeRequest::default() }
}

fn delete() -> DeleteRangeRequest {
    let (key, range_end) = (Bytes::from_static(b"k"), Bytes::from_static(b"l"));
    DeleteRangeRequest { key, range_end, prev_kv: true }
}

fn txn() -> TxnRequest {
    let op = |request| RequestOp { request: Some(request) };
    let compare = Compare {
        result: CompareResult::Greater.into(),
        target: CompareTarget::Version.into(),
        key: Bytes::from_static(b"k"),
        range_end: Bytes::from_static(b"l"),
        target_union: Some(TargetUnion::Version(1)),
    };
    let inner = TxnRequest {
        compare: vec![compare.clone()],
        success: vec![op(Request::RequestPut(put()))],
        failure: vec![op(Request::RequestRange(range()))],
    };
    TxnRequest {
        compare: vec![compare],
        success: vec![op(Request::RequestTxn(inner)), op(Request::RequestRange(range()))],
        failure: vec![op(Request::RequestDeleteRange(delete()))],
    }
}

/// Applies what requests have become, each after the one before.
struct Applied {
    machine: Machine,
    index: u64,
}

impl Applied {
    fn new() -> Applied {
        Applied { machine: Machine::new(), index: 0 }
    }

    fn apply(&mut self, command: Command) {
        self.index += 1;
        let entry = Entry { at: Timestamp(1), origin: Origin::default(), command, principal: None };
        let entry = Entry::decode(self.index, &entry.encode()).expect("what is encoded decodes");
        let position = Position { term: 1, index: self.index };
        self.machine.apply(position, &entry, &mut Batch::default()).expect("no fault");
    }
}

#[test]
fn a_damaged_write_is_refused_or_applied() {
    let mut applied = Applied::new();
    let valid = [put().encode_to_vec(), delete().encode_to_vec(), txn().encode_to_vec()];
    mutants(&valid, |bytes, _| {
        if let Ok(request) = PutRequest::decode(bytes)
            && let Ok(put) = convert::put(request)
        {
            applied.apply(Command::Put(put));
        }
        if let Ok(request) = DeleteRangeRequest::decode(bytes)
            && let Ok(delete) = convert::delete_range(request)
        {
            applied.apply(Command::DeleteRange(delete));
        }
        if let Ok(request) = TxnRequest::decode(bytes)
            && let Ok(txn) = convert::txn(request, MAX_OPS)
        {
            applied.apply(Command::Txn(txn));
        }
    });
    assert!(applied.index > 0, "nothing got through");
}

#[test]
fn a_damaged_read_is_refused_or_answered() {
    let mut applied = Applied::new();
    applied.apply(Command::Put(convert::put(put()).expect("valid")));
    let view = applied.machine.store().view();
    mutants(&[range().encode_to_vec()], |bytes, _| {
        let Ok(request) = RangeRequest::decode(bytes) else { return };
        if let Ok(range) = convert::range(request.clone()) {
            // A revision may be compacted or yet to come.
            let _ = view.range(&range);
        }
        let _ = convert::range_stream(request);
    });
}
