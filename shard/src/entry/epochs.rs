//! Owns the question whether what was fetched earlier still counts: it may have been purged, or its key removed, since then.
//!
//! Two ways to end. A removal names one key: removals are numbered, and each key's stripe, shared with others by hash, knows the
//! last of its own; a fill that began before that is spoilt, whatever key it was begun for. Memory is fixed, and the price is that
//! a removal now and then spoils the storing (not the serving) of a fill of an unrelated key. A purge names a tag, or everything:
//! it raises the generation, and whoever holds an entry that was looked at in another generation has it judged anew. The last
//! purge of each tag is kept; of the tags that are too many the oldest are forgotten, and everything with a tag that is older
//! than what was forgotten is then taken for purged.
//!
//! Refuses to say which key was removed.
//! Invariant: what was begun before a removal of its key, or a purge of one of its tags, is never taken for sound after it.

use crate::key::{Prehashed, Tag};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{PoisonError, RwLock};
use std::time::Instant;

/// 512 KiB. A fill is spoilt with the share of these that are removed from while it runs: with 1,000 removals, 1.5 %.
const STRIPES: usize = 65_536;

/// Tags whose last purge is known: about 10 MiB when all are used.
pub(crate) const TAGS_MAX: usize = 131_072;

/// The number of a purge that the fleet has not numbered yet: it counts as later than anything another node has stored.
pub(crate) const UNNUMBERED: u64 = u64::MAX;

/// When a fill began, reckoned in purges and removals; see `View::since`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Since {
    generation: u64,
    removals: u64,
    number: u64,
}

impl Since {
    pub(crate) fn generation(self) -> u64 {
        self.generation
    }

    /// Whether anything was removed between this and the later one.
    pub(crate) fn is_before(self, later: Self) -> bool {
        self.removals < later.removals
    }

    /// The last purge of the fleet that was known then.
    pub(crate) fn number(self) -> u64 {
        self.number
    }
}

/// What is purged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    Everything,
    Tag(Tag),
}

/// An order to purge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Purge {
    pub scope: Scope,
    /// What is purged softly becomes stale: it may answer while it is validated, or for a failing origin.
    pub is_soft: bool,
}

/// What has become of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Judgement {
    Sound,
    /// Stale since then.
    Soft(Instant),
    Dead,
}

#[derive(Debug)]
pub(crate) struct Epochs {
    generation: AtomicU64,
    /// The highest number of a purge that the fleet has given and this process has heard of.
    number: AtomicU64,
    /// Removals so far, of any key.
    removals: AtomicU64,
    /// By stripe, the number of its last removal.
    removed: Box<[AtomicU64]>,
    /// The same for what shards say was changed there, by the entries' names.
    changed: Box<[AtomicU64]>,
    purges: RwLock<Purges>,
    /// By shard, the generation in which it was last lost sight of.
    unwatched: Box<[AtomicU64]>,
}

#[derive(Debug, Default)]
struct Purges {
    tags: HashMap<u64, Last, Prehashed>,
    /// Tags in the order of their purges; some stand in it more than once.
    order: VecDeque<(u64, u64)>,
    everything: Last,
    /// Of everything with a tag: the last purge that was forgotten.
    floor: Mark,
}

/// The last purges of a tag, hard and soft.
#[derive(Clone, Copy, Debug, Default)]
struct Last {
    hard: Mark,
    soft: Mark,
    softened: Option<Instant>,
}

/// A purge, in this process's generations and in the fleet's numbers.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    generation: u64,
    number: u64,
}

/// What an entry's fill knew of purges.
#[derive(Clone, Copy)]
enum Stamp {
    /// This process began it in that generation.
    Own(u64),
    /// Another node began it knowing that number.
    Foreign(u64),
}

impl Mark {
    fn is_after(self, stamp: Stamp) -> bool {
        match stamp {
            Stamp::Own(generation) => self.generation > generation,
            Stamp::Foreign(number) => self.number > number,
        }
    }

