//! The service Locks of `holdfast.v1`: plain locks for our own clients.
//!
//! [`convert`] turns what is known of a lock into messages. Codes are the ones that fit, other than
//! on etcd's services; the texts stand in [`super::status`].

pub(super) mod convert;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::concurrency::Queues;
use crate::concurrency::client::{self, Own, SESSION_TTL_SECONDS};
use crate::concurrency::hold::{self, Ask, TELLS_WAITING};
use crate::concurrency::locks::{self, LockState, LockWatch, Scope, Wait};
use crate::machine::{AskRelease, Force, Right};
use crate::node::{Caller, Node, told};
use crate::pb::holdfastpb as pb;
use crate::pb::holdfastpb::hold_request::Request as HoldAsk;
use crate::pb::holdfastpb::locks_server::Locks;
use crate::types::{KeyRange, LeaseId};

use super::callers;
use super::connection::Connection;
use super::status::{self, LockRefusal};

use self::convert::{Moment, header};

/// The longest label, and what else a client may have kept about itself.
const MAX_TEXT_BYTES: usize = 256;
/// The longest TTL, as for any lease.
const MAX_TTL_SECONDS: i64 = 9_000_000_000;
/// Locks in one answer of List.
const LIST_DEFAULT: usize = 100;
const LIST_MAX: usize = 1_000;
/// Hold and Watch streams at a time on one member; one more is refused.
const MAX_STREAMS: usize = 100_000;
/// How long a new Hold stream may take to say what it wants.
const OPEN_PATIENCE: Duration = Duration::from_secs(10);

pub struct LocksService {
    queues: Queues,
    streams: Arc<AtomicUsize>,
}

impl LocksService {
    pub fn new(queues: Queues) -> LocksService {
        LocksService { queues, streams: Arc::default() }
    }

    fn stream(&self) -> Result<StreamPermit, Status> {
        let permit = StreamPermit(self.streams.clone());
        if permit.0.fetch_add(1, Ordering::Relaxed) >= MAX_STREAMS {
            return Err(LockRefusal::TooManyStreams(MAX_STREAMS).into());
        }
        Ok(permit)
    }

    fn moment(&self) -> Moment<'_> {
        Moment { node: &self.queues.node }
    }
}

/// A stream's share of [`MAX_STREAMS`].
struct StreamPermit(Arc<AtomicUsize>);

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) async fn caller(node: &Node, metadata: &MetadataMap) -> Result<Caller, Status> {
    callers::caller(node, metadata).await.map_err(status::of_own)
}

/// A caller that may see the queue `name`.
pub(super) async fn reader(
    node: &Node,
    metadata: &MetadataMap,
    name: &[u8],
) -> Result<Caller, Status> {
    let caller = callers::up_to_date(node, metadata).await.map_err(status::of_own)?;
    let access = caller.access().map_err(status::of_own)?;
    access.queue(Right::Read, name).map_err(|it| status::of_own(it.into()))?;
    Ok(caller)
}

/// A caller that may see all queues whose keys are in `range`.
async fn reader_of(
    node: &Node,
    metadata: &MetadataMap,
    range: &KeyRange,
) -> Result<Caller, Status> {
    let caller = callers::up_to_date(node, metadata).await.map_err(status::of_own)?;
    let access = caller.access().map_err(status::of_own)?;
    access.range(Right::Read, range).map_err(|it| status::of_own(it.into()))?;
    Ok(caller)
}

pub(super) fn unchanged(node: &Node, caller: &Caller) -> Result<(), Status> {
    node.check_unchanged(caller).map_err(status::of_own)
}

pub(super) fn checked_name(name: Bytes) -> Result<Bytes, Status> {
    if name.is_empty() { Err(LockRefusal::EmptyName.into()) } else { Ok(name) }
}

fn checked_text(what: &'static str, text: String) -> Result<String, Status> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(LockRefusal::TextTooLong { what, most: MAX_TEXT_BYTES }.into());
    }
    Ok(text)
}

