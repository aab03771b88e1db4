//! Owns the names of regions and the keys of stored responses.
//!
//! A key is an injective byte string: its caller appends parts, each preceded by its length, so
//! that different lists of parts give different bytes. Its 64-bit hash is computed once, with a
//! seed of this process, and stored with it. The digest that names it outside the process is
//! computed only when needed. A region is not part of a key: where responses differ by region, the
//! caller appends the region's name as a part.
//!
//! Refuses region names that are not `[a-z0-9_-]{1,32}`.
//! Invariant: equal bytes have equal hashes on every thread of the process, and a lookup does not
//! allocate.

use foldhash::quality::RandomState;
use moka::Equivalent;
use serde::{Deserialize, Serialize};
use std::borrow::Borrow;
use std::fmt;
use std::hash::{BuildHasher, Hash, Hasher};
use std::str::FromStr;
use std::sync::{Arc, LazyLock};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// One seed for the whole process: tables of different threads share hashes, and a client cannot
/// compute them.
static SEED: LazyLock<RandomState> = LazyLock::new(RandomState::default);

const REGION_BYTES_MAX: usize = 32;

/// The name of a region. Stored inline and `Copy`, so that passing it around touches no counter
/// shared between cores.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Region {
    name: [u8; REGION_BYTES_MAX],
    len: u8,
}

/// The name is not 1 to 32 of `a-z`, `0-9`, `_` and `-`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a region's name is 1 to 32 of a-z, 0-9, '_' and '-'")]
pub struct InvalidRegion;

impl Region {
    /// The region of requests that name none; its shards also serve regions without a
    /// configuration.
    pub const DEFAULT: Region = Region::ascii(b"default");

    pub fn new(name: &str) -> Result<Self, InvalidRegion> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-';
        if name.is_empty() || name.len() > REGION_BYTES_MAX || !name.bytes().all(allowed) {
            return Err(InvalidRegion);
        }
        Ok(Self::ascii(name.as_bytes()))
    }

    pub fn as_str(&self) -> &str {
        str::from_utf8(self.as_bytes()).expect("only ASCII is accepted")
    }

    const fn ascii(bytes: &[u8]) -> Self {
        let mut name = [0; REGION_BYTES_MAX];
        name.split_at_mut(bytes.len()).0.copy_from_slice(bytes);
        Self { name, len: bytes.len() as u8 }
    }

    fn as_bytes(&self) -> &[u8] {
        &self.name[..usize::from(self.len)]
    }
}

impl Hash for Region {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl Borrow<str> for Region {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl FromStr for Region {
    type Err = InvalidRegion;

    fn from_str(name: &str) -> Result<Self, InvalidRegion> {
        Self::new(name)
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// Composes keys in a buffer that is reused for the next key.
#[derive(Debug, Default)]
pub struct KeyBuilder {
    bytes: Vec<u8>,
}

impl KeyBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes all parts and keeps the buffer.
    pub fn clear(&mut self) -> &mut Self {
        self.bytes.clear();
        self
    }

    /// Appends one part. An empty part counts: `["a", ""]` and `["a"]` are different keys.
    pub fn part(&mut self, part: &[u8]) -> &mut Self {
        self.part_of(&[part])
    }

    /// Appends one part that is the concatenation of `pieces`.
    pub fn part_of(&mut self, pieces: &[&[u8]]) -> &mut Self {
        let mut len = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        while len >= 0x80 {
            self.bytes.push((len & 0x7f) as u8 | 0x80);
            len >>= 7;
        }
        self.bytes.push(len as u8);
        pieces.iter().for_each(|piece| self.bytes.extend_from_slice(piece));
        self
    }

    pub fn key(&self) -> KeyRef<'_> {
        KeyRef::hashed(&self.bytes)
    }
}

/// A key with its hash, borrowed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyRef<'a> {
    hash: u64,
    bytes: &'a [u8],
}

impl<'a> KeyRef<'a> {
    fn hashed(bytes: &'a [u8]) -> Self {
        let mut hasher = SEED.build_hasher();
        hasher.write(bytes);
        Self { hash: hasher.finish(), bytes }
    }

    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The parts that the key is composed of.
    pub fn parts(&self) -> impl Iterator<Item = &'a [u8]> {
        let mut rest = self.bytes;
        std::iter::from_fn(move || {
            let (mut len, mut shift) = (0, 0);
            loop {
                let (byte, after) = rest.split_first()?;
                rest = after;
                len |= usize::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 {
                    break;
                }
            }
            let (part, after) = rest.split_at_checked(len)?;
            rest = after;
            Some(part)
        })
    }

