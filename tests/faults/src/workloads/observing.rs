//! Observers of elections: who leads, as it happens, on one member after the other.
//!
//! One observer a name. When its stream ends it goes on at the next member. In the end somebody leads
//! each name for good, and all must see that soon.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_client::Client;
use holdfast_client_tests::addresses::{Addresses, connect};
use holdfast_client_tests::holding::{Change, QUEUES, tenures};
use holdfast_client_tests::moment;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::now;
use crate::record::Line;

/// A stream that has told nothing for so long may hang on a member that is stopped: it is left for
/// one on another member.
const SILENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(10);

/// The last leader is seen this soon: two seconds are promised, one more is for a busy machine.
const LAST_SEEN: Duration = Duration::from_secs(3);

/// What an observer was told: that this leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    pub name: String,
    /// Counts the streams of an observer.
    pub stream: usize,
    pub member: usize,
    pub revision: i64,
    pub key: String,
    pub create_revision: i64,
    pub mod_revision: i64,
    pub value: String,
    #[serde(with = "moment")]
    pub at: Instant,
}

pub struct Observers {
    seen: Arc<Mutex<Vec<Seen>>>,
    tasks: Vec<JoinHandle<()>>,
    names: usize,
}

impl Observers {
    pub fn start(cluster: &Addresses, names: usize) -> Observers {
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let endpoints: Vec<String> = (0..cluster.size()).map(|m| cluster.endpoint(m)).collect();
        let tasks = (0..names).map(|name| {
            let (seen, endpoints) = (seen.clone(), endpoints.clone());
            tokio::spawn(async move { observe(name, &endpoints, &seen).await })
        });
        Observers { tasks: tasks.collect(), seen, names }
    }

    /// Elects a last leader of each name, which all must see soon, and gives what they were told.
    pub async fn finish(self, cluster: &Addresses) -> Vec<Line> {
        let mut lines = Vec::new();
        let mut client = cluster.client(0).await;
        for name in 0..self.names {
            if let Err(what) = self.last_leader(&mut client, &name.to_string()).await {
                lines.push(Line::Failed { what });
            }
        }
        for task in self.tasks {
            task.abort();
        }
        let seen = std::mem::take(&mut *self.seen.lock().expect("noting does not panic"));
        lines.extend(seen.into_iter().map(Line::Observed));
        lines
    }

    async fn last_leader(&self, client: &mut Client, name: &str) -> Result<(), String> {
        let elect = async {
            let lease = client.lease_grant(60, None).await?.id();
            client.campaign(format!("{QUEUES}{name}"), "the last", lease).await?;
            Ok::<i64, etcd_client::Error>(lease)
        };
        let elected = tokio::time::timeout(PATIENCE, elect).await;
        let lease = elected
            .map_err(|_| format!("nobody can be elected for {name} in the end"))?
            .map_err(|e| format!("nobody can be elected for {name} in the end: {e}"))?;
        let since = Instant::now();
        let is_last = |s: &Seen| s.name == name && s.value == "the last";
        while !self.seen.lock().expect("noting does not panic").iter().any(is_last) {
            if since.elapsed() > LAST_SEEN {
                return Err(format!("the observer of {name} does not see the last leader"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // Gone again, so that no hold is left over.
        let revoked = tokio::time::timeout(PATIENCE, client.lease_revoke(lease)).await;
        revoked.map_err(|e| e.to_string())?.map_err(|e| e.to_string()).map(|_| ())
    }
}

async fn observe(name: usize, endpoints: &[String], seen: &Mutex<Vec<Seen>>) {
    for stream in 0.. {
        let member = (name + stream) % endpoints.len();
        let mut client = connect(&endpoints[member]).await;
        let name = name.to_string();
        let opened = client.observe(format!("{QUEUES}{name}"));
        if let Ok(Ok(mut answers)) = tokio::time::timeout(SILENCE, opened).await {
            while let Ok(Ok(Some(mut answer))) =
                tokio::time::timeout(SILENCE, answers.message()).await
            {
                let revision = answer.header().map_or(0, |h| h.revision());
                let Some(kv) = answer.take_kv() else { continue };
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                seen.lock().expect("noting does not panic").push(Seen {
                    name: name.clone(),
                    stream,
                    member,
                    revision,
                    key: text(kv.key()),
                    create_revision: kv.create_revision(),
                    mod_revision: kv.mod_revision(),
                    value: text(kv.value()),
                    at: now(),
                });
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Checks what observers were told against the witness.
pub fn check(seen: &[Seen], changes: &[Change]) -> Vec<String> {
    let tenures = tenures(changes);
    let by_token: HashMap<(&str, i64), _> =
        tenures.iter().map(|t| ((t.key.as_str(), t.token), t)).collect();
    let mut found = Vec::new();
    let mut newest: HashMap<&str, (i64, i64)> = HashMap::new();
    for s in seen {
        let place = (s.create_revision, s.mod_revision);
        let before = newest.entry(&s.name).or_default();
        if place < *before {
            found.push(format!("observed after {before:?}, which is newer: {s:?}"));
        }
        *before = place.max(*before);
        let led = by_token.get(&(s.key.as_str(), s.create_revision)).is_some_and(|tenure| {
            let mut later = tenure.values.iter().map(|(at, _)| *at);
            let next = later.find(|at| *at > s.mod_revision);
            let wrote = tenure.values.contains(&(s.mod_revision, s.value.clone()));
            // It still had this value when it led.
            wrote && next.is_none_or(|next| next > tenure.from.0)
        });
        if !led {
            found.push(format!("observed what never led: {s:?}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(revision: i64, key: &str, create_revision: i64, value: &str) -> Change {
        let (key, value) = (format!("{QUEUES}0/{key}"), value.to_owned());
        Change { revision, key, create_revision, lease: 0, value, seen: moment::at(0) }
    }

    fn seen(key: &str, create_revision: i64, mod_revision: i64, value: &str) -> Seen {
        Seen {
            name: "0".to_owned(),
            stream: 0,
            member: 0,
            revision: mod_revision,
            key: format!("{QUEUES}0/{key}"),
            create_revision,
            mod_revision,
            value: value.to_owned(),
            at: moment::at(0),
        }
    }

    #[test]
    fn observers_see_leaders_only_and_never_go_back() {
        let history = [
            change(2, "a", 2, "A"),
            change(3, "b", 3, "B"),
            change(4, "c", 4, "C"),
            change(5, "c", 0, ""),
            change(6, "a", 0, ""),
        ];
        let (a, b) = (seen("a", 2, 2, "A"), seen("b", 3, 3, "B"));
        assert!(check(&[a.clone(), b.clone()], &history).is_empty());
        assert!(check(&[b, a], &history)[0].contains("newer"));
        let never = check(&[seen("c", 4, 4, "C")], &history);
        assert!(never[0].contains("never led"), "{never:?}");
    }
}
