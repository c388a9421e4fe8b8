//! A disk that hangs: neither a write nor a sync returns, and nothing fails.
//!
//! Each member has an ext4 file system of its own, mounted through a loop device, and `fsfreeze`
//! stops one of them. That takes root; where it does not work, the test says so and passes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use etcd_client::GetOptions;
use holdfast_client_tests::check::{AFTER_ELECTION, SOON, report};
use holdfast_client_tests::load::Load;
use holdfast_client_tests::{Cluster, target_is_etcd, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const DISK_BYTES: u64 = 1 << 30;
const WRITES: usize = 100;

/// The others may be without a leader while they find out, and for one election.
const SERVICE_IS_BACK: Duration = Duration::from_secs(5);

/// A file system, unmounted when dropped.
struct Disk {
    mount: PathBuf,
    frozen: bool,
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Disk {
    fn make(mount: &Path) -> Result<Disk, String> {
        let image = mount.with_extension("img");
        let file = std::fs::File::create(&image).map_err(|e| e.to_string())?;
        file.set_len(DISK_BYTES).map_err(|e| e.to_string())?;
        std::fs::create_dir_all(mount).map_err(|e| e.to_string())?;
        let (image, path) = (image.to_string_lossy(), mount.to_string_lossy());
        run("mkfs.ext4", &["-q", "-F", "-m", "0", &image])?;
        run("mount", &["-o", "loop", &image, &path])?;
        Ok(Disk { mount: mount.to_owned(), frozen: false })
    }

    fn freeze(&mut self) -> Result<(), String> {
        run("fsfreeze", &["--freeze", &self.mount.to_string_lossy()])?;
        self.frozen = true;
        Ok(())
    }

    fn thaw(&mut self) {
        if std::mem::take(&mut self.frozen) {
            run("fsfreeze", &["--unfreeze", &self.mount.to_string_lossy()]).expect("it goes on");
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.thaw();
        // Lazily: a process that was just killed may still let go of it.
        if let Err(reason) = run("umount", &["-l", &self.mount.to_string_lossy()]) {
            report(&format!("left mounted: {reason}"));
        }
    }
}

/// Why there can be no disks that freeze, if so.
fn unavailable() -> Option<String> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let tried = Disk::make(&dir.path().join("disk")).and_then(|mut disk| disk.freeze());
    tried.err()
}

async fn metrics(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("connected");
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.expect("asked");
    let mut page = String::new();
    stream.read_to_string(&mut page).await.expect("an answer");
    page
}

#[tokio::test]
async fn a_leader_whose_disk_hangs_hands_over_and_comes_back() {
    if let Some(reason) = unavailable() {
        report(&format!("left out: {reason}"));
        return;
    }
    let mut cluster = Cluster::prepare(3, &[]);
    let mut disks = Vec::new();
    for member in 0..3 {
        let data = cluster.dir().join(format!("m{}", member + 1));
        disks.push(Disk::make(&data).expect("it has worked before"));
        cluster.spawn(member);
    }
    for member in 0..3 {
        cluster.serving(member).await;
    }
    let mut load = Load::start(&cluster);
    load.flows(WRITES).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    load.probe(&cluster, &others).await;
    load.flows(WRITES).await;

    disks[leader].freeze().expect("it has worked before");
    let frozen = Instant::now();
    let next = within(AFTER_ELECTION, "another leader", async {
        loop {
            let next = cluster.leader_among(&others).await;
            if next != leader {
                return next;
            }
        }
    });
    let next = next.await;
    assert_ne!(next, leader);
    report(&format!("disk of the leader frozen, another leads after {:?}", frozen.elapsed()));
    load.flows(3 * WRITES).await;
    let gap = load.longest_gap(&others, frozen);
    report(&format!("longest time without an acknowledged write on the others: {gap:?}"));
    assert!(gap < SERVICE_IS_BACK);
    // It still reads what it has.
    let serializable = GetOptions::new().with_serializable().with_count_only().with_prefix();
    let read = cluster.client(leader).await;
    let read = async move { read.kv_client().get("load/", Some(serializable)).await };
    let found = within(SOON, "a serializable read", read).await.expect("a range");
    assert!(found.count() > 0);
    if !target_is_etcd() {
        let page = within(SOON, "the metrics", metrics(cluster.client_port(leader))).await;
        assert!(page.contains("\nholdfast_disk_stalled 1\n"), "{page}");
    }

    disks[leader].thaw();
    cluster.serving(leader).await;
    load.flows(WRITES).await;
    report(&format!("{:?}", load.finish(&cluster).await));
    cluster.kill_all();
}