    fn later(self, other: Self) -> Self {
        Self { generation: self.generation.max(other.generation), number: self.number.max(other.number) }
    }
}

impl Last {
    fn judge(&self, stamp: Stamp) -> Judgement {
        if self.hard.is_after(stamp) {
            return Judgement::Dead;
        }
        match self.softened {
            Some(at) if self.soft.is_after(stamp) => Judgement::Soft(at),
            _ => Judgement::Sound,
        }
    }
}

impl Judgement {
    fn worse(self, other: Self) -> Self {
        match (self, other) {
            (Self::Dead, _) | (_, Self::Dead) => Self::Dead,
            (Self::Soft(one), Self::Soft(two)) => Self::Soft(one.min(two)),
            (Self::Soft(at), Self::Sound) | (Self::Sound, Self::Soft(at)) => Self::Soft(at),
            (Self::Sound, Self::Sound) => Self::Sound,
        }
    }
}

impl Epochs {
    pub(crate) fn new(shards: usize) -> Self {
        let zeros = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        let [generation, number, removals] = [0; 3].map(AtomicU64::new);
        Self {
            generation,
            number,
            removals,
            removed: zeros(STRIPES),
            changed: zeros(if shards == 0 { 0 } else { STRIPES }),
            purges: RwLock::default(),
            unwatched: zeros(shards),
        }
    }

    /// The moment now.
    pub(crate) fn since(&self) -> Since {
        // The number is read first: a purge raises it after the generation, so that no number is known without its purge.
        let number = self.number.load(Ordering::Acquire);
        Since { generation: self.generation(), removals: self.removals.load(Ordering::Acquire), number }
    }

    /// Whether the key with `hash` was not removed since then.
    pub(crate) fn is_kept(&self, hash: u64, since: Since) -> bool {
        is_before(&self.removed, hash, since)
    }

