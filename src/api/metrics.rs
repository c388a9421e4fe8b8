//! `/metrics`: what this member counts and how it stands, under etcd's names.
//!
//! Dashboards and alerts made for etcd work as they are. A number that has no meaning here is left
//! out rather than made up, and etcd's histograms of its own parts (bbolt, the Go runtime) are not
//! imitated.

use std::fmt::Display;

use crate::concurrency::Queues;
use crate::metrics::{Counter, Kind, Page, Process};
use crate::node::{Facts, Node, Room};
use crate::types::MemberId;

use super::calls::Calls;
use super::{ETCD_VERSION, convert};

/// The whole page, as of now.
pub fn page(queues: &Queues, calls: &Calls) -> String {
    let node = queues.node.as_ref();
    let mut page = Page::default();
    let facts = node.facts();
    server(&mut page, node, &facts);
    store(&mut page, node, calls, &facts);
    leases(&mut page, node);
    let name = "holdfast_server_made_leases_total";
    let help = "Leases that the server made for a Lock or Campaign without one.";
    page.counter(name, help, queues.server_leases.made());
    disk(&mut page, node);
    peers(&mut page, node);
    calls.write(&mut page);
    process(&mut page, &Process::read());
    page.into_text()
}

fn server(page: &mut Page, node: &Node, facts: &Facts) {
    let meters = node.meters();
    page.gauge("etcd_server_has_leader", "Whether there is a leader.", u8::from(facts.has_leader));
    page.gauge("etcd_server_is_leader", "Whether this member leads.", u8::from(facts.is_leader));
    let is_learner = u8::from(facts.is_learner);
    page.gauge("etcd_server_is_learner", "Whether this member is a learner.", is_learner);
    let changes = meters.leader_changes.get();
    page.counter("etcd_server_leader_changes_seen_total", "Leaders that took over.", changes);
    let name = "etcd_server_proposals_committed_total";
    page.gauge(name, "Index of the newest entry known to be committed.", facts.committed_index);
    let name = "etcd_server_proposals_applied_total";
    page.gauge(name, "Index of the newest entry applied.", facts.applied_index);
    let name = "etcd_server_proposals_pending";
    page.gauge(name, "Proposals that wait for their outcome.", facts.proposals_pending);
    let counters = [
        ("etcd_server_proposals_failed_total", "Proposals that failed.", &meters.proposals_failed),
        ("etcd_server_slow_apply_total", "Entries that were slow to apply.", &meters.slow_applies),
        (
            "etcd_server_slow_read_indexes_total",
            "Rounds of linearizable reads that were slow to be confirmed.",
            &meters.slow_reads,
        ),
        (
            "etcd_server_read_indexes_failed_total",
            "Linearizable reads that no leader confirmed in time.",
            &meters.reads_failed,
        ),
        ("etcd_server_health_success", "Health checks passed.", &meters.health_successes),
        ("etcd_server_health_failures", "Health checks failed.", &meters.health_failures),
    ];
    write_counters(page, &counters);
    let counts = node.succession();
    let name = "holdfast_leader_gone_total";
    let help = "Leaders found gone before an election timeout.";
    page.counter(name, help, counts.gone.get());
    let id = hex(node.identity().member_id);
    labelled(page, "etcd_server_id", "This member's id.", ("server_id", &id));
    let label = ("server_version", ETCD_VERSION);
    labelled(page, "etcd_server_version", "The API's version.", label);
    let minor = ETCD_VERSION.rsplit_once('.').map_or(ETCD_VERSION, |(minor, _)| minor);
    let label = ("cluster_version", minor);
    labelled(page, "etcd_cluster_version", "The cluster's version.", label);
}

fn store(page: &mut Page, node: &Node, calls: &Calls, facts: &Facts) {
    let meters = node.meters();
    let name = "etcd_mvcc_db_total_size_in_bytes";
    let help = "The state's size: on disk, or what is in use where that is more.";
    page.gauge(name, help, facts.db_size_bytes);
    let name = "etcd_mvcc_db_total_size_in_use_in_bytes";
    let help = "What keys, history and leases take; the quota bounds it.";
    page.gauge(name, help, facts.db_size_in_use_bytes);
    let name = "etcd_server_quota_backend_bytes";
    page.gauge(name, "The quota; zero for none.", facts.quota_bytes.unwrap_or(0));
    let name = "holdfast_state_disk_bytes";
    page.gauge(name, "What the state's files take, compressed.", facts.disk_bytes);
    let help = "1 for each alarm that is raised, with the member it was raised for.";
    let mut family = page.family("holdfast_alarm", Kind::Gauge, help);
    for alarm in &facts.alarms {
        let name = convert::alarm_name(alarm.kind);
        family.sample(&[("alarm", name), ("member_id", &hex(alarm.member))], 1);
    }
    let name = "holdfast_disk_free_bytes";
    page.gauge(name, "What the disk of the data directory has room for.", facts.disk.free_bytes);
    let name = "holdfast_disk_low";
    let low = u8::from(facts.disk.room < Room::Enough);
    page.gauge(name, "Whether this member refuses writes because its disk is nearly full.", low);
    let of_kv = |method| calls.handled_well("etcdserverpb.KV", method);
    let ranges = meters.ranges.get() + of_kv("Range") + of_kv("RangeStream");
    page.counter("etcd_mvcc_range_total", "Ranges read.", ranges);
    let counters = [
        ("etcd_mvcc_put_total", "Puts applied.", &meters.puts),
        ("etcd_mvcc_delete_total", "Deletes applied.", &meters.deletes),
        ("etcd_mvcc_txn_total", "Transactions of several operations applied.", &meters.txns),
    ];
    write_counters(page, &counters);

    page.gauge("etcd_debugging_mvcc_current_revision", "The store's revision.", facts.revision);
    let name = "etcd_debugging_mvcc_compact_revision";
    page.gauge(name, "The revision of the last compaction.", facts.compacted);
    page.gauge("etcd_debugging_mvcc_keys_total", "Keys in the store.", facts.keys);
    let watches = &facts.watches;
    page.gauge("etcd_debugging_mvcc_watch_stream_total", "Watch streams.", watches.streams);
    page.gauge("etcd_debugging_mvcc_watcher_total", "Watches.", watches.watchers);
    let name = "etcd_debugging_mvcc_slow_watcher_total";
    page.gauge(name, "Watches that are behind.", watches.slow_watchers);
    let name = "etcd_debugging_mvcc_pending_events_total";
    page.gauge(name, "Events that wait for their streams.", watches.pending_events);
    let name = "etcd_debugging_mvcc_events_total";
    page.counter(name, "Events handed to streams.", watches.events);
}

