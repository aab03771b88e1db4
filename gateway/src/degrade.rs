//! Fallback responses: the route's page or a problem document, as HTML or JSON by `Accept`.
//!
//! All responses that the gateway synthesises are written here. They have `no-store` and a reason.

mod page_format;
mod built_in_page;

use std::cell::{Cell, RefCell};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use built_in_page::PageText;
use bytes::Bytes;
use http::StatusCode;
pub(crate) use page_format::{PageFormat, PageLanguage};

use crate::cache::StatusPattern;
use crate::error::{Error, ErrorKind};
use crate::http::fields::{Fields, KnownField};
use crate::http::grpc::{self, GrpcStatus};
use crate::http::h1::RequestRefusal;
use crate::http::message::{BodyLength, Response};
use crate::identify::RequestId;
use crate::pages::{self, ErrorPage, PageFacts};

/// The degrade page of a route (`routes.degrade`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DegradeConfig {
    /// Status of the page, 400 to 599.
    pub(crate) status: StatusCode,
    /// The page for clients that accept HTML, read when the configuration was loaded; `None`: the
    /// built-in page.
    pub(crate) html: Option<String>,
    /// The page for clients that accept JSON, likewise.
    pub(crate) json: Option<String>,
    /// Mean of the jittered `Retry-After`.
    pub(crate) retry_after: Duration,
}

impl DegradeConfig {
    /// The default 503 tells clients to retry later. An upstream with malformed responses or with
    /// a wrong certificate is broken rather than overloaded: 502 (RFC 9110 section 15.6.3).
    fn status_for(&self, kind: ErrorKind) -> StatusCode {
        let is_broken = matches!(
            kind,
            ErrorKind::Malformed
                | ErrorKind::UpstreamTls
                | ErrorKind::UpstreamTlsAlert
                | ErrorKind::UpstreamTlsProtocol
        );
        if is_broken && self.status == StatusCode::SERVICE_UNAVAILABLE { StatusCode::BAD_GATEWAY } else { self.status }
    }
}

impl Default for DegradeConfig {
    fn default() -> Self {
        DegradeConfig {
            status: StatusCode::SERVICE_UNAVAILABLE,
            html: None,
            json: None,
            retry_after: Duration::from_secs(5),
        }
    }
}

/// Writes the response to an `Error`: the route's page or a problem document, in the format that
/// the request's `Accept` prefers.
pub(crate) struct ErrorResponder<'a> {
    /// The route's page, used if the failure is behind the gateway.
    pub(crate) config: Option<&'a DegradeConfig>,
    /// The request's fields, for `Accept`.
    pub(crate) request: &'a Fields,
    /// Random number for the jitter of `Retry-After`.
    pub(crate) random: u64,
    /// The least time of `Retry-After`: nothing changes before.
    pub(crate) wait: Duration,
    /// The pages of the route, then those of the gateway.
    pub(crate) pages: [&'a [(StatusPattern, ErrorPage)]; 2],
    /// The name of the route; empty without one.
    pub(crate) route: &'a str,
    pub(crate) request_id: Option<&'a RequestId>,
}

