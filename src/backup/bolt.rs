//! Reads a file of bbolt, the store under etcd.
//!
//! A file is made of pages of one size. Two of them, the *metas*, are written in turn; the newer one
//! that is whole names the root of a tree of pages. Branches lead to leaves, leaves hold keys with
//! values, and a value can be a *bucket*: another tree, or a single leaf within the value.
//!
//! ```text
//! page     id u64, flags u16, count u16, overflow u32; elements; keys and values. With `overflow`
//!          that many further pages belong to it
//! branch   element: pos u32, key length u32, page u64
//! leaf     element: flags u32, pos u32, key length u32, value length u32
//! meta     magic u32, version u32, page size u32, flags u32, root u64, sequence u64, freelist u64,
//!          end u64, transaction u64, FNV-64a of these
//! bucket   root u64, sequence u64; a page within the value where the root is zero
//! ```
//!
//! Numbers are little-endian; `pos` counts from the element. Everything in the file may be wrong, and
//! pages carry no checksum: each page is read once at most, so a file that leads in circles ends, and
//! nothing takes more memory than the file has bytes.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;

const PAGE_HEAD_BYTES: usize = 16;
const ELEMENT_BYTES: usize = 16;
const BUCKET_HEAD_BYTES: usize = 16;
const META_BYTES: usize = 64;

const BRANCH: u16 = 0x01;
const LEAF: u16 = 0x02;
const META: u16 = 0x04;
/// Of an element of a leaf.
const IS_BUCKET: u32 = 0x01;

const PAGE_SIZES: std::ops::RangeInclusive<u32> = 9..=16;

#[derive(Debug, thiserror::Error)]
pub enum BoltError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("this is no file of etcd: neither a snapshot nor a member's db")]
    NotBolt,
    #[error("damaged in page {page}: {what}")]
    Damaged { page: u64, what: &'static str },
}

/// An open file.
pub struct Bolt<R> {
    file: R,
    page_bytes: u64,
    /// In the file.
    pages: u64,
    /// Which pages were read.
    seen: Vec<u64>,
    buckets: BTreeMap<Vec<u8>, Bucket>,
}

/// Where the pairs of a bucket are.
#[derive(Debug, Clone)]
enum Bucket {
    Tree(u64),
    /// In the page of this number.
    Inline(Vec<u8>, u64),
}

/// A pair of a leaf.
struct Element<'a> {
    is_bucket: bool,
    key: &'a [u8],
    value: &'a [u8],
}

impl<R: Read + Seek> Bolt<R> {
    /// Opens the first `bytes` of `file`.
    ///
    /// # Errors
    ///
    /// A file that is not bbolt's, or whose outermost tree is damaged.
    pub fn open(mut file: R, bytes: u64) -> Result<Bolt<R>, BoltError> {
        let meta = newest_meta(&mut file, bytes)?;
        let page_bytes = u64::from(meta.page_bytes);
        let pages = bytes / page_bytes;
        let words = usize::try_from(pages.div_ceil(64)).map_err(io::Error::other)?;
        let (seen, buckets) = (vec![0; words], BTreeMap::new());
        let mut bolt = Bolt { file, page_bytes, pages, seen, buckets };
        let mut buckets = BTreeMap::new();
        bolt.walk_tree(meta.root, &mut |page, element| {
            if element.is_bucket {
                buckets.insert(element.key.to_vec(), bucket(page, element.value)?);
            }
            Ok::<(), BoltError>(())
        })?;
        bolt.buckets = buckets;
        Ok(bolt)
    }

    /// Calls `visit` with each pair of the outermost bucket `name`, in the order of their keys, until
    /// it fails. An absent bucket has none. Each bucket can be read once.
    ///
    /// # Errors
    ///
    /// Those of `visit`, and damage.
    pub fn read_bucket<E: From<BoltError>>(
        &mut self,
        name: &[u8],
        mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut visit = |_, element: Element<'_>| match element.is_bucket {
            true => Ok(()),
            false => visit(element.key, element.value),
        };
        match self.buckets.remove(name) {
            None => Ok(()),
            Some(Bucket::Tree(root)) => self.walk_tree(root, &mut visit),
            Some(Bucket::Inline(page, number)) => {
                if flags_of(&page) != LEAF {
                    return Err(damaged(number, "a bucket within it is no leaf").into());
                }
                read_leaf(number, &page, &mut visit)
            }
        }
    }

    fn walk_tree<E: From<BoltError>>(
        &mut self,
        root: u64,
        visit: &mut impl FnMut(u64, Element<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut to_read = vec![root];
        while let Some(number) = to_read.pop() {
            let page = self.read_page(number)?;
            match flags_of(&page) {
                LEAF => read_leaf(number, &page, visit)?,
                BRANCH => {
                    let begin = to_read.len();
                    for at in 0..count_of(&page) {
                        let element = element_at(number, &page, at)?;
                        to_read.push(u64_at(element, 8));
                    }
                    // The first is read next.
                    to_read[begin..].reverse();
                }
                _ => return Err(damaged(number, "neither a branch nor a leaf").into()),
            }
        }
        Ok(())
    }

    /// A page with those that belong to it, unless one of them was read before.
    fn read_page(&mut self, number: u64) -> Result<Vec<u8>, BoltError> {
        self.mark(number)?;
        let start = number * self.page_bytes;
        let mut head = [0; PAGE_HEAD_BYTES];
        self.read_at(start, &mut head)?;
        if u64_at(&head, 0) != number {
            return Err(damaged(number, "another page stands there"));
        }
        let further = u64::from(u32_at(&head, 12));
        if further >= self.pages - number {
            return Err(damaged(number, "it goes beyond the end of the file"));
        }
        for belonging in number + 1..=number + further {
            self.mark(belonging)?;
        }
        let length = usize::try_from((further + 1) * self.page_bytes).map_err(io::Error::other)?;
        let mut page = vec![0; length];
        self.read_at(start, &mut page)?;
        Ok(page)
    }

    fn mark(&mut self, number: u64) -> Result<(), BoltError> {
        if number >= self.pages {
            return Err(damaged(number, "it is beyond the end of the file"));
        }
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if self.seen[word] & bit != 0 {
            return Err(damaged(number, "it is part of two trees"));
        }
        self.seen[word] |= bit;
        Ok(())
    }

    fn read_at(&mut self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(at))?;
        self.file.read_exact(bytes)
    }
}

