//! Operations as lines that a person can read and repeat.

use std::fmt::{self, Display, Formatter};

use bytes::Bytes;

use holdfast::pb::etcdserverpb as pb;
use holdfast::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use holdfast::pb::etcdserverpb::request_op;
use holdfast::pb::etcdserverpb::watch_request::RequestUnion;

use super::operation::{Operation, PICKED, Request};

/// Longer byte strings are shown by their beginning and length.
const SHOWN_BYTES: usize = 40;

impl Display for Operation {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "m{} {}", self.member, self.request)
    }
}

impl Display for Request {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Request::Range(range) => write!(f, "{}", shown_range(range)),
            Request::Put(put) => write!(f, "{}", shown_put(put)),
            Request::DeleteRange(delete) => write!(f, "{}", shown_delete(delete)),
            Request::Txn(txn) => write!(f, "{}", shown_txn(txn)),
            Request::Compact(compact) => {
                let mut line = Line::new("compact");
                line.number("revision", compact.revision).flag("physical", compact.physical);
                write!(f, "{line}")
            }
            Request::Grant(grant) => {
                let mut line = Line::new("grant");
                line.lease("id", grant.id).number("ttl", grant.ttl);
                write!(f, "{line}")
            }
            Request::Revoke(revoke) => write!(f, "revoke{}", Lease(revoke.id)),
            Request::KeepAlive(keep_alive) => write!(f, "keep-alive{}", Lease(keep_alive.id)),
            Request::TimeToLive(time_to_live) => {
                let keys = if time_to_live.keys { " keys" } else { "" };
                write!(f, "time-to-live{}{keys}", Lease(time_to_live.id))
            }
            Request::Leases => write!(f, "leases"),
            Request::Watch { stream, request } => {
                write!(f, "stream {stream}: {}", shown_watch(request))
            }
            Request::CloseStream { stream } => write!(f, "stream {stream}: close"),
        }
    }
}

/// A name, and what differs from the default.
struct Line(String);

impl Line {
    fn new(name: &str) -> Line {
        Line(name.to_owned())
    }

    fn add(&mut self, text: &str) -> &mut Line {
        self.0.push(' ');
        self.0.push_str(text);
        self
    }

    fn bytes(&mut self, name: &str, bytes: &Bytes) -> &mut Line {
        if bytes.is_empty() { self } else { self.add(&format!("{name}={}", quoted(bytes))) }
    }

    fn number<N: Display + PartialEq + Default>(&mut self, name: &str, number: N) -> &mut Line {
        if number == N::default() { self } else { self.add(&format!("{name}={number}")) }
    }

    fn lease(&mut self, name: &str, id: i64) -> &mut Line {
        if id == 0 { self } else { self.add(&format!("{name}={}", shown_lease(id))) }
    }

    fn flag(&mut self, name: &str, is_set: bool) -> &mut Line {
        if is_set { self.add(name) } else { self }
    }
}

impl Display for Line {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

struct Lease(i64);

impl Display for Lease {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, " id={}", shown_lease(self.0))
    }
}

fn shown_lease(id: i64) -> String {
    // Ids that are near it for another reason are not in any request.
    if (PICKED..2 * PICKED).contains(&id) {
        format!("picked#{}", id - PICKED)
    } else {
        id.to_string()
    }
}

pub fn quoted(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(SHOWN_BYTES)];
    let text = shown.escape_ascii();
    match bytes.len() {
        length if length > SHOWN_BYTES => format!("\"{text}\"... ({length} bytes)"),
        _ => format!("\"{text}\""),
    }
}

fn key_range(line: &mut Line, key: &Bytes, range_end: &Bytes) {
    line.add(&quoted(key));
    if !range_end.is_empty() {
        line.add(&format!("to {}", quoted(range_end)));
    }
}

fn shown_range(range: &pb::RangeRequest) -> Line {
    let mut line = Line::new("range");
    key_range(&mut line, &range.key, &range.range_end);
    line.number("limit", range.limit)
        .number("revision", range.revision)
        .number("sort_order", range.sort_order)
        .number("sort_target", range.sort_target)
        .flag("serializable", range.serializable)
        .flag("keys_only", range.keys_only)
        .flag("count_only", range.count_only)
        .number("min_mod", range.min_mod_revision)
        .number("max_mod", range.max_mod_revision)
        .number("min_create", range.min_create_revision)
        .number("max_create", range.max_create_revision);
    line
}

