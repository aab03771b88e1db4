//! `[tiers]` and `[limits.*]`: weights, and rules that routes attach.

use std::num::{NonZeroU32, NonZeroUsize};

use limiter::{Fraction, KeyIndex, Mode, Percent, Quota, QuotaError, Rate, Rule, Tier, Weight};

use super::super::fault::{At, Code, Problem};
use super::super::kind::{Choice, Parsed, Positive, Whole};
use super::super::table::Table;
use super::{forms, identity};
use crate::identify::{self, KEYS_MAX, Source};
use crate::limit::{self, RuleSettings, Tells};

/// What a subject's tier may multiply rate and burst by, at most.
const WEIGHT_MAX: f64 = 10_000.0;

/// A burst that is no mistake.
const BURST_MAX: u32 = 100_000_000;

const RATE: Parsed<Rate> =
    Parsed { name: "a rate such as \"100/s\", \"3000/m\" or \"5/h\"", parse: rate, show: Rate::to_string };

/// The weights of the file over the two that always exist.
pub(super) fn weights(root: &Table<'_>) -> Vec<(String, f64)> {
    let mut weights = limit::Settings::default().weights;
    for (name, weight) in root.pairs("tiers", &Positive(WEIGHT_MAX)) {
        if let Err(problem) = forms::name(&name.value) {
            root.reading.error(&name.at, problem);
        }
        if let Err(error) = Weight::try_from(weight) {
            root.reading.error(&name.at, Problem::bad(error.to_string()));
        }
        match weights.iter_mut().find(|(known, _)| *known == name.value) {
            Some(known) => known.1 = weight,
            None => weights.push((name.value, weight)),
        }
    }
    weights
}

/// What a limit may count by: also a claim of a verified token.
const KEY: Parsed<Source> = Parsed {
    name: "\"header:NAME\", \"cookie:NAME\", \"path:N\", \"host:\" or \"claim:NAME\"",
    parse: |text| match text.strip_prefix("claim:") {
        Some("") | None => (identity::SOURCE.parse)(text),
        Some(name) => Ok(Source::Claim(name.to_owned())),
    },
    show: |source| match source {
        Source::Claim(name) => format!("claim:{name}"),
        source => (identity::SOURCE.show)(source),
    },
};

/// Most keys that a rule holds: 63 bytes each.
const RULE_KEYS_MAX: u32 = 1 << 24;

/// What one address may use of a device rule, in devices: an office or a mobile network behind one address, and no more than
/// so many times what one device gets for whoever makes device ids up.
const PER_ADDRESS: u32 = 100;

/// Every rule with the place of its table. What rules of tier `key` count by goes to those who identify callers.
pub(super) fn rules(
    root: &Table<'_>,
    weights: &[(String, f64)],
    identify: &mut identify::Settings,
) -> Vec<(RuleSettings, At)> {
    let rules = root.named("limits", |name, table| {
        if let Err(problem) = forms::name(name.value) {
            table.reading.error(&name.at, problem);
        }
        if name.value == "explain" {
            let problem = Problem::bad("`explain` is what the admin address calls its explanations");
            table.reading.error(&name.at, problem.hint("give the limit another name"));
        }
        Some((rule(name.value, table, weights, identify)?, name.at))
    });
    rules.into_iter().flatten().collect()
}

