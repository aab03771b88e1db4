//! Fallback responses: the route's page or a problem document, as HTML or JSON by `Accept`.
//!
//! All responses that the gateway synthesises are written here. They have `no-store` and a reason.

use std::cell::{Cell, RefCell};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::StatusCode;

use crate::cache::StatusPattern;
use crate::error::{Error, ErrorKind};
use crate::http::fields::{Fields, KnownField};
use crate::http::message::{BodyLength, Response};
use crate::identify::Trace;
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
        match (kind, self.status) {
            (ErrorKind::Malformed | ErrorKind::UpstreamTls, StatusCode::SERVICE_UNAVAILABLE) => StatusCode::BAD_GATEWAY,
            (_, status) => status,
        }
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

/// Media type of a synthesised response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageFormat {
    Html,
    Json,
}

/// The format that `Accept` prefers (RFC 9110 section 12.5.1); problem JSON without a preference.
pub(crate) fn page_format(request: &Fields) -> PageFormat {
    if !request.has(KnownField::Accept) {
        return PageFormat::Json;
    }
    let (mut html, mut json) = (0, 0);
    for member in request.members(KnownField::Accept) {
        let text = String::from_utf8_lossy(member).to_ascii_lowercase();
        let mut parts = text.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok()).unwrap_or(1.0);
        // In thousandths: the grammar has at most three digits. An invalid weight counts as 0.
        let weight = if (0.0..=1.0).contains(&weight) { (weight * 1000.0) as u32 } else { 0 };
        match kind {
            "text/html" | "application/xhtml+xml" | "text/*" => html = html.max(weight),
            "application/json" | "application/problem+json" | "application/*" => json = json.max(weight),
            _ => {}
        }
    }
    if html > json { PageFormat::Html } else { PageFormat::Json }
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
    pub(crate) trace: Option<Trace>,
}

impl ErrorResponder<'_> {
    /// Writes the head of the response to `error` and returns its body.
    pub(crate) fn write(&self, error: &Error, response: &mut Response) -> Bytes {
        let page = self.config.filter(|_| error.is_degradable());
        let status = page.map_or(error.status(), |page| page.status_for(error.kind()));
        let format = page_format(self.request);
        let retry_after = match page {
            Some(page) => Some(jittered_retry_after(page.retry_after, self.wait, self.random)),
            None => retry_after(error.kind()),
        };
        let own = match format {
            PageFormat::Html => self.page(status, error, retry_after),
            PageFormat::Json => None,
        };
        let body = match (page, format) {
            (Some(DegradeConfig { html: Some(html), .. }), PageFormat::Html) => Bytes::copy_from_slice(html.as_bytes()),
            (Some(DegradeConfig { json: Some(json), .. }), PageFormat::Json) => Bytes::copy_from_slice(json.as_bytes()),
            (_, format) => own.unwrap_or_else(|| default_body(status, error, format)),
        };
        write_head(status, format, &body, response);
        if let Some(seconds) = retry_after {
            response.fields.add(KnownField::RetryAfter, seconds.to_string());
        }
        if page.is_some() {
            write_proxy_status(error.kind(), response);
        }
        body
    }

    /// The configured page for `status`, if there is one.
    pub(crate) fn page(&self, status: StatusCode, error: &Error, retry_after: Option<u64>) -> Option<Bytes> {
        let page = self.pages.into_iter().find_map(|pages| pages::find(pages, status))?;
        page.render(&PageFacts {
            status,
            reason: error.reason(),
            message: html_message(error.kind()),
            retry_after,
            route: self.route,
            request_id: &self.trace.map(|trace| trace.to_string()).unwrap_or_default(),
        })
    }
}

/// Seconds after which a request whose credentials were not verified may try again.
fn retry_after(kind: ErrorKind) -> Option<u64> {
    match kind {
        // Ten tokens of an address are verified each second.
        ErrorKind::VerificationThrottled | ErrorKind::AuthenticationBusy => Some(1),
        // One more password of an address is verified every 6 s.
        ErrorKind::AuthenticationThrottled => Some(6),
        _ => None,
    }
}

