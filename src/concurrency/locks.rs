//! Plain locks as our own API sees them: who holds, who waits, and what may be done about it.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::Queues;
use super::client::{self, EnterFailure, Granted, Request};
use super::election::{children, in_queue};
use crate::machine::{AskRelease, Command, Force, ForcedRelease, QueueKey, Range, Release, Reply};
use crate::node::{Caller, Failure, Node};
use crate::types::{KeyRange, LeaseId, Timestamp};
use crate::watch::{Delivery, WatchSpec, WatchStream};

/// Waiters that are shown of one lock.
pub const WAITERS_SHOWN: usize = 1_000;
/// Waiters that are shown of each lock in a list.
const WAITERS_LISTED: usize = 16;
/// Releases by force that are shown of one lock.
const FORCED_SHOWN: usize = 16;
/// Queues that one call of a list looks at: keys of applications may look like queues.
const QUEUES_LOOKED_AT: usize = 10_000;
/// Locks that one watch may begin with.
const LOCKS_WATCHED: usize = 1_000;
/// A holder's stream gets this long to pass on that the lock is wanted.
const TOLD_PATIENCE: Duration = Duration::from_secs(2);

/// A lock as it is at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockState {
    pub name: Bytes,
    /// The first of them holds the lock if it is attached.
    pub queue: Vec<QueueKey>,
    /// Also those that are not shown.
    pub length: usize,
    /// The newest first.
    pub forced: Vec<ForcedRelease>,
    /// Cluster time.
    pub now: Timestamp,
}

impl LockState {
    pub fn holder(&self) -> Option<&QueueKey> {
        self.queue.first().filter(|key| key.attached)
    }

    /// The lock as this member has it.
    pub fn here(node: &Node, name: &Bytes, shown: usize) -> LockState {
        let machine = node.machine();
        let (queue, length) = machine.queue(name, 1 + shown);
        LockState { name: name.clone(), queue, length, forced: Vec::new(), now: machine.now() }
    }
}

pub async fn get(node: &Node, name: &Bytes) -> Result<LockState, Failure> {
    let now = node.read_time().await?;
    let mut state = LockState { now, ..LockState::here(node, name, WAITERS_SHOWN) };
    let machine = node.machine();
    let forced = machine.forced_releases().filter(|forced| forced.name == *name);
    state.forced = forced.take(FORCED_SHOWN).cloned().collect();
    Ok(state)
}

/// Locks whose names begin with `prefix` and come after `after`, at most `limit`; and where to go on
/// when there may be more.
pub async fn list(
    node: &Node,
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Result<(Vec<LockState>, Option<Bytes>), Failure> {
    let now = node.read_time().await?;
    let (names, next) = node.machine().queue_names(prefix, after, limit, QUEUES_LOOKED_AT);
    let state = |name| LockState { now, ..LockState::here(node, name, WAITERS_LISTED) };
    Ok((names.iter().map(state).collect(), next))
}

/// How long a call is content to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    Not,
    For(Duration),
    /// As long as the call lasts.
    Unbounded,
}

/// What stands before a call that does not have the lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotGranted {
    pub holder: Option<QueueKey>,
    /// How many.
    pub ahead: usize,
    /// Cluster time.
    pub now: Timestamp,
}

impl NotGranted {
    /// As this member has it: before the place with this token, or before a new one.
    pub fn here(node: &Node, name: &Bytes, token: Option<i64>) -> NotGranted {
        let machine = node.machine();
        let (mut queue, length) = machine.queue(name, 1);
        let ahead = token.and_then(|token| machine.queue_ahead(name, token)).unwrap_or(length);
        let holder = queue.pop().filter(|first| first.attached);
        NotGranted { holder, ahead, now: machine.now() }
    }
}

/// What keeps a call on `lease` from having the lock at once. Linearizable, and writes nothing: those
/// who only try are many where a lock is wanted.
pub async fn busy(
    node: &Node,
    name: &Bytes,
    lease: LeaseId,
) -> Result<Option<NotGranted>, EnterFailure> {
    node.read_barrier().await.map_err(EnterFailure::Failed)?;
    let first = node.machine().queue(name, 1).0.pop();
    let other = first.is_some_and(|first| {
        name_and_lease(first.record.key()).is_none_or(|(_, named)| named != lease)
    });
    Ok(other.then(|| NotGranted::here(node, name, None)))
}

