//! Labels of queue keys, and locks that change hands otherwise than by their holders' will.

use super::*;

fn join(name: &str, lease: i64, owner: &str) -> Join {
    Join {
        enqueue: Enqueue {
            name: key(name),
            lease: LeaseId(lease),
            value: Bytes::new(),
            rewrite: false,
        },
        owner: owner.to_owned(),
        client: "c:1".to_owned(),
        session: false,
        only_if_free: false,
    }
}

fn owners(member: &Member, name: &str) -> String {
    let (queue, _) = member.machine.queue(name.as_bytes(), 10);
    let owners = queue.iter().map(|place| match &place.label {
        Some(label) => format!(
            "{}:{}-{}",
            label.owner,
            label.joined_at.0,
            label.granted_at.map_or("".to_owned(), |at| at.0.to_string())
        ),
        None => "?".to_owned(),
    });
    owners.collect::<Vec<_>>().join(" ")
}

fn release(name: &str, token: i64) -> Command {
    Command::Release(Release { name: key(name), token, forced: None })
}

fn force(name: &str, token: i64) -> Command {
    let force = Force { by: "op".into(), reason: "stuck".into() };
    Command::Release(Release { name: key(name), token, forced: Some(force) })
}

#[test]
fn a_label_tells_since_when_a_place_waits_and_holds_and_goes_with_its_key() {
    let mut member = Member::new();
    for id in 1..=4 {
        member.ok(grant(id, 60));
    }
    member.apply_at(100, Command::Join(join("n", 1, "alice"))).reply.unwrap();
    member.apply_at(200, Command::Join(join("n", 2, "bob"))).reply.unwrap();
    // One that came another way has none.
    member.ok(Command::Put(put_on("n/3", "", 3)));
    assert_eq!(owners(&member, "n"), "alice:100-100 bob:200- ?");
    // Again, through another member perhaps: the same place and times.
    let again = member.apply_at(300, Command::Join(join("n", 2, "bobby")));
    assert_eq!(again.revision, 4);
    assert_eq!(again.effects, [Effect::LabelChanged { key: key("n/2") }]);
    member.restart();
    assert_eq!(owners(&member, "n"), "alice:100-100 bobby:200- ?");
    member.apply_at(400, release("n", 2)).reply.unwrap();
    assert_eq!(owners(&member, "n"), "bobby:200-400 ?");
    member.ok(Command::LeaseRevoke { id: LeaseId(2) });
    assert_eq!(owners(&member, "n"), "?");
    assert!(member.machine.label(b"n/2").is_none());
    member.restart();
    assert_eq!(owners(&member, "n"), "?");
}

#[test]
fn who_only_tries_leaves_a_held_lock_alone() {
    let mut member = Member::new();
    member.ok(grant(1, 60));
    member.ok(grant(2, 60));
    let try_it = |lease| Command::Join(Join { only_if_free: true, ..join("n", lease, "") });
    assert!(matches!(member.ok(try_it(1)), Reply::Enqueued(Enqueued { first: true, .. })));
    assert!(matches!(member.ok(try_it(1)), Reply::Enqueued(Enqueued { created: false, .. })));
    let tried = member.apply(try_it(2));
    assert_eq!((tried.reply, tried.revision, tried.effects), (Ok(Reply::Busy), 2, vec![]));
    assert_eq!(member.rejected(try_it(3)), Rejection::LeaseNotFound(LeaseId(3)));
}

#[test]
fn a_release_ends_the_lease_that_was_made_for_the_place_and_no_other() {
    let mut member = Member::new();
    member.ok(grant(1, 60));
    member.ok(grant(2, 60));
    member.ok(Command::Join(Join { session: true, ..join("n", 1, "") }));
    member.ok(Command::Join(join("n", 2, "")));
    assert_eq!(member.ok(release("n", 7)), Reply::Left(false));
    assert_eq!(member.ok(release("m", 2)), Reply::Left(false));
    assert_eq!(member.ok(release("n", 2)), Reply::Left(true));
    assert_eq!(member.ok(release("n", 2)), Reply::Left(false));
    assert!(!member.machine.leases().contains(LeaseId(1)));
    assert_eq!(member.ok(release("n", 3)), Reply::Left(true));
    assert!(member.machine.leases().contains(LeaseId(2)));
    // An application's key is released by nobody but by force.
    member.ok(Command::Put(put("n/5", "data")));
    assert_eq!(member.ok(release("n", 6)), Reply::Left(false));
    assert_eq!(member.ok(force("n", 6)), Reply::Left(true));
    assert_eq!(member.pairs(), "");
}

