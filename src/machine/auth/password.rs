//! What is kept of a password.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A bcrypt hash in its usual text form, or text that is none, which no password fits. It is made
/// before an entry is proposed: the password itself is in no entry.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PasswordHash(pub String);

/// Says nothing of the hash: it is worth guessing at.
impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordHash(..)")
    }
}
