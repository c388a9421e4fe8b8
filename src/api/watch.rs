//! etcd's Watch service: its stream protocol in front of [`crate::watch`].
//!
//! A call is one [`Session`]: a stream of answers that, when polled, takes the next request, the
//! next delivery, or the loss of the leader. Nothing is read or fetched while the client takes no
//! answers, so a client that never reads holds one answer and its bounded queue.

use std::collections::{BTreeSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt, TryStreamExt};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream as Changes;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::api::packed_events::PackedEvents;
use crate::api::status::Refusal;
use crate::machine::{Event, Store};
use crate::node::Failure;
use crate::pb::etcdserverpb::watch_create_request::FilterType;
use crate::pb::etcdserverpb::watch_request::RequestUnion;
use crate::pb::etcdserverpb::watch_server::Watch;
use crate::pb::etcdserverpb::{ResponseHeader, WatchCreateRequest, WatchRequest, WatchResponse};
use crate::types::KeyRange;
use crate::watch::{Delivery, Hub, Refused, WatchSpec, WatchStream};

/// Where one answer ends and the next begins, when many events wait: several gRPC libraries refuse
/// messages above 4 MiB by default. A single revision may be larger.
const RESPONSE_BYTES: usize = 1 << 20;

/// What `--max-request-bytes` is raised by to bound a fragment, as it is to bound a message.
const FRAGMENT_EXTRA_BYTES: usize = 512 << 10;

/// The `watch_id` of an answer that is for no watch: a refused creation, progress of the stream.
const NO_WATCH: i64 = -1;

/// Whether the caller that sent this metadata may watch this range; the error tells why not.
pub type Authorize = dyn Fn(&MetadataMap, &KeyRange) -> Result<(), Status> + Send + Sync;

/// Returns when the member knows the caller that sent this metadata, or has waited long enough.
pub type Arrive = dyn Fn(&MetadataMap) -> BoxFuture<'static, ()> + Send + Sync;

/// The gRPC service. Clones share everything.
#[derive(Clone)]
pub struct WatchService {
    pub hub: Hub,
    pub store: Store,
    /// The header of an answer that shows this revision.
    pub header: Arc<dyn Fn(i64) -> ResponseHeader + Send + Sync>,
    /// Asked for each watch at its creation, never again.
    pub authorize: Arc<Authorize>,
    /// Waited for once, when a stream begins.
    pub arrive: Arc<Arrive>,
    /// Whether the member knows a leader. When the sender is dropped, the member has stopped, and
    /// streams end.
    pub has_leader: watch::Receiver<bool>,
    pub max_request_bytes: usize,
    pub packed_events: Arc<PackedEvents>,
    /// How often an idle watch with `progress_notify` hears of its progress.
    pub progress_interval: Duration,
}

/// The answers to one call.
pub type Responses = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Watch for WatchService {
    type WatchStream = Responses;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let (metadata, _, requests) = request.into_parts();
        (self.arrive)(&metadata).await;
        Ok(Response::new(self.answer(metadata, requests)))
    }
}

impl WatchService {
    /// Serves one call, whatever carries it. The answers go on after `requests` ends, until the
    /// caller drops them, a request is broken, or the member cannot go on.
    pub fn serve<S>(&self, metadata: MetadataMap, requests: S) -> Responses
    where
        S: Stream<Item = Result<WatchRequest, Status>> + Send + Unpin + 'static,
    {
        Box::pin(self.answer(metadata, requests).map_ok(WatchResponse::unpacked))
    }

    /// As [`WatchService::serve`]; the events of the answers are packed, for protobuf.
    fn answer<S>(&self, metadata: MetadataMap, requests: S) -> Responses
    where
        S: Stream<Item = Result<WatchRequest, Status>> + Send + Unpin + 'static,
    {
        // Boxed, because it moves with every answer.
        let session = Box::new(Session {
            needs_leader: metadata.get("hasleader").is_some_and(|value| value == "true"),
            metadata,
            requests: Some(requests),
            watches: self.hub.stream(self.progress_interval),
            has_leader: self.has_leader.clone(),
            leader_changes: Changes::from_changes(self.has_leader.clone()),
            service: self.clone(),
            fragmented: BTreeSet::new(),
            answers: VecDeque::new(),
        });
        Box::pin(futures::stream::unfold(Some(session), |session| async move {
            let mut session = session?;
            match session.next().await {
                Ok(response) => Some((Ok(response), Some(session))),
                Err(status) => Some((Err(status), None)),
            }
        }))
    }
}

