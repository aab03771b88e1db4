//! HTTP/2 to upstreams (RFC 9113), by the crate `h2`.
//!
//! `io` is the byte stream below it, `head` converts heads, `memory` bounds what responses hold,
//! `connection` is one connection with the task that drives it, and `stream` is one exchange. Many
//! exchanges share a connection. Each has clocks of its own, and its end never ends the connection.
//! The receive windows of all streams together fit into that of the connection: a client that reads
//! slowly holds up its own exchange alone.

mod io;
mod head;
mod sync;
mod window_account;
mod memory;
mod connection;
mod stream;
#[cfg(test)]
mod orders;

pub(crate) use connection::{Http2UpstreamConnection, http2_connections};
pub(crate) use memory::{WindowReservation, reserved_upstream_bytes, set_http2_memory};
pub(crate) use stream::Http2UpstreamStream;
