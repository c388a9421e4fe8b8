//! The one who watches everything, from the first revision, on one member after the other.

use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use holdfast::pb::etcdserverpb::watch_client::WatchClient;
use holdfast::pb::etcdserverpb::{WatchCreateRequest, WatchRequest, watch_request};
use holdfast::pb::mvccpb::{Event, event::EventType};
use rand::Rng;
use tonic::transport::Channel;

use crate::client::{Client, now};
use crate::record::Change;

/// A member that tells nothing for so long may be cut off from the others.
const SILENCE: Duration = Duration::from_millis(1500);

/// Until the history reaches the last revision, which is known in the end.
pub async fn witness(mut client: Client) {
    loop {
        client.turn_to_any();
        let (member, record) = (client.member(), client.record.clone());
        let from = record.witnessed.borrow().revision() + 1;
        let many = client.dice.random_range(1..40);
        record.note(&format!("{} watches m{member} from {from}", client.name));
        let mut taken = 0;
        let ended = watch(client.channel(), from, SILENCE, |changes| {
            let mut witnessed = record.witnessed.borrow_mut();
            for change in changes {
                if change.revision < from || change.revision < witnessed.revision() {
                    record.violation(format!("the watch on m{member} went back: {change:?}"));
                }
                witnessed.seen_at.entry(change.revision).or_insert(now());
                witnessed.changes.push(change);
            }
            taken += 1;
            let last = record.last_revision.get();
            taken < many && last.is_none_or(|last| witnessed.revision() < last)
        });
        if let Err(why) = ended.await {
            record.note(&format!("{}: {why}", client.name));
            if why.contains("compacted") {
                record.violation(format!("the watch on m{member} from {from}: {why}"));
                return;
            }
        }
        let last = record.last_revision.get();
        if last.is_some_and(|last| record.witnessed.borrow().revision() >= last) {
            return;
        }
        client.pause(Duration::from_millis(50)).await;
    }
}

/// All that one member tells from revision `from` to `last`.
pub async fn history_of(channel: Channel, from: i64, last: i64) -> Result<Vec<Change>, String> {
    let mut history = Vec::new();
    watch(channel, from, SILENCE, |changes| {
        history.extend(changes);
        history.last().is_none_or(|change: &Change| change.revision < last)
    })
    .await?;
    Ok(history)
}

/// Hands over whole revisions until `take` returns false.
async fn watch(
    channel: Channel,
    from: i64,
    silence: Duration,
    mut take: impl FnMut(Vec<Change>) -> bool,
) -> Result<(), String> {
    let create = WatchCreateRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        start_revision: from,
        ..WatchCreateRequest::default()
    };
    let create =
        WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) };
    let requests = futures::StreamExt::chain(stream::iter([create]), stream::pending());
    let mut client = WatchClient::new(channel);
    let answers = tokio::time::timeout(silence, client.watch(requests)).await;
    let answers = answers.map_err(|_| "silence")?;
    let mut answers = answers.map_err(|status| status.message().to_owned())?.into_inner();
    loop {
        let answer = tokio::time::timeout(silence, answers.message()).await;
        let answer = answer.map_err(|_| "silence")?;
        let answer = answer.map_err(|status| status.message().to_owned())?.ok_or("it ended")?;
        if answer.canceled {
            let compacted = answer.compact_revision;
            return Err(match compacted {
                0 => answer.cancel_reason,
                at => format!("compacted at {at}"),
            });
        }
        let changes: Vec<Change> = answer.events.into_iter().map(change).collect();
        if !changes.is_empty() && !take(changes) {
            return Ok(());
        }
    }
}

fn change(event: Event) -> Change {
    let deleted = event.r#type() == EventType::Delete;
    let kv = event.kv.unwrap_or_default();
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    Change {
        revision: kv.mod_revision,
        key: text(&kv.key),
        value: text(&kv.value),
        deleted,
        create_revision: kv.create_revision,
        version: kv.version,
        lease: kv.lease,
    }
}
