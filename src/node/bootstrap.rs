//! From a data directory to a running member.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::{Instant, SnapshotPolicy};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use super::identity::{DataDir, DataDirError};
use super::role::{Role, RoleTracker};
use super::{Identity, Limits, Node, Shared, calls, forward, lessor, read, told};
use crate::clock::{Clock, Entropy};
use crate::machine::{Command, Effect, Fault, Machine};
use crate::raft::applier::{Applied, Applier, Observer};
use crate::raft::links::Links;
use crate::raft::log_store::{LogOptions, LogStore};
use crate::raft::network::NetworkFactory;
use crate::raft::peer_service::{LeaderContact, PeerService, RaftHandle};
use crate::raft::snapshot::{RaftState, blocking};
use crate::raft::types::{OnRefused, PeerNode};
use crate::storage::{Home, StateWriter, WriterOptions};
use crate::types::MemberId;
use crate::vfs::Vfs;
use crate::watch::Hub;

/// Of the engine under the state. The machine reads from memory, so this serves writing alone.
const ENGINE_CACHE_BYTES: usize = 64 << 20;

/// Entries kept behind a snapshot, so that a member that was away for a moment catches up from the
/// log.
const ENTRIES_KEPT: u64 = 5_000;
/// Entries purged at once: a purge is a record in the log.
const PURGE_BATCH: u64 = 1_024;

/// How often a silent end of openraft is looked for. What ends it has mostly been told by then.
const FAULT_LOOK: Duration = Duration::from_millis(100);

/// The others get this long to say whether they know this member.
const KNOWN_DEADLINE: Duration = Duration::from_millis(700);

/// Compacted records removed between two turns of the applier.
const SCRUB_BATCH: usize = 1_000;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("log: {0}")]
    Log(std::io::Error),
    #[error("state: {0}")]
    State(#[from] Fault),
    #[error("state: {0}")]
    Engine(std::io::Error),
    #[error("raft: {0}")]
    Raft(String),
    #[error(
        "data dir {data_dir} is empty, but the cluster knows this member: it has lost its data and \
         must not vote as if it were new; restore the folder"
    )]
    LostMember { data_dir: PathBuf },
}

/// What a member is told about itself and its cluster. All rules between the values hold.
pub struct Settings {
    pub identity: Identity,
    pub data_dir: PathBuf,
    /// Of a cluster that begins with this start.
    pub initial_members: BTreeMap<u64, PeerNode>,
    /// Where clients reach this member.
    pub client_urls: Vec<String>,
    pub heartbeat_interval: Duration,
    /// The shortest and the longest time without a leader before this member stands for election,
    /// in milliseconds.
    pub election_range_ms: (u64, u64),
    /// Entries between two snapshots, and so between two purges of the log.
    pub snapshot_count: u64,
    pub limits: Limits,
}

/// What the outside world is handed in as.
pub struct World {
    pub clock: Arc<dyn Clock>,
    pub entropy: Arc<dyn Entropy>,
    pub vfs: Arc<dyn Vfs>,
}

/// A running member: the node, what its peers call, and the tasks behind both.
pub struct Member {
    pub node: Arc<Node>,
    pub peer_service: Arc<PeerService>,
    pub(super) raft: RaftHandle,
    pub(super) writer: Arc<StateWriter>,
    pub(super) tasks: JoinSet<()>,
    pub(super) log: LogStore,
    /// Held until the member has stopped.
    pub(super) _data_dir: DataDir,
}

/// Tells when this member cannot go on.
pub struct Faults {
    log: watch::Receiver<Option<crate::raft::log_store::LogFault>>,
    state: watch::Receiver<Option<crate::storage::StorageFault>>,
    raft: RaftHandle,
}

impl Faults {
    /// Returns why the member must stop, once it must.
    pub async fn wait(&mut self) -> String {
        let metrics = self.raft.metrics();
        let mut server = self.raft.server_metrics();
        // Looked for now and then: these metrics change with every entry.
        let raft = async {
            loop {
                if let Err(fatal) = &metrics.borrow_watched().running_state {
                    return format!("raft: {fatal}");
                }
                let changed = tokio::time::timeout(FAULT_LOOK, server.changed()).await;
                if let Ok(Err(_)) = changed {
                    // Its task is gone, in order or by a panic.
                    return "raft has stopped".to_owned();
                }
            }
        };
        tokio::select! {
            fault = self.log.wait_for(Option::is_some) => match fault {
                Ok(fault) => format!("log: {}", fault.as_ref().map_or(String::new(), |f| f.to_string())),
                Err(_) => "the log has stopped".to_owned(),
            },
            fault = self.state.wait_for(Option::is_some) => match fault {
                Ok(fault) => fault.as_ref().map_or(String::new(), |f| f.to_string()),
                Err(_) => "the state writer has stopped".to_owned(),
            },
            reason = raft => reason,
        }
    }
}

