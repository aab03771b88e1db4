//! State that the control thread and the workers share, and the stages of a shutdown.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use shard::{Bus, Store};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::accept::ConnectionTable;
use crate::admin::AdminConfig;
use crate::cache::fill::FillTable;
use crate::cache::stored::CacheMeta;
use crate::config::Config;
use crate::log::AccessLog;
use crate::pipeline::Snapshot;
use crate::proxy_protocol::ProxyProtocolMode;
use crate::tls::TlsTerminator;

/// Timeout for the acknowledgements of the other nodes of a fleet.
pub(super) const ACKNOWLEDGEMENT_TIMEOUT: Duration = Duration::from_secs(3);
/// Interval at which a draining thread checks its remaining connections.
pub(super) const DRAIN_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Stages of a shutdown, sent from the control thread to the workers. They only move forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LifecycleStage {
    Serving,
    /// Responses end their connections. Connections are still accepted, and idle ones kept, because
    /// their clients may not know yet.
    Draining,
    /// Accept no more connections, close idle ones, and finish the current requests.
    Closing,
    /// Close the remaining connections.
    Terminating,
}

/// The listeners that a successor accepts from. Listeners are only added.
#[derive(Debug, Default)]
pub(super) struct HandedOverListeners(watch::Sender<BTreeSet<usize>>);

impl HandedOverListeners {
    pub(super) fn add(&self, listeners: impl IntoIterator<Item = usize>) {
        self.0.send_modify(|handed_over| handed_over.extend(listeners));
    }

    /// Waits until a successor accepts from the listener of this index. Cancel safe.
    pub(super) async fn wait_for(&self, listener: usize) {
        let waited = self.0.subscribe().wait_for(|handed_over| handed_over.contains(&listener)).await.map(drop);
        // The sender lives as long as the shared state.
        waited.expect("the sender is borrowed");
    }
}

/// State that all threads share: snapshot, configuration, store, bus, fills and connections.
pub(super) struct SharedState {
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) config: ArcSwap<Config>,
    pub(super) store: Arc<Store<CacheMeta>>,
    pub(super) bus: Arc<Bus<CacheMeta>>,
    pub(super) fills: Arc<FillTable>,
    pub(super) connections: Arc<ConnectionTable>,
    pub(super) log: Arc<AccessLog>,
    /// By listener.
    pub(super) proxy_protocol: Vec<ProxyProtocolMode>,
    /// Whether clients may use HTTP/2, by listener.
    pub(super) http2: Vec<bool>,
    /// By listener; `None` without TLS.
    pub(super) tls_terminators: Vec<Option<Arc<TlsTerminator>>>,
    pub(super) handed_over: HandedOverListeners,
    pub(super) started_at: Instant,
    /// Identifies this process among the gateways of a fleet, for the shares of cluster limits.
    pub(super) lease_node: u64,
}

/// Checks that a node belongs to the fleet, as far as its servers respond.
///
/// # Errors
/// No node of that name; returns the names of the nodes that exist.
pub(super) async fn check_node(shared: &SharedState, node: &str) -> Result<(), String> {
    if node == shared.config.load().server.node {
        return Ok(());
    }
    let Ok(nodes) = timeout(ACKNOWLEDGEMENT_TIMEOUT, shared.bus.nodes()).await else { return Ok(()) };
    if nodes.is_complete && !nodes.names.contains(node) {
        return Err(nodes.names.into_iter().collect::<Vec<_>>().join(", "));
    }
    Ok(())
}

/// The admin configuration, which a reload may change.
pub(super) type SharedAdminConfig = Arc<ArcSwap<AdminConfig>>;

/// The source of the configuration, for reloads.
#[derive(Clone, Debug)]
pub enum ConfigSource {
    File(PathBuf),
    /// Built from command-line arguments: reloads do not apply.
    Arguments,
}
