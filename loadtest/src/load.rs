//! Load on a service.
//!
//! The generator of this program is the open loop: a `target`, its `connection`s, which read with
//! `response_reader`, the loop itself (`open_loop`), and one `step` of it; `probe` is the request
//! before it. `wrk` and `h2load` run those programs and parse what they print into a `report`.

mod tls_trust;
pub(crate) mod target;
pub(crate) mod response_reader;
mod connection;
pub(crate) mod open_loop;
pub(crate) mod probe;
pub(crate) mod step;
pub(crate) mod report;
pub(crate) mod wrk;
pub(crate) mod h2load;
