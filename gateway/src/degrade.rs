//! What is answered when nothing better is left: the page of a route and its status, as HTML or problem JSON by `Accept`.
//!
//! Every answer that the gateway makes up itself is written here, so they all look alike: `no-store`, and a reason.

use std::cell::{Cell, RefCell};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::StatusCode;

use crate::error::{Error, Kind};
use crate::http::fields::{Fields, Known};
use crate::http::message::{Length, Response};

/// The last answer of a route (`routes.degrade`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Status of the page, 400 to 599.
    pub status: StatusCode,
    /// The page for clients that accept HTML, as read when the configuration was loaded; `None`: the built-in one.
    pub html: Option<String>,
    /// The page for clients that accept JSON, likewise.
    pub json: Option<String>,
    /// The middle of the jittered `Retry-After`.
    pub retry_after: Duration,
}

impl Settings {
    /// 503, the default, promises that waiting helps. An upstream whose answers are malformed is broken, not busy: 502 (RFC 9110
    /// section 15.6.3).
    fn status_for(&self, kind: Kind) -> StatusCode {
        match (kind, self.status) {
            (Kind::Malformed, StatusCode::SERVICE_UNAVAILABLE) => StatusCode::BAD_GATEWAY,
            (_, status) => status,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            status: StatusCode::SERVICE_UNAVAILABLE,
            html: None,
            json: None,
            retry_after: Duration::from_secs(5),
        }
    }
}

/// What a client would rather read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Html,
    Json,
}

/// The form that `Accept` prefers (RFC 9110 section 12.5.1); problem JSON where it does not say.
pub fn form(request: &Fields) -> Form {
    if !request.has(Known::Accept) {
        return Form::Json;
    }
    let (mut html, mut json) = (0, 0);
    for member in request.members(Known::Accept) {
        let text = String::from_utf8_lossy(member).to_ascii_lowercase();
        let mut parts = text.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok()).unwrap_or(1.0);
        // Thousandths, as the grammar has at most three digits; nonsense counts as nothing.
        let weight = if (0.0..=1.0).contains(&weight) { (weight * 1000.0) as u32 } else { 0 };
        match kind {
            "text/html" | "application/xhtml+xml" | "text/*" => html = html.max(weight),
            "application/json" | "application/problem+json" | "application/*" => json = json.max(weight),
            _ => {}
        }
    }
    if html > json { Form::Html } else { Form::Json }
}

/// Fills `response` with the answer to a failure and returns its body. `page` is the route's, where a page may stand in.
pub fn write(error: &Error, page: Option<&Settings>, request: &Fields, spread: u64, response: &mut Response) -> Bytes {
    let page = page.filter(|_| error.is_degradable());
    let status = page.map_or(error.status(), |page| page.status_for(error.kind()));
    let form = form(request);
    let body = match (page, form) {
        (Some(Settings { html: Some(html), .. }), Form::Html) => Bytes::copy_from_slice(html.as_bytes()),
        (Some(Settings { json: Some(json), .. }), Form::Json) => Bytes::copy_from_slice(json.as_bytes()),
        (_, form) => standard(status, error, form),
    };
    head(status, form, &body, response);
    if let Some(page) = page {
        response.fields.add(Known::RetryAfter, jittered(page.retry_after, spread).to_string());
        write_reason(error.kind(), response);
    } else if error.kind() == Kind::Unchecked {
        // Ten are looked at each second.
        response.fields.add(Known::RetryAfter, "1");
    }
    body
}

/// Says why the origin did not answer itself (RFC 9209), on a page as on a stale answer.
pub fn write_reason(kind: Kind, response: &mut Response) {
    response.fields.add(Known::ProxyStatus, proxy_status(kind));
}

/// What this gateway forwards.
const METHODS: &str = "GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS";

/// The gateway's own answer to OPTIONS.
pub fn write_options(response: &mut Response) -> Bytes {
    response.status = StatusCode::OK;
    response.fields.clear();
    date(&mut response.fields);
    response.fields.add(Known::Allow, METHODS);
    response.length = Length::Known(0);
    Bytes::new()
}

/// The answer to a request that was refused before it was understood; it closes the connection.
pub fn write_refusal(status: StatusCode, reason: &str, response: &mut Response) -> Bytes {
    let body = problem(status, reason);
    head(status, Form::Json, &body, response);
    response.fields.add(Known::CacheStatus, format!("tidegate; detail={reason}"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.fields.add(Known::Allow, METHODS);
    }
    body
}

thread_local! {
    /// The line of `Date` on this thread: written anew by its clock, so that no answer has to ask the system.
    static DATE: RefCell<Option<Fields>> = const { RefCell::new(None) };
    /// How often it has changed; nothing before there is one.
    static SECOND: Cell<Option<u64>> = const { Cell::new(None) };
}

/// What answers that are made up here begin with, by their form.
static HTML: LazyLock<Fields> = LazyLock::new(|| beginning("text/html; charset=utf-8"));
static JSON: LazyLock<Fields> = LazyLock::new(|| beginning("application/problem+json"));

fn beginning(content: &str) -> Fields {
    let mut fields = Fields::default();
    fields.add(Known::ContentType, content);
    fields.add(Known::CacheControl, "no-store");
    fields
}

/// The first lines of an answer in this form.
fn kind(form: Form) -> &'static Fields {
    match form {
        Form::Html => &HTML,
        Form::Json => &JSON,
    }
}

