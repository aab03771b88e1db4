//! The normal form of an authority, `uri-host [":" port]` (RFC 3986 section 3.2): lower case, no
//! dot at the end of the host, no empty port, the shortest form of an IPv6 address.
//!
//! User information, percent-encoding and letters beyond ASCII are refused: clients write
//! internationalised names in their ASCII form (RFC 5890).

use std::fmt::Write as _;
use std::net::Ipv6Addr;

/// An authority in its parts.
#[derive(Clone, Copy, Debug)]
struct Authority<'a> {
    host: Host<'a>,
    port: Option<u16>,
}

#[derive(Clone, Copy, Debug)]
enum Host<'a> {
    /// Without the dot at its end.
    Name(&'a str),
    V6(Ipv6Addr),
}

/// Whether `text` is an authority.
pub(crate) fn is_authority(text: &str) -> bool {
    parse(text).is_some()
}

/// Appends the normal form of `text` to `out`; returns false if `text` is not an authority.
pub(crate) fn write_normal(text: &str, out: &mut String) -> bool {
    let Some(Authority { host, port }) = parse(text) else { return false };
    match host {
        Host::Name(name) => {
            let start = out.len();
            out.push_str(name);
            out[start..].make_ascii_lowercase();
        }
        Host::V6(address) => write!(out, "[{address}]").expect("writing to a string does not fail"),
    }
    if let Some(port) = port {
        write!(out, ":{port}").expect("writing to a string does not fail");
    }
    true
}

/// The normal form of an authority that an operator has written: a name beyond ASCII is converted
/// to its ASCII form.
pub(crate) fn normal_of_unicode(text: &str) -> Option<String> {
    let mut normal = String::new();
    if text.is_ascii() {
        return write_normal(text, &mut normal).then_some(normal);
    }
    let (name, port) = text.rsplit_once(':').map_or((text, ""), |(name, port)| (name, port));
    let name = ascii_name(name)?;
    write_normal(&format!("{name}:{port}"), &mut normal).then_some(normal)
}

/// The ASCII form of a name with letters beyond ASCII (RFC 5891 section 5), in lower case.
pub(crate) fn ascii_name(name: &str) -> Option<String> {
    match url::Host::parse(name).ok()? {
        url::Host::Domain(name) => Some(name),
        url::Host::Ipv4(_) | url::Host::Ipv6(_) => None,
    }
}

fn parse(text: &str) -> Option<Authority<'_>> {
    if let Some(rest) = text.strip_prefix('[') {
        let (address, after) = rest.split_once(']')?;
        return Some(Authority { host: Host::V6(address.parse().ok()?), port: parse_port(after)? });
    }
    let (name, after) = text.split_at(memchr::memchr(b':', text.as_bytes()).unwrap_or(text.len()));
    let name = name.strip_suffix('.').unwrap_or(name);
    let mut previous = b'.';
    for byte in name.bytes() {
        let is_empty_label = byte == b'.' && previous == b'.';
        if is_empty_label || !(byte.is_ascii_alphanumeric() || is_host_mark(byte)) {
            return None;
        }
        previous = byte;
    }
    (previous != b'.').then_some(Authority { host: Host::Name(name), port: parse_port(after)? })
}

/// The port in `text`, which is empty or begins with a colon. An empty port is the default port
/// (RFC 3986 section 3.2.3).
fn parse_port(text: &str) -> Option<Option<u16>> {
    match text.strip_prefix(':') {
        None => text.is_empty().then_some(None),
        Some("") => Some(None),
        Some(digits) if digits.len() <= 5 && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            digits.parse().ok().map(Some)
        }
        Some(_) => None,
    }
}

/// The unreserved characters and sub-delimiters other than letters and digits (RFC 3986 section 2).
fn is_host_mark(byte: u8) -> bool {
    matches!(
        byte,
        b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'='
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(text: &str) -> Option<String> {
        let mut out = String::new();
        write_normal(text, &mut out).then_some(out)
    }

    #[test]
    fn equivalent_authorities_have_one_normal_form() {
        for (text, expected) in [
            ("a", "a"),
            ("A.Example", "a.example"),
            ("a.example.", "a.example"),
            ("a.example.:80", "a.example:80"),
            ("a:", "a"),
            ("a.:", "a"),
            ("a:080", "a:80"),
            ("a:0", "a:0"),
            ("127.0.0.1.", "127.0.0.1"),
            ("[::1]", "[::1]"),
            ("[0:0:0:0:0:0:0:1]:", "[::1]"),
            ("[2001:DB8::A]:8080", "[2001:db8::a]:8080"),
            ("XN--bcher-KVA.example", "xn--bcher-kva.example"),
        ] {
            assert_eq!(normal(text).as_deref(), Some(expected), "{text}");
            assert_eq!(normal(expected).as_deref(), Some(expected), "{expected} is normal");
        }
    }

    #[test]
    fn malformed_authorities_are_refused() {
        let malformed = [
            "",
            ".",
            "..",
            ".a",
            "a..",
            "a..b",
            ":",
            ":80",
            "a:x",
            "a:+1",
            "a:65536",
            "a:123456",
            "a:80:80",
            "u@a",
            "a b",
            "a/",
            "a%62",
            "\u{e4}",
            "::1",
            "[::1",
            "[::1]a",
            "[::1%25eth0]",
            "[127.0.0.1]",
            "[]",
            "[::1]:x",
        ];
        for text in malformed {
            assert_eq!(normal(text), None, "{text}");
        }
    }

    #[test]
    fn operators_may_write_names_beyond_ascii() {
        assert_eq!(normal_of_unicode("B\u{fc}cher.example:8080").as_deref(), Some("xn--bcher-kva.example:8080"));
        assert_eq!(normal_of_unicode("b\u{fc}cher.example.").as_deref(), Some("xn--bcher-kva.example"));
        assert_eq!(normal_of_unicode("A.example.").as_deref(), Some("a.example"));
        for text in ["b\u{fc}cher example", "\u{fc}@a", "u@b\u{fc}cher.example", ""] {
            assert_eq!(normal_of_unicode(text), None, "{text}");
        }
    }
}
