//! Actions of a route besides forwarding: `redirect`, `respond`, `headers`, `cors`, `strip_prefix`,
//! `rewrite`, and the conditions of `match` besides host, path and methods.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode};

use super::super::constraints;
use super::super::fault::{ConfigProblem, FaultCode, FaultSeverity};
use super::super::read_context::Located;
use super::super::suggestion::suggest;
use super::super::table_reader::TableReader;
use super::super::value_kind::{
    AnyString, ArrayOf, Boolean, DurationRange, IntegerRange, OneOf, OneOfIntegers, ParsedString, Repeats,
};
use super::bounds::DAY;
use super::formats;
use crate::http::message::Scheme;
use crate::route::{
    CorsPolicy, FixedResponse, HeaderEdits, OriginPattern, PathPattern, PathRewrite, Redirect, RouteAction,
    RouteConditions, RouteEdits, SecurityHeaders, Template, TemplateVariable, ValuePattern,
};

/// Largest body of a fixed response. Larger ones belong to a file server.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Browsers remember a preflight no longer than this (Chromium: 2 hours, Firefox: 24).
const PREFLIGHT_AGE: Duration = Duration::from_secs(3600);

const TEMPLATE: ParsedString<Template> = ParsedString {
    name: "a text with variables such as \"{host}\"",
    pattern: "",
    parse: parse_template,
    format: Template::source,
};

const VALUE_PATTERN: ParsedString<ValuePattern> = ParsedString {
    name: "a value, \"*\" for any, or a beginning such as \"a*\"",
    pattern: r"[^*]*\*?",
    parse: parse_value_pattern,
    format: format_value_pattern,
};

const CONTENT_TYPE: ParsedString<String> = ParsedString {
    name: "a content type, or \"\" for none",
    pattern: r"[\t -~]*",
    parse: |text| match HeaderValue::from_str(text) {
        Ok(value) if value.to_str().is_ok() => Ok(text.to_owned()),
        _ => Err(ConfigProblem::bad_value(format!("`{text}` is not a content type"))),
    },
    format: String::clone,
};

const ORIGIN: ParsedString<OriginPattern> = ParsedString {
    name: "an origin such as \"https://app.example\" or \"https://*.app.example\", or \"*\"",
    pattern: r"\*|[^/]+://[^/?#@ ]+",
    parse: parse_origin,
    format: |origin| match origin {
        OriginPattern::Any => "*".to_owned(),
        OriginPattern::Exact(origin) => origin.clone(),
        OriginPattern::Subdomains(before, after) => format!("{before}*{after}"),
    },
};

const REDIRECT_STATUS: OneOfIntegers = OneOfIntegers {
    numbers: &[301, 302, 303, 307, 308],
    name: "a redirect",
    hint: "308 and 307 keep the method, 303 makes it GET; 301 and 302 are for old clients",
};

const SECURITY_HEADERS: OneOf<Option<SecurityHeaders>> = OneOf(&[
    ("off", Some(None)),
    ("basic", Some(Some(SecurityHeaders::Basic))),
    ("strict", Some(Some(SecurityHeaders::Strict))),
]);

const SCHEMES: OneOf<Scheme> = OneOf(&[("http", Some(Scheme::Http)), ("https", Some(Scheme::Https))]);

/// Fields that the gateway writes by itself: of a connection, of the framing, of the trace, the id
/// of the request and the deadline.
const FIXED_FIELDS: [&str; 13] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
    "expect",
    "traceparent",
    "x-request-id",
    "x-envoy-expected-rq-timeout-ms",
];

/// Further conditions of the table `match`; `None` without any.
pub(super) fn conditions(table: &TableReader<'_>) -> Option<Box<RouteConditions>> {
    let scheme = table.optional("scheme", &SCHEMES).map(|scheme| scheme.value);
    let headers = header_patterns(table, "headers");
    let query = table.named_values("query", &VALUE_PATTERN);
    let mut conditions = RouteConditions {
        scheme,
        headers,
        query: query.into_iter().map(|(name, pattern)| (name.value, pattern)).collect(),
    };
    // Their order means nothing, and routes with the same conditions are compared.
    conditions.headers.sort_by(|(one, _), (other, _)| one.cmp(other));
    conditions.query.sort_by(|(one, _), (other, _)| one.cmp(other));
    (conditions.len() > 0).then(|| Box::new(conditions))
}