fn shown_put(put: &pb::PutRequest) -> Line {
    let mut line = Line::new("put");
    line.add(&quoted(&put.key))
        .bytes("value", &put.value)
        .lease("lease", put.lease)
        .flag("prev_kv", put.prev_kv)
        .flag("ignore_value", put.ignore_value)
        .flag("ignore_lease", put.ignore_lease);
    line
}

fn shown_delete(delete: &pb::DeleteRangeRequest) -> Line {
    let mut line = Line::new("delete");
    key_range(&mut line, &delete.key, &delete.range_end);
    line.flag("prev_kv", delete.prev_kv);
    line
}

fn shown_txn(txn: &pb::TxnRequest) -> String {
    let list = |shown: Vec<String>| format!("[{}]", shown.join("; "));
    let compares = list(txn.compare.iter().map(shown_compare).collect());
    let ops = |ops: &[pb::RequestOp]| list(ops.iter().map(shown_op).collect());
    format!("txn if {compares} then {} else {}", ops(&txn.success), ops(&txn.failure))
}

fn shown_op(op: &pb::RequestOp) -> String {
    match &op.request {
        None => "nothing".to_owned(),
        Some(request_op::Request::RequestRange(range)) => shown_range(range).0,
        Some(request_op::Request::RequestPut(put)) => shown_put(put).0,
        Some(request_op::Request::RequestDeleteRange(delete)) => shown_delete(delete).0,
        Some(request_op::Request::RequestTxn(txn)) => shown_txn(txn),
    }
}

fn shown_compare(compare: &pb::Compare) -> String {
    let mut line = Line::new(&match CompareTarget::try_from(compare.target) {
        Ok(target) => target.as_str_name().to_lowercase(),
        Err(_) => format!("target {}", compare.target),
    });
    line.add("of");
    key_range(&mut line, &compare.key, &compare.range_end);
    line.add(&match CompareResult::try_from(compare.result) {
        Ok(result) => result.as_str_name().to_lowercase(),
        Err(_) => format!("result {}", compare.result),
    });
    line.add(&match &compare.target_union {
        None => "nothing".to_owned(),
        Some(TargetUnion::Version(version)) => format!("version {version}"),
        Some(TargetUnion::CreateRevision(revision)) => format!("create revision {revision}"),
        Some(TargetUnion::ModRevision(revision)) => format!("mod revision {revision}"),
        Some(TargetUnion::Value(value)) => format!("value {}", quoted(value)),
        Some(TargetUnion::Lease(id)) => format!("lease {}", shown_lease(*id)),
    });
    line.0
}

fn shown_watch(request: &pb::WatchRequest) -> Line {
    match &request.request_union {
        None => Line::new("nothing"),
        Some(RequestUnion::CancelRequest(cancel)) => {
            Line(format!("cancel watch {}", cancel.watch_id))
        }
        Some(RequestUnion::ProgressRequest(_)) => Line::new("progress"),
        Some(RequestUnion::CreateRequest(create)) => {
            let mut line = Line::new("watch");
            key_range(&mut line, &create.key, &create.range_end);
            line.number("start", create.start_revision).number("id", create.watch_id);
            if !create.filters.is_empty() {
                line.add(&format!("filters={:?}", create.filters));
            }
            line.flag("prev_kv", create.prev_kv)
                .flag("fragment", create.fragment)
                .flag("progress_notify", create.progress_notify);
            line
        }
    }
}

#[test]
fn an_operation_is_shown_without_what_is_default() {
    let put = pb::PutRequest {
        key: "a\0".into(),
        value: "v".into(),
        lease: PICKED + 2,
        ..pb::PutRequest::default()
    };
    let compare = pb::Compare { key: "k".into(), target: 3, ..pb::Compare::default() };
    let op = pb::RequestOp { request: Some(request_op::Request::RequestPut(put)) };
    let txn =
        pb::TxnRequest { compare: vec![compare], success: vec![op], ..pb::TxnRequest::default() };
    assert_eq!(
        Operation { member: 1, request: Request::Txn(txn) }.to_string(),
        r#"m1 txn if [value of "k" equal nothing] then [put "a\x00" value="v" lease=picked#2] else []"#
    );
    assert_eq!(quoted(&[b'x'; 50]), format!("\"{}\"... (50 bytes)", "x".repeat(40)));
}
