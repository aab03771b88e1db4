//! Owns the roll of what the shared cache holds, in no order: a sweep goes round it in small pieces and finds what no longer
//! counts. moka's own expiry ends everything that is due in one go, in whoever calls it: half a million entries stop a thread for
//! seconds (tests/memory.rs).
//!
//! Refuses to let go of anything itself: it only says what to look at.

use super::{Moment, lock};
use crate::key::CacheKey;
use slab::Slab;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Each grows by itself, so that none takes long to move.
const SHEETS: usize = 256;

pub(super) struct Roll {
    sheets: Box<[Mutex<Sheet>]>,
    /// The sheet that is swept next.
    next: AtomicUsize,
    /// Sheets swept since a piece of leisure had more over than it might take.
    calm: AtomicUsize,
}

#[derive(Default)]
struct Sheet {
    places: Slab<Listed>,
    next: usize,
}

struct Listed {
    key: CacheKey,
    until: Instant,
    generation: u64,
}

/// Where an entry stands on the roll.
#[derive(Clone, Copy)]
pub(super) struct Place {
    sheet: usize,
    at: usize,
}

impl Roll {
    pub(super) fn new() -> Self {
        let sheets = (0..SHEETS).map(|_| Mutex::default()).collect();
        Self { sheets, next: AtomicUsize::new(0), calm: AtomicUsize::new(0) }
    }

    /// Its place, to be given back when it leaves.
    pub(super) fn enter(&self, key: CacheKey, until: Instant, generation: u64) -> Place {
        let sheet = (key.as_key().hash() >> 16) as usize % SHEETS;
        let at = lock(&self.sheets[sheet]).places.insert(Listed { key, until, generation });
        Place { sheet, at }
    }

    pub(super) fn leave(&self, place: Place) {
        let mut sheet = lock(&self.sheets[place.sheet]);
        sheet.places.try_remove(place.at);
        if sheet.places.is_empty() {
            *sheet = Sheet::default();
        }
    }

    /// Looks at the next `places` or a few more, and returns up to `most` that are over.
    pub(super) fn sweep(&self, places: usize, most: usize, moment: Moment) -> Vec<CacheKey> {
        let (mut over, mut looked) = (Vec::new(), 0);
        while looked < places && over.len() < most {
            let number = self.next.load(Ordering::Relaxed) % SHEETS;
            let mut sheet = lock(&self.sheets[number]);
            while over.len() < most && looked < places && sheet.next < sheet.places.capacity() {
                let is_over = |listed: &&Listed| listed.until <= moment.now || listed.generation != moment.generation;
                over.extend(sheet.places.get(sheet.next).filter(is_over).map(|listed| listed.key.clone()));
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
    pub(super) fn sweep_at_leisure(&self, places: usize, most: usize, moment: Moment) -> (Vec<CacheKey>, bool) {
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
    use crate::key::KeyBuilder;
    use std::collections::BTreeMap;
    use std::time::Duration;

    #[test]
    fn a_sweep_finds_what_is_over_piece_by_piece() {
        let now = Instant::now();
        let (moment, later) = (Moment { now, generation: 1 }, now + Duration::from_secs(1));
        let roll = Roll::new();
        let key = |number: u16| KeyBuilder::new().part(&number.to_le_bytes()).key().to_owned();
        let mut places = BTreeMap::new();
        for number in 0..1_000 {
            // Every fourth in time is of an older generation, every other one not in time.
            let (until, generation) = if number % 2 == 0 { (later, u64::from(number % 4 != 0)) } else { (now, 1) };
            let key = key(number);
            let place = roll.enter(key.clone(), until, generation);
            places.insert(key.as_key().as_bytes().to_vec(), place);
        }
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
}