pub(super) fn checked_token(token: i64) -> Result<i64, Status> {
    if token > 0 { Ok(token) } else { Err(LockRefusal::NoToken.into()) }
}

fn checked_ttl(ttl_seconds: i64) -> Result<i64, Status> {
    match ttl_seconds {
        0 => Ok(SESSION_TTL_SECONDS),
        1..=MAX_TTL_SECONDS => Ok(ttl_seconds),
        _ => Err(LockRefusal::Ttl { most: MAX_TTL_SECONDS }.into()),
    }
}

/// What a call that waits for its answer says of itself.
pub(super) fn own(owner: String, client: String, ttl_seconds: i64) -> Result<Own, Status> {
    Ok(Own {
        owner: checked_text("owner", owner)?,
        client,
        ttl_seconds: checked_ttl(ttl_seconds)?,
        only_if_free: false,
        renew: false,
        joined: None,
    })
}

pub(super) fn wait_of(wait_ms: Option<i64>) -> Wait {
    match wait_ms {
        Some(0) => Wait::Not,
        Some(ms) if ms > 0 => Wait::For(Duration::from_millis(ms.unsigned_abs())),
        _ => Wait::Unbounded,
    }
}

#[tonic::async_trait]
impl Locks for LocksService {
    async fn acquire(
        &self,
        request: Request<pb::AcquireRequest>,
    ) -> Result<Response<pb::AcquireResponse>, Status> {
        let client = Connection::of(request.extensions()).peer_text();
        let (metadata, _, request) = request.into_parts();
        let own = own(request.owner, client, request.ttl_seconds)?;
        let name = checked_name(request.name)?;
        let enter = client::Request {
            // One that only tries may be answered without a proposal.
            caller: reader(&self.queues.node, &metadata, &name).await?,
            name,
            lease: LeaseId(request.lease),
            value: Bytes::new(),
            rewrite: false,
            keep_while: None,
            own: Some(own),
        };
        let acquired = locks::acquire(&self.queues, enter, wait_of(request.wait_ms)).await;
        let moment = self.moment();
        Ok(Response::new(match acquired.map_err(status::of_lock)? {
            Ok(granted) => pb::AcquireResponse {
                header: header(moment.node, granted.revision),
                granted: true,
                token: granted.create_revision,
                key: granted.key,
                lease: granted.lease.0,
                ttl_seconds: granted.lease_ttl_seconds,
                holder: None,
                position: 0,
            },
            Err(not) => pb::AcquireResponse {
                header: moment.header(),
                granted: false,
                holder: not.holder.as_ref().map(|holder| moment.place(holder, 0, not.now)),
                position: convert::count(not.ahead),
                ..Default::default()
            },
        }))
    }

