//! `[redis]`: the remote tier, and what the nodes of a fleet share.

use std::time::Duration;

use super::super::expand::read_file;
use super::super::fault::{At, Code, Problem};
use super::super::kind::{Choice, ListOf, Parsed, Size, Span, Text, Whole};
use super::super::reading::Placed;
use super::super::table::Table;
use super::{MS, SECOND, forms};
use crate::limit;
use shard::Compression;

/// A healthy Redis in the same region answers in well under a millisecond: this is room for a bad moment, not for a bad Redis.
const DEADLINE: Duration = Duration::from_millis(20);

/// Below that a body fits few packets anyway.
const COMPRESS_FROM: u64 = 4 << 10;

/// With so many no server of up to 16 has more than twice the mean of a load that is nearly all for one key.
const HOT_COPIES: u32 = 8;

/// How a certificate begins in PEM (RFC 7468 section 5.1).
const CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";

/// More slots than this buy nothing; the store refuses them as well.
const SLOTS_MAX: u32 = 1_024;

const ENDPOINT: Parsed<String> =
    Parsed { name: "a URL such as \"redis://127.0.0.1:6379\"", parse: endpoint, show: String::clone };

const REGION: Parsed<shard::Region> = Parsed {
    name: "a region's name",
    parse: |text| text.parse().map_err(|error| Problem::bad(format!("`{text}`: {error}"))),
    show: |region| region.to_string(),
};

const NODE: Parsed<String> =
    Parsed { name: "a URL such as \"redis://127.0.0.1:7000\"", parse: node, show: String::clone };

const COMPRESSION: Choice<Compression> =
    Choice(&[("lz4", Some(Compression::Lz4)), ("zstd", Some(Compression::Zstd)), ("off", Some(Compression::Off))]);

/// What the section gives to several modules.
pub(super) struct Redis {
    pub(super) nodes: u32,
    pub(super) remote: Option<shard::RemoteSettings>,
    /// The regions and where they stand; `None` without the section.
    pub(super) regions: Option<Vec<Placed<shard::Region>>>,
    pub(super) at: At,
}

/// Reads the section; `object_bytes` is the largest body that is stored remotely.
pub(super) fn read(root: &Table<'_>, object_bytes: u64) -> Redis {
    let nodes = limit::Settings::default().nodes;
    let absent = Redis { nodes, remote: None, regions: None, at: root.at.clone() };
    let section = root.some_table("redis", |table| {
        let deadline = table.or("deadline", &Span(MS..=10 * SECOND), DEADLINE);
        let nodes = table.or("nodes", &Whole(1..=10_000), nodes);
        let secret = table.or("secret", &Text, String::new());
        let regions: Vec<_> = table.named("regions", region).into_iter().flatten().collect();
        let places = regions.iter().map(|(region, _)| region.clone()).collect();
        let compression = table.or("compression", &COMPRESSION, Compression::default());
        let compress = table.or("compress_from", &Size(1..=1 << 40), COMPRESS_FROM);
        let copies = table.or("hot_copies", &Whole(1..=64), HOT_COPIES);
        let tls = table.table("tls", certificates);
        let remote = shard::RemoteSettings {
            deadline,
            secret,
            compression,
            compress_from: usize::try_from(compress).unwrap_or(usize::MAX),
            hot_copies: u16::try_from(copies).unwrap_or(u16::MAX),
            tls,
            object_bytes: usize::try_from(object_bytes).unwrap_or(usize::MAX),
            regions: regions.into_iter().map(|(region, settings)| (region.value, settings)).collect(),
        };
        let at = table.at.clone();
        // The size of the fleet alone says how cluster limits are shared out where there is no Redis.
        let is_size_alone = table.has("nodes")
            && !["regions", "deadline", "secret", "tls", "compression", "compress_from", "hot_copies"]
                .iter()
                .any(|key| table.has(key));
        if is_size_alone {
            return Redis { nodes, remote: None, regions: None, at };
        }
        Redis { nodes, remote: Some(remote), regions: Some(places), at }
    });
    section.unwrap_or(absent)
}

fn region(name: Placed<&str>, table: &Table<'_>) -> Option<(Placed<shard::Region>, shard::RegionSettings)> {
    let region = name.value.parse().map_err(|error: shard::BadRegion| {
        table.reading.error(&name.at, Problem::bad(format!("`{}`: {error}", name.value)));
    });
    let slots = table.or("slots", &Whole(1..=SLOTS_MAX), u32::from(shard::SLOTS));
    let endpoints = ListOf { item: ENDPOINT, least: 1 };
    let cluster = table.optional("cluster", &ListOf { item: NODE, least: 1 });
    let endpoints = if cluster.is_some() {
        table.optional("endpoints", &endpoints)
    } else {
        table.required("endpoints", &endpoints)
    };
    if let (Some(_), Some(endpoints)) = (&cluster, &endpoints) {
        let problem = Problem::bad("a region has `endpoints` or a `cluster`, not both");
        table.reading.error(&endpoints.at, problem);
    }
    let endpoints = endpoints.map_or_else(Vec::new, |endpoints| endpoints.value);
    let cluster = cluster.map_or_else(Vec::new, |cluster| cluster.value);
    for (index, endpoint) in endpoints.iter().enumerate() {
        if endpoints[..index].iter().any(|earlier| server(&earlier.value) == server(&endpoint.value)) {
            table.reading.error(&endpoint.at, Problem::new(Code::Duplicate, "this endpoint is listed twice"));
        }
    }
    if endpoints.len() > super::index(slots) {
        let problem = Problem::bad(format!("{slots} slots are fewer than the {} endpoints", endpoints.len()));
        table.reading.error(&table.place_of(&["slots"]), problem);
    }
    let fallback = forms::list(table, "fallback", REGION, Vec::new());
    let settings = shard::RegionSettings {
        slots: u16::try_from(slots).ok()?,
        endpoints: endpoints.into_iter().map(|endpoint| endpoint.value).collect(),
        cluster: cluster.into_iter().map(|node| node.value).collect(),
        fallback,
    };
    Some((Placed { value: region.ok()?, at: name.at }, settings))
}

