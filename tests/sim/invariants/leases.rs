//! A lease never ends early: nobody learns of its end before its time to live has passed since the
//! latest renewal, or the grant, that was acknowledged was asked for.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::record::{Answered, Asked, Call, Witnessed};

/// The members' clocks are off by less.
const DRIFT: Duration = Duration::from_millis(5);

pub fn check(calls: &[Call], witnessed: &Witnessed) -> Result<(), String> {
    // The keys of a lease name it.
    let mut ends: BTreeMap<i64, i64> = BTreeMap::new();
    for change in witnessed.changes.iter().filter(|change| change.deleted) {
        if let Some(hex) = change.key.strip_prefix("lease/") {
            let lease = i64::from_str_radix(hex, 16).map_err(|error| error.to_string())?;
            ends.insert(lease, change.revision);
        }
    }
    // The earliest moment at which anybody knew of a revision: of it or of a later one.
    let mut known: BTreeMap<i64, Duration> = witnessed.seen_at.clone();
    for call in calls.iter().filter(|call| call.revision > 0) {
        let at = known.entry(call.revision).or_insert(call.ended);
        *at = (*at).min(call.ended);
    }
    for call in calls {
        let (Asked::Grant { .. } | Asked::KeepAlive { .. }) = call.asked else { continue };
        let Answered::Lease { id, ttl_seconds: ttl @ 1.. } = call.answered else { continue };
        let Some(end) = ends.get(&id) else { continue };
        let until = call.began + Duration::from_secs(ttl.unsigned_abs()) - DRIFT;
        if let Some((revision, at)) = known.range(end..).find(|(_, at)| **at < until) {
            return Err(format!(
                "lease {id:x} ended at revision {end}, before {until:?}, as revision {revision} \
                 was known at {at:?}: {call:?}"
            ));
        }
    }
    Ok(())
}
