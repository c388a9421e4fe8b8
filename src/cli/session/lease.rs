//! An election, or the lock of a plain etcd: a lease of our own, a call that waits on it, and a
//! watch on the key.
//!
//! The lease is kept alive from its grant on, so while the call waits too. When the call breaks, it
//! is made again on the next endpoint with the same lease: the key, and so the place in the queue,
//! is the same.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::endpoints::{CALL_LIMIT, Endpoints, is_elsewhere, reason, within};
use super::{
    Grip, Left, RELEASE_LIMIT, RETRY_PAUSE, Reach, Session, SessionError, Standing, Taken, Wanted,
    answer_limit, holder_text, renew_every, seconds, tell,
};
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::lease_client::LeaseClient;
use crate::pb::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::pb::etcdserverpb::watch_client::WatchClient;
use crate::pb::etcdserverpb::watch_request::RequestUnion;
use crate::pb::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, RangeRequest, WatchCreateRequest,
    WatchRequest,
};
use crate::pb::holdfastpb;
use crate::pb::holdfastpb::elections_client::ElectionsClient;
use crate::pb::mvccpb::KeyValue;
use crate::pb::mvccpb::event::EventType;
use crate::pb::v3electionpb::{self, election_client::ElectionClient};
use crate::pb::v3lockpb::{self, lock_client::LockClient};

/// A call of etcd's cannot be told not to wait: one that only tries gets this long, after a look
/// that found nobody.
const TRY_LIMIT: Duration = Duration::from_secs(1);

/// What a call that waits has come to.
enum Entered {
    Granted { key: Bytes, revision: i64 },
    Busy(String),
}

/// Takes the place, or waits for it. The session knows the lease as soon as there is one.
pub async fn take(session: &mut Session) -> Result<Taken, SessionError> {
    let Session { endpoints, wanted, lease } = session;
    let begun = Instant::now();
    // Counted from before the grant, whichever attempt it was that succeeded.
    let limit = Reach::new(wanted.wait).limit;
    let since = std::cell::Cell::new(begun);
    let granted = endpoints.ask(limit, |channel| {
        since.set(Instant::now());
        let request = LeaseGrantRequest { ttl: wanted.ttl_seconds, id: 0 };
        async move { LeaseClient::new(channel).lease_grant(request).await }
    });
    let granted = granted.await?;
    *lease = Some(granted.id);
    let ttl = seconds(granted.ttl);
    let (teller, mut standing) = watch::channel(Standing::Held { since: since.get(), ttl });
    let alive = Alive {
        endpoints: endpoints.clone(),
        lease: granted.id,
        teller: teller.clone(),
        since: since.get(),
        ttl,
    };
    let alive = AbortOnDrop(tokio::spawn(alive.keep()).abort_handle());
    let entered = tokio::select! {
        entered = enter(endpoints, wanted, granted.id, begun) => entered?,
        // Nobody else tells through this channel yet.
        lost = lost(&mut standing) => return Ok(Taken::Busy(format!("while it waited, {lost}"))),
    };
    let (key, revision) = match entered {
        Entered::Granted { key, revision } => (key, revision),
        Entered::Busy(holder) => return Ok(Taken::Busy(holder)),
    };
    let found = endpoints.ask(limit, |channel| look(channel, key.clone())).await?;
    let Some(token) = found.kvs.first().map(|found| found.create_revision) else {
        return Ok(Taken::Busy("its key was deleted at once".to_owned()));
    };
    let (release, released) = oneshot::channel();
    let place = Place { key: key.clone(), token, lease: granted.id };
    let keeper = keep(endpoints.clone(), place, teller, standing.clone(), alive, released);
    Ok(Taken::Granted(Grip {
        key,
        token,
        revision,
        standing,
        release,
        keeper: tokio::spawn(keeper),
    }))
}

/// Ends a lease, and with it its key.
pub async fn revoke(endpoints: &mut Endpoints, id: i64) -> Left {
    let revoked = endpoints.ask(RELEASE_LIMIT / 2, |channel| async move {
        LeaseClient::new(channel).lease_revoke(LeaseRevokeRequest { id }).await
    });
    match timeout(RELEASE_LIMIT, revoked).await {
        Ok(Ok(_)) => Left::Released,
        Ok(Err(SessionError::Refused(status))) if status.code() == Code::NotFound => {
            Left::Gone("the lease ended".to_owned())
        }
        Ok(Err(error)) => Left::Unknown(error.to_string()),
        Err(_) => Left::Unknown("no answer".to_owned()),
    }
}

