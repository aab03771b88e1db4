//! The endpoints of an upstream: identity, state and selection.
//!
//! An endpoint is one address. Its state is shared by all threads and outlives every change of the
//! set that it belongs to. An endpoint that is out of use is tried after all others: a failed
//! attempt costs no more than a rejected request.

mod address;
mod traffic;
mod sync;
mod state;
mod ejection;
mod load;
mod latency;
mod set;
#[cfg(test)]
mod orders;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod state_tests;

use std::hash::Hasher as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use siphasher::sip::SipHasher13;

pub(crate) use address::{EndpointAddress, EndpointScheme};
pub(crate) use ejection::EjectionGate;
pub(crate) use set::{BalanceConfig, EndpointSet, Pick};
pub(crate) use state::{EjectConfig, EndpointAvailability, OutReason};
pub(crate) use traffic::TrafficDirection;

use crate::connect::{Connector, UpstreamTls};
use crate::event::Event;
use crate::metrics::{Counters, Label as _};
use latency::LatencyCounts;
use load::EndpointLoad;
use state::{EndpointState, FailedCall, StateChange};
use traffic::EndpointTraffic;

/// How a request selects an endpoint of its upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum BalancePolicy {
    /// Each in turn.
    RoundRobin,
    /// The endpoint with the fewest requests in flight; among equals, each in turn.
    #[default]
    LeastRequest,
    /// The endpoint with the shortest expected latency (peak EWMA), times the requests in flight.
    Ewma,
    /// Equal requests to the same endpoint, as far as its load allows.
    ConsistentHash,
}

/// One address that a source has found, with its weight and priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EndpointTarget {
    pub(crate) address: SocketAddr,
    /// Endpoints of a lower number are preferred (SRV).
    pub(crate) priority: u16,
    /// Its share compared to the others, from 1 on.
    pub(crate) weight: u32,
    /// By the zone that the source knows; a zone in the configuration overrides it.
    pub(crate) locality: Locality,
}

impl EndpointTarget {
    /// A target of the first priority and of one share, of no known zone.
    pub(crate) fn at(address: SocketAddr) -> Self {
        EndpointTarget { address, priority: 0, weight: 1, locality: Locality::Local }
    }
}

/// Whether an endpoint is in another zone than this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Locality {
    /// In the same one, or of no known zone.
    Local,
    Remote,
}

/// The result of a call as its endpoint is judged by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallOutcome {
    /// A response below 500.
    Success,
    /// A response from 500 on, or a broken connection.
    Failure,
    /// The endpoint let a clock run out.
    Timeout,
}

/// One endpoint of an upstream, shared by all threads.
pub(crate) struct Endpoint {
    /// The name of the upstream.
    upstream: Arc<str>,
    /// The item of the configuration that it comes from.
    origin: EndpointAddress,
    pub(crate) connector: Connector,
    /// Its name in logs and metrics.
    pub(crate) name: Arc<str>,
    pub(crate) priority: u16,
    is_remote: AtomicBool,
    in_flight: AtomicUsize,
    calls: AtomicU64,
    failures: AtomicU64,
    retries: AtomicU64,
    traffic: EndpointTraffic,
    state: EndpointState,
    load: EndpointLoad,
    latencies: LatencyCounts,
    /// For consistent hashing; the same on every gateway.
    hash: u64,
}

fn connector(origin: &EndpointAddress, address: SocketAddr, tls: Option<&UpstreamTls>) -> Connector {
    match (origin.scheme, tls) {
        (scheme, Some(tls)) if scheme.has_tls() => Connector::tls(address, &origin.certificate_name(), tls),
        (scheme, _) if scheme.is_h2c() => Connector::h2c(address),
        _ => Connector::plain(address),
    }
}

impl Endpoint {
    /// `tls` is needed for the scheme `https`.
    pub(crate) fn new(
        upstream: &Arc<str>,
        origin: &EndpointAddress,
        target: EndpointTarget,
        tls: Option<&UpstreamTls>,
    ) -> Self {
        let connector = connector(origin, target.address, tls);
        let name = origin.name_of(target.address);
        let load = EndpointLoad::default();
        load.set_weight(target.weight);
        Endpoint {
            upstream: Arc::clone(upstream),
            origin: origin.clone(),
            connector,
            hash: hash_of(name.as_bytes()),
            name: name.into(),
            priority: target.priority,
            is_remote: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            calls: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            traffic: EndpointTraffic::default(),
            state: EndpointState::default(),
            load,
            latencies: LatencyCounts::default(),
        }
    }

