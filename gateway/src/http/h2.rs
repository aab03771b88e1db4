//! The HTTP/2 engine towards clients (RFC 9113, RFC 7541, RFC 9218). The only place that
//! knows HTTP/2 syntax.
//!
//! `frame` names the parts of frames, the `hpack` files decode and encode field sections, and
//! `request_head` reads a request or refuses it. `connection` keeps the state of a connection:
//! `receive` and `receive_request` change it by the frames of the client, `write` sends, and a
//! `stream_handle` is the side of the task that answers. `sender` decides which stream sends next,
//! and `request_body` holds what a client sends. `first_window` is what a new stream may send,
//! `tunnel` relays a stream that has switched protocols, `abuse` counts frames that cost work.
//! `account` and `memory_budget` bound the memory of a connection and of all, `deferred` holds
//! streams that wait for it, and `relief` ends uploads that keep others from it.

mod client_clock;
mod abuse;
mod frame;
mod priority;
mod huffman;
mod hpack_table;
mod hpack_decode;
mod hpack_encode;
mod out_queue;
mod request_head;
mod repeated_head;
mod memory_budget;
mod account;
mod shared;
mod request_body;
mod first_window;
mod tunnel;
mod stream;
mod deferred;
mod sender;
mod receiver;
mod withheld;
mod connection;
mod write;
mod stream_handle;
mod receive_request;
mod receive;
mod relief;
pub mod fuzzing;

pub(crate) use abuse::{FrameAbuse, Http2Client, is_flooding};
pub(crate) use client_clock::ClientClock;
pub(crate) use connection::Http2Connection;
pub(crate) use frame::Http2ErrorCode;
pub(crate) use memory_budget::{refused_streams, reserved_bytes};
pub(crate) use receive_request::{IncomingRequest, ReceiveEnd};
pub(crate) use request_body::Http2RequestBody;
pub(crate) use request_head::{describe_unread, may_be_bodiless};
pub(crate) use stream_handle::{ResponseEnd, StreamHandle};
pub(crate) use tunnel::{TunnelBody, TunnelUpload, tunnel};

#[cfg(test)]
mod tests;
