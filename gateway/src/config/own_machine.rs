//! The addresses of names that this machine knows by itself: no name server is asked.

use std::cell::OnceCell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The file of names and addresses of this machine.
const HOSTS: &str = "/etc/hosts";

/// The name of this machine.
const OWN_NAME: &str = "/proc/sys/kernel/hostname";

/// The names that this machine knows, read with the first one that is looked up.
#[derive(Default)]
pub(super) struct OwnMachine(OnceCell<KnownNames>);

struct KnownNames {
    hosts: String,
    own_name: String,
}

impl OwnMachine {
    /// The addresses of `host`: of an address, itself; of a name of this machine, those it has
    /// here. Empty for other names.
    pub(super) fn addresses(&self, host: &str) -> Vec<IpAddr> {
        let text = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if let Ok(ip) = text.parse() {
            return vec![ip];
        }
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let known = self.0.get_or_init(|| KnownNames { hosts: read(HOSTS), own_name: read(OWN_NAME) });
        addresses_of_name(host, &known.hosts, known.own_name.trim_end())
    }
}

fn addresses_of_name(name: &str, hosts: &str, own_name: &str) -> Vec<IpAddr> {
    let loopback = || vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    // These names are loopback whatever a name server says (RFC 6761 section 6.3).
    if name == "localhost" || name.ends_with(".localhost") {
        return loopback();
    }
    let mut found: Vec<IpAddr> = Vec::new();
    for line in hosts.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let Some(ip) = words.next().and_then(|word| word.parse().ok()) else { continue };
        if words.any(|word| word.eq_ignore_ascii_case(&name)) {
            found.push(ip);
        }
    }
    // The machine reaches itself by its own name, whatever address that has.
    if name.eq_ignore_ascii_case(own_name) {
        found.extend(loopback());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine_have_addresses() {
        let hosts = "127.0.0.1 localhost\n::1 ip6-loopback # ip6-other\n10.0.0.7\tGate gate.internal\nbad gate\n";
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let loopback = vec![ip("127.0.0.1"), ip("::1")];
        for (name, expected) in [
            ("localhost", loopback.clone()),
            ("LocalHost.", loopback.clone()),
            ("app.localhost", loopback.clone()),
            ("ip6-loopback", vec![ip("::1")]),
            ("ip6-other", vec![]),
            ("gate", vec![ip("10.0.0.7")]),
            ("GATE.internal", vec![ip("10.0.0.7")]),
            ("node-7", loopback.clone()),
            ("shop.example", vec![]),
            ("notlocalhost", vec![]),
        ] {
            assert_eq!(addresses_of_name(name, hosts, "Node-7"), expected, "{name}");
        }
        let machine = OwnMachine::default();
        assert_eq!(machine.addresses("192.0.2.1"), [ip("192.0.2.1")]);
        assert_eq!(machine.addresses("[::1]"), [ip("::1")]);
        assert!(machine.0.get().is_none(), "no file was needed");
        assert_eq!(machine.addresses("localhost"), loopback);
        assert!(machine.0.get().is_some());
    }
}
