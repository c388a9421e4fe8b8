//! A lock of Holdfast, through `holdfast.v1.Locks/Hold`.
//!
//! A stream that breaks, or whose member does not answer a ping, is opened again on the next
//! endpoint with the lease of the grant: the lock is ours still if its token is the same.
//! The member's warning `Uncertain` is not needed here: it counts from when the member got a ping,
//! and so comes after the time that is counted from the sending of that ping.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::endpoints::{Endpoints, is_elsewhere, reason, within};
use super::{
    Grip, Left, REACH_LIMIT, RELEASE_LIMIT, RETRY_PAUSE, Reach, SessionError, Standing, Taken,
    Wanted, answer_limit, holder_text, printable, renew_every, seconds, tell,
};
use crate::pb::holdfastpb::hold_request::{GiveUp, Open, Ping, Request};
use crate::pb::holdfastpb::hold_response::{Granted, Lost, Released, Renewed, Response};
use crate::pb::holdfastpb::locks_client::LocksClient;
use crate::pb::holdfastpb::{HoldRequest, HoldResponse, ReleaseRequest};

/// Messages to the member under way: it reads one at once, so more are a sign that it does not.
const ASKS_WAITING: usize = 4;
/// How long a member may take to tell somebody who waits that it is there.
const WAITING_ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Takes the lock, or waits for it.
pub async fn take(endpoints: &mut Endpoints, wanted: &Wanted) -> Result<Taken, SessionError> {
    let begun = Instant::now();
    let mut reach = Reach::new(wanted.wait);
    loop {
        let wait = wanted.wait.map(|wait| wait.saturating_sub(begun.elapsed()));
        let why = match enter(endpoints, wanted, wait, &mut reach).await {
            Ok(taken) => return Ok(taken),
            // The lease of a waiter may end while nobody could be reached: it queues again.
            Err(status) if is_elsewhere(&status) || status.code() == Code::FailedPrecondition => {
                reason(&status)
            }
            Err(status) => return Err(SessionError::Refused(status)),
        };
        endpoints.turn();
        if reach.is_over_after_failure(endpoints.len()) {
            return Err(SessionError::OutOfReach(why));
        }
        sleep(RETRY_PAUSE).await;
    }
}

/// Takes the lock at the endpoint in use.
async fn enter(
    endpoints: &Endpoints,
    wanted: &Wanted,
    wait: Option<Duration>,
    reach: &mut Reach,
) -> Result<Taken, Status> {
    let open = Open {
        name: wanted.name.clone().into(),
        owner: wanted.owner.clone(),
        ttl_seconds: wanted.ttl_seconds,
        wait_ms: wait.map(|wait| i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)),
        lease: 0,
    };
    let mut stream = Stream::open(endpoints.channel(), open, WAITING_ANSWER_LIMIT).await?;
    let mut asked = Some(stream.ping());
    let mut next = Instant::now() + renew_every(wanted.ttl());
    loop {
        let silent = asked.map(|asked| asked + WAITING_ANSWER_LIMIT);
        let answer = tokio::select! {
            answer = stream.answers.message() => {
                answer?.ok_or_else(|| Status::unavailable("the stream ended"))?
            }
            () = sleep_until(silent.unwrap_or(next)), if silent.is_some() => {
                return Err(Status::deadline_exceeded("the member does not answer"));
            }
            () = sleep_until(next), if silent.is_none() => {
                asked = Some(stream.ping());
                next = Instant::now() + renew_every(wanted.ttl());
                continue;
            }
        };
        reach.answered();
        asked = None;
        match answer.response {
            Some(Response::Granted(granted)) => {
                let revision = answer.header.map_or(0, |header| header.revision);
                let (endpoints, wanted) = (endpoints.clone(), wanted.clone());
                return Ok(Taken::Granted(grip(endpoints, wanted, stream, granted, revision)));
            }
            Some(Response::NotGranted(not)) => {
                return Ok(Taken::Busy(holder_text(not.holder.as_ref(), not.position)));
            }
            Some(Response::Lost(Lost { reason })) => return Err(Status::unavailable(reason)),
            // A place in the queue, or what a later version tells those who wait.
            _ => {}
        }
    }
}

