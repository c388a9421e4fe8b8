//! Users, roles, and who may do what.

use super::*;

fn change(change: AuthChange) -> Command {
    Command::Auth(change)
}

fn password(text: &str) -> PasswordHash {
    PasswordHash(text.to_owned())
}

fn add_user(name: &str) -> Command {
    let password_hash = Some(password("a hash"));
    change(AuthChange::UserAdd { name: name.to_owned(), password_hash })
}

fn add_role(name: &str) -> Command {
    change(AuthChange::RoleAdd { name: name.to_owned() })
}

fn give(user: &str, role: &str) -> Command {
    change(AuthChange::UserGrantRole { user: user.to_owned(), role: role.to_owned() })
}

fn permit(role: &str, start: &str, end: &str, kind: PermissionKind) -> Command {
    let permission = Permission { range: KeyRange::from_wire(key(start), key(end)), kind };
    change(AuthChange::RoleGrantPermission { role: role.to_owned(), permission })
}

fn revoke(role: &str, start: &str, end: &str) -> Command {
    let range = KeyRange::from_wire(key(start), key(end));
    change(AuthChange::RoleRevokePermission { role: role.to_owned(), range })
}

/// A member with root, whose authentication is on, and with user u: it may read `rd`, write `wr`
/// and do both with `rw`, each as a prefix.
fn guarded() -> Member {
    let mut member = Member::new();
    for command in [
        add_user("root"),
        give("root", "root"),
        add_user("u"),
        add_role("r"),
        give("u", "r"),
        permit("r", "rd", "re", PermissionKind::Read),
        permit("r", "wr", "ws", PermissionKind::Write),
        permit("r", "rw", "rx", PermissionKind::ReadWrite),
        change(AuthChange::Enable),
    ] {
        member.ok(command);
    }
    member
}

fn user(member: &Member, name: &str) -> Option<Principal> {
    let auth_revision = member.machine.auth().revision();
    Some(Principal::User { name: name.to_owned(), auth_revision })
}

fn apply_by(member: &mut Member, principal: Option<Principal>, command: Command) -> Outcome {
    let at = Timestamp(member.at);
    member.apply_entry(&Entry { at, origin: Origin::default(), command, principal })
}

/// What `command` by `name` is refused with, on a member that is thrown away.
fn refused_to(member: &mut Member, name: &str, command: Command) -> Option<Rejection> {
    let by = user(member, name);
    let mut other = Member::new();
    other.index = member.index;
    other.at = member.at;
    other.install(member.machine.image());
    apply_by(&mut other, by, command).reply.err()
}

fn ok_by_root(member: &mut Member, command: Command) {
    let root = user(member, "root");
    apply_by(member, root, command).reply.unwrap();
}

