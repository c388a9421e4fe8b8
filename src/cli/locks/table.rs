//! Locks as text: tables for people, JSON for programs.

use std::time::Duration;

use serde_json::{Value, json};

use crate::cli::session::printable;
use crate::pb::holdfastpb::{Forced, Lock, Place};

/// What is not known, or not there.
const NOTHING: &str = "-";

/// A line for each lock, with its holder.
pub fn of_locks(locks: &[Lock]) -> String {
    let header = ["NAME", "HOLDER", "ADDRESS", "LEASE", "LEFT", "HELD", "TOKEN", "WAITERS"];
    let rows = locks.iter().map(|lock| row(lock, lock.holder.as_ref(), lock.waiting.to_string()));
    aligned(&header, rows.collect())
}

/// A line for each place in the queue of one lock, and below what was asked and done about it.
pub fn of_places(lock: &Lock) -> String {
    let header = ["NAME", "HOLDER", "ADDRESS", "LEASE", "LEFT", "HELD", "TOKEN", "POSITION"];
    let holder = lock.holder.as_ref();
    let mut rows = vec![row(lock, holder, holder.map_or(NOTHING, |_| "holder").to_owned())];
    for place in &lock.waiters {
        let waits = match place.inferred {
            true => place.position.to_string(),
            false => format!("{} (waits {})", place.position, time(place.waited_ms)),
        };
        rows.push(row(lock, Some(place), waits));
    }
    let mut table = aligned(&header, rows);
    if let Some(asked) = holder.and_then(|holder| holder.asked.as_ref()) {
        let told = if asked.told { "told" } else { "not told yet" };
        let (by, reason) = (shown(&asked.by), shown(&asked.reason));
        table += &format!("asked for by {by} {} ago, {told}: {reason}\n", time(asked.age_ms));
    }
    for forced in &lock.forced {
        let (by, owner, reason) = (shown(&forced.by), shown(&forced.owner), shown(&forced.reason));
        let (token, ago) = (forced.token, time(forced.age_ms));
        table += &format!("token {token} was taken from {owner} by {by} {ago} ago: {reason}\n");
    }
    table
}

/// The name of the lock, what is known of one place, and `last`.
fn row(lock: &Lock, place: Option<&Place>, last: String) -> Vec<String> {
    let mut row = vec![lock.name.escape_ascii().to_string()];
    match place {
        None => row.extend([NOTHING; 6].map(str::to_owned)),
        Some(place) => {
            let owner = if place.inferred { "(inferred)" } else { &place.owner };
            let known = |time: String| if place.inferred { NOTHING.to_owned() } else { time };
            let holds = place.position == 0;
            row.extend([
                shown(owner),
                shown(&place.client),
                format!("{:x}", place.lease),
                if place.ttl_seconds > 0 { time(place.left_ms) } else { NOTHING.to_owned() },
                if holds { known(time(place.held_ms)) } else { NOTHING.to_owned() },
                place.token.to_string(),
            ]);
        }
    }
    row.push(last);
    row
}

/// One lock, fit for one line.
pub fn json(lock: &Lock) -> Value {
    json!({
        "name": String::from_utf8_lossy(&lock.name),
        "holder": lock.holder.as_ref().map(place_json),
        "waiters": lock.waiters.iter().map(place_json).collect::<Vec<_>>(),
        "waiting": lock.waiting,
        "forced": lock.forced.iter().map(forced_json).collect::<Vec<_>>(),
    })
}

fn place_json(place: &Place) -> Value {
    let asked = place.asked.as_ref().map(|asked| {
        json!({
            "by": asked.by, "reason": asked.reason, "age_ms": asked.age_ms, "told": asked.told,
        })
    });
    json!({
        "position": place.position,
        "owner": place.owner,
        "client": place.client,
        "key": String::from_utf8_lossy(&place.key),
        "token": place.token,
        "lease": format!("{:x}", place.lease),
        "live": place.live,
        "inferred": place.inferred,
        "ttl_seconds": place.ttl_seconds,
        "left_ms": place.left_ms,
        "waited_ms": place.waited_ms,
        "held_ms": place.held_ms,
        "held_since_unix_ms": place.held_since_unix_ms,
        "asked": asked,
    })
}