/// Names in lower case of fields that a request must have, with their values.
pub(super) fn header_patterns(table: &TableReader<'_>, key: &'static str) -> Vec<(String, ValuePattern)> {
    table.constraint(constraints::names(key, formats::FIELD_PATTERN));
    let headers = table.named_values(key, &VALUE_PATTERN);
    let hint = "both would have to match one request; keep one of the two";
    formats::check_field_names(table, headers.iter().map(|(name, _)| name), FaultSeverity::Error, hint);
    let headers = headers.into_iter().filter_map(|(name, pattern)| {
        let checked = field_name(table, &name)?;
        if checked.contains('_') {
            let problem = ConfigProblem::bad_value(format!("`{checked}` never matches: fields with `_` are dropped"));
            table.context.warning(&name.at, problem.hint("`limits_http.underscores = \"forward\"` keeps them"));
        }
        Some((checked, pattern))
    });
    headers.collect()
}

/// Reports `{rest}` in a route for one path: it would always be empty.
fn check_rest(table: &TableReader<'_>, path: &PathPattern, template: &Located<Template>) {
    if matches!(path, PathPattern::Exact(_)) && template.value.uses(TemplateVariable::Rest) {
        let problem = ConfigProblem::bad_value("`{rest}` is empty: `match.path` is one path, and has no `*`");
        table.context.error(&template.at, problem.hint("write `{path}`, or end `match.path` with `/*`"));
    }
}

/// The action of a route for `path`; `Forward` where the table has neither `redirect` nor
/// `respond`.
pub(super) fn action(table: &TableReader<'_>, path: &PathPattern) -> RouteAction {
    let (has_redirect, has_respond) = (table.has("redirect"), table.has("respond"));
    let redirect = table.feature_table("redirect", |table| {
        let to = table.required_if(has_redirect, "to", &TEMPLATE);
        if let Some(to) = &to {
            check_rest(table, path, to);
        }
        if let Some(to) = &to
            && !names_its_place(&to.value.source())
        {
            let problem = ConfigProblem::bad_value("a redirect goes to a URL, or to a path that begins with `/`");
            table.context.error(&to.at, problem.hint("write \"https://{host}{uri}\", or \"/new/{rest}\""));
        }
        let status = u16::try_from(table.value_or("status", &REDIRECT_STATUS, 308))
            .ok()
            .and_then(|status| StatusCode::from_u16(status).ok());
        RouteAction::Redirect(Redirect {
            to: to.map(|to| to.value).unwrap_or_default(),
            status: status.unwrap_or(StatusCode::PERMANENT_REDIRECT),
        })
    });
    let respond = table.feature_table("respond", |table| {
        let status = table.value_or("status", &IntegerRange(200..=599), 200u32);
        let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
        let (body, at) = table.located_or("body", &AnyString, String::new());
        if body.len() > BODY_BYTES_MAX {
            let message = format!("{} bytes are too much for a fixed response", body.len());
            let hint = format!("at most {} KiB; serve larger files by an upstream", BODY_BYTES_MAX >> 10);
            table.context.error(&at.unwrap_or_else(|| table.at.clone()), ConfigProblem::bad_value(message).hint(hint));
        }
        if matches!(status, Some(StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED))
            && !body.is_empty()
        {
            let at = table.location_of(&["body"]);
            let status = status.unwrap_or_default();
            let message = format!("a response with status {} has no body", status.as_u16());
            table.context.error(&at, ConfigProblem::bad_value(message).hint("remove `body`, or write another status"));
        }
        let content_type = table.value_or("content_type", &CONTENT_TYPE, "text/plain; charset=utf-8".to_owned());
        RouteAction::Respond(FixedResponse {
            status: status.unwrap_or(StatusCode::OK),
            body: Bytes::from(body),
            content_type,
            forms: std::sync::Arc::default(),
        })
    });
    if has_redirect && has_respond {
        let problem = ConfigProblem::bad_value("a route has either `redirect` or `respond`");
        table.context.error(&table.location_of(&["respond"]), problem);
    }
    if has_redirect {
        redirect
    } else if has_respond {
        respond
    } else {
        RouteAction::Forward
    }
}