struct Session<S> {
    service: WatchService,
    metadata: MetadataMap,
    needs_leader: bool,
    has_leader: watch::Receiver<bool>,
    /// Waits across answers: to begin anew each time costs more than some answers.
    leader_changes: Changes<bool>,
    /// `None` after the client has half-closed.
    requests: Option<S>,
    watches: WatchStream,
    /// The watches that take large revisions in pieces.
    fragmented: BTreeSet<i64>,
    /// Made but not sent yet: of one request or one delivery.
    answers: VecDeque<WatchResponse>,
}

impl<S> Session<S>
where
    S: Stream<Item = Result<WatchRequest, Status>> + Unpin,
{
    /// The next answer. An error ends the stream.
    async fn next(&mut self) -> Result<WatchResponse, Status> {
        loop {
            self.check_leader()?;
            if let Some(answer) = self.answers.pop_front() {
                return Ok(answer);
            }
            // Requests first: a cancel must get through however many events there are.
            tokio::select! {
                biased;
                request = next_request(&mut self.requests) => match request {
                    Some(request) => self.take_request(request?),
                    None => self.requests = None,
                },
                delivery = self.watches.next() => self.take_delivery(delivery),
                // The reason to look again; what has changed is found at the top.
                _ = self.leader_changes.next() => {}
            }
        }
    }

    fn check_leader(&mut self) -> Result<(), Status> {
        if self.has_leader.has_changed().is_err() {
            return Err(Failure::Stopping.into());
        }
        if self.needs_leader && !*self.has_leader.borrow() {
            return Err(Refusal::NoLeader.into());
        }
        Ok(())
    }

    fn take_request(&mut self, request: WatchRequest) {
        match request.request_union {
            None => {}
            Some(RequestUnion::CreateRequest(request)) => {
                let answer = self.create(request);
                self.answers.push_back(answer);
            }
            Some(RequestUnion::CancelRequest(request)) => self.cancel(request.watch_id),
            Some(RequestUnion::ProgressRequest(_)) => self.watches.request_progress(),
        }
    }

    fn create(&mut self, request: WatchCreateRequest) -> WatchResponse {
        let fragment = request.fragment;
        let spec = spec(request);
        if let Err(status) = (self.service.authorize)(&self.metadata, &spec.range) {
            // As a Go program prints a status: its names of the codes are ours.
            let reason =
                format!("rpc error: code = {:?} desc = {}", status.code(), status.message());
            return self.refusal(reason);
        }
        match self.watches.create(spec) {
            Ok(created) => {
                if fragment {
                    self.fragmented.insert(created.id);
                }
                WatchResponse {
                    header: self.header(created.revision),
                    watch_id: created.id,
                    created: true,
                    ..WatchResponse::default()
                }
            }
            Err(refused) => self.refusal(reason(refused).to_owned()),
        }
    }

    /// An id that no watch has gets no answer.
    fn cancel(&mut self, id: i64) {
        if self.watches.cancel(id) {
            self.fragmented.remove(&id);
            self.answers.push_back(WatchResponse {
                header: self.header(self.service.store.revision()),
                watch_id: id,
                canceled: true,
                ..WatchResponse::default()
            });
        }
    }

    fn refusal(&self, cancel_reason: String) -> WatchResponse {
        WatchResponse {
            header: self.header(self.service.store.revision()),
            watch_id: NO_WATCH,
            created: true,
            canceled: true,
            cancel_reason,
            ..WatchResponse::default()
        }
    }

    fn take_delivery(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Events { id, events } => self.answer_events(id, &events),
            Delivery::Compacted { id, compacted } => {
                self.fragmented.remove(&id);
                self.answers.push_back(WatchResponse {
                    header: self.header(0),
                    watch_id: id,
                    canceled: true,
                    compact_revision: compacted,
                    ..WatchResponse::default()
                });
            }
            Delivery::Progress { id, revision } => self.answers.push_back(WatchResponse {
                header: self.header(revision),
                watch_id: id.unwrap_or(NO_WATCH),
                ..WatchResponse::default()
            }),
        }
    }

    /// Packs events into answers, each with whole revisions unless the watch takes fragments. The
    /// header of an answer shows the revision of its last event.
    fn answer_events(&mut self, id: i64, events: &[Event]) {
        let fragment_bytes = self
            .fragmented
            .contains(&id)
            .then(|| self.service.max_request_bytes + FRAGMENT_EXTRA_BYTES);
        let mut packed = self.service.packed_events.pack(events).into_iter();
        let mut answer = Packed::default();
        let mut last_revision = 0;
        for revision in events.chunk_by(|a, b| main_revision(a) == main_revision(b)) {
            let addition: Packed = packed.by_ref().take(revision.len()).collect();
            if answer.bytes > 0 && answer.bytes + addition.bytes > RESPONSE_BYTES {
                let answer = std::mem::take(&mut answer);
                self.answer_packed(id, last_revision, answer, fragment_bytes);
            }
            answer.append(addition);
            last_revision = main_revision(&revision[0]);
        }
        self.answer_packed(id, last_revision, answer, fragment_bytes);
    }

    fn answer_packed(
        &mut self,
        id: i64,
        revision: i64,
        packed: Packed,
        fragment_bytes: Option<usize>,
    ) {
        let header = self.header(revision);
        let mut pieces = match fragment_bytes {
            Some(limit) if packed.bytes > limit => packed.cut(limit),
            _ => vec![packed.events],
        };
        let last = pieces.pop();
        let answer = |packed, fragment| WatchResponse {
            header,
            watch_id: id,
            fragment,
            packed,
            ..WatchResponse::default()
        };
        self.answers.extend(pieces.into_iter().map(|events| answer(events, true)));
        self.answers.extend(last.map(|events| answer(events, false)));
    }

    fn header(&self, revision: i64) -> Option<ResponseHeader> {
        Some((self.service.header)(revision))
    }
}

