//! What happens to the process itself: one value per happening, which writes its log line and moves its metric.
//!
//! A line has a fixed message and structured fields. INFO is lifecycle, WARN is recovered, ERROR needs a person; requests
//! belong to the access log. What clients can cause at will is written once a second at most, while the metric counts all.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant};

use tracing::level_filters::LevelFilter;
use tracing::{Level, debug, error, info, warn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, Registry, fmt, reload};

use crate::label;
use crate::metrics::{self, Counters, Label as _};

/// Something worth telling the operator.
pub enum Event<'a> {
    Starting {
        version: &'a str,
        workers: usize,
        node: &'a str,
    },
    Listening {
        address: SocketAddr,
        tls: bool,
        backlog_effective: u32,
    },
    /// The kernel cuts the backlog of every listener (`net.core.somaxconn`).
    BacklogCapped {
        asked: u32,
        effective: u32,
    },
    /// The kernel allows fewer descriptors than `limits_http.connections` may need.
    DescriptorsCapped {
        wanted: u64,
        effective: u64,
    },
    Ready,
    Draining {
        connections: usize,
    },
    DrainTimedOut {
        connections: usize,
    },
    /// A second signal while draining.
    DrainInterrupted {
        connections: usize,
    },
    Stopped,
    Reloaded {
        source: &'a str,
    },
    ReloadRefused {
        faults: usize,
    },
    ReloadNeedsRestart {
        what: &'a str,
    },
    /// A change below `path` will not be noticed.
    WatchFailed {
        path: &'a Path,
        error: &'a dyn Display,
    },
    BreakerOpened {
        route: &'a str,
    },
    BreakerHalfOpen {
        route: &'a str,
    },
    BreakerClosed {
        route: &'a str,
    },
    /// Reads or writes (`lane`) of a shard fail, and its breaker is open.
    ShardDown {
        region: &'a str,
        endpoint: &'a str,
        lane: &'a str,
        fault: &'a dyn Display,
    },
    ShardUp {
        region: &'a str,
        endpoint: &'a str,
        lane: &'a str,
    },
    /// An operator tries something out, or ends that.
    LimitChanged {
        rule: &'a str,
        what: &'a str,
    },
    /// This machine's wall clock differs from the one that counts.
    ClockOff {
        seconds: f64,
    },
    ClockBack,
    /// The common bucket of a cluster limit does not answer.
    LimitOnShare {
        rule: &'a str,
    },
    LimitSupplied {
        rule: &'a str,
    },
    /// An operator purged, here or on another node of the fleet.
    Purged {
        what: &'a str,
        soft: bool,
        /// Nodes that have not confirmed it yet.
        missing: usize,
    },
    AcceptPaused {
        error: &'a dyn Display,
    },
    ConnectionRefused {
        reason: &'static str,
        client: IpAddr,
    },
    TlsFailed {
        error: &'a dyn Display,
    },
    CertificateLoaded {
        path: &'a Path,
        names: usize,
    },
    /// The file is unusable; where one was in use already, it stays in use.
    CertificateRefused {
        path: &'a Path,
        error: &'a dyn Display,
    },
    RequestPanicked {
        route: &'a str,
    },
    UpstreamFailed {
        route: &'a str,
        endpoint: &'a dyn Display,
        kind: UpstreamFault,
    },
    AccessLogFailed {
        error: &'a dyn Display,
    },
}

label! {
    /// How an upstream failed a request.
    UpstreamFault, "kind", {
        Connect = "connect",
        ConnectTimeout = "connect_timeout",
        /// The connection ended before the first byte of an answer.
        NoAnswer = "no_answer",
        /// The connection ended inside an answer.
        Cut = "cut",
        Malformed = "malformed",
        Timeout = "timeout",
    }
}

