//! Owns which keys this process is asked for most: counted by each thread, merged when a thread reports, about once a second.
//!
//! A key is hot from a rate of lookups on, all threads together, and stays hot down to half of it, so that one at the border does
//! not come and go. Counting is sampled (see `tally`): a lookup of most keys costs one decrement.
//!
//! Refuses to keep more than `HOT_MAX` keys, whatever clients ask for.
//! Invariant: whether a key is hot is answered without a lock while no key is.

mod tally;

pub(crate) use tally::Tally;

use crate::key::{CacheKey, Prehashed};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

/// Enough for what can be hot at a time: 64 keys at the default rate are 64,000 lookups a second.
const HOT_MAX: usize = 64;

/// A rate is told from chance by about so many samples a second.
const SAMPLES: u32 = 32;

/// Sampling more rarely than this saves nothing any more.
const EVERY_MAX: u32 = 32;

/// A key that is hot.
#[derive(Clone, Debug)]
pub struct HotKey {
    pub key: CacheKey,
    /// Lookups, over all threads of this process.
    pub per_second: f64,
}

pub(crate) struct Hot {
    /// Lookups per second from which a key is hot.
    rate: u32,
    count: AtomicUsize,
    keys: RwLock<Arc<Keys>>,
    board: Mutex<HashMap<u64, Vec<HotKey>>>,
    members: AtomicU64,
}

type Keys = HashMap<u64, HotKey, Prehashed>;

impl Hot {
    pub(crate) fn new(rate: u32) -> Self {
        Self {
            rate: rate.max(1),
            count: AtomicUsize::new(0),
            keys: RwLock::default(),
            board: Mutex::default(),
            members: AtomicU64::new(0),
        }
    }

    pub(crate) fn rate(&self) -> u32 {
        self.rate
    }

    /// What a thread counts with.
    pub(crate) fn tally(&self) -> Tally {
        let every = (self.rate / SAMPLES).clamp(1, EVERY_MAX);
        Tally::new(self.members.fetch_add(1, Ordering::Relaxed), every)
    }

    pub(crate) fn has(&self, hash: u64) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.keys().contains_key(&hash)
    }

    /// The hottest first.
    pub(crate) fn list(&self) -> Vec<HotKey> {
        let mut list: Vec<_> = self.keys().values().cloned().collect();
        list.sort_by(|one, other| other.per_second.total_cmp(&one.per_second));
        list
    }

    /// Takes what a thread has counted until now, and finds anew what is hot.
    pub(crate) fn report(&self, tally: &mut Tally, now: Instant) {
        let Some(seen) = tally.turn(now) else { return };
        let mut board = self.board();
        if seen.is_empty() {
            if board.remove(&tally.member()).is_none() {
                return;
            }
        } else {
            board.insert(tally.member(), seen);
        }
        self.merge(&board);
    }

    /// A thread has ended.
    pub(crate) fn left(&self, tally: &Tally) {
        let mut board = self.board();
        if board.remove(&tally.member()).is_some() {
            self.merge(&board);
        }
    }

    fn merge(&self, board: &HashMap<u64, Vec<HotKey>>) {
        let mut sums: Keys = HashMap::default();
        for seen in board.values().flatten() {
            let sum = sums.entry(seen.key.as_key().hash());
            sum.and_modify(|sum| sum.per_second += seen.per_second).or_insert_with(|| seen.clone());
        }
        let before = self.keys();
        sums.retain(|hash, seen| {
            let least = if before.contains_key(hash) { self.rate / 2 } else { self.rate };
            seen.per_second >= f64::from(least)
        });
        if sums.len() > HOT_MAX {
            let mut rates: Vec<_> = sums.values().map(|seen| seen.per_second).collect();
            rates.sort_by(|one, other| other.total_cmp(one));
            sums.retain(|_, seen| seen.per_second > rates[HOT_MAX]);
        }
        let count = sums.len();
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(sums);
        self.count.store(count, Ordering::Release);
    }

    fn keys(&self) -> Arc<Keys> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn board(&self) -> MutexGuard<'_, HashMap<u64, Vec<HotKey>>> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::KeyBuilder;
    use std::time::Duration;

    fn key(n: u64) -> CacheKey {
        KeyBuilder::new().part(&n.to_le_bytes()).key().to_owned()
    }

    fn ask(tally: &mut Tally, key: &CacheKey, times: u32) {
        (0..times).for_each(|_| tally.see(&key.as_key()));
    }

    #[test]
    fn a_key_is_hot_by_what_all_threads_see_and_cools_below_half_the_rate() {
        let hot = Hot::new(1_000);
        let (mut one, mut two) = (hot.tally(), hot.tally());
        let (key, mut now) = (key(1), Instant::now());
        let mut second = |per_thread: u32, hot: &Hot| {
            now += Duration::from_secs(1);
            for tally in [&mut one, &mut two] {
                ask(tally, &key, per_thread);
                hot.report(tally, now);
            }
            hot.has(key.as_key().hash())
        };
        assert!(!second(300, &hot) && !second(300, &hot) && !second(300, &hot), "600 a second are not hot");
        assert!((0..5).any(|_| second(800, &hot)), "1,600 a second are");
        let told = hot.list()[0].per_second;
        assert!((1_000.0..2_500.0).contains(&told), "{told}");
        (0..5).for_each(|_| assert!(second(350, &hot), "and stay so at 700"));
        assert!((0..8).any(|_| !second(100, &hot)), "not at 200");
        assert!(hot.list().is_empty());
    }

    #[test]
    fn many_keys_that_are_asked_for_alike_are_none_of_them_hot() {
        let hot = Hot::new(1_000);
        let mut tally = hot.tally();
        let keys: Vec<_> = (0..5_000).map(key).collect();
        let mut now = Instant::now();
        for _ in 0..5 {
            now += Duration::from_secs(1);
            for key in &keys {
                ask(&mut tally, key, 40);
            }
            hot.report(&mut tally, now);
            assert!(hot.list().is_empty(), "{:?}", hot.list());
        }
    }

    #[test]
    fn a_hot_key_is_found_among_many_others() {
        let hot = Hot::new(1_000);
        let mut tally = hot.tally();
        let keys: Vec<_> = (0..5_000).map(key).collect();
        let mut now = Instant::now();
        for _ in 0..4 {
            now += Duration::from_secs(1);
            for (n, cold) in keys.iter().enumerate() {
                ask(&mut tally, cold, 20);
                ask(&mut tally, &keys[7], if n % 2 == 0 { 2 } else { 0 });
            }
            hot.report(&mut tally, now);
        }
        let list: Vec<_> = hot.list().into_iter().map(|seen| seen.key).collect();
        assert_eq!(list, [keys[7].clone()]);
    }

    #[test]
    fn no_more_than_the_hottest_few_are_kept_and_those_of_a_thread_that_ended_go() {
        let hot = Hot::new(32);
        let (mut one, mut now) = (hot.tally(), Instant::now());
        for _ in 0..3 {
            now += Duration::from_secs(1);
            (0..HOT_MAX as u64 * 2).for_each(|n| ask(&mut one, &key(n), 100));
            hot.report(&mut one, now);
        }
        assert!(hot.list().len() <= HOT_MAX);
        hot.left(&one);
        assert!(hot.list().is_empty() && !hot.has(key(0).as_key().hash()));
    }
}
