//! Parses the bytes of a request head into a `Request`, or returns the reason why it is refused.

use http::Method;

use super::framing::{self, FramingError};
use crate::http::fields::{KnownField, is_token};
use crate::http::limits::HttpLimits;
use crate::http::message::{BodyLength, ConnectionOptions, HttpVersion, Request, StatusCode};

/// Upper bound of `header_fields` in any configuration: the parser's table is on the stack.
const FIELDS_MAX: usize = 256;

macro_rules! refusals {
    ($($variant:ident = $status:literal $reason:literal),+ $(,)?) => {
        /// Why a request is refused while its head or body is read. The connection closes after
        /// every refusal.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum RequestRefusal { $($variant),+ }

        impl RequestRefusal {
            pub(crate) const ALL: &[RequestRefusal] = &[$(RequestRefusal::$variant),+];

            /// The status of the response to the client.
            pub fn status(self) -> StatusCode {
                let code: u16 = match self { $(RequestRefusal::$variant => $status),+ };
                StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_REQUEST)
            }

            /// A fixed reason, also the metric label.
            pub(crate) fn reason(self) -> &'static str {
                match self { $(RequestRefusal::$variant => $reason),+ }
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

/// Maximum letters of a method; the longest registered method has 17 (RFC 9110 section 16.1).
pub(super) const METHOD_MAX: usize = 32;

/// The number of letters before the first space of a request line, of which a part may be missing;
/// 0 without a space.
pub(super) fn method_length(line: &[u8]) -> usize {
    line.iter().position(|byte| *byte == b' ').unwrap_or(0)
}

/// Parses a complete head (empty line included) into `request`, which is cleared first. After a
/// refusal, `request` may still hold the previous authority.
pub(super) fn parse(head: &[u8], limits: &HttpLimits, request: &mut Request) -> Result<(), RequestRefusal> {
    // The authority of the previous request on this connection. It is usually the same and is then
    // not validated again.
    let authority = std::mem::take(&mut request.authority);
    request.clear();
    request.authority = authority;
    let parsed = parse_lines(head, limits, request).and_then(|(version, target)| {
        request.version = version;
        let authority = parse_target(target, request)?;
        validate(authority, limits, request)
    });
    // A refused head must not match as a repetition.
    parsed.inspect_err(|_| request.fields.clear())
}

/// Fast path for a head at the front of `bytes` that equals the previous head of `request`, except
/// perhaps in its target: its field lines are already parsed and validated. Clients that send one
/// request after the other usually repeat their fields. Returns the length of the head. `None` if
/// the head is different or incomplete: use [`parse`] then. At most the fields have been restored
/// in that case.
pub(super) fn parse_repeated(
    bytes: &[u8],
    limits: &HttpLimits,
    request: &mut Request,
) -> Option<Result<usize, RequestRefusal>> {
    const VERSION: &[u8] = b" HTTP/1.1\r\n";
    let line = bytes.strip_prefix(request.method.as_str().as_bytes())?.strip_prefix(b" ")?;
    let same_target = line.strip_prefix(request.target.as_bytes()).and_then(|rest| rest.strip_prefix(VERSION));
    let (target, rest) = match same_target {
        Some(rest) => (None, rest),
        None => {
            let (target, rest) = line.split_at(line.iter().position(|byte| !IS_TARGET_BYTE[usize::from(*byte)])?);
            (Some(std::str::from_utf8(target).ok()?), rest.strip_prefix(VERSION)?)
        }
    };
    let path = target.unwrap_or(&request.target);
    if !path.starts_with('/') || path.len() > limits.uri_bytes {
        return None;
    }
    let length = bytes.len() - rest.len() + request.fields.restore_section(rest)?;
    if length > limits.header_bytes || request.fields.len() > limits.header_fields {
        return None;
    }
    request.interim.clear();
    request.repeats_previous = target.is_none() && request.version == HttpVersion::Http11;
    if request.repeats_previous {
        // The previous head was validated.
        return Some(Ok(length));
    }
    if let Some(target) = target {
        request.set_target(target);
    }
    request.version = HttpVersion::Http11;
    let validated = validate(None, limits, request).inspect_err(|_| request.fields.clear());
    Some(validated.map(|()| length))
}

/// Validates what depends on both target and fields: host, body length and connection options.
/// `authority` is the authority of the target.
fn validate(authority: Option<&str>, limits: &HttpLimits, request: &mut Request) -> Result<(), RequestRefusal> {
    let is_http10 = request.version == HttpVersion::Http10;
    set_authority(authority, request)?;
    set_length(limits, request)?;
    request.connection = ConnectionOptions {
        keep_alive: keeps_alive(request, is_http10),
        expects_continue: expects_continue(request)? && !is_http10 && request.length != BodyLength::Empty,
    };
    Ok(())
}

/// Splits the head into its lines; returns version and target.
fn parse_lines<'a>(
    head: &'a [u8],
    limits: &HttpLimits,
    request: &mut Request,
) -> Result<(HttpVersion, &'a str), RequestRefusal> {
    let line_end = memchr::memchr(b'\r', head).ok_or(RequestRefusal::RequestLine)?;
    check_request_line(&head[..line_end], limits)?;
    let mut lines = [const { std::mem::MaybeUninit::uninit() }; FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut []);
    match httparse::ParserConfig::default().parse_request_with_uninit_headers(&mut parsed, head, &mut lines) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(RequestRefusal::FieldSyntax),
        Err(httparse::Error::TooManyHeaders) => return Err(RequestRefusal::TooManyFields),
        Err(httparse::Error::Token | httparse::Error::NewLine) => return Err(RequestRefusal::RequestLine),
        Err(httparse::Error::Version) => return Err(RequestRefusal::Version),
        Err(_) => return Err(RequestRefusal::FieldSyntax),
    }
    if parsed.headers.len() > limits.header_fields {
        return Err(RequestRefusal::TooManyFields);
    }
    let lines = parsed.headers.iter().map(|line| (line.name.as_bytes(), line.value.trim_ascii()));
    request.fields.load_section(&head[line_end + 2..], lines);
    let method = parsed.method.unwrap_or_default();
    request.method = Method::from_bytes(method.as_bytes()).map_err(|_| RequestRefusal::RequestLine)?;
    if request.method == Method::CONNECT || request.method == Method::TRACE {
        return Err(RequestRefusal::Method);
    }
    let version = if parsed.version == Some(0) { HttpVersion::Http10 } else { HttpVersion::Http11 };
    Ok((version, parsed.path.unwrap_or_default()))
}

