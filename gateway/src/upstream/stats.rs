//! Counts of an upstream's calls by result, for metrics. They outlive a reload.

use std::sync::Arc;

use http::StatusCode;

use super::retry::RetryBudget;
use crate::concurrency::ConcurrencyRejection;
use crate::endpoint::{OutReason, TrafficDirection};
use crate::http::attempt::UpstreamConnectionError;
use crate::http::exchange_clock::Blame;
use crate::label;
use crate::metrics::{Counters, Histogram};

label! {
    /// The result of a call: the class of the response's status, or why there was none.
    pub(crate) UpstreamResult, "result", {
        Informational = "1xx",
        Success = "2xx",
        Redirection = "3xx",
        ClientError = "4xx",
        ServerError = "5xx",
        /// No connection was opened, or none with TLS.
        Connect = "connect",
        Timeout = "timeout",
        /// The connection or its stream ended before the response, or the response was malformed.
        Failed = "failed",
        /// The client has gone, or did not send its request; the gateway ended the call.
        Cancelled = "cancelled",
    }
}

impl UpstreamResult {
    pub(crate) fn of_status(status: StatusCode) -> Self {
        match status.as_u16() {
            100..200 => UpstreamResult::Informational,
            200..300 => UpstreamResult::Success,
            300..400 => UpstreamResult::Redirection,
            400..500 => UpstreamResult::ClientError,
            _ => UpstreamResult::ServerError,
        }
    }

    pub(crate) fn of_error(error: &UpstreamConnectionError) -> Self {
        match error {
            _ if error.blame() != Blame::Upstream => UpstreamResult::Cancelled,
            UpstreamConnectionError::Connect(_)
            | UpstreamConnectionError::Ended(_)
            | UpstreamConnectionError::NoAddress
            | UpstreamConnectionError::NoEndpoints
            | UpstreamConnectionError::Tls(..) => UpstreamResult::Connect,
            UpstreamConnectionError::Timeout(_) => UpstreamResult::Timeout,
            _ => UpstreamResult::Failed,
        }
    }
}

/// A call whose result is not known yet. If it is dropped, because its client has gone, it counts
/// as cancelled.
pub(crate) struct CallInProgress<'s> {
    stats: &'s UpstreamStats,
    result: UpstreamResult,
}

impl<'s> CallInProgress<'s> {
    pub(crate) fn begin(stats: &'s UpstreamStats) -> Self {
        CallInProgress { stats, result: UpstreamResult::Cancelled }
    }

    /// Counts the call with its result.
    pub(crate) fn end(mut self, result: UpstreamResult) {
        self.result = result;
    }
}

impl Drop for CallInProgress<'_> {
    fn drop(&mut self) {
        self.stats.results.inc(self.result);
    }
}

/// Counts of an upstream's calls.
#[derive(Default)]
pub(crate) struct UpstreamStats {
    pub(crate) results: Counters<UpstreamResult>,
    /// From the complete request to the head of its response, of calls without a retry.
    pub(crate) durations: Histogram,
    pub(super) ejections: Counters<OutReason>,
    /// Bytes of bodies, of all endpoints that were known.
    pub(super) bytes: Arc<Counters<TrafficDirection>>,
}

impl UpstreamStats {
    /// The number of cells of an upstream's counters, those of its retries and of its concurrency
    /// limit included.
    pub(crate) const CELLS: usize = Counters::<UpstreamResult>::CELLS
        + Histogram::CELLS
        + Counters::<OutReason>::CELLS
        + Counters::<TrafficDirection>::CELLS
        + RetryBudget::CELLS
        + Counters::<ConcurrencyRejection>::CELLS;
}
