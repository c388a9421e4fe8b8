//! Who may call what, asked of any member. The answers are those of etcd 3.5.30.

use std::io::Read;

use tonic::{Code, Request, Status};

use super::*;
use crate::pb::authpb::Permission;
use crate::pb::authpb::permission::Type;
use crate::pb::etcdserverpb::auth_client::AuthClient;
use crate::pb::etcdserverpb::cluster_client::ClusterClient;
use crate::pb::etcdserverpb::kv_client::KvClient;
use crate::pb::etcdserverpb::lease_client::LeaseClient;
use crate::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::pb::etcdserverpb::watch_client::WatchClient;
use crate::pb::etcdserverpb::watch_request::RequestUnion;
use crate::pb::etcdserverpb::*;
use crate::pb::holdfastpb;
use crate::pb::holdfastpb::elections_client::ElectionsClient;
use crate::pb::holdfastpb::locks_client::LocksClient;
use crate::pb::v3electionpb::election_client::ElectionClient;
use crate::pb::v3electionpb::{CampaignRequest, LeaderKey, LeaderRequest, ResignRequest};
use crate::pb::v3lockpb::lock_client::LockClient;
use crate::pb::v3lockpb::{LockRequest, UnlockRequest};

/// Cheap hashes, so that the tests spend no time on them.
const FLAGS: [&str; 1] = ["--bcrypt-cost=4"];

fn by<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if !token.is_empty() {
        request.metadata_mut().insert("token", token.parse().unwrap());
    }
    request
}

fn said<T>(answer: Result<T, Status>) -> String {
    match answer {
        Ok(_) => "ok".to_owned(),
        Err(status) => format!("{:?} {}", status.code(), status.message()),
    }
}

async fn token(channel: &Channel, name: &str, password: &str) -> Result<String, Status> {
    let ask = AuthenticateRequest { name: name.into(), password: password.into() };
    let answer = AuthClient::new(channel.clone()).authenticate(ask).await?;
    Ok(answer.into_inner().token)
}

async fn permit(channel: &Channel, root: &str, role: &str, prefix: &str, kind: Type) {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().unwrap() += 1;
    let key = prefix.as_bytes().to_vec().into();
    let perm = Permission { perm_type: kind.into(), key, range_end: end.into() };
    let grant = AuthRoleGrantPermissionRequest { name: role.into(), perm: Some(perm) };
    AuthClient::new(channel.clone()).role_grant_permission(by(root, grant)).await.unwrap();
}

async fn add_user(channel: &Channel, root: &str, name: &str, role: &str) {
    let mut auth = AuthClient::new(channel.clone());
    let password = format!("{name}'s password");
    let add = AuthUserAddRequest { name: name.into(), password, ..Default::default() };
    auth.user_add(by(root, add)).await.unwrap();
    let grant = AuthUserGrantRoleRequest { user: name.into(), role: role.into() };
    auth.user_grant_role(by(root, grant)).await.unwrap();
}

/// Turns authentication on, with user u: it may read `rd`, write `wr` and do both with `rw`, each as
/// a prefix. Returns tokens of root and of u.
async fn guard(channel: &Channel) -> (String, String) {
    let mut auth = AuthClient::new(channel.clone());
    add_user(channel, "", "root", "root").await;
    auth.role_add(AuthRoleAddRequest { name: "r".into() }).await.unwrap();
    add_user(channel, "", "u", "r").await;
    for (prefix, kind) in [("rd", Type::Read), ("wr", Type::Write), ("rw", Type::Readwrite)] {
        permit(channel, "", "r", prefix, kind).await;
    }
    auth.auth_enable(AuthEnableRequest {}).await.unwrap();
    let root = token(channel, "root", "root's password").await.unwrap();
    (root, token(channel, "u", "u's password").await.unwrap())
}

fn put(key: &str) -> PutRequest {
    PutRequest { key: key.as_bytes().to_vec().into(), value: "v".into(), ..Default::default() }
}

fn get(key: &str) -> RangeRequest {
    RangeRequest { key: key.as_bytes().to_vec().into(), ..Default::default() }
}