/// Whether a redirect names scheme and host, or a path of the same host: a client must not choose
/// them. `{uri}` or `{path}` alone would lead to the same URL again.
fn names_its_place(to: &str) -> bool {
    let Some((_, rest)) = ["http://", "https://", "{scheme}://"].iter().find_map(|scheme| to.split_once(scheme)) else {
        return to.starts_with('/') && !to.starts_with("//");
    };
    // The host ends before the first part that is a path.
    let ends = ["/", "{uri}", "{path}"].iter().filter_map(|end| rest.find(end)).min();
    let host = &rest[..ends.unwrap_or(rest.len())];
    let literal = host.replacen("{host}", "h", 1).replacen("{authority}", "h", 1);
    !literal.is_empty() && !literal.contains(['{', '}', '@'])
}

/// The changes of a route in messages; `None`: nothing.
pub(super) fn edits(table: &TableReader<'_>, path: &PathPattern) -> Option<Box<RouteEdits>> {
    let mut host = None;
    let (request, response) = table.table("headers", |table| {
        let request = table.table("request", |table| {
            let mut edits = header_edits(table);
            let is_host = |(name, _): &(String, Template)| name == "host";
            if let Some(at) = edits.set.iter().position(is_host) {
                host = Some(edits.set.remove(at).1);
            }
            if edits.add.iter().any(is_host) || edits.remove.iter().any(|name| name == "host") {
                let problem = ConfigProblem::bad_value("`host` can be set, but neither added nor removed");
                table.context.error(&table.at, problem);
            }
            edits
        });
        (request, table.table("response", header_edits))
    });
    let security = table.value_or("security_headers", &SECURITY_HEADERS, None);
    let edits = RouteEdits { request, response, host, path: path_rewrite(table, path), cors: cors(table), security };
    check_cors_fields(table, &edits);
    (edits != RouteEdits::default()).then(|| Box::new(edits))
}

fn header_edits(table: &TableReader<'_>) -> HeaderEdits {
    let values = |key, severity, hint| {
        table.constraint(constraints::names(key, formats::FIELD_PATTERN));
        let named = table.named_values(key, &TEMPLATE);
        formats::check_field_names(table, named.iter().map(|(name, _)| name), severity, hint);
        named.into_iter().filter_map(|(name, value)| Some((field_name(table, &name)?, value))).collect()
    };
    let set: Vec<(String, Template)> = values("set", FaultSeverity::Error, "the field would be sent twice; keep one");
    let add = values("add", FaultSeverity::Warning, "each adds a line; write the values into one, if it is a list");
    let names = ArrayOf { item: formats::FIELD_NAME, min_items: 0, repeats: Repeats::Warned };
    let names = table.value_or("remove", &names, Vec::new());
    for name in names.iter().filter(|name| set.iter().any(|(set, _)| *set == name.value)) {
        let message = format!("`remove` has no effect on `{}`, which `set` replaces", name.value);
        let problem = ConfigProblem::new(FaultCode::Duplicate, message);
        table.context.warning(&name.at, problem.hint("remove it from one of the two"));
    }
    let remove = names.iter().filter_map(|name| field_name(table, name)).collect();
    HeaderEdits { remove, set, add }
}

/// A name in lower case; reports one that is not a field name, or that a route may not change.
fn field_name(table: &TableReader<'_>, name: &Located<String>) -> Option<String> {
    let Ok(parsed) = HeaderName::from_bytes(name.value.as_bytes()) else {
        let problem = ConfigProblem::bad_value(format!("`{}` is not a field name", name.value));
        table.context.error(&name.at, problem);
        return None;
    };
    if FIXED_FIELDS.contains(&parsed.as_str()) {
        let problem =
            ConfigProblem::bad_value(format!("`{parsed}` belongs to the connection, the framing or the trace"));
        table.context.error(&name.at, problem.hint("the gateway writes it by itself"));
        return None;
    }
    Some(parsed.as_str().to_owned())
}

/// The permissions of CORS are those of `cors` alone.
fn check_cors_fields(table: &TableReader<'_>, edits: &RouteEdits) {
    let names = edits.response.set.iter().chain(&edits.response.add).map(|(name, _)| name);
    let named = names.chain(&edits.response.remove).find(|name| name.starts_with("access-control-"));
    if let Some(name) = named.filter(|_| edits.cors.is_some()) {
        let problem = ConfigProblem::bad_value(format!("`{name}` is written by `cors`"));
        table.context.error(&table.location_of(&["headers", "response"]), problem.hint("change it in `cors`"));
    }
}

