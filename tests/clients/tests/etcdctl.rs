//! etcd's own command line does against this server what it does against etcd.
//!
//! Each scenario is a test against one member. All of them run once more, one after the other,
//! against three members, where every step asks the next member: whatever one member has answered,
//! the others know.

use std::cell::Cell;
use std::path::Path;
use std::time::Duration;

use holdfast_client_tests::check::{SOON, eventually_now};
use holdfast_client_tests::etcdctl::{Running, text};
use holdfast_client_tests::{Cluster, Etcdctl};
use serde_json::Value;

/// Asks the members in turn.
struct Asking {
    members: Vec<Etcdctl>,
    all: Etcdctl,
    turn: Cell<usize>,
    dir: std::path::PathBuf,
}

impl Asking {
    fn of(cluster: &Cluster) -> Asking {
        let members = (0..cluster.size()).map(|m| Etcdctl::member(cluster, m)).collect();
        let (all, dir) = (Etcdctl::all(cluster), cluster.dir().to_owned());
        Asking { members, all, turn: Cell::new(0), dir }
    }

    fn next(&self) -> &Etcdctl {
        let turn = self.turn.get();
        self.turn.set(turn + 1);
        &self.members[turn % self.members.len()]
    }

    #[track_caller]
    fn ok(&self, command: &[&str]) -> String {
        self.next().ok(command)
    }

    #[track_caller]
    fn lines(&self, command: &[&str]) -> Vec<String> {
        self.next().lines(command)
    }

    #[track_caller]
    fn json(&self, command: &[&str]) -> Value {
        self.next().json(command)
    }

    #[track_caller]
    fn fails(&self, command: &[&str]) -> String {
        self.next().fails(command)
    }

    fn spawn(&self, command: &[&str]) -> Running {
        self.next().spawn(command)
    }

    /// Puts a pair and gives the revision it made.
    #[track_caller]
    fn put(&self, key: &str, value: &str) -> i64 {
        revision(&self.json(&["put", key, value]))
    }

    /// The keys that a `get` answers, in its order.
    #[track_caller]
    fn keys(&self, options: &[&str]) -> Vec<String> {
        let mut command = vec!["get", "--keys-only"];
        command.extend(options);
        self.lines(&command).into_iter().filter(|l| !l.is_empty()).collect()
    }
}

fn revision(answer: &Value) -> i64 {
    answer["header"]["revision"].as_i64().expect("a header with a revision")
}

/// The lease that `lease grant` says it granted.
fn lease_in(line: &str) -> String {
    line.split(' ').nth(1).expect("lease ID granted with TTL(..)").to_owned()
}

fn put_and_get(ask: &Asking) {
    assert_eq!(ask.ok(&["put", "pg/a", "1"]), "OK\n");
    assert_eq!(ask.ok(&["get", "pg/a"]), "pg/a\n1\n");
    assert_eq!(ask.ok(&["put", "pg/a", "2", "--prev-kv"]), "OK\npg/a\n1\n");
    assert_eq!(ask.ok(&["get", "pg/a", "--print-value-only"]), "2\n");
    assert_eq!(ask.ok(&["get", "pg/absent"]), "");
    assert_eq!(ask.next().ok_with_input(&["put", "pg/stdin"], "from stdin"), "OK\n");
    assert_eq!(ask.ok(&["get", "pg/stdin", "--print-value-only"]), "from stdin\n");
    assert_eq!(ask.ok(&["put", "pg/a", "--ignore-lease", "3"]), "OK\n");
    assert!(ask.fails(&["put", "", "x"]).contains("etcdserver: key is not provided"));
    assert!(
        ask.fails(&["put", "--ignore-value", "pg/absent"]).contains("etcdserver: key not found")
    );
    let answer = ask.json(&["get", "pg/a"]);
    assert_eq!(answer["count"], 1);
    assert_eq!(
        (text(&answer["kvs"][0]["key"]), text(&answer["kvs"][0]["value"])),
        pair("pg/a", "3")
    );
    assert_eq!(answer["kvs"][0]["version"], 3);
}

