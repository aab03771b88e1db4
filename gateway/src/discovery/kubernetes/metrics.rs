//! Metrics of the requests to the API server.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::label;
use crate::metrics::{self, Counters};

label! {
    /// How a request to the API server has ended.
    pub(super) ApiResult, "result", {
        /// A complete answer; of a watch: its time is over, or the server has closed it.
        Ok = "ok",
        /// The connection of a watch broke. The next one continues where it was.
        Broken = "broken",
        /// The version is too old (410): the slices are listed again.
        Gone = "gone",
        /// No data in time.
        Stalled = "stalled",
        Timeout = "timeout",
        Unreachable = "unreachable",
        Unauthorized = "unauthorized",
        Forbidden = "forbidden",
        Throttled = "throttled",
        /// Another status than 200.
        Status = "status",
        TooLarge = "too_large",
        Malformed = "malformed",
        /// A file or setting of the access cannot be used.
        Access = "access",
    }
}

label! {
    /// Why a part of an answer was left out.
    pub(super) SkipReason, "reason", {
        Malformed = "malformed",
        /// Beyond the bound of one service.
        TooMany = "too_many",
        /// Addresses that are names.
        Unsupported = "unsupported",
    }
}

pub(super) static LISTS: LazyLock<Counters<ApiResult>> = LazyLock::new(Counters::default);
pub(super) static WATCHES: LazyLock<Counters<ApiResult>> = LazyLock::new(Counters::default);
pub(super) static SKIPPED: LazyLock<Counters<SkipReason>> = LazyLock::new(Counters::default);
/// The services that are watched.
pub(super) static WATCHED: AtomicUsize = AtomicUsize::new(0);

/// Exposes the metrics of this module.
pub(crate) fn expose() {
    let help = "Pages of EndpointSlices listed at the API server of Kubernetes, by result.";
    metrics::expose_counters("tidegate_kubernetes_lists", help, &LISTS);
    let help = "Watches of EndpointSlices that have ended, by result.";
    metrics::expose_counters("tidegate_kubernetes_watches", help, &WATCHES);
    let help = "EndpointSlices, endpoints and ports that were left out, by reason.";
    metrics::expose_counters("tidegate_kubernetes_skipped", help, &SKIPPED);
    let help = "Services of Kubernetes whose EndpointSlices are watched.";
    metrics::expose_gauge_with("tidegate_kubernetes_services", help, |emit| emit(&[], WATCHED.load(Relaxed) as f64));
}
