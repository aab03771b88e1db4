//! The content of the dashboard: the state of the process with the rates of the last seconds, and
//! the history of the last fifteen minutes.
//!
//! Nothing here is on the path of a request. Counters are sampled every five seconds, and read
//! once a second at most while a dashboard is open. Invariant: the size of the state is bounded,
//! however many routes and endpoints there are (`rows`) and readers ask.

mod sample;
mod history;
mod rows;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval_at};

use super::bounded_lists;
use super::components::{degraded_components, hot_keys, refused_certificates};
use super::reload_status::ReloadStatus;
use super::state::SharedState;
use crate::tasks::{self, ServiceEnd, ServiceTask, TaskKind, TaskWait};
use crate::{serve, tls};
use history::{History, HistoryPoint, INTERVAL};
use rows::SamplePair;
use sample::{CounterSample, RequestRates, per_second};

/// Readers that ask within this time get the same state.
const STATE_KEPT: Duration = Duration::from_millis(500);

/// Client certificates of upstreams that are shown.
const UPSTREAM_CERTIFICATES_MAX: usize = 50;

/// The content of the dashboard.
pub(super) struct Dashboard {
    shared: Arc<SharedState>,
    is_draining: Rc<Cell<bool>>,
    reloads: Rc<ReloadStatus>,
    /// The newest sample, and the one before.
    samples: RefCell<[CounterSample; 2]>,
    history: RefCell<History>,
    latest: RefCell<Option<(Instant, Rc<str>)>>,
}

impl Dashboard {
    pub(super) fn new(shared: &Arc<SharedState>, is_draining: &Rc<Cell<bool>>, reloads: &Rc<ReloadStatus>) -> Rc<Self> {
        let snapshot = shared.snapshot.load();
        Rc::new(Dashboard {
            shared: Arc::clone(shared),
            is_draining: Rc::clone(is_draining),
            reloads: Rc::clone(reloads),
            samples: RefCell::new([CounterSample::take(&snapshot), CounterSample::take(&snapshot)]),
            history: RefCell::default(),
            latest: RefCell::new(None),
        })
    }

    /// Takes the samples until the returned task is dropped.
    pub(super) fn follow(self: &Rc<Self>) -> ServiceTask {
        let dashboard = Rc::clone(self);
        tasks::supervise(TaskKind::Dashboard, async move || {
            tasks::set_waiting_for(TaskWait::Timer);
            let mut ticks = interval_at(tokio::time::Instant::now() + INTERVAL, INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                dashboard.sample();
            }
            #[expect(unreachable_code, reason = "a service returns how it ended")]
            ServiceEnd::Failed
        })
    }

    fn sample(&self) {
        let current = CounterSample::take(&self.shared.snapshot.load());
        let mut samples = self.samples.borrow_mut();
        let [newest, before] = &mut *samples;
        let seconds = current.at.duration_since(newest.at).as_secs_f64();
        let (counts, denied) = current.totals_since(newest);
        self.history.borrow_mut().push(HistoryPoint {
            time: unix_time(),
            rates: RequestRates::of(&counts, seconds),
            denied: per_second(denied, seconds),
            connections: self.shared.connections.count(),
            in_flight: serve::requests_in_flight(),
        });
        *before = std::mem::replace(newest, current);
    }

    /// The points of the history from number `from` on, and the number of the next one.
    pub(super) fn history_since(&self, from: u64) -> (Vec<Value>, u64) {
        self.history.borrow().since(from)
    }

    /// The state as JSON, at most `STATE_KEPT` old.
    pub(super) fn state(&self) -> Rc<str> {
        let mut latest = self.latest.borrow_mut();
        match &*latest {
            Some((at, state)) if at.elapsed() < STATE_KEPT => Rc::clone(state),
            _ => {
                let state: Rc<str> = self.read().to_string().into();
                *latest = Some((Instant::now(), Rc::clone(&state)));
                state
            }
        }
    }

    fn read(&self) -> Value {
        let shared = &*self.shared;
        let snapshot = shared.snapshot.load();
        let samples = self.samples.borrow();
        let current = CounterSample::take(&snapshot);
        let [newest, before] = &*samples;
        let samples = SamplePair { earlier: rows::baseline([newest, before], current.at), current: &current };
        let (routes, routes_hidden) = rows::routes(&snapshot, &samples);
        let (breakers, breakers_hidden) = bounded_lists::breakers(&snapshot);
        let (upstreams, upstreams_hidden) = rows::upstreams(&snapshot, &samples);
        let (totals, denied) = samples.current.totals_since(samples.earlier);
        let mut totals = RequestRates::of(&totals, samples.seconds()).to_json();
        totals["denied_per_second"] = json!(per_second(denied, samples.seconds()));
        let config = shared.config.load();
        let local = shared.store.local_report();
        json!({
            "time": unix_time(),
            "version": env!("CARGO_PKG_VERSION"),
            "commit": env!("TIDEGATE_COMMIT"),
            "node": config.server.node,
            "uptime_seconds": shared.started_at.elapsed().as_secs(),
            "draining": self.is_draining.get(),
            "degraded": degraded_components(shared),
            "connections": shared.connections.count(),
            "connections_max": config.accept.connections,
            "requests_in_flight": serve::requests_in_flight(),
            "window_seconds": samples.seconds().round(),
            "totals": totals,
            "routes": routes,
            "routes_hidden": routes_hidden,
            "upstreams": upstreams,
            "upstreams_hidden": upstreams_hidden,
            "breakers": breakers,
            "breakers_hidden": breakers_hidden,
            "limits": rows::limits(&snapshot, &config.limit, &samples),
            "cache": { "entries": local.entries, "bytes": local.weight_bytes, "bytes_max": config.cache.memory_bytes },
            "shards": shared.store.shard_reports().map(|shard| rows::shard_row(&shard)).collect::<Vec<_>>(),
            "hot": hot_keys(shared),
            "certificates": self.certificates(),
            "refused_certificates": refused_certificates(shared)
                .into_iter()
                .map(|refused| json!({ "file": refused.file.display().to_string(), "error": refused.error }))
                .collect::<Vec<_>>(),
            "reload": self.reloads.to_json(snapshot.generation),
        })
    }

    /// The certificates of all listeners, and those with which upstreams are called.
    fn certificates(&self) -> Vec<Value> {
        let config = self.shared.config.load();
        let listeners = self.shared.tls_terminators.iter().zip(&config.listen);
        let certificates = listeners.filter_map(|(terminator, listen)| Some((terminator.as_ref()?, listen.address)));
        let rows = certificates.flat_map(|(terminator, address)| {
            let rows = terminator.certificates().into_iter().map(move |certificate| {
                json!({
                    "listener": address.to_string(),
                    "file": certificate.file.display().to_string(),
                    "names": certificate.names,
                    "expires_at": certificate.expires_at.map(unix_seconds),
                })
            });
            rows.collect::<Vec<_>>()
        });
        let upstreams = config.upstreams.iter().filter_map(|upstream| {
            let (file, leaf) = upstream.tls.as_ref()?.client_certificate()?;
            Some(json!({
                "listener": format!("to upstream {}", upstream.name),
                "file": file.display().to_string(),
                "names": tls::dns_names(&leaf).unwrap_or_default(),
                "expires_at": tls::not_after(&leaf).map(unix_seconds),
            }))
        });
        rows.chain(upstreams.take(UPSTREAM_CERTIFICATES_MAX)).collect()
    }
}

fn unix_time() -> f64 {
    unix_seconds(SystemTime::now())
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
