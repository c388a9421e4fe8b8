//! The small words everything else is said in: revisions, keys and ranges, lease and member ids,
//! and the time that entries carry.
//!
//! Nothing here performs I/O, reads a clock, or knows of protobuf.

mod ids;
mod key_range;
mod revision;
mod timestamp;

pub use ids::{ClusterId, LeaseId, MemberId};
pub use key_range::KeyRange;
pub use revision::Revision;
pub use timestamp::Timestamp;
