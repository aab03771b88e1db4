//! Owns the locations of copies of hot entries: a hot entry is stored in slots on other servers
//! too, and each reader chooses one location at random.
//!
//! A copy is the same envelope under another key, for which no server reports invalidations. A copy
//! is therefore valid only while the revision in the entry's own slot is known: a reader of that
//! slot records the revision, and it is discarded when the server reports a change or the
//! subscription is lost. A copy of another revision is ignored and replaced.
//!
//! Refuses more than `COPIED_ENTRIES_MAX` entries, and any without a bus that reports their
//! changes.
//! Invariant: an entry read from a copy is the one that its own slot had according to the last
//! report of its server.

use crate::key::{Digest, Prehashed};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Delay before the same copy is written again.
const REWRITE_AFTER: Duration = Duration::from_secs(1);

/// A change also affects the entries that share its stripe, 1 in so many.
const STRIPES: usize = 256;

/// Four times the number of hot keys; one key may be stored in several regions.
const COPIED_ENTRIES_MAX: usize = 256;

/// Revision and copy locations of each hot entry, for the process, and the number of reported
/// changes.
pub(crate) struct HotCopies {
    /// Whether a bus reports changes.
    is_enabled: AtomicBool,
    count: AtomicUsize,
    /// Number of reported changes, by stripe of digest prefixes.
    changes: Box<[AtomicU64; STRIPES]>,
    entries: Mutex<HashMap<u64, CopiedEntry, Prehashed>>,
}

/// Revision of one hot entry in its own slot, the locations of its copies, and a bitmap of copies
/// written within `REWRITE_AFTER`.
struct CopiedEntry {
    revision: u64,
    locations: Arc<[CopyLocation]>,
    /// Bit n is set if this process wrote copy n lately; the write may have been lost or dropped.
    written: u64,
    written_since: Instant,
}

/// The location of a copy: the index of its shard, and its key in Redis.
pub(super) struct CopyLocation {
    pub(super) shard: usize,
    pub(super) redis_key: String,
}

/// A copy chosen for a read: its location, and the revision that makes it valid.
pub(super) struct ChosenCopy {
    pub(super) revision: u64,
    locations: Arc<[CopyLocation]>,
    at: usize,
    digest_prefix: u64,
}

/// A revision read from an entry's own slot, and the change count before the read.
#[derive(Clone, Copy)]
pub(super) struct RevisionRead {
    pub(super) revision: u64,
    pub(super) change_count: u64,
}

impl ChosenCopy {
    pub(super) fn location(&self) -> &CopyLocation {
        &self.locations[self.at]
    }
}

impl Default for HotCopies {
    fn default() -> Self {
        let changes = Box::new(std::array::from_fn(|_| AtomicU64::new(0)));
        Self { is_enabled: AtomicBool::new(false), count: AtomicUsize::new(0), changes, entries: Mutex::default() }
    }
}

impl HotCopies {
    /// Enables copies: a bus reports changes from now on.
    pub(crate) fn enable(&self) {
        self.is_enabled.store(true, Ordering::Release);
    }

