//! Admin API queries about limits: list, explain, override.
//!
//! Invariant: an explanation charges no rule.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::time::Duration;

use limiter::{Explanation, Limiter, Mode, RecentDenial, Scope};
use serde_json::{Value, json};
use smallvec::SmallVec;

use super::config::LimitConfig;
use super::error::AdminQueryError;
use super::override_command::{OverrideCommand, mode_name};
use super::subject::{CLOCK, subject};
use crate::identify::{CallerDescription, CallerIdentifier};
use crate::metrics::Label as _;

/// A caller that was denied last before that time is not limited any more, as far as an operator is
/// concerned.
const DENIED_WITHIN: Duration = Duration::from_secs(15 * 60);
/// Denied callers that are listed.
const DENIED_MAX: usize = 20;

/// Query or command of an operator.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum AdminQuery {
    /// Every rule.
    List,
    /// How each rule treats the described caller, and the reason.
    Explain(CallerDescription),
    /// Sets or clears an override of one rule.
    Override {
        rule: String,
        command: OverrideCommand,
        /// Limits the command to one node; `None` for the whole fleet.
        node: Option<String>,
    },
}

/// JSON reply to a query, and whether every node acknowledged it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AdminReply {
    pub(crate) value: Value,
    /// False if some node did not acknowledge an override in time.
    pub(crate) is_complete: bool,
}

const EXPLAIN_PARAMETERS: &str = "ip, device, fingerprint, user, principal, issuer, user_class and key";

impl AdminQuery {
    /// Parses a command that sets an override: `mode=shadow&percent=10&for=15m`.
    pub(crate) fn set_override(rule: &str, query: &str) -> Result<AdminQuery, AdminQueryError> {
        let (command, node) = OverrideCommand::parse(query)?;
        Ok(AdminQuery::Override { rule: rule.to_owned(), command, node })
    }

    /// Parses a command that clears an override on one node, `node=n1`, or on all.
    pub(crate) fn clear_override(rule: &str, query: &str) -> Result<AdminQuery, AdminQueryError> {
        let (command, node) = OverrideCommand::parse_clear(query)?;
        Ok(AdminQuery::Override { rule: rule.to_owned(), command, node })
    }

    /// Parses the caller to explain:
    /// `ip=192.0.2.1&device=abc&user=alice&user_class=gold&key=tenants:acme`.
    pub(crate) fn explain(query: &str) -> Result<AdminQuery, AdminQueryError> {
        let mut description = CallerDescription::default();
        let mut ip = None;
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "ip" => {
                    let address = value.parse::<IpAddr>();
                    ip = Some(address.map_err(|_| AdminQueryError::InvalidValue(value.into_owned(), "an IP address"))?);
                }
                "device" => description.device = Some(value.into_owned()),
                "fingerprint" => description.fingerprint = Some(value.into_owned()),
                "user" => description.user = Some(value.into_owned()),
                "principal" => description.principal = Some(value.into_owned()),
                "issuer" => description.issuer = Some(value.into_owned()),
                // `tier`: the former name.
                "user_class" | "tier" => description.user_class = Some(value.into_owned()),
                "key" => {
                    let invalid = |expected| AdminQueryError::InvalidValue(value.clone().into_owned(), expected);
                    let (rule, key) = value.split_once(':').ok_or_else(|| invalid("RULE:VALUE"))?;
                    if description.keys.iter().any(|(known, _)| known == rule) {
                        return Err(invalid("the only value for its rule"));
                    }
                    description.keys.push((rule.to_owned(), key.to_owned()));
                }
                _ => return Err(AdminQueryError::UnknownParameter(name.into_owned(), EXPLAIN_PARAMETERS)),
            }
        }
        if description.user.is_some()
            && let Some(principal) = description.principal
        {
            return Err(AdminQueryError::InvalidValue(principal, "a principal in place of a user"));
        }
        description.ip = ip.ok_or(AdminQueryError::MissingAddress)?;
        Ok(AdminQuery::Explain(description))
    }

    /// Answers the query from the state of this node. For an override, returns the current rules.
    pub(crate) fn run(
        &self,
        limiter: &Limiter,
        config: &LimitConfig,
        identifier: &CallerIdentifier,
    ) -> Result<Value, AdminQueryError> {
        match self {
            AdminQuery::Explain(description) => explain(limiter, config, identifier, description),
            AdminQuery::List => Ok(list_rules(limiter, config)),
            AdminQuery::Override { rule, .. } if config.rules.iter().any(|config| *config.rule.name == **rule) => {
                Ok(list_rules(limiter, config))
            }
            AdminQuery::Override { rule, .. } => Err(AdminQueryError::UnknownRule(rule.clone())),
        }
    }
}

