//! Where Holdfast's locks and elections differ from etcd's on purpose.
//!
//! Each test reproduces a defect of etcd when it talks to etcd, and its absence when it does not.
//! The ones that need a minute are there in a short form too, and run when `LONG_WAITS` is set.

use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions, LockOptions, PutOptions, ResignOptions};
use holdfast_client_tests::check::{Code, SOON, eventually, refused, report, silent, status_of};
use holdfast_client_tests::raw::{
    self, AnyResponse, LockRequest, LockResponse, UnlockRequest, UnlockResponse,
};
use holdfast_client_tests::{Cluster, target_is_etcd, within};

const A_WHILE: Duration = Duration::from_millis(500);

async fn one_member() -> (Cluster, Client) {
    let cluster = Cluster::start(1).await;
    let client = cluster.client(0).await;
    (cluster, client)
}

async fn lease(client: &mut Client) -> i64 {
    client.lease_grant(60, None).await.expect("a lease").id()
}

async fn lock(mut client: Client, name: &str, lease: i64) -> Result<Vec<u8>, etcd_client::Error> {
    let options = LockOptions::new().with_lease(lease);
    Ok(client.lock(name, Some(options)).await?.key().to_vec())
}

async fn queued(client: &Client, prefix: &str, length: i64) {
    eventually(SOON, &format!("{length} keys under {prefix}"), || {
        let mut client = client.clone();
        let options = GetOptions::new().with_prefix().with_count_only();
        async move {
            let answer = client.get(prefix, Some(options)).await.expect("a range");
            (answer.count() == length).then_some(())
        }
    })
    .await;
}

#[tokio::test]
async fn a_candidate_without_a_lease_is_never_elected() {
    let (_cluster, mut client) = one_member().await;
    let (alice, bob) = (lease(&mut client).await, lease(&mut client).await);
    let won = client.campaign("job", "alice", alice).await.expect("elected");
    let mut candidate = client.clone();
    let mut waits = tokio::spawn(async move { candidate.campaign("job", "bob", bob).await });
    queued(&client, "job/", 2).await;
    client.lease_revoke(bob).await.expect("a revoke");
    if target_is_etcd() {
        silent(A_WHILE, "etcd lets it wait", &mut waits).await;
        let resign = ResignOptions::new().with_leader(won.leader().expect("a key").clone());
        client.resign(Some(resign)).await.expect("resigned");
        let answer = within(SOON, "the phantom is elected", waits).await.expect("no panic");
        let leader = answer.expect("elected").leader().expect("a key").clone();
        assert_eq!(client.get(leader.key(), None).await.expect("a range").count(), 0);
    } else {
        let answer = within(SOON, "the candidate hears of its lease", waits).await;
        refused(answer.expect("no panic"), Code::Unknown, "election: not leader");
    }
}

#[tokio::test]
async fn a_waiter_hears_at_once_that_its_lease_has_ended() {
    let (_cluster, mut client) = one_member().await;
    let (holder, waiter) = (lease(&mut client).await, lease(&mut client).await);
    let held = lock(client.clone(), "m", holder).await.expect("the lock");
    let waiting = client.clone();
    let mut waits = tokio::spawn(async move { lock(waiting, "m", waiter).await });
    queued(&client, "m/", 2).await;
    client.lease_revoke(waiter).await.expect("a revoke");
    if target_is_etcd() {
        silent(A_WHILE, "etcd lets it wait", &mut waits).await;
        client.unlock(held).await.expect("unlocked");
    }
    let answer = within(SOON, "the waiter hears of its lease", waits).await.expect("no panic");
    refused(answer, Code::Unknown, "mutex: session is expired");
}

#[tokio::test]
async fn a_lock_without_a_lease_tells_which_it_got() {
    let (cluster, mut client) = one_member().await;
    let channel = raw::channel(&cluster.endpoint(0)).await;
    let request = LockRequest { name: b"m".to_vec(), lease: 0 };
    let path = "/v3lockpb.Lock/Lock";
    let answer = raw::unary::<_, LockResponse>(&channel, path, request).await.expect("the lock");
    let kv = client.get(answer.get_ref().key.clone(), None).await.expect("a range");
    let kv = kv.kvs()[0].clone();
    assert_eq!(answer.get_ref().key, format!("m/{:x}", kv.lease()).into_bytes());
    let left = client.lease_time_to_live(kv.lease(), None).await.expect("an answer");
    assert_eq!(left.granted_ttl(), 60);
    let told = ["holdfast-lease-id", "holdfast-lease-ttl", "holdfast-fence"]
        .map(|name| raw::metadata(&answer, name));
    if target_is_etcd() {
        assert_eq!(told, [None, None, None]);
    } else {
        let fence = kv.create_revision().to_string();
        assert_eq!(told, [Some(kv.lease().to_string()), Some("60".to_owned()), Some(fence)]);
    }
}

