//! Who belongs to a cluster, and how that changes: what is refused, how members join and leave, and
//! that nothing is lost or doubled while they do.

use std::time::Duration;

use etcd_client::{Client, GetOptions, MemberAddOptions};
use holdfast_client_tests::check::{AFTER_ELECTION, SOON, refused, report};
use holdfast_client_tests::load::Load;
use holdfast_client_tests::process::{Finished, run_to_end};
use holdfast_client_tests::{
    Cluster, Etcdctl, Exit, eventually, status_of, target_is_etcd, within,
};
use tonic::Code;

/// A cluster is healthy, and takes changes, when its members have been connected for five seconds.
const HEALTHY: Duration = Duration::from_secs(30);
/// A start that must fail does so by then.
const REFUSAL: Duration = Duration::from_secs(15);

const UNHEALTHY: &str = "etcdserver: unhealthy cluster";
const NOT_STARTED: &str = "etcdserver: re-configuration failed due to not enough started members";
const NOT_FOUND: &str = "etcdserver: member not found";
const URL_EXISTS: &str = "etcdserver: Peer URLs already exists";
const BAD_URLS: &str = "etcdserver: given member URLs are invalid";
const NOT_IN_SYNC: &str =
    "etcdserver: can only promote a learner member which is in sync with leader";
const NO_LEARNER: &str = "etcdserver: can only promote a learner member";
const TOO_MANY_LEARNERS: &str = "etcdserver: too many learner members in cluster";
const FOR_NO_LEARNER: &str = "etcdserver: rpc not supported for learner";

fn peer_url(cluster: &Cluster, member: usize) -> String {
    format!("http://127.0.0.1:{}", cluster.peer_port(member))
}

/// The id of a member that the cluster has, and whether it is a learner.
async fn known(cluster: &Cluster, asked: usize, member: usize) -> Option<(u64, bool)> {
    let list = cluster.client(asked).await.member_list().await.expect("a list of members");
    let url = peer_url(cluster, member);
    let found = list.members().iter().find(|it| it.peer_urls().contains(&url));
    found.map(|it| (it.id(), it.is_learner()))
}

async fn id(cluster: &Cluster, asked: usize, member: usize) -> u64 {
    known(cluster, asked, member).await.expect("it is a member").0
}

/// Repeats a change while the cluster is not healthy, which says that nothing was done.
async fn once_healthy<T>(
    mut change: impl AsyncFnMut() -> Result<T, etcd_client::Error>,
) -> Result<T, etcd_client::Error> {
    within(HEALTHY, "the cluster is healthy", async {
        loop {
            match change().await {
                Err(etcd_client::Error::GRpcStatus(status)) if status.message() == UNHEALTHY => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                other => return other,
            }
        }
    })
    .await
}

async fn remove(cluster: &Cluster, asked: usize, id: u64) {
    let mut client = cluster.client(asked).await;
    let removed = once_healthy(async || client.member_remove(id).await).await.expect("removed");
    assert!(removed.members().iter().all(|member| member.id() != id));
}

/// `etcdctl member add`, and the variables that it prints.
async fn add(
    cluster: &Cluster,
    asked: usize,
    member: usize,
    learner: bool,
) -> Vec<(String, String)> {
    let ctl = Etcdctl::member(cluster, asked);
    let urls = format!("--peer-urls={}", peer_url(cluster, member));
    let mut arguments = vec!["member", "add", cluster.name(member), &urls];
    if learner {
        arguments.push("--learner");
    }
    let printed = eventually(HEALTHY, "the member is added", || async {
        let output = ctl.run(&arguments);
        assert!(
            output.code == Some(0) || output.stderr.contains(UNHEALTHY),
            "{arguments:?}: {output:?}"
        );
        (output.code == Some(0)).then_some(output.stdout)
    })
    .await;
    let variable = |line: &str| {
        let (name, value) = line.split_once('=')?;
        let value = value.strip_prefix('"')?.strip_suffix('"')?;
        Some((name.to_owned(), value.to_owned()))
    };
    let variables: Vec<_> = printed.lines().filter_map(variable).collect();
    assert_eq!(variables.len(), 4, "{printed}");
    variables
}

