//! Client connections: read requests, run the pipeline, write responses.
//!
//! Each connection is one task. A panic while a request is handled costs that request (500) and its
//! connection, never the thread. While draining, connections close after their response; idle ones
//! close at the end of a grace, in which a request that is under way meets a response.

mod worker_context;
mod accounting;
mod h2;
mod h1;

pub(crate) use accounting::requests_in_flight;
pub(crate) use h1::{HttpTransport, serve as serve_h1};
pub(crate) use h2::serve as serve_h2;
pub(crate) use worker_context::{DrainStage, WorkerContext};

/// Registers the metrics of this module.
pub(crate) fn expose() {
    accounting::expose();
    h2::expose();
}
