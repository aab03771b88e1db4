//! The process: builds the runtime of a configuration, runs one thread per core, reloads, drains
//! and stops.
//!
//! The calling thread becomes the control thread: signals, the configuration file, the admin
//! address, upgrades and the refresh of leases. Worker threads own their listeners, connections,
//! upstream pools and hot tables. All threads share one snapshot.

mod start_error;
mod state;
mod resources;
mod last_reload;
mod assemble;
mod config_watcher;
mod breakers;
mod breaker_publisher;
mod override_publisher;
mod followed_upstreams;
mod key_set_refresher;
mod bounded_lists;
mod components;
mod reload_status;
mod dashboard;
mod service_manager;
mod drain;
mod listeners;
mod upgrade;
mod first_lookups;
mod process_end;
mod control;
mod connection;
mod worker;

use std::net::SocketAddr;
use std::num;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::watch as stage_channel;

use crate::accept::{self, ConnectionTable};
use crate::cache::store_metrics;
use crate::config::Config;
use crate::event::{self, Event};
use crate::log::{self, AccessLog};
use crate::tls::{self, TlsTerminator};
use crate::{
    admin, discovery, identify, limit, metrics, pipeline, proxy_protocol, purge, route, serve, spans, tasks, upstream,
};
use control::ControlThread;
use listeners::{InheritedSockets, Listeners};
use process_end::UpgradeRoles;
use state::{HandedOverListeners, LifecycleStage, SharedState};
use upgrade::{IsSuccessor, TakeOver, UpgradeServer};

pub use start_error::{StartError, UpgradeError};
pub use state::ConfigSource;

/// The bound addresses, with the ports that the system chose.
#[derive(Clone, Debug)]
pub struct BoundAddresses {
    pub listen: Vec<SocketAddr>,
    pub admin: SocketAddr,
}

/// How the process starts.
#[derive(Clone, Debug)]
pub enum StartMode {
    /// On addresses that are free, or that the service manager has bound.
    Fresh,
    /// Takes over from the gateway whose upgrade socket this is; `None`: `server.upgrade_socket`.
    Upgrade { socket: Option<PathBuf> },
}

/// Runs until SIGTERM, SIGINT or a successor, then drains. Calls `on_ready` with the bound
/// addresses once connections are accepted.
///
/// # Errors
/// The process could not start. After the start, only a signal or a successor ends it.
pub fn run(
    config: Config,
    (source, mode): (ConfigSource, StartMode),
    on_ready: impl FnOnce(&BoundAddresses),
) -> Result<(), StartError> {
    let workers = worker_count(&config);
    Event::Starting { version: env!("CARGO_PKG_VERSION"), workers, node: &config.server.node }.emit();
    resources::raise_descriptors(config.accept.connections);
    tls::install_crypto_provider();
    let store = assemble::store(&config)?;
    // Before the first read: purges that this node missed while it was away have to be applied
    // first.
    let bus = shard::Bus::new(&store, &config.server.node);
    let lease_node = assemble::random_number();
    let snapshot = assemble::snapshot(&config, &store, lease_node, None)?;
    let log = AccessLog::open(&config.log.access);
    let log_path = || config.log.access.path().map(Path::to_owned);
    let log = Arc::new(log.map_err(|source| StartError::AccessLog { path: log_path(), source })?);
    let tls_terminators = tls_terminators(&config)?;
    // As late as possible: the predecessor waits from here on.
    let (take_over, inherited) = inherit(&config, mode)?;
    let listeners = Listeners::open(&config, workers, inherited)?;
    let worker_sockets = listeners.by_worker(workers)?;
    let listening = worker_sockets.iter().map(Vec::len).sum();
    let bound = BoundAddresses {
        listen: listeners.listen.iter().map(|listener| listener.bound).collect(),
        admin: listeners.admin.bound,
    };
    let admin_socket = listeners.admin.sockets[0].try_clone()?;
    Event::DashboardReady { url: &format!("http://{}/", bound.admin) }.emit();
    let is_successor = if take_over.is_some() { IsSuccessor::Yes } else { IsSuccessor::No };
    let taken = listeners.taken.clone();
    let upgrade_server = match &config.server.upgrade_socket {
        Some(path) => Some(UpgradeServer::new(path, listeners, is_successor)?),
        None => {
            // Sockets that no worker accepts from must not stay open in a drain.
            drop(listeners);
            None
        }
    };
    let shared = Arc::new(SharedState {
        snapshot: Arc::new(ArcSwap::from_pointee(snapshot)),
        store,
        bus,
        fills: Arc::default(),
        connections: ConnectionTable::new(workers, config.accept.clone()),
        log,
        proxy_protocol: config.listen.iter().map(|listen| listen.proxy_protocol).collect(),
        http2: config.listen.iter().map(|listen| listen.http2).collect(),
        tls_terminators,
        handed_over: HandedOverListeners::default(),
        started_at: Instant::now(),
        lease_node,
        config: ArcSwap::from_pointee(config),
    });
    expose_metrics(&shared);
    let (stage, stage_receiver) = stage_channel::channel(LifecycleStage::Serving);
    let mut threads = Vec::new();
    for (index, sockets) in worker_sockets.into_iter().enumerate() {
        let (shared, stage_receiver) = (Arc::clone(&shared), stage_receiver.clone());
        let thread = thread::Builder::new().name(format!("worker-{index}"));
        threads.push(thread.spawn(move || worker::run(index, sockets, &shared, stage_receiver))?);
    }
    let roles = UpgradeRoles { take_over, taken, listening, server: upgrade_server };
    let control = ControlThread { shared: Arc::clone(&shared), source, admin_socket, stage, roles };
    let ended = control.run(|| on_ready(&bound));
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a worker thread panicked");
        }
    }
    shared.log.close();
    shared.snapshot.load().tracing.iter().for_each(|exporter| exporter.close());
    event::report_all_suppressed();
    Event::Stopped.emit();
    ended
}

