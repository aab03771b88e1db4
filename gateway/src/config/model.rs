//! The checked configuration: every name resolved, every number within its range.

use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::http::target::PathRules;
use crate::log::{AccessLogFormat, AccessLogTarget};
use crate::spans::TracingConfig;
use crate::{accept, admin, cache, discovery, identify, limit, pages, route, upstream};

/// A checked configuration: every name is resolved, and every number is within its range.
#[derive(Clone)]
pub struct Config {
    /// Process-wide settings (`[server]`).
    pub(crate) server: ServerConfig,
    /// Listeners, at least one.
    pub(crate) listen: Vec<accept::ListenConfig>,
    /// The admin listener.
    pub admin: admin::AdminConfig,
    /// Bounds of what a client may send.
    pub(crate) http: crate::http::HttpLimits,
    /// Bounds of the number of connections.
    pub(crate) accept: accept::ConnectionLimits,
    /// Identification of callers.
    pub(crate) identify: identify::IdentityConfig,
    /// Weights and limit rules.
    pub(crate) limit: limit::LimitConfig,
    /// The remote cache layer; `None` without Redis.
    pub(crate) remote: Option<shard::RemoteConfig>,
    /// The local cache layer and the cache key.
    pub(crate) cache: cache::CacheConfig,
    /// Resolution of the names of endpoints.
    pub(crate) dns: discovery::DnsConfig,
    /// Access to the API server of Kubernetes.
    pub(crate) kubernetes: discovery::kubernetes::KubernetesConfig,
    /// Upstreams; routes refer to them by index.
    pub(crate) upstreams: Vec<upstream::UpstreamConfig>,
    /// Pages for the gateway's own responses (`[pages]`).
    pub(crate) pages: pages::ErrorPages,
    /// Routes, in source order.
    pub(crate) routes: Vec<route::RouteConfig>,
    /// Logs (`[log]`).
    pub log: LogConfig,
    /// Export of spans (`[tracing]`); `None`: requests are not traced.
    pub(crate) tracing: Option<TracingConfig>,
    /// Digest of the document.
    pub(crate) document: FileDigest,
    /// All other files that the configuration refers to: values, pages, certificates and keys.
    pub(crate) files: Vec<ConfigFile>,
}

/// Shows the shape only: tokens, secrets and Redis addresses must not appear in logs.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("node", &self.server.node)
            .field("listen", &self.listen)
            .field("upstreams", &self.upstreams.len())
            .field("routes", &self.routes.len())
            .finish_non_exhaustive()
    }
}

/// Process-wide settings (`[server]`).
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    /// Event loops; 0: one per core available to the process.
    pub(crate) workers: usize,
    /// Name of this node in the fleet.
    pub(crate) node: String,
    /// The zone of this node; endpoints of the same one are preferred. `None`: none is.
    pub(crate) zone: Option<String>,
    /// Longest time for requests in flight to complete after SIGTERM.
    pub(crate) drain_timeout: Duration,
    /// After SIGTERM: how long connections are accepted and idle ones kept; at most
    /// `drain_timeout`.
    pub(crate) drain_idle: Duration,
    /// Unix socket on which this process hands its listeners to a successor; `None`: it does not.
    pub(crate) upgrade_socket: Option<PathBuf>,
    /// The normal form of paths.
    pub(crate) paths: PathRules,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            workers: 0,
            node: "node-1".to_owned(),
            zone: None,
            drain_timeout: Duration::from_secs(30),
            drain_idle: Duration::from_secs(10),
            upgrade_socket: None,
            paths: PathRules::default(),
        }
    }
}

/// Destination of the access log and level of the log (`[log]`).
#[derive(Clone, Debug, PartialEq)]
pub struct LogConfig {
    /// Destination of the access log.
    pub(crate) access: AccessLogTarget,
    /// The form of its lines.
    pub(crate) format: AccessLogFormat,
    /// Least severe event in the log.
    pub level: tracing::Level,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { access: AccessLogTarget::Stdout, format: AccessLogFormat::default(), level: tracing::Level::INFO }
    }
}

/// Digest of the contents of a file; `None`: it could not be read.
pub(crate) type FileDigest = Option<blake3::Hash>;

/// The part of a file that its digest covers. Each larger file is refused by its use.
const DIGEST_BYTES_MAX: u64 = (256 << 20) + 1;

/// Digest of a regular file, which is read in pieces.
pub(crate) fn digest(path: &Path) -> FileDigest {
    // A pipe or a device would block, and is refused by its use.
    std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(std::fs::File::open(path).ok()?.take(DIGEST_BYTES_MAX)).ok()?;
    Some(hasher.finalize())
}

/// A file that the configuration refers to, and its contents before they were used: a later watch
/// detects a change since then.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ConfigFile {
    pub(crate) path: PathBuf,
    pub(crate) contents: FileDigest,
}

impl ConfigFile {
    /// To be called before the file is read for its use.
    pub(crate) fn before_use(path: &Path) -> Self {
        ConfigFile { path: path.to_owned(), contents: digest(path) }
    }
}
