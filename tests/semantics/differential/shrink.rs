//! Makes a failing sequence of operations short and plain.
//!
//! First parts of the sequence are left out, in halves, quarters and so on down to single
//! operations; then what remains is made simpler from within: fields become default, transactions
//! lose operations. A step is kept when the shorter sequence still shows a difference, whichever.

use std::time::Duration;

use tokio::time::Instant;

use holdfast::pb::etcdserverpb as pb;
use holdfast::pb::etcdserverpb::request_op;
use holdfast::pb::etcdserverpb::watch_request::RequestUnion;

use super::operation::{Operation, Request};
use super::pair::{Pair, Stopped};
use super::side::Interrupted;
use super::watches::{Different, Trouble};

/// How long to go on. What was reached by then is reported.
const LIMIT: Duration = Duration::from_secs(180);

/// How long to wait for what a stream does not say, at each try.
const PATIENCE: Duration = Duration::from_secs(3);

/// A sequence that shows a difference.
pub struct Failing {
    pub operations: Vec<Operation>,
    pub shown: Vec<String>,
    pub difference: Different,
}

/// Runs sequences one after the other.
pub struct Bench {
    pair: Option<Pair>,
    /// Whether each sequence gets clusters of its own: slow, and needed where a difference shows
    /// only on a store that was never compacted.
    always_fresh: bool,
    /// Whether a sequence also fails by getting no answer: when a member dies of it.
    wants_answers: bool,
    deadline: Instant,
    pub tries: usize,
}

impl Bench {
    /// A bench that starts with these clusters, or with its own.
    pub fn new(pair: Option<Pair>) -> Bench {
        let deadline = Instant::now() + LIMIT;
        Bench { pair, always_fresh: false, wants_answers: false, deadline, tries: 0 }
    }

    pub fn wants_answers(self, wants_answers: bool) -> Bench {
        Bench { wants_answers, ..self }
    }

    pub fn always_fresh(self) -> Bench {
        Bench { pair: None, always_fresh: true, ..self }
    }

    /// Whether the operations show a difference, beginning from an empty store.
    pub async fn try_out(&mut self, operations: &[Operation]) -> Option<Failing> {
        self.tries += 1;
        let mut pair = self.empty_pair().await;
        pair.set_patience(PATIENCE);
        match pair.run(operations).await {
            Ok(()) => {
                self.pair = Some(pair);
                None
            }
            Err(Stopped { operations: shown, trouble }) => {
                let difference = match trouble {
                    Trouble::Different(difference) => {
                        self.pair = Some(pair);
                        difference
                    }
                    Trouble::Interrupted(interrupted) if self.wants_answers => {
                        no_answer(&interrupted)
                    }
                    Trouble::Interrupted(_) => return None,
                };
                let operations = operations[..shown.len()].to_vec();
                Some(Failing { operations, shown, difference })
            }
        }
    }

    async fn empty_pair(&mut self) -> Pair {
        if let Some(mut pair) = self.pair.take().filter(|_| !self.always_fresh)
            && pair.reset().await.is_ok()
        {
            return pair;
        }
        Pair::start().await
    }

    pub async fn shrink(&mut self, mut failing: Failing) -> Failing {
        loop {
            let before = failing.operations.clone();
            let shorter = self.leave_out(failing).await;
            failing = self.simplify(shorter).await;
            // What became simpler may need less of what is before it.
            if failing.operations == before || Instant::now() >= self.deadline {
                return failing;
            }
        }
    }

    async fn leave_out(&mut self, mut failing: Failing) -> Failing {
        let mut size = failing.operations.len().div_ceil(2);
        while size > 0 {
            let mut end = failing.operations.len();
            // From the end, as what is at the end is what the beginning is needed for.
            while end > 0 && Instant::now() < self.deadline {
                let start = end.saturating_sub(size);
                let mut fewer = failing.operations.clone();
                fewer.drain(start..end);
                end = start;
                if let Some(shorter) = self.try_out(&fewer).await {
                    failing = shorter;
                    end = end.min(failing.operations.len());
                }
            }
            size /= 2;
        }
        failing
    }

