//! A place in the queue of a lock or an election, kept alive for as long as a command runs.
//!
//! [`hold`] is the way for locks of Holdfast: one stream that is session, lock and alarm. [`lease`]
//! is the way for elections, and for locks of a plain etcd: a lease, a call that waits, and a watch
//! on the key. Both tell the same through [`Standing`]. What they tell of time counts from the
//! *sending* of the renewal that was answered last, by this machine's monotonic clock: so it ends
//! before the lease does, whatever becomes of the members or of the network.

pub mod endpoints;
mod hold;
mod lease;

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::Status;

use crate::pb::holdfastpb::Place;

use endpoints::Endpoints;

/// How long all endpoints may be out of reach before a caller that waits is told so.
const REACH_LIMIT: Duration = Duration::from_secs(5);
/// How long the release at the end may take. After that the lease runs out by itself.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// Between two attempts.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What is wanted, as the command line says it.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub name: String,
    /// With one it is an election, and this is what the leader proclaims.
    pub value: Option<String>,
    pub ttl_seconds: i64,
    /// Shown to others.
    pub owner: String,
    /// `None`: as long as it takes. Zero: not at all.
    pub wait: Option<Duration>,
}

impl Wanted {
    fn ttl(&self) -> Duration {
        seconds(self.ttl_seconds)
    }
}

/// How sure it is that the place is still ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Granted, but not confirmed in a way that tells how long it lasts.
    Unconfirmed,
    /// Certainly held until `since + ttl`.
    Held { since: Instant, ttl: Duration },
    /// For this reason; it never becomes anything else.
    Lost(String),
}

/// Why there is no place.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("endpoint {0}: only plain http is supported")]
    Scheme(String),
    #[error("endpoint {url}: {reason}")]
    Endpoint { url: String, reason: String },
    #[error("the cluster is out of reach: {0}")]
    OutOfReach(String),
    #[error("{}", .0.message().trim_start_matches("holdfast: "))]
    Refused(Status),
}

impl SessionError {
    /// Whether the members do not know the service at all.
    pub fn is_unimplemented(&self) -> bool {
        matches!(self, SessionError::Refused(status) if status.code() == tonic::Code::Unimplemented)
    }
}

/// How taking a place ended.
pub enum Taken {
    Granted(Grip),
    /// Not in the time that was allowed; who has it, for people to read.
    Busy(String),
}

/// How giving a place up ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Left {
    Released,
    /// It was gone before.
    Gone(String),
    /// Nobody answered: the lease runs out by itself.
    Unknown(String),
}

/// The first place in a queue, kept by a task of its own until it is released or lost.
pub struct Grip {
    pub key: Bytes,
    /// The create revision of the key: the fencing token.
    pub token: i64,
    /// The revision at which the grant was told.
    pub revision: i64,
    pub standing: watch::Receiver<Standing>,
    release: oneshot::Sender<()>,
    keeper: JoinHandle<Left>,
}

impl Grip {
    /// Waits until it is known how long the grant lasts, or that it is lost.
    pub async fn confirmed(&mut self) {
        // The sender goes only after it has said that all is lost, which also ends the wait.
        let _ = self.standing.wait_for(|standing| *standing != Standing::Unconfirmed).await;
    }

    /// Gives the place up. Takes at most about [`RELEASE_LIMIT`].
    pub async fn release(self) -> Left {
        // A keeper that is gone has lost the place, and returns why.
        let _ = self.release.send(());
        match self.keeper.await {
            Ok(left) => left,
            Err(error) => Left::Unknown(error.to_string()),
        }
    }
}

/// One wish for a place, and what has been made for it at the cluster.
pub struct Session {
    endpoints: Endpoints,
    wanted: Wanted,
    lease: Option<i64>,
}

impl Session {
    pub fn new(endpoints: Endpoints, wanted: Wanted) -> Session {
        Session { endpoints, wanted, lease: None }
    }

    /// Takes the place, or waits for it as long as is wanted. After this has been dropped
    /// unfinished, [`Session::abandon`] undoes the rest.
    pub async fn take(&mut self) -> Result<Taken, SessionError> {
        if self.wanted.value.is_none() {
            match hold::take(&mut self.endpoints, &self.wanted).await {
                Err(error) if error.is_unimplemented() => {}
                taken => return taken,
            }
        }
        let taken = lease::take(self).await;
        if !matches!(taken, Ok(Taken::Granted(_))) {
            self.abandon().await;
        }
        taken
    }

