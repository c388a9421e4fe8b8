//! Runs a script: sends its steps to a target and prints what comes back.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::time::Duration;

use futures::channel::mpsc::UnboundedSender;
use futures::{Stream, StreamExt};
use holdfast::pb::etcdserverpb::request_op::Request;
use holdfast::pb::etcdserverpb::watch_request::RequestUnion;
use holdfast::pb::etcdserverpb::{
    AlarmRequest, AlarmResponse, AuthStatusResponse, CompactionRequest, CompactionResponse,
    DeleteRangeRequest, DeleteRangeResponse, HashKvResponse, LeaseGrantRequest, LeaseGrantResponse,
    LeaseKeepAliveResponse, LeaseLeasesResponse, LeaseRevokeResponse, LeaseTimeToLiveRequest,
    LeaseTimeToLiveResponse, MemberListResponse, PutRequest, PutResponse, RangeRequest,
    RangeResponse, StatusResponse, TxnRequest, TxnResponse, WatchCancelRequest,
    WatchProgressRequest, WatchRequest, WatchResponse,
};
use tonic::Status;

use super::parse::{Sent, Step, parse};
use super::print::{self, Lines};
use super::text::Script;
use super::words::Names;

/// How long an answer on a watch stream may take. Long enough for a busy machine: only a script
/// that fails waits it out.
const PATIENCE: Duration = Duration::from_secs(10);

/// After this time without an answer, a progress request is repeated: etcd drops one that comes
/// while a watch has not caught up.
const PROGRESS_PATIENCE: Duration = Duration::from_millis(500);

/// The id of answers that are for no watch.
const NO_WATCH: i64 = -1;

/// One answer of a service.
pub type Answer<T> = Result<T, Status>;

/// What scripts are run against.
///
/// Each call goes to another member than the one before, where there are several.
pub trait Target {
    /// Gives the store's revision, after emptying it unless it is `fresh`. What later calls answer
    /// does not depend on what was there before.
    async fn begin(&mut self, fresh: bool) -> i64;

    /// How the next calls are sent.
    fn send_with(&mut self, metadata: &[(String, String)], gzip: bool);

    /// Waits until every member knows of all that was answered so far.
    async fn settle(&mut self);

    async fn put(&mut self, request: PutRequest) -> Answer<PutResponse>;
    async fn range(&mut self, request: RangeRequest) -> Answer<RangeResponse>;
    async fn delete_range(&mut self, request: DeleteRangeRequest) -> Answer<DeleteRangeResponse>;
    async fn txn(&mut self, request: TxnRequest) -> Answer<TxnResponse>;
    async fn compact(&mut self, request: CompactionRequest) -> Answer<CompactionResponse>;

    async fn lease_grant(&mut self, request: LeaseGrantRequest) -> Answer<LeaseGrantResponse>;
    async fn lease_revoke(&mut self, id: i64) -> Answer<LeaseRevokeResponse>;
    /// Asks for all of them on one stream, closes it, and reads to its end.
    async fn lease_keep_alive(&mut self, ids: &[i64]) -> Answer<Vec<LeaseKeepAliveResponse>>;
    async fn lease_time_to_live(
        &mut self,
        request: LeaseTimeToLiveRequest,
    ) -> Answer<LeaseTimeToLiveResponse>;
    async fn lease_leases(&mut self) -> Answer<LeaseLeasesResponse>;
    /// Waits until the lease has ended; false when it does not.
    async fn expire(&mut self, id: i64) -> bool;
    async fn pass(&mut self, time: Duration);

    fn watch(&mut self) -> Call;

    /// The answers of all members.
    async fn hash_kv(&mut self, revision: i64) -> Answer<Vec<HashKvResponse>>;