fn pair(a: &str, b: &str) -> (String, String) {
    (a.to_owned(), b.to_owned())
}

fn get_options(ask: &Asking) {
    // Creation order c a b, value order b c a, version order a b c, last-change order b a c.
    for (key, value) in [("c", "2"), ("a", "9"), ("b", "1"), ("c", "2"), ("b", "1")] {
        ask.put(&format!("get/{key}"), value);
    }
    let before = ask.put("get/a", "9");
    ask.put("get/c", "2");
    ask.put("get/c", "2");
    ask.put("getting", "other prefix");
    let by = |field: &str, order: &str| {
        let (by, order) = (format!("--sort-by={field}"), format!("--order={order}"));
        ask.keys(&["get/", "--prefix", &by, &order])
    };
    let get =
        |names: &[&str]| -> Vec<String> { names.iter().map(|n| format!("get/{n}")).collect() };
    assert_eq!(by("KEY", "ASCEND"), get(&["a", "b", "c"]));
    assert_eq!(by("KEY", "DESCEND"), get(&["c", "b", "a"]));
    assert_eq!(by("CREATE", "ASCEND"), get(&["c", "a", "b"]));
    assert_eq!(by("CREATE", "DESCEND"), get(&["b", "a", "c"]));
    assert_eq!(by("MODIFY", "ASCEND"), get(&["b", "a", "c"]));
    assert_eq!(by("MODIFY", "DESCEND"), get(&["c", "a", "b"]));
    assert_eq!(by("VALUE", "ASCEND"), get(&["b", "c", "a"]));
    assert_eq!(by("VALUE", "DESCEND"), get(&["a", "c", "b"]));
    assert_eq!(by("VERSION", "ASCEND"), get(&["a", "b", "c"]));
    // Equal versions stay in key order, also downwards.
    assert_eq!(by("VERSION", "DESCEND"), get(&["c", "a", "b"]));

    assert_eq!(ask.keys(&["get/", "--prefix", "--limit=2"]), get(&["a", "b"]));
    let limited = ask.json(&["get", "get/", "--prefix", "--limit=2"]);
    assert_eq!((&limited["count"], &limited["more"]), (&Value::from(3), &Value::from(true)));
    assert_eq!(
        ask.keys(&["get/b", "--from-key"])[..3],
        [&get(&["b", "c"])[..], &["getting".to_owned()]].concat()
    );
    assert_eq!(ask.keys(&["get/a", "get/c"]), get(&["a", "b"]));
    assert_eq!(ask.keys(&["get/c", "get/a"]), get(&[]));
    let counted = ask.lines(&["get", "get/", "--prefix", "--count-only", "-w", "fields"]);
    assert!(counted.contains(&"\"Count\" : 3".to_owned()), "{counted:?}");
    assert!(!counted.iter().any(|l| l.starts_with("\"Key\"")), "{counted:?}");
    let values = ask.lines(&["get", "get/", "--prefix", "--print-value-only"]);
    assert_eq!(values, ["9", "1", "2"]);

    let old = ask.json(&["get", "get/c", &format!("--rev={before}")]);
    assert_eq!(old["kvs"][0]["version"], 2);
    assert!(revision(&old) > before, "the header tells the current revision");
    let future = ask.fails(&["get", "get/c", &format!("--rev={}", before + 1_000)]);
    assert!(future.contains("required revision is a future revision"), "{future}");

    // Any member answers a serializable read, as soon as it has applied the write.
    let member = ask.next();
    let serializable = || member.ok(&["get", "getting", "--consistency=s"]);
    eventually_now(SOON, "a serializable read", || {
        (serializable() == "getting\nother prefix\n").then_some(())
    });
}

