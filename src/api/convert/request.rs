//! Requests as checked commands.

use bytes::Bytes;

use crate::api::status::Refusal;
use crate::machine::{
    Compare, CompareResult, CompareTarget, DeleteRange, Put, Range, SortOrder, SortTarget, Txn,
    TxnOp,
};
use crate::pb::etcdserverpb as pb;
use crate::pb::etcdserverpb::compare::{self, TargetUnion};
use crate::pb::etcdserverpb::range_request;
use crate::pb::etcdserverpb::request_op::Request;
use crate::types::{KeyRange, LeaseId};

use super::duplicates;

/// How deep transactions may nest. Everything that walks a transaction, here and in the machine,
/// recurses this far at most. What arrives as protobuf is stopped earlier, by the decoder, which
/// follows a hundred messages into each other and meets two for each transaction.
const MAX_TXN_DEPTH: usize = 64;

/// The longest time to live a lease may have, in seconds.
const MAX_LEASE_TTL_SECONDS: i64 = 9_000_000_000;

/// Refuses a write whose request is larger than the cluster replicates.
pub fn check_size(request_bytes: usize, max_request_bytes: usize) -> Result<(), Refusal> {
    if request_bytes > max_request_bytes { Err(Refusal::RequestTooLarge) } else { Ok(()) }
}

/// A read. Whether the caller is content with this member's own state (`serializable`) is no part of
/// it.
pub fn range(request: pb::RangeRequest) -> Result<Range, Refusal> {
    if request.key.is_empty() {
        return Err(Refusal::EmptyKey);
    }
    let target = match range_request::SortTarget::try_from(request.sort_target) {
        Ok(range_request::SortTarget::Key) => SortTarget::Key,
        Ok(range_request::SortTarget::Version) => SortTarget::Version,
        Ok(range_request::SortTarget::Create) => SortTarget::Create,
        Ok(range_request::SortTarget::Mod) => SortTarget::Mod,
        Ok(range_request::SortTarget::Value) => SortTarget::Value,
        Err(_) => return Err(Refusal::SortTarget),
    };
    let (order, target) = match range_request::SortOrder::try_from(request.sort_order) {
        Ok(range_request::SortOrder::None) => (SortOrder::None, target),
        Ok(range_request::SortOrder::Ascend) => (SortOrder::Ascend, target),
        Ok(range_request::SortOrder::Descend) => (SortOrder::Descend, target),
        // An order we do not know means no order at all, whereas "none" with a target still sorts.
        Err(_) => (SortOrder::None, SortTarget::Key),
    };
    Ok(Range {
        range: KeyRange::from_wire(request.key, request.range_end),
        limit: request.limit,
        revision: request.revision,
        order,
        target,
        keys_only: request.keys_only,
        count_only: request.count_only,
        min_mod_revision: request.min_mod_revision,
        max_mod_revision: request.max_mod_revision,
        min_create_revision: request.min_create_revision,
        max_create_revision: request.max_create_revision,
    })
}

/// A read that is answered as a stream: in key order, and without filters, for which all pairs would
/// have to be looked at first.
pub fn range_stream(request: pb::RangeRequest) -> Result<Range, Refusal> {
    let range = range(request)?;
    if !range.is_in_key_order() {
        return Err(Refusal::StreamOrder);
    }
    if range.has_filters() {
        return Err(Refusal::StreamFilters);
    }
    Ok(range)
}

