//! `[tiers]` and `[limits.*]`: weights of user classes, and the limit rules that routes use.

use std::num::{NonZeroU32, NonZeroUsize};

use limiter::{
    Fraction, KEYS_PER_RULE_MAX, KeyIndex, Mode, Percent, Quota, QuotaError, Rate, Rule, Scope, WEIGHT_MAX, WEIGHT_MIN,
    Weight,
};

use super::super::constraints;
use super::super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::super::suggestion::suggest;
use super::super::table_reader::TableReader;
use super::super::value_kind::{IntegerRange, NumberRange, OneOf, ParsedString, PositiveNumber};
use super::bounds::index;
use super::{formats, identity};
use crate::identify::{self, IdentitySource, LIMIT_KEYS_MAX};
use crate::limit::{self, HeaderExposure, RuleConfig};
use formats::{segment_number, token};

/// A larger burst is a mistake.
const BURST_MAX: u32 = 100_000_000;

/// The quota of an address is that of a device times this number, as its weight.
const PER_ADDRESS_MAX: u32 = WEIGHT_MAX as u32;

/// At least one request in a period.
pub(super) const RATE_PATTERN: &str = "0*[1-9][0-9]*/[smhd]";

const RATE: ParsedString<Rate> = ParsedString {
    name: "a rate such as \"100/s\", \"3000/m\" or \"5/h\"",
    pattern: RATE_PATTERN,
    parse: parse_rate,
    format: Rate::to_string,
};

/// Weights by user class: the two classes that always exist, overridden and extended by the file.
pub(super) fn weights(root: &TableReader<'_>) -> Vec<(String, f64)> {
    let mut weights = limit::LimitConfig::default().weights;
    root.constraint(constraints::names("tiers", formats::NAME_PATTERN));
    for (name, weight) in root.named_values("tiers", &NumberRange(WEIGHT_MIN..=WEIGHT_MAX)) {
        if let Err(problem) = formats::parse_name(&name.value) {
            root.context.error(&name.at, problem);
        }
        if let Err(error) = Weight::try_from(weight) {
            root.context.error(&name.at, ConfigProblem::bad_value(error.to_string()));
        }
        match weights.iter_mut().find(|(known, _)| *known == name.value) {
            Some(known) => known.1 = weight,
            None => weights.push((name.value, weight)),
        }
    }
    weights
}

/// Source of the key of a limit; unlike other sources it may be a claim of a verified token, a name
/// in a client certificate, or a TLS fingerprint.
const KEY: ParsedString<IdentitySource> = ParsedString {
    name: "\"header:NAME\", \"cookie:NAME\", \"path:N\", \"host:\", \"claim:NAME\", \"certificate:subject\", \"certificate:san\", \"ja4:\", \"geoip:country\" or \"geoip:continent\"",
    pattern: concat!(
        "(header|cookie):",
        token!(),
        r"|host:|claim:[\s\S]+|certificate:(subject|san)|ja4:|geoip:(country|continent)|path:",
        segment_number!()
    ),
    parse: |text| match text.strip_prefix("claim:") {
        Some("") | None => identity::parse_connection_source(text),
        Some(name) => Ok(IdentitySource::Claim(name.to_owned())),
    },
    format: identity::format_source,
};

/// Default budget of one address under a device rule, as a multiple of one device's quota. Large
/// enough for an office or a mobile network behind one address; bounds the gain of a client that
/// invents device IDs.
const DEFAULT_PER_ADDRESS: u32 = 100;

/// Every rule with the location of its table. The keys of rules with scope `key` are added to
/// `identify`.
pub(super) fn rules(
    root: &TableReader<'_>,
    weights: &[(String, f64)],
    identify: &mut identify::IdentityConfig,
) -> Vec<(RuleConfig, DocumentLocation)> {
    root.constraint(constraints::names("limits", formats::NAME_PATTERN));
    let rules = root.named_tables("limits", |name, table| {
        if let Err(problem) = formats::parse_name(name.value) {
            table.context.error(&name.at, problem);
        }
        if name.value == "explain" {
            let problem = ConfigProblem::bad_value("the name `explain` is reserved for the admin API");
            table.context.error(&name.at, problem.hint("give the limit another name"));
        }
        Some((rule(name.value, table, weights, identify)?, name.at))
    });
    rules.into_iter().flatten().collect()
}