    async fn simplify(&mut self, mut failing: Failing) -> Failing {
        let mut at = 0;
        while at < failing.operations.len() {
            let mut simplified = false;
            for simpler in simpler(&failing.operations[at]) {
                if Instant::now() >= self.deadline {
                    return failing;
                }
                let mut operations = failing.operations.clone();
                operations[at] = simpler;
                if let Some(plainer) = self.try_out(&operations).await {
                    failing = plainer;
                    simplified = true;
                    break;
                }
            }
            // What became simpler may become simpler still.
            at += usize::from(!simplified);
        }
        failing
    }
}

/// An interruption as what it is when it comes again and again.
pub fn no_answer(interrupted: &Interrupted) -> Different {
    Different {
        what: "the last operation, or what follows it, gets no answer".to_owned(),
        etcd: String::new(),
        holdfast: interrupted.to_string(),
    }
}

/// One step simpler, in each way there is.
fn simpler(operation: &Operation) -> Vec<Operation> {
    let with = |request| Operation { member: operation.member, request };
    let mut found: Vec<Operation> = match &operation.request {
        Request::Range(range) => {
            simpler_range(range).into_iter().map(|range| with(Request::Range(range))).collect()
        }
        Request::Put(put) => {
            simpler_put(put).into_iter().map(|put| with(Request::Put(put))).collect()
        }
        Request::DeleteRange(delete) => simpler_delete(delete)
            .into_iter()
            .map(|delete| with(Request::DeleteRange(delete)))
            .collect(),
        Request::Txn(txn) => {
            let inner = txn.success.iter().chain(&txn.failure);
            let instead = inner.filter_map(|op| op.request.clone().map(unwrapped));
            let smaller = simpler_txn(txn).into_iter().map(Request::Txn);
            instead.chain(smaller).map(with).collect()
        }
        Request::Compact(compact) if compact.physical => {
            vec![with(Request::Compact(pb::CompactionRequest { physical: false, ..*compact }))]
        }
        Request::Watch { stream, request } => simpler_watch(request)
            .into_iter()
            .map(|request| with(Request::Watch { stream: *stream, request }))
            .collect(),
        _ => Vec::new(),
    };
    if operation.member != 0 {
        found.push(Operation { member: 0, request: operation.request.clone() });
    }
    found
}

fn unwrapped(request: request_op::Request) -> Request {
    match request {
        request_op::Request::RequestRange(range) => Request::Range(range),
        request_op::Request::RequestPut(put) => Request::Put(put),
        request_op::Request::RequestDeleteRange(delete) => Request::DeleteRange(delete),
        request_op::Request::RequestTxn(txn) => Request::Txn(txn),
    }
}

/// The results of those changes that change something.
fn changed<T: Clone + PartialEq>(from: &T, changes: &[fn(&mut T)]) -> Vec<T> {
    let results = changes.iter().map(|change| {
        let mut to = from.clone();
        change(&mut to);
        to
    });
    results.filter(|to| to != from).collect()
}

fn simpler_range(range: &pb::RangeRequest) -> Vec<pb::RangeRequest> {
    changed(
        range,
        &[
            |range| range.range_end.clear(),
            |range| range.limit = 0,
            |range| range.revision = 0,
            |range| (range.sort_order, range.sort_target) = (0, 0),
            |range| range.sort_order = 0,
            |range| range.serializable = false,
            |range| range.keys_only = false,
            |range| range.count_only = false,
            |range| range.min_mod_revision = 0,
            |range| range.max_mod_revision = 0,
            |range| range.min_create_revision = 0,
            |range| range.max_create_revision = 0,
        ],
    )
}

