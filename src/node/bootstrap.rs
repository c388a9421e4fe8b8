//! From a data directory to a running member.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::SnapshotPolicy;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use super::auth::{AuthSettings, AuthState};
use super::contacts::Contacts;
use super::disk::{Disk, Room};
use super::identity::{DataDir, DataDirError};
use super::joining;
use super::membership::ChangeRules;
use super::role::RoleTracker;
use super::{AutoCompaction, Identity, Limits, Meters, Node, Shared, calls, forward, lessor, read};
use crate::clock::{Clock, Entropy};
use crate::machine::{Command, Effect, Fault, Machine};
use crate::raft::applier::{Applied, Applier, Observer, Pace};
use crate::raft::links::{Dial, Links, says_other_cluster, says_removed};
use crate::raft::log_store::{Drive, LogOptions, LogStore};
use crate::raft::network::NetworkFactory;
use crate::raft::peer_service::{LeaderContact, PeerService, RaftHandle};
use crate::raft::snapshot::{RaftState, blocking};
use crate::raft::succession::Succession;
use crate::raft::types::{OnRefused, PeerNode, is_learner};
use crate::storage::{Engines, Home, StateWriter, WriterOptions};
use crate::types::MemberId;
use crate::vfs::Vfs;
use crate::watch::Hub;

/// Of the engine under the state. The machine reads from memory, so this serves writing alone.
pub const ENGINE_CACHE_BYTES: usize = 8 << 20;

/// How often a silent end of openraft is looked for. What ends it has mostly been told by then.
const FAULT_LOOK: Duration = Duration::from_millis(100);

/// Looking whether a leader is gone takes at most this part of the election timeout.
const LOOKS_IN_ELECTION_TIMEOUT: u32 = 10;

/// The others get this long to say whether they know this member.
const KNOWN_DEADLINE: Duration = Duration::from_millis(700);

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
    #[error("disk: {0}")]
    Disk(std::io::Error),
    #[error("raft: {0}")]
    Raft(String),
    #[error(
        "data dir {data_dir} is empty, but the cluster knows this member: it has lost its data and \
         must not vote as if it were new; restore the folder"
    )]
    LostMember { data_dir: PathBuf },
    #[error(
        "the member at {peer_urls}, which --initial-cluster lists, belongs to another cluster: \
         correct --initial-cluster or its token; or, where that cluster was restored from a \
         snapshot, restore this member from the same one, or add it as a new member"
    )]
    OtherCluster { peer_urls: String },
    #[error(
        "the member has been permanently removed from the cluster: add it again as a new one, and \
         give it an empty data dir"
    )]
    Removed,
    #[error(
        "--initial-cluster-state=existing, but none of the members in --initial-cluster answers: \
         start them first, or correct their URLs"
    )]
    NobodyToJoin,
    #[error("--initial-cluster lists members of several clusters: correct their URLs")]
    SeveralClusters,
    #[error(
        "--initial-cluster-state=existing, but no member of the cluster has the peer URLs \
         {peer_urls}: add it first, as by etcdctl member add"
    )]
    NotAdded { peer_urls: String },
    #[error(
        "--initial-cluster lists {listed}, but the members of the cluster are at {members}: make \
         them equal"
    )]
    OtherMembers { listed: String, members: String },
}

/// What a member is told about itself and its cluster. All rules between the values hold.
pub struct Settings {
    /// The cluster's id is the one that the flags describe: [`DataDir::cluster_id`].
    pub identity: Identity,
    pub data_dir: PathBuf,
    /// Of a cluster that begins with this start.
    pub initial_members: BTreeMap<u64, PeerNode>,
    /// The cluster is there already: this member has been added to it, and `identity` holds only
    /// until the others, or the data, say who it is.
    pub joins: bool,
    pub change_rules: ChangeRules,
    /// Where clients reach this member.
    pub client_urls: Vec<String>,
    pub heartbeat_interval: Duration,
    /// The shortest and the longest time without a leader before this member stands for election,
    /// in milliseconds.
    pub election_range_ms: (u64, u64),
    /// Entries between two snapshots, and so between two purges of the log.
    pub snapshot_count: u64,
    /// `None` keeps all history until a client compacts it.
    pub auto_compaction: Option<AutoCompaction>,
    /// An entry that takes this long to apply is worth a warning.
    pub slow_apply: Duration,
    pub limits: Limits,
    pub auth: AuthSettings,
    pub sizes: Sizes,
}

/// What is small in a simulation, so that it happens there at all.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// Entries kept behind a snapshot, so that a member that was away for a moment catches up from
    /// the log.
    pub entries_kept: u64,
    /// Entries purged at once: a purge is a record in the log.
    pub purge_batch: u64,
    /// Preallocated length of a segment of the log.
    pub log_segment_bytes: u64,
    /// Segments of the log kept before the newest one, however few entries that are.
    pub log_segments_kept: u64,
    /// The state writer of a simulation, which has no clock, flushes after so much.
    pub simulated_flush_bytes: usize,
}

