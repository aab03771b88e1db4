//! The programs that a bench needs, and on which core they run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use crate::failure::{Failure, Result};

/// Core of the server that is measured.
pub(crate) const SERVER_CORE: usize = 0;
/// Core of the load and of the origin.
pub(crate) const LOAD_CORE: usize = 1;

/// Descriptors for the most connections, both sides of them, and for the files that nginx keeps open.
const DESCRIPTORS: u64 = 65_536;
/// A program that has to be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    Taskset,
    Setpriv,
    Prlimit,
    Wrk,
    Nginx,
    Haproxy,
    Varnishd,
    Redis,
}

/// Where programs are.
pub(crate) struct Tools {
    found: Vec<(Tool, PathBuf)>,
}

impl Tool {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Tool::Taskset => "taskset",
            Tool::Setpriv => "setpriv",
            Tool::Prlimit => "prlimit",
            Tool::Wrk => "wrk",
            Tool::Nginx => "nginx",
            Tool::Haproxy => "haproxy",
            Tool::Varnishd => "varnishd",
            Tool::Redis => "redis-server",
        }
    }

    /// Debian's package.
    fn package(self) -> &'static str {
        match self {
            Tool::Taskset | Tool::Setpriv | Tool::Prlimit => "util-linux",
            Tool::Varnishd => "varnish",
            Tool::Wrk | Tool::Nginx | Tool::Haproxy | Tool::Redis => self.name(),
        }
    }
}

impl Tools {
    /// Finds what every bench needs, and `others`.
    pub(crate) fn find(others: impl IntoIterator<Item = Tool>) -> Result<Self> {
        let (mut found, mut tools, mut packages) = (Vec::new(), Vec::new(), Vec::new());
        for tool in [Tool::Taskset, Tool::Setpriv, Tool::Prlimit, Tool::Wrk].into_iter().chain(others) {
            match on_path(tool.name()) {
                Some(path) => found.push((tool, path)),
                None => {
                    tools.push(tool.name());
                    packages.push(tool.package());
                }
            }
        }
        packages.dedup();
        if tools.is_empty() {
            return Ok(Tools { found });
        }
        Err(Failure::Missing { tools: tools.join(", "), packages: packages.join(" ") })
    }

    /// The path of a tool that was found; the name of any other.
    pub(crate) fn path(&self, tool: Tool) -> &Path {
        self.found.iter().find(|(found, _)| *found == tool).map_or(Path::new(tool.name()), |(_, path)| path)
    }

    /// `program` on one core; it is killed when the thread that starts it ends, even by SIGKILL.
    pub(crate) fn pinned(&self, core: usize, program: &Path) -> Command {
        let mut command = Command::new(self.path(Tool::Setpriv));
        command.args(["--pdeathsig", "KILL"]);
        command.arg(self.path(Tool::Taskset)).args(["-c", &core.to_string()]).arg(program);
        command.stdin(Stdio::null());
        command
    }

    /// Moves this process off the server's core, and lets it and all that it starts open as many files as it may.
    pub(crate) fn settle(&self) -> Result<()> {
        let pid = std::process::id().to_string();
        let mut move_away = Command::new(self.path(Tool::Taskset));
        complete(move_away.args(["-a", "-c", "-p", &LOAD_CORE.to_string(), &pid]))?;
        let limits = fs::read_to_string("/proc/self/limits").map_err(Failure::io("cannot read /proc/self/limits"))?;
        let soft = hard_limit(&limits).map_or(DESCRIPTORS, |hard| hard.min(DESCRIPTORS));
        complete(Command::new(self.path(Tool::Prlimit)).args(["--pid", &pid, &format!("--nofile={soft}:")]))
    }
}

/// The hard limit of open files in /proc/PID/limits; `None` where there is no limit.
fn hard_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn complete(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(Failure::io(format!("cannot start {name}")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Failure::Unexpected { file: format!("the output of {name}"), text })
}

fn on_path(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Servers live where only root's PATH looks.
    let places = env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    places.map(|place| place.join(tool)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_was_not_found_is_known_by_its_name() {
        let tools = Tools { found: vec![(Tool::Wrk, PathBuf::from("/usr/bin/wrk"))] };
        assert_eq!(tools.path(Tool::Nginx), Path::new("nginx"));
        assert_eq!(tools.path(Tool::Wrk), Path::new("/usr/bin/wrk"));
    }

    #[test]
    fn the_hard_limit_is_the_second_figure() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024   524288   files\n";
        assert_eq!(hard_limit(limits), Some(524_288));
        for text in ["", "Max open files 1024", "Max open files 1024 unlimited files"] {
            assert_eq!(hard_limit(text), None, "{text}");
        }
    }
}
