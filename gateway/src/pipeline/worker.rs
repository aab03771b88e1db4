//! The resources of one worker thread that requests use.

use std::cell::Cell;
use std::sync::Arc;

use shard::{KeyBuilder, StoreView};

use super::prebuilt_429::Prebuilt429Cache;
use crate::cache::fill::FillTable;
use crate::cache::stored::CacheMeta;
use crate::log;

/// The cache view, fills, prebuilt responses and log of one worker thread.
pub(crate) struct WorkerResources {
    /// Buffers for cache keys, reused by the next lookup.
    pub(crate) key_builder: Cell<KeyBuilder>,
    pub(crate) view: StoreView<CacheMeta>,
    pub(crate) fills: Arc<FillTable>,
    pub(crate) prebuilt_429: Prebuilt429Cache,
    pub(crate) log: Arc<log::AccessLog>,
}