/// Waits at one endpoint after the other, with the same lease.
async fn enter(
    endpoints: &mut Endpoints,
    wanted: &Wanted,
    lease: i64,
    begun: Instant,
) -> Result<Entered, SessionError> {
    let mut reach = Reach::new(wanted.wait);
    let mut way = if wanted.value.is_some() { Way::Campaign } else { Way::EtcdLock };
    loop {
        let left = wanted.wait.map(|wait| wait.saturating_sub(begun.elapsed()));
        let status = match ask(endpoints.channel(), way, wanted, lease, left).await {
            Ok(entered) => return Ok(entered),
            Err(status) if status.code() == Code::Unimplemented && way == Way::Campaign => {
                way = Way::EtcdCampaign;
                continue;
            }
            Err(status) if is_elsewhere(&status) => status,
            Err(status) => return Err(SessionError::Refused(status)),
        };
        endpoints.turn();
        if reach.is_over_after_failure(endpoints.len()) {
            return Err(SessionError::OutOfReach(reason(&status)));
        }
        sleep(RETRY_PAUSE).await;
    }
}

/// Which call waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Campaign,
    EtcdCampaign,
    EtcdLock,
}

async fn ask(
    channel: Channel,
    way: Way,
    wanted: &Wanted,
    lease: i64,
    wait: Option<Duration>,
) -> Result<Entered, Status> {
    let name = Bytes::from(wanted.name.clone());
    let value = Bytes::from(wanted.value.clone().unwrap_or_default());
    if way == Way::Campaign {
        let request = holdfastpb::CampaignRequest {
            name,
            lease,
            ttl_seconds: wanted.ttl_seconds,
            owner: wanted.owner.clone(),
            value,
            wait_ms: wait.map(|wait| i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)),
        };
        let answer = ElectionsClient::new(channel).campaign(request).await?.into_inner();
        return Ok(match answer.elected {
            true => Entered::Granted {
                key: answer.key,
                revision: answer.header.map_or(0, |header| header.revision),
            },
            false => Entered::Busy(holder_text(answer.leader.as_ref(), answer.position)),
        });
    }
    // What a call of etcd's leaves behind when it is given up goes with the lease.
    let waits = async {
        if way == Way::EtcdLock {
            let request = v3lockpb::LockRequest { name: name.clone(), lease };
            let answer = LockClient::new(channel.clone()).lock(request).await?.into_inner();
            Ok::<_, Status>((answer.key, answer.header))
        } else {
            let request = v3electionpb::CampaignRequest { name: name.clone(), lease, value };
            let answer = ElectionClient::new(channel.clone()).campaign(request).await?;
            let answer = answer.into_inner();
            let key = answer.leader.unwrap_or_default().key;
            Ok((key, answer.header))
        }
    };
    let limit = match wait {
        Some(Duration::ZERO) => {
            if let Some(holder) = first(channel.clone(), &wanted.name).await? {
                return Ok(Entered::Busy(holder));
            }
            Some(TRY_LIMIT)
        }
        wait => wait,
    };
    let waited = match limit {
        Some(limit) => timeout(limit, waits).await.ok(),
        None => Some(waits.await),
    };
    match waited {
        Some(waited) => {
            let (key, header) = waited?;
            Ok(Entered::Granted { key, revision: header.map_or(0, |header| header.revision) })
        }
        None => {
            let holder = first(channel.clone(), &wanted.name).await?;
            Ok(Entered::Busy(holder.unwrap_or_else(|| "the time is over".to_owned())))
        }
    }
}

/// Who stands first, as far as the keys tell.
async fn first(channel: Channel, name: &str) -> Result<Option<String>, Status> {
    let request = RangeRequest {
        key: format!("{name}/").into(),
        range_end: format!("{name}0").into(),
        limit: 1,
        sort_order: SortOrder::Ascend.into(),
        sort_target: SortTarget::Create.into(),
        keys_only: true,
        ..RangeRequest::default()
    };
    let mut client = KvClient::new(channel);
    let answer = within(CALL_LIMIT, client.range(request)).await?.into_inner();
    Ok(answer.kvs.first().map(|first| {
        let place = holdfastpb::Place {
            key: first.key.clone(),
            token: first.create_revision,
            lease: first.lease,
            inferred: true,
            ..holdfastpb::Place::default()
        };
        holder_text(Some(&place), 0)
    }))
}

