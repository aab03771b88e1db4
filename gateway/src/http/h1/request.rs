//! Parses the bytes of a request head into a `Request`, or returns the reason why it is refused.

use http::Method;

use crate::http::authority;
use crate::http::fields::{KnownField, is_token};
use crate::http::head::{self, METHOD_MAX};
use crate::http::limits::HttpLimits;
use crate::http::message::{BodyLength, ConnectionOptions, HttpVersion, Request};
use crate::http::refusal::RequestRefusal;
use crate::http::target::{self, TargetScan};

/// Upper bound of `header_fields` in any configuration: the parser's table is on the stack.
const FIELDS_MAX: usize = 256;

/// Why a request line that exceeds the limits is refused. A part of `line` may be missing, but no
/// limit is larger than what is there.
pub(super) fn refusal_of_long_line(line: &[u8], limits: &HttpLimits) -> RequestRefusal {
    let method = line.split(|byte| *byte == b' ').next().unwrap_or_default();
    check_method_token(method, limits).err().unwrap_or(RequestRefusal::TargetTooLong)
}

/// A method that is longer than any known one is 501 (RFC 9112 section 3). One that does not end
/// within the longest target is no request line: the bytes may be of any protocol.
fn check_method_token(method: &[u8], limits: &HttpLimits) -> Result<(), RequestRefusal> {
    if !is_token(method) || method.len() > limits.uri_bytes {
        Err(RequestRefusal::RequestLine)
    } else if method.len() > METHOD_MAX {
        Err(RequestRefusal::MethodTooLong)
    } else {
        Ok(())
    }
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
        let authority = parse_target(target, limits, request)?;
        validate(authority, limits, request)
    });
    // A refused head must not match as a repetition. If only its body is refused, the response
    // depends on its fields, and the connection is closed.
    parsed.inspect_err(|refusal| {
        if !refusal.is_of_body() {
            request.fields.clear();
        }
    })
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
    if request.ignores_host {
        return None;
    }
    let line = bytes.strip_prefix(request.method.as_str().as_bytes())?.strip_prefix(b" ")?;
    let same_target = line.strip_prefix(request.target.as_bytes()).and_then(|rest| rest.strip_prefix(VERSION));
    let (target, rest) = match same_target {
        Some(rest) => (None, rest),
        None => {
            let scan = TargetScan::of(line);
            let (target, rest) = line.split_at(scan.length);
            (Some((std::str::from_utf8(target).ok()?, scan)), rest.strip_prefix(VERSION)?)
        }
    };
    let path = target.map_or(&*request.target, |(target, _)| target);
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
        // The previous head was validated. If its path had another form than this one, both have
        // the same normal form.
        request.received_path = None;
        return Some(Ok(length));
    }
    request.version = HttpVersion::Http11;
    let received = match target {
        Some((target, scan)) => target::receive(target, scan, limits.paths, request),
        None => {
            request.received_path = None;
            Ok(())
        }
    };
    let validated = received.and_then(|()| validate(None, limits, request)).inspect_err(|refusal| {
        if !refusal.is_of_body() {
            request.fields.clear();
        }
    });
    Some(validated.map(|()| length))
}

