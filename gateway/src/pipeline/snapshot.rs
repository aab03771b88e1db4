//! The runtime built from one configuration: shared by all threads, replaced as a whole by a
//! reload.
//!
//! A request uses one snapshot from its head to its end. State that outlives a reload (breakers,
//! limits, stores, counters) is carried over into the next snapshot.

use std::sync::Arc;

use limiter::Limiter;

use crate::cache::CacheConfig;
use crate::http::limits::HttpLimits;
use crate::identify::CallerIdentifier;
use crate::limit::LimitHeaders;
use crate::log::AccessLogFormat;
use crate::pages::ErrorPages;
use crate::route::Routes;
use crate::spans::TraceExporter;
use crate::upstream::Upstream;

/// The runtime built from one configuration: identification, routes, limiter, and the settings of
/// cache and HTTP.
pub(crate) struct Snapshot {
    pub(crate) identity: CallerIdentifier,
    pub(crate) routes: Routes,
    pub(crate) upstreams: Vec<Arc<Upstream>>,
    /// Weights of the user classes in thousandths, by index.
    pub(crate) class_weights: Vec<u32>,
    pub(crate) limiter: Limiter,
    pub(crate) limits: LimitHeaders,
    pub(crate) cache: CacheConfig,
    pub(crate) http: HttpLimits,
    pub(crate) log: AccessLogFormat,
    /// `None`: requests are not traced.
    pub(crate) tracing: Option<Arc<TraceExporter>>,
    /// Number of the configuration in this process, from 1.
    pub(crate) generation: u64,
    /// The pages of the gateway, for routes without a page of their own.
    pub(crate) pages: ErrorPages,
}
