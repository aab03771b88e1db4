//! One worker thread: its runtime, its listeners and its connections.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::state::{DRAIN_POLL_INTERVAL, LifecycleStage, SharedState};
use crate::accept::{AcceptedConnection, ListenerTask};
use crate::http::message::Scheme;
use crate::http::transport::TransportStream;
use crate::pipeline::{Prebuilt429Cache, WorkerResources};
use crate::serve::{self, WorkerContext};
use crate::tasks::{self, ServiceEnd, TaskKind, TaskWait};
use crate::tls::Alpn;
use crate::{degrade, metrics, upstream};

/// Interval at which a worker continues maintenance that was too much for one run.
const MAINTENANCE_CONTINUE_INTERVAL: Duration = Duration::from_millis(10);
/// Interval at which a worker sweeps its tables and its idle upstream connections.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(1);
/// Interval at which a worker submits its access log lines.
const LOG_FLUSH_INTERVAL: Duration = Duration::from_millis(100);
/// Timeout for the writes to shards that are queued when the worker ends.
const WRITE_FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs until `stage` ends it: at `Draining` after the last connection has ended, at `Terminating`
/// at once.
pub(super) fn run(
    index: usize,
    sockets: Vec<std::net::TcpListener>,
    shared: &Arc<SharedState>,
    stage: watch::Receiver<LifecycleStage>,
) {
    metrics::use_stripe(index, shared.connections.workers());
    let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "a worker has no runtime"),
    };
    runtime.block_on(serve_connections(index, sockets, Arc::clone(shared), stage));
}

async fn serve_connections(
    index: usize,
    sockets: Vec<std::net::TcpListener>,
    shared: Arc<SharedState>,
    mut stage: watch::Receiver<LifecycleStage>,
) {
    let worker = WorkerResources {
        key_builder: Cell::default(),
        view: shared.store.view(),
        fills: Arc::clone(&shared.fills),
        prebuilt_429: Prebuilt429Cache::default(),
        log: Arc::clone(&shared.log),
    };
    let context = WorkerContext::new(worker, Arc::clone(&shared.snapshot));
    let mut services = Vec::new();
    for (listener, socket) in sockets.into_iter().enumerate() {
        let listener_task = ListenerTask { socket, listener, worker: index, table: Arc::clone(&shared.connections) };
        let (context, shared, mut stage) = (Rc::clone(&context), Arc::clone(&shared), stage.clone());
        services.push(tasks::supervise(TaskKind::Listener, async move || {
            tasks::set_waiting_for(TaskWait::NewConnection);
            let serve = |accepted| spawn_connection(&context, &shared, accepted);
            match listener_task.run(wait_for_stage(&mut stage, LifecycleStage::Draining), serve).await {
                Ok(()) => ServiceEnd::Finished,
                Err(error) => {
                    tracing::error!(%error, "a listener failed");
                    ServiceEnd::Failed
                }
            }
        }));
    }
    let (incoming_context, incoming_shared) = (Rc::clone(&context), Arc::clone(&shared));
    let mut incoming = shared.connections.take_incoming(index);
    services.push(tasks::supervise(TaskKind::Incoming, async move || {
        tasks::set_waiting_for(TaskWait::NewConnection);
        while let Some(accepted) = incoming.next().await {
            spawn_connection(&incoming_context, &incoming_shared, accepted);
        }
        ServiceEnd::Finished
    }));
    let maintained = Rc::clone(&context);
    let maintenance = tasks::supervise(TaskKind::Maintenance, async move || {
        tasks::set_waiting_for(TaskWait::Timer);
        run_maintenance(&maintained).await
    });
    wait_for_stage(&mut stage, LifecycleStage::Draining).await;
    context.drain();
    let finished = async {
        while shared.connections.worker_connections(index) > 0 {
            sleep(DRAIN_POLL_INTERVAL).await;
        }
    };
    tokio::select! {
        () = finished => {}
        () = wait_for_stage(&mut stage, LifecycleStage::Terminating) => {}
    }
    drop(maintenance);
    if timeout(WRITE_FLUSH_TIMEOUT, context.worker.view.flush(WRITE_FLUSH_TIMEOUT)).await.is_err() {
        tracing::debug!("writes to shards were not finished");
    }
    context.worker.log.flush();
}

/// Updates `Date`, submits access log lines, and sweeps the thread's tables and idle upstream
/// connections. Never returns.
async fn run_maintenance(context: &WorkerContext) -> ServiceEnd {
    let (mut last_run, mut is_unfinished) = (Instant::now(), false);
    loop {
        degrade::update_date(context.worker.view.store().wall_time());
        sleep(if is_unfinished { MAINTENANCE_CONTINUE_INTERVAL } else { LOG_FLUSH_INTERVAL }).await;
        context.worker.log.flush();
        let is_due = last_run.elapsed() >= MAINTENANCE_INTERVAL;
        if is_due || is_unfinished {
            is_unfinished = context.worker.view.run_maintenance();
        }
        if is_due {
            last_run = Instant::now();
            upstream::sweep();
        }
    }
}

/// Waits for a stage. The sender lives as long as the control thread; a dropped sender counts as
/// the last stage. Cancel safe.
async fn wait_for_stage(stage: &mut watch::Receiver<LifecycleStage>, awaited: LifecycleStage) {
    let _reached_or_sender_dropped = stage.wait_for(|stage| *stage >= awaited).await;
}

/// Spawns the task of a connection. The task owns the permit and drops it when the connection ends.
fn spawn_connection(context: &Rc<WorkerContext>, shared: &Arc<SharedState>, accepted: AcceptedConnection) {
    let AcceptedConnection { stream, listener, peer, permit, .. } = accepted;
    let ip = peer.ip().to_canonical();
    let context = Rc::clone(context);
    let Some(terminator) = shared.tls_terminators.get(listener).cloned().flatten() else {
        tasks::spawn(TaskKind::Connection, async move {
            tasks::set_waiting_for(TaskWait::ClientHead);
            serve::serve_h1(context, TransportStream::plain(stream), ip, Scheme::Http).await;
            drop(permit);
        });
        return;
    };
    tasks::spawn(TaskKind::Connection, async move {
        tasks::set_waiting_for(TaskWait::TlsHandshake);
        let handshake_timeout = context.snapshot.load().http.header_timeout;
        let accepted = terminator.accept(stream, handshake_timeout).await;
        tasks::set_waiting_for(TaskWait::ClientHead);
        match accepted {
            Ok((stream, Alpn::H2)) => serve::serve_h2(context, stream, ip, Scheme::Https).await,
            Ok((stream, Alpn::H1)) => serve::serve_h1(context, TransportStream::tls(stream), ip, Scheme::Https).await,
            // Counted and logged by the terminator.
            Err(_failed_handshake) => {}
        }
        drop(permit);
    });
}
