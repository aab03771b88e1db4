//! The control thread: admin address, signals, reloads, leases of cluster limits, news of shards, and the drain.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use limiter::Lease;
use serde_json::json;
use shard::{BreakerState, Fault, FaultCounts, RedisTreasury, ShardReport};
use tokio::runtime::{Builder, LocalOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{sleep, timeout};

use super::trials::Trials;
use super::watch::Watch;
use super::{AdminSettings, Origin, Shared, Stage, StartError, assemble};
use crate::admin::{self, Readiness, Views};
use crate::breaker;
use crate::cache::key;
use crate::config::Config;
use crate::event::{self, Event};
use crate::limit;
use crate::purge::{BadOrder, Order, Outcome};
use crate::serve;

/// Between two looks at the connections that are left.
const DRAIN_GLANCE: Duration = Duration::from_millis(10);
/// How often shards are looked at for news.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long after the start a cluster limit may be without its first grant.
const FIRST_GRANTS: Duration = Duration::from_secs(1);
/// How long the other nodes of a fleet have to confirm what they are told.
pub(super) const CONFIRM_WITHIN: Duration = Duration::from_secs(3);
/// What saying goodbye to a fleet may take.
const LEAVE_WITHIN: Duration = Duration::from_millis(200);
/// How long after the start a server's purges may be unknown.
const FIRST_SIGHT: Duration = Duration::from_secs(1);
/// Seconds by which the clocks of two nodes may differ.
const CLOCK_TOLERANCE: f64 = 1.5;
/// What one asking of a treasury may take; nobody waits for it.
const TREASURY_DEADLINE: Duration = Duration::from_millis(100);

/// Runs until a signal says stop; tells the workers by `stage`, waits for the drain, and gives leases back.
pub(super) fn run(
    shared: &Arc<Shared>,
    origin: Origin,
    admin_socket: std::net::TcpListener,
    stage: watch::Sender<Stage>,
    on_ready: impl FnOnce(),
) -> Result<(), StartError> {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(control(shared, origin, admin_socket, stage, on_ready))
}

async fn control(
    shared: &Arc<Shared>,
    origin: Origin,
    admin_socket: std::net::TcpListener,
    stage: watch::Sender<Stage>,
    on_ready: impl FnOnce(),
) -> Result<(), StartError> {
    let admin_settings: AdminSettings = Arc::new(ArcSwap::from_pointee(shared.config.load().admin.clone()));
    let listener = tokio::net::TcpListener::from_std(admin_socket)?;
    let (is_draining, trials) = (Rc::new(Cell::new(false)), Rc::new(Trials::new(shared)));
    let (admin_stop, admin_stopped) = watch::channel(false);
    let admin = spawn_local(admin::serve(
        listener,
        Arc::clone(&admin_settings),
        views(shared, &is_draining, &trials),
        admin_stopped,
    ));
    let mut endings = Endings::new()?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut watch = Watch::new();
    if let Origin::File(file) = &origin {
        watch.renew(files(file, &shared.config.load()));
    }
    let bus = shared.bus.run();
    let news = spawn_local(tell_news(Arc::clone(shared)));
    let suppliers = Suppliers::default();
    suppliers.renew(shared);
    Event::Ready.emit();
    on_ready();
    loop {
        let source = tokio::select! {
            () = endings.next() => break,
            _ = hangup.recv() => {
                shared.log.reopen();
                watch.look();
                "signal"
            }
            () = shared.bus.notices_changed() => {
                trials.heed();
                suppliers.renew(shared);
                continue;
            }
            () = watch.changed() => "file",
        };
        if let Origin::File(file) = &origin {
            reload(shared, file, source, &admin_settings);
            watch.renew(files(file, &shared.config.load()));
            trials.heed();
            suppliers.renew(shared);
        }
    }
    is_draining.set(true);
    drain(shared, &stage, &mut endings).await;
    news.abort();
    suppliers.end().await;
    drop(bus);
    if timeout(LEAVE_WITHIN, shared.bus.leave()).await.is_err() {
        tracing::debug!("the fleet could not be told that this node leaves");
    }
    // The receiver may be gone already if the admin task ended.
    let _gone = admin_stop.send(true);
    admin.abort();
    Ok(())
}

/// The signals that end the process.
struct Endings {
    terminate: Signal,
    interrupt: Signal,
}

impl Endings {
    fn new() -> std::io::Result<Self> {
        Ok(Endings { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for one of them. Cancel safe.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Every file whose change reloads.
fn files(document: &Path, config: &Config) -> Vec<PathBuf> {
    std::iter::once(document.to_owned()).chain(config.files.iter().cloned()).collect()
}

/// Lets connections end, at most for the drain timeout or until another signal says to leave at once.
async fn drain(shared: &Shared, stage: &watch::Sender<Stage>, endings: &mut Endings) {
    let connections = shared.floor.connections();
    Event::Draining { connections }.emit();
    stage.send_replace(Stage::Draining);
    let finished = async {
        while shared.floor.connections() > 0 {
            sleep(DRAIN_GLANCE).await;
        }
    };
    let timeout = shared.config.load().server.drain_timeout;
    tokio::select! {
        () = finished => {}
        () = sleep(timeout) => Event::DrainTimedOut { connections: shared.floor.connections() }.emit(),
        () = endings.next() => Event::DrainInterrupted { connections: shared.floor.connections() }.emit(),
    }
    stage.send_replace(Stage::Ending);
}

/// Reads the file again and swaps the site, or keeps the old one and says why.
fn reload(shared: &Arc<Shared>, file: &Path, source: &str, admin: &AdminSettings) {
    let (config, warnings) = match Config::load(file) {
        Ok(loaded) => loaded,
        Err(report) => {
            Event::ReloadRefused { faults: report.faults().len() }.emit();
            eprintln!("{report}");
            return;
        }
    };
    if !warnings.is_empty() {
        eprintln!("{warnings}");
    }
    let old = shared.config.load_full();
    let site = match assemble::site(&config, &shared.store, shared.identity, Some(&shared.site.load())) {
        Ok(site) => site,
        Err(error) => {
            tracing::error!(%error, "the limits of the new configuration cannot be used");
            return Event::ReloadRefused { faults: 1 }.emit();
        }
    };
    tell_what_needs_a_restart(&old, &config);
    shared.floor.set(config.accept.clone());
    shared.acceptors.iter().flatten().for_each(|acceptor| acceptor.reload());
    admin.store(Arc::new(config.admin.clone()));
    event::set_level(config.log.level);
    shared.site.store(Arc::new(site));
    shared.config.store(Arc::new(config));
    Event::Reloaded { source }.emit();
}

fn tell_what_needs_a_restart(old: &Config, new: &Config) {
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
        (old.admin.address != new.admin.address, "admin.address"),
        (old.cache.memory_bytes != new.cache.memory_bytes, "cache.memory"),
        (old.cache.hot_rate != new.cache.hot_rate, "cache.hot_rate"),
        (remote(old) != remote(new), "redis"),
        (old.log.access != new.log.access, "log.access"),
    ];
    changes.iter().filter(|(changed, _)| *changed).for_each(|(_, what)| Event::ReloadNeedsRestart { what }.emit());
}

/// The loops that keep cluster limits supplied, one per rule.
#[derive(Default)]
struct Suppliers {
    running: RefCell<HashMap<Arc<str>, Supplier>>,
}

struct Supplier {
    lease: Arc<Lease>,
    treasury: Arc<RedisTreasury>,
    task: JoinHandle<()>,
}

impl Suppliers {
    /// Starts loops for leases that are new and ends those of leases that are gone.
    fn renew(&self, shared: &Shared) {
        let site = shared.site.load();
        let mut running = self.running.borrow_mut();
        running.retain(|name, supplier| {
            let is_kept =
                site.limiter.leases().any(|(rule, lease)| rule == name && Arc::ptr_eq(lease, &supplier.lease));
            if !is_kept {
                supplier.task.abort();
            }
            is_kept
        });
        for (rule, lease) in site.limiter.leases() {
            if running.contains_key(rule) {
                continue;
            }
            let Some(treasury) = RedisTreasury::new(&shared.store, rule, TREASURY_DEADLINE).map(Arc::new) else {
                continue;
            };
            let task = spawn_local(limit::supply(Arc::clone(lease), Arc::clone(&treasury)));
            running.insert(Arc::clone(rule), Supplier { lease: Arc::clone(lease), treasury, task });
        }
    }

    /// Ends every loop and gives unused tokens back.
    async fn end(self) {
        for (_, supplier) in self.running.take() {
            supplier.task.abort();
            let returned = timeout(2 * TREASURY_DEADLINE, limit::give_back(&supplier.lease, &*supplier.treasury)).await;
            if returned.is_err() {
                tracing::debug!("unused tokens could not be given back in time");
            }
        }
    }
}

/// A lane of a shard as it was at the last look.
#[derive(Default)]
struct LaneSeen {
    is_down: bool,
    faults: FaultCounts,
    latest: Option<Fault>,
}

/// Says when a lane of a shard goes down or comes back.
async fn tell_news(shared: Arc<Shared>) {
    let mut lanes_seen: HashMap<(String, String, &str), LaneSeen> = HashMap::new();
    let mut on_share = HashSet::new();
    let mut is_off = false;
    loop {
        for shard in shared.store.shards() {
            // At the start a server is seen only after a moment.
            let is_seen = shard.is_watched || shared.began.elapsed() < FIRST_SIGHT;
            let sight = if is_seen { BreakerState::Closed } else { BreakerState::Open };
            let lanes = [
                ("read", shard.reads, &shard.read_faults),
                ("read_large", shard.large, &shard.large_faults),
                ("write", shard.writes, &shard.write_faults),
                ("bus", sight, &shard.bus_faults),
            ];
            for (lane, state, faults) in lanes {
                let (region, endpoint) = (shard.region.as_str(), shard.endpoint.as_str());
                let seen = lanes_seen.entry((region.to_owned(), endpoint.to_owned(), lane)).or_default();
                seen.latest = faults.latest(&seen.faults).or(seen.latest);
                seen.faults = *faults;
                if state == BreakerState::Open && !seen.is_down {
                    seen.is_down = true;
                    let fault = seen.latest.map_or("unknown", Fault::name);
                    Event::ShardDown { region, endpoint, lane, fault: &fault }.emit();
                }
                // Half-open is neither: it has failed and has not yet succeeded.
                if state == BreakerState::Closed && seen.is_down {
                    seen.is_down = false;
                    Event::ShardUp { region, endpoint, lane }.emit();
                }
            }
        }
        tell_of_limits(&shared, &mut on_share);
        is_off = tell_of_the_clock(&shared, is_off);
        sleep(LOOK_EVERY).await;
    }
}

/// Says when this machine's wall clock goes wrong, and when it is right again.
fn tell_of_the_clock(shared: &Shared, was_off: bool) -> bool {
    let seconds = shared.store.clock_offset();
    let is_off = seconds.abs() > CLOCK_TOLERANCE;
    match (was_off, is_off) {
        (false, true) => Event::ClockOff { seconds }.emit(),
        (true, false) => Event::ClockBack.emit(),
        _ => {}
    }
    is_off
}

/// Says when a cluster limit leaves its common bucket, or comes back to it.
fn tell_of_limits(shared: &Shared, on_share: &mut HashSet<Arc<str>>) {
    // Without Redis a share is all there ever is; at the start the first grant is still under way.
    if !shared.store.has_default_region() || shared.began.elapsed() < FIRST_GRANTS {
        return;
    }
    for (rule, lease) in shared.site.load().limiter.leases() {
        if !limit::is_on_share(lease) {
            if on_share.remove(rule) {
                Event::LimitSupplied { rule }.emit();
            }
        } else if on_share.insert(Arc::clone(rule)) {
            Event::LimitOnShare { rule }.emit();
        }
    }
}

fn views(shared: &Arc<Shared>, is_draining: &Rc<Cell<bool>>, trials: &Rc<Trials>) -> Views {
    let (ready_shared, ready_draining) = (Arc::clone(shared), Rc::clone(is_draining));
    let (status_shared, status_draining) = (Arc::clone(shared), Rc::clone(is_draining));
    let (purge_shared, hot_shared, trials) = (Arc::clone(shared), Arc::clone(shared), Rc::clone(trials));
    Views {
        ready: Box::new(move || {
            let draining = ready_draining.get();
            Readiness { ready: !draining, draining, degraded: degraded(&ready_shared) }
        }),
        status: Box::new(move || status(&status_shared, status_draining.get())),
        hot: Box::new(move || hot(&hot_shared)),
        limits: Box::new(move |inquiry| Box::pin(Rc::clone(&trials).inquire(inquiry))),
        purge: Box::new(move |order| Box::pin(follow(Arc::clone(&purge_shared), order))),
    }
}

/// Purges here and on the other nodes of the fleet.
async fn follow(shared: Arc<Shared>, order: Order) -> Result<Outcome, BadOrder> {
    let purges = order.purges(&shared.site.load().cache)?;
    let confirmed = shared.bus.purge(&purges, order.node.as_deref(), CONFIRM_WITHIN).await?;
    let list = |names: std::collections::BTreeSet<String>| names.into_iter().collect();
    let outcome = Outcome {
        acknowledged: list(confirmed.nodes),
        missing: list(confirmed.missing),
        untold: list(confirmed.untold),
    };
    Event::Purged { what: &order.told(), soft: order.is_soft, missing: outcome.missing.len() }.emit();
    Ok(outcome)
}

/// What works less well than it should.
fn degraded(shared: &Shared) -> Vec<String> {
    let site = shared.site.load();
    let breakers = site.routes.iter().filter(|route| route.breaker.state() != breaker::State::Closed);
    let breakers = breakers.map(|route| format!("breaker {}", route.settings.name));
    let is_degraded = |shard: &ShardReport| {
        let lanes = [shard.reads, shard.large, shard.writes];
        lanes.iter().any(|lane| *lane != BreakerState::Closed) || !shard.is_watched
    };
    let shards = shared.store.shards().filter(is_degraded);
    breakers.chain(shards.map(|shard| format!("shard {} {}", shard.region, shard.endpoint))).collect()
}

/// What is asked for most, the hottest first.
fn hot(shared: &Shared) -> serde_json::Value {
    let keys: Vec<_> = shared
        .store
        .hot_keys()
        .iter()
        .map(|hot| json!({ "key": key::told(&hot.key.as_key()), "per_second": hot.per_second.round() }))
        .collect();
    json!({ "from_per_second": shared.store.hot_rate(), "keys": keys })
}

fn status(shared: &Shared, draining: bool) -> serde_json::Value {
    let site = shared.site.load();
    let routes: Vec<_> = site
        .routes
        .iter()
        .map(|route| json!({ "name": &*route.settings.name, "breaker": route.breaker.state().as_str() }))
        .collect();
    let shards: Vec<_> = shared
        .store
        .shards()
        .map(|shard| {
            json!({
                "region": shard.region.as_str(),
                "endpoint": shard.endpoint.to_string(),
                "available": shard.reads == BreakerState::Closed && shard.is_watched,
                "hits": shard.counts.hits,
                "misses": shard.counts.misses,
            })
        })
        .collect();
    let local = shared.store.local_report();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "node": shared.config.load().server.node,
        "uptime_seconds": shared.began.elapsed().as_secs(),
        "draining": draining,
        "connections": shared.floor.connections(),
        "requests_in_flight": serve::requests_in_flight(),
        "cache": { "entries": local.entries, "bytes": local.weight_bytes, "pinned": local.pinned },
        "routes": routes,
        "shards": shards,
    })
}