    /// Ends the lease of a wait that is given up, and with it the place in the queue.
    pub async fn abandon(&mut self) {
        if let Some(id) = self.lease.take()
            && let Left::Unknown(why) = lease::revoke(&mut self.endpoints, id).await
        {
            eprintln!("holdfast: the place in the queue stays until its lease runs out: {why}");
        }
    }
}

/// How long nobody has answered.
struct Reach {
    since: Instant,
    failures: usize,
    limit: Duration,
}

impl Reach {
    fn new(wait: Option<Duration>) -> Reach {
        let limit = wait.map_or(REACH_LIMIT, |wait| wait.min(REACH_LIMIT));
        Reach { since: Instant::now(), failures: 0, limit }
    }

    fn answered(&mut self) {
        (self.since, self.failures) = (Instant::now(), 0);
    }

    /// Counts a failure; true when each of `endpoints` had its chance and the time is over.
    fn is_over_after_failure(&mut self, endpoints: usize) -> bool {
        self.failures += 1;
        self.failures >= endpoints && self.since.elapsed() >= self.limit
    }
}

/// How often a lease of `ttl` is renewed: early enough for three attempts, one after the other,
/// before two thirds of it are over.
fn renew_every(ttl: Duration) -> Duration {
    ttl / 4
}

/// How long the answer to a renewal may take before another endpoint is tried.
fn answer_limit(ttl: Duration) -> Duration {
    (ttl / 8).max(Duration::from_millis(200))
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// Tells how things stand, unless the place is lost already: that stays.
fn tell(teller: &watch::Sender<Standing>, news: Standing) {
    teller.send_if_modified(|standing| {
        let open = !matches!(standing, Standing::Lost(_));
        if open {
            *standing = news;
        }
        open
    });
}

/// What others have written, without what would disturb a terminal.
pub fn printable(told: &str) -> String {
    told.chars().map(|char| if char.is_control() { '?' } else { char }).collect()
}

/// Who stands first, for people to read.
fn holder_text(holder: Option<&Place>, position: i64) -> String {
    let Some(place) = holder else {
        return format!("nobody holds it, but {position} stand before");
    };
    let owner = match (place.inferred, place.owner.as_str()) {
        (true, _) => format!("key {}", place.key.escape_ascii()),
        (false, "") => "an unnamed owner".to_owned(),
        (false, owner) => printable(owner),
    };
    let client = if place.client.is_empty() { "" } else { &format!(" at {}", place.client) };
    format!("held by {owner}{client}, token {}, lease {:x}", place.token, place.lease)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_place_stays_lost() {
        let (teller, standing) = watch::channel(Standing::Unconfirmed);
        let held = Standing::Held { since: Instant::now(), ttl: seconds(10) };
        tell(&teller, held.clone());
        assert_eq!(*standing.borrow(), held);
        tell(&teller, Standing::Lost("gone".into()));
        tell(&teller, held);
        assert_eq!(*standing.borrow(), Standing::Lost("gone".into()));
    }

    #[test]
    fn two_more_endpoints_are_asked_before_two_thirds_of_the_ttl() {
        for ttl in [3, 10, 60].map(seconds) {
            let third = renew_every(ttl) + 2 * (answer_limit(ttl) + RETRY_PAUSE);
            assert!(third < ttl * 2 / 3, "{ttl:?}");
        }
    }

    #[test]
    fn all_endpoints_have_their_chance_before_the_cluster_is_out_of_reach() {
        let mut reach = Reach::new(Some(Duration::ZERO));
        assert!(!reach.is_over_after_failure(2));
        assert!(reach.is_over_after_failure(2));
        reach.answered();
        assert!(!reach.is_over_after_failure(2));
    }

    #[test]
    fn the_holder_is_named_as_far_as_it_is_known() {
        let mut place = Place {
            key: "jobs/1f".into(),
            token: 7,
            lease: 31,
            owner: "host:1".into(),
            client: "10.0.0.1:5".into(),
            ..Place::default()
        };
        assert_eq!(holder_text(Some(&place), 1), "held by host:1 at 10.0.0.1:5, token 7, lease 1f");
        place = Place { inferred: true, owner: String::new(), client: String::new(), ..place };
        assert_eq!(holder_text(Some(&place), 1), "held by key jobs/1f, token 7, lease 1f");
        assert_eq!(holder_text(None, 2), "nobody holds it, but 2 stand before");
    }
}
