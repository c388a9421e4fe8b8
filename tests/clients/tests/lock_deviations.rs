//! Where Holdfast's locks and elections differ from etcd's on purpose.
//!
//! Each test reproduces a defect of etcd when it talks to etcd, and its absence when it does not.

use std::time::Duration;

use etcd_client::{Client, GetOptions, LockOptions, PutOptions, ResignOptions};
use holdfast_client_tests::check::{Code, SOON, eventually, refused, silent, status_of};
use holdfast_client_tests::raw::{self, LockRequest, LockResponse, UnlockRequest, UnlockResponse};
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

#[tokio::test]
async fn a_leases_remaining_time_survives_a_restart() {
    let (mut cluster, mut client) = one_member().await;
    let id = client.lease_grant(20, None).await.expect("a lease").id();
    let left = eventually(SOON, "a few seconds of the lease have passed", || {
        let mut client = client.clone();
        async move {
            let left = client.lease_time_to_live(id, None).await.expect("an answer").ttl();
            (left <= 15).then_some(left)
        }
    })
    .await;
    cluster.kill(0);
    cluster.restart(0).await;
    let mut client = cluster.client(0).await;
    let now = client.lease_time_to_live(id, None).await.expect("an answer").ttl();
    if target_is_etcd() {
        assert!(now >= 18, "etcd starts the countdown anew: {now}");
    } else {
        // The time without a leader does not count, and a tick's worth may be forgotten.
        assert!((left - 5..=left + 2).contains(&now), "{left} s before the restart, {now} after");
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
