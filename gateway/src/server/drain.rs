//! The end of the process: the signal or the successor, and the drain of the connections after it.
//!
//! After SIGTERM, load balancers and clients learn with their next response, or by `/ready`, that
//! this process ends. Until they have, or a grace is over, connections are accepted and idle ones
//! kept. Invariant: every stage ends at `server.drain_timeout`.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::state::{DRAIN_POLL_INTERVAL, LifecycleStage, SharedState};
use crate::accept::ConnectionTable;
use crate::config::ServerConfig;
use crate::event::Event;

/// The grace ends early when no connection has been open for so long.
const UNUSED_TIME: Duration = Duration::from_secs(1);

/// The signals that shut the process down.
pub(super) struct ShutdownSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl ShutdownSignals {
    pub(super) fn new() -> io::Result<Self> {
        Ok(ShutdownSignals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for one of them. Cancel safe.
    pub(super) async fn recv(&mut self) -> DrainKind {
        tokio::select! {
            _ = self.terminate.recv() => DrainKind::WithGrace,
            _ = self.interrupt.recv() => DrainKind::AtOnce,
        }
    }
}

/// Whether clients are given time to learn of the drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DrainKind {
    /// SIGTERM: load balancers and clients with idle connections still send requests.
    WithGrace,
    /// SIGINT: a person waits for the end.
    AtOnce,
    /// A successor accepts the connections; only kept ones still send requests.
    HandedOver,
}

/// Waits for the connections to end. Ends early at the drain timeout and at a second shutdown
/// signal. A service manager that stops the service signals every process of it: the first signal
/// after a hand-over changes nothing, since the process drains already.
pub(super) async fn drain(
    shared: &SharedState,
    stage: &watch::Sender<LifecycleStage>,
    (kind, shutdown_signals): (DrainKind, &mut ShutdownSignals),
) {
    let (connections, table) = (shared.connections.count(), &shared.connections);
    Event::Draining { connections }.emit();
    stage.send_replace(LifecycleStage::Draining);
    let ServerConfig { drain_timeout, drain_idle, .. } = shared.config.load().server;
    let finished = async {
        if kind != DrainKind::AtOnce {
            // Whichever is earlier.
            _ = timeout(drain_idle, wait_until_unused(table)).await;
        }
        stage.send_replace(LifecycleStage::Closing);
        while table.is_listening() || table.count() > 0 {
            sleep(DRAIN_POLL_INTERVAL).await;
        }
    };
    let interrupted = async {
        if kind == DrainKind::HandedOver {
            shutdown_signals.recv().await;
        }
        shutdown_signals.recv().await;
    };
    tokio::select! {
        () = finished => {}
        () = sleep(drain_timeout) => Event::DrainTimedOut { connections: table.count() }.emit(),
        () = interrupted => Event::DrainInterrupted { connections: table.count() }.emit(),
    }
    stage.send_replace(LifecycleStage::Terminating);
}

/// Waits until no connection has been open for `UNUSED_TIME`.
async fn wait_until_unused(table: &ConnectionTable) {
    let (mut accepted, mut unused_since) = (table.accepted(), Instant::now());
    while unused_since.elapsed() < UNUSED_TIME {
        sleep(DRAIN_POLL_INTERVAL).await;
        let before = std::mem::replace(&mut accepted, table.accepted());
        if table.count() > 0 || accepted != before {
            unused_since = Instant::now();
        }
    }
}