fn rule(
    name: &str,
    table: &TableReader<'_>,
    weights: &[(String, f64)],
    identify: &mut identify::IdentityConfig,
) -> Option<RuleConfig> {
    const SCOPES: OneOf<Scope> = OneOf(&[
        ("device", Some(Scope::Device)),
        ("user", Some(Scope::User)),
        ("key", Some(Scope::Key)),
        ("node", Some(Scope::Node)),
        ("cluster", Some(Scope::Cluster)),
    ]);
    const MODES: OneOf<Mode> =
        OneOf(&[("enforce", Some(Mode::Enforce)), ("shadow", Some(Mode::Shadow)), ("off", Some(Mode::Off))]);
    const EXPOSURES: OneOf<HeaderExposure> = OneOf(&[
        ("all", Some(HeaderExposure::Full)),
        ("policy", Some(HeaderExposure::PolicyOnly)),
        ("none", Some(HeaderExposure::Hidden)),
    ]);
    let scope = table.required("tier", &SCOPES);
    let rate = table.required("rate", &RATE);
    let burst = table.required("burst", &IntegerRange(1..=BURST_MAX));
    table.constraint(constraints::needed_by("key", ("tier", "key")));
    table.constraint(constraints::refused_by("key", ("tier", &["device", "user", "node", "cluster"])));
    table.constraint(constraints::refused_by("keys", ("tier", &["node", "cluster"])));
    table.constraint(constraints::refused_by("per_address", ("tier", &["user", "key", "node", "cluster"])));
    let mode = table.value_or("mode", &MODES, Mode::default());
    let percent = table.value_or("percent", &IntegerRange(0..=100), 100);
    let key = table.optional("key", &KEY);
    let keys = table.optional("keys", &IntegerRange(1..=KEYS_PER_RULE_MAX));
    let exposure = table.value_or("headers", &EXPOSURES, HeaderExposure::default());
    let per_address = table.value_or("per_address", &IntegerRange(0..=PER_ADDRESS_MAX), DEFAULT_PER_ADDRESS);
    let reserve = reserve(table, weights);
    let (scope, rate, burst) = (scope?, rate?, burst?);
    let quota = match Quota::new(rate.value, NonZeroU32::new(burst.value)?) {
        Ok(quota) => quota,
        Err(error) => {
            table.context.error(&burst.at, ConfigProblem::bad_value(error.to_string()));
            return None;
        }
    };
    let key = match (scope.value, key) {
        (Scope::Key, None) => {
            let problem = ConfigProblem::new(FaultCode::Missing, "a limit with `tier = \"key\"` needs a `key`");
            let problem = problem.hint(format!("write key = {}", KEY.name));
            table.context.error(&table.at, problem.lacks(&[&table.location_of(&["key"]).path]));
            return None;
        }
        (Scope::Key, Some(source)) if matches!(source.value, IdentitySource::Claim(_)) && identify.tokens.is_none() => {
            let problem = ConfigProblem::new(FaultCode::Missing, "there is no token to read the claim from");
            let problem = problem.hint("set `identity.user = { jwt = { ... } }`").lacks(&["identity.user"]);
            table.context.error(&source.at, problem);
            return None;
        }
        (Scope::Key, Some(source)) => Some(key_index(source.value, &mut identify.keys).or_else(|| {
            let message = format!("the limits have more than {LIMIT_KEYS_MAX} different keys");
            table.context.error(&source.at, ConfigProblem::bad_value(message));
            None
        })?),
        (_, Some(source)) => {
            table
                .context
                .error(&source.at, ConfigProblem::bad_value("`key` applies to limits with `tier = \"key\"` only"));
            None
        }
        (_, None) => None,
    };
    // Otherwise each address has exactly one device.
    let has_many_devices = scope.value == Scope::Device && (!identify.device.is_empty() || identify.has_fingerprints);
    if table.has("per_address") && !has_many_devices {
        let message = "`per_address` applies to limits with `tier = \"device\"` only, and needs `identity.device` or a listener with TLS";
        let problem = ConfigProblem::bad_value(message);
        let tier = table.location_of(&["tier"]).path;
        table.context.error(&table.location_of(&["per_address"]), problem.lacks(&["identity.device", "listen", &tier]));
    }
    let is_chosen = |source: &IdentitySource| matches!(source, IdentitySource::Header(_) | IdentitySource::Cookie(_));
    if has_many_devices && !table.has("per_address") && per_address > 0 && identify.device.iter().any(is_chosen) {
        let message = format!(
            "clients choose the ids in `identity.device`: with made-up ones, an address gets {per_address} times this limit"
        );
        let problem = ConfigProblem::new(FaultCode::Risk, message);
        table
            .context
            .warning(&table.at, problem.hint("write `per_address`, the devices that may be behind one address"));
    }
    if scope.value == Scope::User && !identify.has_users() {
        let problem = ConfigProblem::new(FaultCode::Risk, "this limit never applies: no request has a user");
        table.context.warning(&table.at, problem.hint("set `identity.user`").lacks(&["identity.user"]));
    }
    if let Some(keys) = keys.as_ref().filter(|_| matches!(scope.value, Scope::Node | Scope::Cluster)) {
        table.context.error(
            &keys.at,
            ConfigProblem::bad_value("`keys` does not apply to limits with `tier = \"node\"` or `\"cluster\"`"),
        );
    }
    for source in &identify.keys {
        if let IdentitySource::Claim(name) = source
            && !identify.claims.contains(name)
        {
            identify.claims.push(name.clone());
        }
    }
    let rule = Rule {
        key,
        mode,
        percent: u8::try_from(percent).ok().and_then(|percent| Percent::try_from(percent).ok())?,
        keys: keys.and_then(|keys| NonZeroUsize::new(index(keys.value))),
        reserve,
        is_exposed: exposure != HeaderExposure::Hidden,
        ..Rule::new(name, scope.value, quota)
    };
    let mut config = RuleConfig { rule, exposure, per_address: None };
    config.per_address = NonZeroU32::new(per_address).filter(|_| has_many_devices);
    let representable = config.limiter_rules().and_then(|mut rules| {
        let Some(address) = rules.nth(1) else { return Ok(()) };
        // Invalid weights have already been reported.
        let mut weights = weights.iter().filter_map(|(_, weight)| Weight::try_from(*weight).ok());
        weights.try_for_each(|weight| address.quota.weighted(weight).map(drop))
    });
    if let Err(error) = representable {
        if table.has("per_address") {
            table.context.error(&table.location_of(&["per_address"]), ConfigProblem::bad_value(error.to_string()));
        }
        // A quota above the limiter's resolution limits nothing.
        config.per_address = None;
    }
    Some(config)
}

