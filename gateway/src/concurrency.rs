//! The adaptive limit of the calls that an upstream has in progress at a time.
//!
//! One limit belongs to an upstream and is shared by all threads: its capacity is one number, and a
//! share of it for each thread would be wrong as soon as connections are spread unevenly. Taking
//! and returning a slot are one critical section each, of some hundred nanoseconds; upstreams
//! without a limit have none.
//!
//! A call has a slot from its turn until the head of its response, or its failure. Bodies are not
//! counted: their time is also that of the client, and event streams and tunnels last for hours.
//! Health checks need no slot.

mod config;
mod window;
mod estimator;
mod queue;
mod gate;
#[cfg(test)]
mod class_simulation;
#[cfg(test)]
mod simulated_upstream;
#[cfg(test)]
mod simulation;

pub(crate) use config::ConcurrencyConfig;
pub(crate) use gate::{CallSlot, ConcurrencyLimit, ConcurrencyRejection, ConcurrencyReport};
