//! The allow list (exempt from limits) and the deny list (rejected before any other step) of
//! `[access]`.
//!
//! A lookup probes a hash set once per distinct prefix length, and once each for device and user:
//! the cost does not grow with the number of entries. A caller in both lists is denied.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::label;

label! {
    /// Access of a caller.
    pub(crate) AccessDecision, "access", {
        /// In neither list.
        Unlisted = "unlisted",
        /// No limit applies.
        Exempt = "exempt",
        /// Rejected with 403.
        Denied = "denied",
        /// Rejected with 429: its token was not verified, because the budget of invalid signatures
        /// is exhausted.
        Unverified = "unverified",
    }
}

impl AccessDecision {
    /// Combines two decisions. `Denied` takes precedence, then `Unverified`, then `Exempt`.
    pub(super) fn and(self, other: AccessDecision) -> AccessDecision {
        match (self, other) {
            (AccessDecision::Denied, _) | (_, AccessDecision::Denied) => AccessDecision::Denied,
            (AccessDecision::Unverified, _) | (_, AccessDecision::Unverified) => AccessDecision::Unverified,
            (AccessDecision::Exempt, _) | (_, AccessDecision::Exempt) => AccessDecision::Exempt,
            _ => AccessDecision::Unlisted,
        }
    }
}

/// One entry of an access list: a network, a device id or a user id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AccessEntry {
    Network(IpNet),
    /// The device id that a client sends, from any address.
    Device(String),
    /// The user id.
    User(String),
}

/// Entries of the two lists (`[access]`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessConfig {
    pub(crate) exempt: Vec<AccessEntry>,
    pub(crate) denied: Vec<AccessEntry>,
}

impl AccessConfig {
    /// The entries that are users, of both lists.
    pub(super) fn users(&self) -> [Vec<&str>; 2] {
        [&self.exempt, &self.denied].map(|list| {
            let users = list.iter().filter_map(|entry| match entry {
                AccessEntry::User(id) => Some(id.as_str()),
                _ => None,
            });
            users.collect()
        })
    }
}

/// Both lists, indexed for lookup.
pub(super) struct AccessLists {
    exempt: AccessList,
    denied: AccessList,
}

/// One list indexed for lookup: networks by address family, and hash sets of device and user ids.
#[derive(Default)]
struct AccessList {
    v4: PrefixSet,
    v6: PrefixSet,
    devices: HashSet<Box<[u8]>>,
    users: HashSet<Box<[u8]>>,
}

/// Networks by prefix length and first address, which is stored as 128 bits.
#[derive(Default)]
struct PrefixSet {
    lengths: BTreeSet<u8>,
    prefixes: HashSet<(u8, u128)>,
}

impl PrefixSet {
    fn insert(&mut self, length: u8, prefix: u128) {
        self.lengths.insert(length);
        self.prefixes.insert((length, prefix));
    }

    /// `bits` is the length of an address.
    fn contains(&self, address: u128, bits: u8) -> bool {
        let network_prefix = |length: u8| if length == 0 { 0 } else { address & (u128::MAX << (bits - length)) };
        self.lengths.iter().any(|&length| self.prefixes.contains(&(length, network_prefix(length))))
    }
}

impl AccessList {
    fn new(entries: &[AccessEntry]) -> Self {
        let mut list = AccessList::default();
        for entry in entries {
            match entry {
                AccessEntry::Network(IpNet::V4(network)) => {
                    list.v4.insert(network.prefix_len(), u32::from(network.network()).into());
                }
                AccessEntry::Network(IpNet::V6(network)) => {
                    list.v6.insert(network.prefix_len(), network.network().into());
                }
                AccessEntry::Device(id) => _ = list.devices.insert(id.as_bytes().into()),
                AccessEntry::User(id) => _ = list.users.insert(id.as_bytes().into()),
            }
        }
        list
    }

