//! Configuration of limits (`[tiers]`, `[limits.*]`, and `nodes` of `[redis]`).

use std::num::NonZeroU32;
use std::sync::Arc;

use limiter::{KeyIndex, QuotaError, Rule, Scope, Weight};

use crate::identify::ADDRESS_KEY_INDEX;

/// Weights of user classes, and rules.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LimitConfig {
    /// Name of each user class and its weight on rate and burst; `anonymous` and `standard` are
    /// always present.
    pub(crate) weights: Vec<(String, f64)>,
    /// The rules, in the order of the file; routes refer to them by index.
    pub(crate) rules: Vec<RuleConfig>,
    /// Expected number of nodes in the fleet. Without a shared store, a node gets 1/nodes of each
    /// cluster rule.
    pub(crate) nodes: u32,
}

/// Configuration of one limit (`[limits.NAME]`): the rule, its header exposure, and the quota per
/// address.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RuleConfig {
    pub(crate) rule: Rule,
    pub(crate) exposure: HeaderExposure,
    /// For a device rule: the total quota of one address, as a multiple of one device's quota. It
    /// applies whatever device ids the clients at the address send.
    pub(crate) per_address: Option<NonZeroU32>,
}

/// How much of a rule's quota its rate limit headers reveal: all, the policy only, or nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum HeaderExposure {
    /// `RateLimit` and `RateLimit-Policy`.
    #[default]
    Full,
    /// `RateLimit-Policy` only: the remaining quota stays hidden.
    PolicyOnly,
    /// Neither. A denial still carries `Retry-After`.
    Hidden,
}

impl Default for LimitConfig {
    fn default() -> Self {
        LimitConfig {
            weights: vec![("anonymous".to_owned(), 1.0), ("standard".to_owned(), 1.0)],
            rules: Vec::new(),
            nodes: 1,
        }
    }
}

impl RuleConfig {
    /// The limiter rules for this configuration: the rule itself and, with `per_address`, one for
    /// all devices of an address.
    ///
    /// # Errors
    /// The quota multiplied by `per_address` exceeds the limiter's range.
    pub(crate) fn limiter_rules(&self) -> Result<impl Iterator<Item = Rule> + use<>, QuotaError> {
        let address_rule = self.per_address.map(|devices| {
            let quota = self.rule.quota.weighted(Weight::try_from(f64::from(devices.get()))?)?;
            Ok(Rule {
                scope: Scope::Key,
                key: Some(KeyIndex(ADDRESS_KEY_INDEX)),
                quota,
                name: self.address_rule_name(),
                ..self.rule.clone()
            })
        });
        Ok([self.rule.clone()].into_iter().chain(address_rule.transpose()?))
    }

    /// Names of the rules that [`RuleConfig::limiter_rules`] returns.
    pub(crate) fn names(&self) -> impl Iterator<Item = Arc<str>> {
        let address_rule = self.per_address.map(|_| self.address_rule_name());
        [Arc::clone(&self.rule.name)].into_iter().chain(address_rule)
    }

    /// Cannot collide with a rule of the file: a configured name has no colon.
    fn address_rule_name(&self) -> Arc<str> {
        format!("{}:address", self.rule.name).into()
    }
}

impl LimitConfig {
    pub(super) fn exposure_of(&self, rule_name: &str) -> HeaderExposure {
        let has_name = |config: &&RuleConfig| config.names().any(|name| *name == *rule_name);
        self.rules.iter().find(has_name).map_or(HeaderExposure::Hidden, |config| config.exposure)
    }
}