/// The answers to one call by nobody, with a token that is none, and by u.
macro_rules! answers {
    ($client:ident.$call:ident, $tokens:expr, $message:expr) => {{
        let mut answers = Vec::new();
        for token in $tokens {
            answers.push(said($client.$call(by(token, $message)).await));
        }
        answers
    }};
}

const EMPTY: &str = "InvalidArgument etcdserver: user name is empty";
const BAD: &str = "Unauthenticated etcdserver: invalid auth token";
const DENIED: &str = "PermissionDenied etcdserver: permission denied";

#[tokio::test]
async fn every_service_asks_who_calls() {
    let cluster = cluster(1, &FLAGS).await;
    let channel = cluster[0].connect().await;
    let (root, u) = guard(&channel).await;
    let tokens = ["", "x.1", u.as_str()];
    let mut kv = KvClient::new(channel.clone());
    let mut leases = LeaseClient::new(channel.clone());
    let mut members = ClusterClient::new(channel.clone());
    let mut maintenance = MaintenanceClient::new(channel.clone());
    let mut auth = AuthClient::new(channel.clone());
    kv.put(by(&root, put("xx"))).await.unwrap();
    for (id, key) in [(1, "xx1"), (2, "wr1"), (3, "rd1")] {
        leases.lease_grant(by(&root, LeaseGrantRequest { id, ttl: 600 })).await.unwrap();
        kv.put(by(&root, PutRequest { lease: id, ..put(key) })).await.unwrap();
    }
    let etcd = |of_u: &'static str| [EMPTY, BAD, of_u];

    assert_eq!(answers!(kv.range, tokens, get("rd")), etcd("ok"));
    assert_eq!(answers!(kv.range, tokens, get("xx")), etcd(DENIED));
    let serializable = |key| RangeRequest { serializable: true, ..get(key) };
    assert_eq!(answers!(kv.range, tokens, serializable("rd")), etcd("ok"));
    assert_eq!(answers!(kv.range, tokens, serializable("xx")), etcd(DENIED));
    assert_eq!(answers!(kv.range_stream, tokens, get("xx")), etcd(DENIED));
    assert_eq!(answers!(kv.put, tokens, put("wr")), etcd("ok"));
    assert_eq!(answers!(kv.put, tokens, put("rd")), etcd(DENIED));
    let no_key = "InvalidArgument etcdserver: key is not provided";
    assert_eq!(answers!(kv.put, tokens, put("")), [no_key; 3], "that comes first");
    let delete = DeleteRangeRequest { key: "rd".into(), ..Default::default() };
    assert_eq!(answers!(kv.delete_range, tokens, delete.clone()), etcd(DENIED));
    let reading = |key| {
        let request = Some(request_op::Request::RequestRange(get(key)));
        TxnRequest { failure: vec![RequestOp { request }], ..Default::default() }
    };
    assert_eq!(answers!(kv.txn, tokens, reading("rd")), etcd("ok"));
    assert_eq!(answers!(kv.txn, tokens, reading("xx")), etcd(DENIED));
    assert_eq!(answers!(kv.txn, tokens, TxnRequest::default()), ["ok", BAD, "ok"]);
    assert_eq!(answers!(kv.compact, tokens, CompactionRequest::default()), etcd(DENIED));

    let grant = LeaseGrantRequest { id: 0, ttl: 60 };
    assert_eq!(answers!(leases.lease_grant, tokens, grant), etcd("ok"));
    let revoke = LeaseRevokeRequest { id: 1 };
    assert_eq!(answers!(leases.lease_revoke, tokens, revoke), etcd(DENIED));
    let unknown = "NotFound etcdserver: requested lease not found";
    let revoke = LeaseRevokeRequest { id: 99 };
    assert_eq!(answers!(leases.lease_revoke, tokens, revoke), etcd(unknown));
    let left = |id, keys| LeaseTimeToLiveRequest { id, keys };
    assert_eq!(answers!(leases.lease_time_to_live, tokens, left(1, false)), etcd("ok"));
    assert_eq!(answers!(leases.lease_time_to_live, tokens, left(1, true)), etcd(DENIED));
    assert_eq!(answers!(leases.lease_time_to_live, tokens, left(3, true)), etcd("ok"));
    let all = LeaseLeasesRequest {};
    assert_eq!(answers!(leases.lease_leases, tokens, all), etcd(DENIED));
    let renewals = [(1, DENIED), (2, "ok"), (3, DENIED), (99, "ok")];
    for (id, of_u) in renewals {
        for (token, expected) in tokens.into_iter().zip(etcd(of_u)) {
            let asked = tokio_stream::iter([LeaseKeepAliveRequest { id }]);
            let answer = leases.lease_keep_alive(by(token, asked)).await.unwrap();
            let answer = answer.into_inner().message().await;
            assert_eq!(said(answer), expected, "lease {id}");
        }
    }

    let list = MemberListRequest::default();
    assert_eq!(answers!(members.member_list, tokens, list), etcd("ok"));
    let remove = MemberRemoveRequest { id: 5 };
    assert_eq!(answers!(members.member_remove, tokens, remove), etcd(DENIED));
    assert_eq!(answers!(maintenance.status, tokens, StatusRequest {}), etcd(DENIED));
    let alarm = |action| AlarmRequest { action, ..Default::default() };
    assert_eq!(answers!(maintenance.alarm, tokens, alarm(0)), etcd("ok"));
    assert_eq!(answers!(maintenance.alarm, tokens, alarm(1)), etcd(DENIED));
    let raise = AlarmRequest { alarm: AlarmType::Nospace.into(), ..alarm(1) };
    assert_eq!(answers!(maintenance.alarm, tokens, raise), etcd(DENIED));
    let target = MoveLeaderRequest { target_id: 5 };
    assert_eq!(answers!(maintenance.move_leader, tokens, target), etcd(DENIED));
    let odd = [
        "Unknown auth: user name is empty",
        "Unknown auth: invalid auth token",
        "Unknown auth: permission denied",
    ];
    assert_eq!(answers!(maintenance.hash, tokens, HashRequest {}), odd);
    assert_eq!(answers!(maintenance.hash_kv, tokens, HashKvRequest::default()), odd);
    assert_eq!(answers!(maintenance.defragment, tokens, DefragmentRequest {}), odd);
    assert_eq!(answers!(maintenance.snapshot, tokens, SnapshotRequest {}), odd);

    assert_eq!(answers!(auth.auth_status, tokens, AuthStatusRequest {}), etcd(DENIED));
    assert_eq!(answers!(auth.auth_enable, tokens, AuthEnableRequest {}), etcd(DENIED));
    assert_eq!(answers!(auth.auth_disable, tokens, AuthDisableRequest {}), etcd(DENIED));
    assert_eq!(answers!(auth.user_list, tokens, AuthUserListRequest {}), etcd(DENIED));
    assert_eq!(answers!(auth.role_list, tokens, AuthRoleListRequest {}), etcd(DENIED));
    let user = |name: &str| AuthUserGetRequest { name: name.into() };
    assert_eq!(answers!(auth.user_get, tokens, user("u")), etcd("ok"));
    assert_eq!(answers!(auth.user_get, tokens, user("root")), etcd(DENIED));
    let role = |name: &str| AuthRoleGetRequest { role: name.into() };
    assert_eq!(answers!(auth.role_get, tokens, role("r")), etcd("ok"));
    assert_eq!(answers!(auth.role_get, tokens, role("zz")), etcd(DENIED));
    let own = AuthUserChangePasswordRequest {
        name: "u".into(),
        password: "other".into(),
        ..Default::default()
    };
    assert_eq!(answers!(auth.user_change_password, tokens, own.clone()), etcd(DENIED));
    let add = AuthUserAddRequest { name: "v".into(), ..Default::default() };
    assert_eq!(answers!(auth.user_add, tokens, add.clone()), etcd(DENIED));
    let bare = || AuthRoleGrantPermissionRequest { name: "r".into(), perm: None };
    assert_eq!(answers!(auth.role_grant_permission, tokens, bare()), etcd(DENIED));
}

