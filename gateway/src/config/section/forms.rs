//! Forms of text that sections share: names, addresses, patterns, fields.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderName, Method, Uri};
use ipnet::{IpNet, Ipv4Net};

use super::super::fault::Problem;
use super::super::kind::{ListOf, Parsed};
use super::super::reading::Placed;
use super::super::table::Table;
use crate::endpoint;
use crate::route::{HostPattern, PathPattern};

/// Names go into logs, metrics and header fields: they are short and need no quoting anywhere.
const NAME_BYTES_MAX: usize = 64;

pub(super) const NAME: Parsed<String> =
    Parsed { name: "a name of letters, digits, `.`, `-` or `_`", parse: name, show: String::clone };

pub(super) const SOCKET: Parsed<SocketAddr> = Parsed {
    name: "an address and a port such as \"127.0.0.1:8080\"",
    parse: socket,
    show: |address| address.to_string(),
};

pub(super) const NETWORK: Parsed<IpNet> =
    Parsed { name: "a network such as \"10.0.0.0/8\"", parse: network, show: |network| network.to_string() };

pub(super) const METHOD: Parsed<Method> =
    Parsed { name: "a method such as \"GET\"", parse: method, show: |method| method.to_string() };

pub(super) const ENDPOINT: Parsed<endpoint::Address> = Parsed {
    name: "a URL such as \"http://127.0.0.1:3000\"",
    parse: endpoint,
    show: |address| format!("http://{address}"),
};

pub(super) const QUERY_PATTERN: Parsed<String> =
    Parsed { name: "a parameter's name, or its start and a `*`", parse: query_pattern, show: String::clone };

pub(super) const FIELD: Parsed<String> = Parsed { name: "a field name", parse: field, show: String::clone };

pub(super) const FIELD_OR_NONE: Parsed<String> = Parsed {
    name: "a field name, or \"\" for none",
    parse: |text| if text.is_empty() { Ok(String::new()) } else { field(text) },
    show: String::clone,
};

pub(super) const HOST: Parsed<HostPattern> =
    Parsed { name: "\"*\", a host, or \"*.\" and a domain", parse: host, show: show_host };

pub(super) const PATH: Parsed<PathPattern> =
    Parsed { name: "a path such as \"/orders\", or \"/orders/*\" for all below it", parse: path, show: show_path };

/// A list of texts without their places.
pub(super) fn list<T>(table: &Table<'_>, key: &'static str, item: Parsed<T>, default: Vec<T>) -> Vec<T> {
    let default = default.into_iter().map(|value| Placed { value, at: table.at.clone() }).collect();
    let items = table.or(key, &ListOf { item, least: 0 }, default);
    items.into_iter().map(|item| item.value).collect()
}

pub(super) fn name(text: &str) -> Result<String, Problem> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(plain) {
        let hint = format!("names are 1 to {NAME_BYTES_MAX} letters, digits, `.`, `-` or `_`");
        return Err(Problem::bad(format!("`{text}` is not a name")).hint(hint));
    }
    Ok(text.to_owned())
}

fn socket(text: &str) -> Result<SocketAddr, Problem> {
    text.parse().map_err(|_| {
        let hint = "write an IP address and a port: \"127.0.0.1:8080\", \"0.0.0.0:8080\" or \"[::]:8080\"";
        Problem::bad(format!("`{text}` is not an address")).hint(hint)
    })
}

/// Callers' addresses are never IPv4 within IPv6 (RFC 4291 section 2.5.5.2).
fn canonical(network: IpNet) -> IpNet {
    match network {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => {
            let v4 = v6.network().to_ipv4_mapped().and_then(|ip| Ipv4Net::new(ip, v6.prefix_len() - 96).ok());
            v4.map_or(network, IpNet::V4)
        }
        _ => network,
    }
}

fn network(text: &str) -> Result<IpNet, Problem> {
    let address = || text.parse::<IpAddr>().map(IpNet::from).ok();
    text.parse::<IpNet>().ok().or_else(address).map(|network| canonical(network.trunc())).ok_or_else(|| {
        Problem::bad(format!("`{text}` is not a network")).hint("write \"10.0.0.0/8\", \"fd00::/8\" or one address")
    })
}

