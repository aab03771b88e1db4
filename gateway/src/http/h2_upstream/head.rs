//! Heads of requests and responses as the crate `h2` has them.
//!
//! A request gets the same edits of its route as over HTTP/1.1. Fields of an HTTP/1.1 connection
//! have no place in HTTP/2 (RFC 9113 section 8.2.2); `TE: trailers` is kept.

use std::time::Duration;

use h2::ext::Protocol;
use http::header::{CONTENT_LENGTH, HeaderName, HeaderValue, TE};
use http::uri::{Authority, PathAndQuery, Scheme as UriScheme};
use http::{HeaderMap, Method, Uri};

use crate::http::fields::{Fields, KnownField, KnownFieldSet};
use crate::http::framing;
use crate::http::grpc;
use crate::http::h1::is_allowed_trailer;
use crate::http::message::{BodyLength, Request, Response, Scheme, StatusCode, is_bodiless};
use crate::http::{text, websocket};

/// Most fields of a response head, as over HTTP/1.1.
const FIELDS_MAX: usize = 256;
/// Tells the origin the time that is left.
const EXPECTED_WITHIN: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Fields that are not copied: those of a protocol switch and of framing, and those that are
/// written from `Request`. `hop` has removed the others of a connection.
const LEFT_OUT: KnownFieldSet = KnownFieldSet::of(&[
    KnownField::Host,
    KnownField::ContentLength,
    KnownField::TransferEncoding,
    KnownField::Connection,
    KnownField::Upgrade,
    KnownField::Te,
]);

/// The peer of a connection as the pseudo-fields name it.
pub(super) struct PeerName {
    pub(super) scheme: Scheme,
    /// The authority of a request that has none (HTTP/1.0).
    pub(super) authority: String,
}

/// Whether a request is the handshake of a WebSocket, which HTTP/2 has a form for (RFC 8441).
pub(super) fn is_websocket(request: &Request) -> bool {
    let mut protocols = request.fields.members(KnownField::Upgrade);
    let is_it = |protocol: &[u8]| protocol.eq_ignore_ascii_case(websocket::PROTOCOL.as_bytes());
    request.method == Method::GET
        && request.length == BodyLength::Empty
        && protocols.next().is_some_and(is_it)
        && protocols.next().is_none()
}

/// Makes the head of the handshake of a WebSocket an extended CONNECT (RFC 8441 section 5).
pub(super) fn make_connect(head: &mut http::Request<()>) {
    *head.method_mut() = Method::CONNECT;
    head.headers_mut().remove(websocket::KEY);
    head.extensions_mut().insert(Protocol::from_static(websocket::PROTOCOL));
}

/// Makes a 2xx response to an extended CONNECT the 101 that it stands for.
pub(super) fn make_switch(request: &Request, response: &mut Response) {
    response.status = StatusCode::SWITCHING_PROTOCOLS;
    response.length = BodyLength::Empty;
    response.fields.remove(KnownField::ContentLength);
    response.fields.add(KnownField::Connection, "upgrade");
    response.fields.add(KnownField::Upgrade, websocket::PROTOCOL);
    if let Some(key) = request.fields.named(websocket::KEY.as_bytes()).next() {
        response.fields.push(websocket::ACCEPT.as_bytes(), websocket::accept(key).as_bytes());
    }
}

/// The head of `request` for a peer. `left` is the time that is left for the whole exchange.
///
/// # Errors
/// Names the part that HTTP/2 cannot carry.
pub(super) fn request_head(
    request: &Request,
    peer: &PeerName,
    left: Option<Duration>,
) -> Result<http::Request<()>, &'static str> {
    let mut head = http::Request::new(());
    *head.method_mut() = request.method.clone();
    *head.uri_mut() = uri(request, peer)?;
    *head.version_mut() = http::Version::HTTP_2;
    let headers = head.headers_mut();
    let fields = request.origin_fields();
    let is_deadline_written = left.is_some() && grpc::is_grpc(&request.fields);
    headers.reserve(fields.len() + 3);
    for field in fields.iter() {
        if field.known.is_some_and(|known| LEFT_OUT.contains(known))
            || (is_deadline_written && field.name.eq_ignore_ascii_case(grpc::TIMEOUT_NAME))
        {
            continue;
        }
        let name = HeaderName::from_bytes(field.name).map_err(|_| "field name")?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| "field value")?;
        headers.try_append(name, value).map_err(|_| "too many fields")?;
    }
    if request.accepts_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let BodyLength::Known(length) = request.length {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    if let Some(left) = left {
        // The origin can stop when the response would be too late. 0 would be no limit.
        let left = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1);
        headers.insert(EXPECTED_WITHIN, HeaderValue::from(left));
        if is_deadline_written {
            let mut value = Vec::new();
            text::push_number(&mut value, left.min(grpc::TIMEOUT_MAX));
            value.push(b'm');
            headers.insert(GRPC_TIMEOUT, HeaderValue::from_bytes(&value).map_err(|_| "deadline")?);
        }
    }
    Ok(head)
}

