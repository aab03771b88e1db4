//! The decisions of a shared cache: may this be stored, may that be used (RFC 9111 sections 3 and 4).

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::Method;

use super::control::{self, Control};
use super::fresh::{self, Lifetime};
use super::part::Extent;
use super::range::{self, Wanted};
use super::stored::{Meta, Object, Standing};
use super::{RoutePolicy, SetCookie, Settings, date, key, tags, targeted};
use crate::http::fields::{Fields, Known};
use crate::http::message::{Length, Request, Response, StatusCode};

/// How long an object with a validator is kept beyond all its windows, to be validated rather than fetched again.
const VALIDATE_FOR: Duration = Duration::from_secs(3600);
/// How long a key counts as uncacheable after an answer that was.
pub const PASS_FOR: Duration = Duration::from_secs(10);

/// Why a response is not stored; the text appears in `Cache-Status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoStore {
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
}

impl NoStore {
    pub fn as_str(self) -> &'static str {
        match self {
            NoStore::Method => "method",
            NoStore::Status => "status",
            NoStore::Directive => "directive",
            NoStore::Authorization => "authorization",
            NoStore::SetCookie => "set-cookie",
            NoStore::Vary => "vary",
            NoStore::Variants => "variants",
            NoStore::NotFresh => "not-fresh",
            NoStore::TooLarge => "too-large",
            NoStore::Range => "range",
        }
    }
}

/// Whether a request may be answered from the cache and fill it at all.
pub fn is_lookup(request: &Request) -> bool {
    matches!(request.method, Method::GET | Method::HEAD)
        && request.length == Length::Empty
        && !request.fields.has(Known::IfMatch)
        && !request.fields.has(Known::IfUnmodifiedSince)
}

/// Whether an answer to POST is what GET would get: it says how long it is fresh, and that it lies where the request went
/// (RFC 9110 section 9.3.3).
pub fn is_answer_of_target(request: &Request, response: &Response) -> bool {
    let place = response.fields.get(Known::ContentLocation).and_then(|place| std::str::from_utf8(place).ok());
    let (Some(place), StatusCode::OK) = (place, response.status) else { return false };
    let control = Control::of(&response.fields);
    let is_explicit = control.max_age.or(control.s_maxage).is_some() || response.fields.has(Known::Expires);
    is_explicit && key::same_origin(place, request).as_deref() == Some(&*request.target)
}

/// Whether a request wants a part only (RFC 9110 section 14.2 defines that for GET alone).
pub fn wants_part(request: &Request) -> bool {
    request.method == Method::GET && request.fields.has(Known::Range)
}

/// Takes what `request` wants of a whole answer: all of it, parts, or 416.
pub fn cut(request: &Request, body: Bytes, response: &mut Response) -> Bytes {
    if !wants_part(request) || response.status != StatusCode::OK {
        return body;
    }
    let wanted = range::wanted(&request.fields, &response.fields, body.len() as u64);
    if wanted == Wanted::Whole {
        return body;
    }
    let extent = Extent::whole(body.len() as u64);
    range::answer(wanted, extent, &body, response).unwrap_or(body)
}

/// Takes what `request` wants of a stored part; `None` where the part does not have it all. `response` has the head of the whole.
pub fn cut_part(request: &Request, extent: Extent, body: &Bytes, response: &mut Response) -> Option<Bytes> {
    let wanted = range::wanted(&request.fields, &response.fields, extent.total);
    range::answer(wanted, extent, body, response)
}

/// Whether a request asks not to be answered without validation: `no-cache`, or `Pragma` where there is no `Cache-Control`.
pub fn demands_validation(request: &Fields, control: &Control) -> bool {
    let pragma = || request.members(Known::Pragma).any(|member| member.eq_ignore_ascii_case(b"no-cache"));
    control.no_cache || (!request.has(Known::CacheControl) && pragma())
}

/// Whether a stored object may answer a request as it stands (RFC 9111 section 4.2, request directives of section 5.2.1).
pub fn may_use(object: &Object, standing: Standing, asked: &Control) -> bool {
    if object.must_validate {
        return false;
    }
    let age_allows = asked.max_age.is_none_or(|limit| standing.age <= limit);
    let left = standing.lifetime.saturating_sub(standing.age);
    let fresh_enough = standing.is_fresh() && asked.min_fresh.is_none_or(|least| left >= least);
    age_allows && fresh_enough
}

