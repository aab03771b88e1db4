//! Owns the store of a process: the local tier, the regions with their shards, and what settings may say about them.
//!
//! A region without settings of its own uses the shards of `default`, under its own name: its entries are apart from those of
//! `default` and of every other region. Where there is no `default` either, it has no remote tier. The local tier does not know
//! regions; see `key`.
//!
//! Refuses settings that cannot work (see `shards`), and never asks whether Redis is there: a gateway starts without it.
//! Invariant: what is said about an endpoint, in errors and reports, contains no credentials.

mod copies;
mod shards;
mod view;

pub use shards::StoreError;
pub use view::{Hit, Reach, Remote, Tier, View};

pub(crate) use copies::Copies;

use crate::clock::{Wall, wall_time};
use crate::entry::{Compression, Epochs, Home, Meta, Purge, UNNUMBERED};
use crate::hot::{Hot, HotKey};
use crate::key::{Digest, KeyRef, Region};
use crate::local::{Local, LocalReport};
use crate::placement::{SLOTS, Slot, copy_key, redis_key, tag_in, winner};
use crate::remote::{Cluster, PLACES, Scout, Shard, ShardReport, TlsSettings};
use copies::Spot;
use shards::{Kind, RegionShards, Shards};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// The local tier.
#[derive(Clone, Copy, Debug)]
pub struct LocalSettings {
    /// Weight of all entries; threads' own tables may hold half as much again.
    pub memory_bytes: usize,
    /// Lookups per second, over all threads, from which a key is hot.
    pub hot_rate: u32,
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
    pub compression: Compression,
    /// Bodies that are as large are compressed, where their metadata say that this may help.
    pub compress_from: usize,
    /// Servers on which a hot entry stands, its own included.
    pub hot_copies: u16,
    /// For endpoints with TLS.
    pub tls: TlsSettings,
    pub regions: BTreeMap<Region, RegionSettings>,
}

impl RemoteSettings {
    /// Whether a store can be made of them; connects to nothing.
    pub fn check(&self) -> Result<(), StoreError> {
        Shards::new(self, Wall::new()).map(drop)
    }
}

/// Where a region's entries live.
#[derive(Clone)]
pub struct RegionSettings {
    /// From the number of endpoints to 1024.
    pub slots: u16,
    /// `redis://[user:password@]host:port[/db]`, `rediss://` for TLS, `redis+unix:///path`, or
    /// `redis+sentinel://[user:password@]host:port,host:port/master[/db]` for a master that Sentinels name.
    pub endpoints: Vec<String>,
    /// Some nodes of a Redis Cluster, as `redis://` or `rediss://`, instead of endpoints.
    pub cluster: Vec<String>,
    /// Regions that are asked, in this order, for what this one does not have.
    pub fallback: Vec<Region>,
}

/// Where a response lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    pub slot: Slot,
    /// Host, port and database, if the region has a remote tier whose server is known.
    pub endpoint: Option<String>,
}

/// The store of a process. Threads use it through a `View` each.
pub struct Store<M> {
    local: Local<M>,
    hot: Arc<Hot>,
    wall: Arc<Wall>,
    copies: Copies,
    epochs: Arc<Epochs>,
    remote: Option<Shards>,
    /// Regions that something was stored for.
    named: Mutex<BTreeSet<Region>>,
}

/// Who keeps what has no slot.
pub(crate) enum Keeper<'a> {
    Shard(&'a Shard),
    /// The places of a cluster.
    Cluster(&'a Arc<Cluster>, &'a [Arc<Shard>]),
}

/// One bit each.
const COPIES_MAX: usize = 64;

/// Most regions that a process stores for; requests may make them up.
const NAMED_MAX: usize = 1_024;

/// Everything needed to ask for a key.
struct Place {
    shard: usize,
    slot: Slot,
    name: String,
    digest: Digest,
}

/// Where something belongs.
enum Whither {
    To(usize),
    /// A cluster has not said.
    Unknown,
    /// There is no cluster to say.
    Nowhere,
}

