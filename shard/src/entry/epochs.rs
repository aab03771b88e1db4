//! Owns the invalidation state: whether an entry fetched earlier was purged, or its key deleted,
//! since then.
//!
//! A delete concerns one key. Deletes are numbered, and each key maps by hash to a stripe that
//! holds the number of the last delete in it. A fill that began before that number is not stored,
//! whatever key of the stripe was deleted. Memory is fixed; the price is that a delete occasionally
//! prevents an unrelated fill from being stored (it is still served).
//!
//! A purge concerns a tag, or everything. It raises the generation, and each entry last checked in
//! an earlier generation is checked again. The last purge of each tag is kept. Beyond `TAGS_MAX`
//! tags the oldest purges are forgotten, and every tagged entry older than a forgotten purge counts
//! as purged.
//!
//! A delete by another node is a change that a server reports (see `bus`); changes are recorded by
//! the digest of the entry, in stripes of their own. A fill also knows when it began and how many
//! deletes it had seen, for the comparison with a tombstone (see `remote::tombstone`).
//!
//! Refuses to say which key was deleted.
//! Invariant: a fill that began before a delete of its key, or a purge of one of its tags, never
//! counts as valid after it.

use crate::key::{Prehashed, Tag};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{PoisonError, RwLock};
use std::time::Instant;

/// 512 KiB. The probability that an unrelated delete prevents a fill from being stored is the share
/// of stripes with a delete while it runs: 1.5 % for 1,000 deletes.
const STRIPES: usize = 65_536;

/// Tags whose last purge is kept: about 10 MiB when all are used.
pub(crate) const TAGS_MAX: usize = 131_072;

/// Number of a purge that the fleet has not numbered yet: it counts as later than every entry that
/// another node has stored.
pub(crate) const UNNUMBERED: u64 = u64::MAX;

/// A point in the sequence of purges and deletes, taken when a fill begins; see
/// `StoreView::epoch_snapshot`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EpochSnapshot {
    generation: u64,
    deletes: u64,
    number: u64,
    began: Instant,
}

impl EpochSnapshot {
    /// This snapshot for a fill that began with an earlier one. Deletes and purges of this process
    /// up to this snapshot do not count for it; those of other nodes, which may be reported later,
    /// count from the beginning of the fill.
    #[must_use]
    pub fn with_beginning_of(self, earlier: Self) -> Self {
        Self { began: earlier.began, ..self }
    }

    /// Number of deletes and changes that preceded it.
    pub(crate) fn deletes(self) -> u64 {
        self.deletes
    }

    pub(crate) fn began(self) -> Instant {
        self.began
    }

    pub(crate) fn generation(self) -> u64 {
        self.generation
    }

    /// Whether any key was deleted between this snapshot and a later one.
    pub(crate) fn is_older_than(self, later: Self) -> bool {
        self.deletes < later.deletes
    }

    /// Number of the last known purge of the fleet.
    pub(crate) fn purge_number(self) -> u64 {
        self.number
    }
}

/// The entries that a purge covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PurgeScope {
    Everything,
    Tag(Tag),
}

/// A purge of a tag or of everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Purge {
    pub scope: PurgeScope,
    /// A soft purge makes entries stale: they may be served while they are validated, or for a
    /// failing origin.
    pub is_soft: bool,
}

/// The effect of purges on an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PurgeStatus {
    Unaffected,
    /// Stale since this time.
    SoftPurged(Instant),
    Purged,
}

/// Invalidation state of the process: the current generation and purge number, the last delete of
/// each stripe in fixed arrays of atomics, and the purge history behind a read-write lock.
#[derive(Debug)]
pub(crate) struct InvalidationEpochs {
    /// Random identity of the process whose deletes are numbered here.
    process: u64,
    generation: AtomicU64,
    /// The highest purge number that this process has observed.
    number: AtomicU64,
    /// Number of deletes and changes so far, of any key.
    deletes: AtomicU64,
    /// Number of the last delete in each stripe, by key hash.
    delete_stripes: Box<[AtomicU64]>,
    /// Number of the last invalidation in each stripe, by digest prefix.
    change_stripes: Box<[AtomicU64]>,
    purges: RwLock<PurgeHistory>,
    /// Per shard, the generation of its last subscription gap.
    subscription_gaps: Box<[AtomicU64]>,
}

/// The last purges of at most `TAGS_MAX` tags, by tag hash, and of everything; forgotten purges are
/// merged into a floor.
#[derive(Debug, Default)]
struct PurgeHistory {
    tags: HashMap<u64, TagPurges, Prehashed>,
    /// Purged tags in order, with the generation of the purge; a tag may occur more than once.
    order: VecDeque<(u64, u64)>,
    everything: TagPurges,
    /// The latest forgotten purge; it applies to every tagged entry.
    floor: PurgeEpoch,
}