#[tokio::test]
async fn locks_and_elections_ask_who_calls() {
    let cluster = cluster(1, &FLAGS).await;
    let channel = cluster[0].connect().await;
    let (root, u) = guard(&channel).await;
    let tokens = ["", "x.1", u.as_str()];
    let mut locks = LockClient::new(channel.clone());
    let mut elections = ElectionClient::new(channel.clone());
    let unknown = |of_u: &'static str| {
        let (empty, bad) = ("etcdserver: user name is empty", "etcdserver: invalid auth token");
        [format!("Unknown {empty}"), format!("Unknown {bad}"), of_u.to_owned()]
    };
    const DENIED: &str = "Unknown etcdserver: permission denied";
    for (name, of_u) in [("rw", "ok"), ("wr", DENIED), ("rd", DENIED), ("xx", DENIED)] {
        let lock = LockRequest { name: name.into(), lease: 0 };
        assert_eq!(answers!(locks.lock, tokens, lock.clone()), unknown(of_u), "{name}");
        let campaign = CampaignRequest { name: format!("{name}e").into(), ..Default::default() };
        assert_eq!(answers!(elections.campaign, tokens, campaign.clone()), unknown(of_u));
        let key = format!("{name}e/1").into_bytes();
        let leader = Some(LeaderKey { key: key.clone().into(), rev: 1, ..Default::default() });
        let resign = ResignRequest { leader };
        assert_eq!(answers!(elections.resign, tokens, resign.clone()), unknown(of_u));
        let unlock = UnlockRequest { key: format!("{name}/1").into() };
        let of_u = if name == "wr" { "ok" } else { of_u };
        assert_eq!(answers!(locks.unlock, tokens, unlock.clone()), unknown(of_u), "{name}");
        let who = LeaderRequest { name: format!("{name}/none").into() };
        let readable = name.starts_with('r');
        let of_u = if readable { "Unknown election: no leader" } else { DENIED };
        assert_eq!(answers!(elections.leader, tokens, who.clone()), unknown(of_u), "{name}");
    }
    // Who may not see an election sees its end.
    for token in ["", "x.1", u.as_str()] {
        let who = LeaderRequest { name: "xx".into() };
        let mut seen = elections.observe(by(token, who)).await.unwrap().into_inner();
        assert_eq!(within("the end", seen.message()).await.unwrap(), None);
    }

    let own = |of_u: &'static str| {
        [
            "InvalidArgument holdfast: user name is empty".to_owned(),
            "Unauthenticated holdfast: invalid auth token".to_owned(),
            of_u.to_owned(),
        ]
    };
    const OWN_DENIED: &str = "PermissionDenied holdfast: permission denied";
    let mut locks = LocksClient::new(channel.clone());
    let mut elections = ElectionsClient::new(channel.clone());
    let acquire = |name: &str, wait_ms| {
        let name = name.as_bytes().to_vec().into();
        holdfastpb::AcquireRequest { name, wait_ms: Some(wait_ms), ..Default::default() }
    };
    assert_eq!(answers!(locks.acquire, tokens, acquire("rw/own", 1)), own("ok"));
    assert_eq!(answers!(locks.acquire, tokens, acquire("xx", 0)), own(OWN_DENIED));
    assert_eq!(answers!(locks.acquire, tokens, acquire("rd", 0)), own(OWN_DENIED));
    let look = |name: &str| holdfastpb::GetRequest { name: name.as_bytes().to_vec().into() };
    assert_eq!(answers!(locks.get, tokens, look("rd")), own("ok"));
    assert_eq!(answers!(locks.get, tokens, look("xx")), own(OWN_DENIED));
    let list = holdfastpb::ListRequest::default();
    assert_eq!(answers!(locks.list, tokens, list.clone()), own(OWN_DENIED), "it may not see all");
    let list = holdfastpb::ListRequest { prefix: "rw".into(), ..Default::default() };
    assert_eq!(answers!(locks.list, tokens, list.clone()), own("ok"));
    let watch = |name: &'static str| holdfastpb::WatchRequest { name: name.into(), prefix: false };
    assert_eq!(answers!(locks.watch, tokens, watch("xx")), own(OWN_DENIED));
    let check = holdfastpb::CheckRequest { name: "xx".into(), token: 5 };
    assert_eq!(answers!(locks.check, tokens, check.clone()), own(OWN_DENIED));
    let force = holdfastpb::ForceReleaseRequest {
        name: "rd".into(),
        token: 5,
        reason: "stuck".into(),
        ..Default::default()
    };
    assert_eq!(answers!(locks.force_release, tokens, force.clone()), own(OWN_DENIED));
    let see = holdfastpb::CandidatesRequest { name: "xx".into() };
    assert_eq!(answers!(elections.candidates, tokens, see.clone()), own(OWN_DENIED));
    let follow = holdfastpb::ObserveRequest { name: "xx".into(), ..Default::default() };
    assert_eq!(answers!(elections.observe, tokens, follow.clone()), own(OWN_DENIED));
    // A fence tells who holds a lock.
    let mut kv = KvClient::new(channel);
    let mut fenced = by(&u, put("wr"));
    fenced.metadata_mut().insert("holdfast-fence", "xx=1".parse().unwrap());
    let denied = "PermissionDenied etcdserver: permission denied";
    assert_eq!(said(kv.put(fenced).await), denied);
    let mut fenced = by(&root, put("wr"));
    fenced.metadata_mut().insert("holdfast-fence", "xx=1".parse().unwrap());
    assert_eq!(said(kv.put(fenced).await), "FailedPrecondition holdfast: stale fencing token");
}

