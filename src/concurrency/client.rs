//! A Lock or Campaign call on the member that the client asked.
//!
//! The call joins the queue with one proposal, whose outcome this member learns for certain, and
//! if others stand before it, waits on the leader until they are gone. When the leader changes,
//! the new one is asked to wait: the key is in the replicated queue and keeps its place.
//!
//! The call runs in a task of its own, which outlives the client: only the task knows what the call
//! has made, so the task alone can undo it when the client goes away.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::Queues;
use super::rules::{ServerLeases, UnlockRule};
use super::server::{self, Place, Turn};
use crate::machine::{Command, DeleteRange, Enqueue, Join, Principal, Proclaim, Rejection, Reply};
use crate::mutant;
use crate::node::{Caller, Failure, Node, told};
use crate::raft::frame;
use crate::types::{KeyRange, LeaseId};

/// The TTL of a lease that the server makes for a call without one, as etcd's sessions have.
pub const SESSION_TTL_SECONDS: i64 = 60;

/// Between two renewals of such a lease.
const RENEW_INTERVAL: Duration = Duration::from_secs(SESSION_TTL_SECONDS as u64 / 3);

/// Between two attempts to reach a leader, unless another one turns up earlier.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Between two attempts to take back what a call has made.
const UNDO_PAUSE: Duration = Duration::from_millis(200);
/// After this long the lease has to do the cleaning up.
const UNDO_PATIENCE: Duration = Duration::from_secs(60);

/// The life of a client's connection: closed when the sender is gone.
pub type ConnectionLife = tokio::sync::watch::Receiver<()>;

/// What a client asks for.
#[derive(Debug)]
pub struct Request {
    /// In whose name the call is made. What it has made is undone in the cluster's own.
    pub caller: Caller,
    pub name: Bytes,
    /// [`LeaseId::NONE`] lets the server make one.
    pub lease: LeaseId,
    pub value: Bytes,
    /// Whether a key that is there already takes `value`: a campaign's does, a lock's does not.
    pub rewrite: bool,
    /// A lease that the server made is renewed as long as this lasts, if it is set.
    pub keep_while: Option<ConnectionLife>,
    /// Set for a call of our own API.
    pub own: Option<Own>,
}

/// What our own API knows of a call beyond what etcd's does.
#[derive(Debug)]
pub struct Own {
    pub owner: String,
    /// The client's address.
    pub client: String,
    /// Of a lease that the server makes.
    pub ttl_seconds: i64,
    /// Takes the lock at once or not at all.
    pub only_if_free: bool,
    /// Renews a lease that the client gave, too, as long as the call waits.
    pub renew: bool,
    /// Told once the call has to wait.
    pub joined: Option<oneshot::Sender<Joined>>,
}

/// The place of a call that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    pub create_revision: i64,
    pub lease: LeaseId,
    pub lease_ttl_seconds: i64,
}

/// A key that is first in its queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    pub key: Bytes,
    pub lease: LeaseId,
    /// Of the key; the fencing token.
    pub create_revision: i64,
    /// A revision at which it is the first.
    pub revision: i64,
    /// Whether others stood before it.
    pub waited: bool,
    /// Of the lease, as granted.
    pub lease_ttl_seconds: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnterFailure {
    LeaseNotFound,
    /// The key or its lease went away while the call waited.
    Expired,
    /// The call was not to wait, and would have to.
    Busy,
    Failed(Failure),
}

type AnswerSender = oneshot::Sender<Result<Granted, EnterFailure>>;

/// Joins a queue, waits to be its first, and returns then. When the caller drops this future, what
/// the call has made is undone.
pub async fn enter(queues: &Queues, request: Request) -> Result<Granted, EnterFailure> {
    let (answer, receiver) = oneshot::channel();
    let Queues { node, server_leases, .. } = queues.clone();
    let task = Task { node, server_leases, session: None, made: None };
    let node = &queues.node;
    node.background().spawn(task.run(request, answer));
    match receiver.await {
        Ok(result) => result,
        Err(_) => Err(EnterFailure::Failed(Failure::Stopping)),
    }
}

