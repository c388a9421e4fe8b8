//! The revision check: what clients were told, against the whole history of the store.
//!
//! While faults happen, each client notes every operation with the times around it and what came
//! back. Afterwards a watch from revision 1 gives the history, and the two must fit:
//!
//! 1. An acknowledged write is in the history at exactly the revision it was acknowledged with.
//! 2. A written value, unique by construction, is in the history at most once: nothing was applied
//!    twice. A write that was refused is not there at all. Nothing is there that no client wrote.
//! 3. A compare that succeeded held just before its revision; one that failed did not hold at its.
//! 4. A read answers what the history says for the revision in its header.
//! 5. Whatever begins after an answer arrived does not answer with an earlier revision, and a write
//!    answers with a later one.
//! 6. Along each key, versions and revisions go up without a gap.
//!
//! This takes time proportional to n log n and decides exactly, because the revision in every answer
//! says where in the one order of all writes an operation claims to stand.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use etcd_client::{Client, EventType, WatchOptions};
use serde::{Deserialize, Serialize};

use crate::check::within;

/// One put of the history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    pub key: String,
    pub value: String,
    pub revision: i64,
    pub create_revision: i64,
    pub version: i64,
}

/// What a client asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Asked {
    /// A put of a value that no other operation writes.
    Put { key: String, value: String },
    /// A put of such a value if the key's mod revision is still `if_at`.
    Swap { key: String, value: String, if_at: i64 },
    /// A linearizable read of a key.
    Read { key: String },
}

/// What came back.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answered {
    /// The write is done, at this revision.
    Done { revision: i64 },
    /// The compare did not hold at this revision.
    Refused { revision: i64 },
    /// The key had this mod revision and value (0 and empty: absent) at this revision.
    Found { revision: i64, mod_revision: i64, value: String },
    /// An error or no answer in time: a write may have happened or not.
    Unknown,
}

/// One call of one client.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Operation {
    pub asked: Asked,
    pub answered: Answered,
    #[serde(with = "crate::moment")]
    pub began: Instant,
    #[serde(with = "crate::moment")]
    pub ended: Instant,
}

/// What a successful check found, for the test to judge whether the run was a run at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    pub writes_done: usize,
    pub writes_unknown: usize,
    pub unknown_but_applied: usize,
    pub swaps_refused: usize,
    pub reads: usize,
}

/// All puts under `prefix` from revision 1 up to `last`, as a watch on this client's member tells it.
///
/// # Panics
///
/// If the watch does not get as far as `last`, or reports a delete.
pub async fn witness(client: &mut Client, prefix: &str, last: i64) -> Vec<Written> {
    let options = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut stream = client.watch(prefix, Some(options)).await.expect("a watch can be made");
    let mut history = Vec::new();
    within(Duration::from_secs(60), "the watch from revision 1 catches up", async {
        loop {
            let response = stream.message().await.expect("the watch goes on").expect("no end");
            assert!(!response.canceled(), "watch cancelled: {}", response.cancel_reason());
            for event in response.events() {
                let kv = event.kv().expect("an event has a pair");
                assert_eq!(event.event_type(), EventType::Put, "nobody deletes: {kv:?}");
                history.push(Written {
                    key: kv.key_str().expect("text").to_owned(),
                    value: kv.value_str().expect("text").to_owned(),
                    revision: kv.mod_revision(),
                    create_revision: kv.create_revision(),
                    version: kv.version(),
                });
            }
            if history.last().is_some_and(|w| w.revision >= last) {
                return;
            }
        }
    })
    .await;
    history
}