impl Default for Sizes {
    fn default() -> Sizes {
        Sizes {
            entries_kept: 5_000,
            purge_batch: 1_024,
            log_segment_bytes: 16 << 20,
            log_segments_kept: 2,
            simulated_flush_bytes: 16 << 10,
        }
    }
}

/// What the outside world is handed in as.
pub struct World {
    pub clock: Arc<dyn Clock>,
    pub entropy: Arc<dyn Entropy>,
    pub vfs: Arc<dyn Vfs>,
    /// What keeps the state, on that file system.
    pub engines: Arc<dyn Engines>,
    /// How the other members are reached.
    pub dial: Arc<dyn Dial>,
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
    agreement: watch::Receiver<Option<String>>,
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
            // The disk's errors first: raft stops of them, and knows less.
            biased;
            fault = self.log.wait_for(Option::is_some) => match fault {
                Ok(fault) => format!("log: {}", fault.as_ref().map_or(String::new(), |f| f.to_string())),
                Err(_) => "the log has stopped".to_owned(),
            },
            fault = self.state.wait_for(Option::is_some) => match fault {
                Ok(fault) => fault.as_ref().map_or(String::new(), |f| f.to_string()),
                Err(_) => "the state writer has stopped".to_owned(),
            },
            fault = self.agreement.wait_for(Option::is_some) => match fault {
                Ok(fault) => fault.clone().unwrap_or_default(),
                Err(_) => "the member has stopped".to_owned(),
            },
            reason = raft => reason,
        }
    }
}

/// Opens the data directory, recovers log and state, and starts the member. It talks to its peers
/// from now on, but clients are to be served only after [`Node::recovered`].
pub async fn start(settings: &Settings, world: World) -> Result<(Member, Faults), StartError> {
    let identity = joining::identity(settings).await?;
    let mut data_dir = DataDir::open(world.vfs.clone(), &settings.data_dir, &identity)?;
    let meters = Arc::new(Meters::default());
    let stores = Stores::open(settings, &data_dir, &world, &meters).await?;
    data_dir.log_begun()?;
    let disk = Disk::watch(world.vfs.clone(), data_dir.path().to_owned());
    let disk = disk.map_err(StartError::Disk)?;
    let (log, writer) = (stores.log.clone(), stores.writer.clone());
    let identity = Identity { cluster_id: data_dir.cluster_id(), ..identity };
    if stores.machine.retired_members().contains(&identity.member_id) {
        return Err(StartError::Removed);
    }
    let (node, peer_service, tasks) =
        assemble(settings, identity, world, stores, disk, meters).await?;
    let raft = peer_service.raft.clone();
    let faults = Faults {
        log: log.watch_fault(),
        state: writer.fault(),
        agreement: node.watch_agreement_fault(),
        raft: raft.clone(),
    };
    let member = Member { node, peer_service, raft, writer, tasks, log, _data_dir: data_dir };
    Ok((member, faults))
}

/// What a member keeps on disk, opened and read.
struct Stores {
    home: Arc<Home>,
    machine: Machine,
    state: RaftState,
    writer: Arc<StateWriter>,
    log: LogStore,
}

impl Stores {
    async fn open(
        settings: &Settings,
        data_dir: &DataDir,
        world: &World,
        meters: &Meters,
    ) -> Result<Stores, StartError> {
        let vfs = world.vfs.clone();
        let home = Home::new(data_dir.state(), vfs.clone(), world.engines.clone());
        let home = Arc::new(home);
        let opening = home.clone();
        let simulated = home.is_simulated();
        let opened = blocking(simulated, move || {
            let engine = opening.open()?;
            let loaded = Applier::load(engine.as_ref());
            Ok((engine, loaded))
        });
        let failed = |status: tonic::Status| std::io::Error::other(status.message().to_owned());
        let (engine, loaded) = opened.await.map_err(|status| StartError::Engine(failed(status)))?;
        let (machine, state) = loaded?;
        let applied_index = state.applied.map_or(0, |applied| applied.index);
        let flushes = meters.state_flush.clone();
        let options = WriterOptions {
            flush_observer: Some(Arc::new(move |took| flushes.observe(took))),
            ..WriterOptions::default()
        };
        let writer = if simulated {
            let flush_bytes = settings.sizes.simulated_flush_bytes;
            let options = WriterOptions { flush_bytes, flush_observer: None, ..options };
            StateWriter::start_inline(engine, applied_index, options)
        } else {
            let writer = StateWriter::start(engine, applied_index, options);
            writer.map_err(StartError::Engine)?
        };
        let syncs = meters.log_sync.clone();
        let options = LogOptions {
            sync_observer: Some(Arc::new(move |took| syncs.observe(took))),
            segment_bytes: settings.sizes.log_segment_bytes,
            drive: if simulated { Drive::Task } else { Drive::Thread },
            ..LogOptions::default()
        };
        let log = LogStore::open(vfs, data_dir.log(), options).map_err(StartError::Log)?;
        Ok(Stores { home, machine, state, writer: Arc::new(writer), log })
    }
}