label! {
    /// The metric's label.
    Name, "event", {
        Starting = "starting",
        Listening = "listening",
        BacklogCapped = "backlog_capped",
        DescriptorsCapped = "descriptors_capped",
        Ready = "ready",
        Draining = "draining",
        DrainTimedOut = "drain_timed_out",
        DrainInterrupted = "drain_interrupted",
        Stopped = "stopped",
        Reloaded = "reloaded",
        ReloadRefused = "reload_refused",
        ReloadNeedsRestart = "reload_needs_restart",
        WatchFailed = "watch_failed",
        BreakerOpened = "breaker_opened",
        BreakerHalfOpen = "breaker_half_open",
        BreakerClosed = "breaker_closed",
        ShardDown = "shard_down",
        ShardUp = "shard_up",
        LimitChanged = "limit_changed",
        ClockOff = "clock_off",
        ClockBack = "clock_back",
        LimitOnShare = "limit_on_share",
        LimitSupplied = "limit_supplied",
        Purged = "purged",
        AcceptPaused = "accept_paused",
        ConnectionRefused = "connection_refused",
        TlsFailed = "tls_failed",
        CertificateLoaded = "certificate_loaded",
        CertificateRefused = "certificate_refused",
        RequestPanicked = "request_panicked",
        UpstreamFailed = "upstream_failed",
        AccessLogFailed = "access_log_failed",
    }
}

static EVENTS: LazyLock<Counters<Name>> = LazyLock::new(Counters::default);

/// Exposes `tidegate_events_total`.
pub fn expose() {
    metrics::expose_counters("tidegate_events", "What happened to the process, by event.", &EVENTS);
}

static ACCEPT_PAUSED: Throttle = Throttle::new();
static CONNECTION_REFUSED: Throttle = Throttle::new();
static REQUEST_PANICKED: Throttle = Throttle::new();
static ACCESS_LOG_FAILED: Throttle = Throttle::new();
static UPSTREAM_FAILED: [Throttle; UpstreamFault::ALL.len()] = [const { Throttle::new() }; UpstreamFault::ALL.len()];

