//! Turns the bytes of a request head into a `Request`, or into the reason why it is refused.

use http::Method;

use super::framing::{self, BadFraming};
use crate::http::fields::{Known, is_token};
use crate::http::limits::Limits;
use crate::http::message::{Length, Request, StatusCode, Version, Wishes};

/// Most fields that any configuration may allow; the parser's table lives on the stack.
const FIELDS_MAX: usize = 256;

macro_rules! refusals {
    ($($variant:ident = $status:literal $reason:literal),+ $(,)?) => {
        /// Why a request is refused before it is looked at. After every refusal the connection closes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Refusal { $($variant),+ }

        impl Refusal {
            pub const ALL: &[Refusal] = &[$(Refusal::$variant),+];

            /// The status that the client gets.
            pub fn status(self) -> StatusCode {
                let code: u16 = match self { $(Refusal::$variant => $status),+ };
                StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_REQUEST)
            }

            /// A short fixed reason, also the metric's label.
            pub fn reason(self) -> &'static str {
                match self { $(Refusal::$variant => $reason),+ }
            }
        }
    };
}

refusals! {
    BareLf = 400 "bare_lf",
    RequestLine = 400 "request_line",
    Target = 400 "target",
    FieldSyntax = 400 "field_syntax",
    NoHost = 400 "no_host",
    RepeatedHost = 400 "repeated_host",
    BadHost = 400 "bad_host",
    HostMismatch = 400 "host_mismatch",
    BadLength = 400 "bad_length",
    RepeatedLength = 400 "repeated_length",
    LengthAndCoding = 400 "length_and_coding",
    RepeatedCoding = 400 "repeated_coding",
    CodingInHttp10 = 400 "coding_in_http10",
    BodySyntax = 400 "body_syntax",
    BodyOfGet = 400 "body_of_get",
    Method = 405 "method",
    HeadTimeout = 408 "head_timeout",
    BodyTimeout = 408 "body_timeout",
    BodyTooLarge = 413 "body_too_large",
    TargetTooLong = 414 "target_too_long",
    Expectation = 417 "expectation",
    HeadTooLarge = 431 "head_too_large",
    TooManyFields = 431 "too_many_fields",
    UnknownCoding = 501 "unknown_coding",
    MethodTooLong = 501 "method_too_long",
    Version = 505 "version",
}

/// Letters of a method; the longest registered one has 17 (RFC 9110 section 16.1).
pub(super) const METHOD_MAX: usize = 32;

/// Letters before the first space of a request line, or of what has arrived of it where that may be a method.
pub(super) fn method_length(line: &[u8]) -> usize {
    line.iter().position(|byte| *byte == b' ').unwrap_or(0)
}

/// Parses a whole head (its empty line included) into `request`, which is cleared first. What is refused may leave the last one's
/// authority there.
pub(super) fn parse(head: &[u8], limits: &Limits, request: &mut Request) -> Result<(), Refusal> {
    // Of the last request on this connection; most often this one's is the same, and need not be looked at again.
    let authority = std::mem::take(&mut request.authority);
    request.clear();
    request.authority = authority;
    let parsed = parse_lines(head, limits, request).and_then(|(version, target)| {
        request.version = version;
        let authority = parse_target(target, request)?;
        judge(authority, limits, request)
    });
    // Nothing that was refused can be repeated.
    parsed.inspect_err(|_| request.fields.clear())
}

/// Parses a head at the front of `bytes` that differs from the last one of `request` in its target alone, if at all, as those of a
/// program do that asks a server for one thing after the other: its lines were found and judged by themselves. Returns its length;
/// `None` where it is no such head, or not all here. Then it is for [`parse`], and at most the fields are again as they were read.
pub(super) fn parse_repeated(bytes: &[u8], limits: &Limits, request: &mut Request) -> Option<Result<usize, Refusal>> {
    const VERSION: &[u8] = b" HTTP/1.1\r\n";
    let line = bytes.strip_prefix(request.method.as_str().as_bytes())?.strip_prefix(b" ")?;
    let same = line.strip_prefix(request.target.as_bytes()).and_then(|rest| rest.strip_prefix(VERSION));
    let (target, rest) = match same {
        Some(rest) => (None, rest),
        None => {
            let (target, rest) = line.split_at(line.iter().position(|byte| !IN_TARGET[usize::from(*byte)])?);
            (Some(std::str::from_utf8(target).ok()?), rest.strip_prefix(VERSION)?)
        }
    };
    let path = target.unwrap_or(&request.target);
    if !path.starts_with('/') || path.len() > limits.uri_bytes {
        return None;
    }
    let length = bytes.len() - rest.len() + request.fields.repeat(rest)?;
    if length > limits.header_bytes || request.fields.len() > limits.header_fields {
        return None;
    }
    request.interim.clear();
    request.repeats = target.is_none() && request.version == Version::Http11;
    if request.repeats {
        // And was judged already.
        return Some(Ok(length));
    }
    if let Some(target) = target {
        request.set_target(target);
    }
    request.version = Version::Http11;
    let judged = judge(None, limits, request).inspect_err(|_| request.fields.clear());
    Some(judged.map(|()| length))
}

