//! The service Locks, through its own client, asked of any member.

use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming};

use super::*;
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::lease_client::LeaseClient;
use crate::pb::etcdserverpb::{LeaseGrantRequest, LeaseRevokeRequest, PutRequest};
use crate::pb::holdfastpb::check_response::Standing;
use crate::pb::holdfastpb::hold_request::{GiveUp, Open, Ping, Request as Ask};
use crate::pb::holdfastpb::hold_response::Response as Told;
use crate::pb::holdfastpb::locks_client::LocksClient;
use crate::pb::holdfastpb::*;
use crate::pb::v3lockpb::LockRequest;
use crate::pb::v3lockpb::lock_client::LockClient;

type Client = LocksClient<Channel>;

async fn client(of: &Running) -> Client {
    LocksClient::new(of.connect().await)
}

fn said(status: &Status) -> (Code, &str) {
    (status.code(), status.message())
}

fn acquire(name: &'static str, owner: &str, wait_ms: Option<i64>) -> AcquireRequest {
    AcquireRequest { name: name.into(), owner: owner.into(), wait_ms, ..Default::default() }
}

async fn get(client: &mut Client, name: &'static str) -> Lock {
    let answer = client.get(GetRequest { name: name.into() }).await.unwrap();
    answer.into_inner().lock.unwrap()
}

async fn standing(client: &mut Client, name: &'static str, token: i64) -> Standing {
    let answer = client.check(CheckRequest { name: name.into(), token }).await.unwrap();
    answer.into_inner().standing()
}

/// A Hold stream.
struct Hold {
    asks: mpsc::UnboundedSender<HoldRequest>,
    tells: Streaming<HoldResponse>,
}

impl Hold {
    async fn open(client: &mut Client, open: Open) -> Hold {
        let (asks, requests) = mpsc::unbounded_channel();
        asks.send(HoldRequest { request: Some(Ask::Open(open)) }).unwrap();
        let tells = client.hold(UnboundedReceiverStream::new(requests)).await.unwrap();
        Hold { asks, tells: tells.into_inner() }
    }

    fn say(&self, ask: Ask) {
        self.asks.send(HoldRequest { request: Some(ask) }).unwrap();
    }

    async fn next(&mut self) -> Told {
        let told = within("a message", self.tells.message()).await.unwrap();
        told.expect("the stream goes on").response.unwrap()
    }

