//! What the rules of a limiter show: to clients in fields, to operators in counts.
//!
//! Refuses to show a client what its rule hides. Invariant: counts live on over reloads, by the names of rule and tier.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};

use limiter::{Class, Denial, Limiter, Standing, Verdict, Votes};

use super::{Settings, Tells};
use crate::http::fields::{Fields, Known};
use crate::http::text;
use crate::label;
use crate::metrics::{self, Counter, Label as _};

label! {
    /// What a rule said of a request, and in which arm of a trial: a percentage leaves some subjects out.
    Vote, "vote", {
        Passed = "passed",
        Denied = "denied",
        ShadowPassed = "shadow_passed",
        ShadowDenied = "shadow_denied",
        LeftOut = "left_out",
    }
}

impl Vote {
    /// The arm and the decision, as two labels: so that two arms are compared by one query.
    fn labels(self) -> (&'static str, &'static str) {
        match self {
            Vote::Passed => ("enforced", "passed"),
            Vote::Denied => ("enforced", "denied"),
            Vote::ShadowPassed => ("shadow", "passed"),
            Vote::ShadowDenied => ("shadow", "denied"),
            Vote::LeftOut => ("left_out", "passed"),
        }
    }
}

/// The votes of one rule on one tier of users.
type Count = [Counter; Vote::ALL.len()];

/// By rule and tier.
type CountsByName = BTreeMap<(String, String), Arc<Count>>;

/// For as long as the process runs: there are as many as configurations have named.
static COUNTS: LazyLock<Mutex<CountsByName>> = LazyLock::new(Mutex::default);

/// Faces that this process has made.
static FACES: AtomicU64 = AtomicU64::new(0);

pub(super) fn expose() {
    let help = "What each limit said of requests, by tier of user and arm of a trial.";
    metrics::expose_counter_with("tidegate_limit_votes", help, |emit| {
        for ((rule, class), count) in &*COUNTS.lock().unwrap_or_else(PoisonError::into_inner) {
            for vote in Vote::ALL {
                let (arm, decision) = vote.labels();
                emit(
                    &[("rule", rule), ("tier_class", class), ("arm", arm), ("decision", decision)],
                    count[vote.index()].get(),
                );
            }
        }
    });
}

/// The face of a limiter's rules, by index.
pub struct Face {
    /// No other of this process has it.
    number: u64,
    rules: Vec<Shown>,
}

/// All that an answer to a denial says of it: two that are equal are said in the same words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wording {
    face: u64,
    rule: usize,
    class: Class,
    remaining: u64,
    reset_seconds: u64,
    retry_after_seconds: u64,
}

impl Wording {
    /// A number in which wordings of one moment differ.
    pub fn spread(&self) -> u64 {
        let Wording { face: _, rule, class, remaining, reset_seconds, retry_after_seconds } = *self;
        let whose = (rule as u64) << 3 ^ u64::from(class.0) << 1;
        whose ^ remaining << 4 ^ reset_seconds << 2 ^ retry_after_seconds
    }
}

struct Shown {
    name: Arc<str>,
    tells: Tells,
    /// By class.
    counts: Vec<Arc<Count>>,
    /// Likewise, the line of `RateLimit-Policy`, which is the same as long as the rule is.
    policies: Vec<OnceLock<Fields>>,
}

impl Face {
    pub(super) fn new(limiter: &Limiter, settings: &Settings) -> Self {
        let mut all = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = |rule: &str, class: &str| {
            Arc::clone(all.entry((rule.to_owned(), class.to_owned())).or_insert_with(|| Arc::new(Default::default())))
        };
        let rules = limiter.rules().map(|rule| {
            let tells = settings.tells_of(&rule.name);
            let policies = settings.weights.iter().map(|_| OnceLock::new()).collect();
            let counts = settings.weights.iter().map(|(class, _)| count(&rule.name, class)).collect();
            Shown { name: Arc::clone(&rule.name), tells, counts, policies }
        });
        Face { number: FACES.fetch_add(1, Relaxed), rules: rules.collect() }
    }

    /// The name of a rule.
    pub fn name(&self, rule: usize) -> &str {
        self.rules.get(rule).map_or("", |shown| &shown.name)
    }

    /// Counts what each rule said.
    pub(super) fn count(&self, votes: &Votes, class: Class) {
        let masks = [
            (Vote::Passed, votes.passed),
            (Vote::Denied, votes.denied),
            (Vote::ShadowPassed, votes.shadow_passed),
            (Vote::ShadowDenied, votes.shadow_denied),
            (Vote::LeftOut, votes.excluded),
        ];
        for (vote, mut mask) in masks {
            while mask != 0 {
                let rule = mask.trailing_zeros() as usize;
                mask &= mask - 1;
                let count = self.rules.get(rule).and_then(|shown| shown.counts.get(usize::from(class.0)));
                if let Some(count) = count {
                    count[vote.index()].inc();
                }
            }
        }
    }

    /// Writes `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10): for an allowed request, of the rule with the
    /// fewest tokens left, of those that tell; for a denied one, of the rule that denies, with `Retry-After`.
    pub fn write_verdict(&self, verdict: &Verdict, fields: &mut Fields) {
        match verdict {
            Verdict::Allowed(report) => {
                if let Some(standing) = report.tightest() {
                    self.write(standing, report.class, fields);
                }
            }
            Verdict::Denied(denial) => {
                if self.tells(&denial.standing) != Tells::Nothing {
                    self.write(&denial.standing, denial.class, fields);
                }
                fields.add_with(Known::RetryAfter, |text| text::push_number(text, denial.retry_after_seconds()));
            }
        }
    }

    /// What `write_verdict` would say of a denial.
    pub fn wording(&self, denial: &Denial) -> Wording {
        let Denial { standing, class, .. } = denial;
        Wording {
            face: self.number,
            rule: standing.rule,
            class: *class,
            remaining: standing.remaining,
            reset_seconds: standing.reset_seconds(),
            retry_after_seconds: denial.retry_after_seconds(),
        }
    }

    fn tells(&self, standing: &Standing) -> Tells {
        self.rules.get(standing.rule).map_or(Tells::Nothing, |shown| shown.tells)
    }

    fn write(&self, standing: &Standing, class: Class, fields: &mut Fields) {
        let Some(shown) = self.rules.get(standing.rule) else { return };
        if let Some(policy) = shown.policies.get(usize::from(class.0)) {
            fields.append_all(policy.get_or_init(|| shown.policy(standing)));
        }
        if shown.tells == Tells::Everything {
            fields.add_with(Known::RateLimit, |text| {
                push_item(text, &shown.name, ("\";r=", standing.remaining), (";t=", standing.reset_seconds()));
            });
        }
    }
}

impl Shown {
    fn policy(&self, standing: &Standing) -> Fields {
        let window = standing.quota.window();
        let window = (window.as_secs() + u64::from(window.subsec_nanos() > 0)).max(1);
        let mut line = Fields::default();
        line.add_with(Known::RateLimitPolicy, |text| {
            push_item(text, &self.name, ("\";q=", u64::from(standing.quota.burst().get())), (";w=", window));
        });
        line
    }
}

/// `"NAME"` and two parameters (RFC 9651). Names need no escaping.
fn push_item(text: &mut Vec<u8>, name: &str, first: (&str, u64), second: (&str, u64)) {
    text.push(b'"');
    text.extend_from_slice(name.as_bytes());
    for (key, value) in [first, second] {
        text.extend_from_slice(key.as_bytes());
        text::push_number(text, value);
    }
}
