//! The name of a breaker.

use std::sync::Arc;

/// The route and the upstream of a breaker, in events and for the admin address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BreakerName {
    /// `None`: the breaker is that of all routes of the upstream.
    pub(crate) route: Option<Arc<str>>,
    pub(crate) upstream: Arc<str>,
}

impl BreakerName {
    /// The name of the route in log and metrics; `*` for all of the upstream.
    pub(crate) fn route(&self) -> &str {
        self.route.as_deref().unwrap_or("*")
    }
}
