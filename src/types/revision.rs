//! A point in the history of the whole key space.

use serde::{Deserialize, Serialize};

/// `main` is the revision clients see: one for each entry that changed something. `sub` numbers
/// the changes within it, from zero, in the order they were made.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Revision {
    pub main: i64,
    pub sub: u32,
}

impl Revision {
    pub const fn new(main: i64, sub: u32) -> Revision {
        Revision { main, sub }
    }

    /// The first possible change of `main`.
    pub const fn first_of(main: i64) -> Revision {
        Revision { main, sub: 0 }
    }

    /// The last possible change of `main`.
    pub const fn last_of(main: i64) -> Revision {
        Revision { main, sub: u32::MAX }
    }

    /// The last possible change before this one.
    pub fn before(self) -> Option<Revision> {
        match self.sub.checked_sub(1) {
            Some(sub) => Some(Revision { sub, ..self }),
            None => Some(Revision::last_of(self.main.checked_sub(1)?)),
        }
    }

    /// Twelve bytes that order as revisions do.
    pub fn to_bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&(self.main as u64).to_be_bytes());
        bytes[8..].copy_from_slice(&self.sub.to_be_bytes());
        bytes
    }

    /// The inverse of [`Revision::to_bytes`]; `None` when `bytes` has another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Revision> {
        let (main, sub) = bytes.split_at_checked(8)?;
        Some(Revision {
            main: u64::from_be_bytes(main.try_into().ok()?) as i64,
            sub: u32::from_be_bytes(sub.try_into().ok()?),
        })
    }
}