fn uri(request: &Request, peer: &PeerName) -> Result<Uri, &'static str> {
    let authority = match request.origin_authority() {
        "" => peer.authority.as_str(),
        authority => authority,
    };
    let mut target = Vec::new();
    request.push_origin_target(&mut target);
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(match peer.scheme {
        Scheme::Http => UriScheme::HTTP,
        Scheme::Https => UriScheme::HTTPS,
    });
    parts.authority = Some(Authority::try_from(authority).map_err(|_| "authority")?);
    let path = PathAndQuery::try_from(target.as_slice()).or_else(|_| PathAndQuery::try_from(escaped(&target)));
    parts.path_and_query = Some(path.map_err(|_| "path")?);
    Uri::from_parts(parts).map_err(|_| "target")
}

/// A target with every byte escaped that a URI must not have (RFC 3986 section 2).
fn escaped(target: &[u8]) -> Vec<u8> {
    const ALLOWED: &[u8] = b"-._~:/?[]@!$&'()*+,;=%";
    let mut text = Vec::with_capacity(target.len());
    for byte in target {
        if byte.is_ascii_alphanumeric() || ALLOWED.contains(byte) {
            text.push(*byte);
        } else {
            text.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    text
}

/// Fills `response` from the head of a response. `is_complete`: no body follows.
///
/// # Errors
/// Names what is malformed.
pub(super) fn read_response(
    (status, headers): (StatusCode, &HeaderMap),
    method: &Method,
    is_complete: bool,
    response: &mut Response,
) -> Result<(), &'static str> {
    if status.as_u16() >= 600 {
        return Err("bad status code");
    }
    if headers.len() > FIELDS_MAX {
        return Err("too many fields");
    }
    // The crate refuses the other fields of a connection, and lets this one pass as in a request
    // (RFC 9113 section 8.2.2).
    if headers.contains_key(TE) {
        return Err("field of a connection");
    }
    response.status = status;
    response.fields.clear();
    push_all(headers, &mut response.fields);
    let announced = framing::announced_length(&response.fields, false).map_err(|_| "bad framing")?;
    response.length = match announced {
        // The length that a GET would return: a response to HEAD may announce it and has no body.
        _ if *method == Method::HEAD => announced.unwrap_or(BodyLength::Empty),
        _ if is_bodiless(method, status) => BodyLength::Empty,
        Some(BodyLength::Known(length)) if is_complete && length > 0 => return Err("body shorter than announced"),
        Some(length) => length,
        None if is_complete => BodyLength::Known(0),
        None => BodyLength::Streamed,
    };
    Ok(())
}

/// The trailers that are passed on, if there are any.
pub(super) fn read_trailers(headers: &HeaderMap) -> Option<Box<Fields>> {
    let mut trailers = Fields::default();
    for (name, value) in headers.iter().take(FIELDS_MAX).filter(|(name, _)| is_allowed_trailer(name.as_str())) {
        trailers.push(name.as_str().as_bytes(), value.as_bytes().trim_ascii());
    }
    (!trailers.is_empty()).then(|| Box::new(trailers))
}

/// The trailers of a request.
pub(super) fn write_trailers(fields: &Fields) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for field in fields.iter() {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(field.name), HeaderValue::from_bytes(field.value)) {
            headers.append(name, value);
        }
    }
    headers
}

