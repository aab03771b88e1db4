//! Paths of files that the configuration names.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::super::fault::{ConfigProblem, FaultCode};
use super::super::read_context::{Located, ReadPurpose};
use super::super::table_reader::TableReader;
use super::super::value_kind::AnyString;
use crate::tls;

/// Largest file with certificates or keys: the authorities of a system have a quarter of a MiB.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Opens a file that is read at start, so that `tidegate check` reports an unreadable file. Returns
/// whether it may be read: a pipe would block, and a device may have no end.
pub(super) fn check_file(table: &TableReader<'_>, file: &Located<PathBuf>) -> bool {
    let opened = open(&file.value);
    if let Err(error) = &opened {
        let hint = "paths are relative to the directory of the configuration file";
        table.context.error(&file.at, unreadable(file, error).hint(hint));
    }
    opened.is_ok()
}

/// As [`check_file`], for a file of a listener. A reload keeps what the listener has loaded, and is
/// not refused, if the file is missing or must not be read.
pub(super) fn check_listener_file(table: &TableReader<'_>, file: &Located<PathBuf>) -> bool {
    match open(&file.value) {
        // Other files are not opened by the listener either.
        Err(error) if table.context.purpose == ReadPurpose::Reload && error.kind() != ErrorKind::Other => {
            let hint = "the listener keeps what it has loaded; without the file, no gateway starts";
            table.context.warning(&file.at, unreadable(file, &error).hint(hint));
            false
        }
        _ => check_file(table, file),
    }
}

fn open(path: &Path) -> io::Result<()> {
    std::fs::metadata(path).and_then(|metadata| match metadata.len() {
        _ if !metadata.is_file() => Err(io::Error::other("it is not a regular file")),
        0..=FILE_BYTES_MAX => std::fs::File::open(path).map(drop),
        _ => Err(io::Error::other("it is larger than 16 MiB")),
    })
}

fn unreadable(file: &Located<PathBuf>, error: &io::Error) -> ConfigProblem {
    ConfigProblem::new(FaultCode::File, format!("cannot read {}: {error}", file.value.display()))
}

/// The content of a file, whose change then triggers a reload. `None` if it cannot be read, which
/// is reported.
pub(super) fn read_file(table: &TableReader<'_>, file: &Located<PathBuf>) -> Option<Vec<u8>> {
    if !check_file(table, file) {
        return None;
    }
    table.context.environment.watch(&file.value);
    std::fs::read(&file.value).ok()
}

/// Reads an optional path, relative to the directory of the configuration file.
pub(super) fn optional_path(table: &TableReader<'_>, key: &'static str) -> Option<Located<PathBuf>> {
    let path = table.optional(key, &AnyString)?;
    Some(Located { value: table.context.environment.base.join(path.value), at: path.at })
}

/// Reads a required path, relative to the directory of the configuration file.
pub(super) fn path(table: &TableReader<'_>, key: &'static str) -> Option<Located<PathBuf>> {
    let path = table.required(key, &AnyString)?;
    Some(Located { value: table.context.environment.base.join(path.value), at: path.at })
}

/// With `tidegate check`, warns of certificates in a PEM file that have expired. `consequence`: of
/// that, in a few words.
pub(super) fn check_validity(table: &TableReader<'_>, (file, pem): (&Located<PathBuf>, &[u8]), consequence: &str) {
    if table.context.purpose != ReadPurpose::Check {
        return;
    }
    let now = SystemTime::now();
    for time in tls::not_after_each(pem).into_iter().filter(|time| *time < now) {
        let message = format!("the certificate has expired on {}", httpdate::fmt_http_date(time));
        let problem = ConfigProblem::new(FaultCode::Risk, format!("{}: {message}", file.value.display()));
        table.context.warning(&file.at, problem.hint(format!("{consequence}; renew it")));
    }
}