async fn assemble(
    settings: &Settings,
    identity: Identity,
    world: World,
    stores: Stores,
    disk: Disk,
    meters: Arc<Meters>,
) -> Result<(Arc<Node>, Arc<PeerService>, JoinSet<()>), StartError> {
    let Stores { home, machine, state, writer, log } = stores;
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
        meters: meters.clone(),
        membership: watch::Sender::new(state.membership.clone()),
        learner: watch::Sender::new(is_learner(&state.membership, me.0)),
        retired: Arc::default(),
        removed: watch::Sender::new(false),
        contacts: Contacts::default(),
        space: super::space::Space::default(),
        agreement: super::agreement::Agreement::default(),
        auth: AuthState::new(settings.auth, world.clock.clone(), &machine),
    });
    shared.retired.replace(machine.retired_members());
    shared.space.note(&machine);
    shared.agreement.note(state.applied.map_or(0, |applied| applied.index), machine.digest());
    let scrub = Arc::new(Notify::new());
    // History that a crash left to be removed.
    scrub.notify_one();
    let machine = Arc::new(Mutex::new(machine));
    let observer = observer(me, shared.clone(), scrub.clone());
    let pace = Pace {
        clock: world.clock.clone(),
        slow_after: settings.slow_apply,
        slow: meters.slow_applies.clone(),
    };
    let applier =
        Applier::new(machine.clone(), state, writer.clone(), home.clone(), observer, pace);
    let links = Links::new(identity.cluster_id, me, world.clock.clone());
    let links = Arc::new(links.over(world.dial));
    let config = Arc::new(raft_config(settings, &identity)?);
    let network = NetworkFactory { links: links.clone() };
    let stall = super::stall::Stall::new(log.under_way());
    let kept_log = log.clone();
    let raft = RaftHandle::new(me.0, config, network, log, applier)
        .await
        .map_err(|error| StartError::Raft(error.to_string()))?;
    begin_cluster(settings, me, &links, &raft).await?;

    let contact = Arc::new(LeaderContact::new(world.clock.clone()));
    let patience = settings.limits.election_timeout / LOOKS_IN_ELECTION_TIMEOUT;
    let succession =
        Arc::new(Succession::new(me, raft.clone(), links.clone(), contact.clone(), patience));
    let (has_leader_sender, has_leader) = watch::channel(false);
    let refusals = shared.clone();
    let on_refused: OnRefused = Arc::new(move |call, term| {
        refusals.calls.unsend(call, calls::Sent { term, stream: 0 });
        refusals.refused.notify_one();
    });
    let room = disk.subscribe();
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
        succession: succession.clone(),
        stall,
        has_leader,
        writer,
        disk,
        stopping: watch::Sender::new(false),
        background: TaskTracker::new(),
        on_refused,
        change_rules: settings.change_rules,
        changes: tokio::sync::Mutex::default(),
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(node.clone().route());
    tasks.spawn(node.clone().keep_forwarding());
    tasks.spawn(node.clone().keep_succeeding());
    tasks.spawn(node.clone().keep_watching_disk());
    tasks.spawn(node.clone().keep_beating(settings.heartbeat_interval));
    tasks.spawn(node.clone().keep_reading());
    tasks.spawn(node.clone().keep_renewing());
    tasks.spawn(node.clone().keep_expiring());
    tasks.spawn(node.clone().follow_raft(has_leader_sender, contact.clone()));
    tasks.spawn(node.clone().keep_scrubbing(scrub));
    tasks.spawn(node.clone().keep_log_short(kept_log, settings.sizes.log_segments_kept));
    tasks.spawn(node.clone().keep_in_touch());
    tasks.spawn(node.clone().keep_promoting());
    tasks.spawn(node.clone().keep_agreeing());
    tasks.spawn(node.clone().keep_room_for_leader());
    if let Some(asked) = settings.auto_compaction {
        tasks.spawn(node.clone().keep_compacting(asked));
    }
    tasks.spawn(node.clone().publish(settings.client_urls.clone()));
    let peer_service = Arc::new(PeerService {
        raft,
        home,
        contact,
        succession,
        receiving: tokio::sync::Mutex::default(),
        takes_entries: Arc::new(move || room.borrow().room > Room::Full),
    });
    Ok((node, peer_service, tasks))
}