/// Takes a lock for a call of our own API, or tells who has it.
pub async fn acquire(
    queues: &Queues,
    mut request: Request,
    wait: Wait,
) -> Result<Result<Granted, NotGranted>, EnterFailure> {
    let (node, name) = (&queues.node, request.name.clone());
    if wait == Wait::Not
        && let Some(busy) = busy(node, &name, request.lease).await?
    {
        return Ok(Err(busy));
    }
    let (joined, mut joining) = oneshot::channel();
    if let Some(own) = &mut request.own {
        own.only_if_free = wait == Wait::Not;
        own.joined = Some(joined);
    }
    let entering = client::enter(queues, request);
    let entered = match wait {
        Wait::For(patience) => tokio::time::timeout(patience, entering).await,
        Wait::Not | Wait::Unbounded => Ok(entering.await),
    };
    match entered {
        Ok(Ok(granted)) => Ok(Ok(granted)),
        Ok(Err(EnterFailure::Busy)) => Ok(Err(NotGranted::here(node, &name, None))),
        Ok(Err(failure)) => Err(failure),
        // The call was dropped, which undoes it.
        Err(_) => {
            let token = joining.try_recv().ok().map(|joined| joined.create_revision);
            Ok(Err(NotGranted::here(node, &name, token)))
        }
    }
}

/// What a token is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Current,
    Stale,
    Future,
    Unknown,
}

pub async fn check(node: &Node, name: &Bytes, token: i64) -> Result<Standing, Failure> {
    node.read_barrier().await?;
    let (first, waits, view) = {
        let machine = node.machine();
        let first = machine.queue(name, 1).0.pop();
        (first, machine.queue_ahead(name, token).is_some(), machine.store().view())
    };
    if let Some(first) = first {
        let create_revision = first.record.create_revision();
        if create_revision == token {
            // A first key without its lease owns nothing, and never will again.
            return Ok(if first.attached { Standing::Current } else { Standing::Stale });
        }
        if create_revision > token {
            return Ok(Standing::Stale);
        }
    }
    if waits || token > view.revision() {
        return Ok(Standing::Future);
    }
    // It is no one's now. Whether it ever was, the history tells as far as it goes.
    let made_then = Range {
        revision: token,
        min_create_revision: token,
        max_create_revision: token,
        ..Range::all(children(name))
    };
    let was = view
        .range(&made_then)
        .is_ok_and(|reply| reply.records.iter().any(|record| in_queue(name, record.key())));
    Ok(if was { Standing::Stale } else { Standing::Unknown })
}

/// Gives up the place with this token. Returns whether there was one.
pub async fn release(
    node: &Node,
    caller: Caller,
    name: Bytes,
    token: i64,
    forced: Option<Force>,
) -> Result<bool, Failure> {
    let release = Command::Release(Release { name, token, forced });
    match node.propose_for(caller, release).await?.reply {
        Reply::Left(left) => Ok(left),
        other => unreachable!("a release was answered with {other:?}"),
    }
}

/// A holder that was asked to give its lock up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AskedHolder {
    pub token: i64,
    /// Whether a stream of its has passed that on, or it is gone already.
    pub told: bool,
    /// `None` when it is gone.
    pub holder: Option<QueueKey>,
}

/// Asks the holder to give the lock up; `None` when nobody holds it with this token.
pub async fn ask_release(
    node: &Node,
    caller: Caller,
    ask: AskRelease,
) -> Result<Option<AskedHolder>, Failure> {
    let name = ask.name.clone();
    let asked = node.propose_for(caller, Command::AskRelease(ask)).await?.reply;
    let Reply::Asked(asked) = asked else {
        unreachable!("a wish is answered with whom it reached")
    };
    let Some((key, token)) = asked else { return Ok(None) };
    let mut waiter = node.waiters().listen(key);
    let deadline = tokio::time::Instant::now() + TOLD_PATIENCE;
    loop {
        waiter.news.borrow_and_update();
        let first = node.machine().queue(&name, 1).0.pop();
        let Some(holder) = first.filter(|it| it.record.create_revision() == token) else {
            return Ok(Some(AskedHolder { token, told: true, holder: None }));
        };
        let asked = holder.label.as_ref().and_then(|label| label.asked.as_ref());
        let (pends, told) = (asked.is_some_and(|it| !it.told), asked.is_some_and(|it| it.told));
        if !pends || tokio::time::timeout_at(deadline, waiter.news.changed()).await.is_err() {
            return Ok(Some(AskedHolder { token, told, holder: Some(holder) }));
        }
    }
}

