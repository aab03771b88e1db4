//! Owns the shards of a store, built from its settings: each region's endpoints, or the places of its cluster.
//!
//! Refuses settings that cannot work, and never asks whether Redis is there.
//! Invariant: what is said about an endpoint contains no credentials.

use super::{RegionSettings, RemoteSettings};
use crate::clock::Wall;
use crate::entry::{Packing, Seal};
use crate::key::Region;
use crate::placement::{SLOTS_MAX, Slot, Slots};
use crate::remote::{BadAddress, Cluster, Dialer, PLACES, Removals, Scout, Sentinels, Shard, Site, TlsSettings};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// What is wrong with settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("region {region}: neither endpoints nor a cluster, or both")]
    NoEndpoints { region: Region },
    #[error("region {region}: endpoint {index} (from 0) is no address, or its certificates are none")]
    Address { region: Region, index: usize },
    #[error("region {region}: {endpoint} is listed twice")]
    Twice { region: Region, endpoint: String },
    #[error("region {region}: slots must be between the number of endpoints and {SLOTS_MAX}")]
    Slots { region: Region },
    #[error("the deadline must be between 1 ms and 10 s")]
    Deadline,
}

pub(super) struct Shards {
    pub(super) deadline: Duration,
    pub(super) hot_copies: u16,
    pub(super) wall: Arc<Wall>,
    pub(super) seal: Arc<Seal>,
    pub(super) removals: Arc<Removals>,
    pub(super) shards: Vec<Arc<Shard>>,
    pub(super) regions: HashMap<Region, RegionShards>,
    pub(super) scouts: Vec<Arc<Scout>>,
}

pub(super) struct RegionShards {
    pub(super) fallback: Vec<Region>,
    /// Index of its first shard among all.
    pub(super) first: usize,
    pub(super) kind: Kind,
}

pub(super) enum Kind {
    Endpoints {
        slots: Slots,
        labels: Vec<String>,
    },
    /// One shard for each of its places.
    Cluster {
        slots: u16,
        cluster: Arc<Cluster>,
    },
}

impl Shards {
    pub(super) fn new(settings: &RemoteSettings, wall: Arc<Wall>) -> Result<Self, StoreError> {
        if !(Duration::from_millis(1)..=Duration::from_secs(10)).contains(&settings.deadline) {
            return Err(StoreError::Deadline);
        }
        let packing = Packing { compression: settings.compression, from: settings.compress_from };
        let mut all = Self {
            deadline: settings.deadline,
            hot_copies: settings.hot_copies,
            wall,
            seal: Arc::new(Seal::new(&settings.secret, settings.object_bytes, packing)),
            removals: Arc::default(),
            shards: Vec::new(),
            regions: HashMap::new(),
            scouts: Vec::new(),
        };
        for (&region, its) in &settings.regions {
            all.add(region, its, &settings.tls)?;
        }
        Ok(all)
    }

    fn add(&mut self, region: Region, settings: &RegionSettings, tls: &TlsSettings) -> Result<(), StoreError> {
        if settings.endpoints.is_empty() == settings.cluster.is_empty() {
            return Err(StoreError::NoEndpoints { region });
        }
        let count = settings.endpoints.len().max(1);
        if settings.slots > SLOTS_MAX || usize::from(settings.slots) < count {
            return Err(StoreError::Slots { region });
        }
        let kind = if settings.cluster.is_empty() {
            self.add_endpoints(region, settings, tls)?
        } else {
            self.add_cluster(region, settings, tls)?
        };
        let first = self.shards.len() - kind.shards();
        self.regions.insert(region, RegionShards { fallback: settings.fallback.clone(), first, kind });
        Ok(())
    }

    fn add_endpoints(
        &mut self,
        region: Region,
        settings: &RegionSettings,
        tls: &TlsSettings,
    ) -> Result<Kind, StoreError> {
        let mut labels = Vec::with_capacity(settings.endpoints.len());
        for (index, url) in settings.endpoints.iter().enumerate() {
            // What is wrong with an address may quote it, password included.
            let address = |_: BadAddress| StoreError::Address { region, index };
            let (site, label) = match Sentinels::of(url) {
                Some(named) => {
                    let named = named.map_err(address)?;
                    let (scout, site) = named.scout(tls).map_err(address)?;
                    self.scouts.push(Arc::new(scout));
                    (site, named.master)
                }
                None => {
                    let spot = Dialer::new(url, tls).and_then(|dialer| dialer.spot()).map_err(address)?;
                    let label = spot.label.clone();
                    (Site::fixed(spot), label)
                }
            };
            if labels.contains(&label) {
                return Err(StoreError::Twice { region, endpoint: label });
            }
            self.shards.push(Arc::new(Shard::new(region, index, site, Some(label.clone()), self.wall.clone())));
            labels.push(label);
        }
        Ok(Kind::Endpoints { slots: Slots::spread(settings.slots, &labels), labels })
    }

    fn add_cluster(
        &mut self,
        region: Region,
        settings: &RegionSettings,
        tls: &TlsSettings,
    ) -> Result<Kind, StoreError> {
        let seeds = settings.cluster.iter().enumerate().map(|(index, url)| {
            let dialer = Dialer::new(url, tls).ok().filter(Dialer::is_on_a_network);
            dialer.ok_or(StoreError::Address { region, index })
        });
        let cluster = Arc::new(Cluster::new(seeds.collect::<Result<_, _>>()?));
        for (index, site) in cluster.sites.iter().enumerate() {
            self.shards.push(Arc::new(Shard::new(region, index, site.clone(), None, self.wall.clone())));
        }
        self.scouts.push(Arc::new(Scout::Cluster(cluster.clone())));
        Ok(Kind::Cluster { slots: settings.slots, cluster })
    }

    pub(super) fn of(&self, region: &Region) -> Option<&RegionShards> {
        self.regions.get(region).or_else(|| self.regions.get(&Region::DEFAULT))
    }
}

impl RegionShards {
    pub(super) fn slots(&self) -> u16 {
        match &self.kind {
            Kind::Endpoints { slots, .. } => slots.len(),
            Kind::Cluster { slots, .. } => *slots,
        }
    }

    /// The shard of a region's slot; `None` where a cluster has not said who holds it.
    pub(super) fn shard(&self, region: &Region, slot: Slot) -> Option<usize> {
        match &self.kind {
            Kind::Endpoints { slots, .. } => Some(self.first + slots.owner(slot)),
            Kind::Cluster { cluster, .. } => Some(self.first + cluster.place_of(region, slot)?),
        }
    }
}

impl Kind {
    fn shards(&self) -> usize {
        match self {
            Kind::Endpoints { labels, .. } => labels.len(),
            Kind::Cluster { .. } => PLACES,
        }
    }
}
