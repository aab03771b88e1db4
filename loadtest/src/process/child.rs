//! Child processes that end with their owner, and their working directory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, io, thread};

use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;

/// Lines of the log in the error if a process does not start.
const LOG_LINES_MAX: usize = 15;

/// Time for a server to exit after SIGTERM, so that it can stop its own children.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// A temporary directory, removed on drop.
pub(crate) struct ScratchDirectory {
    path: PathBuf,
}

impl ScratchDirectory {
    pub(crate) fn new() -> Result<Self> {
        Self::named("bench")
    }

    /// Created on tmpfs if possible.
    pub(crate) fn named(purpose: &str) -> Result<Self> {
        let name = format!("tidegate-{purpose}-{}", std::process::id());
        let directories = [PathBuf::from("/dev/shm"), env::temp_dir()];
        let created = directories.iter().find_map(|directory| {
            let path = directory.join(&name);
            fs::create_dir(&path).ok().map(|()| ScratchDirectory { path })
        });
        created.ok_or_else(|| LoadtestError::Io {
            action: format!("cannot create {name} in /dev/shm or {}", env::temp_dir().display()),
            source: io::Error::last_os_error(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let file = self.path.join(name);
        fs::write(&file, text).map_err(LoadtestError::io(format!("cannot write {}", file.display())))?;
        Ok(file)
    }
}

impl Drop for ScratchDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("loadtest: {} cannot be removed: {error}", self.path.display());
        }
    }
}

/// A child process that is stopped, by its ID, on drop.
pub(crate) struct ChildProcess {
    child: Child,
    name: String,
    log: PathBuf,
}

impl ChildProcess {
    /// Starts `command`; its output goes to a log file in `scratch`.
    pub(crate) fn start(name: &str, mut command: Command, scratch: &ScratchDirectory) -> Result<Self> {
        let log = scratch.path().join(format!("{name}.out"));
        let start_error = || LoadtestError::io(format!("cannot start {name}"));
        let file = File::create(&log).map_err(start_error())?;
        command.stdout(file.try_clone().map_err(start_error())?).stderr(file);
        let child = command.spawn().map_err(start_error())?;
        Ok(ChildProcess { child, name: name.to_owned(), log })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The output so far.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until `is_ready` returns true; fails if the process exits or after `timeout`.
    pub(crate) fn await_ready(&mut self, timeout: Duration, is_ready: impl Fn() -> bool) -> Result<()> {
        let ready =
            wait_for(timeout, || if self.has_ended()? { Ok(Some(false)) } else { Ok(is_ready().then_some(true)) })?;
        if ready == Some(true) { Ok(()) } else { Err(self.not_ready()) }
    }

    /// Waits for the exit and returns whether it was successful; `None` after `timeout`. Calls
    /// `on_tick` periodically.
    pub(crate) fn await_end(&mut self, timeout: Duration, mut on_tick: impl FnMut()) -> Result<Option<bool>> {
        let name = &self.name;
        let child = &mut self.child;
        wait_for(timeout, || {
            on_tick();
            let status = child.try_wait().map_err(LoadtestError::io(format!("cannot wait for {name}")))?;
            Ok(status.map(|status| status.success()))
        })
    }

    fn has_ended(&mut self) -> Result<bool> {
        let status = self.child.try_wait().map_err(LoadtestError::io(format!("cannot wait for {}", self.name)))?;
        Ok(status.is_some())
    }

    fn not_ready(&self) -> LoadtestError {
        let output = self.output();
        let lines: Vec<&str> = output.lines().collect();
        let log = lines[lines.len().saturating_sub(LOG_LINES_MAX)..].join("\n");
        LoadtestError::NotReady { name: self.name.clone(), log }
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Uses the `kill` of the shell, because std supports SIGKILL only. If it fails, SIGKILL
            // follows.
            let mut terminate = Command::new("/bin/sh");
            terminate.args(["-c", "kill -TERM \"$1\"", "sh", &self.pid().to_string()]).stderr(Stdio::null());
            let deadline = Instant::now() + END_TIMEOUT;
            let is_terminating = terminate.status().is_ok_and(|status| status.success());
            while is_terminating && matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
        }
        // Both fail only if the process has already exited and been waited for.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_that_ignores_sigterm_is_killed_on_drop() {
        let scratch = ScratchDirectory::named("process").expect("a directory");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "trap '' TERM; while :; do sleep 1; done"]);
        let running = ChildProcess::start("ignores-sigterm", command, &scratch).expect("a shell");
        let stat = PathBuf::from(format!("/proc/{}/stat", running.pid()));
        assert!(stat.exists());
        drop(running);
        assert!(!stat.exists());
    }
}
