//! Per-thread cache of token verification results, and the budget of invalid signatures.
//!
//! With the cache, a token is verified once per thread and not on every request. Its key is a keyed
//! 128-bit hash of the token, so that clients cannot construct collisions. Invariants: the tables
//! have a fixed size; a rejected token never evicts an accepted one; the table of accepted tokens
//! contains only tokens with a verified signature.

use std::hash::{BuildHasher as _, RandomState};
use std::num::{NonZeroU32, NonZeroUsize};

use limiter::bucket::{Gcra, GcraCell, GcraTable};
use limiter::{Cost, KeyHash, MonotonicTime, Quota, Rate};

/// Accepted tokens per thread, one per active user. At 96 bytes each they take less than 0.5 MiB.
const ACCEPTED_MAX: usize = 4_096;
/// Rejected tokens per thread. They repeat when one client is misconfigured; a flood of distinct
/// tokens never hits.
const REJECTED_MAX: usize = 1_024;
/// Associativity. A lookup scans a whole set: few enough slots for a scan, enough for an even load
/// of the sets.
const WAYS: usize = 8;
/// Addresses with invalid tokens that are tracked at a time.
const TRACKED_ADDRESSES: NonZeroUsize = NonZeroUsize::new(1_024).expect("not zero");

/// Rate (per second) and burst of invalid signatures that are verified for one address (IPv6: one
/// /64). A client with an outdated token repeats the same token, which the cache answers; more
/// distinct tokens indicate guessing.
const INVALID_PER_ADDRESS: (u64, u32) = (10, 50);
/// Rate and burst for all addresses together: at 50 to 150 us each they take 5 to 15 % of a thread.
/// Only invalid signatures are charged to the two budgets, so the number of valid tokens is not
/// limited. While a budget is exhausted, new tokens are not verified; cached ones still work.
const INVALID_PER_THREAD: (u64, u32) = (1_000, 1_000);

/// Keyed hash of a whole token, or of other credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TokenDigest(u128);

/// Computes digests with a random key.
pub(super) struct TokenHasher {
    key: [u8; 32],
}

impl Default for TokenHasher {
    fn default() -> Self {
        TokenHasher { key: random_key() }
    }
}

impl TokenHasher {
    pub(super) fn digest(&self, token: &[u8]) -> TokenDigest {
        let hash = blake3::keyed_hash(&self.key, token);
        let half: [u8; 16] = hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes");
        TokenDigest(u128::from_le_bytes(half))
    }
}

/// The rules and the key set by which a token was verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CacheGeneration {
    /// Digest of the rules of verification and of what is read from the claims.
    pub(super) rules: u128,
    /// Digest of the key set.
    pub(super) keys: u128,
}

/// Verification results of one thread.
pub(super) struct VerifiedTokenCache<G, B> {
    generation: CacheGeneration,
    hasher: TokenHasher,
    /// Expiry in Unix seconds.
    pub(super) accepted: TokenTable<G>,
    /// Expiry in monotonic nanoseconds, so that a jump of the wall clock extends no entry.
    pub(super) rejected: TokenTable<B>,
    pub(super) budget: VerificationBudget,
}

impl<G, B> Default for VerifiedTokenCache<G, B> {
    fn default() -> Self {
        VerifiedTokenCache {
            generation: CacheGeneration::default(),
            hasher: TokenHasher::default(),
            accepted: TokenTable::new(ACCEPTED_MAX),
            rejected: TokenTable::new(REJECTED_MAX),
            budget: VerificationBudget::default(),
        }
    }
}

impl<G, B> VerifiedTokenCache<G, B> {
    /// Clears the results that no longer apply: all of them with other rules, the rejections with
    /// other keys. Whether the key of an accepted token is still in the set is left to the caller.
    pub(super) fn for_generation(&mut self, generation: CacheGeneration) -> &mut Self {
        if self.generation != generation {
            if self.generation.rules != generation.rules {
                self.accepted = TokenTable::new(ACCEPTED_MAX);
            }
            self.rejected = TokenTable::new(REJECTED_MAX);
            self.generation = generation;
        }
        self
    }

    pub(super) fn digest(&self, token: &[u8]) -> TokenDigest {
        self.hasher.digest(token)
    }
}

/// A key from 128 bits of system randomness, the seed of the standard library's hash tables.
fn random_key() -> [u8; 32] {
    let state = RandomState::new();
    let words: Vec<u8> = (0..4u64).flat_map(|word| state.hash_one(word).to_le_bytes()).collect();
    blake3::derive_key("tidegate identify 1: tokens seen", &words)
}

/// One cached value with the digest of its token, its expiry in the time unit of its table, and its
/// last use for LRU eviction.
struct TokenSlot<V> {
    digest: TokenDigest,
    expires_at: u64,
    last_used: u64,
    value: V,
}

/// Set-associative table of fixed size whose values expire. A full set evicts its least recently
/// used slot.
pub(super) struct TokenTable<V> {
    slots: Vec<Option<TokenSlot<V>>>,
    uses: u64,
}

impl<V> TokenTable<V> {
    /// `slots` is a multiple of `WAYS`.
    pub(super) fn new(slots: usize) -> Self {
        TokenTable { slots: std::iter::repeat_with(|| None).take(slots).collect(), uses: 0 }
    }

    /// The value and its expiry, which may have passed.
    pub(super) fn get(&mut self, digest: TokenDigest) -> Option<(&V, u64)> {
        self.uses += 1;
        let uses = self.uses;
        let slot = self.set(digest).iter_mut().flatten().find(|slot| slot.digest == digest)?;
        slot.last_used = uses;
        Some((&slot.value, slot.expires_at))
    }