#[test]
fn changes_are_refused_in_etcds_order_and_count_only_when_they_change_something() {
    use AuthRefusal::*;
    let mut member = Member::new();
    let by_name = |name: &str| name.to_owned();
    let revision = |member: &Member| member.machine.auth().revision();
    assert_eq!(revision(&member), 1);
    let refused = |member: &mut Member, command, refusal: AuthRefusal| {
        assert_eq!(member.rejected(command), refusal.into());
    };
    refused(&mut member, change(AuthChange::Enable), RootUserNotFound);
    member.ok(change(AuthChange::Disable));
    assert_eq!(revision(&member), 1, "it was off");
    member.ok(add_user("root"));
    refused(&mut member, add_user("root"), UserExists);
    refused(&mut member, add_user(""), UserEmpty);
    refused(&mut member, add_user(&"x".repeat(1025)), NameTooLong);
    refused(&mut member, change(AuthChange::Enable), RootRoleNotGranted);
    refused(&mut member, give("nobody", "root"), UserNotFound);
    refused(&mut member, give("root", "r"), RoleNotFound);
    assert_eq!(revision(&member), 2);
    member.ok(give("root", "root"));
    member.ok(give("root", "root"));
    assert_eq!(revision(&member), 3, "granted twice is changed once");
    member.ok(add_role("r"));
    refused(&mut member, add_role("r"), RoleExists);
    refused(&mut member, add_role(""), RoleEmpty);
    refused(&mut member, permit("x", "k", "", PermissionKind::Read), RoleNotFound);
    refused(&mut member, permit("r", "", "", PermissionKind::Read), InvalidManagement);
    refused(&mut member, permit("r", "b", "a", PermissionKind::Read), InvalidManagement);
    member.ok(permit("r", "k", "", PermissionKind::Read));
    member.ok(permit("r", "k", "", PermissionKind::Write));
    refused(&mut member, revoke("r", "k", "z"), PermissionNotGranted);
    refused(&mut member, revoke("x", "k", ""), RoleNotFound);
    let kept = member.machine.auth().role("r").expect("it is there").permissions().to_vec();
    assert_eq!(kept, [Permission { range: one("k"), kind: PermissionKind::Write }]);
    let revoke_role = |user: &str, role: &str| {
        change(AuthChange::UserRevokeRole { user: by_name(user), role: by_name(role) })
    };
    refused(&mut member, revoke_role("root", "r"), RoleNotGranted);
    refused(&mut member, revoke_role("nobody", "r"), UserNotFound);
    member.ok(change(AuthChange::Enable));
    member.ok(change(AuthChange::Authenticate {
        user: by_name("root"),
        token_sha256: [1; 32],
        auth_revision: revision(&member),
    }));
    let before = revision(&member);
    for (command, refusal) in [
        (change(AuthChange::UserDelete { name: by_name("root") }), InvalidManagement),
        (change(AuthChange::RoleDelete { name: by_name("root") }), InvalidManagement),
        (revoke_role("root", "root"), InvalidManagement),
        (change(AuthChange::UserDelete { name: by_name("nobody") }), UserNotFound),
        (change(AuthChange::RoleDelete { name: by_name("nobody") }), RoleNotFound),
    ] {
        assert_eq!(refused_to(&mut member, "root", command), Some(refusal.into()));
    }
    ok_by_root(&mut member, change(AuthChange::Enable));
    assert_eq!(revision(&member), before, "it was on");
    ok_by_root(&mut member, change(AuthChange::Disable));
    assert_eq!(revision(&member), before + 1);
}

#[test]
fn a_token_is_given_out_only_by_the_tables_that_the_password_was_checked_by() {
    let mut member = guarded();
    let proof = |user: &str, auth_revision| {
        let (user, token_sha256) = (user.to_owned(), [7; 32]);
        change(AuthChange::Authenticate { user, token_sha256, auth_revision })
    };
    let revision = member.machine.auth().revision();
    let old = member.rejected(proof("u", revision - 1));
    assert_eq!(old, AuthRefusal::OldRevision.into());
    assert_eq!(member.rejected(proof("nobody", revision)), AuthRefusal::OldRevision.into());
    member.ok(proof("u", revision));
    ok_by_root(&mut member, change(AuthChange::Disable));
    let off = member.rejected(proof("u", revision + 1));
    assert_eq!(off, AuthRefusal::Disabled.into());
}

#[test]
fn a_role_that_is_deleted_is_taken_from_its_users() {
    let mut member = guarded();
    assert_eq!(refused_to(&mut member, "u", Command::Put(put("wr1", "v"))), None);
    ok_by_root(&mut member, change(AuthChange::RoleDelete { name: "r".to_owned() }));
    assert!(member.machine.auth().user("u").expect("it is there").roles.is_empty());
    let denied = refused_to(&mut member, "u", Command::Put(put("wr1", "v")));
    assert_eq!(denied, Some(AuthRefusal::PermissionDenied.into()));
}

