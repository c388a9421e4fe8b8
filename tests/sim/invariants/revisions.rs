//! What clients were told fits the history of the store.
//!
//! 1. An acknowledged write is in the history at exactly its revision. A written value is there at
//!    most once, a refused one not at all, and nothing is there that nobody wrote.
//! 2. A compare that succeeded held just before its revision; one that failed did not hold at its.
//! 3. A read answers what the history says for the revision in its header.
//! 4. Whatever begins after an answer arrived does not stand at an earlier revision, and a write
//!    stands at a later one. A serializable read is free of this.
//! 5. Along each key, versions and revisions go up without a gap.

use std::collections::BTreeMap;

use crate::record::{Answered, Asked, Call, Change};

/// The changes of each key, in order.
pub struct Chains<'a>(BTreeMap<&'a str, Vec<&'a Change>>);

impl<'a> Chains<'a> {
    /// # Errors
    ///
    /// When a change does not follow from the one before.
    pub fn new(history: &'a [Change]) -> Result<Chains<'a>, String> {
        let mut chains: BTreeMap<&str, Vec<&Change>> = BTreeMap::new();
        let mut highest = 1;
        for change in history {
            let chain = chains.entry(&change.key).or_default();
            let fits = match chain.last().filter(|last| !last.deleted) {
                None => {
                    !change.deleted
                        && change.version == 1
                        && change.create_revision == change.revision
                }
                Some(_) if change.deleted => true,
                Some(last) => {
                    change.version == last.version + 1
                        && change.create_revision == last.create_revision
                }
            };
            if !fits || chain.last().is_some_and(|last| last.revision >= change.revision) {
                return Err(format!("{change:?} does not follow from {:?}", chain.last()));
            }
            if change.revision != highest && change.revision != highest + 1 {
                return Err(format!("a gap before {change:?}, after revision {highest}"));
            }
            highest = change.revision;
            chain.push(change);
        }
        Ok(Chains(chains))
    }

    /// What the key holds at a revision.
    pub fn at(&self, key: &str, revision: i64) -> Option<&'a Change> {
        let chain = self.0.get(key)?;
        let after = chain.partition_point(|change| change.revision <= revision);
        after.checked_sub(1).map(|last| chain[last]).filter(|change| !change.deleted)
    }

    pub fn with_prefix(&self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &[&'a Change])> {
        let below = self.0.range(prefix..).take_while(move |(key, _)| key.starts_with(prefix));
        below.map(|(key, chain)| (*key, chain.as_slice()))
    }
}

pub fn check(calls: &[Call], history: &[Change], chains: &Chains) -> Result<(), String> {
    let mut by_value: BTreeMap<&str, Vec<&Change>> = BTreeMap::new();
    for change in history.iter().filter(|change| !change.deleted && !change.value.is_empty()) {
        by_value.entry(&change.value).or_default().push(change);
    }
    let mut placed: Vec<(&Call, i64, bool)> = Vec::new();
    for call in calls {
        let (keys, value) = match &call.asked {
            Asked::Put { key, value }
            | Asked::Swap { key, value, .. }
            | Asked::Guarded { key, value, .. } => (vec![key.as_str()], value),
            Asked::PutBoth { keys, value } => (keys.iter().map(String::as_str).collect(), value),
            Asked::Read { key, serializable } => {
                let Answered::Found { mod_revision, value } = &call.answered else { continue };
                let held = chains.at(key, call.revision);
                let (at, text) = held.map_or((0, ""), |c| (c.revision, c.value.as_str()));
                if at != *mod_revision || (!value.is_empty() && text != value) {
                    return Err(format!("wrong read: {call:?}, in fact {held:?}"));
                }
                if !serializable {
                    placed.push((call, call.revision, false));
                }
                continue;
            }
            _ => continue,
        };
        let written = by_value.remove(value.as_str());
        if let Some(written) = &written {
            let same = written.iter().all(|change| change.revision == written[0].revision);
            let mut there: Vec<&str> = written.iter().map(|change| change.key.as_str()).collect();
            there.sort_unstable();
            if !same || there != keys {
                return Err(format!("{call:?} was applied as {written:?}"));
            }
        }
        let at = written.as_ref().map(|written| written[0].revision);
        if let Some(at) = at
            && !compare_held(call, chains, at - 1)
        {
            return Err(format!("the compare did not hold at {}: {call:?}", at - 1));
        }
        match (&call.answered, at) {
            (Answered::Done, Some(at)) if at == call.revision => placed.push((call, at, true)),
            (Answered::Done, _) => {
                return Err(format!("acknowledged write lost: {call:?}, in fact {written:?}"));
            }
            (Answered::Refused, Some(_)) => return Err(format!("refused yet applied: {call:?}")),
            (Answered::Refused, None) => {
                if compare_held(call, chains, call.revision) {
                    return Err(format!("refused though it held: {call:?}"));
                }
                placed.push((call, call.revision, false));
            }
            (_, Some(at)) => placed.push((call, at, true)),
            (_, None) => {}
        }
    }
    if let Some((value, changes)) = by_value.first_key_value() {
        return Err(format!("{value} was written by nobody: {changes:?}"));
    }
    real_time(&placed)
}

/// Whether what `call` compares held at `revision`.
fn compare_held(call: &Call, chains: &Chains, revision: i64) -> bool {
    match &call.asked {
        Asked::Swap { key, if_at, .. } => {
            chains.at(key, revision).map_or(0, |change| change.revision) == *if_at
        }
        Asked::Guarded { owner, token, .. } => {
            chains.at(owner, revision).map_or(0, |change| change.create_revision) == *token
        }
        _ => true,
    }
}

/// Nothing that begins after an answer arrived may stand before that answer's revision.
fn real_time(placed: &[(&Call, i64, bool)]) -> Result<(), String> {
    let acknowledged = |call: &Call| !matches!(call.answered, Answered::Unknown(_));
    let mut ends: Vec<_> = placed.iter().filter(|(call, ..)| acknowledged(call)).collect();
    ends.sort_by_key(|(call, ..)| call.ended);
    let mut begins: Vec<_> = placed.iter().collect();
    begins.sort_by_key(|(call, ..)| call.began);
    let mut ends = ends.into_iter().peekable();
    let mut floor: Option<(i64, &Call)> = None;
    for (call, revision, writes) in begins {
        while let Some((earlier, at, _)) = ends.next_if(|(earlier, ..)| earlier.ended < call.began)
        {
            if floor.is_none_or(|(highest, _)| *at > highest) {
                floor = Some((*at, earlier));
            }
        }
        let Some((floor, by)) = floor else { continue };
        if *revision < floor || (*writes && *revision == floor) {
            return Err(format!("{call:?} stands at {revision}, after {by:?} was answered"));
        }
    }
    Ok(())
}
