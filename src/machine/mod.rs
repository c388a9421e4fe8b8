//! The replicated state machine: the same entries in the same order give the same state and the
//! same answers on every member.
//!
//! It is a function. It has no clock, no randomness, no I/O; an entry brings its time along, and
//! what is to be stored leaves in a batch. [`Machine::apply`] is called by one thread;
//! any number of others read through a [`Store`] meanwhile.
//!
//! ```text
//! Entry ──> Machine::apply ──> Outcome   the answer, the events, the effects
//!                │    └──────> Batch     for the engine
//!                └───────────> Store     for readers: a published revision
//! ```

mod command;
mod outcome;
mod record;

mod alarm;
mod apply;
mod auth;
mod codec;
mod digest;
mod holds;
mod lease;
mod mvcc;
mod queue;
mod queueing;
pub mod schema;
mod snapshot;
mod state;
mod txn;

#[cfg(test)]
pub(crate) mod tests;

pub use alarm::{Alarm, AlarmAction, AlarmKind, AlarmKinds};
pub use auth::{
    Access, Auth, AuthChange, AuthRefusal, PasswordHash, Permission, PermissionKind, Principal,
    ROOT, Right,
};
pub use codec::{DEEPEST_TXN, LARGEST_VALUE_BYTES};
pub use command::*;
pub use digest::{DIGEST_VERSION, Digest};
pub use holds::{Asked, ForcedRelease, Label, QueueKey};
pub use lease::{Lease, LeaseTable};
pub use mvcc::{Changes, HashKv, NEVER_COMPACTED, PAGE_BYTES, Page, Pages, PagesEnd, Store, View};
pub use outcome::*;
pub use record::{Parts, Record};
pub use snapshot::{Afresh, Image, Pair, foreign_lease, foreign_numbers, foreign_record};
pub use state::{Machine, Position, PublishedMember};
