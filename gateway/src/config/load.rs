//! Reads a configuration: from a file, from text, or from the arguments of `tidegate run
//! --upstream`.

use std::net::SocketAddr;
use std::path::Path;
use std::{fs, io};

use super::document::{self, ConfigDocument, DocumentFormat};
use super::expand::ExpansionEnvironment;
use super::fault::{ConfigProblem, ConfigReport, DocumentLocation, FaultCode};
use super::model::{Config, ConfigFile, LogConfig, ServerConfig};
use super::print::{self, PrintOptions};
use super::read_context::{ReadContext, ReadPurpose};
use super::{check, section, table_reader};
use crate::connect::UpstreamTls;
use crate::http::h1;
use crate::{accept, admin, cache, discovery, identify, limit, route, tls, upstream};

impl Config {
    /// Reads the file at `path`, as JSON if its name ends in `.json`. Warnings are returned with
    /// the configuration, errors instead of it.
    pub fn load(path: &Path) -> Result<(Config, ConfigReport), ConfigReport> {
        with_file(path, Config::parse)
    }

    /// As [`Config::load`], for a process that runs: the certificates that its listeners have
    /// loaded stay in use if their files are missing, which is a warning.
    pub(crate) fn reload(path: &Path) -> Result<(Config, ConfigReport), ConfigReport> {
        with_file(path, |document| Config::parse_for(document, ReadPurpose::Reload))
    }

    /// As [`Config::load`], to find faults: also checks what a start would find later, in files.
    /// The path `-` is standard input.
    pub fn verify(path: &Path) -> Result<(Config, ConfigReport), ConfigReport> {
        with_file(path, |document| Config::parse_for(document, ReadPurpose::Check))
    }

    /// The effective configuration of the file at `path` as text: a line for each key. Errors are
    /// returned instead of it.
    pub fn print(path: &Path, options: PrintOptions) -> Result<String, ConfigReport> {
        with_file(path, |document| print::print(document, options))
    }

    /// Reads and checks a document.
    pub fn parse(document: &ConfigDocument<'_>) -> Result<(Config, ConfigReport), ConfigReport> {
        Config::parse_for(document, ReadPurpose::Run)
    }

    fn parse_for(document: &ConfigDocument<'_>, purpose: ReadPurpose) -> Result<(Config, ConfigReport), ConfigReport> {
        let report = |faults| ConfigReport::new(document.name, document.text, faults);
        let root = document::parse(document.text, document.format).map_err(report)?;
        let environment = ExpansionEnvironment::new(document.base, document.env);
        let mut context = ReadContext::new(document.text, environment);
        context.purpose = purpose;
        let draft = table_reader::read_document(&context, &root, section::read);
        let mut config = check::resolve(draft, &context);
        config.document = Some(blake3::hash(document.text.as_bytes()));
        config.files = context.environment.files_read();
        let credentials = config.routes.iter().filter_map(|route| Some(route.auth.as_ref()?.field()));
        let untrusted = config.identify.untrusted_fields.iter().map(|name| &**name);
        let untrusted = untrusted.filter(|name| h1::is_allowed_trailer(name));
        let dropped = config.identify.fields().chain(credentials).chain(untrusted);
        config.http.dropped_trailers = dropped.map(str::to_owned).collect();
        let tls = config.listen.iter().filter_map(|listen| listen.tls.as_ref());
        config.files.extend(tls.flat_map(tls::TlsConfig::files).map(ConfigFile::before_use));
        let report = report(context.into_faults());
        if report.has_errors() { Err(report) } else { Ok((config, report)) }
    }