impl Event<'_> {
    /// Counts the event and writes its line.
    pub fn emit(&self) {
        EVENTS.inc(self.name());
        match self.throttle() {
            None => self.write(0),
            Some(throttle) => {
                if let Some(suppressed) = throttle.pass(since_start()) {
                    self.write(suppressed);
                }
            }
        }
    }

    fn throttle(&self) -> Option<&'static Throttle> {
        match self {
            Event::AcceptPaused { .. } => Some(&ACCEPT_PAUSED),
            Event::ConnectionRefused { .. } => Some(&CONNECTION_REFUSED),
            Event::RequestPanicked { .. } => Some(&REQUEST_PANICKED),
            Event::AccessLogFailed { .. } => Some(&ACCESS_LOG_FAILED),
            Event::UpstreamFailed { kind, .. } => Some(&UPSTREAM_FAILED[kind.index()]),
            _ => None,
        }
    }

    /// `suppressed` counts the lines left out since the last one of this kind.
    fn write(&self, suppressed: u64) {
        let event = self.name().as_str();
        match self {
            Event::Starting { version, workers, node } => info!(event, version, workers, node, "starting"),
            Event::Listening { address, tls, backlog_effective } => {
                info!(event, %address, tls, backlog_effective, "listening");
            }
            Event::BacklogCapped { asked, effective } => {
                warn!(event, asked, effective, "the kernel caps the accept backlog; raise net.core.somaxconn");
            }
            Event::DescriptorsCapped { wanted, effective } => {
                warn!(
                    event,
                    wanted, effective, "too few descriptors for all connections; raise the limit (ulimit -Hn)"
                );
            }
            Event::Ready => info!(event, "ready"),
            Event::Draining { connections } => info!(event, connections, "draining"),
            Event::DrainTimedOut { connections } => {
                warn!(event, connections, "the drain timeout passed; remaining connections are cut");
            }
            Event::DrainInterrupted { connections } => {
                warn!(event, connections, "a second signal came; remaining connections are cut");
            }
            Event::Stopped => info!(event, "stopped"),
            Event::Reloaded { source } => info!(event, source, "configuration reloaded"),
            Event::ReloadRefused { faults } => {
                error!(event, faults, "the new configuration has faults; the old one stays in force");
            }
            Event::ReloadNeedsRestart { what } => warn!(event, what, "this change takes effect after a restart"),
            Event::WatchFailed { path, error } => {
                warn!(event, path = %path.display(), %error, "changes of files are not noticed; SIGHUP still reloads");
            }
            Event::BreakerOpened { route } => warn!(event, route, "breaker opened"),
            Event::BreakerHalfOpen { route } => info!(event, route, "breaker half-open"),
            Event::BreakerClosed { route } => info!(event, route, "breaker closed"),
            Event::ShardDown { region, endpoint, lane, fault } => {
                warn!(event, region, endpoint, lane, %fault, "shard down");
            }
            Event::ShardUp { region, endpoint, lane } => info!(event, region, endpoint, lane, "shard up"),
            Event::LimitChanged { rule, what } => info!(event, rule, what, "a limit was changed for a while"),
            Event::ClockOff { seconds } => warn!(event, seconds, "this machine's wall clock is not believed"),
            Event::ClockBack => info!(event, "this machine's wall clock is right again"),
            Event::LimitOnShare { rule } => warn!(event, rule, "a cluster limit runs on this node's share"),
            Event::LimitSupplied { rule } => info!(event, rule, "a cluster limit is supplied again"),
            Event::Purged { what, soft, missing } => info!(event, what, soft, missing, "purged"),
            Event::AcceptPaused { error } => error!(event, %error, suppressed, "accepting paused"),
            Event::ConnectionRefused { reason, client } => {
                warn!(event, reason, %client, suppressed, "connection refused");
            }
            Event::TlsFailed { error } => debug!(event, %error, "TLS handshake failed"),
            Event::CertificateLoaded { path, names } => {
                info!(event, path = %path.display(), names, "certificate loaded");
            }
            Event::CertificateRefused { path, error } => {
                error!(event, path = %path.display(), %error, "certificate refused");
            }
            Event::RequestPanicked { route } => error!(event, route, suppressed, "request panicked"),
            Event::UpstreamFailed { route, endpoint, kind } => {
                warn!(event, route, %endpoint, kind = kind.as_str(), suppressed, "upstream failed");
            }
            Event::AccessLogFailed { error } => error!(event, %error, suppressed, "access log failed"),
        }
    }

    fn name(&self) -> Name {
        match self {
            Event::Starting { .. } => Name::Starting,
            Event::Listening { .. } => Name::Listening,
            Event::BacklogCapped { .. } => Name::BacklogCapped,
            Event::DescriptorsCapped { .. } => Name::DescriptorsCapped,
            Event::Ready => Name::Ready,
            Event::Draining { .. } => Name::Draining,
            Event::DrainTimedOut { .. } => Name::DrainTimedOut,
            Event::DrainInterrupted { .. } => Name::DrainInterrupted,
            Event::Stopped => Name::Stopped,
            Event::Reloaded { .. } => Name::Reloaded,
            Event::ReloadRefused { .. } => Name::ReloadRefused,
            Event::ReloadNeedsRestart { .. } => Name::ReloadNeedsRestart,
            Event::WatchFailed { .. } => Name::WatchFailed,
            Event::BreakerOpened { .. } => Name::BreakerOpened,
            Event::BreakerHalfOpen { .. } => Name::BreakerHalfOpen,
            Event::BreakerClosed { .. } => Name::BreakerClosed,
            Event::ShardDown { .. } => Name::ShardDown,
            Event::ShardUp { .. } => Name::ShardUp,
            Event::LimitChanged { .. } => Name::LimitChanged,
            Event::ClockOff { .. } => Name::ClockOff,
            Event::ClockBack => Name::ClockBack,
            Event::LimitOnShare { .. } => Name::LimitOnShare,
            Event::LimitSupplied { .. } => Name::LimitSupplied,
            Event::Purged { .. } => Name::Purged,
            Event::AcceptPaused { .. } => Name::AcceptPaused,
            Event::ConnectionRefused { .. } => Name::ConnectionRefused,
            Event::TlsFailed { .. } => Name::TlsFailed,
            Event::CertificateLoaded { .. } => Name::CertificateLoaded,
            Event::CertificateRefused { .. } => Name::CertificateRefused,
            Event::RequestPanicked { .. } => Name::RequestPanicked,
            Event::UpstreamFailed { .. } => Name::UpstreamFailed,
            Event::AccessLogFailed { .. } => Name::AccessLogFailed,
        }
    }
}

