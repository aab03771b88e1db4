//! The control thread: admin address, signals, reloads, leases of cluster limits, state changes of
//! shards, and the drain.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use std::{io, net};

use arc_swap::ArcSwap;
use limiter::Lease;
use serde_json::json;
use shard::{BusLoop, RedisLeaseBackend, ShardBreakerState, ShardFault, ShardFaultCounts, ShardTaskKind};
use tokio::runtime::{Builder, LocalOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::components::{degraded_components, hot_keys};
use super::config_watcher::ConfigWatcher;
use super::dashboard::Dashboard;
use super::drain::{ShutdownSignals, drain};
use super::first_lookups::FirstLookups;
use super::followed_upstreams::FollowedUpstreams;
use super::key_set_refresher::KeySetRefresher;
use super::override_publisher::OverridePublisher;
use super::process_end::{LeavingProcess, ProcessEnd, UpgradeRoles};
use super::reload_status::ReloadStatus;
use super::service_manager::{NotifiedState, ServiceManager};
use super::start_error::StartError;
use super::state::{ACKNOWLEDGEMENT_TIMEOUT, ConfigSource, LifecycleStage, SharedAdminConfig, SharedState, check_node};
use super::upgrade::IsSuccessor;
use super::{assemble, bounded_lists, breakers, last_reload, resources};
use crate::admin::{self, AdminViews, LiveSources, ReadinessReport};
use crate::cache::stored::CacheMeta;
use crate::config::{Config, ConfigFault, ConfigFile, ConfigReport, FaultSeverity};
use crate::event::{self, Event};
use crate::limit;
use crate::purge::{PurgeOrder, PurgeOrderError, PurgeOutcome};
use crate::serve;
use crate::simple_server::SimpleServerStage;
use crate::tasks::{self, ServiceEnd, ServiceTask, TaskKind, TaskWait};
use crate::tls::TlsConfig;

/// Interval at which the states of shards and limits are checked for changes.
const STATE_CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Grace period after the start for the first grant of a cluster limit.
const FIRST_GRANT_GRACE: Duration = Duration::from_secs(1);
/// Grace period after the start for the subscription to a shard's purges.
const SUBSCRIPTION_GRACE: Duration = Duration::from_secs(1);
/// Timeout for leaving the fleet.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(200);
/// Seconds by which the clocks of two nodes may differ.
const CLOCK_TOLERANCE: f64 = 1.5;
/// Faults of one configuration that a reload writes to the log: more say nothing new, and a file of
/// another kind has one in each line.
const FAULTS_REPORTED_MAX: usize = 50;
/// Timeout of one lease request. No client request waits for it.
const LEASE_REQUEST_TIMEOUT: Duration = Duration::from_millis(100);

/// The resources of the control thread.
pub(super) struct ControlThread {
    pub(super) shared: Arc<SharedState>,
    pub(super) source: ConfigSource,
    pub(super) admin_socket: net::TcpListener,
    /// Sends the stages of the shutdown to the workers.
    pub(super) stage: watch::Sender<LifecycleStage>,
    pub(super) roles: UpgradeRoles,
}

impl ControlThread {
    /// Runs until a signal or a successor stops the process. Then drains the workers and returns
    /// unused lease tokens.
    pub(super) fn run(self, on_ready: impl FnOnce()) -> Result<(), StartError> {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
        runtime.block_on(self.control(on_ready))
    }

    async fn control(self, on_ready: impl FnOnce()) -> Result<(), StartError> {
        let ControlThread { shared, source, admin_socket, stage, mut roles } = self;
        let admin_config: SharedAdminConfig = Arc::new(ArcSwap::from_pointee(shared.config.load().admin.clone()));
        let listener = tokio::net::TcpListener::from_std(admin_socket)?;
        let (is_draining, overrides) = (Rc::new(Cell::new(false)), Rc::new(OverridePublisher::new(&shared)));
        let (admin_stage, followed_stage) = watch::channel(SimpleServerStage::Serving);
        let reload_status = Rc::new(ReloadStatus::default());
        let dashboard = Dashboard::new(&shared, &is_draining, &reload_status);
        let sampling = dashboard.follow();
        let is_successor = if roles.take_over.is_some() { IsSuccessor::Yes } else { IsSuccessor::No };
        let first_lookups = FirstLookups::new(is_successor);
        let views = Rc::new(admin_views(&shared, (&is_draining, first_lookups), &overrides, &dashboard));
        let served_config = Arc::clone(&admin_config);
        let admin = tasks::supervise(TaskKind::Admin, async move || {
            tasks::set_waiting_for(TaskWait::NewConnection);
            admin::serve(&listener, Arc::clone(&served_config), Rc::clone(&views), followed_stage.clone()).await;
            ServiceEnd::Finished
        });
        let mut shutdown_signals = ShutdownSignals::new()?;
        let manager = Rc::new(ServiceManager::from_environment());
        let bus = follow_bus(&shared);
        let reported = Arc::clone(&shared);
        let state_changes = tasks::supervise(TaskKind::StateReport, async move || {
            tasks::set_waiting_for(TaskWait::Timer);
            report_state_changes(&reported).await
        });
        let leases = Rc::new(LeaseRefresher::default());
        leases.refresh_leases_of(&shared);
        let key_sets = Rc::new(KeySetRefresher::default());
        key_sets.refresh_key_set_of(&shared);
        let mut followed = FollowedUpstreams::new(&shared);
        followed.follow(&shared);
        let services =
            ReloadedServices { overrides: Rc::clone(&overrides), leases: Rc::clone(&leases), key_sets, followed };
        let reloads = Reloader::new(source, (&shared, &manager), admin_config)?.watch(services, reload_status);
        let (changed_leases, changed_shared) = (Rc::clone(&leases), Arc::clone(&shared));
        let override_changes = tasks::supervise(TaskKind::Overrides, async move || {
            tasks::set_waiting_for(TaskWait::Change);
            loop {
                overrides.changed().await;
                overrides.apply_overrides();
                changed_leases.refresh_leases_of(&changed_shared);
            }
        });
        let end = match roles.take_over(&shared).await {
            Ok(()) => {
                Event::Ready.emit();
                manager.notify(NotifiedState::Ready);
                on_ready();
                roles.wait_for_end(&mut shutdown_signals).await?
            }
            Err(error) => ProcessEnd::Refused(error, roles.taken.clone()),
        };
        drop((reloads, override_changes));
        // Closes the upgrade socket, and its copies of the listening sockets.
        drop(roles);
        let leaving =
            LeavingProcess { shared: &shared, manager: &manager, admin_stage: &admin_stage, is_draining: &is_draining };
        let (kind, ended) = leaving.leave(end).await;
        drain(&shared, &stage, (kind, &mut shutdown_signals)).await;
        drop(state_changes);
        leases.shut_down().await;
        drop(bus);
        if timeout(LEAVE_TIMEOUT, shared.bus.leave()).await.is_err() {
            tracing::debug!("could not announce to the fleet that this node leaves");
        }
        // The receiver is dropped if the admin task has ended.
        let _receiver_may_be_gone = admin_stage.send(SimpleServerStage::Stopped);
        drop((admin, sampling));
        ended
    }
}

/// Runs the loops of the bus.
fn follow_bus(shared: &SharedState) -> Vec<ServiceTask> {
    let follow = |bus_loop: BusLoop<CacheMeta>| {
        tasks::supervise(TaskKind::Bus, async move || {
            tasks::set_waiting_for(TaskWait::Shard);
            bus_loop.run().await;
            ServiceEnd::Failed
        })
    };
    shared.bus.loops().into_iter().map(follow).collect()
}

/// The services that a reload gives new work.
struct ReloadedServices {
    overrides: Rc<OverridePublisher>,
    leases: Rc<LeaseRefresher>,
    key_sets: Rc<KeySetRefresher>,
    followed: FollowedUpstreams,
}

/// Reloads the configuration at SIGHUP and when one of its files changes.
struct Reloader {
    source: ConfigSource,
    shared: Arc<SharedState>,
    /// The configuration of the start: some of its settings stay until a restart.
    started_with: Arc<Config>,
    admin_config: SharedAdminConfig,
    hangup: Signal,
    watcher: ConfigWatcher,
    manager: Rc<ServiceManager>,
}

impl Reloader {
    fn new(
        source: ConfigSource,
        (shared, manager): (&Arc<SharedState>, &Rc<ServiceManager>),
        admin_config: SharedAdminConfig,
    ) -> io::Result<Self> {
        let (hangup, mut watcher) = (signal(SignalKind::hangup())?, ConfigWatcher::new());
        if let ConfigSource::File(file) = &source {
            watcher.watch_files(watched_files(file, &shared.config.load()));
        }
        let started_with = shared.config.load_full();
        let (shared, manager) = (Arc::clone(shared), Rc::clone(manager));
        Ok(Reloader { source, shared, started_with, admin_config, hangup, watcher, manager })
    }

    /// Starts the service. A reload applies the overrides and the leases to the new limits, fetches
    /// the key set of the new tokens, and follows the new upstreams.
    fn watch(mut self, services: ReloadedServices, status: Rc<ReloadStatus>) -> ServiceTask {
        let ReloadedServices { overrides, leases, key_sets, mut followed } = services;
        tasks::supervise(TaskKind::Reload, async move || {
            tasks::set_waiting_for(TaskWait::Change);
            loop {
                let trigger = self.triggered().await;
                let ConfigSource::File(file) = &self.source else { continue };
                self.manager.notify(NotifiedState::Reloading);
                self.reload(file, trigger, &status);
                self.manager.notify(NotifiedState::Ready);
                followed.follow(&self.shared);
                self.watcher.watch_files(watched_files(file, &self.shared.config.load()));
                overrides.apply_overrides();
                leases.refresh_leases_of(&self.shared);
                key_sets.refresh_key_set_of(&self.shared);
            }
        })
    }

    /// Reads the file again and swaps the snapshot. If the file has faults, reports them and keeps
    /// the old snapshot.
    fn reload(&self, file: &Path, trigger: &str, status: &ReloadStatus) {
        let shared = &self.shared;
        let (mut config, warnings) = match Config::reload(file) {
            Ok(loaded) => loaded,
            Err(report) => {
                let (errors, warnings) = (report.count(FaultSeverity::Error), report.count(FaultSeverity::Warning));
                report_faults(&report);
                last_reload::record_failure();
                status.record_refused(trigger, &report);
                return Event::ReloadRefused { errors, warnings }.emit();
            }
        };
        if !warnings.is_empty() {
            report_faults(&warnings);
        }
        let restart = changed_restart_settings(&self.started_with, &config);
        keep_restart_settings(&self.started_with, &mut config);
        let snapshot =
            match assemble::snapshot(&config, &shared.store, shared.lease_node, Some(&shared.snapshot.load())) {
                Ok(snapshot) => snapshot,
                Err(error) => {
                    last_reload::record_failure();
                    tracing::error!(%error, "the limits of the new configuration cannot be used");
                    status.record_failed(trigger, &error);
                    return Event::ReloadRefused { errors: 1, warnings: warnings.count(FaultSeverity::Warning) }.emit();
                }
            };
        restart.iter().for_each(|setting| Event::ReloadNeedsRestart { setting }.emit());
        if config.accept.connections != shared.config.load().accept.connections {
            resources::raise_descriptors(config.accept.connections);
        }
        shared.connections.set_limits(config.accept.clone());
        shared.tls_terminators.iter().flatten().for_each(|terminator| terminator.reload());
        self.admin_config.store(Arc::new(config.admin.clone()));
        event::set_level(config.log.level);
        limit::take_over(&snapshot.limiter, &shared.snapshot.load().limiter);
        shared.snapshot.store(Arc::new(snapshot));
        shared.config.store(Arc::new(config));
        last_reload::record_success();
        status.record_loaded(trigger, &warnings, &restart);
        Event::Reloaded { source: trigger }.emit();
    }

    /// Waits for a signal or a changed file. A signal also reopens the access log. Cancel safe.
    async fn triggered(&mut self) -> &'static str {
        tokio::select! {
            _ = self.hangup.recv() => {
                self.shared.log.reopen();
                self.watcher.compare_contents();
                "signal"
            }
            () = self.watcher.changed() => "file",
        }
    }
}

