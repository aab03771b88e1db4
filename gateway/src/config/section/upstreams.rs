//! `[dns]` and `[upstreams.*]`: endpoints, timeouts and circuit breaker.

use std::path::PathBuf;
use std::time::Duration;

use super::super::constraints;
use super::super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::super::node::DocumentValue;
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{
    ArrayOf, Boolean, DurationRange, InputValue, IntegerRange, OneOf, ParsedString, PositiveNumber, Repeats, ValueKind,
};
use super::bounds::{DAY, HOUR, MS, SECOND, index, index_of};
use super::files::{check_validity, optional_path, read_file};
use super::formats;
use crate::breaker::{BreakerConfig, BreakerMode, BreakerScope};
use crate::concurrency::ConcurrencyConfig;
use crate::connect::{UpstreamProtocol, UpstreamTls, UpstreamTlsConfig, UpstreamTlsError, UpstreamTlsVersion};
use crate::discovery::DnsConfig;
use crate::endpoint::{BalanceConfig, BalancePolicy, EjectConfig, EndpointAddress};
use crate::upstream::{HealthConfig, RetryConfig, UpstreamConfig};

pub(super) fn dns(root: &TableReader<'_>) -> DnsConfig {
    let default = DnsConfig::default();
    root.table("dns", |table| DnsConfig {
        servers: formats::list(table, "servers", formats::NAME_SERVER, default.servers),
        timeout: table.value_or("timeout", &DurationRange(100 * MS..=60 * SECOND), default.timeout),
    })
}

/// Every upstream with the location of its name.
pub(super) fn read(root: &TableReader<'_>) -> Vec<(UpstreamConfig, DocumentLocation)> {
    root.constraint(constraints::names("upstreams", formats::NAME_PATTERN));
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
        ("ewma", Some(BalancePolicy::Ewma)),
        ("consistent-hash", Some(BalancePolicy::ConsistentHash)),
    ]);
    let endpoints = ArrayOf { item: WeightedEndpoint, min_items: 1, repeats: Repeats::BySection };
    let endpoints = table.required("endpoints", &endpoints);
    let endpoints = endpoints.map_or_else(Vec::new, |endpoints| endpoints.value);
    for (index, endpoint) in endpoints.iter().enumerate() {
        if endpoints[..index].iter().any(|earlier| earlier.value.0 == endpoint.value.0) {
            table.context.error(&endpoint.at, ConfigProblem::new(FaultCode::Duplicate, "duplicate endpoint"));
        }
    }
    let has_tls = endpoints.iter().any(|endpoint| endpoint.value.0.scheme.has_tls());
    if table.has("tls") && !has_tls {
        let problem = ConfigProblem::bad_value("no endpoint of this upstream uses TLS");
        table.context.error(&table.location_of(&["tls"]), problem.hint("write \"https://\" in `endpoints`"));
    }
    let tls_settings = table.table("tls", tls);
    if !has_tls {
        // Without TLS, its defaults are no effective values.
        table.context.remove_values_under(&table.location_of(&["tls"]).path);
    }
    let tls = tls_settings.filter(|_| has_tls).and_then(|(settings, files)| match UpstreamTls::new(settings) {
        Ok(tls) => Some(tls),
        Err(UpstreamTlsError::File { key, source }) => {
            let named = TLS_FILES.iter().zip(&files).find(|(named, _)| **named == key);
            if let Some(file) = named.and_then(|(_, file)| file.as_ref()) {
                let message = format!("cannot use {}: {source}", file.value.display());
                let hint =
                    "`ca` names a file with the certificates of authorities, `cert` and `key` those of the gateway";
                table.context.error(&file.at, ConfigProblem::new(FaultCode::File, message).hint(hint));
            }
            None
        }
        Err(error) => {
            let problem = ConfigProblem::new(FaultCode::File, format!("TLS to this upstream: {error}"));
            let hint = "install the package `ca-certificates`, or name a file in `ca`";
            table.context.error(&table.location_of(&["tls"]), problem.hint(hint));
            None
        }
    });
    let (mut addresses, mut weights, mut zones) = (Vec::new(), Vec::new(), Vec::new());
    for Located { value: (address, weight, zone), .. } in endpoints {
        addresses.push(address);
        weights.push(weight);
        zones.push(zone);
    }
    let default = UpstreamConfig::new(name.into(), addresses);
    let policy = table.value_or("balance", &BALANCE, default.balance.policy);
    table.constraint(constraints::needs("hash_by", "balance"));
    table.constraint(constraints::refused_by("hash_by", ("balance", &["round-robin", "least-request", "ewma"])));
    let hash_by = table.value_or("hash_by", &formats::HASH_KEY, default.hash_by);
    if table.has("hash_by") && policy != BalancePolicy::ConsistentHash {
        let problem = ConfigProblem::bad_value("`hash_by` has no effect without `balance = \"consistent-hash\"`");
        let problem = problem.lacks(&[&table.location_of(&["balance"]).path]);
        table.context.error(&table.location_of(&["hash_by"]), problem);
    }
    let slow_start = table.value_or("slow_start", &DurationRange(Duration::ZERO..=HOUR), default.balance.slow_start);
    let retry = RetryConfig {
        retries: table.value_or("retries", &IntegerRange(0..=10), default.retry.retries),
        statuses: formats::statuses(table, "retry_on", &RETRY_STATUSES, default.retry.statuses.clone()),
    };
    if retry.retries == 0 && retry.statuses != default.retry.statuses {
        let problem = ConfigProblem::new(FaultCode::Risk, "`retry_on` has no effect: no request is sent again");
        let problem = problem.hint("set `retries`").lacks(&[&table.location_of(&["retries"]).path]);
        table.context.warning(&table.location_of(&["retry_on"]), problem);
    }
    UpstreamConfig {
        tls,
        balance: BalanceConfig { policy, slow_start },
        hash_by,
        weights,
        zones,
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
        concurrency: table.optional_table("concurrency", concurrency),
        breaker: table.table("breaker", breaker),
        retry,
        ..default
    }
}