/// Lets one line pass per second and counts the others, without a lock.
struct Throttle {
    /// Milliseconds since the start at which the next line may pass.
    next: AtomicU64,
    suppressed: AtomicU64,
}

impl Throttle {
    const fn new() -> Self {
        Throttle { next: AtomicU64::new(0), suppressed: AtomicU64::new(0) }
    }

    /// How many were suppressed before this one, or `None` where this one is suppressed too.
    fn pass(&self, now: Duration) -> Option<u64> {
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let next = self.next.load(Relaxed);
        let wins = now >= next && self.next.compare_exchange(next, now.saturating_add(1_000), Relaxed, Relaxed).is_ok();
        if wins {
            return Some(self.suppressed.swap(0, Relaxed));
        }
        self.suppressed.fetch_add(1, Relaxed);
        None
    }
}

fn since_start() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line, for machines.
    Json,
    /// For a person at a terminal.
    Text,
}

static LEVEL: OnceLock<reload::Handle<LevelFilter, Registry>> = OnceLock::new();

/// Sends log lines of `level` and above to standard error. A second call changes nothing but the level.
pub fn init(level: Level, format: Format) {
    let (filter, handle) = reload::Layer::new(LevelFilter::from_level(level));
    let lines = match format {
        Format::Json => fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed(),
        Format::Text => fmt::layer().with_target(false).with_ansi(false).with_writer(std::io::stderr).boxed(),
    };
    match tracing_subscriber::registry().with(filter).with(lines).try_init() {
        Ok(()) => drop(LEVEL.set(handle)),
        Err(_already_set) => set_level(level),
    }
}

/// Changes the level of a subscriber that `init` installed.
pub fn set_level(level: Level) {
    let Some(handle) = LEVEL.get() else { return };
    if let Err(error) = handle.reload(LevelFilter::from_level(level)) {
        warn!(%error, "the log level was not changed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_the_rest_is_counted() {
        let throttle = Throttle::new();
        assert_eq!(throttle.pass(Duration::from_millis(5)), Some(0));
        assert_eq!(throttle.pass(Duration::from_millis(6)), None);
        assert_eq!(throttle.pass(Duration::from_millis(1_004)), None);
        assert_eq!(throttle.pass(Duration::from_millis(1_005)), Some(2));
        assert_eq!(throttle.pass(Duration::from_millis(9_000)), Some(0));
    }

    #[test]
    fn the_metric_counts_what_the_log_suppresses() {
        let before = EVENTS.get(Name::UpstreamFailed);
        for _ in 0..5 {
            Event::UpstreamFailed { route: "r", endpoint: &"127.0.0.1:1", kind: UpstreamFault::Connect }.emit();
        }
        assert!(EVENTS.get(Name::UpstreamFailed) >= before + 5);
        expose();
        assert!(metrics::exposition().contains("tidegate_events_total{event=\"upstream_failed\"}"));
    }

    #[test]
    fn a_second_subscriber_is_no_panic() {
        init(Level::ERROR, Format::Json);
        init(Level::ERROR, Format::Text);
    }
}
