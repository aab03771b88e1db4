//! Tokens that this thread has seen lately and what they came to, so that a token is verified once and not with every request;
//! and how many bad ones are looked at.
//!
//! Tokens are kept as keyed hashes of 128 bits, which nobody can aim at without the key. Invariants: the tables have a fixed
//! size; what is bad never displaces what is good; what a signature has not vouched for is never in the table of the good.

use std::hash::{BuildHasher as _, RandomState};
use std::num::{NonZeroU32, NonZeroUsize};

use limiter::bucket::{Cell, Gcra, Table as Buckets};
use limiter::{Cost, KeyHash, Moment, Quota, Rate};

/// Tokens of users that are active on one thread: at 96 bytes each they take less than half a mebibyte.
const GOOD_MAX: usize = 4_096;
/// Bad ones repeat because one client is broken; a flood of different ones finds nothing here anyway.
const BAD_MAX: usize = 1_024;
/// A set is looked through on every lookup: few enough for that, and enough that hashes spread evenly over sets.
const WAYS: usize = 8;
/// Addresses with bad tokens that are told apart at a time.
const ADDRESSES: NonZeroUsize = NonZeroUsize::new(1_024).expect("not zero");

/// Bad signatures per second that one address (IPv6: one /64) may have verified, and at once. A client with an old token sends
/// the same one again, which costs nothing: more is somebody who guesses.
const BAD_PER_ADDRESS: (u64, u32) = (10, 50);
/// Those of all addresses together: at 50 to 150 us each they take 5 to 15 % of a thread. Only bad signatures count against
/// these two, so that good tokens are verified however many there are; while a flood lasts, new ones are not, old ones are known.
const BAD_PER_THREAD: (u64, u32) = (1_000, 1_000);

/// The hash of a whole token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Digest(u128);

/// What one thread knows.
pub(super) struct Seen<G, B> {
    /// The configuration that it is about.
    generation: u64,
    key: [u8; 32],
    /// Until a wall time in seconds.
    pub(super) good: Table<G>,
    /// Until a moment in nanoseconds: a jump of the wall clock prolongs nothing.
    pub(super) bad: Table<B>,
    pub(super) budget: Budget,
}

impl<G, B> Default for Seen<G, B> {
    fn default() -> Self {
        Seen {
            generation: 0,
            key: random_key(),
            good: Table::new(GOOD_MAX),
            bad: Table::new(BAD_MAX),
            budget: Budget::default(),
        }
    }
}

impl<G, B> Seen<G, B> {
    /// Forgets what was seen under another configuration: other keys, other claims.
    pub(super) fn under(&mut self, generation: u64) -> &mut Self {
        if self.generation != generation {
            self.generation = generation;
            self.good = Table::new(GOOD_MAX);
            self.bad = Table::new(BAD_MAX);
        }
        self
    }

    pub(super) fn digest(&self, token: &[u8]) -> Digest {
        let hash = blake3::keyed_hash(&self.key, token);
        let half: [u8; 16] = hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes");
        Digest(u128::from_le_bytes(half))
    }
}

/// A key of 128 bits of the system's randomness, which the standard library keys its hash tables with.
fn random_key() -> [u8; 32] {
    let state = RandomState::new();
    let words: Vec<u8> = (0..4u64).flat_map(|word| state.hash_one(word).to_le_bytes()).collect();
    blake3::derive_key("tidegate identify 1: tokens seen", &words)
}

struct Slot<V> {
    digest: Digest,
    until: u64,
    used: u64,
    value: V,
}

/// A fixed number of values, each good until a time; in a full set the one that was asked for least recently gives way.
pub(super) struct Table<V> {
    slots: Vec<Option<Slot<V>>>,
    uses: u64,
}

impl<V> Table<V> {
    fn new(slots: usize) -> Self {
        Table { slots: std::iter::repeat_with(|| None).take(slots).collect(), uses: 0 }
    }

    /// The value, and until when it is good, which may be over.
    pub(super) fn get(&mut self, digest: Digest) -> Option<(&V, u64)> {
        self.uses += 1;
        let uses = self.uses;
        let slot = self.set(digest).iter_mut().flatten().find(|slot| slot.digest == digest)?;
        slot.used = uses;
        Some((&slot.value, slot.until))
    }

