//! Counts the instructions of a server with callgrind, while it serves.
//!
//! Unlike CPU time, the count hardly differs between runs and machines. The server is some fifty
//! times slower meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{LoadtestError, Result};
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::tools::{SERVER_CORE, Tool, Tools, run_to_completion};

/// A server below callgrind, stopped on drop.
pub(crate) struct CountedProcess {
    process: ChildProcess,
    control: PathBuf,
    /// Path of the counts without their number.
    counts: PathBuf,
    counted: usize,
}

impl CountedProcess {
    /// Starts `program` with `arguments`. It can still fail: see `process`.
    pub(crate) fn start(
        name: &str,
        (program, arguments): (&Path, &[&str]),
        tools: &Tools,
        scratch: &ScratchDirectory,
    ) -> Result<Self> {
        let counts = scratch.path().join(format!("{name}.counts"));
        let mut command = tools.pinned(SERVER_CORE, tools.path(Tool::Valgrind));
        command.arg("--tool=callgrind").arg(format!("--callgrind-out-file={}", counts.display()));
        command.arg(program).args(arguments);
        let process = ChildProcess::start(name, command, scratch)?;
        Ok(CountedProcess { process, control: tools.path(Tool::CallgrindControl).to_owned(), counts, counted: 0 })
    }

    pub(crate) fn process(&mut self) -> &mut ChildProcess {
        &mut self.process
    }

    /// Instructions that the process executes while `load` runs, on all its threads, outside the
    /// kernel.
    pub(crate) fn count(&mut self, load: impl FnOnce() -> Result<()>) -> Result<u64> {
        self.control("--zero")?;
        load()?;
        self.control("--dump")?;
        self.counted += 1;
        let file = format!("{}.{}", self.counts.display(), self.counted);
        let text = fs::read_to_string(&file).map_err(LoadtestError::io(format!("cannot read {file}")))?;
        total(&text).ok_or(LoadtestError::Unexpected { file, text: "no line `totals:`".to_owned() })
    }

    fn control(&self, command: &str) -> Result<()> {
        run_to_completion(Command::new(&self.control).arg(command).arg(self.process.pid().to_string()))
    }
}

fn total(text: &str) -> Option<u64> {
    text.lines().rev().find_map(|line| line.strip_prefix("totals:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn count_is_the_line_of_totals() {
        assert_eq!(total("version: 1\nsummary: 7\n\nfn=(1)\n3 4\n\ntotals: 1234\n"), Some(1_234));
        for text in ["", "totals:", "totals: x", "summary: 7"] {
            assert_eq!(total(text), None, "{text}");
        }
    }
}