/// One more member, added, started as etcdctl says, and serving.
async fn grow(cluster: &mut Cluster, asked: usize, flags: &[&str]) -> usize {
    let member = cluster.prepare_another(flags);
    let variables = add(cluster, asked, member, false).await;
    cluster.introduce(member, variables);
    cluster.spawn(member);
    cluster.serving(member).await;
    member
}

async fn put(client: &mut Client, key: &str) {
    within(SOON, "a put", client.put(key, "v", None)).await.expect("a put");
}

/// Writes `count` entries of `value_bytes` each through one member, many at a time.
async fn fill(cluster: &Cluster, member: usize, count: usize, value_bytes: usize) {
    const WRITERS: usize = 32;
    let mut writers = tokio::task::JoinSet::new();
    let client = cluster.client(member).await;
    for writer in 0..WRITERS {
        let mut client = client.clone();
        writers.spawn(async move {
            for n in 0..count.div_ceil(WRITERS) {
                let key = format!("fill/{writer}/{n}");
                client.put(key, vec![b'v'; value_bytes], None).await.expect("a put");
            }
        });
    }
    within(Duration::from_secs(60), "the entries", writers.join_all()).await;
}

/// Whether a member's state came from another member, as a whole.
fn was_sent_the_state(cluster: &Cluster, member: usize) -> bool {
    let state = cluster.dir().join(cluster.name(member)).join("state");
    std::fs::read_to_string(state.join("CURRENT")).expect("a state").trim() != "state-1"
}

#[tokio::test]
async fn what_adding_and_updating_refuse() {
    let cluster = Cluster::start(3).await;
    let mut client = cluster.client(0).await;
    let add = async |client: &mut Client, url: &str| client.member_add([url], None).await;
    let voters = "http://127.0.0.1:1";
    refused(add(&mut client, voters).await, Code::Unavailable, UNHEALTHY);
    let first = once_healthy(async || add(&mut client, voters).await).await.expect("healthy");
    let answered = first.header().expect("a header").clone();
    assert_eq!(answered.revision(), 0, "answers about members show no revision");
    let added = first.member().expect("the member").clone();
    assert_eq!((added.name(), added.peer_urls()), ("", &[voters.to_owned()][..]));
    assert!(added.client_urls().is_empty() && first.member_list().len() == 4);

    for bad in ["http://127.0.0.1", "http://127.0.0.1:1/v3", "ftp://127.0.0.1:1", "http://:x"] {
        refused(add(&mut client, bad).await, Code::InvalidArgument, BAD_URLS);
    }
    let nothing = client.member_add(Vec::<String>::new(), None).await;
    refused(nothing, Code::InvalidArgument, BAD_URLS);
    let taken = peer_url(&cluster, 1);
    refused(add(&mut client, &taken).await, Code::FailedPrecondition, URL_EXISTS);
    let (code, text) = eventually(SOON, "another second", || {
        let mut client = client.clone();
        async move {
            let told = status_of(client.member_add([voters], None).await);
            // In the same second the id would be the same, too.
            (told.1 != "etcdserver: member ID already exist").then_some(told)
        }
    })
    .await;
    assert_eq!((code, text.as_str()), (Code::FailedPrecondition, URL_EXISTS));
    // Two more may be added before they start, a third not.
    add(&mut client, "http://127.0.0.1:2").await.expect("a second");
    refused(add(&mut client, "http://127.0.0.1:3").await, Code::Unknown, NOT_STARTED);
    let learner = MemberAddOptions::new().with_is_learner();
    let learner = client.member_add(["http://127.0.0.1:4"], Some(learner)).await;
    refused(learner, Code::Unavailable, UNHEALTHY);

    refused(client.member_update(7, ["nonsense".to_owned()]).await, Code::NotFound, NOT_FOUND);
    let update = client.member_update(added.id(), [taken.clone()]).await;
    refused(update, Code::FailedPrecondition, URL_EXISTS);
    if !target_is_etcd() {
        // etcd takes them, and stops when it uses them.
        let update = client.member_update(added.id(), ["nonsense".to_owned()]).await;
        refused(update, Code::InvalidArgument, BAD_URLS);
    }
    let moved =
        client.member_update(added.id(), ["http://127.0.0.1:5".to_owned()]).await.expect("moved");
    let now = moved.members().iter().find(|member| member.id() == added.id()).expect("it is there");
    assert_eq!(now.peer_urls(), ["http://127.0.0.1:5"]);
    // Every member says the same, whoever was asked.
    for member in 0..3 {
        let list = cluster.client(member).await;
        eventually(SOON, "the change is known everywhere", || {
            let mut list = list.clone();
            async move {
                let list = list.member_list().await.expect("a list");
                list.members()
                    .iter()
                    .any(|it| it.peer_urls() == ["http://127.0.0.1:5"])
                    .then_some(())
            }
        })
        .await;
    }
}

