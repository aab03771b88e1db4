//! `[redis]`: the remote tier, and what the nodes of a fleet share.

use std::time::Duration;

use super::super::fault::{At, Code, Problem};
use super::super::kind::{ListOf, Parsed, Span, Text, Whole};
use super::super::reading::Placed;
use super::super::table::Table;
use super::{MS, SECOND};
use crate::limit;

/// A healthy Redis in the same region answers in well under a millisecond: this is room for a bad moment, not for a bad Redis.
const DEADLINE: Duration = Duration::from_millis(20);

/// More slots than this buy nothing; the store refuses them as well.
const SLOTS_MAX: u32 = 1_024;

const ENDPOINT: Parsed<String> =
    Parsed { name: "a URL such as \"redis://127.0.0.1:6379\"", parse: endpoint, show: String::clone };

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
        let remote = shard::RemoteSettings {
            deadline,
            secret,
            object_bytes: usize::try_from(object_bytes).unwrap_or(usize::MAX),
            regions: regions.into_iter().map(|(region, settings)| (region.value, settings)).collect(),
        };
        let at = table.at.clone();
        // The size of the fleet alone says how cluster limits are shared out where there is no Redis.
        let is_size_alone = table.has("nodes") && !["regions", "deadline", "secret"].iter().any(|key| table.has(key));
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
    table.later("cluster", None);
    let endpoints = ListOf { item: ENDPOINT, least: 1 };
    let endpoints = if table.has("cluster") {
        table.optional("endpoints", &endpoints)
    } else {
        table.required("endpoints", &endpoints)
    };
    let endpoints = endpoints.map_or_else(Vec::new, |endpoints| endpoints.value);
    for (index, endpoint) in endpoints.iter().enumerate() {
        if endpoints[..index].iter().any(|earlier| server(&earlier.value) == server(&endpoint.value)) {
            table.reading.error(&endpoint.at, Problem::new(Code::Duplicate, "this endpoint is listed twice"));
        }
    }
    if endpoints.len() > super::index(slots) {
        let problem = Problem::bad(format!("{slots} slots are fewer than the {} endpoints", endpoints.len()));
        table.reading.error(&table.place_of(&["slots"]), problem);
    }
    let settings = shard::RegionSettings {
        slots: u16::try_from(slots).ok()?,
        endpoints: endpoints.into_iter().map(|endpoint| endpoint.value).collect(),
    };
    Some((Placed { value: region.ok()?, at: name.at }, settings))
}

/// Host, port and database of an endpoint, whoever logs in.
fn server(endpoint: &str) -> (&str, &str, &str) {
    let rest = endpoint.strip_prefix("redis://").unwrap_or(endpoint);
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
            .hint("write \"redis://[USER:PASSWORD@]HOST:PORT[/DATABASE]\"")
    };
    if text.strip_prefix("redis+unix://").is_some_and(|path| path.starts_with('/')) {
        return Ok(text.to_owned());
    }
    let Some(rest) = text.strip_prefix("redis://") else {
        return Err(if text.starts_with("rediss://") {
            Problem::unavailable("an endpoint with rediss://").hint("write \"redis://HOST:PORT\"")
        } else {
            problem("it does not start with redis://")
        });
    };
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
