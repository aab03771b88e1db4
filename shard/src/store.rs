//! Owns the store of a process: the local tier, the regions with their shards, and what settings may say about them.
//!
//! A region without settings of its own uses the shards of `default`, under its own name: its entries are apart from those of
//! `default` and of every other region. Where there is no `default` either, it has no remote tier. The local tier does not know
//! regions; see `key`.
//!
//! Refuses settings that cannot work, and never asks whether Redis is there: a gateway starts without it.
//! Invariant: what is said about an endpoint, in errors and reports, contains no credentials.

mod view;

pub use view::{Hit, Reach, Remote, Tier, View};

use crate::entry::{Epochs, Home, Meta, Purge, Seal, UNNUMBERED};
use crate::key::{Digest, KeyRef, Region};
use crate::local::{Local, LocalReport};
use crate::placement::{SLOTS, SLOTS_MAX, Slot, Slots, redis_key, winner};
use crate::remote::{Shard, ShardReport, client};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The local tier.
#[derive(Clone, Copy, Debug)]
pub struct LocalSettings {
    /// Weight of all entries; threads' own tables may hold half as much again.
    pub memory_bytes: usize,
}

/// The remote tier. No `Debug`: addresses and secret are confidential.
#[derive(Clone)]
pub struct RemoteSettings {
    /// For one read, connecting included. A batch of writes, which no request waits for, may take ten times as long.
    pub deadline: Duration,
    /// Authenticates entries; when empty, they are only protected against damage.
    pub secret: String,
    /// Bodies that are larger stay local.
    pub object_bytes: usize,
    pub regions: BTreeMap<Region, RegionSettings>,
}

/// Where a region's entries live.
#[derive(Clone)]
pub struct RegionSettings {
    /// From the number of endpoints to 1024.
    pub slots: u16,
    /// `redis://[user:password@]host:port[/db]` or `redis+unix:///path`.
    pub endpoints: Vec<String>,
}

/// What is wrong with settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("region {region}: no endpoints")]
    NoEndpoints { region: Region },
    #[error("region {region}: endpoint {index} (from 0) is not a redis:// or redis+unix:// address")]
    Address { region: Region, index: usize },
    #[error("region {region}: endpoint {index} (from 0) asks for TLS, which is not built in")]
    Tls { region: Region, index: usize },
    #[error("region {region}: {endpoint} is listed twice")]
    Twice { region: Region, endpoint: String },
    #[error("region {region}: slots must be between the number of endpoints and {SLOTS_MAX}")]
    Slots { region: Region },
    #[error("the deadline must be between 1 ms and 10 s")]
    Deadline,
}

/// Where a response lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement<'a> {
    pub slot: Slot,
    /// Host, port and database, if the region has a remote tier.
    pub endpoint: Option<&'a str>,
}

/// The store of a process. Threads use it through a `View` each.
pub struct Store<M> {
    local: Local<M>,
    epochs: Arc<Epochs>,
    remote: Option<Shards>,
    /// Regions that something was stored for.
    named: Mutex<BTreeSet<Region>>,
}

struct Shards {
    deadline: Duration,
    seal: Arc<Seal>,
    shards: Vec<Arc<Shard>>,
    regions: HashMap<Region, RegionShards>,
}

struct RegionShards {
    slots: Slots,
    /// Index of its first shard among all.
    first: usize,
    labels: Vec<String>,
}

/// Most regions that a process stores for; requests may make them up.
const NAMED_MAX: usize = 1_024;

/// Everything needed to ask for a key.
struct Place {
    shard: usize,
    name: String,
    digest: Digest,
}

impl Place {
    fn home(&self) -> Home {
        Home { shard: self.shard, name: self.digest.beginning() }
    }
}

impl<M: Meta> Store<M> {
    /// Checks the settings; connects to nothing.
    pub fn new(local: LocalSettings, remote: Option<RemoteSettings>) -> Result<Arc<Self>, StoreError> {
        let remote = remote.as_ref().map(Shards::new).transpose()?;
        let epochs = Arc::new(Epochs::new(remote.as_ref().map_or(0, |remote| remote.shards.len())));
        let local = Local::new(local.memory_bytes, epochs.clone());
        Ok(Arc::new(Self { local, epochs, remote, named: Mutex::default() }))
    }

