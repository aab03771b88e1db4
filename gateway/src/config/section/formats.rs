//! String formats shared by sections: names, addresses, patterns, fields.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderName, Method, Uri};
use ipnet::{IpNet, Ipv4Net};
use rustls_pki_types::ServerName;

use super::super::fault::{ConfigProblem, FaultCode, FaultSeverity};
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{ArrayOf, ParsedString, Repeats, ValueKind};
use crate::endpoint::{EndpointAddress, EndpointScheme};
use crate::http::authority;
use crate::route::{HostPattern, PathPattern};
use crate::upstream::HashKey;

/// The pattern of a token (RFC 9110 section 5.6.2), such as a field name.
macro_rules! token {
    () => {
        "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
    };
}

/// The pattern of the number of a path segment, 1 to 32.
macro_rules! segment_number {
    () => {
        "([1-9]|[12][0-9]|3[0-2])"
    };
}

pub(super) use {segment_number, token};

/// Patterns of names, of regions, and of any text but the empty one.
pub(super) const NAME_PATTERN: &str = "[A-Za-z0-9._-]{1,64}";
pub(super) const REGION_PATTERN: &str = "[a-z0-9_-]{1,32}";
pub(super) const NOT_EMPTY: &str = r"[\s\S]+";
/// The pattern of the name of a field.
pub(super) const FIELD_PATTERN: &str = token!();

/// Names appear in logs, metrics and header fields: they are short and need no quoting.
const NAME_BYTES_MAX: usize = 64;

pub(super) const NAME: ParsedString<String> = ParsedString {
    name: "a name of letters, digits, `.`, `-` or `_`",
    pattern: NAME_PATTERN,
    parse: parse_name,
    format: String::clone,
};

pub(super) const SOCKET_ADDRESS: ParsedString<SocketAddr> = ParsedString {
    name: "an address and a port such as \"127.0.0.1:8080\"",
    pattern: r"([0-9.]+|\[[0-9A-Fa-f:.]+(%[0-9]+)?\]):[0-9]+",
    parse: parse_socket,
    format: |address| address.to_string(),
};

pub(super) const NETWORK: ParsedString<IpNet> = ParsedString {
    name: "a network such as \"10.0.0.0/8\"",
    pattern: r"[0-9A-Fa-f:.]+(/[0-9]+)?",
    parse: parse_network,
    format: |network| network.to_string(),
};

pub(super) const METHOD: ParsedString<Method> = ParsedString {
    name: "a method such as \"GET\"",
    pattern: "[!#$%&'*+.^_`|~0-9A-Z-]+",
    parse: parse_method,
    format: |method| method.to_string(),
};

pub(super) const ENDPOINT: ParsedString<EndpointAddress> = ParsedString {
    name: "a URL such as \"http://127.0.0.1:3000\", \"srv://_http._tcp.shop.example\" or \"kubernetes://shop.default:http\"",
    pattern: r"([Hh][Tt][Tt][Pp][Ss]?|h2c|srv(\+https)?|kubernetes(\+https|\+h2c)?)://[^/?#@ ]+/?",
    parse: parse_endpoint,
    format: ToString::to_string,
};

pub(super) const HASH_KEY: ParsedString<HashKey> = ParsedString {
    name: "\"url\", \"client\", \"header:NAME\" or \"cookie:NAME\"",
    pattern: concat!("url|client|(header|cookie):", token!()),
    parse: parse_hash_key,
    format: format_hash_key,
};

pub(super) const NAME_SERVER: ParsedString<SocketAddr> = ParsedString {
    name: "an IP address, or an address and a port such as \"127.0.0.1:53\"",
    pattern: r"[0-9.]+(:[0-9]+)?|[0-9A-Fa-f:.]+|\[[0-9A-Fa-f:.]+(%[0-9]+)?\]:[0-9]+",
    parse: parse_name_server,
    format: ToString::to_string,
};

/// A single status, or a class of statuses as its first digit.
pub(super) const STATUSES: ParsedString<u16> = ParsedString {
    name: "a status or a class such as \"204\" or \"2xx\"",
    pattern: "[1-5]([0-9][0-9]|xx)",
    parse: parse_statuses,
    format: |status| if *status < 10 { format!("{status}xx") } else { status.to_string() },
};

pub(super) const TARGET: ParsedString<String> = ParsedString {
    name: "a path such as \"/healthz\"",
    pattern: r#"/[!"$-~]*"#,
    parse: parse_target,
    format: String::clone,
};