/// Begins the cluster on the first start.
async fn begin_cluster(
    settings: &Settings,
    me: MemberId,
    links: &Links,
    raft: &RaftHandle,
) -> Result<(), StartError> {
    if !raft.is_initialized().await.map_err(|error| StartError::Raft(error.to_string()))? {
        if settings.joins {
            // The leader sends it what there is. It must not have been sent any before.
            return match joining::introduced(settings).await? {
                known if known.member_id == me => Ok(()),
                _ => Err(StartError::LostMember { data_dir: settings.data_dir.clone() }),
            };
        }
        refuse_lost_member(settings, me, links).await?;
        raft.initialize(settings.initial_members.clone())
            .await
            .map_err(|error| StartError::Raft(error.to_string()))?;
    } else if raft.server_metrics().borrow_watched().vote.leader_id.term == 0 {
        // It has a state and was never part of an election: restored, perhaps for the second time.
        match refuse_lost_member(settings, me, links).await {
            // Somebody who was forgotten and started empty: not this one is wrong.
            Ok(()) | Err(StartError::OtherCluster { .. }) => {}
            Err(refusal) => return Err(refusal),
        }
    }
    if raft.voter_ids().eq([me.0]) {
        // Nobody else could be elected: there is nothing to wait for.
        raft.trigger().elect(false).await.map_err(|error| StartError::Raft(error.to_string()))?;
    }
    Ok(())
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
        match tokio::time::timeout(KNOWN_DEADLINE, client.known(question)).await.ok()? {
            Ok(answer) => {
                let known = crate::raft::frame::decode::<bool>(answer.get_ref()).ok()?;
                known.then(|| StartError::LostMember { data_dir: settings.data_dir.clone() })
            }
            Err(status) if says_removed(&status) => Some(StartError::Removed),
            Err(status) => says_other_cluster(&status)
                .then(|| StartError::OtherCluster { peer_urls: node.peer_urls.join(",") }),
        }
    });
    // One that does not answer may not have started yet.
    let answers = futures::future::join_all(questions).await;
    let mut refusals: Vec<StartError> = answers.into_iter().flatten().collect();
    // Who knows this member tells more than who belongs elsewhere.
    refusals.sort_by_key(|refusal| matches!(refusal, StartError::OtherCluster { .. }));
    refusals.into_iter().next().map_or(Ok(()), Err)
}

fn raft_config(settings: &Settings, identity: &Identity) -> Result<openraft::Config, StartError> {
    let (election_timeout_min, election_timeout_max) = settings.election_range_ms;
    let raft = openraft::Config {
        cluster_name: identity.cluster_id.to_string(),
        // How long the answer to a heartbeat may take; how often one is sent, `keep_beating` says.
        heartbeat_interval: election_timeout_min * 9 / 10,
        // A leader that is not answered is silent by turns, or those who hear it would never elect
        // another. The shortest that openraft takes.
        quorum_loss_probe_interval: Some(2 * election_timeout_max),
        election_timeout_min,
        election_timeout_max,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(settings.snapshot_count),
        max_in_snapshot_log_to_keep: settings.sizes.entries_kept,
        purge_batch_size: settings.sizes.purge_batch,
        // A follower behind this is sent a snapshot even though the log still reaches it.
        replication_lag_threshold: settings
            .snapshot_count
            .saturating_add(10 * settings.sizes.entries_kept),
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
        shared.space.note(machine);
        let position = match applied {
            Applied::Entry { position, entry, outcome } => {
                if let Ok(reply) = &outcome.reply {
                    shared.meters.count(reply);
                }
                shared.hub.publish(outcome.revision, &outcome.events);
                shared.waiters.on_effects(&outcome.effects, outcome.revision);
                if outcome.effects.iter().any(|effect| matches!(effect, Effect::LeaseHeld { .. })) {
                    shared.lessor.notify_one();
                }
                match &entry.command {
                    Command::Compact { .. } => scrub.notify_one(),
                    // Leases end again.
                    Command::Alarm(_) => shared.lessor.notify_one(),
                    Command::Auth(change) if outcome.reply.is_ok() => {
                        shared.auth.on_change(machine, change);
                    }
                    _ => {}
                }
                if entry.origin.member == me {
                    shared.calls.answer(entry.origin.call, outcome);
                }
                position
            }
            Applied::Other { position, membership } => {
                if let Some(membership) = membership {
                    shared.on_membership(me, membership, machine);
                }
                position
            }
            Applied::Installed { position, membership } => {
                shared.on_membership(me, membership, machine);
                shared.hub.reset();
                shared.agreement.reset();
                shared.waiters.on_installed();
                shared.auth.on_installed(machine);
                shared.calls.fail_sent();
                position
            }
        };
        shared.agreement.note(position.index, machine.digest());
        shared.applied.send_replace(position.index);
        shared.role.on_applied(position.term, machine.now());
    })
}
