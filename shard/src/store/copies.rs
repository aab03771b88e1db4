//! Owns where copies of hot entries are: beside its own slot, an entry that is hot stands in slots on other servers, and readers
//! choose one of them at random.
//!
//! A copy is the same envelope under another name, which no server tells changes of. So a copy is good only while it is known which
//! edition the entry's own slot has: whoever reads that learns it, and it is forgotten as soon as the server tells of a change, or
//! can no longer tell. A copy of another edition is passed over and replaced.
//!
//! Refuses to know more than `KNOWN_MAX` entries, and any without a bus that would tell of their changes.
//! Invariant: what is read from a copy is what its own slot had when its server last told.

use crate::key::{Digest, Prehashed};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a copy that was to be written is waited for.
const WRITE_AGAIN: Duration = Duration::from_secs(1);

/// A change is taken for one of 1 in so many other entries, too.
const STRIPES: usize = 256;

/// Four times what can be hot at a time; more are what regions make of them.
const KNOWN_MAX: usize = 256;

pub(crate) struct Copies {
    /// Whether there is a bus.
    is_told: AtomicBool,
    count: AtomicUsize,
    /// Changes that were told so far, by stripes of entries' names.
    changes: Box<[AtomicU64; STRIPES]>,
    known: Mutex<HashMap<u64, Known, Prehashed>>,
}

struct Known {
    edition: u64,
    spots: Arc<[Spot]>,
    /// Bit n is set where this process has had the nth written lately: it may be lost, or dropped on its way.
    written: u64,
    since: Instant,
}

/// Where a copy is.
pub(super) struct Spot {
    pub(super) shard: usize,
    pub(super) name: String,
}

/// A copy to be read.
pub(super) struct Choice {
    pub(super) edition: u64,
    spots: Arc<[Spot]>,
    at: usize,
    digest: u64,
}

impl Choice {
    pub(super) fn spot(&self) -> &Spot {
        &self.spots[self.at]
    }
}

impl Default for Copies {
    fn default() -> Self {
        let changes = Box::new(std::array::from_fn(|_| AtomicU64::new(0)));
        Self { is_told: AtomicBool::new(false), count: AtomicUsize::new(0), changes, known: Mutex::default() }
    }
}

impl Copies {
    /// From now on somebody tells of changes.
    pub(crate) fn are_told(&self) {
        self.is_told.store(true, Ordering::Release);
    }

