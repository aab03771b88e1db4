//! The response cache (RFC 9111 as a shared cache): what is stored, for how long, and when a stale
//! response is served.
//!
//! `config` has the configuration. `date`, `control` and `targeted` parse fields. `freshness`
//! computes ages and lifetimes. `extent` and `range` handle byte ranges, `resume` continues an
//! interrupted response by one, `partial` combines stored partial responses, and `missing` finds
//! the piece that one lacks. `languages` reduces `Accept-Language`. `policy` makes the decisions.
//! `stored` is the metadata of an entry, `key` its cache key, and `tags` its surrogate keys. `fill`
//! collapses concurrent misses into one fetch. `store_metrics` has the metrics of the cache store.

mod config;
pub(crate) mod control;
mod date;
pub(crate) mod extent;
pub(crate) mod fill;
mod targeted;
pub(crate) mod stored;
mod freshness;
pub mod key;
pub(crate) mod range;
pub(crate) mod resume;
pub(crate) mod tags;
pub mod policy;
pub(crate) mod partial;
pub(crate) mod missing;
pub(crate) mod languages;
pub(crate) mod store_metrics;

pub use config::{CacheConfig, CachePolicy};
pub(crate) use config::{CookiePolicy, HonourClient, SetCookiePolicy, StatusPattern};
