//! The wall clock of a process, shifted at run time by libfaketime; its monotonic clock is
//! unchanged, as on a machine whose clock is set.

use std::fs;
use std::path::PathBuf;

use crate::error::{LoadtestError, Result};
use crate::process::child::ScratchDirectory;

const LIBRARY: &str = "libfaketime.so.1";
/// Directories of Debian's package, by architecture, and of other systems.
const DIRECTORIES: [&str; 5] = [
    "/usr/lib/x86_64-linux-gnu/faketime",
    "/usr/lib/aarch64-linux-gnu/faketime",
    "/usr/lib64/faketime",
    "/usr/lib/faketime",
    "/usr/local/lib/faketime",
];

/// The clock of one process.
pub(crate) struct FakeClock {
    library: PathBuf,
    file: PathBuf,
}

impl FakeClock {
    /// Fails if libfaketime is not installed.
    pub(crate) fn new(scratch: &ScratchDirectory, name: &str) -> Result<Self> {
        let library =
            DIRECTORIES.iter().map(|directory| PathBuf::from(directory).join(LIBRARY)).find(|file| file.is_file());
        let library = library
            .ok_or_else(|| LoadtestError::Missing { tools: LIBRARY.to_owned(), packages: "faketime".to_owned() })?;
        let file = scratch.write(&format!("{name}.offset"), "+0")?;
        Ok(FakeClock { library, file })
    }

    /// Variables of the process.
    pub(crate) fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
    }

    /// Sets the wall clock to this many seconds from the true time.
    pub(crate) fn set(&self, seconds: f64) -> Result<()> {
        // Renamed into place: a partly written file has no valid offset.
        let new = self.file.with_extension("new");
        let written = fs::write(&new, format!("{seconds:+}")).and_then(|()| fs::rename(&new, &self.file));
        written.map_err(LoadtestError::io(format!("cannot write {}", self.file.display())))
    }
}
