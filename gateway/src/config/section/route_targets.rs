//! `routes.canary` and `routes.mirror`: further upstreams of a route.

use limiter::Percent;

use super::super::constraints;
use super::super::fault::ConfigProblem;
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{AnyString, IntegerRange};
use super::route_actions;
use crate::route::{CanaryConfig, MirrorConfig, RouteAction};

/// The canary, and the name of its upstream; `None` without one.
pub(super) fn canary(table: &TableReader<'_>, action: &RouteAction) -> Option<(CanaryConfig, Option<Located<String>>)> {
    check_action(table, ("canary", action));
    table.optional_table("canary", |table| {
        table.constraint(constraints::at_least_one(&["percent", "header"]));
        let upstream = table.required("upstream", &AnyString);
        let (percent, headers) = (percent(table, 0), route_actions::header_patterns(table, "header"));
        if headers.is_empty() && !table.has("percent") {
            let problem = ConfigProblem::bad_value("the canary gets no request");
            let hint = "set `percent`, or `header = { x-canary = \"1\" }`";
            table.context.error(&table.at, problem.hint(hint));
        }
        (CanaryConfig { upstream: 0, percent, headers }, upstream)
    })
}

/// The mirror, and the name of its upstream; `None` without one.
pub(super) fn mirror(table: &TableReader<'_>, action: &RouteAction) -> Option<(MirrorConfig, Option<Located<String>>)> {
    check_action(table, ("mirror", action));
    table.optional_table("mirror", |table| {
        let upstream = table.required("upstream", &AnyString);
        (MirrorConfig { upstream: 0, percent: percent(table, 100) }, upstream)
    })
}

fn percent(table: &TableReader<'_>, default: u32) -> Percent {
    let percent = table.value_or("percent", &IntegerRange(0..=100), default);
    u8::try_from(percent).ok().and_then(|percent| Percent::try_from(percent).ok()).unwrap_or(Percent::ALL)
}

fn check_action(table: &TableReader<'_>, (key, action): (&'static str, &RouteAction)) {
    if *action != RouteAction::Forward && table.has(key) {
        let problem = ConfigProblem::bad_value(format!("`{key}` has no effect: the route answers by itself"));
        table.context.error(&table.location_of(&[key]), problem);
    }
}