fn delete(ask: &Asking) {
    for key in ["del/a", "del/b", "del/c", "del/d"] {
        ask.put(key, "v");
    }
    assert_eq!(ask.ok(&["del", "del/absent"]), "0\n");
    assert_eq!(ask.ok(&["del", "del/a", "--prev-kv"]), "1\ndel/a\nv\n");
    assert_eq!(ask.ok(&["del", "del/b", "del/c"]), "1\n");
    let before = ask.put("del/e", "v");
    assert_eq!(ask.ok(&["del", "del/", "--prefix"]), "3\n");
    assert_eq!(ask.put("del/z1", "v"), before + 2, "one revision for the whole delete");
    ask.put("zzz/1", "v");
    assert_eq!(ask.ok(&["del", "zzz/", "--from-key"]), "1\n");
    assert_eq!(ask.keys(&["del/", "--prefix"]), ["del/z1"]);
    assert_eq!(ask.put("del/a", "again"), before + 5);
    assert_eq!(ask.json(&["get", "del/a"])["kvs"][0]["version"], 1);
}

fn transaction(ask: &Asking) {
    ask.put("txn/a", "1");
    let run = |input: &str| ask.next().ok_with_input(&["txn"], input);
    let passes = "value(\"txn/a\") = \"1\"\nversion(\"txn/a\") > \"0\"\n\
                  create(\"txn/absent\") = \"0\"\nmod(\"txn/a\") != \"0\"\n";
    let ops = "put txn/b 2\nget txn/a\n\nput txn/c 3\n\n";
    assert_eq!(run(&format!("{passes}\n{ops}")), "SUCCESS\n\nOK\n\ntxn/a\n1\n");
    assert_eq!(run(&format!("value(\"txn/a\") < \"1\"\n\n{ops}")), "FAILURE\n\nOK\n");
    assert_eq!(run("\ndel txn/b\n\n\n"), "SUCCESS\n\n1\n");
    assert_eq!(ask.keys(&["txn/", "--prefix"]), ["txn/a", "txn/c"]);
    let twice = ask.next().run_with_input(&["txn"], "\nput txn/x 1\nput txn/x 2\n\n\n");
    assert_ne!(twice.code, Some(0));
    assert!(twice.stderr.contains("duplicate key given in txn request"), "{twice:?}");
    let interactive = ask.next().ok_with_input(&["txn", "-i"], "\nget txn/a\n\n\n");
    assert!(interactive.ends_with("SUCCESS\n\ntxn/a\n1\n"), "{interactive}");
}

fn watch(ask: &Asking) {
    let start = ask.put("watch/a", "0");
    let from = format!("--rev={start}");
    // History first, so the first lines also show that each watch is up.
    let key = ask.spawn(&["watch", "watch/a", &from]);
    let prefix = ask.spawn(&["watch", "watch/", "--prefix", "--prev-kv", &from]);
    let range = ask.spawn(&["watch", "watch/a", "watch/c", &from]);
    for (running, first) in [(&key, 3), (&prefix, 3), (&range, 3)] {
        running.expect(&["PUT", "watch/a", "0"][..first]);
    }
    ask.put("watch/a", "1");
    ask.put("watch/b", "2");
    ask.put("watch/c", "3");
    ask.ok(&["del", "watch/a"]);
    key.expect(&["PUT", "watch/a", "1", "DELETE", "watch/a", ""]);
    prefix.expect(&["PUT", "watch/a", "0", "watch/a", "1"]);
    prefix.expect(&["PUT", "watch/b", "2", "PUT", "watch/c", "3"]);
    prefix.expect(&["DELETE", "watch/a", "1", "watch/a", ""]);
    range.expect(&["PUT", "watch/a", "1", "PUT", "watch/b", "2", "DELETE", "watch/a", ""]);
    for running in [&key, &prefix, &range] {
        running.expect_silence(Duration::from_millis(200));
    }
}