/// Checks `method SP target SP version` with single spaces. A well-formed but unsupported version
/// is 505.
fn check_request_line(line: &[u8], limits: &HttpLimits) -> Result<(), RequestRefusal> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(RequestRefusal::RequestLine);
    };
    if !is_token(method) || target.is_empty() {
        return Err(RequestRefusal::RequestLine);
    }
    if method.len() > METHOD_MAX {
        return Err(RequestRefusal::MethodTooLong);
    }
    if target.len() > limits.uri_bytes {
        return Err(RequestRefusal::TargetTooLong);
    }
    match version {
        b"HTTP/1.1" | b"HTTP/1.0" => Ok(()),
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            Err(RequestRefusal::Version)
        }
        _ => Err(RequestRefusal::RequestLine),
    }
}

/// The bytes allowed in a target. `#` would start a fragment, which clients never send; the other
/// four excluded bytes are not allowed in a URI (RFC 3986 appendix A). Further bytes outside the
/// grammar are too common in practice to refuse.
const IS_TARGET_BYTE: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = b'!';
    while byte <= b'~' {
        table[byte as usize] = !matches!(byte, b'#' | b'"' | b'<' | b'>' | b'`');
        byte += 1;
    }
    table
};

/// Sets scheme and target; returns the authority of an absolute-form target (RFC 9112 section 3.2).
fn parse_target<'a>(target: &'a str, request: &mut Request) -> Result<Option<&'a str>, RequestRefusal> {
    if !target.bytes().all(|byte| IS_TARGET_BYTE[usize::from(byte)]) {
        return Err(RequestRefusal::Target);
    }
    if target.starts_with('/') {
        request.set_target(target);
        return Ok(None);
    }
    if target == "*" {
        request.set_target("*");
        return if request.method == Method::OPTIONS { Ok(None) } else { Err(RequestRefusal::Target) };
    }
    let Some((scheme, rest)) = target.split_once("://") else {
        // The authority form is for CONNECT only, which is already refused.
        return Err(RequestRefusal::Target);
    };
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return Err(RequestRefusal::Target);
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

