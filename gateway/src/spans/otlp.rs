//! Spans as OTLP in JSON (OpenTelemetry protocol 1.x, `ExportTraceServiceRequest`), with the
//! attributes of the semantic conventions for HTTP.

use std::time::Instant;

use serde_json::{Value, json};

use super::{
    ATTEMPTS_MAX, AttemptSpan, BackgroundWork, ConnectSpan, FinishedRequest, Phase, PhaseSpan, RequestSpans, TEXT_MAX,
    child_id,
};
use crate::http::attempt::AttemptErrorClass;
use crate::http::message::{Method, StatusCode};
use crate::metrics::Label as _;

const INTERNAL: u8 = 1;
const SERVER: u8 = 2;
const CLIENT: u8 = 3;
/// `STATUS_CODE_ERROR`.
const ERROR: u8 = 2;

/// The resource of all spans: this gateway.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Resource {
    pub(super) service_name: String,
    pub(super) node: String,
}

/// The request of an export.
pub(super) fn encode(resource: &Resource, batch: &[FinishedRequest]) -> Value {
    let spans: Vec<Value> = batch.iter().flat_map(spans_of).collect();
    let version = env!("CARGO_PKG_VERSION");
    json!({ "resourceSpans": [{
        "resource": { "attributes": attributes([
            ("service.name", text(&resource.service_name)),
            ("service.instance.id", text(&resource.node)),
            ("service.version", text(version)),
        ]) },
        "scopeSpans": [{ "scope": { "name": "tidegate", "version": version }, "spans": spans }],
    }] })
}

fn spans_of(request: &FinishedRequest) -> Vec<Value> {
    let spans = &*request.spans;
    let ended = spans.began + request.duration;
    let mut all = vec![match spans.work {
        None => server_span(request, ended),
        Some(work) => work_span(request, (work, ended)),
    }];
    for phase in &spans.phases {
        // A phase that is open when the request ends has ended with it.
        let phase_ended = phase.ended.unwrap_or(ended).max(phase.began);
        all.push(phase_span(request, phase, phase_ended));
        let attempts = phase.attempts_below().iter().enumerate();
        all.extend(attempts.map(|(index, attempt)| attempt_span(request, (phase, index), attempt)));
        let connects = phase.connects_below().iter().enumerate();
        all.extend(connects.map(|(index, connect)| connect_span(spans, (phase, index), connect)));
    }
    all
}

fn server_span(request: &FinishedRequest, ended: Instant) -> Value {
    let spans = &*request.spans;
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    let (address, port) = split_authority(&request.authority);
    let is_failed = request.status.is_server_error() || !request.aborted.is_empty();
    let error = [request.failure, request.aborted].into_iter().find(|reason| !reason.is_empty());
    let error = error.map_or_else(|| request.status.as_str().to_owned(), str::to_owned);
    let (method, original) = method(&request.method);
    let name = match &*request.route_path {
        "" => method.to_owned(),
        route => format!("{method} {route}"),
    };
    let attributes = attributes([
        ("http.request.method", text(method)),
        ("http.request.method_original", text(original)),
        ("url.scheme", text(request.scheme.as_str())),
        ("url.path", text(path)),
        ("url.query", text(query)),
        ("server.address", text(address)),
        ("server.port", port.map_or(Value::Null, int)),
        ("client.address", text(&request.client.to_string())),
        ("network.protocol.version", text(request.version.as_str())),
        ("http.response.status_code", int(request.status.as_u16())),
        ("http.route", text(&request.route_path)),
        ("user_agent.original", text(&request.user_agent)),
        ("http.request.body.size", positive(request.request_bytes)),
        ("http.response.body.size", positive(request.bytes)),
        ("error.type", if is_failed { text(&error) } else { Value::Null }),
        ("tidegate.route", text(&request.route)),
        ("tidegate.cache", text(request.cache)),
        ("tidegate.failure", text(request.failure)),
        ("tidegate.limit", text(&request.limit)),
        ("tidegate.request_id", text(&request.request_id)),
    ]);
    let id = (spans.id, spans.parent);
    span(spans, id, (&name, SERVER), (spans.began, ended), Outcome { attributes, is_failed })
}

/// The span of work beside a request or after it.
fn work_span(request: &FinishedRequest, (work, ended): (BackgroundWork, Instant)) -> Value {
    let spans = &*request.spans;
    let (method, original) = method(&request.method);
    let attributes = attributes([
        ("http.request.method", text(method)),
        ("http.request.method_original", text(original)),
        ("url.path", text(request.target.split('?').next().unwrap_or_default())),
        ("http.route", text(&request.route_path)),
        ("http.response.body.size", positive(request.bytes)),
        ("error.type", text(request.failure)),
        ("tidegate.route", text(&request.route)),
        ("tidegate.cache", text(request.cache)),
        ("tidegate.failure", text(request.failure)),
    ]);
    let outcome = Outcome { attributes, is_failed: !request.failure.is_empty() };
    span(spans, (spans.id, spans.parent), (work.as_str(), INTERNAL), (spans.began, ended), outcome)
}