#[tokio::test]
async fn a_waiter_that_goes_away_takes_its_server_made_lease_along() {
    let (_cluster, mut client) = one_member().await;
    let holder = lease(&mut client).await;
    lock(client.clone(), "m", holder).await.expect("the lock");
    let waiting = client.clone();
    let waits = tokio::spawn(async move { lock(waiting, "m", 0).await });
    queued(&client, "m/", 2).await;
    assert_eq!(client.leases().await.expect("an answer").leases().len(), 2);
    waits.abort();
    queued(&client, "m/", 1).await;
    if target_is_etcd() {
        assert_eq!(client.leases().await.expect("an answer").leases().len(), 2);
    } else {
        eventually(SOON, "the server's own lease is revoked", || {
            let mut client = client.clone();
            async move {
                let leases = client.leases().await.expect("an answer");
                let left: Vec<i64> = leases.leases().iter().map(|l| l.id()).collect();
                (left == [holder]).then_some(())
            }
        })
        .await;
    }
}

#[tokio::test]
async fn unlock_takes_only_locks_away() {
    let (cluster, mut client) = one_member().await;
    let channel = raw::channel(&cluster.endpoint(0)).await;
    let unlock = async |key: &str| {
        let request = UnlockRequest { key: key.as_bytes().to_vec() };
        let path = "/v3lockpb.Lock/Unlock";
        let answer = raw::unary::<_, UnlockResponse>(&channel, path, request).await;
        raw::metadata(&answer.expect("never an error"), "holdfast-released")
    };
    let id = lease(&mut client).await;
    let foreign = format!("config/{:x}", id + 1);
    let attached = Some(PutOptions::new().with_lease(id));
    client.put("config/settings", "precious", None).await.expect("a put");
    client.put(foreign.as_str(), "another's lease", attached).await.expect("a put");
    for key in ["config/settings", &foreign] {
        let told = unlock(key).await;
        let left = client.get(key, None).await.expect("a range").count();
        let expected = if target_is_etcd() { (None, 0) } else { (Some("false".to_owned()), 1) };
        assert_eq!((told, left), expected, "{key}");
    }
    let key = lock(client.clone(), "m", id).await.expect("the lock");
    let key = String::from_utf8(key).expect("text");
    let told = unlock(&key).await;
    assert_eq!(told, (!target_is_etcd()).then(|| "true".to_owned()));
    assert_eq!(client.get(key, None).await.expect("a range").count(), 0);
}

#[tokio::test]
async fn a_lock_does_not_wait_for_the_locks_below_its_name() {
    let (_cluster, mut client) = one_member().await;
    let (below, above) = (lease(&mut client).await, lease(&mut client).await);
    let held = lock(client.clone(), "jobs/1", below).await.expect("the lock");
    let asking = client.clone();
    let mut waits = tokio::spawn(async move { lock(asking, "jobs", above).await });
    if target_is_etcd() {
        silent(A_WHILE, "etcd waits for jobs/1", &mut waits).await;
        client.unlock(held).await.expect("unlocked");
    }
    let key = within(SOON, "the lock on jobs", waits).await.expect("no panic").expect("granted");
    assert_eq!(key, format!("jobs/{above:x}").into_bytes());
}

/// Until there are at most 15 of the 20 seconds left.
async fn partly_used_lease(client: &mut Client) -> (i64, i64) {
    let id = client.lease_grant(20, None).await.expect("a lease").id();
    let left = eventually(SOON, "a few seconds of the lease have passed", || {
        let mut client = client.clone();
        async move {
            let left = client.lease_time_to_live(id, None).await.expect("an answer").ttl();
            (left <= 15).then_some(left)
        }
    })
    .await;
    (id, left)
}

async fn what_remained_is_what_remains(mut client: Client, id: i64, left: i64) {
    let now = client.lease_time_to_live(id, None).await.expect("an answer").ttl();
    if target_is_etcd() {
        assert!(now >= 16, "etcd starts the countdown anew: {now}");
    } else {
        // The time without a leader does not count, and a tick's worth may be forgotten.
        assert!((left - 5..=left + 2).contains(&now), "{left} s before, {now} after");
    }
}

