//! What a watch promises, whatever happens around it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Context;
use std::time::Duration;

use futures::FutureExt;
use futures::future::LocalBoxFuture;
use futures::task::{ArcWake, waker};

use super::testing::{Fixture, all, drain, one, put, ready, show, shown};
use super::{Delivery, QUEUE_BYTES, Refused, WatchSpec, WatchStream};
use crate::types::KeyRange;

/// Creates a watch and returns its id.
fn watch(stream: &mut WatchStream, range: KeyRange, start: i64) -> i64 {
    stream.create(WatchSpec::new(range, start)).unwrap().id
}

fn progress(revision: i64) -> Delivery {
    Delivery::Progress { id: None, revision }
}

#[test]
fn a_watch_from_now_sees_what_comes_and_nothing_before() {
    let mut fixture = Fixture::new();
    fixture.put("a", "1");
    let mut stream = fixture.stream();
    let created = stream.create(WatchSpec::new(one("a"), 0)).unwrap();
    assert_eq!((created.id, created.revision), (0, 2));
    assert_eq!(ready(&mut stream), None);
    fixture.put("a", "2");
    fixture.put("b", "3");
    fixture.delete(one("a"));
    assert_eq!(shown(&drain(&mut stream))[&0], ["3 PUT a=2", "5 DELETE a"]);
}

#[test]
fn the_census_tells_who_watches_and_what_waits() {
    let mut fixture = Fixture::new();
    fixture.put("a", "1");
    let mut stream = fixture.stream();
    let other = fixture.stream();
    watch(&mut stream, one("a"), 0);
    let behind = watch(&mut stream, one("a"), 1);
    let standing = |fixture: &Fixture| {
        let census = fixture.hub.census();
        (census.streams, census.watchers, census.slow_watchers, census.pending_events)
    };
    assert_eq!(standing(&fixture), (2, 2, 1, 0));
    fixture.put("a", "2");
    assert_eq!(standing(&fixture), (2, 2, 1, 1), "the one behind will read it");
    drain(&mut stream);
    assert_eq!(standing(&fixture), (2, 2, 0, 0));
    assert_eq!(fixture.hub.census().events, 3);
    fixture.put("a", "3");
    assert!(stream.cancel(behind));
    assert_eq!(standing(&fixture), (2, 1, 0, 1), "what waited for it is forgotten");
    drop(stream);
    drop(other);
    assert_eq!(standing(&fixture), (0, 0, 0, 0));
}

#[test]
fn a_watch_from_the_past_sees_the_history_and_then_what_comes() {
    let mut fixture = Fixture::new();
    for value in ["1", "2", "3"] {
        fixture.put("a", value);
    }
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 3);
    fixture.put("a", "4");
    assert_eq!(shown(&drain(&mut stream))[&0], ["3 PUT a=2", "4 PUT a=3", "5 PUT a=4"]);
    fixture.put("a", "5");
    assert_eq!(shown(&drain(&mut stream))[&0], ["6 PUT a=5"]);
}

#[test]
fn a_watch_from_the_future_skips_what_comes_before() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 4);
    for value in ["2", "3", "4", "5"] {
        fixture.put("a", value);
    }
    assert_eq!(shown(&drain(&mut stream))[&0], ["4 PUT a=4", "5 PUT a=5"]);
}

#[test]
fn a_revision_the_store_shows_but_that_is_not_published_comes_once() {
    let mut fixture = Fixture::new();
    let outcome = fixture.apply(put("a", "1"));
    let mut stream = fixture.stream();
    let from_it = watch(&mut stream, one("a"), 2);
    let after_it = watch(&mut stream, one("a"), 0);
    let early = drain(&mut stream);
    fixture.hub.publish(outcome.revision, &outcome.events);
    fixture.put("a", "2");
    let all = shown(&[early, drain(&mut stream)].concat());
    assert_eq!(all[&from_it], ["2 PUT a=1", "3 PUT a=2"]);
    assert_eq!(all[&after_it], ["3 PUT a=2"]);
}