impl Place {
    fn home(&self) -> Home {
        Home { shard: self.shard, name: self.digest.beginning() }
    }
}

impl<M: Meta> Store<M> {
    /// Checks the settings; connects to nothing.
    pub fn new(local: LocalSettings, remote: Option<RemoteSettings>) -> Result<Arc<Self>, StoreError> {
        let wall = Wall::new();
        let remote = remote.as_ref().map(|remote| Shards::new(remote, wall.clone())).transpose()?;
        let epochs = Arc::new(Epochs::new(remote.as_ref().map_or(0, |remote| remote.shards.len())));
        let hot = Arc::new(Hot::new(local.hot_rate));
        let local = Local::new(local.memory_bytes, hot.clone(), epochs.clone());
        Ok(Arc::new(Self { local, hot, wall, copies: Copies::default(), epochs, remote, named: Mutex::default() }))
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
    pub fn placement(&self, region: &Region, key: &KeyRef<'_>) -> Placement {
        let slot = self.slot(region, key);
        let home = || {
            let remote = self.remote.as_ref()?;
            remote.shards[remote.of(region)?.shard(region, slot)?].label()
        };
        Placement { slot, endpoint: home() }
    }

    /// Regions to ask for what `region` does not have.
    pub fn fallback(&self, region: &Region) -> &[Region] {
        let home = self.remote.as_ref().and_then(|remote| remote.regions.get(region));
        home.map_or(&[], |home| &home.fallback)
    }

    /// The slot of a response in its region.
    pub fn slot(&self, region: &Region, key: &KeyRef<'_>) -> Slot {
        let home = self.remote.as_ref().and_then(|remote| remote.of(region));
        Slot::of(key, home.map_or(SLOTS, RegionShards::slots))
    }

    /// Every shard's state and figures.
    pub fn shards(&self) -> impl Iterator<Item = ShardReport> {
        self.remote.iter().flat_map(|remote| &remote.shards).filter_map(|shard| shard.report())
    }

    /// What time it is: by a server of the remote tier where one has said so lately, so that a fleet reckons by one clock; else by this
    /// machine, whose jumps are not believed at once.
    pub fn wall_time(&self) -> SystemTime {
        wall_time(&self.wall, self.shards_here().iter().map(|shard| shard.clock()))
    }

    /// Seconds by which this machine's wall clock is ahead of `wall_time`; in fractions.
    pub fn clock_offset(&self) -> f64 {
        let (counts, machine) = (self.wall_time(), SystemTime::now());
        match machine.duration_since(counts) {
            Ok(ahead) => ahead.as_secs_f64(),
            Err(behind) => -behind.duration().as_secs_f64(),
        }
    }

    /// Whether the default region has a remote tier: it keeps what the fleet shares beside entries.
    pub fn has_default_region(&self) -> bool {
        self.keeper("").is_some()
    }

    /// Lookups per second from which a key is hot.
    pub fn hot_rate(&self) -> u32 {
        self.hot.rate()
    }

    /// The keys that this process is asked for most, the hottest first.
    pub fn hot_keys(&self) -> Vec<HotKey> {
        self.hot.list()
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
        let slot = Slot::of(key, home.slots());
        let digest = key.digest(region);
        // Where a cluster is not known yet, the first place: nobody is there either.
        let shard = home.shard(region, slot).unwrap_or(home.first);
        Some(Place { shard, slot, name: redis_key(region, slot, &digest), digest })
    }

    /// Where what a shard has sent elsewhere belongs by now.
    fn follow(&self, shard: usize, name: &str) -> Whither {
        let Some(((cluster, place), tag)) = self.cluster_of(shard).zip(tag_in(name)) else { return Whither::Nowhere };
        match cluster.place_of_tag(tag) {
            Some(now) => Whither::To(shard - place + now),
            None => Whither::Unknown,
        }
    }

    /// Where copies of a hot entry are: in the slots after its own, each on another server.
    fn spots(&self, region: &Region, place: &Place) -> Vec<Spot> {
        let Some((remote, home)) = self.remote.as_ref().and_then(|remote| Some((remote, remote.of(region)?))) else {
            return Vec::new();
        };
        if remote.shards.len() == 1 {
            return Vec::new();
        }
        let (mut spots, mut taken) = (Vec::new(), vec![place.shard]);
        for slot in place.slot.others(home.slots()) {
            if taken.len() >= usize::from(remote.hot_copies).min(COPIES_MAX) {
                break;
            }
            if let Some(shard) = home.shard(region, slot).filter(|shard| !taken.contains(shard)) {
                taken.push(shard);
                spots.push(Spot { shard, name: copy_key(region, slot, &place.digest) });
            }
        }
        spots
    }
}

impl<M> Store<M> {
    pub(crate) fn shards_here(&self) -> &[Arc<Shard>] {
        self.remote.as_ref().map_or(&[], |remote| &remote.shards)
    }