#[tokio::test]
async fn a_leases_remaining_time_survives_a_restart() {
    let (mut cluster, mut client) = one_member().await;
    let (id, left) = partly_used_lease(&mut client).await;
    cluster.kill(0);
    cluster.restart(0).await;
    what_remained_is_what_remains(cluster.client(0).await, id, left).await;
}

#[tokio::test]
async fn a_leases_remaining_time_survives_the_leader() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let mut client = cluster.client(leader).await;
    let (id, left) = partly_used_lease(&mut client).await;
    cluster.kill(leader);
    let next = cluster.leader().await;
    // It serves, so it has taken the leases over.
    cluster.serving(next).await;
    what_remained_is_what_remains(cluster.client(next).await, id, left).await;
}

/// The short form of a wait of more than a minute, which is the lease's whole life: see
/// [`a_server_made_lease_lives_as_long_as_it_is_needed`].
#[tokio::test]
async fn the_time_of_a_server_made_lease_starts_at_the_grant() {
    let (_cluster, mut client) = one_member().await;
    let holder = lease(&mut client).await;
    let held = lock(client.clone(), "m", holder).await.expect("the lock");
    let waits = tokio::spawn(lock(client.clone(), "m", 0));
    queued(&client, "m/", 2).await;
    let other = eventually(SOON, "seconds of the waiter's lease have passed", || {
        let mut client = client.clone();
        async move {
            let leases = client.leases().await.expect("an answer");
            let other = leases.leases().iter().map(|l| l.id()).find(|id| *id != holder)?;
            let left = client.lease_time_to_live(other, None).await.expect("an answer").ttl();
            (left <= 56).then_some(other)
        }
    })
    .await;
    client.unlock(held).await.expect("unlocked");
    let key = within(SOON, "the waiter's turn", waits).await.expect("no panic").expect("granted");
    assert_eq!(key, format!("m/{other:x}").into_bytes());
    let left = client.lease_time_to_live(other, None).await.expect("an answer").ttl();
    if target_is_etcd() {
        assert!(left <= 56, "etcd never renews it: {left}");
    } else {
        assert!((58..=60).contains(&left), "{left} s at the grant");
    }
}

