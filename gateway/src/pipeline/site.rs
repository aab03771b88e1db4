//! What a configuration became: built once, shared by all threads, replaced whole by a reload.
//!
//! A request keeps the site it began with. What must outlive a reload (breakers, limits, stores, counts) is carried over.

use std::cell::Cell;
use std::sync::Arc;

use limiter::Limiter;
use shard::{KeyBuilder, View};

use super::denied::Denials;
use crate::cache::fill::Fills;
use crate::cache::stored::Meta;
use crate::http::limits::Limits;
use crate::identify::Identity;
use crate::limit::Face;
use crate::route::Routes;
use crate::{cache, log};

/// The built configuration.
pub struct Site {
    pub identity: Identity,
    pub routes: Routes,
    pub limiter: Limiter,
    pub limits: Face,
    pub cache: cache::Settings,
    pub http: Limits,
}

/// What one thread works with.
pub struct Worker {
    /// Buffers for keys, used again by the next request that looks into the cache.
    pub builder: Cell<KeyBuilder>,
    pub view: View<Meta>,
    pub fills: Arc<Fills>,
    pub denials: Denials,
    pub log: Arc<log::AccessLog>,
}
