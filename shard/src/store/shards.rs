//! Owns the shards of a store, built from its configuration: the endpoints of each region, or the
//! masters of its cluster.
//!
//! Refuses invalid configuration. Never checks whether Redis is reachable.
//! Invariant: endpoints in errors and reports contain no credentials.

use super::config::{RegionConfig, RemoteConfig};
use crate::clock::WallClock;
use crate::entry::{CompressionConfig, EnvelopeCodec};
use crate::key::Region;
use crate::placement::{SLOTS_MAX, Slot, SlotTable};
use crate::remote::{
    CLUSTER_MASTERS_MAX, ConfiguredShard, Dialer, InvalidAddress, PendingDeletes, RedisCluster, RedisTlsConfig,
    SentinelEndpoint, ServerAddress, Shard, TopologyDiscovery,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Invalid configuration of the remote cache.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreConfigError {
    #[error("region {region}: neither endpoints nor a cluster, or both")]
    EndpointsOrCluster { region: Region },
    #[error("region {region}: endpoint {index} (from 0) has an invalid address or invalid certificates")]
    InvalidAddress { region: Region, index: usize },
    #[error("region {region}: {endpoint} is listed twice")]
    DuplicateEndpoint { region: Region, endpoint: String },
    #[error("region {region}: slots must be between the number of endpoints and {SLOTS_MAX}")]
    InvalidSlots { region: Region },
    #[error("the deadline must be between 1 ms and 10 s")]
    InvalidDeadline,
}

impl RemoteConfig {
    /// Validates the configuration; connects to nothing.
    pub fn check(&self) -> Result<(), StoreConfigError> {
        Shards::new(self, WallClock::new()).map(drop)
    }
}

/// The shards of all regions in one list, the regions that refer to them by index, and the state
/// that all shards share.
pub(super) struct Shards {
    pub(super) deadline: Duration,
    pub(super) hot_copies: u16,
    pub(super) wall: Arc<WallClock>,
    pub(super) codec: Arc<EnvelopeCodec>,
    pub(super) pending_deletes: Arc<PendingDeletes>,
    pub(super) shards: Vec<Arc<Shard>>,
    pub(super) regions: HashMap<Region, RegionShards>,
    pub(super) default_region: Region,
    pub(super) topology_discoveries: Vec<Arc<TopologyDiscovery>>,
}

/// Shards of one region: their position in the list of all shards, the mapping of slots to them,
/// and the regions in which misses are looked up, in order.
pub(super) struct RegionShards {
    pub(super) fallback: Vec<Region>,
    /// Index of its first shard among all shards.
    pub(super) first: usize,
    pub(super) backend: RegionBackend,
}

/// Mapping of a region's slots to shards: a fixed table over labelled endpoints, or the topology of
/// a Redis Cluster.
pub(super) enum RegionBackend {
    Endpoints {
        slots: SlotTable,
        labels: Vec<String>,
    },
    /// One shard for each possible master.
    Cluster {
        slots: u16,
        cluster: Arc<RedisCluster>,
    },
}

impl Shards {
    pub(super) fn new(config: &RemoteConfig, wall: Arc<WallClock>) -> Result<Self, StoreConfigError> {
        if !(Duration::from_millis(1)..=Duration::from_secs(10)).contains(&config.deadline) {
            return Err(StoreConfigError::InvalidDeadline);
        }
        let compression = CompressionConfig { algorithm: config.compression, min_bytes: config.compress_from };
        let mut shards = Self {
            deadline: config.deadline,
            hot_copies: config.hot_copies,
            wall,
            codec: Arc::new(EnvelopeCodec::new(&config.secret, config.object_bytes, compression)),
            pending_deletes: Arc::default(),
            shards: Vec::new(),
            regions: HashMap::new(),
            default_region: config.default_region,
            topology_discoveries: Vec::new(),
        };
        for (&region, region_config) in &config.regions {
            shards.add(region, region_config, &config.tls)?;
        }
        Ok(shards)
    }

    fn add(&mut self, region: Region, config: &RegionConfig, tls: &RedisTlsConfig) -> Result<(), StoreConfigError> {
        if config.endpoints.is_empty() == config.cluster.is_empty() {
            return Err(StoreConfigError::EndpointsOrCluster { region });
        }
        let count = config.endpoints.len().max(1);
        if config.slots > SLOTS_MAX || usize::from(config.slots) < count {
            return Err(StoreConfigError::InvalidSlots { region });
        }
        let backend = if config.cluster.is_empty() {
            self.add_endpoints(region, config, tls)?
        } else {
            self.add_cluster(region, config, tls)?
        };
        let first = self.shards.len() - backend.shard_count();
        self.regions.insert(region, RegionShards { fallback: config.fallback.clone(), first, backend });
        Ok(())
    }

    fn add_endpoints(
        &mut self,
        region: Region,
        config: &RegionConfig,
        tls: &RedisTlsConfig,
    ) -> Result<RegionBackend, StoreConfigError> {
        let mut labels = Vec::with_capacity(config.endpoints.len());
        for (index, url) in config.endpoints.iter().enumerate() {
            // The parser's error may quote the address, password included.
            let invalid = |_: InvalidAddress| StoreConfigError::InvalidAddress { region, index };
            let (address, label) = match SentinelEndpoint::parse(url) {
                Some(sentinels) => {
                    let sentinels = sentinels.map_err(invalid)?;
                    let (discovery, address) = sentinels.discovery(tls).map_err(invalid)?;
                    self.topology_discoveries.push(Arc::new(discovery));
                    (address, sentinels.master)
                }
                None => {
                    let server = Dialer::new(url, tls).map_err(invalid)?.server();
                    let label = server.label.clone();
                    (ServerAddress::fixed(server), label)
                }
            };
            if labels.contains(&label) {
                return Err(StoreConfigError::DuplicateEndpoint { region, endpoint: label });
            }
            self.shards.push(Arc::new(Shard::new(
                ConfiguredShard { region, index, label: Some(label.clone()) },
                address,
                self.wall.clone(),
            )));
            labels.push(label);
        }
        Ok(RegionBackend::Endpoints { slots: SlotTable::assign(config.slots, &labels), labels })
    }

    fn add_cluster(
        &mut self,
        region: Region,
        config: &RegionConfig,
        tls: &RedisTlsConfig,
    ) -> Result<RegionBackend, StoreConfigError> {
        let seeds = config.cluster.iter().enumerate().map(|(index, url)| {
            let dialer = Dialer::new(url, tls).ok().filter(Dialer::is_tcp);
            dialer.ok_or(StoreConfigError::InvalidAddress { region, index })
        });
        let cluster = Arc::new(RedisCluster::new(seeds.collect::<Result<_, _>>()?));
        for (index, address) in cluster.addresses.iter().enumerate() {
            self.shards.push(Arc::new(Shard::new(
                ConfiguredShard { region, index, label: None },
                address.clone(),
                self.wall.clone(),
            )));
        }
        self.topology_discoveries.push(Arc::new(TopologyDiscovery::Cluster(cluster.clone())));
        Ok(RegionBackend::Cluster { slots: config.slots, cluster })
    }

    pub(super) fn of(&self, region: &Region) -> Option<&RegionShards> {
        self.regions.get(region).or_else(|| self.regions.get(&self.default_region))
    }
}

impl RegionShards {
    pub(super) fn slots(&self) -> u16 {
        match &self.backend {
            RegionBackend::Endpoints { slots, .. } => slots.len(),
            RegionBackend::Cluster { slots, .. } => *slots,
        }
    }

    /// The shard of a region's slot; `None` while the cluster topology is unknown.
    pub(super) fn shard(&self, region: &Region, slot: Slot) -> Option<usize> {
        match &self.backend {
            RegionBackend::Endpoints { slots, .. } => Some(self.first + slots.owner(slot)),
            RegionBackend::Cluster { cluster, .. } => Some(self.first + cluster.master_of(region, slot)?),
        }
    }
}

impl RegionBackend {
    fn shard_count(&self) -> usize {
        match self {
            RegionBackend::Endpoints { labels, .. } => labels.len(),
            RegionBackend::Cluster { .. } => CLUSTER_MASTERS_MAX,
        }
    }
}
