//! The requesting side of a lease: when a node sends a request, how much it requests, and how it
//! applies the grant.
//!
//! Requests of clients never enter here: only the task that sends the messages does, about fifty
//! times a second. Invariant: at most one lease request is pending, and it contains all tokens that
//! were taken out of the balance to be returned.

use std::time::Duration;

use super::Lease;
use super::backend::{LeaseGrant, LeaseRequest};
use super::config::{LeaseSource, MICRO, NANOS, PENDING_MAX};
use super::requester::{LeaseRequester, PendingRequest};
use crate::clock::MonotonicTime;
use crate::sync::Ordering;

/// More frequent requests cost Redis more than a smoother supply is worth: at most 100 a second.
const INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Each node of a large fleet adds this to the interval: all nodes together send at most 10,000
/// requests a second to one key, as long as [`INTERVAL_MAX`] allows.
const INTERVAL_PER_NODE: Duration = Duration::from_micros(100);
/// The longest interval. The backend treats a node that is silent for 150 ms as one that uses its
/// local rate, and a node whose requests fail must notice soon that Redis is back.
const INTERVAL_MAX: Duration = Duration::from_millis(100);
/// The interval is this many times longer for a node that has no demand and holds what its largest
/// request takes, and for a node whose requests fail.
const IDLE_FACTOR: u32 = 5;
/// A client that was told when to retry may come this much later; `peak` is kept for at most
/// one minute.
const RETRY_SLACK: Duration = Duration::from_secs(3);
const PEAK_KEPT_MAX: Duration = Duration::from_secs(60);
/// No grant delays the local rate for longer than this.
const VALID_MAX: Duration = Duration::from_secs(10);

impl Lease {
    /// The next request to send to the backend, if one is due. Call it every few milliseconds. Each
    /// request must be followed by [`Lease::apply_grant`] or [`Lease::request_failed`] before the
    /// next one.
    pub fn next_request(&self, now: MonotonicTime) -> Option<LeaseRequest> {
        let mut requester = self.requester();
        if requester.config.source == LeaseSource::LocalFallback || requester.has_sent_final_request {
            return None;
        }
        if let Some(pending) = requester.pending {
            if now.since(pending.since) < PENDING_MAX {
                return None;
            }
            self.abandon_pending(&mut requester, now);
        }
        let demanded = self.demanded.load(Ordering::Relaxed);
        let interval = self.request_interval(&requester);
        let cap = self.cap_micros.load(Ordering::Relaxed);
        let needed = requester.peak.saturating_mul(MICRO).min(cap);
        let is_short = self.balance_micros.load(Ordering::Relaxed) < needed;
        let is_idle = demanded == requester.counted && !is_short || requester.is_failing;
        let due = if is_idle { (interval * IDLE_FACTOR).min(INTERVAL_MAX) } else { interval };
        if requester.requested_at.is_some_and(|requested_at| now.since(requested_at) < due) {
            return None;
        }
        self.measure_demand(&mut requester, demanded, now);
        self.accrue(now);
        let target = self.target(&requester, interval);
        if needed == cap && !self.is_local(now) {
            self.drop_fraction();
        }
        // Slack, so that small changes of the demand do not move tokens back and forth. While
        // requests fail, nothing is returned: it would be lost with them.
        let slack = if requester.is_failing { u64::MAX } else { cap / 4 };
        let returned = self.take_surplus(target, slack);
        Some(LeaseRequest { returned, ..self.build_request(&mut requester, target, now) })
    }

    /// The last request of a node that shuts down and decides no more: it returns all tokens, so
    /// that the node's share is free at once instead of after half a minute. The reply is ignored.
    pub fn final_request(&self, now: MonotonicTime) -> Option<LeaseRequest> {
        let mut requester = self.requester();
        if requester.config.source == LeaseSource::LocalFallback || requester.has_sent_final_request {
            return None;
        }
        self.accrue(now);
        self.local_nanos.store(0, Ordering::Release);
        let returned = self.take_surplus(0, 0);
        let request = LeaseRequest { returned, leaving: true, ..self.build_request(&mut requester, 0, now) };
        (requester.has_sent_final_request, requester.pending) = (true, None);
        Some(request)
    }

    /// Applies the grant for the pending request; without one, the grant is dropped. Takes no more
    /// tokens than were requested, and no share above the rate.
    pub fn apply_grant(&self, grant: LeaseGrant, now: MonotonicTime) {
        let mut requester = self.requester();
        let Some(pending) = requester.pending.take() else { return };
        requester.is_failing = false;
        // Counts what the local rate has brought so far, before its clock stops.
        self.accrue(now);
        requester.nodes_seen = grant.nodes_seen.unwrap_or(0);
        let rate = requester.quota.rate().micros_per_second();
        requester.share_micros = grant.share_micros.map(|share| share.min(rate)).or(requester.share_micros);
        self.update_rates(&requester);
        self.add(grant.tokens.min(pending.requested).saturating_mul(MICRO));
        let valid_for = grant.valid_for.min(VALID_MAX);
        self.refill_from.store((now + valid_for).nanos(), Ordering::Release);
    }

