//! Owns the topology of a Redis Cluster as one region uses it: which master holds which hash slot.
//! Each master has a stable index.
//!
//! A master index keeps the queued writes and the breaker of its master. A replica that takes over
//! hash slots takes over the index too, so that writes queued for the failed master go to its
//! successor.
//!
//! Refuses more than `CLUSTER_MASTERS_MAX` masters: entries in the hash slots of further masters
//! are not stored remotely.
//! Invariant: a key maps to at most one master index at any time, whatever changes in the topology.

use super::address::{Dialer, ServerAddress};
use crate::key::Region;
use crate::placement::Slot;
use crc::{CRC_16_XMODEM, Crc};
use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::Notify;

/// Most masters of a cluster that are used.
pub(crate) const CLUSTER_MASTERS_MAX: usize = 32;

/// Hash slots of a Redis Cluster.
const HASH_SLOTS: u16 = 16_384;

const UNASSIGNED: u8 = u8::MAX;

/// Addresses of the masters with the ranges of hash slots that each holds.
pub(crate) type MasterRanges = Vec<((String, u16), Vec<(u16, u16)>)>;

/// Topology of one Redis Cluster, shared by all threads: its seed nodes, an updatable address for
/// each of the `CLUSTER_MASTERS_MAX` master indexes, and the owners of the hash slots.
pub(crate) struct RedisCluster {
    pub(crate) seeds: Vec<Dialer>,
    pub(crate) addresses: Vec<Arc<ServerAddress>>,
    /// Notified when a server reports that it does not hold the requested key.
    pub(crate) rediscover: Arc<Notify>,
    /// Whether this process has read the cluster's purge history.
    pub(crate) is_caught_up: AtomicBool,
    topology: RwLock<ClusterTopology>,
}

/// The master index of each hash slot (`UNASSIGNED` for none), and the host and port of each master
/// index; behind a read-write lock.
struct ClusterTopology {
    owners: Box<[u8]>,
    addresses: Vec<Option<(String, u16)>>,
}

impl RedisCluster {
    pub(crate) fn new(seeds: Vec<Dialer>) -> Self {
        let rediscover = Arc::new(Notify::new());
        let addresses = (0..CLUSTER_MASTERS_MAX).map(|_| ServerAddress::unresolved(rediscover.clone())).collect();
        let owners = vec![UNASSIGNED; usize::from(HASH_SLOTS)].into();
        Self {
            seeds,
            addresses,
            rediscover,
            is_caught_up: AtomicBool::new(false),
            topology: RwLock::new(ClusterTopology { owners, addresses: vec![None; CLUSTER_MASTERS_MAX] }),
        }
    }

    /// The master index of the hash tag of a region's slot.
    pub(crate) fn master_of(&self, region: &Region, slot: Slot) -> Option<usize> {
        self.master_of_tag(&format!("{region}:{slot}"))
    }

    /// The master index of the hash tag `tag`.
    pub(crate) fn master_of_tag(&self, tag: &str) -> Option<usize> {
        let topology = self.topology.read().unwrap_or_else(PoisonError::into_inner);
        match topology.owners[usize::from(hash_slot(tag))] {
            UNASSIGNED => None,
            master => Some(usize::from(master)),
        }
    }

    /// Applies a topology that the cluster reported.
    pub(crate) fn update_topology(&self, masters: &MasterRanges) {
        let mut topology = self.topology.write().unwrap_or_else(PoisonError::into_inner);
        let is_reported =
            |address: &Option<(String, u16)>| masters.iter().any(|(named, _)| Some(named) == address.as_ref());
        let known_indices: HashMap<(String, u16), usize> = topology
            .addresses
            .iter()
            .enumerate()
            .filter(|(_, address)| is_reported(address))
            .filter_map(|(master, address)| Some((address.clone()?, master)))
            .collect();
        let mut assigned: Vec<bool> = topology.addresses.iter().map(is_reported).collect();
        let mut owners = vec![UNASSIGNED; usize::from(HASH_SLOTS)];
        for (address, ranges) in masters {
            let master = known_indices.get(address).copied().or_else(|| {
                let holder = ranges.first().map(|&(first, _)| topology.owners[usize::from(first)]);
                let predecessor =
                    holder.map(usize::from).filter(|&master| master < CLUSTER_MASTERS_MAX && !assigned[master]);
                predecessor
                    .or_else(|| {
                        (0..CLUSTER_MASTERS_MAX)
                            .find(|&master| !assigned[master] && topology.addresses[master].is_none())
                    })
                    .or_else(|| (0..CLUSTER_MASTERS_MAX).find(|&master| !assigned[master]))
            });
            let Some(master) = master else { continue };
            assigned[master] = true;
            if topology.addresses[master].as_ref() != Some(address) {
                let server = self.seeds.first().map(|seed| seed.server_at(&address.0, address.1));
                self.addresses[master].set(server);
                topology.addresses[master] = Some(address.clone());
            }
            for &(first, last) in ranges {
                owners[usize::from(first)..=usize::from(last)].fill(master as u8);
            }
        }
        for master in (0..CLUSTER_MASTERS_MAX).filter(|&master| !assigned[master]) {
            if topology.addresses[master].take().is_some() {
                self.addresses[master].set(None);
            }
        }
        topology.owners = owners.into();
    }
}

