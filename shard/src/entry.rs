//! Owns a stored response: its metadata, its body, its time to live, and whether it is still valid.
//!
//! Ages are measured with the monotonic clock of this process. Entries written for other nodes are
//! dated, and entries read from them are aged, by the clock of the server that holds them (see
//! `clock`), with a tolerance of 1.5 s.
//!
//! Refuses to judge freshness: the gateway does that from `meta`.
//! Invariant: a retired entry never becomes valid again.

mod compression;
mod epochs;
mod envelope;

pub use compression::Compression;
pub(crate) use envelope::{CompressionConfig, EnvelopeCodec, EnvelopeError, MAC_RANGE, REVISION_BYTES};
pub use epochs::{EpochSnapshot, Purge, PurgeScope};
pub(crate) use epochs::{InvalidationEpochs, PurgeStatus, TAGS_MAX, UNNUMBERED};

use crate::clock::{CLOCK_TOLERANCE, ClockReading};
use crate::key::Tag;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Upper bound of `ttl`: an entry that was not validated for a year may be fetched again, and
/// `Instant` arithmetic cannot overflow.
pub(crate) const TTL_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// Metadata that the gateway stores with a body.
pub trait EntryMeta: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Version of the serialised form, to be increased with every change of it. Entries of another
    /// version are misses, so that a fleet may run two releases at once.
    const SCHEMA: u16;

    /// Approximate size on the heap; charged to the local cache besides the body.
    fn heap_bytes(&self) -> usize;

    /// Tags that the entry can be purged by.
    fn tags(&self) -> &[Tag];

    /// Whether compression is likely to shrink the body.
    fn is_compressible(&self) -> bool;
}

/// A stored response: metadata, body and lifetime, and the validity state that threads share
/// through atomics.
#[derive(Debug)]
pub struct Entry<M> {
    pub meta: M,
    pub body: Bytes,
    /// Time to live from storing until removal, stale windows included. Whole milliseconds.
    pub ttl: Duration,
    /// Bytes charged to the local cache.
    pub weight: u32,
    stored_here_at: Instant,
    age_when_stored_here: Duration,
    expires_at: Instant,
    fill_epoch: Option<EpochSnapshot>,
    location: Option<EntryLocation>,
    is_live: AtomicBool,
    /// The last generation in which the entry was found valid.
    valid_in_generation: AtomicU64,
    soft_purged_at: OnceLock<Instant>,
    had_subscription_gap: AtomicBool,
    /// Revision of the entry at its shard, taken from the envelope's MAC; 0 if unknown.
    revision: AtomicU64,
}

/// The content of an entry to be created.
pub(crate) struct EntryParts<M> {
    pub(crate) meta: M,
    pub(crate) body: Bytes,
    pub(crate) ttl: Duration,
}

/// Shard index and digest prefix of an entry, by which an invalidation from its server finds the
/// local copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryLocation {
    pub(crate) shard: usize,
    /// The first 8 bytes of its digest.
    pub(crate) digest_prefix: u64,
}

/// Why an entry must be validated before use: it was soft-purged, or invalidations of its shard may
/// have been missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaleReason {
    /// Soft-purged this long ago: stale, usable while it is validated and for a failing origin.
    SoftPurged(Duration),
    /// Invalidations of its shard may have been missed: it must be validated first, and is usable
    /// for a failing origin.
    SubscriptionGap,
}

impl<M: EntryMeta> Entry<M> {
    /// Creates an entry for a response that was complete at `now`.
    pub fn new(meta: M, body: Bytes, ttl: Duration, now: Instant) -> Self {
        Self::with_age(EntryParts { meta, body, ttl }, Duration::ZERO, now)
    }

