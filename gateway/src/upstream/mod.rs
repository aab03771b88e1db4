//! An upstream: a named set of endpoints, with the timeouts of its exchanges.
//!
//! A request of which nothing was sent may go to any endpoint. A request that was sent is sent
//! again only as `retry` decides, and while the bytes of its body are still there.

mod attempt_error;
mod hash_key;
mod known_targets;
mod pool;
mod replay;
mod retry;
mod latency;
mod stats;
mod judge;
mod exchange;
mod open;
mod call;
mod health;

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

pub(crate) use attempt_error::AttemptError;
pub(crate) use call::{CallRepeats, CallResult, KeptConnections, OutgoingRequest, UpstreamResponse};
pub(crate) use exchange::{Tunnel, UpstreamExchange};
pub(crate) use hash_key::HashKey;
pub(crate) use health::{HealthConfig, check_health};
pub(crate) use pool::sweep;
pub(crate) use replay::KEPT_MAX as REPLAY_BYTES_MAX;
pub(crate) use retry::RetryConfig;
pub(crate) use stats::{CallInProgress, UpstreamResult, UpstreamStats};

use crate::concurrency::{ConcurrencyConfig, ConcurrencyLimit, ConcurrencyRejection};
use crate::connect::UpstreamTls;
use crate::discovery::StaticSource;
use crate::endpoint::{
    BalanceConfig, EjectConfig, Endpoint, EndpointAddress, EndpointAvailability, EndpointSet, EndpointTarget, Locality,
    OutReason, TrafficDirection,
};
use crate::http::attempt::UpstreamConnectionError;
use crate::http::exchange_clock::ExchangeTimeouts;
use crate::http::upstream_connection::{http2_connections, reserved_upstream_bytes};

use crate::metrics::Label as _;
use crate::spans::AttemptLog;
use crate::{breaker, metrics};
use judge::EndpointJudge;
use known_targets::{KnownTargets, NamedTargets};
use latency::RecentLatencies;
use open::{AttemptPlan, OpenedConnection};
use retry::{ReplayReason, RetryBudget, RetryReason};

/// Configuration of one upstream (`[upstreams.X]`): endpoints, load balancing, timeouts and
/// breaker.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct UpstreamConfig {
    /// The name that routes refer to.
    pub(crate) name: Arc<str>,
    /// The endpoints, at least one.
    pub(crate) endpoints: Vec<EndpointAddress>,
    /// TLS with the endpoints whose scheme is `https`; `None`: there is none.
    pub(crate) tls: Option<UpstreamTls>,
    /// How an endpoint is selected.
    pub(crate) balance: BalanceConfig,
    /// The part of a request that decides with consistent hashing.
    pub(crate) hash_by: HashKey,
    /// The weights of `endpoints`.
    pub(crate) weights: Vec<u32>,
    /// The zones of `endpoints`.
    pub(crate) zones: Vec<Option<String>>,
    /// The zone of this node, which is preferred; `None`: none is.
    pub(crate) own_zone: Option<String>,
    /// Limit for opening a connection.
    pub(crate) connect_timeout: Duration,
    /// From the complete request sent to the head of the response.
    pub(crate) timeout: Duration,
    /// Between two moves of a body, of request or response.
    pub(crate) idle_timeout: Duration,
    /// The whole exchange, from the selection of an endpoint to the last byte of the response;
    /// `None`: no limit.
    pub(crate) total_timeout: Option<Duration>,
    /// When an endpoint is ejected.
    pub(crate) eject: EjectConfig,
    /// Active health checks; `None`: none.
    pub(crate) health: Option<HealthConfig>,
    /// The adaptive limit of calls in progress; `None`: there is none.
    pub(crate) concurrency: Option<ConcurrencyConfig>,
    /// When the circuit breaker opens.
    pub(crate) breaker: breaker::BreakerConfig,
    /// When a request is sent again.
    pub(crate) retry: RetryConfig,
}

