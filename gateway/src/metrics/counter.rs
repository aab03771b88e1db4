//! Counters that every thread writes in a place of its own.
//!
//! What a thread counts lies close together, whatever counts it, so that a request touches few cache lines for it. Adding allocates
//! nothing and takes no lock. Invariant: a place belongs to one counter at a time, and is zero when it gets it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Threads that count for themselves; those beyond share, which costs speed and not correctness.
const LINES: usize = 16;
/// Places that are made at once, 4 KiB for each thread.
const BLOCK: usize = 512;
/// Half a million places: more than a configuration of tens of thousands of routes needs, before and after a reload.
const BLOCKS: usize = 1_024;
/// The last block is for all counters that find no place of their own.
const CROWD: usize = (BLOCKS - 1) * BLOCK;

#[repr(align(64))]
struct Block([AtomicU64; BLOCK]);

/// By place; made when the thread first counts there.
type Line = [OnceLock<Box<Block>>; BLOCKS];

/// By thread.
static LINED: [Line; LINES] = [const { [const { OnceLock::new() }; BLOCKS] }; LINES];

/// Who counts where.
static PLACES: Mutex<Places> = Mutex::new(Places { next: 0, free: BTreeMap::new() });

struct Places {
    next: usize,
    /// Those that were given back, by how many lie together.
    free: BTreeMap<usize, Vec<usize>>,
}

/// The line that a thread adds to, and whether no other does.
#[derive(Clone, Copy)]
struct Use {
    line: &'static Line,
    is_own: bool,
}

thread_local! {
    static USE: Cell<Use> = const { Cell::new(Use { line: &LINED[0], is_own: false }) };
}

/// Gives the calling thread the line of worker `index`, one of so many. No two workers that live have the same index.
pub fn use_line(index: usize, workers: usize) {
    // The first is for all that are no workers.
    let is_own = workers < LINES;
    USE.set(Use { line: &LINED[if is_own { index + 1 } else { index % LINES }], is_own });
}

/// Counters that lie together, `count` of them.
struct Group {
    first: usize,
    count: usize,
}

impl Group {
    fn new(count: usize) -> Self {
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = places.free.get_mut(&count).and_then(Vec::pop) {
            return Group { first, count };
        }
        // All in one block.
        let room = BLOCK - places.next % BLOCK;
        let first = if room < count { places.next + room } else { places.next };
        if first + count > CROWD {
            tracing::error!("there are more than half a million counters: those beyond count each other's");
            return Group { first: CROWD, count: count.min(BLOCK) };
        }
        places.next = first + count;
        Group { first, count }
    }

    fn add(&self, at: usize, count: u64) {
        let Use { line, is_own } = USE.get();
        let place = self.first + at;
        let block = line[place / BLOCK].get_or_init(|| Box::new(Block([const { AtomicU64::new(0) }; BLOCK])));
        let cell = &block.0[place % BLOCK];
        if is_own {
            // Nobody else writes it: adding at once would cost five times as much.
            cell.store(cell.load(Relaxed).wrapping_add(count), Relaxed);
        } else {
            cell.fetch_add(count, Relaxed);
        }
    }

    /// The place in every line that has it.
    fn cells(&self, at: usize) -> impl Iterator<Item = &'static AtomicU64> {
        let place = self.first + at;
        LINED.iter().filter_map(move |line| Some(&line[place / BLOCK].get()?.0[place % BLOCK]))
    }

    fn get(&self, at: usize) -> u64 {
        self.cells(at).map(|cell| cell.load(Relaxed)).fold(0, u64::wrapping_add)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.first == CROWD {
            return;
        }
        for at in 0..self.count {
            self.cells(at).for_each(|cell| cell.store(0, Relaxed));
        }
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        places.free.entry(self.count).or_default().push(self.first);
    }
}

/// A counter; adding to it never waits for another thread.
pub struct Counter(Group);

impl Default for Counter {
    fn default() -> Self {
        Counter(Group::new(1))
    }
}

impl Counter {
    pub fn inc(&self) {
        self.add(1);
    }

    pub fn add(&self, count: u64) {
        self.0.add(0, count);
    }

    pub fn get(&self) -> u64 {
        self.0.get(0)
    }
}

/// A closed set of label values.
pub trait Label: Copy + Send + Sync + 'static {
    /// The label's name.
    const NAME: &'static str;
    /// Every value, in the order of `index`.
    const ALL: &'static [Self];
    fn index(self) -> usize;
    fn as_str(self) -> &'static str;
}

/// One counter per value of a label.
pub struct Counters<L> {
    group: Group,
    label: std::marker::PhantomData<L>,
}

impl<L: Label> Default for Counters<L> {
    fn default() -> Self {
        Counters { group: Group::new(L::ALL.len()), label: std::marker::PhantomData }
    }
}

impl<L: Label> Counters<L> {
    pub fn inc(&self, label: L) {
        self.group.add(label.index(), 1);
    }

    pub fn get(&self, label: L) -> u64 {
        self.group.get(label.index())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn every_thread_counts_for_all() {
        let counters = [(); 3].map(|()| Counter::default());
        thread::scope(|scope| {
            for worker in 0..4 {
                let counters = &counters;
                scope.spawn(move || {
                    if worker > 1 {
                        // As two workers of two hundred, which share.
                        use_line(worker, 200);
                    }
                    for (at, counter) in counters.iter().enumerate() {
                        (0..10_000).for_each(|_| counter.add(at as u64));
                    }
                });
            }
        });
        assert_eq!(counters.each_ref().map(Counter::get), [0, 40_000, 80_000]);
    }

    #[test]
    fn a_place_that_is_given_back_counts_anew() {
        // Of a size that nothing else here has.
        let group = Group::new(321);
        let first = group.first;
        group.add(320, 7);
        assert_eq!((group.get(320), group.get(319)), (7, 0));
        drop(group);
        let group = Group::new(321);
        assert_eq!((group.first, group.get(320)), (first, 0));
        assert_eq!(group.first / BLOCK, (group.first + 320) / BLOCK);
    }
}
