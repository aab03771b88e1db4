//! `[[routes]]`: match conditions, and the policies of matching requests.

use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::time::Duration;

use http::StatusCode;
use ipnet::IpNet;

use super::super::constraints;
use super::super::expand::read_file;
use super::super::fault::{ConfigProblem, FaultCode};
use super::super::read_context::Located;
use super::super::table_reader::{TableReader, ValueOrTable};
use super::super::value_kind::{
    AnyString, ArrayOf, Boolean, DurationRange, IntegerRange, OneOf, ParsedString, Repeats, SizeRange, ValueKind,
};
use super::auth::RouteAuth;
use super::bounds::{DAY, GIB, HOUR, MIB, MS, SECOND};
use super::draft::RouteReferences;
use super::{auth, formats, route_actions, route_targets};
use crate::compress::{CompressConfig, TypePattern};
use crate::http::compressed_forms::ContentCoding;
use crate::http::fields::is_token;
use crate::pages::{ErrorPage, ErrorPages};
use crate::route::{ClientNetworks, ForwardPath, HostPattern, PathPattern, RouteConfig, TimeoutOverrides};
use crate::{cache, degrade};
use formats::token;

const COST_MAX: u32 = 1_000_000;
/// Longest lifetime of a cached response; keeps sums of ages far from overflow.
const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// Every route; its references are not resolved yet.
pub(super) fn read(root: &TableReader<'_>) -> Vec<(RouteConfig, RouteReferences)> {
    root.tables("routes", route)
}

const FORWARD_PATH: OneOf<ForwardPath> =
    OneOf(&[("normal", Some(ForwardPath::Normal)), ("received", Some(ForwardPath::Received))]);

fn route(table: &TableReader<'_>) -> (RouteConfig, RouteReferences) {
    let name = table.required("name", &formats::NAME);
    let (matched, host, path, methods, conditions) = table.table("match", |matched| {
        let host = matched.value_or("host", &formats::HOST, HostPattern::Any);
        let path = matched.required("path", &formats::PATH);
        let path = path.map_or(PathPattern::Prefix("/".to_owned()), |path| path.value);
        let methods = formats::list(matched, "methods", formats::METHOD, Vec::new());
        (matched.at.clone(), host, path, methods, route_actions::conditions(matched))
    });
    let action = route_actions::action(table, &path);
    for key in route_actions::FORWARDING_KEYS.into_iter().chain(["canary", "mirror"]) {
        table.constraint(constraints::excludes(key, &["redirect", "respond"]));
    }
    table.constraint(constraints::excludes("strip_prefix", &["rewrite"]));
    let upstream = table.required_without(&["redirect", "respond"], "upstream", &AnyString);
    route_actions::check_action(table, &action);
    let edits = route_actions::edits(table, &path);
    let limits =
        table.value_or("limits", &ArrayOf { item: AnyString, min_items: 0, repeats: Repeats::BySection }, Vec::new());
    let name_text = name.as_ref().map_or("", |name| name.value.as_str());
    let default = RouteConfig::new(name_text.into(), path, 0);
    let cost = table.value_or("cost", &IntegerRange(1..=COST_MAX), default.cost.get());
    table.unavailable("journal", None);
    let (mut auth, mut key_classes, mut forward_auth, mut service) = (None, None, None, None);
    match auth::read(table) {
        Some(RouteAuth::Credentials(credentials, classes)) => (auth, key_classes) = (Some(credentials), classes),
        Some(RouteAuth::Service(config, endpoint, at)) => {
            (forward_auth, service) = (Some(config), Some(Located { value: endpoint, at }));
        }
        None => {}
    }
    let (canary, canary_upstream) = route_targets::canary(table, &action).unzip();
    let (mirror, mirror_upstream) = route_targets::mirror(table, &action).unzip();
    let config = RouteConfig {
        canary: canary.map(Box::new),
        mirror,
        host,
        methods,
        conditions,
        action,
        edits,
        cost: NonZeroU32::new(cost).unwrap_or(default.cost),
        cost_by_status: by_status(table, "cost_by_status", &IntegerRange(1..=COST_MAX))
            .into_iter()
            .filter_map(|(statuses, cost)| Some((statuses, NonZeroU32::new(cost)?)))
            .collect(),
        cache: table.table("cache", |cache| cache_policy(cache, default.cache.clone().unwrap_or_default())),
        degrade: table.table("degrade", |degrade| degrade_page(degrade, default.degrade.clone())),
        timeouts: TimeoutOverrides {
            head: optional(table, "timeout", MS..=HOUR),
            idle: optional(table, "idle_timeout", MS..=HOUR),
            total: optional(table, "total_timeout", Duration::ZERO..=DAY),
        },
        forward_path: table.value_or("forward_path", &FORWARD_PATH, default.forward_path),
        hedge: table.value_or("hedge", &Boolean, default.hedge),
        body_bytes: table.optional("body_bytes", &SizeRange(0..=1_024 * GIB)).map(|bytes| bytes.value),
        pages: pages(table),
        clients: clients(table),
        compress: compression(table),
        auth,
        forward_auth,
        ..default
    };
    let names = RouteReferences {
        name: name.map_or_else(|| table.at.clone(), |name| name.at),
        matched,
        path: table.location_of(&["match", "path"]),
        forward_path: table.location_of(&["forward_path"]),
        request_headers: table.location_of(&["headers", "request"]),
        cost: table.location_of(&["cost"]),
        cost_by_status: table.location_of(&["cost_by_status"]),
        hedge: table.location_of(&["hedge"]),
        redirect: table.location_of(&["redirect", "to"]),
        respond: table.location_of(&["respond", "status"]),
        pages: table.location_of(&["pages"]),
        default_ttl: table.location_of(&["cache", "default_ttl"]),
        ttl: table.location_of(&["cache", "ttl"]),
        upstream,
        canary: canary_upstream.flatten(),
        mirror: mirror_upstream.flatten(),
        limits,
        key_classes,
        service,
        has_heuristic: ["heuristic", "heuristic_max"].iter().any(|key| table.has_at(&["cache", key])),
    };
    (config, names)
}