/// Every rule with the override that is in effect, and the denied callers.
pub(crate) fn list_rules(limiter: &Limiter, config: &LimitConfig) -> Value {
    let now = CLOCK.now();
    let overrides: Vec<_> = limiter.active_overrides(now).collect();
    let rules = config.rules.iter().map(|config| {
        let rule = &config.rule;
        let active = overrides.iter().find(|active| active.rule == rule.name);
        json!({
            "name": &*rule.name,
            "scope": scope_name(rule.scope),
            "rate": rule.quota.rate().to_string(),
            "burst": rule.quota.burst(),
            "mode": mode_name(rule.mode),
            "percent": rule.percent.get(),
            "override": active.map(|active| json!({
                "mode": mode_name(active.rule_override.mode),
                "percent": active.rule_override.percent.get(),
                "ends_in_seconds": active.ends_at.since(now).as_secs(),
            })),
        })
    });
    let (denials, denials_hidden) = denied_callers(limiter);
    json!({ "rules": rules.collect::<Vec<_>>(), "denials": denials, "denials_hidden": denials_hidden })
}

fn explain(
    limiter: &Limiter,
    config: &LimitConfig,
    identifier: &CallerIdentifier,
    description: &CallerDescription,
) -> Result<Value, AdminQueryError> {
    let keys = description.keys.iter().map(|(rule, value)| {
        let rule_config = config.rules.iter().find(|config| *config.rule.name == **rule);
        let key = rule_config.ok_or_else(|| AdminQueryError::UnknownRule(rule.clone()))?.rule.key;
        key.map(|key| (key.0, value.as_str())).ok_or_else(|| AdminQueryError::NotKeyed(rule.clone()))
    });
    let keys = keys.collect::<Result<Vec<_>, _>>()?;
    let caller = identifier.caller_from_description(description, &keys).ok_or_else(|| {
        AdminQueryError::InvalidValue(description.user_class.clone().unwrap_or_default(), "a configured user class")
    })?;
    let now = CLOCK.now();
    let rules: Vec<_> = limiter
        .explain(&subject(&caller), now)
        .iter()
        .map(|explanation| {
            let last_denial = explanation.last_denial.map(|last| {
                json!({
                    "seconds_ago": now.since(last.at).as_secs_f64(),
                    "retry_after_seconds": seconds(last.retry_after),
                })
            });
            json!({
                "name": &*explanation.name,
                "scope": scope_name(explanation.scope),
                "mode": mode_name(explanation.mode),
                "percent": explanation.percent.get(),
                "is_override": explanation.override_ends_at.is_some(),
                "rate": explanation.quota.rate().to_string(),
                "burst": explanation.quota.burst(),
                "reserve": explanation.reserve,
                "remaining": explanation.remaining,
                "reset_seconds": seconds(explanation.reset),
                "wait_seconds": seconds(explanation.wait),
                "last_denial": last_denial,
                "reason": reason(explanation),
            })
        })
        .collect();
    let user_class = config.weights.get(caller.user_class).map(|(name, _)| name.as_str());
    Ok(json!({ "user_class": user_class, "access": caller.access.as_str(), "rules": rules }))
}