    pub(super) fn put(&mut self, digest: Digest, until: u64, value: V) {
        self.uses += 1;
        let slot = Slot { digest, until, used: self.uses, value };
        let set = self.set(digest);
        let same = set.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.digest == digest));
        let oldest = || (0..set.len()).min_by_key(|at| set[*at].as_ref().map_or(0, |slot| slot.used)).unwrap_or(0);
        let at = same.unwrap_or_else(oldest);
        set[at] = Some(slot);
    }

    fn set(&mut self, digest: Digest) -> &mut [Option<Slot<V>>] {
        let sets = (self.slots.len() / WAYS) as u128;
        let begin = (digest.0 % sets) as usize * WAYS;
        &mut self.slots[begin..begin + WAYS]
    }
}

/// By whom there is nothing left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spent {
    ByAddress,
    ByAll,
}

/// How many bad signatures are looked at: narrow before wide, so that one address does not use up what is everybody's.
pub(super) struct Budget {
    addresses: Buckets,
    all: Cell,
    per_address: Gcra,
    per_thread: Gcra,
}

impl Default for Budget {
    fn default() -> Self {
        let gcra = |(rate, burst): (u64, u32)| {
            let burst = NonZeroU32::new(burst).expect("a constant above zero");
            let rate = Rate::new(rate, 1).expect("a constant within the limiter's range");
            Gcra::new(Quota::new(rate, burst).expect("a constant within the limiter's range"))
        };
        Budget {
            addresses: Buckets::new(ADDRESSES),
            all: Cell::default(),
            per_address: gcra(BAD_PER_ADDRESS),
            per_thread: gcra(BAD_PER_THREAD),
        }
    }
}

impl Budget {
    /// Says whose bad signatures were too many, if a signature from this address may not be verified at the risk that it is bad.
    pub(super) fn allows(&self, address: KeyHash, now: Moment) -> Result<(), Spent> {
        let one = Cost::new(NonZeroU32::MIN);
        if self.addresses.peek(address, &self.per_address, one, now).is_err() {
            Err(Spent::ByAddress)
        } else if self.all.peek(&self.per_thread, one, now).is_err() {
            Err(Spent::ByAll)
        } else {
            Ok(())
        }
    }

    /// Charges one bad signature.
    pub(super) fn charge(&self, address: KeyHash, now: Moment) {
        let one = Cost::new(NonZeroU32::MIN);
        // Where nothing is left there is nothing to take: it was verified because another key may fit.
        let _charged =
            (self.addresses.commit(address, &self.per_address, one, now), self.all.commit(&self.per_thread, one, now));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn tables_keep_their_size_and_what_was_used_last() {
        let mut table = Table::new(GOOD_MAX);
        let digests: Vec<Digest> = (0..WAYS as u128 + 1).map(|n| Digest(n * (GOOD_MAX / WAYS) as u128)).collect();
        for (value, digest) in digests[..WAYS].iter().enumerate() {
            table.put(*digest, 7, value);
        }
        assert_eq!(table.get(digests[0]), Some((&0, 7)));
        table.put(digests[WAYS], 7, WAYS);
        assert_eq!(table.get(digests[1]), None, "the least recent gave way");
        assert_eq!(table.get(digests[0]), Some((&0, 7)));
        table.put(digests[0], 9, 42);
        assert_eq!(table.get(digests[0]), Some((&42, 9)));
        for n in 0..100_000u128 {
            table.put(Digest(n.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)), 7, 0);
        }
        assert_eq!(table.slots.len(), GOOD_MAX);
    }

    #[test]
    fn bad_signatures_of_one_address_are_few_and_cost_others_nothing() {
        let budget = Budget::default();
        let spend = |address: u64, now: Moment| {
            let mut spent = 0;
            while budget.allows(KeyHash(address), now).is_ok() {
                budget.charge(KeyHash(address), now);
                spent += 1;
            }
            spent
        };
        let now = Moment::ORIGIN + Duration::from_secs(60);
        assert_eq!((spend(1, now), spend(1, now), spend(2, now)), (50, 0, 50));
        assert_eq!(spend(1, now + Duration::from_secs(1)), 10);
        let all: usize = (3..200).map(|address| spend(address, now + Duration::from_secs(1))).sum();
        assert_eq!(all, 990, "what all may spend");
    }

    #[test]
    fn each_thread_has_a_key_of_its_own_and_a_reload_forgets() {
        let (mut one, other): (Seen<u8, u8>, Seen<u8, u8>) = Default::default();
        let digest = one.digest(b"token");
        assert_ne!(digest, other.digest(b"token"));
        assert_ne!(digest, one.digest(b"tokem"));
        one.under(1).good.put(digest, 1, 1);
        assert!(one.under(1).good.get(digest).is_some() && one.under(2).good.get(digest).is_none());
        assert_eq!(one.digest(b"token"), digest);
    }
}