/// Requires exactly one valid `Host` that equals the authority of an absolute target (RFC 9112
/// section 3.2).
fn set_authority(from_target: Option<&str>, request: &mut Request) -> Result<(), RequestRefusal> {
    let mut hosts = request.fields.all(KnownField::Host);
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(RequestRefusal::RepeatedHost);
    }
    let host = match host {
        // Unchanged since the previous request. A stored authority is valid or empty.
        Some(host) if from_target.is_none() && host == request.authority.as_bytes() && !host.is_empty() => {
            return Ok(());
        }
        Some(host) => {
            let host = std::str::from_utf8(host).map_err(|_| RequestRefusal::BadHost)?;
            if !is_authority(host) {
                return Err(RequestRefusal::BadHost);
            }
            host
        }
        None if request.version == HttpVersion::Http10 => from_target.unwrap_or_default(),
        None => return Err(RequestRefusal::NoHost),
    };
    if let Some(authority) = from_target {
        if !is_authority(authority) {
            return Err(RequestRefusal::Target);
        }
        if !authority.eq_ignore_ascii_case(host) {
            return Err(RequestRefusal::HostMismatch);
        }
    }
    let mut authority = std::mem::take(&mut request.authority);
    authority.clear();
    authority.push_str(host);
    authority.make_ascii_lowercase();
    request.authority = authority;
    Ok(())
}

/// Whether `text` is `uri-host [":" port]` without userinfo (RFC 3986 section 3.2).
/// Percent-encoding is refused: host names do not need it.
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
    let host_is_valid = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || is_host_mark(b));
    let port_is_valid = port
        .is_none_or(|port| port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok());
    host_is_valid && port_is_valid
}

/// The unreserved characters and sub-delimiters other than letters and digits (RFC 3986 section 2).
fn is_host_mark(byte: u8) -> bool {
    matches!(
        byte,
        b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'='
    )
}

fn set_length(limits: &HttpLimits, request: &mut Request) -> Result<(), RequestRefusal> {
    let announced = framing::announced_length(&request.fields, request.version == HttpVersion::Http10).map_err(
        |bad| match bad {
            FramingError::BadLength => RequestRefusal::BadLength,
            FramingError::RepeatedLength => RequestRefusal::RepeatedLength,
            FramingError::LengthAndCoding => RequestRefusal::LengthAndCoding,
            FramingError::RepeatedCoding => RequestRefusal::RepeatedCoding,
            FramingError::CodingInHttp10 => RequestRefusal::CodingInHttp10,
            FramingError::UnknownCoding => RequestRefusal::UnknownCoding,
        },
    )?;
    request.length = match announced {
        Some(BodyLength::Known(length)) if length > limits.body_bytes => return Err(RequestRefusal::BodyTooLarge),
        Some(BodyLength::Known(0)) if !matches!(request.method, Method::POST | Method::PUT | Method::PATCH) => {
            BodyLength::Empty
        }
        Some(length) => length,
        None => BodyLength::Empty,
    };
    if limits.refuses_body(&request.method, request.length) {
        return Err(RequestRefusal::BodyOfGet);
    }
    Ok(())
}

/// Whether the connection persists, by version and `Connection` (RFC 9112 section 9.3).
fn keeps_alive(request: &Request, is_http10: bool) -> bool {
    if !request.fields.has(KnownField::Connection) {
        return !is_http10;
    }
    let has_option = |option: &[u8]| {
        request.fields.members(KnownField::Connection).any(|member| member.eq_ignore_ascii_case(option))
    };
    if is_http10 { has_option(b"keep-alive") && !has_option(b"close") } else { !has_option(b"close") }
}