    pub(super) fn put(&mut self, digest: TokenDigest, expires_at: u64, value: V) {
        self.uses += 1;
        let slot = TokenSlot { digest, expires_at, last_used: self.uses, value };
        let set = self.set(digest);
        let existing = set.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.digest == digest));
        let oldest = || (0..set.len()).min_by_key(|at| set[*at].as_ref().map_or(0, |slot| slot.last_used)).unwrap_or(0);
        let at = existing.unwrap_or_else(oldest);
        set[at] = Some(slot);
    }

    fn set(&mut self, digest: TokenDigest) -> &mut [Option<TokenSlot<V>>] {
        let sets = (self.slots.len() / WAYS) as u128;
        let begin = (digest.0 % sets) as usize * WAYS;
        &mut self.slots[begin..begin + WAYS]
    }
}

/// The budget that is exhausted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExhaustedBudget {
    Address,
    Thread,
}

/// Limits the verification of invalid signatures: first per address, then per thread, so that one
/// address cannot exhaust the shared budget.
pub(super) struct VerificationBudget {
    addresses: GcraTable,
    thread: GcraCell,
    per_address: Gcra,
    per_thread: Gcra,
}

impl Default for VerificationBudget {
    fn default() -> Self {
        let gcra = |(rate, burst): (u64, u32)| {
            let burst = NonZeroU32::new(burst).expect("a constant above zero");
            let rate = Rate::new(rate, 1).expect("a constant within the limiter's range");
            Gcra::new(Quota::new(rate, burst).expect("a constant within the limiter's range"))
        };
        VerificationBudget {
            addresses: GcraTable::new(TRACKED_ADDRESSES),
            thread: GcraCell::default(),
            per_address: gcra(INVALID_PER_ADDRESS),
            per_thread: gcra(INVALID_PER_THREAD),
        }
    }
}

impl VerificationBudget {
    /// Checks whether another signature from this address may be verified; it could turn out
    /// invalid.
    ///
    /// # Errors
    /// The exhausted budget.
    pub(super) fn check(&self, address: KeyHash, now: MonotonicTime) -> Result<(), ExhaustedBudget> {
        let one = Cost::new(NonZeroU32::MIN);
        if self.addresses.peek(address, &self.per_address, one, now).is_err() {
            Err(ExhaustedBudget::Address)
        } else if self.thread.peek(&self.per_thread, one, now).is_err() {
            Err(ExhaustedBudget::Thread)
        } else {
            Ok(())
        }
    }

    /// Charges one invalid signature.
    pub(super) fn charge(&self, address: KeyHash, now: MonotonicTime) {
        let one = Cost::new(NonZeroU32::MIN);
        // The commit fails if the budget is exhausted meanwhile: a token is verified with each
        // candidate key, but checked once.
        let _charged = (
            self.addresses.commit(address, &self.per_address, one, now),
            self.thread.commit(&self.per_thread, one, now),
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn tables_keep_their_size_and_evict_least_recently_used() {
        let mut table = TokenTable::new(ACCEPTED_MAX);
        let digests: Vec<TokenDigest> =
            (0..WAYS as u128 + 1).map(|n| TokenDigest(n * (ACCEPTED_MAX / WAYS) as u128)).collect();
        for (value, digest) in digests[..WAYS].iter().enumerate() {
            table.put(*digest, 7, value);
        }
        assert_eq!(table.get(digests[0]), Some((&0, 7)));
        table.put(digests[WAYS], 7, WAYS);
        assert_eq!(table.get(digests[1]), None, "the least recently used is evicted");
        assert_eq!(table.get(digests[0]), Some((&0, 7)));
        table.put(digests[0], 9, 42);
        assert_eq!(table.get(digests[0]), Some((&42, 9)));
        for n in 0..100_000u128 {
            table.put(TokenDigest(n.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)), 7, 0);
        }
        assert_eq!(table.slots.len(), ACCEPTED_MAX);
    }

    #[test]
    fn budget_of_one_address_does_not_affect_others() {
        let budget = VerificationBudget::default();
        let spend = |address: u128, now: MonotonicTime| {
            let mut spent = 0;
            while budget.check(KeyHash(address), now).is_ok() {
                budget.charge(KeyHash(address), now);
                spent += 1;
            }
            spent
        };
        let now = MonotonicTime::ORIGIN + Duration::from_secs(60);
        assert_eq!((spend(1, now), spend(1, now), spend(2, now)), (50, 0, 50));
        assert_eq!(spend(1, now + Duration::from_secs(1)), 10);
        let all: usize = (3..200).map(|address| spend(address, now + Duration::from_secs(1))).sum();
        assert_eq!(all, 990, "the budget of the thread");
    }

    #[test]
    fn keys_differ_per_thread_and_a_new_generation_clears_tables() {
        let (mut one, other): (VerifiedTokenCache<u8, u8>, VerifiedTokenCache<u8, u8>) = Default::default();
        let digest = one.digest(b"token");
        assert_ne!(digest, other.digest(b"token"));
        assert_ne!(digest, one.digest(b"tokem"));
        let at = |rules, keys| CacheGeneration { rules, keys };
        one.for_generation(at(1, 1)).accepted.put(digest, 1, 1);
        one.for_generation(at(1, 1)).rejected.put(digest, 1, 1);
        assert!(one.for_generation(at(1, 1)).rejected.get(digest).is_some());
        let other_keys = one.for_generation(at(1, 2));
        assert!(other_keys.accepted.get(digest).is_some() && other_keys.rejected.get(digest).is_none());
        assert!(one.for_generation(at(2, 2)).accepted.get(digest).is_none());
        assert_eq!(one.digest(b"token"), digest);
    }
}