fn grip(
    endpoints: Endpoints,
    wanted: Wanted,
    mut stream: Stream,
    granted: Granted,
    revision: i64,
) -> Grip {
    // What the grant itself says of time was true when it was sent, whenever that was.
    let asked = stream.ping();
    let (teller, standing) = watch::channel(Standing::Unconfirmed);
    let (release, released) = oneshot::channel();
    let (key, token) = (granted.key.clone(), granted.token);
    let keeper = Keeper {
        endpoints,
        lease: granted.lease,
        token,
        wanted,
        ttl: seconds(granted.ttl_seconds),
        confirmed: Instant::now(),
        teller,
        asked: Some(asked),
        next: asked,
    };
    let keeper = tokio::spawn(keeper.run(stream, released));
    Grip { key, token, revision, standing, release, keeper }
}

/// One Hold stream.
struct Stream {
    asks: mpsc::Sender<HoldRequest>,
    answers: Streaming<HoldResponse>,
    pings: u64,
}

impl Stream {
    async fn open(channel: Channel, open: Open, limit: Duration) -> Result<Stream, Status> {
        let (asks, waiting) = mpsc::channel(ASKS_WAITING);
        send(&asks, Request::Open(open));
        let mut client = LocksClient::new(channel);
        let answers = within(limit, client.hold(ReceiverStream::new(waiting))).await?.into_inner();
        Ok(Stream { asks, answers, pings: 0 })
    }

    /// Asks for a renewal. Returns a moment that is not after the sending.
    fn ping(&mut self) -> Instant {
        self.pings += 1;
        let sent = Instant::now();
        send(&self.asks, Request::Ping(Ping { id: self.pings }));
        sent
    }
}

/// Says something to the member, if it reads. A member that has ended the stream does not, and what
/// it said before is still to be read; for any other the lack of an answer decides.
fn send(asks: &mpsc::Sender<HoldRequest>, request: Request) {
    let _ = asks.try_send(HoldRequest { request: Some(request) });
}

/// How the service of one stream ended.
enum End {
    Broken,
    Lost(String),
    /// The command is over.
    Asked,
}

struct Keeper {
    endpoints: Endpoints,
    wanted: Wanted,
    lease: i64,
    token: i64,
    ttl: Duration,
    /// The lease has its whole TTL from here on, at least.
    confirmed: Instant,
    teller: watch::Sender<Standing>,
    /// When the ping was sent that is not answered yet.
    asked: Option<Instant>,
    /// When the next one is to be sent.
    next: Instant,
}

impl Keeper {
    async fn run(mut self, mut stream: Stream, mut release: oneshot::Receiver<()>) -> Left {
        loop {
            match self.serve(&mut stream, &mut release).await {
                End::Asked => return self.release(stream).await,
                End::Lost(reason) => return self.lost(reason),
                End::Broken => {}
            }
            stream = loop {
                if self.confirmed.elapsed() >= self.ttl {
                    let reason = "its lease was not confirmed before its time ran out";
                    return self.lost(reason.to_owned());
                }
                self.endpoints.turn();
                tokio::select! {
                    // Also when the grip is gone.
                    _ = &mut release => {
                        return release_elsewhere(self.endpoints, self.wanted, self.token).await;
                    }
                    opened = self.reopen() => match opened {
                        Ok(Ok(stream)) => break stream,
                        Ok(Err(reason)) => return self.lost(reason),
                        // The next endpoint may know more, while there is time.
                        Err(_) => {}
                    },
                }
                sleep(RETRY_PAUSE).await;
            };
        }
    }

    fn lost(&self, reason: String) -> Left {
        // It may hold what somebody gave as the reason for a release by force.
        let reason = printable(&reason);
        tell(&self.teller, Standing::Lost(reason.clone()));
        Left::Gone(reason)
    }

    async fn serve(&mut self, stream: &mut Stream, release: &mut oneshot::Receiver<()>) -> End {
        loop {
            let silent = self.asked.map(|asked| asked + answer_limit(self.ttl));
            tokio::select! {
                biased;
                _ = &mut *release => return End::Asked,
                answer = stream.answers.message() => match answer {
                    Ok(Some(answer)) => {
                        if let Some(reason) = self.heard(stream.pings, answer.response) {
                            return End::Lost(reason);
                        }
                    }
                    Err(status) if has_ended(&status) => return End::Lost(reason(&status)),
                    Ok(None) | Err(_) => return End::Broken,
                },
                () = sleep_until(silent.unwrap_or(self.next)) => {
                    if silent.is_some() {
                        return End::Broken;
                    }
                    self.asked = Some(stream.ping());
                }
            }
        }
    }

