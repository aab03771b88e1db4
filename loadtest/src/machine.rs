//! Where, when and with what a bench ran.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::available_parallelism;
use std::time::SystemTime;
use std::{env, fs};

use serde::{Deserialize, Serialize};

use crate::bench::Plan;
use crate::tools::{Tool, Tools};

/// One run of the bench, which may measure several workloads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) date: String,
    pub(crate) commit: String,
    /// Whether the checkout differed from the commit, figures of earlier runs apart.
    pub(crate) has_changes: bool,
    pub(crate) command: String,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
    pub(crate) machine: BTreeMap<String, String>,
    pub(crate) versions: BTreeMap<String, String>,
}

impl Run {
    pub(crate) fn read(plan: &Plan, tools: &Tools) -> Self {
        let mut versions = BTreeMap::from([
            ("wrk".to_owned(), version(tools.path(Tool::Wrk), "-v")),
            ("tidegate".to_owned(), version(&plan.tidegate, "--version")),
        ]);
        for tool in plan.peers.iter().filter_map(|peer| peer.tool()) {
            let argument = if tool == Tool::Varnishd { "-V" } else { "-v" };
            versions.entry(tool.name().to_owned()).or_insert_with(|| version(tools.path(tool), argument));
        }
        let changes = git(&["status", "--porcelain", "--", ":/", ":(top,exclude)docs/performance"]);
        Run {
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

fn unknown() -> String {
    "unknown".to_owned()
}

fn read(file: &str) -> String {
    fs::read_to_string(file).map_or_else(|_| unknown(), |text| text.trim().to_owned())
}

/// The first value of `name` in a file of lines such as `name : value`.
fn value_of(file: &str, name: &str, separator: char) -> String {
    let text = read(file);
    let value = text.lines().find_map(|line| {
        let (key, value) = line.split_once(separator)?;
        (key.trim() == name).then(|| value.trim().trim_matches('"').to_owned())
    });
    value.unwrap_or_else(unknown)
}

/// The first line a program prints about itself, on whichever stream.
fn version(program: &Path, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output();
    let text = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().next().map_or_else(unknown, |line| line.trim().to_owned())
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Without the directories of the program, which say nothing to anyone else.
fn command_line(mut arguments: impl Iterator<Item = String>) -> String {
    let program = arguments.next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default().to_owned();
    std::iter::once(name).chain(arguments).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_told_is_unknown() {
        assert_eq!(version(Path::new("/nonexistent"), "-v"), "unknown");
        assert_eq!(value_of("/nonexistent", "a", ':'), "unknown");
        assert_eq!(git(&["no-such-command"]), None);
    }

    #[test]
    fn a_command_line_begins_with_a_name() {
        let arguments = ["/a/b/loadtest", "bench", "--write", "docs/performance"].map(str::to_owned);
        assert_eq!(command_line(arguments.into_iter()), "loadtest bench --write docs/performance");
    }
}
