//! Owns a Redis Cluster as a region sees it: which of its masters holds which hash slot, each in a place of its own.
//!
//! A place keeps what is queued for its master and its breaker. A master that takes over another's hash slots takes over its place,
//! so that what was queued for the one that failed goes to the one that followed it.
//!
//! Refuses more than `PLACES` masters: what they hold is then not stored remotely.
//! Invariant: a key is looked for at one place at a time, whatever else changes.

use super::site::{Dialer, Site};
use crate::key::Region;
use crate::placement::Slot;
use crc::{CRC_16_XMODEM, Crc};
use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::Notify;

/// Masters of a cluster that are used.
pub(crate) const PLACES: usize = 32;

/// Hash slots of a Redis Cluster.
const HASH_SLOTS: u16 = 16_384;

const NOWHERE: u8 = u8::MAX;

/// Hash slots of one master, and its address.
pub(crate) type Masters = Vec<((String, u16), Vec<(u16, u16)>)>;

pub(crate) struct Cluster {
    pub(crate) seeds: Vec<Dialer>,
    pub(crate) sites: Vec<Arc<Site>>,
    /// Called when a server says that it is the wrong one.
    pub(crate) call: Arc<Notify>,
    /// Whether what was purged in it has been heard of in this process.
    pub(crate) is_heard: AtomicBool,
    known: RwLock<Known>,
}

struct Known {
    table: Box<[u8]>,
    addresses: Vec<Option<(String, u16)>>,
}

impl Cluster {
    pub(crate) fn new(seeds: Vec<Dialer>) -> Self {
        let call = Arc::new(Notify::new());
        let sites = (0..PLACES).map(|_| Site::unknown(call.clone())).collect();
        let table = vec![NOWHERE; usize::from(HASH_SLOTS)].into();
        Self {
            seeds,
            sites,
            call,
            is_heard: AtomicBool::new(false),
            known: RwLock::new(Known { table, addresses: vec![None; PLACES] }),
        }
    }

    /// The place of what has the hash tag of a region's slot.
    pub(crate) fn place_of(&self, region: &Region, slot: Slot) -> Option<usize> {
        self.place_of_tag(&format!("{region}:{slot}"))
    }

    /// The place of what has the hash tag `tag`.
    pub(crate) fn place_of_tag(&self, tag: &str) -> Option<usize> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        match known.table[usize::from(hash_slot(tag))] {
            NOWHERE => None,
            place => Some(usize::from(place)),
        }
    }

    /// Takes over what the cluster says of itself.
    pub(crate) fn learn(&self, masters: &Masters) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let is_named =
            |address: &Option<(String, u16)>| masters.iter().any(|(named, _)| Some(named) == address.as_ref());
        let kept: HashMap<(String, u16), usize> = known
            .addresses
            .iter()
            .enumerate()
            .filter(|(_, address)| is_named(address))
            .filter_map(|(place, address)| Some((address.clone()?, place)))
            .collect();
        let mut taken: Vec<bool> = known.addresses.iter().map(is_named).collect();
        let mut table = vec![NOWHERE; usize::from(HASH_SLOTS)];
        for (address, ranges) in masters {
            let place = kept.get(address).copied().or_else(|| {
                let before = ranges.first().map(|&(first, _)| known.table[usize::from(first)]);
                let followed = before.map(usize::from).filter(|&place| place < PLACES && !taken[place]);
                followed
                    .or_else(|| (0..PLACES).find(|&place| !taken[place] && known.addresses[place].is_none()))
                    .or_else(|| (0..PLACES).find(|&place| !taken[place]))
            });
            let Some(place) = place else { continue };
            taken[place] = true;
            if known.addresses[place].as_ref() != Some(address) {
                let spot = self.seeds.first().and_then(|seed| seed.spot_at(&address.0, address.1).ok());
                self.sites[place].move_to(spot);
                known.addresses[place] = Some(address.clone());
            }
            for &(first, last) in ranges {
                table[usize::from(first)..=usize::from(last)].fill(place as u8);
            }
        }
        for place in (0..PLACES).filter(|&place| !taken[place]) {
            if known.addresses[place].take().is_some() {
                self.sites[place].move_to(None);
            }
        }
        known.table = table.into();
    }
}

