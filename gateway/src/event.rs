//! Events of the process: each one writes a log line and increments a metric.
//!
//! A line has a fixed message and structured fields. INFO is lifecycle, WARN is recovered, ERROR
//! needs a person. Requests belong to the access log. Lines that clients can cause at will are
//! written at most once a second; the metric counts every event.

mod json_lines;
pub(crate) mod tail;

use std::fmt::Display;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use json_lines::{JsonLines, LogTime};
use tracing::level_filters::LevelFilter;
use tracing::{Level, debug, error, info, warn};
use tracing_subscriber::fmt::format::JsonFields;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, Registry, fmt, reload};

use crate::label;
use crate::metrics::{self, Counters, Label as _};
use tail::TailLayer;

/// Defines every event once: variant, name, fields, level and message.
///
/// `VARIANT = "NAME" { FIELD: TYPE, ... } => LEVEL "MESSAGE";` generates the variant of the enum,
/// the value of the metric's label and the log line. `FIELD: TYPE = EXPRESSION` logs the expression
/// instead of the field. `LEVEL [THROTTLE]` writes the line only where the throttle passes it and
/// adds the field `suppressed`. The log macros of `tracing` bring `display` into scope.
macro_rules! events {
    (
        $(#[$enum_doc:meta])*
        pub(crate) enum $events:ident<$lifetime:lifetime>;
        $(
            $(#[$doc:meta])*
            $variant:ident = $name:literal $({ $($field:ident: $type:ty $(= $value:expr)?),+ })?
            => $level:ident $([$throttle:expr])? $message:literal;
        )+
    ) => {
        $(#[$enum_doc])*
        pub(crate) enum $events<$lifetime> {
            $($(#[$doc])* $variant $({ $($field: $type),+ })?),+
        }

        label! {
            /// The metric's label.
            EventName, "event", { $($variant = $name),+ }
        }

        impl $events<'_> {
            fn name(&self) -> EventName {
                match self { $($events::$variant { .. } => EventName::$variant),+ }
            }

            #[expect(unused_variables, reason = "a throttle may depend on a field; most do not")]
            fn throttle(&self) -> Option<&'static Throttle> {
                match self {
                    $($events::$variant $({ $($field),+ })? => optional!($($throttle)?)),+
                }
            }

            /// `suppressed` is the number of lines left out since the last one; `None` for an event
            /// that is not throttled.
            fn write(&self, suppressed: Option<u64>) {
                let event = self.name().as_str();
                match self {
                    $($events::$variant $({ $($field),+ })? => {
                        $level!(event, $($($field = logged!($field $(, $value)?),)+)? suppressed, $message);
                    })+
                }
            }
        }
    };
}

/// An expression or none as an `Option`.
macro_rules! optional {
    () => {
        None
    };
    ($value:expr) => {
        Some($value)
    };
}

/// The value that a log line has for a field: the field itself, or the expression given for it.
macro_rules! logged {
    ($field:ident) => {
        $field
    };
    ($field:ident, $value:expr) => {
        $value
    };
}

/// A throttle for one event, for each name and kind of it, or for each of `$count` kinds.
macro_rules! throttled {
    () => {{
        static THROTTLE: Throttle = Throttle::new();
        &THROTTLE
    }};
    (of $name:expr, $kind:expr) => {{
        static THROTTLES: NamedThrottles = NamedThrottles::new();
        THROTTLES.of($name, $kind)
    }};
    ($index:expr, $count:expr) => {{
        static THROTTLES: [Throttle; $count] = [const { Throttle::new() }; $count];
        &THROTTLES[$index]
    }};
}

events! {
    /// A lifecycle event or a failure that an operator should see.
    pub(crate) enum Event<'a>;

    Starting = "starting" { version: &'a str, workers: usize, node: &'a str } => info "starting";
    /// `source` of the socket is `bound`, `systemd` or `predecessor`.
    Listening = "listening" {
        address: SocketAddr = display(address),
        tls: bool,
        backlog_effective: u32,
        source: &'static str
    } => info "listening";
    /// The kernel caps the backlog of every listener (`net.core.somaxconn`).
    BacklogCapped = "backlog_capped" { requested: u32, effective: u32 }
        => warn "the kernel caps the accept backlog; raise net.core.somaxconn";
    /// The kernel allows fewer descriptors than `limits_http.connections` may need.
    DescriptorsCapped = "descriptors_capped" { required: u64, effective: u64 }
        => warn "too few descriptors for all connections; raise the limit (ulimit -Hn)";
    /// `url` is that of the admin address.
    DashboardReady = "dashboard_ready" { url: &'a str } => info "the dashboard is at this address";
    Ready = "ready" => info "ready";
    Draining = "draining" { connections: usize } => info "draining";
    DrainTimedOut = "drain_timed_out" { connections: usize }
        => warn "the drain timeout passed; remaining connections are closed";
    /// A second signal while draining.
    DrainInterrupted = "drain_interrupted" { connections: usize }
        => warn "a second signal arrived; remaining connections are closed";
    Stopped = "stopped" => info "stopped";
    /// SIGUSR2: the program is started again, to take over.
    SuccessorStarted = "successor_started" { pid: u32 } => info "a successor is started";
    /// A process that was to take over did not; this one goes on as before.
    UpgradeFailed = "upgrade_failed" { error: &'a dyn Display = display(error) }
        => error "a successor did not take over; this process goes on";
    /// A successor accepts from the sockets of this process, which drains. `kept` listeners are not
    /// in the configuration of the successor and end with this process.
    HandedOver = "handed_over" { pid: i32, version: &'a str, listeners: usize, kept: usize }
        => info "a successor took over";
    /// This process accepts from the sockets of another one, which drains.
    TookOver = "took_over" { pid: i32, version: &'a str, listeners: usize } => info "took over from another process";
    /// The other process has ended before it confirmed; this one serves.
    PredecessorLost = "predecessor_lost" { error: &'a dyn Display = display(error) }
        => warn "the process to take over from ended early";
    /// The state of the process could not be told to the service manager (`NOTIFY_SOCKET`).
    NotifyFailed = "notify_failed" { error: &'a dyn Display = display(error) }
        => warn [throttled!()] "the service manager was not notified";
    Reloaded = "reloaded" { source: &'a str } => info "configuration reloaded";
    /// A fault of a configuration that a reload has read. `key` is empty if it concerns the whole
    /// document.
    ConfigError = "config_error" {
        file: &'a str,
        line: usize,
        column: usize,
        key: &'a str,
        code: &'static str,
        fault: &'a str,
        hint: Option<&'a str>
    } => error "the new configuration has an error";
    /// As `ConfigError`, for a fault that does not refuse the configuration.
    ConfigWarning = "config_warning" {
        file: &'a str,
        line: usize,
        column: usize,
        key: &'a str,
        code: &'static str,
        fault: &'a str,
        hint: Option<&'a str>
    } => warn "the new configuration has a warning";
    ReloadRefused = "reload_refused" { errors: usize, warnings: usize }
        => error "the new configuration has errors; the old one remains active";
    /// `setting` is the key that a reload cannot change.
    ReloadNeedsRestart = "reload_needs_restart" { setting: &'a str } => warn "this change takes effect after a restart";
    /// Changes below `path` will not be detected.
    WatchFailed = "watch_failed" { path: &'a Path = display(path.display()), error: &'a dyn Display = display(error) }
        => warn "file changes are not detected; SIGHUP still reloads";
    /// `reason` is the rule by which it opened. The counts are the calls of its window. `route` is
    /// `*` for the breaker of all routes of the upstream; probes are admitted after `seconds`.
    BreakerOpened = "breaker_opened" {
        route: &'a str,
        upstream: &'a str,
        mode: &'static str,
        reason: &'static str,
        calls: u32,
        failed: u32,
        slow: u32,
        failed_ratio: f64,
        slow_ratio: f64,
        seconds: f64
    } => warn "breaker opened";
    /// Its time has passed: `probes` calls are admitted.
    BreakerHalfOpen = "breaker_half_open" {
        route: &'a str,
        upstream: &'a str,
        mode: &'static str,
        reason: &'static str,
        probes: usize
    } => info "breaker half-open";
    /// All probes succeeded: a growing share of the calls is admitted for `seconds`.
    BreakerRamp = "breaker_ramp" {
        route: &'a str,
        upstream: &'a str,
        mode: &'static str,
        reason: &'static str,
        probes: usize,
        seconds: f64
    } => info "breaker admits a growing share of the calls";
    /// `reason` is `ramp_ended`, or `probes_succeeded` without a ramp.
    BreakerClosed = "breaker_closed" {
        route: &'a str,
        upstream: &'a str,
        mode: &'static str,
        reason: &'static str
    } => info "breaker closed";
    /// An operator sets the state of a breaker for a time.
    BreakerOverridden = "breaker_overridden" { route: &'a str, upstream: &'a str, state: &'static str, seconds: u64 }
        => info "the state of a breaker is set by hand";
    /// `reason` is `expired` or `cleared`.
    BreakerOverrideEnded = "breaker_override_ended" {
        route: &'a str,
        upstream: &'a str,
        state: &'static str,
        reason: &'static str
    } => info "the state of a breaker is not set by hand any more";
    /// One class of operations of a shard fails, and its breaker is open.
    ShardDown = "shard_down" {
        region: &'a str,
        endpoint: &'a str,
        operation: &'a str,
        fault: &'a dyn Display = display(fault)
    } => warn "shard down";
    ShardUp = "shard_up" { region: &'a str, endpoint: &'a str, operation: &'a str } => info "shard up";
    /// An operator overrides a limit for a time, on this node or on another one of the fleet.
    LimitOverridden = "limit_overridden" { rule: &'a str, change: &'a str } => info "a limit is overridden";
    /// `reason` is `expired` or `cleared`.
    LimitOverrideEnded = "limit_override_ended" { rule: &'a str, reason: &'static str }
        => info "a limit override ended; the limit applies as configured";
    /// This machine's wall clock differs from the reference clock by `seconds`.
    ClockSkewed = "clock_skewed" { seconds: f64 } => warn "this machine's wall clock is wrong and is not used";
    ClockRecovered = "clock_recovered" => info "this machine's wall clock is right again";
    /// The shared bucket of a cluster limit is unreachable.
    LimitLocalFallback = "limit_local_fallback" { rule: &'a str }
        => warn "a cluster limit runs on this node's local fallback share";
    LimitLeaseRestored = "limit_lease_restored" { rule: &'a str }
        => info "a cluster limit gets leases from its shared bucket again";
    /// An operator purged through this node. The last two fields are counts: nodes that have not
    /// acknowledged the purge, and Redis servers that have not received it.
    Purged = "purged" { targets: &'a str, soft: bool, unacknowledged_nodes: usize, unreachable_servers: usize }
        => info "purged";
    AcceptPaused = "accept_paused" { error: &'a dyn Display = display(error) }
        => error [throttled!()] "accepting paused";
    ConnectionRefused = "connection_refused" { reason: &'static str, client: IpAddr = display(client) }
        => warn [throttled!(of "", reason)] "connection refused";
    /// A connection to a listener with `proxy_protocol` was closed because of its header.
    ProxyHeaderRefused = "proxy_header_refused" {
        reason: &'static str,
        peer: IpAddr = display(peer)
    } => warn [throttled!(of "", reason)] "PROXY protocol header refused";
    TlsFailed = "tls_failed" { error: &'a dyn Display = display(error) } => debug "TLS handshake failed";
    /// A handshake failed because of the client's certificate.
    ClientCertificateRefused = "client_certificate_refused" {
        reason: &'static str,
        client: IpAddr = display(client),
        error: &'a dyn Display = display(error)
    } => warn [throttled!(of "", reason)] "client certificate refused";
    /// The authorities of client certificates, at the start and when their files have changed.
    ClientCaLoaded = "client_ca_loaded" { path: &'a Path = display(path.display()), authorities: usize }
        => info "authorities of client certificates loaded";
    CertificateLoaded = "certificate_loaded" { path: &'a Path = display(path.display()), names: usize }
        => info "certificate loaded";
    /// The file is unusable; a certificate that was loaded earlier stays in use.
    CertificateRefused = "certificate_refused" {
        path: &'a Path = display(path.display()),
        error: &'a dyn Display = display(error)
    } => error "certificate refused";
    /// The issuer of tokens has published another key set than the one in use.
    KeySetFetched = "key_set_fetched" { url: &'a str, keys: usize } => info "key set of tokens fetched";
    /// A set that was fetched earlier stays in use, until it is too old. Without one, all tokens
    /// are rejected.
    KeySetFetchFailed = "key_set_fetch_failed" {
        url: &'a str,
        has_keys: bool,
        error: &'a dyn Display = display(error)
    } => warn "key set of tokens not fetched";
    /// A task panicked. A service is restarted; any other task ends.
    TaskPanicked = "task_panicked" { kind: &'static str, panic: &'a str }
        => error [throttled!(of "", kind)] "task panicked";
    /// A service ended although its owner still runs; it is restarted.
    ServiceEnded = "service_ended" { kind: &'static str }
        => error [throttled!(of "", kind)] "a service ended and is restarted";
    RequestPanicked = "request_panicked" { route: &'a str } => error [throttled!(of route, "")] "request panicked";
    UpstreamFailed = "upstream_failed" {
        route: &'a str,
        endpoint: &'a dyn Display = display(endpoint),
        kind: UpstreamFault = kind.as_str()
    } => warn [throttled!(failure_throttle(route, *kind), FAILURE_THROTTLES)] "upstream failed";
    /// Calls were rejected because the upstream has too many in progress. `limit` is the number
    /// that it may have, `waiting` that of calls that wait.
    UpstreamOverloaded = "upstream_overloaded" {
        upstream: &'a str,
        reason: &'static str,
        limit: usize,
        waiting: usize
    } => warn [throttled!(of upstream, reason)] "an upstream has too many calls in progress; calls are rejected";
    /// An endpoint is out of use, for `seconds` at least; `None`: until its health checks pass.
    EndpointDown = "endpoint_down" {
        upstream: &'a str,
        endpoint: &'a str,
        reason: &'static str,
        seconds: Option<f64>
    } => warn "endpoint down";
    EndpointUp = "endpoint_up" { upstream: &'a str, endpoint: &'a str } => info "endpoint up";
    /// The certificates of an upstream are not verified (`upstreams.X.tls.verify`).
    UpstreamUnverified = "upstream_unverified" { upstream: &'a str }
        => warn "the certificates of an upstream are not verified; anyone on the way can read and change its traffic";
    /// The endpoints of an upstream have changed, because the addresses of a name have.
    EndpointsChanged = "endpoints_changed" {
        upstream: &'a str,
        name: &'a str,
        endpoints: usize,
        added: usize,
        removed: usize
    } => info [throttled!(of upstream, "")] "the endpoints of an upstream have changed";
    /// The addresses of a name cannot be looked up. The last known ones stay in use.
    LookupFailed = "lookup_failed" {
        upstream: &'a str,
        name: &'a str,
        known: usize,
        error: &'a dyn Display = display(error)
    } => warn "the addresses of an upstream cannot be looked up";
    LookupRecovered = "lookup_recovered" { upstream: &'a str, name: &'a str }
        => info "the addresses of an upstream can be looked up again";
    /// A request to the admin address had a wrong token. `count`: those of the address without a
    /// right one in between.
    AdminTokenRejected = "admin_token_rejected" { address: IpAddr = display(address), count: u32 }
        => warn [throttled!()] "a wrong admin token was rejected";
    /// An address has sent so many wrong passwords that its next one is not verified.
    PasswordsThrottled = "passwords_throttled" { client: IpAddr = display(client) }
        => warn [throttled!()] "too many wrong passwords of an address";
    /// An HTTP/2 connection was ended because its client sent too many frames.
    Http2Flood = "http2_flood" { client: IpAddr = display(client), frames: &'static str }
        => warn [throttled!(of "", frames)] "an HTTP/2 client sent too many frames";
    /// A stream was refused because the memory of its connection, of its client's address, or of
    /// all connections was used up.
    Http2StreamRefused = "http2_stream_refused" { client: IpAddr = display(client), memory: &'static str }
        => warn [throttled!(of "", memory)] "no memory for a stream of an HTTP/2 client";
    /// Spans were dropped because the collector did not take them.
    TraceExportFailed = "trace_export_failed" {
        url: &'a str,
        spans: u64,
        error: &'a dyn Display = display(error)
    } => warn [throttled!()] "spans were not exported";
    /// `path`: of the file; none of standard output.
    AccessLogFailed = "access_log_failed" {
        path: Option<&'a Path> = path.map(|path| display(path.display())),
        error: &'a dyn Display = display(error)
    } => error [throttled!()] "access log failed";
}

label! {
    /// How an upstream failed a request.
    pub UpstreamFault, "kind", {
        Connect = "connect",
        /// No name of its endpoints is resolved.
        NoAddress = "no_address",
        /// The source of its endpoints has answered that there is none.
        NoEndpoints = "no_endpoints",
        /// TLS: the certificate is for another name.
        CertificateName = "certificate_name",
        CertificateUnknownIssuer = "certificate_unknown_issuer",
        CertificateSelfSigned = "certificate_self_signed",
        CertificateOfAuthority = "certificate_of_authority",
        CertificateExpired = "certificate_expired",
        CertificateNotYetValid = "certificate_not_yet_valid",
        CertificateInvalid = "certificate_invalid",
        /// The gateway's own certificate is not accepted.
        ClientCertificate = "client_certificate",
        TlsAlert = "tls_alert",
        TlsClosed = "tls_closed",
        TlsProtocol = "tls_protocol",
        ConnectTimeout = "connect_timeout",
        /// The connection ended before the first byte of a response.
        NoResponse = "no_response",
        /// The connection ended inside a response.
        Truncated = "truncated",
        Malformed = "malformed",
        Timeout = "timeout",
    }
}

static EVENTS: LazyLock<Counters<EventName>> = LazyLock::new(Counters::default);

/// Exposes `tidegate_events_total`.
pub(crate) fn expose() {
    metrics::expose_counters("tidegate_events", "Lifecycle events and failures of the process, by event.", &EVENTS);
}

impl Event<'_> {
    /// Counts the event and writes its log line, unless its throttle suppresses the line.
    pub(crate) fn emit(&self) {
        EVENTS.inc(self.name());
        let Some(throttle) = self.throttle() else { return self.write(None) };
        if let Some(suppressed) = throttle.pass(since_start()) {
            throttle.describe(self);
            self.write(Some(suppressed));
        }
    }

    /// The route, the upstream and the kind of event whose lines share a throttle; empty for an
    /// event that has one throttle.
    fn throttled_as(&self) -> ThrottledLines {
        let (route, upstream, kind) = match self {
            Event::UpstreamFailed { route, kind, .. } => (*route, "", kind.as_str()),
            Event::UpstreamOverloaded { upstream, reason, .. } => ("", *upstream, *reason),
            Event::EndpointsChanged { upstream, .. } => ("", *upstream, ""),
            Event::RequestPanicked { route } => (*route, "", ""),
            Event::ConnectionRefused { reason, .. }
            | Event::ProxyHeaderRefused { reason, .. }
            | Event::ClientCertificateRefused { reason, .. } => ("", "", *reason),
            Event::TaskPanicked { kind, .. } | Event::ServiceEnded { kind } => ("", "", *kind),
            Event::Http2Flood { frames, .. } => ("", "", *frames),
            Event::Http2StreamRefused { memory, .. } => ("", "", *memory),
            _ => ("", "", ""),
        };
        ThrottledLines { event: self.name(), route: route.to_owned(), upstream: upstream.to_owned(), kind }
    }
}

/// The event, the names and the kind that the lines of one throttle share.
struct ThrottledLines {
    event: EventName,
    route: String,
    upstream: String,
    kind: &'static str,
}

/// Routes whose failures are throttled apart. Routes beyond them share.
const THROTTLED_ROUTES: usize = 64;
const FAILURE_THROTTLES: usize = THROTTLED_ROUTES * UpstreamFault::ALL.len();

/// The index of the throttle for one kind of failures of a route.
fn failure_throttle(route: &str, kind: UpstreamFault) -> usize {
    let mut hasher = DefaultHasher::new();
    route.hash(&mut hasher);
    let route = usize::try_from(hasher.finish() % THROTTLED_ROUTES as u64).unwrap_or(0);
    route * UpstreamFault::ALL.len() + kind.index()
}

/// Names and kinds of one event that are throttled apart. Those beyond them share: names of routes
/// and upstreams come from the configuration, which may have thousands.
const NAMES_MAX: usize = 64;

/// A name and a kind, once they have a place.
type ThrottledName = OnceLock<(Box<str>, &'static str)>;

/// A throttle for each name and kind of an event: lines of one do not hide those of another.
struct NamedThrottles {
    named: [(ThrottledName, Throttle); NAMES_MAX],
    others: Throttle,
}

impl NamedThrottles {
    const fn new() -> Self {
        NamedThrottles { named: [const { (OnceLock::new(), Throttle::new()) }; NAMES_MAX], others: Throttle::new() }
    }

    /// The throttle of a name and a kind, which get the first free place.
    fn of(&'static self, name: &str, kind: &'static str) -> &'static Throttle {
        let is_own = |place: &ThrottledName| {
            let (own, own_kind) = place.get_or_init(|| (name.into(), kind));
            **own == *name && *own_kind == kind
        };
        self.named.iter().find(|(place, _)| is_own(place)).map_or(&self.others, |(_, throttle)| throttle)
    }
}

/// Passes one line per second and counts the others, without a lock.
struct Throttle {
    /// Milliseconds since the start at which the next line may pass.
    next: AtomicU64,
    suppressed: AtomicU64,
    /// Whether the throttle is in `SUPPRESSING`.
    is_listed: AtomicBool,
    /// Those that passed.
    passed: Mutex<Option<ThrottledLines>>,
}

/// Throttles with suppressed lines that no line has reported yet.
static SUPPRESSING: Mutex<Vec<&'static Throttle>> = Mutex::new(Vec::new());

impl Throttle {
    const fn new() -> Self {
        Throttle {
            next: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
            is_listed: AtomicBool::new(false),
            passed: Mutex::new(None),
        }
    }

    /// The number of lines suppressed since the last one; `None` if this line is suppressed too.
    fn pass(&'static self, now: Duration) -> Option<u64> {
        if self.take_turn(now) {
            return Some(self.suppressed.swap(0, Relaxed));
        }
        self.suppressed.fetch_add(1, Relaxed);
        if !self.is_listed.load(Relaxed) && !self.is_listed.swap(true, Relaxed) {
            lock(&SUPPRESSING).push(self);
        }
        None
    }

    /// Whether a line may pass at `now`. The next one may a second later.
    fn take_turn(&self, now: Duration) -> bool {
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let next = self.next.load(Relaxed);
        now >= next && self.next.compare_exchange(next, now.saturating_add(1_000), Relaxed, Relaxed).is_ok()
    }

    fn describe(&self, event: &Event<'_>) {
        *lock(&self.passed) = Some(event.throttled_as());
    }

    fn report_suppressed(&self) {
        let suppressed = self.suppressed.swap(0, Relaxed);
        if let Some(ThrottledLines { event, route, upstream, kind }) = &*lock(&self.passed)
            && suppressed > 0
        {
            let written = |text: &'_ str| (!text.is_empty()).then(|| text.to_owned());
            let [route, upstream, kind] = [written(route), written(upstream), written(kind)];
            warn!(
                event = "events_suppressed",
                of = event.as_str(),
                route,
                upstream,
                kind,
                suppressed,
                "similar lines were left out"
            );
        }
    }
}

/// Writes a line for each throttle that has suppressed lines and whose next line may pass: the last
/// failures of a series are reported although no other follows. To be called about once a second.
pub(crate) fn report_suppressed() {
    report_suppressed_if(|throttle| throttle.take_turn(since_start()));
}

/// As `report_suppressed`, before the end of the process.
pub(crate) fn report_all_suppressed() {
    report_suppressed_if(|_| true);
}

fn report_suppressed_if(is_due: impl Fn(&Throttle) -> bool) {
    // A throttle without suppressed lines leaves the list without a line, and without a turn.
    let is_ended = |throttle: &mut &'static Throttle| throttle.suppressed.load(Relaxed) == 0 || is_due(throttle);
    let due: Vec<&'static Throttle> = lock(&SUPPRESSING).extract_if(.., is_ended).collect();
    due.iter().for_each(|throttle| throttle.is_listed.store(false, Relaxed));
    due.into_iter().for_each(Throttle::report_suppressed);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn since_start() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// Output format of the process log on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// Plain text, for a terminal.
    Text,
}

static LEVEL: OnceLock<reload::Handle<LineFilter, Registry>> = OnceLock::new();

/// Passes lines of a level and above. Those of libraries below `ERROR` have no event, and clients
/// can cause some of them at will: they are for debugging.
struct LineFilter(Level);

impl LineFilter {
    fn passes(&self, level: Level, target: &str) -> bool {
        let is_own =
            || ["gateway", "shard", "limiter", "tidegate"].contains(&target.split(':').next().unwrap_or_default());
        level <= self.0 && (level == Level::ERROR || self.0 >= Level::DEBUG || is_own())
    }
}

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for LineFilter {
    fn enabled(&self, line: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        self.passes(*line.level(), line.target())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::from_level(self.0))
    }
}

/// Writes log lines of `level` and above to standard error. A second call changes only the level.
pub fn init(level: Level, format: LogFormat) {
    let (filter, handle) = reload::Layer::new(LineFilter(level));
    let lines = match format {
        LogFormat::Json => {
            let layer = fmt::layer().event_format(JsonLines).fmt_fields(JsonFields::new());
            layer.with_writer(std::io::stderr).boxed()
        }
        LogFormat::Text => {
            let layer = fmt::layer().with_timer(LogTime).with_target(false).with_ansi(false);
            layer.with_writer(std::io::stderr).boxed()
        }
    };
    match tracing_subscriber::registry().with(filter).with(lines).with(TailLayer).try_init() {
        Ok(()) => drop(LEVEL.set(handle)),
        Err(_already_set) => set_level(level),
    }
}

/// Changes the level of a subscriber that `init` installed.
pub(crate) fn set_level(level: Level) {
    let Some(handle) = LEVEL.get() else { return };
    if let Err(error) = handle.reload(LineFilter(level)) {
        warn!(%error, "the log level was not changed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throttle_passes_one_line_a_second_and_counts_the_rest() {
        static THROTTLE: Throttle = Throttle::new();
        let throttle = &THROTTLE;
        assert_eq!(throttle.pass(Duration::from_millis(5)), Some(0));
        assert_eq!(throttle.pass(Duration::from_millis(6)), None);
        assert_eq!(throttle.pass(Duration::from_millis(1_004)), None);
        assert_eq!(throttle.pass(Duration::from_millis(1_005)), Some(2));
        assert_eq!(throttle.pass(Duration::from_millis(9_000)), Some(0));
    }

    /// The list of docs/metrics.md is complete, and so are the words of lines that are no events.
    #[test]
    fn all_events_are_documented() {
        let docs = include_str!("../../docs/metrics.md");
        let list = docs.split("`event`: `starting`").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("a list");
        let words = EventName::ALL.iter().map(|name| name.as_str()).filter(|name| *name != "starting");
        let missing: Vec<_> =
            words.chain(["events_suppressed"]).filter(|name| !list.contains(&format!("`{name}`"))).collect();
        assert_eq!(missing, [""; 0]);
    }

    #[test]
    fn lines_of_libraries_are_for_debugging() {
        let info = LineFilter(Level::INFO);
        assert!(info.passes(Level::INFO, "gateway::event") && info.passes(Level::WARN, "shard"));
        assert!(!info.passes(Level::DEBUG, "gateway::event") && !info.passes(Level::WARN, "rustls::check"));
        assert!(!info.passes(Level::WARN, "gateways") && info.passes(Level::ERROR, "rustls::check"));
        assert!(LineFilter(Level::DEBUG).passes(Level::WARN, "rustls::check"));
    }

    #[test]
    fn each_route_and_kind_of_failure_has_a_throttle() {
        let all: Vec<usize> = ["a", "b"]
            .iter()
            .flat_map(|route| UpstreamFault::ALL.iter().map(|kind| failure_throttle(route, *kind)))
            .collect();
        let mut unique = all.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), all.len());
        assert!(all.iter().all(|index| *index < FAILURE_THROTTLES));
    }

    #[test]
    fn lines_of_one_name_do_not_hide_those_of_another() {
        static THROTTLES: NamedThrottles = NamedThrottles::new();
        let now = Duration::from_secs(1);
        for (name, kind) in [("a", "x"), ("a", "y"), ("b", "x")] {
            assert_eq!(THROTTLES.of(name, kind).pass(now), Some(0), "{name} {kind}");
            assert_eq!(THROTTLES.of(name, kind).pass(now), None, "{name} {kind}");
        }
        // The number of names is bounded: further ones share.
        for name in 0..NAMES_MAX {
            THROTTLES.of(&name.to_string(), "");
        }
        assert!(std::ptr::eq(THROTTLES.of("further", ""), THROTTLES.of("others", "")));
        assert!(!std::ptr::eq(THROTTLES.of("a", "x"), THROTTLES.of("others", "")));
    }

    #[test]
    fn metric_counts_suppressed_events() {
        let before = EVENTS.get(EventName::UpstreamFailed);
        for _ in 0..5 {
            Event::UpstreamFailed { route: "r", endpoint: &"127.0.0.1:1", kind: UpstreamFault::Connect }.emit();
        }
        assert!(EVENTS.get(EventName::UpstreamFailed) >= before + 5);
        expose();
        assert!(
            metrics::exposition(metrics::ExpositionFormat::Text)
                .contains("tidegate_events_total{event=\"upstream_failed\"}")
        );
    }

    #[test]
    fn second_init_does_not_panic() {
        init(Level::ERROR, LogFormat::Json);
        init(Level::ERROR, LogFormat::Text);
    }
}
