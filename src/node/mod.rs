//! One member, seen from inside: it proposes, reads, forwards to the leader, and keeps leases.
//!
//! Everything that is asked of the cluster goes through [`Node`]. Its parts:
//!
//! - [`role`]: who leads, and the clock of a leader;
//! - [`calls`] and [`propose`]: commands on their way into the log and their outcomes back;
//! - [`auth`]: who makes a call, and what is asked in its name;
//! - [`space`]: what may be proposed while alarms are raised and the quota is used up;
//! - [`read`]: the point from which a linearizable read may be answered;
//! - [`forward`]: what a follower sends to the leader, and what the leader does with it;
//! - [`failover`]: the next leader, when the one there was is gone;
//! - [`lessor`]: renewals together, and the end of leases;
//! - [`leadership`]: handing it on when asked to;
//! - [`membership`], [`members_service`], [`joining`], [`contacts`]: who belongs to the cluster;
//! - [`stall`]: a disk that hangs;
//! - [`compactor`]: the end of history that nobody wants any more;
//! - [`disk`]: what a member does when its disk has little room;
//! - [`meters`], [`facts`]: what is counted, and what is read, for whoever watches over the member;
//! - [`waiters`]: the Lock and Campaign calls that wait for their turn;
//! - [`agreement`]: whether the members have done the same;
//! - [`bootstrap`], [`upkeep`], [`shutdown`]: from a data directory to a running member and back;
//! - [`founding`]: from a saved state to a data directory.

mod agreement;
mod auth;
pub mod bootstrap;
mod calls;
mod compactor;
mod contacts;
#[cfg(test)]
mod crash_tests;
mod disk;
mod facts;
mod failover;
mod forward;
pub mod founding;
mod identity;
mod joining;
mod leadership;
mod lessor;
mod log_length;
mod members_service;
mod membership;
mod meters;
mod propose;
mod read;
mod role;
mod shutdown;
mod space;
mod stall;
mod upkeep;
mod waiters;

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::task::TaskTracker;

pub use auth::{AuthSettings, Caller, LoginFailure, PasswordFailure};
pub use bootstrap::{Faults, Member as RunningMember, Settings, Sizes, StartError, World};
pub use calls::Answer;
pub use compactor::AutoCompaction;
pub use disk::{DiskState, Room};
pub use facts::Facts;
pub use forward::ForwardService;
pub use identity::Identity;
pub use leadership::MoveFailure;
pub use members_service::{IntroductionService, MembersService};
pub use membership::{Change, ChangeFailure, ChangeRefusal, ChangeRules, Changed};
pub use meters::Meters;
pub use role::Role;
pub use waiters::{Waiters, WaitingFor};

use crate::clock::{Clock, Entropy};
use crate::machine::{Command, Image, Machine, Principal, Rejection, Reply, Store, View};
use crate::raft::applier::SharedMachine;
use crate::raft::links::{Links, Peer, Retired};
use crate::raft::peer_service::RaftHandle;
use crate::raft::succession::{Counts, Succession};
use crate::raft::traffic::Traffic;
use crate::raft::types::{Membership, OnRefused, PeerNode, is_learner};
use crate::storage::StateWriter;
use crate::types::{ClusterId, LeaseId, MemberId};
use crate::watch::Hub;

/// Why a call was not answered with its result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Rejected(#[from] Rejection),
    #[error("no leader")]
    NoLeader,
    /// The server gave up waiting; a write may still happen.
    #[error("timed out")]
    TimedOut,
    /// A linearizable read that no leader confirmed in time.
    #[error("read not confirmed in time")]
    ReadTimedOut,
    /// A write may or may not have happened.
    #[error("outcome unknown")]
    Unknown,
    #[error("stopping")]
    Stopping,
    #[error("too many requests")]
    TooManyRequests,
    /// The caller's token is none, or none any more.
    #[error("unknown token")]
    InvalidToken,
    /// This member's disk has no room for it.
    #[error("the disk is nearly full")]
    DiskFull,
}

/// What every answer says of the member and the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub cluster_id: ClusterId,
    pub member_id: MemberId,
    pub revision: i64,
    pub raft_term: u64,
}

/// A command that was applied and not rejected.
#[derive(Debug)]
pub struct Applied {
    pub revision: i64,
    pub reply: Reply,
}

/// What requests may ask for, and how long the server itself waits.
#[derive(Debug, Clone)]
pub struct Limits {
    pub max_request_bytes: usize,
    /// In each list of a transaction.
    pub max_txn_ops: usize,
    pub min_lease_ttl_seconds: i64,
    /// A call that the cluster has not answered by then is given up: etcd's five seconds and two
    /// election timeouts.
    pub call_timeout: Duration,
    pub election_timeout: Duration,
    /// How much keys, history and leases may take; `None`: as much as they need.
    pub quota_bytes: Option<u64>,
}