/// Validates what depends on both target and fields: host, body length and connection options.
/// `authority` is the authority of the target.
fn validate(authority: Option<&str>, limits: &HttpLimits, request: &mut Request) -> Result<(), RequestRefusal> {
    let is_http10 = request.version == HttpVersion::Http10;
    set_authority(authority, request)?;
    head::set_length(limits, request)?;
    request.connection = ConnectionOptions {
        keep_alive: keeps_alive(request, is_http10),
        expects_continue: head::expects_continue(request)? && !is_http10 && request.length != BodyLength::Empty,
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
        // The method was checked, so the invalid character is in the target.
        Err(httparse::Error::Token) => return Err(RequestRefusal::Target),
        Err(httparse::Error::NewLine) => return Err(RequestRefusal::RequestLine),
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
    head::check_method(&request.method)?;
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
    if target.is_empty() {
        return Err(RequestRefusal::RequestLine);
    }
    check_method_token(method, limits)?;
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

/// Sets the target; returns the authority of one in absolute form (RFC 9112 section 3.2).
fn parse_target<'a>(
    target: &'a str,
    limits: &HttpLimits,
    request: &mut Request,
) -> Result<Option<&'a str>, RequestRefusal> {
    if target.starts_with('/') || target == "*" {
        return head::set_target(target, limits, request).map(|()| None);
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
    match path {
        // RFC 9112 section 3.2.4.
        "" if request.method == Method::OPTIONS => request.set_target("*"),
        path if path.starts_with('/') => head::set_target(path, limits, request)?,
        query => head::set_target(&format!("/{query}"), limits, request)?,
    }
    Ok(Some(authority))
}

/// Requires exactly one valid `Host` (RFC 9112 section 3.2). The authority of a target in absolute
/// form replaces it (section 3.2.2).
fn set_authority(from_target: Option<&str>, request: &mut Request) -> Result<(), RequestRefusal> {
    let (host, second) = {
        let mut hosts = request.fields.all(KnownField::Host);
        (hosts.next(), hosts.next())
    };
    if second.is_some() {
        return Err(RequestRefusal::RepeatedHost);
    }
    let has_host = host.is_some();
    let mut authority = std::mem::take(&mut request.authority);
    match host {
        // Unchanged since the previous request. A stored authority is valid or empty.
        Some(host) if host == authority.as_bytes() && !host.is_empty() => {}
        Some(host) => {
            authority.clear();
            if !std::str::from_utf8(host).is_ok_and(|host| authority::write_normal(host, &mut authority)) {
                return Err(RequestRefusal::BadHost);
            }
        }
        None if request.version == HttpVersion::Http10 => authority.clear(),
        None => return Err(RequestRefusal::NoHost),
    }
    request.authority = authority;
    let Some(from_target) = from_target else { return Ok(()) };
    let from_host = std::mem::take(&mut request.authority);
    if !authority::write_normal(from_target, &mut request.authority) {
        return Err(RequestRefusal::Target);
    }
    if has_host && from_host != request.authority {
        request.fields.set(KnownField::Host, &request.authority);
        request.ignores_host = true;
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
        for target in ["/", "/x", "//x", "/%78", "/%2f", "/?`", "*", "http://a/", "http://b:80/x", "http://?/"] {
            for version in ["HTTP/1.1", "HTTP/1.0"] {
                for host in [
                    "Host: a\r\n",
                    "Host: a\r\nConnection: close\r\n",
                    "Host:  a\r\n",
                    "Host: A.:\r\n",
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
                let Request { method, authority, target, path_len, received_path, version, .. } = request.clone();
                let Request { length, connection, fields, .. } = request.clone();
                let target = (authority, target, path_len, received_path);
                (method, target, version, length, connection, format!("{fields:?}"))
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
                let is_normal = head.contains(" / ") || head.contains(" /x ");
                assert!(used.repeats_previous || !may_repeat || !is_normal || before != head, "{head:?} twice");
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
            ("GET http://b:x/ HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Target),
            ("GET http://b/ HTTP/1.1\r\nHost: a b\r\n\r\n", RequestRefusal::BadHost),
            ("GET /a%2fb HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::EncodedSlash),
            ("GET http://a/a\\b HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::EncodedSlash),
            ("GET /a%0d HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::PathEncoding),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 05\r\n\r\n", RequestRefusal::BadLength),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 00\r\n\r\n", RequestRefusal::BadLength),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", RequestRefusal::ChunkedNotLast),
            ("GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Target),
            ("CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Method),
            ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::Method),
            ("get / HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::MethodCase),
            ("trace / HTTP/1.1\r\nHost: a\r\n\r\n", RequestRefusal::MethodCase),
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
    fn authority_of_an_absolute_target_replaces_host() {
        for (target, host, expected) in [
            ("http://b/x", "a", "b"),
            ("http://a:80/x", "a", "a:80"),
            ("http://A./x", "a", "a"),
            ("http://b:/x", "a:81", "b"),
        ] {
            let head = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nX: y\r\n\r\n");
            let mut request = parse_text(&head).expect("valid");
            assert_eq!((request.path(), &*request.authority), ("/x", expected), "{head}");
            assert_eq!(request.fields.get(KnownField::Host), Some(expected.as_bytes()));
            // The next request of the connection has the host that its `Host` names.
            let next = format!("GET /x HTTP/1.1\r\nHost: {host}\r\nX: y\r\n\r\n");
            let limits = HttpLimits::default();
            if parse_repeated(next.as_bytes(), &limits, &mut request).is_none() {
                parse(next.as_bytes(), &limits, &mut request).expect("valid");
            }
            assert_eq!(request.authority, host, "{head}");
        }
    }

    #[test]
    fn long_lines_are_refused_for_their_longest_part() {
        for (line, refusal) in [
            ("A".repeat(9_000), RequestRefusal::RequestLine),
            (format!("{} / HTTP/1.1", "A".repeat(9_000)), RequestRefusal::RequestLine),
            (format!("{} /{}", "A".repeat(8_192), "a".repeat(9_000)), RequestRefusal::MethodTooLong),
            (format!("GET /{}", "a".repeat(9_000)), RequestRefusal::TargetTooLong),
            ("\u{16}\u{3}\u{1}".repeat(3_000), RequestRefusal::RequestLine),
            (" /".to_owned(), RequestRefusal::RequestLine),
        ] {
            let limits = HttpLimits::default();
            assert_eq!(refusal_of_long_line(line.as_bytes(), &limits), refusal, "{}", &line[..2]);
        }
    }

    #[test]
    fn origin_form_and_absolute_form_parse_alike() {
        let request = parse_text("GET HTTP://A.example:80?x=1 HTTP/1.1\r\nHost: a.EXAMPLE:80\r\n\r\n").expect("valid");
        assert_eq!((request.path(), request.query(), request.host()), ("/", Some("x=1"), "a.example"));
        let request = parse_text("GET /a/b?c=d?e HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n").expect("valid");
        assert_eq!((request.path(), request.query(), request.host()), ("/a/b", Some("c=d?e"), "[::1]"));
    }
}
