//! Sends spans to a collector, on a thread of its own.
//!
//! Bounds: the queue holds `QUEUE_MAX` requests; a batch is sent at `BATCH_MAX` requests or after
//! `BATCH_AGE_MAX`, within `TIMEOUT`, and once more if the collector could not take it.

use std::io::Write as _;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, io};

use flate2::Compression;
use flate2::write::GzEncoder;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

use super::FinishedRequest;
use super::otlp::{self, Resource};
use crate::event::Event;
use crate::label;
use crate::metrics::{self, Counter, Counters};

/// Requests that wait for the export: about 4 MiB at most, and a second of 2,000 sampled requests.
const QUEUE_MAX: usize = 2_048;
/// Requests of one batch: far below the 4 MiB that collectors accept.
const BATCH_MAX: usize = 256;
const BATCH_AGE_MAX: Duration = Duration::from_secs(1);
/// Longest time of one export. Only later exports wait for it.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Pause before the second try.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long the end of the process waits for the last export.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

label! {
    /// Why spans were not exported.
    DropReason, "reason", {
        QueueFull = "queue_full",
        ExportFailed = "export_failed",
    }
}

static EXPORTED: LazyLock<Counter> = LazyLock::new(Counter::default);
static DROPPED: LazyLock<Counters<DropReason>> = LazyLock::new(Counters::default);

/// Exposes the metrics of this module.
pub(crate) fn expose() {
    metrics::expose_counter_with("tidegate_trace_spans_exported", "Spans that a collector has taken.", |emit| {
        emit(&[], EXPORTED.get());
    });
    metrics::expose_counters("tidegate_trace_spans_dropped", "Spans that were not exported, by reason.", &DROPPED);
}

/// `[tracing]`, with `tracing.otlp` set.
#[derive(Clone, PartialEq)]
pub(crate) struct TracingConfig {
    /// The URL to which traces are posted.
    pub(crate) url: String,
    /// The share of new traces that are sampled, from 0 to 1.
    pub(crate) ratio: f64,
    pub(crate) service_name: String,
    /// Whether spans have the query, which may carry tokens and signatures.
    pub(crate) has_query: bool,
    pub(crate) compression: ExportCompression,
    /// Fields of an export, such as credentials.
    pub(crate) headers: Vec<(String, String)>,
}

/// The coding of exports, named as in `OTEL_EXPORTER_OTLP_COMPRESSION`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ExportCompression {
    #[default]
    None,
    Gzip,
}

impl ExportCompression {
    /// The body as it is sent.
    fn encode(self, body: String) -> io::Result<Vec<u8>> {
        match self {
            ExportCompression::None => Ok(body.into_bytes()),
            ExportCompression::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
                encoder.write_all(body.as_bytes())?;
                encoder.finish()
            }
        }
    }
}

/// Without the values of fields, which may be secrets.
impl fmt::Debug for TracingConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.headers.iter().map(|(name, _)| &**name).collect();
        write!(
            f,
            "TracingConfig {{ {}, {}, {:?}, {:?}, {names:?} }}",
            self.url, self.ratio, self.service_name, self.compression
        )
    }
}

enum Message {
    Request(Box<FinishedRequest>),
    Close,
}

/// The queue of requests whose spans are to be exported, and the thread that empties it. The
/// thread ends when all users of the queue are gone, or by `close`.
pub(crate) struct TraceExporter {
    config: TracingConfig,
    node: String,
    sender: SyncSender<Message>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl TraceExporter {
    /// Takes over the exporter of the previous configuration if nothing has changed, or starts one.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn replacing(
        old: Option<&Arc<TraceExporter>>,
        config: &TracingConfig,
        node: &str,
    ) -> io::Result<Arc<TraceExporter>> {
        if let Some(old) = old.filter(|old| old.config == *config && old.node == node) {
            return Ok(Arc::clone(old));
        }
        let (sender, receiver) = sync_channel(QUEUE_MAX);
        let resource = Resource { service_name: config.service_name.clone(), node: node.to_owned() };
        let run = Exporter { config: config.clone(), resource, receiver };
        let thread = thread::Builder::new().name("trace-export".to_owned()).spawn(move || run.run())?;
        let (config, thread) = (config.clone(), Mutex::new(Some(thread)));
        Ok(Arc::new(TraceExporter { config, node: node.to_owned(), sender, thread }))
    }