    /// One of the copies, or `None` for the entry's own slot: each as likely as any other. `number` is random.
    pub(super) fn choose(&self, digest: &Digest, number: u64) -> Option<Choice> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let known = self.known();
        let entry = known.get(&digest.beginning())?;
        let at = (number % (entry.spots.len() as u64 + 1)) as usize;
        (at < entry.spots.len()).then(|| Choice {
            edition: entry.edition,
            spots: entry.spots.clone(),
            at,
            digest: digest.beginning(),
        })
    }

    /// To be taken before an entry's own slot is read, for `learn`.
    pub(super) fn changes(&self, digest: &Digest) -> u64 {
        self.stripe(digest.beginning()).load(Ordering::Acquire)
    }

    fn stripe(&self, name: u64) -> &AtomicU64 {
        &self.changes[name as usize % STRIPES]
    }

    /// Whether the edition that was chosen is still the known one.
    pub(super) fn is_known(&self, choice: &Choice) -> bool {
        self.known().get(&choice.digest).is_some_and(|known| known.edition == choice.edition)
    }

    /// Says which edition an entry's own slot had, unless a change was told since that was asked for: it may be this one's.
    /// `spots` tells where copies are to be.
    pub(super) fn learn(&self, digest: &Digest, edition: u64, changes: u64, spots: impl FnOnce() -> Vec<Spot>) {
        if !self.is_told.load(Ordering::Acquire) {
            return;
        }
        let mut known = self.known();
        let name = digest.beginning();
        if self.changes(digest) != changes {
            // One of the two is outdated, and nobody can say which.
            if known.get(&name).is_some_and(|known| known.edition != edition) {
                known.remove(&name);
                self.count.store(known.len(), Ordering::Release);
            }
            return;
        }
        match known.get_mut(&name) {
            Some(entry) if entry.edition == edition => {}
            Some(entry) => (entry.edition, entry.written) = (edition, 0),
            None => {
                let spots: Arc<[Spot]> = spots().into();
                if spots.is_empty() {
                    return;
                }
                if known.len() >= KNOWN_MAX {
                    known.clear();
                }
                known.insert(name, Known { edition, spots, written: 0, since: Instant::now() });
            }
        }
        self.count.store(known.len(), Ordering::Release);
    }

    /// Whether this copy is to be written by whoever found it missing: once a second for each edition and process.
    pub(super) fn claim(&self, choice: &Choice) -> bool {
        let mut known = self.known();
        let Some(entry) = known.get_mut(&choice.digest).filter(|entry| entry.edition == choice.edition) else {
            return false;
        };
        if entry.since.elapsed() > WRITE_AGAIN {
            (entry.written, entry.since) = (0, Instant::now());
        }
        let before = entry.written;
        entry.written |= 1 << choice.at;
        before != entry.written
    }

    /// The entry with this name was changed.
    pub(crate) fn forget(&self, name: u64) {
        self.stripe(name).fetch_add(1, Ordering::AcqRel);
        if self.is_told.load(Ordering::Acquire) {
            let mut known = self.known();
            known.remove(&name);
            self.count.store(known.len(), Ordering::Release);
        }
    }

    /// Changes are not being told, or copies that were written may be gone.
    pub(crate) fn forget_all(&self) {
        self.changes.iter().for_each(|stripe| _ = stripe.fetch_add(1, Ordering::AcqRel));
        let mut known = self.known();
        known.clear();
        self.count.store(0, Ordering::Release);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<u64, Known, Prehashed>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{KeyBuilder, Region};

    fn digest(n: u64) -> Digest {
        KeyBuilder::new().part(&n.to_le_bytes()).key().digest(&Region::DEFAULT)
    }

    fn spots() -> Vec<Spot> {
        (1..4).map(|shard| Spot { shard, name: format!("copy {shard}") }).collect()
    }

    fn learn(copies: &Copies, digest: &Digest, edition: u64) {
        copies.learn(digest, edition, copies.changes(digest), spots);
    }

    fn chosen(copies: &Copies, digest: &Digest, number: u64) -> Option<(usize, u64)> {
        copies.choose(digest, number).map(|choice| (choice.spot().shard, choice.edition))
    }

    #[test]
    fn each_place_is_as_likely_and_an_edition_is_forgotten_when_it_changes() {
        let (copies, digest) = (Copies::default(), digest(1));
        learn(&copies, &digest, 7);
        assert_eq!(chosen(&copies, &digest, 0), None, "nobody would tell of a change");
        copies.are_told();
        learn(&copies, &digest, 7);
        let all: Vec<_> = (0..4).map(|number| chosen(&copies, &digest, number)).collect();
        assert_eq!(all, [Some((1, 7)), Some((2, 7)), Some((3, 7)), None]);
        copies.forget(digest.beginning());
        assert_eq!(chosen(&copies, &digest, 0), None);
        learn(&copies, &digest, 8);
        assert_eq!(chosen(&copies, &digest, 0), Some((1, 8)));
        let changes = copies.changes(&digest);
        copies.forget_all();
        assert_eq!(chosen(&copies, &digest, 0), None);
        copies.learn(&digest, 8, changes, spots);
        assert_eq!(chosen(&copies, &digest, 0), None, "it was asked for before the change");
    }

    #[test]
    fn what_contradicts_what_is_known_ends_it_even_where_it_cannot_be_learnt() {
        let (copies, digest) = (Copies::default(), digest(1));
        copies.are_told();
        learn(&copies, &digest, 7);
        let changes = copies.changes(&digest);
        // Another entry of the same stripe.
        copies.forget(digest.beginning().wrapping_add(STRIPES as u64));
        copies.learn(&digest, 8, changes, spots);
        assert_eq!(chosen(&copies, &digest, 0), None);
    }

    #[test]
    fn a_copy_is_written_once_for_each_edition() {
        let (copies, digest) = (Copies::default(), digest(1));
        copies.are_told();
        learn(&copies, &digest, 7);
        let choice = copies.choose(&digest, 0).unwrap();
        assert!(copies.claim(&choice) && !copies.claim(&choice));
        learn(&copies, &digest, 8);
        assert!(!copies.claim(&choice), "it is not this edition any more");
        let choice = copies.choose(&digest, 0).unwrap();
        assert!(copies.claim(&choice) && !copies.claim(&choice));
    }

    #[test]
    fn no_more_are_known_than_the_bound() {
        let copies = Copies::default();
        copies.are_told();
        (0..1_000).for_each(|n| learn(&copies, &digest(n), 1));
        assert!(copies.known().len() <= KNOWN_MAX);
    }
}
