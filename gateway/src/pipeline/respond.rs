//! The respond phase: fields and counters of every response.

use std::sync::LazyLock;

use http::StatusCode;

use super::context::RequestContext;
use crate::error::ErrorKind;
use crate::http::fields::KnownField;
use crate::metrics::{self, Counters};
use crate::record::{CacheResult, RequestRecord};
use crate::route::{Route, StatusClass};
use crate::spans::Phase;
use crate::{degrade, respond};

static CACHE_RESULTS: LazyLock<Counters<CacheResult>> = LazyLock::new(Counters::default);

pub(super) fn expose() {
    metrics::expose_counters("tidegate_cache_results", "How the cache took part in requests.", &CACHE_RESULTS);
}

pub(super) fn count_result(result: CacheResult) {
    CACHE_RESULTS.inc(result);
}

/// Counts a response of `status`, by route where one matched.
pub(super) fn count_response(route: Option<&Route>, record: &RequestRecord, status: StatusCode) {
    let Some(route) = route else { return };
    route.counters.responses.inc(StatusClass::of(status));
    if !record.degraded.is_empty() {
        route.counters.degraded.inc();
    }
}

impl RequestContext<'_> {
    /// Adds the gateway's own fields to the response and counts it. Every response passes here
    /// once, except prebuilt denials, refusals and panics.
    pub(super) fn respond(&mut self) {
        self.enter(Phase::Respond);
        let (record, fields) = (&*self.record, &mut self.response.fields);
        if record.failure == Some(ErrorKind::ClientGone) {
            // Nothing is sent.
            return;
        }
        count_result(record.cache);
        if !fields.has(KnownField::Date) {
            // That of the origin has one; this is a response of the gateway or of a service of its
            // own (RFC 9110 section 6.6.1).
            degrade::add_date(fields);
        }
        respond::write_cache_status(record, fields);
        if record.retries > 0 || record.is_hedged || !record.degraded.is_empty() {
            respond::write_proxy_status(record, fields);
        }
        self.snapshot.limits.write(&record.verdict, fields);
        if self.snapshot.cache.strip_targeted {
            for name in &self.snapshot.cache.targeted {
                fields.retain(|field| !field.name.eq_ignore_ascii_case(name.as_bytes()));
            }
        }
        if let Some(id) = &record.request_id {
            id.write(fields);
        }
        if self.route.is_some_and(|route| route.config.edits.is_some()) {
            self.edit_response();
        }
        count_response(self.route, self.record, self.response.status);
    }

    /// Applies what the route changes in responses, whatever their source.
    #[cold]
    pub(super) fn edit_response(&mut self) {
        let Some(edits) = self.route.and_then(|route| route.config.edits.as_deref()) else { return };
        let mut fields = std::mem::take(&mut self.response.fields);
        edits.edit_response(&mut fields, &self.template_values());
        self.response.fields = fields;
    }
}