fn lease(ask: &Asking) {
    let granted = ask.ok(&["lease", "grant", "60"]);
    let id = lease_in(&granted);
    assert_eq!(granted, format!("lease {id} granted with TTL(60s)\n"));
    let list = ask.lines(&["lease", "list"]);
    assert!(list.contains(&id), "{list:?}");
    ask.ok(&["put", "lease/a", "1", "--lease", &id]);
    ask.ok(&["put", "lease/b", "1", "--lease", &id]);
    let left = ask.ok(&["lease", "timetolive", &id, "--keys"]);
    assert!(left.starts_with(&format!("lease {id} granted with TTL(60s), remaining(")), "{left}");
    assert!(left.contains("lease/a") && left.contains("lease/b"), "{left}");
    let kept = ask.ok(&["lease", "keep-alive", "--once", &id]);
    assert_eq!(kept, format!("lease {id} keepalived with TTL(60)\n"));
    assert_eq!(ask.ok(&["lease", "revoke", &id]), format!("lease {id} revoked\n"));
    assert_eq!(ask.ok(&["get", "lease/", "--prefix"]), "");
    assert_eq!(ask.ok(&["lease", "timetolive", &id]), format!("lease {id} already expired\n"));
    assert!(ask.fails(&["lease", "revoke", &id]).contains("requested lease not found"));
    let unknown = ask.fails(&["put", "lease/c", "1", "--lease", &id]);
    assert!(unknown.contains("requested lease not found"), "{unknown}");

    // The smallest lease ends by itself, and its keys with it, in one revision.
    let short = lease_in(&ask.ok(&["lease", "grant", "1"]));
    let first = revision(&ask.json(&["put", "lease/x", "1", "--lease", &short]));
    let from = format!("--rev={first}");
    let watching = ask.spawn(&["watch", "lease/", "--prefix", &from]);
    ask.ok(&["put", "lease/y", "1", "--lease", &short]);
    watching.expect(&["PUT", "lease/x", "1", "PUT", "lease/y", "1"]);
    watching.expect(&["DELETE", "lease/x", "", "DELETE", "lease/y", ""]);
    assert_eq!(ask.put("lease/after", "1"), first + 3);
}

fn lock(ask: &Asking) {
    // Two contenders that print when they hold it.
    let first = ask.spawn(&["lock", "lock/turns"]);
    let held = first.line();
    assert!(held.starts_with("lock/turns/"), "{held}");
    let second = ask.spawn(&["lock", "lock/turns"]);
    second.expect_silence(Duration::from_millis(300));
    first.interrupt();
    let next = second.line();
    assert!(next.starts_with("lock/turns/") && next != held, "{held}, then {next}");
    second.interrupt();
    assert_eq!(ask.keys(&["lock/turns/", "--prefix"]), [""; 0]);

    // A command runs under the lock, knows the key, and its exit code is passed on.
    let printed = ask.lines(&["lock", "lock/run", "--", "sh", "-c", "echo $ETCD_LOCK_KEY"]);
    assert!(printed[0].starts_with("lock/run/"), "{printed:?}");
    let failing = ask.next().run(&["lock", "lock/run", "--", "sh", "-c", "exit 5"]);
    assert_eq!(failing.code, Some(5), "{failing:?}");

    // Several commands never run at the same time.
    let trace = ask.dir.join("lock-trace");
    let script = format!("echo in >> {0}; sleep 0.05; echo out >> {0}", trace.display());
    let command = ["lock", "lock/excl", "--", "sh", "-c", &script];
    let running: Vec<Running> = (0..6).map(|_| ask.spawn(&command)).collect();
    for run in running {
        assert_eq!(run.wait(), Some(0));
    }
    let trace = read(&trace);
    assert_eq!(trace, "in\nout\n".repeat(6), "the holders overlapped");
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).expect("the file is there")
}

fn elect(ask: &Asking) {
    let candidate = ask.spawn(&["elect", "elect/job", "alice"]);
    let key = candidate.line();
    assert!(key.starts_with("elect/job/"), "{key}");
    assert_eq!(candidate.line(), "alice");
    let observer = ask.spawn(&["elect", "--listen", "elect/job"]);
    observer.expect(&[&key, "alice"]);
    let other = ask.spawn(&["elect", "elect/job", "bob"]);
    other.expect_silence(Duration::from_millis(300));
    candidate.interrupt();
    let next = other.line();
    assert!(next.starts_with("elect/job/") && next != key, "{key}, then {next}");
    assert_eq!(other.line(), "bob");
    observer.expect(&[&next, "bob"]);
    other.interrupt();
    observer.expect_silence(Duration::from_millis(200));
}