fn push_all(headers: &HeaderMap, fields: &mut Fields) {
    for (name, value) in headers {
        fields.push(name.as_str().as_bytes(), value.as_bytes().trim_ascii());
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::http::message::OriginEdits;

    fn peer() -> PeerName {
        PeerName { scheme: Scheme::Https, authority: "127.0.0.1:443".into() }
    }

    fn request(fields: &[(&str, &str)]) -> Request {
        let mut request = Request { authority: "shop".into(), ..Request::default() };
        request.set_target("/a/b?c=d");
        fields.iter().for_each(|(name, value)| request.fields.push(name.as_bytes(), value.as_bytes()));
        request
    }

    #[test]
    fn fields_of_an_http1_connection_are_left_out() {
        let mut request = request(&[
            ("Host", "evil"),
            ("Connection", "upgrade"),
            ("Upgrade", "websocket"),
            ("Transfer-Encoding", "chunked"),
            ("X-A", "1"),
            ("x-a", "2"),
        ]);
        request.accepts_trailers = true;
        request.length = BodyLength::Known(3);
        let head = request_head(&request, &peer(), Some(Duration::from_micros(1))).expect("a head");
        assert_eq!(head.uri(), "https://shop/a/b?c=d");
        let names: Vec<_> = head.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let expected: [(&str, &[u8]); 5] = [
            ("x-a", b"1"),
            ("x-a", b"2"),
            ("te", b"trailers"),
            ("content-length", b"3"),
            ("x-envoy-expected-rq-timeout-ms", b"1"),
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn edits_of_the_route_are_applied() {
        let mut request = request(&[("cookie", "a"), ("x-b", "1")]);
        request.origin_edits = Some(Rc::new(OriginEdits {
            path: Some("/other".into()),
            host: Some("internal".into()),
            removed: vec!["cookie".into()],
            set: vec![("x-b".into(), b"2".to_vec())],
            added: Vec::new(),
        }));
        let head = request_head(&request, &peer(), None).expect("a head");
        assert_eq!(head.uri(), "https://internal/other?c=d");
        assert_eq!((head.headers().len(), head.headers()["x-b"].as_bytes()), (1, &b"2"[..]));
    }

    #[test]
    fn unusual_targets_are_kept_or_escaped() {
        for (target, expected) in [("/<a>`", "/%3Ca%3E%60"), ("/%3c?<", "/%3c?%3C"), ("/a|b", "/a|b")] {
            let mut request = request(&[]);
            request.set_target(target);
            let head = request_head(&request, &peer(), None).expect("a head");
            assert_eq!(head.uri().path_and_query().map(PathAndQuery::as_str), Some(expected));
        }
        let mut options = request(&[]);
        (options.method, options.authority) = (Method::OPTIONS, String::new());
        options.set_target("*");
        let head = request_head(&options, &peer(), None).expect("a head");
        assert_eq!((head.uri().path(), head.uri().host()), ("*", Some("127.0.0.1")));
    }

    #[test]
    fn deadline_of_grpc_is_what_is_left() {
        let request = request(&[("content-type", "application/grpc"), ("grpc-timeout", "5S")]);
        let head = request_head(&request, &peer(), Some(Duration::from_millis(4_321))).expect("a head");
        assert_eq!(head.headers()["grpc-timeout"], "4321m");
        let head = request_head(&request, &peer(), None).expect("a head");
        assert_eq!(head.headers()["grpc-timeout"], "5S");
    }

    #[test]
    fn length_of_a_response_follows_from_its_head_and_end() {
        let length = |method, status: u16, lines: &[(&'static str, &'static str)], is_complete| {
            let headers =
                lines.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
            let (headers, mut response) = (headers.collect(), Response::default());
            let status = StatusCode::from_u16(status).expect("a status");
            read_response((status, &headers), &method, is_complete, &mut response).map(|()| response.length)
        };
        assert_eq!(length(Method::GET, 200, &[("content-length", "5")], false), Ok(BodyLength::Known(5)));
        assert_eq!(length(Method::GET, 200, &[], false), Ok(BodyLength::Streamed));
        assert_eq!(length(Method::GET, 200, &[], true), Ok(BodyLength::Known(0)));
        assert_eq!(length(Method::HEAD, 200, &[("content-length", "5")], true), Ok(BodyLength::Known(5)));
        assert_eq!(length(Method::GET, 304, &[("content-length", "5")], true), Ok(BodyLength::Empty));
        assert!(length(Method::GET, 200, &[("content-length", "5")], true).is_err());
        assert!(length(Method::GET, 200, &[("content-length", "+5")], false).is_err());
        assert!(length(Method::GET, 600, &[], false).is_err());
    }
}