struct Task {
    node: Arc<Node>,
    server_leases: Arc<ServerLeases>,
    /// The lease, when this call made it.
    session: Option<LeaseId>,
    /// The key, when this call made it.
    made: Option<Place>,
}

impl Task {
    async fn run(mut self, request: Request, mut answer: AnswerSender) {
        let keep_while = request.keep_while.clone();
        let done = match self.enter(request, &mut answer).await {
            Some(Ok(granted)) => {
                let held = granted.clone();
                let told = answer.send(Ok(granted)).is_ok();
                if let (true, Some(lease), Some(life)) = (told, self.session, keep_while) {
                    keep_held(&self.node, lease, &held, life).await;
                }
                told
            }
            Some(Err(failure)) => {
                // What a failed call has made is of no use to its caller, there or not.
                let _ = answer.send(Err(failure));
                false
            }
            None => false,
        };
        if !done && !mutant::is("cancelled-waiter-stays") {
            self.undo().await;
        }
    }

    /// `None` when the client went away.
    async fn enter(
        &mut self,
        request: Request,
        answer: &mut AnswerSender,
    ) -> Option<Result<Granted, EnterFailure>> {
        let Request { caller, name, lease, value, rewrite, own, .. } = request;
        let counts = own.is_none();
        let ttl_seconds = own.as_ref().map_or(SESSION_TTL_SECONDS, |own| own.ttl_seconds);
        let lease = match self.lease(&caller, lease, ttl_seconds, counts).await {
            Ok(lease) => lease,
            Err(failure) => return Some(Err(EnterFailure::Failed(failure))),
        };
        let enqueue = Enqueue { name, lease, value, rewrite };
        let command = match &own {
            None => Command::Enqueue(enqueue),
            Some(own) => Command::Join(Join {
                enqueue,
                owner: own.owner.clone(),
                client: own.client.clone(),
                session: self.session.is_some(),
                only_if_free: own.only_if_free,
            }),
        };
        let (place, lease_ttl_seconds, at_once) = match self.enqueue(&caller, command).await {
            Ok(queued) => queued,
            Err(failure) => return Some(Err(failure)),
        };
        let mut renewed = self.session;
        if let Some(own) = own.filter(|_| at_once.is_none()) {
            if own.only_if_free {
                return Some(Err(EnterFailure::Busy));
            }
            renewed = renewed.or(own.renew.then_some(lease));
            if let Some(joined) = own.joined {
                let create_revision = place.create_revision;
                // Whoever wanted to know may be gone.
                let _ = joined.send(Joined { create_revision, lease, lease_ttl_seconds });
            }
        }
        let renewed = renewed.map(|lease| (lease, lease_ttl_seconds));
        let revision = match at_once {
            Some(revision) => revision,
            None => {
                let turn = tokio::select! {
                    turn = self.wait(&place, renewed) => turn,
                    () = answer.closed() => return None,
                };
                match turn {
                    Ok(revision) => revision,
                    Err(failure) => return Some(Err(failure)),
                }
            }
        };
        if self.session.is_some() && at_once.is_none() {
            // It waited: its time begins now. A failure leaves what the last renewal gave.
            let _ = self.node.lease_renew(lease).await;
        }
        Some(Ok(Granted {
            key: place.key,
            lease,
            create_revision: place.create_revision,
            revision,
            waited: at_once.is_none(),
            lease_ttl_seconds,
        }))
    }

