//! The configuration: one document, TOML or JSON, read whole and checked whole.
//!
//! A document goes through four steps, each in its file: `document` (a tree with places), `section` (every key read into the
//! type of the module that owns it), `check` (what has to fit together) and, where anything is wrong, a [`Report`] of all of
//! it. Nothing here opens a socket or a log. A [`Config`] that comes out needs no further checking.

mod check;
mod document;
mod expand;
mod fault;
mod json;
mod kind;
mod nearest;
mod reading;
pub mod reference;
mod section;
mod table;
#[cfg(test)]
mod tests;
mod units;

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use crate::log::Access;
pub use fault::{Code, Fault, Report, Severity};

use crate::{accept, admin, cache, identify, limit, route, upstream};
use expand::Values;
use fault::{At, Problem};
use reading::Reading;

/// A checked configuration. Every name in it is resolved, every number within its range.
#[derive(Clone)]
pub struct Config {
    /// The process.
    pub server: Server,
    /// The addresses that are served, at least one.
    pub listen: Vec<accept::Listen>,
    /// The admin address.
    pub admin: admin::Settings,
    /// What a client may send.
    pub http: crate::http::Limits,
    /// How many connections may stand.
    pub accept: accept::Settings,
    /// How callers are identified.
    pub identify: identify::Settings,
    /// Weights and limit rules.
    pub limit: limit::Settings,
    /// The remote tier; `None`: there is no Redis.
    pub remote: Option<shard::RemoteSettings>,
    /// The local tier and the cache key.
    pub cache: cache::Settings,
    /// What stands behind the gateway; routes refer to it by index.
    pub upstreams: Vec<upstream::Settings>,
    /// The routes, in the order of the file.
    pub routes: Vec<route::Settings>,
    /// What is logged.
    pub log: Log,
    /// Every other file that belongs to it: values, pages, certificates and their keys.
    pub files: Vec<PathBuf>,
}

/// Shows no more than the shape: tokens, secrets and addresses of Redis belong in no log.
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

/// The process (`[server]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Event loops; 0: one per core available to the process.
    pub workers: usize,
    /// This gateway's name in a fleet.
    pub node: String,
    /// How long running requests may take to end after SIGTERM.
    pub drain_timeout: Duration,
}

impl Default for Server {
    fn default() -> Self {
        Server { workers: 0, node: "node-1".to_owned(), drain_timeout: Duration::from_secs(30) }
    }
}

/// What is logged (`[log]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// Where the access log goes.
    pub access: Access,
    /// The least severe event that is logged.
    pub level: tracing::Level,
}

impl Default for Log {
    fn default() -> Self {
        Log { access: Access::Stdout, level: tracing::Level::INFO }
    }
}

/// How a document is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Format {
    /// TOML 1.0.
    Toml,
    /// JSON (RFC 8259).
    Json,
}

/// A document to read.
pub struct Source<'a> {
    /// What messages call it.
    pub name: &'a str,
    /// Its text.
    pub text: &'a str,
    /// How it is written.
    pub format: Format,
    /// Where relative paths in it start.
    pub base: &'a Path,
    /// The environment that `${NAME}` is looked up in.
    pub env: &'a dyn Fn(&str) -> Option<String>,
}

impl Config {
    /// Reads the file at `path`; it is JSON where its name ends in `.json`. Warnings come with the configuration, errors
    /// instead of it.
    pub fn load(path: &Path) -> Result<(Config, Report), Report> {
        let name = path.display().to_string();
        let text = fs::read_to_string(path).map_err(|error| {
            let problem = Problem::new(Code::File, format!("cannot read {name}: {error}"));
            Report::new(&name, "", vec![At::default().error(problem)])
        })?;
        let json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        Config::parse(&Source {
            name: &name,
            text: &text,
            format: if json { Format::Json } else { Format::Toml },
            base: path.parent().unwrap_or(Path::new("")),
            env: &|name| std::env::var(name).ok(),
        })
    }

    /// Reads and checks a document.
    pub fn parse(source: &Source<'_>) -> Result<(Config, Report), Report> {
        let report = |faults| Report::new(source.name, source.text, faults);
        let root = document::read(source.text, source.format).map_err(report)?;
        let reading = Reading::new(source.text, Values::new(source.base, source.env));
        let draft = reading.document(&root, section::read);
        let mut config = check::resolve(draft, &reading);
        config.files = reading.values.files_read();
        config.http.dropped_trailers = config.identify.fields().map(str::to_owned).collect();
        let pairs = config.listen.iter().filter_map(|listen| listen.tls.as_ref()).flat_map(|tls| &tls.certificates);
        config.files.extend(pairs.flat_map(|files| [files.cert.clone(), files.key.clone()]));
        let report = report(reading.into_faults());
        if report.has_errors() { Err(report) } else { Ok((config, report)) }
    }

    /// What `tidegate run --upstream URL` runs: one listener, one upstream, one route for everything that caches what the
    /// origin allows, and no limits.
    pub fn for_upstream(url: &str, listen: Option<SocketAddr>) -> Result<Config, Report> {
        let endpoint = section::endpoint_address(url).map_err(|problem| {
            let at = At { path: String::new(), span: 0..url.len() };
            Report::new("--upstream", url, vec![at.error(problem)])
        })?;
        let everything = route::PathPattern::Prefix("/".to_owned());
        let default = accept::Listen::default();
        Ok(Config {
            server: Server::default(),
            listen: vec![accept::Listen { address: listen.unwrap_or(default.address), ..default }],
            admin: admin::Settings::default(),
            http: crate::http::Limits::default(),
            accept: accept::Settings::default(),
            identify: identify::Settings::default(),
            limit: limit::Settings::default(),
            remote: None,
            cache: cache::Settings::default(),
            upstreams: vec![upstream::Settings::new("upstream".into(), vec![endpoint])],
            routes: vec![route::Settings::new("everything".into(), everything, 0)],
            log: Log::default(),
            files: Vec::new(),
        })
    }
}
