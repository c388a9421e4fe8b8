//! One state of one key, in one piece of memory.
//!
//! The history holds a record for each change since the last compaction, a million or more of them,
//! and three tables refer to each. So a record is a single allocation behind a thin pointer: a handle
//! takes 8 bytes, and a record 33 bytes beside its key and value, until one of the numbers differs
//! from what it is in most.

use std::fmt;

use arc_swap::ArcSwapAny;
use bytes::Bytes;
use triomphe::ThinArc;

use crate::types::{LeaseId, Revision};

/// One state of one key: what a put left, or the tombstone of a delete (version 0, no value). A clone
/// is the same record.
#[derive(Clone)]
pub struct Record(ThinArc<Head, u8>);

#[derive(Clone, Copy, PartialEq, Eq)]
struct Head {
    main: i64,
    sub: u32,
    key_bytes: u32,
}

impl Head {
    fn mod_revision(&self) -> Revision {
        Revision::new(self.main, self.sub)
    }
}

/// What a record is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts<'a> {
    pub key: &'a [u8],
    pub value: &'a [u8],
    pub create_revision: i64,
    pub mod_revision: Revision,
    pub version: i64,
    pub lease: LeaseId,
}

/// Behind key and value come those of these numbers that are not what they mostly are, eight bytes
/// each in this order, and a byte that tells which.
const CREATED_EARLIER: u8 = 1;
const LATER_VERSION: u8 = 2;
const HAS_LEASE: u8 = 4;
/// All numbers are zero.
const TOMBSTONE: u8 = 8;

const NUMBER_BYTES: usize = 8;

impl Record {
    /// # Panics
    ///
    /// With a key of 4 GiB.
    pub fn new(parts: Parts<'_>) -> Record {
        let Parts { key, value, create_revision, mod_revision, version, lease } = parts;
        let key_bytes = u32::try_from(key.len()).expect("a key is smaller than a request");
        let mut bytes = Vec::with_capacity(key.len() + value.len() + 3 * NUMBER_BYTES + 1);
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(value);
        let mut which = 0;
        if (create_revision, version, lease) == (0, 0, LeaseId::NONE) {
            which = TOMBSTONE;
        } else {
            for (mark, number, mostly) in [
                (CREATED_EARLIER, create_revision, mod_revision.main),
                (LATER_VERSION, version, 1),
                (HAS_LEASE, lease.0, LeaseId::NONE.0),
            ] {
                if number != mostly {
                    which |= mark;
                    bytes.extend_from_slice(&number.to_ne_bytes());
                }
            }
        }
        bytes.push(which);
        let Revision { main, sub } = mod_revision;
        Record(ThinArc::from_header_and_slice(Head { main, sub, key_bytes }, &bytes))
    }

    /// A tombstone of `key`.
    pub fn tombstone(key: &[u8], mod_revision: Revision) -> Record {
        let (create_revision, version, lease) = (0, 0, LeaseId::NONE);
        Record::new(Parts { key, value: &[], create_revision, mod_revision, version, lease })
    }

    pub fn parts(&self) -> Parts<'_> {
        Parts {
            key: self.key(),
            value: self.value(),
            create_revision: self.create_revision(),
            mod_revision: self.mod_revision(),
            version: self.version(),
            lease: self.lease(),
        }
    }

    pub fn key(&self) -> &[u8] {
        &self.0.slice[..self.key_bytes()]
    }

    pub fn value(&self) -> &[u8] {
        &self.0.slice[self.key_bytes()..self.value_end()]
    }

    /// Key and value, in the record's own memory.
    pub fn shared(&self) -> (Bytes, Bytes) {
        struct Whole(Record);
        impl AsRef<[u8]> for Whole {
            fn as_ref(&self) -> &[u8] {
                &self.0.0.slice
            }
        }
        let whole = Bytes::from_owner(Whole(self.clone()));
        let key_bytes = self.key_bytes();
        (whole.slice(..key_bytes), whole.slice(key_bytes..self.value_end()))
    }

    pub fn create_revision(&self) -> i64 {
        self.number(CREATED_EARLIER, self.head().main)
    }

    pub fn mod_revision(&self) -> Revision {
        self.head().mod_revision()
    }

    pub fn version(&self) -> i64 {
        self.number(LATER_VERSION, 1)
    }

    pub fn lease(&self) -> LeaseId {
        LeaseId(self.number(HAS_LEASE, LeaseId::NONE.0))
    }

    pub fn is_tombstone(&self) -> bool {
        self.version() == 0
    }

    fn head(&self) -> &Head {
        &self.0.header.header
    }

    fn key_bytes(&self) -> usize {
        self.head().key_bytes as usize
    }

    fn which(&self) -> u8 {
        *self.0.slice.last().expect("a record ends with the byte that tells which numbers it has")
    }

    fn value_end(&self) -> usize {
        let numbers = (self.which() & (CREATED_EARLIER | LATER_VERSION | HAS_LEASE)).count_ones();
        self.0.slice.len() - 1 - numbers as usize * NUMBER_BYTES
    }

    fn number(&self, mark: u8, mostly: i64) -> i64 {
        let which = self.which();
        if which & mark == 0 {
            return if which == TOMBSTONE { 0 } else { mostly };
        }
        let before = (which & (mark - 1)).count_ones() as usize;
        let at = self.value_end() + before * NUMBER_BYTES;
        let number = self.0.slice[at..].first_chunk();
        i64::from_ne_bytes(*number.expect("the mark says that the number is there"))
    }
}