fn forced_json(forced: &Forced) -> Value {
    json!({
        "token": forced.token,
        "owner": forced.owner,
        "client": forced.client,
        "by": forced.by,
        "reason": forced.reason,
        "age_ms": forced.age_ms,
    })
}

fn shown(told: &str) -> String {
    if told.is_empty() { NOTHING.to_owned() } else { printable(told) }
}

/// Milliseconds, in the unit that fits.
fn time(ms: i64) -> String {
    let time = Duration::from_millis(u64::try_from(ms).unwrap_or(0));
    match time.as_secs() {
        0..60 => format!("{}.{}s", time.as_secs(), time.subsec_millis() / 100),
        seconds @ 60..3_600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        seconds => format!("{}h{:02}m", seconds / 3_600, seconds / 60 % 60),
    }
}

fn aligned(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let header: Vec<String> = header.iter().map(|&title| title.to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..rows[0].len()).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}  "));
        format!("{}\n", cells.collect::<String>().trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> Lock {
        let holder = Place {
            key: "jobs/1f".into(),
            token: 42,
            lease: 0x1f,
            live: true,
            owner: "me".into(),
            client: "10.0.0.1:5".into(),
            ttl_seconds: 10,
            left_ms: 8_290,
            held_ms: 83_000,
            ..Place::default()
        };
        let waiter = Place { position: 1, token: 50, waited_ms: 1_500, ..holder.clone() };
        let waiters = vec![Place { held_ms: 0, owner: "a\x1bb".into(), ..waiter }];
        Lock { name: "jobs".into(), holder: Some(holder), waiters, waiting: 1, forced: Vec::new() }
    }

    #[test]
    fn a_lock_is_one_line_under_aligned_titles() {
        let free = Lock { name: "x".into(), ..Lock::default() };
        assert_eq!(
            of_locks(&[held(), free]),
            "NAME  HOLDER  ADDRESS     LEASE  LEFT  HELD   TOKEN  WAITERS\n\
             jobs  me      10.0.0.1:5  1f     8.2s  1m23s  42     1\n\
             x     -       -           -      -     -      -      0\n"
        );
    }

    #[test]
    fn the_places_of_a_lock_follow_its_holder() {
        assert_eq!(
            of_places(&held()),
            "NAME  HOLDER  ADDRESS     LEASE  LEFT  HELD   TOKEN  POSITION\n\
             jobs  me      10.0.0.1:5  1f     8.2s  1m23s  42     holder\n\
             jobs  a?b     10.0.0.1:5  1f     8.2s  -      50     1 (waits 1.5s)\n"
        );
    }

    #[test]
    fn what_is_inferred_is_marked_and_has_no_times() {
        let holder = Place { token: 7, lease: 0x1f, inferred: true, ..Place::default() };
        let lock = Lock { name: "a".into(), holder: Some(holder), ..Lock::default() };
        let table = of_locks(&[lock]);
        let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["a", "(inferred)", "-", "1f", "-", "-", "7", "0"]);
    }

    #[test]
    fn json_tells_an_absent_holder_as_null() {
        let lock = json(&Lock { name: "a".into(), ..Lock::default() });
        assert_eq!(lock["holder"], Value::Null);
        assert_eq!(json(&held())["waiters"][0]["token"], 50);
        assert!(!json(&held()).to_string().contains('\n'));
    }

    #[test]
    fn times_are_told_in_the_unit_that_fits() {
        assert_eq!([900, 61_000, 7_500_000].map(time), ["0.9s", "1m01s", "2h05m"]);
    }
}
