//! The HTTP/1.1 engine (RFC 9112), strict towards clients and upstreams. The only place that knows
//! HTTP/1 syntax.
//!
//! `scan` finds the end of a head. `request` and `response` parse heads or refuse them. `chunk`
//! decodes chunked bodies. `send` writes messages, `serialized`
//! holds prebuilt responses. `downstream` is a client connection, `upstream` an upstream
//! connection, and `relay` connects the two after a protocol switch. A message that the engine
//! accepts has exactly one framing. It is serialized from its parsed form, never copied through.

mod scan;
mod chunk;
mod request;
mod response;
mod send;
mod serialized;
pub(crate) mod downstream;
pub(crate) mod upstream;
mod relay;
pub mod fuzzing;

pub(crate) use crate::http::authority::is_authority;
pub(crate) use crate::http::refusal::RequestRefusal;
pub(crate) use chunk::is_allowed_trailer;
pub(crate) use downstream::{DownstreamConnection, Http1RequestBody, RequestReadError, ResponseWriter, WaitOutcome};
pub(crate) use relay::relay;
pub(crate) use send::SendError;
pub(crate) use serialized::SerializedResponse;
pub(crate) use upstream::Http1UpstreamConnection;