/// The hash slot of a hash tag (Redis Cluster specification, key distribution model).
fn hash_slot(tag: &str) -> u16 {
    const CRC: Crc<u16> = Crc::<u16>::new(&CRC_16_XMODEM);
    CRC.checksum(tag.as_bytes()) % HASH_SLOTS
}

/// Parses the reply of `CLUSTER SLOTS`: ranges of hash slots with their nodes, the master first.
/// `None` if it is malformed.
pub(crate) fn parse_cluster_slots(reply: &redis::Value, queried_host: &str) -> Option<MasterRanges> {
    use redis::{Value, from_redis_value_ref};
    let Value::Array(ranges) = reply else { return None };
    let mut masters: MasterRanges = Vec::new();
    for range in ranges {
        let Value::Array(parts) = range else { return None };
        let [first, last, master, ..] = parts.as_slice() else { return None };
        let first = parse_u16(first).filter(|&slot| slot < HASH_SLOTS)?;
        let last = parse_u16(last).filter(|&slot| first <= slot && slot < HASH_SLOTS)?;
        let Value::Array(master) = master else { return None };
        let [host, port, ..] = master.as_slice() else { return None };
        // A node that does not know its own address omits it: it is the node that was queried.
        let host: Option<String> = from_redis_value_ref(host).ok()?;
        let host = host.filter(|host| !host.is_empty() && host != "?").unwrap_or_else(|| queried_host.to_owned());
        let address = (host, parse_u16(port)?);
        match masters.iter_mut().find(|(named, _)| *named == address) {
            Some((_, ranges)) => ranges.push((first, last)),
            None => masters.push((address, vec![(first, last)])),
        }
    }
    (!masters.is_empty()).then_some(masters)
}

/// The client's own conversion would truncate numbers that are too large.
fn parse_u16(value: &redis::Value) -> Option<u16> {
    match value {
        redis::Value::Int(number) => u16::try_from(*number).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::address::RedisTlsConfig;
    use super::*;

    fn cluster() -> RedisCluster {
        RedisCluster::new(vec![Dialer::new("redis://127.0.0.1:7000", &RedisTlsConfig::default()).unwrap()])
    }

    fn master(port: u16, first: u16, last: u16) -> ((String, u16), Vec<(u16, u16)>) {
        (("127.0.0.1".to_owned(), port), vec![(first, last)])
    }

    #[test]
    fn hash_slots_match_those_of_redis() {
        // Values from `CLUSTER KEYSLOT` of a server.
        assert_eq!([hash_slot("123456789"), hash_slot("bus"), hash_slot("default:0")], [12_739, 3_155, 6_591]);
    }

    #[test]
    fn new_master_takes_over_the_index_of_its_predecessor() {
        let cluster = cluster();
        cluster.update_topology(&vec![master(1, 0, 5_000), master(2, 5_001, 10_000), master(3, 10_001, 16_383)]);
        let index_of = |tag: &str| cluster.master_of_tag(tag);
        let label = |index: Option<usize>| cluster.addresses[index.unwrap()].current().unwrap().label.clone();
        let before = (index_of("bus"), index_of("default:0"));
        assert_eq!((label(before.0), label(before.1)), ("127.0.0.1:1".into(), "127.0.0.1:2".into()));
        // The first master fails over, and the third gives all its slots to the second.
        cluster.update_topology(&vec![master(2, 5_001, 16_383), master(9, 0, 5_000)]);
        assert_eq!((index_of("bus"), index_of("default:0")), before);
        assert_eq!(label(before.0), "127.0.0.1:9");
        assert_eq!(cluster.addresses.iter().filter(|address| address.current().is_some()).count(), 2);
    }

    #[test]
    fn cluster_slots_reply_is_parsed_or_rejected() {
        let read = |text: &str| parse_cluster_slots(&redis::parse_redis_value(text.as_bytes()).unwrap(), "asked");
        let two =
            "*2\r\n*3\r\n:0\r\n:99\r\n*2\r\n$0\r\n\r\n:7000\r\n*3\r\n:100\r\n:16383\r\n*2\r\n$1\r\nb\r\n:7001\r\n";
        let expected =
            vec![(("asked".to_owned(), 7_000), vec![(0, 99)]), (("b".to_owned(), 7_001), vec![(100, 16_383)])];
        assert_eq!(read(two), Some(expected));
        for bad in [
            "*0\r\n",
            ":1\r\n",
            "*1\r\n*3\r\n:9\r\n:8\r\n*2\r\n$1\r\nb\r\n:1\r\n",
            "*1\r\n*3\r\n:0\r\n:16384\r\n*2\r\n$1\r\nb\r\n:1\r\n",
            "*1\r\n*3\r\n:0\r\n:1\r\n*2\r\n$1\r\nb\r\n:99999\r\n",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