/// Host, port and database of an endpoint, whoever logs in.
fn server(endpoint: &str) -> (&str, &str, &str) {
    let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    if endpoint.contains("+sentinel://") {
        // The master's name alone tells it from others.
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

/// The text is never repeated in a message: it may hold a password.
fn endpoint(text: &str) -> Result<String, Problem> {
    let problem = |reason: &str| {
        Problem::bad(format!("not a Redis endpoint: {reason}"))
            .hint("write \"redis://[USER:PASSWORD@]HOST:PORT[/DATABASE]\", rediss:// for TLS, or \"redis+sentinel://HOST:PORT,HOST:PORT/MASTER\"; in user and password, percent-encode what is no letter or digit: %23 for #")
    };
    if text.contains(['#', '?']) {
        return Err(problem("it has a `#` or a `?`"));
    }
    if text.strip_prefix("redis+unix://").is_some_and(|path| path.starts_with('/')) {
        return Ok(text.to_owned());
    }
    let sentinels = ["redis+sentinel://", "rediss+sentinel://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    if let Some(rest) = sentinels {
        let Some((authority, path)) = rest.split_once('/').filter(|(_, path)| !path.is_empty()) else {
            return Err(problem("it does not name the master after its Sentinels"));
        };
        let (login, hosts) = authority.rsplit_once('@').map_or(("", authority), |(login, hosts)| (login, hosts));
        let (_, database) = path.split_once('/').unwrap_or((path, ""));
        let at = if login.is_empty() { "" } else { "@" };
        // Each Sentinel as an address of its own.
        for host in hosts.split(',') {
            endpoint(&format!("redis://{login}{at}{host}/{database}"))?;
        }
        return Ok(text.to_owned());
    }
    let rest = ["redis://", "rediss://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    let Some(rest) = rest else { return Err(problem("it does not start with redis:// or rediss://")) };
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    // The part after a bracket, so that the colons of an IPv6 address are not taken for a port's.
    let tail = host.rsplit_once(']').map_or(host, |(_, tail)| tail);
    let port = tail.rsplit_once(':').map(|(_, port)| port);
    if host.is_empty() || host.starts_with(':') || text.contains(char::is_whitespace) {
        return Err(problem("it has no host"));
    }
    if port.is_some_and(|port| !port.parse::<u16>().is_ok_and(|port| port > 0)) {
        return Err(problem("its port is not 1 to 65535"));
    }
    if !database.is_empty() && database.parse::<u8>().is_err() {
        return Err(problem("its database is not a number"));
    }
    Ok(text.to_owned())
}

/// A node of a cluster: there is but one database in it.
fn node(text: &str) -> Result<String, Problem> {
    let is_plain = ["redis://", "rediss://"].iter().any(|scheme| text.starts_with(scheme));
    if !is_plain || text.splitn(4, '/').nth(3).is_some_and(|database| !database.is_empty()) {
        let problem = Problem::bad("not a node of a cluster");
        return Err(problem.hint("write \"redis://[USER:PASSWORD@]HOST:PORT\" or rediss://, without a database"));
    }
    endpoint(text)
}

/// `[redis.tls]`, for endpoints with `rediss://`.
fn certificates(table: &Table<'_>) -> shard::TlsSettings {
    let pem = |key: &'static str| {
        let path = table.optional(key, &Text)?;
        let text = read_file(&table.reading.values, &path.value);
        text.map(String::into_bytes).map_err(|problem| table.reading.error(&path.at, problem)).ok()
    };
    let (ca, cert, key) = (pem("ca"), pem("cert"), pem("key"));
    for (name, text) in [("ca", &ca), ("cert", &cert)] {
        let has_one = |text: &Vec<u8>| text.windows(CERTIFICATE.len()).any(|window| window == CERTIFICATE);
        if text.as_ref().is_some_and(|text| !has_one(text)) {
            let problem = Problem::new(Code::File, "there is no certificate (PEM) in the file");
            table.reading.error(&table.place_of(&[name]), problem);
        }
    }
    if table.has("cert") != table.has("key") {
        let problem = Problem::new(Code::Missing, "`cert` and `key` belong together");
        table.reading.error(&table.at, problem);
    }
    shard::TlsSettings { ca, client: cert.zip(key) }
}