fn simpler_put(put: &pb::PutRequest) -> Vec<pb::PutRequest> {
    changed(
        put,
        &[
            |put| put.value.clear(),
            |put| put.lease = 0,
            |put| put.prev_kv = false,
            |put| put.ignore_value = false,
            |put| put.ignore_lease = false,
        ],
    )
}

fn simpler_delete(delete: &pb::DeleteRangeRequest) -> Vec<pb::DeleteRangeRequest> {
    changed(delete, &[|delete| delete.range_end.clear(), |delete| delete.prev_kv = false])
}

fn simpler_txn(txn: &pb::TxnRequest) -> Vec<pb::TxnRequest> {
    let mut found = Vec::new();
    for compare in shorter(&txn.compare) {
        found.push(pb::TxnRequest { compare, ..txn.clone() });
    }
    for success in shorter(&txn.success).into_iter().chain(plainer(&txn.success)) {
        found.push(pb::TxnRequest { success, ..txn.clone() });
    }
    for failure in shorter(&txn.failure).into_iter().chain(plainer(&txn.failure)) {
        found.push(pb::TxnRequest { failure, ..txn.clone() });
    }
    found
}

/// Without one half, without the other, and without each one.
fn shorter<T: Clone>(list: &[T]) -> Vec<Vec<T>> {
    let half = list.len() / 2;
    let mut found = Vec::new();
    if half > 1 {
        found.extend([list[..half].to_vec(), list[half..].to_vec()]);
    }
    for at in 0..list.len() {
        let mut fewer = list.to_vec();
        fewer.remove(at);
        found.push(fewer);
    }
    found
}

/// With one of the operations simpler.
fn plainer(ops: &[pb::RequestOp]) -> Vec<Vec<pb::RequestOp>> {
    use request_op::Request::{RequestDeleteRange, RequestPut, RequestRange, RequestTxn};
    let mut found = Vec::new();
    for (at, op) in ops.iter().enumerate() {
        let simpler: Vec<request_op::Request> = match &op.request {
            Some(RequestRange(range)) => {
                simpler_range(range).into_iter().map(RequestRange).collect()
            }
            Some(RequestPut(put)) => simpler_put(put).into_iter().map(RequestPut).collect(),
            Some(RequestDeleteRange(delete)) => {
                simpler_delete(delete).into_iter().map(RequestDeleteRange).collect()
            }
            Some(RequestTxn(txn)) => {
                let inner = txn.success.iter().chain(&txn.failure);
                let instead = inner.filter_map(|op| op.request.clone());
                instead.chain(simpler_txn(txn).into_iter().map(RequestTxn)).collect()
            }
            None => Vec::new(),
        };
        for request in simpler {
            let mut ops = ops.to_vec();
            ops[at] = pb::RequestOp { request: Some(request) };
            found.push(ops);
        }
    }
    found
}

fn simpler_watch(request: &pb::WatchRequest) -> Vec<pb::WatchRequest> {
    let Some(RequestUnion::CreateRequest(create)) = &request.request_union else {
        return Vec::new();
    };
    let simpler = changed(
        create,
        &[
            |create| create.range_end.clear(),
            |create| create.start_revision = 0,
            |create| create.progress_notify = false,
            |create| create.filters.clear(),
            |create| create.prev_kv = false,
            |create| create.watch_id = 0,
            |create| create.fragment = false,
        ],
    );
    let request = |create| Some(RequestUnion::CreateRequest(create));
    simpler.into_iter().map(|create| pb::WatchRequest { request_union: request(create) }).collect()
}

#[test]
fn simpler_forms_come_to_an_end() {
    for operation in super::generate::operations(11, 200) {
        let mut form = operation;
        let mut steps = 0;
        // Always the last way: what remains of a transaction is looked into as well.
        while let Some(next) = simpler(&form).pop() {
            assert_ne!(next, form);
            form = next;
            steps += 1;
            assert!(steps < 2000, "{form} gets no simpler");
        }
    }
}
