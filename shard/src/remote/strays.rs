//! Owns the removals of one thread that a server of a cluster has said belong elsewhere: its slot moves, or has moved.
//!
//! They wait here until somebody who knows the cluster sends them to where they belong now, and are as good as done meanwhile
//! (see `removals`). While a slot is on its way, which can take minutes, they come back once a second.
//!
//! Refuses more than `STRAYS_MAX`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// As many as wait for one shard.
const STRAYS_MAX: usize = 4_096;

#[derive(Debug, Default)]
pub(crate) struct Strays {
    /// So that nobody takes the lock while there are none.
    has_some: AtomicBool,
    names: Mutex<VecDeque<String>>,
}

impl Strays {
    /// Takes a name, and gives back one that there is no room for.
    pub(crate) fn add(&self, name: String) -> Option<String> {
        let mut names = self.names();
        if names.len() >= STRAYS_MAX {
            return Some(name);
        }
        names.push_back(name);
        self.has_some.store(true, Ordering::Release);
        None
    }

    /// All of them, in order.
    pub(crate) fn take(&self) -> VecDeque<String> {
        if !self.has_some.load(Ordering::Acquire) {
            return VecDeque::new();
        }
        let mut names = self.names();
        self.has_some.store(false, Ordering::Release);
        std::mem::take(&mut names)
    }

    fn names(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_taken_in_order_and_the_last_gives_way() {
        let strays = Strays::default();
        assert!(strays.take().is_empty());
        let refused: Vec<_> = (0..STRAYS_MAX + 1).filter_map(|n| strays.add(n.to_string())).collect();
        assert_eq!(refused, [STRAYS_MAX.to_string()]);
        let taken = strays.take();
        assert_eq!((taken.len(), taken[0].as_str(), taken[1].as_str()), (STRAYS_MAX, "0", "1"));
        assert!(strays.take().is_empty() && strays.add("more".into()).is_none());
    }
}
