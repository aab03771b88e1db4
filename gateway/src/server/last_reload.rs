//! The result of the last reload, for metrics and `/ready`. The start counts as one that has
//! succeeded.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;

use crate::metrics;

static HAS_FAILED: AtomicBool = AtomicBool::new(false);
/// Milliseconds since 1970 at which the configuration in use was loaded.
static LOADED_AT: AtomicU64 = AtomicU64::new(0);

/// Exposes the metrics. To be called at the start.
pub(super) fn expose() {
    record_success();
    let help = "1 if the last reload has succeeded, 0 if its configuration was refused.";
    metrics::expose_gauge_with("tidegate_config_last_reload_successful", help, |emit| {
        emit(&[], if HAS_FAILED.load(Relaxed) { 0.0 } else { 1.0 });
    });
    let help = "The time at which the configuration in use was loaded, in seconds since 1970.";
    metrics::expose_gauge_with("tidegate_config_last_reload_success_timestamp_seconds", help, |emit| {
        emit(&[], LOADED_AT.load(Relaxed) as f64 / 1e3);
    });
}

/// A configuration was loaded.
pub(super) fn record_success() {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    LOADED_AT.store(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX), Relaxed);
    HAS_FAILED.store(false, Relaxed);
}

/// A configuration was refused.
pub(super) fn record_failure() {
    HAS_FAILED.store(true, Relaxed);
}

/// Whether the configuration on disk was refused, and an older one is in use.
pub(super) fn has_failed() -> bool {
    HAS_FAILED.load(Relaxed)
}