/// What a plain user may do, as etcd 3.5.30 answered.
#[test]
fn a_user_may_do_what_its_roles_allow() {
    let mut member = guarded();
    // Leases with nothing on them, with a key of the user's, and with one that it may not write.
    for (id, name) in [(1, None), (2, Some("wr9")), (3, Some("xx9")), (4, Some("rd9"))] {
        ok_by_root(&mut member, grant(id, 60));
        if let Some(name) = name {
            ok_by_root(&mut member, Command::Put(put_on(name, "v", id)));
        }
    }
    let span = |start: &str, end: &str| KeyRange::from_wire(key(start), key(end));
    let get = |range| TxnOp::Range(Range::all(range));
    let with_prev = |name: &str| Put { prev_kv: true, ..put(name, "v") };
    let deleting = |range| Command::DeleteRange(delete(range));
    let deleting_told = |range| Command::DeleteRange(DeleteRange { range, prev_kv: true });
    let compare =
        |range| Compare { range, result: CompareResult::Equal, target: CompareTarget::Create(0) };
    let when = |range| Command::Txn(txn(vec![compare(range)], vec![], vec![]));
    let then = |op| Command::Txn(txn(vec![], vec![op], vec![]));
    let otherwise = |op| Command::Txn(txn(vec![], vec![], vec![op]));
    let nested = |op| then(TxnOp::Txn(txn(vec![], vec![], vec![op])));
    let fenced = |name: &str, write| {
        Command::Fenced(Fenced { fences: vec![Fence { name: key(name), token: 5 }], write })
    };
    let enqueue = |name: &str, id| {
        Command::Enqueue(Enqueue {
            name: key(name),
            lease: LeaseId(id),
            value: key(""),
            rewrite: false,
        })
    };
    let release =
        |name: &str| Command::Release(Release { name: key(name), token: 5, forced: None });
    let revoke_lease = |id| Command::LeaseRevoke { id: LeaseId(id) };
    let raise = alarms::raise(1, AlarmKind::NoSpace);
    let cases = [
        ("put", true, Command::Put(put("wr1", "v"))),
        ("put what it may read", false, Command::Put(put("rd1", "v"))),
        ("put elsewhere", false, Command::Put(put("xx1", "v"))),
        ("put and be told what was", false, Command::Put(with_prev("wr1"))),
        ("put and be told", true, Command::Put(with_prev("rw1"))),
        ("keep the value", true, Command::Put(Put { value: None, ..put("wr9", "") })),
        ("put on an empty lease", true, Command::Put(put_on("wr1", "v", 1))),
        ("put on its lease", true, Command::Put(put_on("wr1", "v", 2))),
        ("put on another's lease", false, Command::Put(put_on("wr1", "v", 3))),
        ("put on a lease with what it may read", false, Command::Put(put_on("wr1", "v", 4))),
        ("delete", true, deleting(one("wr1"))),
        ("delete all", true, deleting(span("wr", "ws"))),
        ("delete more", false, deleting(span("wr", "wt"))),
        ("delete from there on", false, deleting(span("wr", "\0"))),
        ("delete what it may read", false, deleting(one("rd1"))),
        ("delete and be told what was", false, deleting_told(one("wr1"))),
        ("delete and be told", true, deleting_told(one("rw1"))),
        ("delete nothing", true, deleting(span("wr5", "wr1"))),
        ("delete nothing elsewhere", false, deleting(span("xx5", "xx1"))),
        ("compare", true, when(one("rd1"))),
        ("compare elsewhere", false, when(one("xx1"))),
        ("compare more", false, when(span("rd", "rz"))),
        ("compare what it may write", false, when(one("wr1"))),
        ("put in a branch", true, then(TxnOp::Put(put("wr1", "v")))),
        ("put in a branch not taken", false, otherwise(TxnOp::Put(put("xx1", "v")))),
        ("read in a branch not taken", false, otherwise(get(one("xx1")))),
        ("delete in a branch not taken", false, otherwise(TxnOp::DeleteRange(delete(one("xx1"))))),
        ("be told in a branch", false, then(TxnOp::Put(with_prev("wr1")))),
        ("put on another's lease in a branch", false, then(TxnOp::Put(put_on("wr1", "v", 3)))),
        ("read deep down", false, nested(get(one("xx1")))),
        ("put deep down", true, nested(TxnOp::Put(put("wr1", "v")))),
        ("compact", false, Command::Compact { revision: 1 }),
        ("raise an alarm", false, raise),
        ("grant a lease", true, grant(9, 60)),
        ("revoke an empty lease", true, revoke_lease(1)),
        ("revoke its lease", true, revoke_lease(2)),
        ("revoke another's lease", false, revoke_lease(3)),
        ("lock", true, enqueue("rw", 1)),
        ("lock what it may only write", false, enqueue("wr", 1)),
        ("lock what it may only read", false, enqueue("rd", 1)),
        ("lock on another's lease", false, enqueue("rw", 3)),
        ("leave", true, Command::Leave { key: key("rw/1"), create_revision: 5 }),
        ("leave elsewhere", false, Command::Leave { key: key("wr/1"), create_revision: 5 }),
        ("unlock", true, Command::Unlock { key: key("wr/1") }),
        ("unlock elsewhere", false, Command::Unlock { key: key("rd/1") }),
        ("release", true, release("rw")),
        ("release elsewhere", false, release("rd")),
        ("write behind a fence elsewhere", false, fenced("xx", FencedWrite::Put(put("wr1", "v")))),
        ("add a user", false, add_user("v")),
        ("enable", false, change(AuthChange::Enable)),
        ("disable", false, change(AuthChange::Disable)),
    ];
    let denied = Some(Rejection::from(AuthRefusal::PermissionDenied));
    for (what, may, command) in cases {
        let refused = refused_to(&mut member, "u", command.clone());
        assert_eq!(refused, denied.clone().filter(|_| !may), "{what}");
        assert_ne!(refused_to(&mut member, "root", command.clone()), denied, "root: {what}");
        let nobody = apply_by(&mut member, None, command.clone()).reply;
        assert_eq!(nobody.unwrap_err(), AuthRefusal::UserEmpty.into(), "nobody: {what}");
        let by = Some(Principal::User { name: "gone".to_owned(), auth_revision: u64::MAX });
        let gone = apply_by(&mut member, by, command).reply;
        assert_eq!(gone.err(), denied.clone(), "gone: {what}");
    }
    // A fence that does not hold is no lack of rights.
    let stale = refused_to(&mut member, "u", fenced("rw", FencedWrite::Put(put("wr1", "v"))));
    assert_eq!(stale, Some(Rejection::StaleFence { token: 5 }));
}