impl UpstreamConfig {
    /// An upstream with the defaults of every key except its endpoints.
    pub(crate) fn new(name: Arc<str>, endpoints: Vec<EndpointAddress>) -> Self {
        let (weights, zones) = (vec![1; endpoints.len()], vec![None; endpoints.len()]);
        UpstreamConfig {
            name,
            endpoints,
            tls: None,
            balance: BalanceConfig::default(),
            hash_by: HashKey::default(),
            weights,
            zones,
            own_zone: None,
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            total_timeout: None,
            eject: EjectConfig::default(),
            health: None,
            concurrency: None,
            breaker: breaker::BreakerConfig::default(),
            retry: RetryConfig::default(),
        }
    }

    /// The timeouts of an exchange once its connection is open.
    pub(crate) fn timeouts(&self) -> ExchangeTimeouts {
        ExchangeTimeouts { head: self.timeout, idle: self.idle_timeout, total: self.total_timeout }
    }
}

/// The number of endpoints that a new answer has added and removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndpointsChange {
    pub(crate) endpoints: usize,
    pub(crate) added: usize,
    pub(crate) removed: usize,
}

/// A named set of endpoints, shared by all threads.
pub(crate) struct Upstream {
    config: UpstreamConfig,
    /// The limit of calls in progress; `None`: there is none.
    limit: Option<Arc<ConcurrencyLimit>>,
    /// The endpoints, and when one is ejected.
    judge: Arc<EndpointJudge>,
    /// By index of `config.endpoints`.
    known: Mutex<Vec<NamedTargets>>,
    /// Notified of every answer and failure, for requests that wait for the first endpoint.
    answered: watch::Sender<()>,
    budget: Arc<RetryBudget>,
    /// Of the calls that may be hedged.
    latencies: Arc<RecentLatencies>,
}

impl Upstream {
    /// An upstream with the endpoints whose addresses are numeric, and with those that `old`, the
    /// upstream of the same name before a reload, knows for the same names. Endpoints of `old` keep
    /// their state.
    pub(crate) fn new(mut config: UpstreamConfig, old: Option<&Upstream>) -> Self {
        // Equal settings keep their connections, and their sessions for resumption.
        if let Some(old) = old.filter(|old| old.config.tls == config.tls) {
            config.tls.clone_from(&old.config.tls);
        }
        let known_before = |origin: &EndpointAddress| {
            let old = old?;
            let index = old.config.endpoints.iter().position(|other| other == origin)?;
            old.known.lock().unwrap_or_else(PoisonError::into_inner).get(index).cloned()
        };
        let known = config.endpoints.iter().map(|origin| match StaticSource::of(origin) {
            Some(StaticSource(target)) => NamedTargets::numeric(target),
            None => known_before(origin).unwrap_or_default(),
        });
        let known: Vec<_> = known.collect();
        let before = old.map(|old| old.judge.set.load_full());
        let stats: Arc<UpstreamStats> = old.map(|old| Arc::clone(&old.judge.stats)).unwrap_or_default();
        let list = merge((&config, &stats), &known, before.as_deref().map_or(&[], EndpointSet::list));
        let set = EndpointSet::new(list, config.balance, config.eject.share);
        let judge = Arc::new(EndpointJudge::new(config.eject.clone(), set, stats));
        let limit = config.concurrency.map(|bounds| {
            let kept = old.and_then(|old| old.limit.as_ref()).filter(|limit| *limit.config() == bounds);
            kept.map_or_else(|| Arc::new(ConcurrencyLimit::new(bounds, std::time::Instant::now())), Arc::clone)
        });
        let budget = old.map(|old| Arc::clone(&old.budget)).unwrap_or_default();
        let latencies = old.map(|old| Arc::clone(&old.latencies)).unwrap_or_default();
        Upstream { config, limit, judge, known: Mutex::new(known), answered: watch::Sender::new(()), budget, latencies }
    }

    pub(crate) fn config(&self) -> &UpstreamConfig {
        &self.config
    }

    /// The limit of calls in progress; `None`: there is none.
    pub(crate) fn limit(&self) -> Option<&Arc<ConcurrencyLimit>> {
        self.limit.as_ref()
    }

    /// Counts of calls, for metrics.
    pub(crate) fn stats(&self) -> &UpstreamStats {
        &self.judge.stats
    }