/// The hash slot of a tag (Redis Cluster specification, key distribution model).
fn hash_slot(tag: &str) -> u16 {
    const CRC: Crc<u16> = Crc::<u16>::new(&CRC_16_XMODEM);
    CRC.checksum(tag.as_bytes()) % HASH_SLOTS
}

/// What `CLUSTER SLOTS` answers: ranges of hash slots with their nodes, the master first. `None` where it makes no sense.
pub(crate) fn masters(reply: &redis::Value, asked: &str) -> Option<Masters> {
    use redis::{Value, from_redis_value_ref};
    let Value::Array(ranges) = reply else { return None };
    let mut masters: Masters = Vec::new();
    for range in ranges {
        let Value::Array(parts) = range else { return None };
        let [first, last, master, ..] = parts.as_slice() else { return None };
        let first = number(first).filter(|&slot| slot < HASH_SLOTS)?;
        let last = number(last).filter(|&slot| first <= slot && slot < HASH_SLOTS)?;
        let Value::Array(master) = master else { return None };
        let [host, port, ..] = master.as_slice() else { return None };
        // A node that does not know its own address leaves it out: it is the one that was asked.
        let host: Option<String> = from_redis_value_ref(host).ok()?;
        let host = host.filter(|host| !host.is_empty() && host != "?").unwrap_or_else(|| asked.to_owned());
        let address = (host, number(port)?);
        match masters.iter_mut().find(|(named, _)| *named == address) {
            Some((_, ranges)) => ranges.push((first, last)),
            None => masters.push((address, vec![(first, last)])),
        }
    }
    (!masters.is_empty()).then_some(masters)
}

/// The client would cut off what is too large.
fn number(value: &redis::Value) -> Option<u16> {
    match value {
        redis::Value::Int(number) => u16::try_from(*number).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::site::TlsSettings;
    use super::*;

    fn cluster() -> Cluster {
        Cluster::new(vec![Dialer::new("redis://127.0.0.1:7000", &TlsSettings::default()).unwrap()])
    }

    fn master(port: u16, first: u16, last: u16) -> ((String, u16), Vec<(u16, u16)>) {
        (("127.0.0.1".to_owned(), port), vec![(first, last)])
    }

    #[test]
    fn tags_have_the_hash_slots_that_redis_gives_them() {
        // By `CLUSTER KEYSLOT` of a server.
        assert_eq!([hash_slot("123456789"), hash_slot("bus"), hash_slot("default:0")], [12_739, 3_155, 6_591]);
    }

    #[test]
    fn a_master_that_takes_over_takes_the_place() {
        let cluster = cluster();
        cluster.learn(&vec![master(1, 0, 5_000), master(2, 5_001, 10_000), master(3, 10_001, 16_383)]);
        let place = |tag: &str| cluster.place_of_tag(tag);
        let label = |place: Option<usize>| cluster.sites[place.unwrap()].now().unwrap().label.clone();
        let before = (place("bus"), place("default:0"));
        assert_eq!((label(before.0), label(before.1)), ("127.0.0.1:1".into(), "127.0.0.1:2".into()));
        // The first fails over, and the third gives all it had to the second.
        cluster.learn(&vec![master(2, 5_001, 16_383), master(9, 0, 5_000)]);
        assert_eq!((place("bus"), place("default:0")), before);
        assert_eq!(label(before.0), "127.0.0.1:9");
        assert_eq!(cluster.sites.iter().filter(|site| site.now().is_some()).count(), 2);
    }

    #[test]
    fn what_a_node_says_of_its_cluster_is_read_or_refused() {
        let read = |text: &str| masters(&redis::parse_redis_value(text.as_bytes()).unwrap(), "asked");
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