/// Which locks a watch is about.
#[derive(Debug, Clone)]
pub enum Scope {
    Name(Bytes),
    Prefix(Bytes),
}

impl Scope {
    /// The keys that it is about.
    pub fn range(&self) -> KeyRange {
        match self {
            Scope::Name(name) => children(name),
            Scope::Prefix(prefix) => KeyRange::prefix(prefix),
        }
    }

    fn contains(&self, name: &[u8]) -> bool {
        match self {
            Scope::Name(wanted) => wanted == name,
            Scope::Prefix(prefix) => name.starts_with(prefix),
        }
    }
}

/// Follows locks: their present state first, then each that has changed, as it is when told.
pub struct LockWatch {
    scope: Scope,
    watch: WatchStream,
    pending: VecDeque<LockState>,
    /// Locks that were told with somebody in their queue.
    known: BTreeSet<Bytes>,
}

/// Why a watch cannot begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchFailure {
    TooManyLocks(usize),
    Failed(Failure),
}

impl LockWatch {
    pub async fn begin(node: &Node, scope: Scope) -> Result<LockWatch, WatchFailure> {
        let failed = WatchFailure::Failed;
        let now = node.read_time().await.map_err(failed)?;
        let (names, revision) = {
            let machine = node.machine();
            let names = match &scope {
                Scope::Name(name) => vec![name.clone()],
                Scope::Prefix(prefix) => {
                    let (names, next) =
                        machine.queue_names(prefix, None, LOCKS_WATCHED, 10 * QUEUES_LOOKED_AT);
                    if next.is_some() {
                        return Err(WatchFailure::TooManyLocks(LOCKS_WATCHED));
                    }
                    names
                }
            };
            (names, machine.store().revision())
        };
        let mut watch = node.hub().stream(Duration::from_secs(600));
        let spec = WatchSpec::new(scope.range(), revision + 1);
        watch.create(spec).map_err(|_| failed(Failure::TooManyRequests))?;
        let state = |name| LockState { now, ..LockState::here(node, name, WAITERS_SHOWN) };
        let pending = names.iter().map(state).collect();
        Ok(LockWatch { scope, watch, pending, known: names.into_iter().collect() })
    }

    /// Whether everything that was there at the beginning has been told.
    pub fn is_synced(&self) -> bool {
        self.pending.is_empty()
    }

    /// The next lock to tell of.
    pub async fn next(&mut self, node: &Node) -> Result<LockState, WatchFailure> {
        loop {
            if let Some(state) = self.pending.pop_front() {
                return Ok(state);
            }
            match self.watch.next().await {
                Delivery::Events { events, .. } => {
                    let names: BTreeSet<Bytes> = events
                        .iter()
                        .filter_map(|event| name_and_lease(event.record.key()))
                        .map(|(name, _)| name)
                        .filter(|name| self.scope.contains(name))
                        .collect();
                    for name in names {
                        let (is_lock, known) =
                            (node.machine().is_lock(&name), self.known.contains(&name));
                        if !is_lock && !known {
                            continue;
                        }
                        if is_lock {
                            self.known.insert(name.clone());
                        } else {
                            self.known.remove(&name);
                        }
                        self.pending.push_back(LockState::here(node, &name, WAITERS_SHOWN));
                    }
                }
                // What it was about to read is compacted. The present will do, also for those that
                // are gone by now.
                Delivery::Compacted { .. } => {
                    let begun = LockWatch::begin(node, self.scope.clone()).await?;
                    let gone: Vec<Bytes> = self.known.difference(&begun.known).cloned().collect();
                    let gone = gone.iter().map(|name| LockState::here(node, name, WAITERS_SHOWN));
                    let mut begun = begun;
                    begun.pending.extend(gone);
                    *self = begun;
                }
                Delivery::Progress { .. } => {}
            }
        }
    }
}

/// The lock in whose queue a key of this form stands, and the lease it names.
fn name_and_lease(key: &[u8]) -> Option<(Bytes, LeaseId)> {
    let slash = key.iter().rposition(|byte| *byte == b'/')?;
    Some((Bytes::copy_from_slice(&key[..slash]), LeaseId::from_hex(&key[slash + 1..])?))
}
