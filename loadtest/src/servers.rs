//! Servers that a load needs: the minimal `origin`, an origin with a knee (`worker_pool_origin`),
//! one whose responses a scenario decides (`scripted_origin`), the two upper bounds
//! (`constant_response`, `byte_relay`), and Redis. The first two and the bounds are commands too.
//!
//! `listen`, `free_address` and `certificate` are their addresses and their TLS.

pub(crate) mod listen;
pub(crate) mod free_address;
pub(crate) mod certificate;
pub(crate) mod origin;
pub(crate) mod worker_pool_origin;
pub(crate) mod scripted_origin;
pub(crate) mod constant_response;
pub(crate) mod byte_relay;
pub(crate) mod redis_server;