/// Judges a response to `request`. `now` is the moment its head was complete, `delay` how long the exchange took until then.
///
/// # Errors
/// Why it is not stored.
pub fn judge(
    request: &Request,
    asked: &Control,
    response: &Response,
    route: &RoutePolicy,
    settings: &Settings,
    now: SystemTime,
    delay: Duration,
) -> Result<(Object, Duration), NoStore> {
    let targeted = targeted::control(&settings.targeted, &response.fields);
    let control = targeted.unwrap_or_else(|| Control::of(&response.fields));
    let mut fields = response.fields.compact();
    if control.withholds {
        let withheld: Vec<&[u8]> = control::withheld(&response.fields).collect();
        fields.retain(|field| !withheld.iter().any(|name| field.name.eq_ignore_ascii_case(name)));
    }
    check_storable(request, asked, response.status, &fields, &control, route.set_cookie)?;
    let found = route
        .ttl_of(response.status.as_u16())
        .map_or_else(|| Lifetime::of(&control, targeted.is_some(), response, route, now), Lifetime::Assumed);
    let lifetime = found.length();
    let forbids_stale = control.forbids_stale();
    let window =
        |own: Option<Duration>, routes: Duration| if forbids_stale { Duration::ZERO } else { own.unwrap_or(routes) };
    let object = Object {
        status: response.status.as_u16(),
        fields,
        initial_age: fresh::initial_age(&response.fields, now, delay),
        lifetime,
        stale_while_revalidate: window(control.stale_while_revalidate, route.stale_while_revalidate),
        stale_if_error: window(control.stale_if_error, route.stale_if_error),
        must_validate: control.no_cache,
        forbids_stale,
        tags: tags::of(settings, route.tags.as_deref(), request, &response.fields),
    };
    let fresh_for = lifetime.saturating_sub(object.initial_age);
    // What is stale at once is worth keeping only to be validated, and only where the origin expects that.
    let is_foreseen = matches!(found, Lifetime::Explicit(_)) || control.no_cache;
    if fresh_for.is_zero() && !(object.has_validator() && is_foreseen) {
        return Err(NoStore::NotFresh);
    }
    let beyond = if object.has_validator() { VALIDATE_FOR } else { Duration::ZERO };
    let keep = fresh_for + object.stale_while_revalidate.max(object.stale_if_error).max(beyond);
    Ok((object, keep))
}

/// A lifetime less up to `percent` of it.
pub fn jittered(lifetime: Duration, percent: u32, random: u64) -> Duration {
    if percent == 0 {
        return lifetime;
    }
    let share = f64::from(percent) / 100.0 * (random >> 11) as f64 / (1u64 << 53) as f64;
    lifetime.mul_f64(1.0 - share)
}

fn check_storable(
    request: &Request,
    asked: &Control,
    status: StatusCode,
    fields: &Fields,
    control: &Control,
    set_cookie: SetCookie,
) -> Result<(), NoStore> {
    if status == StatusCode::PARTIAL_CONTENT || status == StatusCode::NOT_MODIFIED {
        return Err(NoStore::Status);
    }
    // `must-understand` lets a cache that knows the status ignore `no-store` (section 5.2.2.3).
    let overridden = control.must_understand && fresh::may_assume(status);
    if control.must_understand && !overridden {
        return Err(NoStore::Status);
    }
    if asked.no_store || control.private || (control.no_store && !overridden) {
        return Err(NoStore::Directive);
    }
    let opened = control.public || control.s_maxage.is_some() || control.must_revalidate;
    if request.fields.has(Known::Authorization) && !opened {
        return Err(NoStore::Authorization);
    }
    if set_cookie == SetCookie::Private && fields.has(Known::SetCookie) {
        return Err(NoStore::SetCookie);
    }
    Ok(())
}

/// Makes `request` conditional on what is stored, by both validators (RFC 9111 section 4.3.1). The client's own conditions are replaced.
pub fn make_conditional(object: &Object, request: &mut Fields) {
    request.remove(Known::IfNoneMatch);
    request.remove(Known::IfModifiedSince);
    if let Some(etag) = object.fields.get(Known::ETag) {
        request.add(Known::IfNoneMatch, etag);
    }
    if let Some(modified) = object.fields.get(Known::LastModified) {
        request.add(Known::IfModifiedSince, modified);
    }
}

/// Whether a 304 speaks of the stored object: one that names another validator speaks of another (RFC 9111 section 4.3.4).
pub fn is_selected(object: &Object, response: &Response) -> bool {
    let (stored, said) = (&object.fields, &response.fields);
    match (stored.get(Known::ETag), said.get(Known::ETag)) {
        (Some(stored), Some(said)) => weak(stored) == weak(said),
        _ => true,
    }
}

