//! Owns a stored response: what the gateway knows about it, its body, how long it is worth keeping, and whether it still counts.
//!
//! Ages are measured on the monotonic clock of this process. An entry is dated for other nodes, and one that came from them is aged, by
//! the clock of the server that holds it (see `clock`), with 1.5 s of tolerance.
//!
//! Refuses to judge freshness: that is the gateway's, from `meta`.
//! Invariant: an entry that was retired never counts again.

mod compression;
mod envelope;
mod epochs;

pub use compression::Compression;
pub(crate) use envelope::{Corrupt, EDITION_BYTES, Packing, Seal};
pub(crate) use epochs::{Epochs, Judgement, TAGS_MAX, UNNUMBERED};
pub use epochs::{Purge, Scope, Since};

use crate::clock::{CLOCK_TOLERANCE, Now};
use crate::key::Tag;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longer is cut: what nobody has asked to validate for a year may be fetched again, and instants cannot overflow.
pub(crate) const KEEP_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// What the gateway stores beside a body.
pub trait Meta: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The version of the serialised form, to be raised with every change of it: entries of another version are misses, so that
    /// a fleet may run two releases at once.
    const SCHEMA: u16;

    /// Bytes held on the heap, approximately: they are charged to the local tier beside the body.
    fn heap_bytes(&self) -> usize;

    /// What it can be purged by.
    fn tags(&self) -> &[Tag];

    /// Whether compressing its body is likely to save anything.
    fn is_compressible(&self) -> bool;
}

/// A stored response.
#[derive(Debug)]
pub struct Entry<M> {
    pub meta: M,
    pub body: Bytes,
    /// From storing until it is useless, stale windows included. Whole milliseconds.
    pub keep: Duration,
    /// Bytes charged to the local tier.
    pub weight: u32,
    arrived: Instant,
    age_on_arrival: Duration,
    until: Instant,
    since: Option<Since>,
    home: Option<Home>,
    live: AtomicBool,
    /// The generation in which it was last found to count.
    checked: AtomicU64,
    softened: OnceLock<Instant>,
    is_suspect: AtomicBool,
    /// Of what the shard holds, as its seal says; 0 while it is not known.
    edition: AtomicU64,
}

/// Where an entry is stored beside this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Home {
    pub(crate) shard: usize,
    /// The beginning of its digest.
    pub(crate) name: u64,
}

/// Why an entry may not be what its shard, or the origin, would answer now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// Purged softly so long ago: stale, but good enough while it is validated and for a failing origin.
    Purged(Duration),
    /// Its shard was lost sight of and may have been told otherwise: to be validated first, good enough for a failing origin.
    Unwatched,
}

impl<M: Meta> Entry<M> {
    /// A response that was complete at `now`.
    pub fn new(meta: M, body: Bytes, keep: Duration, now: Instant) -> Self {
        Self::aged(meta, body, keep, Duration::ZERO, now)
    }

    /// An entry that another node stored, if its time is not over by the clock of its server. One dated further in the future than
    /// clocks may differ has no age that could be trusted, and counts as over.
    pub(crate) fn received(meta: M, body: Bytes, keep: Duration, stored_unix_ms: u64, now: Now) -> Option<Self> {
        let keep = keep.min(KEEP_MAX);
        let ahead = Duration::from_millis(stored_unix_ms.saturating_sub(now.unix_ms));
        let age = Duration::from_millis(now.unix_ms.saturating_sub(stored_unix_ms));
        let over = age >= keep + CLOCK_TOLERANCE || ahead > CLOCK_TOLERANCE;
        (!over).then(|| Self::aged(meta, body, keep, age, now.instant))
    }

    fn aged(meta: M, body: Bytes, keep: Duration, age: Duration, now: Instant) -> Self {
        let keep = Duration::from_millis(keep.min(KEEP_MAX).as_millis() as u64);
        let weight = allocated(body.len()) + allocated(meta.heap_bytes()) + size_of::<Self>();
        // An age within the tolerance may be nothing but the difference of two clocks.
        let remaining = keep.saturating_sub(age.saturating_sub(CLOCK_TOLERANCE));
        Self {
            meta,
            body,
            keep,
            weight: u32::try_from(weight).unwrap_or(u32::MAX),
            arrived: now,
            age_on_arrival: age,
            until: now + remaining,
            since: None,
            home: None,
            live: AtomicBool::new(true),
            checked: AtomicU64::new(0),
            softened: OnceLock::new(),
            is_suspect: AtomicBool::new(false),
            edition: AtomicU64::new(0),
        }
    }

    /// Says when the fill of this entry began: it is not stored if its key was removed, or one of its tags purged, after that.
    #[must_use]
    pub fn begun(self, since: Since) -> Self {
        Self { since: Some(since), checked: AtomicU64::new(since.generation()), ..self }
    }

    pub(crate) fn at_home(self, home: Option<Home>) -> Self {
        Self { home, ..self }
    }

