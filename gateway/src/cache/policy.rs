//! Decisions of a shared cache: whether a response may be stored and whether a stored one may be
//! used (RFC 9111 sections 3 and 4).

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::Method;

use super::config::{CacheConfig, CachePolicy, CookiePolicy, SetCookiePolicy};
use super::control::{self, CacheControl};
use super::extent::Extent;
use super::freshness::{self, FreshnessLifetime};
use super::range::{self, RangeSelection};
use super::stored::{CacheMeta, CachedObject, Freshness, LifetimeSource, StoredForms};
use super::targeted::ResponseDirectives;
use super::{date, key, tags};
use crate::http::fields::{Fields, KnownField};
use crate::http::message::{BodyLength, Request, Response, StatusCode};

/// How long an object with a validator is kept beyond its freshness and stale windows, so that it
/// can be validated instead of fetched again.
const KEEP_FOR_VALIDATION: Duration = Duration::from_secs(3600);
/// How long a key is marked as hit-for-miss after an uncacheable response.
pub(crate) const HIT_FOR_MISS_TTL: Duration = Duration::from_secs(10);

/// Why a response is not stored. The text appears in `Cache-Status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoStoreReason {
    Method,
    Status,
    Directive,
    Authorization,
    SetCookie,
    Vary,
    Variants,
    NotFresh,
    TooLarge,
    Range,
    Invalidated,
}

impl NoStoreReason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            NoStoreReason::Method => "method",
            NoStoreReason::Status => "status",
            NoStoreReason::Directive => "directive",
            NoStoreReason::Authorization => "authorization",
            NoStoreReason::SetCookie => "set-cookie",
            NoStoreReason::Vary => "vary",
            NoStoreReason::Variants => "variants",
            NoStoreReason::NotFresh => "not-fresh",
            NoStoreReason::TooLarge => "too-large",
            NoStoreReason::Range => "range",
            NoStoreReason::Invalidated => "invalidated",
        }
    }
}

/// Whether a request may be answered from the cache and its response may be stored.
pub fn is_cacheable_request(request: &Request) -> bool {
    matches!(request.method, Method::GET | Method::HEAD)
        && request.length == BodyLength::Empty
        && !request.fields.has(KnownField::IfMatch)
        && !request.fields.has(KnownField::IfUnmodifiedSince)
}

/// Whether a response to POST may be stored for GET: it has an explicit lifetime, and its
/// `Content-Location` is the target URI (RFC 9110 section 9.3.3).
pub(crate) fn is_storable_post_response(config: &CacheConfig, request: &Request, response: &Response) -> bool {
    let location =
        response.fields.get(KnownField::ContentLocation).and_then(|location| std::str::from_utf8(location).ok());
    let (Some(location), StatusCode::OK) = (location, response.status) else { return false };
    let control = CacheControl::parse(&response.fields);
    let is_explicit = control.max_age.or(control.s_maxage).is_some() || response.fields.has(KnownField::Expires);
    is_explicit && key::resolve_same_origin(config, location, request).as_deref() == Some(&*request.target)
}

/// Whether an error response may be given to every request that waited for it. One that names a
/// client (`Set-Cookie`, `private`, `no-store`) or varies by fields of the request may not.
pub(crate) fn is_shareable_error(response: &Response) -> bool {
    let control = CacheControl::parse(&response.fields);
    let is_personal = control.private || control.no_store || control.no_cache;
    let varies = response.fields.has(KnownField::SetCookie) || response.fields.has(KnownField::Vary);
    response.status.is_server_error() && !is_personal && !varies
}

/// Whether the request has a range. RFC 9110 section 14.2 defines ranges only for GET.
pub fn wants_range(request: &Request) -> bool {
    request.method == Method::GET && request.fields.has(KnownField::Range)
}

/// Applies the range of `request` to a complete response: the complete body, ranges of it, or 416.
pub fn apply_range(request: &Request, body: Bytes, response: &mut Response) -> Bytes {
    if !wants_range(request) || response.status != StatusCode::OK {
        return body;
    }
    let selection = range::select(&request.fields, &response.fields, body.len() as u64);
    if selection == RangeSelection::Whole {
        return body;
    }
    let extent = Extent::whole(body.len() as u64);
    range::apply(selection, extent, &body, response).unwrap_or(body)
}

/// Applies the range of `request` to a stored part. `None` if the part does not cover the range.
/// `response` has the head of the complete object.
pub fn apply_range_to_partial(
    request: &Request,
    extent: Extent,
    body: &Bytes,
    response: &mut Response,
) -> Option<Bytes> {
    let selection = range::select(&request.fields, &response.fields, extent.total);
    range::apply(selection, extent, body, response)
}

