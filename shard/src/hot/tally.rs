//! Owns what one thread counts: the keys it is asked for most, by the Space-Saving algorithm (Metwally, Agrawal, El Abbadi, 2005) over
//! a sample of its lookups, halved every second.
//!
//! A key that takes the place of another takes over its count, and knows how much of it is not its own: only the rest is told.
//! Refuses to keep more than `PLACES` keys.
//! Invariant: what is told of a key is, but for the chance of sampling, never more than what it was asked for.

use super::HotKey;
use crate::key::{CacheKey, KeyRef};
use std::time::{Duration, Instant};

/// Twice what is told of at most, so that those at the border are not lost among strangers.
const PLACES: usize = 128;

/// Samples from which a key is worth a copy of its bytes: most keys never get there.
const KEPT_FROM: f64 = 4.0;

/// How often it is told, about.
const TURN: Duration = Duration::from_secs(1);

pub(crate) struct Tally {
    member: u64,
    /// One lookup in so many is counted, on average: a rhythm of the load must not meet one of the sampling.
    every: u32,
    skip: u32,
    random: u64,
    places: Vec<Place>,
    turned: Option<Instant>,
}

struct Place {
    hash: u64,
    /// Samples in the last seconds, of which `foreign` are others'.
    count: f64,
    foreign: f64,
    key: Option<CacheKey>,
}

impl Tally {
    pub(super) fn new(member: u64, every: u32) -> Self {
        let random = 0x9e37_79b9_7f4a_7c15 ^ (member + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Self { member, every, skip: every, random, places: Vec::new(), turned: None }
    }

    pub(super) fn member(&self) -> u64 {
        self.member
    }

    /// Counts a lookup, or passes it over.
    pub(crate) fn see(&mut self, key: &KeyRef<'_>) {
        self.skip -= 1;
        if self.skip == 0 {
            self.skip = self.pause();
            self.count(key);
        }
    }

    /// A number without a rhythm (xorshift); it is no secret.
    pub(crate) fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 17
    }

    fn pause(&mut self) -> u32 {
        1 + self.random() as u32 % (2 * self.every - 1)
    }

    fn count(&mut self, key: &KeyRef<'_>) {
        let hash = key.hash();
        let at = match self.places.iter().position(|place| place.hash == hash) {
            Some(at) => at,
            None if self.places.len() < PLACES => {
                self.places.push(Place { hash, count: 0.0, foreign: 0.0, key: None });
                self.places.len() - 1
            }
            None => {
                let least = |one: &usize, other: &usize| self.places[*one].count.total_cmp(&self.places[*other].count);
                let at = (0..PLACES).min_by(least).expect("there are places");
                let place = &mut self.places[at];
                (place.hash, place.foreign, place.key) = (hash, place.count, None);
                at
            }
        };
        let place = &mut self.places[at];
        place.count += 1.0;
        if place.key.is_none() && place.count - place.foreign >= KEPT_FROM {
            place.key = Some(key.to_owned());
        }
    }

    /// What was asked for how often lately; `None` where it was told a moment ago.
    pub(super) fn turn(&mut self, now: Instant) -> Option<Vec<HotKey>> {
        let passed = self.turned.map_or(TURN, |turned| now.saturating_duration_since(turned));
        if passed < TURN / 2 {
            return None;
        }
        self.turned = Some(now);
        // With c samples a second, what is left after each halving comes to c: a rate per second.
        let left = 0.5_f64.powf(passed.as_secs_f64());
        let mut seen = Vec::new();
        for place in &mut self.places {
            (place.count, place.foreign) = (place.count * left, place.foreign * left);
            if let Some(key) = &place.key {
                let per_second = (place.count - place.foreign) * f64::from(self.every);
                seen.push(HotKey { key: key.clone(), per_second });
            }
        }
        self.places.retain(|place| place.count >= 0.25);
        seen.retain(|seen| seen.per_second >= 1.0);
        Some(seen)
    }
}
