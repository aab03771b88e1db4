//! Processes that end with their owner, and the directory they work in.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, io, thread};

use crate::failure::{Failure, Result};
use crate::interrupt::wait_for;

/// How much of a log is shown when its process did not start.
const LOG_LINES_MAX: usize = 15;

/// For a server to end by itself, which lets it end what it started.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// A directory of its own, removed at the end.
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self> {
        Self::named("bench")
    }

    /// On tmpfs where there is one.
    pub(crate) fn named(purpose: &str) -> Result<Self> {
        let name = format!("tidegate-{purpose}-{}", std::process::id());
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

/// A process that is ended, by its id, when it goes out of scope.
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

    /// Waits for the end, and tells whether it was a success; `None` where `patience` ended before. Calls `meanwhile`
    /// again and again.
    pub(crate) fn await_end(&mut self, patience: Duration, mut meanwhile: impl FnMut()) -> Result<Option<bool>> {
        let name = &self.name;
        let child = &mut self.child;
        wait_for(patience, || {
            meanwhile();
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
        if matches!(self.child.try_wait(), Ok(None)) {
            // The shell's own `kill`, since std only knows SIGKILL. Where it fails, SIGKILL follows.
            let mut terminate = Command::new("/bin/sh");
            terminate.args(["-c", "kill -TERM \"$1\"", "sh", &self.pid().to_string()]).stderr(Stdio::null());
            let deadline = Instant::now() + END_PATIENCE;
            let asked = terminate.status().is_ok_and(|status| status.success());
            while asked && matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
        }
        // Both fail only where the process has ended and been waited for, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_out_of_scope_ends_even_where_it_ignores_the_request() {
        let scratch = Scratch::named("process").expect("a directory");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "trap '' TERM; while :; do sleep 1; done"]);
        let running = Running::start("deaf", command, &scratch).expect("a shell");
        let stat = PathBuf::from(format!("/proc/{}/stat", running.pid()));
        assert!(stat.exists());
        drop(running);
        assert!(!stat.exists());
    }
}