impl ErrorResponder<'_> {
    /// Writes the head of the response to `error` and returns its body.
    pub(crate) fn write(&self, error: &Error, response: &mut Response) -> Bytes {
        if grpc::is_grpc(self.request) {
            return write_grpc(error, response);
        }
        let page = self.config.filter(|_| error.is_degradable());
        let status = page.map_or(error.status(), |page| page.status_for(error.kind()));
        let format = PageFormat::preferred(self.request);
        let retry_after = match page {
            Some(page) => Some(jittered_retry_after(page.retry_after, self.wait, self.random)),
            None => retry_after(error.kind()),
        };
        let own = match format {
            PageFormat::Html(language) => self.page(error, (status, retry_after), language),
            PageFormat::Json => None,
        };
        let body = match (page, format) {
            (Some(DegradeConfig { html: Some(html), .. }), PageFormat::Html(_)) => {
                Bytes::copy_from_slice(html.as_bytes())
            }
            (Some(DegradeConfig { json: Some(json), .. }), PageFormat::Json) => Bytes::copy_from_slice(json.as_bytes()),
            (_, format) => own.unwrap_or_else(|| {
                default_body(error, format, &BodyFacts { status, retry_after, request_id: self.request_id })
            }),
        };
        write_head(status, format, &body, response);
        name_choice(&mut response.fields);
        if let Some(seconds) = retry_after {
            response.fields.add(KnownField::RetryAfter, seconds.to_string());
        }
        body
    }

    /// The configured page for a status, if there is one. `retry_after`: seconds.
    pub(crate) fn page(
        &self,
        error: &Error,
        (status, retry_after): (StatusCode, Option<u64>),
        language: PageLanguage,
    ) -> Option<Bytes> {
        let page = self.pages.into_iter().find_map(|pages| pages::find(pages, status))?;
        page.render(&PageFacts {
            status,
            reason: error.reason(),
            message: built_in_page::message(error.kind(), language),
            language: language.tag(),
            retry_after,
            route: self.route,
            request_id: &self.request_id.map(ToString::to_string).unwrap_or_default(),
        })
    }
}

/// Seconds after which a request whose credentials were not verified may try again.
fn retry_after(kind: ErrorKind) -> Option<u64> {
    match kind {
        // Ten tokens of an address are verified each second.
        ErrorKind::VerificationThrottled | ErrorKind::AuthenticationBusy | ErrorKind::VerificationUnavailable => {
            Some(1)
        }
        // One more password of an address is verified every 6 s.
        ErrorKind::AuthenticationThrottled => Some(6),
        _ => None,
    }
}

/// Writes the response to an `Error` of a call of gRPC.
fn write_grpc(error: &Error, response: &mut Response) -> Bytes {
    response.status = error.status();
    response.fields.clear();
    add_date(&mut response.fields);
    if let Some(seconds) = retry_after(error.kind()) {
        response.fields.add(KnownField::RetryAfter, seconds.to_string());
    }
    make_grpc(error.reason(), response);
    Bytes::new()
}

/// Writes the response to a call of gRPC that is ended because of its upstream.
pub(crate) fn write_unavailable_call(reason: &str, response: &mut Response) {
    response.status = StatusCode::SERVICE_UNAVAILABLE;
    response.fields.clear();
    add_date(&mut response.fields);
    make_grpc(reason, response);
}

/// Turns the head of a response to a failure into that of gRPC: the status in a field, in a head
/// without a body (`Trailers-Only`). `reason` is a word without reserved characters.
pub(crate) fn make_grpc(reason: &str, response: &mut Response) {
    let status = GrpcStatus::of(response.status);
    response.status = StatusCode::OK;
    response.fields.remove(KnownField::ContentType);
    response.fields.remove(KnownField::CacheControl);
    response.fields.add(KnownField::ContentType, "application/grpc");
    status.write(reason, &mut response.fields);
    response.length = BodyLength::Empty;
}

/// The methods that this gateway forwards.
const METHODS: &str = "GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS";

/// Writes the gateway's own response to OPTIONS.
pub(crate) fn write_options(response: &mut Response) -> Bytes {
    response.status = StatusCode::OK;
    response.fields.clear();
    add_date(&mut response.fields);
    response.fields.add(KnownField::Allow, METHODS);
    response.length = BodyLength::Known(0);
    Bytes::new()
}

