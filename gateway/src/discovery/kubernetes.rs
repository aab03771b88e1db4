//! The endpoints of services of Kubernetes, from their EndpointSlices (`kubernetes://`).
//!
//! A thread of its own talks to the API server: it lists the slices of each service once, and then
//! watches them. All upstreams that name a service share its watch. The last answer of the API
//! server stays in use while it is not reachable.
//!
//! Without the feature `kubernetes` only the configuration is here: it is refused where a service
//! is named.

mod config;

#[cfg(feature = "kubernetes")]
mod metrics;
#[cfg(feature = "kubernetes")]
mod backoff;
#[cfg(feature = "kubernetes")]
mod api_error;
#[cfg(feature = "kubernetes")]
mod lines;
#[cfg(feature = "kubernetes")]
mod client;
#[cfg(feature = "kubernetes")]
mod slice;
#[cfg(feature = "kubernetes")]
mod slice_set;
#[cfg(feature = "kubernetes")]
mod api;
#[cfg(feature = "kubernetes")]
mod watcher;
#[cfg(feature = "kubernetes")]
mod service_watch;
#[cfg(feature = "kubernetes")]
mod source;
#[cfg(feature = "kubernetes")]
mod watches;

#[cfg(feature = "kubernetes")]
pub(crate) use client::check_kubeconfig;
pub(crate) use config::{KubernetesAccess, KubernetesConfig, SERVICE_ACCOUNT};
#[cfg(feature = "kubernetes")]
pub(super) use metrics::expose;
#[cfg(feature = "kubernetes")]
pub(super) use source::KubernetesSource;
#[cfg(feature = "kubernetes")]
pub(super) use watches::KubernetesWatches;

/// Whether this binary has discovery by Kubernetes.
pub(crate) const IS_AVAILABLE: bool = cfg!(feature = "kubernetes");