#[test]
fn events_of_one_revision_come_together_and_in_their_order() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, all(), 0);
    watch(&mut stream, one("b"), 0);
    fixture.put_all(&[("c", "1"), ("b", "2"), ("a", "3")]);
    fixture.delete(all());
    let by_watch = shown(&drain(&mut stream));
    assert_eq!(
        by_watch[&0],
        ["2 PUT c=1", "2 PUT b=2", "2 PUT a=3", "3 DELETE a", "3 DELETE b", "3 DELETE c"]
    );
    assert_eq!(by_watch[&1], ["2 PUT b=2", "3 DELETE b"]);
}

#[test]
fn filters_leave_out_puts_or_deletes_live_and_from_the_past() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    let filtered = |start_revision, no_put, no_delete| WatchSpec {
        no_put,
        no_delete,
        ..WatchSpec::new(one("a"), start_revision)
    };
    for start in [0, 2] {
        stream.create(filtered(start, true, false)).unwrap();
        stream.create(filtered(start, false, true)).unwrap();
        stream.create(filtered(start, true, true)).unwrap();
        if start == 0 {
            fixture.put("a", "1");
            fixture.delete(one("a"));
        }
    }
    let by_watch = shown(&drain(&mut stream));
    assert_eq!(by_watch.keys().collect::<Vec<_>>(), [&0, &1, &3, &4]);
    for live in [0, 3] {
        assert_eq!(by_watch[&live], ["3 DELETE a"]);
        assert_eq!(by_watch[&(live + 1)], ["2 PUT a=1"]);
    }
}

#[test]
fn the_previous_pair_comes_only_when_asked_for() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    let with_prev = |start| WatchSpec { prev_kv: true, ..WatchSpec::new(one("a"), start) };
    stream.create(with_prev(0)).unwrap();
    watch(&mut stream, one("a"), 0);
    fixture.put("a", "1");
    fixture.put("a", "2");
    fixture.delete(one("a"));
    stream.create(with_prev(1)).unwrap();
    let by_watch = shown(&drain(&mut stream));
    let with = ["2 PUT a=1", "3 PUT a=2 was 1", "4 DELETE a was 2"];
    assert_eq!(by_watch[&0], with);
    assert_eq!(by_watch[&1], ["2 PUT a=1", "3 PUT a=2", "4 DELETE a"]);
    assert_eq!(by_watch[&2], with);
}

#[test]
fn ids_count_from_zero_and_pass_over_those_in_use() {
    let fixture = Fixture::new();
    let mut stream = fixture.stream();
    let mut create = |id| {
        let spec = WatchSpec { id, ..WatchSpec::new(one("a"), 0) };
        stream.create(spec).map(|created| created.id)
    };
    assert_eq!(create(None), Ok(0));
    assert_eq!(create(Some(2)), Ok(2));
    assert_eq!(create(Some(-7)), Ok(-7));
    assert_eq!(create(Some(2)), Err(Refused::DuplicateId));
    assert_eq!(create(None), Ok(1));
    assert_eq!(create(None), Ok(3));
}

#[test]
fn a_refused_duplicate_leaves_the_old_watch_alone() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    stream.create(WatchSpec { id: Some(5), ..WatchSpec::new(one("a"), 0) }).unwrap();
    let again = WatchSpec { id: Some(5), ..WatchSpec::new(one("b"), 0) };
    assert_eq!(stream.create(again), Err(Refused::DuplicateId));
    fixture.put("b", "1");
    fixture.put("a", "2");
    assert_eq!(shown(&drain(&mut stream))[&5], ["3 PUT a=2"]);
}

#[test]
fn what_cannot_be_watched_is_refused() {
    let fixture = Fixture::new();
    let mut stream = fixture.stream();
    let empty = KeyRange::Span { start: "b".into(), end: "b".into() };
    assert_eq!(stream.create(WatchSpec::new(empty, 0)), Err(Refused::EmptyRange));
    assert_eq!(stream.create(WatchSpec::new(one("a"), -1)), Err(Refused::NegativeStart));
}

#[test]
fn nothing_comes_after_a_cancel_and_the_id_may_be_used_again() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    let id = watch(&mut stream, one("a"), 0);
    fixture.put("a", "1");
    assert!(stream.cancel(id));
    assert!(!stream.cancel(id));
    fixture.put("a", "2");
    assert_eq!(ready(&mut stream), None);
    stream.create(WatchSpec { id: Some(id), ..WatchSpec::new(one("a"), 3) }).unwrap();
    assert_eq!(shown(&drain(&mut stream))[&id], ["3 PUT a=2"]);
}