/// `100-continue` is the only supported expectation (RFC 9110 section 10.1.1).
fn expects_continue(request: &Request) -> Result<bool, RequestRefusal> {
    if !request.fields.has(KnownField::Expect) {
        return Ok(false);
    }
    let mut expectations = request.fields.all(KnownField::Expect);
    match (expectations.next(), expectations.next()) {
        (None, _) => Ok(false),
        (Some(value), None) if value.eq_ignore_ascii_case(b"100-continue") => Ok(true),
        _ => Err(RequestRefusal::Expectation),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Result<Request, RequestRefusal> {
        let mut request = Request::default();
        parse(text.as_bytes(), &HttpLimits::default(), &mut request).map(|_| request)
    }

    #[test]
    fn previous_head_does_not_change_the_result() {
        let parse_next = |head: &str, request: &mut Request| {
            let repeated = parse_repeated(head.as_bytes(), &HttpLimits::default(), request);
            repeated
                .map(|parsed| parsed.map(|length| assert_eq!(length, head.len())))
                .unwrap_or_else(|| parse(head.as_bytes(), &HttpLimits::default(), request))
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
        let summary = |result: &Result<(), RequestRefusal>, request: &Request| {
            result.map(|()| {
                let Request { method, authority, target, path_len, version, length, connection, fields, .. } =
                    request.clone();
                (method, authority, target, path_len, version, length, connection, format!("{fields:?}"))
            })
        };
        for before in &heads {
            for head in &heads {
                let (mut used, mut new) = (Request::default(), Request::default());
                let _any_result = parse_next(before, &mut used);
                used.fields.add(KnownField::Via, "1.1 tidegate");
                let [again, first] = [&mut used, &mut new].map(|request| parse_next(head, request));
                assert_eq!(summary(&again, &used), summary(&first, &new), "{before:?}, then {head:?}");
                let may_repeat = first.is_ok() && head.contains(" /") && head.contains("HTTP/1.1");
                assert!(may_repeat || first.is_err() || !used.repeats_previous, "{before:?}, then {head:?}");
                assert!(used.repeats_previous || !may_repeat || before != head, "{head:?} twice");
            }
        }
    }

    #[test]
    fn malformed_heads_are_refused_with_a_reason() {
        let cases = [
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::RequestLine),
            ("GET /\r\nHost: a\r\n\r\n", RequestRefusal::RequestLine),
            ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n", RequestRefusal::RequestLine),
            ("GET / http/1.1\r\nHost: a\r\n\r\n", RequestRefusal::RequestLine),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", RequestRefusal::Version),
            ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", RequestRefusal::Version),
            ("GET /#f HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Target),
            ("GET /<a> HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Target),
            ("VERY-LONG-METHOD-THAT-NOBODY-KNOWS / HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::MethodTooLong),
            ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Target),
            ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Target),
            ("GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Target),
            ("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::HostMismatch),
            ("GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Target),
            ("CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Method),
            ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Method),
            ("GET / HTTP/1.1\r\n\r\n", RequestRefusal::NoHost),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", RequestRefusal::RepeatedHost),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", RequestRefusal::BadHost),
            ("GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", RequestRefusal::BadHost),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n", RequestRefusal::BadHost),
            ("GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n", RequestRefusal::BadHost),
            ("GET / HTTP/1.1\r\nHost: a\r\nA : b\r\n\r\n", RequestRefusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\r\n c\r\n\r\n", RequestRefusal::FieldSyntax),
            ("GET / HTTP/1.1\r\n A: b\r\nHost: a\r\n\r\n", RequestRefusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", RequestRefusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", RequestRefusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\0c\r\n\r\n", RequestRefusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\rc\r\n\r\n", RequestRefusal::FieldSyntax),
            ("GET / HTTP/1.1\r\nHost: a\r\nExpect: magic\r\n\r\n", RequestRefusal::Expectation),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 17000000\r\n\r\n", RequestRefusal::BodyTooLarge),
        ];
        for (text, refusal) in cases {
            assert_eq!(parse_text(text).map(|r| r.target), Err(refusal), "{text:?}");
        }
        let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(9000));
        assert_eq!(parse_text(&long).map(|r| r.target), Err(RequestRefusal::TargetTooLong));
        let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(100));
        assert_eq!(parse_text(&many).map(|r| r.target), Err(RequestRefusal::TooManyFields));
    }

    #[test]
    fn origin_form_and_absolute_form_parse_alike() {
        let request = parse_text("GET HTTP://A.example:80?x=1 HTTP/1.1\r\nHost: a.EXAMPLE:80\r\n\r\n").expect("valid");
        assert_eq!((request.path(), request.query(), request.host()), ("/", Some("x=1"), "a.example"));
        let request = parse_text("GET /a/b?c=d?e HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n").expect("valid");
        assert_eq!((request.path(), request.query(), request.host()), ("/a/b", Some("c=d?e"), "[::1]"));
    }
}
