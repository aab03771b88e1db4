//! The watches of all services that upstreams name, on a thread of their own.
//!
//! A list of thousands of endpoints takes a while to parse, and a plugin of a kubeconfig blocks:
//! neither delays requests or the admin address. The thread starts with the first watch and ends
//! with the last user of `KubernetesWatches`; a watch ends with its last user.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::KubernetesConfig;
use super::api::{ServiceKey, SliceApi};
use super::metrics::WATCHED;
use super::service_watch::{ServiceWatch, WatchCommand};
use super::source::KubernetesSource;
use super::watcher::watch_service;
use crate::endpoint::EndpointAddress;
use crate::tasks::{self, ServiceEnd, ServiceTask, TaskKind};

/// The watches of one configuration.
pub(crate) struct KubernetesWatches {
    config: KubernetesConfig,
    /// The thread; `None` before the first watch.
    commands: RefCell<Option<UnboundedSender<WatchCommand>>>,
    running: RefCell<HashMap<ServiceKey, Weak<ServiceWatch>>>,
    /// The number of watches that were started.
    next: Cell<u64>,
}

impl KubernetesWatches {
    pub(crate) fn new(config: KubernetesConfig) -> Self {
        KubernetesWatches { config, commands: RefCell::default(), running: RefCell::default(), next: Cell::new(0) }
    }

    /// The source of the service and port of `origin`. Sources of one service share its watch.
    pub(crate) fn source(&self, origin: &EndpointAddress, own_zone: Option<String>) -> KubernetesSource {
        // The configuration names both.
        let (name, namespace) = origin.host.split_once('.').unwrap_or((&origin.host, "default"));
        let key = ServiceKey { namespace: namespace.into(), name: name.into() };
        KubernetesSource::new(self.watch(key), origin, own_zone, self.config.timeout)
    }

    fn watch(&self, key: ServiceKey) -> Rc<ServiceWatch> {
        let mut running = self.running.borrow_mut();
        if let Some(watch) = running.get(&key).and_then(Weak::upgrade) {
            return watch;
        }
        running.retain(|_, watch| watch.strong_count() > 0);
        let commands = self.commands.borrow_mut().get_or_insert_with(|| start_thread(self.config.clone())).clone();
        let id = self.next.get();
        self.next.set(id + 1);
        let watch = Rc::new(ServiceWatch::start(id, key.clone(), commands));
        running.insert(key, Rc::downgrade(&watch));
        watch
    }
}

fn start_thread(config: KubernetesConfig) -> UnboundedSender<WatchCommand> {
    let (sender, receiver) = unbounded_channel();
    // The end of the process does not wait for it.
    let started = thread::Builder::new().name("kubernetes".to_owned()).spawn(move || run(&config, receiver));
    if let Err(error) = started {
        tracing::error!(%error, "there is no thread for discovery by Kubernetes");
    }
    sender
}

fn run(config: &KubernetesConfig, commands: UnboundedReceiver<WatchCommand>) {
    match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => runtime.block_on(run_watches(config, commands)),
        Err(error) => tracing::error!(%error, "there is no runtime for discovery by Kubernetes"),
    }
}

/// Runs the watches until no one can ask for another one.
async fn run_watches(config: &KubernetesConfig, mut commands: UnboundedReceiver<WatchCommand>) {
    let api = Rc::new(SliceApi::new(config));
    let mut running: HashMap<u64, ServiceTask> = HashMap::new();
    while let Some(command) = commands.recv().await {
        match command {
            WatchCommand::Start(id, service, state) => {
                let api = Rc::clone(&api);
                let task = tasks::supervise(TaskKind::KubernetesWatch, async move || {
                    watch_service(Rc::clone(&api), service.clone(), &state).await;
                    ServiceEnd::Failed
                });
                running.insert(id, task);
            }
            WatchCommand::Stop(id) => drop(running.remove(&id)),
        }
        WATCHED.store(running.len(), Relaxed);
    }
    WATCHED.store(0, Relaxed);
}