pub(super) const SERVER_NAME: ParsedString<ServerName<'static>> = ParsedString {
    name: "a host name or an IP address",
    pattern: r"[^/ ]+",
    parse: parse_server_name,
    format: |name| name.to_str().into_owned(),
};

pub(super) const AUTHORITY: ParsedString<String> = ParsedString {
    name: "a host, with or without a port",
    pattern: r"[^/]+",
    parse: parse_authority,
    format: String::clone,
};

pub(super) const QUERY_PATTERN: ParsedString<String> = ParsedString {
    name: "a parameter name or prefix such as \"utm_*\"",
    pattern: r"[^*&=#]+\*?|\*",
    parse: parse_query_pattern,
    format: String::clone,
};

pub(super) const FIELD_NAME: ParsedString<String> =
    ParsedString { name: "a field name", pattern: token!(), parse: parse_field_name, format: String::clone };

pub(super) const FIELD_NAME_OR_EMPTY: ParsedString<String> = ParsedString {
    name: "a field name, or \"\" for none",
    pattern: concat!("(", token!(), ")?"),
    parse: |text| if text.is_empty() { Ok(String::new()) } else { parse_field_name(text) },
    format: String::clone,
};

pub(super) const HOST: ParsedString<HostPattern> = ParsedString {
    name: "\"*\", a host, or \"*.\" and a domain",
    pattern: r"\*|[^/:]+|\[[0-9A-Fa-f:.]+\]",
    parse: parse_host,
    format: format_host,
};

pub(super) const PATH: ParsedString<PathPattern> = ParsedString {
    name: "a path such as \"/orders\", or \"/orders/*\" as a prefix",
    pattern: r#"/[!"$-)+->@-~]*|/([!"$-)+->@-~]*/)?\*"#,
    parse: parse_path,
    format: format_path,
};

pub(super) const PREFIX: ParsedString<String> =
    ParsedString {
        name: "a path such as \"/v1\"",
        pattern: r#"/[!"$-)+->@-~]+"#,
        parse: |text| match parse_path(text)? {
            PathPattern::Exact(path) if path.len() > 1 => Ok(path.trim_end_matches('/').to_owned()),
            _ => Err(ConfigProblem::bad_value(format!("`{text}` is not the beginning of a path"))
                .hint("write it without a `*`")),
        },
        format: String::clone,
    };

/// Reads an array of strings, without their locations.
pub(super) fn list<T>(table: &TableReader<'_>, key: &'static str, item: ParsedString<T>, default: Vec<T>) -> Vec<T> {
    values(table, key, &ArrayOf { item, min_items: 0, repeats: Repeats::Warned }, default)
}

/// Reads an array, without the locations of its items.
pub(super) fn values<K: ValueKind>(
    table: &TableReader<'_>,
    key: &'static str,
    array: &ArrayOf<K>,
    default: Vec<K::Value>,
) -> Vec<K::Value> {
    let default = default.into_iter().map(|value| Located { value, at: table.at.clone() }).collect();
    table.value_or(key, array, default).into_iter().map(|item| item.value).collect()
}

/// Reads an array of statuses and classes, in which each covers responses of its own.
pub(super) fn statuses(
    table: &TableReader<'_>,
    key: &'static str,
    array: &ArrayOf<ParsedString<u16>>,
    default: Vec<u16>,
) -> Vec<u16> {
    let default = default.into_iter().map(|value| Located { value, at: table.at.clone() }).collect();
    let statuses = table.value_or(key, array, default);
    for status in &statuses {
        let class = statuses.iter().find(|class| class.value < 10 && class.value == status.value / 100);
        if let Some(class) = class {
            let message = format!("`{}` has no effect beside `{}xx`", status.value, class.value);
            let problem = ConfigProblem::new(FaultCode::Duplicate, message);
            table.context.warning(&status.at, problem.hint("remove one of the two"));
        }
    }
    statuses.into_iter().map(|status| status.value).collect()
}

/// Reports the names of fields that differ from an earlier one in their case only: they name the
/// same field.
pub(super) fn check_field_names<'n>(
    table: &TableReader<'_>,
    names: impl Iterator<Item = &'n Located<String>>,
    severity: FaultSeverity,
    hint: &str,
) {
    let mut seen: Vec<&str> = Vec::new();
    for name in names {
        match seen.iter().find(|earlier| earlier.eq_ignore_ascii_case(&name.value)) {
            Some(earlier) => {
                let message = format!("`{}` and `{earlier}` name the same field", name.value);
                let problem = ConfigProblem::new(FaultCode::Duplicate, message).hint(hint);
                table.context.report(severity, &name.at, problem);
            }
            None => seen.push(&name.value),
        }
    }
}

