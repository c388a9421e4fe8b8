//! A client library in another process, the etcd-client crate: KV, leases, watches, locks, elections.

use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, EventType, GetOptions, LeaseTimeToLiveOptions,
    LockOptions, ProclaimOptions, PutOptions, ResignOptions, SortOrder, SortTarget, Txn, TxnOp,
    TxnOpResponse, WatchFilterType, WatchOptions, WatchResponse, WatchStream,
};
use holdfast_client_tests::check::{SOON, eventually, silent};
use holdfast_client_tests::{Cluster, within};

/// Long enough for something that must not happen to happen.
const A_WHILE: Duration = Duration::from_millis(300);

async fn one_member() -> (Cluster, Client) {
    let cluster = Cluster::start(1).await;
    let client = cluster.client(0).await;
    (cluster, client)
}

async fn put(client: &mut Client, key: &str, value: &str) -> i64 {
    let answer = client.put(key, value, None).await.expect("a put");
    answer.header().expect("a header").revision()
}

async fn keys(client: &mut Client, prefix: &str) -> Vec<String> {
    let options = GetOptions::new().with_prefix().with_keys_only();
    let answer = client.get(prefix, Some(options)).await.expect("a range");
    answer.kvs().iter().map(|kv| kv.key_str().expect("text").to_owned()).collect()
}

async fn lease(client: &mut Client, ttl: i64) -> i64 {
    client.lease_grant(ttl, None).await.expect("a lease").id()
}

#[tokio::test]
async fn a_pair_carries_its_history() {
    let (_cluster, mut client) = one_member().await;
    let first = put(&mut client, "k", "a").await;
    let options = PutOptions::new().with_prev_key();
    let answer = client.put("k", "b", Some(options)).await.expect("a put");
    assert_eq!(answer.prev_key().expect("the pair before").value(), b"a");
    let answer = client.get("k", None).await.expect("a range");
    let kv = &answer.kvs()[0];
    assert_eq!((kv.key(), kv.value()), (&b"k"[..], &b"b"[..]));
    let facts = (kv.create_revision(), kv.mod_revision(), kv.version(), kv.lease());
    assert_eq!(facts, (first, first + 1, 2, 0));
    let header = answer.header().expect("a header");
    assert!(header.cluster_id() != 0 && header.member_id() != 0 && header.raft_term() >= 2);

    let options = DeleteOptions::new().with_prev_key();
    let answer = client.delete("k", Some(options)).await.expect("a delete");
    assert_eq!((answer.deleted(), answer.prev_kvs()[0].value()), (1, &b"b"[..]));
    assert_eq!(put(&mut client, "k", "c").await, first + 3);
    let kv = client.get("k", None).await.expect("a range").take_kvs().remove(0);
    assert_eq!((kv.create_revision(), kv.version()), (first + 3, 1));
    let past = GetOptions::new().with_revision(first);
    let kv = client.get("k", Some(past)).await.expect("a range").take_kvs().remove(0);
    assert_eq!((kv.value(), kv.version()), (&b"a"[..], 1));
}

#[tokio::test]
async fn ranges_are_limited_sorted_and_filtered() {
    let (_cluster, mut client) = one_member().await;
    let mut revisions = Vec::new();
    for (key, value) in [("r/c", "2"), ("r/a", "3"), ("r/b", "1"), ("s", "0")] {
        revisions.push(put(&mut client, key, value).await);
    }
    let prefix = || GetOptions::new().with_prefix();
    let first = async |mut client: Client, options| -> (Vec<String>, i64, bool) {
        let answer = client.get("r/", Some(options)).await.expect("a range");
        let keys = answer.kvs().iter().map(|kv| kv.key_str().expect("text")[2..].to_owned());
        (keys.collect(), answer.count(), answer.more())
    };
    let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let sorted = prefix().with_sort(SortTarget::Value, SortOrder::Descend).with_limit(2);
    assert_eq!(first(client.clone(), sorted).await, (names(&["a", "c"]), 3, true));
    let sorted = prefix().with_sort(SortTarget::Create, SortOrder::Ascend);
    assert_eq!(first(client.clone(), sorted).await, (names(&["c", "a", "b"]), 3, false));
    let counted = prefix().with_count_only();
    assert_eq!(first(client.clone(), counted).await, (names(&[]), 3, false));
    let recent = prefix().with_min_mod_revision(revisions[1]);
    assert_eq!(first(client.clone(), recent).await, (names(&["a", "b"]), 3, false));
    let early = prefix().with_max_create_revision(revisions[1]);
    assert_eq!(first(client.clone(), early).await, (names(&["a", "c"]), 3, false));
    let all = client.get("", Some(GetOptions::new().with_all_keys())).await.expect("a range");
    assert_eq!(all.count(), 4);
}

