//! The watch of one service as its users hold it.

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::api::ServiceKey;
use super::watcher::ServiceState;

/// A message to the thread of the watches. A reload sends a few for each service.
pub(super) enum WatchCommand {
    Start(u64, ServiceKey, watch::Sender<ServiceState>),
    Stop(u64),
}

/// The watch of one service. It ends when this is dropped.
pub(super) struct ServiceWatch {
    id: u64,
    state: watch::Receiver<ServiceState>,
    commands: UnboundedSender<WatchCommand>,
}

impl ServiceWatch {
    /// Starts the watch `id` of `service` on the thread that receives `commands`.
    pub(super) fn start(id: u64, service: ServiceKey, commands: UnboundedSender<WatchCommand>) -> Self {
        let (sender, state) = watch::channel(ServiceState::default());
        // Without the thread the sender is dropped, which the source tells.
        let _thread_has_ended = commands.send(WatchCommand::Start(id, service, sender));
        ServiceWatch { id, state, commands }
    }

    pub(super) fn state(&self) -> watch::Receiver<ServiceState> {
        self.state.clone()
    }
}

impl Drop for ServiceWatch {
    fn drop(&mut self) {
        let _thread_has_ended = self.commands.send(WatchCommand::Stop(self.id));
    }
}
