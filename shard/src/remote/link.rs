//! Owns one connection of one thread to one shard: connects in the background, and replaces what no longer answers.
//!
//! The client is given no timeouts of its own: a deadline around every call bounds it whatever the client or server does. A
//! server that hangs leaves a client that waits for ever, so `TIMEOUTS` unanswered calls in a row throw the connection away.
//!
//! Refuses to retry, and to connect more often than once per rest.
//! Invariant: at most one attempt to connect is under way, it ends within `CONNECT_WITHIN`, and it dies with the link.

use super::fault::Fault;
use super::lane::Lane;
use super::site::{Site, Spot};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Pipeline, Value};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const TIMEOUTS: u32 = 3;

/// Covers a name lookup, a handshake across an ocean and a password; requests do not wait for it.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// After a failed attempt. The lane's breaker keeps a fleet from doing this together.
const REST: Duration = Duration::from_millis(100);

/// After a connection broke all threads come back at once: they spread over this.
const COMEBACK: Duration = Duration::from_millis(20);

pub(crate) struct Link {
    ends: Arc<Ends>,
    attempt: Mutex<Option<AbortHandle>>,
}

struct Ends {
    site: Arc<Site>,
    lane: Arc<Lane>,
    phase: watch::Sender<Phase>,
    /// Calls in a row that this connection left unanswered.
    timeouts: AtomicU32,
    /// Connections made so far.
    epochs: AtomicU64,
}

enum Phase {
    Idle,
    Connecting,
    Up { connection: MultiplexedConnection, spot: Arc<Spot>, epoch: u64 },
    Resting { until: Instant },
}

impl Link {
    pub(crate) fn new(site: Arc<Site>, lane: Arc<Lane>) -> Self {
        let phase = watch::Sender::new(Phase::Idle);
        let ends = Ends { site, lane, phase, timeouts: AtomicU32::new(0), epochs: AtomicU64::new(0) };
        Self { ends: Arc::new(ends), attempt: Mutex::new(None) }
    }

    /// Sends `pipeline` and waits for its replies at most until `deadline` has passed, connecting included. Error replies are
    /// among the values; the first of them is recorded with the lane. Cancel safe: an answer that comes later is dropped.
    pub(crate) async fn ask(&self, pipeline: &Pipeline, deadline: Duration) -> Result<Vec<Value>, Fault> {
        self.ends.lane.admit(Instant::now())?;
        let mut epoch = None;
        let exchange = async {
            let (mut connection, its_epoch) = self.connected().await?;
            epoch = Some(its_epoch);
            connection.send_packed_commands(pipeline, 0, pipeline.len()).await.map_err(|error| Fault::of(&error))
        };
        let answer = timeout(deadline, exchange).await.unwrap_or(Err(Fault::Timeout));
        self.judge(&answer, epoch);
        answer
    }

    /// Whether a call made now would be refused without being tried.
    pub(crate) fn refuses(&self) -> bool {
        self.ends.lane.refuses(Instant::now())
    }

    /// Whether there is no server to connect to.
    pub(crate) fn is_nowhere(&self) -> bool {
        self.ends.site.now().is_none()
    }

    /// Throws the connection away because what it answers cannot be trusted.
    pub(crate) fn distrust(&self) {
        let epoch = match &*self.ends.phase.borrow() {
            Phase::Up { epoch, .. } => *epoch,
            _ => return,
        };
        self.replace(epoch);
    }

    fn judge(&self, answer: &Result<Vec<Value>, Fault>, epoch: Option<u64>) {
        let fault = match answer {
            Ok(replies) => {
                self.ends.timeouts.store(0, Ordering::Relaxed);
                replies.iter().find_map(Fault::in_reply)
            }
            Err(fault) => Some(*fault),
        };
        let Some(fault) = fault else { return self.ends.lane.succeeded() };
        self.ends.lane.failed(fault);
        if answer.is_ok() && !fault.is_evidence() {
            // A refused command is an answer: the server is there, and its breaker may close. A restarted server answers
            // the first script with NOSCRIPT, and the script itself must then get through.
            self.ends.lane.succeeded();
        }
        let Some(epoch) = epoch else { return };
        let hangs = fault == Fault::Timeout && self.ends.timeouts.fetch_add(1, Ordering::Relaxed) + 1 >= TIMEOUTS;
        if hangs {
            self.ends.lane.hangs();
        }
        if fault.is_elsewhere() {
            self.ends.site.doubt();
        }
        if hangs || fault.ends_connection() {
            self.replace(epoch);
        }
    }