/// The files whose changes trigger a reload.
fn watched_files(document: &Path, config: &Config) -> Vec<ConfigFile> {
    let document = ConfigFile { path: document.to_owned(), contents: config.document };
    std::iter::once(document).chain(config.files.iter().cloned()).collect()
}

/// Emits an event for each fault, up to `FAULTS_REPORTED_MAX`; `reload_refused` counts all.
fn report_faults(report: &ConfigReport) {
    for fault in report.faults().iter().take(FAULTS_REPORTED_MAX) {
        let ConfigFault { path: key, message, code, .. } = fault;
        let (file, (line, column), code) = (report.name(), report.position(fault), code.as_str());
        let (fault, hint, is_error) = (&**message, fault.hint.as_deref(), fault.severity == FaultSeverity::Error);
        match is_error {
            true => Event::ConfigError { file, line, column, key, code, fault, hint }.emit(),
            false => Event::ConfigWarning { file, line, column, key, code, fault, hint }.emit(),
        }
    }
}

/// The names of the settings that differ from those of the running process and take effect only
/// after a restart. Reported at every reload, until they are in effect or changed back.
fn changed_restart_settings(old: &Config, new: &Config) -> Vec<&'static str> {
    let remote = |config: &Config| {
        config.remote.as_ref().map(|remote| {
            let regions = remote.regions.iter().map(|(region, shards)| {
                (*region, shards.slots, shards.endpoints.clone(), shards.cluster.clone(), shards.fallback.clone())
            });
            (
                remote.deadline,
                remote.secret.clone(),
                remote.object_bytes,
                (remote.compression, remote.compress_from),
                remote.hot_copies,
                remote.tls.clone(),
                regions.collect::<Vec<_>>(),
            )
        })
    };
    let changes = [
        (old.listen != new.listen, "listen"),
        (old.server.workers != new.server.workers, "server.workers"),
        (old.server.node != new.server.node, "server.node"),
        (old.server.upgrade_socket != new.server.upgrade_socket, "server.upgrade_socket"),
        (old.admin.address != new.admin.address, "admin.address"),
        (old.cache.memory_bytes != new.cache.memory_bytes, "cache.memory"),
        (old.cache.hot_rate != new.cache.hot_rate, "cache.hot_rate"),
        (remote(old) != remote(new), "redis"),
        (old.log.access != new.log.access, "log.access"),
    ];
    changes.iter().filter(|(is_changed, _)| *is_changed).map(|(_, setting)| *setting).collect()
}