    /// Whether it still counts in `generation`; what purges made of it is noted, so that the next to ask in this generation is
    /// told at once.
    pub(crate) fn counts(&self, epochs: &Epochs, generation: u64) -> bool {
        if !self.is_live() {
            return false;
        }
        let checked = self.checked.load(Ordering::Acquire);
        checked >= generation || self.is_still(epochs, generation)
    }

    #[cold]
    fn is_still(&self, epochs: &Epochs, generation: u64) -> bool {
        let began = self.since.map_or(0, Since::generation);
        match epochs.judge(self.meta.tags(), began) {
            Judgement::Dead => {
                self.retire();
                return false;
            }
            Judgement::Soft(at) => _ = self.softened.get_or_init(|| at),
            Judgement::Sound => {}
        }
        if self.home.is_some_and(|home| epochs.was_lost(home.shard, began)) {
            self.is_suspect.store(true, Ordering::Relaxed);
        }
        self.checked.fetch_max(generation, Ordering::AcqRel);
        true
    }
}

/// What an allocator takes for so many bytes: four sizes for each doubling, as in jemalloc's size classes.
fn allocated(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 8).max(16);
    bytes.next_multiple_of(step)
}

impl<M> Entry<M> {
    /// Time since it was stored, whichever node stored it.
    pub fn age(&self, now: Instant) -> Duration {
        self.age_on_arrival + now.saturating_duration_since(self.arrived)
    }

    /// Time until it is useless.
    pub fn remaining(&self, now: Instant) -> Duration {
        self.until.saturating_duration_since(now)
    }

    /// False once the local tier has let go of it: replaced, removed, evicted or expired.
    pub fn is_live(&self) -> bool {
        self.live.load(Ordering::Relaxed)
    }

    /// Takes it out of every thread's table: each finds the mark at its next look.
    pub fn retire(&self) {
        self.live.store(false, Ordering::Relaxed);
    }

    /// Why it may not be used as if it were fresh.
    pub fn doubt(&self, now: Instant) -> Option<Doubt> {
        if self.is_suspect.load(Ordering::Relaxed) {
            return Some(Doubt::Unwatched);
        }
        self.softened.get().map(|at| Doubt::Purged(now.saturating_duration_since(*at)))
    }

    pub(crate) fn soften(&self, at: Instant) {
        self.softened.get_or_init(|| at);
    }

    pub(crate) fn home(&self) -> Option<Home> {
        self.home
    }

    pub(crate) fn edition(&self) -> u64 {
        self.edition.load(Ordering::Relaxed)
    }

    pub(crate) fn set_edition(&self, edition: u64) {
        self.edition.store(edition, Ordering::Relaxed);
    }

    pub(crate) fn until(&self) -> Instant {
        self.until
    }

    pub(crate) fn since(&self) -> Option<Since> {
        self.since
    }

    pub(crate) fn expire_at(&mut self, until: Instant) {
        self.until = until;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Serialize, Deserialize, PartialEq, Clone, Debug)]
    pub(crate) struct Note(pub(crate) String);

    impl Meta for Note {
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

    fn received(keep: Duration, stored: u64, now: Now) -> Option<Entry<Note>> {
        Entry::received(Note(String::new()), Bytes::new(), keep, stored, now)
    }

    #[test]
    fn a_time_that_is_over_is_over() {
        let now = Now::read();
        assert!(received(10 * SECOND, now.unix_ms - 11_500, now).is_none());
        assert!(received(Duration::MAX, 0, Now { unix_ms: u64::MAX, ..now }).is_none());
    }

    #[test]
    fn a_date_in_the_future_is_believed_within_the_tolerance() {
        let now = Now::read();
        let entry = received(10 * SECOND, now.unix_ms + 1_500, now).unwrap();
        assert_eq!((entry.age(now.instant), entry.remaining(now.instant)), (Duration::ZERO, 10 * SECOND));
        assert!(received(10 * SECOND, now.unix_ms + 1_501, now).is_none());
    }

    #[test]
    fn two_clocks_1200_ms_apart_agree_on_a_short_lived_entry() {
        let now = Now::read();
        let entry = received(SECOND, now.unix_ms - 1_200, now).unwrap();
        assert_eq!(entry.remaining(now.instant), SECOND);
    }

    #[test]
    fn age_goes_on_from_where_the_other_node_left_it() {
        let now = Now::read();
        let entry = received(60 * SECOND, now.unix_ms - 10_000, now).unwrap();
        assert_eq!(entry.age(now.instant + 5 * SECOND), 15 * SECOND);
        assert_eq!(entry.remaining(now.instant + 5 * SECOND), Duration::from_millis(46_500));
    }

    #[test]
    fn a_retired_entry_stays_retired() {
        let entry = Entry::new(Note("x".into()), Bytes::new(), SECOND, Instant::now());
        assert!(entry.is_live());
        entry.retire();
        assert!(!entry.is_live());
    }

    #[test]
    fn keeping_is_cut_at_a_year() {
        let now = Instant::now();
        assert_eq!(Entry::new(Note(String::new()), Bytes::new(), Duration::MAX, now).remaining(now), KEEP_MAX);
    }
}
