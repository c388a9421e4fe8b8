//! One holder at a time, in the order of the queue.
//!
//! At the revision of a grant's header, the key exists and no other key of the queue is older. So no
//! two are granted at one revision, and a key that is gone is granted to nobody. Along the
//! revisions of the grants, tokens never go back.

use std::time::Duration;

use super::revisions::Chains;
use crate::record::{Answered, Asked, Call};

pub fn check(calls: &[Call], chains: &Chains) -> Result<(), String> {
    let mut grants: Vec<(i64, i64, &Call)> = Vec::new();
    for call in calls {
        let (Asked::Lock { name, .. }, Answered::Locked { key }) = (&call.asked, &call.answered)
        else {
            continue;
        };
        let Some(held) = chains.at(key, call.revision) else {
            return Err(format!("{call:?} was granted a key that is gone"));
        };
        let queue = format!("{name}/");
        for (other, _) in chains.with_prefix(&queue) {
            let older = chains.at(other, call.revision);
            if let Some(older) = older.filter(|o| o.create_revision < held.create_revision) {
                return Err(format!("{call:?} was granted while {older:?} stood before it"));
            }
        }
        grants.push((call.revision, held.create_revision, call));
    }
    grants.sort_by_key(|(revision, ..)| *revision);
    for pair in grants.windows(2) {
        let [(_, earlier, first), (_, later, second)] = pair else { continue };
        if later < earlier {
            return Err(format!("token {later} of {second:?} after {earlier} of {first:?}"));
        }
    }
    overlaps(calls, chains)
}

/// A key whose end was known before the call that was granted it began.
fn overlaps(calls: &[Call], chains: &Chains) -> Result<(), String> {
    for call in calls {
        let Answered::Locked { key } = &call.answered else { continue };
        let gone = chains.with_prefix(key).filter(|(found, _)| found == key);
        let ends = gone.flat_map(|(_, chain)| chain.iter()).filter(|change| change.deleted);
        for end in ends {
            if end.revision <= call.revision {
                continue;
            }
            let known = calls
                .iter()
                .filter(|other| other.revision >= end.revision)
                .map(|other| other.ended)
                .min()
                .unwrap_or(Duration::MAX);
            if known < call.began {
                return Err(format!("{call:?} was granted after {end:?} was known"));
            }
        }
    }
    Ok(())
}
