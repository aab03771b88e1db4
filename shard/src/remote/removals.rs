//! Owns which entries of a shard this process has removed and the server has not confirmed yet: they are as good as gone, although the
//! server would still answer with them.
//!
//! Refuses to grow beyond what is queued: see `queue`.
//! Invariant: from the moment a removal is queued until the server has confirmed it, or it was given up, no thread reads the entry.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(crate) struct Removals {
    /// So that nobody takes the lock while there are none.
    count: AtomicUsize,
    /// By the entries' names, how many removals of each.
    names: Mutex<HashMap<u64, u32>>,
}

impl Removals {
    pub(crate) fn begin(&self, name: u64) {
        let mut names = self.names();
        *names.entry(name).or_default() += 1;
        self.count.store(names.len(), Ordering::Release);
    }

    pub(crate) fn end(&self, name: u64) {
        let mut names = self.names();
        if let Some(count) = names.get_mut(&name) {
            *count -= 1;
            if *count == 0 {
                names.remove(&name);
            }
        }
        self.count.store(names.len(), Ordering::Release);
    }

    pub(crate) fn has(&self, name: u64) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.names().contains_key(&name)
    }

    fn names(&self) -> MutexGuard<'_, HashMap<u64, u32>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_gone_until_the_last_of_its_removals_has_ended() {
        let removals = Removals::default();
        removals.begin(1);
        removals.begin(1);
        removals.end(1);
        assert!(removals.has(1) && !removals.has(2));
        removals.end(1);
        assert!(!removals.has(1));
        removals.end(1);
        assert!(!removals.has(1));
    }
}