/// The last hard and soft purge of a tag.
#[derive(Clone, Copy, Debug, Default)]
struct TagPurges {
    hard: PurgeEpoch,
    soft: PurgeEpoch,
    soft_purged_at: Option<Instant>,
}

/// The position of a purge: its generation in this process and its number in the fleet.
#[derive(Clone, Copy, Debug, Default)]
struct PurgeEpoch {
    generation: u64,
    number: u64,
}

/// The purges that an entry already takes into account: a generation if this process filled it, a
/// purge number if another node did.
#[derive(Clone, Copy)]
enum KnownPurges {
    /// Filled by this process, in this generation.
    Local(u64),
    /// Filled by another node, which knew purges up to this number.
    Remote(u64),
}

impl PurgeEpoch {
    fn is_after(self, fill_epoch: KnownPurges) -> bool {
        match fill_epoch {
            KnownPurges::Local(generation) => self.generation > generation,
            KnownPurges::Remote(number) => self.number > number,
        }
    }

    fn later(self, other: Self) -> Self {
        Self { generation: self.generation.max(other.generation), number: self.number.max(other.number) }
    }
}

impl TagPurges {
    fn status(&self, fill_epoch: KnownPurges) -> PurgeStatus {
        if self.hard.is_after(fill_epoch) {
            return PurgeStatus::Purged;
        }
        match self.soft_purged_at {
            Some(at) if self.soft.is_after(fill_epoch) => PurgeStatus::SoftPurged(at),
            _ => PurgeStatus::Unaffected,
        }
    }
}

impl PurgeStatus {
    fn worst(self, other: Self) -> Self {
        match (self, other) {
            (Self::Purged, _) | (_, Self::Purged) => Self::Purged,
            (Self::SoftPurged(one), Self::SoftPurged(two)) => Self::SoftPurged(one.min(two)),
            (Self::SoftPurged(at), Self::Unaffected) | (Self::Unaffected, Self::SoftPurged(at)) => Self::SoftPurged(at),
            (Self::Unaffected, Self::Unaffected) => Self::Unaffected,
        }
    }
}

impl InvalidationEpochs {
    pub(crate) fn new(shards: usize) -> Self {
        let zeros = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        let [generation, number, deletes] = [0; 3].map(AtomicU64::new);
        Self {
            process: RandomState::new().hash_one(shards),
            generation,
            number,
            deletes,
            delete_stripes: zeros(STRIPES),
            change_stripes: zeros(if shards == 0 { 0 } else { STRIPES }),
            purges: RwLock::default(),
            subscription_gaps: zeros(shards),
        }
    }

    /// Random identity of this process, under which other nodes know its deletes.
    pub(crate) fn process(&self) -> u64 {
        self.process
    }

    /// The current position in the sequence of purges and deletes.
    pub(crate) fn snapshot(&self) -> EpochSnapshot {
        let began = Instant::now();
        // The number is read first: a purge raises it after the generation, so no number is
        // observed without its purge.
        let number = self.number.load(Ordering::Acquire);
        EpochSnapshot { generation: self.generation(), deletes: self.deletes.load(Ordering::Acquire), number, began }
    }

    /// Whether the key with `hash` was not deleted since the snapshot.
    pub(crate) fn is_undeleted_since(&self, hash: u64, snapshot: EpochSnapshot) -> bool {
        is_unchanged_in_stripe(&self.delete_stripes, hash, snapshot)
    }