    /// The current endpoints.
    pub(crate) fn endpoints(&self) -> Arc<EndpointSet> {
        self.judge.set.load_full()
    }

    /// The items of `endpoints` whose addresses have to be looked up, with their indexes.
    pub(crate) fn names(&self) -> impl Iterator<Item = (usize, &EndpointAddress)> {
        self.config.endpoints.iter().enumerate().filter(|(_, origin)| origin.numeric().is_none())
    }

    /// Takes over all addresses of the item at `index`. Returns the change, if there is one.
    pub(crate) fn set_targets(&self, index: usize, targets: Vec<EndpointTarget>) -> Option<EndpointsChange> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let named = known.get_mut(index)?;
        let is_changed = !matches!(&named.targets, KnownTargets::Some(before) if *before == targets);
        if !is_changed {
            return None;
        }
        named.targets = KnownTargets::Some(targets);
        let before = self.judge.set.load_full();
        let list = merge((&self.config, &self.judge.stats), &known, before.list());
        let earlier: HashSet<*const Endpoint> = before.list().iter().map(Arc::as_ptr).collect();
        let kept = list.iter().filter(|endpoint| earlier.contains(&Arc::as_ptr(endpoint))).count();
        let change = EndpointsChange {
            endpoints: list.len(),
            added: list.len() - kept,
            removed: before.list().len().saturating_sub(kept),
        };
        let set = EndpointSet::new(list, self.config.balance, self.config.eject.share);
        self.judge.set.store(Arc::new(set));
        self.answered.send_replace(());
        Some(change)
    }

    /// Notes that the addresses of the item at `index` could not be looked up. If it never had any,
    /// requests do not wait for them any more. Returns whether the lookup before has succeeded.
    pub(crate) fn note_failed_lookup(&self, index: usize, error: &dyn Display) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(named) = known.get_mut(index) else { return false };
        if let awaited @ KnownTargets::Awaited = &mut named.targets {
            *awaited = KnownTargets::None;
            self.answered.send_replace(());
        }
        named.note_failure(error.to_string(), std::time::Instant::now())
    }

    /// Notes that the source of the item at `index` has answered. Returns whether the lookup before
    /// has failed.
    pub(crate) fn note_answer(&self, index: usize) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_mut(index).is_some_and(|named| named.failure.take().is_some())
    }

    /// The items of `endpoints` whose addresses cannot be looked up now.
    pub(crate) fn failing_names(&self) -> Vec<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let names = self.names().filter(|(index, _)| known.get(*index).is_some_and(|named| named.failure.is_some()));
        names.map(|(_, origin)| origin.to_string()).collect()
    }

    /// The items of `endpoints` that have never been looked up with success.
    pub(crate) fn unknown_names(&self) -> Vec<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_unknown =
            |index: usize| known.get(index).is_some_and(|named| !matches!(named.targets, KnownTargets::Some(_)));
        self.names().filter(|(index, _)| is_unknown(*index)).map(|(_, origin)| origin.to_string()).collect()
    }

    /// Whether the source of each item has answered, and none has an endpoint.
    fn has_no_endpoints(&self) -> bool {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().all(|named| matches!(&named.targets, KnownTargets::Some(targets) if targets.is_empty()))
    }

    /// Waits until there is an endpoint, or every lookup has ended once. Cancel safe.
    async fn first_endpoint(&self, due: Instant) {
        let mut answered = self.answered.subscribe();
        let is_awaited = || {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.iter().any(|named| matches!(named.targets, KnownTargets::Awaited))
        };
        while self.judge.set.load().list().is_empty() && is_awaited() {
            // The sender lives as long as this upstream.
            if timeout_at(due, answered.changed()).await.is_err() {
                return;
            }
        }
    }

    /// The state of the upstream and of each endpoint, for the admin address.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        let now = std::time::Instant::now();
        let set = self.judge.set.load();
        let endpoints = set.list().iter().map(|endpoint| {
            let (calls, failures) = endpoint.calls();
            let out = endpoint.out(now);
            let latencies = endpoint.percentiles(now);
            let millis = |latency: Duration| latency.as_secs_f64() * 1e3;
            let (sent, received) = endpoint.bytes();
            let [http1, http2] = endpoint.connector.open_connections();
            serde_json::json!({
                "name": &*endpoint.name,
                "state": endpoint.availability(now).as_str(),
                "reason": out.map(|(reason, _)| reason.as_str()),
                "seconds_left": out.and_then(|(_, left)| left),
                "weight": endpoint.weight(),
                "in_flight": endpoint.in_flight(),
                "calls": calls,
                "failures": failures,
                "retries": endpoint.retries(),
                "bytes_sent": sent,
                "bytes_received": received,
                "latency_p50_ms": latencies.map(|[p50, _]| millis(p50)),
                "latency_p99_ms": latencies.map(|[_, p99]| millis(p99)),
                "connections": { "1.1": http1, "2": http2 },
            })
        });
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let names = self.names().filter_map(|(index, origin)| Some(known.get(index)?.to_json(origin, now)));
        serde_json::json!({
            "name": &*self.config.name,
            "names": names.collect::<Vec<_>>(),
            "concurrency": self.limit.as_ref().map(|limit| limit.to_json()),
            "panic": set.is_panicking(now),
            "endpoints": endpoints.collect::<Vec<_>>(),
        })
    }

    /// Opens a connection to an endpoint; `failed` gets those that could not be reached before,
    /// `log` each connection that was tried.
    async fn open(
        &self,
        plan: &mut AttemptPlan,
        failed: &mut Vec<AttemptError>,
        log: Option<&AttemptLog>,
    ) -> Result<OpenedConnection, AttemptError> {
        if self.judge.set.load().list().is_empty() {
            let due = Instant::now() + plan.connect_timeout;
            self.first_endpoint(plan.total_at.map_or(due, |total| total.min(due))).await;
        }
        let set = self.judge.set.load_full();
        if set.list().is_empty() {
            return Err(AttemptError::no_endpoint(match self.has_no_endpoints() {
                true => UpstreamConnectionError::NoEndpoints,
                false => UpstreamConnectionError::NoAddress,
            }));
        }
        open::open(&set, plan, failed, log).await
    }
}

