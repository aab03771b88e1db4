//! Owns the placement of keys: a region's slots, and the endpoint that holds each slot.
//!
//! A region is split into slots so that its load spreads over all its endpoints. Every node of a
//! fleet computes the same placement from the same endpoints, whatever their order in the
//! configuration, because both the slot (xxh3) and its owner (rendezvous hashing) come from stable
//! hashes. An endpoint's label contains no password, so that changing a password moves nothing.
//!
//! Refuses nothing: sizes are checked where the configuration is read.
//! Invariant: the numbers of slots of any two endpoints differ by at most one.

use crate::key::{Digest, KeyRef, Region};
use std::fmt::{self, Write};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Default number of slots of a region.
pub const DEFAULT_SLOTS: u16 = 16;

/// Upper bound of slots: more have no benefit and make the table of owners slow to compute.
pub const SLOTS_MAX: u16 = 1024;

/// Number of a slot, a part of a region's key space, from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(u16);

impl Slot {
    /// Its index among the slots of its region, from 0.
    pub fn number(self) -> u16 {
        self.0
    }

    pub(crate) fn for_key(key: &KeyRef<'_>, slots: u16) -> Self {
        Self((xxh3_64(key.as_bytes()) % u64::from(slots.max(1))) as u16)
    }

    /// The other slots of the region, starting after this one.
    pub(crate) fn following(self, slots: u16) -> impl Iterator<Item = Slot> {
        (1..slots).map(move |step| Slot((self.0 + step) % slots))
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The endpoint of each slot of a region, as an index into the region's endpoints.
#[derive(Debug)]
pub(crate) struct SlotTable {
    owners: Vec<u16>,
}

impl SlotTable {
    /// Assigns `slots` to the endpoints with these labels: pairs of slot and endpoint are taken in
    /// descending order of their rendezvous score, while the slot is unassigned and the endpoint
    /// has not reached its share.
    pub(crate) fn assign(slots: u16, labels: &[String]) -> Self {
        let (share, mut larger_shares) = (usize::from(slots) / labels.len(), usize::from(slots) % labels.len());
        let mut pairs: Vec<(u64, u16, u16)> = (0..slots)
            .flat_map(|slot| {
                let score = move |label: &String| xxh3_64_with_seed(label.as_bytes(), u64::from(slot));
                labels.iter().zip(0u16..).map(move |(label, endpoint)| (score(label), slot, endpoint))
            })
            .collect();
        pairs.sort_unstable_by_key(|&(score, slot, _)| (std::cmp::Reverse(score), slot));

        let mut owners: Vec<Option<u16>> = vec![None; usize::from(slots)];
        let mut counts = vec![0usize; labels.len()];
        for (_, slot, endpoint) in pairs {
            let count = &mut counts[usize::from(endpoint)];
            let within_share = *count < share || (*count == share && larger_shares > 0);
            if owners[usize::from(slot)].is_some() || !within_share {
                continue;
            }
            if *count == share {
                larger_shares -= 1;
            }
            *count += 1;
            owners[usize::from(slot)] = Some(endpoint);
        }
        let owners = owners.into_iter().map(|owner| owner.expect("the shares add up to all slots")).collect();
        Self { owners }
    }

    pub(crate) fn len(&self) -> u16 {
        self.owners.len() as u16
    }

    /// The index of the endpoint that holds `slot`.
    pub(crate) fn owner(&self, slot: Slot) -> usize {
        usize::from(self.owners[usize::from(slot.0)])
    }
}

/// The index of the label with the highest rendezvous score for `name`; used for the few names that
/// are not spread over slots.
pub(crate) fn rendezvous_owner(name: &str, labels: &[String]) -> Option<usize> {
    let seed = xxh3_64(name.as_bytes());
    (0..labels.len()).max_by_key(|&index| xxh3_64_with_seed(labels[index].as_bytes(), seed))
}

/// Prefix of the Redis keys of entries and of the bus; copies and the buckets of limits have other
/// prefixes.
pub(crate) const ENTRY_KEY_PREFIX: &str = "tg:{";

/// The Redis key of an entry: `tg:{region:slot}:` and the first 16 bytes of its digest in
/// hexadecimal. The braces are the hash tag of Redis Cluster, which keeps a slot on one node. The
/// envelope contains the whole digest.
pub(crate) fn redis_key(region: &Region, slot: Slot, digest: &Digest) -> String {
    format_key("tg:", region, slot, digest)
}

/// Prefix of the Redis key of a tombstone, before the digest.
const TOMBSTONE_PART: &str = "tombstone:";

/// The Redis key of the tombstone of the entry with this Redis key, in the same slot; `None` for
/// other keys. It ends with the entry's digest, so that releases without tombstones take its
/// changes for changes of the entry.
pub(crate) fn tombstone_key(entry_key: &str) -> Option<String> {
    let after_tag = ENTRY_KEY_PREFIX.len() + entry_key.strip_prefix(ENTRY_KEY_PREFIX)?.find("}:")? + "}:".len();
    let (slot, digest) = entry_key.split_at(after_tag);
    Some(format!("{slot}{TOMBSTONE_PART}{digest}"))
}

pub(crate) fn is_tombstone_key(key: &[u8]) -> bool {
    let name = key.windows(2).position(|pair| pair == b"}:").and_then(|at| key.get(at + 2..));
    name.is_some_and(|name| name.starts_with(TOMBSTONE_PART.as_bytes()))
}

/// The Redis key of a copy of a hot entry in the given slot: `tg:hot:{region:slot}:` and the same
/// digest. Servers do not report changes of these keys.
pub(crate) fn copy_key(region: &Region, slot: Slot, digest: &Digest) -> String {
    format_key("tg:hot:", region, slot, digest)
}

fn format_key(prefix: &str, region: &Region, slot: Slot, digest: &Digest) -> String {
    let mut key = String::with_capacity(88);
    write!(key, "{prefix}{{{region}:{slot}}}:").expect("writing to a string does not fail");
    for byte in &digest.as_bytes()[..16] {
        write!(key, "{byte:02x}").expect("writing to a string does not fail");
    }
    key
}

/// The hash tag in a Redis key, which determines its node in a cluster.
pub(crate) fn hash_tag(name: &str) -> Option<&str> {
    Some(name.split_once('{')?.1.split_once('}')?.0)
}

/// The digest prefix in the Redis key of an entry (`Digest::prefix`).
pub(crate) fn digest_prefix(key: &[u8]) -> Option<u64> {
    let digest = key.rsplit(|byte| *byte == b':').next()?;
    u64::from_str_radix(str::from_utf8(digest.get(..16)?).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::KeyBuilder;
    use proptest::prelude::*;

    fn labels(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("10.0.0.{i}:6379")).collect()
    }

    fn owners_by_label(slots: &SlotTable, labels: &[String]) -> Vec<String> {
        slots.owners.iter().map(|&owner| labels[usize::from(owner)].clone()).collect()
    }

    #[test]
    fn placement_is_stable_between_releases() {
        let mut builder = KeyBuilder::new();
        let key = builder.part(b"GET").part(b"example.org").part(b"/").key();
        let slot = Slot::for_key(&key, DEFAULT_SLOTS);
        let name = redis_key(&Region::DEFAULT, slot, &key.digest(&Region::DEFAULT));
        assert_eq!(name, "tg:{default:11}:42965117f2d78962591e89f6a67d10af");
        assert_eq!(hash_tag(&name), Some("default:11"));
        let tombstone = tombstone_key(&name).unwrap();
        assert_eq!(tombstone, "tg:{default:11}:tombstone:42965117f2d78962591e89f6a67d10af");
        assert_eq!(digest_prefix(tombstone.as_bytes()), digest_prefix(name.as_bytes()));
        assert!(is_tombstone_key(tombstone.as_bytes()) && !is_tombstone_key(name.as_bytes()));
        let copy = copy_key(&Region::DEFAULT, slot, &key.digest(&Region::DEFAULT));
        assert_eq!(tombstone_key(&copy), None, "only entries in their own slot are removed");
        assert_eq!(
            SlotTable::assign(DEFAULT_SLOTS, &labels(3)).owners,
            [0, 1, 0, 1, 2, 2, 1, 1, 1, 0, 2, 0, 0, 0, 2, 2]
        );
    }

    #[test]
    fn keys_spread_over_every_slot() {
        let mut builder = KeyBuilder::new();
        let mut seen = [0u32; DEFAULT_SLOTS as usize];
        for n in 0u32..1_600 {
            let key = builder.clear().part(&n.to_le_bytes()).key();
            seen[usize::from(Slot::for_key(&key, DEFAULT_SLOTS).0)] += 1;
        }
        assert!(seen.iter().all(|&n| (60..140).contains(&n)), "{seen:?}");
    }

    proptest! {
        #[test]
        fn shares_differ_by_at_most_one(slots in 1u16..200, n in 1usize..20) {
            let spread = SlotTable::assign(slots, &labels(n));
            let count = |endpoint| spread.owners.iter().filter(|&&owner| usize::from(owner) == endpoint).count();
            let counts: Vec<usize> = (0..n).map(count).collect();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{:?}", counts);
        }

        #[test]
        fn order_of_endpoints_does_not_matter(slots in 1u16..100, n in 1usize..12, turn in 0usize..12) {
            let (original, mut rotated) = (labels(n), labels(n));
            rotated.rotate_left(turn % n);
            let owners = |labels: &[String]| owners_by_label(&SlotTable::assign(slots, labels), labels);
            prop_assert_eq!(owners(&original), owners(&rotated));
        }

        /// Adding an endpoint moves at least `slots / (n + 1)` slots; even shares require some
        /// more.
        #[test]
        fn new_endpoint_moves_few_slots(n in 1usize..15) {
            let owners = |labels: &[String]| owners_by_label(&SlotTable::assign(128, labels), labels);
            let (old, new) = (owners(&labels(n)), owners(&labels(n + 1)));
            let moved = old.iter().zip(&new).filter(|(a, b)| a != b).count();
            prop_assert!(moved <= 3 * 128_usize.div_ceil(n + 1), "{} moved", moved);
        }
    }
}
