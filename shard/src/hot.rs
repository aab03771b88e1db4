//! Owns the hot keys of this process: lookups are counted per thread and merged when a thread
//! reports, about once a second.
//!
//! A key becomes hot at a rate of lookups over all threads, and stays hot until the rate falls
//! below half of it, so that a key at the threshold does not flap. Counting is sampled (see
//! `top_k`): most lookups cost one decrement.
//!
//! Refuses to keep more than `HOT_MAX` keys, whatever clients request.
//! Invariant: `is_hot` takes no lock while there is no hot key.

mod top_k;

pub(crate) use top_k::TopKSketch;

use crate::key::{CacheKey, Prehashed};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

/// Maximum number of hot keys: 64 keys at the default rate are 64,000 lookups a second. Of more,
/// those with the lowest rates are dropped.
const HOT_MAX: usize = 64;

/// Samples per second at the hot rate: enough to distinguish the rate from chance.
const SAMPLES_PER_SECOND: u32 = 32;

/// A longer sampling interval saves no measurable work.
const SAMPLE_INTERVAL_MAX: u32 = 32;

/// A frequently requested key and its lookup rate; it is hot from the configured rate on.
#[derive(Clone, Debug)]
pub struct HotKey {
    pub key: CacheKey,
    /// Lookups per second, over all threads of this process.
    pub per_second: f64,
}

/// The hot keys of the process, at most `HOT_MAX`, as a shared map that each merge replaces, with
/// the latest report of each thread behind a lock.
pub(crate) struct HotKeys {
    /// Lookups per second from which a key is hot.
    rate: u32,
    count: AtomicUsize,
    keys: RwLock<Arc<HotKeysByHash>>,
    reports: Mutex<HashMap<u64, Vec<HotKey>>>,
    next_thread: AtomicU64,
}

/// Hot keys with their rates, by key hash.
type HotKeysByHash = HashMap<u64, HotKey, Prehashed>;

impl HotKeys {
    pub(crate) fn new(rate: u32) -> Self {
        Self {
            rate: rate.max(1),
            count: AtomicUsize::new(0),
            keys: RwLock::default(),
            reports: Mutex::default(),
            next_thread: AtomicU64::new(0),
        }
    }

    pub(crate) fn rate(&self) -> u32 {
        self.rate
    }

    /// Creates the sketch of one thread.
    pub(crate) fn new_sketch(&self) -> TopKSketch {
        let interval = (self.rate / SAMPLES_PER_SECOND).clamp(1, SAMPLE_INTERVAL_MAX);
        TopKSketch::new(self.next_thread.fetch_add(1, Ordering::Relaxed), interval)
    }