    /// Creates an entry that another node stored, unless it has expired by the clock of its server.
    /// An entry dated further in the future than clocks may differ has no reliable age and counts
    /// as expired.
    pub(crate) fn from_remote(parts: EntryParts<M>, stored_unix_ms: u64, now: ClockReading) -> Option<Self> {
        let ttl = parts.ttl.min(TTL_MAX);
        let ahead = Duration::from_millis(stored_unix_ms.saturating_sub(now.unix_ms));
        let age = Duration::from_millis(now.unix_ms.saturating_sub(stored_unix_ms));
        let is_expired = age >= ttl + CLOCK_TOLERANCE || ahead > CLOCK_TOLERANCE;
        (!is_expired).then(|| Self::with_age(parts, age, now.instant))
    }

    fn with_age(EntryParts { meta, body, ttl }: EntryParts<M>, age: Duration, now: Instant) -> Self {
        let ttl = Duration::from_millis(ttl.min(TTL_MAX).as_millis() as u64);
        let weight = allocated(body.len()) + allocated(meta.heap_bytes()) + size_of::<Self>();
        // An age within the tolerance may be nothing but clock difference.
        let remaining = ttl.saturating_sub(age.saturating_sub(CLOCK_TOLERANCE));
        Self {
            meta,
            body,
            ttl,
            weight: u32::try_from(weight).unwrap_or(u32::MAX),
            stored_here_at: now,
            age_when_stored_here: age,
            expires_at: now + remaining,
            fill_epoch: None,
            location: None,
            is_live: AtomicBool::new(true),
            valid_in_generation: AtomicU64::new(0),
            soft_purged_at: OnceLock::new(),
            had_subscription_gap: AtomicBool::new(false),
            revision: AtomicU64::new(0),
        }
    }

    /// Sets when the fill of this entry began: the entry is not stored if its key was deleted or
    /// one of its tags purged since then.
    #[must_use]
    pub fn with_fill_epoch(self, fill_epoch: EpochSnapshot) -> Self {
        Self { fill_epoch: Some(fill_epoch), valid_in_generation: AtomicU64::new(fill_epoch.generation()), ..self }
    }

    pub(crate) fn with_location(self, location: Option<EntryLocation>) -> Self {
        Self { location, ..self }
    }

    /// Whether the entry is still valid in `generation`. The result of checking the purges is
    /// recorded for later calls in the same generation.
    pub(crate) fn is_valid(&self, epochs: &InvalidationEpochs, generation: u64) -> bool {
        if !self.is_live() {
            return false;
        }
        let valid_in_generation = self.valid_in_generation.load(Ordering::Acquire);
        valid_in_generation >= generation || self.check_purges(epochs, generation)
    }

    #[cold]
    fn check_purges(&self, epochs: &InvalidationEpochs, generation: u64) -> bool {
        let began = self.fill_epoch.map_or(0, EpochSnapshot::generation);
        match epochs.purge_status(self.meta.tags(), began) {
            PurgeStatus::Purged => {
                self.retire();
                return false;
            }
            PurgeStatus::SoftPurged(at) => _ = self.soft_purged_at.get_or_init(|| at),
            PurgeStatus::Unaffected => {}
        }
        if self.location.is_some_and(|location| epochs.had_subscription_gap(location.shard, began)) {
            self.had_subscription_gap.store(true, Ordering::Relaxed);
        }
        self.valid_in_generation.fetch_max(generation, Ordering::AcqRel);
        true
    }
}

/// Size of an allocation for this many bytes: four size classes for each doubling, as in jemalloc.
fn allocated(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 8).max(16);
    bytes.next_multiple_of(step)
}

impl<M> Entry<M> {
    /// Time since the entry was stored by any node.
    pub fn age(&self, now: Instant) -> Duration {
        self.age_when_stored_here + now.saturating_duration_since(self.stored_here_at)
    }

    /// Time until the entry expires.
    pub fn remaining(&self, now: Instant) -> Duration {
        self.expires_at.saturating_duration_since(now)
    }

    /// False once the local cache has released the entry: replaced, deleted, evicted or expired.
    pub fn is_live(&self) -> bool {
        self.is_live.load(Ordering::Relaxed)
    }

    /// Invalidates the entry in all threads' tables: each finds the flag at its next lookup.
    pub fn retire(&self) {
        self.is_live.store(false, Ordering::Relaxed);
    }