#[tokio::test]
async fn a_transaction_takes_one_branch_in_one_revision() {
    let (_cluster, mut client) = one_member().await;
    let start = put(&mut client, "t/a", "1").await;
    let inner = Txn::new()
        .when([Compare::version("t/new", CompareOp::Equal, 0)])
        .and_then([TxnOp::put("t/inner", "then", None)])
        .or_else([TxnOp::put("t/inner", "else", None)]);
    let txn = Txn::new()
        .when([
            Compare::value("t/a", CompareOp::Equal, "1"),
            Compare::mod_revision("t/a", CompareOp::Equal, start),
            Compare::create_revision("t/absent", CompareOp::Equal, 0),
            Compare::lease("t/a", CompareOp::Equal, 0),
            Compare::version("t/", CompareOp::Greater, 0).with_prefix(),
        ])
        .and_then([
            TxnOp::put("t/new", "2", None),
            TxnOp::get("t/", Some(GetOptions::new().with_prefix())),
            TxnOp::delete("t/a", None),
            TxnOp::txn(inner),
        ])
        .or_else([TxnOp::put("t/wrong", "x", None)]);
    let answer = client.txn(txn.clone()).await.expect("a transaction");
    assert!(answer.succeeded());
    assert_eq!(answer.header().expect("a header").revision(), start + 1);
    let responses = answer.op_responses();
    assert_eq!(responses.len(), 4);
    match &responses[1] {
        // The range sees the put before it.
        TxnOpResponse::Get(range) => assert_eq!(range.count(), 2),
        other => panic!("expected a range, got {other:?}"),
    }
    // The nested compare sees the state before the whole transaction.
    let inner = client.get("t/inner", None).await.expect("a range").take_kvs().remove(0);
    assert_eq!((inner.value(), inner.mod_revision()), (&b"then"[..], start + 1));

    let answer = client.txn(txn).await.expect("a transaction");
    assert!(!answer.succeeded());
    assert_eq!(keys(&mut client, "t/").await, ["t/inner", "t/new", "t/wrong"]);
}

#[tokio::test]
async fn a_lease_takes_its_keys_along_in_one_revision() {
    let (_cluster, mut client) = one_member().await;
    let granted = client.lease_grant(60, None).await.expect("a lease");
    assert!(granted.id() > 0 && granted.ttl() == 60);
    let id = granted.id();
    for key in ["l/b", "l/a", "l/moved", "l/detached"] {
        let options = PutOptions::new().with_lease(id);
        client.put(key, "v", Some(options)).await.expect("a put");
    }
    let other = lease(&mut client, 60).await;
    let options = PutOptions::new().with_lease(other);
    client.put("l/moved", "v", Some(options)).await.expect("a put");
    let before = put(&mut client, "l/detached", "v").await;

    let options = LeaseTimeToLiveOptions::new().with_keys();
    let left = client.lease_time_to_live(id, Some(options)).await.expect("an answer");
    assert!(left.granted_ttl() == 60 && (50..=60).contains(&left.ttl()), "{left:?}");
    let mut attached = left.keys().to_vec();
    attached.sort();
    assert_eq!(attached, [b"l/a", b"l/b"]);
    let leases = client.leases().await.expect("an answer");
    let mut ids: Vec<i64> = leases.leases().iter().map(|l| l.id()).collect();
    ids.sort_unstable();
    assert_eq!(ids, if id < other { [id, other] } else { [other, id] });

    let options = WatchOptions::new().with_prefix().with_start_revision(before + 1);
    let mut watch = client.watch("l/", Some(options)).await.expect("a watch");
    client.lease_revoke(id).await.expect("a revoke");
    let deleted = events(&mut watch, 1).await.remove(0);
    let deleted: Vec<_> = deleted.iter().map(|e| (e.0, e.1.as_str(), e.3)).collect();
    let delete = EventType::Delete;
    assert_eq!(deleted, [(delete, "l/a", before + 1), (delete, "l/b", before + 1)]);
    let gone = client.lease_time_to_live(id, None).await.expect("an answer");
    assert_eq!((gone.ttl(), gone.granted_ttl()), (-1, 0));
    assert_eq!(keys(&mut client, "l/").await, ["l/detached", "l/moved"]);
}