    fn contains(&self, ip: IpAddr, device: Option<&[u8]>, user: Option<&[u8]>) -> bool {
        let is_listed = |set: &HashSet<Box<[u8]>>, id: Option<&[u8]>| id.is_some_and(|id| set.contains(id));
        let is_in_network = match ip {
            IpAddr::V4(ip) => self.v4.contains(u32::from(ip).into(), 32),
            IpAddr::V6(ip) => self.v6.contains(ip.into(), 128),
        };
        is_in_network || is_listed(&self.devices, device) || is_listed(&self.users, user)
    }
}

impl AccessLists {
    /// `None` if both lists are empty.
    pub(super) fn new(config: &AccessConfig) -> Option<Self> {
        let is_empty = config.exempt.is_empty() && config.denied.is_empty();
        (!is_empty)
            .then(|| AccessLists { exempt: AccessList::new(&config.exempt), denied: AccessList::new(&config.denied) })
    }

    /// Whether the deny list contains a user.
    pub(super) fn denies_users(&self) -> bool {
        !self.denied.users.is_empty()
    }

    /// Classifies a user without address and device.
    pub(super) fn classify_user(&self, user: &[u8]) -> AccessDecision {
        if self.denied.users.contains(user) {
            AccessDecision::Denied
        } else if self.exempt.users.contains(user) {
            AccessDecision::Exempt
        } else {
            AccessDecision::Unlisted
        }
    }

    pub(super) fn classify(&self, ip: IpAddr, device: Option<&[u8]>, user: Option<&[u8]>) -> AccessDecision {
        if self.denied.contains(ip, device, user) {
            AccessDecision::Denied
        } else if self.exempt.contains(ip, device, user) {
            AccessDecision::Exempt
        } else {
            AccessDecision::Unlisted
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> AccessEntry {
        AccessEntry::Network(text.parse().expect("a network"))
    }

    #[test]
    fn callers_match_by_address_device_and_user_and_denial_wins() {
        let config = AccessConfig {
            exempt: vec![network("10.0.0.0/8"), network("::1/128"), AccessEntry::User("ops".into())],
            denied: vec![network("10.6.6.0/24"), network("2001:db8::/32"), AccessEntry::Device("bot".into())],
        };
        let lists = AccessLists::new(&config).expect("there are lists");
        let classify = |ip: &str, device: Option<&str>, user: Option<&str>| {
            lists.classify(ip.parse().expect("an address"), device.map(str::as_bytes), user.map(str::as_bytes))
        };
        for (ip, device, user, expected) in [
            ("10.6.6.7", None, None, AccessDecision::Denied),
            ("10.6.7.7", None, None, AccessDecision::Exempt),
            ("10.6.7.7", Some("bot"), Some("ops"), AccessDecision::Denied),
            ("11.0.0.1", None, None, AccessDecision::Unlisted),
            ("11.0.0.1", Some("bots"), Some("ops"), AccessDecision::Exempt),
            ("11.0.0.1", Some("ops"), Some("bot"), AccessDecision::Unlisted),
            ("2001:db8:1::1", None, None, AccessDecision::Denied),
            ("2001:db9::1", None, None, AccessDecision::Unlisted),
            ("::1", None, None, AccessDecision::Exempt),
        ] {
            assert_eq!(classify(ip, device, user), expected, "{ip} {device:?} {user:?}");
        }
        assert!(AccessLists::new(&AccessConfig::default()).is_none());
    }

    #[test]
    fn zero_length_prefix_matches_all_addresses() {
        let all = AccessConfig { exempt: vec![network("0.0.0.0/0"), network("::/0")], ..AccessConfig::default() };
        let lists = AccessLists::new(&all).expect("there are lists");
        for ip in ["1.2.3.4", "255.255.255.255", "::", "ffff::1"] {
            assert_eq!(lists.classify(ip.parse().expect("an address"), None, None), AccessDecision::Exempt);
        }
    }
}
