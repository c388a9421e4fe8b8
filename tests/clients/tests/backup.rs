//! Backup and restore, and the way over from etcd: real processes, real files.
//!
//! Restoring is done by commands of Holdfast's own, so with etcd as the program under test only the
//! saving is looked at. The import takes its file from a real etcd, which the variable `ETCD` names;
//! without it that test says so and does nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, LockOptions, PutOptions, Txn, TxnOp, WatchOptions};
use holdfast_client_tests::addresses::connect;
use holdfast_client_tests::check::{AFTER_ELECTION, SOON, silent};
use holdfast_client_tests::ports::Port;
use holdfast_client_tests::process::{Exit, Finished, run_to_end};
use holdfast_client_tests::program::{command, etcd};
use holdfast_client_tests::{Cluster, Etcdctl, eventually, target_is_etcd, within};
use serde_json::Value;

/// What `restore` and `import` skip unless told otherwise.
const BUMP: i64 = 1_000_000_000;

/// A restore writes and syncs a few files.
const RESTORE: Duration = Duration::from_secs(60);

const LOCK_TTL_SECONDS: i64 = 600;

/// The flags of a member that say who it is: the ones that `restore` takes, too.
fn identity(cluster: &Cluster, member: usize) -> Vec<String> {
    let wanted = [
        "--name",
        "--data-dir",
        "--initial-cluster",
        "--initial-cluster-token",
        "--initial-advertise-peer-urls",
    ];
    let pairs = cluster.arguments(member).chunks(2);
    pairs.filter(|pair| wanted.contains(&pair[0].as_str())).flatten().cloned().collect()
}

fn data_dir(cluster: &Cluster, member: usize) -> PathBuf {
    let arguments = cluster.arguments(member);
    let at = arguments.iter().position(|argument| argument == "--data-dir").expect("a flag");
    PathBuf::from(&arguments[at + 1])
}

/// Runs `holdfast COMMAND FILE` with the flags of a member, and more.
async fn make(
    cluster: &Cluster,
    member: usize,
    what: &str,
    file: &Path,
    more: &[&str],
) -> Finished {
    let mut arguments = vec![what.to_owned(), file.display().to_string()];
    arguments.extend(identity(cluster, member));
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    run_to_end(cluster.dir(), &arguments, RESTORE).await.expect("it ends")
}

#[track_caller]
fn succeeded(finished: &Finished) {
    assert_eq!(finished.exit, Exit::Code(0), "{finished:?}");
}

/// The fields of `snapshot status`.
async fn status(dir: &Path, file: &Path) -> Value {
    let arguments = ["snapshot", "status", "-w", "json"].map(str::to_owned);
    let arguments = [arguments.as_slice(), &[file.display().to_string()]].concat();
    let finished = run_to_end(dir, &arguments, RESTORE).await.expect("it ends");
    succeeded(&finished);
    serde_json::from_str(&finished.stdout).expect("JSON")
}

/// All pairs, with revisions, versions and leases.
fn pairs(etcdctl: &Etcdctl, more: &[&str]) -> Value {
    let command = [&["get", "", "--prefix"], more].concat();
    etcdctl.json(&command)["kvs"].clone()
}

fn revision(etcdctl: &Etcdctl) -> i64 {
    etcdctl.json(&["get", "nothing"])["header"]["revision"].as_i64().expect("a revision")
}

fn cluster_id(etcdctl: &Etcdctl) -> u64 {
    etcdctl.json(&["get", "nothing"])["header"]["cluster_id"].as_u64().expect("an id")
}

