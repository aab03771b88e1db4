//! Owns the roll of what the shared cache holds, in no order: a sweep goes round it in small pieces and finds what no longer
//! counts. moka's own expiry ends everything that is due in one go, in whoever calls it: half a million entries stop a thread for
//! seconds (tests/memory.rs).
//!
//! Refuses to let go of anything itself: it only says what to look at.

use super::{Handle, Moment, lock};
use crate::entry::{Entry, Meta, Since};
use crate::key::{CacheKey, Prehashed};
use slab::Slab;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Each grows by itself, so that none takes long to move.
const SHEETS: usize = 256;

pub(super) struct Roll<M> {
    sheets: Box<[Mutex<Sheet<M>>]>,
    /// The sheet that is swept next.
    next: AtomicUsize,
    /// Sheets swept since a piece of leisure had more over than it might take.
    calm: AtomicUsize,
}

struct Sheet<M> {
    places: Slab<Listed<M>>,
    next: usize,
    /// Places by the names that entries have at their shards.
    names: HashMap<u64, usize, Prehashed>,
}

struct Listed<M> {
    key: CacheKey,
    until: Instant,
    /// In which it was last seen to count.
    generation: u64,
    entry: Handle<M>,
    name: Option<u64>,
}

impl<M> Default for Sheet<M> {
    fn default() -> Self {
        Self { places: Slab::new(), next: 0, names: HashMap::default() }
    }
}

impl<M: Meta> Listed<M> {
    fn is_over(&mut self, moment: Moment<'_>) -> bool {
        if self.until <= moment.now {
            return true;
        }
        if self.generation != moment.generation() {
            self.generation = moment.generation();
            return lock(&self.entry).as_ref().is_none_or(|entry| !moment.counts(entry));
        }
        false
    }
}

fn sheet_of(hash: u64) -> usize {
    (hash >> 16) as usize % SHEETS
}

/// Where an entry stands on the roll.
#[derive(Clone, Copy)]
pub(super) struct Place {
    sheet: usize,
    at: usize,
}

impl<M: Meta> Roll<M> {
    pub(super) fn new() -> Self {
        let sheets = (0..SHEETS).map(|_| Mutex::default()).collect();
        Self { sheets, next: AtomicUsize::new(0), calm: AtomicUsize::new(0) }
    }

    /// Its place, to be given back when it leaves.
    pub(super) fn enter(&self, key: CacheKey, listed: &Arc<Entry<M>>, entry: Handle<M>) -> Place {
        let name = listed.home().map(|home| home.name);
        let number = sheet_of(name.unwrap_or_else(|| key.as_key().hash()));
        let generation = listed.since().map_or(0, Since::generation);
        let mut sheet = lock(&self.sheets[number]);
        let at = sheet.places.insert(Listed { key, until: listed.until(), generation, entry, name });
        if let Some(name) = name {
            sheet.names.insert(name, at);
        }
        Place { sheet: number, at }
    }

    pub(super) fn leave(&self, place: Place) {
        let mut sheet = lock(&self.sheets[place.sheet]);
        let left = sheet.places.try_remove(place.at);
        if let Some(name) = left.and_then(|left| left.name)
            && sheet.names.get(&name) == Some(&place.at)
        {
            sheet.names.remove(&name);
        }
        if sheet.places.is_empty() {
            *sheet = Sheet::default();
        }
    }

    /// What is held of the entry that has this name at its shard.
    pub(super) fn named(&self, name: u64) -> Option<(CacheKey, Arc<Entry<M>>)> {
        let sheet = lock(&self.sheets[sheet_of(name)]);
        let listed = sheet.places.get(*sheet.names.get(&name)?)?;
        Some((listed.key.clone(), lock(&listed.entry).clone()?))
    }