#[test]
fn a_dropped_stream_leaves_nothing_behind() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 0);
    watch(&mut stream, all(), 0);
    watch(&mut stream, one("a"), 1);
    fixture.put("a", "1");
    let mailbox = Arc::downgrade(stream.mailbox());
    drop(stream);
    assert_eq!(mailbox.strong_count(), 0);
    fixture.put("a", "2");
    assert_eq!(fixture.hub.live_watchers(), 0);
}

#[test]
fn a_start_before_the_compacted_revision_ends_the_watch() {
    let mut fixture = Fixture::new();
    for value in ["1", "2", "3"] {
        fixture.put("a", value);
    }
    fixture.compact(4);
    let mut stream = fixture.stream();
    let early = watch(&mut stream, one("a"), 3);
    let exact = watch(&mut stream, one("a"), 4);
    let deliveries = drain(&mut stream);
    assert!(deliveries.contains(&Delivery::Compacted { id: early, compacted: 4 }));
    assert_eq!(shown(&deliveries)[&exact], ["4 PUT a=3"]);
    assert!(!stream.cancel(early));
}

#[test]
fn a_watch_from_the_compacted_revision_sees_the_delete_made_there() {
    let mut fixture = Fixture::new();
    fixture.put("a", "1");
    let deleted = fixture.delete(one("a"));
    fixture.put("b", "1");
    fixture.compact(deleted);
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), deleted);
    assert_eq!(shown(&drain(&mut stream))[&0], ["3 DELETE a"]);
}

#[test]
fn compaction_ends_a_watch_in_the_middle_of_its_history() {
    let mut fixture = Fixture::new();
    for n in 0..3000 {
        fixture.put("a", &n.to_string());
    }
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 2);
    let Some(Delivery::Events { events, .. }) = ready(&mut stream) else { panic!("no chunk") };
    assert!(events.len() < 3000);
    fixture.compact(3001);
    assert_eq!(drain(&mut stream), [Delivery::Compacted { id: 0, compacted: 3001 }]);
}

#[test]
fn compaction_does_not_touch_a_watch_that_is_up_to_date() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 0);
    for _ in 0..10 {
        fixture.put("b", "1");
    }
    fixture.compact(11);
    fixture.hub.reset();
    fixture.put("a", "1");
    assert_eq!(shown(&drain(&mut stream))[&0], ["12 PUT a=1"]);
}

#[test]
fn a_client_that_does_not_read_costs_no_memory_and_misses_nothing() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    let slow = watch(&mut stream, one("a"), 0);
    let other = watch(&mut stream, one("b"), 0);
    fixture.put("b", "1");
    let value = "x".repeat(QUEUE_BYTES / 50);
    for _ in 0..200 {
        fixture.put("a", &value);
        assert!(stream.mailbox().queued_bytes() <= QUEUE_BYTES);
    }
    assert!(stream.mailbox().queued_bytes() < 1000, "only the other watch's event is queued");
    assert_eq!(fixture.hub.live_watchers(), 1, "the slow watch is behind");
    fixture.put("b", "2");
    let by_watch = shown(&drain(&mut stream));
    assert_eq!(by_watch[&slow].len(), 200);
    assert_eq!(by_watch[&other], ["2 PUT b=1", "203 PUT b=2"]);

    assert_eq!(fixture.hub.live_watchers(), 2, "it has joined again");
    fixture.put("a", "end");
    assert_eq!(shown(&drain(&mut stream))[&slow], ["204 PUT a=end"]);
}

