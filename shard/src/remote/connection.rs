//! Owns one connection of one thread to one shard: connects in the background and replaces a
//! connection that no longer responds.
//!
//! The Redis client has no timeouts of its own: a deadline around every call bounds it, whatever
//! the client or the server does. A server that hangs leaves a client that waits forever, so
//! `CONSECUTIVE_TIMEOUTS_MAX` unanswered calls in a row discard the connection. A reply that is
//! longer than any valid one discards it too.
//!
//! Refuses to retry, and to connect more often than once per `CONNECT_BACKOFF`.
//! Invariant: at most one connection attempt is in progress, it ends within `CONNECT_TIMEOUT`, and
//! it is aborted when the `ShardConnection` is dropped.

use super::address::{ResolvedServer, ServerAddress};
use super::dial::{DialOptions, RedisConnection};
use super::fault::ShardFault;
use super::operation::OperationClass;
use super::reply_limit::ReplyLimits;
use crate::tasks::{OnPanic, ShardTaskKind, ShardTaskWait, TaskGuard};
use redis::{Pipeline, Value};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const CONSECUTIVE_TIMEOUTS_MAX: u32 = 3;

/// Enough for a name lookup, a handshake between continents and authentication; requests do not
/// wait for it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause after a failed attempt. The operation's breaker keeps the nodes of a fleet from retrying
/// at the same time.
const CONNECT_BACKOFF: Duration = Duration::from_millis(100);

/// After a connection breaks, all threads reconnect at once; their attempts are spread over this
/// time.
const RECONNECT_SPREAD: Duration = Duration::from_millis(20);

/// A connection of one thread to one shard, with the abort handle of its last connection attempt.
pub(crate) struct ShardConnection {
    state: Arc<ConnectionState>,
    attempt: Mutex<Option<AbortHandle>>,
}

/// State that a connection shares with its connection attempt: the server address, the operation
/// class, the current phase and the consecutive timeouts.
struct ConnectionState {
    address: Arc<ServerAddress>,
    operation: Arc<OperationClass>,
    limits: ReplyLimits,
    phase: watch::Sender<ConnectionPhase>,
    /// Consecutive calls on this connection that timed out.
    timeouts: AtomicU32,
    /// Number of connections opened so far; identifies each of them.
    connection_count: AtomicU64,
}

/// Phase of a connection: not started, connecting, connected to a resolved address, or paused after
/// a failure.
enum ConnectionPhase {
    Idle,
    Connecting,
    Connected { connection: RedisConnection, server: Arc<ResolvedServer>, connection_id: u64 },
    Backoff { until: Instant },
}

impl ShardConnection {
    /// `limits`: what the server may send.
    pub(crate) fn new(address: Arc<ServerAddress>, operation: Arc<OperationClass>, limits: ReplyLimits) -> Self {
        let phase = watch::Sender::new(ConnectionPhase::Idle);
        let state = ConnectionState {
            address,
            operation,
            limits,
            phase,
            timeouts: AtomicU32::new(0),
            connection_count: AtomicU64::new(0),
        };
        Self { state: Arc::new(state), attempt: Mutex::new(None) }
    }

    /// Sends `pipeline` and waits for its replies until `deadline` has passed, including the time
    /// to connect. Error replies are returned as values; the first of them is recorded with the
    /// operation. Cancel safe: a later reply is dropped.
    pub(crate) async fn execute(&self, pipeline: &Pipeline, deadline: Duration) -> Result<Vec<Value>, ShardFault> {
        self.state.operation.admit(Instant::now())?;
        let mut connection_id = None;
        let exchange = async {
            let (mut connection, id) = self.acquire().await?;
            connection_id = Some(id);
            connection.send(pipeline).await
        };
        let result = timeout(deadline, exchange).await.unwrap_or(Err(ShardFault::Timeout));
        self.record_result(&result, connection_id);
        result
    }

    /// Shard and operation.
    pub(crate) fn name(&self) -> &Arc<str> {
        self.state.operation.name()
    }

    /// Whether a call made now would be rejected without an attempt.
    pub(crate) fn is_rejecting(&self) -> bool {
        self.state.operation.is_rejecting(Instant::now())
    }

    /// Whether the server's address is unresolved.
    pub(crate) fn has_no_server(&self) -> bool {
        self.state.address.current().is_none()
    }

    /// Discards the connection because its replies cannot be trusted.
    pub(crate) fn discard(&self) {
        let connection_id = match &*self.state.phase.borrow() {
            ConnectionPhase::Connected { connection_id, .. } => *connection_id,
            _ => return,
        };
        self.reconnect(connection_id);
    }

    fn record_result(&self, result: &Result<Vec<Value>, ShardFault>, connection_id: Option<u64>) {
        let fault = match result {
            Ok(replies) => {
                self.state.timeouts.store(0, Ordering::Relaxed);
                replies.iter().find_map(ShardFault::from_reply)
            }
            Err(fault) => Some(*fault),
        };
        let Some(fault) = fault else { return self.state.operation.record_success() };
        self.state.operation.record_failure(fault);
        if result.is_ok() && !fault.is_breaker_failure() {
            // A rejected command is a reply: the server is reachable, and its breaker may close. A
            // restarted server replies NOSCRIPT to the first script, and the script itself must
            // then get through.
            self.state.operation.record_success();
        }
        let Some(connection_id) = connection_id else { return };
        let hangs = fault == ShardFault::Timeout
            && self.state.timeouts.fetch_add(1, Ordering::Relaxed) + 1 >= CONSECUTIVE_TIMEOUTS_MAX;
        if hangs {
            self.state.operation.record_hang();
        }
        if fault.needs_rediscovery() {
            self.state.address.request_rediscovery();
        }
        if hangs || fault.closes_connection() {
            self.reconnect(connection_id);
        }
    }