    /// The endpoint, whose bytes count in `totals` too.
    pub(crate) fn with_totals(mut self, totals: &Arc<Counters<TrafficDirection>>) -> Self {
        self.traffic.set_totals(totals);
        self
    }

    /// Whether this is the endpoint that `target` of `origin` stands for.
    pub(crate) fn is(&self, origin: &EndpointAddress, target: EndpointTarget, tls: Option<&UpstreamTls>) -> bool {
        self.address() == target.address
            && self.priority == target.priority
            && self.origin == *origin
            && self.connector.key() == connector(origin, target.address, tls).key()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.connector.key().address
    }

    /// The item of the configuration that it comes from.
    pub(crate) fn origin(&self) -> &EndpointAddress {
        &self.origin
    }

    pub(crate) fn set_locality(&self, locality: Locality) {
        self.is_remote.store(locality == Locality::Remote, Relaxed);
    }

    pub(crate) fn locality(&self) -> Locality {
        if self.is_remote.load(Relaxed) { Locality::Remote } else { Locality::Local }
    }

    /// The configured weight, whatever a slow start makes of it.
    pub(crate) fn weight(&self) -> f64 {
        self.load.weight(0, Duration::ZERO)
    }

    pub(crate) fn set_weight(&self, weight: u32) {
        self.load.set_weight(weight);
    }

    /// The endpoint joins others that are in use already.
    pub(crate) fn begin_slow_start(&self, now: Instant) {
        self.load.begin_slow_start(millis(now));
    }

    /// Records the time to the head of a response; `None`: the call failed.
    pub(crate) fn record_latency(&self, latency: Option<Duration>, now: Instant) {
        self.load.record_latency(latency, millis(now));
    }

    /// Records the time to the head of a response, for the percentiles.
    pub(crate) fn count_latency(&self, latency: Duration, now: Instant) {
        self.latencies.record(latency, millis(now));
    }

    /// The median and the 99th percentile of the last responses; `None` without any.
    pub(crate) fn percentiles(&self, now: Instant) -> Option<[Duration; 2]> {
        self.latencies.percentiles([50, 99], millis(now))
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Relaxed)
    }

    /// Calls with a verdict, and those of them that failed.
    pub(crate) fn calls(&self) -> (u64, u64) {
        (self.calls.load(Relaxed), self.failures.load(Relaxed))
    }

    /// Bytes of bodies that were sent to the endpoint, and received from it.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.traffic.get(TrafficDirection::Sent), self.traffic.get(TrafficDirection::Received))
    }

    /// Requests that were sent again because this endpoint has failed them.
    pub(crate) fn retries(&self) -> u64 {
        self.retries.load(Relaxed)
    }

    pub(crate) fn count_retry(&self) {
        self.retries.fetch_add(1, Relaxed);
    }

    pub(crate) fn availability(&self, now: Instant) -> EndpointAvailability {
        self.state.availability(|| millis(now))
    }

    /// Whether the endpoint is ejected or unhealthy.
    pub(crate) fn is_out(&self, now: Instant) -> bool {
        self.state.is_out(millis(now))
    }

    /// Why the endpoint is out, and the seconds until it is used again, if that is known.
    pub(crate) fn out(&self, now: Instant) -> Option<(OutReason, Option<f64>)> {
        self.state.out(millis(now)).map(|(reason, left)| (reason, left.map(|left| left as f64 / 1_000.0)))
    }

    /// Records that no connection could be opened.
    pub(crate) fn record_unreachable(&self, now: Instant) {
        self.report(self.state.record_unreachable(millis(now)));
    }

    /// Records that a connection was opened.
    pub(crate) fn record_reachable(&self, now: Instant) {
        self.report(self.state.record_reachable(millis(now)));
    }

    pub(crate) fn eject(&self, reason: OutReason, config: &EjectConfig, now: Instant) {
        self.report(self.state.eject(reason, (config, millis(now))));
    }

    /// Takes over the result of a health check; `needed` of the same result in a row change the
    /// state.
    pub(crate) fn record_check(&self, passed: bool, needed: u32) {
        self.report(self.state.record_check(passed, needed, millis(Instant::now())));
    }

    /// Forgets the results of health checks: there are none any more.
    pub(crate) fn forget_checks(&self) {
        self.report(self.state.forget_checks(millis(Instant::now())));
    }

    fn report(&self, change: Option<StateChange>) {
        let (upstream, endpoint) = (&*self.upstream, &*self.name);
        match change {
            None => {}
            Some(StateChange::Down(reason)) => {
                let seconds = self.out(Instant::now()).and_then(|(_, left)| left);
                Event::EndpointDown { upstream, endpoint, reason: reason.as_str(), seconds }.emit();
            }
            Some(StateChange::Up) => {
                self.begin_slow_start(Instant::now());
                Event::EndpointUp { upstream, endpoint }.emit();
            }
        }
    }
}