/// Whether an answer to HEAD agrees with the stored object of `length` bytes, so that it may freshen it, or contradicts it (RFC
/// 9111 section 4.3.5). `None`: without a validator it proves nothing.
pub fn agrees(object: &Object, length: u64, response: &Response) -> Option<bool> {
    let (stored, said) = (&object.fields, &response.fields);
    let differs = |known| said.get(known).is_some_and(|said| stored.get(known) != Some(said));
    let is_other = differs(Known::ETag)
        || differs(Known::LastModified)
        || matches!(response.length, Length::Known(said) if said != length);
    let is_proven = said.has(Known::ETag) || said.has(Known::LastModified);
    (is_other || is_proven).then_some(!is_other)
}

/// The stored object freshened by a 304, or by an answer to HEAD (RFC 9111 section 3.2): new fields replace old ones of the
/// same name, but for those that belong to the bytes of the body.
pub fn freshen(object: &Object, response: &Response) -> Response {
    let mut fields = object.fields.clone();
    let keeps = |known| matches!(known, Some(Known::ContentLength | Known::ContentEncoding | Known::ContentRange));
    for field in response.fields.iter().filter(|field| !keeps(field.known)) {
        fields.retain(|old| !old.name.eq_ignore_ascii_case(field.name));
    }
    for field in response.fields.iter().filter(|field| !keeps(field.known)) {
        fields.push(field.name, field.value);
    }
    // What the old response had become counts no more.
    if !response.fields.has(Known::Age) {
        fields.remove(Known::Age);
    }
    let status = StatusCode::from_u16(object.status).unwrap_or(StatusCode::OK);
    Response { status, fields, length: response.length }
}

/// Whether the client's conditions hold its copy to be current, so that 304 answers it (RFC 9110 section 13.2.2).
pub fn is_not_modified(request: &Fields, object: &Object) -> bool {
    if request.has(Known::IfNoneMatch) {
        let Some(etag) = object.fields.get(Known::ETag) else {
            return request.get(Known::IfNoneMatch) == Some(b"*");
        };
        return request
            .all(Known::IfNoneMatch)
            .any(|line| line.trim_ascii() == b"*" || entity_tags(line).any(|tag| weak(tag) == weak(etag)));
    }
    // Without a date of change, the response cannot have changed after it was made (RFC 9111 section 4.3.2).
    let modified = object.fields.get(Known::LastModified).or_else(|| object.fields.get(Known::Date));
    let mut lines = request.all(Known::IfModifiedSince);
    // Two dates are none (RFC 9110 section 13.1.3).
    let (Some(since), None, Some(modified)) = (lines.next(), lines.next(), modified) else { return false };
    matches!((date::parse(since), date::parse(modified)), (Some(since), Some(modified)) if modified <= since)
}

fn weak(tag: &[u8]) -> &[u8] {
    tag.strip_prefix(b"W/").unwrap_or(tag)
}

/// The entity tags of a line; a backslash in a tag escapes nothing (RFC 9110 section 8.8.3). A tag without quotes ends at the
/// next comma.
fn entity_tags(mut line: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        while let Some((b',' | b' ' | b'\t', rest)) = line.split_first() {
            line = rest;
        }
        let open = line.len() - weak(line).len();
        let quoted = line.get(open) == Some(&b'"');
        let close = if quoted { memchr::memchr(b'"', &line[open + 1..]).map(|at| open + at + 2) } else { None };
        let end = close.or_else(|| memchr::memchr(b',', line)).unwrap_or(line.len());
        let tag = line[..end].trim_ascii_end();
        line = &line[end..];
        (!tag.is_empty()).then_some(tag)
    })
}