    pub(crate) fn is_hot(&self, hash: u64) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.keys().contains_key(&hash)
    }

    /// The hot keys, hottest first.
    pub(crate) fn hottest(&self) -> Vec<HotKey> {
        let mut keys: Vec<_> = self.keys().values().cloned().collect();
        keys.sort_by(|one, other| other.per_second.total_cmp(&one.per_second));
        keys
    }

    /// Merges a thread's counts and recomputes the hot keys.
    pub(crate) fn report_rates(&self, sketch: &mut TopKSketch, now: Instant) {
        let Some(keys) = sketch.decay_and_report(now) else { return };
        let mut reports = self.reports();
        if keys.is_empty() {
            if reports.remove(&sketch.thread()).is_none() {
                return;
            }
        } else {
            reports.insert(sketch.thread(), keys);
        }
        self.merge(&reports);
    }

    /// Removes the counts of a thread that ended.
    pub(crate) fn remove_thread(&self, sketch: &TopKSketch) {
        let mut reports = self.reports();
        if reports.remove(&sketch.thread()).is_some() {
            self.merge(&reports);
        }
    }

    fn merge(&self, reports: &HashMap<u64, Vec<HotKey>>) {
        let mut sums: HotKeysByHash = HashMap::default();
        for hot_key in reports.values().flatten() {
            let sum = sums.entry(hot_key.key.as_key().hash());
            sum.and_modify(|sum| sum.per_second += hot_key.per_second).or_insert_with(|| hot_key.clone());
        }
        let before = self.keys();
        sums.retain(|hash, sum| {
            let threshold = if before.contains_key(hash) { self.rate / 2 } else { self.rate };
            sum.per_second >= f64::from(threshold)
        });
        if sums.len() > HOT_MAX {
            let mut rates: Vec<_> = sums.values().map(|sum| sum.per_second).collect();
            rates.sort_by(|one, other| other.total_cmp(one));
            sums.retain(|_, sum| sum.per_second > rates[HOT_MAX]);
        }
        let count = sums.len();
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(sums);
        self.count.store(count, Ordering::Release);
    }

    fn keys(&self) -> Arc<HotKeysByHash> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn reports(&self) -> MutexGuard<'_, HashMap<u64, Vec<HotKey>>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn record(sketch: &mut TopKSketch, key: &CacheKey, times: u32) {
        (0..times).for_each(|_| sketch.record(&key.as_key()));
    }

    #[test]
    fn a_key_is_hot_by_its_total_rate_and_cools_below_half_of_it() {
        let hot = HotKeys::new(1_000);
        let (mut one, mut two) = (hot.new_sketch(), hot.new_sketch());
        let (key, mut now) = (key(1), Instant::now());
        let mut second = |per_thread: u32, hot: &HotKeys| {
            now += Duration::from_secs(1);
            for sketch in [&mut one, &mut two] {
                record(sketch, &key, per_thread);
                hot.report_rates(sketch, now);
            }
            hot.is_hot(key.as_key().hash())
        };
        assert!(!second(300, &hot) && !second(300, &hot) && !second(300, &hot), "600 a second are not hot");
        assert!((0..5).any(|_| second(800, &hot)), "1,600 a second are");
        let rate = hot.hottest()[0].per_second;
        assert!((1_000.0..2_500.0).contains(&rate), "{rate}");
        (0..5).for_each(|_| assert!(second(350, &hot), "and stay so at 700"));
        assert!((0..8).any(|_| !second(100, &hot)), "not at 200");
        assert!(hot.hottest().is_empty());
    }

    #[test]
    fn uniform_lookups_of_many_keys_make_none_hot() {
        let hot = HotKeys::new(1_000);
        let mut sketch = hot.new_sketch();
        let keys: Vec<_> = (0..5_000).map(key).collect();
        let mut now = Instant::now();
        for _ in 0..5 {
            now += Duration::from_secs(1);
            for key in &keys {
                record(&mut sketch, key, 40);
            }
            hot.report_rates(&mut sketch, now);
            assert!(hot.hottest().is_empty(), "{:?}", hot.hottest());
        }
    }

    #[test]
    fn a_hot_key_is_found_among_many_others() {
        let hot = HotKeys::new(1_000);
        let mut sketch = hot.new_sketch();
        let keys: Vec<_> = (0..5_000).map(key).collect();
        let mut now = Instant::now();
        for _ in 0..4 {
            now += Duration::from_secs(1);
            for (n, cold) in keys.iter().enumerate() {
                record(&mut sketch, cold, 20);
                record(&mut sketch, &keys[7], if n % 2 == 0 { 2 } else { 0 });
            }
            hot.report_rates(&mut sketch, now);
        }
        let list: Vec<_> = hot.hottest().into_iter().map(|hot_key| hot_key.key).collect();
        assert_eq!(list, [keys[7].clone()]);
    }

    #[test]
    fn hot_keys_are_bounded_and_removed_with_their_thread() {
        let hot = HotKeys::new(32);
        let (mut one, mut now) = (hot.new_sketch(), Instant::now());
        for _ in 0..3 {
            now += Duration::from_secs(1);
            (0..HOT_MAX as u64 * 2).for_each(|n| record(&mut one, &key(n), 100));
            hot.report_rates(&mut one, now);
        }
        assert!(hot.hottest().len() <= HOT_MAX);
        hot.remove_thread(&one);
        assert!(hot.hottest().is_empty() && !hot.is_hot(key(0).as_key().hash()));
    }
}