/// The endpoints of all known targets: those of `before` where they are the same.
fn merge(
    (config, stats): (&UpstreamConfig, &UpstreamStats),
    known: &[NamedTargets],
    before: &[Arc<Endpoint>],
) -> Vec<Arc<Endpoint>> {
    let mut list: Vec<Arc<Endpoint>> = Vec::new();
    // Few endpoints of an upstream have the same address; there may be thousands of addresses.
    let mut earlier: HashMap<SocketAddr, SmallVec<[&Arc<Endpoint>; 1]>> = HashMap::new();
    before.iter().for_each(|endpoint| earlier.entry(endpoint.address()).or_default().push(endpoint));
    for (index, (origin, known)) in config.endpoints.iter().zip(known).enumerate() {
        let weight = config.weights.get(index).copied().unwrap_or(1);
        let zone = config.zones.get(index).and_then(Option::as_ref).zip(config.own_zone.as_ref());
        let configured = zone.map(|(zone, own)| if zone == own { Locality::Local } else { Locality::Remote });
        let KnownTargets::Some(targets) = &known.targets else { continue };
        for target in targets {
            let target = &EndpointTarget { weight: target.weight.saturating_mul(weight), ..*target };
            let (tls, locality) = (config.tls.as_ref(), configured.unwrap_or(target.locality));
            let same_address = earlier.get(&target.address).into_iter().flatten();
            let kept = same_address.copied().find(|endpoint| endpoint.is(origin, *target, tls)).map(Arc::clone);
            list.push(match kept {
                Some(endpoint) => {
                    endpoint.set_weight(target.weight);
                    endpoint.set_locality(locality);
                    endpoint
                }
                None => {
                    let endpoint = Endpoint::new(&config.name, origin, *target, tls).with_totals(&stats.bytes);
                    endpoint.set_locality(locality);
                    if !before.is_empty() {
                        endpoint.begin_slow_start(std::time::Instant::now());
                    }
                    Arc::new(endpoint)
                }
            });
        }
    }
    list
}

