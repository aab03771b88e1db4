//! Where a response lives: region, slot, Redis, local copy. No HTTP.
//!
//! A `Store` belongs to a process, a `View` to each of its threads. A response is named by a key; a view finds it in the
//! thread's own table, in the cache that threads share, or at the shard of its region, and stores it there.
//!
//! Refuses to know what a response means: freshness, variants and who may see it are the gateway's.
//! Invariant: whatever Redis does, a lookup ends within its deadline, and what it then says is true or "not found".

mod clock;
mod key;
mod placement;
mod entry;
mod remote;
mod hot;
mod local;
mod store;
mod bus;
mod treasury;

pub use bus::{Bus, BusReport, Confirmation, NoRoom, Notice, TooMany};
pub use entry::{Compression, Doubt, Entry, Meta, Purge, Scope, Since};
pub use hot::HotKey;
pub use key::{BadRegion, CacheKey, KeyBuilder, KeyRef, Region, Tag};
pub use local::LocalReport;
pub use placement::{SLOTS, Slot};
pub use remote::{BreakerState, Fault, FaultCounts, ShardCounts, ShardReport, TlsSettings};
pub use store::{
    Hit, LocalSettings, Placement, Reach, RegionSettings, Remote, RemoteSettings, Store, StoreError, Tier, View,
};
pub use treasury::RedisTreasury;