    /// A thread's way to the store; cheap to make, holds about 400 KiB.
    pub fn view(self: &Arc<Self>) -> View<M> {
        View::new(self.clone())
    }

    /// The regions that have stores of their own, those that something was stored for in this process, and the default one.
    pub fn regions(&self) -> BTreeSet<Region> {
        let mut regions = self.named.lock().unwrap_or_else(PoisonError::into_inner).clone();
        regions.extend(self.remote.iter().flat_map(|remote| remote.regions.keys()));
        regions.insert(Region::DEFAULT);
        regions
    }

    /// Remembers a region that something is stored for. False when there are too many to remember: requests may make them up.
    fn name(&self, region: &Region) -> bool {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        named.contains(region) || (named.len() < NAMED_MAX && named.insert(*region))
    }

    /// Where a response lives, or would live.
    pub fn placement(&self, region: &Region, key: &KeyRef<'_>) -> Placement<'_> {
        match self.remote.as_ref().and_then(|remote| Some((remote, remote.of(region)?))) {
            Some((remote, home)) => {
                let slot = Slot::of(key, home.slots.len());
                Placement { slot, endpoint: Some(remote.shards[home.shard(slot)].label()) }
            }
            None => Placement { slot: Slot::of(key, SLOTS), endpoint: None },
        }
    }

    /// Every shard's state and figures.
    pub fn shards(&self) -> impl Iterator<Item = ShardReport> {
        self.remote.iter().flat_map(|remote| &remote.shards).map(|shard| shard.report())
    }

    pub fn local_report(&self) -> LocalReport {
        self.local.report()
    }

    /// Purges in this process alone; see `bus` for a fleet.
    pub fn purge_here(&self, purge: Purge) {
        self.epochs.purge(purge, UNNUMBERED);
    }

    fn place(&self, region: &Region, key: &KeyRef<'_>) -> Option<Place> {
        let home = self.remote.as_ref()?.of(region)?;
        let slot = Slot::of(key, home.slots.len());
        let digest = key.digest(region);
        Some(Place { shard: home.shard(slot), name: redis_key(region, slot, &digest), digest })
    }
}

impl<M> Store<M> {
    pub(crate) fn shards_here(&self) -> &[Arc<Shard>] {
        self.remote.as_ref().map_or(&[], |remote| &remote.shards)
    }

    pub(crate) fn epochs(&self) -> &Epochs {
        &self.epochs
    }

    pub(crate) fn local(&self) -> &Local<M> {
        &self.local
    }

    /// The shard of the default region that keeps what has no slot, by its name.
    pub(crate) fn keeper(&self, name: &str) -> Option<&Shard> {
        let remote = self.remote.as_ref()?;
        let home = remote.of(&Region::DEFAULT)?;
        Some(&remote.shards[home.first + winner(name, &home.labels)?])
    }
}

impl Shards {
    fn new(settings: &RemoteSettings) -> Result<Self, StoreError> {
        if !(Duration::from_millis(1)..=Duration::from_secs(10)).contains(&settings.deadline) {
            return Err(StoreError::Deadline);
        }
        let mut all = Self {
            deadline: settings.deadline,
            seal: Arc::new(Seal::new(&settings.secret, settings.object_bytes)),
            shards: Vec::new(),
            regions: HashMap::new(),
        };
        for (&region, its) in &settings.regions {
            all.add(region, its)?;
        }
        Ok(all)
    }

    fn add(&mut self, region: Region, settings: &RegionSettings) -> Result<(), StoreError> {
        let count = settings.endpoints.len();
        if count == 0 {
            return Err(StoreError::NoEndpoints { region });
        }
        if settings.slots > SLOTS_MAX || usize::from(settings.slots) < count {
            return Err(StoreError::Slots { region });
        }
        let first = self.shards.len();
        let mut labels = Vec::with_capacity(count);
        for (index, url) in settings.endpoints.iter().enumerate() {
            if url.starts_with("rediss:") || url.starts_with("valkeys:") {
                return Err(StoreError::Tls { region, index });
            }
            // The client's error may quote the address, password included.
            let (client, label) = client(url).map_err(|_| StoreError::Address { region, index })?;
            if labels.contains(&label) {
                return Err(StoreError::Twice { region, endpoint: label });
            }
            self.shards.push(Arc::new(Shard::new(region, index, client, label.clone())));
            labels.push(label);
        }
        let slots = Slots::spread(settings.slots, &labels);
        self.regions.insert(region, RegionShards { slots, first, labels });
        Ok(())
    }