#[tokio::test]
async fn what_removing_and_promoting_refuse() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let [first, second] = cluster.others(leader)[..] else { panic!("three members") };
    let mut client = cluster.client(leader).await;
    let ids = [id(&cluster, leader, first).await, id(&cluster, leader, second).await];
    refused(client.member_remove(7).await, Code::NotFound, NOT_FOUND);
    refused(client.member_remove(0).await, Code::NotFound, NOT_FOUND);
    refused(client.member_promote(7).await, Code::NotFound, NOT_FOUND);
    refused(client.member_promote(ids[0]).await, Code::FailedPrecondition, NO_LEARNER);

    let options = || Some(MemberAddOptions::new().with_is_learner());
    let added =
        once_healthy(async || client.member_add(["http://127.0.0.1:1"], options()).await).await;
    let learner = added.expect("a learner").member().expect("the member").id();
    let another = client.member_add(["http://127.0.0.1:2"], options()).await;
    refused(another, Code::FailedPrecondition, TOO_MANY_LEARNERS);
    refused(client.member_promote(learner).await, Code::FailedPrecondition, NOT_IN_SYNC);
    client.member_remove(learner).await.expect("a learner may always go");
    refused(client.member_remove(learner).await, Code::NotFound, NOT_FOUND);

    cluster.kill(second);
    // A URL that is taken: refused as such while nothing is amiss.
    let taken = peer_url(&cluster, first);
    let (code, text) = eventually(SOON, "the loss is noticed", || {
        let (mut client, taken) = (client.clone(), taken.clone());
        async move {
            let told = status_of(client.member_add([taken], None).await);
            (told.1 != URL_EXISTS).then_some(told)
        }
    })
    .await;
    assert_eq!((code, text.as_str()), (Code::Unavailable, UNHEALTHY));
    // The one that is down may go, one of the others not.
    refused(client.member_remove(ids[0]).await, Code::Unavailable, UNHEALTHY);
    client.member_remove(ids[1]).await.expect("the one that is down");
    put(&mut client, "still").await;
    remove(&cluster, leader, ids[0]).await;
    let last = id(&cluster, leader, leader).await;
    refused(client.member_remove(last).await, Code::Unknown, NOT_STARTED);
    put(&mut client, "alone").await;
}

