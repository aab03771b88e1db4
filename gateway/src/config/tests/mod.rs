//! Whole documents: what is refused, with which words and where, and what comes out of those that are not.

mod accepted;
mod checks;
mod contract;
mod refused;
mod tokens;

use std::path::Path;

use super::{Config, Format, Report, Source};

/// The least a document holds.
const LEAST: &str = r#"
version = 1
[upstreams.shop]
endpoints = ["http://127.0.0.1:3000"]
[[routes]]
name = "everything"
match = { path = "/*" }
upstream = "shop"
"#;

fn read(text: &str, format: Format) -> Result<(Config, Report), Report> {
    read_in(Path::new("/nonexistent"), text, format)
}

fn read_in(base: &Path, text: &str, format: Format) -> Result<(Config, Report), Report> {
    let env = |name: &str| (name == "PORT").then(|| "9000".to_owned());
    Config::parse(&Source { name: "test.toml", text, format, base, env: &env })
}

fn toml(text: &str) -> Result<(Config, Report), Report> {
    read(text, Format::Toml)
}

/// The faults of a document as `line:column path: message (hint)`, warnings included.
fn faults(text: &str) -> Vec<String> {
    lines(&match toml(text) {
        Ok((_, warnings)) => warnings,
        Err(report) => report,
    })
}

fn lines(report: &Report) -> Vec<String> {
    let line = |fault: &super::Fault| {
        let (line, column) = report.position(fault);
        let hint = fault.hint.as_ref().map_or(String::new(), |hint| format!(" ({hint})"));
        format!("{line}:{column} {}: {}{hint}", fault.path, fault.message)
    };
    report.faults().iter().map(line).collect()
}

/// All of a configuration as text, to be compared; the store's settings show themselves to nobody else.
fn shown(config: &Config) -> String {
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
        upstreams,
        routes,
        log,
        files: _,
    } = config;
    let shared = (server, listen, admin, http, accept, identify, limit, cache, log);
    format!("{shared:#?} {remote:#?} {upstreams:#?} {routes:#?}")
}