    async fn alarm(&mut self, request: AlarmRequest) -> Answer<AlarmResponse>;
    async fn status(&mut self) -> Answer<StatusResponse>;
    async fn members(&mut self, linearizable: bool) -> Answer<MemberListResponse>;
    async fn auth_status(&mut self) -> Answer<AuthStatusResponse>;
    async fn authenticate(&mut self, name: String, password: String) -> Answer<()>;
    /// How many bytes the answer has.
    async fn call(&mut self, path: String, message: bytes::Bytes) -> Answer<usize>;
    /// The number of the serving status.
    async fn health(&mut self, service: String) -> Answer<i32>;
}

/// A watch stream.
pub struct Call {
    /// `None` after it was closed.
    pub requests: Option<UnboundedSender<WatchRequest>>,
    pub answers: Pin<Box<dyn Stream<Item = Answer<WatchResponse>>>>,
}

/// Runs the script and gives what it prints.
///
/// # Errors
///
/// A step that cannot be read, with its line: the script is wrong, whatever it is run against.
pub async fn run(script: &Script, target: &mut impl Target) -> Result<Lines, String> {
    let base = target.begin(script.fresh).await;
    let mut session =
        Session { target, names: Names::new(base), streams: BTreeMap::new(), lines: Lines::new() };
    for (number, lines) in &script.steps {
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let wrong = |reason| format!("line {number}: {:?}: {reason}", lines[0]);
        let Sent { step, metadata, gzip } = parse(&lines, &session.names).map_err(wrong)?;
        session.target.send_with(&metadata, gzip);
        if answered_by_one_member(&step) {
            session.target.settle().await;
        }
        let answer = session.step(step).await.map_err(wrong)?;
        session.lines.extend(print::collapse(answer));
    }
    Ok(session.lines)
}

/// Whether a member answers from what it knows, without asking the others.
fn answered_by_one_member(step: &Step) -> bool {
    match step {
        Step::Get(get) => get.serializable,
        // etcd asks nobody for compares alone.
        Step::Txn(txn) => !asks_the_others(txn),
        Step::Put(_) | Step::Delete(_) | Step::Compact(_) => false,
        Step::Grant { .. } | Step::Revoke(_) | Step::Pass(_) | Step::Receive { .. } => false,
        _ => true,
    }
}

fn asks_the_others(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|operation| match &operation.request {
        Some(Request::RequestRange(range)) => !range.serializable,
        Some(Request::RequestTxn(txn)) => asks_the_others(txn),
        Some(Request::RequestPut(_) | Request::RequestDeleteRange(_)) => true,
        None => false,
    })
}

struct Session<'t, T> {
    target: &'t mut T,
    names: Names,
    streams: BTreeMap<String, WatchStream>,
    lines: Lines,
}