    /// Whether the entry with this name at its shard was not changed there since then.
    pub(crate) fn is_unchanged(&self, name: u64, since: Since) -> bool {
        is_before(&self.changed, name, since)
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// What purges made of an entry with `tags` whose fill this process began in `generation`.
    pub(crate) fn judge(&self, tags: &[Tag], generation: u64) -> Judgement {
        self.judge_by(tags, Stamp::Own(generation))
    }

    /// The same for an entry that another node stored, knowing the purge `number`.
    pub(crate) fn judge_foreign(&self, tags: &[Tag], number: u64) -> Judgement {
        self.judge_by(tags, Stamp::Foreign(number))
    }

    fn judge_by(&self, tags: &[Tag], stamp: Stamp) -> Judgement {
        let purges = self.purges.read().unwrap_or_else(PoisonError::into_inner);
        if !tags.is_empty() && purges.floor.is_after(stamp) {
            return Judgement::Dead;
        }
        let lasts = tags.iter().filter_map(|tag| purges.tags.get(&tag.hash()));
        lasts.fold(purges.everything.judge(stamp), |worst, last| worst.worse(last.judge(stamp)))
    }

    pub(crate) fn removed(&self, hash: u64) {
        self.count(&self.removed, hash);
    }

    pub(crate) fn changed(&self, name: u64) {
        self.count(&self.changed, name);
    }

    fn count(&self, stripes: &[AtomicU64], hash: u64) {
        let number = self.removals.fetch_add(1, Ordering::AcqRel) + 1;
        stripe(stripes, hash).fetch_max(number, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    /// Purges, under the fleet's `number`, or `UNNUMBERED`.
    pub(crate) fn purge(&self, purge: Purge, number: u64) {
        let mut purges = self.purges.write().unwrap_or_else(PoisonError::into_inner);
        let generation = self.generation() + 1;
        purges.note(purge, Mark { generation, number }, Instant::now());
        self.generation.store(generation, Ordering::Release);
        drop(purges);
        self.know(number);
    }

    /// Whether a purge under this number has been heard of. One that has no number yet has not.
    pub(crate) fn knows(&self, purge: Purge, number: u64) -> bool {
        let purges = self.purges.read().unwrap_or_else(PoisonError::into_inner);
        let last = match purge.scope {
            Scope::Everything => Some(&purges.everything),
            Scope::Tag(tag) => purges.tags.get(&tag.hash()),
        };
        let mark = last.map_or(purges.floor, |last| if purge.is_soft { last.soft } else { last.hard });
        mark.number >= number && mark.number != UNNUMBERED
    }

    /// A shard was lost sight of and is seen again: what is held of it may have been changed there meanwhile.
    pub(crate) fn lost_sight(&self, shard: usize) {
        let purges = self.purges.write().unwrap_or_else(PoisonError::into_inner);
        let generation = self.generation() + 1;
        self.unwatched[shard].store(generation, Ordering::Release);
        self.generation.store(generation, Ordering::Release);
        drop(purges);
    }

    /// Whether a shard was lost sight of after `generation`.
    pub(crate) fn was_lost(&self, shard: usize, generation: u64) -> bool {
        self.unwatched[shard].load(Ordering::Acquire) > generation
    }

    /// Gives the fleet's number to a purge that had none.
    pub(crate) fn numbered(&self, purge: Purge, number: u64) {
        let mut purges = self.purges.write().unwrap_or_else(PoisonError::into_inner);
        let last = match purge.scope {
            Scope::Everything => Some(&mut purges.everything),
            Scope::Tag(tag) => purges.tags.get_mut(&tag.hash()),
        };
        if let Some(last) = last {
            let mark = if purge.is_soft { &mut last.soft } else { &mut last.hard };
            let known = if mark.number == UNNUMBERED { 0 } else { mark.number };
            mark.number = known.max(number);
        }
        drop(purges);
        self.know(number);
    }

    /// Everything with a tag that was stored by a node that knew no purge from `number` on is taken for purged.
    pub(crate) fn forget_before(&self, number: u64) {
        let mut purges = self.purges.write().unwrap_or_else(PoisonError::into_inner);
        purges.floor.number = purges.floor.number.max(number);
    }

    /// The highest number of a purge that was heard of.
    pub(crate) fn number(&self) -> u64 {
        self.number.load(Ordering::Acquire)
    }

    fn know(&self, number: u64) {
        if number != UNNUMBERED {
            self.number.fetch_max(number, Ordering::AcqRel);
        }
    }
}

fn stripe(stripes: &[AtomicU64], hash: u64) -> &AtomicU64 {
    &stripes[(hash >> 32) as usize % STRIPES]
}

fn is_before(stripes: &[AtomicU64], hash: u64, since: Since) -> bool {
    // An insertion stores and then looks here; a removal counts here and then looks for what is stored. The fences make sure
    // that at least one of them sees the other.
    fence(Ordering::SeqCst);
    stripe(stripes, hash).load(Ordering::Acquire) <= since.removals
}

impl Purges {
    fn note(&mut self, purge: Purge, mark: Mark, now: Instant) {
        let last = match purge.scope {
            Scope::Everything => &mut self.everything,
            Scope::Tag(tag) => {
                self.order.push_back((tag.hash(), mark.generation));
                self.tags.entry(tag.hash()).or_default()
            }
        };
        if purge.is_soft {
            last.soft = last.soft.later(mark);
            last.softened = Some(now);
        } else {
            last.hard = last.hard.later(mark);
        }
        while self.order.len() > TAGS_MAX {
            self.forget();
        }
    }

    /// Forgets the purge that is longest ago, unless its tag was purged again.
    fn forget(&mut self) {
        let Some((tag, generation)) = self.order.pop_front() else { return };
        let Some(last) = self.tags.get(&tag) else { return };
        let latest = last.hard.later(last.soft);
        if latest.generation == generation {
            // Those without a number are few and recent (see `bus`), or there is no fleet that gives numbers.
            let number = if latest.number == UNNUMBERED { 0 } else { latest.number };
            self.floor = self.floor.later(Mark { number, ..latest });
            self.tags.remove(&tag);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(name: &str) -> Tag {
        Tag::named(name.as_bytes())
    }

    fn hard(name: &str) -> Purge {
        Purge { scope: Scope::Tag(tag(name)), is_soft: false }
    }

    #[test]
    fn a_removal_ends_what_began_before() {
        let epochs = Epochs::new(0);
        let (before, elsewhere) = (epochs.since(), 7 + (1 << 32));
        epochs.removed(elsewhere);
        assert!(epochs.is_kept(7, before));
        epochs.removed(7);
        assert!(!epochs.is_kept(7, before));
        assert!(epochs.is_kept(7, epochs.since()), "it began after the removal");
    }

    #[test]
    fn a_purge_ends_what_bears_its_tag_and_began_before() {
        let epochs = Epochs::new(0);
        let judge = |names: &[&str], since: Since| {
            let tags: Vec<_> = names.iter().map(|name| tag(name)).collect();
            epochs.judge(&tags, since.generation())
        };
        let before = epochs.since();
        epochs.purge(hard("a"), UNNUMBERED);
        assert_eq!(judge(&["b", "a"], before), Judgement::Dead);
        assert_eq!(
            judge(&["ab", "A", ""], before),
            Judgement::Sound,
            "a longer tag, and other letters, are other tags"
        );
        assert_eq!(judge(&["a"], epochs.since()), Judgement::Sound);
        epochs.purge(Purge { scope: Scope::Everything, is_soft: true }, UNNUMBERED);
        assert!(matches!(judge(&[], before), Judgement::Soft(_)));
        assert_eq!(judge(&["a"], before), Judgement::Dead, "dead remains dead");
        epochs.purge(Purge { scope: Scope::Everything, is_soft: false }, UNNUMBERED);
        assert_eq!(judge(&[], before), Judgement::Dead);
        assert_eq!(judge(&["a"], epochs.since()), Judgement::Sound);
    }

    #[test]
    fn another_nodes_entry_is_judged_by_what_that_node_knew() {
        let epochs = Epochs::new(0);
        epochs.purge(hard("a"), 500);
        epochs.purge(hard("b"), UNNUMBERED);
        assert_eq!(epochs.judge_foreign(&[tag("a")], 499), Judgement::Dead);
        assert_eq!(epochs.judge_foreign(&[tag("a")], 500), Judgement::Sound);
        assert_eq!(epochs.judge_foreign(&[tag("b")], 900), Judgement::Dead, "nobody else knows of it yet");
        epochs.numbered(hard("b"), 800);
        assert_eq!(epochs.judge_foreign(&[tag("b")], 900), Judgement::Sound);
        assert_eq!((epochs.since().number(), epochs.number()), (800, 800));
    }

    #[test]
    fn what_is_forgotten_counts_as_purged() {
        let epochs = Epochs::new(0);
        epochs.purge(hard("first"), 1);
        let after_first = epochs.since();
        for n in 0..TAGS_MAX {
            epochs.purge(hard(&n.to_string()), 2 + n as u64);
        }
        let untouched = tag("untouched");
        assert_eq!(epochs.judge(&[untouched], 0), Judgement::Dead, "it might have been the one that was forgotten");
        assert_eq!(epochs.judge(&[untouched], after_first.generation()), Judgement::Sound);
        assert_eq!(epochs.judge(&[], 0), Judgement::Sound, "it bears no tag");
        assert_eq!(epochs.judge_foreign(&[untouched], 0), Judgement::Dead);
        assert!(epochs.purges.read().unwrap().tags.len() <= TAGS_MAX);
    }
}