/// Statuses after which a request may be sent again.
const RETRY_STATUSES: ArrayOf<ParsedString<u16>> =
    ArrayOf { item: RETRY_STATUS, min_items: 0, repeats: Repeats::Warned };

const RETRY_STATUS: ParsedString<u16> = ParsedString {
    name: "the status of an error or a class such as \"503\" or \"5xx\"",
    pattern: "[45]([0-9][0-9]|xx)",
    parse: |text| match (formats::STATUSES.parse)(text)? {
        status @ (4 | 5 | 400..) => Ok(status),
        _ => Err(ConfigProblem::bad_value(format!("`{text}` is not the status of an error"))
            .hint("a request is sent again after an error only: write \"503\", or \"5xx\" for a class")),
    },
    format: formats::STATUSES.format,
};

/// Statuses that pass a health check. Without any, no endpoint would be healthy.
const HEALTHY_STATUSES: ArrayOf<ParsedString<u16>> =
    ArrayOf { item: HEALTHY_STATUS, min_items: 1, repeats: Repeats::Warned };

const HEALTHY_STATUS: ParsedString<u16> = ParsedString {
    name: formats::STATUSES.name,
    pattern: "[2-5]([0-9][0-9]|xx)",
    parse: |text| match (formats::STATUSES.parse)(text)? {
        1 | 100..200 => Err(ConfigProblem::bad_value(format!("`{text}` does not end a response"))
            .hint("interim responses are not counted: write \"200\", or \"2xx\" for a class")),
        status => Ok(status),
    },
    format: formats::STATUSES.format,
};

/// The keys of `tls` that name files.
const TLS_FILES: [&str; 3] = ["ca", "cert", "key"];

/// The settings, and the paths of [`TLS_FILES`]. `None` if a file cannot be read, which is
/// reported.
fn tls(table: &TableReader<'_>) -> Option<(UpstreamTlsConfig, [Option<Located<PathBuf>>; 3])> {
    const VERSIONS: OneOf<UpstreamTlsVersion> =
        OneOf(&[("1.2", Some(UpstreamTlsVersion::V12)), ("1.3", Some(UpstreamTlsVersion::V13))]);
    const PROTOCOLS: OneOf<UpstreamProtocol> =
        OneOf(&[("h2", Some(UpstreamProtocol::Http2)), ("http/1.1", Some(UpstreamProtocol::Http1))]);
    table.constraint(constraints::needs("cert", "key"));
    table.constraint(constraints::needs("key", "cert"));
    let server_name = table.optional("server_name", &formats::SERVER_NAME).map(|name| name.value);
    let (verify, verify_at) = table.located_or("verify", &Boolean, true);
    let min_version = table.value_or("min_version", &VERSIONS, UpstreamTlsVersion::default());
    let protocols =
        [UpstreamProtocol::Http2, UpstreamProtocol::Http1].map(|value| Located { value, at: table.at.clone() });
    let protocols =
        table.value_or("alpn", &ArrayOf { item: PROTOCOLS, min_items: 1, repeats: Repeats::Warned }, protocols.into());
    let protocols = protocols.into_iter().map(|protocol| protocol.value).collect();
    let paths = TLS_FILES.map(|key| optional_path(table, key));
    let is_readable = |path: &Option<Located<PathBuf>>| path.as_ref().map(|path| read_file(table, path));
    let [ca, cert, key] = paths.each_ref().map(is_readable);
    if let (Some(at), Some(ca)) = (verify_at.filter(|_| !verify), &paths[0]) {
        let problem = ConfigProblem::bad_value("`verify = false` does not use `ca`");
        table.context.error(&at, problem.hint(format!("remove `verify`, or `ca` ({})", ca.value.display())));
    }
    for (file, pem, consequence) in [
        (&paths[0], &ca, "servers that it certifies are not trusted"),
        (&paths[1], &cert, "servers that ask for it refuse it"),
    ] {
        if let (Some(file), Some(Some(pem))) = (file, pem) {
            check_validity(table, (file, pem), consequence);
        }
    }
    let identity = match (cert, key) {
        (None, None) => None,
        (Some(cert), Some(key)) => Some((cert?, key?)),
        (cert, _) => {
            let problem = ConfigProblem::new(FaultCode::Missing, "`cert` and `key` belong together");
            let absent = table.location_of(&[if cert.is_none() { "cert" } else { "key" }]).path;
            table.context.error(&table.at, problem.hint("set both, or none").lacks(&[&absent]));
            return None;
        }
    };
    let ca = match ca {
        Some(content) => Some(content?),
        None => None,
    };
    let identity_file = paths[1].as_ref().map(|path| path.value.clone());
    Some((UpstreamTlsConfig { ca, server_name, identity, identity_file, verify, min_version, protocols }, paths))
}