/// Sets the settings of `changed_restart_settings` to those of the running process, so that none
/// is in effect in part: they are also shown, compared with, and exported.
fn keep_restart_settings(running: &Config, new: &mut Config) {
    if new.listen != running.listen {
        // A renewed certificate of a running listener is loaded, whatever the file names.
        let tls = running.listen.iter().filter_map(|listen| listen.tls.as_ref());
        new.files.extend(tls.flat_map(TlsConfig::files).map(ConfigFile::before_use));
        new.listen.clone_from(&running.listen);
    }
    new.server.workers = running.server.workers;
    new.server.node.clone_from(&running.server.node);
    new.server.upgrade_socket.clone_from(&running.server.upgrade_socket);
    new.admin.address = running.admin.address;
    new.cache.memory_bytes = running.cache.memory_bytes;
    new.cache.hot_rate = running.cache.hot_rate;
    new.remote.clone_from(&running.remote);
    new.log.access.clone_from(&running.log.access);
}

/// The tasks that refresh the leases of cluster limits, one for each rule.
#[derive(Default)]
struct LeaseRefresher {
    tasks: RefCell<HashMap<Arc<str>, LeaseTask>>,
}

/// A running task that refreshes one lease, with the lease and its Redis backend.
struct LeaseTask {
    lease: Arc<Lease>,
    backend: Arc<RedisLeaseBackend>,
    task: ServiceTask,
}