/// Opens the data directory, recovers log and state, and starts the member. It talks to its peers
/// from now on, but clients are to be served only after [`Node::recovered`].
pub async fn start(settings: &Settings, world: World) -> Result<(Member, Faults), StartError> {
    let identity = settings.identity.clone();
    let data_dir = DataDir::open(&settings.data_dir, &identity)?;
    let home = Arc::new(Home::Disk { root: data_dir.state(), cache_bytes: ENGINE_CACHE_BYTES });

    let opening = home.clone();
    let opened = blocking(move || {
        let engine = opening.open()?;
        let loaded = Applier::load(engine.as_ref());
        Ok((engine, loaded))
    });
    let (engine, loaded) = opened
        .await
        .map_err(|status| StartError::Engine(std::io::Error::other(status.message().to_owned())))?;
    let (machine, state) = loaded?;
    let applied_index = state.applied.map_or(0, |applied| applied.index);
    let writer = StateWriter::start(engine, applied_index, WriterOptions::default())
        .map_err(StartError::Engine)?;
    let writer = Arc::new(writer);

    let log = LogStore::open(world.vfs.clone(), data_dir.log(), LogOptions::default())
        .map_err(StartError::Log)?;
    let faults_log = log.watch_fault();
    let (node, raft, peer_service, tasks) =
        assemble(settings, identity, world, home, machine, state, writer.clone(), log.clone())
            .await?;
    let faults = Faults { log: faults_log, state: writer.fault(), raft: raft.clone() };
    let member = Member { node, peer_service, raft, writer, tasks, log, _data_dir: data_dir };
    Ok((member, faults))
}

#[allow(clippy::too_many_arguments, reason = "the parts of a member, each made once")]
async fn assemble(
    settings: &Settings,
    identity: Identity,
    world: World,
    home: Arc<Home>,
    machine: Machine,
    state: RaftState,
    writer: Arc<StateWriter>,
    log: LogStore,
) -> Result<(Arc<Node>, RaftHandle, Arc<PeerService>, JoinSet<()>), StartError> {
    let me = identity.member_id;
    let store = machine.store();
    let shared = Arc::new(Shared {
        role: RoleTracker::new(me, world.clock.clone()),
        calls: calls::Calls::default(),
        hub: Hub::new(store.clone()),
        applied: watch::Sender::new(state.applied.map_or(0, |applied| applied.index)),
        refused: Notify::new(),
        lessor: Notify::new(),
        waiters: super::Waiters::default(),
    });
    let scrub = Arc::new(Notify::new());
    // History that a crash left to be removed.
    scrub.notify_one();
    let machine = Arc::new(Mutex::new(machine));
    let observer = observer(me, shared.clone(), scrub.clone());
    let applier = Applier::new(machine.clone(), state, writer.clone(), home.clone(), observer);
    let links = Arc::new(Links::new(identity.cluster_id, me));
    let raft = RaftHandle::new(
        me.0,
        Arc::new(raft_config(settings, &identity)?),
        NetworkFactory { links: links.clone() },
        log,
        applier,
    )
    .await
    .map_err(|error| StartError::Raft(error.to_string()))?;

    if !raft.is_initialized().await.map_err(|error| StartError::Raft(error.to_string()))? {
        refuse_lost_member(settings, me, &links).await?;
        raft.initialize(settings.initial_members.clone())
            .await
            .map_err(|error| StartError::Raft(error.to_string()))?;
    }
    if raft.voter_ids().eq([me.0]) {
        // Nobody else could be elected: there is nothing to wait for.
        raft.trigger().elect(false).await.map_err(|error| StartError::Raft(error.to_string()))?;
    }

    let (has_leader_sender, has_leader) = watch::channel(false);
    let refusals = shared.clone();
    let on_refused: OnRefused = Arc::new(move |call, term| {
        refusals.calls.unsend(call, calls::Sent { term, stream: 0 });
        refusals.refused.notify_one();
    });
    let node = Arc::new(Node {
        limits: settings.limits.clone(),
        next_call: AtomicU64::new(world.entropy.random_u64()),
        identity,
        clock: world.clock,
        entropy: world.entropy,
        raft: raft.clone(),
        links,
        machine,
        store,
        shared,
        reader: read::Reader::default(),
        renewals: lessor::Renewals::default(),
        forwarder: forward::Forwarder::new(),
        streams: forward::Streams::default(),
        has_leader,
        writer: writer.clone(),
        stopping: watch::Sender::new(false),
        background: TaskTracker::new(),
        on_refused,
    });
    let contact = Arc::new(LeaderContact::new(node.clock.clone()));
    let mut tasks = JoinSet::new();
    tasks.spawn(node.clone().route());
    tasks.spawn(node.clone().keep_forwarding());
    tasks.spawn(node.clone().keep_reading());
    tasks.spawn(node.clone().keep_renewing());
    tasks.spawn(node.clone().keep_expiring());
    tasks.spawn(node.clone().follow_raft(has_leader_sender, contact.clone()));
    tasks.spawn(node.clone().keep_scrubbing(scrub));
    tasks.spawn(node.clone().publish(settings.client_urls.clone()));
    let peer_service = Arc::new(PeerService {
        raft: raft.clone(),
        home,
        contact,
        receiving: tokio::sync::Mutex::default(),
    });
    Ok((node, raft, peer_service, tasks))
}