fn members_and_endpoints(ask: &Asking) {
    let size = ask.members.len();
    let simple = ask.lines(&["member", "list"]);
    assert_eq!(simple.len(), size, "{simple:?}");
    let answer = ask.json(&["member", "list"]);
    let members = answer["members"].as_array().expect("members");
    let mut names: Vec<&str> = members.iter().map(|m| m["name"].as_str().expect("text")).collect();
    names.sort_unstable();
    assert_eq!(names, (1..=size).map(|n| format!("m{n}")).collect::<Vec<_>>());
    for member in members {
        let id = format!("{:x}", member["ID"].as_u64().expect("an ID"));
        let name = member["name"].as_str().expect("a name");
        let peer = member["peerURLs"][0].as_str().expect("a peer URL");
        let client = member["clientURLs"][0].as_str().expect("a client URL");
        let line = format!("{id}, started, {name}, {peer}, {client}, false");
        assert!(simple.contains(&line), "{line} not in {simple:?}");
    }

    let statuses = ask.all.json(&["endpoint", "status"]);
    let statuses = statuses.as_array().expect("one for each endpoint");
    assert_eq!(statuses.len(), size);
    let leader = &statuses[0]["Status"]["leader"];
    assert!(leader.as_u64().expect("a leader") != 0);
    let mut leading = 0;
    for status in statuses {
        let status = &status["Status"];
        assert_eq!(&status["leader"], leader);
        assert!(status["raftTerm"].as_u64().expect("a term") >= 2, "{status}");
        assert!(status["raftIndex"].as_u64().expect("an index") > 0, "{status}");
        assert!(status["dbSize"].as_i64().expect("a size") > 0, "{status}");
        assert!(status["version"].as_str().expect("a version").starts_with("3."), "{status}");
        leading += usize::from(&status["header"]["member_id"] == leader);
    }
    assert_eq!(leading, 1);
    let health = ask.all.json(&["endpoint", "health"]);
    for endpoint in health.as_array().expect("one for each endpoint") {
        assert_eq!(endpoint["health"], true, "{health}");
    }
    let health = ask.next().run(&["endpoint", "health"]);
    let said = format!("{}{}", health.stdout, health.stderr);
    assert!(health.code == Some(0) && said.contains("is healthy"), "{health:?}");
}

fn compaction(ask: &Asking) {
    let first = ask.put("compact/a", "1");
    let second = ask.put("compact/a", "2");
    ask.put("compact/a", "3");
    let answer = ask.ok(&["compaction", &second.to_string()]);
    assert_eq!(answer, format!("compacted revision {second}\n"));
    let gone = ask.fails(&["get", "compact/a", &format!("--rev={first}")]);
    assert!(gone.contains("etcdserver: mvcc: required revision has been compacted"), "{gone}");
    assert_eq!(ask.ok(&["get", "compact/a", &format!("--rev={second}")]), "compact/a\n2\n");
    let again = ask.fails(&["compaction", &second.to_string()]);
    assert!(again.contains("required revision has been compacted"), "{again}");
    let future = ask.fails(&["compaction", "1000000"]);
    assert!(future.contains("required revision is a future revision"), "{future}");
    let from = format!("--rev={first}");
    let watching = ask.next().run(&["watch", "compact/a", &from]);
    assert_ne!(watching.code, Some(0));
    assert!(watching.stderr.contains("required revision has been compacted"), "{watching:?}");
}

/// A test against one member for each scenario, and one of all against three.
macro_rules! scenarios {
    ($($scenario:ident),+ $(,)?) => {
        mod one_member {
            use super::*;
            $(
                #[tokio::test]
                async fn $scenario() {
                    super::$scenario(&Asking::of(&Cluster::start(1).await));
                }
            )+
        }

        #[tokio::test]
        async fn three_members_asked_in_turn() {
            let cluster = Cluster::start(3).await;
            let ask = Asking::of(&cluster);
            $(
                println!("{}", stringify!($scenario));
                $scenario(&ask);
            )+
        }
    };
}

scenarios!(
    put_and_get,
    get_options,
    delete,
    transaction,
    watch,
    lease,
    lock,
    elect,
    members_and_endpoints,
    compaction,
);