/// Writes the response to a request whose head was refused. The connection is closed after it.
pub(crate) fn write_refusal(refusal: RequestRefusal, id: Option<&RequestId>, response: &mut Response) -> Bytes {
    let (status, reason) = (refusal.status(), refusal.reason());
    let body = problem(status, reason, id);
    write_head(status, PageFormat::Json, &body, response);
    response.fields.add(KnownField::CacheStatus, format!("tidegate; detail={reason}"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.fields.add(KnownField::Allow, METHODS);
    }
    if let Some(id) = id {
        id.write(&mut response.fields);
    }
    body
}

thread_local! {
    /// The `Date` field of this thread. Its maintenance task updates it, so that no response reads
    /// the system clock.
    static DATE: RefCell<Option<Fields>> = const { RefCell::new(None) };
    /// Number of changes of `DATE`; `None` before the first update.
    static DATE_VERSION: Cell<Option<u64>> = const { Cell::new(None) };
}

/// The first fields of synthesised responses, by format.
static HTML_FIELDS: LazyLock<Fields> = LazyLock::new(|| base_fields_for("text/html; charset=utf-8"));
static JSON_FIELDS: LazyLock<Fields> = LazyLock::new(|| base_fields_for("application/problem+json"));

fn base_fields_for(content_type: &str) -> Fields {
    let mut fields = Fields::default();
    fields.add(KnownField::ContentType, content_type);
    fields.add(KnownField::CacheControl, "no-store");
    fields
}

fn base_fields(format: PageFormat) -> &'static Fields {
    match format {
        PageFormat::Html(_) => &HTML_FIELDS,
        PageFormat::Json => &JSON_FIELDS,
    }
}

/// Updates the `Date` of responses that this thread synthesises. Call several times a second.
pub(crate) fn update_date(now: SystemTime) {
    let mut current = Fields::default();
    current.add(KnownField::Date, httpdate::fmt_http_date(now));
    DATE.with_borrow_mut(|date| {
        if date.as_ref().and_then(|date| date.get(KnownField::Date)) != current.get(KnownField::Date) {
            *date = Some(current);
            DATE_VERSION.set(Some(DATE_VERSION.get().map_or(0, |version| version + 1)));
        }
    });
}

/// Version of this thread's `Date`: unchanged while the value of the field is unchanged.
pub(crate) fn date_version() -> Option<u64> {
    DATE_VERSION.get()
}

/// Adds `Date`, which the sender of a synthesised response generates (RFC 9110 section 6.6.1).
pub(crate) fn add_date(fields: &mut Fields) {
    DATE.with_borrow(|date| match date {
        Some(date) => fields.append_all(date),
        None => fields.add(KnownField::Date, httpdate::fmt_http_date(SystemTime::now())),
    });
}

/// Writes the head, without the fields that name the reason.
pub(crate) fn write_head(status: StatusCode, format: PageFormat, body: &Bytes, response: &mut Response) {
    response.status = status;
    response.forms = None;
    response.fields.copy_from(base_fields(format));
    response.length = BodyLength::Known(body.len() as u64);
    add_date(&mut response.fields);
}

/// Says that `Accept` and `Accept-Language` have chosen the page (RFC 9110 section 12.5.5).
pub(crate) fn name_choice(fields: &mut Fields) {
    fields.add(KnownField::Vary, "Accept, Accept-Language");
}

/// The built-in body of a failure.
pub(crate) fn default_body(error: &Error, format: PageFormat, facts: &BodyFacts<'_>) -> Bytes {
    let BodyFacts { status, retry_after, request_id } = *facts;
    match format {
        PageFormat::Json => problem(status, error.reason(), request_id),
        PageFormat::Html(language) => {
            let request_id = &request_id.map(ToString::to_string).unwrap_or_default();
            PageText { status, kind: error.kind(), retry_after, request_id, language }.html().into()
        }
    }
}

/// The facts of a response that its built-in body shows.
#[derive(Clone, Copy)]
pub(crate) struct BodyFacts<'a> {
    pub(crate) status: StatusCode,
    /// Seconds.
    pub(crate) retry_after: Option<u64>,
    pub(crate) request_id: Option<&'a RequestId>,
}