/// A member that comes back without its data must not vote as if it had never been: what it
/// acknowledged would be lost. The others know of it.
async fn refuse_lost_member(
    settings: &Settings,
    me: MemberId,
    links: &Links,
) -> Result<(), StartError> {
    let others = settings.initial_members.iter().filter(|(id, _)| **id != me.0);
    let questions = others.map(|(id, node)| async move {
        let mut client = links.peer(*id, node).ok()?.forward();
        let question = crate::raft::frame::encode(&me).ok()?;
        let answer = tokio::time::timeout(KNOWN_DEADLINE, client.known(question)).await;
        crate::raft::frame::decode::<bool>(answer.ok()?.ok()?.get_ref()).ok()
    });
    // One that does not answer may not have started yet.
    if futures::future::join_all(questions).await.contains(&Some(true)) {
        return Err(StartError::LostMember { data_dir: settings.data_dir.clone() });
    }
    Ok(())
}

fn raft_config(settings: &Settings, identity: &Identity) -> Result<openraft::Config, StartError> {
    let (election_timeout_min, election_timeout_max) = settings.election_range_ms;
    let heartbeat_interval = u64::try_from(settings.heartbeat_interval.as_millis())
        .map_err(|_| StartError::Raft("the heartbeat interval is too long".to_owned()))?;
    let raft = openraft::Config {
        cluster_name: identity.cluster_id.to_string(),
        heartbeat_interval,
        election_timeout_min,
        election_timeout_max,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(settings.snapshot_count),
        max_in_snapshot_log_to_keep: ENTRIES_KEPT,
        purge_batch_size: PURGE_BATCH,
        // A follower behind this is sent a snapshot even though the log still reaches it.
        replication_lag_threshold: settings.snapshot_count.saturating_add(10 * ENTRIES_KEPT),
        install_snapshot_timeout: 600_000,
        broadcast_submitted_on_append: Some(true),
        enable_pre_vote: Some(true),
        enable_leader_restore: Some(false),
        allow_log_reversion: Some(false),
        backoff: "50ms 100ms 200ms ...500ms".to_owned(),
        ..openraft::Config::default()
    };
    raft.validate().map_err(|error| StartError::Raft(error.to_string()))
}

/// Tells the member's parts of each applied entry.
fn observer(me: MemberId, shared: Arc<Shared>, scrub: Arc<Notify>) -> Observer {
    Box::new(move |machine, applied| {
        let position = match applied {
            Applied::Entry { position, entry, outcome } => {
                shared.hub.publish(outcome.revision, &outcome.events);
                shared.waiters.on_effects(&outcome.effects, outcome.revision);
                if outcome.effects.iter().any(|effect| matches!(effect, Effect::LeaseHeld { .. })) {
                    shared.lessor.notify_one();
                }
                if matches!(entry.command, Command::Compact { .. }) {
                    scrub.notify_one();
                }
                if entry.origin.member == me {
                    shared.calls.answer(entry.origin.call, outcome);
                }
                position
            }
            Applied::Other { position, .. } => position,
            Applied::Installed { position } => {
                shared.hub.reset();
                shared.calls.fail_sent();
                position
            }
        };
        shared.applied.send_replace(position.index);
        shared.role.on_applied(position.term, machine.now());
    })
}