    async fn release(
        &self,
        request: Request<pb::ReleaseRequest>,
    ) -> Result<Response<pb::ReleaseResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let (name, token) = (checked_name(request.name)?, checked_token(request.token)?);
        let caller = caller(&self.queues.node, &metadata).await?;
        let released = locks::release(&self.queues.node, caller, name, token, None).await;
        let released = released.map_err(status::of_own)?;
        Ok(Response::new(pb::ReleaseResponse { header: self.moment().header(), released }))
    }

    type HoldStream = BoxStream<'static, Result<pb::HoldResponse, Status>>;

    async fn hold(
        &self,
        request: Request<Streaming<pb::HoldRequest>>,
    ) -> Result<Response<Self::HoldStream>, Status> {
        let permit = self.stream()?;
        let client = Connection::of(request.extensions()).peer_text();
        let (metadata, _, mut requests) = request.into_parts();
        let (tells, told) = mpsc::channel(TELLS_WAITING);
        let (failed, failure) = tokio::sync::oneshot::channel();
        let queues = self.queues.clone();
        self.queues.node.background().spawn(async move {
            let _permit = permit;
            let opening = opening(&queues.node, &metadata, &mut requests, client);
            let open = tokio::select! {
                open = tokio::time::timeout(OPEN_PATIENCE, opening) => {
                    open.unwrap_or_else(|_| Err(LockRefusal::NotOpened.into()))
                }
                () = tells.closed() => return,
            };
            let done = match open {
                Ok(open) => {
                    let asks = requests.filter_map(|request| async move { ask(request) }).boxed();
                    hold::run(queues, open, asks, tells).await.map_err(status::of_lock)
                }
                Err(refused) => Err(refused),
            };
            if let Err(status) = done {
                // The caller may be gone.
                let _ = failed.send(status);
            }
        });
        let node = self.queues.node.clone();
        let answers = ReceiverStream::new(told)
            .map(move |tell| Ok(Moment { node: &node }.hold_response(tell)))
            .chain(futures::stream::once(failure).filter_map(|failure| async move {
                // Without one the stream has ended well.
                failure.ok().map(Err)
            }));
        Ok(Response::new(answers.boxed()))
    }

    async fn check(
        &self,
        request: Request<pb::CheckRequest>,
    ) -> Result<Response<pb::CheckResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let (name, token) = (checked_name(request.name)?, checked_token(request.token)?);
        let caller = reader(&self.queues.node, &metadata, &name).await?;
        let standing = locks::check(&self.queues.node, &name, token).await;
        let standing = convert::standing(standing.map_err(status::of_own)?);
        unchanged(&self.queues.node, &caller)?;
        Ok(Response::new(pb::CheckResponse { header: self.moment().header(), standing }))
    }

    async fn list(
        &self,
        request: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let range = KeyRange::prefix(&request.prefix);
        let caller = reader_of(&self.queues.node, &metadata, &range).await?;
        let limit = match usize::try_from(request.limit) {
            Ok(0) | Err(_) => LIST_DEFAULT,
            Ok(limit) => limit.min(LIST_MAX),
        };
        let after = (!request.after.is_empty()).then_some(&request.after[..]);
        let listed = locks::list(&self.queues.node, &request.prefix, after, limit).await;
        let (states, next) = listed.map_err(status::of_own)?;
        unchanged(&self.queues.node, &caller)?;
        let moment = self.moment();
        Ok(Response::new(pb::ListResponse {
            header: moment.header(),
            locks: states.iter().map(|state| moment.lock(state)).collect(),
            next: next.unwrap_or_default(),
        }))
    }

    async fn get(
        &self,
        request: Request<pb::GetRequest>,
    ) -> Result<Response<pb::GetResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let name = checked_name(request.name)?;
        let caller = reader(&self.queues.node, &metadata, &name).await?;
        let state = locks::get(&self.queues.node, &name).await.map_err(status::of_own)?;
        unchanged(&self.queues.node, &caller)?;
        let moment = self.moment();
        let lock = Some(moment.lock(&state));
        Ok(Response::new(pb::GetResponse { header: moment.header(), lock }))
    }

    type WatchStream = BoxStream<'static, Result<pb::WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let permit = self.stream()?;
        let (metadata, _, request) = request.into_parts();
        let scope = match request.prefix {
            true => Scope::Prefix(request.name),
            false => Scope::Name(checked_name(request.name)?),
        };
        let node = self.queues.node.clone();
        let caller = reader_of(&node, &metadata, &scope.range()).await?;
        let watch = LockWatch::begin(&node, scope).await.map_err(status::of_lock_watch)?;
        unchanged(&node, &caller)?;
        let watching = Watching { watch, said_synced: false, failed: false, _permit: permit };
        let answers = futures::stream::unfold(watching, move |mut watching| {
            let node = node.clone();
            async move {
                if watching.failed {
                    return None;
                }
                let moment = Moment { node: &node };
                let synced = watching.watch.is_synced();
                if synced && !watching.said_synced {
                    watching.said_synced = true;
                    let header = moment.header();
                    let told = pb::WatchResponse { header, lock: None, synced: true };
                    return Some((Ok(told), watching));
                }
                let mut stopping = node.stopping();
                let next = tokio::select! {
                    next = watching.watch.next(&node) => next.map_err(status::of_lock_watch),
                    () = told(&mut stopping) => Err(LockRefusal::Stopping.into()),
                };
                watching.failed = next.is_err();
                let answer = next.map(|state: LockState| {
                    let lock = Some(moment.lock(&state));
                    pb::WatchResponse { header: moment.header(), lock, synced: false }
                });
                Some((answer, watching))
            }
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn request_release(
        &self,
        request: Request<pb::RequestReleaseRequest>,
    ) -> Result<Response<pb::RequestReleaseResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let ask = AskRelease {
            name: checked_name(request.name)?,
            token: if request.token == 0 { 0 } else { checked_token(request.token)? },
            by: checked_text("by", request.by)?,
            reason: checked_text("reason", request.reason)?,
        };
        let token = ask.token;
        let caller = caller(&self.queues.node, &metadata).await?;
        let asked = locks::ask_release(&self.queues.node, caller, ask).await;
        let asked = asked.map_err(status::of_own)?;
        let Some(asked) = asked else {
            let refusal = if token == 0 { LockRefusal::NotHeld } else { LockRefusal::StaleToken };
            return Err(refusal.into());
        };
        let moment = self.moment();
        let now = self.queues.node.machine().now();
        Ok(Response::new(pb::RequestReleaseResponse {
            header: moment.header(),
            token: asked.token,
            told: asked.told,
            holder: asked.holder.as_ref().map(|holder| moment.place(holder, 0, now)),
        }))
    }

    async fn force_release(
        &self,
        request: Request<pb::ForceReleaseRequest>,
    ) -> Result<Response<pb::ForceReleaseResponse>, Status> {
        let client = Connection::of(request.extensions()).peer_text();
        let (metadata, _, request) = request.into_parts();
        let (name, token) = (checked_name(request.name)?, checked_token(request.token)?);
        if request.reason.is_empty() {
            return Err(LockRefusal::NoReason.into());
        }
        let force = Force {
            by: checked_text("by", request.by)?,
            reason: checked_text("reason", request.reason)?,
        };
        let node = &self.queues.node;
        let caller = caller(node, &metadata).await?;
        let user = caller.user().unwrap_or_default().to_owned();
        let released = locks::release(node, caller, name.clone(), token, Some(force.clone())).await;
        if !released.map_err(status::of_own)? {
            return Err(LockRefusal::StaleToken.into());
        }
        // Named so because the log hides the values of fields that are called tokens.
        let fence = token;
        tracing::warn!(
            lock = %name.escape_ascii(), fence, by = force.by, reason = force.reason, client, user,
            "a lock was released by force"
        );
        Ok(Response::new(pb::ForceReleaseResponse { header: self.moment().header() }))
    }
}