/// First and last byte that a GET selects of an object with these stored fields: of one range, or
/// of the whole object. `None` for several ranges, and for none of the object.
pub(super) fn single_range(request: &Request, stored: &Fields, total: u64) -> Option<(u64, u64)> {
    if request.method != Method::GET || total == 0 {
        return None;
    }
    if !request.fields.has(KnownField::Range) {
        return Some((0, total - 1));
    }
    match range::select(&request.fields, stored, total) {
        RangeSelection::Ranges(ranges) => <[_; 1]>::try_from(ranges).ok().map(|[range]| range),
        RangeSelection::Whole | RangeSelection::Unsatisfiable => None,
    }
}

/// Whether the request must not be answered without validation: `no-cache`, or `Pragma: no-cache`
/// without `Cache-Control`.
pub fn demands_validation(request: &Fields, control: &CacheControl) -> bool {
    let pragma = || request.members(KnownField::Pragma).any(|member| member.eq_ignore_ascii_case(b"no-cache"));
    control.no_cache || (!request.has(KnownField::CacheControl) && pragma())
}

/// Whether a stored object may be used without validation (RFC 9111 section 4.2, request directives
/// of section 5.2.1).
pub fn is_usable(object: &CachedObject, freshness: Freshness, directives: &CacheControl) -> bool {
    if object.must_validate {
        return false;
    }
    let is_young_enough = directives.max_age.is_none_or(|limit| freshness.age <= limit);
    let remaining = freshness.lifetime.saturating_sub(freshness.age);
    let is_fresh_enough = freshness.is_fresh() && directives.min_fresh.is_none_or(|minimum| remaining >= minimum);
    is_young_enough && is_fresh_enough
}

/// A response of the origin and its request, as input of the storing decision.
pub struct StoreCandidate<'a> {
    pub request: &'a Request,
    /// The `Cache-Control` directives of the request.
    pub directives: &'a CacheControl,
    pub response: &'a Response,
    /// When the head of the response was complete.
    pub received_at: SystemTime,
    /// The time from sending the request to `received_at`.
    pub delay: Duration,
}

impl StoreCandidate<'_> {
    /// Decides whether the response is stored. Returns the object to store and how long to keep it.
    ///
    /// # Errors
    /// The reason why the response is not stored.
    pub fn evaluate(
        &self,
        policy: &CachePolicy,
        config: &CacheConfig,
    ) -> Result<(CachedObject, Duration), NoStoreReason> {
        let response = self.response;
        let directives = ResponseDirectives::of(&config.targeted, &response.fields);
        let control = directives.control;
        let mut fields = response.fields.compact();
        if control.has_qualified_fields {
            let qualified: Vec<&[u8]> = control::qualified_fields(&response.fields).collect();
            fields.retain(|field| !qualified.iter().any(|name| field.name.eq_ignore_ascii_case(name)));
        }
        self.check_storable(&fields, &control, policy.set_cookie)?;
        let of_origin = || FreshnessLifetime::of(&directives, response, policy, self.received_at);
        let is_explicit = policy.cookies == CookiePolicy::Explicit && self.request.fields.has(KnownField::Cookie);
        let freshness_lifetime = match policy.ttl_for_status(response.status.as_u16()) {
            by_status if is_explicit => of_origin().explicit(by_status),
            Some(lifetime) => FreshnessLifetime::Assumed(lifetime, LifetimeSource::StatusTtl),
            None => of_origin(),
        };
        let lifetime = freshness_lifetime.duration();
        let forbids_stale = control.forbids_stale();
        let stale_window = |from_origin: Option<Duration>, default: Duration| {
            if forbids_stale { Duration::ZERO } else { from_origin.unwrap_or(default) }
        };
        let object = CachedObject {
            status: response.status.as_u16(),
            fields,
            initial_age: freshness::initial_age(&response.fields, self.received_at, self.delay),
            lifetime,
            stale_while_revalidate: stale_window(control.stale_while_revalidate, policy.stale_while_revalidate),
            stale_if_error: stale_window(control.stale_if_error, policy.stale_if_error),
            must_validate: control.no_cache,
            forbids_stale,
            lifetime_source: freshness_lifetime.source(),
            assumes_stale_while_revalidate: control.stale_while_revalidate.is_none(),
            assumes_stale_if_error: control.stale_if_error.is_none(),
            tags: tags::response_tags(config, policy.tags.as_deref(), self.request, &response.fields),
            forms: StoredForms::default(),
        };
        let fresh_for = lifetime.saturating_sub(object.initial_age);
        // An object that is stale at once is stored only to be validated, and only if the origin
        // expects validation.
        let expects_validation = matches!(freshness_lifetime, FreshnessLifetime::Explicit(_)) || control.no_cache;
        if fresh_for.is_zero() && !(object.has_validator() && expects_validation) {
            return Err(NoStoreReason::NotFresh);
        }
        let validation_window = if object.has_validator() { KEEP_FOR_VALIDATION } else { Duration::ZERO };
        let keep = fresh_for + object.stale_while_revalidate.max(object.stale_if_error).max(validation_window);
        Ok((object, keep))
    }

    fn check_storable(
        &self,
        fields: &Fields,
        control: &CacheControl,
        set_cookie: SetCookiePolicy,
    ) -> Result<(), NoStoreReason> {
        let status = self.response.status;
        if status == StatusCode::PARTIAL_CONTENT || status == StatusCode::NOT_MODIFIED {
            return Err(NoStoreReason::Status);
        }
        // `must-understand` lets a cache that understands the status ignore `no-store` (section
        // 5.2.2.3).
        let overrides_no_store = control.must_understand && freshness::is_heuristically_cacheable(status);
        if control.must_understand && !overrides_no_store {
            return Err(NoStoreReason::Status);
        }
        if self.directives.no_store || control.private || (control.no_store && !overrides_no_store) {
            return Err(NoStoreReason::Directive);
        }
        let allows_authorization = control.public || control.s_maxage.is_some() || control.must_revalidate;
        if self.request.is_authorized() && !allows_authorization {
            return Err(NoStoreReason::Authorization);
        }
        if set_cookie == SetCookiePolicy::Private && fields.has(KnownField::SetCookie) {
            return Err(NoStoreReason::SetCookie);
        }
        Ok(())
    }
}

