//! Tidegate, the gateway: everything that speaks HTTP.
//!
//! The modules below stand in import order: each may import only those above it (`tests/tidy.rs` checks).
//! A request's life is on one screen in `pipeline`; `docs/architecture.md` draws the house.
#![allow(clippy::missing_errors_doc)]

pub mod metrics;
pub mod event;
pub mod http;
pub mod error;
pub mod hop;
pub mod identify;
pub mod limit;
pub mod cache;
pub mod breaker;
pub mod endpoint;
pub mod upstream;
pub mod degrade;
pub mod log;
pub mod respond;
pub mod route;
pub mod pipeline;
pub mod serve;
pub mod tls;
pub mod accept;
mod plain;
pub mod purge;
pub mod admin;
pub mod admin_client;
pub mod config;
pub mod demo;
pub mod server;
