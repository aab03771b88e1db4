//! The process: builds what a configuration describes, runs one thread per core, reloads, drains and stops.
//!
//! This thread is the control: signals, the configuration file, the admin address and the asking loops of cluster limits.
//! Worker threads own their listeners, connections, upstream pools and hot tables; between them goes only a shared site.

mod assemble;
mod control;
mod resources;
mod trials;
mod watch;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch as signal;

use crate::accept::{self, Floor};
use crate::cache::fill::Fills;
use crate::cache::stored::Meta;
use crate::config::Config;
use crate::event::Event;
use crate::log::AccessLog;
use crate::pipeline::Site;
use crate::{admin, event, identify, limit, log, pipeline, serve, tls};

/// Why the process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot listen on {address}: {source}")]
    Listen { address: std::net::SocketAddr, source: std::io::Error },
    #[error("cannot use the certificates of {address}: {source}")]
    Tls { address: std::net::SocketAddr, source: tls::TlsError },
    #[error("cannot use the limits: {0}")]
    Limits(#[from] limiter::RuleError),
    #[error("cannot use the stores: {0}")]
    Store(#[from] shard::StoreError),
    #[error("cannot open the access log: {0}")]
    AccessLog(std::io::Error),
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
}

/// What workers are told to do; it only ever goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Serving,
    /// Take no more connections and finish what runs.
    Draining,
    /// Leave what still runs.
    Ending,
}

/// What all threads share.
pub(crate) struct Shared {
    pub(crate) site: Arc<ArcSwap<Site>>,
    pub(crate) config: ArcSwap<Config>,
    pub(crate) store: Arc<shard::Store<Meta>>,
    pub(crate) bus: Arc<shard::Bus<Meta>>,
    pub(crate) fills: Arc<Fills>,
    pub(crate) floor: Arc<Floor>,
    pub(crate) log: Arc<AccessLog>,
    pub(crate) acceptors: Vec<Option<Arc<tls::Acceptor>>>,
    pub(crate) began: Instant,
    /// This process among the gateways of a fleet, for the shares of cluster limits.
    pub(crate) identity: u64,
}

/// Where the configuration came from, so that it can be read again.
#[derive(Clone, Debug)]
pub enum Origin {
    File(PathBuf),
    /// Made from arguments: there is nothing to read again.
    Arguments,
}

/// The addresses that were bound, with the ports the system chose.
#[derive(Clone, Debug)]
pub struct Bound {
    pub listen: Vec<std::net::SocketAddr>,
    pub admin: std::net::SocketAddr,
}

/// Runs until SIGTERM or SIGINT, then drains. `on_ready` is told the bound addresses once connections are taken.
///
/// # Errors
/// What keeps the process from starting; once it runs, nothing ends it but a signal.
pub fn run(config: Config, origin: Origin, on_ready: impl FnOnce(&Bound)) -> Result<(), StartError> {
    let workers = worker_count(&config);
    Event::Starting { version: env!("CARGO_PKG_VERSION"), workers, node: &config.server.node }.emit();
    resources::raise_descriptors(config.accept.connections);
    tls::install_provider();
    let store = assemble::store(&config)?;
    // Before anybody reads: what was purged while this node was away has to be known first.
    let bus = shard::Bus::new(&store, &config.server.node);
    let identity = assemble::process_identity();
    let site = assemble::site(&config, &store, identity, None)?;
    let mut doors = Vec::new();
    let mut acceptors = Vec::new();
    let mut bound = Vec::new();
    for listen in &config.listen {
        let fail = |source| StartError::Listen { address: listen.address, source };
        let sockets = accept::bind(listen, workers).map_err(fail)?;
        bound.push(sockets.first().map_or(Ok(listen.address), std::net::TcpListener::local_addr).map_err(fail)?);
        doors.push(sockets);
        let acceptor = listen.tls.as_ref().map(tls::Acceptor::new).transpose();
        let acceptor = acceptor.map_err(|source| StartError::Tls { address: listen.address, source })?;
        acceptors.push(acceptor.map(Arc::new));
    }
    let admin_socket = std::net::TcpListener::bind(config.admin.address)
        .map_err(|source| StartError::Listen { address: config.admin.address, source })?;
    admin_socket.set_nonblocking(true)?;
    let bound = Bound { listen: bound, admin: admin_socket.local_addr()? };
    let shared = Arc::new(Shared {
        site: Arc::new(ArcSwap::from_pointee(site)),
        store,
        bus,
        fills: Arc::default(),
        floor: Floor::new(workers, config.accept.clone()),
        log: Arc::new(AccessLog::open(&config.log.access).map_err(StartError::AccessLog)?),
        acceptors,
        began: Instant::now(),
        identity,
        config: ArcSwap::from_pointee(config),
    });
    expose(&shared);
    let (stage, staged) = signal::channel(Stage::Serving);
    let mut threads = Vec::new();
    for index in 0..workers {
        let sockets = doors.iter_mut().filter_map(Vec::pop).collect::<Vec<_>>();
        let (shared, staged) = (Arc::clone(&shared), staged.clone());
        let thread = thread::Builder::new().name(format!("worker-{index}"));
        threads.push(thread.spawn(move || worker::run(index, sockets, &shared, staged))?);
    }
    control::run(&shared, origin, admin_socket, stage, || on_ready(&bound))?;
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a worker thread panicked");
        }
    }
    shared.log.close();
    Event::Stopped.emit();
    Ok(())
}

fn worker_count(config: &Config) -> usize {
    match config.server.workers {
        0 => thread::available_parallelism().map_or(1, std::num::NonZero::get),
        workers => workers,
    }
}

fn expose(shared: &Arc<Shared>) {
    event::expose();
    log::expose();
    identify::expose();
    limit::expose();
    pipeline::expose();
    serve::expose();
    accept::expose(&shared.floor);
    resources::expose();
    assemble::expose(shared);
}

/// How soon a worker goes on to tidy what could not be done in one go.
pub(crate) const UNTIDY_EVERY: Duration = Duration::from_millis(10);
/// How often a worker tidies its tables and its idle upstream connections.
pub(crate) const TIDY_EVERY: Duration = Duration::from_secs(1);
/// How often a worker hands over its access log lines.
pub(crate) const FLUSH_EVERY: Duration = Duration::from_millis(100);

/// The state of the admin address that a reload may change.
pub(crate) type AdminSettings = Arc<ArcSwap<admin::Settings>>;