impl LeaseRefresher {
    /// Starts tasks for the new leases of the current snapshot and stops those of leases that are
    /// not in it.
    fn refresh_leases_of(&self, shared: &SharedState) {
        let snapshot = shared.snapshot.load();
        let mut running = self.tasks.borrow_mut();
        running.retain(|name, running| {
            snapshot.limiter.leases().any(|(rule, lease)| rule == name && Arc::ptr_eq(lease, &running.lease))
        });
        for (rule, lease) in snapshot.limiter.leases() {
            if running.contains_key(rule) {
                continue;
            }
            let Some(backend) = RedisLeaseBackend::new(&shared.store, rule, LEASE_REQUEST_TIMEOUT).map(Arc::new) else {
                continue;
            };
            let (refreshed, used) = (Arc::clone(lease), Arc::clone(&backend));
            let task = tasks::supervise(TaskKind::Lease, async move || {
                tasks::set_waiting_for(TaskWait::Timer);
                limit::refresh_lease(&refreshed, &*used).await;
                ServiceEnd::Failed
            });
            running.insert(Arc::clone(rule), LeaseTask { lease: Arc::clone(lease), backend, task });
        }
    }

    /// Stops every task and returns unused tokens.
    async fn shut_down(&self) {
        for (_, LeaseTask { lease, backend, task }) in self.tasks.take() {
            drop(task);
            let returned = timeout(2 * LEASE_REQUEST_TIMEOUT, limit::return_tokens(&lease, &*backend)).await;
            if returned.is_err() {
                tracing::debug!("unused tokens could not be returned in time");
            }
        }
    }
}

