//! A key set that the issuer of tokens publishes at a URL: fetched by the control thread, used by
//! all threads.
//!
//! Invariants: no request waits for a fetch; a set that cannot be fetched or used never replaces
//! one that was; fetches for unknown key ids are rare, whatever clients send; a set that is stale
//! for too long is removed, and its tokens are rejected.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwapOption, Guard};
use limiter::bucket::{Gcra, GcraCell};
use limiter::{Cost, MonotonicClock, MonotonicTime, Quota, Rate};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::jwk_set::JwkSet;
use super::key_set_fetch::{self, FetchedKeySet, KeySetFetch, KeySetFetchError, KeySetUrl};
use crate::event::Event;
use crate::metrics::{self, Counters};

/// Lifetime of a set whose response has no `max-age`. A new key is found earlier, by its id.
const LIFETIME_DEFAULT: Duration = Duration::from_secs(5 * 60);
/// A shorter lifetime would burden the issuer: it has one fetch per gateway.
const LIFETIME_MIN: Duration = Duration::from_secs(60);
/// A longer one would delay the removal of a key that the issuer has revoked.
const LIFETIME_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Delay after the first failed fetch; doubles with each further one.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// Seconds for one fetch, and number at once, that tokens with unknown key ids may cause. Anyone
/// can invent such tokens.
const REFRESH_QUOTA: (u32, u32) = (30, 3);

static FETCHES: LazyLock<Counters<KeySetFetch>> = LazyLock::new(Counters::default);
static CLOCK: LazyLock<MonotonicClock> = LazyLock::new(MonotonicClock::start);
/// When the set in use was fetched, in nanoseconds of `CLOCK`; 0: there is none.
static FETCHED_AT: AtomicU64 = AtomicU64::new(0);

/// Registers the metrics of this module.
pub(super) fn expose() {
    metrics::expose_counters("tidegate_token_key_set_fetches", "Fetches of the issuer's key set.", &FETCHES);
    let help = "Time since the key set in use was fetched from the issuer.";
    metrics::expose_gauge_with("tidegate_token_key_set_age_seconds", help, |emit| {
        let fetched_at = FETCHED_AT.load(Relaxed);
        if fetched_at > 0 {
            emit(&[], Duration::from_nanos(CLOCK.now().nanos().saturating_sub(fetched_at)).as_secs_f64());
        }
    });
}

/// The current key set of an issuer; none until the first fetch has succeeded.
pub(crate) struct RemoteKeySet {
    config: KeySetUrl,
    current: ArcSwapOption<JwkSet>,
    fetched: Mutex<Option<FetchedAt>>,
    refresh: Notify,
    refresh_budget: GcraCell,
    is_refreshing: AtomicBool,
}

/// When a set was fetched, and its lifetime.
#[derive(Clone, Copy)]
struct FetchedAt {
    at: MonotonicTime,
    lifetime: Duration,
}

impl RemoteKeySet {
    pub(super) fn new(config: KeySetUrl) -> Self {
        RemoteKeySet {
            config,
            current: ArcSwapOption::empty(),
            fetched: Mutex::new(None),
            refresh: Notify::new(),
            refresh_budget: GcraCell::default(),
            is_refreshing: AtomicBool::new(false),
        }
    }

    pub(super) fn config(&self) -> &KeySetUrl {
        &self.config
    }

    pub(super) fn current(&self) -> Guard<Option<Arc<JwkSet>>> {
        self.current.load()
    }

    /// Asks for a fetch, because a token has a key id that the set does not contain.
    pub(super) fn request_refresh(&self) {
        if !self.is_refreshing.load(Relaxed) {
            self.refresh.notify_one();
        }
    }

    /// Keeps the set current. Never returns. Cancel safe: a fetch that runs is left to end, and its
    /// result is dropped.
    pub(crate) async fn keep_current(&self) {
        let quota = Rate::new(1, REFRESH_QUOTA.0).ok().zip(NonZeroU32::new(REFRESH_QUOTA.1));
        let quota = quota.and_then(|(rate, burst)| Quota::new(rate, burst).ok());
        let budget = Gcra::new(quota.expect("constants within the limiter's range"));
        let mut failures = 0;
        // The task of an earlier configuration may have fetched it.
        self.publish_age();
        let mut wait = self.remaining_lifetime();
        loop {
            self.wait(wait, &budget).await;
            self.is_refreshing.store(true, Relaxed);
            let result = key_set_fetch::fetch(&self.config).await;
            self.is_refreshing.store(false, Relaxed);
            wait = match result {
                Ok(fetched) => {
                    failures = 0;
                    self.replace(fetched)
                }
                Err(error) => {
                    failures += 1;
                    self.failed(&error, failures)
                }
            };
            self.publish_age();
        }
    }

    /// Waits for the next fetch, or for a request of one that the budget allows.
    async fn wait(&self, until_due: Duration, budget: &Gcra) {
        let asked = async {
            loop {
                self.refresh.notified().await;
                match self.refresh_budget.commit(budget, Cost::new(NonZeroU32::MIN), CLOCK.now()) {
                    Ok(_) => return,
                    Err(_) => sleep(RETRY_MIN).await,
                }
            }
        };
        let _due_or_asked = timeout(until_due, asked).await;
    }