fn leases(page: &mut Page, node: &Node) {
    let meters = node.meters();
    let counters = [
        ("etcd_debugging_lease_granted_total", "Leases granted.", &meters.leases_granted),
        ("etcd_debugging_lease_revoked_total", "Leases ended.", &meters.leases_revoked),
        ("etcd_debugging_lease_renewed_total", "Leases renewed.", &meters.leases_renewed),
        ("etcd_debugging_server_lease_expired_total", "Leases run out.", &meters.leases_expired),
    ];
    write_counters(page, &counters);
}

fn disk(page: &mut Page, node: &Node) {
    let meters = node.meters();
    let name = "etcd_disk_wal_fsync_duration_seconds";
    page.histogram(name, "Syncs of the log.", &meters.log_sync);
    let name = "etcd_disk_backend_commit_duration_seconds";
    page.histogram(name, "Syncs of the state behind the log.", &meters.state_flush);
    let name = "holdfast_disk_stalled";
    let help = "Whether the disk has been at one write for longer than an election takes.";
    page.gauge(name, help, u8::from(node.disk_stalled()));
    let name = "holdfast_disk_stalls_total";
    let help = "How often it was; this member then lets others lead.";
    page.counter(name, help, meters.disk_stalls.get());
}

fn peers(page: &mut Page, node: &Node) {
    let peers: Vec<_> =
        node.traffic().all().into_iter().map(|(id, traffic)| (hex(id), traffic)).collect();
    let mut family = page.family(
        "etcd_network_peer_sent_bytes_total",
        Kind::Counter,
        "Bytes of messages to another member.",
    );
    for (id, traffic) in &peers {
        family.sample(&[("To", id)], traffic.sent_bytes.get());
    }
    let mut family = page.family(
        "etcd_network_peer_received_bytes_total",
        Kind::Counter,
        "Bytes of messages from another member.",
    );
    for (id, traffic) in &peers {
        family.sample(&[("From", id)], traffic.received_bytes.get());
    }
    let mut family = page.family(
        "etcd_network_peer_sent_failures_total",
        Kind::Counter,
        "Calls to another member that broke or did not get there.",
    );
    for (id, traffic) in &peers {
        family.sample(&[("To", id)], traffic.sent_failures.get());
    }
    let mut family = page.family(
        "etcd_network_peer_round_trip_time_seconds",
        Kind::Histogram,
        "From a heartbeat to its answer.",
    );
    for (id, traffic) in &peers {
        family.histogram(&[("To", id)], &traffic.round_trip);
    }
}

fn process(page: &mut Page, process: &Process) {
    if let Some(seconds) = process.cpu_seconds {
        page.counter("process_cpu_seconds_total", "Processor time used.", seconds);
    }
    let mut gauge = |name, help, value: Option<&dyn Display>| {
        if let Some(value) = value {
            page.gauge(name, help, value);
        }
    };
    let Process { resident_bytes, virtual_bytes, open_files, max_files, start_seconds, .. } =
        process;
    let bytes = resident_bytes.as_ref().map(|bytes| bytes as &dyn Display);
    gauge("process_resident_memory_bytes", "Memory in use.", bytes);
    let bytes = virtual_bytes.as_ref().map(|bytes| bytes as &dyn Display);
    gauge("process_virtual_memory_bytes", "Address space in use.", bytes);
    let files = open_files.as_ref().map(|files| files as &dyn Display);
    gauge("process_open_fds", "Open files and connections.", files);
    let files = max_files.as_ref().map(|files| files as &dyn Display);
    gauge("process_max_fds", "How many may be open.", files);
    let seconds = start_seconds.as_ref().map(|seconds| seconds as &dyn Display);
    gauge("process_start_time_seconds", "When the process started.", seconds);
}

fn write_counters(page: &mut Page, counters: &[(&'static str, &str, &Counter)]) {
    for (name, help, counter) in counters {
        page.counter(name, help, counter.get());
    }
}

/// A family whose fact stands in a label.
fn labelled(page: &mut Page, name: &'static str, help: &str, label: (&str, &str)) {
    page.family(name, Kind::Gauge, help).sample(&[label], 1);
}

fn hex(id: MemberId) -> String {
    format!("{:x}", id.0)
}
