//! One run of one cell, from the network to the record.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use holdfast_client_tests::addresses::Addresses;
use holdfast_client_tests::program::command;
use tokio::time::Instant;

use crate::cell::{Fault, Setup, Workload};
use crate::disks::Disk;
use crate::members::Members;
use crate::nemesis::{self, Nemesis};
use crate::net::Net;
use crate::record::{self, Deeds, HISTORY, Line, What};
use crate::resources::Sampler;
use crate::witness::Witnesses;
use crate::workloads::Running;

/// All members serve this soon after their first start.
const START: Duration = Duration::from_secs(30);
/// The load is given this long to come up before its rate is taken.
const WARM_UP: Duration = Duration::from_secs(2);
/// In which nothing is wrong and the rate is taken.
const QUIET: Duration = Duration::from_secs(5);
/// At the end nothing is wrong for so long.
const TAIL: Duration = Duration::from_secs(3);
/// Clients end within this time.
const STOP: Duration = Duration::from_secs(90);
/// Between two questions who leads.
const ASK_LEADER: Duration = Duration::from_millis(250);

/// Of each member's disk, where a fault needs one: room for some log segments and the state.
const DISK_MIB: u64 = 400;

/// Entries between two snapshots, where a fault is to make members need one.
const SNAPSHOT_COUNT: &str = "1000";

/// Runs it and leaves the record in `dir`.
///
/// # Errors
///
/// If it could not be set up.
pub async fn run(setup: &Setup, dir: &Path) -> Result<(), String> {
    let deeds = Arc::new(Deeds::create(dir)?);
    deeds.note(What::Setup(setup.clone()));
    let net = Net::new(setup.members)?;
    let mut flags = Vec::new();
    if matches!(setup.fault, Fault::Snapshot | Fault::All) {
        flags.extend(["--snapshot-count", SNAPSHOT_COUNT]);
    }
    let retention = setup.retention.map(|revisions| revisions.to_string());
    if let Some(revisions) = &retention {
        flags.extend([
            "--auto-compaction-mode",
            "revision",
            "--auto-compaction-retention",
            revisions,
        ]);
    }
    let binary = PathBuf::from(&setup.binary);
    let mut members = Members::prepare(dir, &binary, &net, setup.members, &flags);
    let mut disks = Vec::new();
    if setup.fault.needs_disks() {
        for member in 0..setup.members {
            let image = dir.join(format!("disk-{member}.img"));
            disks.push(Disk::make(&image, members.data(member), DISK_MIB)?);
        }
    }
    if setup.fault == Fault::ClockJump {
        nemesis::prepare_clocks(&mut members)?;
    }
    let everyone: Vec<usize> = (0..setup.members).collect();
    for member in &everyone {
        members.start(*member)?;
    }
    let left = members.not_serving(&everyone, START).await;
    if !left.is_empty() {
        return Err(format!("members {left:?} do not serve; see the logs in {}", dir.display()));
    }
    let sampler = Sampler::start(dir, &members)?;
    let history = whole_run(setup, &mut members, &net, &disks, &deeds).await?;
    drop(sampler);
    record::write(&dir.join(HISTORY), &history)
}

async fn whole_run(
    setup: &Setup,
    members: &mut Members,
    net: &Net,
    disks: &[Disk],
    deeds: &Arc<Deeds>,
) -> Result<Vec<Line>, String> {
    let addresses = members.addresses().clone();
    let asking = tokio::spawn(ask_who_leads(addresses.clone(), deeds.clone()));
    // The watches of `watch` have witnesses of their own, behind which they compact.
    let witnesses = (setup.workload != Workload::Watch).then(|| Witnesses::start(&addresses));
    let running = Running::start(&addresses, setup).await?;
    let began = Instant::now();
    tokio::time::sleep(WARM_UP).await;
    deeds.note(What::Quiet);
    tokio::time::sleep(QUIET).await;
    let until = began + Duration::from_secs(setup.seconds);
    let mut nemesis = Nemesis::new(members, net, disks, witnesses.as_ref(), deeds, setup);
    if setup.fault != Fault::None {
        while Instant::now() + TAIL < until && nemesis.round().await {}
    }
    tokio::time::sleep_until(until.max(Instant::now() + TAIL)).await;
    deeds.note(What::Over);
    // What a client panics with is part of the record.
    let stopping = tokio::spawn({
        let addresses = addresses.clone();
        async move { running.stop(&addresses).await }
    });
    let mut lines = match tokio::time::timeout(STOP, stopping).await {
        Ok(Ok(lines)) => lines,
        Ok(Err(ended)) => vec![Line::Failed { what: panicked_with(ended) }],
        Err(_) => vec![Line::Failed { what: format!("the clients do not end in {STOP:?}") }],
    };
    nemesis.hashes().await;
    if let Some(witnesses) = witnesses {
        match last_revision(&addresses).await {
            Some(last) => lines.extend(witnesses.finish(last).await),
            None => lines.push(Line::Failed { what: "no write in the end".to_owned() }),
        }
    }
    asking.abort();
    deeds.note(What::Over);
    Ok(lines)
}

fn panicked_with(ended: tokio::task::JoinError) -> String {
    let Ok(panic) = ended.try_into_panic() else { return "the clients were cancelled".to_owned() };
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("a client: {}", text.unwrap_or("it panicked"))
}

/// The revision of a last write.
async fn last_revision(cluster: &Addresses) -> Option<i64> {
    let deadline = Instant::now() + START;
    while Instant::now() < deadline {
        let mut client = cluster.client(0).await;
        let put = client.put("end", "", None);
        if let Ok(Ok(answer)) = tokio::time::timeout(START / 10, put).await {
            return answer.header().map(|h| h.revision());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    None
}

/// Notes whom each member takes for the leader, whenever that changes.
async fn ask_who_leads(cluster: Addresses, deeds: Arc<Deeds>) {
    let mut ids = vec![0; cluster.size()];
    let mut last = vec![None; cluster.size()];
    loop {
        for by in 0..cluster.size() {
            let status = async { cluster.client(by).await.status().await.ok() };
            let Ok(Some(status)) = tokio::time::timeout(2 * ASK_LEADER, status).await else {
                continue;
            };
            ids[by] = status.header().map_or(0, |h| h.member_id());
            let leader = ids.iter().position(|id| *id != 0 && *id == status.leader());
            let now = Some((leader, status.raft_term()));
            if now != last[by] {
                last[by] = now;
                deeds.note(What::Leads { by, leader, term: status.raft_term() });
            }
        }
        tokio::time::sleep(ASK_LEADER).await;
    }
}

/// What a program says of its version.
///
/// # Errors
///
/// If it cannot be run.
pub fn version_of(binary: &Path) -> Result<String, String> {
    let output = command(binary).arg("--version").output();
    let output = output.map_err(|e| format!("{}: {e}", binary.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
