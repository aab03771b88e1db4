//! EndpointSlices as the API server sends them (`discovery.k8s.io/v1`), made into the parts that
//! are used.
//!
//! A part that is not as the API describes it is left out and counted: one wrong endpoint costs no
//! other one.

use std::net::IpAddr;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::metrics::{SKIPPED, SkipReason};

/// Most endpoints of one slice: the bound of the API.
const ENDPOINTS_MAX: usize = 1_000;
/// Most ports of one slice that are used: the API has no more than 100.
const PORTS_MAX: usize = 100;

/// One slice of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EndpointSlice {
    /// `None`: the endpoints have all ports.
    pub(super) ports: Option<Vec<SlicePort>>,
    pub(super) endpoints: Vec<SliceEndpoint>,
}

/// A port of all endpoints of a slice, of TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SlicePort {
    /// Empty if the service has one port, without a name.
    pub(super) name: Box<str>,
    pub(super) number: u16,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SliceEndpoint {
    pub(super) ip: IpAddr,
    pub(super) readiness: Readiness,
    pub(super) zone: Option<Box<str>>,
    /// The zones that should use it; empty without hints.
    pub(super) hints: Vec<Box<str>>,
}

/// Which requests an endpoint may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Readiness {
    Ready,
    /// It terminates and still serves: it is used if no other one is ready.
    ServingTerminating,
    Unready,
}

/// A value, or what can be read of one that is not as expected.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Lenient<T> {
    Good(T),
    Bad(IgnoredAny),
}

