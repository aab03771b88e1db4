//! The HTTP/1.1 engine (RFC 9112), strict on both sides: the only place that knows HTTP/1 syntax.
//!
//! `scan` finds the end of a head; `request` and `response` turn heads into messages or a reason to refuse them; `framing`
//! decides where a body ends; `chunk` decodes; `send` writes, and `written` keeps what was; `server` and `client` are the two ends of a
//! connection. A message that this engine accepts is framed in exactly one way, and is written anew rather than copied.

mod chunk;
pub mod client;
mod framing;
pub mod probe;
mod relay;
mod request;
mod response;
mod scan;
mod send;
pub mod server;
mod written;

pub use client::{Link, LinkError};
pub use relay::relay;
pub use request::Refusal;
pub(crate) use request::is_authority;
pub use send::SendError;
pub use server::{Answer, ReadError, RequestBody, Server, Waited};
pub use written::Written;
