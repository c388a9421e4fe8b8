//! A session, a lock and an alarm in one: the server's side of a Hold stream.
//!
//! The client pings; each ping renews the lease behind the lock. This member tells what the client
//! must know to stop in time: that the lock is gone, that somebody wants it, or that its lease could
//! not be confirmed for so long that it may run out. What it tells of time it counts from before each
//! renewal was proposed, on its own clock, so it is always early.
//!
//! When the stream breaks while the call waits, what it has made is undone. When it breaks later,
//! the lease runs out by itself: the holder may be at work still, and may come back with its lease
//! over another stream.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};

use super::Queues;
use super::client::{self, EnterFailure, Granted, Joined, Own, Request};
use super::locks::{self, NotGranted, Wait};
use crate::machine::{Asked, Command, Principal, Release, Reply};
use crate::node::{Caller, Failure, Node, told};
use crate::types::LeaseId;

/// Messages that wait for a client which does not read. With all of them waiting nothing more is
/// done for the stream, and its lease runs out.
pub const TELLS_WAITING: usize = 16;

/// How often a waiter's position is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Between two attempts to renew.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Clone)]
pub struct Open {
    pub caller: Caller,
    pub name: Bytes,
    /// [`LeaseId::NONE`] lets the server make one.
    pub lease: LeaseId,
    pub ttl_seconds: i64,
    pub owner: String,
    pub client: String,
    pub wait: Wait,
}

/// What the client says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Ping(u64),
    Release,
}

/// What the client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tell {
    Queued { lease: LeaseId, place: NotGranted },
    Granted { granted: Granted, left: Duration },
    Renewed { ping: u64, ttl_seconds: i64 },
    RevokeRequested { by: String, reason: String },
    Uncertain { left: Duration },
    Lost { reason: String },
    Released { released: bool },
    NotGranted(NotGranted),
}

/// Serves one stream until it has nothing more to tell, or the client is gone.
pub async fn run<A>(
    queues: Queues,
    open: Open,
    asks: A,
    tells: mpsc::Sender<Tell>,
) -> Result<(), EnterFailure>
where
    A: Stream<Item = Ask> + Unpin + Send,
{
    let mut session =
        Session { node: queues.node.clone(), name: open.name.clone(), asks: Some(asks), tells };
    match session.wait(&queues, open).await? {
        Some((granted, confirmed)) => session.hold(granted, confirmed).await,
        None => Ok(()),
    }
}

struct Session<A> {
    node: Arc<Node>,
    name: Bytes,
    /// `None` after the client has closed its side.
    asks: Option<A>,
    tells: mpsc::Sender<Tell>,
}

/// A renewal under way.
struct Renewing {
    ping: u64,
    begun: Instant,
    answer: Pin<Box<dyn Future<Output = Result<Option<i64>, Failure>> + Send>>,
}

impl<A: Stream<Item = Ask> + Unpin + Send> Session<A> {
    /// Tells the client, unless it is gone.
    async fn tell(&mut self, tell: Tell) {
        // Its absence is noticed by `closed`.
        let _ = self.tells.send(tell).await;
    }

    /// What the client says next; nothing once it has closed its side.
    async fn asked(&mut self) -> Ask {
        loop {
            let Some(asks) = &mut self.asks else { return std::future::pending().await };
            match asks.next().await {
                Some(ask) => return ask,
                None => self.asks = None,
            }
        }
    }