/// A lease as `TimeToLive` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseInfo {
    pub granted_ttl_seconds: i64,
    pub remaining: Duration,
    /// Empty unless asked for.
    pub keys: Vec<Bytes>,
}

/// A member of the cluster as `MemberList` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub id: MemberId,
    /// Empty until the member has started once.
    pub name: String,
    pub peer_urls: Vec<String>,
    pub client_urls: Vec<String>,
    pub is_learner: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    pub leader: Option<MemberId>,
    pub raft_term: u64,
    pub raft_index: u64,
    pub applied_index: u64,
    pub db_size_bytes: u64,
    pub db_size_in_use_bytes: u64,
    pub quota_bytes: Option<u64>,
    pub is_learner: bool,
}

/// What the applier tells the rest of the member, and what the rest reads without locking.
pub(crate) struct Shared {
    pub role: role::RoleTracker,
    pub calls: calls::Calls,
    pub hub: Hub,
    /// The index of the newest entry applied here.
    pub applied: watch::Sender<u64>,
    /// Wakes the router: openraft refused a proposal that may be made again.
    pub refused: Notify,
    /// Wakes the lessor: a lease may end sooner than it thought, or this member leads.
    pub lessor: Notify,
    pub waiters: Waiters,
    pub meters: Arc<Meters>,
    /// As of the newest change applied here.
    pub membership: watch::Sender<Membership>,
    /// Whether this member has no vote by the membership.
    pub learner: watch::Sender<bool>,
    /// The members that were removed, for the layer that lets calls in.
    pub retired: Arc<Retired>,
    /// Whether this member was removed.
    pub removed: watch::Sender<bool>,
    pub contacts: contacts::Contacts,
    pub space: space::Space,
    pub agreement: agreement::Agreement,
    pub auth: auth::AuthState,
}

impl Shared {
    /// The membership of the newest change applied, or of a state installed.
    pub fn on_membership(&self, me: MemberId, membership: Membership, machine: &Machine) {
        self.retired.replace(machine.retired_members());
        if machine.retired_members().contains(&me) {
            self.removed.send_replace(true);
        }
        let learner = is_learner(&membership, me.0);
        self.learner.send_if_modified(|was| std::mem::replace(was, learner) != learner);
        self.membership.send_replace(membership);
    }
}

/// This member. Used behind an `Arc`.
pub struct Node {
    identity: Identity,
    limits: Limits,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    raft: RaftHandle,
    links: Arc<Links>,
    machine: SharedMachine,
    store: Store,
    shared: Arc<Shared>,
    next_call: AtomicU64,
    reader: read::Reader,
    renewals: lessor::Renewals,
    forwarder: forward::Forwarder,
    /// For each member that forwards to this one, which of its streams is the newest.
    streams: forward::Streams,
    succession: Arc<Succession>,
    stall: stall::Stall,
    has_leader: watch::Receiver<bool>,
    writer: Arc<StateWriter>,
    disk: disk::Disk,
    stopping: watch::Sender<bool>,
    /// What goes on after its client has gone: the end of a member waits for it.
    background: TaskTracker,
    /// Told of proposals that openraft refused.
    on_refused: OnRefused,
    change_rules: ChangeRules,
    /// Held while a change of the members is made: one at a time.
    changes: tokio::sync::Mutex<()>,
}

impl Node {
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The header of an answer given now.
    pub fn header(&self) -> Header {
        Header {
            cluster_id: self.identity.cluster_id,
            member_id: self.identity.member_id,
            revision: self.store.revision(),
            raft_term: client_term(self.shared.role.get().term),
        }
    }

    /// The state applied here, at this moment.
    pub fn view(&self) -> View {
        self.store.view()
    }

    pub fn store(&self) -> Store {
        self.store.clone()
    }

    pub fn hub(&self) -> &Hub {
        &self.shared.hub
    }

    pub fn role(&self) -> Role {
        self.shared.role.get()
    }

    pub fn watch_role(&self) -> watch::Receiver<Role> {
        self.shared.role.subscribe()
    }

    pub fn leader(&self) -> Option<MemberId> {
        if *self.has_leader.borrow() { self.role().leader } else { None }
    }

    /// False while this member knows no leader that a quorum follows.
    pub fn has_leader(&self) -> watch::Receiver<bool> {
        self.has_leader.clone()
    }

    pub fn meters(&self) -> &Meters {
        &self.shared.meters
    }

