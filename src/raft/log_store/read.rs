//! Fetches entries that have left the cache from their files.

use std::collections::BTreeMap;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use super::contents::Location;
use super::record::{Frame, Place, Record};
use crate::raft::types::LogEntry;
use crate::vfs::VfsFile;

/// Neighbouring records are read together, this much at a time.
const READ_BYTES: u32 = 1 << 20;

/// The files that a fetch needs, by sequence number.
pub type Files = BTreeMap<u64, Arc<dyn VfsFile>>;

/// Reads the entries at `located`, which are in the order of their index.
///
/// # Errors
///
/// `InvalidData` if one of them no longer reads as what was written.
pub fn fetch(located: &[(u64, Location)], files: &Files) -> io::Result<Vec<LogEntry>> {
    let mut entries = Vec::with_capacity(located.len());
    let mut rest = located;
    while let Some((_, first)) = rest.first() {
        // Within a segment later entries lie further back, possibly behind truncated ones.
        let end_of = |location: &Location| location.offset + location.length;
        let together = rest.iter().take_while(|(_, next)| {
            next.segment == first.segment && end_of(next) - first.offset <= READ_BYTES
        });
        let (run, others) = rest.split_at(together.count().max(1));
        let end = run.last().map_or(0, |(_, last)| end_of(last));
        let mut bytes = vec![0; (end - first.offset) as usize];
        let file = files.get(&first.segment).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("log segment {:010} is not open", first.segment),
            )
        })?;
        file.read_exact_at(u64::from(first.offset), &mut bytes)?;
        for (index, location) in run {
            let record = &bytes[(location.offset - first.offset) as usize..];
            entries.push(decode(record, *location, *index)?);
        }
        rest = others;
    }
    Ok(entries)
}

fn decode(bytes: &[u8], location: Location, index: u64) -> io::Result<LogEntry> {
    let place = Place { segment: location.segment, offset: location.offset };
    match Frame::parse(bytes, place).map(|frame| frame.decode()).transpose()? {
        Some(Record::Entry(entry)) if entry.log_id.index == index => Ok(entry),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "log segment {:010} is damaged at offset {}: entry {index}, which was good when it \
                 was written, is not found there",
                location.segment, location.offset
            ),
        )),
    }
}

/// `range` as the first index and the one behind the last.
pub fn bounds(range: impl RangeBounds<u64>) -> (u64, u64) {
    let begin = match range.start_bound() {
        Bound::Included(begin) => *begin,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (begin, end)
}
