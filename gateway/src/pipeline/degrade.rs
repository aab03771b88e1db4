//! The degrade ladder below a failure: stale response, the route's page, a plain problem document.
//!
//! Also the records of requests whose handling did not end: a panic, a client that closed its
//! connection.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use super::buffers::ExchangeBuffers;
use super::context::RequestContext;
use super::respond::{count_response, count_result};
use super::response_body::ResponseBody;
use super::snapshot::Snapshot;
use crate::cache::policy;
use crate::degrade::ErrorResponder;
use crate::error::{Error, ErrorKind};
use crate::event::Event;
use crate::http::attempt::UpstreamConnectionError;
use crate::http::body::BodyError;
use crate::metrics::{self, Counters, Label as _};
use crate::record::{CacheDetail, CacheResult, RequestRecord};

static FAILURES: LazyLock<Counters<ErrorKind>> = LazyLock::new(Counters::default);

pub(super) fn expose() {
    let help = "Failed requests by kind, including those answered with a stale response.";
    metrics::expose_counters("tidegate_failures", help, &FAILURES);
}

pub(super) fn count_failure(kind: ErrorKind) {
    FAILURES.inc(kind);
}

impl RequestContext<'_> {
    /// Answers a failed request from the ladder.
    pub(super) fn degrade(&mut self, error: Error) -> ResponseBody<'static> {
        FAILURES.inc(error.kind());
        self.record.blame.get_or_insert(error.kind().blame());
        self.record.failure = Some(error.kind());
        self.record.must_close = matches!(error.kind(), ErrorKind::ClientBody | ErrorKind::Panic);
        if error.is_degradable()
            && let Some(body) = self.stale_response()
        {
            self.record.degraded = "stale";
            self.record.detail = CacheDetail::Reason(error.kind().as_str());
            return body;
        }
        if error.is_degradable() {
            self.record.degraded = "page";
        }
        self.record.cache = CacheResult::Error;
        self.record.detail = CacheDetail::Reason(error.reason());
        self.record.refusal = error.refusal();
        let mut response = std::mem::take(self.response);
        let page = ErrorResponder { wait: self.wait(&error), ..self.error_responder() }.write(&error, &mut response);
        *self.response = response;
        ResponseBody::Bytes(page)
    }

    /// Answers a request whose announced body is larger than any route allows, as one above the
    /// limit of its route: lists, limits and authentication come first.
    pub(crate) fn refuse_body(&mut self) -> ResponseBody<'static> {
        let mut body = self.admit().unwrap_or_else(|| {
            let body = self.degrade(UpstreamConnectionError::Client(BodyError::TooLarge).into());
            self.respond();
            self.charge_for_status();
            body
        });
        body.unpack_head(self.response);
        body
    }

    /// The time before which a repeated request fails alike.
    fn wait(&self, error: &Error) -> Duration {
        if error.kind() != ErrorKind::BreakerOpen {
            return Duration::ZERO;
        }
        self.route().target(self.request).breaker.wait(Instant::now())
    }

    /// Writes the gateway's own response to a failure of this request.
    pub(super) fn error_responder(&self) -> ErrorResponder<'_> {
        let config = self.route.map(|route| &route.config);
        ErrorResponder {
            config: config.map(|config| &config.degrade),
            request: &self.request.fields,
            random: self.snapshot.identity.random_u64(),
            wait: Duration::ZERO,
            pages: [config.map_or(&[], |config| &*config.pages), &self.snapshot.pages],
            route: config.map_or("", |config| &config.name),
            request_id: self.record.request_id.as_ref(),
        }
    }

    /// Answers a request whose response body failed before its head was sent.
    pub(super) fn degrade_unsent(&mut self, error: &BodyError) -> ResponseBody<'static> {
        let error = Error::from(error);
        self.record.blame = Some(error.kind().blame());
        (self.record.stored, self.record.freshness, self.record.forwarded_status) = (false, None, None);
        self.degrade(error)
    }

    /// The stored response, where it may answer for a failing origin (RFC 5861 section 4).
    pub(super) fn stale_response(&mut self) -> Option<ResponseBody<'static>> {
        let hit = self.stale.take()?;
        self.update_now();
        let object = policy::object(&hit.meta)?;
        let freshness = object.freshness_at(&hit, self.now, self.cache_policy());
        if object.must_validate || freshness.staleness() > object.stale_if_error_under(self.cache_policy()) {
            return None;
        }
        self.record.cache = CacheResult::Stale;
        self.record.forwarded_status = None;
        Some(self.response_from(&hit))
    }
}

/// Answers a request whose handling panicked.
pub(crate) fn panicked(snapshot: &Snapshot, buffers: &mut ExchangeBuffers) -> ResponseBody<'static> {
    let ExchangeBuffers { request, response, record, .. } = buffers;
    *record = RequestRecord {
        cache: CacheResult::Error,
        blame: Some(ErrorKind::Panic.blame()),
        failure: Some(ErrorKind::Panic),
        must_close: true,
        request_id: snapshot.identity.new_request_id(),
        // The record may be that of the previous request.
        route: snapshot.routes.find(request).map(|route| route.index),
        ..RequestRecord::default()
    };
    Event::RequestPanicked { route: snapshot.routes.name(record.route) }.emit();
    FAILURES.inc(ErrorKind::Panic);
    let route = record.route.and_then(|route| snapshot.routes.at(route));
    let responder = ErrorResponder {
        config: None,
        request: &request.fields,
        random: snapshot.identity.random_u64(),
        wait: Duration::ZERO,
        pages: [route.map_or(&[], |route| &*route.config.pages), &snapshot.pages],
        route: route.map_or("", |route| &route.config.name),
        request_id: record.request_id.as_ref(),
    };
    let page = responder.write(&Error::Panic, response);
    count_result(record.cache);
    count_response(route, record, response.status);
    ResponseBody::Bytes(page)
}

/// The record of a request whose client closed the connection before its response began: the facts
/// about the caller, and none of a response.
pub(crate) fn client_closed(record: &RequestRecord) -> RequestRecord {
    let RequestRecord { route, principal, trace, request_id, client_ip, device, user_class, country, .. } = record;
    let spans = record.spans.clone();
    RequestRecord {
        route: *route,
        principal: *principal,
        trace: *trace,
        spans,
        request_id: request_id.clone(),
        client_ip: *client_ip,
        device: *device,
        user_class: *user_class,
        country: *country,
        ..RequestRecord::default()
    }
}