    /// The members that were removed, as the layer that lets calls in must know.
    pub fn retired(&self) -> &Arc<Retired> {
        &self.shared.retired
    }

    /// What went between this member and the others.
    pub fn traffic(&self) -> &Arc<Traffic> {
        self.links.traffic()
    }

    /// What this member has done about leaders that may be gone.
    pub fn succession(&self) -> &Counts {
        self.succession.counts()
    }

    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    pub fn waiters(&self) -> &Waiters {
        &self.shared.waiters
    }

    /// For tasks that may outlive the call that began them.
    pub fn background(&self) -> &TaskTracker {
        &self.background
    }

    /// Turns true when the member begins to stop: streams end, calls are refused.
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The whole state applied here, which holds while more is applied, and the place in the log that
    /// goes with it.
    pub fn image(&self) -> (Image, u64) {
        let machine = self.machine();
        // The applier tells the place while it has the machine, too.
        (machine.image(), *self.shared.applied.borrow())
    }

    /// What keys, history and leases take, as of the newest entry applied here.
    pub fn used_bytes(&self) -> u64 {
        self.shared.space.used_bytes()
    }

    pub fn links_to(&self, member: MemberId) -> Option<Peer> {
        let metrics = self.raft.server_metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        let node = membership.membership().get_node(&member.0)?;
        self.links.peer(member.0, node).ok()
    }

    /// A positive id that no lease is likely to have.
    pub fn new_lease_id(&self) -> LeaseId {
        LeaseId(((self.entropy.random_u64() >> 1) as i64).max(1))
    }

    pub fn status(&self) -> Status {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let in_use = self.shared.space.used_bytes();
        Status {
            leader: self.leader(),
            raft_term: client_term(metrics.current_term),
            raft_index: metrics.last_log_index.unwrap_or(0),
            applied_index: *self.shared.applied.borrow(),
            // Compressed, it may take less on disk than in memory. What is in use is a part of it
            // to whoever watches over the two.
            db_size_bytes: self.writer.size_bytes().max(in_use),
            db_size_in_use_bytes: in_use,
            quota_bytes: self.limits.quota_bytes,
            is_learner: *self.shared.learner.borrow(),
        }
    }

    /// Runs `call` for at most the server's own patience.
    async fn patiently<T>(
        &self,
        call: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(self.limits.call_timeout, call).await {
            Ok(result) => result,
            Err(_) => Err(Failure::TimedOut),
        }
    }

    /// Proposes `command` in the name of `by` and returns what applying it here gave. For clients
    /// see [`Node::propose_for`].
    ///
    /// # Errors
    ///
    /// [`Failure::Rejected`] when the state machine refused it, on every member alike. After
    /// [`Failure::TimedOut`] or [`Failure::Unknown`] it may or may not be applied; after any other
    /// it is not.
    pub async fn propose(
        &self,
        by: Option<Principal>,
        command: Command,
    ) -> Result<Applied, Failure> {
        if *self.stopping.borrow() {
            return Err(Failure::Stopping);
        }
        self.check_room(&command)?;
        let answer = self.patiently(self.call(by, command)).await;
        let answer = answer.inspect_err(|_| self.meters().proposals_failed.increment())?;
        Ok(Applied { revision: answer.revision, reply: answer.reply? })
    }

    /// [`Node::propose`] that waits however long it takes, also while the member stops: for what
    /// must be known or undone.
    pub async fn propose_patiently(
        &self,
        by: Option<Principal>,
        command: Command,
    ) -> Result<Applied, Failure> {
        self.check_room(&command)?;
        let answer = self.call(by, command).await?;
        Ok(Applied { revision: answer.revision, reply: answer.reply? })
    }

    fn check_room(&self, command: &Command) -> Result<(), Failure> {
        let refused = self.disk().room < Room::Enough && disk::grows(command);
        if refused { Err(Failure::DiskFull) } else { Ok(()) }
    }

    /// The members, other than this one, that can lead.
    fn other_voters(&self) -> Vec<(u64, PeerNode)> {
        let metrics = self.raft.server_metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let others = membership.nodes().filter(|(id, _)| **id != self.identity.member_id.0);
        others.filter(|(id, _)| voters.contains(id)).map(|(id, node)| (*id, node.clone())).collect()
    }
}

/// A term as clients see it. openraft writes a cluster's first entry in term 0, etcd in term 1, and
/// etcd's clients take 0 for "none": so theirs are one higher.
fn client_term(term: u64) -> u64 {
    term + 1
}

/// Returns once `signal` is true, or will never be.
pub async fn told(signal: &mut watch::Receiver<bool>) {
    let _ = signal.wait_for(|told| *told).await;
}

/// A lock whose holder cannot panic half-way through a change of what it guards.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