pub(super) fn parse_name(text: &str) -> Result<String, ConfigProblem> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(plain) {
        let hint = format!("names are 1 to {NAME_BYTES_MAX} letters, digits, `.`, `-` or `_`");
        return Err(ConfigProblem::bad_value(format!("`{text}` is not a name")).hint(hint));
    }
    Ok(text.to_owned())
}

fn parse_socket(text: &str) -> Result<SocketAddr, ConfigProblem> {
    text.parse().map_err(|_| {
        let hint = "write an IP address and a port: \"127.0.0.1:8080\", \"0.0.0.0:8080\" or \"[::]:8080\"";
        ConfigProblem::bad_value(format!("`{text}` is not an address")).hint(hint)
    })
}

/// Converts an IPv4-mapped network (RFC 4291 section 2.5.5.2) to IPv4, as callers' addresses are.
fn canonical(network: IpNet) -> IpNet {
    match network {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => {
            let v4 = v6.network().to_ipv4_mapped().and_then(|ip| Ipv4Net::new(ip, v6.prefix_len() - 96).ok());
            v4.map_or(network, IpNet::V4)
        }
        _ => network,
    }
}

fn parse_network(text: &str) -> Result<IpNet, ConfigProblem> {
    let address = || text.parse::<IpAddr>().map(IpNet::from).ok();
    text.parse::<IpNet>().ok().or_else(address).map(|network| canonical(network.trunc())).ok_or_else(|| {
        ConfigProblem::bad_value(format!("`{text}` is not a network"))
            .hint("write \"10.0.0.0/8\", \"fd00::/8\" or a single address")
    })
}

fn parse_method(text: &str) -> Result<Method, ConfigProblem> {
    let method = Method::from_bytes(text.as_bytes());
    let method = method.map_err(|_| ConfigProblem::bad_value(format!("`{text}` is not a method")))?;
    if text == "*" {
        let problem = ConfigProblem::bad_value("`*` is the name of a method here, and matches no other");
        return Err(problem.hint("name the methods"));
    }
    // Methods are case-sensitive (RFC 9110 section 9.1): "get" would never match.
    let upper = text.to_ascii_uppercase();
    if upper == text {
        return Ok(method);
    }
    Err(ConfigProblem::bad_value(format!("`{text}` is not in upper case")).hint(format!("write \"{upper}\"")))
}

/// A field name in lower case.
pub(super) fn parse_field_name(text: &str) -> Result<String, ConfigProblem> {
    let name = HeaderName::from_bytes(text.as_bytes());
    name.map(|name| name.as_str().to_owned())
        .map_err(|_| ConfigProblem::bad_value(format!("`{text}` is not a field name")))
}

/// A cookie name is a token like a field name, but case-sensitive (RFC 6265 section 4.1.1).
pub(super) fn parse_cookie_name(text: &str) -> Result<String, ConfigProblem> {
    parse_field_name(text).map_err(|_| ConfigProblem::bad_value(format!("`{text}` is not a cookie name")))?;
    Ok(text.to_owned())
}

fn parse_hash_key(text: &str) -> Result<HashKey, ConfigProblem> {
    match text.split_once(':') {
        None if text == "url" => Ok(HashKey::Url),
        None if text == "client" => Ok(HashKey::Client),
        Some(("header", name)) => parse_field_name(name).map(HashKey::Header),
        Some(("cookie", name)) => parse_cookie_name(name).map(HashKey::Cookie),
        _ => Err(ConfigProblem::bad_value(format!("`{text}` is not a part of a request"))
            .hint(format!("write {}", HASH_KEY.name))),
    }
}

fn format_hash_key(key: &HashKey) -> String {
    match key {
        HashKey::Url => "url".to_owned(),
        HashKey::Client => "client".to_owned(),
        HashKey::Header(name) => format!("header:{name}"),
        HashKey::Cookie(name) => format!("cookie:{name}"),
    }
}

/// The address of a name server; without a port, port 53.
fn parse_name_server(text: &str) -> Result<SocketAddr, ConfigProblem> {
    let ip = || text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
    text.parse().or_else(|_| ip()).map_err(|_| {
        ConfigProblem::bad_value(format!("`{text}` is not an address"))
            .hint("write \"10.0.0.2\", \"10.0.0.2:53\" or \"[fd00::2]:53\"")
    })
}