fn clients(table: &TableReader<'_>) -> Option<Box<ClientNetworks>> {
    let clients = ClientNetworks {
        allowed: formats::list(table, "allow", formats::NETWORK, Vec::new()),
        denied: formats::list(table, "deny", formats::NETWORK, Vec::new()),
    };
    let is_denied = |network: &&IpNet| clients.denied.iter().any(|denied| denied.contains(*network));
    if let Some(network) = clients.allowed.iter().find(is_denied) {
        let message = format!("`allow` has no effect for {network}: `deny` names it, or a network that contains it");
        let problem =
            ConfigProblem::bad_value(message).hint("`deny` comes before `allow`; remove the network from one");
        table.context.error(&table.location_of(&["allow"]), problem);
    }
    (clients != ClientNetworks::default()).then(|| Box::new(clients))
}

const CODINGS: OneOf<ContentCoding> = OneOf(&[
    ("zstd", Some(ContentCoding::Zstd)),
    ("br", Some(ContentCoding::Brotli)),
    ("gzip", Some(ContentCoding::Gzip)),
]);

const MEDIA_TYPE: ParsedString<TypePattern> = ParsedString {
    name: "a media type such as \"text/html\", \"text/*\" or \"*+json\"",
    pattern: concat!(token!(), "/", token!(), r"|\*\+", token!()),
    parse: |text| {
        let lower = text.to_ascii_lowercase();
        let is_token = |part: &str| is_token(part.as_bytes());
        let pattern = match lower.split_once('/') {
            Some((kind, "*")) if is_token(kind) && kind != "*" => TypePattern::Prefix(format!("{kind}/")),
            Some((kind, name)) if is_token(kind) && is_token(name) && !lower.contains('*') => TypePattern::Exact(lower),
            None if lower.strip_prefix("*+").is_some_and(is_token) => TypePattern::Suffix(lower[1..].to_owned()),
            _ => return Err(ConfigProblem::bad_value(format!("`{text}` is not a media type"))),
        };
        Ok(pattern)
    },
    format: TypePattern::source,
};

/// Without any, no response would be compressed.
const MEDIA_TYPES: ArrayOf<ParsedString<TypePattern>> =
    ArrayOf { item: MEDIA_TYPE, min_items: 1, repeats: Repeats::Warned };