async fn created(channel: &Channel, token: &str, watches: &[(&str, &str)]) -> Vec<WatchResponse> {
    let create = |(key, end): &(&str, &str)| WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
            key: key.as_bytes().to_vec().into(),
            range_end: end.as_bytes().to_vec().into(),
            ..Default::default()
        })),
    };
    let requests: Vec<_> = watches.iter().map(create).collect();
    let mut client = WatchClient::new(channel.clone());
    let stream = client.watch(by(token, tokio_stream::iter(requests))).await.unwrap();
    let mut stream = stream.into_inner();
    let mut answers = Vec::new();
    for _ in watches {
        answers.push(within("an answer", stream.message()).await.unwrap().unwrap());
    }
    answers
}

#[tokio::test]
async fn a_watch_that_is_denied_is_cancelled_and_the_stream_lives_on() {
    let cluster = cluster(1, &FLAGS).await;
    let channel = cluster[0].connect().await;
    let (_, u) = guard(&channel).await;
    let watches = [("xx", ""), ("rd", "rf"), ("rd", ""), ("xx5", "xx1"), ("rd5", "rd1"), ("", "")];
    let denied = "rpc error: code = PermissionDenied desc = etcdserver: permission denied";
    let reasons = [denied, denied, "", denied, "mvcc: watcher range is empty", denied];
    for (answer, reason) in created(&channel, &u, &watches).await.iter().zip(reasons) {
        assert_eq!((answer.created, answer.cancel_reason.as_str()), (true, reason));
        assert_eq!(answer.canceled, !reason.is_empty());
        assert_eq!(answer.watch_id, if reason.is_empty() { 0 } else { -1 });
    }
    let nobody = &created(&channel, "", &watches[..1]).await[0].cancel_reason;
    assert_eq!(nobody, "rpc error: code = InvalidArgument desc = etcdserver: user name is empty");
    let unknown = &created(&channel, "x.1", &watches[..1]).await[0].cancel_reason;
    assert_eq!(unknown, "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token");
}

