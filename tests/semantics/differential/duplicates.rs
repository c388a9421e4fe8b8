//! Transactions that change a key twice and that etcd takes all the same.
//!
//! The rule of both is that no branch puts a key twice or puts and deletes it. etcd does not see it
//!
//! - when the delete is one of all keys from some key on (`range_end` is one zero byte);
//! - when a nested transaction puts the key and a later one beside it deletes it.
//!
//! Compacted at the revision of such a transaction, etcd 3.5.30 loses the pair while its index goes
//! on to name it, and dies at the next read of the key. So nobody is asked to do them here.

use holdfast::pb::etcdserverpb as pb;
use holdfast::pb::etcdserverpb::request_op::Request;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    AsMeant,
    AsInEtcd,
}

#[derive(Default)]
struct Changes<'a> {
    puts: Vec<&'a [u8]>,
    deletes: Vec<(&'a [u8], &'a [u8])>,
}

struct Duplicate;

pub fn only_etcd_takes(txn: &pb::TxnRequest) -> bool {
    let refuses =
        |rule| changes(&txn.success, rule).and_then(|_| changes(&txn.failure, rule)).is_err();
    refuses(Rule::AsMeant) && !refuses(Rule::AsInEtcd)
}

fn changes(ops: &[pb::RequestOp], rule: Rule) -> Result<Changes<'_>, Duplicate> {
    let requests = || ops.iter().filter_map(|op| op.request.as_ref());
    let mut all = Changes::default();
    for request in requests() {
        if let Request::RequestDeleteRange(delete) = request {
            all.deletes.push((&delete.key, &delete.range_end));
        }
    }
    for request in requests() {
        let Request::RequestTxn(nested) = request else { continue };
        let mut either = changes(&nested.success, rule)?;
        let other = changes(&nested.failure, rule)?;
        either.puts.extend(other.puts);
        either.deletes.extend(other.deletes);
        if either.puts.iter().any(|key| all.changes(key, rule))
            || rule == Rule::AsMeant && all.puts.iter().any(|key| either.deletes(key, rule))
        {
            return Err(Duplicate);
        }
        all.puts.extend(either.puts);
        all.deletes.extend(either.deletes);
    }
    for request in requests() {
        if let Request::RequestPut(put) = request {
            if all.changes(&put.key, rule) {
                return Err(Duplicate);
            }
            all.puts.push(&put.key);
        }
    }
    Ok(all)
}

impl Changes<'_> {
    fn changes(&self, key: &[u8], rule: Rule) -> bool {
        self.puts.contains(&key) || self.deletes(key, rule)
    }

    fn deletes(&self, key: &[u8], rule: Rule) -> bool {
        self.deletes.iter().any(|(start, end)| match *end {
            b"" => key == *start,
            b"\0" => rule == Rule::AsMeant && key >= *start,
            end => (*start..end).contains(&key),
        })
    }
}

#[test]
fn what_etcd_does_not_see_is_known() {
    let op = |request| pb::RequestOp { request: Some(request) };
    let put = |key: &'static str| {
        op(Request::RequestPut(pb::PutRequest { key: key.into(), ..pb::PutRequest::default() }))
    };
    let delete = |key: &'static str, end: &'static str| {
        let (key, range_end) = (key.into(), end.into());
        op(Request::RequestDeleteRange(pb::DeleteRangeRequest { key, range_end, prev_kv: false }))
    };
    let txn = |success| pb::TxnRequest { success, ..pb::TxnRequest::default() };
    let nested = |success| op(Request::RequestTxn(txn(success)));
    for (ops, expected) in [
        (vec![put("b"), delete("a", "\0")], true),
        (vec![put("b"), delete("c", "\0")], false),
        (vec![put("b"), delete("a", "c")], false),
        (vec![put("b"), delete("c", "a")], false),
        (vec![put("b"), put("b"), delete("a", "\0")], false),
        (vec![nested(vec![put("b")]), nested(vec![delete("b", "")])], true),
        (vec![nested(vec![delete("b", "")]), nested(vec![put("b")])], false),
        (vec![nested(vec![put("b")]), delete("b", "")], false),
    ] {
        let txn = txn(ops);
        assert_eq!(only_etcd_takes(&txn), expected, "{txn:?}");
    }
}
