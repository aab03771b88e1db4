//! Counts the system calls of a server with perf, while a load runs.
//!
//! Counting slows every system call a little, so that it has a run of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{LoadtestError, Result};
use crate::process::cpu_time;

const EVENT: &str = "raw_syscalls:sys_enter";

/// Counts the system calls of a server's processes and threads until the load ends.
pub(crate) struct SystemCallCounter {
    perf: PathBuf,
    pids: Vec<String>,
    output: PathBuf,
}

impl SystemCallCounter {
    /// `pid`: the server's first process.
    pub(crate) fn new(perf: &Path, pid: u32, output: PathBuf) -> Result<Self> {
        let pids = cpu_time::tree(pid)?.into_iter().map(|pid| pid.to_string()).collect();
        Ok(SystemCallCounter { perf: perf.to_owned(), pids, output })
    }

    pub(crate) fn program(&self) -> &Path {
        &self.perf
    }

    /// Makes `command`, which starts the program, run `load`, whose arguments follow.
    pub(crate) fn add_arguments(&self, command: &mut Command, load: &Path) {
        command.args(["stat", "-x,", "-e", EVENT, "-p", &self.pids.join(",")]);
        command.arg("-o").arg(&self.output).arg("--").arg(load);
    }

    /// The count, once the load has ended.
    pub(crate) fn count(&self) -> Result<u64> {
        let file = self.output.display().to_string();
        let text = fs::read_to_string(&self.output).map_err(LoadtestError::io(format!("cannot read {file}")))?;
        parse(&text).ok_or(LoadtestError::Unexpected { file, text })
    }
}

/// Parses `count,unit,event,...`, which has no number if the kernel refuses to count.
fn parse(text: &str) -> Option<u64> {
    text.lines().find(|line| line.contains(EVENT))?.split(',').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn count_is_the_first_column() {
        let text = "# started on Sun\n\n121710,,raw_syscalls:sys_enter,348732408,100.00,,\n";
        assert_eq!(parse(text), Some(121_710));
        for text in ["", "<not counted>,,raw_syscalls:sys_enter,0,0.00,,", "1,,task-clock,1,100.00"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
