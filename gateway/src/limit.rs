//! Limits on callers: builds the limiter from the rules, decides, and keeps cluster rules supplied.
//!
//! Every decision is made in this process; the treasury of cluster rules is asked by a loop of its own, never by a request.

mod change;
mod face;
mod inquiry;

pub use change::Change;
pub use face::{Face, Vote, Wording};
pub use inquiry::{BadInquiry, Inquiry, Told};

use std::num::NonZeroU32;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use limiter::{
    Backing, Class, Clock, Cost, KeyIndex, LeaseSettings, Limiter, LimiterSettings, Report, Rule, RuleError, RuleSet,
    Subject, Tier, Treasury, Verdict, Weight,
};

use crate::identify::{ADDRESS_KEY, Caller};
use crate::label;
use crate::metrics::{self, Counters};

/// Weights and rules (`[tiers]`, `[limits.*]`, and `nodes` of `[redis]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// User tier and its weight on rate and burst; `anonymous` and `standard` are always present.
    pub weights: Vec<(String, f64)>,
    /// The rules, in the order of the file; routes refer to them by index.
    pub rules: Vec<RuleSettings>,
    /// Expected nodes of the fleet: a node's share of a cluster rule is 1/nodes while there is no common store.
    pub nodes: u32,
}

/// One `[limits.NAME]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleSettings {
    pub rule: Rule,
    pub tells: Tells,
    /// In a device rule: how many devices' worth one address may use in all, whatever devices it says it has.
    pub per_address: Option<NonZeroU32>,
}

/// What clients are told of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tells {
    /// `RateLimit` and `RateLimit-Policy`.
    #[default]
    Everything,
    /// `RateLimit-Policy` alone: what is left stays hidden.
    Policy,
    /// Neither; a denial still says when to come back.
    Nothing,
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

impl RuleSettings {
    /// The rules of the limiter that this one takes: itself, and one for all devices of an address.
    ///
    /// # Errors
    /// So many devices' worth are more than can be measured.
    pub fn built(&self) -> Result<impl Iterator<Item = Rule> + use<>, limiter::QuotaError> {
        let address = self.per_address.map(|devices| {
            let quota = self.rule.quota.weighted(Weight::try_from(f64::from(devices.get()))?)?;
            Ok(Rule {
                tier: Tier::Key,
                key: Some(KeyIndex(ADDRESS_KEY)),
                quota,
                name: self.address_name(),
                ..self.rule.clone()
            })
        });
        Ok([self.rule.clone()].into_iter().chain(address.transpose()?))
    }

    /// The names of those.
    pub fn names(&self) -> impl Iterator<Item = Arc<str>> {
        let address = self.per_address.map(|_| self.address_name());
        [Arc::clone(&self.rule.name)].into_iter().chain(address)
    }

    /// No rule of a file can be called so.
    fn address_name(&self) -> Arc<str> {
        format!("{}:address", self.rule.name).into()
    }
}

impl Settings {
    fn tells_of(&self, name: &str) -> Tells {
        let of = |settings: &&RuleSettings| settings.names().any(|own| *own == *name);
        self.rules.iter().find(of).map_or(Tells::Nothing, |settings| settings.tells)
    }
}

label! {
    /// What limits decided.
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
    face::expose();
}

/// Builds the limiter and its face, keeping the state of `old` where a rule's name and tier are unchanged.
///
/// # Errors
/// What the limiter refuses about the rules.
pub fn build(
    settings: &Settings,
    node: u64,
    has_treasury: bool,
    old: Option<&Limiter>,
) -> Result<(Limiter, Face), RuleError> {
    let weights: Vec<Weight> =
        settings.weights.iter().map(|(_, weight)| Weight::try_from(*weight).unwrap_or(Weight::ONE)).collect();
    let nodes = NonZeroU32::new(settings.nodes).unwrap_or(NonZeroU32::MIN);
    let backing = if has_treasury { Backing::Treasury } else { Backing::Alone };
    let shared = LimiterSettings::new(LeaseSettings::new(node, nodes, backing));
    let now = CLOCK.now();
    let mut rules = Vec::new();
    for settings in &settings.rules {
        let built = settings.built();
        let weight = || Weight::try_from(f64::from(settings.per_address.map_or(1, NonZeroU32::get)));
        let built = built.map_err(|source| RuleError::Weighted {
            rule: Arc::clone(&settings.rule.name),
            weight: weight().unwrap_or(Weight::ONE),
            source,
        });
        rules.extend(built?);
    }
    let limiter = match old {
        Some(old) => old.rebuild(rules, &weights, shared, now),
        None => Limiter::new(rules, &weights, shared, now),
    }?;
    let face = Face::new(&limiter, settings);
    Ok((limiter, face))
}

/// A caller as the limiter knows it.
fn subject(caller: &Caller) -> Subject<'_> {
    let class = Class(u8::try_from(caller.tier).unwrap_or(0));
    Subject { device: caller.device, user: caller.user, class, keys: &caller.keys }
}

/// Decides one request by the rules of its route at the moment `now`.
pub fn decide(rules: &RuleSet, caller: &Caller, cost: Cost, now: Instant) -> Verdict {
    if rules.is_empty() {
        return Verdict::Allowed(Report::default());
    }
    rules.decide(&subject(caller), cost, CLOCK.at(now))
}

/// Counts what came of a request.
pub fn count(face: &Face, verdict: &Verdict) {
    match verdict {
        Verdict::Allowed(report) => {
            face.count(&report.votes, report.class);
            if report.votes.applied() != 0 {
                let is_allowed = report.votes.shadow_denied == 0;
                DECISIONS.inc(if is_allowed { Decision::Allowed } else { Decision::ShadowDenied });
            }
        }
        Verdict::Denied(denial) => {
            face.count(&denial.votes, denial.class);
            DECISIONS.inc(Decision::Denied);
        }
    }
}

/// Charges a request that was answered already: its answer costs more than it looked like.
pub fn charge(rules: &RuleSet, caller: &Caller, cost: Cost) {
    rules.charge(&subject(caller), cost, CLOCK.now());
}

/// Whether a cluster rule runs on this node's share: there is no treasury, or it does not answer.
pub fn is_on_share(lease: &limiter::Lease) -> bool {
    lease.is_local(CLOCK.now())
}

/// Keeps one cluster rule's lease supplied until the task is dropped. Each round asks for what the next interval needs.
pub async fn supply(lease: Arc<limiter::Lease>, treasury: Arc<impl Treasury>) {
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