/// What target and lines mean together: host, body and connection. `authority` is that of the target.
fn judge(authority: Option<&str>, limits: &Limits, request: &mut Request) -> Result<(), Refusal> {
    let is_http10 = request.version == Version::Http10;
    set_authority(authority, request)?;
    set_length(limits, request)?;
    request.wishes = Wishes {
        keep_alive: keeps_alive(request, is_http10),
        expects_continue: expects_continue(request)? && !is_http10 && request.length != Length::Empty,
    };
    Ok(())
}

/// Tokenises the head; returns version and target.
fn parse_lines<'a>(head: &'a [u8], limits: &Limits, request: &mut Request) -> Result<(Version, &'a str), Refusal> {
    let line_end = memchr::memchr(b'\r', head).ok_or(Refusal::RequestLine)?;
    check_request_line(&head[..line_end], limits)?;
    let mut lines = [const { std::mem::MaybeUninit::uninit() }; FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut []);
    match httparse::ParserConfig::default().parse_request_with_uninit_headers(&mut parsed, head, &mut lines) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(Refusal::FieldSyntax),
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::TooManyFields),
        Err(httparse::Error::Token | httparse::Error::NewLine) => return Err(Refusal::RequestLine),
        Err(httparse::Error::Version) => return Err(Refusal::Version),
        Err(_) => return Err(Refusal::FieldSyntax),
    }
    if parsed.headers.len() > limits.header_fields {
        return Err(Refusal::TooManyFields);
    }
    let lines = parsed.headers.iter().map(|line| (line.name.as_bytes(), line.value.trim_ascii()));
    request.fields.adopt(&head[line_end + 2..], lines);
    let method = parsed.method.unwrap_or_default();
    request.method = Method::from_bytes(method.as_bytes()).map_err(|_| Refusal::RequestLine)?;
    if request.method == Method::CONNECT || request.method == Method::TRACE {
        return Err(Refusal::Method);
    }
    let version = if parsed.version == Some(0) { Version::Http10 } else { Version::Http11 };
    Ok((version, parsed.path.unwrap_or_default()))
}

/// `method SP target SP version`, one space each; a well-formed version that we do not speak is 505.
fn check_request_line(line: &[u8], limits: &Limits) -> Result<(), Refusal> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Refusal::RequestLine);
    };
    if !is_token(method) || target.is_empty() {
        return Err(Refusal::RequestLine);
    }
    if method.len() > METHOD_MAX {
        return Err(Refusal::MethodTooLong);
    }
    if target.len() > limits.uri_bytes {
        return Err(Refusal::TargetTooLong);
    }
    match version {
        b"HTTP/1.1" | b"HTTP/1.0" => Ok(()),
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            Err(Refusal::Version)
        }
        _ => Err(Refusal::RequestLine),
    }
}

/// What a target may hold. Fragments are never sent, and four more are in no URI (RFC 3986 appendix A); other doubtful ones are too
/// common to refuse.
const IN_TARGET: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = b'!';
    while byte <= b'~' {
        table[byte as usize] = !matches!(byte, b'#' | b'"' | b'<' | b'>' | b'`');
        byte += 1;
    }
    table
};

/// Sets scheme and target; returns the authority of an absolute-form target (RFC 9112 section 3.2).
fn parse_target<'a>(target: &'a str, request: &mut Request) -> Result<Option<&'a str>, Refusal> {
    if !target.bytes().all(|byte| IN_TARGET[usize::from(byte)]) {
        return Err(Refusal::Target);
    }
    if target.starts_with('/') {
        request.set_target(target);
        return Ok(None);
    }
    if target == "*" {
        request.set_target("*");
        return if request.method == Method::OPTIONS { Ok(None) } else { Err(Refusal::Target) };
    }
    let Some((scheme, rest)) = target.split_once("://") else {
        // authority-form belongs to CONNECT, which is refused already.
        return Err(Refusal::Target);
    };
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return Err(Refusal::Target);
    }
    let path_at = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(path_at);
    if path.starts_with('/') {
        request.set_target(path);
    } else if path.is_empty() && request.method == Method::OPTIONS {
        // RFC 9112 section 3.2.4.
        request.set_target("*");
    } else {
        request.target.push('/');
        request.target.push_str(path);
        request.path_len = 1;
    }
    Ok(Some(authority))
}

