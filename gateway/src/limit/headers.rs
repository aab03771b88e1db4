//! Output of rules: rate limit fields in responses, and evaluation counters in the metrics.
//!
//! Never sends a client a field that the rule hides. Invariant: counters survive reloads; they are
//! keyed by the names of rule and user class.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};

use limiter::{Denial, Evaluations, LimitStatus, Limiter, UserClass, Verdict};

use super::config::{HeaderExposure, LimitConfig};
use crate::http::fields::{Fields, KnownField};
use crate::http::text;
use crate::label;
use crate::metrics::{self, Counter, Label as _};

label! {
    /// Outcome of one rule for one request. Subjects outside the rule's percentage are the holdout.
    pub(crate) EvaluationOutcome, "outcome", {
        Passed = "passed",
        Denied = "denied",
        ShadowPassed = "shadow_passed",
        ShadowDenied = "shadow_denied",
        Holdout = "holdout",
    }
}

impl EvaluationOutcome {
    /// The labels `mode` and `decision`. They are separate so that one query can compare two modes.
    fn labels(self) -> (&'static str, &'static str) {
        match self {
            EvaluationOutcome::Passed => ("enforced", "passed"),
            EvaluationOutcome::Denied => ("enforced", "denied"),
            EvaluationOutcome::ShadowPassed => ("shadow", "passed"),
            EvaluationOutcome::ShadowDenied => ("shadow", "denied"),
            EvaluationOutcome::Holdout => ("holdout", "passed"),
        }
    }
}

/// Counters of one rule for one user class.
type EvaluationCounts = [Counter; EvaluationOutcome::ALL.len()];

/// Counters by names of rule and user class.
type EvaluationCountsByName = BTreeMap<(String, String), Arc<EvaluationCounts>>;

/// Kept until the process ends. Bounded by the rules and user classes that configurations have
/// named.
static EVALUATION_COUNTS: LazyLock<Mutex<EvaluationCountsByName>> = LazyLock::new(Mutex::default);

/// Number of `LimitHeaders` created by this process.
static CREATED: AtomicU64 = AtomicU64::new(0);

pub(super) fn expose() {
    let help = "Evaluations of requests by limits, by rule, user class, mode and decision.";
    metrics::expose_counter_with("tidegate_limit_evaluations", help, |emit| {
        for ((rule, class), count) in &*EVALUATION_COUNTS.lock().unwrap_or_else(PoisonError::into_inner) {
            for outcome in EvaluationOutcome::ALL {
                let (mode, decision) = outcome.labels();
                emit(
                    &[("rule", rule), ("user_class", class), ("mode", mode), ("decision", decision)],
                    count[outcome.index()].get(),
                );
            }
        }
    });
}

/// Writes the rate limit fields of a limiter's rules, by index of the rule.
pub(crate) struct LimitHeaders {
    /// Unique in this process.
    id: u64,
    rules: Vec<RuleHeaders>,
}

/// The key of a prebuilt response: all inputs of the response to a denial, so that equal keys give
/// identical responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DenialResponseKey {
    headers_id: u64,
    rule: usize,
    class: UserClass,
    remaining: u64,
    reset_seconds: u64,
    retry_after_seconds: u64,
}

impl DenialResponseKey {
    /// Hash that distributes the keys in use over the slots at one time over the slots of a cache.
    pub(crate) fn slot_hash(&self) -> u64 {
        let DenialResponseKey { headers_id: _, rule, class, remaining, reset_seconds, retry_after_seconds } = *self;
        let rule_and_class = (rule as u64) << 3 ^ u64::from(class.0) << 1;
        rule_and_class ^ remaining << 4 ^ reset_seconds << 2 ^ retry_after_seconds
    }
}

/// Output state of one rule: its name, its header exposure, and the counters and policy line of
/// each user class.
struct RuleHeaders {
    name: Arc<str>,
    exposure: HeaderExposure,
    /// By user class.
    counts: Vec<Arc<EvaluationCounts>>,
    /// The `RateLimit-Policy` line by user class; constant for the lifetime of the rule.
    policies: Vec<OnceLock<Fields>>,
}

impl LimitHeaders {
    pub(super) fn new(limiter: &Limiter, config: &LimitConfig) -> Self {
        let mut counters = EVALUATION_COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = |rule: &str, class: &str| {
            Arc::clone(
                counters.entry((rule.to_owned(), class.to_owned())).or_insert_with(|| Arc::new(Default::default())),
            )
        };
        let rules = limiter.rules().map(|rule| {
            let exposure = config.exposure_of(&rule.name);
            let policies = config.weights.iter().map(|_| OnceLock::new()).collect();
            let counts = config.weights.iter().map(|(class, _)| count(&rule.name, class)).collect();
            RuleHeaders { name: Arc::clone(&rule.name), exposure, counts, policies }
        });
        LimitHeaders { id: CREATED.fetch_add(1, Relaxed), rules: rules.collect() }
    }