    /// Takes in what the member says; the reason when the lock is lost.
    fn heard(&mut self, pings: u64, response: Option<Response>) -> Option<String> {
        match response {
            Some(Response::Renewed(Renewed { ping_id, ttl_seconds })) => {
                // An answer to an earlier ping would prove less.
                if ping_id == pings
                    && let Some(sent) = self.asked.take()
                {
                    (self.confirmed, self.ttl) = (sent, seconds(ttl_seconds));
                    self.next = sent + renew_every(self.ttl);
                    tell(&self.teller, Standing::Held { since: sent, ttl: self.ttl });
                }
                None
            }
            Some(Response::RevokeRequested(wish)) => {
                let by = if wish.by.is_empty() { "somebody" } else { &printable(&wish.by) };
                let name = &self.wanted.name;
                eprintln!("holdfast: {by} asks for the lock {name}: {}", printable(&wish.reason));
                None
            }
            Some(Response::Lost(Lost { reason })) => Some(reason),
            Some(Response::NotGranted(_) | Response::Released(_)) => {
                Some("the member says that it is not held".to_owned())
            }
            _ => None,
        }
    }

    /// Opens the stream again at the endpoint in use; a reason instead when the lock is lost.
    async fn reopen(&mut self) -> Result<Result<Stream, String>, Status> {
        let limit = answer_limit(self.ttl);
        let open = Open {
            name: self.wanted.name.clone().into(),
            owner: self.wanted.owner.clone(),
            ttl_seconds: self.wanted.ttl_seconds,
            wait_ms: Some(0),
            lease: self.lease,
        };
        let opened = within(limit, async {
            let mut stream = Stream::open(self.endpoints.channel(), open, limit).await?;
            let first = stream.answers.message().await?;
            Ok((stream, first.and_then(|first| first.response)))
        });
        match opened.await {
            Ok((mut stream, Some(Response::Granted(granted)))) if granted.token == self.token => {
                self.asked = Some(stream.ping());
                Ok(Ok(stream))
            }
            Ok((stream, Some(Response::Granted(_)))) => {
                // Another place, made by this very call: it is of no use, and goes with its lease
                // if this message does not arrive.
                send(&stream.asks, Request::Release(GiveUp {}));
                Ok(Err("the key was deleted".to_owned()))
            }
            Ok((_, Some(Response::Lost(Lost { reason })))) => Ok(Err(reason)),
            Ok((_, Some(Response::NotGranted(not)))) => {
                Ok(Err(holder_text(not.holder.as_ref(), not.position)))
            }
            Ok(_) => Err(Status::unavailable("the stream ended")),
            Err(status) if has_ended(&status) => Ok(Err(reason(&status))),
            Err(status) => Err(status),
        }
    }

    async fn release(self, mut stream: Stream) -> Left {
        send(&stream.asks, Request::Release(GiveUp {}));
        let answered = timeout(RELEASE_LIMIT / 2, async {
            while let Ok(Some(answer)) = stream.answers.message().await {
                match answer.response {
                    Some(Response::Released(Released { released: true })) => {
                        return Some(Left::Released);
                    }
                    Some(Response::Released(Released { released: false })) => {
                        return Some(Left::Gone("the key was deleted".to_owned()));
                    }
                    Some(Response::Lost(Lost { reason })) => return Some(Left::Gone(reason)),
                    _ => {}
                }
            }
            None
        });
        if let Ok(Some(left)) = answered.await {
            return left;
        }
        release_elsewhere(self.endpoints, self.wanted, self.token).await
    }
}

/// Whether the session behind the lock is over, as any member would say.
fn has_ended(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::FailedPrecondition)
}

/// Gives the lock up by a call. That it is gone says nothing: an earlier attempt may have done it.
async fn release_elsewhere(mut endpoints: Endpoints, wanted: Wanted, token: i64) -> Left {
    let name = Bytes::from(wanted.name);
    let released = endpoints.ask(REACH_LIMIT / 2, |channel| {
        let request = ReleaseRequest { name: name.clone(), token };
        async move { LocksClient::new(channel).release(request).await }
    });
    match timeout(RELEASE_LIMIT / 2, released).await {
        Ok(Ok(_)) => Left::Released,
        Ok(Err(error)) => Left::Unknown(error.to_string()),
        Err(_) => Left::Unknown("no answer".to_owned()),
    }
}
