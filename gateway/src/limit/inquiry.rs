//! What operators ask of limits on the admin address.
//!
//! Invariant: an explanation charges nobody.

use std::net::IpAddr;
use std::time::Duration;

use limiter::{Explanation, Limiter, Mode, Tier};
use serde_json::{Value, json};

use super::change::Change;
use super::{CLOCK, Settings};
use crate::identify::{Described, Identity};

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Inquiry {
    /// Every rule.
    List,
    /// How each rule treats a caller, and why.
    Explain(Described),
    Change {
        rule: String,
        change: Change,
        /// The one node that is meant, instead of all of the fleet.
        node: Option<String>,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    pub value: Value,
    /// False where a change was not confirmed by every node in time.
    pub is_complete: bool,
}

/// Why an inquiry has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadInquiry {
    #[error("`{0}` is no parameter here; there are {1}")]
    Unknown(String, &'static str),
    #[error(
        "say for how long: for=15m, at most 8 days; and what to try: mode=enforce, shadow or off, percent=0 to 100"
    )]
    NoTrial,
    #[error("`{0}` is not {1}")]
    Bad(String, &'static str),
    #[error("say who: ip=ADDRESS, and what else identifies the caller: device=, user=, tier=, key=RULE:VALUE")]
    Nobody,
    #[error(transparent)]
    NoRoom(#[from] shard::NoRoom),
    #[error("there is no rule `{0}`")]
    NoRule(String),
    #[error("rule `{0}` does not count by a key")]
    NotKey(String),
}

const DESCRIPTIONS: &str = "ip, device, user, issuer, tier and key";

impl Inquiry {
    /// Reads what a trial is to be: `mode=shadow&percent=10&for=15m`.
    pub fn change(rule: &str, query: &str) -> Result<Inquiry, BadInquiry> {
        let (change, node) = Change::read(query)?;
        Ok(Inquiry::Change { rule: rule.to_owned(), change, node })
    }

    /// Reads where a trial is to end: `node=n1`, or everywhere.
    pub fn end(rule: &str, query: &str) -> Result<Inquiry, BadInquiry> {
        let (change, node) = Change::read_end(query)?;
        Ok(Inquiry::Change { rule: rule.to_owned(), change, node })
    }

    /// Reads who is to be explained: `ip=192.0.2.1&device=abc&user=alice&tier=gold&key=tenants:acme`.
    pub fn explain(query: &str) -> Result<Inquiry, BadInquiry> {
        let mut who = Described::default();
        let mut ip = None;
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "ip" => {
                    let address = value.parse::<IpAddr>();
                    ip = Some(address.map_err(|_| BadInquiry::Bad(value.into_owned(), "an address"))?);
                }
                "device" => who.device = Some(value.into_owned()),
                "user" => who.user = Some(value.into_owned()),
                "issuer" => who.issuer = Some(value.into_owned()),
                "tier" => who.tier = Some(value.into_owned()),
                "key" => {
                    let pair = value.split_once(':').map(|(rule, value)| (rule.to_owned(), value.to_owned()));
                    who.keys.push(pair.ok_or_else(|| BadInquiry::Bad(value.into_owned(), "RULE:VALUE"))?);
                }
                _ => return Err(BadInquiry::Unknown(name.into_owned(), DESCRIPTIONS)),
            }
        }
        who.ip = ip.ok_or(BadInquiry::Nobody)?;
        Ok(Inquiry::Explain(who))
    }

    /// What is known of it here. A change is answered with the rules as they are.
    pub fn answer(&self, limiter: &Limiter, settings: &Settings, identity: &Identity) -> Result<Value, BadInquiry> {
        match self {
            Inquiry::Explain(who) => explain(limiter, settings, identity, who),
            Inquiry::List => Ok(list(limiter, settings)),
            Inquiry::Change { rule, .. } if settings.rules.iter().any(|own| *own.rule.name == **rule) => {
                Ok(list(limiter, settings))
            }
            Inquiry::Change { rule, .. } => Err(BadInquiry::NoRule(rule.clone())),
        }
    }
}

