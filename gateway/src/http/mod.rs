//! HTTP syntax without gateway policy: message heads, bodies, connections, the HTTP/1.1 engine, the
//! HTTP/2 engine towards clients, and HTTP/2 towards upstreams.
//!
//! The rest of the gateway uses `Request`, `Response`, `Fields` and `BodySource`. No file outside
//! this module knows the wire format.

pub(crate) mod text;
pub(crate) mod deadline;
pub(crate) mod write_timer;
pub(crate) mod exchange_clock;
pub(crate) mod min_rate;
pub(crate) mod tls_fault;
pub(crate) mod socket;
pub(crate) mod tls_stream;
pub(crate) mod transport;
pub(crate) mod buffer;
pub(crate) mod compressed_forms;
pub(crate) mod fields;
pub(crate) mod message;
pub(crate) mod grpc;
pub(crate) mod refusal;
pub(crate) mod authority;
pub mod target;
pub(crate) mod limits;
mod framing;
mod head;
pub(crate) mod body;
pub(crate) mod attempt;
mod exchange_body;
pub(crate) mod websocket;
pub(crate) mod h1;
pub(crate) mod h2;
pub(crate) mod request_body;
mod h2_upstream;
pub(crate) mod upstream_connection;

pub use limits::HttpLimits;
