//! Parses the source text of a configuration, TOML or JSON, into a tree of [`DocumentNode`]s.

use std::ops::Range;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::fault::{ConfigFault, ConfigProblem, DocumentLocation, FaultCode};
use super::json;
use super::node::{DocumentEntry, DocumentNode, DocumentValue};

/// Syntax of a configuration document.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DocumentFormat {
    /// TOML 1.0.
    Toml,
    /// JSON (RFC 8259).
    Json,
}

/// The input of a configuration read: text, format, base directory and environment.
pub struct ConfigDocument<'a> {
    /// Name of the document in messages.
    pub name: &'a str,
    /// Source text.
    pub text: &'a str,
    /// Syntax of the text.
    pub format: DocumentFormat,
    /// Directory that relative paths in the document are resolved against.
    pub base: &'a Path,
    /// Looks up an environment variable for `${NAME}`.
    pub env: &'a dyn Fn(&str) -> Option<String>,
}

/// Parses `source` into a tree whose root is a table.
pub(super) fn parse(source: &str, format: DocumentFormat) -> Result<DocumentNode, Vec<ConfigFault>> {
    match format {
        DocumentFormat::Json => json::parse(source).map_err(|fault| vec![fault]),
        DocumentFormat::Toml => match DeTable::parse(source) {
            Ok(table) => Ok(DocumentNode { span: 0..0, value: from_table(table.into_inner()) }),
            Err(_) => Err(toml_faults(source)),
        },
    }
}

/// All syntax faults of a TOML text. The recovering parser can report one mistake several times, so
/// only the first fault of each line is kept.
fn toml_faults(source: &str) -> Vec<ConfigFault> {
    let mut faults: Vec<ConfigFault> = Vec::new();
    let mut last_line = None;
    for error in DeTable::parse_recoverable(source).1 {
        let span = error.span().unwrap_or(0..0);
        let line = source.as_bytes()[..span.start.min(source.len())].iter().filter(|b| **b == b'\n').count();
        if last_line != Some(line) {
            let at = DocumentLocation { path: String::new(), span };
            faults.push(at.error(ConfigProblem::new(FaultCode::Syntax, error.message())));
        }
        last_line = Some(line);
    }
    if let (Some(fault), Some(hint)) = (faults.first_mut(), other_format(source)) {
        fault.hint = Some(hint.to_owned());
    }
    faults
}

/// The hint for a document that looks like one of another format, by its first line that is no
/// comment.
fn other_format(source: &str) -> Option<&'static str> {
    let is_content = |line: &&str| !line.is_empty() && !line.starts_with('#') && *line != "---";
    let first = source.lines().map(str::trim).find(is_content)?;
    let is_word =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'"'));
    if first.starts_with('{') {
        return Some("this looks like JSON: give the file the extension `.json`");
    }
    if first.starts_with("//") || first.starts_with("/*") {
        return Some("comments of TOML begin with `#`; JSON has none");
    }
    let (key, value) = first.split_once(':')?;
    let is_yaml = is_word(key) && (value.is_empty() || value.starts_with(' '));
    is_yaml.then_some("this looks like YAML, which is not read: write the document in TOML, or in JSON")
}

fn from_table(table: DeTable<'_>) -> DocumentValue {
    let mut entries: Vec<DocumentEntry> = table
        .into_iter()
        .map(|(key, value)| DocumentEntry {
            key_span: key.span(),
            key: key.into_inner().into_owned(),
            node: from_value(value.span(), value.into_inner()),
        })
        .collect();
    entries.sort_by_key(|entry| entry.key_span.start);
    DocumentValue::Table(entries)
}

fn from_value(span: Range<usize>, value: DeValue<'_>) -> DocumentNode {
    const OUT_OF_RANGE: DocumentValue = DocumentValue::Unsupported("a number out of range");
    let value = match value {
        DeValue::String(text) => DocumentValue::String(text.into_owned()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).map_or(OUT_OF_RANGE, DocumentValue::Integer)
        }
        DeValue::Float(number) => number.as_str().parse().map_or(OUT_OF_RANGE, DocumentValue::Float),
        DeValue::Boolean(boolean) => DocumentValue::Boolean(boolean),
        DeValue::Datetime(_) => DocumentValue::Unsupported("a date"),
        DeValue::Array(items) => {
            DocumentValue::Array(items.into_iter().map(|item| from_value(item.span(), item.into_inner())).collect())
        }
        DeValue::Table(table) => from_table(table),
    };
    DocumentNode { span, value }
}