/// Says what time it is, for the answers of this thread that are the gateway's own; to be called several times a second.
pub fn set_date(now: SystemTime) {
    let mut line = Fields::default();
    line.add(Known::Date, httpdate::fmt_http_date(now));
    DATE.with_borrow_mut(|date| {
        if date.as_ref().and_then(|date| date.get(Known::Date)) != line.get(Known::Date) {
            *date = Some(line);
            SECOND.set(Some(SECOND.get().map_or(0, |second| second + 1)));
        }
    });
}

/// A number that lasts as long as `Date` says the same on this thread.
pub fn second() -> Option<u64> {
    SECOND.get()
}

/// Whoever makes an answer up says when (RFC 9110 section 6.6.1).
fn date(fields: &mut Fields) {
    DATE.with_borrow(|date| match date {
        Some(line) => fields.append_all(line),
        None => fields.add(Known::Date, httpdate::fmt_http_date(SystemTime::now())),
    });
}

/// Fills `response` but for what tells of its reason.
pub fn head(status: StatusCode, form: Form, body: &Bytes, response: &mut Response) {
    response.status = status;
    response.fields.copy_from(kind(form));
    response.length = Length::Known(body.len() as u64);
    date(&mut response.fields);
}

/// The most frequent of all answers that are made up here.
const LIMITED: &[u8] =
    b"{\"type\":\"about:blank\",\"title\":\"Too Many Requests\",\"status\":429,\"reason\":\"limited\"}\n";

/// The built-in page of a failure.
pub fn standard(status: StatusCode, error: &Error, form: Form) -> Bytes {
    match form {
        Form::Json if error.kind() == Kind::Limited => Bytes::from_static(LIMITED),
        Form::Json => problem(status, error.reason()),
        Form::Html => {
            let title = status.canonical_reason().unwrap_or("Error");
            Bytes::from(format!(
                "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
                 <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
                 <style>body{{font:1.1em/1.5 system-ui,sans-serif;max-width:34em;margin:15vh auto;padding:0 1em}}</style></head>\
                 <body><h1>{title}</h1><p>{}</p></body></html>\n",
                sentence(error.kind())
            ))
        }
    }
}

/// Problem details (RFC 9457): `about:blank` with title, status and our reason. None of them needs escaping.
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

fn sentence(kind: Kind) -> &'static str {
    match kind {
        Kind::NoRoute => "There is nothing at this address.",
        Kind::Forbidden => "There is no access from here.",
        Kind::Limited => "Too many requests came from here in a short time. Please wait a moment and try again.",
        Kind::Unchecked => {
            "Too many credentials that are not valid came from here. Please wait a moment and try again."
        }
        Kind::OnlyIfCached => "No stored answer is at hand.",
        Kind::Client | Kind::ClientGone => "The request could not be read.",
        Kind::Panic => "Something went wrong on our side.",
        _ => "The service is busy or away at the moment. Please try again shortly.",
    }
}

/// The error type of RFC 9209 section 2.3 that fits.
fn proxy_status(kind: Kind) -> String {
    let error = match kind {
        Kind::BreakerOpen => "destination_unavailable",
        Kind::Connect => "connection_refused",
        Kind::ConnectTimeout => "connection_timeout",
        Kind::NoAnswer => "connection_terminated",
        Kind::Malformed => "http_protocol_error",
        Kind::Timeout => "http_response_timeout",
        Kind::Upstream => "http_response_incomplete",
        _ => "proxy_internal_error",
    };
    format!("tidegate; error={error}")
}

/// Between half and one and a half times the configured wait, at least a second, so that clients do not return as one wave.
fn jittered(middle: Duration, spread: u64) -> u64 {
    let millis = u64::try_from(middle.as_millis()).unwrap_or(u64::MAX / 4);
    (millis / 2 + spread % millis.max(1)).div_ceil(1000).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(value: &str) -> Form {
        let mut fields = Fields::default();
        fields.push(b"Accept", value.as_bytes());
        form(&fields)
    }

    #[test]
    fn accept_decides_the_form() {
        assert_eq!(form(&Fields::default()), Form::Json);
        assert_eq!(accept("*/*"), Form::Json);
        assert_eq!(accept("text/html,application/xhtml+xml,*/*;q=0.8"), Form::Html);
        assert_eq!(accept("text/html;q=0.5, application/json"), Form::Json);
        assert_eq!(accept("text/html;q=nan, application/json;q=0.1"), Form::Json);
    }

    #[test]
    fn what_is_written_out_is_what_would_be_composed() {
        assert_eq!(LIMITED, problem(StatusCode::TOO_MANY_REQUESTS, "limited"));
    }

    #[test]
    fn retries_are_spread_around_the_configured_wait() {
        for spread in [0, 1, u64::MAX, 12_345] {
            assert!((3..=8).contains(&jittered(Duration::from_secs(5), spread)));
            assert_eq!(jittered(Duration::ZERO, spread), 1);
        }
    }

    #[test]
    fn a_page_stands_in_only_for_failures_behind_the_gateway() {
        let page = Settings { html: None, json: Some("{}".into()), ..Settings::default() };
        let mut response = Response::new(StatusCode::OK);
        assert_eq!(write(&Error::NoRoute, Some(&page), &Fields::default(), 0, &mut response).first(), Some(&b'{'));
        assert_eq!(response.status, StatusCode::NOT_FOUND);
        let open = Error::BreakerOpen;
        assert_eq!(write(&open, Some(&page), &Fields::default(), 0, &mut response), "{}");
        assert!(response.fields.has(Known::RetryAfter));
        assert_eq!(response.fields.get(Known::CacheControl), Some(&b"no-store"[..]));
    }
}