/// Adds `Proxy-Status` (RFC 9209): why the response is a page or stale instead of the origin's.
pub(crate) fn write_proxy_status(kind: ErrorKind, response: &mut Response) {
    response.fields.add(KnownField::ProxyStatus, proxy_status_value(kind));
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
pub(crate) fn write_refusal(status: StatusCode, reason: &str, response: &mut Response) -> Bytes {
    let body = problem(status, reason);
    write_head(status, PageFormat::Json, &body, response);
    response.fields.add(KnownField::CacheStatus, format!("tidegate; detail={reason}"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.fields.add(KnownField::Allow, METHODS);
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
        PageFormat::Html => &HTML_FIELDS,
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
    response.fields.copy_from(base_fields(format));
    response.length = BodyLength::Known(body.len() as u64);
    add_date(&mut response.fields);
}

/// Constant body of the most frequent synthesised response.
const LIMITED_BODY: &[u8] =
    b"{\"type\":\"about:blank\",\"title\":\"Too Many Requests\",\"status\":429,\"reason\":\"limited\"}\n";

/// The built-in body of a failure.
pub(crate) fn default_body(status: StatusCode, error: &Error, format: PageFormat) -> Bytes {
    match format {
        PageFormat::Json if error.kind() == ErrorKind::Limited => Bytes::from_static(LIMITED_BODY),
        PageFormat::Json => problem(status, error.reason()),
        PageFormat::Html => {
            let title = status.canonical_reason().unwrap_or("Error");
            Bytes::from(format!(
                "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
                 <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
                 <style>body{{font:1.1em/1.5 system-ui,sans-serif;max-width:34em;margin:15vh auto;padding:0 1em}}</style></head>\
                 <body><h1>{title}</h1><p>{}</p></body></html>\n",
                html_message(error.kind())
            ))
        }
    }
}

/// Problem details (RFC 9457): `about:blank` with title, status and reason. None of these needs
/// escaping.
fn problem(status: StatusCode, reason: &str) -> Bytes {
    let title = status.canonical_reason().unwrap_or("Error");
    let parts = [
        "{\"type\":\"about:blank\",\"title\":\"",
        title,
        "\",\"status\":",
        status.as_str(),
        ",\"reason\":\"",
        reason,
        "\"}\n",
    ];
    Bytes::from(parts.concat())
}

fn html_message(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NoRoute => "Nothing is available at this address.",
        ErrorKind::Forbidden => "Access is denied.",
        ErrorKind::Limited => "Too many requests. Please wait a moment and try again.",
        ErrorKind::Unauthorized => "This page needs a name and a password, or a key.",
        ErrorKind::VerificationThrottled | ErrorKind::AuthenticationThrottled => {
            "Too many requests with invalid credentials. Please wait a moment and try again."
        }
        ErrorKind::OnlyIfCached => "No stored response is available.",
        ErrorKind::ClientBody | ErrorKind::ClientGone => "The request could not be read.",
        ErrorKind::Panic => "Something went wrong on our side.",
        _ => "The service is temporarily unavailable. Please try again shortly.",
    }
}

/// The value of `Proxy-Status` with the matching error type of RFC 9209 section 2.3.
fn proxy_status_value(kind: ErrorKind) -> String {
    let error = match kind {
        ErrorKind::BreakerOpen => "destination_unavailable",
        ErrorKind::ConcurrencyLimit => "connection_limit_reached",
        ErrorKind::Connect => "connection_refused",
        ErrorKind::NoAddress => "dns_error",
        ErrorKind::UpstreamTls => "tls_certificate_error",
        ErrorKind::ConnectTimeout => "connection_timeout",
        ErrorKind::NoResponse => "connection_terminated",
        ErrorKind::Malformed => "http_protocol_error",
        ErrorKind::Timeout | ErrorKind::TotalTimeout | ErrorKind::SharedFetchTimeout => "http_response_timeout",
        ErrorKind::Upstream => "http_response_incomplete",
        _ => "proxy_internal_error",
    };
    format!("tidegate; error={error}")
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

    fn accept(value: &str) -> PageFormat {
        let mut fields = Fields::default();
        fields.push(b"Accept", value.as_bytes());
        page_format(&fields)
    }

    #[test]
    fn accept_selects_the_format() {
        assert_eq!(page_format(&Fields::default()), PageFormat::Json);
        assert_eq!(accept("*/*"), PageFormat::Json);
        assert_eq!(accept("text/html,application/xhtml+xml,*/*;q=0.8"), PageFormat::Html);
        assert_eq!(accept("text/html;q=0.5, application/json"), PageFormat::Json);
        assert_eq!(accept("text/html;q=nan, application/json;q=0.1"), PageFormat::Json);
    }

    #[test]
    fn constant_body_equals_the_composed_one() {
        assert_eq!(LIMITED_BODY, problem(StatusCode::TOO_MANY_REQUESTS, "limited"));
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
    fn page_replaces_only_failures_behind_the_gateway() {
        let page = DegradeConfig { html: None, json: Some("{}".into()), ..DegradeConfig::default() };
        let mut response = Response::new(StatusCode::OK);
        let fields = Fields::default();
        let page = ErrorResponder {
            config: Some(&page),
            request: &fields,
            wait: Duration::ZERO,
            random: 0,
            pages: [&[], &[]],
            route: "",
            trace: None,
        };
        assert_eq!(page.write(&Error::NoRoute, &mut response).first(), Some(&b'{'));
        assert_eq!(response.status, StatusCode::NOT_FOUND);
        assert_eq!(page.write(&Error::BreakerOpen, &mut response), "{}");
        assert!(response.fields.has(KnownField::RetryAfter));
        assert_eq!(response.fields.get(KnownField::CacheControl), Some(&b"no-store"[..]));
    }
}