impl PartialEq for Record {
    fn eq(&self, other: &Record) -> bool {
        self.head() == other.head() && self.0.slice == other.0.slice
    }
}

impl Eq for Record {}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.parts();
        f.debug_struct("Record")
            .field("key", &parts.key.escape_ascii().to_string())
            .field("value", &parts.value.escape_ascii().to_string())
            .field("create_revision", &parts.create_revision)
            .field("mod_revision", &parts.mod_revision)
            .field("version", &parts.version)
            .field("lease", &parts.lease)
            .finish()
    }
}

/// A place for one record, of the size of a pointer: one thread writes, any number read, none waits.
#[derive(Default)]
pub struct Place(ArcSwapAny<Option<ThinArc<Head, u8>>>);

impl Place {
    pub fn get(&self) -> Option<Record> {
        self.0.load_full().map(Record)
    }

    pub fn set(&self, record: Option<Record>) {
        self.0.store(record.map(|record| record.0));
    }

    pub fn take(&self) -> Option<Record> {
        self.0.swap(None).map(Record)
    }

    /// The revision of the record that is there.
    pub fn mod_revision(&self) -> Option<Revision> {
        let record = self.0.load();
        record.as_ref().map(|record| record.header.header.mod_revision())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_the_parts_that_it_was_made_of() {
        let numbers = [i64::MIN, -1, 0, 1, 2, 7, i64::MAX];
        for (create_revision, version, lease) in numbers
            .into_iter()
            .flat_map(|a| numbers.into_iter().map(move |b| (a, b)))
            .flat_map(|(a, b)| numbers.into_iter().map(move |c| (a, b, c)))
        {
            for (key, value) in [("key", "value"), ("", ""), ("k", ""), ("", "v")] {
                for mod_revision in [Revision::new(7, 0), Revision::new(0, 3)] {
                    let (key, value) = (key.as_bytes(), value.as_bytes());
                    let lease = LeaseId(lease);
                    let parts = Parts { key, value, create_revision, mod_revision, version, lease };
                    let record = Record::new(parts);
                    assert_eq!(record.parts(), parts);
                    assert_eq!(record, Record::new(parts));
                    let (shared_key, shared_value) = record.shared();
                    assert_eq!((&shared_key[..], &shared_value[..]), (key, value));
                }
            }
        }
    }

    #[test]
    fn what_is_shared_outlives_the_record_and_is_no_copy() {
        let record = Record::new(Parts {
            key: b"k",
            value: b"v",
            create_revision: 2,
            mod_revision: Revision::new(2, 0),
            version: 1,
            lease: LeaseId::NONE,
        });
        let place = record.value().as_ptr();
        let (_, value) = record.shared();
        drop(record);
        assert_eq!(value.as_ptr(), place);
        assert_eq!(&value[..], b"v");
    }

    #[test]
    fn a_handle_is_a_pointer() {
        assert_eq!(size_of::<Record>(), size_of::<usize>());
        assert_eq!(size_of::<Option<Record>>(), size_of::<usize>());
    }
}
