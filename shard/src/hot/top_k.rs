//! Owns the top-k sketch of one thread: its most requested keys, counted by the Space-Saving
//! algorithm (Metwally, Agrawal, El Abbadi, 2005) over a sample of its lookups, with counts halved
//! every second.
//!
//! A key that replaces another inherits its count, and records how much of it is inherited: only
//! the rest is reported.
//! Refuses to keep more than `COUNTERS_MAX` keys.
//! Invariant: apart from sampling error, the reported rate of a key is never above its real rate.

use super::HotKey;
use crate::key::{CacheKey, KeyRef};
use std::time::{Duration, Instant};

/// Twice the number of hot keys, so that keys near the threshold are not evicted by rare ones.
const COUNTERS_MAX: usize = 128;

/// Own samples from which a key's bytes are copied; most keys never have that many.
const KEY_COPIED_FROM: f64 = 4.0;

/// Approximate interval of reports.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Space-Saving sketch of one thread: at most `COUNTERS_MAX` counters over sampled lookups, used
/// without a lock.
pub(crate) struct TopKSketch {
    thread: u64,
    /// One lookup in so many is counted, on average; randomised, so that sampling does not alias
    /// with periodic load.
    interval: u32,
    skip: u32,
    random: u64,
    counters: Vec<TopKCounter>,
    reported: Option<Instant>,
}

/// Decayed sample count of one key; the key's bytes are copied only after `KEY_COPIED_FROM` own
/// samples.
struct TopKCounter {
    hash: u64,
    /// Decayed number of samples, of which `inherited` belong to replaced keys.
    count: f64,
    inherited: f64,
    key: Option<CacheKey>,
}

impl TopKSketch {
    pub(super) fn new(thread: u64, interval: u32) -> Self {
        let random = 0x9e37_79b9_7f4a_7c15 ^ (thread + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Self { thread, interval, skip: interval, random, counters: Vec::new(), reported: None }
    }

    pub(super) fn thread(&self) -> u64 {
        self.thread
    }

    /// Counts a lookup if it is sampled.
    pub(crate) fn record(&mut self, key: &KeyRef<'_>) {
        self.skip -= 1;
        if self.skip == 0 {
            self.skip = self.next_skip();
            self.increment(key);
        }
    }

    /// A pseudo-random number (xorshift); not secret.
    pub(crate) fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 17
    }

    fn next_skip(&mut self) -> u32 {
        1 + self.random() as u32 % (2 * self.interval - 1)
    }

    fn increment(&mut self, key: &KeyRef<'_>) {
        let hash = key.hash();
        let at = match self.counters.iter().position(|counter| counter.hash == hash) {
            Some(at) => at,
            None if self.counters.len() < COUNTERS_MAX => {
                self.counters.push(TopKCounter { hash, count: 0.0, inherited: 0.0, key: None });
                self.counters.len() - 1
            }
            None => {
                let least =
                    |one: &usize, other: &usize| self.counters[*one].count.total_cmp(&self.counters[*other].count);
                let at = (0..COUNTERS_MAX).min_by(least).expect("the sketch is full, so it has counters");
                let counter = &mut self.counters[at];
                (counter.hash, counter.inherited, counter.key) = (hash, counter.count, None);
                at
            }
        };
        let counter = &mut self.counters[at];
        counter.count += 1.0;
        if counter.key.is_none() && counter.count - counter.inherited >= KEY_COPIED_FROM {
            counter.key = Some(key.to_owned());
        }
    }

    /// Decays the counts and returns the lookup rates; `None` if the last report was moments ago.
    pub(super) fn decay_and_report(&mut self, now: Instant) -> Option<Vec<HotKey>> {
        let elapsed = self.reported.map_or(REPORT_INTERVAL, |reported| now.saturating_duration_since(reported));
        if elapsed < REPORT_INTERVAL / 2 {
            return None;
        }
        self.reported = Some(now);
        // With c samples a second and halving every second, the decayed sum converges to c: a rate
        // per second.
        let decay = 0.5_f64.powf(elapsed.as_secs_f64());
        let mut rates = Vec::new();
        for counter in &mut self.counters {
            (counter.count, counter.inherited) = (counter.count * decay, counter.inherited * decay);
            if let Some(key) = &counter.key {
                let per_second = (counter.count - counter.inherited) * f64::from(self.interval);
                rates.push(HotKey { key: key.clone(), per_second });
            }
        }
        self.counters.retain(|counter| counter.count >= 0.25);
        rates.retain(|rate| rate.per_second >= 1.0);
        Some(rates)
    }
}