impl<T: Target> Session<'_, T> {
    /// What the step prints.
    async fn step(&mut self, step: Step) -> Result<Lines, String> {
        Ok(match step {
            Step::Put(request) => {
                let answer = self.target.put(request).await;
                self.show("put", answer, print::put)
            }
            Step::Get(request) => {
                let answer = self.target.range(request).await;
                self.show("get", answer, print::get)
            }
            Step::Delete(request) => {
                let answer = self.target.delete_range(request).await;
                self.show("delete", answer, print::delete)
            }
            Step::Txn(request) => {
                let answer = self.target.txn(request).await;
                self.show("txn", answer, print::txn)
            }
            Step::Compact(request) => {
                let answer = self.target.compact(request).await;
                self.show("compact", answer, |answer, names| {
                    vec![format!("{} compact", print::whole(&answer.header, names))]
                })
            }
            Step::Grant { request, name } => {
                let answer = self.target.lease_grant(request).await;
                if let (Some(name), Ok(answer)) = (name, &answer)
                    && answer.id > 0
                {
                    self.names.name_lease(&name, answer.id);
                }
                self.show("grant", answer, |answer, names| {
                    let revision = print::whole(&answer.header, names);
                    let id = names.lease(answer.id);
                    let error = &answer.error;
                    vec![format!("{revision} grant id={id} ttl={}{error}", answer.ttl)]
                })
            }
            Step::Revoke(id) => {
                let answer = self.target.lease_revoke(id).await;
                self.show("revoke", answer, |answer, names| {
                    vec![format!("{} revoke", print::whole(&answer.header, names))]
                })
            }
            Step::KeepAlive(ids) => {
                let answer = self.target.lease_keep_alive(&ids).await;
                self.show("keepalive", answer, |answers, names| {
                    let show = |answer: &LeaseKeepAliveResponse| {
                        let revision = print::whole(&answer.header, names);
                        let id = names.lease(answer.id);
                        format!("{revision} keepalive id={id} ttl={}", answer.ttl)
                    };
                    answers.iter().map(show).collect()
                })
            }
            Step::TimeToLive { id, keys } => {
                let request = LeaseTimeToLiveRequest { id, keys };
                let answer = self.target.lease_time_to_live(request).await;
                self.show("ttl", answer, print::time_to_live)
            }
            Step::Leases => {
                let answer = self.target.lease_leases().await;
                self.show("leases", answer, |answer, names| {
                    // In etcd only the leader knows the order in which they end.
                    let mut ids: Vec<i64> = answer.leases.iter().map(|lease| lease.id).collect();
                    ids.sort_unstable();
                    let mut ids: Vec<String> = ids.into_iter().map(|id| names.lease(id)).collect();
                    // What the server picked has another order each time, its names have not.
                    ids.sort_by_key(|id| id.starts_with(char::is_alphabetic).then(|| id.clone()));
                    let ids: String = ids.iter().map(|id| format!(" {id}")).collect();
                    vec![format!("{} leases{ids}", print::whole(&answer.header, names))]
                })
            }
            Step::Expire(id) => {
                let text = if self.target.expire(id).await { "expired" } else { "still there" };
                vec![format!("{text} {}", self.names.lease(id))]
            }
            Step::Pass(time) => {
                self.target.pass(time).await;
                Lines::new()
            }
            Step::Watch { stream, request } => {
                let request = RequestUnion::CreateRequest(request);
                self.ask(&stream, request, |answer| answer.created).await?
            }
            Step::Cancel { stream, id, answered } => {
                let request = RequestUnion::CancelRequest(WatchCancelRequest { watch_id: id });
                if answered {
                    let ours = |answer: &WatchResponse| answer.canceled && answer.watch_id == id;
                    self.ask(&stream, request, ours).await?
                } else {
                    self.tell(&stream, Some(request))?
                }
            }
            Step::Progress { stream, answered: true } => self.progress(&stream).await?,
            Step::Progress { stream, answered: false } => {
                let request = RequestUnion::ProgressRequest(WatchProgressRequest {});
                self.tell(&stream, Some(request))?
            }
            Step::Empty { stream } => self.tell(&stream, None)?,
            Step::Close { stream } => {
                self.stream(&stream).call.requests = None;
                Lines::new()
            }
            Step::Receive { stream, id, events } => self.receive(&stream, id, events).await,
            Step::HashKv(revision) => match self.target.hash_kv(revision).await {
                Ok(answers) => print::hash_kv(&answers, &mut self.names),
                Err(status) => print::refused("hashkv", &status),
            },
            Step::Alarm(request) => {
                let answer = self.target.alarm(request).await;
                self.show("alarm", answer, print::alarms)
            }
            Step::Status => {
                let answer = self.target.status().await;
                self.show("status", answer, print::status)
            }
            Step::Members { linearizable } => {
                let answer = self.target.members(linearizable).await;
                self.show("members", answer, print::members)
            }
            Step::AuthStatus => {
                let answer = self.target.auth_status().await;
                self.show("auth-status", answer, |answer, names| {
                    let revision = print::whole(&answer.header, names);
                    let AuthStatusResponse { enabled, auth_revision, .. } = answer;
                    vec![format!(
                        "{revision} auth-status enabled={enabled} authRevision={auth_revision}"
                    )]
                })
            }
            Step::Authenticate { name, password } => {
                let answer = self.target.authenticate(name, password).await;
                self.show("authenticate", answer, |(), _| vec!["authenticate".into()])
            }
            Step::Call { path, message } => match self.target.call(path, message).await {
                Ok(bytes) if bytes > 0 => vec!["call answered".into()],
                Ok(_) => vec!["call answered with nothing".into()],
                // What a decoder says about bytes it cannot read is nobody's contract.
                Err(status) if status.code() == tonic::Code::Internal => {
                    vec![format!("call {}", print::code(status.code()))]
                }
                Err(status) => print::refused("call", &status),
            },
            Step::Health { service } => {
                let answer = self.target.health(service).await;
                self.show("health", answer, |number, _| vec![format!("health status={number}")])
            }
        })
    }

    fn show<A>(
        &self,
        verb: &str,
        answer: Answer<A>,
        show: impl FnOnce(&A, &Names) -> Lines,
    ) -> Lines {
        match answer {
            Ok(answer) => show(&answer, &self.names),
            Err(status) => print::refused(verb, &status),
        }
    }

    /// The stream of this name, opened if it is new.
    fn stream(&mut self, name: &str) -> &mut WatchStream {
        if !self.streams.contains_key(name) {
            let stream = WatchStream::new(name, self.target.watch());
            self.streams.insert(name.to_owned(), stream);
        }
        self.streams.get_mut(name).expect("it was opened")
    }

    /// Sends a request that has no answer.
    fn tell(&mut self, stream: &str, request: Option<RequestUnion>) -> Result<Lines, String> {
        self.stream(stream).send(request)?;
        Ok(Lines::new())
    }

    /// Sends a request and prints all answers up to the one that is `ours`.
    async fn ask(
        &mut self,
        stream: &str,
        request: RequestUnion,
        ours: impl Fn(&WatchResponse) -> bool,
    ) -> Result<Lines, String> {
        self.stream(stream).send(Some(request))?;
        let stream = self.streams.get_mut(stream).expect("it was opened");
        Ok(stream.answers_until(&self.names, PATIENCE, ours).await)
    }

    /// Asks for progress of the stream until it is told, and prints with it what the watches have
    /// received before.
    async fn progress(&mut self, stream: &str) -> Result<Lines, String> {
        let ours = |answer: &WatchResponse| answer.watch_id == NO_WATCH && !answer.created;
        for _ in 0..PATIENCE.as_millis() / PROGRESS_PATIENCE.as_millis() {
            let request = RequestUnion::ProgressRequest(WatchProgressRequest {});
            self.stream(stream).send(Some(request))?;
            let stream = self.streams.get_mut(stream).expect("it was opened");
            let answers = stream.answers_until(&self.names, PROGRESS_PATIENCE, ours).await;
            if answers.last().is_some_and(|line| line.ends_with(" progress")) {
                let mut lines: Lines = stream.received.values_mut().flat_map(take_all).collect();
                lines.extend(answers);
                return Ok(lines);
            }
        }
        Ok(vec![format!("{stream} tells no progress")])
    }

    async fn receive(&mut self, stream: &str, id: i64, events: usize) -> Lines {
        self.stream(stream);
        let stream = self.streams.get_mut(stream).expect("it was opened");
        let mut lines = Lines::new();
        while lines.len() < events {
            if let Some(line) = stream.received.entry(id).or_default().pop_front() {
                lines.push(line);
                continue;
            }
            match stream.next_answer(PATIENCE).await {
                Ok(answer) => lines.extend(stream.take(&answer, &self.names)),
                Err(reason) => {
                    lines.push(reason);
                    break;
                }
            }
        }
        lines
    }
}