    async fn granted(&mut self) -> hold_response::Granted {
        loop {
            match self.next().await {
                Told::Granted(granted) => return granted,
                Told::Queued(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn ended(&mut self) {
        assert_eq!(within("the end", self.tells.message()).await.unwrap(), None);
    }
}

fn open(name: &'static str, owner: &str) -> Open {
    Open { name: name.into(), owner: owner.into(), ttl_seconds: 60, ..Default::default() }
}

#[tokio::test]
async fn a_lock_is_taken_seen_and_given_up() {
    let cluster = cluster(1, &[]).await;
    let mut locks = client(&cluster[0]).await;
    let held = locks.acquire(acquire("jobs", "alice", None)).await.unwrap().into_inner();
    assert!(held.granted && held.ttl_seconds == 60, "{held:?}");
    assert_eq!(held.header.unwrap().revision, held.token);
    assert_eq!(held.key, format!("jobs/{:x}", held.lease));

    // One who only tries is told who has it, and writes nothing.
    let revision = cluster[0].node().store().revision();
    let tried = locks.acquire(acquire("jobs", "bob", Some(0))).await.unwrap().into_inner();
    assert_eq!((tried.granted, tried.position), (false, 1));
    let holder = tried.holder.unwrap();
    assert_eq!((holder.owner.as_str(), holder.token), ("alice", held.token));
    assert!(holder.client.starts_with("127.0.0.1:"), "{holder:?}");
    assert_eq!(cluster[0].node().store().revision(), revision);
    // One who waits a little stands in line meanwhile, and leaves nothing behind.
    let waited = locks.acquire(acquire("jobs", "bob", Some(50))).await.unwrap().into_inner();
    assert_eq!((waited.granted, waited.position), (false, 1));
    let node = cluster[0].node();
    eventually(node, "the waiter's lease is gone", || {
        (node.machine().leases().len() == 1).then_some(())
    })
    .await;

    let lock = get(&mut locks, "jobs").await;
    let holder = lock.holder.unwrap();
    assert_eq!((lock.waiting, lock.waiters.len(), lock.forced.len()), (0, 0, 0));
    assert!(holder.live && !holder.inferred);
    assert!(holder.left_ms > 50_000 && holder.left_ms <= 60_000, "{holder:?}");
    assert!(holder.held_since_unix_ms > 1_600_000_000_000, "{holder:?}");

    assert_eq!(standing(&mut locks, "jobs", held.token).await, Standing::Current);
    let release = |token| ReleaseRequest { name: "jobs".into(), token };
    assert!(!locks.release(release(held.token + 1)).await.unwrap().into_inner().released);
    assert!(locks.release(release(held.token)).await.unwrap().into_inner().released);
    assert!(!locks.release(release(held.token)).await.unwrap().into_inner().released);
    assert!(node.machine().leases().is_empty(), "the lease was made for this lock");
    assert_eq!(get(&mut locks, "jobs").await, Lock { name: "jobs".into(), ..Default::default() });
    assert_eq!(standing(&mut locks, "jobs", held.token).await, Standing::Stale);
    assert_eq!(standing(&mut locks, "jobs", held.token - 1).await, Standing::Unknown);
    assert_eq!(standing(&mut locks, "jobs", held.token + 100).await, Standing::Future);
}

#[tokio::test]
async fn refusals_have_the_codes_that_fit() {
    let cluster = cluster(1, &[]).await;
    let mut locks = client(&cluster[0]).await;
    let missing = AcquireRequest { lease: 7, ..acquire("m", "", None) };
    let refused = locks.acquire(missing).await.unwrap_err();
    assert_eq!(said(&refused), (Code::NotFound, "holdfast: lease not found"));
    let refused = locks.acquire(acquire("", "", None)).await.unwrap_err();
    assert_eq!(said(&refused), (Code::InvalidArgument, "holdfast: the name is empty"));
    let refused = locks.acquire(acquire("m", &"x".repeat(257), None)).await.unwrap_err();
    let text = "holdfast: owner is longer than 256 bytes";
    assert_eq!(said(&refused), (Code::InvalidArgument, text));
    let negative = AcquireRequest { ttl_seconds: -1, ..acquire("m", "", None) };
    assert_eq!(locks.acquire(negative).await.unwrap_err().code(), Code::InvalidArgument);
    let refused = locks.release(ReleaseRequest { name: "m".into(), token: 0 }).await.unwrap_err();
    assert_eq!(said(&refused), (Code::InvalidArgument, "holdfast: a token is a positive number"));
    let ask = RequestReleaseRequest { name: "m".into(), ..Default::default() };
    let refused = locks.request_release(ask).await.unwrap_err();
    assert_eq!(said(&refused), (Code::NotFound, "holdfast: nobody holds the lock"));
    let force = ForceReleaseRequest { name: "m".into(), token: 5, ..Default::default() };
    let refused = locks.force_release(force.clone()).await.unwrap_err();
    assert_eq!(said(&refused), (Code::InvalidArgument, "holdfast: a reason is required"));
    let force = ForceReleaseRequest { reason: "stuck".into(), ..force };
    let refused = locks.force_release(force).await.unwrap_err();
    assert_eq!(said(&refused), (Code::FailedPrecondition, "holdfast: stale token"));
    let mut hold = Hold::open(&mut locks, open("", "")).await;
    let refused = within("a refusal", hold.tells.message()).await.unwrap_err();
    assert_eq!(said(&refused), (Code::InvalidArgument, "holdfast: the name is empty"));
}

#[tokio::test]
async fn recipes_and_etcds_service_stand_in_the_same_queue_and_are_listed() {
    let cluster = cluster(1, &[]).await;
    let channel = cluster[0].connect().await;
    let mut locks = LocksClient::new(channel.clone());
    let lock = LockRequest { name: "a/1".into(), lease: 0 };
    let held = LockClient::new(channel.clone()).lock(lock).await.unwrap().into_inner();
    for name in ["a/2", "b"] {
        assert!(locks.acquire(acquire(name, "alice", None)).await.unwrap().into_inner().granted);
    }
    // It looks like a queue's key and is an application's.
    let mut kv = KvClient::new(channel);
    for key in ["a/3/abc", "a/0/d"] {
        kv.put(PutRequest { key: key.into(), ..Default::default() }).await.unwrap();
    }
    let list = |prefix: &'static str, limit, after: bytes::Bytes| ListRequest {
        prefix: prefix.into(),
        limit,
        after,
    };
    let names = |answer: &ListResponse| -> Vec<bytes::Bytes> {
        answer.locks.iter().map(|lock| lock.name.clone()).collect()
    };
    let all = locks.list(list("", 0, "".into())).await.unwrap().into_inner();
    assert_eq!(
        (names(&all), &all.next[..]),
        (vec!["a/1".into(), "a/2".into(), "b".into()], &b""[..])
    );
    let holder = all.locks[0].holder.clone().unwrap();
    assert!(holder.inferred && holder.live && holder.key == held.key, "{holder:?}");
    let first = locks.list(list("a/", 1, "".into())).await.unwrap().into_inner();
    assert_eq!(names(&first), ["a/1"]);
    let rest = locks.list(list("a/", 9, first.next)).await.unwrap().into_inner();
    assert_eq!((names(&rest), rest.next.len()), (vec!["a/2".into()], 0));

    // Whom nothing is known of can be asked, but not told.
    let ask = RequestReleaseRequest { name: "a/1".into(), ..Default::default() };
    let asked = locks.request_release(ask).await.unwrap().into_inner();
    assert_eq!((asked.told, asked.token), (false, holder.token));
}

#[tokio::test]
async fn a_hold_waits_is_granted_renews_and_is_released() {
    let cluster = cluster(1, &[]).await;
    let mut locks = client(&cluster[0]).await;
    let mut alice = Hold::open(&mut locks, open("jobs", "alice")).await;
    let held = alice.granted().await;
    assert!(held.left_ms > 50_000 && held.ttl_seconds == 60, "{held:?}");
    alice.say(Ask::Ping(Ping { id: 7 }));
    let renewed = hold_response::Renewed { ping_id: 7, ttl_seconds: 60 };
    assert_eq!(alice.next().await, Told::Renewed(renewed));

    let mut bob = Hold::open(&mut locks, open("jobs", "bob")).await;
    let Told::Queued(queued) = bob.next().await else { panic!("bob waits") };
    assert_eq!((queued.position, queued.holder.unwrap().owner.as_str()), (1, "alice"));
    bob.say(Ask::Ping(Ping { id: 1 }));
    assert!(matches!(bob.next().await, Told::Queued(_)), "a sign of life is answered");
    let mut try_only =
        Hold::open(&mut locks, Open { wait_ms: Some(0), ..open("jobs", "carol") }).await;
    let Told::NotGranted(not) = try_only.next().await else { panic!("carol does not wait") };
    assert_eq!((not.position, not.holder.unwrap().token), (2, held.token));
    try_only.ended().await;

    let lock = get(&mut locks, "jobs").await;
    assert_eq!(
        (lock.waiting, lock.waiters[0].owner.as_str(), lock.waiters[0].position),
        (1, "bob", 1)
    );
    alice.say(Ask::Release(GiveUp {}));
    assert_eq!(alice.next().await, Told::Released(hold_response::Released { released: true }));
    alice.ended().await;
    let next = bob.granted().await;
    assert!(next.token > held.token);
    assert_eq!(standing(&mut locks, "jobs", held.token).await, Standing::Stale);

    // When his stream breaks the lease stays, and with it he comes back to the same hold.
    drop(bob);
    let node = cluster[0].node();
    within("the stream's task ends", async {
        while !node.background().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let back = Open { lease: next.lease, ..open("jobs", "bob again") };
    let mut bob = Hold::open(&mut locks, back).await;
    assert_eq!(bob.granted().await.token, next.token);
    assert_eq!(get(&mut locks, "jobs").await.holder.unwrap().owner, "bob again");
    bob.say(Ask::Release(GiveUp {}));
    assert_eq!(bob.next().await, Told::Released(hold_response::Released { released: true }));
    assert!(node.machine().leases().is_empty());
}

#[tokio::test]
async fn a_holder_hears_of_its_end() {
    let cluster = cluster(1, &[]).await;
    let mut locks = client(&cluster[0]).await;
    let lost = |reason: &str| Told::Lost(hold_response::Lost { reason: reason.into() });

    let mut alice = Hold::open(&mut locks, open("jobs", "alice")).await;
    let held = alice.granted().await;
    let mut leases = LeaseClient::new(cluster[0].connect().await);
    leases.lease_revoke(LeaseRevokeRequest { id: held.lease }).await.unwrap();
    assert_eq!(alice.next().await, lost("the lease ended"));
    alice.ended().await;

    let mut bob = Hold::open(&mut locks, open("jobs", "bob")).await;
    let held = bob.granted().await;
    let force = ForceReleaseRequest {
        name: "jobs".into(),
        token: held.token,
        by: "an operator".into(),
        reason: "stuck".into(),
    };
    locks.force_release(force).await.unwrap();
    assert_eq!(bob.next().await, lost("taken by an operator: stuck"));
    let forced = get(&mut locks, "jobs").await.forced.remove(0);
    assert_eq!((forced.token, forced.owner.as_str()), (held.token, "bob"));
    assert_eq!((forced.by.as_str(), forced.reason.as_str()), ("an operator", "stuck"));
}

#[tokio::test]
async fn a_holder_that_does_not_ping_is_warned_before_its_time_is_over() {
    let cluster = cluster(1, &[]).await;
    let mut locks = client(&cluster[0]).await;
    let mut alice = Hold::open(&mut locks, Open { ttl_seconds: 5, ..open("jobs", "alice") }).await;
    let ttl = alice.granted().await.ttl_seconds;
    assert_eq!(ttl, 5);
    let Told::Uncertain(uncertain) = alice.next().await else { panic!("a warning comes first") };
    assert!(uncertain.left_ms > 0 && uncertain.left_ms <= 1_700, "{uncertain:?}");
    // In time still: the warning is void.
    alice.say(Ask::Ping(Ping { id: 1 }));
    assert!(matches!(alice.next().await, Told::Renewed(_)));
    assert!(matches!(alice.next().await, Told::Uncertain(_)));
    assert!(matches!(alice.next().await, Told::Lost(_)));
    alice.ended().await;
}

/// What a client that stands still would find in its socket, by one clock: the warning, and with it
/// the end of its time, before anybody else is granted.
#[tokio::test]
async fn a_holder_that_stands_still_is_told_before_the_next_one_is_granted() {
    let cluster = cluster(3, &[]).await;
    let (mut here, mut there) = (client(&cluster[1]).await, client(&cluster[2]).await);
    let mut alice = Hold::open(&mut here, Open { ttl_seconds: 5, ..open("jobs", "alice") }).await;
    let token = alice.granted().await.token;
    let mut bob = Hold::open(&mut there, open("jobs", "bob")).await;
    let told = async {
        let Told::Uncertain(uncertain) = alice.next().await else { panic!("a warning first") };
        let warned = tokio::time::Instant::now();
        (warned, warned + Duration::from_millis(uncertain.left_ms.cast_unsigned()))
    };
    let granted = async {
        let next = bob.granted().await;
        (tokio::time::Instant::now(), next.token)
    };
    let ((warned, its_end), (granted, next)) = tokio::join!(told, granted);
    assert!(next > token);
    assert!(warned < its_end && its_end <= granted, "{:?}", granted.duration_since(warned));
    assert!(matches!(alice.next().await, Told::Lost(_)));
    alice.ended().await;
    for member in cluster {
        member.kill().await;
    }
}

#[tokio::test]
async fn any_member_passes_on_that_the_lock_is_wanted_and_shows_changes() {
    let cluster = cluster(3, &[]).await;
    let mut clients = Vec::new();
    for member in &cluster {
        clients.push(client(member).await);
    }
    let [first, second, third] = &mut clients[..] else { panic!("three members") };
    let watch = WatchRequest { name: "jo".into(), prefix: true };
    let mut seen = third.watch(watch).await.unwrap().into_inner();
    let mut next = async || within("a change", seen.message()).await.unwrap().unwrap();
    assert!(next().await.synced);

    let mut alice = Hold::open(first, open("jobs", "alice")).await;
    let held = alice.granted().await;
    let told = next().await.lock.unwrap();
    assert_eq!((&told.name[..], told.holder.unwrap().token), (&b"jobs"[..], held.token));
    let ask = RequestReleaseRequest {
        name: "jobs".into(),
        token: held.token,
        by: "bob".into(),
        reason: "maintenance".into(),
    };
    let asking = second.request_release(ask.clone());
    let (asked, heard) = tokio::join!(asking, alice.next());
    let wanted = hold_response::RevokeRequested { by: "bob".into(), reason: "maintenance".into() };
    assert_eq!(heard, Told::RevokeRequested(wanted));
    let asked = asked.unwrap().into_inner();
    assert_eq!(
        (asked.told, asked.token, asked.holder.unwrap().owner.as_str()),
        (true, held.token, "alice")
    );
    let stale = RequestReleaseRequest { token: held.token + 1, ..ask };
    let refused = second.request_release(stale).await.unwrap_err();
    assert_eq!(said(&refused), (Code::FailedPrecondition, "holdfast: stale token"));

    // The waiter stands on another member, and is granted there.
    let mut bob = Hold::open(second, open("jobs", "bob")).await;
    assert!(matches!(bob.next().await, Told::Queued(_)));
    assert_eq!(next().await.lock.unwrap().waiting, 1);
    alice.say(Ask::Release(GiveUp {}));
    assert_eq!(alice.next().await, Told::Released(hold_response::Released { released: true }));
    let token = bob.granted().await.token;
    let told = next().await.lock.unwrap();
    assert_eq!((told.holder.unwrap().token, told.waiting), (token, 0));
    drop(bob);
    third.release(ReleaseRequest { name: "jobs".into(), token }).await.unwrap();
    assert_eq!(next().await.lock.unwrap(), Lock { name: "jobs".into(), ..Default::default() });

    // The member that served a holder dies: with its lease the holder goes on elsewhere.
    let lease = LeaseGrantRequest { ttl: 60, id: 0 };
    let mut leases = LeaseClient::new(cluster[0].connect().await);
    let lease = leases.lease_grant(lease).await.unwrap().into_inner().id;
    let mut carol = Hold::open(first, Open { lease, ..open("other", "carol") }).await;
    let held = carol.granted().await;
    let mut cluster = cluster.into_iter();
    cluster.next().unwrap().kill().await;
    assert!(carol.tells.message().await.is_err(), "the stream breaks");
    let mut carol = Hold::open(second, Open { lease, ..open("other", "carol") }).await;
    assert_eq!(carol.granted().await.token, held.token);
    for member in cluster {
        member.kill().await;
    }
}

#[tokio::test]
async fn a_holder_is_warned_in_time_when_no_leader_can_confirm_its_lease() {
    let mut cluster = cluster(3, &[]).await;
    let mut locks = client(&cluster[0]).await;
    let mut alice = Hold::open(&mut locks, Open { ttl_seconds: 5, ..open("jobs", "alice") }).await;
    let held = alice.granted().await;
    for member in cluster.drain(1..) {
        member.kill().await;
    }
    // It is there and says so, which is of no use.
    alice.say(Ask::Ping(Ping { id: 1 }));
    let Told::Uncertain(uncertain) = alice.next().await else { panic!("a warning comes first") };
    assert!(uncertain.left_ms > 0 && uncertain.left_ms <= 1_700, "{uncertain:?}");
    let reason = "the lease was not confirmed before its time ran out".to_owned();
    assert_eq!(alice.next().await, Told::Lost(hold_response::Lost { reason }));
    alice.ended().await;
    let view = cluster[0].node().view();
    assert!(view.get(&held.key).is_some(), "nobody else can have it yet");
}