/// Exposes the metrics of upstreams. `for_each` visits the current upstreams at scrape time.
pub(crate) fn expose(for_each: impl Fn(&mut dyn FnMut(&Upstream)) + Clone + Send + Sync + 'static) {
    expose_concurrency(for_each.clone());
    expose_calls(for_each.clone());
    let help = "Endpoints of each upstream by state.";
    let upstreams = for_each.clone();
    metrics::expose_gauge_with("tidegate_upstream_endpoints", help, move |emit| {
        upstreams(&mut |upstream| {
            let mut counts = [0_u32; EndpointAvailability::ALL.len()];
            let now = std::time::Instant::now();
            upstream
                .judge
                .set
                .load()
                .list()
                .iter()
                .for_each(|endpoint| counts[endpoint.availability(now).index()] += 1);
            for state in EndpointAvailability::ALL {
                let labels = [("upstream", &*upstream.config.name), (EndpointAvailability::NAME, state.as_str())];
                emit(&labels, counts[state.index()].into());
            }
        });
    });
    let help =
        "Names and services of each upstream whose addresses cannot be looked up now; the last ones stay in use.";
    let upstreams = for_each.clone();
    metrics::expose_gauge_with("tidegate_upstream_lookups_failing", help, move |emit| {
        upstreams(&mut |upstream| {
            emit(&[("upstream", &*upstream.config.name)], upstream.failing_names().len() as f64);
        });
    });
    let help = "Connections of HTTP/2 to upstreams, which requests share.";
    metrics::expose_gauge_with("tidegate_upstream_http2_connections", help, |emit| {
        emit(&[], http2_connections() as f64);
    });
    let help = "Memory reserved for responses of upstreams over HTTP/2.";
    metrics::expose_gauge_with("tidegate_upstream_http2_reserved_bytes", help, |emit| {
        emit(&[], reserved_upstream_bytes() as f64);
    });
    let help = "Requests that were sent again, by reason.";
    let upstreams = for_each.clone();
    metrics::expose_counter_with("tidegate_upstream_retries", help, move |emit| {
        upstreams(&mut |upstream| {
            for reason in RetryReason::ALL.iter().copied() {
                let labels = [("upstream", &*upstream.config.name), (RetryReason::NAME, reason.as_str())];
                emit(&labels, upstream.budget.retries(reason));
            }
        });
    });
    let help = "Requests that were sent again because no endpoint had processed them, which is no retry.";
    let upstreams = for_each.clone();
    metrics::expose_counter_with("tidegate_upstream_replays", help, move |emit| {
        upstreams(&mut |upstream| {
            for reason in ReplayReason::ALL.iter().copied() {
                let labels = [("upstream", &*upstream.config.name), (ReplayReason::NAME, reason.as_str())];
                emit(&labels, upstream.budget.replays(reason));
            }
        });
    });
    let help =
        "Requests that were sent to a second endpoint because the first one was slow, by whose response was used.";
    let upstreams = for_each.clone();
    metrics::expose_counter_with("tidegate_upstream_hedges", help, move |emit| {
        upstreams(&mut |upstream| {
            let (hedges, won) = upstream.budget.hedges();
            for (used, count) in [("second", won), ("first", hedges.saturating_sub(won))] {
                emit(&[("upstream", &*upstream.config.name), ("used", used)], count);
            }
        });
    });
    let help = "Retries and hedges that the budget did not allow.";
    metrics::expose_counter_with("tidegate_upstream_retries_denied", help, move |emit| {
        for_each(&mut |upstream| emit(&[("upstream", &*upstream.config.name)], upstream.budget.denied()));
    });
}

