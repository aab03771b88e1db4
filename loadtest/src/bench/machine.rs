//! Date, commit, machine and versions of a bench run.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::available_parallelism;
use std::time::SystemTime;
use std::{env, fs};

use serde::{Deserialize, Serialize};

use crate::bench::comparison::BenchPlan;
use crate::process::tools::{Tool, Tools};

/// One run of the bench; it may measure several workloads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BenchRun {
    pub(crate) date: String,
    pub(crate) commit: String,
    /// Whether the checkout differed from the commit, apart from stored figures.
    pub(crate) has_changes: bool,
    pub(crate) command: String,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
    pub(crate) machine: BTreeMap<String, String>,
    pub(crate) versions: BTreeMap<String, String>,
}

impl BenchRun {
    pub(crate) fn read(plan: &BenchPlan, tools: &Tools) -> Self {
        let mut versions = BTreeMap::from([
            ("wrk".to_owned(), version(tools.path(Tool::Wrk), "-v")),
            ("tidegate".to_owned(), version(&plan.tidegate, "--version")),
        ]);
        if tools.has(Tool::H2load) {
            versions.insert("h2load".to_owned(), version(tools.path(Tool::H2load), "--version"));
        }
        for tool in plan.peers.iter().filter_map(|peer| peer.tool()) {
            let argument = match tool {
                Tool::Varnishd => "-V",
                Tool::Envoy => "--version",
                Tool::Caddy => "version",
                _ => "-v",
            };
            if !tools.has(tool) {
                continue;
            }
            versions.entry(tool.name().to_owned()).or_insert_with(|| version(tools.path(tool), argument));
        }
        let changes = git(&["status", "--porcelain", "--", ":/", ":(top,exclude)docs/performance"]);
        BenchRun {
            date: httpdate::fmt_http_date(SystemTime::now()),
            commit: git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(unknown),
            has_changes: changes.is_none_or(|changes| !changes.is_empty()),
            command: command_line(env::args()),
            rounds: plan.rounds,
            seconds: plan.seconds,
            machine: machine(),
            versions,
        }
    }
}

fn machine() -> BTreeMap<String, String> {
    let cores = available_parallelism().map_or(0, std::num::NonZero::get);
    let facts = [
        ("processor", value_of("/proc/cpuinfo", "model name", ':')),
        ("cores", cores.to_string()),
        ("memory", value_of("/proc/meminfo", "MemTotal", ':')),
        ("kernel", read("/proc/sys/kernel/osrelease")),
        ("system", value_of("/etc/os-release", "PRETTY_NAME", '=')),
        ("load average before", read("/proc/loadavg")),
    ];
    facts.into_iter().map(|(name, fact)| (name.to_owned(), fact)).collect()
}

/// Cores, processor and system in one line.
pub(crate) fn description() -> String {
    let cores = available_parallelism().map_or(0, std::num::NonZero::get);
    let (processor, kernel) = (value_of("/proc/cpuinfo", "model name", ':'), read("/proc/sys/kernel/osrelease"));
    let build = if cfg!(debug_assertions) { "debug build of the load generator" } else { "release build" };
    format!("{cores} cores, {processor}, Linux {kernel}, {build}")
}

/// The most files that this process may have open.
pub(crate) fn open_files() -> u64 {
    let limits = read("/proc/self/limits");
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(u64::MAX)
}

fn unknown() -> String {
    "unknown".to_owned()
}

fn read(file: &str) -> String {
    fs::read_to_string(file).map_or_else(|_| unknown(), |text| text.trim().to_owned())
}

/// First value of `name` in a file with lines such as `name : value`.
fn value_of(file: &str, name: &str, separator: char) -> String {
    let text = read(file);
    let value = text.lines().find_map(|line| {
        let (key, value) = line.split_once(separator)?;
        (key.trim() == name).then(|| value.trim().trim_matches('"').to_owned())
    });
    value.unwrap_or_else(unknown)
}

/// First line of a program's version output, on either stream.
fn version(program: &Path, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output();
    let text = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let line = text.lines().map(str::trim).find(|line| !line.is_empty());
    // Envoy prints its path, which differs between machines.
    let path = program.display().to_string();
    line.map_or_else(unknown, |line| line.strip_prefix(&path).unwrap_or(line).trim().to_owned())
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The command line without the directory of the program, which differs between machines.
fn command_line(mut arguments: impl Iterator<Item = String>) -> String {
    let program = arguments.next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default().to_owned();
    std::iter::once(name).chain(arguments).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unavailable_facts_are_unknown() {
        assert_eq!(version(Path::new("/nonexistent"), "-v"), "unknown");
        assert_eq!(value_of("/nonexistent", "a", ':'), "unknown");
        assert_eq!(git(&["no-such-command"]), None);
    }

    #[test]
    fn command_line_starts_with_the_program_name() {
        let arguments = ["/a/b/loadtest", "bench", "--write", "docs/performance"].map(str::to_owned);
        assert_eq!(command_line(arguments.into_iter()), "loadtest bench --write docs/performance");
    }
}