    /// Why the entry may not be used as if it were fresh.
    pub fn stale_reason(&self, now: Instant) -> Option<StaleReason> {
        if self.had_subscription_gap.load(Ordering::Relaxed) {
            return Some(StaleReason::SubscriptionGap);
        }
        self.soft_purged_at.get().map(|at| StaleReason::SoftPurged(now.saturating_duration_since(*at)))
    }

    pub(crate) fn mark_soft_purged(&self, at: Instant) {
        self.soft_purged_at.get_or_init(|| at);
    }

    pub(crate) fn location(&self) -> Option<EntryLocation> {
        self.location
    }

    pub(crate) fn revision(&self) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    pub(crate) fn set_revision(&self, revision: u64) {
        self.revision.store(revision, Ordering::Relaxed);
    }

    pub(crate) fn expires_at(&self) -> Instant {
        self.expires_at
    }

    pub(crate) fn fill_epoch(&self) -> Option<EpochSnapshot> {
        self.fill_epoch
    }

    /// Whether the fill of this entry began after another one.
    pub fn is_younger_than(&self, fill_epoch: EpochSnapshot) -> bool {
        self.fill_epoch.is_some_and(|own| own.began() > fill_epoch.began())
    }

    pub(crate) fn set_expires_at(&mut self, expires_at: Instant) {
        self.expires_at = expires_at;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Serialize, Deserialize, PartialEq, Clone, Debug)]
    pub(crate) struct TestMeta(pub(crate) String);

    impl EntryMeta for TestMeta {
        const SCHEMA: u16 = 1;

        fn heap_bytes(&self) -> usize {
            self.0.capacity()
        }

        fn tags(&self) -> &[Tag] {
            &[]
        }

        fn is_compressible(&self) -> bool {
            self.0 == "compressible"
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    fn from_remote(ttl: Duration, stored: u64, now: ClockReading) -> Option<Entry<TestMeta>> {
        Entry::from_remote(EntryParts { meta: TestMeta(String::new()), body: Bytes::new(), ttl }, stored, now)
    }

    #[test]
    fn entry_past_its_ttl_and_tolerance_is_rejected() {
        let now = ClockReading::from_system();
        assert!(from_remote(10 * SECOND, now.unix_ms - 11_500, now).is_none());
        assert!(from_remote(Duration::MAX, 0, ClockReading { unix_ms: u64::MAX, ..now }).is_none());
    }

    #[test]
    fn future_date_is_accepted_within_the_tolerance() {
        let now = ClockReading::from_system();
        let entry = from_remote(10 * SECOND, now.unix_ms + 1_500, now).unwrap();
        assert_eq!((entry.age(now.instant), entry.remaining(now.instant)), (Duration::ZERO, 10 * SECOND));
        assert!(from_remote(10 * SECOND, now.unix_ms + 1_501, now).is_none());
    }

    #[test]
    fn short_lived_entry_survives_clocks_that_differ_by_1200_ms() {
        let now = ClockReading::from_system();
        let entry = from_remote(SECOND, now.unix_ms - 1_200, now).unwrap();
        assert_eq!(entry.remaining(now.instant), SECOND);
    }

    #[test]
    fn age_continues_across_nodes() {
        let now = ClockReading::from_system();
        let entry = from_remote(60 * SECOND, now.unix_ms - 10_000, now).unwrap();
        assert_eq!(entry.age(now.instant + 5 * SECOND), 15 * SECOND);
        assert_eq!(entry.remaining(now.instant + 5 * SECOND), Duration::from_millis(46_500));
    }

    #[test]
    fn retired_entry_stays_retired() {
        let entry = Entry::new(TestMeta("x".into()), Bytes::new(), SECOND, Instant::now());
        assert!(entry.is_live());
        entry.retire();
        assert!(!entry.is_live());
    }

    #[test]
    fn ttl_is_capped_at_one_year() {
        let now = Instant::now();
        assert_eq!(Entry::new(TestMeta(String::new()), Bytes::new(), Duration::MAX, now).remaining(now), TTL_MAX);
    }
}
