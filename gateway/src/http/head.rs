//! Checks of a request head that do not depend on the protocol: HTTP/1.1 and HTTP/2 refuse the same
//! requests, so that an origin gets the same ones.

use super::authority;
use super::fields::{Fields, KnownField};
use super::framing::{self, FramingError};
use super::limits::HttpLimits;
use super::message::{BodyLength, HttpVersion, Method, Request};
use super::refusal::RequestRefusal;
use super::target::{self, TargetScan};

/// Maximum letters of a method; the longest registered method has 17 (RFC 9110 section 16.1).
pub(super) const METHOD_MAX: usize = 32;

/// Most bytes of the target of a refused head that are kept for the access log.
pub(super) const REFUSED_TARGET_MAX: usize = 512;

/// Makes `request` the description of a refused head for the access log: method and target as far
/// as they were received, or `-`. Nothing else of it is valid.
#[cold]
pub(super) fn describe_refused(request: &mut Request, method: &[u8], target: &[u8]) {
    request.clear();
    let method = &method[..method.len().min(METHOD_MAX)];
    request.method = Method::from_bytes(method).or_else(|_| Method::from_bytes(b"-")).unwrap_or_default();
    let target = String::from_utf8_lossy(&target[..target.len().min(REFUSED_TARGET_MAX)]);
    request.set_target(if target.is_empty() { "-" } else { &target });
}

/// Methods are case-sensitive (RFC 9110 section 9.1), but many frameworks convert them to upper
/// case: such an origin would take `post` for POST, whose route and limits did not apply.
pub(super) fn check_method(method: &Method) -> Result<(), RequestRefusal> {
    match *method {
        Method::GET | Method::HEAD | Method::POST => Ok(()),
        _ if method.as_str().bytes().any(|byte| byte.is_ascii_lowercase()) => Err(RequestRefusal::MethodCase),
        Method::CONNECT | Method::TRACE => Err(RequestRefusal::Method),
        _ if method.as_str().len() > METHOD_MAX => Err(RequestRefusal::MethodTooLong),
        _ => Ok(()),
    }
}

/// Sets the target of `request`, whose method is set, from a target in origin form or asterisk form
/// (RFC 9112 sections 3.2.1 and 3.2.4).
pub(super) fn set_target(target: &str, limits: &HttpLimits, request: &mut Request) -> Result<(), RequestRefusal> {
    if target.len() > limits.uri_bytes {
        return Err(RequestRefusal::TargetTooLong);
    }
    if target == "*" && request.method == Method::OPTIONS {
        request.set_target("*");
        return Ok(());
    }
    let scan = TargetScan::of(target.as_bytes());
    if scan.length < target.len() || !target.starts_with('/') {
        return Err(RequestRefusal::Target);
    }
    target::receive(target, scan, limits.paths, request)
}

/// Sets `authority` to the normal form of `text`.
pub(super) fn set_authority(text: &str, authority: &mut String) -> Result<(), RequestRefusal> {
    authority.clear();
    if authority::write_normal(text, authority) { Ok(()) } else { Err(RequestRefusal::BadHost) }
}

/// `100-continue` is the only supported expectation (RFC 9110 section 10.1.1).
pub(super) fn expects_continue(request: &Request) -> Result<bool, RequestRefusal> {
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

/// Sets the length of the body from the fields.
pub(super) fn set_length(limits: &HttpLimits, request: &mut Request) -> Result<(), RequestRefusal> {
    let announced = framing::announced_length(&request.fields, request.version == HttpVersion::Http10).map_err(
        |bad| match bad {
            FramingError::BadLength => RequestRefusal::BadLength,
            FramingError::RepeatedLength => RequestRefusal::RepeatedLength,
            FramingError::LengthAndCoding => RequestRefusal::LengthAndCoding,
            FramingError::RepeatedCoding => RequestRefusal::RepeatedCoding,
            FramingError::ChunkedNotLast => RequestRefusal::ChunkedNotLast,
            FramingError::CodingInHttp10 => RequestRefusal::CodingInHttp10,
            FramingError::UnknownCoding => RequestRefusal::UnknownCoding,
        },
    )?;
    // Some recipients take a number with leading zeros for an octal one.
    let has_leading_zero = |fields: &Fields| {
        fields.get(KnownField::ContentLength).is_some_and(|value| value.len() > 1 && value[0] == b'0')
    };
    if matches!(announced, Some(BodyLength::Known(_))) && has_leading_zero(&request.fields) {
        return Err(RequestRefusal::BadLength);
    }
    request.length = match announced {
        Some(BodyLength::Known(length)) if length > limits.body_bytes_max() => {
            return Err(RequestRefusal::BodyTooLarge);
        }
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
