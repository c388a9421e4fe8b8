//! Users, roles and logins, as etcd's command line and a client library see them.
//!
//! The same against etcd, but for what a caller that went away leaves behind.

use std::time::Duration;

use etcd_client::{
    Client, ConnectOptions, GetOptions, LockOptions, Permission, PutOptions,
    RoleRevokePermissionOptions, Txn, TxnOp, WatchOptions,
};
use holdfast_client_tests::check::{Code, SOON, eventually, refused, silent};
use holdfast_client_tests::etcdctl::Output;
use holdfast_client_tests::{Cluster, Etcdctl, target_is_etcd, within};

/// Long enough for something that must not happen to happen.
const A_WHILE: Duration = Duration::from_millis(500);

/// Cheap hashes, so that the tests spend no time on them.
const FLAGS: [&str; 1] = ["--bcrypt-cost=4"];

async fn as_user(cluster: &Cluster, member: usize, name: &str) -> Client {
    let login = ConnectOptions::new().with_user(name, format!("{name}'s password"));
    let connected = Client::connect([cluster.endpoint(member)], Some(login));
    within(SOON, "a login", connected).await.expect("a client")
}

/// A cluster that asks who calls, with root and with alice, who may read and write under `app/`.
async fn guarded(size: usize) -> Cluster {
    let cluster = Cluster::start_with(size, &FLAGS).await;
    let mut client = cluster.client(0).await;
    for name in ["root", "alice"] {
        client.user_add(name, format!("{name}'s password"), None).await.expect("a user");
    }
    client.user_grant_role("root", "root").await.expect("granted");
    client.role_add("app").await.expect("a role");
    let permission = Permission::read_write("app/").with_prefix();
    client.role_grant_permission("app", permission).await.expect("granted");
    client.user_grant_role("alice", "app").await.expect("granted");
    client.auth_enable().await.expect("enabled");
    cluster
}

fn said(output: &Output) -> (Option<i32>, &str, &str) {
    (output.code, output.stdout.trim(), output.stderr.lines().last().unwrap_or_default())
}

/// The text that `etcdctl` prints of a refusal, in whichever of its forms.
fn refusal(output: &Output) -> &str {
    let (code, _, last) = said(output);
    assert_ne!(code, Some(0), "{output:?}");
    last.strip_prefix("Error: ").unwrap_or(last)
}

#[tokio::test]
async fn an_operator_sets_it_up_with_etcdctl() {
    let cluster = Cluster::start_with(1, &FLAGS).await;
    let etcdctl = Etcdctl::member(&cluster, 0);
    let run = |line: &str| etcdctl.run(&line.split(' ').collect::<Vec<_>>());
    let ok = |line: &str| {
        let output = run(line);
        assert_eq!(output.code, Some(0), "{line}: {output:?}");
        output.stdout.trim().to_owned()
    };
    assert_eq!(ok("auth status"), "Authentication Status: false\nAuthRevision: 1");
    assert_eq!(refusal(&run("auth enable")), "etcdserver: root user does not exist");
    assert_eq!(ok("user add root:rp"), "User root created");
    assert_eq!(ok("user add alice:pw"), "User alice created");
    assert_eq!(refusal(&run("user add alice:pw")), "etcdserver: user name already exists");
    assert_eq!(ok("role add app"), "Role app created");
    assert_eq!(ok("role grant-permission app readwrite app/ --prefix=true"), "Role app updated");
    assert_eq!(ok("role grant-permission app read public"), "Role app updated");
    assert_eq!(ok("user grant-role alice app"), "Role app is granted to user alice");
    assert_eq!(ok("user grant-role root root"), "Role root is granted to user root");
    assert_eq!(ok("user list"), "alice\nroot");
    assert_eq!(ok("role list"), "app");
    let role = ok("role get app");
    assert!(role.starts_with("Role app\nKV Read:\n\t[app/, app0) (prefix app/)\n"), "{role}");
    assert_eq!(ok("put public 1"), "OK");
    assert_eq!(ok("auth enable"), "Authentication Enabled");

    assert_eq!(refusal(&run("get public")), "etcdserver: user name is empty");
    assert_eq!(ok("--user alice:pw put app/a 2"), "OK");
    assert_eq!(ok("--user alice:pw get app/ --prefix"), "app/a\n2");
    assert_eq!(ok("--user alice:pw get public"), "public\n1");
    let denied = "etcdserver: permission denied";
    assert_eq!(refusal(&run("--user alice:pw put public 2")), denied);
    assert_eq!(refusal(&run("--user alice:pw get other")), denied);
    assert_eq!(refusal(&run("--user alice:pw user list")), denied);
    let wrong = "etcdserver: authentication failed, invalid user ID or password";
    assert_eq!(refusal(&run("--user alice:wrong get public")), wrong);
    assert_eq!(ok("--user root:rp get app/ --prefix --keys-only"), "app/a");
    assert_eq!(ok("--user alice:pw user get alice"), "User: alice\nRoles: app");
    assert_eq!(ok("--user alice:pw lock app/m echo held"), "held");
    assert_eq!(refusal(&run("--user alice:pw lock m echo held")), denied);
    assert!(ok("--user root:rp endpoint status").contains("127.0.0.1"));
    assert_eq!(
        ok("--user root:rp role revoke-permission app public"),
        "Permission of key public is revoked from role app"
    );
    assert_eq!(refusal(&run("--user alice:pw get public")), denied);
    assert_eq!(
        ok("--user root:rp user revoke-role alice app"),
        "Role app is revoked from user alice"
    );
    assert_eq!(refusal(&run("--user alice:pw get app/a")), denied);
    assert_eq!(ok("--user root:rp user delete alice"), "User alice deleted");
    assert_eq!(refusal(&run("--user alice:pw get app/a")), wrong);
    assert_eq!(ok("--user root:rp auth disable"), "Authentication Disabled");
    assert_eq!(ok("get public"), "public\n1");
}