    fn of(&self, region: &Region) -> Option<&RegionShards> {
        self.regions.get(region).or_else(|| self.regions.get(&Region::DEFAULT))
    }
}

impl RegionShards {
    fn shard(&self, slot: Slot) -> usize {
        self.first + self.slots.owner(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::Note;
    use crate::key::KeyBuilder;

    fn remote(regions: &[(&str, u16, &[&str])]) -> RemoteSettings {
        let region = |&(name, slots, endpoints): &(&str, u16, &[&str])| {
            let endpoints = endpoints.iter().map(|url| url.to_string()).collect();
            (Region::new(name).unwrap(), RegionSettings { slots, endpoints })
        };
        let regions = regions.iter().map(region).collect();
        RemoteSettings { deadline: Duration::from_millis(20), secret: String::new(), object_bytes: 1 << 20, regions }
    }

    fn store(remote: Option<RemoteSettings>) -> Result<Arc<Store<Note>>, StoreError> {
        Store::new(LocalSettings { memory_bytes: 1 << 20 }, remote)
    }

    #[test]
    fn settings_that_cannot_work_are_refused_without_quoting_them() {
        let region = Region::DEFAULT;
        let refused = |slots, endpoints: &[&str]| store(Some(remote(&[("default", slots, endpoints)]))).err().unwrap();
        assert_eq!(refused(16, &[]), StoreError::NoEndpoints { region });
        assert_eq!(refused(16, &["redis://a", "http://:pw@b"]), StoreError::Address { region, index: 1 });
        assert_eq!(refused(16, &["rediss://:pw@a"]), StoreError::Tls { region, index: 0 });
        let twice = refused(16, &["redis://:pw1@a:1", "redis://:pw2@a:1"]);
        assert_eq!(twice, StoreError::Twice { region, endpoint: "a:1".into() });
        assert_eq!(refused(1, &["redis://a", "redis://b"]), StoreError::Slots { region });
        assert_eq!(refused(SLOTS_MAX + 1, &["redis://a"]), StoreError::Slots { region });
        let eager = RemoteSettings { deadline: Duration::ZERO, ..remote(&[]) };
        assert_eq!(store(Some(eager)).err(), Some(StoreError::Deadline));
    }

    #[test]
    fn a_region_without_settings_uses_the_default_shards_under_its_own_name() {
        let settings = remote(&[("default", 16, &["redis://:pw@a:1/3"]), ("eu", 4, &["redis://b:2"])]);
        let store = store(Some(settings)).unwrap();
        let mut builder = KeyBuilder::new();
        let key = builder.part(b"/").key();
        let [default, eu, elsewhere] = ["default", "eu", "elsewhere"].map(|name| Region::new(name).unwrap());
        let endpoint = |region| store.placement(region, &key).endpoint;
        assert_eq!(
            [endpoint(&default), endpoint(&eu), endpoint(&elsewhere)],
            [Some("a:1/3"), Some("b:2"), Some("a:1/3")]
        );
        let names = [default, elsewhere].map(|region| store.place(&region, &key).unwrap().name);
        assert!(names[0].starts_with("tg:{default:") && names[1].starts_with("tg:{elsewhere:"), "{names:?}");
    }

    #[test]
    fn without_redis_there_is_still_a_slot() {
        let (alone, sparse) = (store(None).unwrap(), store(Some(remote(&[("eu", 4, &["redis://b:2"])]))).unwrap());
        let mut builder = KeyBuilder::new();
        let key = builder.part(b"/").key();
        for store in [alone, sparse] {
            assert_eq!(
                store.placement(&Region::DEFAULT, &key),
                Placement { slot: Slot::of(&key, SLOTS), endpoint: None }
            );
            assert!(store.place(&Region::DEFAULT, &key).is_none());
        }
    }
}