#[tokio::test]
async fn a_login_counts_on_every_member_until_something_voids_it() {
    let cluster = cluster(3, &FLAGS).await;
    let mut channels = Vec::new();
    for member in &cluster {
        channels.push(member.connect().await);
    }
    let (root, u) = guard(&channels[0]).await;
    let mut clients: Vec<_> = channels.iter().cloned().map(KvClient::new).collect();
    // Each login and each change is known wherever it is asked for next.
    for round in 0..6 {
        let (here, there) = (round % 3, (round + 1) % 3);
        let fresh = token(&channels[here], "u", "u's password").await.unwrap();
        assert_ne!(fresh, u);
        assert_eq!(said(clients[there].put(by(&fresh, put("rw"))).await), "ok");
        let prefix = format!("p{round}");
        assert_eq!(said(clients[there].put(by(&u, put(&prefix))).await), DENIED);
        permit(&channels[here], &root, "r", &prefix, Type::Write).await;
        assert_eq!(said(clients[there].put(by(&u, put(&prefix))).await), "ok", "{round}");
    }
    let mut auth = AuthClient::new(channels[1].clone());
    let change = AuthUserChangePasswordRequest {
        name: "u".into(),
        password: "new".into(),
        ..Default::default()
    };
    auth.user_change_password(by(&root, change)).await.unwrap();
    for client in &mut clients {
        assert_eq!(said(client.range(by(&u, get("rd"))).await), BAD);
    }
    let wrong = "InvalidArgument etcdserver: authentication failed, invalid user ID or password";
    assert_eq!(said(token(&channels[2], "u", "u's password").await), wrong);
    assert_eq!(said(token(&channels[2], "nobody", "x").await), wrong);
    let u = token(&channels[2], "u", "new").await.unwrap();
    auth.auth_disable(by(&root, AuthDisableRequest {})).await.unwrap();
    for client in &mut clients {
        assert_eq!(said(client.range(get("xx")).await), "ok", "nobody is asked");
    }
    let off = "FailedPrecondition etcdserver: authentication is not enabled";
    assert_eq!(said(token(&channels[0], "u", "new").await), off);
    auth.auth_enable(AuthEnableRequest {}).await.unwrap();
    for client in &mut clients {
        assert_eq!(said(client.range(by(&u, get("rd"))).await), BAD);
        assert_eq!(said(client.range(get("rd")).await), EMPTY);
    }
}