impl<T> Lenient<T> {
    /// The value; `None` is counted.
    pub(super) fn good(self) -> Option<T> {
        match self {
            Lenient::Good(value) => Some(value),
            Lenient::Bad(IgnoredAny) => {
                SKIPPED.inc(SkipReason::Malformed);
                None
            }
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawMetadata {
    pub(super) name: Option<Box<str>>,
    pub(super) resource_version: Option<String>,
    pub(super) r#continue: Option<String>,
}

/// An object of a watch: a slice, a bookmark (only `metadata`) or a status (of an error).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawObject {
    #[serde(default)]
    pub(super) metadata: RawMetadata,
    pub(super) code: Option<u16>,
    pub(super) message: Option<String>,
    address_type: Option<Lenient<String>>,
    endpoints: Option<Lenient<Vec<Lenient<RawEndpoint>>>>,
    ports: Option<Lenient<Vec<Lenient<RawPort>>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpoint {
    addresses: Vec<String>,
    conditions: Option<RawConditions>,
    zone: Option<Box<str>>,
    hints: Option<RawHints>,
}

#[derive(Debug, Default, Deserialize)]
struct RawConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawHints {
    for_zones: Option<Vec<RawZone>>,
}

#[derive(Debug, Deserialize)]
struct RawZone {
    name: Box<str>,
}

#[derive(Debug, Deserialize)]
struct RawPort {
    name: Option<Box<str>>,
    port: Option<u16>,
    protocol: Option<String>,
}

impl RawObject {
    /// The slice; `None` if it cannot be used, which is counted.
    pub(super) fn into_slice(self) -> Option<EndpointSlice> {
        let is_ipv4 = match &self.address_type {
            Some(Lenient::Good(family)) if family == "IPv4" => true,
            Some(Lenient::Good(family)) if family == "IPv6" => false,
            Some(Lenient::Good(names)) if names == "FQDN" => {
                SKIPPED.inc(SkipReason::Unsupported);
                return None;
            }
            _ => {
                SKIPPED.inc(SkipReason::Malformed);
                return None;
            }
        };
        let ports = match self.ports {
            None => None,
            Some(ports) => Some(ports.good()?.into_iter().take(PORTS_MAX).filter_map(usable_port).collect()),
        };
        let mut raw = self.endpoints.map_or(Some(Vec::new()), Lenient::good)?;
        if raw.len() > ENDPOINTS_MAX {
            SKIPPED.add(SkipReason::TooMany, (raw.len() - ENDPOINTS_MAX) as u64);
            raw.truncate(ENDPOINTS_MAX);
        }
        let endpoints = raw.into_iter().filter_map(|endpoint| usable_endpoint(endpoint.good()?, is_ipv4)).collect();
        Some(EndpointSlice { ports, endpoints })
    }
}

fn usable_port(port: Lenient<RawPort>) -> Option<SlicePort> {
    let RawPort { name, port, protocol } = port.good()?;
    let is_tcp = protocol.is_none_or(|protocol| protocol == "TCP");
    let number = port.filter(|number| is_tcp && *number > 0)?;
    Some(SlicePort { name: name.unwrap_or_default(), number })
}

fn usable_endpoint(endpoint: RawEndpoint, is_ipv4: bool) -> Option<SliceEndpoint> {
    let RawEndpoint { addresses, conditions, zone, hints } = endpoint;
    // All addresses of an endpoint stand for the same server; consumers may use the first alone.
    let ip = addresses.first().and_then(|address| address.parse::<IpAddr>().ok());
    let Some(ip) = ip.filter(|ip| ip.is_ipv4() == is_ipv4 && !ip.is_unspecified() && !ip.is_multicast()) else {
        SKIPPED.inc(SkipReason::Malformed);
        return None;
    };
    let RawConditions { ready, serving, terminating } = conditions.unwrap_or_default();
    // An absent condition is not known: such an endpoint is ready.
    let is_ready = ready.unwrap_or(true);
    let readiness = match (is_ready, serving.unwrap_or(is_ready), terminating.unwrap_or(false)) {
        (true, _, _) => Readiness::Ready,
        (false, true, true) => Readiness::ServingTerminating,
        _ => Readiness::Unready,
    };
    let hints = hints.and_then(|hints| hints.for_zones).unwrap_or_default();
    let hints = hints.into_iter().map(|zone| zone.name).collect();
    Some(SliceEndpoint { ip, readiness, zone: zone.filter(|zone| !zone.is_empty()), hints })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(json: &str) -> Option<EndpointSlice> {
        serde_json::from_str::<RawObject>(json).expect("an object").into_slice()
    }

    fn readiness(conditions: &str) -> Readiness {
        let json =
            format!(r#"{{"addressType":"IPv4","endpoints":[{{"addresses":["10.0.0.1"],"conditions":{conditions}}}]}}"#);
        slice(&json).expect("a slice").endpoints[0].readiness
    }

    #[test]
    fn absent_conditions_mean_ready_and_terminating_ones_are_the_second_choice() {
        use Readiness::{Ready, ServingTerminating, Unready};
        for (conditions, want) in [
            ("null", Ready),
            ("{}", Ready),
            (r#"{"ready":true,"serving":true,"terminating":false}"#, Ready),
            (r#"{"ready":false}"#, Unready),
            (r#"{"ready":false,"serving":true}"#, Unready),
            (r#"{"ready":false,"serving":true,"terminating":true}"#, ServingTerminating),
            (r#"{"ready":false,"serving":false,"terminating":true}"#, Unready),
            (r#"{"ready":false,"terminating":true}"#, Unready),
            (r#"{"ready":null,"serving":null,"terminating":null}"#, Ready),
        ] {
            assert_eq!(readiness(conditions), want, "{conditions}");
        }
    }

    #[test]
    fn wrong_parts_cost_no_other_part() {
        let json = r#"{"metadata":{"name":"a","labels":{"x":"y"}},"addressType":"IPv4",
            "ports":[{"name":"http","port":8080},{"port":70000},{"name":"dns","port":53,"protocol":"UDP"},{"name":"all"},7],
            "endpoints":[{"addresses":["10.0.0.1"]},{"addresses":["shop"]},{"addresses":[]},{"addresses":7},
            {"addresses":["fd00::1"]},{"addresses":["0.0.0.0"]},"x",
            {"addresses":["10.0.0.2"],"conditions":{"ready":"yes"}},{"addresses":["10.0.0.3"],"zone":""}]}"#;
        let slice = slice(json).expect("a slice");
        let ips: Vec<String> = slice.endpoints.iter().map(|endpoint| endpoint.ip.to_string()).collect();
        assert_eq!(ips, ["10.0.0.1", "10.0.0.3"]);
        assert_eq!(slice.ports, Some(vec![SlicePort { name: "http".into(), number: 8_080 }]));
        assert_eq!(slice.endpoints[1].zone, None);
    }

    #[test]
    fn slices_without_usable_addresses_are_left_out() {
        for json in [
            r#"{"addressType":"FQDN","endpoints":[{"addresses":["a.test"]}]}"#,
            r#"{"addressType":7}"#,
            r#"{"endpoints":[]}"#,
            r#"{"addressType":"IPv4","endpoints":"none"}"#,
        ] {
            assert_eq!(slice(json), None, "{json}");
        }
        let empty = slice(r#"{"addressType":"IPv6","endpoints":null,"ports":null}"#);
        assert_eq!(empty, Some(EndpointSlice { ports: None, endpoints: Vec::new() }));
    }
}
