//! The parsed document: a tree of values with their byte spans, the same for TOML and JSON.

use std::ops::Range;

/// A value and the bytes of the source that it was parsed from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DocumentNode {
    pub(super) span: Range<usize>,
    pub(super) value: DocumentValue,
}

/// A parsed value of a TOML or JSON document; arrays and tables contain nodes with spans.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum DocumentValue {
    String(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Array(Vec<DocumentNode>),
    /// In source order.
    Table(Vec<DocumentEntry>),
    /// A value that no key accepts, with its type's name: a date, `null`, a number out of range.
    Unsupported(&'static str),
}

/// One key of a table with its span and its value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DocumentEntry {
    pub(super) key: String,
    pub(super) key_span: Range<usize>,
    pub(super) node: DocumentNode,
}

impl DocumentNode {
    /// Type of the value as messages name it, with its article.
    pub(super) fn type_name(&self) -> &'static str {
        match &self.value {
            DocumentValue::String(_) => "a string",
            DocumentValue::Integer(_) => "an integer",
            DocumentValue::Float(_) => "a number",
            DocumentValue::Boolean(_) => "a boolean",
            DocumentValue::Array(_) => "an array",
            DocumentValue::Table(_) => "a table",
            DocumentValue::Unsupported(name) => name,
        }
    }
}
