//! All members tell the same history, and it is the one that was witnessed while it happened.

use crate::record::Change;

/// What one member tells in the end.
#[derive(Debug)]
pub struct Testimony {
    pub member: usize,
    /// From the first revision that no compaction has reached.
    pub from: i64,
    pub history: Vec<Change>,
    /// Of the history up to the last revision, with the revision it was compacted at.
    pub hash: (u32, i64),
}

pub fn check(testimonies: &[Testimony], witnessed: &[Change], last: i64) -> Result<(), String> {
    for Testimony { member, from, history, hash } in testimonies {
        let expected: Vec<&Change> = witnessed
            .iter()
            .filter(|change| change.revision >= *from && change.revision <= last)
            .collect();
        let told: Vec<&Change> = history.iter().filter(|change| change.revision <= last).collect();
        if let Some(at) =
            (0..expected.len().max(told.len())).find(|n| expected.get(*n) != told.get(*n))
        {
            return Err(format!(
                "m{member} tells {:?} where {:?} was witnessed",
                told.get(at),
                expected.get(at)
            ));
        }
        let first = &testimonies[0];
        if hash.1 == first.hash.1 && hash.0 != first.hash.0 {
            return Err(format!("m{member} has hash {hash:?}, m{} {:?}", first.member, first.hash));
        }
    }
    Ok(())
}