    /// Waits for the lock. Returns the grant and a moment from which its lease has its whole TTL;
    /// `None` when everything is told.
    async fn wait(
        &mut self,
        queues: &Queues,
        open: Open,
    ) -> Result<Option<(Granted, Instant)>, EnterFailure> {
        let opened = Instant::now();
        if open.wait == Wait::Not
            && let Some(busy) = locks::busy(&self.node, &open.name, open.lease).await?
        {
            self.tell(Tell::NotGranted(busy)).await;
            return Ok(None);
        }
        let (joined, mut joining) = oneshot::channel();
        let entering = client::enter(
            queues,
            Request {
                caller: open.caller,
                name: open.name,
                lease: open.lease,
                value: Bytes::new(),
                rewrite: false,
                keep_while: None,
                own: Some(Own {
                    owner: open.owner,
                    client: open.client,
                    ttl_seconds: open.ttl_seconds,
                    only_if_free: open.wait == Wait::Not,
                    renew: true,
                    joined: Some(joined),
                }),
            },
        );
        tokio::pin!(entering);
        let deadline = match open.wait {
            Wait::For(patience) => opened.checked_add(patience),
            Wait::Not | Wait::Unbounded => None,
        };
        let mut stopping = self.node.stopping();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut join_unknown = true;
        let mut place: Option<Joined> = None;
        let mut shown = None;
        let mut heard = opened;
        let granted = loop {
            let over = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            let tells = self.tells.clone();
            tokio::select! {
                biased;
                result = &mut entering => match result {
                    Ok(granted) => break granted,
                    Err(EnterFailure::Busy) => {
                        self.tell(Tell::NotGranted(NotGranted::here(&self.node, &self.name, None))).await;
                        return Ok(None);
                    }
                    Err(failure) => return Err(failure),
                },
                () = tells.closed() => return Ok(None),
                joined = &mut joining, if join_unknown => {
                    join_unknown = false;
                    place = joined.ok();
                }
                () = over => {
                    let token = place.as_ref().map(|place| place.create_revision);
                    let place = NotGranted::here(&self.node, &self.name, token);
                    self.tell(Tell::NotGranted(place)).await;
                    return Ok(None);
                }
                _ = look.tick() => {}
                () = told(&mut stopping) => return Err(EnterFailure::Failed(Failure::Stopping)),
                // Last, so that a flood of pings holds nothing up.
                ask = self.asked() => match ask {
                    Ask::Ping(_) => {
                        heard = Instant::now();
                        shown = None;
                    }
                    // Dropping the call undoes it.
                    Ask::Release => {
                        self.tell(Tell::Released { released: false }).await;
                        return Ok(None);
                    }
                },
            }
            let Some(place) = &place else { continue };
            if heard.elapsed() > seconds(place.lease_ttl_seconds) {
                self.tell(Tell::Lost { reason: "no ping for the length of the TTL".to_owned() })
                    .await;
                return Ok(None);
            }
            let token = Some(place.create_revision);
            let now = NotGranted::here(&self.node, &self.name, token);
            if shown != Some(now.ahead) {
                shown = Some(now.ahead);
                self.tell(Tell::Queued { lease: place.lease, place: now }).await;
            }
        };
        let fresh = opened.elapsed() < seconds(granted.lease_ttl_seconds) / 4;
        if fresh && open.lease.is_none() && !granted.waited {
            return Ok(Some((granted, opened)));
        }
        if let Some(confirmed) = self.confirm(&granted).await? {
            return Ok(Some((granted, confirmed)));
        }
        // It went away before it heard of the grant, so it is not at work. With a lease of its own
        // it may have been before.
        if open.lease.is_none() {
            self.release(granted.create_revision).await?;
        }
        Ok(None)
    }

    /// Renews the lease of a grant that the client has yet to hear of; `None` when it goes away.
    async fn confirm(&mut self, granted: &Granted) -> Result<Option<Instant>, EnterFailure> {
        loop {
            let begun = Instant::now();
            let renewed = tokio::select! {
                renewed = self.node.lease_renew(granted.lease) => renewed,
                () = self.tells.closed() => return Ok(None),
            };
            match renewed {
                Ok(Some(_)) => return Ok(Some(begun)),
                Ok(None) => return Err(EnterFailure::Expired),
                Err(Failure::Stopping) => return Err(EnterFailure::Failed(Failure::Stopping)),
                Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
            }
        }
    }