#[test]
fn a_revision_larger_than_the_queue_comes_whole() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, all(), 0);
    fixture.put("0", "before");
    let value = "x".repeat(QUEUE_BYTES / 3);
    let keys: Vec<String> = (1..8).map(|n| n.to_string()).collect();
    let pairs: Vec<(&str, &str)> = keys.iter().map(|key| (&**key, &*value)).collect();
    fixture.put_all(&pairs);
    let sizes: Vec<usize> = drain(&mut stream)
        .into_iter()
        .map(|delivery| match delivery {
            Delivery::Events { events, .. } => events.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(sizes == [8] || sizes == [1, 7], "{sizes:?}");
}

#[test]
fn watches_with_a_long_history_take_turns() {
    let mut fixture = Fixture::new();
    for n in 0..5000 {
        fixture.put("a", &n.to_string());
    }
    let mut stream = fixture.stream();
    for _ in 0..3 {
        watch(&mut stream, one("a"), 2);
    }
    let ids: Vec<i64> = drain(&mut stream)
        .iter()
        .map(|delivery| match delivery {
            Delivery::Events { id, .. } => *id,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(ids.len() > 9);
    assert_eq!(ids[..9], [0, 1, 2, 0, 1, 2, 0, 1, 2]);
}

#[test]
fn after_a_snapshot_each_watch_goes_on_from_where_it_was() {
    let mut fixture = Fixture::new();
    let mut other = Fixture::new();
    for n in 2..=4 {
        fixture.put("a", &n.to_string());
        other.put("a", &n.to_string());
    }
    let mut stream = fixture.stream();
    let read = watch(&mut stream, one("a"), 2);
    assert_eq!(shown(&drain(&mut stream))[&read].len(), 3);
    let queued = watch(&mut stream, all(), 0);
    let idle = watch(&mut stream, one("b"), 0);
    let future = watch(&mut stream, one("a"), 8);
    fixture.put("a", "5");
    other.put("a", "5");
    for n in 6..=9 {
        other.put("a", &n.to_string());
    }
    other.compact(6);
    fixture.install(other);
    fixture.put("a", "10");
    fixture.put("b", "11");
    let by_watch = shown(&drain(&mut stream));
    let puts = |from: i64| (from..=10).map(|n| format!("{n} PUT a={n}")).collect::<Vec<String>>();
    assert_eq!(by_watch[&read], puts(5));
    assert_eq!(by_watch[&queued], [puts(5), vec!["11 PUT b=11".to_owned()]].concat());
    assert_eq!(by_watch[&idle], ["11 PUT b=11"]);
    assert_eq!(by_watch[&future], puts(8));
}

#[test]
fn a_snapshot_that_has_forgotten_what_a_watch_needs_ends_it() {
    let mut fixture = Fixture::new();
    let mut other = Fixture::new();
    fixture.put("a", "2");
    for n in 2..=9 {
        other.put("a", &n.to_string());
    }
    other.compact(7);
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 0);
    fixture.install(other);
    assert_eq!(drain(&mut stream), [Delivery::Compacted { id: 0, compacted: 7 }]);
}

#[test]
fn progress_comes_once_for_each_request_and_after_the_events() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 0);
    fixture.put("a", "1");
    stream.request_progress();
    stream.request_progress();
    let deliveries = drain(&mut stream);
    assert_eq!(shown(&deliveries[..1])[&0], ["2 PUT a=1"]);
    assert_eq!(deliveries[1..], [progress(2), progress(2)]);
}

#[test]
fn progress_waits_for_the_watch_that_is_furthest_behind() {
    let mut fixture = Fixture::new();
    for n in 0..3000 {
        fixture.put("a", &n.to_string());
    }
    let mut stream = fixture.stream();
    watch(&mut stream, one("b"), 0);
    watch(&mut stream, one("a"), 2);
    stream.request_progress();
    let deliveries = drain(&mut stream);
    assert_eq!(deliveries.last(), Some(&progress(3001)));
    assert_eq!(shown(&deliveries)[&1].len(), 3000);
}

#[test]
fn progress_comes_under_load_that_never_pauses() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 0);
    fixture.put("a", "1");
    stream.request_progress();
    for n in 2.. {
        fixture.put("a", &n.to_string());
        if matches!(ready(&mut stream), Some(Delivery::Progress { .. })) {
            break;
        }
        assert!(n < 10, "no progress");
    }
}

#[test]
fn a_stream_without_watches_has_no_progress() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    stream.request_progress();
    let id = watch(&mut stream, one("a"), 0);
    assert_eq!(ready(&mut stream), None);
    fixture.put("a", "1");
    stream.request_progress();
    stream.cancel(id);
    assert_eq!(ready(&mut stream), None);
    watch(&mut stream, one("a"), 0);
    assert_eq!(ready(&mut stream), None, "the request went with the watches");
}