    /// Whether the entry with this digest prefix was not changed at its shard since the snapshot.
    pub(crate) fn is_unchanged_since(&self, digest_prefix: u64, snapshot: EpochSnapshot) -> bool {
        is_unchanged_in_stripe(&self.change_stripes, digest_prefix, snapshot)
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The effect of purges on an entry with `tags` whose fill this process began in `generation`.
    pub(crate) fn purge_status(&self, tags: &[Tag], generation: u64) -> PurgeStatus {
        self.status_for(tags, KnownPurges::Local(generation))
    }

    /// The same for an entry that another node stored while it knew purges up to `number`.
    pub(crate) fn remote_purge_status(&self, tags: &[Tag], number: u64) -> PurgeStatus {
        self.status_for(tags, KnownPurges::Remote(number))
    }

    fn status_for(&self, tags: &[Tag], fill_epoch: KnownPurges) -> PurgeStatus {
        let purges = self.purges.read().unwrap_or_else(PoisonError::into_inner);
        if !tags.is_empty() && purges.floor.is_after(fill_epoch) {
            return PurgeStatus::Purged;
        }
        let recorded = tags.iter().filter_map(|tag| purges.tags.get(&tag.hash()));
        recorded.fold(purges.everything.status(fill_epoch), |worst, recorded| worst.worst(recorded.status(fill_epoch)))
    }

    /// Records a delete and returns its number: fills that began before it have a smaller
    /// `EpochSnapshot::deletes`.
    pub(crate) fn record_delete(&self, hash: u64) -> u64 {
        self.count(&self.delete_stripes, hash)
    }

    pub(crate) fn record_change(&self, digest_prefix: u64) {
        self.count(&self.change_stripes, digest_prefix);
    }

    fn count(&self, stripes: &[AtomicU64], hash: u64) -> u64 {
        let number = self.deletes.fetch_add(1, Ordering::AcqRel) + 1;
        stripe(stripes, hash).fetch_max(number, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        number
    }

    /// Applies a purge with the fleet's `number`, or `UNNUMBERED`.
    pub(crate) fn purge(&self, purge: Purge, number: u64) {
        let mut purges = self.purges.write().unwrap_or_else(PoisonError::into_inner);
        let generation = self.generation() + 1;
        purges.record(purge, PurgeEpoch { generation, number }, Instant::now());
        self.generation.store(generation, Ordering::Release);
        drop(purges);
        self.observe_number(number);
    }

    /// Whether a purge with this number has been applied; false while it has no number.
    pub(crate) fn has_applied(&self, purge: Purge, number: u64) -> bool {
        let purges = self.purges.read().unwrap_or_else(PoisonError::into_inner);
        let recorded = match purge.scope {
            PurgeScope::Everything => Some(&purges.everything),
            PurgeScope::Tag(tag) => purges.tags.get(&tag.hash()),
        };
        let epoch = recorded.map_or(purges.floor, |recorded| if purge.is_soft { recorded.soft } else { recorded.hard });
        epoch.number >= number && epoch.number != UNNUMBERED
    }

    /// Records that the subscription to a shard was interrupted: its entries may have been changed
    /// there meanwhile.
    pub(crate) fn record_subscription_gap(&self, shard: usize) {
        let purges = self.purges.write().unwrap_or_else(PoisonError::into_inner);
        let generation = self.generation() + 1;
        self.subscription_gaps[shard].store(generation, Ordering::Release);
        self.generation.store(generation, Ordering::Release);
        drop(purges);
    }

    /// Whether the subscription to a shard was interrupted after `generation`.
    pub(crate) fn had_subscription_gap(&self, shard: usize, generation: u64) -> bool {
        self.subscription_gaps[shard].load(Ordering::Acquire) > generation
    }

    /// Assigns the fleet's number to a purge that had none.
    pub(crate) fn assign_number(&self, purge: Purge, number: u64) {
        let mut purges = self.purges.write().unwrap_or_else(PoisonError::into_inner);
        let recorded = match purge.scope {
            PurgeScope::Everything => Some(&mut purges.everything),
            PurgeScope::Tag(tag) => purges.tags.get_mut(&tag.hash()),
        };
        if let Some(recorded) = recorded {
            let epoch = if purge.is_soft { &mut recorded.soft } else { &mut recorded.hard };
            let previous = if epoch.number == UNNUMBERED { 0 } else { epoch.number };
            epoch.number = previous.max(number);
        }
        drop(purges);
        self.observe_number(number);
    }

    /// Treats tagged entries as purged if their node knew no purge with this number or a later one.
    pub(crate) fn raise_floor(&self, number: u64) {
        let mut purges = self.purges.write().unwrap_or_else(PoisonError::into_inner);
        purges.floor.number = purges.floor.number.max(number);
    }

    /// The highest purge number observed.
    pub(crate) fn latest_purge_number(&self) -> u64 {
        self.number.load(Ordering::Acquire)
    }

    fn observe_number(&self, number: u64) {
        if number != UNNUMBERED {
            self.number.fetch_max(number, Ordering::AcqRel);
        }
    }
}

fn stripe(stripes: &[AtomicU64], hash: u64) -> &AtomicU64 {
    &stripes[(hash >> 32) as usize % STRIPES]
}

fn is_unchanged_in_stripe(stripes: &[AtomicU64], hash: u64, snapshot: EpochSnapshot) -> bool {
    // An insertion stores and then checks the stripe; a delete counts in the stripe and then looks
    // for stored entries. The fences ensure that at least one of them sees the other.
    fence(Ordering::SeqCst);
    stripe(stripes, hash).load(Ordering::Acquire) <= snapshot.deletes
}

impl PurgeHistory {
    fn record(&mut self, purge: Purge, epoch: PurgeEpoch, now: Instant) {
        let recorded = match purge.scope {
            PurgeScope::Everything => &mut self.everything,
            PurgeScope::Tag(tag) => {
                self.order.push_back((tag.hash(), epoch.generation));
                self.tags.entry(tag.hash()).or_default()
            }
        };
        if purge.is_soft {
            recorded.soft = recorded.soft.later(epoch);
            recorded.soft_purged_at = Some(now);
        } else {
            recorded.hard = recorded.hard.later(epoch);
        }
        while self.order.len() > TAGS_MAX {
            self.forget();
        }
    }

    /// Forgets the oldest purge, unless its tag was purged again.
    fn forget(&mut self) {
        let Some((tag, generation)) = self.order.pop_front() else { return };
        let Some(recorded) = self.tags.get(&tag) else { return };
        let latest = recorded.hard.later(recorded.soft);
        if latest.generation == generation {
            // Unnumbered purges are few and recent (see `bus`), or no fleet assigns numbers.
            let number = if latest.number == UNNUMBERED { 0 } else { latest.number };
            self.floor = self.floor.later(PurgeEpoch { number, ..latest });
            self.tags.remove(&tag);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(name: &str) -> Tag {
        Tag::surrogate_key(name.as_bytes())
    }

    fn hard(name: &str) -> Purge {
        Purge { scope: PurgeScope::Tag(tag(name)), is_soft: false }
    }

    #[test]
    fn delete_invalidates_fills_that_began_before_it() {
        let epochs = InvalidationEpochs::new(0);
        let (before, elsewhere) = (epochs.snapshot(), 7 + (1 << 32));
        epochs.record_delete(elsewhere);
        assert!(epochs.is_undeleted_since(7, before));
        epochs.record_delete(7);
        assert!(!epochs.is_undeleted_since(7, before));
        assert!(epochs.is_undeleted_since(7, epochs.snapshot()), "it began after the delete");
    }

    #[test]
    fn purge_invalidates_tagged_fills_that_began_before_it() {
        let epochs = InvalidationEpochs::new(0);
        let status = |names: &[&str], snapshot: EpochSnapshot| {
            let tags: Vec<_> = names.iter().map(|name| tag(name)).collect();
            epochs.purge_status(&tags, snapshot.generation())
        };
        let before = epochs.snapshot();
        epochs.purge(hard("a"), UNNUMBERED);
        assert_eq!(status(&["b", "a"], before), PurgeStatus::Purged);
        assert_eq!(
            status(&["ab", "A", ""], before),
            PurgeStatus::Unaffected,
            "tags match exactly, letter case included"
        );
        assert_eq!(status(&["a"], epochs.snapshot()), PurgeStatus::Unaffected);
        epochs.purge(Purge { scope: PurgeScope::Everything, is_soft: true }, UNNUMBERED);
        assert!(matches!(status(&[], before), PurgeStatus::SoftPurged(_)));
        assert_eq!(status(&["a"], before), PurgeStatus::Purged, "a soft purge does not undo a hard one");
        epochs.purge(Purge { scope: PurgeScope::Everything, is_soft: false }, UNNUMBERED);
        assert_eq!(status(&[], before), PurgeStatus::Purged);
        assert_eq!(status(&["a"], epochs.snapshot()), PurgeStatus::Unaffected);
    }

    #[test]
    fn remote_entry_is_checked_against_the_purges_its_node_knew() {
        let epochs = InvalidationEpochs::new(0);
        epochs.purge(hard("a"), 500);
        epochs.purge(hard("b"), UNNUMBERED);
        assert_eq!(epochs.remote_purge_status(&[tag("a")], 499), PurgeStatus::Purged);
        assert_eq!(epochs.remote_purge_status(&[tag("a")], 500), PurgeStatus::Unaffected);
        assert_eq!(
            epochs.remote_purge_status(&[tag("b")], 900),
            PurgeStatus::Purged,
            "an unnumbered purge is later than every remote entry"
        );
        epochs.assign_number(hard("b"), 800);
        assert_eq!(epochs.remote_purge_status(&[tag("b")], 900), PurgeStatus::Unaffected);
        assert_eq!((epochs.snapshot().purge_number(), epochs.latest_purge_number()), (800, 800));
    }

    #[test]
    fn forgotten_purges_apply_to_every_tagged_entry() {
        let epochs = InvalidationEpochs::new(0);
        epochs.purge(hard("first"), 1);
        let after_first = epochs.snapshot();
        for n in 0..TAGS_MAX {
            epochs.purge(hard(&n.to_string()), 2 + n as u64);
        }
        let untouched = tag("untouched");
        assert_eq!(
            epochs.purge_status(&[untouched], 0),
            PurgeStatus::Purged,
            "the forgotten purge may have been one of this tag"
        );
        assert_eq!(epochs.purge_status(&[untouched], after_first.generation()), PurgeStatus::Unaffected);
        assert_eq!(epochs.purge_status(&[], 0), PurgeStatus::Unaffected, "it has no tag");
        assert_eq!(epochs.remote_purge_status(&[untouched], 0), PurgeStatus::Purged);
        assert!(epochs.purges.read().unwrap().tags.len() <= TAGS_MAX);
    }
}
