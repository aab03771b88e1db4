//! Owns the store of a process: the local cache, the regions with their shards, and the validation
//! of their configuration.
//!
//! A region without configuration uses the shards of the default region under its own name: its
//! entries are separate from those of every other region. If the default region has no shards, the
//! region has no remote cache. The local cache has no regions; see `key`.
//!
//! Refuses invalid configuration (see `shards`). Never checks whether Redis is reachable: a gateway
//! starts without it.
//! Invariant: endpoints in errors and reports contain no credentials.

mod config;
mod hot_copies;
mod shards;
mod view;

pub use config::{LocalConfig, RegionConfig, RemoteConfig};
pub use shards::StoreConfigError;
pub use view::{CacheHit, CacheLayer, InsertTarget, RemoteLookup, StoreView};

pub(crate) use hot_copies::HotCopies;

use crate::clock::{WallClock, wall_time};
use crate::entry::{EntryLocation, EntryMeta, InvalidationEpochs, Purge, UNNUMBERED};
use crate::hot::{HotKey, HotKeys};
use crate::key::{Digest, KeyRef, Region};
use crate::local::{LocalCache, LocalCacheReport};
use crate::placement::{DEFAULT_SLOTS, Slot, copy_key, hash_tag, redis_key, rendezvous_owner};
use crate::remote::{CLUSTER_MASTERS_MAX, RedisCluster, Shard, ShardReport, TopologyDiscovery};
use hot_copies::CopyLocation;
use shards::{RegionBackend, RegionShards, Shards};
use std::sync::Arc;
use std::time::SystemTime;

/// Slot of a response and the endpoint that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    pub slot: Slot,
    /// Host, port and database, if the region has a remote cache whose server is known.
    pub endpoint: Option<String>,
}

/// The store of a process: the local cache, the shards of all regions, the hot keys and the
/// invalidation state. Each thread uses it through a `StoreView`.
pub struct Store<M> {
    local: LocalCache<M>,
    hot: Arc<HotKeys>,
    wall: Arc<WallClock>,
    hot_copies: HotCopies,
    epochs: Arc<InvalidationEpochs>,
    remote: Option<Shards>,
}

/// The holder of a cluster limit's bucket: one shard of the default region, or a Redis Cluster,
/// whose master for it may change.
pub(crate) enum BucketOwner<'a> {
    Shard(&'a Shard),
    /// The shards of a cluster.
    Cluster(&'a Arc<RedisCluster>, &'a [Arc<Shard>]),
}

/// One bit per copy.
const COPIES_MAX: usize = 64;

/// Shard, slot, Redis key and digest of one cache key: everything that a read or write of it needs.
struct RemoteKey {
    shard: usize,
    slot: Slot,
    redis_key: String,
    digest: Digest,
}

/// The current owner of a key that a shard redirected.
enum Redirect {
    To(usize),
    /// The cluster topology is not known.
    Unknown,
    /// The shard is not part of a cluster.
    NoCluster,
}

impl RemoteKey {
    fn location(&self) -> EntryLocation {
        EntryLocation { shard: self.shard, digest_prefix: self.digest.prefix() }
    }
}

impl<M: EntryMeta> Store<M> {
    /// Validates the configuration; connects to nothing.
    pub fn new(local: LocalConfig, remote: Option<RemoteConfig>) -> Result<Arc<Self>, StoreConfigError> {
        let wall = WallClock::new();
        let remote = remote.as_ref().map(|remote| Shards::new(remote, wall.clone())).transpose()?;
        let epochs = Arc::new(InvalidationEpochs::new(remote.as_ref().map_or(0, |remote| remote.shards.len())));
        let hot = Arc::new(HotKeys::new(local.hot_rate));
        let local = LocalCache::new(local.memory_bytes, hot.clone(), epochs.clone());
        Ok(Arc::new(Self { local, hot, wall, hot_copies: HotCopies::default(), epochs, remote }))
    }

    /// A thread's view of the store; cheap to create, holds about 400 KiB.
    pub fn view(self: &Arc<Self>) -> StoreView<M> {
        StoreView::new(self.clone())
    }

    /// The placement of a response, whether it is stored or not.
    pub fn placement(&self, region: &Region, key: &KeyRef<'_>) -> Placement {
        let slot = self.slot(region, key);
        let endpoint = || {
            let remote = self.remote.as_ref()?;
            remote.shards[remote.of(region)?.shard(region, slot)?].label()
        };
        Placement { slot, endpoint: endpoint() }
    }

    /// Regions in which misses of `region` are looked up.
    pub fn fallback_regions(&self, region: &Region) -> &[Region] {
        let configured = self.remote.as_ref().and_then(|remote| remote.regions.get(region));
        configured.map_or(&[], |configured| &configured.fallback)
    }

