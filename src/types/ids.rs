//! Identities: of a lease, a member and a cluster.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The id of a lease. Any non-zero `i64` may name one; zero means "no lease".
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct LeaseId(pub i64);

impl LeaseId {
    /// The absence of a lease.
    pub const NONE: LeaseId = LeaseId(0);

    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// The lease id as it ends a lock or election key: lower-case hexadecimal without padding,
    /// with a minus sign for a negative id.
    pub fn to_hex(self) -> String {
        if self.0 < 0 { format!("-{:x}", self.0.unsigned_abs()) } else { format!("{:x}", self.0) }
    }

    /// The inverse of [`LeaseId::to_hex`]. `None` for anything that `to_hex` does not print:
    /// padding, upper case, a plus sign, zero, or a value outside `i64`.
    pub fn from_hex(text: &[u8]) -> Option<LeaseId> {
        let (negative, digits) = match text.strip_prefix(b"-") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        if digits.is_empty() || digits.len() > 16 || digits[0] == b'0' {
            return None;
        }
        let mut magnitude: u64 = 0;
        for digit in digits {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return None,
            };
            magnitude = magnitude << 4 | u64::from(value);
        }
        let id = if negative {
            0i64.checked_sub_unsigned(magnitude)
        } else {
            i64::try_from(magnitude).ok()
        };
        id.map(LeaseId)
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

/// The id of a member, never zero for a member that exists.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct MemberId(pub u64);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// The id of a cluster, derived from its first members and its token.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct ClusterId(pub u64);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::LeaseId;

    #[test]
    fn a_lease_id_survives_its_hexadecimal_form() {
        for id in [1, 0x4d, -0x4d, i64::MAX, i64::MIN, 7587891234567890123] {
            let text = LeaseId(id).to_hex();
            assert_eq!(LeaseId::from_hex(text.as_bytes()), Some(LeaseId(id)), "{text}");
        }
        assert_eq!(LeaseId(-0x4d).to_hex(), "-4d");
    }

    #[test]
    fn only_the_canonical_form_names_a_lease() {
        for text in
            ["", "-", "0", "00", "01", "4D", "+4d", "4g", "ffffffffffffffff", "1ffffffffffffffff"]
        {
            assert_eq!(LeaseId::from_hex(text.as_bytes()), None, "{text}");
        }
    }
}