struct Meta {
    page_bytes: u32,
    root: u64,
    transaction: u64,
}

/// The newer of the metas that are whole. The second stands where the first page ends, wherever
/// that is.
fn newest_meta(file: &mut (impl Read + Seek), bytes: u64) -> Result<Meta, BoltError> {
    let mut newest: Option<Meta> = None;
    let places = std::iter::once(0).chain(PAGE_SIZES.map(|power| 1_u64 << power));
    for at in places {
        let mut page = [0; PAGE_HEAD_BYTES + META_BYTES];
        if bytes < at + page.len() as u64 {
            continue;
        }
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut page)?;
        let Some(meta) = meta(&page) else { continue };
        let is_in_place = at == 0 || at == u64::from(meta.page_bytes);
        let is_newer = newest.as_ref().is_none_or(|it| it.transaction < meta.transaction);
        if is_in_place && is_newer {
            newest = Some(meta);
        }
    }
    newest.ok_or(BoltError::NotBolt)
}

fn meta(page: &[u8]) -> Option<Meta> {
    let meta = &page[PAGE_HEAD_BYTES..];
    let page_bytes = u32_at(meta, 8);
    let is_one = flags_of(page) & META != 0
        && u32_at(meta, 0) == MAGIC
        && u32_at(meta, 4) == VERSION
        && page_bytes.is_power_of_two()
        && PAGE_SIZES.contains(&page_bytes.trailing_zeros())
        && u64_at(meta, 56) == fnv_64a(&meta[..56]);
    is_one.then(|| Meta { page_bytes, root: u64_at(meta, 16), transaction: u64_at(meta, 48) })
}

fn fnv_64a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn bucket(page: u64, value: &[u8]) -> Result<Bucket, BoltError> {
    if value.len() < BUCKET_HEAD_BYTES {
        return Err(damaged(page, "a bucket without a root"));
    }
    match u64_at(value, 0) {
        0 if value.len() < BUCKET_HEAD_BYTES + PAGE_HEAD_BYTES => {
            Err(damaged(page, "a bucket without a page"))
        }
        0 => Ok(Bucket::Inline(value[BUCKET_HEAD_BYTES..].to_vec(), page)),
        root => Ok(Bucket::Tree(root)),
    }
}

fn read_leaf<E: From<BoltError>>(
    number: u64,
    page: &[u8],
    visit: &mut impl FnMut(u64, Element<'_>) -> Result<(), E>,
) -> Result<(), E> {
    for at in 0..count_of(page) {
        let element = element_at(number, page, at)?;
        let is_bucket = u32_at(element, 0) & IS_BUCKET != 0;
        let sizes = [4, 8, 12].map(|offset| u32_at(element, offset) as usize);
        let [position, key_bytes, value_bytes] = sizes;
        let key = element.get(position..).and_then(|rest| rest.split_at_checked(key_bytes));
        let value = key.and_then(|(_, rest)| rest.get(..value_bytes));
        let (Some((key, _)), Some(value)) = (key, value) else {
            return Err(damaged(number, "a pair goes beyond the end of the page").into());
        };
        visit(number, Element { is_bucket, key, value })?;
    }
    Ok(())
}

/// The page from its element `at` on.
fn element_at(number: u64, page: &[u8], at: usize) -> Result<&[u8], BoltError> {
    let element = page.get(PAGE_HEAD_BYTES + at * ELEMENT_BYTES..);
    let element = element.filter(|rest| rest.len() >= ELEMENT_BYTES);
    element.ok_or_else(|| damaged(number, "it has more elements than room"))
}

fn flags_of(page: &[u8]) -> u16 {
    u16::from_le_bytes([page[8], page[9]])
}

fn count_of(page: &[u8]) -> usize {
    usize::from(u16::from_le_bytes([page[10], page[11]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn damaged(page: u64, what: &'static str) -> BoltError {
    BoltError::Damaged { page, what }
}
