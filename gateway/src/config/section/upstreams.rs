//! `[upstreams.*]`: endpoints, deadlines and the breaker in front of them.

use super::super::document::Value;
use super::super::fault::{At, Code, Problem};
use super::super::kind::{Choice, ListOf, Positive, Span, Whole};
use super::super::table::Table;
use super::{HOUR, MS, SECOND, forms};
use crate::breaker;
use crate::endpoint::Balance;
use crate::upstream::Settings;

/// Every upstream, and the place of its name.
pub(super) fn read(root: &Table<'_>) -> Vec<(Settings, At)> {
    root.named("upstreams", |name, table| {
        if let Err(problem) = forms::name(name.value) {
            table.reading.error(&name.at, problem);
        }
        (upstream(name.value, table), name.at)
    })
}

fn upstream(name: &str, table: &Table<'_>) -> Settings {
    const BALANCE: Choice<Balance> = Choice(&[
        ("round-robin", Some(Balance::RoundRobin)),
        ("least-request", Some(Balance::LeastRequest)),
        ("ewma", None),
        ("consistent-hash", None),
    ]);
    table.later("dns", None);
    table.later("retries", Some(&Value::Whole(0)));
    table.later("health", None);
    table.later("concurrency", None);
    let endpoints = ListOf { item: forms::ENDPOINT, least: 1 };
    let endpoints = if table.has("dns") {
        table.optional("endpoints", &endpoints)
    } else {
        table.required("endpoints", &endpoints)
    };
    let endpoints = endpoints.map_or_else(Vec::new, |endpoints| endpoints.value);
    for (index, endpoint) in endpoints.iter().enumerate() {
        if endpoints[..index].iter().any(|earlier| earlier.value == endpoint.value) {
            table.reading.error(&endpoint.at, Problem::new(Code::Duplicate, "this endpoint is listed twice"));
        }
    }
    let default = Settings::new(name.into(), endpoints.into_iter().map(|endpoint| endpoint.value).collect());
    Settings {
        balance: table.or("balance", &BALANCE, default.balance),
        connect_timeout: table.or("connect_timeout", &Span(MS..=60 * SECOND), default.connect_timeout),
        timeout: table.or("timeout", &Span(MS..=HOUR), default.timeout),
        breaker: table.table("breaker", breaker),
        ..default
    }
}

fn breaker(table: &Table<'_>) -> breaker::Settings {
    let default = breaker::Settings::default();
    breaker::Settings {
        error_ratio: table.or("error_ratio", &Positive(1.0), default.error_ratio),
        slow: table.or("slow", &Span(MS..=HOUR), default.slow),
        slow_ratio: table.or("slow_ratio", &Positive(1.0), default.slow_ratio),
        minimum: table.or("minimum", &Whole(1..=1_000_000), default.minimum),
        window: table.or("window", &Span(SECOND..=60 * SECOND), default.window),
        open: table.or("open", &Span(100 * MS..=HOUR), default.open),
    }
}
