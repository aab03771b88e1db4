//! Who is let pass without a limit, and who is turned away before anything else is asked (`[access]`).
//!
//! Networks are found by one look for each length of prefix that is listed, devices and users by their hash: the cost does not grow
//! with the lists. Refuses to guess: who is in both lists is turned away.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::label;

label! {
    /// What the lists say of a caller.
    Access, "access", {
        /// In neither list.
        Ordinary = "ordinary",
        /// No limit applies.
        Exempt = "exempt",
        /// Answered 403.
        Denied = "denied",
        /// Answered 429: who it is was not looked at, because too many bad tokens came before.
        Unknown = "unknown",
    }
}

impl Access {
    /// What two words come to: denial wins, then doubt.
    pub(super) fn and(self, other: Access) -> Access {
        match (self, other) {
            (Access::Denied, _) | (_, Access::Denied) => Access::Denied,
            (Access::Unknown, _) | (_, Access::Unknown) => Access::Unknown,
            (Access::Exempt, _) | (_, Access::Exempt) => Access::Exempt,
            _ => Access::Ordinary,
        }
    }
}

/// One entry of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Network(IpNet),
    /// What a client says its device is, wherever it comes from.
    Device(String),
    /// What identifies a user.
    User(String),
}

/// The two lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    pub exempt: Vec<Entry>,
    pub denied: Vec<Entry>,
}

/// Both lists, ready to be asked.
pub(super) struct Lists {
    exempt: List,
    denied: List,
}

#[derive(Default)]
struct List {
    /// The lengths of prefixes that there are, and the networks by their length and first address, as 128 bits.
    v4: Networks,
    v6: Networks,
    devices: HashSet<Box<[u8]>>,
    users: HashSet<Box<[u8]>>,
}

#[derive(Default)]
struct Networks {
    lengths: BTreeSet<u8>,
    firsts: HashSet<(u8, u128)>,
}

impl Networks {
    fn insert(&mut self, length: u8, first: u128) {
        self.lengths.insert(length);
        self.firsts.insert((length, first));
    }

    /// `bits` is how long an address is.
    fn contains(&self, address: u128, bits: u8) -> bool {
        let masked = |length: u8| if length == 0 { 0 } else { address & (u128::MAX << (bits - length)) };
        self.lengths.iter().any(|&length| self.firsts.contains(&(length, masked(length))))
    }
}

impl List {
    fn of(entries: &[Entry]) -> Self {
        let mut list = List::default();
        for entry in entries {
            match entry {
                Entry::Network(IpNet::V4(network)) => {
                    list.v4.insert(network.prefix_len(), u32::from(network.network()).into());
                }
                Entry::Network(IpNet::V6(network)) => {
                    list.v6.insert(network.prefix_len(), network.network().into());
                }
                Entry::Device(id) => _ = list.devices.insert(id.as_bytes().into()),
                Entry::User(id) => _ = list.users.insert(id.as_bytes().into()),
            }
        }
        list
    }

    fn has(&self, ip: IpAddr, device: Option<&[u8]>, user: Option<&[u8]>) -> bool {
        let is_listed = |set: &HashSet<Box<[u8]>>, id: Option<&[u8]>| id.is_some_and(|id| set.contains(id));
        let is_near = match ip {
            IpAddr::V4(ip) => self.v4.contains(u32::from(ip).into(), 32),
            IpAddr::V6(ip) => self.v6.contains(ip.into(), 128),
        };
        is_near || is_listed(&self.devices, device) || is_listed(&self.users, user)
    }
}

impl Lists {
    /// `None` where both are empty.
    pub(super) fn of(settings: &Settings) -> Option<Self> {
        let is_empty = settings.exempt.is_empty() && settings.denied.is_empty();
        (!is_empty).then(|| Lists { exempt: List::of(&settings.exempt), denied: List::of(&settings.denied) })
    }

    /// Whether users are among those who get nothing.
    pub(super) fn denies_users(&self) -> bool {
        !self.denied.users.is_empty()
    }

    /// A user alone.
    pub(super) fn judge_user(&self, user: &[u8]) -> Access {
        if self.denied.users.contains(user) {
            Access::Denied
        } else if self.exempt.users.contains(user) {
            Access::Exempt
        } else {
            Access::Ordinary
        }
    }

    pub(super) fn judge(&self, ip: IpAddr, device: Option<&[u8]>, user: Option<&[u8]>) -> Access {
        if self.denied.has(ip, device, user) {
            Access::Denied
        } else if self.exempt.has(ip, device, user) {
            Access::Exempt
        } else {
            Access::Ordinary
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Entry {
        Entry::Network(text.parse().expect("a network"))
    }

    #[test]
    fn who_is_listed_is_found_by_address_device_and_user_and_denial_wins() {
        let settings = Settings {
            exempt: vec![network("10.0.0.0/8"), network("::1/128"), Entry::User("ops".into())],
            denied: vec![network("10.6.6.0/24"), network("2001:db8::/32"), Entry::Device("bot".into())],
        };
        let lists = Lists::of(&settings).expect("there are lists");
        let judge = |ip: &str, device: Option<&str>, user: Option<&str>| {
            lists.judge(ip.parse().expect("an address"), device.map(str::as_bytes), user.map(str::as_bytes))
        };
        for (ip, device, user, expected) in [
            ("10.6.6.7", None, None, Access::Denied),
            ("10.6.7.7", None, None, Access::Exempt),
            ("10.6.7.7", Some("bot"), Some("ops"), Access::Denied),
            ("11.0.0.1", None, None, Access::Ordinary),
            ("11.0.0.1", Some("bots"), Some("ops"), Access::Exempt),
            ("11.0.0.1", Some("ops"), Some("bot"), Access::Ordinary),
            ("2001:db8:1::1", None, None, Access::Denied),
            ("2001:db9::1", None, None, Access::Ordinary),
            ("::1", None, None, Access::Exempt),
        ] {
            assert_eq!(judge(ip, device, user), expected, "{ip} {device:?} {user:?}");
        }
        assert!(Lists::of(&Settings::default()).is_none());
    }

    #[test]
    fn a_network_of_everything_has_everybody() {
        let all = Settings { exempt: vec![network("0.0.0.0/0"), network("::/0")], ..Settings::default() };
        let lists = Lists::of(&all).expect("there are lists");
        for ip in ["1.2.3.4", "255.255.255.255", "::", "ffff::1"] {
            assert_eq!(lists.judge(ip.parse().expect("an address"), None, None), Access::Exempt);
        }
    }
}
