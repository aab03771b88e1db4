//! The response cache: what is stored, for how long, and what is answered when it is stale (RFC 9111 as a shared cache).
//!
//! `control` reads directives, `policy` decides, `stored` is what is kept beside a body, `key` names it, `fill` makes many
//! requests for one missing answer into one.

pub mod control;
pub mod fill;
pub mod key;
pub mod policy;
pub mod stored;

use std::time::Duration;

/// Sizes and keys shared by all routes (`[cache]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Bytes of the local tier.
    pub memory_bytes: u64,
    /// Bytes of the largest response that is stored; larger ones pass through.
    pub object_bytes: u64,
    /// Bytes of the largest response that is stored remotely; larger ones stay local.
    pub remote_object_bytes: u64,
    /// Names of query parameters that are left out of the cache key; a trailing `*` matches any rest. None by default.
    pub key_ignore_query: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            memory_bytes: 256 << 20,
            object_bytes: 8 << 20,
            remote_object_bytes: 1 << 20,
            key_ignore_query: Vec::new(),
        }
    }
}

/// Freshness of one route's responses (`routes.cache`), where the origin says nothing itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutePolicy {
    /// Freshness lifetime of a response that carries none; zero stores only what says so itself.
    pub default_ttl: Duration,
    /// How long past its freshness a response may answer for a failing origin (RFC 5861 section 4).
    pub stale_if_error: Duration,
    /// How long past its freshness a response may answer while it is validated (RFC 5861 section 3).
    pub stale_while_revalidate: Duration,
}
