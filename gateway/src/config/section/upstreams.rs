//! `[dns]` and `[upstreams.*]`: endpoints, timeouts and circuit breaker.

use std::time::Duration;

use super::super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::super::node::DocumentValue;
use super::super::table_reader::TableReader;
use super::super::value_kind::{ArrayOf, DurationRange, IntegerRange, OneOf, PositiveNumber};
use super::bounds::{DAY, HOUR, MS, SECOND};
use super::formats;
use crate::breaker;
use crate::discovery::DnsConfig;
use crate::endpoint::{BalancePolicy, EjectConfig};
use crate::upstream::{HealthConfig, UpstreamConfig};

pub(super) fn dns(root: &TableReader<'_>) -> DnsConfig {
    let default = DnsConfig::default();
    root.table("dns", |table| DnsConfig {
        servers: formats::list(table, "servers", formats::NAME_SERVER, default.servers),
        timeout: table.value_or("timeout", &DurationRange(100 * MS..=60 * SECOND), default.timeout),
    })
}

/// Every upstream with the location of its name.
pub(super) fn read(root: &TableReader<'_>) -> Vec<(UpstreamConfig, DocumentLocation)> {
    root.named_tables("upstreams", |name, table| {
        if let Err(problem) = formats::parse_name(name.value) {
            table.context.error(&name.at, problem);
        }
        (upstream(name.value, table), name.at)
    })
}

fn upstream(name: &str, table: &TableReader<'_>) -> UpstreamConfig {
    const BALANCE: OneOf<BalancePolicy> = OneOf(&[
        ("round-robin", Some(BalancePolicy::RoundRobin)),
        ("least-request", Some(BalancePolicy::LeastRequest)),
        ("ewma", None),
        ("consistent-hash", None),
    ]);
    table.unavailable("retries", Some(&DocumentValue::Integer(0)));
    table.unavailable("concurrency", None);
    let endpoints = ArrayOf { item: formats::ENDPOINT, min_items: 1 };
    let endpoints = table.required("endpoints", &endpoints);
    let endpoints = endpoints.map_or_else(Vec::new, |endpoints| endpoints.value);
    for (index, endpoint) in endpoints.iter().enumerate() {
        if endpoints[..index].iter().any(|earlier| earlier.value == endpoint.value) {
            table.context.error(&endpoint.at, ConfigProblem::new(FaultCode::Duplicate, "duplicate endpoint"));
        }
    }
    let default = UpstreamConfig::new(name.into(), endpoints.into_iter().map(|endpoint| endpoint.value).collect());
    UpstreamConfig {
        balance: table.value_or("balance", &BALANCE, default.balance),
        connect_timeout: table.value_or("connect_timeout", &DurationRange(MS..=60 * SECOND), default.connect_timeout),
        timeout: table.value_or("timeout", &DurationRange(MS..=HOUR), default.timeout),
        idle_timeout: table.value_or("idle_timeout", &DurationRange(MS..=HOUR), default.idle_timeout),
        total_timeout: Some(table.value_or(
            "total_timeout",
            &DurationRange(Duration::ZERO..=DAY),
            default.total_timeout.unwrap_or_default(),
        ))
        .filter(|total| !total.is_zero()),
        eject: table.table("eject", eject),
        health: table.optional_table("health", health),
        breaker: table.table("breaker", breaker),
        ..default
    }
}

fn eject(table: &TableReader<'_>) -> EjectConfig {
    let default = EjectConfig::default();
    EjectConfig {
        after: table.value_or("after", &IntegerRange(0..=1_000_000), default.after),
        base: table.value_or("base", &DurationRange(100 * MS..=HOUR), default.base),
        share: table.value_or("share", &PositiveNumber(1.0), default.share),
    }
}

fn health(table: &TableReader<'_>) -> HealthConfig {
    HealthConfig {
        path: table.required("path", &formats::TARGET).map_or_else(String::new, |path| path.value),
        host: table.optional("host", &formats::AUTHORITY).map(|host| host.value),
        interval: table.value_or("interval", &DurationRange(100 * MS..=HOUR), 5 * SECOND),
        timeout: table.value_or("timeout", &DurationRange(10 * MS..=60 * SECOND), SECOND),
        healthy: table.value_or("healthy", &IntegerRange(1..=1_000), 2),
        unhealthy: table.value_or("unhealthy", &IntegerRange(1..=1_000), 3),
        expect: formats::list(table, "expect", formats::STATUSES, vec![2, 3]),
    }
}

fn breaker(table: &TableReader<'_>) -> breaker::BreakerConfig {
    let default = breaker::BreakerConfig::default();
    breaker::BreakerConfig {
        error_ratio: table.value_or("error_ratio", &PositiveNumber(1.0), default.error_ratio),
        slow: table.value_or("slow", &DurationRange(MS..=HOUR), default.slow),
        slow_ratio: table.value_or("slow_ratio", &PositiveNumber(1.0), default.slow_ratio),
        minimum: table.value_or("minimum", &IntegerRange(1..=1_000_000), default.minimum),
        window: table.value_or("window", &DurationRange(SECOND..=60 * SECOND), default.window),
        open: table.value_or("open", &DurationRange(100 * MS..=HOUR), default.open),
    }
}