/// The span of a connection that a call has tried.
fn connect_span(spans: &RequestSpans, (phase, index): (&PhaseSpan, usize), connect: &ConnectSpan) -> Value {
    let (address, port) = split_authority(&connect.endpoint);
    let attributes = attributes([
        ("server.address", text(address)),
        ("server.port", port.map_or(Value::Null, int)),
        ("network.peer.address", text(&connect.address.ip().to_string())),
        ("network.peer.port", int(connect.address.port())),
        ("network.transport", text("tcp")),
        ("error.type", text(connect.failure.map_or("", AttemptErrorClass::as_str))),
    ]);
    let outcome = Outcome { attributes, is_failed: connect.failure.is_some() };
    let id = (child_id(phase.id, ATTEMPTS_MAX + index), phase.id);
    span(spans, id, ("connect", INTERNAL), (connect.began, connect.ended), outcome)
}

fn phase_span(request: &FinishedRequest, phase: &PhaseSpan, ended: Instant) -> Value {
    let spans = &*request.spans;
    let id = (phase.id, spans.id);
    if let (Phase::Upstream, [attempt]) = (phase.phase, &*phase.attempts) {
        // One attempt is the call.
        let outcome = attempt_outcome(request, 0, attempt);
        return span(spans, id, (method(&request.method).0, CLIENT), (phase.began, ended), outcome);
    }
    let attributes = match phase.phase {
        Phase::Admit => attributes([("tidegate.limit", text(&request.limit))]),
        Phase::Lookup => attributes([("tidegate.cache", text(request.cache))]),
        Phase::Upstream => attributes([
            ("tidegate.attempts", positive(phase.attempts.len() as u64)),
            ("server.address", request.upstream.as_deref().map_or(Value::Null, |name| text(split_authority(name).0))),
        ]),
        Phase::Authorize | Phase::Respond => Vec::new(),
    };
    let is_failed = phase.phase == Phase::Upstream && phase.attempts.last().is_some_and(|last| is_failure(last.result));
    span(spans, id, (phase.phase.as_str(), INTERNAL), (phase.began, ended), Outcome { attributes, is_failed })
}

fn attempt_span(request: &FinishedRequest, (phase, index): (&PhaseSpan, usize), attempt: &AttemptSpan) -> Value {
    let id = (child_id(phase.id, index), phase.id);
    let outcome = attempt_outcome(request, index, attempt);
    span(&request.spans, id, (method(&request.method).0, CLIENT), (attempt.began, attempt.ended), outcome)
}

fn attempt_outcome(request: &FinishedRequest, index: usize, attempt: &AttemptSpan) -> Outcome {
    let (address, port) = split_authority(attempt.endpoint.as_deref().unwrap_or_default());
    let (method, original) = method(&request.method);
    let status = attempt.result.ok();
    let error = match attempt.result {
        Ok(status) if status.is_server_error() || status.is_client_error() => status.as_str().to_owned(),
        Ok(_) => String::new(),
        Err(error) => error.as_str().to_owned(),
    };
    let attributes = attributes([
        ("http.request.method", text(method)),
        ("http.request.method_original", text(original)),
        ("server.address", text(address)),
        ("server.port", port.map_or(Value::Null, int)),
        ("url.path", text(request.target.split('?').next().unwrap_or_default())),
        ("http.response.status_code", status.map_or(Value::Null, |status| int(status.as_u16()))),
        ("http.request.resend_count", positive(index as u64)),
        ("error.type", text(&error)),
    ]);
    // A client's span is in error from 400 on.
    Outcome { attributes, is_failed: !error.is_empty() }
}

fn is_failure(result: Result<StatusCode, AttemptErrorClass>) -> bool {
    result.map_or(true, |status| status.is_server_error() || status.is_client_error())
}

struct Outcome {
    attributes: Vec<Value>,
    is_failed: bool,
}

#[expect(clippy::too_many_arguments, reason = "the members of one JSON object")]
fn span(
    spans: &RequestSpans,
    (id, parent): (u64, u64),
    (name, kind): (&str, u8),
    (began, ended): (Instant, Instant),
    outcome: Outcome,
) -> Value {
    json!({
        "traceId": spans.trace.to_string(),
        "spanId": format!("{id:016x}"),
        "parentSpanId": if parent == 0 { String::new() } else { format!("{parent:016x}") },
        "flags": spans.trace.flags,
        "name": name,
        "kind": kind,
        "startTimeUnixNano": spans.unix_nanos(began).to_string(),
        "endTimeUnixNano": spans.unix_nanos(ended).to_string(),
        "attributes": outcome.attributes,
        "status": if outcome.is_failed { json!({ "code": ERROR }) } else { json!({}) },
    })
}

/// The attributes that have a value.
fn attributes<const N: usize>(all: [(&str, Value); N]) -> Vec<Value> {
    let present = all.into_iter().filter(|(_, value)| !value.is_null());
    present.map(|(key, value)| json!({ "key": key, "value": value })).collect()
}

/// A text, bounded; none if it is empty.
fn text(text: &str) -> Value {
    let text = &text[..text.floor_char_boundary(TEXT_MAX)];
    if text.is_empty() { Value::Null } else { json!({ "stringValue": text }) }
}

/// Integers of 64 bits are strings in JSON.
fn int(number: u16) -> Value {
    json!({ "intValue": number.to_string() })
}

fn positive(number: u64) -> Value {
    if number == 0 { Value::Null } else { json!({ "intValue": number.to_string() }) }
}

/// A method of RFC 9110 or RFC 5789, or `_OTHER` with the method as it was sent.
fn method(method: &Method) -> (&str, &str) {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
    if KNOWN.contains(&method.as_str()) { (method.as_str(), "") } else { ("_OTHER", method.as_str()) }
}

/// Host and port; a host without a port as it is.
fn split_authority(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port.parse().ok()),
        _ => (authority, None),
    }
}