fn list(limiter: &Limiter, settings: &Settings) -> Value {
    let now = CLOCK.now();
    let running: Vec<_> = limiter.trials(now).collect();
    let rules = settings.rules.iter().map(|settings| {
        let rule = &settings.rule;
        let trial = running.iter().find(|running| running.rule == rule.name);
        json!({
            "name": &*rule.name,
            "tier": tier(rule.tier),
            "rate": rule.quota.rate().to_string(),
            "burst": rule.quota.burst(),
            "mode": mode(rule.mode),
            "percent": rule.percent.get(),
            "trial": trial.map(|running| json!({
                "mode": mode(running.trial.mode),
                "percent": running.trial.percent.get(),
                "ends_in_seconds": running.until.since(now).as_secs(),
            })),
        })
    });
    json!({ "rules": rules.collect::<Vec<_>>() })
}

fn explain(limiter: &Limiter, settings: &Settings, identity: &Identity, who: &Described) -> Result<Value, BadInquiry> {
    let keys = who.keys.iter().map(|(rule, value)| {
        let own = settings.rules.iter().find(|own| *own.rule.name == **rule);
        let key = own.ok_or_else(|| BadInquiry::NoRule(rule.clone()))?.rule.key;
        key.map(|key| (key.0, value.as_str())).ok_or_else(|| BadInquiry::NotKey(rule.clone()))
    });
    let keys = keys.collect::<Result<Vec<_>, _>>()?;
    let caller = identity
        .described(who, &keys)
        .ok_or_else(|| BadInquiry::Bad(who.tier.clone().unwrap_or_default(), "a tier of the configuration"))?;
    let now = CLOCK.now();
    let rules: Vec<_> = limiter
        .explain(&super::subject(&caller), now)
        .iter()
        .map(|told| {
            let last = told.last_denial.map(|last| {
                json!({
                    "seconds_ago": now.since(last.at).as_secs_f64(),
                    "retry_after_seconds": seconds(last.retry_after),
                })
            });
            json!({
                "name": &*told.name,
                "tier": tier(told.tier),
                "mode": mode(told.mode),
                "percent": told.percent.get(),
                "is_trial": told.until.is_some(),
                "rate": told.quota.rate().to_string(),
                "burst": told.quota.burst(),
                "reserve": told.reserve,
                "remaining": told.remaining,
                "reset_seconds": seconds(told.reset),
                "wait_seconds": seconds(told.wait),
                "last_denial": last,
                "why": why(told),
            })
        })
        .collect();
    let tier = settings.weights.get(caller.tier).map(|(name, _)| name.as_str());
    Ok(json!({ "tier": tier, "access": crate::metrics::Label::as_str(caller.access), "rules": rules }))
}

/// One sentence for a person.
fn why(told: &Explanation) -> String {
    if !told.has_key {
        return "does not apply: the caller has nothing that it counts by".to_owned();
    }
    if told.mode == Mode::Off {
        return "does not apply: it is off".to_owned();
    }
    if !told.is_included {
        return format!("does not apply: the caller is not among the {} %", told.percent.get());
    }
    let verb = if told.mode == Mode::Shadow { "would deny (shadow)" } else { "denies" };
    if told.wait.is_zero() {
        return format!("passes: {} of {} are left", told.remaining, told.quota.burst());
    }
    let reserve = if told.reserve > 0 {
        format!(", of which {} are kept for heavier tiers", told.reserve)
    } else {
        String::new()
    };
    format!("{verb} for another {:.3} s: {} are left{reserve}", seconds(told.wait), told.remaining)
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

fn tier(tier: Tier) -> &'static str {
    match tier {
        Tier::Device => "device",
        Tier::User => "user",
        Tier::Key => "key",
        Tier::Node => "node",
        Tier::Cluster => "cluster",
    }
}

pub(super) fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Enforce => "enforce",
        Mode::Shadow => "shadow",
        Mode::Off => "off",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explanation_wants_somebody() {
        assert_eq!(Inquiry::explain("device=a"), Err(BadInquiry::Nobody));
        assert!(matches!(Inquiry::explain("ip=a"), Err(BadInquiry::Bad(..))));
        assert!(matches!(Inquiry::explain("ip=::1&key=a"), Err(BadInquiry::Bad(..))));
        let Ok(Inquiry::Explain(who)) = Inquiry::explain("ip=192.0.2.1&device=a%26b&key=tenants:a:b") else {
            panic!("it is right")
        };
        assert_eq!(
            (who.device.as_deref(), &who.keys[..]),
            (Some("a&b"), &[("tenants".to_owned(), "a:b".to_owned())][..])
        );
    }
}
