//! What follows when a leader is gone, or seems to be.

use tokio::net::TcpStream;

use super::*;
use crate::pb::etcdserverpb::PutRequest;
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::types::MemberId;

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
    let members = cluster_of(3, &[], async |place| {
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