/// The codings of `compress`, or its table.
fn compression(table: &TableReader<'_>) -> Option<Box<CompressConfig>> {
    let codings = ArrayOf { item: CODINGS, min_items: 1, repeats: Repeats::Warned };
    let default = CompressConfig::default();
    let values = |codings: Vec<Located<ContentCoding>>| codings.into_iter().map(|coding| coding.value).collect();
    let read = table.value_or_table("compress", &codings, |table| CompressConfig {
        codings: table.optional("codings", &codings).map_or(default.codings.clone(), |codings| values(codings.value)),
        types: formats::values(table, "types", &MEDIA_TYPES, default.types.clone()),
        min_bytes: table.value_or("min_bytes", &SizeRange(0..=MIB), default.min_bytes),
        credentials: table.value_or("credentials", &Boolean, default.credentials),
    });
    read.map(|read| match read {
        ValueOrTable::Value(codings) => {
            Box::new(CompressConfig { codings: values(codings.value), ..CompressConfig::default() })
        }
        ValueOrTable::Table(config) => Box::new(config),
    })
}

fn optional(table: &TableReader<'_>, key: &'static str, range: RangeInclusive<Duration>) -> Option<Duration> {
    table.optional(key, &DurationRange(range)).map(|duration| duration.value)
}

fn cache_policy(table: &TableReader<'_>, default: cache::CachePolicy) -> Option<cache::CachePolicy> {
    const SET_COOKIE: OneOf<cache::SetCookiePolicy> =
        OneOf(&[("private", Some(cache::SetCookiePolicy::Private)), ("shared", Some(cache::SetCookiePolicy::Shared))]);
    const MODES: OneOf<bool> = OneOf(&[("standard", Some(true)), ("off", Some(false))]);
    const COOKIES: OneOf<cache::CookiePolicy> =
        OneOf(&[("ignored", Some(cache::CookiePolicy::Ignored)), ("explicit", Some(cache::CookiePolicy::Explicit))]);
    let lifetime = DurationRange(Duration::ZERO..=YEAR);
    let is_enabled = table.value_or("mode", &MODES, true);
    let policy = cache::CachePolicy {
        default_ttl: table.value_or("default_ttl", &lifetime, default.default_ttl),
        ttl: by_status(table, "ttl", &lifetime),
        ttl_jitter_percent: table.value_or("ttl_jitter_percent", &IntegerRange(0..=50), default.ttl_jitter_percent),
        heuristic_max: heuristic_max(table, &lifetime, default.heuristic_max),
        tags: Some(table.value_or("tags", &formats::FIELD_NAME_OR_EMPTY, default.tags.unwrap_or_default()))
            .filter(|field| !field.is_empty()),
        set_cookie: table.value_or("set_cookie", &SET_COOKIE, default.set_cookie),
        cookies: table.optional("cookies", &COOKIES).map_or(default.cookies, |policy| policy.value),
        stale_if_error: table.value_or("stale_if_error", &lifetime, default.stale_if_error),
        stale_while_revalidate: table.value_or("stale_while_revalidate", &lifetime, default.stale_while_revalidate),
        languages: languages(table).into(),
    };
    is_enabled.then_some(policy)
}

const LANGUAGE: ParsedString<String> = ParsedString {
    name: "a language tag such as \"en\" or \"pt-BR\"",
    pattern: "[0-9A-Za-z]{1,8}(-[0-9A-Za-z]{1,8})*",
    parse: |text| {
        let is_subtag =
            |part: &str| (1..=8).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_alphanumeric());
        match text.split('-').all(is_subtag) {
            true => Ok(text.to_owned()),
            false => Err(ConfigProblem::bad_value(format!("`{text}` is not a language tag"))),
        }
    },
    format: String::clone,
};

/// The languages of the responses; their tags have no case (RFC 5646 section 2.1.1).
fn languages(table: &TableReader<'_>) -> Vec<String> {
    let languages = formats::list(table, "languages", LANGUAGE, Vec::new());
    for (index, language) in languages.iter().enumerate() {
        let is_same = |earlier: &&String| earlier.eq_ignore_ascii_case(language) && *earlier != language;
        if let Some(earlier) = languages[..index].iter().find(is_same) {
            let message = format!("`{language}` and `{earlier}` are the same language");
            let problem = ConfigProblem::new(FaultCode::Duplicate, message).hint("remove one of the two");
            table.context.warning(&table.location_of(&["languages"]), problem);
        }
    }
    languages
}