/// Waits for longer than the 60 s that a server-made lease lives: only when `LONG_WAITS` is set.
///
/// etcd 3.5 refuses the waiter when its turn comes, and both lose an unattended lock without a word;
/// Holdfast keeps it, where it is told to, for as long as the caller's connection lives.
#[tokio::test]
async fn a_server_made_lease_lives_as_long_as_it_is_needed() {
    if std::env::var_os("LONG_WAITS").is_none() {
        report("a wait of more than a minute is left out: LONG_WAITS is not set");
        return;
    }
    let flags: &[&str] = if target_is_etcd() { &[] } else { &["--holdfast-lease0=connection"] };
    let cluster = Cluster::start_with(1, flags).await;
    cluster.may_live(Duration::from_secs(240));
    let mut client = cluster.client(0).await;
    let holder = client.lease_grant(300, None).await.expect("a lease").id();
    let held = lock(client.clone(), "m", holder).await.expect("the lock");
    let asked = Instant::now();
    let waits = tokio::spawn(lock(client.clone(), "m", 0));
    queued(&client, "m/", 2).await;
    // Of another connection, so that it can be closed.
    let unattended = lock(cluster.client(0).await, "gone", 0).await.expect("the lock");
    let attended = cluster.client(0).await;
    let kept = lock(attended.clone(), "kept", 0).await.expect("the lock");
    tokio::time::sleep_until((asked + Duration::from_secs(64)).into()).await;
    let there =
        async |key: &[u8]| client.clone().get(key, None).await.expect("a range").count() == 1;
    // Renewed last when its connection ended, so it has had its 60 s too.
    assert!(!there(&unattended).await, "nobody is there to need it");
    assert_eq!(there(&kept).await, !target_is_etcd());
    drop(attended);
    client.clone().unlock(held).await.expect("unlocked");
    let answer = within(SOON, "the waiter's turn", waits).await.expect("no panic");
    if target_is_etcd() {
        refused(answer, Code::Unknown, "mutex: session is expired");
    } else {
        let key = answer.expect("granted");
        assert!(there(&key).await, "it holds what it was given");
        eventually(Duration::from_secs(70), "the lock of a closed connection ends", || async {
            (!there(&kept).await).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_candidacy_without_a_lease_tells_which_it_got() {
    let (cluster, mut client) = one_member().await;
    let channel = raw::channel(&cluster.endpoint(0)).await;
    // Name and lease have the same tags in both requests.
    let request = LockRequest { name: b"job".to_vec(), lease: 0 };
    let path = "/v3electionpb.Election/Campaign";
    let answer = raw::unary::<_, AnyResponse>(&channel, path, request).await.expect("elected");
    let leader = client.leader("job").await.expect("a leader").take_kv().expect("a pair");
    assert_eq!(leader.key(), format!("job/{:x}", leader.lease()).into_bytes());
    let told = ["holdfast-lease-id", "holdfast-lease-ttl", "holdfast-fence"]
        .map(|name| raw::metadata(&answer, name));
    if target_is_etcd() {
        assert_eq!(told, [None, None, None]);
    } else {
        let fence = leader.create_revision().to_string();
        assert_eq!(told, [Some(leader.lease().to_string()), Some("60".to_owned()), Some(fence)]);
    }
}

/// The same on both: holds are counted in our own service only.
#[tokio::test]
async fn a_lock_taken_twice_with_one_lease_is_released_once() {
    let (_cluster, mut client) = one_member().await;
    let (twice, next) = (lease(&mut client).await, lease(&mut client).await);
    let token = async |key: &[u8]| {
        client.clone().get(key, None).await.expect("a range").kvs()[0].create_revision()
    };
    let first = lock(client.clone(), "m", twice).await.expect("the lock");
    let its = token(&first).await;
    let waits = tokio::spawn(lock(client.clone(), "m", next));
    queued(&client, "m/", 2).await;
    let again = lock(client.clone(), "m", twice).await.expect("the lock");
    assert_eq!((&again, token(&again).await), (&first, its), "its place in the queue is its own");
    client.clone().unlock(again).await.expect("unlocked");
    let key = within(SOON, "the waiter's turn", waits).await.expect("no panic").expect("granted");
    assert!(token(&key).await > its, "tokens go up");
    let gone = client.get(first, None).await.expect("a range").count();
    assert_eq!(gone, 0);
}

#[derive(Clone, PartialEq, prost::Message)]
struct OwnProclaimRequest {
    #[prost(bytes = "vec", tag = "1")]
    name: Vec<u8>,
    #[prost(int64, tag = "2")]
    term: i64,
}

#[tokio::test]
async fn our_own_services_have_a_code_for_each_refusal() {
    let (cluster, mut client) = one_member().await;
    // On etcd's service both have etcd's one code for everything.
    let key = etcd_client::LeaderKey::new().with_name("job").with_key("job/1267").with_rev(7);
    let options = etcd_client::ProclaimOptions::new().with_leader(key);
    refused(client.proclaim("v", Some(options)).await, Code::Unknown, "election: not leader");
    refused(client.leader("job").await, Code::Unknown, "election: no leader");
    let channel = raw::channel(&cluster.endpoint(0)).await;
    let acquire = LockRequest { name: b"m".to_vec(), lease: 4711 };
    let acquired: Result<_, _> =
        raw::unary::<_, AnyResponse>(&channel, "/holdfast.v1.Locks/Acquire", acquire).await;
    let proclaim = OwnProclaimRequest { name: b"job".to_vec(), term: 7 };
    let path = "/holdfast.v1.Elections/Proclaim";
    let proclaimed = raw::unary::<_, AnyResponse>(&channel, path, proclaim).await;
    let told = [acquired, proclaimed].map(|answer| {
        let status = answer.expect_err("refused");
        (status.code(), status.message().to_owned())
    });
    if target_is_etcd() {
        assert!(told.iter().all(|(code, _)| *code == Code::Unimplemented), "{told:?}");
    } else {
        let text = |t: &str| t.to_owned();
        let expected = [
            (Code::NotFound, text("holdfast: lease not found")),
            (Code::FailedPrecondition, text("holdfast: stale token")),
        ];
        assert_eq!(told, expected);
    }
}

#[tokio::test]
async fn the_codes_of_a_lock_and_a_plain_call_differ_as_in_etcd() {
    let (_cluster, mut client) = one_member().await;
    let text = "etcdserver: requested lease not found".to_owned();
    let locked = lock(client.clone(), "m", 4711).await;
    assert_eq!(status_of(locked), (Code::Unknown, text.clone()));
    assert_eq!(status_of(client.lease_revoke(4711).await), (Code::NotFound, text));
}
