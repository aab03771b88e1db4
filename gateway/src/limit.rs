//! Rate limiting of callers: builds the limiter from the configured rules, decides requests, and
//! refreshes the leases of cluster rules.
//!
//! Every decision is made in this process. A background task per cluster rule calls the lease
//! backend; no request does.

mod config;
mod error;
mod subject;
mod override_command;
mod admin_query;
mod headers;

pub(crate) use admin_query::{AdminQuery, AdminReply, list_rules};
pub(crate) use config::{HeaderExposure, LimitConfig, RuleConfig};
pub(crate) use error::AdminQueryError;
pub(crate) use headers::{DenialResponseKey, LimitHeaders};
pub(crate) use override_command::{OverrideCommand, parse_duration};

use std::num::NonZeroU32;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use limiter::{
    Admission, Cost, Lease, LeaseBackend, LeaseConfig, LeaseSource, Limiter, LimiterConfig, RuleError, RuleSet,
    Verdict, Weight,
};

use self::subject::{CLOCK, subject};
use crate::identify::Caller;
use crate::label;
use crate::metrics::{self, Counters};

label! {
    /// Decision of the limiter for one request.
    pub(crate) LimitDecision, "decision", {
        Allowed = "allowed",
        Denied = "denied",
        ShadowDenied = "shadow_denied",
    }
}

static DECISIONS: LazyLock<Counters<LimitDecision>> = LazyLock::new(Counters::default);

/// Registers the metrics of this module.
///
/// `for_each_lease` visits the current leases of cluster rules at scrape time.
pub(crate) fn expose(for_each_lease: impl Fn(&mut dyn FnMut(&str, &Lease)) + Send + Sync + 'static) {
    metrics::expose_counters("tidegate_limit_decisions", "Requests decided by limits.", &DECISIONS);
    headers::expose();
    metrics::expose_gauge_with(
        "tidegate_limit_local_fallback",
        "1 where a cluster limit runs on this node's local fallback share instead of the shared bucket.",
        move |emit| {
            for_each_lease(&mut |rule, lease| emit(&[("rule", rule)], f64::from(u8::from(is_local_fallback(lease)))));
        },
    );
}

/// Seconds after which a denied request may be repeated; `None`: it was not denied.
pub(crate) fn retry_seconds(verdict: &Verdict) -> Option<u64> {
    match verdict {
        Verdict::Allowed(_) => None,
        Verdict::Denied(denial) => Some(denial.retry_after_seconds()),
    }
}

/// Builds the limiter and its response headers. Keeps the state of `old` for each rule whose name
/// and scope are unchanged.
///
/// # Errors
/// The limiter rejected a rule.
pub(crate) fn build(
    config: &LimitConfig,
    node: u64,
    has_lease_backend: bool,
    old: Option<&Limiter>,
) -> Result<(Limiter, LimitHeaders), RuleError> {
    let weights: Vec<Weight> =
        config.weights.iter().map(|(_, weight)| Weight::try_from(*weight).unwrap_or(Weight::ONE)).collect();
    let nodes = NonZeroU32::new(config.nodes).unwrap_or(NonZeroU32::MIN);
    let lease_source = if has_lease_backend { LeaseSource::Backend } else { LeaseSource::LocalFallback };
    let limiter_config = LimiterConfig::new(LeaseConfig::new(node, nodes, lease_source));
    let now = CLOCK.now();
    let mut rules = Vec::new();
    for rule_config in &config.rules {
        let weight = || Weight::try_from(f64::from(rule_config.per_address.map_or(1, NonZeroU32::get)));
        let limiter_rules = rule_config.limiter_rules().map_err(|source| RuleError::Weighted {
            rule: Arc::clone(&rule_config.rule.name),
            weight: weight().unwrap_or(Weight::ONE),
            source,
        });
        rules.extend(limiter_rules?);
    }
    let limiter = match old {
        Some(old) => old.rebuild(rules, &weights, limiter_config, now),
        None => Limiter::new(rules, &weights, limiter_config, now),
    }?;
    let headers = LimitHeaders::new(&limiter, config);
    Ok((limiter, headers))
}

/// Converts what callers have spent under `old` for `new`, which replaces it at once.
pub(crate) fn take_over(new: &Limiter, old: &Limiter) {
    new.take_over(old, || CLOCK.now());
}

/// Decides one request by the rules of its route at time `now`.
pub(crate) fn decide(rules: &RuleSet, caller: &Caller, cost: Cost, now: Instant) -> Verdict {
    if rules.is_empty() {
        return Verdict::Allowed(Admission::default());
    }
    rules.decide(&subject(caller), cost, CLOCK.at(now))
}

/// Counts the decision on a request in the metrics.
pub(crate) fn record_decision(headers: &LimitHeaders, verdict: &Verdict) {
    match verdict {
        Verdict::Allowed(admission) => {
            headers.count(&admission.evaluations, admission.class);
            if admission.evaluations.evaluated() != 0 {
                let is_allowed = admission.evaluations.shadow_denied == 0;
                DECISIONS.inc(if is_allowed { LimitDecision::Allowed } else { LimitDecision::ShadowDenied });
            }
        }
        Verdict::Denied(denial) => {
            headers.count(&denial.evaluations, denial.class);
            DECISIONS.inc(LimitDecision::Denied);
        }
    }
}

/// Charges `cost` to the caller after the response: the response status raised the cost of the
/// request.
pub(crate) fn charge(rules: &RuleSet, caller: &Caller, cost: Cost) {
    rules.charge(&subject(caller), cost, CLOCK.now());
}

/// Whether a cluster rule runs on the local fallback: there is no lease backend, or it does not
/// reply.
pub(crate) fn is_local_fallback(lease: &Lease) -> bool {
    lease.is_local(CLOCK.now())
}

/// Refreshes the lease of one cluster rule until the task is dropped. Each request covers the
/// demand of the next interval.
pub(crate) async fn refresh_lease(lease: &Lease, backend: &impl LeaseBackend) {
    loop {
        if let Some(request) = lease.next_request(CLOCK.now()) {
            match backend.acquire(request).await {
                Ok(grant) => lease.apply_grant(grant, CLOCK.now()),
                Err(error) => {
                    tracing::debug!(%error, "the lease backend did not reply");
                    lease.request_failed(CLOCK.now());
                }
            }
        }
        tokio::time::sleep(REFRESH_INTERVAL).await;
    }
}

/// Interval of the checks of a lease. Requests to the backend are at least one lease interval
/// apart.
const REFRESH_INTERVAL: Duration = Duration::from_millis(5);

/// Returns the unused tokens of a lease to the backend when the process shuts down.
pub(crate) async fn return_tokens(lease: &Lease, backend: &impl LeaseBackend) {
    if let Some(request) = lease.final_request(CLOCK.now())
        && let Err(error) = backend.acquire(request).await
    {
        tracing::debug!(%error, "could not return unused tokens");
    }
}