/// Exactly one valid `Host`, which an absolute target must agree with (RFC 9112 section 3.2).
fn set_authority(from_target: Option<&str>, request: &mut Request) -> Result<(), Refusal> {
    let mut hosts = request.fields.all(Known::Host);
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Refusal::RepeatedHost);
    }
    let host = match host {
        // An authority is valid, or empty.
        Some(host) if from_target.is_none() && host == request.authority.as_bytes() && !host.is_empty() => {
            return Ok(());
        }
        Some(host) => {
            let host = std::str::from_utf8(host).map_err(|_| Refusal::BadHost)?;
            if !is_authority(host) {
                return Err(Refusal::BadHost);
            }
            host
        }
        None if request.version == Version::Http10 => from_target.unwrap_or_default(),
        None => return Err(Refusal::NoHost),
    };
    if let Some(authority) = from_target {
        if !is_authority(authority) {
            return Err(Refusal::Target);
        }
        if !authority.eq_ignore_ascii_case(host) {
            return Err(Refusal::HostMismatch);
        }
    }
    let mut authority = std::mem::take(&mut request.authority);
    authority.clear();
    authority.push_str(host);
    authority.make_ascii_lowercase();
    request.authority = authority;
    Ok(())
}

/// A `uri-host [":" port]` without userinfo (RFC 3986 section 3.2); percent-encoding is refused, names have no need of it.
pub(crate) fn is_authority(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, after)) = rest.split_once(']') else { return false };
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            match after.strip_prefix(':') {
                Some(port) => ("v6", Some(port)),
                None if after.is_empty() => ("v6", None),
                None => return false,
            }
        }
        None => match memchr::memchr(b':', text.as_bytes()) {
            Some(colon) => (&text[..colon], Some(&text[colon + 1..])),
            None => (text, None),
        },
    };
    let host_is_valid = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || is_mark(b));
    let port_is_valid = port
        .is_none_or(|port| port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok());
    host_is_valid && port_is_valid
}

/// The unreserved and sub-delimiters that are no letters or digits (RFC 3986 section 2).
fn is_mark(byte: u8) -> bool {
    matches!(
        byte,
        b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'='
    )
}

fn set_length(limits: &Limits, request: &mut Request) -> Result<(), Refusal> {
    let announced =
        framing::announced(&request.fields, request.version == Version::Http10).map_err(|bad| match bad {
            BadFraming::BadLength => Refusal::BadLength,
            BadFraming::RepeatedLength => Refusal::RepeatedLength,
            BadFraming::LengthAndCoding => Refusal::LengthAndCoding,
            BadFraming::RepeatedCoding => Refusal::RepeatedCoding,
            BadFraming::CodingInHttp10 => Refusal::CodingInHttp10,
            BadFraming::UnknownCoding => Refusal::UnknownCoding,
        })?;
    request.length = match announced {
        Some(Length::Known(length)) if length > limits.body_bytes => return Err(Refusal::BodyTooLarge),
        Some(Length::Known(0)) if !matches!(request.method, Method::POST | Method::PUT | Method::PATCH) => {
            Length::Empty
        }
        Some(length) => length,
        None => Length::Empty,
    };
    if limits.refuses_body(&request.method, request.length) {
        return Err(Refusal::BodyOfGet);
    }
    Ok(())
}

/// Persistence by version and `Connection` (RFC 9112 section 9.3).
fn keeps_alive(request: &Request, is_http10: bool) -> bool {
    if !request.fields.has(Known::Connection) {
        return !is_http10;
    }
    let says =
        |option: &[u8]| request.fields.members(Known::Connection).any(|member| member.eq_ignore_ascii_case(option));
    if is_http10 { says(b"keep-alive") && !says(b"close") } else { !says(b"close") }
}