    /// The name of a rule.
    pub(crate) fn name(&self, rule: usize) -> &str {
        self.rules.get(rule).map_or("", |rule| &rule.name)
    }

    /// The evaluations of each rule by all user classes: passed, denied, and denied in shadow mode.
    pub(crate) fn rule_counts(&self) -> impl Iterator<Item = (Arc<str>, [u64; 3])> {
        let outcomes = [EvaluationOutcome::Passed, EvaluationOutcome::Denied, EvaluationOutcome::ShadowDenied];
        self.rules.iter().map(move |rule| {
            let sum = |outcome: EvaluationOutcome| rule.counts.iter().map(|counts| counts[outcome.index()].get()).sum();
            (Arc::clone(&rule.name), outcomes.map(sum))
        })
    }

    /// The names of the rules in a bitmask, separated by commas.
    pub(crate) fn names(&self, rules: u64) -> String {
        let names = (0..64).filter(|rule| rules >> rule & 1 != 0).map(|rule| self.name(rule));
        if rules == 0 { String::new() } else { names.collect::<Vec<_>>().join(",") }
    }

    /// Counts the outcome of each rule.
    pub(super) fn count(&self, evaluations: &Evaluations, class: UserClass) {
        let masks = [
            (EvaluationOutcome::Passed, evaluations.passed),
            (EvaluationOutcome::Denied, evaluations.denied),
            (EvaluationOutcome::ShadowPassed, evaluations.shadow_passed),
            (EvaluationOutcome::ShadowDenied, evaluations.shadow_denied),
            (EvaluationOutcome::Holdout, evaluations.holdout),
        ];
        for (outcome, mut mask) in masks {
            while mask != 0 {
                let rule = mask.trailing_zeros() as usize;
                mask &= mask - 1;
                let counts = self.rules.get(rule).and_then(|rule| rule.counts.get(usize::from(class.0)));
                if let Some(counts) = counts {
                    counts[outcome.index()].inc();
                }
            }
        }
    }

    /// Writes `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10). For an
    /// allowed request they describe the exposed rule with the fewest remaining tokens. For a
    /// denied request they describe the rule that denies, and `Retry-After` is added.
    pub(crate) fn write(&self, verdict: &Verdict, fields: &mut Fields) {
        match verdict {
            Verdict::Allowed(admission) => {
                if let Some(limit_status) = admission.tightest() {
                    self.write_status(limit_status, admission.class, fields);
                }
            }
            Verdict::Denied(denial) => {
                if self.exposure(&denial.limit_status) != HeaderExposure::Hidden {
                    self.write_status(&denial.limit_status, denial.class, fields);
                }
                fields.add_with(KnownField::RetryAfter, |text| text::push_number(text, denial.retry_after_seconds()));
            }
        }
    }

    /// Inputs of the response to `denial`.
    pub(crate) fn denial_response_key(&self, denial: &Denial) -> DenialResponseKey {
        let Denial { limit_status, class, .. } = denial;
        DenialResponseKey {
            headers_id: self.id,
            rule: limit_status.rule,
            class: *class,
            remaining: limit_status.remaining,
            reset_seconds: limit_status.reset_seconds(),
            retry_after_seconds: denial.retry_after_seconds(),
        }
    }

    fn exposure(&self, limit_status: &LimitStatus) -> HeaderExposure {
        self.rules.get(limit_status.rule).map_or(HeaderExposure::Hidden, |rule| rule.exposure)
    }

    fn write_status(&self, limit_status: &LimitStatus, class: UserClass, fields: &mut Fields) {
        let Some(rule) = self.rules.get(limit_status.rule) else { return };
        if let Some(policy) = rule.policies.get(usize::from(class.0)) {
            fields.append_all(policy.get_or_init(|| rule.policy(limit_status)));
        }
        if rule.exposure == HeaderExposure::Full {
            fields.add_with(KnownField::RateLimit, |text| {
                push_item(text, &rule.name, ("\";r=", limit_status.remaining), (";t=", limit_status.reset_seconds()));
            });
        }
    }
}

impl RuleHeaders {
    fn policy(&self, limit_status: &LimitStatus) -> Fields {
        let window = limit_status.quota.window();
        let window = (window.as_secs() + u64::from(window.subsec_nanos() > 0)).max(1);
        let mut line = Fields::default();
        line.add_with(KnownField::RateLimitPolicy, |text| {
            push_item(text, &self.name, ("\";q=", u64::from(limit_status.quota.burst().get())), (";w=", window));
        });
        line
    }
}

/// Appends `"NAME"` and two parameters (RFC 9651). Rule names need no escaping.
fn push_item(text: &mut Vec<u8>, name: &str, first: (&str, u64), second: (&str, u64)) {
    text.push(b'"');
    text.extend_from_slice(name.as_bytes());
    for (key, value) in [first, second] {
        text.extend_from_slice(key.as_bytes());
        text::push_number(text, value);
    }
}
