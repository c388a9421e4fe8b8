//! Where each part of the state lies in the engine's key space.
//!
//! ```text
//! 'a' ...               the raft layer's: applied log id and membership. The machine never touches it
//! 'c' member (8) kind  an alarm
//! 'f' number (8)        a lock that was released by force
//! 'g'                   whether authentication is on, and its revision
//! 'h' key               what is known of a queue key beside the key itself
//! 'l' lease id (8)      a lease, without its keys: those follow from the records
//! 'm'                   revision, compacted revision, cluster time
//! 'o' name              a role
//! 'p' member id (8)     how clients reach a member
//! 'r' revision (12)     one record of the key history
//! 'u' name              a user
//! 'x' member id (8)     a member that was removed: the id never comes back
//! ```
//!
//! Numbers are big-endian, so that keys order as the numbers do (lease ids as unsigned ones).
//! The values are the codec's.

use super::{Alarm, AlarmKind};
use crate::types::{LeaseId, MemberId, Revision};

/// Free for the raft layer.
pub const RAFT_PREFIX: u8 = b'a';
pub const ALARM_PREFIX: u8 = b'c';
pub const FORCED_PREFIX: u8 = b'f';
pub const AUTH_KEY: [u8; 1] = *b"g";
pub const LABEL_PREFIX: u8 = b'h';
pub const LEASE_PREFIX: u8 = b'l';
pub const META_KEY: [u8; 1] = *b"m";
pub const ROLE_PREFIX: u8 = b'o';
pub const MEMBER_PREFIX: u8 = b'p';
/// The engine packs what lies here into blocks, as it only ever grows at its end.
pub const RECORD_PREFIX: u8 = crate::storage::RECORD_PREFIX;
pub const USER_PREFIX: u8 = b'u';
pub const RETIRED_PREFIX: u8 = b'x';

pub fn record_key(revision: Revision) -> [u8; 13] {
    let mut key = [RECORD_PREFIX; 13];
    key[1..].copy_from_slice(&revision.to_bytes());
    key
}

/// The inverse of [`record_key`].
pub fn record_revision(key: &[u8]) -> Option<Revision> {
    Revision::from_bytes(key.strip_prefix(&[RECORD_PREFIX])?)
}

/// An alarm stands in its key alone.
pub fn alarm_key(alarm: Alarm) -> [u8; 10] {
    let mut key = [0; 10];
    key[..9].copy_from_slice(&numbered(ALARM_PREFIX, alarm.member.0));
    key[9] = match alarm.kind {
        AlarmKind::NoSpace => 1,
        AlarmKind::Corrupt => 2,
    };
    key
}

/// The inverse of [`alarm_key`].
pub fn alarm(key: &[u8]) -> Option<Alarm> {
    let (kind, key) = key.split_last()?;
    let kind = match kind {
        1 => AlarmKind::NoSpace,
        2 => AlarmKind::Corrupt,
        _ => return None,
    };
    Some(Alarm { member: MemberId(number(ALARM_PREFIX, key)?), kind })
}

pub fn lease_key(id: LeaseId) -> [u8; 9] {
    numbered(LEASE_PREFIX, id.0 as u64)
}

/// The inverse of [`lease_key`].
pub fn lease_id(key: &[u8]) -> Option<LeaseId> {
    Some(LeaseId(number(LEASE_PREFIX, key)? as i64))
}

pub fn forced_key(number: u64) -> [u8; 9] {
    numbered(FORCED_PREFIX, number)
}

/// The inverse of [`forced_key`].
pub fn forced_number(key: &[u8]) -> Option<u64> {
    number(FORCED_PREFIX, key)
}

pub fn label_key(queue_key: &[u8]) -> Vec<u8> {
    [&[LABEL_PREFIX], queue_key].concat()
}

pub fn user_key(name: &str) -> Vec<u8> {
    [&[USER_PREFIX], name.as_bytes()].concat()
}

pub fn role_key(name: &str) -> Vec<u8> {
    [&[ROLE_PREFIX], name.as_bytes()].concat()
}

/// The inverse of [`user_key`] and [`role_key`].
pub fn name(key: &[u8]) -> Option<String> {
    let (_prefix, name) = key.split_first()?;
    String::from_utf8(name.to_vec()).ok().filter(|name| !name.is_empty())
}

pub fn member_key(id: MemberId) -> [u8; 9] {
    numbered(MEMBER_PREFIX, id.0)
}

/// The inverse of [`member_key`].
pub fn member_id(key: &[u8]) -> Option<MemberId> {
    Some(MemberId(number(MEMBER_PREFIX, key)?))
}

pub fn retired_key(id: MemberId) -> [u8; 9] {
    numbered(RETIRED_PREFIX, id.0)
}

/// The inverse of [`retired_key`].
pub fn retired_id(key: &[u8]) -> Option<MemberId> {
    Some(MemberId(number(RETIRED_PREFIX, key)?))
}

fn numbered(prefix: u8, number: u64) -> [u8; 9] {
    let mut key = [prefix; 9];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

fn number(prefix: u8, key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.strip_prefix(&[prefix])?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_records_order_as_their_revisions_do() {
        let revisions = [(1, 0), (1, 1), (2, 0), (255, u32::MAX), (256, 0), (i64::MAX, 3)];
        let keys: Vec<_> =
            revisions.iter().map(|&(main, sub)| record_key(Revision::new(main, sub))).collect();
        assert!(keys.is_sorted());
        for (key, (main, sub)) in keys.iter().zip(revisions) {
            assert_eq!(record_revision(key), Some(Revision::new(main, sub)));
        }
    }

    #[test]
    fn a_key_of_another_shape_names_nothing() {
        assert_eq!(lease_id(&lease_key(LeaseId(-5))), Some(LeaseId(-5)));
        assert_eq!(member_id(&member_key(MemberId(u64::MAX))), Some(MemberId(u64::MAX)));
        assert_eq!(lease_id(&member_key(MemberId(1))), None);
        assert_eq!(lease_id(b"l123"), None);
        let raised = Alarm { member: MemberId(u64::MAX), kind: AlarmKind::Corrupt };
        assert_eq!(alarm(&alarm_key(raised)), Some(raised));
        assert_eq!(alarm(b"c123456780"), None);
        assert_eq!(alarm(b"c\x01"), None);
        assert_eq!(record_revision(b"r"), None);
        assert_eq!(record_revision(b""), None);
    }
}