/// Index of a source among the keys, added if it is new; `None` if there are too many.
fn key_index(source: IdentitySource, keys: &mut Vec<IdentitySource>) -> Option<KeyIndex> {
    let position = keys.iter().position(|known| *known == source).unwrap_or_else(|| {
        keys.push(source);
        keys.len() - 1
    });
    u8::try_from(position).ok().filter(|_| position < LIMIT_KEYS_MAX).map(KeyIndex)
}

/// Fraction that each user class leaves to the others, in the order of the weights; empty if none
/// is configured.
fn reserve(table: &TableReader<'_>, weights: &[(String, f64)]) -> Box<[Fraction]> {
    let named = table.named_values("reserve", &PositiveNumber(1.0));
    if named.is_empty() {
        return Box::default();
    }
    let mut reserve = vec![Fraction::ZERO; weights.len()];
    for (name, fraction) in named {
        match weights.iter().position(|(known, _)| *known == name.value) {
            Some(class) => reserve[class] = Fraction::try_from(fraction).unwrap_or_default(),
            None => {
                let known: Vec<&str> = weights.iter().map(|(known, _)| known.as_str()).collect();
                let problem =
                    ConfigProblem::new(FaultCode::UnknownName, format!("unknown user class `{}`", name.value));
                table.context.error(&name.at, problem.hint(suggest(&name.value, &known)).lacks(&["tiers"]));
            }
        }
    }
    reserve.into()
}

pub(super) fn parse_rate(text: &str) -> Result<Rate, ConfigProblem> {
    text.parse().map_err(|error: QuotaError| {
        ConfigProblem::bad_value(error.to_string())
            .hint("write an integer number of requests per s, m, h or d, such as \"100/s\"")
    })
}