#[tokio::test]
async fn leadership_goes_to_whom_it_is_given() {
    let mut cluster = Cluster::start(3).await;
    let mut load = Load::start(&cluster);
    load.flows(50).await;
    let leader = cluster.leader().await;
    let [first, second] = cluster.others(leader)[..] else { panic!("three members") };
    let target = id(&cluster, leader, first).await;
    let (precondition, bad) = (Code::FailedPrecondition, "etcdserver: bad leader transferee");
    let mut client = cluster.client(leader).await;
    for nobody in [0, 7] {
        refused(client.move_leader(nobody).await, precondition, bad);
    }
    let asked = cluster.client(second).await.move_leader(target).await;
    refused(asked, precondition, "etcdserver: not leader");
    let own = id(&cluster, leader, leader).await;
    let told = client.move_leader(own).await.expect("it leads already");
    assert!(told.header().is_none(), "etcd answers without a header");
    load.probe(&cluster, &[second]).await;
    let asked = std::time::Instant::now();
    client.move_leader(target).await.expect("moved");
    assert_eq!(cluster.leader().await, first);
    load.flows(50).await;
    let gap = load.longest_gap(&[second], asked);
    report(&format!("longest time without a write while leadership moved: {gap:?}"));
    report(&format!("{:?}", load.finish(&cluster).await));
}

/// From one member to five, one at a time, and back to one, while all that are there write.
#[tokio::test]
async fn a_cluster_grows_and_shrinks_under_load_and_loses_nothing() {
    let mut cluster = Cluster::start(1).await;
    let mut load = Load::start(&cluster);
    load.flows(50).await;
    for size in 2..=5 {
        cluster.may_live(Duration::from_secs(120));
        // Any member may be asked.
        let member = grow(&mut cluster, (size - 1) / 2, &[]).await;
        load.add(&cluster, member);
        load.flows(50).await;
        let list = cluster.client(0).await.member_list().await.expect("a list");
        assert_eq!(list.members().len(), size);
        let started = |it: &&etcd_client::Member| !it.name().is_empty() && !it.is_learner();
        eventually(SOON, "all have started", || async {
            let list = cluster.client(0).await.member_list().await.expect("a list");
            (list.members().iter().filter(started).count() == size).then_some(())
        })
        .await;
    }
    let mut left: Vec<usize> = (0..5).collect();
    while left.len() > 1 {
        cluster.may_live(Duration::from_secs(120));
        // The leader goes, then the first of the others, and so on.
        let leader = cluster.leader().await;
        let gone = if left.len() % 2 == 1 { leader } else { left[0] };
        let asked = *left.last().expect("some are left");
        remove(&cluster, asked, id(&cluster, asked, gone).await).await;
        assert_eq!(cluster.ended(gone, AFTER_ELECTION).await, Exit::Code(0));
        left.retain(|member| *member != gone);
        load.flows(50).await;
    }
    let survivor = left[0];
    let list = cluster.client(survivor).await.member_list().await.expect("a list");
    assert_eq!(list.members().len(), 1);
    report(&format!("grown to 5, shrunk to 1: {:?}", load.finish(&cluster.only(&left)).await));
}

#[tokio::test]
async fn a_dead_member_is_replaced_under_load() {
    let mut cluster = Cluster::start(3).await;
    let mut load = Load::start(&cluster);
    load.flows(50).await;
    let dead = cluster.leader().await;
    let dead_id = id(&cluster, dead, dead).await;
    let others = cluster.others(dead);
    cluster.kill(dead);
    // Other members of etcd go on counting a leader that died.
    let asked = cluster.leader().await;
    // Without its data it is another member.
    std::fs::remove_dir_all(cluster.dir().join(cluster.name(dead))).expect("removed");
    let mut client = cluster.client(asked).await;
    remove(&cluster, asked, dead_id).await;
    let new = grow(&mut cluster, asked, &[]).await;
    load.add(&cluster, new);
    load.flows(100).await;
    refused(client.member_remove(dead_id).await, Code::NotFound, NOT_FOUND);
    let members = [others[0], others[1], new];
    report(&format!("{:?}", load.finish(&cluster.only(&members)).await));
}

