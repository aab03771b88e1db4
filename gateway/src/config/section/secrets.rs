//! Secrets: tokens and keys that only the operator may know.

use super::super::fault::{ConfigProblem, FaultCode};
use super::super::read_context::ReadPurpose;
use super::super::table_reader::TableReader;
use super::super::value_kind::AnyString;

/// The texts that `tidegate config print` writes in place of a secret.
const REPLACED: [&str; 2] = ["***", "REDACTED"];

/// Reads a secret, empty without one. A process does not run with the replacement of a secret,
/// which is the same for all; `tidegate check` accepts it with a warning, because the rest of a
/// printed document can be checked.
pub(super) fn secret(table: &TableReader<'_>, key: &'static str) -> String {
    let secret = table.value_or(key, &AnyString, String::new());
    if REPLACED.contains(&&*secret) {
        let at = table.location_of(&[key]);
        let message = format!("`{secret}` stands for a secret that `tidegate config print` has replaced");
        let hint = format!("write the secret, or a reference such as `{key} = \"${{file:/run/secrets/{key}}}\"`");
        match table.context.purpose {
            ReadPurpose::Run | ReadPurpose::Reload => {
                table.context.error(&at, ConfigProblem::bad_value(message).hint(hint))
            }
            ReadPurpose::Check | ReadPurpose::Print => {
                table.context.warning(&at, ConfigProblem::new(FaultCode::Risk, message).hint(hint));
            }
        }
    }
    secret
}