#[test]
fn progress_is_not_told_before_a_watch_of_the_stream_begins() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 0);
    watch(&mut stream, one("b"), 3);
    fixture.put("a", "1");
    stream.request_progress();
    stream.request_progress();
    assert_eq!(shown(&drain(&mut stream))[&0], ["2 PUT a=1"]);
    fixture.put("a", "2");
    let deliveries = drain(&mut stream);
    assert_eq!(deliveries.len(), 1, "the requests were dropped: {deliveries:?}");
    stream.request_progress();
    assert_eq!(drain(&mut stream), [progress(3)]);
}

#[tokio::test]
async fn a_watch_that_has_not_begun_tells_no_progress_of_its_own() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.hub.stream(Duration::from_millis(20));
    let notified = |start| WatchSpec { progress_notify: true, ..WatchSpec::new(one("a"), start) };
    stream.create(notified(3)).unwrap();
    let begun = stream.create(notified(0)).unwrap().id;
    let tell = |id, revision| Delivery::Progress { id: Some(id), revision };
    assert_eq!(stream.next().await, tell(begun, 1));
    assert_eq!(stream.next().await, tell(begun, 1));
    fixture.put("b", "1");
    fixture.put("b", "2");
    stream.cancel(begun);
    assert_eq!(stream.next().await, tell(0, 3));
}

#[test]
fn progress_waits_until_the_revision_it_shows_is_published() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 0);
    for (key, revision) in [("a", 2), ("b", 3)] {
        let outcome = fixture.apply(put(key, "1"));
        stream.request_progress();
        let count = Arc::new(Wakes::default());
        let sleeping = sleep(&mut stream, &count);
        fixture.hub.publish(outcome.revision, &outcome.events);
        assert_eq!(count.taken(), 1, "also when the events are for others");
        drop(sleeping);
        let deliveries = drain(&mut stream);
        assert_eq!(deliveries.last(), Some(&progress(revision)));
    }
}

#[tokio::test]
async fn idle_watches_tell_their_progress_at_each_interval() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.hub.stream(Duration::from_millis(50));
    let notified = |key| WatchSpec { progress_notify: true, ..WatchSpec::new(one(key), 0) };
    watch(&mut stream, one("silent"), 0);
    let idle = stream.create(notified("idle")).unwrap().id;
    let busy = stream.create(notified("busy")).unwrap().id;
    fixture.put("busy", "1");
    assert!(matches!(stream.next().await, Delivery::Events { id, .. } if id == busy));
    let tell = |id| Delivery::Progress { id: Some(id), revision: 2 };
    assert_eq!(stream.next().await, tell(idle));
    assert_eq!(stream.next().await, tell(idle));
    assert_eq!(stream.next().await, tell(busy), "idle for a whole interval now");
    stream.cancel(idle);
    stream.cancel(busy);
    tokio::time::timeout(Duration::from_millis(150), stream.next()).await.unwrap_err();
}

#[test]
fn one_wake_up_serves_many_events_and_reaches_nobody_else() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    let mut other = fixture.stream();
    watch(&mut stream, one("a"), 0);
    watch(&mut stream, all(), 0);
    watch(&mut other, one("b"), 0);
    let (count, other_count) = (Arc::new(Wakes::default()), Arc::new(Wakes::default()));
    let sleepers = (sleep(&mut stream, &count), sleep(&mut other, &other_count));
    for _ in 0..100 {
        fixture.put("a", "1");
    }
    drop(sleepers);
    assert_eq!(count.taken(), 1);
    assert_eq!(other_count.taken(), 0);
    assert_eq!(drain(&mut stream).len(), 2, "one delivery for each watch");
}

#[test]
fn dropping_a_waiting_call_loses_nothing() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 0);
    for n in 2..50 {
        assert!(stream.next().now_or_never().is_none());
        fixture.put("a", "1");
        drop(stream.next());
        assert_eq!(shown(&drain(&mut stream))[&0], [format!("{n} PUT a=1")]);
    }
}

#[test]
#[should_panic(expected = "revision 2 is published after 2")]
fn publishing_a_revision_twice_is_a_fault() {
    let mut fixture = Fixture::new();
    let outcome = fixture.apply(put("a", "1"));
    fixture.hub.publish(2, &outcome.events);
    fixture.hub.publish(2, &outcome.events);
}