const WEIGHT: IntegerRange = IntegerRange(1..=1_000);

/// An endpoint as a URL, or as a table with its URL and weight.
struct WeightedEndpoint;

impl ValueKind for WeightedEndpoint {
    type Value = (EndpointAddress, u32, Option<String>);

    fn describe(&self) -> String {
        format!("{}; or a table `{{ url, weight, zone }}` with a weight of 1 to 1000", formats::ENDPOINT.describe())
    }

    fn format(&self, (address, weight, zone): &Self::Value) -> String {
        let url = formats::ENDPOINT.format(address);
        if *weight == 1 && zone.is_none() {
            return url;
        }
        let zone = zone.as_ref().map(|zone| format!(", zone = \"{zone}\"")).unwrap_or_default();
        format!("{{ url = {url}, weight = {weight}{zone} }}")
    }

    fn schema(&self) -> serde_json::Value {
        let table = serde_json::json!({
            "type": "object",
            "properties": {
                "url": formats::ENDPOINT.schema(),
                "weight": WEIGHT.schema(),
                "zone": formats::NAME.schema(),
            },
            "required": ["url"],
            "additionalProperties": false,
        });
        serde_json::json!({ "anyOf": [formats::ENDPOINT.schema(), table] })
    }

    fn read(&self, input: &InputValue<'_>) -> Result<Self::Value, ConfigProblem> {
        let DocumentValue::Table(entries) = &input.node.value else {
            return Ok((formats::ENDPOINT.read(input)?, 1, None));
        };
        let (mut address, mut weight, mut zone) = (None, 1, None);
        for entry in entries {
            let input = InputValue { node: &entry.node, ..*input };
            match &*entry.key {
                "url" => address = Some(formats::ENDPOINT.read(&input)?),
                "weight" => weight = WEIGHT.read(&input)?,
                "zone" => zone = Some(formats::NAME.read(&input)?),
                other => {
                    let problem = ConfigProblem::new(FaultCode::UnknownKey, format!("unknown key `{other}`"));
                    return Err(problem.hint("an endpoint has `url`, `weight` and `zone`"));
                }
            }
        }
        address
            .map(|address| (address, weight, zone))
            .ok_or_else(|| ConfigProblem::new(FaultCode::Missing, "`url` is missing"))
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
        expect: formats::statuses(table, "expect", &HEALTHY_STATUSES, vec![2, 3]),
    }
}

fn concurrency(table: &TableReader<'_>) -> ConcurrencyConfig {
    let default = ConcurrencyConfig::default();
    let bounds = IntegerRange(1..=100_000_u32);
    let min = table.value_or("min", &bounds, index_of(default.min));
    let max = table.value_or("max", &bounds, index_of(default.max));
    if min > max {
        let problem = ConfigProblem::bad_value("`min` is larger than `max`");
        table.context.error(&table.location_of(&["min"]), problem);
    }
    ConcurrencyConfig {
        min: index(min),
        max: index(max.max(min)),
        wait: table.value_or("wait", &DurationRange(Duration::ZERO..=60 * SECOND), default.wait),
    }
}

fn breaker(table: &TableReader<'_>) -> BreakerConfig {
    const SCOPES: OneOf<BreakerScope> =
        OneOf(&[("route", Some(BreakerScope::Route)), ("upstream", Some(BreakerScope::Upstream))]);
    const MODES: OneOf<BreakerMode> = OneOf(&[
        ("enforce", Some(BreakerMode::Enforce)),
        ("shadow", Some(BreakerMode::Shadow)),
        ("off", Some(BreakerMode::Off)),
    ]);
    let default = BreakerConfig::default();
    BreakerConfig {
        error_ratio: table.value_or("error_ratio", &PositiveNumber(1.0), default.error_ratio),
        slow: table.value_or("slow", &DurationRange(MS..=HOUR), default.slow),
        slow_ratio: table.value_or("slow_ratio", &PositiveNumber(1.0), default.slow_ratio),
        minimum: table.value_or("minimum", &IntegerRange(1..=1_000_000), default.minimum),
        window: table.value_or("window", &DurationRange(SECOND..=60 * SECOND), default.window),
        open: table.value_or("open", &DurationRange(100 * MS..=HOUR), default.open),
        ramp: table.value_or("ramp", &DurationRange(Duration::ZERO..=HOUR), default.ramp),
        scope: table.value_or("scope", &SCOPES, default.scope),
        mode: table.value_or("mode", &MODES, default.mode),
    }
}