/// A request in flight at an endpoint. Dropping the guard ends the count.
pub(crate) struct InFlightGuard {
    endpoint: Arc<Endpoint>,
    /// The ejections of the endpoint before the request.
    ejections: u32,
    /// Bytes of the bodies so far, which the end of the request counts.
    sent: u64,
    received: u64,
}

impl InFlightGuard {
    pub(crate) fn new(endpoint: Arc<Endpoint>) -> Self {
        endpoint.in_flight.fetch_add(1, Relaxed);
        InFlightGuard { ejections: endpoint.state.ejections(), endpoint, sent: 0, received: 0 }
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Sets the bytes of the request's body that were sent so far.
    pub(crate) fn set_sent(&mut self, bytes: u64) {
        self.sent = bytes;
    }

    /// Adds bytes of the response's body.
    pub(crate) fn add_received(&mut self, bytes: u64) {
        self.received += bytes;
    }

    /// Counts the call, whose response, or failure before it, is known. Returns why the endpoint is
    /// to be ejected, if it is. The end of a good response is recorded by `record_success`.
    pub(crate) fn record(
        &self,
        outcome: CallOutcome,
        config: &EjectConfig,
        now: impl Fn() -> Instant,
    ) -> Option<OutReason> {
        self.endpoint.calls.fetch_add(1, Relaxed);
        if outcome == CallOutcome::Success {
            self.endpoint.load.record_outcome(false, || millis(now()));
            return None;
        }
        self.record_failure(outcome, config, now())
    }

    /// Records a response that has ended well.
    pub(crate) fn record_success(&self, now: impl Fn() -> Instant) {
        self.endpoint.report(self.endpoint.state.record_success(self.ejections, || millis(now())));
    }

    /// Records the failure of a call that is counted already, as `record` does.
    pub(crate) fn record_failure(&self, outcome: CallOutcome, config: &EjectConfig, now: Instant) -> Option<OutReason> {
        let endpoint = &self.endpoint;
        endpoint.failures.fetch_add(1, Relaxed);
        endpoint.load.record_outcome(true, || millis(now));
        let is_timeout = outcome == CallOutcome::Timeout;
        let call = FailedCall { is_timeout, calls: endpoint.calls.load(Relaxed), ejections: self.ejections };
        endpoint.state.record_failure(call, config, millis(now))
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.endpoint.in_flight.fetch_sub(1, Relaxed);
        self.endpoint.traffic.add(TrafficDirection::Sent, self.sent);
        self.endpoint.traffic.add(TrafficDirection::Received, self.received);
    }
}

/// The hash of a name or of a key for consistent hashing.
pub(crate) fn hash_of(bytes: &[u8]) -> u64 {
    // The key is public: all gateways of a fleet choose the same endpoint, and the bound on its
    // load protects an endpoint for which clients choose their keys.
    let mut hasher = SipHasher13::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Milliseconds since the first use of an endpoint in this process.
fn millis(now: Instant) -> u64 {
    static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(now.saturating_duration_since(*EPOCH).as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(count: u16) -> EndpointSet {
        let endpoint = |port| {
            let origin = EndpointAddress::http("127.0.0.1", port);
            let address = origin.numeric().expect("a numeric host");
            Arc::new(Endpoint::new(&"shop".into(), &origin, EndpointTarget::at(address), None))
        };
        EndpointSet::new((1..=count).map(endpoint).collect(), BalanceConfig::default(), 0.5)
    }

    fn at(now: Instant) -> Pick {
        Pick { now, hash: 0 }
    }

    fn port(selected: Option<&Arc<Endpoint>>) -> Option<u16> {
        selected.map(|endpoint| endpoint.address().port())
    }

    #[test]
    fn tried_endpoints_are_skipped_and_unreachable_ones_come_last() {
        let set = endpoints(3);
        let now = Instant::now();
        let list = set.list();
        list[0].record_unreachable(now);
        assert!((0..6).all(|_| port(set.select(&[], at(now))) != Some(1)));
        assert_eq!(port(set.select(&list[1..], at(now))), Some(1));
        assert_eq!(port(set.select(list, at(now))), None);
        assert!((0..6).any(|_| port(set.select(&[], at(now + Duration::from_secs(2)))) == Some(1)));
    }

    #[test]
    fn every_endpoint_of_many_is_selected_once() {
        let set = endpoints(200);
        let now = Instant::now();
        let mut tried = Vec::new();
        while let Some(endpoint) = set.select(&tried, at(now)) {
            tried.push(Arc::clone(endpoint));
            assert!(tried.len() <= 200);
        }
        let mut ports: Vec<u16> = tried.iter().map(|endpoint| endpoint.address().port()).collect();
        ports.sort_unstable();
        assert_eq!(ports, (1..=200).collect::<Vec<u16>>());
    }

    #[test]
    fn endpoint_is_selected_while_other_threads_change_the_states() {
        let set = endpoints(3);
        let (start, config) =
            (Instant::now(), EjectConfig { base: Duration::from_millis(1), ..EjectConfig::default() });
        std::thread::scope(|scope| {
            for endpoint in set.list() {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        endpoint.state.record_unreachable(millis(start));
                        endpoint.state.eject(OutReason::Failures, (&config, millis(start)));
                        endpoint.state.record_reachable(millis(start));
                    }
                });
            }
            let tried = &set.list()[..1];
            assert!((0..20_000).all(|_| set.select(tried, at(start)).is_some()));
        });
    }

