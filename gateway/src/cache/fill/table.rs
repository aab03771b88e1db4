//! The fills in progress, by cache key.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shard::{CacheKey, EpochSnapshot, KeyRef};

use super::budget::FetchBudget;
use super::state::{Fill, FillPhase};

/// Requests at one fill. Further requests go to the origin on their own, because their response is
/// already late.
const SLOTS_MAX: usize = 20_000;
/// Number of locks of the table.
const PARTITIONS: usize = 64;

/// Map of one lock stripe of the fill table.
type FillPartition = HashMap<CacheKey, Arc<Fill>, foldhash::fast::RandomState>;

/// The fills in progress in this process, and the memory that their bodies hold.
pub(crate) struct FillTable {
    partitions: Box<[Mutex<FillPartition>]>,
    budget: Arc<FetchBudget>,
}

impl Default for FillTable {
    fn default() -> Self {
        FillTable { partitions: (0..PARTITIONS).map(|_| Mutex::default()).collect(), budget: Arc::default() }
    }
}

/// The entry of a fill in the table, by which it can be removed.
#[derive(Clone)]
pub(super) struct Registration {
    table: Arc<FillTable>,
    key: CacheKey,
}

impl Registration {
    /// Removes the fill, unless its key has a newer one: no further request joins it.
    pub(super) fn remove(&self, fill: &Arc<Fill>) {
        let mut partition = self.table.partition(self.key.as_key().hash());
        if partition.get(&self.key).is_some_and(|current| Arc::ptr_eq(current, fill)) {
            partition.remove(&self.key);
        }
    }
}

/// A fill and the place of the request that entered.
pub(super) enum Entered {
    New(Arc<Fill>, Registration),
    Existing(Arc<Fill>, Registration, usize),
    Full,
}

impl FillTable {
    pub(crate) fn budget(&self) -> &Arc<FetchBudget> {
        &self.budget
    }

    /// Enters the fill of `key`, or a new one that begins at `epoch`. A fill that began before the
    /// key was removed is left to the requests that are at it already.
    pub(super) fn enter(
        self: &Arc<Self>,
        key: &KeyRef<'_>,
        epoch: EpochSnapshot,
        is_current: impl FnOnce(EpochSnapshot) -> bool,
    ) -> Entered {
        let mut partition = self.partition(key.hash());
        let registration = Registration { table: Arc::clone(self), key: key.to_owned() };
        if let Some(fill) = partition.get(&registration.key).filter(|fill| fill.epoch.is_some_and(is_current)) {
            let mut state = fill.lock();
            if state.slots.len() >= SLOTS_MAX {
                return Entered::Full;
            }
            let slot = match state.phase {
                // The body is buffered from its first byte while the fill is in the table.
                FillPhase::Streaming(..) => state.add_reader(),
                _ => state.add_waiting(),
            };
            return Entered::Existing(Arc::clone(fill), registration, slot);
        }
        let fill = Arc::new(Fill::new(Some(epoch)));
        partition.insert(registration.key.clone(), Arc::clone(&fill));
        Entered::New(fill, registration)
    }

    fn partition(&self, hash: u64) -> MutexGuard<'_, FillPartition> {
        let index = usize::try_from(hash >> 32).unwrap_or(0) % PARTITIONS;
        self.partitions[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.partitions.iter().all(|partition| partition.lock().is_ok_and(|partition| partition.is_empty()))
    }
}
