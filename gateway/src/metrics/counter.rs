//! Counters with one cell per thread.
//!
//! The cells of one thread are contiguous across all counters, so that the counters of a request
//! touch few cache lines. Adding allocates nothing (after the first use of a block) and takes no
//! lock. Invariant: a cell index belongs to one counter at a time, and its cells are zero when the
//! counter gets it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Stripes for threads. Threads beyond that number share stripes, which costs speed but not
/// correctness.
const STRIPES: usize = 16;
/// Cells that are allocated at once, 4 KiB for each thread.
const BLOCK_CELLS: usize = 512;
/// Blocks of a stripe. A million cells: those of several thousand routes, before and after a reload
/// together.
const BLOCKS: usize = 2_048;
/// Cells that groups of at most `size` cells can have: a group does not cross a block.
pub(super) const fn cells_for_groups_of(size: usize) -> usize {
    (BLOCKS - 1) * (BLOCK_CELLS - size)
}

/// First cell of the last block, which all counters beyond the bound share.
const OVERFLOW: usize = (BLOCKS - 1) * BLOCK_CELLS;

/// A block of `BLOCK_CELLS` cells of one stripe, aligned to a cache line.
#[repr(align(64))]
struct CounterBlock([AtomicU64; BLOCK_CELLS]);

/// The cells of one thread, in blocks that are allocated on first use.
type Stripe = [OnceLock<Box<CounterBlock>>; BLOCKS];

/// The stripes, by thread.
static CELLS: [Stripe; STRIPES] = [const { [const { OnceLock::new() }; BLOCKS] }; STRIPES];

/// Allocates cell indexes to counters.
static ALLOCATOR: Mutex<CellAllocator> = Mutex::new(CellAllocator { next: 0, free: BTreeMap::new() });

/// Allocator of cell indexes: the next unused index, and a free list of released groups by size.
struct CellAllocator {
    next: usize,
    /// First indexes of released groups, by size of the group.
    free: BTreeMap<usize, Vec<usize>>,
}

/// The stripe that a thread adds to, and whether it shares it.
#[derive(Clone, Copy)]
struct ThreadStripe {
    stripe: &'static Stripe,
    /// No other thread writes to the stripe.
    is_exclusive: bool,
}

thread_local! {
    static THREAD_STRIPE: Cell<ThreadStripe> = const { Cell::new(ThreadStripe { stripe: &CELLS[0], is_exclusive: false }) };
}

/// Assigns the stripe of worker `index` to the calling thread. No two running workers have the same
/// index.
pub(crate) fn use_stripe(index: usize, workers: usize) {
    // Threads that are not workers use the first stripe.
    let is_exclusive = workers < STRIPES;
    let stripe = &CELLS[if is_exclusive { index + 1 } else { index % STRIPES }];
    THREAD_STRIPE.set(ThreadStripe { stripe, is_exclusive });
}

/// `count` counters with contiguous cells.
pub(super) struct CounterGroup {
    first: usize,
    count: usize,
}

impl CounterGroup {
    pub(super) fn new(count: usize) -> Self {
        let mut allocator = ALLOCATOR.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = allocator.free.get_mut(&count).and_then(Vec::pop) {
            return CounterGroup { first, count };
        }
        // A group does not cross a block.
        let room = BLOCK_CELLS - allocator.next % BLOCK_CELLS;
        let first = if room < count { allocator.next + room } else { allocator.next };
        if first + count > OVERFLOW {
            tracing::error!("more than a million counters: the rest share cells and show wrong values");
            return CounterGroup { first: OVERFLOW, count: count.min(BLOCK_CELLS) };
        }
        allocator.next = first + count;
        CounterGroup { first, count }
    }