    #[test]
    fn endpoints_that_are_out_are_used_only_if_more_are_than_the_share_allows() {
        let set = endpoints(4);
        let (config, now) = (EjectConfig::default(), Instant::now());
        let selected = || {
            let mut ports: Vec<_> = (0..16).filter_map(|_| port(set.select(&[], at(now)))).collect();
            ports.sort_unstable();
            ports.dedup();
            ports
        };
        for (out, expected) in [(0, vec![2, 3, 4]), (1, vec![3, 4]), (2, vec![1, 2, 3, 4])] {
            set.list()[out].eject(OutReason::Failures, &config, now);
            assert_eq!(selected(), expected, "{} of 4 are out", out + 1);
        }
        // No connection to it succeeds, panic or not.
        set.list()[3].record_unreachable(now);
        assert_eq!(selected(), [1, 2, 3]);
    }

    #[test]
    fn least_loaded_endpoint_is_selected() {
        let set = endpoints(3);
        let now = Instant::now();
        let _busy = [0, 2].map(|index: usize| InFlightGuard::new(Arc::clone(&set.list()[index])));
        assert!((0..6).all(|_| port(set.select(&[], at(now))) == Some(2)));
    }

    /// Also if no endpoint ever has two requests in flight, which would make the others busier.
    #[test]
    fn endpoint_that_has_failed_is_tried_again_after_a_while() {
        let set = endpoints(2);
        let now = Instant::now();
        for failures in [1, 100] {
            let call = InFlightGuard::new(Arc::clone(&set.list()[0]));
            for _ in 0..failures {
                call.record(CallOutcome::Failure, &EjectConfig::default(), || now);
            }
            drop(call);
            let is_tried = |seconds| {
                let later = now + Duration::from_secs(seconds);
                (0..4).any(|_| port(set.select(&[], at(later))) == Some(1))
            };
            assert!(!is_tried(1) && !is_tried(20), "{failures}");
            assert!(is_tried(60), "{failures}");
        }
    }

    #[test]
    fn own_zone_is_preferred_while_half_of_its_endpoints_are_available() {
        let list = endpoints(6).list().to_vec();
        list[2..].iter().for_each(|endpoint| endpoint.set_locality(Locality::Remote));
        let set = EndpointSet::new(list, BalanceConfig::default(), 1.0);
        let (config, now) = (EjectConfig::default(), Instant::now());
        let selected = || {
            let mut ports: Vec<_> = (0..60).filter_map(|_| port(set.select(&[], at(now)))).collect();
            ports.sort_unstable();
            ports.dedup();
            ports
        };
        assert_eq!(selected(), [1, 2]);
        set.list()[0].eject(OutReason::Failures, &config, now);
        assert_eq!(selected(), [2]);
        set.list()[1].eject(OutReason::Failures, &config, now);
        assert_eq!(selected(), [3, 4, 5, 6]);
        assert_eq!(port(set.select(&set.list()[2..], at(now))), Some(1), "the last resort");
    }
}