pub fn put(request: pb::PutRequest) -> Result<Put, Refusal> {
    if request.key.is_empty() {
        return Err(Refusal::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(Refusal::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Refusal::LeaseProvided);
    }
    Ok(Put {
        key: request.key,
        value: (!request.ignore_value).then_some(request.value),
        lease: (!request.ignore_lease).then_some(LeaseId(request.lease)),
        prev_kv: request.prev_kv,
    })
}

pub fn delete_range(request: pb::DeleteRangeRequest) -> Result<DeleteRange, Refusal> {
    if request.key.is_empty() {
        return Err(Refusal::EmptyKey);
    }
    Ok(DeleteRange {
        range: KeyRange::from_wire(request.key, request.range_end),
        prev_kv: request.prev_kv,
    })
}

/// A transaction with at most `max_ops` compares, and as many operations in either branch; one nested
/// in it may have as many as its own longest list has left over.
///
/// Both branches are checked, whichever will be taken: first each operation, then that no branch
/// changes a key twice (see [`duplicates`]).
pub fn txn(request: pb::TxnRequest, max_ops: usize) -> Result<Txn, Refusal> {
    let txn = txn_within(request, max_ops, MAX_TXN_DEPTH)?;
    duplicates::check(&txn.success)?;
    duplicates::check(&txn.failure)?;
    Ok(txn)
}

fn txn_within(request: pb::TxnRequest, max_ops: usize, depth: usize) -> Result<Txn, Refusal> {
    let longest = request.compare.len().max(request.success.len()).max(request.failure.len());
    if longest > max_ops || depth == 0 {
        return Err(Refusal::TooManyOperations);
    }
    let left = max_ops - longest;
    let operations = |operations: Vec<pb::RequestOp>| {
        let checked = operations.into_iter().map(|op| operation(op, left, depth - 1));
        checked.collect::<Result<Vec<TxnOp>, Refusal>>()
    };
    Ok(Txn {
        compares: request.compare.into_iter().map(compare).collect::<Result<_, _>>()?,
        success: operations(request.success)?,
        failure: operations(request.failure)?,
    })
}

fn operation(op: pb::RequestOp, max_ops: usize, depth: usize) -> Result<TxnOp, Refusal> {
    match op.request {
        Some(Request::RequestRange(request)) => range(request).map(TxnOp::Range),
        Some(Request::RequestPut(request)) => put(request).map(TxnOp::Put),
        Some(Request::RequestDeleteRange(request)) => delete_range(request).map(TxnOp::DeleteRange),
        Some(Request::RequestTxn(request)) => txn_within(request, max_ops, depth).map(TxnOp::Txn),
        None => Err(Refusal::EmptyOperation),
    }
}

fn compare(request: pb::Compare) -> Result<Compare, Refusal> {
    if request.key.is_empty() {
        return Err(Refusal::EmptyKey);
    }
    let result = match compare::CompareResult::try_from(request.result) {
        Ok(compare::CompareResult::Equal) => CompareResult::Equal,
        Ok(compare::CompareResult::Greater) => CompareResult::Greater,
        Ok(compare::CompareResult::Less) => CompareResult::Less,
        Ok(compare::CompareResult::NotEqual) => CompareResult::NotEqual,
        Err(_) => CompareResult::Unknown,
    };
    // Only the value that belongs to the target counts. Without it the target is compared with
    // zero, or with the empty value.
    let union = request.target_union;
    let target = match compare::CompareTarget::try_from(request.target) {
        Ok(compare::CompareTarget::Version) => CompareTarget::Version(match union {
            Some(TargetUnion::Version(version)) => version,
            _ => 0,
        }),
        Ok(compare::CompareTarget::Create) => CompareTarget::Create(match union {
            Some(TargetUnion::CreateRevision(revision)) => revision,
            _ => 0,
        }),
        Ok(compare::CompareTarget::Mod) => CompareTarget::Mod(match union {
            Some(TargetUnion::ModRevision(revision)) => revision,
            _ => 0,
        }),
        Ok(compare::CompareTarget::Value) => CompareTarget::Value(match union {
            Some(TargetUnion::Value(value)) => value,
            _ => Bytes::new(),
        }),
        Ok(compare::CompareTarget::Lease) => CompareTarget::Lease(match union {
            Some(TargetUnion::Lease(lease)) => lease,
            _ => 0,
        }),
        Err(_) => CompareTarget::Unknown,
    };
    Ok(Compare { range: KeyRange::from_wire(request.key, request.range_end), result, target })
}

/// Whether the caller is content with this member's own state: the transaction reads, and every
/// range in it, at any depth, is serializable.
///
/// A transaction that only compares is not: nobody asked for a stale answer.
pub fn is_serializable(request: &pb::TxnRequest) -> bool {
    /// Whether there is a range at all, `None` when one of them is not serializable.
    fn ranges(request: &pb::TxnRequest) -> Option<bool> {
        request.success.iter().chain(&request.failure).try_fold(false, |found, op| {
            match &op.request {
                Some(Request::RequestRange(range)) => range.serializable.then_some(true),
                Some(Request::RequestTxn(txn)) => ranges(txn).map(|more| found || more),
                _ => None,
            }
        })
    }
    ranges(request) == Some(true)
}

/// The time to live to grant when `requested` is asked for: `min_seconds` at least.
pub fn lease_ttl_seconds(requested: i64, min_seconds: i64) -> Result<i64, Refusal> {
    if requested > MAX_LEASE_TTL_SECONDS {
        return Err(Refusal::LeaseTtlTooLarge);
    }
    Ok(requested.max(min_seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_OPS: usize = 3;

    fn put_op(key: &'static str) -> pb::RequestOp {
        op(Request::RequestPut(pb::PutRequest { key: key.into(), ..Default::default() }))
    }

    fn range_op(key: &'static str, serializable: bool) -> pb::RequestOp {
        op(Request::RequestRange(pb::RangeRequest {
            key: key.into(),
            serializable,
            ..Default::default()
        }))
    }

    fn op(request: Request) -> pb::RequestOp {
        pb::RequestOp { request: Some(request) }
    }

    fn succeeding(success: Vec<pb::RequestOp>) -> pb::TxnRequest {
        pb::TxnRequest { success, ..Default::default() }
    }

    fn nested(depth: usize) -> pb::TxnRequest {
        (1..depth).fold(succeeding(vec![put_op("a")]), |inner, _| {
            succeeding(vec![op(Request::RequestTxn(inner))])
        })
    }

    #[test]
    fn every_request_needs_a_key() {
        let end = Bytes::from_static(b"z");
        let ranged = pb::RangeRequest { range_end: end.clone(), ..Default::default() };
        assert_eq!(range(ranged), Err(Refusal::EmptyKey));
        let deleted = pb::DeleteRangeRequest { range_end: end, ..Default::default() };
        assert_eq!(delete_range(deleted), Err(Refusal::EmptyKey));
        let compared =
            pb::TxnRequest { compare: vec![pb::Compare::default()], ..Default::default() };
        assert_eq!(txn(compared, MAX_OPS), Err(Refusal::EmptyKey));
        assert_eq!(txn(succeeding(vec![put_op("")]), MAX_OPS), Err(Refusal::EmptyKey));
    }

    #[test]
    fn the_key_is_complained_of_before_value_and_lease() {
        let mut request = pb::PutRequest {
            key: Bytes::new(),
            value: "v".into(),
            lease: 7,
            prev_kv: false,
            ignore_value: true,
            ignore_lease: true,
        };
        assert_eq!(put(request.clone()), Err(Refusal::EmptyKey));
        request.key = "k".into();
        assert_eq!(put(request.clone()), Err(Refusal::ValueProvided));
        request.value = Bytes::new();
        assert_eq!(put(request.clone()), Err(Refusal::LeaseProvided));
        request.lease = 0;
        let put = put(request).unwrap();
        assert_eq!((put.value, put.lease), (None, None));
    }

    #[test]
    fn a_plain_put_detaches_and_may_be_empty() {
        let put = put(pb::PutRequest { key: "k".into(), ..Default::default() }).unwrap();
        assert_eq!((put.value, put.lease), (Some(Bytes::new()), Some(LeaseId::NONE)));
    }

    #[test]
    fn an_unknown_sort_order_is_no_order_and_an_unknown_target_is_refused() {
        let request = |sort_order, sort_target| {
            let request =
                pb::RangeRequest { key: "k".into(), sort_order, sort_target, ..Default::default() };
            range(request).map(|range| (range.order, range.target))
        };
        assert_eq!(request(0, 4), Ok((SortOrder::None, SortTarget::Value)));
        assert_eq!(request(2, 1), Ok((SortOrder::Descend, SortTarget::Version)));
        assert_eq!(request(9, 1), Ok((SortOrder::None, SortTarget::Key)));
        assert_eq!(request(0, 9), Err(Refusal::SortTarget));
    }

    #[test]
    fn each_list_of_a_transaction_is_measured_by_itself() {
        let full = || ["a", "b", "c"].map(put_op).to_vec();
        let compares = |count| vec![pb::Compare { key: "k".into(), ..Default::default() }; count];
        let request = pb::TxnRequest { compare: compares(3), success: full(), failure: full() };
        assert!(txn(request, MAX_OPS).is_ok());
        let request = pb::TxnRequest { compare: compares(4), ..Default::default() };
        assert_eq!(txn(request, MAX_OPS), Err(Refusal::TooManyOperations));
    }

    #[test]
    fn a_nested_transaction_has_what_the_longest_list_around_it_leaves() {
        let two = || op(Request::RequestTxn(succeeding(vec![put_op("a"), put_op("b")])));
        assert!(txn(succeeding(vec![two()]), MAX_OPS).is_ok());
        let request = succeeding(vec![put_op("c"), two()]);
        assert_eq!(txn(request, MAX_OPS), Err(Refusal::TooManyOperations));
        let mut request = succeeding(vec![two()]);
        request.failure = vec![put_op("c"), put_op("d")];
        assert_eq!(txn(request, MAX_OPS), Err(Refusal::TooManyOperations));
        // Two that stand beside each other have the same each.
        let one = |key| op(Request::RequestTxn(succeeding(vec![put_op(key)])));
        assert!(txn(succeeding(vec![one("a"), one("b")]), MAX_OPS).is_ok());
    }

    #[test]
    fn the_number_of_operations_is_complained_of_before_their_keys() {
        let request = succeeding(["", "", "", ""].map(put_op).to_vec());
        assert_eq!(txn(request, MAX_OPS), Err(Refusal::TooManyOperations));
    }

    #[test]
    fn the_branch_not_taken_is_checked_too() {
        let mut request = succeeding(vec![put_op("a")]);
        request.failure = vec![pb::RequestOp::default()];
        assert_eq!(txn(request, MAX_OPS), Err(Refusal::EmptyOperation));
    }

    #[test]
    fn a_failing_operation_is_complained_of_before_a_duplicate_key() {
        let request = succeeding(vec![put_op("a"), put_op("a"), pb::RequestOp::default()]);
        assert_eq!(txn(request, MAX_OPS), Err(Refusal::EmptyOperation));
        let request = succeeding(vec![put_op("a"), put_op("a")]);
        assert_eq!(txn(request, MAX_OPS), Err(Refusal::DuplicateKey));
    }

    #[test]
    fn transactions_nest_only_so_deep() {
        let enough = MAX_TXN_DEPTH + 1;
        assert!(txn(nested(MAX_TXN_DEPTH), enough).is_ok());
        assert_eq!(txn(nested(MAX_TXN_DEPTH + 1), enough), Err(Refusal::TooManyOperations));
    }

    #[test]
    fn the_decoder_stops_deep_nesting_before_we_do() {
        use prost::Message;
        let decodes = |depth| pb::TxnRequest::decode(nested(depth).encode_to_vec().as_slice());
        assert!(decodes(40).is_ok());
        assert!(decodes(MAX_TXN_DEPTH).is_err());
    }

    #[test]
    fn a_compare_takes_only_the_value_of_its_target() {
        let target = |target: i32, union| {
            let request =
                pb::Compare { key: "k".into(), target, target_union: union, ..Default::default() };
            compare(request).unwrap().target
        };
        assert_eq!(target(0, Some(TargetUnion::Version(5))), CompareTarget::Version(5));
        assert_eq!(target(0, Some(TargetUnion::ModRevision(5))), CompareTarget::Version(0));
        assert_eq!(target(1, Some(TargetUnion::CreateRevision(5))), CompareTarget::Create(5));
        assert_eq!(target(2, Some(TargetUnion::ModRevision(5))), CompareTarget::Mod(5));
        assert_eq!(target(3, Some(TargetUnion::Lease(5))), CompareTarget::Value(Bytes::new()));
        assert_eq!(
            target(3, Some(TargetUnion::Value("v".into()))),
            CompareTarget::Value("v".into())
        );
        assert_eq!(target(4, Some(TargetUnion::Lease(5))), CompareTarget::Lease(5));
        assert_eq!(target(4, None), CompareTarget::Lease(0));
        assert_eq!(target(9, Some(TargetUnion::Lease(5))), CompareTarget::Unknown);
    }

    #[test]
    fn an_unknown_compare_result_is_kept_as_unknown() {
        let request = pb::Compare { key: "k".into(), result: 9, ..Default::default() };
        assert_eq!(compare(request).unwrap().result, CompareResult::Unknown);
    }

    #[test]
    fn a_transaction_is_serializable_when_all_its_ranges_are() {
        let txn = |ops| succeeding(ops);
        assert!(is_serializable(&txn(vec![range_op("a", true)])));
        assert!(!is_serializable(&txn(vec![range_op("a", true), range_op("b", false)])));
        assert!(!is_serializable(&txn(vec![])));
        let inner = op(Request::RequestTxn(txn(vec![range_op("b", false)])));
        assert!(!is_serializable(&txn(vec![range_op("a", true), inner])));
        let inner = op(Request::RequestTxn(txn(vec![range_op("b", true)])));
        assert!(is_serializable(&txn(vec![inner])));
    }

    #[test]
    fn a_request_may_be_as_large_as_the_limit() {
        assert_eq!(check_size(10, 10), Ok(()));
        assert_eq!(check_size(11, 10), Err(Refusal::RequestTooLarge));
    }

    #[test]
    fn a_short_time_to_live_is_raised_and_a_long_one_refused() {
        for requested in [i64::MIN, -1, 0, 1, 2] {
            assert_eq!(lease_ttl_seconds(requested, 2), Ok(2));
        }
        assert_eq!(lease_ttl_seconds(9_000_000_000, 2), Ok(9_000_000_000));
        assert_eq!(lease_ttl_seconds(9_000_000_001, 2), Err(Refusal::LeaseTtlTooLarge));
    }
}