/// State of one operation class of a shard at the last check.
#[derive(Default)]
struct OperationState {
    is_down: bool,
    faults: ShardFaultCounts,
    latest_fault: Option<ShardFault>,
}

/// Emits events when an operation class of a shard goes down or recovers, and when a breaker, a
/// limit or the clock changes its state.
async fn report_state_changes(shared: &SharedState) -> ServiceEnd {
    let mut states: HashMap<(String, String, &str), OperationState> = HashMap::new();
    let mut local_fallback = HashSet::new();
    let mut is_clock_skewed = false;
    let mut panics = ShardTaskKind::ALL.map(ShardTaskKind::panics);
    loop {
        panics = report_shard_panics(panics);
        event::report_suppressed();
        breakers::advance(&shared.snapshot.load());
        for shard in shared.store.shard_reports() {
            // After the start, the subscription takes a moment.
            let is_subscribed = shard.is_subscribed || shared.started_at.elapsed() < SUBSCRIPTION_GRACE;
            let bus = if is_subscribed { ShardBreakerState::Closed } else { ShardBreakerState::Open };
            let operations = [
                ("read", shard.reads, &shard.read_faults),
                ("read_large", shard.large_reads, &shard.large_read_faults),
                ("write", shard.writes, &shard.write_faults),
                ("bus", bus, &shard.bus_faults),
            ];
            for (operation, breaker, faults) in operations {
                let (region, endpoint) = (shard.region.as_str(), shard.endpoint.as_str());
                let state = states.entry((region.to_owned(), endpoint.to_owned(), operation)).or_default();
                state.latest_fault = faults.most_frequent_since(&state.faults).or(state.latest_fault);
                state.faults = *faults;
                if breaker == ShardBreakerState::Open && !state.is_down {
                    state.is_down = true;
                    let fault = state.latest_fault.map_or("unknown", ShardFault::name);
                    Event::ShardDown { region, endpoint, operation, fault: &fault }.emit();
                }
                // Half-open changes nothing: the operations have failed and have not yet succeeded.
                if breaker == ShardBreakerState::Closed && state.is_down {
                    state.is_down = false;
                    Event::ShardUp { region, endpoint, operation }.emit();
                }
            }
        }
        report_local_fallback(shared, &mut local_fallback);
        is_clock_skewed = report_clock_skew(shared, is_clock_skewed);
        sleep(STATE_CHECK_INTERVAL).await;
    }
}

/// Emits an event if tasks of shards have panicked since `before`. Returns the current counts.
fn report_shard_panics(before: [u64; ShardTaskKind::ALL.len()]) -> [u64; ShardTaskKind::ALL.len()] {
    let now = ShardTaskKind::ALL.map(ShardTaskKind::panics);
    for (kind, (now, before)) in ShardTaskKind::ALL.into_iter().zip(now.into_iter().zip(before)) {
        if now > before {
            Event::TaskPanicked { kind: kind.name(), panic: "the panic itself is on standard error" }.emit();
        }
    }
    now
}

/// Emits an event when this machine's wall clock becomes wrong or right again. Returns whether it
/// is wrong.
fn report_clock_skew(shared: &SharedState, was_skewed: bool) -> bool {
    let seconds = shared.store.clock_offset();
    let is_skewed = seconds.abs() > CLOCK_TOLERANCE;
    match (was_skewed, is_skewed) {
        (false, true) => Event::ClockSkewed { seconds }.emit(),
        (true, false) => Event::ClockRecovered.emit(),
        _ => {}
    }
    is_skewed
}

/// Emits an event when a cluster limit switches to its local fallback or back to the shared bucket.
fn report_local_fallback(shared: &SharedState, local_fallback: &mut HashSet<Arc<str>>) {
    // Without Redis the local share is the normal state; after the start the first grant takes a
    // moment.
    if !shared.store.has_default_region() || shared.started_at.elapsed() < FIRST_GRANT_GRACE {
        return;
    }
    for (rule, lease) in shared.snapshot.load().limiter.leases() {
        if !limit::is_local_fallback(lease) {
            if local_fallback.remove(rule) {
                Event::LimitLeaseRestored { rule }.emit();
            }
        } else if local_fallback.insert(Arc::clone(rule)) {
            Event::LimitLocalFallback { rule }.emit();
        }
    }
}