/// Checks that `operations` and `history` fit each other.
///
/// # Errors
///
/// A sentence about the first thing that does not.
pub fn check(operations: &[Operation], history: &[Written]) -> Result<Summary, String> {
    let chains = chains(history)?;
    let by_value = unique_values(history)?;
    let mut summary = Summary {
        writes_done: 0,
        writes_unknown: 0,
        unknown_but_applied: 0,
        swaps_refused: 0,
        reads: 0,
    };
    let mut claimed = 0;
    // The revision each operation stands at, for those that have one, and whether it is a write.
    let mut placed: Vec<(&Operation, i64, bool)> = Vec::new();
    for operation in operations {
        match &operation.asked {
            Asked::Put { key, value } | Asked::Swap { key, value, .. } => {
                let found = by_value.get(value.as_str()).copied();
                if let Some(written) = found {
                    claimed += 1;
                    if written.key != *key {
                        return Err(format!("{operation:?} landed as {written:?}"));
                    }
                    if let Asked::Swap { if_at, .. } = &operation.asked {
                        let before = state(&chains, key, written.revision - 1);
                        let held_at = before.map_or(0, |w| w.revision);
                        if held_at != *if_at {
                            return Err(format!("compare did not hold: {operation:?}, {before:?}"));
                        }
                    }
                }
                match (&operation.answered, found) {
                    (Answered::Done { revision }, Some(written))
                        if written.revision == *revision =>
                    {
                        summary.writes_done += 1;
                        placed.push((operation, *revision, true));
                    }
                    (Answered::Done { .. }, found) => {
                        return Err(format!("acknowledged write lost: {operation:?}, {found:?}"));
                    }
                    (Answered::Refused { revision }, None) => {
                        let Asked::Swap { if_at, .. } = operation.asked else {
                            return Err(format!("a put cannot be refused: {operation:?}"));
                        };
                        if state(&chains, key, *revision).map_or(0, |w| w.revision) == if_at {
                            return Err(format!("refused though it held: {operation:?}"));
                        }
                        summary.swaps_refused += 1;
                        placed.push((operation, *revision, false));
                    }
                    (Answered::Refused { .. }, Some(written)) => {
                        return Err(format!("refused yet applied: {operation:?}, {written:?}"));
                    }
                    (Answered::Unknown, found) => {
                        summary.writes_unknown += 1;
                        if let Some(written) = found {
                            summary.unknown_but_applied += 1;
                            placed.push((operation, written.revision, true));
                        }
                    }
                    (Answered::Found { .. }, _) => {
                        return Err(format!("a write answered as a read: {operation:?}"));
                    }
                }
            }
            Asked::Read { key } => match &operation.answered {
                Answered::Found { revision, mod_revision, value } => {
                    let held = state(&chains, key, *revision);
                    let (at, text) = held.map_or((0, ""), |w| (w.revision, w.value.as_str()));
                    if (at, text) != (*mod_revision, value.as_str()) {
                        return Err(format!("wrong read: {operation:?}, in fact {held:?}"));
                    }
                    summary.reads += 1;
                    placed.push((operation, *revision, false));
                }
                Answered::Unknown => {}
                other => return Err(format!("a read answered as a write: {other:?}")),
            },
        }
    }
    if claimed != history.len() {
        let known: std::collections::HashSet<&str> = operations
            .iter()
            .filter_map(|o| match &o.asked {
                Asked::Put { value, .. } | Asked::Swap { value, .. } => Some(value.as_str()),
                Asked::Read { .. } => None,
            })
            .collect();
        let stranger = history.iter().find(|w| !known.contains(w.value.as_str()));
        return Err(format!("in the history, written by nobody: {stranger:?}"));
    }
    real_time(&placed)?;
    Ok(summary)
}

/// Per key the puts in order, after checking that each follows from the one before.
fn chains(history: &[Written]) -> Result<HashMap<&str, Vec<&Written>>, String> {
    let mut chains: HashMap<&str, Vec<&Written>> = HashMap::new();
    for written in history {
        let chain = chains.entry(written.key.as_str()).or_default();
        let fits = match chain.last() {
            None => written.version == 1 && written.create_revision == written.revision,
            Some(last) => {
                written.version == last.version + 1
                    && written.create_revision == last.create_revision
                    && written.revision > last.revision
            }
        };
        if !fits {
            return Err(format!("{written:?} does not follow from {:?}", chain.last()));
        }
        chain.push(written);
    }
    Ok(chains)
}

fn unique_values(history: &[Written]) -> Result<HashMap<&str, &Written>, String> {
    let mut by_value = HashMap::new();
    for written in history {
        if let Some(earlier) = by_value.insert(written.value.as_str(), written) {
            return Err(format!("applied twice: {earlier:?} and {written:?}"));
        }
    }
    Ok(by_value)
}

/// The put that a key holds at a revision, if any.
fn state<'a>(
    chains: &HashMap<&str, Vec<&'a Written>>,
    key: &str,
    revision: i64,
) -> Option<&'a Written> {
    let chain = chains.get(key)?;
    let after = chain.partition_point(|w| w.revision <= revision);
    after.checked_sub(1).map(|last| chain[last])
}

