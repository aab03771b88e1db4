//! The document as a tree that knows where each of its values stands, the same for TOML and JSON.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::fault::{At, Code, Fault, Problem};
use super::{Format, json};

/// A value and the bytes of the source it was written in.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) span: Range<usize>,
    pub(super) value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    Whole(i64),
    Real(f64),
    Truth(bool),
    List(Vec<Node>),
    /// In the order of the text.
    Table(Vec<Entry>),
    /// What no key takes, by its name: a date, `null`, a number out of range.
    Other(&'static str),
}

/// One key of a table.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_span: Range<usize>,
    pub(super) node: Node,
}

impl Node {
    /// What stands here, as messages name it.
    pub(super) fn found(&self) -> &'static str {
        match &self.value {
            Value::Text(_) => "text",
            Value::Whole(_) => "a whole number",
            Value::Real(_) => "a number",
            Value::Truth(_) => "true or false",
            Value::List(_) => "a list",
            Value::Table(_) => "a table",
            Value::Other(name) => name,
        }
    }
}

/// Reads `source` into a tree whose root is a table.
pub(super) fn read(source: &str, format: Format) -> Result<Node, Vec<Fault>> {
    match format {
        Format::Json => json::read(source).map_err(|fault| vec![fault]),
        Format::Toml => match DeTable::parse(source) {
            Ok(table) => Ok(Node { span: 0..0, value: from_table(table.into_inner()) }),
            Err(_) => Err(toml_faults(source)),
        },
    }
}

/// All syntax faults of a TOML text. Recovery can report one mistake several times: one fault a line is kept.
fn toml_faults(source: &str) -> Vec<Fault> {
    let mut faults: Vec<Fault> = Vec::new();
    let mut last_line = None;
    for error in DeTable::parse_recoverable(source).1 {
        let span = error.span().unwrap_or(0..0);
        let line = source.as_bytes()[..span.start.min(source.len())].iter().filter(|b| **b == b'\n').count();
        if last_line != Some(line) {
            let at = At { path: String::new(), span };
            faults.push(at.error(Problem::new(Code::Syntax, error.message())));
        }
        last_line = Some(line);
    }
    faults
}

fn from_table(table: DeTable<'_>) -> Value {
    let mut entries: Vec<Entry> = table
        .into_iter()
        .map(|(key, value)| Entry {
            key_span: key.span(),
            key: key.into_inner().into_owned(),
            node: from_value(value.span(), value.into_inner()),
        })
        .collect();
    entries.sort_by_key(|entry| entry.key_span.start);
    Value::Table(entries)
}

fn from_value(span: Range<usize>, value: DeValue<'_>) -> Node {
    let value = match value {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or(Value::Other("a number out of range"), Value::Whole),
        DeValue::Float(number) => number.as_str().parse().map_or(Value::Other("a number out of range"), Value::Real),
        DeValue::Boolean(truth) => Value::Truth(truth),
        DeValue::Datetime(_) => Value::Other("a date"),
        DeValue::Array(items) => {
            Value::List(items.into_iter().map(|item| from_value(item.span(), item.into_inner())).collect())
        }
        DeValue::Table(table) => from_table(table),
    };
    Node { span, value }
}