    /// Configuration of `tidegate run --upstream URL`: one listener, one upstream, one route for
    /// all requests that caches what the origin allows, and no limits.
    pub fn for_upstream(url: &str, listen: Option<SocketAddr>) -> Result<Config, ConfigReport> {
        let endpoint = section::parse_endpoint(url).map_err(|problem| {
            let at = DocumentLocation { path: String::new(), span: 0..url.len() };
            ConfigReport::new("--upstream", url, vec![at.error(problem)])
        })?;
        if endpoint.scheme.is_kubernetes() {
            let problem = ConfigProblem::bad_value("a service of Kubernetes needs a configuration file");
            let hint = "write it to `upstreams.NAME.endpoints` of a file, and start with `--config FILE`";
            let at = DocumentLocation { path: String::new(), span: 0..url.len() };
            return Err(ConfigReport::new("--upstream", url, vec![at.error(problem.hint(hint))]));
        }
        let mut upstream = upstream::UpstreamConfig::new("upstream".into(), vec![endpoint.clone()]);
        if endpoint.scheme.has_tls() {
            upstream.tls = Some(UpstreamTls::verified().map_err(|error| {
                let problem = ConfigProblem::new(FaultCode::File, format!("TLS to this upstream: {error}"));
                let hint = "install the package `ca-certificates`, or name a file with `SSL_CERT_FILE`";
                let at = DocumentLocation { path: String::new(), span: 0..url.len() };
                ConfigReport::new("--upstream", url, vec![at.error(problem.hint(hint))])
            })?);
        }
        let all_paths = route::PathPattern::Prefix("/".to_owned());
        let default = accept::ListenConfig::default();
        Ok(Config {
            server: ServerConfig::default(),
            listen: vec![accept::ListenConfig { address: listen.unwrap_or(default.address), ..default }],
            admin: admin::AdminConfig::default(),
            http: crate::http::HttpLimits::default(),
            accept: accept::ConnectionLimits::default(),
            identify: identify::IdentityConfig::default(),
            limit: limit::LimitConfig::default(),
            remote: None,
            cache: cache::CacheConfig::default(),
            dns: discovery::DnsConfig::default(),
            kubernetes: discovery::kubernetes::KubernetesConfig::default(),
            upstreams: vec![upstream],
            pages: Vec::new(),
            routes: vec![route::RouteConfig::new("everything".into(), all_paths, 0)],
            log: LogConfig::default(),
            tracing: None,
            document: None,
            files: Vec::new(),
        })
    }
}

/// The faults with which a document is refused, when it is to run and when it is checked.
#[cfg(test)]
pub(super) fn parse_for_purposes(base: &Path, text: &str, format: DocumentFormat) -> [ConfigReport; 2] {
    [ReadPurpose::Run, ReadPurpose::Check].map(|purpose| {
        let document = ConfigDocument { name: "test.toml", text, format, base, env: &|_| None };
        Config::parse_for(&document, purpose).map_or_else(|report| report, |(_, warnings)| warnings)
    })
}

/// Reads the file at `path`, as JSON if its name ends in `.json`, and passes it to `read`. Standard
/// input, `-`, is JSON if it begins with a brace.
fn with_file<R>(
    path: &Path,
    read: impl FnOnce(&ConfigDocument<'_>) -> Result<R, ConfigReport>,
) -> Result<R, ConfigReport> {
    let name = path.display().to_string();
    let failed = |code, message, hint: &str| {
        let problem = ConfigProblem::new(code, message);
        let problem = if hint.is_empty() { problem } else { problem.hint(hint) };
        ConfigReport::new(&name, "", vec![DocumentLocation::default().error(problem)])
    };
    let has_extension = |wanted: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(wanted));
    if has_extension("yaml") || has_extension("yml") {
        let hint = "write the document in TOML, or in JSON with the extension `.json`";
        return Err(failed(FaultCode::Syntax, format!("{name} is YAML, which is not read"), hint));
    }
    let is_stdin = path == Path::new("-");
    let text = if is_stdin { io::read_to_string(io::stdin().lock()) } else { fs::read_to_string(path) };
    let text = text.map_err(|error| failed(FaultCode::File, format!("cannot read {name}: {error}"), ""))?;
    let is_json = has_extension("json") || is_stdin && text.trim_start().starts_with('{');
    read(&ConfigDocument {
        name: if is_stdin { "standard input" } else { &name },
        text: &text,
        format: if is_json { DocumentFormat::Json } else { DocumentFormat::Toml },
        base: path.parent().unwrap_or(Path::new("")),
        env: &|name| std::env::var(name).ok(),
    })
}
