//! The sections of the document, one file each: which keys there are, their types, ranges and defaults.
//!
//! What is read here is right by itself; whether it fits the rest is decided by `check`, which is why places travel along.

mod access;
mod forms;
mod identity;
mod limits;
mod listen;
mod redis;
mod routes;
mod tokens;
mod upstreams;

pub(super) use forms::endpoint as endpoint_address;

use std::time::Duration;

use super::fault::{At, Code, Problem};
use super::kind::{Choice, Parsed, Span, Text, Whole};
use super::reading::Placed;
use super::table::Table;
use super::{Access, Config, Log, Server};
use crate::{cache, limit};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A configuration whose names are not resolved yet, and the places of what `check` may complain about.
pub(super) struct Draft {
    /// Routes have upstream 0 and no limits until `check` has resolved their names.
    pub(super) config: Config,
    pub(super) listen: Vec<At>,
    pub(super) admin: At,
    /// `identity.user` and `identity.tier`, where they are headers.
    pub(super) trusting: Vec<At>,
    pub(super) regions: Option<Vec<Placed<shard::Region>>>,
    pub(super) regions_at: At,
    pub(super) uri_bytes: At,
    pub(super) object_bytes: At,
    pub(super) limits: At,
    pub(super) rules: Vec<At>,
    pub(super) upstreams: Vec<At>,
    pub(super) routes: Vec<RouteNames>,
}

/// The names in a route and their places.
pub(super) struct RouteNames {
    pub(super) name: At,
    pub(super) matched: At,
    pub(super) cost: At,
    pub(super) upstream: Option<Placed<String>>,
    pub(super) limits: Vec<Placed<String>>,
}

/// Reads the whole document.
pub(super) fn read(root: &Table<'_>) -> Draft {
    version(root);
    let (listen, listen_at): (Vec<_>, Vec<_>) = listen::listeners(root).into_iter().unzip();
    let (admin, admin_at) = listen::admin(root);
    let (http, accept) = listen::limits_http(root);
    let (mut identify, trusting) = identity::read(root);
    identify.access = access::read(root, &identify);
    let weights = limits::weights(root);
    let cache = cache(root);
    let redis = redis::read(root, cache.remote_object_bytes);
    let (rules, rules_at) = limits::rules(root, &weights, &mut identify).into_iter().unzip();
    let (upstreams, upstreams_at) = upstreams::read(root).into_iter().unzip();
    let (routes, route_names) = routes::read(root).into_iter().unzip();
    later(root);
    Draft {
        config: Config {
            server: server(root),
            listen: if listen.is_empty() { vec![crate::accept::Listen::default()] } else { listen },
            admin,
            http,
            accept,
            identify,
            limit: limit::Settings { weights, rules, nodes: redis.nodes },
            remote: redis.remote,
            cache,
            upstreams,
            routes,
            log: log(root),
            files: Vec::new(),
        },
        listen: listen_at,
        admin: admin_at,
        trusting,
        regions: redis.regions,
        regions_at: redis.at,
        uri_bytes: root.place_of(&["limits_http", "uri_bytes"]),
        object_bytes: root.place_of(&["cache", "object_bytes"]),
        limits: root.place_of(&["limits"]),
        rules: rules_at,
        upstreams: upstreams_at,
        routes: route_names,
    }
}

/// The version of the format, so that a later one may differ.
fn version(root: &Table<'_>) {
    root.required("version", &Whole(1..=1));
}

fn server(root: &Table<'_>) -> Server {
    let default = Server::default();
    root.table("server", |server| Server {
        workers: index(server.or("workers", &Whole(0..=1_024), index_of(default.workers))),
        node: server.or("node", &forms::NAME, default.node),
        drain_timeout: server.or("drain_timeout", &Span(Duration::ZERO..=HOUR), default.drain_timeout),
    })
}

