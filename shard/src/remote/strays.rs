//! Owns the removals of one thread that a server of a cluster has said belong elsewhere: its slot moves, or has moved.
//!
//! They wait here until somebody who knows the cluster sends them to where they belong now, and are as good as done meanwhile
//! (see `removals`). While a slot is on its way, which can take minutes, they come back once a second.
//!
//! Refuses more than `STRAYS_MAX`, two of one name, and those that have been astray for longer than `ASTRAY_MAX`: a resharding that
//! nobody ends.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// As many as wait for one shard.
const STRAYS_MAX: usize = 4_096;

const ASTRAY_MAX: Duration = Duration::from_secs(600);

/// A removal without a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stray {
    pub(crate) name: String,
    /// When it was first sent elsewhere.
    pub(crate) since: Instant,
}

/// What became of one that was put aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aside {
    Waits,
    /// Another of its name waits already.
    Twice,
    GivenUp,
}

#[derive(Debug, Default)]
pub(crate) struct Strays {
    /// So that nobody takes the lock while there are none.
    has_some: AtomicBool,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    strays: VecDeque<Stray>,
    names: HashSet<String>,
}

impl Strays {
    pub(crate) fn add(&self, stray: Stray) -> Aside {
        let mut held = self.held();
        if held.names.contains(&stray.name) {
            return Aside::Twice;
        }
        if held.strays.len() >= STRAYS_MAX || stray.since.elapsed() > ASTRAY_MAX {
            return Aside::GivenUp;
        }
        held.names.insert(stray.name.clone());
        held.strays.push_back(stray);
        self.has_some.store(true, Ordering::Release);
        Aside::Waits
    }

    /// All of them, in order.
    pub(crate) fn take(&self) -> VecDeque<Stray> {
        if !self.has_some.load(Ordering::Acquire) {
            return VecDeque::new();
        }
        let mut held = self.held();
        self.has_some.store(false, Ordering::Release);
        held.names.clear();
        std::mem::take(&mut held.strays)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_taken_in_order_and_the_last_and_the_oldest_give_way() {
        let (strays, since) = (Strays::default(), Instant::now());
        let stray = |n: usize| Stray { name: n.to_string(), since };
        assert!(strays.take().is_empty());
        for n in 0..STRAYS_MAX {
            assert_eq!(strays.add(stray(n)), Aside::Waits);
        }
        assert_eq!((strays.add(stray(0)), strays.add(stray(STRAYS_MAX))), (Aside::Twice, Aside::GivenUp));
        let taken = strays.take();
        assert_eq!((taken.len(), &taken[0], &taken[1]), (STRAYS_MAX, &stray(0), &stray(1)));
        assert!(strays.take().is_empty());
        assert_eq!(strays.add(stray(0)), Aside::Waits);
        if let Some(since) = since.checked_sub(2 * ASTRAY_MAX) {
            assert_eq!(strays.add(Stray { name: "old".into(), since }), Aside::GivenUp);
        }
    }
}
