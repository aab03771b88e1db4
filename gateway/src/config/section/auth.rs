//! `routes.auth`: the credentials that the requests of a route need.

use std::time::Duration;

use super::super::constraints;
use super::super::expand::read_file;
use super::super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{AnyString, DurationRange, OneOf, ParsedString};
use super::bounds::{HOUR, MS};
use super::formats;
use crate::endpoint::{EndpointAddress, EndpointScheme};
use crate::identify::auth::api_keys::ApiKeys;
use crate::identify::auth::{AuthConfig, AuthMethod, PasswordFile};
use crate::route::ForwardAuthConfig;

/// Default of `header`.
const KEY_FIELD: &str = "x-api-key";
/// Default of `realm`.
const REALM: &str = "restricted";

/// The value is sent in quotes, so it has none itself.
const REALM_TEXT: ParsedString<String> = ParsedString {
    name: "1 to 64 visible ASCII characters or spaces, without quotes and backslashes",
    pattern: r"[ !#-\[\]-~]{1,64}",
    parse: |text| {
        let is_plain = |byte: u8| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\';
        if (1..=64).contains(&text.len()) && text.bytes().all(is_plain) {
            Ok(text.to_owned())
        } else {
            Err(ConfigProblem::bad_value("not a realm").hint("write a short name such as \"Staging\""))
        }
    },
    format: String::clone,
};

const CREDENTIALS: OneOf<bool> = OneOf(&[("remove", Some(false)), ("forward", Some(true))]);

/// The user classes that a file of keys names, with the location to report an unknown one at.
pub(in crate::config) struct NamedClasses {
    pub(in crate::config) at: DocumentLocation,
    pub(in crate::config) file: String,
    /// With their lines.
    pub(in crate::config) classes: Vec<(String, usize)>,
}

/// The authentication of a route.
pub(super) enum RouteAuth {
    Credentials(AuthConfig, Option<NamedClasses>),
    /// A service, its endpoint, and the location of its URL.
    Service(ForwardAuthConfig, EndpointAddress, DocumentLocation),
}

/// The URL of a verification service: its endpoint, then path and query.
#[derive(Clone, Debug, PartialEq)]
struct ServiceUrl {
    endpoint: EndpointAddress,
    authority: String,
    target: String,
}

const SERVICE: ParsedString<ServiceUrl> = ParsedString {
    name: "a URL such as \"http://127.0.0.1:4000/verify\"",
    pattern: "[Hh][Tt][Tt][Pp][Ss]?://[^/#@ ]+(/[^# ]*)?",
    parse: |text| {
        let after_scheme = text.find("://").map_or(0, |at| at + 3);
        let path_at = text[after_scheme..].find('/').map_or(text.len(), |at| after_scheme + at);
        let (origin, target) = text.split_at(path_at);
        if target.contains(['#', ' ']) {
            return Err(ConfigProblem::bad_value("not the URL of a service"));
        }
        let endpoint = formats::parse_endpoint(origin)?;
        if !matches!(endpoint.scheme, EndpointScheme::Http | EndpointScheme::Https) {
            return Err(ConfigProblem::bad_value("a verification service is reached by http or https"));
        }
        let target = if target.is_empty() { "/" } else { target };
        Ok(ServiceUrl { endpoint, authority: origin[after_scheme..].to_ascii_lowercase(), target: target.to_owned() })
    },
    format: |url| format!("{}://{}{}", url.endpoint.scheme.as_str(), url.authority, url.target),
};

/// Longest time of a call of a verification service.
const SERVICE_TIMEOUT: Duration = Duration::from_secs(2);

/// Keys without effect unless a service decides, and those without effect if one does.
const FORWARD_KEYS: [&str; 3] = ["timeout", "headers", "user"];
const CREDENTIALS_KEYS: [&str; 3] = ["header", "credentials", "realm"];

/// The keys of a verification service, which have no effect without one.
fn forward_service(
    table: &TableReader<'_>,
    url: Option<&Located<ServiceUrl>>,
) -> Option<(ForwardAuthConfig, EndpointAddress)> {
    let timeout = table.value_or("timeout", &DurationRange(MS..=HOUR), SERVICE_TIMEOUT);
    let fields = formats::list(table, "headers", formats::FIELD_NAME, Vec::new());
    let user = table.optional("user", &formats::FIELD_NAME).map(|user| user.value);
    let Some(Located { value: url, .. }) = url else {
        let has = FORWARD_KEYS.into_iter().find(|key| table.has(key));
        if let Some(key) = has {
            let problem = ConfigProblem::bad_value(format!("`{key}` applies to `forward` only"));
            table.context.error(&table.location_of(&[key]), problem);
        }
        return None;
    };
    if CREDENTIALS_KEYS.iter().any(|key| table.has(key)) {
        let problem = ConfigProblem::bad_value("`header`, `credentials` and `realm` have no effect with `forward`");
        table.context.error(&table.at, problem.hint("the service reads the request itself"));
    }
    let (authority, target) = (url.authority.clone(), url.target.clone());
    Some((ForwardAuthConfig { upstream: 0, authority, target, timeout, fields, user }, url.endpoint.clone()))
}