    /// Serves a holder. `confirmed`: from when its lease has its whole TTL, at least.
    async fn hold(&mut self, granted: Granted, mut confirmed: Instant) -> Result<(), EnterFailure> {
        let node = self.node.clone();
        let (lease, ttl) = (granted.lease, seconds(granted.lease_ttl_seconds));
        // Listening begins before the state is looked at, so that nothing is missed in between.
        let mut waiter = node.waiters().listen(granted.key.clone());
        let mut stopping = node.stopping();
        let left = ttl.saturating_sub(confirmed.elapsed());
        self.tell(Tell::Granted { granted: granted.clone(), left }).await;
        let mut renewing: Option<Renewing> = None;
        let mut next_ping = None;
        let mut uncertain = false;
        let mut passed_on: Option<Asked> = None;
        loop {
            waiter.news.borrow_and_update();
            if let Some(reason) = lost(&node, &self.name, &granted) {
                self.tell(Tell::Lost { reason }).await;
                return Ok(());
            }
            let asked = node.machine().label(&granted.key).and_then(|label| label.asked.clone());
            if let Some(asked) = asked {
                let known = passed_on
                    .as_ref()
                    .is_some_and(|old| Asked { told: asked.told, ..old.clone() } == asked);
                if !known {
                    let (by, reason) = (asked.by.clone(), asked.reason.clone());
                    self.tell(Tell::RevokeRequested { by, reason }).await;
                    if !asked.told {
                        say_told(&node, &granted);
                    }
                    passed_on = Some(asked);
                }
            }
            if renewing.is_none()
                && let Some(ping) = next_ping.take()
            {
                renewing = Some(renew(&node, lease, ping, Duration::ZERO));
            }
            let answered = async {
                match &mut renewing {
                    Some(renewing) => (&mut renewing.answer).await,
                    None => std::future::pending().await,
                }
            };
            let alarm = confirmed + if uncertain { ttl } else { ttl * 2 / 3 };
            let tells = self.tells.clone();
            tokio::select! {
                biased;
                answer = answered => {
                    let Some(Renewing { ping, begun, .. }) = renewing.take() else { continue };
                    match answer {
                        Ok(Some(ttl_seconds)) => {
                            confirmed = begun;
                            uncertain = false;
                            self.tell(Tell::Renewed { ping, ttl_seconds }).await;
                        }
                        Ok(None) => {
                            self.tell(Tell::Lost { reason: "the lease ended".to_owned() }).await;
                            return Ok(());
                        }
                        Err(failure) => {
                            tracing::debug!(%failure, "lease of a hold not renewed yet");
                            renewing = Some(renew(&node, lease, ping, RETRY_PAUSE));
                        }
                    }
                }
                _ = waiter.news.changed() => {}
                () = tells.closed() => return Ok(()),
                () = tokio::time::sleep_until(alarm) => {
                    if uncertain {
                        let reason = "the lease was not confirmed before its time ran out";
                        self.tell(Tell::Lost { reason: reason.to_owned() }).await;
                        return Ok(());
                    }
                    uncertain = true;
                    let left = ttl.saturating_sub(confirmed.elapsed());
                    self.tell(Tell::Uncertain { left }).await;
                }
                () = told(&mut stopping) => return Err(EnterFailure::Failed(Failure::Stopping)),
                // Last, as above.
                ask = self.asked() => match ask {
                    Ask::Ping(ping) => next_ping = Some(ping),
                    Ask::Release => return self.release(granted.create_revision).await,
                },
            }
        }
    }

    async fn release(&mut self, token: i64) -> Result<(), EnterFailure> {
        let release = Release { name: self.name.clone(), token, forced: None };
        let release = Command::Release(release);
        // However long it takes: the client counts on it, and may be gone without harm. What this
        // stream has taken it may give back, whatever has become of the user.
        let released = match self.node.propose_patiently(Some(Principal::Server), release).await {
            Ok(applied) => applied.reply == Reply::Left(true),
            Err(failure) => return Err(EnterFailure::Failed(failure)),
        };
        self.tell(Tell::Released { released }).await;
        Ok(())
    }
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn renew(node: &Arc<Node>, lease: LeaseId, ping: u64, pause: Duration) -> Renewing {
    let node = node.clone();
    let answer = async move {
        tokio::time::sleep(pause).await;
        node.lease_renew(lease).await
    };
    Renewing { ping, begun: Instant::now(), answer: answer.boxed() }
}

/// Lets the cluster know that the holder was told what it is asked.
fn say_told(node: &Arc<Node>, granted: &Granted) {
    let Granted { key, create_revision, .. } = granted.clone();
    let saying = node.clone();
    node.background().spawn(async move {
        let told = Command::Told { key, create_revision };
        if let Err(failure) = saying.propose(None, told).await {
            tracing::debug!(%failure, "nobody learns that a holder was told");
        }
    });
}

/// Why the lock is no longer the holder's; `None` while it is.
fn lost(node: &Node, name: &Bytes, granted: &Granted) -> Option<String> {
    let record = node.view().get(&granted.key);
    if let Some(record) = record.filter(|it| it.create_revision() == granted.create_revision) {
        let detached = record.lease() != granted.lease;
        return detached.then(|| "the key was taken from its lease".to_owned());
    }
    let machine = node.machine();
    let mut forced = machine.forced_releases();
    let forced = forced.find(|it| it.name == *name && it.token == granted.create_revision);
    Some(match forced {
        Some(forced) if forced.by.is_empty() => format!("taken by force: {}", forced.reason),
        Some(forced) => format!("taken by {}: {}", forced.by, forced.reason),
        None if machine.leases().contains(granted.lease) => "the key was deleted".to_owned(),
        None => "the lease ended".to_owned(),
    })
}