#[tokio::test]
async fn a_lease_lives_as_long_as_it_is_kept_alive_and_not_much_longer() {
    let (_cluster, mut client) = one_member().await;
    let kept = client.lease_grant(1, None).await.expect("a lease");
    let left_alone = client.lease_grant(1, None).await.expect("a lease").id();
    assert_eq!(kept.ttl(), 2, "raised to the smallest TTL");
    for (key, id) in [("kept", kept.id()), ("alone", left_alone)] {
        let options = PutOptions::new().with_lease(id);
        client.put(key, "v", Some(options)).await.expect("a put");
    }
    let mut watch = client.watch("alone", None).await.expect("a watch");
    let (mut keeper, mut answers) = client.lease_keep_alive(kept.id()).await.expect("kept alive");
    let began = std::time::Instant::now();
    // Kept alive until the other one is gone, and its TTL once more.
    let mut other_went = None;
    while other_went.is_none_or(|at: std::time::Instant| at.elapsed() < Duration::from_secs(3)) {
        keeper.keep_alive().await.expect("the stream is up");
        let answer = within(SOON, "an answer", answers.message()).await;
        let answer = answer.expect("no error").expect("no end");
        assert_eq!((answer.id(), answer.ttl()), (kept.id(), 2));
        let step = tokio::time::timeout(Duration::from_millis(500), watch.message()).await;
        if let Ok(message) = step {
            let message = message.expect("no error").expect("no end");
            if !message.events().is_empty() {
                other_went = Some(std::time::Instant::now());
            }
        }
        assert!(began.elapsed() < Duration::from_secs(30), "a lease of 2 s never ended");
    }
    let lived = other_went.expect("it went").duration_since(began);
    assert!(lived > Duration::from_millis(1_500), "ended early, after {lived:?}");
    assert!(lived < Duration::from_secs(5), "ended late, after {lived:?}");
    assert_eq!(keys(&mut client, "kept").await, ["kept"]);
}

/// Type, key, value and mod revision of an event, and the value before it.
type Seen = (EventType, String, String, i64, Option<String>);

fn seen(response: &WatchResponse) -> Vec<Seen> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let one = |event: &etcd_client::Event| {
        let kv = event.kv().expect("an event has a pair");
        let before = event.prev_kv().map(|kv| text(kv.value()));
        (event.event_type(), text(kv.key()), text(kv.value()), kv.mod_revision(), before)
    };
    response.events().iter().map(one).collect()
}

/// The next answer of a watch stream, whatever it is.
async fn answer(watch: &mut WatchStream) -> WatchResponse {
    let message = within(SOON, "an answer of the watch", watch.message()).await;
    message.expect("no error").expect("no end")
}

/// The events of the next `revisions` revisions, each in a list of its own.
async fn events(watch: &mut WatchStream, revisions: usize) -> Vec<Vec<Seen>> {
    let mut by_revision: Vec<Vec<Seen>> = Vec::new();
    while by_revision.len() < revisions {
        for event in seen(&answer(watch).await) {
            match by_revision.last_mut() {
                Some(last) if last[0].3 == event.3 => last.push(event),
                _ => by_revision.push(vec![event]),
            }
        }
    }
    by_revision
}

