//! Owns the handle by which the L2 cache, its index and its pins share an entry.

use crate::entry::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared slot that holds an entry until it is removed.
pub(super) type EntryHandle<M> = Arc<Mutex<Option<Arc<Entry<M>>>>>;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