/// Whether the policy allows a stored object to be used at all. It may have been stored under
/// another policy: before a reload, or by another gateway.
pub(crate) fn is_allowed(object: &CachedObject, policy: &CachePolicy) -> bool {
    policy.set_cookie == SetCookiePolicy::Shared || !object.fields.has(KnownField::SetCookie)
}

/// Shortens a lifetime randomly by up to `percent`.
pub(crate) fn with_jitter(lifetime: Duration, percent: u32, random: u64) -> Duration {
    if percent == 0 {
        return lifetime;
    }
    let share = f64::from(percent) / 100.0 * (random >> 11) as f64 / (1u64 << 53) as f64;
    lifetime.mul_f64(1.0 - share)
}

/// Makes `request` conditional on the stored object, with both of its validators (RFC 9111 section
/// 4.3.1). The conditions of the client are replaced.
pub fn make_conditional(object: &CachedObject, request: &mut Fields) {
    request.remove(KnownField::IfNoneMatch);
    request.remove(KnownField::IfModifiedSince);
    if let Some(etag) = object.fields.get(KnownField::ETag) {
        request.add(KnownField::IfNoneMatch, etag);
    }
    if let Some(modified) = object.fields.get(KnownField::LastModified) {
        request.add(KnownField::IfModifiedSince, modified);
    }
}

/// Whether a 304 selects the stored object. A 304 with another entity tag selects another object
/// (RFC 9111 section 4.3.4).
pub fn is_selected(object: &CachedObject, response: &Response) -> bool {
    let (stored, received) = (&object.fields, &response.fields);
    match (stored.get(KnownField::ETag), received.get(KnownField::ETag)) {
        (Some(stored), Some(received)) => opaque_tag(stored) == opaque_tag(received),
        _ => true,
    }
}

/// Whether a response to HEAD matches the stored object of `length` bytes and may freshen it, or
/// contradicts it (RFC 9111 section 4.3.5). `None` if the response has no validator and shows
/// neither.
pub fn matches_head(object: &CachedObject, length: u64, response: &Response) -> Option<bool> {
    let (stored, received) = (&object.fields, &response.fields);
    let differs = |known| received.get(known).is_some_and(|value| stored.get(known) != Some(value));
    let contradicts = differs(KnownField::ETag)
        || differs(KnownField::LastModified)
        || matches!(response.length, BodyLength::Known(received_length) if received_length != length);
    let has_validator = received.has(KnownField::ETag) || received.has(KnownField::LastModified);
    (contradicts || has_validator).then_some(!contradicts)
}

