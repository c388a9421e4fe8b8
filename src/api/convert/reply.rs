//! Replies as protobuf.

use bytes::Bytes;

use crate::api::header;
use crate::machine::{DeleteReply, Page, PutReply, RangeReply, Record, TxnOpReply, TxnReply};
use crate::node::{LeaseInfo, Member};
use crate::pb::etcdserverpb as pb;
use crate::pb::etcdserverpb::response_op::Response;
use crate::pb::mvccpb::KeyValue;

/// What stands for the remaining time of a lease that does not exist.
const TTL_OF_NO_LEASE: i64 = -1;

/// The pair as clients see it; of a tombstone, its key and mod revision.
pub fn key_value(record: &Record) -> KeyValue {
    let (key, value) = record.shared();
    KeyValue {
        key,
        create_revision: record.create_revision(),
        mod_revision: record.mod_revision().main,
        version: record.version(),
        value,
        lease: record.lease().0,
    }
}

fn key_values(records: &[Record]) -> Vec<KeyValue> {
    records.iter().map(key_value).collect()
}

fn pairs(records: &[Record], keys_only: bool) -> Vec<KeyValue> {
    if keys_only {
        let key = |record: &Record| KeyValue { value: Bytes::new(), ..key_value(record) };
        return records.iter().map(key).collect();
    }
    key_values(records)
}

pub fn range_response(reply: &RangeReply, header: pb::ResponseHeader) -> pb::RangeResponse {
    let kvs = pairs(&reply.records, reply.keys_only);
    pb::RangeResponse { header: Some(header), kvs, more: reply.more, count: reply.count }
}

/// One piece of a range. The header, and what is true of the range as a whole, come with the last.
pub fn range_stream_response(
    page: &Page,
    keys_only: bool,
    header: impl FnOnce(i64) -> pb::ResponseHeader,
) -> pb::RangeStreamResponse {
    let mut response =
        pb::RangeResponse { kvs: pairs(&page.records, keys_only), ..Default::default() };
    if let Some(end) = page.end {
        response.header = Some(header(end.revision));
        response.more = end.more;
        response.count = end.count;
    }
    pb::RangeStreamResponse { range_response: Some(response) }
}

pub fn put_response(reply: &PutReply, header: pb::ResponseHeader) -> pb::PutResponse {
    let prev_kv = reply.prev.as_ref().map(key_value);
    pb::PutResponse { header: Some(header), prev_kv }
}

pub fn delete_range_response(
    reply: &DeleteReply,
    header: pb::ResponseHeader,
) -> pb::DeleteRangeResponse {
    pb::DeleteRangeResponse {
        header: Some(header),
        deleted: reply.deleted,
        prev_kvs: key_values(&reply.prev),
    }
}

/// The answers inside show their revision and nothing else in their headers; that of a nested
/// transaction is there and empty.
pub fn txn_response(reply: &TxnReply, header: pb::ResponseHeader) -> pb::TxnResponse {
    pb::TxnResponse {
        header: Some(header),
        succeeded: reply.succeeded,
        responses: reply.responses.iter().map(response_op).collect(),
    }
}

fn response_op(reply: &TxnOpReply) -> pb::ResponseOp {
    let response = match reply {
        TxnOpReply::Range { revision, reply } => {
            Response::ResponseRange(range_response(reply, header::inside_txn(*revision)))
        }
        TxnOpReply::Put { revision, reply } => {
            Response::ResponsePut(put_response(reply, header::inside_txn(*revision)))
        }
        TxnOpReply::DeleteRange { revision, reply } => Response::ResponseDeleteRange(
            delete_range_response(reply, header::inside_txn(*revision)),
        ),
        TxnOpReply::Txn(reply) => {
            Response::ResponseTxn(txn_response(reply, pb::ResponseHeader::default()))
        }
    };
    pb::ResponseOp { response: Some(response) }
}