/// The bound of heuristic lifetimes; `heuristic = false` is zero.
fn heuristic_max(table: &TableReader<'_>, lifetime: &DurationRange, default: Duration) -> Duration {
    let is_off = table.optional("heuristic", &Boolean).is_some_and(|heuristic| !heuristic.value);
    let (max, at) = table.located_or("heuristic_max", lifetime, default);
    if let Some(at) = at.filter(|_| is_off && !max.is_zero()) {
        let problem = ConfigProblem::bad_value("`heuristic = false` allows no heuristic lifetime");
        table.context.error(&at, problem.hint("remove one of the two"));
    }
    if is_off { Duration::ZERO } else { max }
}

/// Values by status, `{ 404 = VALUE, 5xx = VALUE }`; single statuses come first.
fn by_status<K: ValueKind<Value: Ord>>(
    table: &TableReader<'_>,
    key: &'static str,
    kind: &K,
) -> Vec<(cache::StatusPattern, K::Value)> {
    table.constraint(constraints::names(key, "[2-5](xx|[0-9][0-9])"));
    let mut values: Vec<_> = table
        .named_values(key, kind)
        .into_iter()
        .filter_map(|(name, value)| match statuses(&name.value) {
            Some(statuses) => Some((statuses, value)),
            None => {
                let problem = ConfigProblem::bad_value(format!("`{}` is not a status", name.value));
                table.context.error(&name.at, problem.hint("write a status such as 404, or a class such as \"5xx\""));
                None
            }
        })
        .collect();
    values.sort_unstable();
    values
}

fn statuses(text: &str) -> Option<cache::StatusPattern> {
    if let Some(class) = text.strip_suffix("xx") {
        return matches!(class, "2" | "3" | "4" | "5").then(|| class.parse().ok().map(cache::StatusPattern::Class))?;
    }
    let has_digits = text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit());
    let status = text.parse().ok().filter(|status| has_digits && (200..=599).contains(status));
    status.map(cache::StatusPattern::One)
}

fn degrade_page(table: &TableReader<'_>, default: degrade::DegradeConfig) -> degrade::DegradeConfig {
    let status = table.value_or("status", &IntegerRange(400..=599), u32::from(default.status.as_u16()));
    let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
    degrade::DegradeConfig {
        status: status.unwrap_or(default.status),
        html: page(table, "html"),
        json: page(table, "json"),
        retry_after: table.value_or("retry_after", &DurationRange(SECOND..=DAY), default.retry_after),
    }
}

/// The table `pages`: the template in a file for each status or class.
pub(super) fn pages(table: &TableReader<'_>) -> ErrorPages {
    table.constraint(constraints::names("pages", "[45](xx|[0-9][0-9])"));
    let files = table.named_values("pages", &AnyString);
    let mut pages: ErrorPages = files
        .into_iter()
        .filter_map(|(name, file)| Some((page_statuses(table, &name)?, error_page(table, (&name, &file))?)))
        .collect();
    pages.sort_unstable_by_key(|(statuses, _)| *statuses);
    pages
}

fn page_statuses(table: &TableReader<'_>, name: &Located<String>) -> Option<cache::StatusPattern> {
    let is_error = |statuses: &cache::StatusPattern| {
        statuses.matches(400) || statuses.matches(500) || matches!(statuses, cache::StatusPattern::One(400..))
    };
    let statuses = statuses(&name.value).filter(is_error);
    if statuses.is_none() {
        let problem = ConfigProblem::bad_value(format!("`{}` is not the status of an error", name.value));
        table.context.error(&name.at, problem.hint("write a status such as 404, or the class \"4xx\" or \"5xx\""));
    }
    statuses
}

fn error_page(table: &TableReader<'_>, (name, file): (&Located<String>, &str)) -> Option<ErrorPage> {
    let compile =
        |text: String| ErrorPage::compile(&text).map_err(|fault| ConfigProblem::bad_value(format!("{file}: {fault}")));
    let page = read_file(&table.context.environment, file).and_then(compile);
    page.map_err(|problem| table.context.error(&name.at, problem)).ok()
}

/// Content of the file named by `key`.
fn page(table: &TableReader<'_>, key: &'static str) -> Option<String> {
    let path = table.optional(key, &AnyString)?;
    let text = read_file(&table.context.environment, &path.value);
    text.map_err(|problem| table.context.error(&path.at, problem)).ok()
}
