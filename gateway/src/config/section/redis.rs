//! `[redis]`: the remote cache layer and the state shared by the nodes of a fleet.

use std::time::Duration;

use super::super::constraints;
use super::super::expand::read_file;
use super::super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{
    AnyString, ArrayOf, DurationRange, IntegerRange, OneOf, ParsedString, Repeats, SizeRange,
};
use super::bounds::{MS, SECOND, index};
use super::{formats, secrets};
use crate::limit;
use shard::Compression;

/// A healthy Redis in the same region responds in well under 1 ms. The default covers a latency
/// spike, not an overloaded server.
const DEFAULT_DEADLINE: Duration = Duration::from_millis(20);

/// A smaller body fits in a few packets even uncompressed.
const DEFAULT_COMPRESS_FROM: u64 = 4 << 10;

/// With 8 copies, no server of up to 16 gets more than twice the mean load if nearly all requests
/// are for one key.
const DEFAULT_HOT_COPIES: u32 = 8;

/// Begin label of a PEM certificate (RFC 7468 section 5.1).
const CERTIFICATE_LABEL: &[u8] = b"-----BEGIN CERTIFICATE-----";

const ENDPOINT: ParsedString<String> = ParsedString {
    name: "a URL such as \"redis://127.0.0.1:6379\"",
    pattern: r"(rediss?(\+sentinel)?|redis\+unix)://[^#?]+",
    parse: parse_endpoint,
    format: String::clone,
};

const REGION: ParsedString<shard::Region> = ParsedString {
    name: "a region name",
    pattern: formats::REGION_PATTERN,
    parse: |text| text.parse().map_err(|error| ConfigProblem::bad_value(format!("`{text}`: {error}"))),
    format: |region| region.to_string(),
};

const CLUSTER_NODE: ParsedString<String> = ParsedString {
    name: "a URL such as \"redis://127.0.0.1:7000\"",
    pattern: r"rediss?://[^/#?]+/?",
    parse: parse_cluster_node,
    format: String::clone,
};

const COMPRESSION: OneOf<Compression> =
    OneOf(&[("lz4", Some(Compression::Lz4)), ("zstd", Some(Compression::Zstd)), ("off", Some(Compression::Off))]);

/// The section, for the limiter (`nodes`) and the store (`remote`).
pub(super) struct RedisSection {
    pub(super) nodes: u32,
    pub(super) remote: Option<shard::RemoteConfig>,
    /// The regions with their locations; `None` without the section.
    pub(super) regions: Option<Vec<Located<shard::Region>>>,
    pub(super) at: DocumentLocation,
}

/// Reads the section; `object_bytes` is the largest body that is stored remotely.
pub(super) fn read(root: &TableReader<'_>, object_bytes: u64) -> RedisSection {
    let nodes = limit::LimitConfig::default().nodes;
    let absent = RedisSection { nodes, remote: None, regions: None, at: root.at.clone() };
    let section = root.optional_table("redis", |table| {
        let deadline = table.value_or("deadline", &DurationRange(MS..=10 * SECOND), DEFAULT_DEADLINE);
        let nodes = table.value_or("nodes", &IntegerRange(1..=10_000), nodes);
        let secret = secrets::secret(table, "secret");
        table.constraint(constraints::names("regions", formats::REGION_PATTERN));
        let regions: Vec<_> = table.named_tables("regions", region).into_iter().flatten().collect();
        let locations = regions.iter().map(|(region, _)| region.clone()).collect();
        let compression = table.value_or("compression", &COMPRESSION, Compression::default());
        let compress = table.value_or("compress_from", &SizeRange(1..=1 << 40), DEFAULT_COMPRESS_FROM);
        if compression == Compression::Off && compress != DEFAULT_COMPRESS_FROM {
            let problem = ConfigProblem::new(FaultCode::Risk, "`compress_from` has no effect: nothing is compressed");
            let problem = problem.hint("set `redis.compression`").lacks(&["redis.compression"]);
            table.context.warning(&table.location_of(&["compress_from"]), problem);
        }
        let copies = table.value_or("hot_copies", &IntegerRange(1..=64), DEFAULT_HOT_COPIES);
        let tls = table.table("tls", tls_config);
        let remote = shard::RemoteConfig {
            deadline,
            secret,
            compression,
            compress_from: usize::try_from(compress).unwrap_or(usize::MAX),
            hot_copies: u16::try_from(copies).unwrap_or(u16::MAX),
            tls,
            object_bytes: usize::try_from(object_bytes).unwrap_or(usize::MAX),
            regions: regions.into_iter().map(|(region, config)| (region.value, config)).collect(),
            // Set by `check`, from `identity.region_default`.
            default_region: shard::Region::DEFAULT,
        };
        let at = table.at.clone();
        // `nodes` alone sets each node's share of the cluster limits without Redis.
        let has_nodes_only = table.has("nodes")
            && !["regions", "deadline", "secret", "tls", "compression", "compress_from", "hot_copies"]
                .iter()
                .any(|key| table.has(key));
        if has_nodes_only {
            return RedisSection { nodes, remote: None, regions: None, at };
        }
        RedisSection { nodes, remote: Some(remote), regions: Some(locations), at }
    });
    section.unwrap_or(absent)
}