    /// Queues a request for the export, or drops it. Does not wait.
    pub(crate) fn submit(&self, mut request: FinishedRequest) {
        if !self.config.has_query {
            request.target.truncate(request.target.find('?').unwrap_or(request.target.len()));
        }
        let spans = request.spans.count();
        if self.sender.try_send(Message::Request(Box::new(request))).is_err() {
            DROPPED.add(DropReason::QueueFull, spans);
        }
    }

    /// Exports what is queued, for at most 2 s.
    pub(crate) fn close(&self) {
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        while self.sender.try_send(Message::Close).is_err() && Instant::now() < deadline && !thread.is_finished() {
            thread::sleep(Duration::from_millis(5));
        }
        while !thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The state of the thread.
struct Exporter {
    config: TracingConfig,
    resource: Resource,
    receiver: Receiver<Message>,
}

impl Exporter {
    fn run(self) {
        let agent = self.agent();
        let mut batch: Vec<FinishedRequest> = Vec::new();
        let mut is_open = true;
        while is_open {
            match self.receiver.recv() {
                Ok(Message::Request(request)) => batch.push(*request),
                Ok(Message::Close) | Err(_) => return,
            }
            let due = Instant::now() + BATCH_AGE_MAX;
            while batch.len() < BATCH_MAX {
                match self.receiver.recv_timeout(due.saturating_duration_since(Instant::now())) {
                    Ok(Message::Request(request)) => batch.push(*request),
                    Err(RecvTimeoutError::Timeout) => break,
                    Ok(Message::Close) | Err(RecvTimeoutError::Disconnected) => {
                        is_open = false;
                        break;
                    }
                }
            }
            self.export(&agent, &batch);
            batch.clear();
        }
    }

    fn agent(&self) -> ureq::Agent {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = rustls_native_certs::load_native_certs().certs;
        let roots = roots.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect();
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(provider)
            .root_certs(RootCerts::Specific(Arc::new(roots)));
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls.build());
        ureq::Agent::new_with_config(config.build())
    }

    fn export(&self, agent: &ureq::Agent, batch: &[FinishedRequest]) {
        let spans = batch.iter().map(|request| request.spans.count()).sum();
        let text = otlp::encode(&self.resource, batch).to_string();
        let body = self.config.compression.encode(text).expect("a write to memory does not fail");
        let mut sent = self.send(agent, &body);
        if sent.as_ref().is_err_and(|error| error.may_pass) {
            thread::sleep(RETRY_PAUSE);
            sent = self.send(agent, &body);
        }
        match sent {
            Ok(()) => EXPORTED.add(spans),
            Err(error) => {
                DROPPED.add(DropReason::ExportFailed, spans);
                Event::TraceExportFailed { url: &self.config.url, spans, error: &error.text }.emit();
            }
        }
    }

    fn send(&self, agent: &ureq::Agent, body: &[u8]) -> Result<(), ExportError> {
        let mut request = agent.post(&self.config.url).header("content-type", "application/json");
        if self.config.compression == ExportCompression::Gzip {
            request = request.header("content-encoding", "gzip");
        }
        for (name, value) in &self.config.headers {
            request = request.header(name, value);
        }
        let response = request.send(body).map_err(|error| ExportError { text: error.to_string(), may_pass: true })?;
        match response.status().as_u16() {
            200..=299 => Ok(()),
            // The statuses that the protocol names as passing.
            status => {
                let may_pass = matches!(status, 429 | 502..=504);
                Err(ExportError { text: format!("the response has status {status}"), may_pass })
            }
        }
    }
}

struct ExportError {
    text: String,
    /// Whether the same export may succeed later.
    may_pass: bool,
}