#[test]
fn permissions_that_touch_add_up() {
    let mut member = guarded();
    for (start, end) in [("t1", "t3"), ("t3", "t5"), ("t4", "t7"), ("one", ""), ("z", "\0")] {
        ok_by_root(&mut member, permit("r", start, end, PermissionKind::ReadWrite));
    }
    ok_by_root(&mut member, add_role("s"));
    ok_by_root(&mut member, give("u", "s"));
    ok_by_root(&mut member, permit("s", "t7", "t8", PermissionKind::Write));
    ok_by_root(&mut member, permit("s", "u", "v", PermissionKind::Unknown(7)));
    let auth = member.machine.auth().clone();
    let by = user(&member, "u");
    let access = auth.access(by.as_ref()).unwrap();
    let may = |right, start: &str, end: &str| {
        access.range(right, &KeyRange::from_wire(key(start), key(end))).is_ok()
    };
    assert!(may(Right::Read, "t1", "t7"));
    assert!(!may(Right::Read, "t1", "t71"));
    assert!(may(Right::Write, "t1", "t8"), "of two roles");
    assert!(!may(Right::Write, "t0", "t8"));
    assert!(!may(Right::Write, "t1", "\0"));
    assert!(may(Right::Read, "one", "") && may(Right::Read, "one", "one\0"));
    assert!(!may(Right::Read, "one", "one\0\0") && !may(Right::Read, "onf", ""));
    assert!(may(Right::Read, "z", "\0") && may(Right::Read, "zz", "\0"));
    assert!(!may(Right::Read, "y", "\0"));
    assert!(!may(Right::Read, "u", "") && !may(Right::Write, "u", ""));
}

#[test]
fn a_caller_that_was_known_by_older_tables_is_refused() {
    let mut member = guarded();
    let by = user(&member, "u");
    ok_by_root(&mut member, permit("r", "q", "", PermissionKind::Read));
    let outcome = apply_by(&mut member, by, Command::Put(put("wr1", "v")));
    assert_eq!(outcome.reply.unwrap_err(), AuthRefusal::OldRevision.into());
}

#[test]
fn what_the_cluster_does_itself_needs_no_user() {
    let mut member = guarded();
    ok_by_root(&mut member, grant(1, 1));
    ok_by_root(&mut member, Command::Put(put_on("xx", "v", 1)));
    let leave = Command::Leave { key: key("xx"), create_revision: 2 };
    let server = Some(Principal::Server);
    assert_eq!(apply_by(&mut member, server.clone(), leave).reply, Ok(Reply::Left(true)));
    for command in [Command::Tick, Command::LeaseRenew { ids: vec![LeaseId(1)] }] {
        member.ok(command);
    }
    let renewed_at_index = member.machine.leases().get(LeaseId(1)).unwrap().renewed_at_index;
    let leases = vec![ExpiredLease { id: LeaseId(1), renewed_at_index }];
    let ended = member.apply_at(60_000, Command::LeaseExpire { term: 1, leases });
    assert_eq!(ended.reply, Ok(Reply::LeaseExpired(1)));
    apply_by(&mut member, server, Command::Compact { revision: 2 }).reply.unwrap();
}

