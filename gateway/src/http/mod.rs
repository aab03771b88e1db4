//! HTTP's syntax and nothing of the gateway's meaning: heads, bodies, connections, the HTTP/1.1 engine, HTTP/2 by hyper.
//!
//! Everything else in the gateway sees `Request`, `Response`, `Fields` and `Source`; no other file knows how they are written on a wire.

pub mod alarm;
pub mod body;
pub mod buffer;
pub mod fields;
pub mod h1;
pub mod h2;
pub mod io;
pub mod limits;
pub mod message;
pub mod pace;
pub mod text;

pub use limits::Limits;
