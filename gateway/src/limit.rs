//! Limits on callers: builds the limiter from the rules, and tells clients where they stand.
//!
//! Every decision is made in this process; the treasury of cluster rules is asked by a loop of its own, never by a request.

use std::num::NonZeroU32;
use std::sync::LazyLock;
use std::time::Duration;

use limiter::{
    Backing, Class, Clock, Cost, Denial, LeaseSettings, Limiter, LimiterSettings, Report, RuleError, RuleSet, Subject,
    Treasury, Verdict, Weight,
};

use crate::error::Error;
use crate::http::fields::{Fields, Known};
use crate::http::text;
use crate::identify::Caller;
use crate::label;
use crate::metrics::{self, Counters};

/// Weights and rules (`[tiers]`, `[limits.*]`, and `nodes` of `[redis]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// User tier and its weight on rate and burst; `anonymous` and `standard` are always present.
    pub weights: Vec<(String, f64)>,
    /// The rules, in the order of the file; routes refer to them by index.
    pub rules: Vec<limiter::Rule>,
    /// Expected nodes of the fleet: a node's share of a cluster rule is 1/nodes while there is no common store.
    pub nodes: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            weights: vec![("anonymous".to_owned(), 1.0), ("standard".to_owned(), 1.0)],
            rules: Vec::new(),
            nodes: 1,
        }
    }
}

label! {
    /// What a limit decided.
    Decision, "decision", {
        Allowed = "allowed",
        Denied = "denied",
        ShadowDenied = "shadow_denied",
    }
}

static DECISIONS: LazyLock<Counters<Decision>> = LazyLock::new(Counters::default);
/// One clock for every limit of the process.
static CLOCK: LazyLock<Clock> = LazyLock::new(Clock::start);

/// Registers the metrics of this module.
pub fn expose() {
    metrics::expose_counters("tidegate_limit_decisions", "Requests decided by limits.", &DECISIONS);
}

/// Builds the limiter, keeping the state of `old` where a rule's name and tier are unchanged.
///
/// # Errors
/// What the limiter refuses about the rules.
pub fn build(settings: &Settings, node: u64, has_treasury: bool, old: Option<&Limiter>) -> Result<Limiter, RuleError> {
    let weights: Vec<Weight> =
        settings.weights.iter().map(|(_, weight)| Weight::try_from(*weight).unwrap_or(Weight::ONE)).collect();
    let nodes = NonZeroU32::new(settings.nodes).unwrap_or(NonZeroU32::MIN);
    let backing = if has_treasury { Backing::Treasury } else { Backing::Alone };
    let shared = LimiterSettings::new(LeaseSettings::new(node, nodes, backing));
    let now = CLOCK.now();
    match old {
        Some(old) => old.rebuild(settings.rules.clone(), &weights, shared, now),
        None => Limiter::new(settings.rules.clone(), &weights, shared, now),
    }
}

/// Decides one request by the rules of its route; where it may pass, tells where the caller stands.
///
/// # Errors
/// `Limited` with the longest wait of those that deny.
pub fn decide(rules: &RuleSet, names: &[String], caller: &Caller, cost: Cost) -> Result<Report, Error> {
    if rules.is_empty() {
        return Ok(Report::default());
    }
    let class = Class(u8::try_from(caller.tier).unwrap_or(0));
    let subject = Subject { device: caller.device, user: caller.user, class, keys: &[] };
    match rules.decide(&subject, cost, CLOCK.now()) {
        Verdict::Allowed(report) => {
            let decision = if report.votes.shadow_denied == 0 { Decision::Allowed } else { Decision::ShadowDenied };
            DECISIONS.inc(decision);
            Ok(report)
        }
        Verdict::Denied(denial) => {
            DECISIONS.inc(Decision::Denied);
            let rule = names.get(denial.standing.rule).cloned().unwrap_or_default();
            Err(Error::Limited { rule, denial: Box::new(denial) })
        }
    }
}

/// Writes `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10) for an allowed request.
pub fn write_report(report: &Report, names: &[String], fields: &mut Fields) {
    if let Some(standing) = report.tightest() {
        write_standing(standing, names, fields);
    }
}

/// The same for a denied one, with `Retry-After`.
pub fn write_denial(denial: &Denial, names: &[String], fields: &mut Fields) {
    write_standing(&denial.standing, names, fields);
    fields.set(Known::RetryAfter, denial.retry_after_seconds().to_string());
}

fn write_standing(standing: &limiter::Standing, names: &[String], fields: &mut Fields) {
    let Some(name) = names.get(standing.rule) else { return };
    let (remaining, reset) = (standing.remaining, standing.reset_seconds());
    let window = standing.quota.window();
    let window = (window.as_secs() + u64::from(window.subsec_nanos() > 0)).max(1);
    let mut add = |known, (first, first_value): (&str, u64), (second, second_value): (&str, u64)| {
        fields.add_with(known, |text| {
            text.push(b'"');
            text.extend_from_slice(name.as_bytes());
            text.extend_from_slice(first.as_bytes());
            text::push_number(text, first_value);
            text.extend_from_slice(second.as_bytes());
            text::push_number(text, second_value);
        });
    };
    add(Known::RateLimitPolicy, ("\";q=", u64::from(standing.quota.burst().get())), (";w=", window));
    add(Known::RateLimit, ("\";r=", remaining), (";t=", reset));
}

/// Whether a cluster rule runs on this node's share: there is no treasury, or it does not answer.
pub fn is_on_share(lease: &limiter::Lease) -> bool {
    lease.is_local(CLOCK.now())
}

/// Keeps one cluster rule's lease supplied until the task is dropped. Each round asks for what the next interval needs.
pub async fn supply(lease: std::sync::Arc<limiter::Lease>, treasury: std::sync::Arc<impl Treasury>) {
    loop {
        if let Some(ask) = lease.ask(CLOCK.now()) {
            match treasury.withdraw(ask).await {
                Ok(grant) => lease.deposit(grant, CLOCK.now()),
                Err(error) => {
                    tracing::debug!(%error, "the treasury did not answer");
                    lease.failed(CLOCK.now());
                }
            }
        }
        tokio::time::sleep(ROUND).await;
    }
}

/// How often a lease is looked at; asks themselves are at least an interval apart.
const ROUND: Duration = Duration::from_millis(5);

/// Gives back what a lease still holds; for the end of the process.
pub async fn give_back(lease: &limiter::Lease, treasury: &impl Treasury) {
    if let Some(ask) = lease.leave(CLOCK.now())
        && let Err(error) = treasury.withdraw(ask).await
    {
        tracing::debug!(%error, "unused tokens could not be given back");
    }
}
