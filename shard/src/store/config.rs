//! Owns the configuration of a store: local cache, remote cache, regions.

use crate::entry::Compression;
use crate::key::Region;
use crate::remote::RedisTlsConfig;
use std::collections::BTreeMap;
use std::time::Duration;

/// Configuration of the local cache: its memory, and the rate from which a key is hot.
#[derive(Clone, Copy, Debug)]
pub struct LocalConfig {
    /// Maximum weight of all entries, in bytes, L1 caches and pinned entries included.
    pub memory_bytes: usize,
    /// Lookups per second, over all threads, from which a key is hot.
    pub hot_rate: u32,
}

/// Configuration of the remote cache. No `Debug`: addresses and secret are confidential.
#[derive(Clone)]
pub struct RemoteConfig {
    /// Deadline of one read, connecting included. A batch of writes, for which no request waits,
    /// may take ten times as long.
    pub deadline: Duration,
    /// Key of the MAC of entries. If it is empty, entries are protected against corruption only.
    pub secret: String,
    /// Larger bodies are stored locally only.
    pub object_bytes: usize,
    pub compression: Compression,
    /// Bodies from this size on are compressed if their metadata indicate that this helps.
    pub compress_from: usize,
    /// Number of servers that hold a hot entry, its own included.
    pub hot_copies: u16,
    /// TLS for `rediss://` endpoints.
    pub tls: RedisTlsConfig,
    pub regions: BTreeMap<Region, RegionConfig>,
    /// The region whose shards also serve regions without a configuration, and hold the state that
    /// the nodes of a fleet share.
    pub default_region: Region,
}

/// Configuration of one region.
#[derive(Clone)]
pub struct RegionConfig {
    /// From the number of endpoints to 1024.
    pub slots: u16,
    /// `redis://[user:password@]host:port[/db]`, `rediss://` for TLS, `redis+unix:///path`, or
    /// `redis+sentinel://[user:password@]host:port,host:port/master[/db]` for a master that
    /// Sentinels report.
    pub endpoints: Vec<String>,
    /// Seed nodes of a Redis Cluster, as `redis://` or `rediss://`, instead of endpoints.
    pub cluster: Vec<String>,
    /// Regions in which misses of this region are looked up, in this order.
    pub fallback: Vec<Region>,
}
