//! `[[routes]]`: what a request has to match, and the policies it then gets.

use std::num::NonZeroU32;
use std::time::Duration;

use http::StatusCode;

use super::super::expand::read_file;
use super::super::fault::Problem;
use super::super::kind::{Choice, Kind, ListOf, Span, Text, Whole};
use super::super::table::Table;
use super::{DAY, RouteNames, SECOND, forms};
use crate::route::{HostPattern, PathPattern, Settings};
use crate::{cache, degrade};

const COST_MAX: u32 = 1_000_000;
/// Longer than this nothing is worth keeping, and sums of ages stay far from overflow.
const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// Every route, its names not resolved yet.
pub(super) fn read(root: &Table<'_>) -> Vec<(Settings, RouteNames)> {
    root.tables("routes", route)
}

fn route(table: &Table<'_>) -> (Settings, RouteNames) {
    let name = table.required("name", &forms::NAME);
    let (matched, host, path, methods) = table.table("match", |matched| {
        let host = matched.or("host", &forms::HOST, HostPattern::Any);
        let path = matched.required("path", &forms::PATH);
        let path = path.map_or(PathPattern::Prefix("/".to_owned()), |path| path.value);
        (matched.at.clone(), host, path, forms::list(matched, "methods", forms::METHOD, Vec::new()))
    });
    let upstream = table.required("upstream", &Text);
    let limits = table.or("limits", &ListOf { item: Text, least: 0 }, Vec::new());
    let text = name.as_ref().map_or("", |name| name.value.as_str());
    let default = Settings::new(text.into(), path, 0);
    let cost = table.or("cost", &Whole(1..=COST_MAX), default.cost.get());
    table.later("journal", None);
    let settings = Settings {
        host,
        methods,
        cost: NonZeroU32::new(cost).unwrap_or(default.cost),
        cost_by_status: by_status(table, "cost_by_status", &Whole(1..=COST_MAX))
            .into_iter()
            .filter_map(|(statuses, cost)| Some((statuses, NonZeroU32::new(cost)?)))
            .collect(),
        cache: table.table("cache", |cache| cache_policy(cache, default.cache.clone().unwrap_or_default())),
        degrade: table.table("degrade", |degrade| degrade_page(degrade, default.degrade.clone())),
        ..default
    };
    let names = RouteNames {
        name: name.map_or_else(|| table.at.clone(), |name| name.at),
        matched,
        cost: table.place_of(&["cost"]),
        upstream,
        limits,
    };
    (settings, names)
}

fn cache_policy(table: &Table<'_>, default: cache::RoutePolicy) -> Option<cache::RoutePolicy> {
    const SET_COOKIE: Choice<cache::SetCookie> =
        Choice(&[("private", Some(cache::SetCookie::Private)), ("shared", Some(cache::SetCookie::Shared))]);
    const MODES: Choice<bool> = Choice(&[("standard", Some(true)), ("off", Some(false))]);
    let lifetime = Span(Duration::ZERO..=YEAR);
    let caches = table.or("mode", &MODES, true);
    let policy = cache::RoutePolicy {
        default_ttl: table.or("default_ttl", &lifetime, default.default_ttl),
        ttl: by_status(table, "ttl", &lifetime),
        ttl_jitter_percent: table.or("ttl_jitter_percent", &Whole(0..=50), default.ttl_jitter_percent),
        heuristic_max: table.or("heuristic_max", &lifetime, default.heuristic_max),
        tags: Some(table.or("tags", &forms::FIELD_OR_NONE, default.tags.unwrap_or_default()))
            .filter(|field| !field.is_empty()),
        set_cookie: table.or("set_cookie", &SET_COOKIE, default.set_cookie),
        stale_if_error: table.or("stale_if_error", &lifetime, default.stale_if_error),
        stale_while_revalidate: table.or("stale_while_revalidate", &lifetime, default.stale_while_revalidate),
    };
    caches.then_some(policy)
}

/// `{ 404 = VALUE, 5xx = VALUE }`, single statuses first.
fn by_status<K: Kind<Value: Ord>>(table: &Table<'_>, key: &'static str, kind: &K) -> Vec<(cache::Statuses, K::Value)> {
    let mut all: Vec<_> = table
        .pairs(key, kind)
        .into_iter()
        .filter_map(|(name, value)| match statuses(&name.value) {
            Some(statuses) => Some((statuses, value)),
            None => {
                let problem = Problem::bad(format!("`{}` is no status", name.value));
                table.reading.error(&name.at, problem.hint("write a status such as 404, or a class such as \"5xx\""));
                None
            }
        })
        .collect();
    all.sort_unstable();
    all
}

fn statuses(text: &str) -> Option<cache::Statuses> {
    if let Some(class) = text.strip_suffix("xx") {
        return matches!(class, "2" | "3" | "4" | "5").then(|| class.parse().ok().map(cache::Statuses::Class))?;
    }
    text.parse().ok().filter(|status| (200..=599).contains(status)).map(cache::Statuses::One)
}

fn degrade_page(table: &Table<'_>, default: degrade::Settings) -> degrade::Settings {
    let status = table.or("status", &Whole(400..=599), u32::from(default.status.as_u16()));
    let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
    degrade::Settings {
        status: status.unwrap_or(default.status),
        html: page(table, "html"),
        json: page(table, "json"),
        retry_after: table.or("retry_after", &Span(SECOND..=DAY), default.retry_after),
    }
}

/// The contents of the file that `key` names.
fn page(table: &Table<'_>, key: &'static str) -> Option<String> {
    let path = table.optional(key, &Text)?;
    let text = read_file(&table.reading.values, &path.value);
    text.map_err(|problem| table.reading.error(&path.at, problem)).ok()
}
