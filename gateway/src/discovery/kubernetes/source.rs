//! A service of Kubernetes as a source of endpoints: what its watch knows, for one port.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::service_watch::ServiceWatch;
use super::slice_set::ServicePort;
use super::watcher::ServiceState;
use crate::discovery::{EndpointSource, LookupError, SourceAnswer};
use crate::endpoint::EndpointAddress;
use crate::tasks::{self, TaskWait};

/// Shortest time between two answers: a rollout changes slices many times a second, and each answer
/// makes a new set of all endpoints.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// The endpoints of one service at one port.
#[derive(Clone)]
pub(crate) struct KubernetesSource {
    /// Keeps the watch running.
    _watch: Rc<ServiceWatch>,
    state: watch::Receiver<ServiceState>,
    port: ServicePort,
    own_zone: Option<String>,
    /// The limit of the first list.
    limit: Duration,
    /// The revision of the last answer; 0: there was none.
    answered: u64,
    answered_at: Option<Instant>,
    /// A failure is known that has not been told, because there was a newer answer.
    has_failure: bool,
}

impl KubernetesSource {
    pub(super) fn new(
        watch: Rc<ServiceWatch>,
        origin: &EndpointAddress,
        own_zone: Option<String>,
        limit: Duration,
    ) -> Self {
        let (state, port) = (watch.state(), ServicePort::of(origin));
        KubernetesSource {
            _watch: watch,
            state,
            port,
            own_zone,
            limit,
            answered: 0,
            answered_at: None,
            has_failure: false,
        }
    }

    /// The limit of the first lookup.
    pub(in crate::discovery) fn limit(&self) -> Duration {
        self.limit
    }
}

impl EndpointSource for KubernetesSource {
    fn waits_for(&self) -> TaskWait {
        TaskWait::ApiServer
    }

    async fn lookup(&mut self) -> Result<SourceAnswer, LookupError> {
        let is_known = |state: &ServiceState| state.slices.is_some() || state.error.is_some();
        if self.state.wait_for(is_known).await.is_err() {
            return Err(LookupError::Server("the thread that watches Kubernetes has ended".to_owned()));
        }
        let state = self.state.borrow_and_update().clone();
        let is_new = state.revision != self.answered;
        // A new answer is told before a failure that came after it.
        self.has_failure = is_new && state.error.is_some();
        match (state.slices, state.error) {
            (Some(slices), error) if is_new || error.is_none() => {
                (self.answered, self.answered_at) = (state.revision, Some(Instant::now()));
                let targets = slices.targets(&self.port, self.own_zone.as_deref());
                let targets = targets.map_err(|error| LookupError::Server(error.to_string()))?;
                Ok(SourceAnswer { targets, valid_for: Some(Duration::MAX) })
            }
            (_, error) => Err(LookupError::Server(error.map_or_else(String::new, |error| error.to_string()))),
        }
    }

    /// Waits for a change, whatever the delay.
    async fn wait(&mut self, delay: Duration) {
        if self.has_failure {
            return;
        }
        tasks::set_waiting_for(TaskWait::ApiServer);
        if self.state.changed().await.is_err() {
            tasks::set_waiting_for(TaskWait::Timer);
            return sleep(delay).await;
        }
        if let Some(answered_at) = self.answered_at {
            sleep_until(answered_at + INTERVAL_MIN).await;
        }
    }
}