    async fn acquire(&self) -> Result<(RedisConnection, u64), ShardFault> {
        let mut phases = self.state.phase.subscribe();
        self.discard_if_moved();
        self.ensure_connecting();
        loop {
            match &*phases.borrow_and_update() {
                ConnectionPhase::Connected { connection, connection_id, .. } => {
                    return Ok((connection.clone(), *connection_id));
                }
                ConnectionPhase::Backoff { .. } => return Err(ShardFault::ConnectBackoff),
                ConnectionPhase::Idle | ConnectionPhase::Connecting => {}
            }
            // `self` owns the sender, so the channel stays open.
            phases.changed().await.map_err(|_| ShardFault::Connect)?;
        }
    }

    /// Discards a connection to a previous address of the server.
    fn discard_if_moved(&self) {
        let outdated = match &*self.state.phase.borrow() {
            ConnectionPhase::Connected { server, connection_id, .. } if !self.state.address.is_current(server) => {
                *connection_id
            }
            _ => return,
        };
        self.reconnect(outdated);
    }

    /// Starts an attempt unless one is in progress or the backoff has not passed.
    fn ensure_connecting(&self) {
        let now = Instant::now();
        let has_started = self.state.phase.send_if_modified(|phase| {
            let due = match phase {
                ConnectionPhase::Idle => true,
                ConnectionPhase::Backoff { until } => *until <= now,
                ConnectionPhase::Connecting | ConnectionPhase::Connected { .. } => false,
            };
            if due {
                *phase = ConnectionPhase::Connecting;
            }
            due
        });
        if has_started {
            self.spawn_connect(Duration::ZERO);
        }
    }

    /// Drops the connection with this id and connects again in the background; until then calls are
    /// rejected at once.
    fn reconnect(&self, connection_id: u64) {
        let now = Instant::now();
        let was_dropped = self.state.phase.send_if_modified(|phase| {
            let current =
                matches!(phase, ConnectionPhase::Connected { connection_id: current, .. } if *current == connection_id);
            if current {
                *phase = ConnectionPhase::Backoff { until: now + CONNECT_TIMEOUT };
            }
            current
        });
        if was_dropped {
            let spread = xxh3_64_with_seed(&connection_id.to_le_bytes(), self.state.operation.seed());
            self.spawn_connect(RECONNECT_SPREAD.mul_f64((spread >> 11) as f64 / (1u64 << 53) as f64));
        }
    }

    fn spawn_connect(&self, delay: Duration) {
        let state = self.state.clone();
        let task = Handle::try_current().map(|runtime| {
            runtime.spawn(async move {
                let task = TaskGuard::new(ShardTaskKind::Connection, state.operation.name(), ShardTaskWait::Retry);
                // Without an end of the attempt, none would follow it.
                let panicked = state.clone();
                let _ended = OnPanic(|| {
                    panicked.phase.send_replace(ConnectionPhase::Backoff { until: Instant::now() + CONNECT_BACKOFF });
                });
                sleep(delay).await;
                task.set_wait(ShardTaskWait::Connect);
                state.connect().await;
            })
        });
        let Ok(task) = task else {
            // Outside a runtime nothing can connect; the next call inside a runtime starts an
            // attempt.
            self.state.phase.send_replace(ConnectionPhase::Idle);
            return;
        };
        let previous = self.attempt.lock().unwrap_or_else(PoisonError::into_inner).replace(task.abort_handle());
        if let Some(previous) = previous {
            previous.abort();
        }
    }
}

impl ConnectionState {
    async fn connect(&self) {
        let result = match self.address.current() {
            None => Err(ShardFault::Connect),
            Some(server) => {
                let options = DialOptions::new(self.operation.name().clone(), self.limits);
                match timeout(CONNECT_TIMEOUT, RedisConnection::open(&server, options)).await {
                    Ok(connected) => connected.map(|connection| (connection, server)),
                    Err(_) => Err(ShardFault::Timeout),
                }
            }
        };
        self.timeouts.store(0, Ordering::Relaxed);
        let phase = match result {
            Ok((connection, server)) => ConnectionPhase::Connected {
                connection,
                server,
                connection_id: self.connection_count.fetch_add(1, Ordering::Relaxed),
            },
            Err(fault) => {
                self.operation.record_failure(fault);
                self.address.request_rediscovery();
                ConnectionPhase::Backoff { until: Instant::now() + CONNECT_BACKOFF }
            }
        };
        self.phase.send_replace(phase);
    }
}

impl Drop for ShardConnection {
    fn drop(&mut self) {
        if let Some(attempt) = self.attempt.get_mut().unwrap_or_else(PoisonError::into_inner) {
            attempt.abort();
        }
    }
}