    /// The slot of a response in its region.
    pub fn slot(&self, region: &Region, key: &KeyRef<'_>) -> Slot {
        let configured = self.remote.as_ref().and_then(|remote| remote.of(region));
        Slot::for_key(key, configured.map_or(DEFAULT_SLOTS, RegionShards::slots))
    }

    /// State and statistics of every shard.
    pub fn shard_reports(&self) -> impl Iterator<Item = ShardReport> {
        self.remote.iter().flat_map(|remote| &remote.shards).filter_map(|shard| shard.report())
    }

    /// The current time: from a server of the remote cache if one reported it lately, so that a
    /// fleet uses one clock; else from this machine, whose clock steps are applied with a delay.
    pub fn wall_time(&self) -> SystemTime {
        wall_time(&self.wall, self.remote_shards().iter().map(|shard| shard.clock()))
    }

    /// Seconds, with fractions, by which this machine's clock is ahead of `wall_time`.
    pub fn clock_offset(&self) -> f64 {
        let (fleet, machine) = (self.wall_time(), SystemTime::now());
        match machine.duration_since(fleet) {
            Ok(ahead) => ahead.as_secs_f64(),
            Err(behind) => -behind.duration().as_secs_f64(),
        }
    }

    /// Whether the default region has a remote cache, which also stores the fleet's shared limiter
    /// state.
    pub fn has_default_region(&self) -> bool {
        self.bucket_owner("").is_some()
    }

    /// Lookups per second from which a key is hot.
    pub fn hot_rate(&self) -> u32 {
        self.hot.rate()
    }

    /// The hot keys of this process, hottest first.
    pub fn hot_keys(&self) -> Vec<HotKey> {
        self.hot.hottest()
    }

    pub fn local_report(&self) -> LocalCacheReport {
        self.local.report()
    }

    /// Purges in this process only; see `Bus::purge` for a fleet.
    pub fn purge_locally(&self, purge: Purge) {
        self.epochs.purge(purge, UNNUMBERED);
    }

    fn remote_key(&self, region: &Region, key: &KeyRef<'_>) -> Option<RemoteKey> {
        let target = self.remote.as_ref()?.of(region)?;
        let slot = Slot::for_key(key, target.slots());
        let digest = key.digest(region);
        // While the cluster topology is unknown, the first shard: it is not connected either.
        let shard = target.shard(region, slot).unwrap_or(target.first);
        Some(RemoteKey { shard, slot, redis_key: redis_key(region, slot, &digest), digest })
    }

    /// The current owner of a key that a shard redirected.
    fn redirect(&self, shard: usize, redis_key: &str) -> Redirect {
        let Some(((cluster, position), tag)) = self.cluster_of(shard).zip(hash_tag(redis_key)) else {
            return Redirect::NoCluster;
        };
        match cluster.master_of_tag(tag) {
            Some(current) => Redirect::To(shard - position + current),
            None => Redirect::Unknown,
        }
    }

    /// Locations of the copies of a hot entry: the slots after its own, each on another server.
    fn copy_locations(&self, region: &Region, key: &RemoteKey) -> Vec<CopyLocation> {
        let Some((remote, target)) = self.remote.as_ref().and_then(|remote| Some((remote, remote.of(region)?))) else {
            return Vec::new();
        };
        if remote.shards.len() == 1 {
            return Vec::new();
        }
        let (mut locations, mut taken) = (Vec::new(), vec![key.shard]);
        for slot in key.slot.following(target.slots()) {
            if taken.len() >= usize::from(remote.hot_copies).min(COPIES_MAX) {
                break;
            }
            if let Some(shard) = target.shard(region, slot).filter(|shard| !taken.contains(shard)) {
                taken.push(shard);
                locations.push(CopyLocation { shard, redis_key: copy_key(region, slot, &key.digest) });
            }
        }
        locations
    }
}

impl<M> Store<M> {
    pub(crate) fn remote_shards(&self) -> &[Arc<Shard>] {
        self.remote.as_ref().map_or(&[], |remote| &remote.shards)
    }

    pub(crate) fn epochs(&self) -> &InvalidationEpochs {
        &self.epochs
    }

    pub(crate) fn hot_copies(&self) -> &HotCopies {
        &self.hot_copies
    }

    pub(crate) fn local(&self) -> &LocalCache<M> {
        &self.local
    }

    pub(crate) fn topology_discoveries(&self) -> &[Arc<TopologyDiscovery>] {
        self.remote.as_ref().map_or(&[], |remote| &remote.topology_discoveries)
    }

    /// The cluster that a shard belongs to, and the shard's position in it.
    pub(crate) fn cluster_of(&self, shard: usize) -> Option<(&Arc<RedisCluster>, usize)> {
        self.remote.as_ref()?.regions.values().find_map(|region| match &region.backend {
            RegionBackend::Cluster { cluster, .. }
                if (region.first..region.first + CLUSTER_MASTERS_MAX).contains(&shard) =>
            {
                Some((cluster, shard - region.first))
            }
            _ => None,
        })
    }