fn admin_views(
    shared: &Arc<SharedState>,
    (is_draining, first_lookups): (&Rc<Cell<bool>>, FirstLookups),
    overrides: &Rc<OverridePublisher>,
    dashboard: &Rc<Dashboard>,
) -> AdminViews {
    let (ready_shared, ready_draining) = (Arc::clone(shared), Rc::clone(is_draining));
    let (status_shared, status_draining) = (Arc::clone(shared), Rc::clone(is_draining));
    let (purge_shared, hot_shared) = (Arc::clone(shared), Arc::clone(shared));
    let (overrides, of_breakers) = (Rc::clone(overrides), Rc::clone(overrides));
    let (state_dashboard, history_dashboard) = (Rc::clone(dashboard), Rc::clone(dashboard));
    AdminViews {
        ready: Box::new(move || {
            let draining = ready_draining.get();
            let awaited = first_lookups.awaited(&ready_shared);
            let is_known = awaited.is_empty();
            let mut degraded = degraded_components(&ready_shared);
            degraded.splice(0..0, awaited);
            // The dashboard shows the faults in place of this line.
            if last_reload::has_failed() {
                degraded.insert(0, "configuration: the last reload was refused".to_owned());
            }
            ReadinessReport { ready: !draining && is_known, draining, degraded }
        }),
        live: Rc::new(LiveSources {
            state: Box::new(move || state_dashboard.state()),
            history: Box::new(move |from| history_dashboard.history_since(from)),
        }),
        status: Box::new(move || status(&status_shared, status_draining.get())),
        hot: Box::new(move || hot_keys(&hot_shared)),
        limits: Box::new(move |query| Box::pin(Rc::clone(&overrides).query(query))),
        breakers: Box::new(move |query| Box::pin(Rc::clone(&of_breakers).breaker_query(query))),
        purge: Box::new(move |order| Box::pin(purge(Arc::clone(&purge_shared), order))),
    }
}

/// Purges here and on the other nodes of the fleet.
async fn purge(shared: Arc<SharedState>, order: PurgeOrder) -> Result<PurgeOutcome, PurgeOrderError> {
    let purges = order.purges(&shared.snapshot.load().cache)?;
    if let Some(node) = &order.node
        && let Err(nodes) = check_node(&shared, node).await
    {
        return Err(PurgeOrderError::UnknownNode { node: node.clone(), nodes });
    }
    let report = shared.bus.purge(&purges, order.node.as_deref(), ACKNOWLEDGEMENT_TIMEOUT).await?;
    let list = |names: BTreeSet<String>| names.into_iter().collect();
    let outcome = PurgeOutcome {
        acknowledged_nodes: list(report.acknowledged_nodes),
        unacknowledged_nodes: list(report.unacknowledged_nodes),
        unreachable_servers: list(report.unreachable_servers),
    };
    Event::Purged {
        targets: &order.description(),
        soft: order.is_soft,
        unacknowledged_nodes: outcome.unacknowledged_nodes.len(),
        unreachable_servers: outcome.unreachable_servers.len(),
    }
    .emit();
    Ok(outcome)
}

fn status(shared: &SharedState, draining: bool) -> serde_json::Value {
    let snapshot = shared.snapshot.load();
    let (routes, routes_hidden) = bounded_lists::routes(&snapshot);
    let (upstreams, upstreams_hidden) = bounded_lists::upstreams(&snapshot);
    let (breakers, breakers_hidden) = bounded_lists::breakers(&snapshot);
    let shards: Vec<_> = shared
        .store
        .shard_reports()
        .map(|shard| {
            json!({
                "region": shard.region.as_str(),
                "endpoint": shard.endpoint.to_string(),
                "available": shard.reads == ShardBreakerState::Closed && shard.is_subscribed,
                "hits": shard.counts.hits,
                "misses": shard.counts.misses,
            })
        })
        .collect();
    let local = shared.store.local_report();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "node": shared.config.load().server.node,
        "uptime_seconds": shared.started_at.elapsed().as_secs(),
        "draining": draining,
        "connections": shared.connections.count(),
        "requests_in_flight": serve::requests_in_flight(),
        "cache": { "entries": local.entries, "bytes": local.weight_bytes, "pinned": local.pinned },
        "upstreams": upstreams,
        "upstreams_hidden": upstreams_hidden,
        "routes": routes,
        "routes_hidden": routes_hidden,
        "breakers": breakers,
        "breakers_hidden": breakers_hidden,
        "shards": shards,
    })
}
