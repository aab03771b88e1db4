//! The gateway: everything that speaks HTTP.
//!
//! The modules below are in import order: each imports only from those above it (`tests/tidy.rs`
//! checks). `pipeline` shows the life of a request, `docs/architecture.md` the structure, and
//! `docs/glossary.md` defines the names.
#![allow(clippy::missing_errors_doc)]

#[cfg(test)]
mod picture;
mod metrics;
mod timestamp;
pub mod event;
mod panics;
mod tasks;
mod http;
mod error;
mod hop;
mod peer;
mod identify;
mod spans;
mod limit;
mod cache;
mod breaker;
mod concurrency;
mod connect;
mod endpoint;
mod discovery;
mod upstream;
mod pages;
mod degrade;
mod log;
mod record;
mod respond;
mod compress;
mod route;
mod pipeline;
mod serve;
mod tls;
mod proxy_protocol;
mod accept;
mod simple_server;
pub mod purge;
mod admin;
pub mod admin_client;
pub mod top;
pub mod config;
pub mod demo;
pub mod server;

/// Lines for the files of `routes.auth`.
pub mod credentials {
    pub use crate::identify::auth::api_keys::{NewApiKey, NewApiKeyError};
    pub use crate::identify::auth::htpasswd::password_line;
}

/// The items that tests, benches and fuzz targets of this crate use. Not a public interface.
#[doc(hidden)]
pub mod testing {
    pub use crate::cache::control::CacheControl;
    pub use crate::cache::extent::Extent;
    pub use crate::cache::stored::{CacheMeta, CachedObject};
    pub use crate::cache::{CacheConfig, CachePolicy, key, policy};
    pub use crate::http::HttpLimits;
    pub use crate::http::fields::{Fields, KnownField, is_token};
    pub use crate::http::h1::fuzzing;
    pub use crate::http::h2::fuzzing as h2_fuzzing;
    pub use crate::http::message::{BodyLength, HttpVersion, Request, Response, StatusCode};
    pub use crate::http::target;
    pub use crate::identify::jwk_set::JwkSet;
    pub use crate::identify::tokens;
    pub use crate::identify::{CallerIdentifier, CertificateField, IdentityConfig, IdentitySource, TraceSampling};
    pub use crate::proxy_protocol::header as proxy_header;
    pub use crate::tls::{fingerprint_text, has_fingerprint};
}