fn rule(
    name: &str,
    table: &Table<'_>,
    weights: &[(String, f64)],
    identify: &mut identify::Settings,
) -> Option<RuleSettings> {
    const TIERS: Choice<Tier> = Choice(&[
        ("device", Some(Tier::Device)),
        ("user", Some(Tier::User)),
        ("key", Some(Tier::Key)),
        ("node", Some(Tier::Node)),
        ("cluster", Some(Tier::Cluster)),
    ]);
    const MODES: Choice<Mode> =
        Choice(&[("enforce", Some(Mode::Enforce)), ("shadow", Some(Mode::Shadow)), ("off", Some(Mode::Off))]);
    const TELLS: Choice<Tells> =
        Choice(&[("all", Some(Tells::Everything)), ("policy", Some(Tells::Policy)), ("none", Some(Tells::Nothing))]);
    let tier = table.required("tier", &TIERS);
    let rate = table.required("rate", &RATE);
    let burst = table.required("burst", &Whole(1..=BURST_MAX));
    let mode = table.or("mode", &MODES, Mode::default());
    let percent = table.or("percent", &Whole(0..=100), 100);
    let key = table.optional("key", &KEY);
    let held = table.optional("keys", &Whole(1..=RULE_KEYS_MAX));
    let tells = table.or("headers", &TELLS, Tells::default());
    let per_address = table.or("per_address", &Whole(0..=1_000_000), PER_ADDRESS);
    let reserve = reserve(table, weights);
    let (tier, rate, burst) = (tier?, rate?, burst?);
    let quota = match Quota::new(rate.value, NonZeroU32::new(burst.value)?) {
        Ok(quota) => quota,
        Err(error) => {
            table.reading.error(&burst.at, Problem::bad(error.to_string()));
            return None;
        }
    };
    let key = match (tier.value, key) {
        (Tier::Key, None) => {
            let problem = Problem::new(Code::Missing, "a limit of tier `key` says what it counts by");
            table.reading.error(
                &table.at,
                problem.hint("write key = \"header:NAME\", \"cookie:NAME\", \"path:N\", \"host:\" or \"claim:NAME\""),
            );
            return None;
        }
        (Tier::Key, Some(source)) if matches!(source.value, Source::Claim(_)) && identify.tokens.is_none() => {
            let problem = Problem::new(Code::Missing, "there is no token that would have this claim");
            table.reading.error(&source.at, problem.hint("set identity.user = { jwt = { ... } }"));
            return None;
        }
        (Tier::Key, Some(source)) => Some(index_of(source.value, &mut identify.keys).or_else(|| {
            let message = format!("limits count by more than {KEYS_MAX} different keys");
            table.reading.error(&source.at, Problem::bad(message));
            None
        })?),
        (_, Some(source)) => {
            table.reading.error(&source.at, Problem::bad("only a limit of tier `key` counts by a key"));
            None
        }
        (_, None) => None,
    };
    if table.has("per_address") && (tier.value != Tier::Device || identify.device.is_empty()) {
        let message = "only a limit of tier `device` has addresses with several devices, and where `identity.device` tells them apart";
        table.reading.error(&table.place_of(&["per_address"]), Problem::bad(message));
    }
    if tier.value == Tier::User && identify.user.is_none() {
        let problem = Problem::new(Code::Risk, "this limit never applies: nobody is a user");
        table.reading.warning(&table.at, problem.hint("set `identity.user`"));
    }
    if let Some(held) = held.as_ref().filter(|_| matches!(tier.value, Tier::Node | Tier::Cluster)) {
        table.reading.error(&held.at, Problem::bad("a limit that all share holds no keys"));
    }
    for source in &identify.keys {
        if let Source::Claim(name) = source
            && !identify.claims.contains(name)
        {
            identify.claims.push(name.clone());
        }
    }
    let rule = Rule {
        key,
        mode,
        percent: u8::try_from(percent).ok().and_then(|percent| Percent::try_from(percent).ok())?,
        keys: held.and_then(|held| NonZeroUsize::new(super::index(held.value))),
        reserve,
        is_told: tells != Tells::Nothing,
        ..Rule::new(name, tier.value, quota)
    };
    let mut settings = RuleSettings { rule, tells, per_address: None };
    // Where nothing but its address tells a device, there is one for each.
    let has_many = tier.value == Tier::Device && !identify.device.is_empty();
    settings.per_address = NonZeroU32::new(per_address).filter(|_| has_many);
    let measured = settings.built().and_then(|mut rules| {
        let Some(address) = rules.nth(1) else { return Ok(()) };
        // Faulty weights have been reported where they stand.
        let mut weights = weights.iter().filter_map(|(_, weight)| Weight::try_from(*weight).ok());
        weights.try_for_each(|weight| address.quota.weighted(weight).map(drop))
    });
    if let Err(error) = measured {
        if table.has("per_address") {
            table.reading.error(&table.place_of(&["per_address"]), Problem::bad(error.to_string()));
        }
        // What is too much to be measured limits nobody.
        settings.per_address = None;
    }
    Some(settings)
}

/// The place of a source among those that are looked for; `None` where there are too many.
fn index_of(source: Source, keys: &mut Vec<Source>) -> Option<KeyIndex> {
    let at = keys.iter().position(|known| *known == source).unwrap_or_else(|| {
        keys.push(source);
        keys.len() - 1
    });
    u8::try_from(at).ok().filter(|_| at < KEYS_MAX).map(KeyIndex)
}

/// What each user tier leaves to the others, in the order of the weights; empty where none is named.
fn reserve(table: &Table<'_>, weights: &[(String, f64)]) -> Box<[Fraction]> {
    let named = table.pairs("reserve", &Positive(1.0));
    if named.is_empty() {
        return Box::default();
    }
    let mut reserve = vec![Fraction::ZERO; weights.len()];
    for (name, part) in named {
        match weights.iter().position(|(known, _)| *known == name.value) {
            Some(at) => reserve[at] = Fraction::try_from(part).unwrap_or_default(),
            None => {
                let known: Vec<&str> = weights.iter().map(|(known, _)| known.as_str()).collect();
                let problem = Problem::new(Code::UnknownName, format!("there is no user tier `{}`", name.value));
                table.reading.error(&name.at, problem.hint(super::super::nearest::nearest(&name.value, &known)));
            }
        }
    }
    reserve.into()
}

pub(super) fn rate(text: &str) -> Result<Rate, Problem> {
    text.parse().map_err(|error: QuotaError| {
        Problem::bad(error.to_string()).hint("a whole number of requests per s, m, h or d, such as \"100/s\"")
    })
}
