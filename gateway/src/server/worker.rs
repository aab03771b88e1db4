//! One worker thread: its runtime, its listeners and its connections.

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::connection::spawn_connection;
use super::listeners::WorkerSockets;
use super::state::{DRAIN_POLL_INTERVAL, LifecycleStage, SharedState};
use crate::accept::{ListenerTask, QueueOwner};
use crate::pipeline::{Prebuilt429Cache, WorkerResources};
use crate::serve::{DrainStage, WorkerContext};
use crate::tasks::{self, ServiceEnd, TaskKind, TaskWait};
use crate::{degrade, metrics, upstream};

/// Interval at which a worker continues maintenance that was too much for one run.
const MAINTENANCE_CONTINUE_INTERVAL: Duration = Duration::from_millis(10);
/// Interval at which a worker sweeps its tables and its idle upstream connections.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(1);
/// Interval at which a worker submits its access log lines.
const LOG_FLUSH_INTERVAL: Duration = Duration::from_millis(100);
/// Timeout for the writes to shards that are queued when the worker ends.
const WRITE_FLUSH_TIMEOUT: Duration = Duration::from_millis(500);
/// How long connections get to end after the drain timeout.
const EXPIRE_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs until `stage` ends it: at `Closing` after the last connection has ended, at `Terminating`
/// at once.
pub(super) fn run(
    index: usize,
    sockets: WorkerSockets,
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
    sockets: WorkerSockets,
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
    for (listener, socket) in sockets {
        let listener_task = ListenerTask {
            socket,
            listener,
            proxy_protocol: shared.proxy_protocol[listener],
            worker: index,
            table: Arc::clone(&shared.connections),
        };
        let (context, shared, mut stage) = (Rc::clone(&context), Arc::clone(&shared), stage.clone());
        services.push(tasks::supervise(TaskKind::Listener, async move || {
            tasks::set_waiting_for(TaskWait::NewConnection);
            let serve = |accepted| spawn_connection(&context, &shared, accepted);
            let stop = async {
                tokio::select! {
                    biased;
                    () = shared.handed_over.wait_for(listener) => QueueOwner::Successor,
                    () = wait_for_stage(&mut stage, LifecycleStage::Closing) => QueueOwner::ThisProcess,
                }
            };
            match listener_task.run(stop, serve).await {
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
    context.enter(DrainStage::Draining);
    let mut closing = stage.clone();
    let finished = async {
        wait_for_stage(&mut closing, LifecycleStage::Closing).await;
        context.enter(DrainStage::Closing);
        while shared.connections.is_listening() || shared.connections.worker_connections(index) > 0 {
            sleep(DRAIN_POLL_INTERVAL).await;
        }
    };
    let mut finished = pin!(finished);
    tokio::select! {
        () = &mut finished => {}
        () = wait_for_stage(&mut stage, LifecycleStage::Terminating) => {
            context.enter(DrainStage::Expired);
            // They write their lines of the access log.
            let _late_ones_are_dropped = timeout(EXPIRE_TIMEOUT, finished).await;
        }
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