#[test]
fn users_and_roles_survive_a_restart_and_an_image() {
    let mut member = guarded();
    ok_by_root(&mut member, permit("r", "z", "\0", PermissionKind::ReadWrite));
    ok_by_root(&mut member, permit("r", "z", "", PermissionKind::Unknown(9)));
    let auth = member.machine.auth().clone();
    member.restart();
    assert_eq!(*member.machine.auth(), auth);
    let image = member.machine.image();
    member.install(image);
    assert_eq!(*member.machine.auth(), auth);
    assert_eq!(refused_to(&mut member, "u", Command::Put(put("zz", "v"))), None);
    // A cluster that is made from a backup has them, too.
    let afresh = Afresh { bump_revision: 10, mark_compacted: true };
    let pairs: Vec<_> = member.machine.image().flatten().collect();
    let mut restored = Member::new();
    let mut batch = Batch::default();
    for pair in pairs {
        if let Some((key, value)) = afresh.carry(pair).unwrap() {
            batch.put(key, value);
        }
    }
    restored.engine.apply(batch).unwrap();
    restored.restart();
    assert_eq!(*restored.machine.auth(), auth);
    ok_by_root(&mut member, change(AuthChange::UserDelete { name: "u".to_owned() }));
    ok_by_root(&mut member, change(AuthChange::RoleDelete { name: "r".to_owned() }));
    let auth = member.machine.auth().clone();
    member.restart();
    assert_eq!(*member.machine.auth(), auth);
    assert_eq!(auth.users().map(|(name, _)| name).collect::<Vec<_>>(), ["root"]);
}

#[test]
fn the_tables_are_bounded() {
    let mut member = guarded();
    let long = "k".repeat(200 * 1024);
    let mut refused = None;
    for n in 0..6 {
        let by = user(&member, "root");
        let permit = permit("r", &format!("{long}{n}"), "", PermissionKind::Read);
        refused = refused.or(apply_by(&mut member, by, permit).reply.err());
    }
    assert_eq!(refused, Some(AuthRefusal::RoleTooLarge.into()));
    let kept = member.machine.auth().role("r").unwrap().permissions().len();
    assert_eq!(kept, 3 + 5, "what was refused left nothing");
}

#[test]
fn a_hash_is_never_printed() {
    let added = format!("{:?}", add_user("alice"));
    assert!(added.contains("alice") && !added.contains("a hash"), "{added}");
}

/// Every key that can lie in a gap between ranges whose bounds have up to two letters.
fn all_keys() -> Vec<Bytes> {
    let letters = ["", "\0", "a", "b"];
    let mut keys: Vec<Bytes> = Vec::new();
    for one in letters {
        for two in letters {
            for three in letters {
                keys.push(key(&[one, two, three].concat()));
            }
        }
    }
    keys.sort();
    keys.dedup();
    keys
}

#[test]
fn a_range_is_covered_when_each_of_its_keys_is() {
    let keys = all_keys();
    let bound = |random: &mut Random| loop {
        let drawn = random.pick(&keys);
        if (1..=2).contains(&drawn.len()) {
            break drawn;
        }
    };
    let range = |random: &mut Random| match random.below(4) {
        0 => KeyRange::One(bound(random)),
        1 => KeyRange::From(bound(random)),
        _ => KeyRange::Span { start: bound(random), end: bound(random) },
    };
    let (mut covered, mut asked) = (0, 0);
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let mut member = guarded();
        let mut granted = Vec::new();
        for _ in 0..1 + random.below(5) {
            let (range, role) = (range(&mut random), "r".to_owned());
            if range.is_empty() {
                continue;
            }
            granted.push(range.clone());
            let permission = Permission { range, kind: PermissionKind::Read };
            let permit = AuthChange::RoleGrantPermission { role, permission };
            ok_by_root(&mut member, change(permit));
        }
        let auth = member.machine.auth().clone();
        let by = user(&member, "u");
        let access = auth.access(by.as_ref()).unwrap();
        for _ in 0..100 {
            let wanted = range(&mut random);
            // One that holds no key counts as its start.
            let counts = match wanted.is_empty() {
                true => KeyRange::One(wanted.start().clone()),
                false => wanted.clone(),
            };
            let mut inside = keys.iter().filter(|key| counts.contains(key));
            let expected = inside.all(|key| granted.iter().any(|range| range.contains(key)));
            let found = access.range(Right::Read, &wanted).is_ok();
            assert_eq!(found, expected, "seed {seed}: {wanted:?} of {granted:?}");
            covered += usize::from(found);
            asked += 1;
        }
    }
    assert!(covered > asked / 20 && covered < asked / 20 * 19, "{covered} of {asked}");
}