    /// The owner of a key without a slot, in the default region, by its name.
    pub(crate) fn bucket_owner(&self, name: &str) -> Option<BucketOwner<'_>> {
        let remote = self.remote.as_ref()?;
        let region = remote.of(&remote.default_region)?;
        Some(match &region.backend {
            RegionBackend::Endpoints { labels, .. } => {
                BucketOwner::Shard(&remote.shards[region.first + rendezvous_owner(name, labels)?])
            }
            RegionBackend::Cluster { cluster, .. } => {
                BucketOwner::Cluster(cluster, &remote.shards[region.first..region.first + CLUSTER_MASTERS_MAX])
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Compression;
    use crate::entry::tests::TestMeta;
    use crate::key::KeyBuilder;
    use crate::placement::SLOTS_MAX;
    use crate::remote::RedisTlsConfig;
    use std::time::Duration;

    fn remote(regions: &[(&str, u16, &[&str])]) -> RemoteConfig {
        let region = |&(name, slots, endpoints): &(&str, u16, &[&str])| {
            let endpoints = endpoints.iter().map(|url| url.to_string()).collect();
            (Region::new(name).unwrap(), RegionConfig { slots, endpoints, cluster: Vec::new(), fallback: Vec::new() })
        };
        let regions = regions.iter().map(region).collect();
        RemoteConfig {
            deadline: Duration::from_millis(20),
            secret: String::new(),
            object_bytes: 1 << 20,
            compression: Compression::Off,
            compress_from: 0,
            hot_copies: 8,
            tls: RedisTlsConfig::default(),
            regions,
            default_region: Region::DEFAULT,
        }
    }

    fn store(remote: Option<RemoteConfig>) -> Result<Arc<Store<TestMeta>>, StoreConfigError> {
        Store::new(LocalConfig { memory_bytes: 1 << 20, hot_rate: 1_000 }, remote)
    }

    #[test]
    fn invalid_configuration_is_rejected_without_revealing_credentials() {
        let region = Region::DEFAULT;
        let refused = |slots, endpoints: &[&str]| store(Some(remote(&[("default", slots, endpoints)]))).err().unwrap();
        assert_eq!(refused(16, &[]), StoreConfigError::EndpointsOrCluster { region });
        assert_eq!(refused(16, &["redis://a", "http://:pw@b"]), StoreConfigError::InvalidAddress { region, index: 1 });
        let twice = refused(16, &["redis://:pw1@a:1", "redis://:pw2@a:1"]);
        assert_eq!(twice, StoreConfigError::DuplicateEndpoint { region, endpoint: "a:1".into() });
        assert_eq!(refused(1, &["redis://a", "redis://b"]), StoreConfigError::InvalidSlots { region });
        assert_eq!(refused(SLOTS_MAX + 1, &["redis://a"]), StoreConfigError::InvalidSlots { region });
        let without_deadline = RemoteConfig { deadline: Duration::ZERO, ..remote(&[]) };
        assert_eq!(store(Some(without_deadline)).err(), Some(StoreConfigError::InvalidDeadline));
    }

    #[test]
    fn an_unconfigured_region_uses_the_default_shards_under_its_own_name() {
        let config = remote(&[("default", 16, &["redis://:pw@a:1/3"]), ("eu", 4, &["redis://b:2"])]);
        let store = store(Some(config)).unwrap();
        let mut builder = KeyBuilder::new();
        let key = builder.part(b"/").key();
        let [default, eu, elsewhere] = ["default", "eu", "elsewhere"].map(|name| Region::new(name).unwrap());
        let endpoint = |region| store.placement(region, &key).endpoint;
        assert_eq!(
            [endpoint(&default), endpoint(&eu), endpoint(&elsewhere)],
            [Some("a:1/3".to_owned()), Some("b:2".to_owned()), Some("a:1/3".to_owned())]
        );
        let keys = [default, elsewhere].map(|region| store.remote_key(&region, &key).unwrap().redis_key);
        assert!(keys[0].starts_with("tg:{default:") && keys[1].starts_with("tg:{elsewhere:"), "{keys:?}");
    }

    #[test]
    fn placement_without_redis_has_a_slot_and_no_endpoint() {
        let (alone, sparse) = (store(None).unwrap(), store(Some(remote(&[("eu", 4, &["redis://b:2"])]))).unwrap());
        let mut builder = KeyBuilder::new();
        let key = builder.part(b"/").key();
        for store in [alone, sparse] {
            assert_eq!(
                store.placement(&Region::DEFAULT, &key),
                Placement { slot: Slot::for_key(&key, DEFAULT_SLOTS), endpoint: None }
            );
            assert!(store.remote_key(&Region::DEFAULT, &key).is_none());
        }
    }
}