#[test]
fn thousands_of_watchers_each_see_their_own_key() {
    let mut fixture = Fixture::new();
    let mut streams: Vec<WatchStream> = (0..50).map(|_| fixture.stream()).collect();
    for (n, stream) in streams.iter_mut().enumerate() {
        for m in 0..40 {
            watch(stream, one(&format!("key{n:02}{m:02}")), 0);
        }
        watch(stream, KeyRange::prefix(format!("key{n:02}").as_bytes()), 0);
    }
    let revision = fixture.put("key0705", "x");
    for (n, stream) in streams.iter_mut().enumerate() {
        let deliveries = drain(stream);
        if n == 7 {
            let by_watch = shown(&deliveries);
            assert_eq!(by_watch.keys().collect::<Vec<_>>(), [&5, &40]);
            assert_eq!(by_watch[&40], [format!("{revision} PUT key0705=x")]);
        } else {
            assert_eq!(deliveries, []);
        }
    }
    assert_eq!(show(&fixture.history[0]), "2 PUT key0705=x");
}

/// Counts how often it was woken.
#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wakes {
    fn taken(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl ArcWake for Wakes {
    fn wake_by_ref(arc_self: &Arc<Wakes>) {
        arc_self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A task that waits for the stream. What is queued must have been taken before.
fn sleep<'a>(stream: &'a mut WatchStream, count: &Arc<Wakes>) -> LocalBoxFuture<'a, Delivery> {
    let mut next = stream.next().boxed_local();
    let waker = waker(count.clone());
    assert!(next.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    next
}

/// Longer than a test may run.
const LONG: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn a_stream_that_gathers_hands_out_all_of_it_later_and_at_once() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    watch(&mut stream, one("a"), 0);
    fixture.put("a", "1");
    assert_eq!(shown(&drain(&mut stream))[&0], ["2 PUT a=1"], "an idle stream does not wait");
    stream.gather_for(LONG);
    fixture.put("a", "2");
    fixture.put("a", "3");
    assert_eq!(ready(&mut stream), None);
    fixture.put("a", "4");
    stream.gather_for(Duration::from_millis(1));
    assert_eq!(
        shown(&[stream.next().await])[&0],
        ["3 PUT a=2", "4 PUT a=3", "5 PUT a=4"],
        "in one delivery"
    );
    assert_eq!(ready(&mut stream), None);
}

#[tokio::test]
async fn a_stream_that_gathers_still_takes_cancels_and_tells_progress() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.stream();
    let (first, second) = (watch(&mut stream, one("a"), 0), watch(&mut stream, one("a"), 0));
    stream.gather_for(LONG);
    stream.request_progress();
    assert_eq!(stream.next().await, progress(1), "there is nothing to wait for");
    fixture.put("a", "1");
    assert_eq!(ready(&mut stream), None);
    assert!(stream.cancel(first));
    stream.request_progress();
    assert_eq!(ready(&mut stream), None);
    stream.gather_for(Duration::from_millis(1));
    assert_eq!(shown(&[stream.next().await])[&second], ["2 PUT a=1"]);
    assert_eq!(stream.next().await, progress(2));
}

#[tokio::test]
async fn streams_gather_only_where_many_watch_and_lose_nothing() {
    let mut fixture = Fixture::new();
    let mut streams: Vec<WatchStream> = (0..100).map(|_| fixture.stream()).collect();
    watch(&mut streams[0], one("a"), 0);
    fixture.put("a", "1");
    assert_eq!(fixture.hub.pause(), Duration::ZERO);
    assert_eq!(shown(&drain(&mut streams[0]))[&0], ["2 PUT a=1"]);
    for stream in &mut streams[1..] {
        watch(stream, one("a"), 0);
    }
    let mut expected = Vec::new();
    for revision in 3..53 {
        fixture.put("a", "x");
        expected.push(format!("{revision} PUT a=x"));
    }
    assert_eq!(fixture.hub.pause(), Duration::from_millis(3));
    for stream in &mut streams {
        let mut seen = Vec::new();
        while seen.len() < expected.len() {
            seen.extend(shown(&[stream.next().await])[&0].clone());
        }
        assert_eq!(seen, expected);
    }
    for _ in 0..100 {
        fixture.put("b", "nobody watches it");
    }
    assert_eq!(fixture.hub.pause(), Duration::ZERO, "the fan-out has waned");
}