#[tokio::test]
async fn a_watch_sends_history_then_news_then_stops_when_cancelled() {
    let (_cluster, mut client) = one_member().await;
    let start = put(&mut client, "w/a", "1").await;
    put(&mut client, "w/a", "2").await;
    put(&mut client, "x", "not watched").await;
    let options = WatchOptions::new().with_prefix().with_prev_key().with_start_revision(start);
    let mut watch = client.watch("w/", Some(options)).await.expect("a watch");
    let created = answer(&mut watch).await;
    assert!(created.created() && created.events().is_empty() && created.watch_id() == 0);
    assert_eq!(created.header().expect("a header").revision(), start + 2);
    let event = |kind, key: &str, value: &str, at, before: Option<&str>| {
        vec![(kind, key.to_owned(), value.to_owned(), at, before.map(str::to_owned))]
    };
    assert_eq!(
        events(&mut watch, 2).await,
        [
            event(EventType::Put, "w/a", "1", start, None),
            event(EventType::Put, "w/a", "2", start + 1, Some("1")),
        ]
    );
    client.delete("w/a", None).await.expect("a delete");
    let deleted = event(EventType::Delete, "w/a", "", start + 3, Some("2"));
    assert_eq!(events(&mut watch, 1).await, [deleted]);

    // A second watch on the same stream gets the next id, and its events carry it.
    watch.watch("x", None).await.expect("asked");
    let created = answer(&mut watch).await;
    assert!(created.created() && created.watch_id() == 1);
    put(&mut client, "x", "watched").await;
    let news = answer(&mut watch).await;
    assert_eq!((news.watch_id(), news.events().len()), (1, 1));
    watch.cancel(0).await.expect("asked");
    let cancelled = answer(&mut watch).await;
    assert!(cancelled.canceled() && cancelled.watch_id() == 0);
    assert_eq!(cancelled.cancel_reason(), "");
    put(&mut client, "w/a", "unseen").await;
    put(&mut client, "x", "seen").await;
    assert_eq!(answer(&mut watch).await.watch_id(), 1);
}

#[tokio::test]
async fn filters_keep_puts_or_deletes_away() {
    let (_cluster, mut client) = one_member().await;
    let start = put(&mut client, "f", "1").await;
    client.delete("f", None).await.expect("a delete");
    put(&mut client, "f", "2").await;
    let from = |filter| WatchOptions::new().with_start_revision(start).with_filters([filter]);
    let options = from(WatchFilterType::NoPut);
    let mut deletes = client.watch("f", Some(options)).await.expect("a watch");
    let options = from(WatchFilterType::NoDelete);
    let mut puts = client.watch("f", Some(options)).await.expect("a watch");
    let found = events(&mut deletes, 1).await;
    assert_eq!((found[0][0].0, found[0][0].3), (EventType::Delete, start + 1));
    let found: Vec<_> = events(&mut puts, 2).await.concat().iter().map(|e| (e.0, e.3)).collect();
    assert_eq!(found, [(EventType::Put, start), (EventType::Put, start + 2)]);
    silent(A_WHILE, "puts are filtered", deletes.message()).await;
}

#[tokio::test]
async fn progress_is_reported_when_asked_and_never_overtakes_events() {
    let (_cluster, mut client) = one_member().await;
    let mut watch = client.watch("p", None).await.expect("a watch");
    assert!(answer(&mut watch).await.created());
    put(&mut client, "p", "1").await;
    let current = put(&mut client, "q", "not watched").await;
    let mut event_seen = false;
    let progress = loop {
        watch.request_progress().await.expect("asked");
        // etcd leaves a request out while the watch is still catching up.
        let next = tokio::time::timeout(Duration::from_secs(1), watch.message()).await;
        let Ok(message) = next else { continue };
        let message = message.expect("no error").expect("no end");
        if message.events().is_empty() {
            if message.header().expect("a header").revision() == current {
                break message;
            }
        } else {
            event_seen = true;
        }
    };
    assert!(event_seen, "progress past the event came before the event");
    assert_eq!(progress.watch_id(), -1);
}