/// Scheme, host and port of an endpoint. Also parses `--upstream`.
pub(in crate::config) fn parse_endpoint(text: &str) -> Result<EndpointAddress, ConfigProblem> {
    // The text never appears in a message: it may contain a password.
    if let Some(address) = parse_kubernetes_endpoint(text) {
        return address;
    }
    let hint = "write \"http://HOST:PORT\", \"https://HOST:PORT\", \"h2c://HOST:PORT\", \"srv://_SERVICE._tcp.DOMAIN\" for servers in SRV records, with TLS \"srv+https://...\", or \"kubernetes://SERVICE.NAMESPACE:PORT\"";
    let problem = |reason: &str| ConfigProblem::bad_value(format!("not an endpoint: {reason}")).hint(hint);
    let uri: Uri = text.parse().map_err(|_| problem("it is not a URL"))?;
    let scheme = match uri.scheme_str() {
        Some(scheme) => EndpointScheme::ALL.into_iter().find(|known| known.as_str() == scheme),
        None => return Err(problem("it does not start with a scheme")),
    };
    let scheme = scheme.ok_or_else(|| problem("its scheme is not known"))?;
    let authority = uri.authority().ok_or_else(|| problem("it has no host"))?;
    if authority.as_str().contains('@') {
        return Err(problem("it has a user name"));
    }
    if uri.path() != "/" || uri.query().is_some() || text.contains('#') {
        return Err(problem("it has a path"));
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let port = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
    let port = match (port.strip_prefix(':'), scheme.default_port()) {
        (None, default) => default.unwrap_or(0),
        (Some(_), None) => return Err(problem("it has a port, which the records of the service name")),
        (Some(port), Some(_)) => parse_port(port).ok_or_else(|| problem("its port is not 1 to 65535"))?,
    };
    if host.is_empty() {
        return Err(problem("it has no host"));
    }
    let address = EndpointAddress { scheme, host: host.to_ascii_lowercase(), port, port_name: None };
    if scheme.has_tls() && ServerName::try_from(&*address.certificate_name()).is_err() {
        return Err(problem("a certificate cannot name its host"));
    }
    if scheme.is_service() && host.parse::<IpAddr>().is_ok() {
        return Err(problem("an address has no SRV records"));
    }
    Ok(address)
}

/// A service of Kubernetes; `None` if the scheme is another one. Without a namespace, the section
/// `kubernetes` adds that of the pod.
fn parse_kubernetes_endpoint(text: &str) -> Option<Result<EndpointAddress, ConfigProblem>> {
    let (scheme, rest) = text.split_once("://")?;
    let scheme = EndpointScheme::ALL.into_iter().find(|known| known.is_kubernetes() && known.as_str() == scheme)?;
    let problem = |reason: &str| {
        let problem = ConfigProblem::bad_value(format!("not a service of Kubernetes: {reason}"));
        problem.hint("write \"kubernetes://SERVICE.NAMESPACE:PORT\", with TLS \"kubernetes+https://...\", with HTTP/2 in clear text \"kubernetes+h2c://...\"; PORT is a name, or the number of the pods' port")
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port)));
    let host = host.to_ascii_lowercase();
    // Names of services and namespaces are labels of DNS (RFC 1123 section 2.1).
    let is_label = |label: &str| {
        let is_valid = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(is_valid)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let labels: Vec<&str> = host.split('.').collect();
    if labels.len() > 2 {
        return Some(Err(problem("it has more than a service and a namespace")));
    }
    if !labels.iter().all(|label| is_label(label)) {
        return Some(Err(problem("a name has letters, digits and `-` only")));
    }
    let (port, port_name) = match port {
        None => (0, None),
        Some(text) if !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit()) => match parse_port(text) {
            Some(port) => (port, None),
            None => return Some(Err(problem("its port is not 1 to 65535"))),
        },
        Some(text) if is_label(text) => (0, Some(text.into())),
        Some(_) => return Some(Err(problem("its port is neither a name nor a number"))),
    };
    Some(Ok(EndpointAddress { scheme, host, port, port_name }))
}

/// 1 to 65535, without a sign.
pub(super) fn parse_port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port > 0 && !text.starts_with('+'))
}

