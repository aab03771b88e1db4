//! Checks of a request head that do not depend on the protocol: HTTP/1.1 and HTTP/2 refuse the same
//! requests, so that an origin gets the same ones.

use super::authority;
use super::fields::KnownField;
use super::limits::HttpLimits;
use super::message::{Method, Request};
use super::refusal::RequestRefusal;
use super::target::{self, TargetScan};

/// Maximum letters of a method; the longest registered method has 17 (RFC 9110 section 16.1).
pub(super) const METHOD_MAX: usize = 32;

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