fn cache(root: &Table<'_>) -> cache::Settings {
    const QUERY_ORDER: Choice<bool> = Choice(&[("kept", Some(false)), ("sorted", Some(true))]);
    const STATUS_KEY: Choice<bool> = Choice(&[("hide", Some(false)), ("tell", Some(true))]);
    const TO_CLIENTS: Choice<bool> = Choice(&[("pass", Some(false)), ("strip", Some(true))]);
    const PER_SECOND: Parsed<u32> = Parsed {
        name: "a rate such as \"1000/s\"",
        parse: |text| {
            limits::rate(text).map(|rate| rate.count().div_ceil(rate.seconds()).try_into().unwrap_or(u32::MAX))
        },
        show: |rate| format!("{rate}/s"),
    };
    let default = cache::Settings::default();
    root.table("cache", |cache| cache::Settings {
        memory_bytes: cache.or("memory", &super::kind::Size(MIB..=1_024 * GIB), default.memory_bytes),
        hot_rate: cache.or("hot_rate", &PER_SECOND, default.hot_rate),
        object_bytes: cache.or("object_bytes", &super::kind::Size(KIB..=4 * GIB), default.object_bytes),
        remote_object_bytes: cache.or(
            "remote_object_bytes",
            &super::kind::Size(KIB..=64 * MIB),
            default.remote_object_bytes,
        ),
        fill_bytes: cache.or("fill_bytes", &super::kind::Size(MIB..=1_024 * GIB), default.fill_bytes),
        key_ignore_query: forms::list(cache, "key_ignore_query", forms::QUERY_PATTERN, default.key_ignore_query),
        key_sort_query: cache.or("key_query_order", &QUERY_ORDER, default.key_sort_query),
        key_fields: forms::list(cache, "key_fields", forms::FIELD, default.key_fields),
        tells_key: cache.or("status_key", &STATUS_KEY, default.tells_key),
        variants: cache.or("variants", &Whole(1..=1024), 128) as usize,
        targeted: forms::list(cache, "targeted", forms::FIELD, default.targeted),
        strip_targeted: cache.or("targeted_to_clients", &TO_CLIENTS, default.strip_targeted),
    })
}

fn log(root: &Table<'_>) -> Log {
    const LEVELS: Choice<tracing::Level> = Choice(&[
        ("error", Some(tracing::Level::ERROR)),
        ("warn", Some(tracing::Level::WARN)),
        ("info", Some(tracing::Level::INFO)),
        ("debug", Some(tracing::Level::DEBUG)),
        ("trace", Some(tracing::Level::TRACE)),
    ]);
    const ACCESS: Parsed<Access> =
        Parsed { name: "\"stdout\", \"off\" or a file's path", parse: access, show: show_access };
    let default = Log::default();
    root.table("log", |log| Log {
        access: match log.or("access", &ACCESS, default.access) {
            Access::File(path) => Access::File(log.reading.values.base.join(path)),
            access => access,
        },
        level: log.or("level", &LEVELS, default.level),
    })
}

fn access(text: &str) -> Result<Access, Problem> {
    match text {
        "stdout" => Ok(Access::Stdout),
        "off" => Ok(Access::Off),
        "" => Err(Problem::bad("the path is empty").hint("write \"off\" to log nothing")),
        path => Ok(Access::File(path.into())),
    }
}

fn show_access(access: &Access) -> String {
    match access {
        Access::Stdout => "stdout".to_owned(),
        Access::Off => "off".to_owned(),
        Access::File(path) => path.display().to_string(),
    }
}

/// Sections whose feature is not available yet.
fn later(root: &Table<'_>) {
    use super::document::Value;
    root.later("journal", None);
    root.table("tracing", |tracing| tracing.later("otlp", Some(&Value::Text(String::new()))));
}

fn index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn index_of(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Opens a file that will be read later, so that `check` finds what a start would.
fn check_file(table: &Table<'_>, file: &Placed<std::path::PathBuf>) {
    let opened = std::fs::metadata(&file.value).and_then(|metadata| match metadata.is_file() {
        true => std::fs::File::open(&file.value).map(drop),
        false => Err(std::io::Error::other("it is not a regular file")),
    });
    if let Err(error) = opened {
        let problem = Problem::new(Code::File, format!("cannot read {}: {error}", file.value.display()));
        table.reading.error(&file.at, problem.hint("paths start in the directory of the configuration file"));
    }
}

/// Reads a path as a text and joins it to the directory of the configuration file.
fn path(table: &Table<'_>, key: &'static str) -> Option<Placed<std::path::PathBuf>> {
    let path = table.required(key, &Text)?;
    Some(Placed { value: table.reading.values.base.join(path.value), at: path.at })
}