    /// The pending request got no reply: the node continues at 0.8 of its last known share.
    pub fn request_failed(&self, now: MonotonicTime) {
        self.abandon_pending(&mut self.requester(), now);
    }

    /// Tokens that the lost reply granted, or that the request returned, are lost with it.
    fn abandon_pending(&self, requester: &mut LeaseRequester, now: MonotonicTime) {
        (requester.pending, requester.is_failing) = (None, true);
        self.refill_from.fetch_min(now.nanos(), Ordering::AcqRel);
    }

    /// A request that returns nothing yet. Call it after the returned tokens have left the balance.
    fn build_request(&self, requester: &mut LeaseRequester, target: u64, now: MonotonicTime) -> LeaseRequest {
        let balance = self.balance_micros.load(Ordering::Acquire);
        let requested = target.saturating_sub(balance).div_ceil(MICRO);
        requester.pending = Some(PendingRequest { since: now, requested });
        requester.requested_at = Some(now);
        let uptime = now.since(requester.started_at).as_micros();
        LeaseRequest {
            node: requester.config.node,
            quota: requester.quota,
            expected_nodes: requester.config.nodes.get(),
            requested,
            returned: 0,
            held: balance.div_ceil(MICRO),
            demand_millis: requester.demand_millis,
            ordinary_millis: requester.ordinary_millis,
            borrowed: self.borrowed_micros.load(Ordering::Acquire).div_ceil(MICRO),
            share_micros: requester.share_micros.unwrap_or_else(|| requester.equal_share_nanos() / 1_000),
            uptime_micros: u64::try_from(uptime).unwrap_or(u64::MAX),
            leaving: false,
        }
    }

    /// The balance to aim for: twice the demand of an interval (one part is spent while the next is
    /// fetched), the largest request, or half the cap, so that the first request after a pause
    /// finds tokens.
    fn target(&self, requester: &LeaseRequester, interval: Duration) -> u64 {
        let cap = self.cap_micros.load(Ordering::Relaxed);
        let demand = u128::from(requester.demand_millis) * 1_000 * interval.as_nanos() * 2 / NANOS;
        let demand = u64::try_from(demand).unwrap_or(u64::MAX);
        demand.max(requester.peak.saturating_mul(MICRO)).max(cap / 2).min(cap)
    }

    /// The configured interval, longer in a large fleet; or, if that is shorter, half the time in
    /// which this node's share uses up the cap: a small burst must be fetched more often.
    fn request_interval(&self, requester: &LeaseRequester) -> Duration {
        let cap = u128::from(self.cap_micros.load(Ordering::Relaxed));
        let share = u128::from(self.expected_nanos.load(Ordering::Relaxed).max(1));
        let half_life = u64::try_from(cap * 1_000 * NANOS / (2 * share)).unwrap_or(u64::MAX);
        let interval = requester.config.interval.max(INTERVAL_PER_NODE * requester.fleet_size());
        Duration::from_nanos(half_life).min(interval).clamp(INTERVAL_MIN, INTERVAL_MAX)
    }

    fn measure_demand(&self, requester: &mut LeaseRequester, demanded: u64, now: MonotonicTime) {
        let elapsed = now.since(requester.counted_at).max(Duration::from_millis(1));
        let ordinary = self.ordinary.load(Ordering::Relaxed);
        let smoothed = |before: u64, tokens: u64| {
            let current = u128::from(tokens) * 1_000 * NANOS / elapsed.as_nanos();
            before / 2 + u64::try_from(current).unwrap_or(u64::MAX) / 2
        };
        requester.demand_millis = smoothed(requester.demand_millis, demanded.wrapping_sub(requester.counted));
        requester.ordinary_millis =
            smoothed(requester.ordinary_millis, ordinary.wrapping_sub(requester.ordinary_counted));
        requester.ordinary_counted = ordinary;
        let peak = self.peak.swap(0, Ordering::Relaxed);
        let kept_for = RETRY_SLACK + self.time_for(self.cap_micros.load(Ordering::Relaxed), now);
        if peak >= requester.peak {
            (requester.peak, requester.peak_at) = (peak, now);
        } else if now.since(requester.peak_at) > kept_for.min(PEAK_KEPT_MAX) {
            requester.peak = peak.max(requester.peak - requester.peak.div_ceil(8));
        }
        (requester.counted, requester.counted_at) = (demanded, now);
    }

    /// Drops the fraction of a token in the balance. The local rate leaves one and grants are
    /// whole, so the last token would not fit below the cap, and a request that needs the whole cap
    /// would wait for ever. This costs less than a token per period at the local rate.
    fn drop_fraction(&self) {
        self.balance_micros.update(Ordering::AcqRel, Ordering::Acquire, |balance| balance - balance % MICRO);
    }

    /// Takes whole tokens above `target` out of the balance, if they exceed it by more than
    /// `slack`.
    fn take_surplus(&self, target: u64, slack: u64) -> u64 {
        let surplus = |balance: u64| match balance.saturating_sub(target) {
            excess if excess > slack => excess / MICRO,
            _ => 0,
        };
        let rest = |balance: u64| balance - surplus(balance) * MICRO;
        surplus(self.balance_micros.update(Ordering::AcqRel, Ordering::Acquire, rest))
    }
}