/// The head of the stored object, freshened by a 304 or a response to HEAD (RFC 9111 section 3.2).
/// New fields replace old ones of the same name, except those that describe the stored body.
pub fn freshen(object: &CachedObject, response: &Response) -> Response {
    let mut fields = object.fields.clone();
    let belongs_to_body = |known| {
        matches!(known, Some(KnownField::ContentLength | KnownField::ContentEncoding | KnownField::ContentRange))
    };
    for field in response.fields.iter().filter(|field| !belongs_to_body(field.known)) {
        fields.retain(|old| !old.name.eq_ignore_ascii_case(field.name));
    }
    for field in response.fields.iter().filter(|field| !belongs_to_body(field.known)) {
        fields.push(field.name, field.value);
    }
    // The age of the old response no longer applies.
    if !response.fields.has(KnownField::Age) {
        fields.remove(KnownField::Age);
    }
    let status = StatusCode::from_u16(object.status).unwrap_or(StatusCode::OK);
    Response { version: response.version, status, fields, length: response.length, forms: None }
}

/// Whether the conditions of the client hold, so that the response is 304 (RFC 9110 section
/// 13.2.2).
pub fn is_not_modified(request: &Fields, object: &CachedObject) -> bool {
    if request.has(KnownField::IfNoneMatch) {
        let Some(etag) = object.fields.get(KnownField::ETag) else {
            return request.get(KnownField::IfNoneMatch) == Some(b"*");
        };
        return request
            .all(KnownField::IfNoneMatch)
            .any(|line| line.trim_ascii() == b"*" || entity_tags(line).any(|tag| opaque_tag(tag) == opaque_tag(etag)));
    }
    // Without `Last-Modified`, the response is unchanged since its `Date` (RFC 9111 section 4.3.2).
    let modified = object.fields.get(KnownField::LastModified).or_else(|| object.fields.get(KnownField::Date));
    let mut lines = request.all(KnownField::IfModifiedSince);
    // A repeated date is ignored (RFC 9110 section 13.1.3).
    let (Some(since), None, Some(modified)) = (lines.next(), lines.next(), modified) else { return false };
    matches!((date::parse(since), date::parse(modified)), (Some(since), Some(modified)) if modified <= since)
}

fn opaque_tag(tag: &[u8]) -> &[u8] {
    tag.strip_prefix(b"W/").unwrap_or(tag)
}

/// The entity tags of a field line. A backslash does not escape anything in an entity tag (RFC 9110
/// section 8.8.3). An unquoted tag ends at the next comma.
fn entity_tags(mut line: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        while let Some((b',' | b' ' | b'\t', rest)) = line.split_first() {
            line = rest;
        }
        let quote_at = line.len() - opaque_tag(line).len();
        let is_quoted = line.get(quote_at) == Some(&b'"');
        let close =
            if is_quoted { memchr::memchr(b'"', &line[quote_at + 1..]).map(|at| quote_at + at + 2) } else { None };
        let end = close.or_else(|| memchr::memchr(b',', line)).unwrap_or(line.len());
        let tag = line[..end].trim_ascii_end();
        line = &line[end..];
        (!tag.is_empty()).then_some(tag)
    })
}