fn take_all(queue: &mut VecDeque<String>) -> Vec<String> {
    queue.drain(..).collect()
}

/// A watch stream, and what came on it that no step has asked for yet.
struct WatchStream {
    name: String,
    call: Call,
    /// Events, and ends of watches that nobody cancelled: by watch, because answers to different
    /// watches come in no defined order.
    received: BTreeMap<i64, VecDeque<String>>,
    /// For each watch the revision of its last event, while it may go on.
    open_revision: BTreeMap<i64, i64>,
}

impl WatchStream {
    fn new(name: &str, call: Call) -> WatchStream {
        WatchStream {
            name: name.to_owned(),
            call,
            received: BTreeMap::new(),
            open_revision: BTreeMap::new(),
        }
    }

    fn send(&self, request_union: Option<RequestUnion>) -> Result<(), String> {
        let requests = self.call.requests.as_ref().ok_or("the stream is closed")?;
        // When the server has ended the stream, the next read says so.
        let _ = requests.unbounded_send(WatchRequest { request_union });
        Ok(())
    }

    async fn next_answer(&mut self, patience: Duration) -> Result<WatchResponse, String> {
        match tokio::time::timeout(patience, self.call.answers.next()).await {
            Ok(Some(Ok(answer))) => Ok(answer),
            Ok(Some(Err(status))) => Err(print::refused(&self.name, &status).concat()),
            Ok(None) => Err(format!("{} ended", self.name)),
            Err(_) => Err(format!("nothing came on {}", self.name)),
        }
    }