/// Reads the authentication of a route; `None` without it, or with a fault.
pub(super) fn read(route: &TableReader<'_>) -> Option<RouteAuth> {
    let is_set = route.has("auth");
    route.feature_table("auth", |table| {
        table.constraint(constraints::exactly_one(&["basic", "api_keys", "forward"]));
        for key in FORWARD_KEYS {
            table.constraint(constraints::needs(key, "forward"));
        }
        for key in CREDENTIALS_KEYS {
            table.constraint(constraints::excludes(key, &["forward"]));
        }
        table.constraint(constraints::needs("header", "api_keys"));
        let basic = table.optional("basic", &AnyString);
        let keys = table.optional("api_keys", &AnyString);
        let forward = table.optional("forward", &SERVICE);
        let (field, field_at) = table.located_or("header", &formats::FIELD_NAME, KEY_FIELD.to_owned());
        const UNUSABLE: [&str; 7] =
            ["connection", "content-length", "cookie", "host", "proxy-authorization", "te", "transfer-encoding"];
        if UNUSABLE.contains(&&*field) || field.contains('_') {
            let problem = ConfigProblem::bad_value(format!("`{field}` cannot carry a key"));
            let at = field_at.clone().unwrap_or_else(|| table.at.clone());
            table.context.error(&at, problem.hint("the gateway uses or drops the field; write \"x-api-key\""));
        }
        let realm = table.value_or("realm", &REALM_TEXT, REALM.to_owned());
        let forwards_credentials = table.value_or("credentials", &CREDENTIALS, false);
        let service = forward_service(table, forward.as_ref());
        if let Some(forward) = forward {
            if let Some(other) = basic.as_ref().or(keys.as_ref()) {
                let problem = ConfigProblem::bad_value("a route has one of `basic`, `api_keys` and `forward`");
                table.context.error(&other.at, problem);
            }
            let (config, endpoint) = service?;
            return Some(RouteAuth::Service(config, endpoint, forward.at));
        }
        let (method, classes) = match (basic, keys) {
            (Some(file), None) => {
                if let Some(at) = field_at {
                    let problem = ConfigProblem::bad_value("`header` applies to `api_keys` only");
                    table.context.error(&at, problem.hint("HTTP Basic has a field of its own, `Authorization`"));
                }
                (AuthMethod::Basic(users(table, &file)?), None)
            }
            (None, Some(file)) => {
                let keys = api_keys(table, &file)?;
                let classes = keys.classes().map(|(class, line)| (class.to_owned(), line)).collect();
                let classes = NamedClasses { at: file.at, file: file.value, classes };
                (AuthMethod::ApiKey { keys, field }, Some(classes))
            }
            (Some(_), Some(second)) => {
                let problem = ConfigProblem::bad_value("a route has either `basic` or `api_keys`");
                table.context.error(&second.at, problem.hint("use two routes, or one of the two"));
                return None;
            }
            (None, None) => {
                if is_set && !["basic", "api_keys"].iter().any(|key| table.has(key)) {
                    let problem = ConfigProblem::new(FaultCode::Missing, "`basic`, `api_keys` or `forward` is missing");
                    let hint = "write { basic = \"users.htpasswd\" } or { api_keys = \"keys.txt\" }";
                    table.context.error(&table.at, problem.hint(hint));
                }
                return None;
            }
        };
        Some(RouteAuth::Credentials(AuthConfig { method, realm, forwards_credentials }, classes))
    })
}

fn users(table: &TableReader<'_>, file: &Located<String>) -> Option<PasswordFile> {
    let hint = "expected lines as `htpasswd -B` or `tidegate password` prints them";
    parse(table, file, (hint, |text| PasswordFile::parse(text).map_err(|error| error.to_string())))
}

fn api_keys(table: &TableReader<'_>, file: &Located<String>) -> Option<ApiKeys> {
    let hint = "expected lines as `tidegate key NAME` prints them";
    let keys = parse(table, file, (hint, |text| ApiKeys::parse(text).map_err(|error| error.to_string())))?;
    if keys.len() == 0 {
        let problem = ConfigProblem::new(FaultCode::Risk, format!("{} has no keys", file.value));
        table.context.warning(&file.at, problem.hint("every request of this route gets 401"));
    }
    Some(keys)
}

/// Reads and parses a file, whose later changes are watched.
fn parse<T>(
    table: &TableReader<'_>,
    file: &Located<String>,
    (hint, parse): (&str, impl FnOnce(&str) -> Result<T, String>),
) -> Option<T> {
    let parsed = read_file(&table.context.environment, &file.value).and_then(|text| {
        parse(&text).map_err(|error| {
            ConfigProblem::new(FaultCode::File, format!("cannot use {}: {error}", file.value)).hint(hint)
        })
    });
    parsed.map_err(|problem| table.context.error(&file.at, problem)).ok()
}
