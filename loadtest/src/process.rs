//! Processes on one core that end with their owner, and the directory they work in.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{env, io};

use crate::failure::{Failure, Result};
use crate::interrupt::wait_for;

/// Core of the server that is measured.
pub(crate) const SERVER_CORE: usize = 0;
/// Core of the load and of the origin.
pub(crate) const LOAD_CORE: usize = 1;

/// How much of a log is shown when its process did not start.
const LOG_LINES_MAX: usize = 15;

/// What has to be installed.
pub(crate) struct Tools {
    pub(crate) nginx: PathBuf,
    pub(crate) wrk: PathBuf,
    pub(crate) taskset: PathBuf,
    pub(crate) setpriv: PathBuf,
}

impl Tools {
    pub(crate) fn find() -> Result<Self> {
        let wanted = [("nginx", "nginx"), ("wrk", "wrk"), ("taskset", "util-linux"), ("setpriv", "util-linux")];
        let found = wanted.map(|(tool, _)| on_path(tool));
        if let [Some(nginx), Some(wrk), Some(taskset), Some(setpriv)] = found {
            return Ok(Tools { nginx, wrk, taskset, setpriv });
        }
        let missing = wanted.iter().zip(&found).filter(|(_, path)| path.is_none());
        let (tools, mut packages): (Vec<&str>, Vec<&str>) =
            missing.map(|((tool, package), _)| (*tool, *package)).unzip();
        packages.dedup();
        Err(Failure::Missing { tools: tools.join(", "), packages: packages.join(" ") })
    }

    /// `program` on one core; it is killed when the thread that starts it ends, even by SIGKILL.
    pub(crate) fn pinned(&self, core: usize, program: &Path) -> Command {
        let mut command = Command::new(&self.setpriv);
        command.args(["--pdeathsig", "KILL"]).arg(&self.taskset).args(["-c", &core.to_string()]).arg(program);
        command.stdin(Stdio::null());
        command
    }
}

fn on_path(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Servers live where only root's PATH looks.
    let places = env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    places.map(|place| place.join(tool)).find(|file| file.is_file())
}

/// A directory of its own, removed at the end.
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// On tmpfs where there is one.
    pub(crate) fn new() -> Result<Self> {
        let name = format!("tidegate-bench-{}", std::process::id());
        let places = [PathBuf::from("/dev/shm"), env::temp_dir()];
        let created = places.iter().find_map(|place| {
            let path = place.join(&name);
            fs::create_dir(&path).ok().map(|()| Scratch { path })
        });
        created.ok_or_else(|| Failure::Io {
            doing: format!("cannot create {name} in /dev/shm or {}", env::temp_dir().display()),
            source: io::Error::last_os_error(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let file = self.path.join(name);
        fs::write(&file, text).map_err(Failure::io(format!("cannot write {}", file.display())))?;
        Ok(file)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("loadtest: {} is left over: {error}", self.path.display());
        }
    }
}

/// A process that is killed, by its id, when it goes out of scope.
pub(crate) struct Running {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Running {
    /// Starts `command` with its output in a log in `scratch`.
    pub(crate) fn start(name: &str, mut command: Command, scratch: &Scratch) -> Result<Self> {
        let log = scratch.path().join(format!("{name}.out"));
        let doing = || Failure::io(format!("cannot start {name}"));
        let file = File::create(&log).map_err(doing())?;
        command.stdout(file.try_clone().map_err(doing())?).stderr(file);
        let child = command.spawn().map_err(doing())?;
        Ok(Running { child, name: name.to_owned(), log })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has written.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until `is_ready`, and fails when the process ends or `patience` does.
    pub(crate) fn await_ready(&mut self, patience: Duration, is_ready: impl Fn() -> bool) -> Result<()> {
        let ready =
            wait_for(patience, || if self.has_ended()? { Ok(Some(false)) } else { Ok(is_ready().then_some(true)) })?;
        if ready == Some(true) { Ok(()) } else { Err(self.not_ready()) }
    }

    /// Waits for the end, and tells whether it was a success; `None` where `patience` ended before.
    pub(crate) fn await_end(&mut self, patience: Duration) -> Result<Option<bool>> {
        let name = &self.name;
        let child = &mut self.child;
        wait_for(patience, || {
            let status = child.try_wait().map_err(Failure::io(format!("cannot wait for {name}")))?;
            Ok(status.map(|status| status.success()))
        })
    }

    fn has_ended(&mut self) -> Result<bool> {
        let status = self.child.try_wait().map_err(Failure::io(format!("cannot wait for {}", self.name)))?;
        Ok(status.is_some())
    }

    fn not_ready(&self) -> Failure {
        let output = self.output();
        let lines: Vec<&str> = output.lines().collect();
        let log = lines[lines.len().saturating_sub(LOG_LINES_MAX)..].join("\n");
        Failure::NotReady { name: self.name.clone(), log }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only where the process has ended and been waited for, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