    async fn connected(&self) -> Result<(MultiplexedConnection, u64), Fault> {
        let mut phases = self.ends.phase.subscribe();
        self.follow();
        self.wake();
        loop {
            match &*phases.borrow_and_update() {
                Phase::Up { connection, epoch, .. } => return Ok((connection.clone(), *epoch)),
                Phase::Resting { .. } => return Err(Fault::Resting),
                Phase::Idle | Phase::Connecting => {}
            }
            // The sender lives in `self`.
            phases.changed().await.map_err(|_| Fault::Connect)?;
        }
    }

    /// Gives up a connection to where the server was before.
    fn follow(&self) {
        let left = match &*self.ends.phase.borrow() {
            Phase::Up { spot, epoch, .. } if !self.ends.site.is_at(spot) => *epoch,
            _ => return,
        };
        self.replace(left);
    }

    /// Starts an attempt where there is none and none has just failed.
    fn wake(&self) {
        let now = Instant::now();
        let begun = self.ends.phase.send_if_modified(|phase| {
            let due = match phase {
                Phase::Idle => true,
                Phase::Resting { until } => *until <= now,
                Phase::Connecting | Phase::Up { .. } => false,
            };
            if due {
                *phase = Phase::Connecting;
            }
            due
        });
        if begun {
            self.attempt_after(Duration::ZERO);
        }
    }

    /// Drops the connection of `epoch` and begins the next in the background; meanwhile calls are refused at once.
    fn replace(&self, epoch: u64) {
        let now = Instant::now();
        let dropped = self.ends.phase.send_if_modified(|phase| {
            let current = matches!(phase, Phase::Up { epoch: up, .. } if *up == epoch);
            if current {
                *phase = Phase::Resting { until: now + CONNECT_WITHIN };
            }
            current
        });
        if dropped {
            let spread = xxh3_64_with_seed(&epoch.to_le_bytes(), self.ends.lane.seed());
            self.attempt_after(COMEBACK.mul_f64((spread >> 11) as f64 / (1u64 << 53) as f64));
        }
    }

    fn attempt_after(&self, delay: Duration) {
        let ends = self.ends.clone();
        let task = Handle::try_current().map(|runtime| {
            runtime.spawn(async move {
                sleep(delay).await;
                ends.connect().await;
            })
        });
        let Ok(task) = task else {
            // Outside a runtime nothing can connect; the next call that runs inside one begins again.
            self.ends.phase.send_replace(Phase::Idle);
            return;
        };
        let before = self.attempt.lock().unwrap_or_else(PoisonError::into_inner).replace(task.abort_handle());
        if let Some(before) = before {
            before.abort();
        }
    }
}

impl Ends {
    async fn connect(&self) {
        let bare = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let result = match self.site.now() {
            None => Err(Fault::Connect),
            Some(spot) => {
                let attempt = spot.client.get_multiplexed_async_connection_with_config(&bare);
                match timeout(CONNECT_WITHIN, attempt).await {
                    Ok(Ok(connection)) => Ok((connection, spot)),
                    Ok(Err(error)) => Err(Fault::of_connecting(&error)),
                    Err(_) => Err(Fault::Timeout),
                }
            }
        };
        self.timeouts.store(0, Ordering::Relaxed);
        let phase = match result {
            Ok((connection, spot)) => {
                Phase::Up { connection, spot, epoch: self.epochs.fetch_add(1, Ordering::Relaxed) }
            }
            Err(fault) => {
                self.lane.failed(fault);
                self.site.doubt();
                Phase::Resting { until: Instant::now() + REST }
            }
        };
        self.phase.send_replace(phase);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(attempt) = self.attempt.get_mut().unwrap_or_else(PoisonError::into_inner) {
            attempt.abort();
        }
    }
}