    async fn answers_until(
        &mut self,
        names: &Names,
        patience: Duration,
        ours: impl Fn(&WatchResponse) -> bool,
    ) -> Lines {
        let mut lines = Lines::new();
        loop {
            match self.next_answer(patience).await {
                Ok(answer) => {
                    lines.extend(self.take(&answer, names));
                    if ours(&answer) {
                        return lines;
                    }
                }
                Err(reason) => {
                    lines.push(reason);
                    return lines;
                }
            }
        }
    }

    /// Keeps what is for a step to receive; prints any other answer.
    fn take(&mut self, answer: &WatchResponse, names: &Names) -> Option<String> {
        let id = answer.watch_id;
        let watch = format!("{}.{id}", self.name);
        if !answer.events.is_empty() {
            self.take_events(answer, names);
            return None;
        }
        let mut line = format!("{} {watch}", print::whole(&answer.header, names));
        for (said, word) in [
            (answer.created, " created"),
            (answer.canceled, " canceled"),
            (answer.fragment, " fragment"),
        ] {
            if said {
                line.push_str(word);
            }
        }
        if answer.compact_revision != 0 {
            let revision = names.revision(answer.compact_revision);
            line.push_str(&format!(" compact_revision={revision}"));
        }
        if !answer.cancel_reason.is_empty() {
            line.push_str(&format!(" {:?}", answer.cancel_reason));
        }
        if !answer.created && !answer.canceled {
            line.push_str(" progress");
        }
        let unasked = answer.canceled && !answer.created && answer.compact_revision != 0;
        if unasked {
            self.received.entry(id).or_default().push_back(line);
            return None;
        }
        Some(line)
    }

    fn take_events(&mut self, answer: &WatchResponse, names: &Names) {
        let id = answer.watch_id;
        let queue = self.received.entry(id).or_default();
        let revision =
            |event: &holdfast::pb::mvccpb::Event| event.kv.as_ref().map_or(0, |kv| kv.mod_revision);
        for (place, event) in answer.events.iter().enumerate() {
            let mut line = format!("{}.{id} {}", self.name, print::event(event, names));
            if place == 0 && self.open_revision.get(&id) == Some(&revision(event)) {
                line.push_str(" (in another answer)");
            }
            if place + 1 == answer.events.len() {
                self.open_revision.insert(id, revision(event));
                if answer.fragment {
                    line.push_str(" (fragment)");
                }
            }
            if answer.created || answer.canceled || answer.compact_revision != 0 {
                line.push_str(" (in an odd answer)");
            }
            queue.push_back(line);
        }
        let whole = print::whole(&answer.header, names);
        if whole.starts_with('(') {
            queue.push_back(whole);
        }
    }
}
