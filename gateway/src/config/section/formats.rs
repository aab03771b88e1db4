//! String formats shared by sections: names, addresses, patterns, fields.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderName, Method, Uri};
use ipnet::{IpNet, Ipv4Net};

use super::super::fault::ConfigProblem;
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{ArrayOf, ParsedString};
use crate::endpoint;
use crate::http::authority;
use crate::route::{HostPattern, PathPattern};

/// Names appear in logs, metrics and header fields: they are short and need no quoting.
const NAME_BYTES_MAX: usize = 64;

pub(super) const NAME: ParsedString<String> =
    ParsedString { name: "a name of letters, digits, `.`, `-` or `_`", parse: parse_name, format: String::clone };

pub(super) const SOCKET_ADDRESS: ParsedString<SocketAddr> = ParsedString {
    name: "an address and a port such as \"127.0.0.1:8080\"",
    parse: parse_socket,
    format: |address| address.to_string(),
};

pub(super) const NETWORK: ParsedString<IpNet> = ParsedString {
    name: "a network such as \"10.0.0.0/8\"",
    parse: parse_network,
    format: |network| network.to_string(),
};

pub(super) const METHOD: ParsedString<Method> =
    ParsedString { name: "a method such as \"GET\"", parse: parse_method, format: |method| method.to_string() };

pub(super) const ENDPOINT: ParsedString<endpoint::EndpointAddress> = ParsedString {
    name: "a URL such as \"http://127.0.0.1:3000\"",
    parse: parse_endpoint,
    format: |address| format!("http://{address}"),
};

pub(super) const QUERY_PATTERN: ParsedString<String> = ParsedString {
    name: "a parameter name or prefix such as \"utm_*\"",
    parse: parse_query_pattern,
    format: String::clone,
};

pub(super) const FIELD_NAME: ParsedString<String> =
    ParsedString { name: "a field name", parse: parse_field_name, format: String::clone };

pub(super) const FIELD_NAME_OR_EMPTY: ParsedString<String> = ParsedString {
    name: "a field name, or \"\" for none",
    parse: |text| if text.is_empty() { Ok(String::new()) } else { parse_field_name(text) },
    format: String::clone,
};

pub(super) const HOST: ParsedString<HostPattern> =
    ParsedString { name: "\"*\", a host, or \"*.\" and a domain", parse: parse_host, format: format_host };

pub(super) const PATH: ParsedString<PathPattern> = ParsedString {
    name: "a path such as \"/orders\", or \"/orders/*\" as a prefix",
    parse: parse_path,
    format: format_path,
};

pub(super) const PREFIX: ParsedString<String> =
    ParsedString {
        name: "a path such as \"/v1\"",
        parse: |text| match parse_path(text)? {
            PathPattern::Exact(path) if path.len() > 1 => Ok(path.trim_end_matches('/').to_owned()),
            _ => Err(ConfigProblem::bad_value(format!("`{text}` is not the beginning of a path"))
                .hint("write it without a `*`")),
        },
        format: String::clone,
    };

/// Reads an array of strings, without their locations.
pub(super) fn list<T>(table: &TableReader<'_>, key: &'static str, item: ParsedString<T>, default: Vec<T>) -> Vec<T> {
    let default = default.into_iter().map(|value| Located { value, at: table.at.clone() }).collect();
    let items = table.value_or(key, &ArrayOf { item, min_items: 0 }, default);
    items.into_iter().map(|item| item.value).collect()
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

/// Host and port of an endpoint. Also parses `--upstream`.
pub(in crate::config) fn parse_endpoint(text: &str) -> Result<endpoint::EndpointAddress, ConfigProblem> {
    // The text never appears in a message: it may contain a password.
    let problem = |reason: &str| {
        ConfigProblem::bad_value(format!("not an endpoint: {reason}")).hint("write \"http://HOST:PORT\"")
    };
    let uri: Uri = text.parse().map_err(|_| problem("it is not a URL"))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => {
            return Err(ConfigProblem::unavailable("an endpoint with https://").hint("write \"http://HOST:PORT\""));
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
    Ok(endpoint::EndpointAddress { host: host.to_ascii_lowercase(), port })
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
    parse: parse_region,
    format: |region| region.to_string(),
};

fn parse_region(text: &str) -> Result<shard::Region, ConfigProblem> {
    text.parse().map_err(|error: shard::InvalidRegion| ConfigProblem::bad_value(format!("`{text}`: {error}")))
}
