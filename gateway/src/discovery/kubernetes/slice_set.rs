//! The slices of one service together, and the targets that they are for one port.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use super::metrics::{SKIPPED, SkipReason};
use super::slice::{EndpointSlice, Readiness, SliceEndpoint, SlicePort};
use crate::endpoint::{EndpointAddress, EndpointTarget, Locality};

/// Most slices of one service: a service of the largest clusters has 50 to 100.
pub(super) const SLICES_MAX: usize = 1_000;
/// Most targets of one service: twice what Kubernetes is made for.
const TARGETS_MAX: usize = 10_000;
/// Ports that an error names.
const NAMED_PORTS_MAX: usize = 5;

/// All slices of one service, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SliceSet(BTreeMap<Box<str>, Arc<EndpointSlice>>);

/// A port of a service as the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ServicePort {
    Name(Box<str>),
    /// The port of the endpoints, not of the service.
    Number(u16),
    /// The service has one port.
    Only,
}

impl ServicePort {
    pub(super) fn of(origin: &EndpointAddress) -> Self {
        match (&origin.port_name, origin.port) {
            (Some(name), _) => ServicePort::Name(name.clone()),
            (None, 0) => ServicePort::Only,
            (None, number) => ServicePort::Number(number),
        }
    }

    /// The number of the port at the endpoints of a slice; `None` if they do not have it.
    fn number(&self, slice: &EndpointSlice) -> Option<u16> {
        match (self, &slice.ports) {
            (ServicePort::Number(number), None) => Some(*number),
            (_, None) => None,
            (ServicePort::Number(number), Some(ports)) => {
                ports.iter().find(|port| port.number == *number).map(|port| port.number)
            }
            (ServicePort::Name(name), Some(ports)) => {
                ports.iter().find(|port| port.name == *name).map(|port| port.number)
            }
            (ServicePort::Only, Some(ports)) => match &ports[..] {
                [only] => Some(only.number),
                _ => None,
            },
        }
    }
}