/// The log is short here, so that the learner needs the whole state.
#[tokio::test]
async fn a_learner_gets_the_state_answers_little_and_is_promoted() {
    let flags = ["--snapshot-count", "200"];
    let mut cluster = Cluster::start_with(3, &flags).await;
    let load = Load::start(&cluster);
    load.flows(50).await;
    fill(&cluster, 0, 6_000, 100).await;
    let learner = cluster.prepare_another(&flags);
    let variables = add(&cluster, 0, learner, true).await;
    cluster.introduce(learner, variables);
    cluster.spawn(learner);
    let mut client = cluster.client(learner).await;
    let local = || Some(GetOptions::new().with_serializable());
    eventually(AFTER_ELECTION, "the learner has the state", || {
        let mut client = client.clone();
        async move { client.get("load/m0w0k0", local()).await.ok()?.kvs().first().map(drop) }
    })
    .await;
    assert!(target_is_etcd() || was_sent_the_state(&cluster, learner));
    let status = client.status().await.expect("a status");
    assert!(status.is_learner() && status.leader() != 0);
    for refusal in [
        client.get("a", None).await.map(drop),
        client.put("a", "b", None).await.map(drop),
        client.member_list().await.map(drop),
        client.lease_grant(10, None).await.map(drop),
        client.hash_kv(0).await.map(drop),
    ] {
        refused(refusal, Code::Unavailable, FOR_NO_LEARNER);
    }
    let (own, is_learner) = known(&cluster, 0, learner).await.expect("it is a member");
    assert!(is_learner);
    let mut asked = cluster.client(0).await;
    let transfer = status_of(asked.move_leader(own).await);
    assert_eq!(transfer.0, Code::FailedPrecondition);
    // A learner that is killed in between catches up again.
    cluster.kill(learner);
    load.flows(50).await;
    cluster.spawn(learner);
    eventually(AFTER_ELECTION, "it is in sync", || {
        let mut asked = asked.clone();
        async move {
            match asked.member_promote(own).await {
                Ok(_) => Some(()),
                Err(error) => {
                    refused::<()>(Err(error), Code::FailedPrecondition, NOT_IN_SYNC);
                    None
                }
            }
        }
    })
    .await;
    cluster.serving(learner).await;
    put(&mut cluster.client(learner).await, "voting").await;
    assert_eq!(known(&cluster, learner, learner).await, Some((own, false)));
    report(&format!("{:?}", load.finish(&cluster).await));
}

#[tokio::test]
async fn a_member_away_for_longer_than_the_log_reaches_gets_the_state() {
    let mut cluster = Cluster::start_with(3, &["--snapshot-count", "200"]).await;
    let load = Load::start(&cluster);
    load.flows(100).await;
    let leader = cluster.leader().await;
    let away = cluster.others(leader)[0];
    cluster.kill(away);
    fill(&cluster, leader, 8_000, 4_096).await;
    load.flows(50).await;
    // Interrupted at any moment, it begins anew.
    for wait in [50, 150, 300] {
        cluster.spawn(away);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        cluster.kill(away);
    }
    cluster.restart(away).await;
    load.flows(100).await;
    assert!(target_is_etcd() || was_sent_the_state(&cluster, away));
    report(&format!("{:?}", load.finish(&cluster).await));
}

#[tokio::test]
async fn a_removed_member_ends_stays_away_and_disturbs_nobody() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let [gone, stays] = cluster.others(leader)[..] else { panic!("three members") };
    let gone_id = id(&cluster, leader, gone).await;
    // It is down while it is removed, so nobody tells it.
    cluster.kill(gone);
    let mut client = cluster.client(stays).await;
    eventually(HEALTHY, "it is removed", || {
        let mut client = client.clone();
        async move { client.member_remove(gone_id).await.ok() }
    })
    .await;
    let term = client.status().await.expect("a status").raft_term();
    for _ in 0..2 {
        cluster.spawn(gone);
        let exit = cluster.ended(gone, AFTER_ELECTION).await;
        let printed = cluster.printed(gone);
        assert!(printed.contains("removed"), "{printed}");
        if !target_is_etcd() {
            assert_eq!(exit, Exit::Code(2));
            let last = printed.lines().last().unwrap_or_default();
            assert!(last.contains("permanently removed from the cluster"), "{last}");
        }
    }
    put(&mut client, "undisturbed").await;
    assert_eq!(client.status().await.expect("a status").raft_term(), term, "no election");
    if target_is_etcd() {
        return;
    }
    // Without its data it is no more welcome: neither as it was nor as one that joins.
    std::fs::remove_dir_all(cluster.dir().join(cluster.name(gone))).expect("removed");
    let finished = run_to_end(cluster.dir(), cluster.arguments(gone), REFUSAL).await;
    refuses(finished, "permanently removed from the cluster");
    cluster.set_flag(gone, "--initial-cluster-state", "existing");
    let finished = run_to_end(cluster.dir(), cluster.arguments(gone), REFUSAL).await;
    refuses(finished, "add it first");
    // What is counted of it ends, too.
    let page = metrics(&cluster, leader).await;
    assert!(!page.contains(&format!("\"{gone_id:x}\"")), "{page}");
}