impl Node {
    /// Returns once this member has applied everything it may ever have shown to a client, and
    /// knows a leader. Without a quorum it does not return.
    pub async fn recovered(&self) -> Result<(), super::Failure> {
        let stopped = |_| super::Failure::Stopping;
        let found = self.raft.metrics().borrow_watched().last_log_index;
        self.has_leader.clone().wait_for(|has| *has).await.map_err(stopped)?;
        let mut metrics = self.raft.metrics();
        loop {
            {
                // What was found and never committed may be gone by now.
                let now = metrics.borrow_and_update();
                let wanted = found.min(now.last_log_index);
                let committed = now.cluster_committed.map(|log_id| log_id.index);
                let applied = now.last_applied.map(|log_id| log_id.index);
                if committed.is_some() && committed >= wanted && applied >= wanted {
                    return Ok(());
                }
            }
            metrics.changed().await.map_err(|_| super::Failure::Stopping)?;
        }
    }

    /// Keeps the role up to date with openraft, and whether a quorum follows the leader.
    async fn follow_raft(
        self: Arc<Self>,
        has_leader: watch::Sender<bool>,
        contact: Arc<LeaderContact>,
    ) {
        let mut has_leader = Some(has_leader);
        let mut server = self.raft.server_metrics();
        let metrics = self.raft.metrics();
        let mut stopping = self.stopping.subscribe();
        // How often a silent loss of the quorum is looked for.
        let mut look = tokio::time::interval(self.limits.election_timeout / 4);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let (term, leader, connected) = {
                let now = server.borrow_and_update();
                // The vote shown is the last durable one, the leader may be of a later one.
                let voted = now.vote.leader_id.voted_for;
                let leader = now.current_leader.filter(|leader| *leader == voted).map(MemberId);
                let alone = now.membership_config.voter_ids().count() == 1;
                let term = now.vote.leader_id.term;
                let connected = match leader {
                    None => false,
                    Some(leader) if leader == self.identity.member_id => {
                        let patience = self.limits.election_timeout;
                        let heard = metrics.borrow_watched().last_quorum_acked;
                        alone || heard.is_some_and(|heard| heard.elapsed() <= patience)
                    }
                    Some(_) => contact.within(self.limits.election_timeout),
                };
                (term, leader, connected)
            };
            {
                // Held so that no entry is applied between its time and the promotion.
                let machine = self.machine();
                self.shared.role.on_raft(term, leader, machine.now());
            }
            if let Some(has_leader) = &has_leader {
                has_leader.send_if_modified(|has| std::mem::replace(has, connected) != connected);
            }
            tokio::select! {
                changed = server.changed() => if changed.is_err() { return },
                _ = look.tick() => {}
                // Streams end with the sender; the role is still needed.
                () = told(&mut stopping), if has_leader.is_some() => has_leader = None,
            }
        }
    }

    /// Removes compacted history, a little at a time, between the entries that are applied.
    async fn keep_scrubbing(self: Arc<Self>, wanted: Arc<Notify>) {
        let mut stopping = self.stopping.subscribe();
        loop {
            tokio::select! {
                () = wanted.notified() => {}
                () = told(&mut stopping) => return,
            }
            loop {
                let step = self
                    .raft
                    .with_state_machine(|applier: &mut Applier| {
                        Box::pin(applier.scrub(SCRUB_BATCH))
                    })
                    .await;
                match step {
                    Ok(Ok(true)) => tokio::time::sleep(Duration::from_millis(2)).await,
                    Ok(Ok(false)) => break,
                    // The member stops: its faults say why.
                    Ok(Err(_)) | Err(_) => return,
                }
            }
        }
    }

    /// Tells the cluster how clients reach this member.
    async fn publish(self: Arc<Self>, client_urls: Vec<String>) {
        let mut stopping = self.stopping.subscribe();
        let me = self.identity.member_id;
        let attempts = async {
            loop {
                let known = self.machine().published_members().get(&me).cloned();
                if known.is_some_and(|known| {
                    known.name == self.identity.name && known.client_urls == client_urls
                }) {
                    return;
                }
                let name = self.identity.name.clone();
                let client_urls = client_urls.clone();
                let command = Command::PublishMember { id: me, name, client_urls };
                if let Err(failure) = self.propose(command).await {
                    tracing::debug!(%failure, "not yet published");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        tokio::select! {
            () = attempts => {}
            () = told(&mut stopping) => {}
        }
    }

    /// The index of the newest entry applied here.
    pub(crate) fn applied_index(&self) -> u64 {
        *self.shared.applied.borrow()
    }

    /// Waits until entry `index` is applied here.
    pub(crate) async fn applied_up_to_entry(&self, index: u64) -> Result<(), super::Failure> {
        self.patiently(self.applied_up_to(index)).await
    }

    /// Whether this member leads now.
    pub fn is_leading(role: &Role) -> bool {
        role.leading.is_some()
    }
}