/// The callers that were denied in the last fifteen minutes, those with most denials first, and the
/// number of those that are not shown. The hashes are those of the access log. A denial of a user
/// is that of a device as well: both have one entry, with the larger count.
fn denied_callers(limiter: &Limiter) -> (Vec<Value>, usize) {
    let now = CLOCK.now();
    let mut denied: Vec<(RecentDenial, SmallVec<[u64; 2]>)> = Vec::new();
    for recent in limiter.denied_within(DENIED_WITHIN, now) {
        match denied.last_mut() {
            Some((last, keys)) if last.rule == recent.rule && last.denial == recent.denial => {
                keys.push(recent.key);
                (last.count, last.since) = (last.count, last.since).max((recent.count, recent.since));
            }
            _ => denied.push((recent.clone(), SmallVec::from_slice(&[recent.key]))),
        }
    }
    denied.sort_by_key(|(recent, _)| Reverse(recent.count));
    let hidden = denied.len().saturating_sub(DENIED_MAX);
    denied.truncate(DENIED_MAX);
    let rows = denied.into_iter().map(|(RecentDenial { rule, denial, count, since, .. }, keys)| {
        json!({
            "rule": &*rule,
            "callers": keys.iter().map(|key| format!("{key:016x}")).collect::<Vec<_>>(),
            "denials": count,
            "since_seconds_ago": now.since(since).as_secs_f64().round(),
            "seconds_ago": now.since(denial.at).as_secs_f64().round(),
            "retry_after_seconds": denial.retry_after.as_secs_f64().ceil(),
        })
    });
    (rows.collect(), hidden)
}

/// One sentence for the operator.
fn reason(explanation: &Explanation) -> String {
    if !explanation.has_key {
        return "does not apply: the caller has no value for its key".to_owned();
    }
    if explanation.mode == Mode::Off {
        return "does not apply: the rule is off".to_owned();
    }
    if !explanation.is_included {
        return format!("does not apply: the caller is outside the enforced {} %", explanation.percent.get());
    }
    let verb = if explanation.mode == Mode::Shadow { "would deny (shadow)" } else { "denies" };
    if explanation.wait.is_zero() {
        return format!("passes: {} of {} tokens remain", explanation.remaining, explanation.quota.burst());
    }
    let reserve = if explanation.reserve > 0 {
        format!(", of which {} are reserved for user classes of higher weight", explanation.reserve)
    } else {
        String::new()
    };
    format!("{verb} for another {:.3} s: {} tokens remain{reserve}", seconds(explanation.wait), explanation.remaining)
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// Value of `tier` in the configuration, and of `scope` in the admin API.
fn scope_name(scope: Scope) -> &'static str {
    match scope {
        Scope::Device => "device",
        Scope::User => "user",
        Scope::Key => "key",
        Scope::Node => "node",
        Scope::Cluster => "cluster",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn explain_requires_an_address() {
        assert_eq!(AdminQuery::explain("device=a"), Err(AdminQueryError::MissingAddress));
        assert!(matches!(AdminQuery::explain("ip=a"), Err(AdminQueryError::InvalidValue(..))));
        assert!(matches!(AdminQuery::explain("ip=::1&key=a"), Err(AdminQueryError::InvalidValue(..))));
        assert!(matches!(AdminQuery::explain("ip=::1&key=a:b&key=a:c"), Err(AdminQueryError::InvalidValue(..))));
        assert!(matches!(AdminQuery::explain("ip=::1&user=a&principal=a"), Err(AdminQueryError::InvalidValue(..))));
        let Ok(AdminQuery::Explain(description)) = AdminQuery::explain("ip=192.0.2.1&device=a%26b&key=tenants:a:b")
        else {
            panic!("a valid query")
        };
        assert_eq!(
            (description.device.as_deref(), &description.keys[..]),
            (Some("a&b"), &[("tenants".to_owned(), "a:b".to_owned())][..])
        );
    }
}