    pub(super) fn add(&self, at: usize, count: u64) {
        let ThreadStripe { stripe, is_exclusive } = THREAD_STRIPE.get();
        let index = self.first + at;
        let block = stripe[index / BLOCK_CELLS]
            .get_or_init(|| Box::new(CounterBlock([const { AtomicU64::new(0) }; BLOCK_CELLS])));
        let cell = &block.0[index % BLOCK_CELLS];
        if is_exclusive {
            // No other thread writes the cell. An atomic addition would cost five times as much.
            cell.store(cell.load(Relaxed).wrapping_add(count), Relaxed);
        } else {
            cell.fetch_add(count, Relaxed);
        }
    }

    /// The cells of the counter, one in each stripe where its block is allocated.
    fn cells(&self, at: usize) -> impl Iterator<Item = &'static AtomicU64> {
        let index = self.first + at;
        CELLS.iter().filter_map(move |stripe| Some(&stripe[index / BLOCK_CELLS].get()?.0[index % BLOCK_CELLS]))
    }

    pub(super) fn get(&self, at: usize) -> u64 {
        self.cells(at).map(|cell| cell.load(Relaxed)).fold(0, u64::wrapping_add)
    }
}

impl Drop for CounterGroup {
    fn drop(&mut self) {
        if self.first == OVERFLOW {
            return;
        }
        for at in 0..self.count {
            self.cells(at).for_each(|cell| cell.store(0, Relaxed));
        }
        let mut allocator = ALLOCATOR.lock().unwrap_or_else(PoisonError::into_inner);
        allocator.free.entry(self.count).or_default().push(self.first);
    }
}

/// A counter with one cell per stripe; its value is the sum of the cells. Adding to it never waits
/// for another thread.
pub(crate) struct Counter(CounterGroup);

impl Default for Counter {
    fn default() -> Self {
        Counter(CounterGroup::new(1))
    }
}

impl Counter {
    /// The number of its cells.
    pub(crate) const CELLS: usize = 1;

    pub(crate) fn inc(&self) {
        self.add(1);
    }

    pub(crate) fn add(&self, count: u64) {
        self.0.add(0, count);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.get(0)
    }
}

/// The closed set of values of one label.
pub(crate) trait Label: Copy + Send + Sync + 'static {
    /// The label's name.
    const NAME: &'static str;
    /// Every value, in the order of `index`.
    const ALL: &'static [Self];
    fn index(self) -> usize;
    fn as_str(self) -> &'static str;
}

/// One counter per value of a label.
pub(crate) struct Counters<L> {
    group: CounterGroup,
    label: std::marker::PhantomData<L>,
}

impl<L: Label> Default for Counters<L> {
    fn default() -> Self {
        Counters { group: CounterGroup::new(L::ALL.len()), label: std::marker::PhantomData }
    }
}

impl<L: Label> Counters<L> {
    /// The number of its cells.
    pub(crate) const CELLS: usize = L::ALL.len();

    pub(crate) fn inc(&self, label: L) {
        self.add(label, 1);
    }

    pub(crate) fn add(&self, label: L, count: u64) {
        self.group.add(label.index(), count);
    }

    pub(crate) fn get(&self, label: L) -> u64 {
        self.group.get(label.index())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn additions_of_all_threads_are_summed() {
        let counters = [(); 3].map(|()| Counter::default());
        thread::scope(|scope| {
            for worker in 0..4 {
                let counters = &counters;
                scope.spawn(move || {
                    if worker > 1 {
                        // Two of 200 workers: they share stripes with others.
                        use_stripe(worker, 200);
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
    fn released_cells_are_reused_from_zero() {
        // A size that no other group of this process has.
        let group = CounterGroup::new(321);
        let first = group.first;
        group.add(320, 7);
        assert_eq!((group.get(320), group.get(319)), (7, 0));
        drop(group);
        let group = CounterGroup::new(321);
        assert_eq!((group.first, group.get(320)), (first, 0));
        assert_eq!(group.first / BLOCK_CELLS, (group.first + 320) / BLOCK_CELLS);
    }
}