#[tokio::test]
async fn a_transaction_reaches_a_watch_in_one_answer() {
    let (_cluster, mut client) = one_member().await;
    let options = WatchOptions::new().with_prefix();
    let mut watch = client.watch("m/", Some(options)).await.expect("a watch");
    assert!(answer(&mut watch).await.created());
    let ops = ["m/c", "m/a", "m/b"].map(|key| TxnOp::put(key, "v", None));
    client.txn(Txn::new().and_then(ops)).await.expect("a transaction");
    let news = seen(&answer(&mut watch).await);
    let order: Vec<&str> = news.iter().map(|e| e.1.as_str()).collect();
    assert_eq!(order, ["m/c", "m/a", "m/b"], "all of it, in the order of the operations");
    assert!(news.iter().all(|e| e.3 == news[0].3));
}

async fn locked(client: &mut Client, name: &str, lease: i64) -> (String, i64) {
    let options = LockOptions::new().with_lease(lease);
    let answer = client.lock(name, Some(options)).await.expect("the lock");
    let key = String::from_utf8(answer.key().to_vec()).expect("text");
    (key, answer.header().expect("a header").revision())
}

#[tokio::test]
async fn a_lock_is_one_key_bound_to_its_lease() {
    let (_cluster, mut client) = one_member().await;
    let id = lease(&mut client, 60).await;
    let (key, revision) = locked(&mut client, "jobs", id).await;
    assert_eq!(key, format!("jobs/{id:x}"));
    let kv = client.get(key.as_str(), None).await.expect("a range").take_kvs().remove(0);
    assert_eq!((kv.value(), kv.lease(), kv.create_revision()), (&b""[..], id, revision));
    // The same lease again: the same key, and nothing written.
    assert_eq!(locked(&mut client, "jobs", id).await, (key.clone(), revision));
    client.unlock(key.as_str()).await.expect("unlocked");
    assert_eq!(keys(&mut client, "jobs").await, [""; 0]);
    let before = put(&mut client, "x", "").await;
    client.unlock(key.as_str()).await.expect("again is no error");
    assert_eq!(put(&mut client, "x", "").await, before + 1);
}

#[tokio::test]
async fn a_lock_passes_in_the_order_of_asking() {
    let (_cluster, mut client) = one_member().await;
    let holder = lease(&mut client, 60).await;
    let (mut held, _) = locked(&mut client, "fifo", holder).await;
    let (granted, mut grants) = tokio::sync::mpsc::unbounded_channel();
    for waiter in 0..5 {
        let (mut waiting, granted) = (client.clone(), granted.clone());
        let id = lease(&mut client, 60).await;
        tokio::spawn(async move {
            let (key, revision) = locked(&mut waiting, "fifo", id).await;
            granted.send((waiter, key, revision)).expect("the test listens");
        });
        // In the queue before the next one asks.
        wait_for_queue(&client, "fifo/", waiter + 2).await;
    }
    silent(A_WHILE, "the lock is held", grants.recv()).await;
    for waiter in 0..5 {
        let released = client.unlock(held.as_str()).await.expect("unlocked");
        let (who, key, revision) =
            within(SOON, "the next grant", grants.recv()).await.expect("one");
        assert_eq!(who, waiter);
        // The grant tells the revision at which the last older key went away.
        assert_eq!(revision, released.header().expect("a header").revision());
        held = key;
    }
}

#[tokio::test]
async fn a_waiting_lock_that_is_cancelled_leaves_no_key() {
    let (_cluster, mut client) = one_member().await;
    let holder = lease(&mut client, 60).await;
    let (held, _) = locked(&mut client, "quit", holder).await;
    let (first, second) = (lease(&mut client, 60).await, lease(&mut client, 60).await);
    let spawn = |id| {
        let mut client = client.clone();
        tokio::spawn(async move { locked(&mut client, "quit", id).await })
    };
    let quits = spawn(first);
    wait_for_queue(&client, "quit/", 2).await;
    let stays = spawn(second);
    wait_for_queue(&client, "quit/", 3).await;
    quits.abort();
    wait_for_queue(&client, "quit/", 2).await;
    let queue = keys(&mut client, "quit/").await;
    assert!(!queue.contains(&format!("quit/{first:x}")), "{queue:?}");
    client.unlock(held).await.expect("unlocked");
    let (key, _) = within(SOON, "the other waiter's turn", stays).await.expect("no panic");
    assert_eq!(key, format!("quit/{second:x}"));
}