/// What remains of lease `id`, in whole seconds; `None` when there is no such lease, which is no
/// error.
pub fn lease_time_to_live_response(
    id: i64,
    info: Option<LeaseInfo>,
    header: pb::ResponseHeader,
) -> pb::LeaseTimeToLiveResponse {
    let header = Some(header);
    match info {
        Some(info) => pb::LeaseTimeToLiveResponse {
            header,
            id,
            ttl: info.remaining.as_secs().try_into().unwrap_or(i64::MAX),
            granted_ttl: info.granted_ttl_seconds,
            keys: info.keys,
        },
        None => pb::LeaseTimeToLiveResponse {
            header,
            id,
            ttl: TTL_OF_NO_LEASE,
            granted_ttl: 0,
            keys: Vec::new(),
        },
    }
}

pub fn members(members: Vec<Member>) -> Vec<pb::Member> {
    members
        .into_iter()
        .map(|member| pb::Member {
            id: member.id.0,
            name: member.name,
            peer_ur_ls: member.peer_urls,
            client_ur_ls: member.client_urls,
            is_learner: member.is_learner,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Parts;
    use crate::types::{LeaseId, Revision};

    fn record(key: &'static str) -> Record {
        Record::new(Parts {
            key: key.as_bytes(),
            value: b"value",
            create_revision: 2,
            mod_revision: Revision::new(5, 1),
            version: 3,
            lease: LeaseId(7),
        })
    }

    fn full_header() -> pb::ResponseHeader {
        pb::ResponseHeader { cluster_id: 1, member_id: 2, revision: 9, raft_term: 3 }
    }

    #[test]
    fn a_pair_shows_the_main_revision_and_its_lease() {
        let kv = key_value(&record("k"));
        assert_eq!((kv.create_revision, kv.mod_revision, kv.version, kv.lease), (2, 5, 3, 7));
        assert_eq!((kv.key.as_ref(), kv.value.as_ref()), (&b"k"[..], &b"value"[..]));
    }

    #[test]
    fn values_are_shared_and_not_copied() {
        let record = record("k");
        assert_eq!(key_value(&record).value.as_ptr(), record.value().as_ptr());
    }

    #[test]
    fn keys_only_leaves_out_nothing_but_the_values() {
        let reply =
            RangeReply { records: vec![record("k")], more: true, count: 4, keys_only: true };
        let response = range_response(&reply, full_header());
        assert_eq!((response.more, response.count), (true, 4));
        assert!(response.kvs[0].value.is_empty());
        assert_eq!(response.kvs[0].version, 3);
    }

    #[test]
    fn answers_inside_a_transaction_show_only_their_revision() {
        let nested = TxnReply {
            succeeded: false,
            responses: vec![TxnOpReply::Range { revision: 9, reply: RangeReply::default() }],
        };
        let reply = TxnReply {
            succeeded: true,
            responses: vec![
                TxnOpReply::Range { revision: 8, reply: RangeReply::default() },
                TxnOpReply::Put { revision: 9, reply: PutReply { prev: Some(record("k")) } },
                TxnOpReply::DeleteRange {
                    revision: 9,
                    reply: DeleteReply { deleted: 1, prev: vec![record("d")] },
                },
                TxnOpReply::Txn(nested),
            ],
        };
        let response = txn_response(&reply, full_header());
        assert_eq!(response.header, Some(full_header()));
        assert!(response.succeeded);

        let headers: Vec<pb::ResponseHeader> = response
            .responses
            .iter()
            .map(|op| {
                match op.response.as_ref().unwrap() {
                    Response::ResponseRange(range) => range.header,
                    Response::ResponsePut(put) => put.header,
                    Response::ResponseDeleteRange(delete) => delete.header,
                    Response::ResponseTxn(txn) => txn.header,
                }
                .unwrap()
            })
            .collect();
        let only = |revision| pb::ResponseHeader { revision, ..Default::default() };
        assert_eq!(headers, [only(8), only(9), only(9), only(0)]);

        let Some(Response::ResponseTxn(nested)) = &response.responses[3].response else {
            panic!("the fourth answer is that of the nested transaction");
        };
        let Some(Response::ResponseRange(range)) = &nested.responses[0].response else {
            panic!("the nested transaction only ranges");
        };
        assert_eq!(range.header, Some(only(9)));
    }
}