    /// Uses a fetched set. Returns the time until the next fetch.
    fn replace(&self, fetched: FetchedKeySet) -> Duration {
        FETCHES.inc(KeySetFetch::Fetched);
        let lifetime = fetched.lifetime.unwrap_or(LIFETIME_DEFAULT).clamp(LIFETIME_MIN, LIFETIME_MAX);
        let is_new = self.current.load().as_deref() != Some(&fetched.keys);
        if is_new {
            Event::KeySetFetched { url: &self.config.url, keys: fetched.keys.len() }.emit();
            self.current.store(Some(Arc::new(fetched.keys)));
        }
        *self.lock() = Some(FetchedAt { at: CLOCK.now(), lifetime });
        lifetime
    }

    /// Keeps the set after a failed fetch, unless it is too old. Returns the time until the next
    /// fetch.
    fn failed(&self, error: &KeySetFetchError, failures: u32) -> Duration {
        FETCHES.inc(error.kind());
        let stale_for = self.lock().map(|fetched| CLOCK.now().since(fetched.at + fetched.lifetime));
        let is_expired = stale_for.is_some_and(|stale_for| stale_for > self.config.stale);
        if is_expired {
            self.current.store(None);
            *self.lock() = None;
        }
        let has_keys = self.current.load().is_some();
        Event::KeySetFetchFailed { url: &self.config.url, has_keys, error }.emit();
        let retry = RETRY_MIN.saturating_mul(1 << failures.saturating_sub(1).min(6)).min(RETRY_MAX);
        match stale_for {
            // The next try is in time to remove the set.
            Some(stale_for) if has_keys => {
                retry.min(self.config.stale.saturating_sub(stale_for) + Duration::from_millis(1))
            }
            _ => retry,
        }
    }

    fn remaining_lifetime(&self) -> Duration {
        self.lock().map_or(Duration::ZERO, |fetched| fetched.lifetime.saturating_sub(CLOCK.now().since(fetched.at)))
    }

    fn publish_age(&self) {
        FETCHED_AT.store(self.lock().map_or(0, |fetched| fetched.at.nanos().max(1)), Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<FetchedAt>> {
        self.fetched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No set is in use any more.
pub(crate) fn forget_age() {
    FETCHED_AT.store(0, Relaxed);
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::Algorithm;

    use super::super::issuer::{Issuer, set};
    use super::*;

    const KEEP: Duration = Duration::from_secs(3_600);

    fn fetched(issuer: &Issuer, lifetime: Option<u64>) -> FetchedKeySet {
        let keys = JwkSet::parse(&set(&[issuer]), &[Algorithm::ES256]).expect("a usable set");
        FetchedKeySet { keys, lifetime: lifetime.map(Duration::from_secs) }
    }

    fn remote(stale: Duration) -> RemoteKeySet {
        let algorithms = vec![Algorithm::ES256];
        RemoteKeySet::new(KeySetUrl { url: "https://id.test/".to_owned(), algorithms, authorities: Vec::new(), stale })
    }

    #[test]
    fn lifetimes_are_bounded() {
        let (keys, issuer) = (remote(KEEP), Issuer::new(Algorithm::ES256, "a"));
        for (lifetime, want) in [(None, 300), (Some(0), 60), (Some(59), 60), (Some(600), 600), (Some(1 << 40), 86_400)]
        {
            assert_eq!(keys.replace(fetched(&issuer, lifetime)), Duration::from_secs(want));
        }
        assert!(keys.remaining_lifetime() > Duration::from_secs(86_000));
    }

    #[test]
    fn stale_keys_are_removed_after_their_time() {
        let issuer = Issuer::new(Algorithm::ES256, "a");
        let error = KeySetFetchError::Status(503);
        let without = remote(KEEP);
        let retries: Vec<u64> = (1..=9).map(|failures| without.failed(&error, failures).as_secs()).collect();
        assert_eq!(retries, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        let keys = remote(Duration::ZERO);
        keys.replace(fetched(&issuer, Some(60)));
        // An early fetch for an unknown key id fails: the set is fresh.
        keys.failed(&error, 1);
        assert!(keys.current().is_some());
        *keys.lock() = Some(FetchedAt { at: MonotonicTime::ORIGIN, lifetime: Duration::ZERO });
        while CLOCK.now() <= MonotonicTime::ORIGIN {}
        keys.failed(&error, 2);
        assert!(keys.current().is_none() && keys.lock().is_none(), "no stale use is configured");
        keys.replace(fetched(&issuer, None));
        assert!(keys.current().is_some(), "it recovers");
        let long = remote(KEEP);
        long.replace(fetched(&issuer, None));
        *long.lock() = Some(FetchedAt { at: MonotonicTime::ORIGIN, lifetime: Duration::ZERO });
        long.failed(&error, 20);
        assert!(long.current().is_some(), "it is used for an hour");
    }
}