fn region(name: Located<&str>, table: &TableReader<'_>) -> Option<(Located<shard::Region>, shard::RegionConfig)> {
    let region = name.value.parse().map_err(|error: shard::InvalidRegion| {
        table.context.error(&name.at, ConfigProblem::bad_value(format!("`{}`: {error}", name.value)));
    });
    let slots =
        table.value_or("slots", &IntegerRange(1..=u32::from(shard::SLOTS_MAX)), u32::from(shard::DEFAULT_SLOTS));
    let endpoints = ArrayOf { item: ENDPOINT, min_items: 1, repeats: Repeats::BySection };
    let cluster = table.optional("cluster", &ArrayOf { item: CLUSTER_NODE, min_items: 1, repeats: Repeats::Warned });
    let endpoints = table.required_without(&["cluster"], "endpoints", &endpoints);
    if let (Some(_), Some(endpoints)) = (&cluster, &endpoints) {
        let problem = ConfigProblem::bad_value("`endpoints` and `cluster` exclude each other");
        table.context.error(&endpoints.at, problem);
    }
    let endpoints = endpoints.map_or_else(Vec::new, |endpoints| endpoints.value);
    let cluster = cluster.map_or_else(Vec::new, |cluster| cluster.value);
    for (position, endpoint) in endpoints.iter().enumerate() {
        if endpoints[..position]
            .iter()
            .any(|earlier| server_identity(&earlier.value) == server_identity(&endpoint.value))
        {
            table.context.error(&endpoint.at, ConfigProblem::new(FaultCode::Duplicate, "duplicate endpoint"));
        }
    }
    if endpoints.len() > index(slots) {
        let problem = ConfigProblem::bad_value(format!(
            "{slots} slots for {} endpoints: a region needs at least one slot per endpoint",
            endpoints.len()
        ));
        table.context.error(&table.location_of(&["slots"]), problem);
    }
    let fallback = formats::list(table, "fallback", REGION, Vec::new());
    let config = shard::RegionConfig {
        slots: u16::try_from(slots).ok()?,
        endpoints: endpoints.into_iter().map(|endpoint| endpoint.value).collect(),
        cluster: cluster.into_iter().map(|node| node.value).collect(),
        fallback,
    };
    Some((Located { value: region.ok()?, at: name.at }, config))
}

/// Host, port and database of an endpoint, without credentials.
fn server_identity(endpoint: &str) -> (&str, &str, &str) {
    let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    if endpoint.contains("+sentinel://") {
        // The name of the master identifies the server.
        let (_, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (master, database) = path.split_once('/').unwrap_or((path, ""));
        return (master, "", if database.is_empty() { "0" } else { database });
    }
    let (authority, database) = rest.rsplit_once('/').unwrap_or((rest, ""));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, port),
        _ => (host, "6379"),
    };
    (host, port, if database.is_empty() { "0" } else { database })
}