/// Only `100-continue` is an expectation that anyone can meet (RFC 9110 section 10.1.1).
fn expects_continue(request: &Request) -> Result<bool, Refusal> {
    if !request.fields.has(Known::Expect) {
        return Ok(false);
    }
    let mut expectations = request.fields.all(Known::Expect);
    match (expectations.next(), expectations.next()) {
        (None, _) => Ok(false),
        (Some(value), None) if value.eq_ignore_ascii_case(b"100-continue") => Ok(true),
        _ => Err(Refusal::Expectation),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Result<Request, Refusal> {
        let mut request = Request::default();
        parse(text.as_bytes(), &Limits::default(), &mut request).map(|_| request)
    }

    #[test]
    fn what_was_read_before_changes_nothing() {
        let read = |head: &str, request: &mut Request| {
            let repeated = parse_repeated(head.as_bytes(), &Limits::default(), request);
            repeated
                .map(|read| read.map(|length| assert_eq!(length, head.len())))
                .unwrap_or_else(|| parse(head.as_bytes(), &Limits::default(), request))
        };
        let mut heads = vec![
            "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "GET /<a> HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n".to_owned(),
            "POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n".to_owned(),
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 7\r\n\r\n".to_owned(),
        ];
        for target in ["/", "/x", "*", "http://a/", "http://b:80/x", "http://?/"] {
            for version in ["HTTP/1.1", "HTTP/1.0"] {
                for host in [
                    "Host: a\r\n",
                    "Host: a\r\nConnection: close\r\n",
                    "Host:  a\r\n",
                    "Host: A\r\n",
                    "Host: b:80\r\n",
                    "Host: a b\r\n",
                    "Host:\r\n",
                    "Host: \u{e9}\r\n",
                    "",
                ] {
                    heads.push(format!("GET {target} {version}\r\n{host}\r\n"));
                }
            }
        }
        let seen = |read: &Result<(), Refusal>, request: &Request| {
            read.map(|()| {
                let Request { method, authority, target, path_len, version, length, wishes, fields, .. } =
                    request.clone();
                (method, authority, target, path_len, version, length, wishes, format!("{fields:?}"))
            })
        };
        for before in &heads {
            for head in &heads {
                let (mut used, mut new) = (Request::default(), Request::default());
                let _whatever_it_was = read(before, &mut used);
                used.fields.add(Known::Via, "1.1 tidegate");
                let [again, first] = [&mut used, &mut new].map(|request| read(head, request));
                assert_eq!(seen(&again, &used), seen(&first, &new), "{before:?}, then {head:?}");
                let may_repeat = first.is_ok() && head.contains(" /") && head.contains("HTTP/1.1");
                assert!(may_repeat || first.is_err() || !used.repeats, "{before:?}, then {head:?}");
                assert!(used.repeats || !may_repeat || before != head, "{head:?} twice");
            }
        }
    }

    #[test]
    fn malformed_heads_are_refused_with_their_reason() {
        let cases = [
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::RequestLine),
            ("GET /\r\nHost: a\r\n\r\n", Refusal::RequestLine),
            ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n", Refusal::RequestLine),
            ("GET / http/1.1\r\nHost: a\r\n\r\n", Refusal::RequestLine),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", Refusal::Version),
            ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", Refusal::Version),
            ("GET /#f HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Target),
            ("GET /<a> HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Target),
            ("VERY-LONG-METHOD-THAT-NOBODY-KNOWS / HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::MethodTooLong),
            ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Target),
            ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Target),
            ("GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Target),
            ("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::HostMismatch),
            ("GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Target),
            ("CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Method),
            ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Method),
            ("GET / HTTP/1.1\r\n\r\n", Refusal::NoHost),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", Refusal::RepeatedHost),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", Refusal::BadHost),
            ("GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", Refusal::BadHost),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n", Refusal::BadHost),
            ("GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n", Refusal::BadHost),
            ("GET / HTTP/1.1\r\nHost: a\r\nA : b\r\n\r\n", Refusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\r\n c\r\n\r\n", Refusal::FieldSyntax),
            ("GET / HTTP/1.1\r\n A: b\r\nHost: a\r\n\r\n", Refusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", Refusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", Refusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\0c\r\n\r\n", Refusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\rc\r\n\r\n", Refusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nExpect: magic\r\n\r\n", Refusal::Expectation),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 17000000\r\n\r\n", Refusal::BodyTooLarge),
        ];
        for (text, refusal) in cases {
            assert_eq!(parse_text(text).map(|r| r.target), Err(refusal), "{text:?}");
        }
        let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(9000));
        assert_eq!(parse_text(&long).map(|r| r.target), Err(Refusal::TargetTooLong));
        let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(100));
        assert_eq!(parse_text(&many).map(|r| r.target), Err(Refusal::TooManyFields));
    }

    #[test]
    fn targets_of_both_forms_agree() {
        let request = parse_text("GET HTTP://A.example:80?x=1 HTTP/1.1\r\nHost: a.EXAMPLE:80\r\n\r\n").expect("valid");
        assert_eq!((request.path(), request.query(), request.host()), ("/", Some("x=1"), "a.example"));
        let request = parse_text("GET /a/b?c=d?e HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n").expect("valid");
        assert_eq!((request.path(), request.query(), request.host()), ("/a/b", Some("c=d?e"), "[::1]"));
    }
}