    /// A copy, or `None` for the entry's own slot, with equal probability each. `random` is a
    /// random number.
    pub(super) fn choose(&self, digest: &Digest, random: u64) -> Option<ChosenCopy> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let entries = self.entries();
        let entry = entries.get(&digest.prefix())?;
        let at = (random % (entry.locations.len() as u64 + 1)) as usize;
        (at < entry.locations.len()).then(|| ChosenCopy {
            revision: entry.revision,
            locations: entry.locations.clone(),
            at,
            digest_prefix: digest.prefix(),
        })
    }

    /// The number of changes reported so far; read it before the entry's own slot, for
    /// `record_revision`.
    pub(super) fn change_count(&self, digest: &Digest) -> u64 {
        self.stripe(digest.prefix()).load(Ordering::Acquire)
    }

    fn stripe(&self, digest_prefix: u64) -> &AtomicU64 {
        &self.changes[digest_prefix as usize % STRIPES]
    }

    /// Whether the chosen revision is still the recorded one.
    pub(super) fn is_current(&self, chosen: &ChosenCopy) -> bool {
        self.entries().get(&chosen.digest_prefix).is_some_and(|entry| entry.revision == chosen.revision)
    }

    /// Records the revision read from an entry's own slot, unless a change was reported since the
    /// read began: it may concern this entry. `locations` computes where copies are stored.
    pub(super) fn record_revision(
        &self,
        digest: &Digest,
        read: RevisionRead,
        locations: impl FnOnce() -> Vec<CopyLocation>,
    ) {
        if !self.is_enabled.load(Ordering::Acquire) {
            return;
        }
        let RevisionRead { revision, change_count } = read;
        let mut entries = self.entries();
        let prefix = digest.prefix();
        if self.change_count(digest) != change_count {
            // One of the two revisions is outdated, and it is unknown which.
            if entries.get(&prefix).is_some_and(|entry| entry.revision != revision) {
                entries.remove(&prefix);
                self.count.store(entries.len(), Ordering::Release);
            }
            return;
        }
        match entries.get_mut(&prefix) {
            Some(entry) if entry.revision == revision => {}
            Some(entry) => (entry.revision, entry.written) = (revision, 0),
            None => {
                let locations: Arc<[CopyLocation]> = locations().into();
                if locations.is_empty() {
                    return;
                }
                if entries.len() >= COPIED_ENTRIES_MAX {
                    entries.clear();
                }
                entries.insert(prefix, CopiedEntry { revision, locations, written: 0, written_since: Instant::now() });
            }
        }
        self.count.store(entries.len(), Ordering::Release);
    }

    /// Whether the caller has to write this copy, which it found missing or outdated: once a second
    /// per revision and process.
    pub(super) fn claim_write(&self, chosen: &ChosenCopy) -> bool {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(&chosen.digest_prefix).filter(|entry| entry.revision == chosen.revision)
        else {
            return false;
        };
        if entry.written_since.elapsed() > REWRITE_AFTER {
            (entry.written, entry.written_since) = (0, Instant::now());
        }
        let before = entry.written;
        entry.written |= 1 << chosen.at;
        before != entry.written
    }

    /// Discards the revision of an entry that was changed.
    pub(crate) fn invalidate(&self, prefix: u64) {
        self.stripe(prefix).fetch_add(1, Ordering::AcqRel);
        if self.is_enabled.load(Ordering::Acquire) {
            let mut entries = self.entries();
            entries.remove(&prefix);
            self.count.store(entries.len(), Ordering::Release);
        }
    }

    /// Discards all revisions: changes are not reported, or copies may be lost.
    pub(crate) fn invalidate_all(&self) {
        self.changes.iter().for_each(|stripe| _ = stripe.fetch_add(1, Ordering::AcqRel));
        let mut entries = self.entries();
        entries.clear();
        self.count.store(0, Ordering::Release);
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<u64, CopiedEntry, Prehashed>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{KeyBuilder, Region};

    fn digest(n: u64) -> Digest {
        KeyBuilder::new().part(&n.to_le_bytes()).key().digest(&Region::DEFAULT)
    }

    fn locations() -> Vec<CopyLocation> {
        (1..4).map(|shard| CopyLocation { shard, redis_key: format!("copy {shard}") }).collect()
    }

    fn record(copies: &HotCopies, digest: &Digest, revision: u64) {
        let read = RevisionRead { revision, change_count: copies.change_count(digest) };
        copies.record_revision(digest, read, locations);
    }

    fn choose(copies: &HotCopies, digest: &Digest, number: u64) -> Option<(usize, u64)> {
        copies.choose(digest, number).map(|chosen| (chosen.location().shard, chosen.revision))
    }

    #[test]
    fn locations_are_equally_likely_and_a_change_discards_the_revision() {
        let (copies, digest) = (HotCopies::default(), digest(1));
        record(&copies, &digest, 7);
        assert_eq!(choose(&copies, &digest, 0), None, "no bus reports changes");
        copies.enable();
        record(&copies, &digest, 7);
        let all: Vec<_> = (0..4).map(|number| choose(&copies, &digest, number)).collect();
        assert_eq!(all, [Some((1, 7)), Some((2, 7)), Some((3, 7)), None]);
        copies.invalidate(digest.prefix());
        assert_eq!(choose(&copies, &digest, 0), None);
        record(&copies, &digest, 8);
        assert_eq!(choose(&copies, &digest, 0), Some((1, 8)));
        let change_count = copies.change_count(&digest);
        copies.invalidate_all();
        assert_eq!(choose(&copies, &digest, 0), None);
        copies.record_revision(&digest, RevisionRead { revision: 8, change_count }, locations);
        assert_eq!(choose(&copies, &digest, 0), None, "the read began before the change");
    }

    #[test]
    fn a_contradicting_revision_discards_the_recorded_one() {
        let (copies, digest) = (HotCopies::default(), digest(1));
        copies.enable();
        record(&copies, &digest, 7);
        let change_count = copies.change_count(&digest);
        // Another entry of the same stripe.
        copies.invalidate(digest.prefix().wrapping_add(STRIPES as u64));
        copies.record_revision(&digest, RevisionRead { revision: 8, change_count }, locations);
        assert_eq!(choose(&copies, &digest, 0), None);
    }

    #[test]
    fn a_copy_is_written_once_per_revision() {
        let (copies, digest) = (HotCopies::default(), digest(1));
        copies.enable();
        record(&copies, &digest, 7);
        let chosen = copies.choose(&digest, 0).unwrap();
        assert!(copies.claim_write(&chosen) && !copies.claim_write(&chosen));
        record(&copies, &digest, 8);
        assert!(!copies.claim_write(&chosen), "it is not this revision any more");
        let chosen = copies.choose(&digest, 0).unwrap();
        assert!(copies.claim_write(&chosen) && !copies.claim_write(&chosen));
    }

    #[test]
    fn recorded_entries_are_bounded() {
        let copies = HotCopies::default();
        copies.enable();
        (0..1_000).for_each(|n| record(&copies, &digest(n), 1));
        assert!(copies.entries().len() <= COPIED_ENTRIES_MAX);
    }
}
