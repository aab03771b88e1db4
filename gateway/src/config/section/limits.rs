//! `[tiers]` and `[limits.*]`: weights, and rules that routes attach.

use std::num::NonZeroU32;

use limiter::{Mode, Percent, Quota, QuotaError, Rate, Rule, Tier};

use super::super::fault::{At, Problem};
use super::super::kind::{Choice, Parsed, Positive, Whole};
use super::super::table::Table;
use super::forms;
use crate::limit;

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
        if let Err(error) = limiter::Weight::try_from(weight) {
            root.reading.error(&name.at, Problem::bad(error.to_string()));
        }
        match weights.iter_mut().find(|(known, _)| *known == name.value) {
            Some(known) => known.1 = weight,
            None => weights.push((name.value, weight)),
        }
    }
    weights
}

/// Every rule, and the place of its table.
pub(super) fn rules(root: &Table<'_>) -> Vec<(Rule, At)> {
    let rules = root.named("limits", |name, table| {
        if let Err(problem) = forms::name(name.value) {
            table.reading.error(&name.at, problem);
        }
        Some((rule(name.value, table)?, name.at))
    });
    rules.into_iter().flatten().collect()
}

fn rule(name: &str, table: &Table<'_>) -> Option<Rule> {
    const TIERS: Choice<Tier> = Choice(&[
        ("device", Some(Tier::Device)),
        ("user", Some(Tier::User)),
        ("node", Some(Tier::Node)),
        ("cluster", Some(Tier::Cluster)),
    ]);
    const MODES: Choice<Mode> =
        Choice(&[("enforce", Some(Mode::Enforce)), ("shadow", Some(Mode::Shadow)), ("off", Some(Mode::Off))]);
    let tier = table.required("tier", &TIERS);
    let rate = table.required("rate", &RATE);
    let burst = table.required("burst", &Whole(1..=BURST_MAX));
    let mode = table.or("mode", &MODES, Mode::default());
    let percent = table.or("percent", &Whole(0..=100), 100);
    let (tier, rate, burst) = (tier?, rate?, burst?);
    let tokens = NonZeroU32::new(burst.value)?;
    match Quota::new(rate.value, tokens) {
        Ok(quota) => Some(Rule {
            mode,
            percent: u8::try_from(percent).ok().and_then(|percent| Percent::try_from(percent).ok())?,
            ..Rule::new(name, tier.value, quota)
        }),
        Err(error) => {
            table.reading.error(&burst.at, Problem::bad(error.to_string()));
            None
        }
    }
}

pub(super) fn rate(text: &str) -> Result<Rate, Problem> {
    text.parse().map_err(|error: QuotaError| {
        Problem::bad(error.to_string()).hint("a whole number of requests per s, m, h or d, such as \"100/s\"")
    })
}