/// Nothing that begins after an answer arrived may stand before that answer's revision.
fn real_time(placed: &[(&Operation, i64, bool)]) -> Result<(), String> {
    // An unknown write has no time of acknowledgement: it binds others only through reads.
    let acknowledged = |o: &Operation| !matches!(o.answered, Answered::Unknown);
    let mut ends: Vec<_> = placed.iter().filter(|(o, ..)| acknowledged(o)).collect();
    ends.sort_unstable_by_key(|(o, ..)| o.ended);
    let mut begins: Vec<_> = placed.iter().collect();
    begins.sort_unstable_by_key(|(o, ..)| o.began);
    let mut ends = ends.into_iter().peekable();
    let mut floor: Option<(i64, &Operation)> = None;
    for (operation, revision, writes) in begins {
        while let Some((earlier, at, _)) = ends.next_if(|(o, ..)| o.ended < operation.began) {
            if floor.is_none_or(|(highest, _)| *at > highest) {
                floor = Some((*at, earlier));
            }
        }
        let Some((floor, by)) = floor else { continue };
        if *revision < floor || (*writes && *revision == floor) {
            return Err(format!("{operation:?} stands at {revision}, after {by:?} was answered"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(key: &str, value: &str, revision: i64, create: i64, version: i64) -> Written {
        let (key, value) = (key.to_owned(), value.to_owned());
        Written { key, value, revision, create_revision: create, version }
    }

    /// Operations that begin and end one after the other.
    fn in_turn(calls: Vec<(Asked, Answered)>) -> Vec<Operation> {
        let start = Instant::now();
        let at = |n: usize| start + Duration::from_millis(n as u64);
        let turn = |(n, (asked, answered))| Operation {
            asked,
            answered,
            began: at(2 * n),
            ended: at(2 * n + 1),
        };
        calls.into_iter().enumerate().map(turn).collect()
    }

    fn put(key: &str, value: &str) -> Asked {
        Asked::Put { key: key.to_owned(), value: value.to_owned() }
    }

    fn read(key: &str) -> Asked {
        Asked::Read { key: key.to_owned() }
    }

    fn found(revision: i64, mod_revision: i64, value: &str) -> Answered {
        Answered::Found { revision, mod_revision, value: value.to_owned() }
    }

    fn two_puts() -> Vec<Written> {
        vec![written("k", "a", 2, 2, 1), written("k", "b", 3, 2, 2)]
    }

    #[test]
    fn a_history_that_fits_is_accepted() {
        let operations = in_turn(vec![
            (put("k", "a"), Answered::Done { revision: 2 }),
            (put("k", "b"), Answered::Unknown),
            (put("k", "c"), Answered::Unknown),
            (read("k"), found(3, 3, "b")),
        ]);
        let summary = check(&operations, &two_puts()).expect("it fits");
        assert_eq!((summary.writes_done, summary.unknown_but_applied), (1, 1));
    }

    #[test]
    fn a_lost_write_is_found() {
        let operations = in_turn(vec![
            (put("k", "a"), Answered::Done { revision: 2 }),
            (put("k", "b"), Answered::Done { revision: 3 }),
        ]);
        let error = check(&operations, &two_puts()[..1]).expect_err("b is gone");
        assert!(error.contains("lost"), "{error}");
    }

    #[test]
    fn a_write_applied_twice_is_found() {
        let mut history = two_puts();
        history.push(written("k", "a", 4, 2, 3));
        let error = check(&[], &history).expect_err("a is there twice");
        assert!(error.contains("twice"), "{error}");
    }

    #[test]
    fn a_stale_read_is_found() {
        let operations = in_turn(vec![
            (put("k", "a"), Answered::Done { revision: 2 }),
            (put("k", "b"), Answered::Done { revision: 3 }),
            (read("k"), found(2, 2, "a")),
        ]);
        let error = check(&operations, &two_puts()).expect_err("the read is stale");
        assert!(error.contains("stands at 2"), "{error}");
    }

    #[test]
    fn a_swap_whose_compare_did_not_hold_is_found() {
        let swap = Asked::Swap { key: "k".to_owned(), value: "b".to_owned(), if_at: 1 };
        let operations = in_turn(vec![
            (put("k", "a"), Answered::Done { revision: 2 }),
            (swap, Answered::Done { revision: 3 }),
        ]);
        let error = check(&operations, &two_puts()).expect_err("the key was at 2");
        assert!(error.contains("did not hold"), "{error}");
    }

    #[test]
    fn a_value_that_nobody_wrote_is_found() {
        let operations = in_turn(vec![(put("k", "a"), Answered::Done { revision: 2 })]);
        let error = check(&operations, &two_puts()).expect_err("who wrote b?");
        assert!(error.contains("nobody"), "{error}");
    }
}