#[tokio::test]
async fn what_a_waiting_call_has_made_goes_with_its_caller_though_that_may_do_nothing_more() {
    let cluster = cluster(3, &FLAGS).await;
    let channel = cluster[1].connect().await;
    let (root, u) = guard(&channel).await;
    let held = LockRequest { name: "rw".into(), lease: 0 };
    LockClient::new(channel.clone()).lock(by(&root, held)).await.unwrap();
    let mut leases = LeaseClient::new(channel.clone());
    let lease = leases.lease_grant(by(&u, LeaseGrantRequest { id: 0x77, ttl: 600 })).await;
    assert_eq!(lease.unwrap().into_inner().id, 0x77);
    let waiting = channel.clone();
    let token = u.clone();
    let waiter = tokio::spawn(async move {
        let lock = LockRequest { name: "rw".into(), lease: 0x77 };
        LockClient::new(waiting).lock(by(&token, lock)).await
    });
    let node = cluster[1].node();
    let stands = || node.view().get(b"rw/77").is_some();
    eventually(node, "the waiter stands in line", || stands().then_some(())).await;
    let mut auth = AuthClient::new(channel);
    auth.user_delete(by(&root, AuthUserDeleteRequest { name: "u".into() })).await.unwrap();
    waiter.abort();
    eventually(node, "its key is gone", || (!stands()).then_some(())).await;
}

#[tokio::test]
async fn passwords_and_tokens_are_in_no_entry() {
    let cluster = cluster(1, &FLAGS).await;
    let channel = cluster[0].connect().await;
    let (root, _) = guard(&channel).await;
    let mut auth = AuthClient::new(channel.clone());
    let long =
        AuthUserAddRequest { name: "long".into(), password: "x".repeat(73), ..Default::default() };
    let refused = auth.user_add(by(&root, long)).await.unwrap_err();
    let text = "bcrypt: password length exceeds 72 bytes";
    assert_eq!((refused.code(), refused.message()), (Code::Unknown, text));
    let data = cluster[0]._data.path().join("data/log");
    let secret = root.split('.').next().unwrap().as_bytes();
    for segment in std::fs::read_dir(data).unwrap() {
        // Behind its records a segment is zeros.
        let mut bytes = Vec::new();
        let segment = std::fs::File::open(segment.unwrap().path()).unwrap();
        segment.take(1 << 18).read_to_end(&mut bytes).unwrap();
        let holds = |text: &[u8]| bytes.windows(text.len()).any(|window| window == text);
        assert!(holds(b"$2a$04$"), "the hash is there");
        assert!(!holds(b"u's password") && !holds(secret));
    }
}