/// The complete object of an entry. `None` for any other entry.
pub fn object(meta: &CacheMeta) -> Option<&CachedObject> {
    match meta {
        CacheMeta::Object(object) => Some(object),
        CacheMeta::Varies { .. } | CacheMeta::HitForMiss | CacheMeta::Partial(..) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, lines: &[(&str, &str)]) -> Response {
        let mut response = Response::new(StatusCode::from_u16(status).expect("valid"));
        for (name, value) in lines {
            response.fields.push(name.as_bytes(), value.as_bytes());
        }
        response
    }

    fn evaluate(
        request: &Request,
        response: &Response,
        policy: &CachePolicy,
    ) -> Result<(CachedObject, Duration), NoStoreReason> {
        let directives = CacheControl::parse(&request.fields);
        let candidate = StoreCandidate {
            request,
            directives: &directives,
            response,
            received_at: SystemTime::now(),
            delay: Duration::ZERO,
        };
        candidate.evaluate(policy, &CacheConfig::default())
    }

    fn fresh_for(request: &Request, response: &Response) -> Result<Duration, NoStoreReason> {
        evaluate(request, response, &CachePolicy::default())
            .map(|(object, _)| object.lifetime.saturating_sub(object.initial_age))
    }

    #[test]
    fn private_and_stale_responses_are_not_stored() {
        let get = Request::default();
        for (lines, reason) in [
            (&[("cache-control", "private, max-age=60")][..], NoStoreReason::Directive),
            (&[("cache-control", "Private, max-age=60")], NoStoreReason::Directive),
            (&[("cache-control", "private=x, max-age=60")], NoStoreReason::Directive),
            (&[("cache-control", "no-store, max-age=60")], NoStoreReason::Directive),
            (&[("cache-control", "max-age=60"), ("set-cookie", "a=b")], NoStoreReason::SetCookie),
            (&[("cache-control", "max-age=0")], NoStoreReason::NotFresh),
            (&[("cache-control", "max-age=60"), ("age", "60")], NoStoreReason::NotFresh),
            (&[("cache-control", "max-age=60"), ("age", "99999999999999999999999999")], NoStoreReason::NotFresh),
            (&[("expires", "0")], NoStoreReason::NotFresh),
            (&[("expires", "Mon, 01 Jan 2024 00:00:00 GMT")], NoStoreReason::NotFresh),
            (&[], NoStoreReason::NotFresh),
        ] {
            assert_eq!(fresh_for(&get, &response(200, lines)), Err(reason), "{lines:?}");
        }
        assert_eq!(fresh_for(&get, &response(206, &[("cache-control", "max-age=60")])), Err(NoStoreReason::Status));
    }

    #[test]
    fn jitter_is_at_most_the_configured_share() {
        let hour = Duration::from_secs(3600);
        assert_eq!(with_jitter(hour, 0, u64::MAX), hour);
        assert_eq!(with_jitter(hour, 50, 0), hour);
        assert!(with_jitter(hour, 50, u64::MAX) > hour / 2 - Duration::from_secs(1));
        assert!(with_jitter(hour, 50, u64::MAX) < hour / 2 + Duration::from_secs(1));
    }

    #[test]
    fn responses_to_authorized_requests_need_permission() {
        let mut request = Request::default();
        request.fields.push(b"Authorization", b"Basic x");
        assert_eq!(
            fresh_for(&request, &response(200, &[("cache-control", "max-age=60")])),
            Err(NoStoreReason::Authorization)
        );
        for open in ["public, max-age=60", "s-maxage=60", "must-revalidate, max-age=60"] {
            assert_eq!(fresh_for(&request, &response(200, &[("cache-control", open)])), Ok(Duration::from_secs(60)));
        }
    }

    #[test]
    fn explicit_lifetimes_have_a_precedence() {
        let get = Request::default();
        let lines = [("cache-control", "max-age=60, s-maxage=5"), ("expires", "Thu, 01 Jan 2099 00:00:00 GMT")];
        assert_eq!(fresh_for(&get, &response(200, &lines)), Ok(Duration::from_secs(5)));
        let dated = [("date", "Thu, 01 Jan 2099 00:00:00 GMT"), ("expires", "Thu, 01 Jan 2099 00:01:00 GMT")];
        assert_eq!(fresh_for(&get, &response(200, &dated)), Ok(Duration::from_secs(60)));
    }

    #[test]
    fn stale_windows_are_zero_if_the_origin_forbids_stale_use() {
        let policy = CachePolicy { stale_if_error: Duration::from_secs(600), ..CachePolicy::default() };
        let window = |value: &str| {
            let response = response(200, &[("cache-control", value), ("etag", "\"x\"")]);
            evaluate(&Request::default(), &response, &policy).map(|(object, _)| object.stale_if_error.as_secs())
        };
        assert_eq!(window("max-age=1"), Ok(600));
        assert_eq!(window("max-age=1, stale-if-error=5"), Ok(5));
        for forbidding in
            ["max-age=1, must-revalidate", "s-maxage=1", "max-age=1, proxy-revalidate", "no-cache, max-age=1"]
        {
            assert_eq!(window(forbidding), Ok(0), "{forbidding}");
        }
    }

    #[test]
    fn entity_tags_are_delimited_by_quotes() {
        let of = |line: &'static str| {
            entity_tags(line.as_bytes()).map(|tag| std::str::from_utf8(tag).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(of(r#" "a,b" ,, W/"c\","#), [r#""a,b""#, r#"W/"c\""#]);
        assert_eq!(of(r#"a, "b, c"#), ["a", "\"b", "c"]);
        assert!(of(" , ").is_empty());
    }

    #[test]
    fn conditions_compare_weakly() {
        let (object, _) = evaluate(
            &Request::default(),
            &response(200, &[("etag", "W/\"a\""), ("cache-control", "max-age=9")]),
            &CachePolicy::default(),
        )
        .expect("storable");
        let matches = |value: &str| {
            let mut fields = Fields::default();
            fields.push(b"If-None-Match", value.as_bytes());
            is_not_modified(&fields, &object)
        };
        assert!(matches("\"a\"") && matches("\"b\", W/\"a\"") && matches("*"));
        assert!(!matches("\"b\""));
    }
}
