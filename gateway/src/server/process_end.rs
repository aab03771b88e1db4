//! The begin and the end of the service of this process, as its predecessor, its successor and the
//! service manager see them.
//!
//! Invariant: at any time after the start, one process says that it accepts connections.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::drain::{DrainKind, ShutdownSignals};
use super::listeners::TakenListeners;
use super::service_manager::{NotifiedState, ServiceManager};
use super::start_error::{StartError, UpgradeError};
use super::state::SharedState;
use super::upgrade::{HandOver, SuccessorProcess, TakeOver, TakeOverEnd, UpgradeServer};
use crate::event::Event;
use crate::simple_server::SimpleServerStage;

/// Timeout for all listener tasks to accept, after the start of their threads.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval at which that is checked.
const ACCEPT_POLL_INTERVAL: Duration = Duration::from_millis(2);

/// The parts of the process in binary upgrades: as successor, then as predecessor.
pub(super) struct UpgradeRoles {
    pub(super) take_over: Option<TakeOver>,
    pub(super) taken: TakenListeners,
    /// Listener tasks of all workers.
    pub(super) listening: usize,
    pub(super) server: Option<UpgradeServer>,
}

/// Why the process ends.
pub(super) enum ProcessEnd {
    Signal(DrainKind),
    HandedOver(HandOver),
    /// The predecessor goes on, and accepts from the sockets that were taken.
    Refused(UpgradeError, TakenListeners),
}

impl UpgradeRoles {
    /// As a successor: waits until all workers accept, and then has the predecessor stop. Makes the
    /// upgrade socket known.
    ///
    /// # Errors
    /// The predecessor goes on, or this process cannot be upgraded as it is configured to be.
    pub(super) async fn take_over(&mut self, shared: &SharedState) -> Result<(), UpgradeError> {
        if let Some(take_over) = self.take_over.take() {
            let all_accept = async {
                while shared.connections.listening() < self.listening {
                    sleep(ACCEPT_POLL_INTERVAL).await;
                }
            };
            timeout(ACCEPT_TIMEOUT, all_accept).await.map_err(|_elapsed| UpgradeError::NotAccepting)?;
            let (pid, version, listeners) = (take_over.pid, take_over.version.clone(), self.taken.theirs.len());
            match take_over.announce(self.taken.theirs.clone(), self.taken.admin).await? {
                TakeOverEnd::Draining => Event::TookOver { pid, version: &version, listeners }.emit(),
                TakeOverEnd::Lost(error) => Event::PredecessorLost { error: &error }.emit(),
            }
        }
        self.server.as_mut().map_or(Ok(()), UpgradeServer::publish)
    }

    /// Waits for the end of the process. SIGUSR2 starts a successor.
    ///
    /// # Errors
    /// The system does not deliver the signal.
    pub(super) async fn wait_for_end(&mut self, signals: &mut ShutdownSignals) -> io::Result<ProcessEnd> {
        let mut upgrade_requests = signal(SignalKind::user_defined2())?;
        let path = self.server.as_ref().map(|server| server.path().to_owned());
        let mut successor = SuccessorProcess::new();
        let server = &mut self.server;
        let mut handed_over = std::pin::pin!(async {
            match server {
                Some(server) => server.serve().await,
                None => std::future::pending().await,
            }
        });
        loop {
            tokio::select! {
                kind = signals.recv() => return Ok(ProcessEnd::Signal(kind)),
                hand_over = &mut handed_over => return Ok(ProcessEnd::HandedOver(hand_over)),
                _ = upgrade_requests.recv() => successor.start(path.as_deref()),
                never = successor.watch() => match never {},
            }
        }
    }
}

/// The parts of a process that ends its service.
pub(super) struct LeavingProcess<'a> {
    pub(super) shared: &'a SharedState,
    pub(super) manager: &'a ServiceManager,
    pub(super) admin_stage: &'a watch::Sender<SimpleServerStage>,
    pub(super) is_draining: &'a Cell<bool>,
}

impl LeavingProcess<'_> {
    /// Leaves the sockets of a successor to it, and says so. Returns how to drain, and the result
    /// of the process.
    pub(super) async fn leave(&self, end: ProcessEnd) -> (DrainKind, Result<(), StartError>) {
        match end {
            ProcessEnd::Signal(kind) => {
                self.is_draining.set(true);
                self.manager.notify(NotifiedState::Stopping);
                (kind, Ok(()))
            }
            ProcessEnd::HandedOver(hand_over) => {
                let HandOver { pid, ref version, ref listeners, admin, .. } = hand_over;
                let kept = self.shared.proxy_protocol.len() - listeners.len();
                Event::HandedOver { pid, version, listeners: listeners.len(), kept }.emit();
                self.shared.handed_over.add(listeners.iter().copied());
                self.leave_admin(admin);
                // Before the successor says that it is ready.
                self.manager.notify(NotifiedState::HandedOver { pid });
                hand_over.confirm().await;
                (DrainKind::HandedOver, Ok(()))
            }
            ProcessEnd::Refused(error, taken) => {
                self.shared.handed_over.add(taken.own);
                self.leave_admin(taken.admin);
                (DrainKind::HandedOver, Err(error.into()))
            }
        }
    }

    /// An admin address that another process has is ready as that process is.
    fn leave_admin(&self, is_left: bool) {
        self.is_draining.set(!is_left);
        if is_left {
            // The receiver is dropped if the admin task has ended.
            let _receiver_may_be_gone = self.admin_stage.send(SimpleServerStage::HandedOver);
        }
    }
}
