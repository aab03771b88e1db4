//! The wall clock of a process, shifted at run time by libfaketime; its monotonic clock is
//! unchanged, as on a machine whose clock is set.
//!
//! Refuses a program that is linked statically: it loads no library, and its clock would stay.

use std::fs;
use std::path::{Path, PathBuf};

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
    /// Fails if the clock of `program` cannot be shifted.
    pub(crate) fn new(scratch: &ScratchDirectory, name: &str, program: &Path) -> Result<Self> {
        let library = Self::library_for(program)?;
        let file = scratch.write(&format!("{name}.offset"), "+0")?;
        Ok(FakeClock { library, file })
    }

    /// The library; fails if it is not installed, or has no effect on `program`.
    pub(crate) fn library_for(program: &Path) -> Result<PathBuf> {
        let bytes = fs::read(program).map_err(LoadtestError::io(format!("cannot read {}", program.display())))?;
        if !has_interpreter(&bytes) {
            let text = "is linked statically: its clock cannot be shifted; pass a --tidegate that is not";
            return Err(LoadtestError::Usage(format!("{} {text}", program.display())));
        }
        let library =
            DIRECTORIES.iter().map(|directory| PathBuf::from(directory).join(LIBRARY)).find(|file| file.is_file());
        library.ok_or_else(|| LoadtestError::Missing { tools: LIBRARY.to_owned(), packages: "faketime".to_owned() })
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

/// Whether a program of 64 bits, little-endian, names a dynamic loader (ELF, PT_INTERP).
fn has_interpreter(elf: &[u8]) -> bool {
    let number = |at: usize, length: usize| {
        let bytes = elf.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0_usize, |value, byte| value << 8 | usize::from(*byte)))
    };
    let headers = || Some((number(32, 8)?, number(54, 2)?, number(56, 2)?));
    let Some((first, size, count)) = headers() else { return false };
    elf.starts_with(b"\x7fELF") && (0..count).any(|index| number(first.saturating_add(index * size), 4) == Some(3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_program_with_a_dynamic_loader_can_be_shifted() {
        let this = fs::read(std::env::current_exe().expect("a path")).expect("this program");
        assert!(has_interpreter(&this));
        // A header with one program header, of PT_LOAD.
        let mut elf = [b"\x7fELF".as_slice(), &[0; 124]].concat();
        (elf[32], elf[54], elf[56], elf[64]) = (64, 56, 1, 1);
        assert!(!has_interpreter(&elf));
        elf[64] = 3;
        assert!(has_interpreter(&elf));
        assert!(!has_interpreter(b"\x7fELF") && !has_interpreter(b""));
        let text = std::env::temp_dir().join(format!("tidegate-static-{}", std::process::id()));
        fs::write(&text, "not a program").expect("a file");
        let refused = FakeClock::library_for(&text).map_err(|fault| fault.to_string());
        fs::remove_file(&text).expect("the file");
        assert!(refused.is_err_and(|fault| fault.contains("linked statically")));
    }
}