async fn wait_for_queue(client: &Client, prefix: &str, length: usize) {
    eventually(SOON, &format!("{length} keys under {prefix}"), || {
        let mut client = client.clone();
        async move { (keys(&mut client, prefix).await.len() == length).then_some(()) }
    })
    .await;
}

#[tokio::test]
async fn a_lock_is_free_when_its_holders_lease_ends() {
    let (_cluster, mut client) = one_member().await;
    let holder = lease(&mut client, 2).await;
    locked(&mut client, "dies", holder).await;
    let next = lease(&mut client, 60).await;
    let began = std::time::Instant::now();
    let waits = locked(&mut client, "dies", next);
    let (key, _) = within(SOON, "the next holder", waits).await;
    assert_eq!(key, format!("dies/{next:x}"));
    assert!(began.elapsed() > Duration::from_secs(1), "the lease lived for its TTL");
}

#[tokio::test]
async fn an_election_has_one_leader_at_a_time() {
    let (_cluster, mut client) = one_member().await;
    let (alice, bob) = (lease(&mut client, 60).await, lease(&mut client, 60).await);
    let won = client.campaign("job", "alice", alice).await.expect("elected");
    let leader = won.leader().expect("a leader key").clone();
    assert_eq!(leader.name(), b"job");
    assert_eq!(leader.key(), format!("job/{alice:x}").as_bytes());
    assert_eq!((leader.rev(), leader.lease()), (won.header().expect("a header").revision(), alice));

    let mut observer = client.observe("job").await.expect("a stream");
    let mut observed = async |what: &str| {
        let next = within(SOON, what, observer.message()).await.expect("no error").expect("no end");
        let kv = next.kv().expect("a pair").clone();
        (kv.value_str().expect("text").to_owned(), kv.create_revision(), kv.mod_revision())
    };
    assert_eq!(observed("alice").await, ("alice".to_owned(), leader.rev(), leader.rev()));
    let mut candidate = client.clone();
    let waits = tokio::spawn(async move { candidate.campaign("job", "bob", bob).await });
    wait_for_queue(&client, "job/", 2).await;
    let options = ProclaimOptions::new().with_leader(leader.clone());
    let proclaimed =
        client.proclaim("still alice", Some(options.clone())).await.expect("proclaimed");
    let at = proclaimed.header().expect("a header").revision();
    assert_eq!(observed("the proclaim").await, ("still alice".to_owned(), leader.rev(), at));
    let now = client.leader("job").await.expect("a leader");
    assert_eq!(now.kv().expect("a pair").value(), b"still alice");
    assert!(!waits.is_finished());

    let resign = ResignOptions::new().with_leader(leader.clone());
    client.resign(Some(resign.clone())).await.expect("resigned");
    let won = within(SOON, "bob's turn", waits).await.expect("no panic").expect("elected");
    let bobs = won.leader().expect("a leader key").clone();
    assert_eq!(bobs.key(), format!("job/{bob:x}").as_bytes());
    // Unlike a lock, the answer tells the candidate's own create revision.
    assert_eq!(won.header().expect("a header").revision(), bobs.rev());
    assert_eq!(observed("bob").await, ("bob".to_owned(), bobs.rev(), bobs.rev()));
    client.proclaim("too late", Some(options)).await.expect_err("alice leads no more");
    client.resign(Some(resign)).await.expect("resigning again is no error");
    let kept = client.lease_time_to_live(alice, None).await.expect("an answer");
    assert!(kept.ttl() > 0, "resigning keeps the lease");
}

#[tokio::test]
async fn a_candidate_that_gives_up_leaves_no_key() {
    let (_cluster, mut client) = one_member().await;
    let (alice, bob) = (lease(&mut client, 60).await, lease(&mut client, 60).await);
    client.campaign("give", "alice", alice).await.expect("elected");
    let mut candidate = client.clone();
    let waits = tokio::spawn(async move { candidate.campaign("give", "bob", bob).await });
    wait_for_queue(&client, "give/", 2).await;
    waits.abort();
    wait_for_queue(&client, "give/", 1).await;
    assert_eq!(keys(&mut client, "give/").await, [format!("give/{alice:x}")]);
}
