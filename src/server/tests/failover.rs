//! What follows when a leader is gone, or seems to be.

use std::io;
use std::path::Path;
use std::sync::{Condvar, Mutex};

use tokio::net::TcpStream;

use super::*;
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::{PutRequest, RangeRequest};
use crate::types::MemberId;
use crate::vfs::{Lock, Vfs, VfsFile};

async fn put(channel: &Channel, key: &str) {
    let request = PutRequest { key: key.to_owned().into(), ..PutRequest::default() };
    within("a put", KvClient::new(channel.clone()).put(request)).await.expect("a put");
}

/// Looks every few milliseconds until `found` returns something.
async fn seen<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    within(what, async {
        loop {
            if let Some(value) = found() {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
}

/// Which of `members` leads, once all of them say the same.
async fn leader_of(members: &[Running]) -> usize {
    seen("a leader", || {
        let leader = members[0].node().leader()?;
        let agreed = members.iter().all(|member| member.node().leader() == Some(leader));
        let leads = |member: &Running| member.node().identity().member_id == leader;
        agreed.then(|| members.iter().position(leads)).flatten()
    })
    .await
}

fn id(member: &Running) -> MemberId {
    member.node().identity().member_id
}

/// Stands before the port that a member serves its peers on.
struct Proxy {
    url: String,
    cut: watch::Sender<u64>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    async fn before(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let cut = watch::Sender::new(0);
        let cuts = cut.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut from, _) = listener.accept().await.unwrap();
                let mut cut = cuts.subscribe();
                connections.spawn(async move {
                    let Ok(mut to) = TcpStream::connect(target).await else { return };
                    let through = tokio::io::copy_bidirectional(&mut from, &mut to);
                    tokio::select! {
                        _ = through => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Proxy { url, cut, _tasks: tasks }
    }

    /// Ends all connections that stand. New ones are accepted.
    fn cut(&self) {
        self.cut.send_modify(|cuts| *cuts += 1);
    }
}

/// Three members that reach each other through proxies.
async fn proxied() -> (Vec<Running>, Vec<Proxy>) {
    let mut proxies = Vec::new();
    // A look at the leader may take a tenth of it, and this machine may be busy.
    let members = cluster_of(3, &["--election-timeout=10000"], async |place| {
        let proxy = Proxy::before(place.peer).await;
        place.peer_url.clone_from(&proxy.url);
        proxies.push(proxy);
    })
    .await;
    (members, proxies)
}

#[tokio::test]
async fn connections_that_break_depose_no_leader_that_lives() {
    let (members, proxies) = proxied().await;
    let leader = leader_of(&members).await;
    let role = members[leader].node().role();
    let followers: Vec<usize> = (0..3).filter(|member| *member != leader).collect();
    let channel = members[followers[0]].connect().await;
    // One follower's connections, then those of both at the same time.
    for (round, cut) in [&followers[..1], &followers[..]].iter().cycle().take(20).enumerate() {
        let looks = |member: &usize| members[*member].node().succession().looks.get();
        let before: Vec<u64> = cut.iter().map(looks).collect();
        cut.iter().for_each(|member| proxies[*member].cut());
        seen("the followers look at the leader", || {
            cut.iter().zip(&before).all(|(member, before)| looks(member) > *before).then_some(())
        })
        .await;
        put(&channel, &format!("k{round}")).await;
    }
    for member in &members {
        let now = member.node().role();
        assert_eq!((now.term, now.leader), (role.term, role.leader));
        assert_eq!(member.node().succession().ballots.get(), 0);
    }
}

#[tokio::test]
async fn a_leader_that_died_is_succeeded_before_any_timeout() {
    // Nobody else can be elected by timeout within nine seconds of the last heartbeat.
    const TIMEOUT: Duration = Duration::from_secs(9);
    let mut members = cluster(3, &["--election-timeout=10000"]).await;
    let leader = leader_of(&members).await;
    let dead = members.remove(leader);
    let (gone, term) = (id(&dead), dead.node().role().term);
    // Calls that the followers take now are answered by the next leader.
    let mut calls = JoinSet::new();
    for member in &members {
        let channel = member.connect().await;
        calls.spawn(async move { put(&channel, "k").await });
    }
    let died = tokio::time::Instant::now();
    dead.kill().await;
    calls.join_all().await;
    seen("another leader", || {
        let leader = members[0].node().leader()?;
        (leader != gone).then_some(())
    })
    .await;
    let channel = members[1].connect().await;
    put(&channel, "l").await;
    assert!(died.elapsed() < TIMEOUT, "succeeded by timeout, after {:?}", died.elapsed());
    assert!(members[0].node().role().term > term);
}

#[tokio::test]
async fn a_member_left_alone_raises_no_term() {
    let mut members = cluster(3, &[]).await;
    let leader = leader_of(&members).await;
    let dead = members.remove(leader);
    let other = members.remove(0);
    let alone = members.remove(0);
    let term = alone.node().role().term;
    // The leader last, so that there is nobody to elect another.
    other.kill().await;
    dead.kill().await;
    let asked = || alone.node().succession().ballots.get();
    seen("it asks the others in vain", || (asked() >= 5).then_some(())).await;
    assert_eq!(alone.node().status().raft_term, term + 1, "as clients count");
}

/// The machine's files, with writes that can be made to wait.
#[derive(Debug, Default)]
struct Stalling {
    stalled: Mutex<bool>,
    goes_on: Condvar,
}

impl Stalling {
    fn stall(&self, stalled: bool) {
        *self.stalled.lock().unwrap() = stalled;
        self.goes_on.notify_all();
    }

    fn pass(&self) {
        let mut stalled = self.stalled.lock().unwrap();
        while *stalled {
            stalled = self.goes_on.wait(stalled).unwrap();
        }
    }
}

#[derive(Debug)]
struct StallingVfs(Arc<Stalling>);

#[derive(Debug)]
struct StallingFile(Arc<Stalling>, Arc<dyn VfsFile>);

impl Vfs for StallingVfs {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        OsVfs.create_dir_all(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        self.0.pass();
        Ok(Arc::new(StallingFile(self.0.clone(), OsVfs.create(path)?)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        Ok(Arc::new(StallingFile(self.0.clone(), OsVfs.open(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        OsVfs.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        OsVfs.remove_file(path)
    }

    fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        OsVfs.remove_dir_all(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        OsVfs.list(dir)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        OsVfs.exists(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.pass();
        OsVfs.sync_dir(dir)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        OsVfs.lock(path)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        OsVfs.free_bytes(dir)
    }
}

impl VfsFile for StallingFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.pass();
        self.1.write_at(offset, bytes)
    }

    fn read_exact_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.1.read_exact_at(offset, bytes)
    }

    fn len(&self) -> io::Result<u64> {
        self.1.len()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.1.set_len(length)
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        self.1.allocate(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.pass();
        self.1.sync()
    }
}

/// Goes on when the test ends, however it does: a member that stops waits for its disk.
struct GoesOn(Vec<Arc<Stalling>>);

impl Drop for GoesOn {
    fn drop(&mut self) {
        self.0.iter().for_each(|disk| disk.stall(false));
    }
}

#[tokio::test]
async fn a_leader_whose_disk_stalls_lets_another_lead_and_comes_back() {
    let mut disks = Vec::new();
    let members = cluster_of(3, &[], async |place| {
        let disk = Arc::new(Stalling::default());
        place.vfs = Arc::new(StallingVfs(disk.clone()));
        disks.push(disk);
    })
    .await;
    let disks = GoesOn(disks);
    let leader = leader_of(&members).await;
    let follower = (leader + 1) % 3;
    let channel = members[follower].connect().await;
    disks.0[leader].stall(true);
    let stalled = members[leader].node();
    // Its own disk is needed for no commit, but for every entry.
    put(&channel, "a").await;
    seen("the stall is noticed", || stalled.disk_stalled().then_some(())).await;
    let next = seen("another leader", || {
        members[follower].node().leader().filter(|next| *next != id(&members[leader]))
    })
    .await;
    put(&channel, "b").await;
    // openraft waits for the disk before it follows another.
    seen("it knows no leader", || stalled.leader().is_none().then_some(())).await;
    assert_eq!(stalled.meters().disk_stalls.get(), 1);

    disks.0[leader].stall(false);
    seen("it goes on", || (!stalled.disk_stalled()).then_some(())).await;
    seen("it follows", || (stalled.leader() == Some(next)).then_some(())).await;
    let own = members[leader].connect().await;
    put(&own, "c").await;
    let all = RangeRequest { key: "a".into(), range_end: "z".into(), ..RangeRequest::default() };
    let found = within("a range", KvClient::new(own).range(all)).await.unwrap().into_inner();
    assert_eq!(found.count, 3);
}

#[tokio::test]
async fn a_follower_whose_disk_stalls_serves_reads_and_writes() {
    let mut disks = Vec::new();
    let members = cluster_of(3, &[], async |place| {
        let disk = Arc::new(Stalling::default());
        place.vfs = Arc::new(StallingVfs(disk.clone()));
        disks.push(disk);
    })
    .await;
    let disks = GoesOn(disks);
    let leader = leader_of(&members).await;
    let follower = (leader + 1) % 3;
    let term = members[leader].node().role().term;
    let channel = members[follower].connect().await;
    disks.0[follower].stall(true);
    put(&channel, "a").await;
    let stalled = members[follower].node();
    seen("the stall is noticed", || stalled.disk_stalled().then_some(())).await;
    put(&channel, "b").await;
    let one = RangeRequest { key: "b".into(), ..RangeRequest::default() };
    let found = within("a linearizable read", KvClient::new(channel).range(one)).await.unwrap();
    assert_eq!(found.into_inner().count, 1);
    let now = members[leader].node().role();
    assert_eq!((now.term, now.leader), (term, Some(id(&members[leader]))));
}