/// Pends for ever once the client has half-closed.
async fn next_request<S>(requests: &mut Option<S>) -> Option<Result<WatchRequest, Status>>
where
    S: Stream<Item = Result<WatchRequest, Status>> + Unpin,
{
    match requests {
        Some(requests) => requests.next().await,
        None => std::future::pending().await,
    }
}

/// Encoded events and what they take in a message.
#[derive(Default)]
struct Packed {
    events: Vec<Bytes>,
    bytes: usize,
}

impl FromIterator<Bytes> for Packed {
    fn from_iter<I: IntoIterator<Item = Bytes>>(events: I) -> Packed {
        let events: Vec<Bytes> = events.into_iter().collect();
        let bytes = events.iter().map(Bytes::len).sum();
        Packed { events, bytes }
    }
}

impl Packed {
    fn append(&mut self, mut other: Packed) {
        if self.events.is_empty() {
            *self = other;
        } else {
            self.bytes += other.bytes;
            self.events.append(&mut other.events);
        }
    }

    /// Cuts into pieces of at most `limit` bytes, or of one event that is larger.
    fn cut(self, limit: usize) -> Vec<Vec<Bytes>> {
        let mut pieces = vec![Vec::new()];
        let mut bytes = 0;
        for event in self.events {
            if bytes > 0 && bytes + event.len() > limit {
                pieces.push(Vec::new());
                bytes = 0;
            }
            bytes += event.len();
            pieces.last_mut().expect("there is always one").push(event);
        }
        pieces
    }
}

fn spec(request: WatchCreateRequest) -> WatchSpec {
    let has = |filter: FilterType| request.filters.contains(&(filter as i32));
    let (no_put, no_delete) = (has(FilterType::Noput), has(FilterType::Nodelete));
    let key = if request.key.is_empty() { Bytes::from_static(&[0]) } else { request.key };
    WatchSpec {
        id: (request.watch_id != 0).then_some(request.watch_id),
        range: own(KeyRange::from_wire(key, request.range_end)),
        start_revision: request.start_revision,
        prev_kv: request.prev_kv,
        no_put,
        no_delete,
        progress_notify: request.progress_notify,
    }
}

/// The range in buffers of its own size: it lives as long as the watch, and must not keep the
/// connection's receive buffer.
fn own(range: KeyRange) -> KeyRange {
    let copy = |bytes: Bytes| Bytes::copy_from_slice(&bytes);
    match range {
        KeyRange::One(key) => KeyRange::One(copy(key)),
        KeyRange::Span { start, end } => KeyRange::Span { start: copy(start), end: copy(end) },
        KeyRange::From(start) => KeyRange::From(copy(start)),
    }
}

/// The words etcd's clients know.
fn reason(refused: Refused) -> &'static str {
    match refused {
        Refused::NegativeStart => "etcdserver: mvcc: required revision has been compacted",
        Refused::EmptyRange => "mvcc: watcher range is empty",
        Refused::DuplicateId => "mvcc: duplicate watch ID provided on the WatchStream",
        Refused::TooMany => "etcdserver: too many requests",
    }
}

fn main_revision(event: &Event) -> i64 {
    event.record.mod_revision().main
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