    /// Looks at the next `places` or a few more, and returns up to `most` that are over.
    pub(super) fn sweep(&self, places: usize, most: usize, moment: Moment<'_>) -> Vec<CacheKey> {
        let (mut over, mut looked) = (Vec::new(), 0);
        while looked < places && over.len() < most {
            let number = self.next.load(Ordering::Relaxed) % SHEETS;
            let mut sheet = lock(&self.sheets[number]);
            while over.len() < most && looked < places && sheet.next < sheet.places.capacity() {
                let at = sheet.next;
                let over_here = |listed: &mut Listed<M>| listed.is_over(moment).then(|| listed.key.clone());
                over.extend(sheet.places.get_mut(at).and_then(over_here));
                sheet.next += 1;
                looked += 1;
            }
            if sheet.next >= sheet.places.capacity() {
                sheet.next = 0;
                looked += 1;
                self.next.store(number + 1, Ordering::Relaxed);
                self.calm.fetch_add(1, Ordering::Relaxed);
            }
        }
        over
    }

    /// Sweeps a piece, and says whether there was too much of it somewhere in the last round: then there may be more.
    pub(super) fn sweep_at_leisure(&self, places: usize, most: usize, moment: Moment<'_>) -> (Vec<CacheKey>, bool) {
        let over = self.sweep(places, most, moment);
        if over.len() == most {
            self.calm.store(0, Ordering::Relaxed);
        }
        (over, self.calm.load(Ordering::Relaxed) <= SHEETS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::Note;
    use crate::entry::{Epochs, Home, Purge, Scope, UNNUMBERED};
    use crate::key::KeyBuilder;
    use bytes::Bytes;
    use std::collections::BTreeMap;
    use std::time::Duration;

    #[test]
    fn a_sweep_finds_what_is_over_piece_by_piece() {
        let (now, epochs, roll) = (Instant::now(), Epochs::new(0), Roll::new());
        let key = |number: u16| KeyBuilder::new().part(&number.to_le_bytes()).key().to_owned();
        let early = epochs.since();
        epochs.purge(Purge { scope: Scope::Everything, is_soft: false }, UNNUMBERED);
        let late = epochs.since();
        let mut places = BTreeMap::new();
        for number in 0..1_000 {
            // Every fourth in time was purged, every other one is not in time.
            let keep = Duration::from_secs(if number % 2 == 0 { 60 } else { 1 });
            let entry = Entry::new(Note(String::new()), Bytes::new(), keep, now);
            let entry = Arc::new(entry.begun(if number % 4 == 0 { early } else { late }));
            let key = key(number);
            let place = roll.enter(key.clone(), &entry, Arc::new(Mutex::new(Some(entry.clone()))));
            places.insert(key.as_key().as_bytes().to_vec(), place);
        }
        let moment = Moment::new(now + Duration::from_secs(2), &epochs);
        let mut pieces = 0;
        let mut is_untidy = true;
        while is_untidy {
            let over;
            (over, is_untidy) = roll.sweep_at_leisure(100, 7, moment);
            assert!(over.len() <= 7);
            over.iter().for_each(|key| roll.leave(places.remove(key.as_key().as_bytes()).expect("it is found once")));
            pieces += 1;
            assert!(pieces < 10_000, "it comes to an end");
        }
        assert_eq!(places.len(), 250);
        assert!((0..100).all(|_| roll.sweep(100, 7, moment).is_empty()));
    }

    #[test]
    fn an_entry_is_found_by_its_name_at_the_shard_until_it_leaves() {
        let roll = Roll::new();
        let key = KeyBuilder::new().part(b"a").key().to_owned();
        let enter = |text: &str| {
            let entry = Entry::new(Note(text.into()), Bytes::new(), Duration::from_secs(60), Instant::now());
            let entry = Arc::new(entry.at_home(Some(Home { shard: 0, name: 77 })));
            roll.enter(key.clone(), &entry, Arc::new(Mutex::new(Some(entry.clone()))))
        };
        let named = || roll.named(77).map(|(_, entry)| entry.meta.0.clone());
        let old = enter("old");
        let new = enter("new");
        roll.leave(old);
        assert_eq!(named().as_deref(), Some("new"), "the one before has left later");
        roll.leave(new);
        assert_eq!(named(), None);
    }
}