/// Problem details (RFC 9457): `about:blank` with title, status, reason and the id of the request.
/// None of these needs escaping.
fn problem(status: StatusCode, reason: &str, request_id: Option<&RequestId>) -> Bytes {
    let title = status.canonical_reason().unwrap_or("Error");
    let parts = ["{\"type\":\"about:blank\",\"title\":\"", title, "\",\"status\":", status.as_str()];
    let mut text = parts.concat().into_bytes();
    if let Some(id) = request_id {
        text.extend_from_slice(b",\"request_id\":\"");
        id.push(&mut text);
        text.push(b'"');
    }
    text.extend_from_slice([",\"reason\":\"", reason, "\"}\n"].concat().as_bytes());
    text.into()
}

/// Seconds between 0.5 and 1.5 times the configured mean, at least 1; with a longer `wait`, that
/// and up to the mean more. The jitter keeps clients from returning all at once.
fn jittered_retry_after(mean: Duration, wait: Duration, random: u64) -> u64 {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 4);
    let mean = millis(mean);
    let least = (mean / 2).max(millis(wait));
    least.saturating_add(random % mean.max(1)).div_ceil(1000).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::attempt::UpstreamConnectionError;
    use crate::http::exchange_clock::ExchangeTimeout;

    fn responder<'a>(config: &'a DegradeConfig, request: &'a Fields) -> ErrorResponder<'a> {
        ErrorResponder {
            config: Some(config),
            request,
            wait: Duration::ZERO,
            random: 0,
            pages: [&[], &[]],
            route: "",
            request_id: None,
        }
    }

    #[test]
    fn retry_after_is_jittered_around_the_configured_mean() {
        for random in [0, 1, u64::MAX, 12_345] {
            let second = Duration::from_secs(1);
            assert!((3..=8).contains(&jittered_retry_after(5 * second, Duration::ZERO, random)));
            assert!((30..=35).contains(&jittered_retry_after(5 * second, 30 * second, random)));
            assert_eq!(jittered_retry_after(Duration::ZERO, Duration::ZERO, random), 1);
            assert_eq!(jittered_retry_after(Duration::ZERO, Duration::from_millis(2_001), random), 3);
        }
    }

    #[test]
    fn failures_of_grpc_calls_are_statuses_of_grpc() {
        let mut fields = Fields::default();
        fields.push(b"Content-Type", b"application/grpc");
        let page = DegradeConfig::default();
        let page = responder(&page, &fields);
        let timeout = || UpstreamConnectionError::Timeout(ExchangeTimeout::UpstreamHead);
        for (error, expected) in [
            (Error::NoRoute, b"12"),
            (Error::BreakerOpen, b"14"),
            (Error::Unauthorized, b"16"),
            (Error::UpstreamConnection(timeout()), b"04"),
            (Error::Forbidden, b"07"),
            (Error::Panic, b"13"),
        ] {
            let mut response = Response::default();
            assert_eq!(page.write(&error, &mut response), "");
            assert_eq!((response.status, response.length), (StatusCode::OK, BodyLength::Empty));
            let number = response.fields.named(b"grpc-status").next().expect("a status");
            assert_eq!(number, expected.strip_prefix(b"0").unwrap_or(expected), "{error}");
            assert_eq!(response.fields.named(b"grpc-message").next(), Some(error.reason().as_bytes()));
        }
    }

    #[test]
    fn page_replaces_only_failures_behind_the_gateway() {
        let page = DegradeConfig { html: None, json: Some("{}".into()), ..DegradeConfig::default() };
        let mut response = Response::new(StatusCode::OK);
        let fields = Fields::default();
        let page = responder(&page, &fields);
        assert_eq!(page.write(&Error::NoRoute, &mut response).first(), Some(&b'{'));
        assert_eq!(response.status, StatusCode::NOT_FOUND);
        assert_eq!(page.write(&Error::BreakerOpen, &mut response), "{}");
        assert!(response.fields.has(KnownField::RetryAfter));
        assert_eq!(response.fields.get(KnownField::CacheControl), Some(&b"no-store"[..]));
    }
}