/// Exposes the results of the calls of upstreams.
fn expose_calls(for_each: impl Fn(&mut dyn FnMut(&Upstream)) + Clone + Send + Sync + 'static) {
    let each = for_each.clone();
    metrics::expose_counter_with("tidegate_upstream_requests", "Calls of each upstream by result.", move |emit| {
        each(&mut |upstream| {
            for result in UpstreamResult::ALL {
                let labels = [("upstream", &*upstream.config.name), (UpstreamResult::NAME, result.as_str())];
                emit(&labels, upstream.stats().results.get(*result));
            }
        });
    });
    let each = for_each.clone();
    let help = "Bytes of bodies that were sent to the endpoints of each upstream, and received from them.";
    metrics::expose_counter_with("tidegate_upstream_body_bytes", help, move |emit| {
        each(&mut |upstream| {
            for direction in TrafficDirection::ALL {
                let labels = [("upstream", &*upstream.config.name), (TrafficDirection::NAME, direction.as_str())];
                emit(&labels, upstream.stats().bytes.get(*direction));
            }
        });
    });
    let each = for_each.clone();
    metrics::expose_histogram_with(
        "tidegate_upstream_request_duration_seconds",
        "From the complete request to the head of the response, of calls without a retry.",
        move |emit| each(&mut |upstream| emit(&[("upstream", &upstream.config.name)], &upstream.stats().durations)),
    );
    let each = for_each.clone();
    metrics::expose_counter_with(
        "tidegate_upstream_ejections",
        "Endpoints ejected because of their responses, by reason.",
        move |emit| {
            each(&mut |upstream| {
                for reason in OutReason::ALL {
                    let labels = [("upstream", &*upstream.config.name), (OutReason::NAME, reason.as_str())];
                    emit(&labels, upstream.stats().ejections.get(*reason));
                }
            });
        },
    );
    metrics::expose_gauge_with(
        "tidegate_upstream_connections",
        "Open connections to the endpoints of each upstream, by protocol.",
        move |emit| {
            for_each(&mut |upstream| {
                let mut sums = [0; 2];
                for endpoint in upstream.endpoints().list() {
                    let open = endpoint.connector.open_connections();
                    sums = [sums[0] + open[0], sums[1] + open[1]];
                }
                for (protocol, count) in ["1.1", "2"].into_iter().zip(sums) {
                    emit(&[("upstream", &upstream.config.name), ("network_protocol_version", protocol)], count as f64);
                }
            });
        },
    );
}

/// Exposes the concurrency limits of upstreams that have one.
fn expose_concurrency(for_each: impl Fn(&mut dyn FnMut(&Upstream)) + Clone + Send + Sync + 'static) {
    let each = for_each.clone();
    metrics::expose_gauge_with(
        "tidegate_upstream_concurrency_limit",
        "Calls that an upstream may have in progress.",
        move |emit| visit_limits(&each, &mut |name, limit| emit(&[("upstream", name)], limit.report().limit as f64)),
    );
    let each = for_each.clone();
    metrics::expose_gauge_with(
        "tidegate_upstream_concurrency_in_flight",
        "Calls that an upstream has in progress.",
        move |emit| {
            visit_limits(&each, &mut |name, limit| emit(&[("upstream", name)], limit.report().in_flight as f64))
        },
    );
    let each = for_each.clone();
    metrics::expose_gauge_with(
        "tidegate_upstream_concurrency_waiting",
        "Calls that wait for the concurrency limit of an upstream.",
        move |emit| visit_limits(&each, &mut |name, limit| emit(&[("upstream", name)], limit.report().waiting as f64)),
    );
    metrics::expose_counter_with(
        "tidegate_upstream_concurrency_rejections",
        "Calls rejected by the concurrency limit of an upstream.",
        move |emit| {
            visit_limits(&for_each, &mut |name, limit| {
                for reason in ConcurrencyRejection::ALL {
                    let labels = [("upstream", name), (ConcurrencyRejection::NAME, reason.as_str())];
                    emit(&labels, limit.rejections(*reason));
                }
            });
        },
    );
}

/// Visits the concurrency limits of the upstreams that have one.
fn visit_limits(for_each: &impl Fn(&mut dyn FnMut(&Upstream)), visit: &mut dyn FnMut(&str, &ConcurrencyLimit)) {
    for_each(&mut |upstream| {
        if let Some(limit) = &upstream.limit {
            visit(&upstream.config.name, limit);
        }
    });
}
