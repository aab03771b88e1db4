//! Paths of files that the configuration names.

use std::path::PathBuf;
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
    let opened = std::fs::metadata(&file.value).and_then(|metadata| match metadata.len() {
        _ if !metadata.is_file() => Err(std::io::Error::other("it is not a regular file")),
        0..=FILE_BYTES_MAX => std::fs::File::open(&file.value).map(drop),
        _ => Err(std::io::Error::other("it is larger than 16 MiB")),
    });
    let is_usable = opened.is_ok();
    if let Err(error) = opened {
        let problem = ConfigProblem::new(FaultCode::File, format!("cannot read {}: {error}", file.value.display()));
        table.context.error(&file.at, problem.hint("paths are relative to the directory of the configuration file"));
    }
    is_usable
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
