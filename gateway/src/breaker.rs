//! The circuit breaker in front of an upstream: closed (calls are admitted), open (calls are
//! rejected), half-open (a few calls probe), ramp (a growing share of the calls is admitted).
//!
//! A breaker belongs to one route, or to all routes of an upstream together. It opens at a ratio of
//! failed or slow calls over a window of one-second buckets. The time of a call starts when the
//! origin has the whole request: the time that a client takes to send it is not the origin's. A
//! running call counts as slow as soon as it passes the threshold, so a hanging upstream opens the
//! breaker too. A permit that is dropped without a result counts as neither success nor failure;
//! calls that fail by the client's fault or by a limit of the gateway end like this, so that no
//! client can open the breaker of a healthy origin.
//!
//! Everything that time changes is changed by the next call, or by `Breaker::advance`, which the
//! control thread calls several times a second: state, metrics and readiness are right without
//! traffic too.

mod config;
mod name;
mod state;
mod window;
mod probes;
mod ramp;
mod open_time;
mod core;
mod gate;
mod state_change;
mod report;
mod admin_query;
#[cfg(test)]
mod tests;

pub(crate) use admin_query::{BreakerQuery, BreakerQueryError, BreakerTarget};
pub(crate) use config::{BreakerConfig, BreakerMode, BreakerScope};
pub(crate) use gate::{Breaker, RecordedCall};
pub(crate) use name::BreakerName;
pub(crate) use state::{BreakerState, CallStart};
pub(crate) use state_change::BreakerStateChange;