async fn look(
    channel: Channel,
    key: Bytes,
) -> Result<tonic::Response<crate::pb::etcdserverpb::RangeResponse>, Status> {
    let request = RangeRequest { key, ..RangeRequest::default() };
    KvClient::new(channel).range(request).await
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The place that was granted.
struct Place {
    key: Bytes,
    token: i64,
    lease: i64,
}

async fn keep(
    mut endpoints: Endpoints,
    place: Place,
    teller: watch::Sender<Standing>,
    mut standing: watch::Receiver<Standing>,
    alive: AbortOnDrop,
    release: oneshot::Receiver<()>,
) -> Left {
    let reason = tokio::select! {
        biased;
        // Also when the grip is gone.
        _ = release => {
            drop(alive);
            return revoke(&mut endpoints, place.lease).await;
        }
        reason = lost(&mut standing) => reason,
        reason = gone(endpoints.clone(), &place) => {
            tell(&teller, Standing::Lost(reason.clone()));
            drop(alive);
            // A key that was deleted, or taken from its lease, leaves the lease behind. If nobody
            // answers, it ends by itself.
            revoke(&mut endpoints, place.lease).await;
            reason
        }
    };
    Left::Gone(reason)
}

/// Waits until the place is lost; returns why.
async fn lost(standing: &mut watch::Receiver<Standing>) -> String {
    let lost = standing.wait_for(|standing| matches!(standing, Standing::Lost(_))).await;
    match lost.as_deref() {
        Ok(Standing::Lost(reason)) => reason.clone(),
        _ => "nobody keeps the lease any more".to_owned(),
    }
}

/// A lease that is kept alive.
struct Alive {
    endpoints: Endpoints,
    lease: i64,
    teller: watch::Sender<Standing>,
    /// The lease has its whole TTL from here on, at least.
    since: Instant,
    ttl: Duration,
}

impl Alive {
    async fn keep(mut self) {
        sleep_until(self.since + renew_every(self.ttl)).await;
        let reason = loop {
            if let Ok(ended) = self.stream().await {
                break ended;
            }
            if self.since.elapsed() >= self.ttl {
                break "its lease was not confirmed before its time ran out".to_owned();
            }
            self.endpoints.turn();
            sleep(RETRY_PAUSE).await;
        };
        tell(&self.teller, Standing::Lost(reason));
    }

    /// Renews at the endpoint in use until that fails, or the lease has ended: then it says so.
    async fn stream(&mut self) -> Result<String, Status> {
        let renewal = LeaseKeepAliveRequest { id: self.lease };
        let (asks, waiting) = mpsc::channel(1);
        let gone = |_| Status::unavailable("the member does not read");
        // An etcd opens the answers with the first of them, so it has to be asked before.
        let mut sent = Instant::now();
        asks.try_send(renewal).map_err(|_| Status::internal("the queue is new"))?;
        let mut client = LeaseClient::new(self.endpoints.channel());
        let opened = client.lease_keep_alive(ReceiverStream::new(waiting));
        let mut answers = within(answer_limit(self.ttl), opened).await?.into_inner();
        loop {
            let answer = within(answer_limit(self.ttl), answers.message()).await?;
            let answer = answer.ok_or_else(|| Status::unavailable("the stream ended"))?;
            if answer.ttl <= 0 {
                return Ok("the lease ended".to_owned());
            }
            (self.since, self.ttl) = (sent, seconds(answer.ttl));
            tell(&self.teller, Standing::Held { since: sent, ttl: self.ttl });
            sleep_until(sent + renew_every(self.ttl)).await;
            sent = Instant::now();
            asks.send(renewal).await.map_err(gone)?;
        }
    }
}

/// Waits until the key is no longer the one of the place; returns why.
async fn gone(mut endpoints: Endpoints, place: &Place) -> String {
    loop {
        // Whatever the failure: the lease decides how long the place lasts without news of the key.
        if let Ok(reason) = follow(endpoints.channel(), place).await {
            return reason;
        }
        endpoints.turn();
        sleep(RETRY_PAUSE).await;
    }
}

async fn follow(channel: Channel, place: &Place) -> Result<String, Status> {
    let found = within(CALL_LIMIT, look(channel.clone(), place.key.clone())).await?.into_inner();
    if let Some(reason) = verdict(found.kvs.first(), place) {
        return Ok(reason);
    }
    let revision = found.header.map_or(0, |header| header.revision);
    let create = WatchCreateRequest {
        key: place.key.clone(),
        start_revision: revision + 1,
        ..WatchCreateRequest::default()
    };
    let (asks, waiting) = mpsc::channel(1);
    let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    asks.try_send(request).map_err(|_| Status::internal("the queue is new"))?;
    let mut client = WatchClient::new(channel);
    let opened = client.watch(ReceiverStream::new(waiting));
    let mut answers = within(CALL_LIMIT, opened).await?.into_inner();
    while let Some(answer) = answers.message().await? {
        if answer.canceled {
            break;
        }
        for event in answer.events {
            let kept = event.kv.filter(|_| event.r#type == i32::from(EventType::Put));
            if let Some(reason) = verdict(kept.as_ref(), place) {
                return Ok(reason);
            }
        }
    }
    // Open until here, so that the watch was.
    drop(asks);
    Err(Status::unavailable("the watch ended"))
}

/// Why the key is no longer that of the place; `None` if it is.
fn verdict(found: Option<&KeyValue>, place: &Place) -> Option<String> {
    match found {
        Some(found) if found.create_revision != place.token => Some("the key was deleted"),
        Some(found) if found.lease != place.lease => Some("the key was taken from its lease"),
        Some(_) => None,
        None => Some("the key was deleted"),
    }
    .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_must_stay_the_same_with_the_same_lease() {
        let place = Place { key: "a/1".into(), token: 5, lease: 1 };
        let found = KeyValue { create_revision: 5, lease: 1, ..KeyValue::default() };
        assert_eq!(verdict(Some(&found), &place), None);
        assert!(verdict(None, &place).is_some());
        let again = KeyValue { create_revision: 6, ..found.clone() };
        assert!(verdict(Some(&again), &place).is_some());
        let detached = KeyValue { lease: 0, ..found };
        assert!(verdict(Some(&detached), &place).is_some());
    }
}