#[test]
fn only_so_many_releases_by_force_are_remembered() {
    let mut member = Member::new();
    member.ok(grant(1, 60));
    for turn in 0..1_003 {
        let name = format!("n{turn}");
        let Reply::Enqueued(queued) = member.ok(Command::Join(join(&name, 1, "alice"))) else {
            panic!("it is free")
        };
        assert_eq!(member.ok(force(&name, queued.create_revision)), Reply::Left(true));
    }
    assert_eq!(member.ok(force("n1", 2)), Reply::Left(false));
    for _ in 0..2 {
        let forced: Vec<_> = member.machine.forced_releases().collect();
        assert_eq!((forced.len(), &forced[0].name[..]), (1_000, &b"n1002"[..]));
        assert_eq!((forced[999].name.as_ref(), forced[999].owner.as_str()), (&b"n3"[..], "alice"));
        member.restart();
    }
}

#[test]
fn a_wish_reaches_the_holder_and_goes_with_it() {
    let mut member = Member::new();
    member.ok(grant(1, 60));
    member.ok(grant(2, 60));
    let ask = |token| {
        let (by, reason) = ("op".to_owned(), "please".to_owned());
        Command::AskRelease(AskRelease { name: key("n"), token, by, reason })
    };
    assert_eq!(member.ok(ask(0)), Reply::Asked(None));
    member.ok(Command::Join(join("n", 1, "")));
    member.ok(Command::Join(join("n", 2, "")));
    assert_eq!(member.ok(ask(3)), Reply::Asked(None), "it waits");
    let told = |member: &Member| {
        member.machine.label(b"n/1").and_then(|label| label.asked.clone()).map(|asked| asked.told)
    };
    assert_eq!(told(&member), None);
    for token in [0, 2] {
        let asked = member.apply(ask(token));
        assert_eq!(asked.reply, Ok(Reply::Asked(Some((key("n/1"), 2)))));
        assert_eq!(asked.effects, [Effect::LabelChanged { key: key("n/1") }]);
        assert_eq!(told(&member), Some(false));
        member.ok(Command::Told { key: key("n/1"), create_revision: 3 });
        assert_eq!(told(&member), Some(false), "another key's");
        member.ok(Command::Told { key: key("n/1"), create_revision: 2 });
        assert_eq!(told(&member), Some(true));
    }
    member.ok(release("n", 2));
    assert!(member.machine.label(b"n/2").is_some_and(|label| label.asked.is_none()));
}

#[test]
fn names_of_locks_come_in_pages() {
    let mut member = Member::new();
    member.ok(grant(1, 60));
    for name in ["a", "b/1", "b/2", "b/3", "c"] {
        member.ok(Command::Join(join(name, 1, "")));
    }
    // These look like queues and are not.
    member.ok(Command::Put(put("b/2x/abc", "")));
    let page = |prefix: &str, after: Option<&str>, limit, look_at| {
        let after = after.map(str::as_bytes);
        let (names, next) = member.machine.queue_names(prefix.as_bytes(), after, limit, look_at);
        let names: Vec<_> = names.iter().map(|name| name.escape_ascii().to_string()).collect();
        (names.join(" "), next.map(|next| next.escape_ascii().to_string()))
    };
    assert_eq!(page("", None, 10, 10), ("a b/1 b/2 b/3 c".into(), None));
    assert_eq!(page("b/", None, 2, 10), ("b/1 b/2".into(), Some("b/2".into())));
    assert_eq!(page("b/", Some("b/2"), 2, 10), ("b/3".into(), None));
    assert_eq!(page("b/", Some("a"), 1, 10), ("b/1".into(), Some("b/1".into())));
    assert_eq!(page("b/", Some("b/2"), 9, 1), ("".into(), Some("b/2x".into())));
    assert_eq!(page("d", None, 9, 9), ("".into(), None));
}