fn method(text: &str) -> Result<Method, Problem> {
    let method = Method::from_bytes(text.as_bytes());
    let method = method.map_err(|_| Problem::bad(format!("`{text}` is not a method")))?;
    // Methods are case-sensitive (RFC 9110 section 9.1): "get" would match nothing, ever.
    let upper = text.to_ascii_uppercase();
    if upper == text {
        return Ok(method);
    }
    Err(Problem::bad(format!("`{text}` is not in upper case")).hint(format!("write \"{upper}\"")))
}

/// A field's name in lower case.
pub(super) fn field(text: &str) -> Result<String, Problem> {
    let name = HeaderName::from_bytes(text.as_bytes());
    name.map(|name| name.as_str().to_owned()).map_err(|_| Problem::bad(format!("`{text}` is not a field's name")))
}

/// A cookie's name is a token, as a field's name is, but its case counts (RFC 6265 section 4.1.1).
pub(super) fn cookie(text: &str) -> Result<String, Problem> {
    field(text).map_err(|_| Problem::bad(format!("`{text}` is not a cookie's name")))?;
    Ok(text.to_owned())
}

/// Host and port of an upstream's endpoint. Used for `--upstream` as well.
pub(in crate::config) fn endpoint(text: &str) -> Result<endpoint::Address, Problem> {
    // The text is not repeated: it may hold a password.
    let problem = |reason: &str| Problem::bad(format!("not an endpoint: {reason}")).hint("write \"http://HOST:PORT\"");
    let uri: Uri = text.parse().map_err(|_| problem("it is not a URL"))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => {
            return Err(Problem::unavailable("an endpoint with https://").hint("write \"http://HOST:PORT\""));
        }
        Some(_) => return Err(problem("its scheme is not http")),
        None => return Err(problem("it does not start with http://")),
    }
    let authority = uri.authority().ok_or_else(|| problem("it has no host"))?;
    if authority.as_str().contains('@') {
        return Err(problem("it has a user name"));
    }
    if uri.path() != "/" || uri.query().is_some() || text.contains('#') {
        return Err(problem("it has a path"));
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let port = match authority.as_str().strip_prefix(authority.host()).unwrap_or_default() {
        "" => 80,
        port => port[1..].parse().ok().filter(|port| *port > 0).ok_or_else(|| problem("its port is not 1 to 65535"))?,
    };
    if host.is_empty() {
        return Err(problem("it has no host"));
    }
    Ok(endpoint::Address { host: host.to_ascii_lowercase(), port })
}

fn query_pattern(text: &str) -> Result<String, Problem> {
    let name = text.strip_suffix('*').unwrap_or(text);
    if text.is_empty() || name.contains(['*', '&', '=', '#']) {
        return Err(
            Problem::bad(format!("`{text}` is not a pattern")).hint("write a name, or its start and a `*`: \"utm_*\"")
        );
    }
    Ok(text.to_owned())
}

fn host(text: &str) -> Result<HostPattern, Problem> {
    if text == "*" {
        return Ok(HostPattern::Any);
    }
    let lower = text.to_ascii_lowercase();
    let (suffix, name) = match lower.strip_prefix('*') {
        Some(rest) => (true, rest.strip_prefix('.').unwrap_or_default()),
        None => (false, lower.as_str()),
    };
    let label =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let address = address.is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
    if !(name.split('.').all(label) || address && !suffix) {
        let hint = "write \"*\", \"shop.example\" or \"*.shop.example\", without scheme and port";
        return Err(Problem::bad(format!("`{text}` is not a host")).hint(hint));
    }
    Ok(if suffix { HostPattern::Suffix(format!(".{name}")) } else { HostPattern::Exact(lower) })
}

fn show_host(host: &HostPattern) -> String {
    match host {
        HostPattern::Any => "*".to_owned(),
        HostPattern::Exact(host) => host.clone(),
        HostPattern::Suffix(suffix) => format!("*{suffix}"),
    }
}

fn path(text: &str) -> Result<PathPattern, Problem> {
    let problem = |reason: &str| Problem::bad(format!("`{text}` {reason}"));
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
        return Err(problem("has a character that no path holds").hint("a path has no query and is percent-encoded"));
    }
    if literal.split('/').any(|segment| matches!(segment, "." | "..")) {
        return Err(problem("has a dot segment"));
    }
    let literal = literal.to_owned();
    Ok(if text.ends_with('*') { PathPattern::Prefix(literal) } else { PathPattern::Exact(literal) })
}

fn show_path(path: &PathPattern) -> String {
    match path {
        PathPattern::Exact(path) => path.clone(),
        PathPattern::Prefix(path) => format!("{path}*"),
    }
}