/// A Watch stream between two messages.
struct Watching {
    watch: LockWatch,
    said_synced: bool,
    failed: bool,
    _permit: StreamPermit,
}

/// The first message of a Hold stream.
async fn opening(
    node: &Node,
    metadata: &MetadataMap,
    requests: &mut Streaming<pb::HoldRequest>,
    client: String,
) -> Result<hold::Open, Status> {
    let first = requests.message().await.map_err(status::of_stream)?;
    let Some(HoldAsk::Open(open)) = first.and_then(|first| first.request) else {
        return Err(LockRefusal::NotOpened.into());
    };
    let name = checked_name(open.name)?;
    Ok(hold::Open {
        caller: reader(node, metadata, &name).await?,
        name,
        lease: LeaseId(open.lease),
        ttl_seconds: checked_ttl(open.ttl_seconds)?,
        owner: checked_text("owner", open.owner)?,
        client,
        wait: wait_of(open.wait_ms),
    })
}

/// What a later message asks. One that asks nothing we know is passed over, and so is the end of a
/// broken stream: that shows on the side of the answers.
fn ask(request: Result<pb::HoldRequest, Status>) -> Option<Ask> {
    match request.ok()?.request? {
        HoldAsk::Ping(ping) => Some(Ask::Ping(ping.id)),
        HoldAsk::Release(_) => Some(Ask::Release),
        HoldAsk::Open(_) => None,
    }
}