    pub(crate) fn epochs(&self) -> &Epochs {
        &self.epochs
    }

    pub(crate) fn copies(&self) -> &Copies {
        &self.copies
    }

    pub(crate) fn local(&self) -> &Local<M> {
        &self.local
    }

    pub(crate) fn scouts(&self) -> &[Arc<Scout>] {
        self.remote.as_ref().map_or(&[], |remote| &remote.scouts)
    }

    /// The cluster that a shard is a place of, and which.
    pub(crate) fn cluster_of(&self, shard: usize) -> Option<(&Arc<Cluster>, usize)> {
        self.remote.as_ref()?.regions.values().find_map(|home| match &home.kind {
            Kind::Cluster { cluster, .. } if (home.first..home.first + PLACES).contains(&shard) => {
                Some((cluster, shard - home.first))
            }
            _ => None,
        })
    }

    /// Who keeps, in the default region, what has no slot, by its name.
    pub(crate) fn keeper(&self, name: &str) -> Option<Keeper<'_>> {
        let remote = self.remote.as_ref()?;
        let home = remote.of(&Region::DEFAULT)?;
        Some(match &home.kind {
            Kind::Endpoints { labels, .. } => Keeper::Shard(&remote.shards[home.first + winner(name, labels)?]),
            Kind::Cluster { cluster, .. } => Keeper::Cluster(cluster, &remote.shards[home.first..home.first + PLACES]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::Note;
    use crate::key::KeyBuilder;
    use crate::placement::SLOTS_MAX;

    fn remote(regions: &[(&str, u16, &[&str])]) -> RemoteSettings {
        let region = |&(name, slots, endpoints): &(&str, u16, &[&str])| {
            let endpoints = endpoints.iter().map(|url| url.to_string()).collect();
            (Region::new(name).unwrap(), RegionSettings { slots, endpoints, cluster: Vec::new(), fallback: Vec::new() })
        };
        let regions = regions.iter().map(region).collect();
        RemoteSettings {
            deadline: Duration::from_millis(20),
            secret: String::new(),
            object_bytes: 1 << 20,
            compression: Compression::Off,
            compress_from: 0,
            hot_copies: 8,
            tls: TlsSettings::default(),
            regions,
        }
    }

    fn store(remote: Option<RemoteSettings>) -> Result<Arc<Store<Note>>, StoreError> {
        Store::new(LocalSettings { memory_bytes: 1 << 20, hot_rate: 1_000 }, remote)
    }

    #[test]
    fn settings_that_cannot_work_are_refused_without_quoting_them() {
        let region = Region::DEFAULT;
        let refused = |slots, endpoints: &[&str]| store(Some(remote(&[("default", slots, endpoints)]))).err().unwrap();
        assert_eq!(refused(16, &[]), StoreError::NoEndpoints { region });
        assert_eq!(refused(16, &["redis://a", "http://:pw@b"]), StoreError::Address { region, index: 1 });
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
            [Some("a:1/3".to_owned()), Some("b:2".to_owned()), Some("a:1/3".to_owned())]
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