    /// The client's lease, or a new one.
    async fn lease(
        &mut self,
        caller: &Caller,
        given: LeaseId,
        ttl_seconds: i64,
        counts: bool,
    ) -> Result<LeaseId, Failure> {
        if !given.is_none() {
            return Ok(given);
        }
        loop {
            let id = self.node.new_lease_id();
            let ttl_seconds = ttl_seconds.max(self.node.limits().min_lease_ttl_seconds);
            let grant = Command::LeaseGrant { id, ttl_seconds };
            match self.node.propose_for(caller.clone(), grant).await {
                Ok(_) => {
                    self.session = Some(id);
                    if counts {
                        self.server_leases.count(self.node.clock().as_ref());
                    }
                    return Ok(id);
                }
                Err(Failure::Rejected(Rejection::LeaseExists(_))) => {}
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Joins the queue. Returns the place, the TTL of the lease, and a revision at which the place
    /// is the first if it is.
    ///
    /// Waits however long it takes, client or no client: only then is it known what was made.
    async fn enqueue(
        &mut self,
        caller: &Caller,
        command: Command,
    ) -> Result<(Place, i64, Option<i64>), EnterFailure> {
        loop {
            let applied = match self.node.propose_patiently_for(caller, command.clone()).await {
                Ok(applied) => applied,
                Err(Failure::Rejected(Rejection::LeaseNotFound(_))) => {
                    return Err(EnterFailure::LeaseNotFound);
                }
                // The key stands in line, but not for this lease: nothing is held by it.
                Err(Failure::Rejected(Rejection::Detached(_))) => {
                    return Err(EnterFailure::Expired);
                }
                // A snapshot took the place of the entries. Asked again, it finds its key, if
                // there is one; whose that is cannot be told, so it is left alone.
                Err(Failure::Unknown) => continue,
                Err(failure) => return Err(EnterFailure::Failed(failure)),
            };
            let queued = match applied.reply {
                Reply::Enqueued(queued) => queued,
                Reply::Busy => return Err(EnterFailure::Busy),
                other => unreachable!("an enqueue was answered with {other:?}"),
            };
            let place = Place {
                key: queued.key,
                create_revision: queued.create_revision,
                index: self.node.applied_index(),
            };
            if queued.created {
                self.made = Some(place.clone());
            }
            let at_once = queued.first.then_some(applied.revision);
            return Ok((place, queued.lease_ttl_seconds, at_once));
        }
    }

    /// Waits for the turn of `place`, on whoever leads, and renews a lease meanwhile. Returns a revision at which it is the
    /// first.
    async fn wait(
        &self,
        place: &Place,
        renewed: Option<(LeaseId, i64)>,
    ) -> Result<i64, EnterFailure> {
        let renewing = async {
            match renewed {
                Some((lease, ttl_seconds)) => keep_alive(&self.node, lease, ttl_seconds).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            turn = self.wait_on_leaders(place) => turn,
            never = renewing => never,
        }
    }

    async fn wait_on_leaders(&self, place: &Place) -> Result<i64, EnterFailure> {
        let mut roles = self.node.watch_role();
        loop {
            let asked = *roles.borrow_and_update();
            let turn = tokio::select! {
                turn = self.ask_leader(place) => turn,
                // The one that was asked may have fallen silent.
                _ = roles.wait_for(|now| now.term != asked.term || now.leader != asked.leader) => {
                    continue;
                }
            };
            match turn {
                Turn::Granted { revision, index } => {
                    // The client reads its own writes where it made them.
                    let known = self.node.applied_up_to_entry(index).await;
                    return known.map(|()| revision).map_err(EnterFailure::Failed);
                }
                Turn::Gone => return Err(EnterFailure::Expired),
                Turn::Moved => {}
            }
            if *self.node.stopping().borrow() {
                return Err(EnterFailure::Failed(Failure::Stopping));
            }
            tokio::select! {
                _ = roles.changed() => {}
                () = tokio::time::sleep(RETRY_PAUSE) => {}
            }
        }
    }

    async fn ask_leader(&self, place: &Place) -> Turn {
        let Some(leader) = self.node.role().leader else { return Turn::Moved };
        if leader == self.node.identity().member_id {
            return server::wait(&self.node, place).await;
        }
        let asked = async {
            let mut client = self.node.links_to(leader)?.queue();
            let answer = client.wait(frame::encode(place).ok()?).await.ok()?;
            frame::decode(answer.get_ref()).ok()
        };
        asked.await.unwrap_or(Turn::Moved)
    }

    /// Takes back what the call has made: the lease, and the key with it, or the key alone.
    async fn undo(self) {
        let command = match (self.session, self.made) {
            (Some(id), _) => Command::LeaseRevoke { id },
            (None, Some(place)) => {
                Command::Leave { key: place.key, create_revision: place.create_revision }
            }
            (None, None) => return,
        };
        let attempts = async {
            loop {
                let by = Some(Principal::Server);
                match self.node.propose_patiently(by, command.clone()).await {
                    Ok(_) | Err(Failure::Rejected(_) | Failure::Stopping) => return,
                    Err(failure) => tracing::debug!(%failure, "queue key not yet removed"),
                }
                tokio::time::sleep(UNDO_PAUSE).await;
            }
        };
        if tokio::time::timeout(UNDO_PATIENCE, attempts).await.is_err() {
            tracing::warn!("a queue key is left to its lease: it could not be removed");
        }
    }
}

/// Renews the lease of a waiting call: its time shall begin with the grant.
async fn keep_alive<T>(node: &Node, lease: LeaseId, ttl_seconds: i64) -> T {
    let interval = Duration::from_secs(ttl_seconds.unsigned_abs().max(1)) / 3;
    loop {
        tokio::time::sleep(interval).await;
        if let Err(failure) = node.lease_renew(lease).await {
            tracing::debug!(%failure, "lease of a waiting call not renewed");
        }
    }
}

/// Renews the lease of a granted call as long as its connection lives and its key is there. After
/// that the lease runs out: the holder may still be at work.
async fn keep_held(node: &Node, lease: LeaseId, held: &Granted, mut life: ConnectionLife) {
    let mut stopping = node.stopping();
    loop {
        tokio::select! {
            // Nothing is ever sent: it ends when the connection does.
            _ = life.changed() => return,
            () = told(&mut stopping) => return,
            () = tokio::time::sleep(RENEW_INTERVAL) => {}
        }
        let record = node.view().get(&held.key);
        if record.is_none_or(|record| record.create_revision() != held.create_revision) {
            return;
        }
        match node.lease_renew(lease).await {
            Ok(Some(_)) => {}
            Ok(None) => return,
            Err(failure) => tracing::debug!(%failure, "lease of a connection not renewed"),
        }
    }
}

/// Gives up a lock.
///
/// Returns whether a key was deleted. Strictly, only one of the form `NAME/HEX` that is attached to
/// the lease HEX is.
pub async fn unlock(queues: &Queues, caller: Caller, key: Bytes) -> Result<bool, Failure> {
    let command = match queues.rules.unlock {
        UnlockRule::Strict => Command::Unlock { key },
        UnlockRule::Etcd => {
            Command::DeleteRange(DeleteRange { range: KeyRange::One(key), prev_kv: false })
        }
    };
    match queues.node.propose_for(caller, command).await?.reply {
        Reply::Left(left) => Ok(left),
        Reply::DeleteRange(reply) => Ok(reply.deleted > 0),
        other => unreachable!("an unlock was answered with {other:?}"),
    }
}

/// Gives a leader's key another value. Returns whether it leads, and the revision.
pub async fn proclaim(
    node: &Node,
    caller: Caller,
    proclaim: Proclaim,
) -> Result<(bool, i64), Failure> {
    let applied = node.propose_for(caller, Command::Proclaim(proclaim)).await?;
    match applied.reply {
        Reply::Proclaimed(leads) => Ok((leads, applied.revision)),
        other => unreachable!("a proclamation was answered with {other:?}"),
    }
}
