//! Whole documents: rejected ones with their faults, accepted ones with the resulting
//! configuration.

mod accepted;
mod checks;
mod complete_documents;
mod credentials;
mod irregular_files;
mod kubernetes;
mod no_effect;
mod rejected;
mod schema;
mod tokens;

use std::path::Path;

use super::{Config, ConfigDocument, ConfigReport, DocumentFormat};

/// The smallest valid document.
const MINIMAL: &str = r#"
version = 1
[upstreams.shop]
endpoints = ["http://127.0.0.1:3000"]
[[routes]]
name = "everything"
match = { path = "/*" }
upstream = "shop"
"#;

fn parse(text: &str, format: DocumentFormat) -> Result<(Config, ConfigReport), ConfigReport> {
    parse_in(Path::new("/nonexistent"), text, format)
}

fn parse_in(base: &Path, text: &str, format: DocumentFormat) -> Result<(Config, ConfigReport), ConfigReport> {
    let env = |name: &str| (name == "PORT").then(|| "9000".to_owned());
    let parsed = Config::parse(&ConfigDocument { name: "test.toml", text, format, base, env: &env });
    if parsed.is_ok() {
        assert_eq!(schema::schema_fault(text, format), None, "accepted, but not by the schema:\n{text}");
    }
    parsed
}

fn parse_toml(text: &str) -> Result<(Config, ConfigReport), ConfigReport> {
    parse(text, DocumentFormat::Toml)
}

/// Faults of a document, warnings included, as `line:column path: message (hint)`.
fn faults(text: &str) -> Vec<String> {
    lines(&match parse_toml(text) {
        Ok((_, warnings)) => warnings,
        Err(report) => report,
    })
}

fn lines(report: &ConfigReport) -> Vec<String> {
    let line = |fault: &super::ConfigFault| {
        let (line, column) = report.position(fault);
        let hint = fault.hint.as_ref().map_or(String::new(), |hint| format!(" ({hint})"));
        format!("{line}:{column} {}: {}{hint}", fault.path, fault.message)
    };
    report.faults().iter().map(line).collect()
}

/// The whole configuration as text for comparisons, including the store's, whose `Debug` hides
/// secrets.
fn debug_text(config: &Config) -> String {
    let remote = config.remote.as_ref().map(|remote| {
        let regions = remote.regions.iter().map(|(name, region)| (name, region.slots, &region.endpoints));
        (remote.deadline, &remote.secret, remote.object_bytes, regions.collect::<Vec<_>>())
    });
    let Config {
        server,
        listen,
        admin,
        http,
        accept,
        identify,
        limit,
        remote: _,
        cache,
        dns,
        kubernetes,
        upstreams,
        pages,
        routes,
        log,
        tracing,
        document: _,
        files: _,
    } = config;
    let shared = (server, listen, admin, http, accept, identify, limit, cache, log, tracing);
    format!("{shared:#?} {remote:#?} {dns:#?} {kubernetes:#?} {upstreams:#?} {pages:#?} {routes:#?}")
}
