//! Owns entries of hot keys that the shared cache pushed out: they stay until they are replaced, over, or no longer hot.
//!
//! The shared cache lets go by what was asked for lately, and a flood of other keys is asked for too; what half the clients ask for
//! must not be fetched anew because of it.
//!
//! Refuses more bytes than its part of the memory.
//! Invariant: of a key there is at most one entry here, and none that the key's removal or change has ended.

use super::{Handle, Moment, Stored, lock};
use crate::entry::{Entry, Meta, Since};
use crate::key::{CacheKey, KeyRef, Prehashed};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

pub(super) struct Pins<M> {
    bytes_max: usize,
    /// How many there are, so that nobody takes the lock for nothing.
    count: AtomicUsize,
    held: Mutex<Held<M>>,
}

struct Held<M> {
    bytes: usize,
    pins: HashMap<CacheKey, Stored<M>, Prehashed>,
    /// When hot keys were last removed: an entry on its way here may have been begun before that.
    ended: HashMap<u64, Since, Prehashed>,
}

impl<M: Meta> Pins<M> {
    pub(super) fn new(bytes_max: usize) -> Self {
        let held = Held { bytes: 0, pins: HashMap::default(), ended: HashMap::default() };
        Self { bytes_max, count: AtomicUsize::new(0), held: Mutex::new(held) }
    }

    /// Takes an entry in, if there is room and its key was not removed since it was begun; gives back what is to be let go of.
    pub(super) fn keep(&self, key: &CacheKey, stored: Stored<M>) -> Vec<Stored<M>> {
        let Some(entry) = stored.entry() else { return vec![stored] };
        let mut held = lock(&self.held);
        let mut out: Vec<_> = held.take(key).into_iter().collect();
        let ended = held.ended.get(&key.as_key().hash());
        let is_ended = ended.is_some_and(|ended| entry.since().is_none_or(|since| since.is_before(*ended)));
        if held.bytes + stored.weight as usize <= self.bytes_max && entry.is_live() && !is_ended {
            held.bytes += stored.weight as usize;
            held.pins.insert(key.clone(), stored);
        } else {
            out.push(stored);
        }
        self.count.store(held.pins.len(), Ordering::Release);
        out
    }

    pub(super) fn get(&self, key: &KeyRef<'_>) -> Option<Arc<Entry<M>>> {
        if self.is_empty() {
            return None;
        }
        lock(&self.held).pins.get(&key.to_owned())?.entry()
    }

    pub(super) fn take(&self, key: &KeyRef<'_>) -> Option<Stored<M>> {
        if self.is_empty() {
            return None;
        }
        let mut held = lock(&self.held);
        let taken = held.take(&key.to_owned());
        self.count.store(held.pins.len(), Ordering::Release);
        taken
    }

    /// Takes out what is here of a key, unless it is the given one.
    pub(super) fn take_other(&self, key: &KeyRef<'_>, own: &Handle<M>) -> Option<Stored<M>> {
        if self.is_empty() {
            return None;
        }
        let key = key.to_owned();
        let mut held = lock(&self.held);
        let is_other = held.pins.get(&key).is_some_and(|stored| !Arc::ptr_eq(&stored.entry, own));
        let taken = if is_other { held.take(&key) } else { None };
        self.count.store(held.pins.len(), Ordering::Release);
        taken
    }

    /// Takes out what is here of a hot key that was removed, and lets nothing in that was begun before `now`.
    pub(super) fn end(&self, key: &KeyRef<'_>, now: Since) -> Option<Stored<M>> {
        let mut held = lock(&self.held);
        held.ended.insert(key.hash(), now);
        let taken = held.take(&key.to_owned());
        self.count.store(held.pins.len(), Ordering::Release);
        taken
    }

    /// Gives back what no longer counts, or is no longer hot.
    pub(super) fn sweep(&self, moment: Moment<'_>, is_hot: impl Fn(u64) -> bool) -> Vec<Stored<M>> {
        let mut held = lock(&self.held);
        held.ended.retain(|hash, _| is_hot(*hash));
        let is_over = |(key, stored): (&CacheKey, &Stored<M>)| {
            let counts = stored.entry().is_some_and(|entry| moment.counts(&entry));
            (!counts || !is_hot(key.as_key().hash())).then(|| key.clone())
        };
        let over: Vec<_> = held.pins.iter().filter_map(is_over).collect();
        let out = over.iter().filter_map(|key| held.take(key)).collect();
        self.count.store(held.pins.len(), Ordering::Release);
        out
    }

    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<M> Held<M> {
    fn take(&mut self, key: &CacheKey) -> Option<Stored<M>> {
        let taken = self.pins.remove(key)?;
        self.bytes -= taken.weight as usize;
        Some(taken)
    }
}