async fn metrics(cluster: &Cluster, member: usize) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream =
        tokio::net::TcpStream::connect(("127.0.0.1", cluster.client_port(member))).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: h\r\n\r\n").await.unwrap();
    let mut page = String::new();
    within(SOON, "the page", stream.read_to_string(&mut page)).await.unwrap();
    assert!(page.contains("etcd_network_peer_sent_bytes_total"), "{page}");
    page
}

/// Asserts a refusal to start whose last line contains `reason`.
#[track_caller]
fn refuses(finished: Option<Finished>, reason: &str) {
    let finished = finished.expect("it goes on as if nothing were wrong");
    assert!(!matches!(finished.exit, Exit::Code(0) | Exit::Signal(_)), "{finished:?}");
    if !target_is_etcd() {
        let last = finished.stderr.lines().next_back().unwrap_or_default();
        assert!(last.contains(reason), "{reason}: {finished:?}");
    }
}

#[tokio::test]
async fn joining_is_refused_to_whom_the_cluster_does_not_expect() {
    let mut cluster = Cluster::start(1).await;
    let new = cluster.prepare_another(&[]);
    let name = cluster.name(new).to_owned();
    let (theirs, own) = (peer_url(&cluster, 0), peer_url(&cluster, new));
    let (dir, flags) = (cluster.dir().to_owned(), cluster.arguments(new).to_vec());
    let joining = |initial: &str| {
        let mut arguments = flags.clone();
        for (flag, value) in [
            ("--name", name.as_str()),
            ("--initial-advertise-peer-urls", &own),
            ("--initial-cluster", initial),
            ("--initial-cluster-state", "existing"),
        ] {
            arguments.extend([flag.to_owned(), value.to_owned()]);
        }
        arguments
    };
    let start = async |initial: &str| run_to_end(&dir, &joining(initial), REFUSAL).await;
    let both = format!("m1={theirs},{name}={own}");
    refuses(start(&both).await, "add it first");
    refuses(start(&format!("x=http://127.0.0.1:1,{name}={own}")).await, "none of the members");
    let variables = add(&cluster, 0, new, false).await;
    let third = format!("{both},x=http://127.0.0.1:1");
    refuses(start(&third).await, "make them equal");

    cluster.introduce(new, variables);
    cluster.spawn(new);
    cluster.serving(new).await;
    // Started again it asks nobody: the other one is not there.
    cluster.kill_all();
    cluster.spawn(new);
    cluster.spawn(0);
    cluster.serving(new).await;
    put(&mut cluster.client(new).await, "restarted").await;
    if !target_is_etcd() {
        cluster.kill(new);
        std::fs::remove_dir_all(cluster.dir().join(&name)).expect("removed");
        let finished = run_to_end(cluster.dir(), &joining(&both), REFUSAL).await;
        refuses(finished, "has lost its data");
    }
}