/// The text never appears in a message: it may contain a password.
fn parse_endpoint(text: &str) -> Result<String, ConfigProblem> {
    let problem = |reason: &str| {
        ConfigProblem::bad_value(format!("not a Redis endpoint: {reason}"))
            .hint("write \"redis://[USER:PASSWORD@]HOST:PORT[/DATABASE]\", rediss:// for TLS, or \"redis+sentinel://HOST:PORT,HOST:PORT/MASTER\"; in user and password, percent-encode all characters but letters and digits: %23 for #")
    };
    if text.contains(['#', '?']) {
        return Err(problem("it contains `#` or `?`"));
    }
    if text.strip_prefix("redis+unix://").is_some_and(|path| path.starts_with('/')) {
        return Ok(text.to_owned());
    }
    let sentinels = ["redis+sentinel://", "rediss+sentinel://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    if let Some(rest) = sentinels {
        let Some((authority, path)) = rest.split_once('/').filter(|(_, path)| !path.is_empty()) else {
            return Err(problem("the name of the master is missing after the Sentinels"));
        };
        let (login, hosts) = authority.rsplit_once('@').map_or(("", authority), |(login, hosts)| (login, hosts));
        let (_, database) = path.split_once('/').unwrap_or((path, ""));
        let at = if login.is_empty() { "" } else { "@" };
        // Checks each Sentinel as a separate address.
        for host in hosts.split(',') {
            parse_endpoint(&format!("redis://{login}{at}{host}/{database}"))?;
        }
        return Ok(text.to_owned());
    }
    let rest = ["redis://", "rediss://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    let Some(rest) = rest else { return Err(problem("it does not start with redis:// or rediss://")) };
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    // Only the text after `]` is searched: the colons of an IPv6 address do not separate a port.
    let tail = host.rsplit_once(']').map_or(host, |(_, tail)| tail);
    let port = tail.rsplit_once(':').map(|(_, port)| port);
    if host.is_empty() || host.starts_with(':') || text.contains(char::is_whitespace) {
        return Err(problem("it has no host"));
    }
    if port.is_some_and(|port| formats::parse_port(port).is_none()) {
        return Err(problem("its port is not 1 to 65535"));
    }
    if !database.is_empty() && (database.starts_with('+') || database.parse::<u8>().is_err()) {
        return Err(problem("its database is not a number"));
    }
    Ok(text.to_owned())
}

/// A node of a Redis Cluster, which has no numbered databases.
fn parse_cluster_node(text: &str) -> Result<String, ConfigProblem> {
    let is_plain = ["redis://", "rediss://"].iter().any(|scheme| text.starts_with(scheme));
    if !is_plain || text.splitn(4, '/').nth(3).is_some_and(|database| !database.is_empty()) {
        let problem = ConfigProblem::bad_value("not a Redis Cluster node");
        return Err(problem.hint("write \"redis://[USER:PASSWORD@]HOST:PORT\" or rediss://, without a database"));
    }
    parse_endpoint(text)
}

/// `[redis.tls]`, for endpoints with `rediss://`.
fn tls_config(table: &TableReader<'_>) -> shard::RedisTlsConfig {
    let pem = |key: &'static str| {
        let path = table.optional(key, &AnyString)?;
        let text = read_file(&table.context.environment, &path.value);
        let text = text.map(String::into_bytes).map_err(|problem| table.context.error(&path.at, problem)).ok()?;
        Some(Located { value: (path.value, text), at: path.at })
    };
    table.constraint(constraints::needs("cert", "key"));
    table.constraint(constraints::needs("key", "cert"));
    let (ca, cert, key) = (pem("ca"), pem("cert"), pem("key"));
    for Located { value: (path, text), at } in [&ca, &cert].into_iter().flatten() {
        if !text.windows(CERTIFICATE_LABEL.len()).any(|window| window == CERTIFICATE_LABEL) {
            let problem = ConfigProblem::new(FaultCode::File, format!("{path} contains no PEM certificate"));
            table.context.error(at, problem);
        }
    }
    let [ca, cert, key] = [ca, cert, key].map(|file| file.map(|file| file.value.1));
    if table.has("cert") != table.has("key") {
        let problem = ConfigProblem::new(FaultCode::Missing, "`cert` and `key` must be set together");
        table.context.error(&table.at, problem);
    }
    shard::RedisTlsConfig { ca, client: cert.zip(key) }
}