impl SliceSet {
    pub(super) fn get(&self, name: &str) -> Option<&Arc<EndpointSlice>> {
        self.0.get(name)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes over a slice, unless there are too many.
    pub(super) fn insert(&mut self, name: Box<str>, slice: Arc<EndpointSlice>) {
        if self.0.len() >= SLICES_MAX && !self.0.contains_key(&name) {
            return SKIPPED.inc(SkipReason::TooMany);
        }
        self.0.insert(name, slice);
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// The targets for one port: all ready endpoints, or without any those that terminate and still
    /// serve. An endpoint of several slices counts once.
    ///
    /// # Errors
    /// The endpoints do not have the port: the ports that they have.
    pub(super) fn targets(&self, port: &ServicePort, own_zone: Option<&str>) -> Result<Vec<EndpointTarget>, PortError> {
        let mut found: BTreeMap<SocketAddr, &SliceEndpoint> = BTreeMap::new();
        let (mut has_port, mut has_endpoints) = (false, false);
        for slice in self.0.values() {
            has_endpoints |= !slice.endpoints.is_empty();
            let Some(number) = port.number(slice) else { continue };
            has_port = true;
            for endpoint in &slice.endpoints {
                let known = found.entry(SocketAddr::new(endpoint.ip, number)).or_insert(endpoint);
                if endpoint.readiness < known.readiness {
                    *known = endpoint;
                }
            }
        }
        if has_endpoints && !has_port {
            return Err(PortError { wanted: port.clone(), known: self.ports() });
        }
        let used = found.values().map(|endpoint| endpoint.readiness).min().unwrap_or(Readiness::Unready);
        found.retain(|_, endpoint| used != Readiness::Unready && endpoint.readiness == used);
        if found.len() > TARGETS_MAX {
            SKIPPED.add(SkipReason::TooMany, (found.len() - TARGETS_MAX) as u64);
        }
        let uses_hints = own_zone.is_some_and(|own| {
            let has_own = |endpoint: &&SliceEndpoint| endpoint.hints.iter().any(|zone| **zone == *own);
            found.values().all(|endpoint| !endpoint.hints.is_empty()) && found.values().any(has_own)
        });
        let locality = |endpoint: &SliceEndpoint| {
            let is_local = match (own_zone, &endpoint.zone) {
                (Some(own), _) if uses_hints => endpoint.hints.iter().any(|zone| **zone == *own),
                (Some(own), Some(zone)) => **zone == *own,
                _ => true,
            };
            if is_local { Locality::Local } else { Locality::Remote }
        };
        let target = |(address, endpoint): (&SocketAddr, &&SliceEndpoint)| EndpointTarget {
            locality: locality(endpoint),
            ..EndpointTarget::at(*address)
        };
        Ok(found.iter().take(TARGETS_MAX).map(target).collect())
    }

    /// The ports of all slices as an error names them.
    fn ports(&self) -> Vec<String> {
        let ports = self.0.values().flat_map(|slice| slice.ports.iter().flatten());
        let named = |SlicePort { name, number }: &SlicePort| match &**name {
            "" => number.to_string(),
            name => format!("{name} ({number})"),
        };
        let ports: BTreeSet<String> = ports.map(named).collect();
        ports.into_iter().take(NAMED_PORTS_MAX).collect()
    }
}

/// The endpoints of a service do not have the configured port.
#[derive(Debug)]
pub(super) struct PortError {
    wanted: ServicePort,
    known: Vec<String>,
}

impl std::fmt::Display for PortError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.wanted {
            ServicePort::Name(name) => write!(f, "the endpoints of the service have no port `{name}`")?,
            ServicePort::Number(number) => write!(
                f,
                "the endpoints of the service have no port {number} (a number is that of the pods, not of the service)"
            )?,
            ServicePort::Only => f.write_str("the service has not exactly one port: name it after a colon")?,
        }
        match &self.known[..] {
            [] => f.write_str("; they have no port of TCP"),
            known => write!(f, "; they have {}", known.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(ip: &str, readiness: Readiness, zone: &str, hints: &[&str]) -> SliceEndpoint {
        SliceEndpoint {
            ip: ip.parse().expect("an address"),
            readiness,
            zone: (!zone.is_empty()).then(|| zone.into()),
            hints: hints.iter().map(|zone| Box::from(*zone)).collect(),
        }
    }

    fn ready(ip: &str) -> SliceEndpoint {
        endpoint(ip, Readiness::Ready, "", &[])
    }

    /// Ports by name, and endpoints.
    type Slice<'s> = (&'s [(&'s str, u16)], Vec<SliceEndpoint>);

    fn set(slices: Vec<Slice<'_>>) -> SliceSet {
        let mut set = SliceSet::default();
        for (index, (ports, endpoints)) in slices.into_iter().enumerate() {
            let port = |(name, number): &(&str, u16)| SlicePort { name: (*name).into(), number: *number };
            let slice = EndpointSlice { ports: Some(ports.iter().map(port).collect()), endpoints };
            set.insert(format!("shop-{index}").into(), Arc::new(slice));
        }
        set
    }

    fn addresses(set: &SliceSet, port: &ServicePort) -> Vec<String> {
        let targets = set.targets(port, None).expect("targets");
        targets.iter().map(|target| target.address.to_string()).collect()
    }

    const HTTP: &[(&str, u16)] = &[("http", 80)];

    #[test]
    fn slices_are_merged_and_an_address_counts_once() {
        let unready = endpoint("10.0.0.2", Readiness::Unready, "", &[]);
        let set = set(vec![
            (HTTP, vec![ready("10.0.0.1"), unready.clone()]),
            (HTTP, vec![ready("10.0.0.2"), ready("10.0.0.1")]),
            (&[("http", 81)], vec![ready("10.0.0.1"), ready("fd00::1")]),
            (&[("other", 9)], vec![ready("10.0.0.9")]),
        ]);
        let want = ["10.0.0.1:80", "10.0.0.1:81", "10.0.0.2:80", "[fd00::1]:81"];
        assert_eq!(addresses(&set, &ServicePort::Name("http".into())), want);
        assert_eq!(addresses(&set, &ServicePort::Number(81)), ["10.0.0.1:81", "[fd00::1]:81"]);
    }

    #[test]
    fn terminating_endpoints_are_used_while_none_is_ready() {
        let of = |readiness| endpoint("10.0.0.1", readiness, "", &[]);
        let leaving = || endpoint("10.0.0.2", Readiness::ServingTerminating, "", &[]);
        for (other, want) in [
            (Readiness::Ready, vec!["10.0.0.1:80"]),
            (Readiness::ServingTerminating, vec!["10.0.0.1:80", "10.0.0.2:80"]),
            (Readiness::Unready, vec!["10.0.0.2:80"]),
        ] {
            let set = set(vec![(HTTP, vec![of(other)]), (HTTP, vec![leaving()])]);
            assert_eq!(addresses(&set, &ServicePort::Only), want, "{other:?}");
        }
        let none = set(vec![(HTTP, vec![of(Readiness::Unready)])]);
        assert!(addresses(&none, &ServicePort::Only).is_empty());
    }

    #[test]
    fn port_that_no_endpoint_has_is_an_error_that_names_the_others() {
        let both = set(vec![(&[("http", 8_080), ("", 9)], vec![ready("10.0.0.1")])]);
        let error = |port: ServicePort| both.targets(&port, None).expect_err("no such port").to_string();
        assert_eq!(
            error(ServicePort::Number(80)),
            "the endpoints of the service have no port 80 (a number is that of the pods, not of the service); \
             they have 9, http (8080)"
        );
        assert!(error(ServicePort::Name("web".into())).contains("no port `web`"));
        assert!(error(ServicePort::Only).contains("not exactly one port"));
        // A service without endpoints has a slice without ports.
        let empty = set(vec![(&[], Vec::new())]);
        assert_eq!(empty.targets(&ServicePort::Name("web".into()), None).expect("no targets"), []);
        let mut all_ports = SliceSet::default();
        let slice = EndpointSlice { ports: None, endpoints: vec![ready("10.0.0.1")] };
        all_ports.insert("a".into(), Arc::new(slice));
        assert_eq!(addresses(&all_ports, &ServicePort::Number(7)), ["10.0.0.1:7"]);
        assert!(all_ports.targets(&ServicePort::Only, None).is_err());
    }

    #[test]
    fn hints_decide_about_the_zone_if_all_endpoints_have_them() {
        let local = |set: &SliceSet, own: Option<&str>| -> Vec<bool> {
            let targets = set.targets(&ServicePort::Only, own).expect("targets");
            targets.iter().map(|target| target.locality == Locality::Local).collect()
        };
        let of = |ip, zone, hints: &[&str]| endpoint(ip, Readiness::Ready, zone, hints);
        let hinted = set(vec![(HTTP, vec![of("10.0.0.1", "a", &["b"]), of("10.0.0.2", "b", &["a", "c"])])]);
        assert_eq!(local(&hinted, Some("a")), [false, true]);
        assert_eq!(local(&hinted, Some("b")), [true, false]);
        assert_eq!(local(&hinted, Some("d")), [false, false], "no hint for this zone: its own zone decides");
        assert_eq!(local(&hinted, None), [true, true]);
        let partly =
            set(vec![(HTTP, vec![of("10.0.0.1", "a", &["b"]), of("10.0.0.2", "b", &[]), of("10.0.0.3", "", &[])])]);
        assert_eq!(local(&partly, Some("a")), [true, false, true]);
    }

    #[test]
    fn slices_and_targets_are_bounded() {
        let mut many = SliceSet::default();
        for index in 0..SLICES_MAX as u32 + 5 {
            let endpoints = (0..11).map(|last| {
                let ip = std::net::Ipv4Addr::from(0x0a00_0000 + index * 16 + last);
                ready(&ip.to_string())
            });
            let ports = Some(vec![SlicePort { name: "".into(), number: 80 }]);
            let slice = EndpointSlice { ports, endpoints: endpoints.collect() };
            many.insert(format!("{index:05}").into(), Arc::new(slice));
        }
        assert_eq!(many.len(), SLICES_MAX);
        assert_eq!(many.targets(&ServicePort::Only, None).expect("targets").len(), TARGETS_MAX);
    }
}