#[tokio::test]
async fn a_member_moves_to_another_url() {
    let mut cluster = Cluster::start(3).await;
    let load = Load::start(&cluster);
    let leader = cluster.leader().await;
    let moves = cluster.others(leader)[0];
    let moved_id = id(&cluster, leader, moves).await;
    load.flows(50).await;
    cluster.kill(moves);
    let spare = holdfast_client_tests::ports::Port::reserve();
    let url = format!("http://127.0.0.1:{}", spare.number());
    let mut client = cluster.client(cluster.others(moves)[0]).await;
    client.member_update(moved_id, [url.clone()]).await.expect("updated");
    cluster.set_flag(moves, "--listen-peer-urls", &url);
    cluster.restart(moves).await;
    load.flows(50).await;
    // It counts: without it there would be no quorum.
    let other = cluster.others(moves).into_iter().find(|it| *it != leader).expect("three");
    cluster.kill(other);
    put(&mut cluster.client(moves).await, "moved").await;
    cluster.restart(other).await;
    report(&format!("{:?}", load.finish(&cluster).await));
}

/// A cluster of one takes writes while the second is added and has not started.
#[tokio::test]
async fn an_added_member_that_has_not_started_costs_no_quorum() {
    let mut cluster = Cluster::start(1).await;
    let new = cluster.prepare_another(&[]);
    let variables = add(&cluster, 0, new, false).await;
    let mut client = cluster.client(0).await;
    if target_is_etcd() {
        // There it counts at once, and nothing is written until it starts.
        let stuck = tokio::time::timeout(Duration::from_secs(3), client.put("k", "v", None)).await;
        assert!(stuck.is_err());
    } else {
        put(&mut client, "k").await;
        cluster.kill(0);
        cluster.restart(0).await;
        put(&mut client, "k").await;
    }
    cluster.introduce(new, variables);
    cluster.spawn(new);
    cluster.serving(new).await;
    put(&mut cluster.client(new).await, "k").await;
}

/// The leader dies at some moment of a change that another member was asked for. Either all know of
/// it afterwards, once, or nobody does; and whoever was told that it is made is right.
#[tokio::test]
async fn a_change_is_made_once_or_not_at_all_when_the_leader_dies() {
    let mut cluster = Cluster::start_with(3, &["--strict-reconfig-check=false"]).await;
    let load = Load::start(&cluster);
    let (mut made, mut told) = (0, 0);
    for round in 0..8u64 {
        cluster.may_live(Duration::from_secs(120));
        load.flows(20).await;
        let leader = cluster.leader().await;
        let others = cluster.others(leader);
        let mut asked = cluster.client(others[0]).await;
        let url = format!("http://127.0.0.1:{}", round + 1);
        let change = tokio::spawn({
            let url = url.clone();
            // A voter would cost etcd its quorum.
            let learner = MemberAddOptions::new().with_is_learner();
            async move { asked.member_add([url], Some(learner)).await }
        });
        tokio::time::sleep(Duration::from_millis(round * 2)).await;
        cluster.kill(leader);
        let answer = match tokio::time::timeout(SOON, change).await {
            Ok(answer) => answer.expect("no panic").ok(),
            // There a proposal that is lost is waited for without end.
            Err(_) if target_is_etcd() => None,
            Err(_) => panic!("no answer"),
        };
        cluster.restart(leader).await;
        let mut found = Vec::new();
        for member in 0..3 {
            let client = cluster.client(member).await;
            // A read that is linearizable: what was made is applied.
            client.clone().get("a", None).await.expect("a read");
            let list = client.clone().member_list().await.expect("a list");
            let those: Vec<u64> = list
                .members()
                .iter()
                .filter(|it| it.peer_urls() == [url.clone()])
                .map(|it| it.id())
                .collect();
            assert!(those.len() <= 1, "made twice: {list:?}");
            found.push(those);
        }
        assert!(found.iter().all(|those| *those == found[0]), "{found:?}");
        if let Some(answer) = &answer {
            let id = answer.member().expect("the member").id();
            assert_eq!(found[0], [id], "told that it is made");
            told += 1;
        }
        for id in &found[0] {
            made += 1;
            cluster.client(0).await.member_remove(*id).await.expect("removed");
        }
    }
    report(&format!("of 8 changes {made} were made, {told} were said to be"));
    report(&format!("{:?}", load.finish(&cluster).await));
}
