//! Owns where a key lives: a region's slots, and which endpoint holds each of them.
//!
//! A slot is the second split of a region: one region's load spreads over all its endpoints instead of hitting one. Every node
//! of a fleet computes the same placement from the same endpoints, whatever their order in the configuration, because both the
//! slot (xxh3) and the owner (rendezvous) come from stable hashes. An endpoint's label carries no password, so that changing
//! one moves nothing.
//!
//! Refuses nothing: sizes are checked where settings are read.
//! Invariant: endpoints hold the same number of slots, within one.

use crate::key::{Digest, KeyRef, Region};
use std::fmt::{self, Write};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Slots of a region where nothing else is configured.
pub const SLOTS: u16 = 16;

/// More slots than this buy nothing and make the table of owners slow to compute.
pub(crate) const SLOTS_MAX: u16 = 1024;

/// A part of a region's key space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(u16);

impl Slot {
    /// Its place among the slots of its region, from 0.
    pub fn number(self) -> u16 {
        self.0
    }

    pub(crate) fn of(key: &KeyRef<'_>, slots: u16) -> Self {
        Self((xxh3_64(key.as_bytes()) % u64::from(slots.max(1))) as u16)
    }

    /// The other slots of the region, from the next one on.
    pub(crate) fn others(self, slots: u16) -> impl Iterator<Item = Slot> {
        (1..slots).map(move |step| Slot((self.0 + step) % slots))
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which endpoint holds each slot of a region.
#[derive(Debug)]
pub(crate) struct Slots {
    owners: Vec<u16>,
}

impl Slots {
    /// Gives `slots` to the endpoints named by `labels`: the pairs of slot and endpoint are taken from the highest rendezvous
    /// score down, as long as the slot is free and the endpoint has not its share.
    pub(crate) fn spread(slots: u16, labels: &[String]) -> Self {
        let (each, mut larger) = (usize::from(slots) / labels.len(), usize::from(slots) % labels.len());
        let mut pairs: Vec<(u64, u16, u16)> = (0..slots)
            .flat_map(|slot| {
                let score = move |label: &String| xxh3_64_with_seed(label.as_bytes(), u64::from(slot));
                labels.iter().zip(0u16..).map(move |(label, endpoint)| (score(label), slot, endpoint))
            })
            .collect();
        pairs.sort_unstable_by_key(|&(score, slot, _)| (std::cmp::Reverse(score), slot));

        let mut owners: Vec<Option<u16>> = vec![None; usize::from(slots)];
        let mut held = vec![0usize; labels.len()];
        for (_, slot, endpoint) in pairs {
            let held = &mut held[usize::from(endpoint)];
            let within_share = *held < each || (*held == each && larger > 0);
            if owners[usize::from(slot)].is_some() || !within_share {
                continue;
            }
            if *held == each {
                larger -= 1;
            }
            *held += 1;
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

/// The index of the label that wins `name` by rendezvous: for the few names that are not spread over slots.
pub(crate) fn winner(name: &str, labels: &[String]) -> Option<usize> {
    let seed = xxh3_64(name.as_bytes());
    (0..labels.len()).max_by_key(|&index| xxh3_64_with_seed(labels[index].as_bytes(), seed))
}

/// What the names of entries, and of what the bus keeps, begin with; copies and the buckets of limits have others.
pub(crate) const PREFIX: &str = "tg:{";

/// The name of an entry in Redis: `tg:{region:slot}:` and the first 16 bytes of its digest in hexadecimal. The braces are the
/// hash tag of Redis Cluster, which keeps a slot on one node. The envelope repeats the whole digest.
pub(crate) fn redis_key(region: &Region, slot: Slot, digest: &Digest) -> String {
    named_by("tg:", region, slot, digest)
}

/// The name of a copy of a hot entry in the given slot: `tg:hot:{region:slot}:` and the same digest. Changes of such names are not told.
pub(crate) fn copy_key(region: &Region, slot: Slot, digest: &Digest) -> String {
    named_by("tg:hot:", region, slot, digest)
}

fn named_by(prefix: &str, region: &Region, slot: Slot, digest: &Digest) -> String {
    let mut key = String::with_capacity(88);
    write!(key, "{prefix}{{{region}:{slot}}}:").expect("writing to a string does not fail");
    for byte in &digest.as_bytes()[..16] {
        write!(key, "{byte:02x}").expect("writing to a string does not fail");
    }
    key
}

/// The hash tag in a name, which decides where a cluster keeps it.
pub(crate) fn tag_in(name: &str) -> Option<&str> {
    Some(name.split_once('{')?.1.split_once('}')?.0)
}

/// The beginning of the digest in an entry's name in Redis (`Digest::beginning`).
pub(crate) fn named(key: &[u8]) -> Option<u64> {
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

    fn named(slots: &Slots, labels: &[String]) -> Vec<String> {
        slots.owners.iter().map(|&owner| labels[usize::from(owner)].clone()).collect()
    }

    #[test]
    fn placement_does_not_change_between_releases() {
        let mut builder = KeyBuilder::new();
        let key = builder.part(b"GET").part(b"example.org").part(b"/").key();
        let slot = Slot::of(&key, SLOTS);
        let name = redis_key(&Region::DEFAULT, slot, &key.digest(&Region::DEFAULT));
        assert_eq!(name, "tg:{default:11}:42965117f2d78962591e89f6a67d10af");
        assert_eq!(tag_in(&name), Some("default:11"));
        assert_eq!(Slots::spread(SLOTS, &labels(3)).owners, [0, 1, 0, 1, 2, 2, 1, 1, 1, 0, 2, 0, 0, 0, 2, 2]);
    }

    #[test]
    fn every_slot_of_a_region_is_used() {
        let mut builder = KeyBuilder::new();
        let mut seen = [0u32; SLOTS as usize];
        for n in 0u32..1_600 {
            let key = builder.clear().part(&n.to_le_bytes()).key();
            seen[usize::from(Slot::of(&key, SLOTS).0)] += 1;
        }
        assert!(seen.iter().all(|&n| (60..140).contains(&n)), "{seen:?}");
    }

    proptest! {
        #[test]
        fn shares_are_even_within_one(slots in 1u16..200, n in 1usize..20) {
            let spread = Slots::spread(slots, &labels(n));
            let held: Vec<usize> = (0..n).map(|e| spread.owners.iter().filter(|&&o| usize::from(o) == e).count()).collect();
            prop_assert!(held.iter().max().unwrap() - held.iter().min().unwrap() <= 1, "{:?}", held);
        }

        #[test]
        fn order_in_the_configuration_does_not_matter(slots in 1u16..100, n in 1usize..12, turn in 0usize..12) {
            let (straight, mut turned) = (labels(n), labels(n));
            turned.rotate_left(turn % n);
            prop_assert_eq!(named(&Slots::spread(slots, &straight), &straight), named(&Slots::spread(slots, &turned), &turned));
        }

        /// The unavoidable movement when an endpoint joins is `slots / (n + 1)`; evenness costs some more.
        #[test]
        fn a_new_endpoint_moves_few_slots(n in 1usize..15) {
            let (before, after) = (labels(n), labels(n + 1));
            let (old, new) = (named(&Slots::spread(128, &before), &before), named(&Slots::spread(128, &after), &after));
            let moved = old.iter().zip(&new).filter(|(a, b)| a != b).count();
            prop_assert!(moved <= 3 * 128_usize.div_ceil(n + 1), "{} moved", moved);
        }
    }
}
