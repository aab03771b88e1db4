//! Stores responses: region, slot, Redis, local cache. No HTTP.
//!
//! A `Store` belongs to a process, a `StoreView` to each of its threads. A response is identified
//! by a key. A view looks it up, and stores it, in the thread's own L1 table, in the cache that
//! threads share, and at the shard of its region.
//!
//! Refuses to interpret a response: freshness, variants and access rights are the gateway's.
//! Invariant: whatever Redis does, a lookup ends within its deadline and returns a valid entry or
//! none.

mod clock;
mod key;
mod placement;
mod entry;
mod tasks;
mod remote;
mod hot;
mod local;
mod store;
mod bus;
mod lease_backend;
#[cfg(test)]
mod scale;

pub use bus::{
    Bus, BusLoop, BusReport, DeliveryReport, FleetNodes, NamedOverride, OVERRIDE_DURATION_MAX, OverrideRegistryFull,
    OverrideRequest, PurgeOutboxFull,
};
pub use entry::{Compression, Entry, EntryMeta, EpochSnapshot, Purge, PurgeScope, StaleReason};
pub use hot::HotKey;
pub use key::{CacheKey, InvalidRegion, KeyBuilder, KeyRef, Region, Tag};
pub use lease_backend::RedisLeaseBackend;
pub use local::LocalCacheReport;
pub use placement::{DEFAULT_SLOTS, SLOTS_MAX, Slot};
pub use remote::{RedisTlsConfig, ShardBreakerState, ShardCounts, ShardFault, ShardFaultCounts, ShardReport};
pub use store::{
    CacheHit, CacheLayer, InsertTarget, LocalConfig, Placement, RegionConfig, RemoteConfig, RemoteLookup, Store,
    StoreConfigError, StoreView,
};
pub use tasks::{ListedShardTask, ShardTaskKind};