/// The sockets that another process has opened.
fn inherit(config: &Config, mode: StartMode) -> Result<(Option<TakeOver>, InheritedSockets), StartError> {
    let StartMode::Upgrade { socket } = mode else {
        return Ok((None, InheritedSockets::from_systemd(config).map_err(StartError::Activation)?));
    };
    let path = socket.or_else(|| config.server.upgrade_socket.clone()).ok_or(UpgradeError::NoPath)?;
    let (take_over, inherited) = TakeOver::request(&path)?;
    Ok((Some(take_over), inherited))
}

fn tls_terminators(config: &Config) -> Result<Vec<Option<Arc<TlsTerminator>>>, StartError> {
    let terminator = |listen: &accept::ListenConfig| match listen.tls.as_ref().map(TlsTerminator::new).transpose() {
        Ok(terminator) => Ok(terminator.map(Arc::new)),
        Err(source) => Err(StartError::Tls { address: listen.address, source: Box::new(source) }),
    };
    config.listen.iter().map(terminator).collect()
}

fn worker_count(config: &Config) -> usize {
    match config.server.workers {
        0 => thread::available_parallelism().map_or(1, num::NonZero::get),
        workers => workers,
    }
}

/// Registers the metrics of all modules. The current snapshot is read at scrape time, so that a
/// reload takes effect.
fn expose_metrics(shared: &Arc<SharedState>) {
    event::expose();
    log::expose();
    identify::expose();
    pipeline::expose();
    serve::expose();
    resources::expose();
    last_reload::expose();
    tasks::expose();
    spans::expose();
    admin::expose();
    accept::expose(&shared.connections);
    proxy_protocol::expose();
    store_metrics::expose(&shared.store);
    purge::expose(&shared.bus);
    let snapshot = Arc::clone(&shared.snapshot);
    limit::expose(move |visit| snapshot.load().limiter.leases().for_each(|(rule, lease)| visit(rule, lease)));
    let snapshot = Arc::clone(&shared.snapshot);
    route::expose(move |visit| snapshot.load().routes.iter().for_each(&mut *visit));
    discovery::expose();
    let snapshot = Arc::clone(&shared.snapshot);
    upstream::expose(move |visit| snapshot.load().upstreams.iter().for_each(|upstream| visit(upstream)));
    let terminators = shared.tls_terminators.clone();
    let config = Arc::clone(shared);
    tls::expose(
        move |visit| terminators.iter().flatten().for_each(|terminator| visit(terminator)),
        move |visit| {
            let config = config.config.load();
            let certificates =
                config.upstreams.iter().filter_map(|upstream| upstream.tls.as_ref()?.client_certificate());
            certificates.for_each(|(path, leaf)| visit(path, &leaf));
        },
    );
    let shared = Arc::clone(shared);
    metrics::expose_gauge_with("tidegate_info", "Always 1; the labels are version, commit and node.", move |emit| {
        let (version, commit) = (env!("CARGO_PKG_VERSION"), env!("TIDEGATE_COMMIT"));
        emit(&[("version", version), ("commit", commit), ("node", &shared.config.load().server.node)], 1.0);
    });
}
