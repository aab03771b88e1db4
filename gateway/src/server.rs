//! The process: builds the runtime of a configuration, runs one thread per core, reloads, drains
//! and stops.
//!
//! The calling thread becomes the control thread: signals, the configuration file, the admin
//! address and the refresh of leases. Worker threads own their listeners, connections, upstream
//! pools and hot tables. All threads share one snapshot.

mod state;
mod resources;
mod last_reload;
mod assemble;
mod config_watcher;
mod override_publisher;
mod followed_upstreams;
mod key_set_refresher;
mod breakers;
mod bounded_lists;
mod components;
mod reload_status;
mod dashboard;
mod drain;
mod control;
mod connection;
mod worker;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::Instant;
use std::{io, num};

use arc_swap::ArcSwap;
use tokio::sync::watch as stage_channel;

use crate::accept::{self, ConnectionTable, ListenConfig};
use crate::cache::store_metrics;
use crate::config::Config;
use crate::event::{self, Event};
use crate::log::{self, AccessLog};
use crate::tls::{self, TlsTerminator};
use crate::{
    admin, discovery, identify, limit, metrics, pipeline, proxy_protocol, purge, route, serve, spans, tasks, upstream,
};
use control::ControlThread;
use state::{LifecycleStage, SharedState};

pub use state::ConfigSource;

/// Why the process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot use the certificates of {address}: {source}")]
    Tls { address: SocketAddr, source: Box<tls::TlsError> },
    #[error("cannot use the limits: {0}")]
    Limits(#[from] limiter::RuleError),
    #[error("cannot use the stores: {0}")]
    Store(#[from] shard::StoreConfigError),
    #[error("cannot open the access log: {0}")]
    AccessLog(io::Error),
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

/// The bound addresses, with the ports that the system chose.
#[derive(Clone, Debug)]
pub struct BoundAddresses {
    pub listen: Vec<SocketAddr>,
    pub admin: SocketAddr,
}

/// Runs until SIGTERM or SIGINT, then drains. Calls `on_ready` with the bound addresses once
/// connections are accepted.
///
/// # Errors
/// The process could not start. After the start, only a signal ends it.
pub fn run(config: Config, source: ConfigSource, on_ready: impl FnOnce(&BoundAddresses)) -> Result<(), StartError> {
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
    for ListenConfig { address, .. } in &config.listen {
        accept::check_unused(*address).map_err(|source| StartError::Listen { address: *address, source })?;
    }
    let mut listener_sockets = Vec::new();
    let mut tls_terminators = Vec::new();
    let mut bound = Vec::new();
    for listen in &config.listen {
        let fail = |source| StartError::Listen { address: listen.address, source };
        let sockets = accept::bind(listen, workers).map_err(fail)?;
        bound.push(sockets.first().map_or(Ok(listen.address), TcpListener::local_addr).map_err(fail)?);
        listener_sockets.push(sockets);
        let terminator = listen.tls.as_ref().map(TlsTerminator::new).transpose();
        let terminator =
            terminator.map_err(|source| StartError::Tls { address: listen.address, source: Box::new(source) })?;
        tls_terminators.push(terminator.map(Arc::new));
    }
    let admin_socket = TcpListener::bind(config.admin.address)
        .map_err(|source| StartError::Listen { address: config.admin.address, source })?;
    admin_socket.set_nonblocking(true)?;
    let bound = BoundAddresses { listen: bound, admin: admin_socket.local_addr()? };
    Event::DashboardReady { url: &format!("http://{}/", bound.admin) }.emit();
    let shared = Arc::new(SharedState {
        snapshot: Arc::new(ArcSwap::from_pointee(snapshot)),
        store,
        bus,
        fills: Arc::default(),
        connections: ConnectionTable::new(workers, config.accept.clone()),
        log: Arc::new(AccessLog::open(&config.log.access).map_err(StartError::AccessLog)?),
        proxy_protocol: config.listen.iter().map(|listen| listen.proxy_protocol).collect(),
        tls_terminators,
        started_at: Instant::now(),
        lease_node,
        config: ArcSwap::from_pointee(config),
    });
    expose_metrics(&shared);
    let (stage, stage_receiver) = stage_channel::channel(LifecycleStage::Serving);
    let mut threads = Vec::new();
    for index in 0..workers {
        let sockets = listener_sockets.iter_mut().filter_map(Vec::pop).collect::<Vec<_>>();
        let (shared, stage_receiver) = (Arc::clone(&shared), stage_receiver.clone());
        let thread = thread::Builder::new().name(format!("worker-{index}"));
        threads.push(thread.spawn(move || worker::run(index, sockets, &shared, stage_receiver))?);
    }
    let control = ControlThread { shared: Arc::clone(&shared), source, admin_socket, stage };
    control.run(|| on_ready(&bound))?;
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a worker thread panicked");
        }
    }
    shared.log.close();
    shared.snapshot.load().tracing.iter().for_each(|exporter| exporter.close());
    event::report_all_suppressed();
    Event::Stopped.emit();
    Ok(())
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
