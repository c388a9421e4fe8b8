//! What a running member does all the time: follow openraft, remove compacted history, make itself
//! known.

use std::sync::Arc;
use std::time::Duration;

use openraft::Instant;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::{Notify, watch};

use super::{Node, told};
use crate::machine::Command;
use crate::raft::applier::Applier;
use crate::raft::peer_service::LeaderContact;
use crate::types::MemberId;

/// Compacted records removed between two turns of the applier.
const SCRUB_BATCH: usize = 1_000;

/// After each batch, the state writer has so many times as long as the batch took it for other things:
/// what clients write waits for its turn there.
const SCRUB_REST: u32 = 3;
const SCRUB_PAUSE: Duration = Duration::from_millis(2);

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
                    break;
                }
            }
            metrics.changed().await.map_err(|_| super::Failure::Stopping)?;
        }
        // One that joins has everything from before it was known to be there.
        let me = self.identity.member_id;
        let mut applied = self.shared.applied.subscribe();
        while !self.machine().published_members().contains_key(&me) {
            applied.changed().await.map_err(stopped)?;
        }
        Ok(())
    }

    /// Keeps the role up to date with openraft, and whether a quorum follows the leader.
    pub(super) async fn follow_raft(
        self: Arc<Self>,
        has_leader: watch::Sender<bool>,
        contact: Arc<LeaderContact>,
    ) {
        let mut has_leader = Some(has_leader);
        let mut followed = None;
        let mut server = self.raft.server_metrics();
        let metrics = self.raft.metrics();
        let mut stopping = self.stopping.subscribe();
        // How often a silent loss of the quorum is looked for.
        let mut known = None;
        let mut look = tokio::time::interval(self.limits.election_timeout / 4);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let (term, leader, connected) = {
                let now = server.borrow_and_update();
                if known != Some(*now.membership_config.log_id()) {
                    known = Some(*now.membership_config.log_id());
                    let members = now.membership_config.nodes();
                    self.links.update(members.map(|(id, node)| (*id, node.clone())).collect());
                }
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
                        let followed = heard.is_some_and(|heard| heard.elapsed() <= patience);
                        // A stalled disk keeps openraft from saying that another leads.
                        alone || (followed && !self.disk_stalled())
                    }
                    Some(_) => contact.within(self.limits.election_timeout),
                };
                (term, leader, connected)
            };
            if leader.is_none_or(|leader| followed != Some((term, leader))) {
                followed = leader.map(|leader| (term, leader));
                self.meters().leader_changes.add(u64::from(leader.is_some()));
            }
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

    /// Sends the heartbeats while this member leads. openraft takes one interval for how often it sends
    /// one and for how long it waits for the answer; over links on which that takes longer, it would
    /// never count one, and a leader without writes would lose its lease for ever.
    pub(super) async fn keep_beating(self: Arc<Self>, interval: Duration) {
        let metrics = self.raft.server_metrics();
        let mut stopping = self.stopping.subscribe();
        let mut beat = tokio::time::interval(interval);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = beat.tick() => {}
                () = told(&mut stopping) => return,
            }
            let leads = metrics.borrow_watched().state.is_leader();
            if leads && self.raft.trigger().heartbeat().await.is_err() {
                return;
            }
        }
    }

    /// Removes compacted history, a little at a time, between the entries that are applied.
    pub(super) async fn keep_scrubbing(self: Arc<Self>, wanted: Arc<Notify>) {
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
                    Ok(Ok(true)) => {}
                    Ok(Ok(false)) => break,
                    // The member stops: its faults say why.
                    Ok(Err(_)) | Err(_) => return,
                }
                let began = self.clock.monotonic();
                if self.writer.inspect(|_| ()).await.is_err() {
                    return;
                }
                let written_in = self.clock.monotonic().saturating_sub(began);
                tokio::time::sleep((written_in * SCRUB_REST).max(SCRUB_PAUSE)).await;
            }
        }
    }

    /// Tells the cluster how clients reach this member.
    pub(super) async fn publish(self: Arc<Self>, client_urls: Vec<String>) {
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
                if let Err(failure) = self.propose(None, command).await {
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
}