fn path_rewrite(table: &TableReader<'_>, path: &PathPattern) -> Option<PathRewrite> {
    let prefix = table.optional("strip_prefix", &formats::PREFIX);
    let rewrite = table.optional("rewrite", &TEMPLATE);
    if let (Some(_), Some(rewrite)) = (&prefix, &rewrite) {
        let problem = ConfigProblem::bad_value("a route has either `strip_prefix` or `rewrite`");
        table.context.error(&rewrite.at, problem);
    }
    if let Some(Located { value, at }) = &prefix {
        let (PathPattern::Exact(path) | PathPattern::Prefix(path)) = path;
        let rest = path.strip_prefix(value.as_str());
        if rest.is_none_or(|rest| !(rest.is_empty() || rest.starts_with('/'))) {
            let problem = ConfigProblem::bad_value(format!("paths of this route do not begin with `{value}`"));
            table.context.error(at, problem.hint("`strip_prefix` is a beginning of `match.path`, in whole segments"));
        }
    }
    if let Some(rewrite) = &rewrite {
        check_rest(table, path, rewrite);
    }
    if let Some(Located { value, at }) = &rewrite {
        let raw = [TemplateVariable::Query, TemplateVariable::Uri, TemplateVariable::Authority];
        if raw.iter().any(|variable| value.uses(*variable)) {
            let problem = ConfigProblem::bad_value("`{query}`, `{uri}` and `{authority}` are no parts of a path");
            table
                .context
                .error(at, problem.hint("a client would write segments such as `..`; use `{path}` or `{rest}`"));
        }
        let source = value.source();
        if !source.starts_with('/') && !source.starts_with("{path}") || source.contains(['?', '#', ' ']) {
            let problem = ConfigProblem::bad_value("`rewrite` is a path, which begins with `/`");
            table.context.error(at, problem.hint("the query stays as it is"));
        }
    }
    let rewrite = rewrite.map(|rewrite| PathRewrite::Replace(rewrite.value));
    prefix.map(|prefix| PathRewrite::StripPrefix(prefix.value)).or(rewrite)
}

fn cors(table: &TableReader<'_>) -> Option<CorsPolicy> {
    let is_set = table.has("cors");
    table.feature_table("cors", |table| cors_policy(table, is_set))
}

fn cors_policy(table: &TableReader<'_>, is_set: bool) -> Option<CorsPolicy> {
    let origins =
        table.required_if(is_set, "origins", &ArrayOf { item: ORIGIN, min_items: 1, repeats: Repeats::Warned });
    let (origins, origins_at) = origins.map_or((Vec::new(), None), |origins| (origins.value, Some(origins.at)));
    let simple = vec![Method::GET, Method::HEAD, Method::POST];
    let policy = CorsPolicy {
        origins: origins.into_iter().map(|origin| origin.value).collect(),
        methods: formats::list(table, "methods", formats::METHOD, simple),
        headers: formats::list(table, "headers", formats::FIELD_NAME, Vec::new()),
        expose: formats::list(table, "expose", formats::FIELD_NAME, Vec::new()),
        credentials: table.value_or("credentials", &Boolean, false),
        max_age: table.value_or("max_age", &DurationRange(Duration::ZERO..=DAY), PREFLIGHT_AGE),
    };
    if policy.credentials {
        for (key, names) in [("headers", &policy.headers), ("expose", &policy.expose)] {
            if names.iter().any(|name| name == "*") {
                let message = "with `credentials = true`, browsers take `*` for the name of a field";
                let problem = ConfigProblem::bad_value(message);
                let hint = if key == "headers" {
                    "leave the list empty to allow what is asked for"
                } else {
                    "name the fields"
                };
                table.context.error(&table.location_of(&[key]), problem.hint(hint));
            }
        }
    }
    if policy.credentials && policy.origins.contains(&OriginPattern::Any) {
        let problem = ConfigProblem::bad_value(
            "`origins = [\"*\"]` with `credentials = true` would let every site act as its visitors",
        );
        table.context.error(&origins_at?, problem.hint("name the origins"));
    }
    is_set.then_some(policy)
}