    /// The hash of the key: different in every process, equal on all threads of one.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn to_owned(&self) -> CacheKey {
        CacheKey { hash: self.hash, bytes: Arc::from(self.bytes) }
    }

    /// The digest that names this key outside the process. It covers the region, so that an entry
    /// of one region is never taken for one of another.
    pub(crate) fn digest(&self, region: &Region) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[region.len]);
        hasher.update(region.as_bytes());
        hasher.update(self.bytes);
        Digest(*hasher.finalize().as_bytes())
    }
}

impl Hash for KeyRef<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl Equivalent<CacheKey> for KeyRef<'_> {
    fn equivalent(&self, key: &CacheKey) -> bool {
        *self == key.as_key()
    }
}

impl fmt::Debug for KeyRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.bytes.escape_ascii())
    }
}

/// A key with its hash, owned; a clone shares the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct CacheKey {
    hash: u64,
    bytes: Arc<[u8]>,
}

impl CacheKey {
    pub fn as_key(&self) -> KeyRef<'_> {
        KeyRef { hash: self.hash, bytes: &self.bytes }
    }
}

impl Hash for CacheKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl fmt::Debug for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_key().fmt(f)
    }
}

/// A property by which stored responses are purged together: a surrogate key or a URL. Represented
/// by a hash that is equal on every node; two tags with the same hash (probability 2^-64) are
/// purged together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Tag(u64);

impl Tag {
    const SURROGATE_KEY_SEED: u64 = 1;
    const URL_SEED: u64 = 2;

    /// The tag of a surrogate key; letter case matters.
    pub fn surrogate_key(name: &[u8]) -> Self {
        Self(xxh3_64_with_seed(name, Self::SURROGATE_KEY_SEED))
    }

    /// The tag of the URL that the parts of `key` compose; it covers all variants of the URL.
    pub fn url(key: &KeyRef<'_>) -> Self {
        Self(xxh3_64_with_seed(key.bytes, Self::URL_SEED))
    }

    pub(crate) fn hash(self) -> u64 {
        self.0
    }

    pub(crate) fn from_hash(hash: u64) -> Self {
        Self(hash)
    }
}

/// The 32-byte digest of a region and a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Digest([u8; 32]);

impl Digest {
    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 8 bytes: enough to distinguish the entries of one process.
    pub(crate) fn prefix(&self) -> u64 {
        u64::from_be_bytes(self.0[..8].try_into().expect("the range is 8 bytes long"))
    }
}

/// A hasher for keys that already contain their hash.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Prehashed(u64);

impl BuildHasher for Prehashed {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        Self(0)
    }
}

impl Hasher for Prehashed {
    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are hashed with write_u64 only");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn built(parts: &[Vec<u8>]) -> KeyBuilder {
        let mut builder = KeyBuilder::new();
        for part in parts {
            builder.part(part);
        }
        builder
    }

    #[test]
    fn region_name_outside_the_alphabet_is_rejected() {
        for name in ["", "Paris", "a b", "a:b", "a{b}", "é", &"x".repeat(33)] {
            assert_eq!(Region::new(name), Err(InvalidRegion), "{name:?}");
        }
        assert_eq!(Region::new("default").unwrap(), Region::DEFAULT);
        assert_eq!(Region::new(&"x".repeat(32)).unwrap().as_str(), "x".repeat(32));
    }

    #[test]
    fn digest_depends_on_the_region() {
        let key = built(&[b"/a".to_vec()]);
        let (key, other) = (key.key(), Region::new("eu").unwrap());
        assert_ne!(key.digest(&Region::DEFAULT), key.digest(&other));
    }

    #[test]
    fn parts_of_a_key_are_recovered() {
        let parts = [b"a".to_vec(), Vec::new(), vec![b'x'; 300]];
        assert!(built(&parts).key().parts().eq(parts.iter().map(Vec::as_slice)));
        let mut builder = KeyBuilder::new();
        assert_eq!(builder.part_of(&[b"a", b"", b"bc"]).key().as_bytes(), b"\x03abc");
    }

    #[test]
    fn cleared_builder_starts_with_an_empty_key() {
        let mut builder = built(&[b"old".to_vec()]);
        builder.clear().part(b"new");
        assert_eq!(builder.key(), built(&[b"new".to_vec()]).key());
    }

    proptest! {
        #[test]
        fn keys_are_equal_only_if_their_parts_are(
            a in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..4),
            b in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3), 0..4),
        ) {
            let (left, right) = (built(&a), built(&b));
            prop_assert_eq!(left.key() == right.key(), a == b);
            let owned = left.key().to_owned();
            prop_assert_eq!(left.key(), owned.as_key());
        }
    }
}
