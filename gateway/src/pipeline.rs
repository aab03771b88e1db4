//! The life of a request, from its head to its response.
//!
//! ```text
//! serve ──> caller_cache   identify the caller, find the route
//!           admit          lists and limits; answers what they deny
//!           handle         the phases that may wait, in order:
//!             lookup         local cache, join a shared fetch, remote cache
//!             lead           lead a shared fetch, also after its client has closed
//!             fetch          judge, store
//!             forward        breaker, endpoint, exchange with the upstream
//!             unsafe_method  forward, invalidate, store the response to POST
//!             degrade        only after a failure: stale response or page
//!             compress       the body in the coding that the client prefers
//!             respond        fields and counters of every response
//! ```
//! `admit` never waits. `handle` sends every failure through `degrade` and every response through
//! `respond`. Denials, which arrive in floods, are answered by `admit` from prebuilt responses.

mod snapshot;
mod prebuilt_429;
mod worker;
mod caller_cache;
mod buffers;
mod context;
mod respond;
mod mirror;
mod forward;
mod pieced_body;
mod fill_task;
mod store_post;
mod shared_body;
mod response_body;
mod compress;
mod degrade;
mod forward_auth;
mod admit;
mod fetch;
mod lead;
mod handle;
mod lookup;
mod partial;
mod unsafe_method;

pub(crate) use buffers::{Arrival, ExchangeBuffers};
pub(crate) use context::RequestContext;
pub(crate) use degrade::{client_closed, panicked};
pub(crate) use forward::count_timeout;
pub(crate) use prebuilt_429::Prebuilt429Cache;
pub(crate) use response_body::ResponseBody;
pub(crate) use snapshot::Snapshot;
pub(crate) use worker::WorkerResources;

/// Registers the metrics of this module.
pub(crate) fn expose() {
    compress::expose();
    degrade::expose();
    forward::expose();
    respond::expose();
    shared_body::expose();
}