fn parse_statuses(text: &str) -> Result<u16, ConfigProblem> {
    // `parse` alone would accept `+200` and `0200`.
    let has_digits = text.len() == 3 && text.bytes().next().is_some_and(|first| first.is_ascii_digit());
    let class = text.strip_suffix("xx").and_then(|class| class.parse().ok()).filter(|class| (1..=5).contains(class));
    let status = || text.parse().ok().filter(|status| (100..=599).contains(status));
    class.or_else(status).filter(|_| has_digits).ok_or_else(|| {
        ConfigProblem::bad_value(format!("`{text}` is not a status")).hint("write \"200\", or \"2xx\" for a class")
    })
}

/// Path and query of a request.
fn parse_target(text: &str) -> Result<String, ConfigProblem> {
    let is_valid = text.starts_with('/') && text.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
    if is_valid { Ok(text.to_owned()) } else { Err(ConfigProblem::bad_value(format!("`{text}` is not a path"))) }
}

fn parse_server_name(text: &str) -> Result<ServerName<'static>, ConfigProblem> {
    ServerName::try_from(text.to_owned())
        .map_err(|_| ConfigProblem::bad_value(format!("`{text}` is not a name of a certificate")))
}

fn parse_authority(text: &str) -> Result<String, ConfigProblem> {
    authority::normal_of_unicode(text)
        .filter(|host| !host.is_empty())
        .map(|host| host.to_string())
        .ok_or_else(|| ConfigProblem::bad_value(format!("`{text}` is not a host")))
}

fn parse_query_pattern(text: &str) -> Result<String, ConfigProblem> {
    let name = text.strip_suffix('*').unwrap_or(text);
    if text.is_empty() || name.contains(['*', '&', '=', '#']) {
        return Err(ConfigProblem::bad_value(format!("`{text}` is not a parameter pattern"))
            .hint("write a name, or a prefix and `*`: \"utm_*\""));
    }
    Ok(text.to_owned())
}

fn parse_host(text: &str) -> Result<HostPattern, ConfigProblem> {
    if text == "*" {
        return Ok(HostPattern::Any);
    }
    let (suffix, name) = match text.strip_prefix('*') {
        Some(rest) => (true, rest.strip_prefix('.').unwrap_or_default()),
        None => (false, text),
    };
    // Requests have the host in its normal form, without a port.
    let normal = authority::normal_of_unicode(name).filter(|_| !name.contains(':') || name.ends_with(']'));
    let name = normal.as_deref().unwrap_or_default();
    let label =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let address = address.is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
    if !(name.split('.').all(label) || address && !suffix) {
        let hint = "write \"*\", \"shop.example\" or \"*.shop.example\", without scheme and port";
        return Err(ConfigProblem::bad_value(format!("`{text}` is not a host")).hint(hint));
    }
    Ok(if suffix { HostPattern::Suffix(format!(".{name}")) } else { HostPattern::Exact(name.to_owned()) })
}

fn format_host(host: &HostPattern) -> String {
    match host {
        HostPattern::Any => "*".to_owned(),
        HostPattern::Exact(host) => host.clone(),
        HostPattern::Suffix(suffix) => format!("*{suffix}"),
    }
}

fn parse_path(text: &str) -> Result<PathPattern, ConfigProblem> {
    let problem = |reason: &str| ConfigProblem::bad_value(format!("`{text}` {reason}"));
    if !text.starts_with('/') {
        return Err(problem("does not start with `/`").hint(format!("write \"/{text}\"")));
    }
    let literal = text.strip_suffix('*').unwrap_or(text);
    if literal.contains('*') {
        return Err(problem("has a `*` that is not at its end"));
    }
    if literal.len() < text.len() && !literal.ends_with('/') {
        return Err(problem("has a `*` that does not follow a `/`").hint(format!("write \"{literal}/*\"")));
    }
    if !literal.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#')) {
        return Err(
            problem("has a character that is not allowed in a path").hint("percent-encode the path, without a query")
        );
    }
    let literal = literal.to_owned();
    Ok(if text.ends_with('*') { PathPattern::Prefix(literal) } else { PathPattern::Exact(literal) })
}

fn format_path(path: &PathPattern) -> String {
    match path {
        PathPattern::Exact(path) => path.clone(),
        PathPattern::Prefix(path) => format!("{path}*"),
    }
}

pub(super) const REGION: ParsedString<shard::Region> = ParsedString {
    name: "a region name: 1 to 32 of a-z, 0-9, `-` and `_`",
    pattern: REGION_PATTERN,
    parse: parse_region,
    format: |region| region.to_string(),
};

fn parse_region(text: &str) -> Result<shard::Region, ConfigProblem> {
    text.parse().map_err(|error: shard::InvalidRegion| ConfigProblem::bad_value(format!("`{text}`: {error}")))
}