/// The object inside a stored entry, if it is one.
pub fn object(meta: &Meta) -> Option<&Object> {
    match meta {
        Meta::Object(object) => Some(object),
        Meta::Varies { .. } | Meta::Pass | Meta::Part(..) => None,
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

    fn judged(request: &Request, response: &Response) -> Result<Duration, NoStore> {
        let asked = Control::of(&request.fields);
        judge(
            request,
            &asked,
            response,
            &RoutePolicy::default(),
            &Settings::default(),
            SystemTime::now(),
            Duration::ZERO,
        )
        .map(|(object, _)| object.lifetime.saturating_sub(object.initial_age))
    }

    #[test]
    fn what_may_not_be_shared_is_not_stored() {
        let get = Request::default();
        for (lines, reason) in [
            (&[("cache-control", "private, max-age=60")][..], NoStore::Directive),
            (&[("cache-control", "Private, max-age=60")], NoStore::Directive),
            (&[("cache-control", "private=x, max-age=60")], NoStore::Directive),
            (&[("cache-control", "no-store, max-age=60")], NoStore::Directive),
            (&[("cache-control", "max-age=60"), ("set-cookie", "a=b")], NoStore::SetCookie),
            (&[("cache-control", "max-age=0")], NoStore::NotFresh),
            (&[("cache-control", "max-age=60"), ("age", "60")], NoStore::NotFresh),
            (&[("cache-control", "max-age=60"), ("age", "99999999999999999999999999")], NoStore::NotFresh),
            (&[("expires", "0")], NoStore::NotFresh),
            (&[("expires", "Mon, 01 Jan 2024 00:00:00 GMT")], NoStore::NotFresh),
            (&[], NoStore::NotFresh),
        ] {
            assert_eq!(judged(&get, &response(200, lines)), Err(reason), "{lines:?}");
        }
        assert_eq!(judged(&get, &response(206, &[("cache-control", "max-age=60")])), Err(NoStore::Status));
    }

    #[test]
    fn jitter_takes_no_more_than_its_share() {
        let hour = Duration::from_secs(3600);
        assert_eq!(jittered(hour, 0, u64::MAX), hour);
        assert_eq!(jittered(hour, 50, 0), hour);
        assert!(jittered(hour, 50, u64::MAX) > hour / 2 - Duration::from_secs(1));
        assert!(jittered(hour, 50, u64::MAX) < hour / 2 + Duration::from_secs(1));
    }

    #[test]
    fn authorised_responses_need_permission() {
        let mut request = Request::default();
        request.fields.push(b"Authorization", b"Basic x");
        assert_eq!(judged(&request, &response(200, &[("cache-control", "max-age=60")])), Err(NoStore::Authorization));
        for open in ["public, max-age=60", "s-maxage=60", "must-revalidate, max-age=60"] {
            assert_eq!(judged(&request, &response(200, &[("cache-control", open)])), Ok(Duration::from_secs(60)));
        }
    }

    #[test]
    fn explicit_lifetimes_have_an_order() {
        let get = Request::default();
        let lines = [("cache-control", "max-age=60, s-maxage=5"), ("expires", "Thu, 01 Jan 2099 00:00:00 GMT")];
        assert_eq!(judged(&get, &response(200, &lines)), Ok(Duration::from_secs(5)));
        let dated = [("date", "Thu, 01 Jan 2099 00:00:00 GMT"), ("expires", "Thu, 01 Jan 2099 00:01:00 GMT")];
        assert_eq!(judged(&get, &response(200, &dated)), Ok(Duration::from_secs(60)));
    }

    #[test]
    fn stale_windows_close_where_the_origin_forbids_them() {
        let route = RoutePolicy { stale_if_error: Duration::from_secs(600), ..RoutePolicy::default() };
        let window = |value: &str| {
            let response = response(200, &[("cache-control", value), ("etag", "\"x\"")]);
            judge(
                &Request::default(),
                &Control::default(),
                &response,
                &route,
                &Settings::default(),
                SystemTime::now(),
                Duration::ZERO,
            )
            .map(|(object, _)| object.stale_if_error.as_secs())
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
    fn tags_are_told_apart_by_their_quotes() {
        let of = |line: &'static str| {
            entity_tags(line.as_bytes()).map(|tag| std::str::from_utf8(tag).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(of(r#" "a,b" ,, W/"c\","#), [r#""a,b""#, r#"W/"c\""#]);
        assert_eq!(of(r#"a, "b, c"#), ["a", "\"b", "c"]);
        assert!(of(" , ").is_empty());
    }

    #[test]
    fn conditions_compare_weakly() {
        let (object, _) = judge(
            &Request::default(),
            &Control::default(),
            &response(200, &[("etag", "W/\"a\""), ("cache-control", "max-age=9")]),
            &RoutePolicy::default(),
            &Settings::default(),
            SystemTime::now(),
            Duration::ZERO,
        )
        .expect("storable");
        let asks = |value: &str| {
            let mut fields = Fields::default();
            fields.push(b"If-None-Match", value.as_bytes());
            is_not_modified(&fields, &object)
        };
        assert!(asks("\"a\"") && asks("\"b\", W/\"a\"") && asks("*"));
        assert!(!asks("\"b\""));
    }
}