/// A value of the caller in requests for the origin, whose responses may be shared, and whether
/// `Vary` can name the field that has it.
pub(in crate::config) fn unkeyed_variable(edits: &RouteEdits) -> Option<(&'static str, bool)> {
    let variables =
        [("client_ip", TemplateVariable::ClientIp), ("tier", TemplateVariable::Tier), ("user", TemplateVariable::User)];
    variables.into_iter().find_map(|(name, variable)| {
        let in_path = matches!(&edits.path, Some(PathRewrite::Replace(path)) if path.uses(variable));
        let in_host = edits.host.as_ref().is_some_and(|host| host.uses(variable));
        (in_path || in_host || edits.request.uses(variable)).then_some((name, !in_path && !in_host))
    })
}

fn parse_template(text: &str) -> Result<Template, ConfigProblem> {
    Template::parse(text).map_err(|error| {
        let problem = ConfigProblem::bad_value(error.to_string());
        match error {
            crate::route::TemplateError::UnknownVariable(name) => {
                problem.hint(suggest(&name, &TemplateVariable::ALL.map(|(name, _)| name)))
            }
            _ => problem,
        }
    })
}

fn parse_value_pattern(text: &str) -> Result<ValuePattern, ConfigProblem> {
    let pattern = match text.strip_suffix('*') {
        Some("") => ValuePattern::Any,
        Some(prefix) => ValuePattern::Prefix(prefix.to_owned()),
        None => ValuePattern::Exact(text.to_owned()),
    };
    if text.trim_end_matches('*').contains('*') || text.ends_with("**") {
        return Err(ConfigProblem::bad_value(format!("`{text}` has a `*` that is not at its end")));
    }
    Ok(pattern)
}

fn format_value_pattern(pattern: &ValuePattern) -> String {
    match pattern {
        ValuePattern::Any => "*".to_owned(),
        ValuePattern::Exact(value) => value.clone(),
        ValuePattern::Prefix(prefix) => format!("{prefix}*"),
    }
}

fn parse_origin(text: &str) -> Result<OriginPattern, ConfigProblem> {
    if text == "*" {
        return Ok(OriginPattern::Any);
    }
    let lower = text.to_ascii_lowercase();
    let bad = |hint: &str| ConfigProblem::bad_value(format!("`{text}` is not an origin")).hint(hint.to_owned());
    let (scheme, host) =
        lower.split_once("://").ok_or_else(|| bad("write the scheme too, such as \"https://app.example\""))?;
    if scheme.is_empty() || host.is_empty() || host.contains(['/', '?', '#', '@', ' ']) {
        return Err(bad("an origin is scheme, host and port, without a path"));
    }
    match host.strip_prefix("*.") {
        Some(domain) if !domain.is_empty() && !domain.contains('*') => {
            Ok(OriginPattern::Subdomains(format!("{scheme}://"), format!(".{domain}")))
        }
        // Browsers leave out the default port (RFC 6454 section 6.1).
        None if !host.contains('*') => {
            let port = if scheme == "https" { ":443" } else { ":80" };
            Ok(OriginPattern::Exact(lower.strip_suffix(port).unwrap_or(&lower).to_owned()))
        }
        _ => Err(bad("the only wildcard is a whole first label: \"https://*.app.example\"")),
    }
}

/// Keys that need an upstream.
pub(super) const FORWARDING_KEYS: [&str; 10] = [
    "upstream",
    "cache",
    "degrade",
    "timeout",
    "idle_timeout",
    "total_timeout",
    "forward_path",
    "hedge",
    "strip_prefix",
    "rewrite",
];

/// Reports keys without effect on a route that answers by itself.
pub(super) fn check_action(table: &TableReader<'_>, action: &RouteAction) {
    let own = match action {
        RouteAction::Forward => return,
        RouteAction::Redirect(_) => "redirect",
        RouteAction::Respond(_) => "respond",
    };
    for key in FORWARDING_KEYS.into_iter().filter(|key| table.has(key)) {
        let problem = ConfigProblem::bad_value(format!("`{key}` has no effect on a route with `{own}`"));
        table.context.error(&table.location_of(&[key]), problem.hint(format!("remove `{key}` or `{own}`")));
    }
}