#[tokio::test]
async fn a_library_logs_in_and_keeps_to_its_rights_on_every_member() {
    let cluster = guarded(3).await;
    let mut root = as_user(&cluster, 0, "root").await;
    root.put("other", "1", None).await.expect("root may");
    let denied = |result| refused(result, Code::PermissionDenied, "etcdserver: permission denied");
    for member in 0..3 {
        let mut alice = as_user(&cluster, member, "alice").await;
        alice.put("app/k", "v", None).await.expect("a put");
        assert_eq!(alice.get("app/k", None).await.expect("a range").count(), 1);
        denied(alice.get("other", None).await.map(drop));
        denied(alice.get("other", Some(GetOptions::new().with_serializable())).await.map(drop));
        denied(alice.get("app/", Some(GetOptions::new().with_from_key())).await.map(drop));
        denied(alice.put("other", "2", None).await.map(drop));
        denied(alice.delete("other", None).await.map(drop));
        let hidden = Txn::new().or_else([TxnOp::get("other", None)]);
        denied(alice.txn(hidden).await.map(drop));
        let lease = alice.lease_grant(60, None).await.expect("a lease").id();
        root.put("other", "1", Some(PutOptions::new().with_lease(lease))).await.expect("root may");
        let on_it = PutOptions::new().with_lease(lease);
        denied(alice.put("app/k", "v", Some(on_it)).await.map(drop));
        denied(alice.lease_revoke(lease).await.map(drop));
        denied(alice.status().await.map(drop));
        let nobody = cluster.client(member).await.put("app/k", "v", None).await;
        refused(nobody, Code::InvalidArgument, "etcdserver: user name is empty");
        // What is cancelled at its creation shows no watch.
        let watch = alice.watch("other", Some(WatchOptions::new())).await;
        let reason = match watch {
            Err(error) => error.to_string(),
            Ok(mut stream) => {
                let first = within(SOON, "an answer", stream.message()).await.expect("an answer");
                first.expect("the stream goes on").cancel_reason().to_owned()
            }
        };
        assert!(reason.contains("permission denied"), "{reason}");
    }
}

#[tokio::test]
async fn a_login_ends_with_the_password_and_rights_change_at_once() {
    let cluster = guarded(1).await;
    let mut root = as_user(&cluster, 0, "root").await;
    let mut alice = as_user(&cluster, 0, "alice").await;
    let more = Permission::read("more");
    root.role_grant_permission("app", more).await.expect("granted");
    assert_eq!(alice.get("more", None).await.expect("a range").count(), 0);
    let none = RoleRevokePermissionOptions::new();
    root.role_revoke_permission("app", "more", Some(none)).await.expect("revoked");
    let denied = alice.get("more", None).await;
    refused(denied, Code::PermissionDenied, "etcdserver: permission denied");
    root.user_change_password("alice", "new").await.expect("changed");
    let ended = alice.get("app/k", None).await;
    refused(ended, Code::Unauthenticated, "etcdserver: invalid auth token");
    let deleting = root.user_delete("root").await;
    refused(deleting, Code::InvalidArgument, "etcdserver: invalid auth management");
}

#[tokio::test]
async fn users_and_their_rights_survive_members_that_are_killed() {
    let mut cluster = guarded(1).await;
    let before = as_user(&cluster, 0, "root").await.user_list().await.expect("a list");
    cluster.kill(0);
    cluster.restart(0).await;
    let nobody = cluster.client(0).await.put("app/k", "v", None).await;
    refused(nobody, Code::InvalidArgument, "etcdserver: user name is empty");
    let mut alice = as_user(&cluster, 0, "alice").await;
    alice.put("app/k", "v", None).await.expect("a put");
    let denied = alice.put("other", "v", None).await;
    refused(denied, Code::PermissionDenied, "etcdserver: permission denied");
    let mut root = as_user(&cluster, 0, "root").await;
    let after = root.user_list().await.expect("a list");
    assert_eq!(before.users(), after.users());
    root.auth_disable().await.expect("disabled");
    cluster.kill(0);
    cluster.restart(0).await;
    cluster.client(0).await.put("other", "v", None).await.expect("nobody is asked");
}

/// D5: etcd takes back what a caller has made in the caller's name, with a call that has no token.
#[tokio::test]
async fn the_queue_key_of_a_caller_that_went_away_goes_with_auth_on_too() {
    let cluster = guarded(1).await;
    let mut root = as_user(&cluster, 0, "root").await;
    let alice = as_user(&cluster, 0, "alice").await;
    root.lock("app/m", None).await.expect("the lock");
    let mut waiting = alice.clone();
    let lease = waiting.lease_grant(600, None).await.expect("a lease").id();
    let key = format!("app/m/{lease:x}");
    let waiter = tokio::spawn(async move {
        waiting.lock("app/m", Some(LockOptions::new().with_lease(lease))).await
    });
    let count = |client: &Client| {
        let (mut client, key) = (client.clone(), key.clone());
        async move { client.get(key, None).await.expect("a range").count() }
    };
    eventually(SOON, "the waiter stands in line", || {
        let count = count(&root);
        async move { (count.await == 1).then_some(()) }
    })
    .await;
    waiter.abort();
    assert!(waiter.await.is_err(), "it waits no longer");
    let gone = eventually(SOON, "its key is gone", || {
        let count = count(&root);
        async move { (count.await == 0).then_some(()) }
    });
    if target_is_etcd() {
        silent(A_WHILE, "etcd leaves the key to its lease", gone).await;
    } else {
        gone.await;
    }
}
