//! Owns the reference of `lease.lua`: the same bucket in memory, line for line, with time passed in.
//!
//! Refuses cleverness of its own: where the two differ, one of them is wrong. It serves tests, here and in the
//! crate that talks to Redis, and a tour without Redis. Invariant: tokens granted over any time t never exceed
//! rate * t plus half the burst.

use std::collections::BTreeMap;
use std::time::Duration;

use super::treasury::{Ask, Grant};

const MICRO: f64 = 1_000_000.0;
/// A node silent for longer is gone.
const FORGET_MICROS: f64 = 30_000_000.0;
const VALID_FOR: Duration = Duration::from_secs(1);
/// A node without demand counts as wanting this part of an equal share, so that it has something to live on in
/// an outage.
const IDLE_PARTS: f64 = 32.0;

/// A treasury in memory. Numbers are doubles, as Lua's are: every result is floored.
#[derive(Debug, Default)]
pub struct Bank {
    at: Option<f64>,
    level: f64,
    rest: f64,
    nodes: BTreeMap<u64, Record>,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    asked: f64,
    weight: f64,
    share: f64,
    credit: f64,
    held: f64,
}

impl Bank {
    /// Answers one ask at `redis_now_micros`, the time of the treasury's own clock.
    pub fn withdraw(&mut self, ask: &Ask, redis_now_micros: u64) -> Grant {
        let now = redis_now_micros as f64;
        let rate = ask.quota.rate();
        let (count, period) = (rate.count() as f64, rate.seconds() as f64);
        let burst = f64::from(ask.quota.burst().get());
        let (returned, held, borrowed) = (ask.returned as f64, ask.held as f64, ask.borrowed_micros as f64);
        let pool = (burst / 2.0).floor().max(1.0);
        let afield = (burst - pool).max(1.0);
        let capacity = pool * MICRO;

        self.nodes.retain(|_, record| now - record.asked <= FORGET_MICROS);
        let mine = self.nodes.remove(&ask.node);
        let others = || self.nodes.values();
        let earned = |record: &Record| {
            let age = (now - record.asked).max(0.0);
            (age * record.share / MICRO).floor()
        };
        let shares: f64 = others().map(|record| record.share).sum();
        let claims: f64 = others().map(earned).sum();
        let out: f64 = others().map(|record| record.held).sum();

        let elapsed = (now - self.at.unwrap_or(now)).clamp(0.0, FORGET_MICROS);
        let parts = elapsed * count + self.rest;
        let gained = (parts / period).floor();
        let level = (self.level + gained + returned * MICRO).min(capacity) - borrowed;
        let level = level.max(-capacity);

        let nodes = self.nodes.len() as f64 + 1.0;
        let fleet = nodes.max(f64::from(ask.expected));
        let idle = (count * 1_000.0 / period / (IDLE_PARTS * fleet)).floor();
        let weight = (ask.demand_millis as f64).max(idle).max(1.0);
        let total = others().map(|record| record.weight).sum::<f64>() + weight;
        let rate = (count * MICRO / period).floor();
        let share = (rate * weight / total).floor().min(rate - shares).max(0.0);
        let cap = (afield / fleet).floor().max(1.0);
        let credit = mine.map_or(0.0, |mine| {
            let credit = mine.credit + earned(&mine) + returned * MICRO - borrowed;
            credit.min(cap * MICRO).max(-cap * MICRO)
        });

        let available = credit.max(level - claims.max((capacity / 2.0).floor()));
        let tokens = ((ask.wanted as f64 * MICRO).min(available).min(level) / MICRO).floor();
        let tokens = tokens.min(cap - held).min(afield - out - held).max(0.0);
        let credit = (credit - tokens * MICRO).max(credit.min(0.0));

        self.at = Some(now);
        self.level = level - tokens * MICRO;
        self.rest = parts - gained * period;
        if !ask.leaving {
            self.nodes.insert(ask.node, Record { asked: now, weight, share, credit, held: held + tokens });
        }
        Grant {
            tokens: tokens as u64,
            valid_for: VALID_FOR,
            nodes_seen: Some(nodes as u32),
            share_micros: Some(share as u64),
        }
    }
}