/// Puts without end, until it is told to stop; the number of them.
async fn load(mut client: Client, stop: Arc<AtomicBool>) -> usize {
    let mut puts = 0;
    while !stop.load(Ordering::SeqCst) {
        let (key, value) = (format!("load/{}", puts % 500), format!("{puts}").repeat(50));
        client.put(key, value, None).await.expect("a put");
        puts += 1;
    }
    puts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_restored_from_a_snapshot_goes_on_with_what_was_saved() {
    let mut cluster = Cluster::start(3).await;
    cluster.may_live(Duration::from_secs(240));
    let all = Etcdctl::all(&cluster);
    let mut client = cluster.client(0).await;
    for n in 0..3_000 {
        client.put(format!("kept/{n:04}"), vec![b'x'; 400], None).await.expect("a put");
    }
    let lock_lease = client.lease_grant(LOCK_TTL_SECONDS, None).await.expect("a lease").id();
    let options = LockOptions::new().with_lease(lock_lease);
    client.lock("held", Some(options)).await.expect("the lock");
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3)
        .map(|member| (cluster.endpoint(member), stop.clone()))
        .map(|(endpoint, stop)| {
            tokio::spawn(async move { load(connect(&endpoint).await, stop).await })
        })
        .collect();
    let dying = client.lease_grant(30, None).await.expect("a lease").id();
    let on_lease = PutOptions::new().with_lease(dying);
    client.put("dying", "soon", Some(on_lease)).await.expect("a put");
    let granted_at = Instant::now();

    let file = cluster.dir().join("saved");
    let text = file.display().to_string();
    Etcdctl::member(&cluster, 1).ok(&["snapshot", "save", &text]);
    let since_grant = granted_at.elapsed();
    stop.store(true, Ordering::SeqCst);
    for writer in writers {
        assert!(writer.await.expect("a writer") > 0);
    }
    assert_eq!(fs::metadata(&file).expect("a file").len() % 512, 32);
    if target_is_etcd() {
        return;
    }

    let told = status(cluster.dir(), &file).await;
    let saved_at = told["revision"].as_i64().expect("a revision");
    assert!(saved_at < revision(&all), "writes went on");
    let at = format!("--rev={saved_at}");
    let before = pairs(&all, &[&at]);
    assert_eq!(
        told["totalKey"].as_u64().expect("a number") as usize,
        before.as_array().expect("pairs").len()
    );
    let hashes = Etcdctl::member(&cluster, 2).json(&["endpoint", "hashkv", &at]);
    assert_eq!(hashes[0]["HashKV"]["hash"], told["hash"], "{hashes}");
    let old_id = cluster_id(&all);

    cluster.kill_all();
    for member in 0..3 {
        fs::remove_dir_all(data_dir(&cluster, member)).expect("a folder");
    }
    // One member is restored, another one forgotten: they are no cluster together.
    succeeded(&make(&cluster, 0, "restore", &file, &[]).await);
    cluster.spawn(0);
    cluster.spawn(1);
    let served = async {
        loop {
            let mut client = cluster.client(0).await;
            if client.get("kept/0001", None).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    silent(Duration::from_secs(4), "a member alone serves nobody", served).await;
    cluster.kill(1);
    fs::remove_dir_all(data_dir(&cluster, 1)).expect("a folder");
    succeeded(&make(&cluster, 1, "restore", &file, &[]).await);
    succeeded(&make(&cluster, 2, "restore", &file, &[]).await);
    cluster.spawn(1);
    cluster.spawn(2);
    for member in 0..3 {
        cluster.serving(member).await;
    }

    for member in 0..3 {
        let etcdctl = Etcdctl::member(&cluster, member);
        assert_eq!(pairs(&etcdctl, &[]), before, "member {member}");
        assert_eq!(revision(&etcdctl), saved_at + BUMP, "member {member}");
        assert_ne!(cluster_id(&etcdctl), old_id);
        assert_eq!(cluster_id(&etcdctl), cluster_id(&all));
    }
    let mut client = cluster.client(2).await;
    let from_before = WatchOptions::new().with_prefix().with_start_revision(saved_at);
    let mut watch = client.watch("kept/", Some(from_before)).await.expect("a watch");
    let canceled = within(SOON, "the watch's end", async {
        loop {
            let answer = watch.message().await.expect("no error").expect("an answer");
            assert!(answer.events().is_empty(), "{answer:?}");
            if answer.canceled() {
                return answer;
            }
        }
    })
    .await;
    assert_eq!(canceled.compact_revision(), saved_at + BUMP);

    let left = client.lease_time_to_live(lock_lease, None).await.expect("the lease");
    assert!(left.ttl() > LOCK_TTL_SECONDS - 120, "{left:?}");
    let mut waiting = cluster.client(1).await;
    silent(Duration::from_secs(1), "the lock is held", waiting.lock("held", None)).await;
    client.lease_revoke(lock_lease).await.expect("revoked");
    within(SOON, "the lock", waiting.lock("held", None)).await.expect("the lock");

    // What a member has confirmed since is not in the file: it must not come back from it.
    cluster.kill(2);
    let aside = cluster.dir().join("aside");
    fs::rename(data_dir(&cluster, 2), &aside).expect("a folder");
    let arguments = cluster.arguments(2).to_vec();
    let empty = run_to_end(cluster.dir(), &arguments, SOON).await.expect("it ends");
    assert_eq!(empty.exit, Exit::Code(2), "{empty:?}");
    assert!(empty.stderr.contains("belongs to another cluster"), "{empty:?}");
    fs::remove_dir_all(data_dir(&cluster, 2)).expect("a folder");
    succeeded(&make(&cluster, 2, "restore", &file, &[]).await);
    let again = run_to_end(cluster.dir(), &arguments, SOON).await.expect("it ends");
    assert_eq!(again.exit, Exit::Code(2), "{again:?}");
    assert!(again.stderr.contains("it has lost its data"), "{again:?}");
    fs::remove_dir_all(data_dir(&cluster, 2)).expect("a folder");
    fs::rename(&aside, data_dir(&cluster, 2)).expect("a folder");
    cluster.restart(2).await;

    let restored_at = Instant::now();
    let gone = || async {
        let answer = cluster.client(0).await.get("dying", None).await.ok()?;
        answer.kvs().is_empty().then(Instant::now)
    };
    let gone_at = eventually(Duration::from_secs(60), "the end of a lease", gone).await;
    // What was left when the file was made began to run again when the cluster had a leader.
    let most = Duration::from_secs(30).saturating_sub(since_grant) + SOON;
    assert!(gone_at - restored_at < most, "{:?} of {most:?}", gone_at - restored_at);

    // Both restarts and further snapshots are ordinary ones.
    client.put("after", "all", None).await.expect("a put");
    cluster.kill_all();
    for member in 0..3 {
        cluster.spawn(member);
    }
    cluster.serving(0).await;
    all.ok(&["get", "after"]);
    let again = cluster.dir().join("again");
    Etcdctl::member(&cluster, 0).ok(&["snapshot", "save", &again.display().to_string()]);
    assert!(status(cluster.dir(), &again).await["revision"].as_i64() > Some(saved_at + BUMP));
}

#[tokio::test]
async fn restore_refuses_what_it_must_not_use_and_leaves_nothing_behind() {
    if target_is_etcd() {
        return;
    }
    let mut cluster = Cluster::start(1).await;
    let etcdctl = Etcdctl::member(&cluster, 0);
    etcdctl.ok(&["put", "a", "1"]);
    let file = cluster.dir().join("saved");
    etcdctl.ok(&["snapshot", "save", &file.display().to_string()]);

    let in_use = make(&cluster, 0, "restore", &file, &[]).await;
    assert_eq!(in_use.exit, Exit::Code(1));
    assert!(in_use.stderr.contains("is not empty"), "{in_use:?}");
    cluster.kill_all();
    fs::remove_dir_all(data_dir(&cluster, 0)).expect("a folder");

    let mut bytes = fs::read(&file).expect("a file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let damaged = cluster.dir().join("damaged");
    fs::write(&damaged, &bytes).expect("a file");
    for (what, file, said) in [
        ("restore", &damaged, "damaged at byte"),
        ("restore", &cluster.dir().join("absent"), "No such file"),
        ("import", &file, "neither a snapshot nor a member's db"),
    ] {
        let refused = make(&cluster, 0, what, file, &[]).await;
        assert_eq!(refused.exit, Exit::Code(1), "{refused:?}");
        assert!(refused.stderr.contains(said), "{refused:?}");
        assert!(!data_dir(&cluster, 0).exists(), "{what} {}", file.display());
    }
    let wrong = make(&cluster, 0, "restore", &file, &["--bump-revision", "-1"]).await;
    assert_eq!(wrong.exit, Exit::Code(2), "{wrong:?}");

    // The history stays readable for who asks for that.
    let more = ["--bump-revision=0", "--mark-compacted=false"];
    succeeded(&make(&cluster, 0, "restore", &file, &more).await);
    cluster.spawn(0);
    cluster.serving(0).await;
    assert_eq!(revision(&etcdctl), 2);
    assert_eq!(etcdctl.ok(&["get", "a", "--rev=2", "--print-value-only"]), "1\n");
}

/// A real etcd of one member.
struct Etcd {
    child: Child,
    endpoint: String,
    data: PathBuf,
    _ports: [Port; 2],
}

impl Etcd {
    fn start(program: &Path, dir: &Path) -> Etcd {
        let ports = [Port::reserve(), Port::reserve()];
        let url = |port: &Port| format!("http://127.0.0.1:{}", port.number());
        let (client, peer) = (url(&ports[0]), url(&ports[1]));
        let data = dir.join("etcd-data");
        let log = fs::File::create(dir.join("etcd.log")).expect("a log");
        let child = command(program)
            .arg("--data-dir")
            .arg(&data)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log)
            .spawn()
            .expect("etcd runs");
        Etcd { child, endpoint: client, data, _ports: ports }
    }

    /// Ends it and gives the path of its `db`.
    fn stop(&mut self) -> PathBuf {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
        self.data.join("member/snap/db")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // Both fail when it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// 10,000 keys in ten writes each of a thousand, some again, some deleted, some on leases, and a
/// compaction in the middle of it.
async fn fill(client: &mut Client) -> Vec<i64> {
    let mut leases = Vec::new();
    for n in 0..20 {
        leases.push(client.lease_grant(1_000 + n, None).await.expect("a lease").id());
    }
    let revoked = client.lease_grant(1_000, None).await.expect("a lease").id();
    for round in 0..3 {
        for chunk in 0..100 / (round + 1) {
            let puts = (0..100).map(|n| {
                let number = chunk * 100 + n;
                let value = vec![b'a' + round as u8; 10 + number % 300];
                let lease = match number % 50 {
                    0 => leases[number / 50 % leases.len()],
                    1 => revoked,
                    _ => 0,
                };
                let options = PutOptions::new().with_lease(lease);
                TxnOp::put(format!("key/{number:05}"), value, Some(options))
            });
            client.txn(Txn::new().and_then(puts.collect::<Vec<_>>())).await.expect("a transaction");
        }
    }
    for number in (0..10_000).step_by(7) {
        client.delete(format!("key/{number:05}"), None).await.expect("a delete");
    }
    client.lease_revoke(revoked).await.expect("revoked");
    let put = client.put("big", vec![b'b'; 1_000_000], None).await.expect("a put");
    let revision = put.header().expect("a header").revision();
    client.compact(revision - 500, None).await.expect("a compaction");
    for number in (0..10_000).step_by(91) {
        client.put(format!("key/{number:05}"), "last", None).await.expect("a put");
    }
    client.delete("key/00091", None).await.expect("a delete");
    leases
}

#[tokio::test]
async fn a_cluster_imported_from_etcd_has_its_keys_revisions_and_leases() {
    let Some(program) = etcd().filter(|_| !target_is_etcd()) else {
        eprintln!("skipped: ETCD names no etcd to import from");
        return;
    };
    let mut cluster = Cluster::prepare(3, &[]);
    cluster.may_live(Duration::from_secs(240));
    let mut etcd = Etcd::start(program, cluster.dir());
    let from = Etcdctl::at(&etcd.endpoint);
    let endpoint = etcd.endpoint.clone();
    let ready = || async { connect(&endpoint).await.get("x", None).await.ok() };
    eventually(AFTER_ELECTION, "etcd serves", ready).await;
    let leases = fill(&mut connect(&endpoint).await).await;
    from.ok(&["user", "add", "alice:secret"]);
    let (expected, at) = (pairs(&from, &[]), revision(&from));
    assert!(expected.as_array().expect("pairs").len() > 8_000);
    let snapshot = cluster.dir().join("etcd-snapshot");
    from.ok(&["snapshot", "save", &snapshot.display().to_string()]);
    let db = etcd.stop();

    for member in 0..3 {
        let imported = make(&cluster, member, "import", &snapshot, &[]).await;
        succeeded(&imported);
        assert!(imported.stdout.contains(&format!("etcd was at revision {at}")), "{imported:?}");
        assert!(imported.stdout.contains("20 leases"), "{imported:?}");
        assert!(imported.stderr.contains("1 users and 0 roles"), "{imported:?}");
        cluster.spawn(member);
    }
    for member in 0..3 {
        cluster.serving(member).await;
        let etcdctl = Etcdctl::member(&cluster, member);
        assert!(pairs(&etcdctl, &[]) == expected, "member {member}");
        assert_eq!(revision(&etcdctl), at + BUMP);
    }
    let mut client = cluster.client(1).await;
    for (n, lease) in leases.iter().enumerate() {
        let granted = 1_000 + n as i64;
        let answer = client.lease_time_to_live(*lease, None).await.expect("a lease");
        assert_eq!(answer.granted_ttl(), granted);
        assert!((granted - 60..=granted).contains(&answer.ttl()), "{answer:?}");
    }
    let listed = client.leases().await.expect("leases").leases().len();
    assert_eq!(listed, leases.len());
    let put = client.put("key/00000", "now", None).await.expect("a put");
    assert_eq!(put.header().expect("a header").revision(), at + BUMP + 1);
    // A key goes with the lease that etcd gave it.
    let on_lease = client.lease_time_to_live(
        leases[1],
        Some(etcd_client::LeaseTimeToLiveOptions::new().with_keys()),
    );
    let keys = on_lease.await.expect("a lease").keys().to_vec();
    assert!(!keys.is_empty());
    client.lease_revoke(leases[1]).await.expect("revoked");
    assert!(client.get(keys[0].clone(), None).await.expect("a range").kvs().is_empty());

    // The same from the file of the member itself, without a bump.
    cluster.kill_all();
    fs::remove_dir_all(data_dir(&cluster, 0)).expect("a folder");
    let alone = identity(&cluster, 0);
    let mut alone: Vec<String> =
        alone.chunks(2).filter(|pair| pair[0] != "--initial-cluster").flatten().cloned().collect();
    let peer =
        alone.chunks(2).find(|pair| pair[0] == "--initial-advertise-peer-urls").expect("a flag")[1]
            .clone();
    alone.extend(["--initial-cluster".to_owned(), format!("m1={peer}")]);
    let mut arguments =
        vec!["import".to_owned(), db.display().to_string(), "--bump-revision=0".to_owned()];
    arguments.extend(alone);
    let imported = run_to_end(cluster.dir(), &arguments, RESTORE).await.expect("it ends");
    succeeded(&imported);
    assert!(imported.stderr.contains("no hash was checked"), "{imported:?}");
    assert!(
        imported.stdout.contains(&format!("revision {at}: history before it is compacted")),
        "{imported:?}"
    );
}
