//! Typed access to a table of the document: each read declares a key, and every undeclared key is
//! reported as unknown.

use std::cell::RefCell;

use super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::node::{DocumentEntry, DocumentNode, DocumentValue};
use super::read_context::{EffectiveValue, KeyDefault, KeySpec, Located, ReadContext, TableSpec};
use super::suggestion::suggest;
use super::value_kind::{AnyString, InputValue, ValueKind, quoted};

/// Reads one table. An absent table is read as one in which every key is absent.
pub(super) struct TableReader<'a> {
    pub(super) context: &'a ReadContext<'a>,
    pub(super) at: DocumentLocation,
    entries: &'a [DocumentEntry],
    /// The table's path with names and indexes replaced by placeholders.
    pattern: String,
    declared: RefCell<Vec<&'static str>>,
    /// Former names of renamed keys: accepted, but never suggested.
    deprecated: RefCell<Vec<&'static str>>,
}

/// Current and former name of a renamed configuration key. The former name is accepted for one
/// version, with a warning.
pub(super) struct RenamedKey {
    pub(super) name: &'static str,
    pub(super) former: &'static str,
}

/// The location of a table, and its path with names and indexes replaced by placeholders.
struct TablePath {
    at: DocumentLocation,
    pattern: String,
}

/// The value of a key that accepts either a plain value or a table.
pub(super) enum ValueOrTable<V, T> {
    Value(Located<V>),
    Table(T),
}

/// Reads the document's root: `read` reads its keys, then every undeclared key is reported.
pub(super) fn read_document<R>(
    context: &ReadContext<'_>,
    root: &DocumentNode,
    read: impl FnOnce(&TableReader<'_>) -> R,
) -> R {
    read_node(context, Some(root), TablePath { at: DocumentLocation::default(), pattern: String::new() }, read)
}

/// Reads one table; a node of another type is a fault and is read as an absent table.
fn read_node<R>(
    context: &ReadContext<'_>,
    node: Option<&DocumentNode>,
    path: TablePath,
    read: impl FnOnce(&TableReader<'_>) -> R,
) -> R {
    let TablePath { at, pattern } = path;
    let entries = match node {
        None => None,
        Some(DocumentNode { value: DocumentValue::Table(entries), .. }) => Some(entries.as_slice()),
        Some(node) => {
            context.error(&at, not_a_table(node));
            None
        }
    };
    let table = TableReader {
        context,
        at,
        entries: entries.unwrap_or_default(),
        pattern,
        declared: RefCell::default(),
        deprecated: RefCell::default(),
    };
    let result = read(&table);
    table.report_unknown();
    result
}

fn not_a_table(node: &DocumentNode) -> ConfigProblem {
    ConfigProblem::new(FaultCode::WrongType, format!("expected a table, found {}", node.type_name()))
}

impl<'a> TableReader<'a> {
    /// Reads an optional value.
    pub(super) fn optional<K: ValueKind>(&self, key: &'static str, kind: &K) -> Option<Located<K::Value>> {
        self.declare(key, kind, KeyDefault::None);
        self.read(key, kind)
    }

    /// Reads a value; an absent key, or one with a fault, has the default.
    pub(super) fn value_or<K: ValueKind>(&self, key: &'static str, kind: &K, default: K::Value) -> K::Value {
        self.located_or(key, kind, default).0
    }

    /// As [`Self::value_or`], with the value's location if the document has the key.
    pub(super) fn located_or<K: ValueKind>(
        &self,
        key: &'static str,
        kind: &K,
        default: K::Value,
    ) -> (K::Value, Option<DocumentLocation>) {
        self.declare(key, kind, KeyDefault::Value(kind.format(&default)));
        if self.entry(key).is_none() {
            let at = DocumentLocation { path: self.path_of(key), span: self.at.span.clone() };
            self.record_value(&at, kind.format(&default), false);
        }
        self.read(key, kind).map_or((default, None), |located| (located.value, Some(located.at)))
    }

    /// As [`Self::value_or`], for a renamed key. Setting both names is an error.
    pub(super) fn renamed_or<K: ValueKind>(&self, key: &RenamedKey, kind: &K, default: K::Value) -> K::Value {
        let RenamedKey { name, former } = *key;
        self.deprecated.borrow_mut().push(former);
        let Some(entry) = self.entry(former) else {
            self.declare_renamed(key, kind, &default);
            if !self.has(name) {
                let at = DocumentLocation { path: self.path_of(name), span: self.at.span.clone() };
                self.record_value(&at, kind.format(&default), false);
            }
            return self.read(name, kind).map_or(default, |located| located.value);
        };
        let at = DocumentLocation { path: self.path_of(former), span: entry.key_span.clone() };
        if self.has(name) {
            let message = format!("`{former}` is the former name of `{name}`, which is also set");
            let problem = ConfigProblem::new(FaultCode::Duplicate, message);
            self.context.error(&at, problem.hint(format!("remove `{former}`")));
            self.declare_renamed(key, kind, &default);
            return self.read(name, kind).map_or(default, |located| located.value);
        }
        let problem = ConfigProblem::new(FaultCode::Deprecated, format!("`{former}` is deprecated"));
        self.context.warning(&at, problem.hint(format!("rename it to `{name}`")));
        self.declare_renamed(key, kind, &default);
        self.read(former, kind).map_or(default, |located| located.value)
    }

    /// Reads an optional value that may be a table instead.
    pub(super) fn value_or_table<K: ValueKind, R>(
        &self,
        key: &'static str,
        kind: &K,
        read: impl FnOnce(&TableReader<'_>) -> R,
    ) -> Option<ValueOrTable<K::Value, R>> {
        self.declare(key, kind, KeyDefault::None);
        let entry = self.entry(key)?;
        if let DocumentValue::Table(_) = entry.node.value {
            let path = TablePath { at: self.location(entry), pattern: self.pattern_of(key) };
            return Some(ValueOrTable::Table(read_node(self.context, Some(&entry.node), path, read)));
        }
        self.read(key, kind).map(ValueOrTable::Value)
    }

    /// Reads a required value.
    pub(super) fn required<K: ValueKind>(&self, key: &'static str, kind: &K) -> Option<Located<K::Value>> {
        self.required_if(true, key, kind)
    }

    /// Reads a value that is required where the document has the table.
    pub(super) fn required_if<K: ValueKind>(
        &self,
        is_required: bool,
        key: &'static str,
        kind: &K,
    ) -> Option<Located<K::Value>> {
        self.declare(key, kind, KeyDefault::Required);
        if is_required && self.entry(key).is_none() {
            self.report_missing(key, kind);
        }
        self.read(key, kind)
    }

    /// Reads a value that is required unless the table has one of the keys `others`, which exclude
    /// it: the reader of `others` reports a table with several of them.
    pub(super) fn required_without<K: ValueKind>(
        &self,
        others: &'static [&'static str],
        key: &'static str,
        kind: &K,
    ) -> Option<Located<K::Value>> {
        self.declare(key, kind, KeyDefault::RequiredWithout(others));
        if self.entry(key).is_none() && !others.iter().any(|other| self.has(other)) {
            self.report_missing(key, kind);
        }
        self.read(key, kind)
    }

    fn report_missing(&self, key: &str, kind: &impl ValueKind) {
        let problem = ConfigProblem::new(FaultCode::Missing, format!("`{key}` is missing"));
        let at = DocumentLocation { path: self.path_of(key), span: self.at.span.clone() };
        self.context.error(&at, problem.hint(format!("expected {}", kind.describe())));
    }

    /// Declares a key whose feature is not available yet: only `neutral`, which switches the
    /// feature off, is accepted.
    pub(super) fn unavailable(&self, key: &'static str, neutral: Option<&DocumentValue>) {
        let kind = neutral.map_or_else(|| "absent".to_owned(), |value| format!("`{}` or absent", format_value(value)));
        self.declare_name(key);
        let (key_pattern, default) = (self.pattern_of(key), KeyDefault::Unavailable);
        let schema = serde_json::Value::Bool(false);
        self.context.record_key(KeySpec { key: key_pattern, kind, schema, default, former: None });
        let Some(entry) = self.entry(key) else { return };
        let at = self.location(entry);
        let value = match &entry.node.value {
            DocumentValue::String(_) => match AnyString.read(&self.input(entry, &at)) {
                Ok(text) => DocumentValue::String(text),
                Err(problem) => return self.context.error(&at, problem),
            },
            other => other.clone(),
        };
        if Some(&value) != neutral {
            let hint = match neutral {
                Some(neutral) => format!("remove the key, or write `{key} = {}`", format_value(neutral)),
                None => "remove the key".to_owned(),
            };
            self.context.error(&at, ConfigProblem::unavailable(&format!("`{key}`")).hint(hint));
        }
    }

    /// Whether the table has `key`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entry(key).is_some()
    }

    /// Whether a table of the array under `key` has `inner`.
    pub(super) fn has_in_any(&self, key: &str, inner: &str) -> bool {
        let Some(DocumentValue::Array(items)) = self.entry(key).map(|entry| &entry.node.value) else { return false };
        items.iter().any(|item| {
            matches!(&item.value, DocumentValue::Table(entries) if entries.iter().any(|entry| entry.key == inner))
        })
    }

    /// Whether there is a value at the path `keys`.
    pub(super) fn has_at(&self, keys: &[&str]) -> bool {
        let mut entries = self.entries;
        for key in keys {
            let Some(entry) = entries.iter().find(|entry| entry.key == *key) else { return false };
            entries = match &entry.node.value {
                DocumentValue::Table(entries) => entries,
                _ => &[],
            };
        }
        true
    }

    /// Whether the value of `key` is a table.
    pub(super) fn has_table(&self, key: &str) -> bool {
        self.entry(key).is_some_and(|entry| matches!(entry.node.value, DocumentValue::Table(_)))
    }

    /// Location of the value at the path `keys`, or of the innermost existing table on that path.
    pub(super) fn location_of(&self, keys: &[&str]) -> DocumentLocation {
        let mut at = self.at.clone();
        let mut entries = self.entries;
        for key in keys {
            at.path = join(&at.path, key);
            let Some(entry) = entries.iter().find(|entry| entry.key == *key) else { break };
            at.span = entry.node.span.clone();
            entries = if let DocumentValue::Table(entries) = &entry.node.value { entries } else { &[] };
        }
        at
    }

    /// Reads the table under `key`, which may be absent.
    pub(super) fn table<R>(&self, key: &'static str, read: impl FnOnce(&TableReader<'_>) -> R) -> R {
        self.context.record_table(TableSpec::AlwaysRead(self.pattern_of(key)));
        self.read_table(key, read)
    }

    fn read_table<R>(&self, key: &'static str, read: impl FnOnce(&TableReader<'_>) -> R) -> R {
        self.declare_name(key);
        let entry = self.entry(key);
        let span = entry.map_or_else(|| self.at.span.clone(), |entry| entry.node.span.clone());
        let at = DocumentLocation { path: self.path_of(key), span };
        let path = TablePath { at, pattern: self.pattern_of(key) };
        read_node(self.context, entry.map(|entry| &entry.node), path, read)
    }

    /// As [`Self::table`], for a table whose presence is a setting: the defaults of its keys are no
    /// effective values without it.
    pub(super) fn feature_table<R>(&self, key: &'static str, read: impl FnOnce(&TableReader<'_>) -> R) -> R {
        let result = self.read_table(key, read);
        if !self.has(key) {
            self.context.remove_values_under(&self.path_of(key));
        }
        result
    }

    /// Reads the table under `key` if the document has it.
    pub(super) fn optional_table<R>(&self, key: &'static str, read: impl FnOnce(&TableReader<'_>) -> R) -> Option<R> {
        self.declare_name(key);
        self.entry(key).is_some().then(|| self.read_table(key, read))
    }

    /// Reads each table of the array under `key`.
    pub(super) fn tables<R>(&self, key: &'static str, mut read: impl FnMut(&TableReader<'_>) -> R) -> Vec<R> {
        self.declare_name(key);
        let Some(entry) = self.entry(key) else { return Vec::new() };
        let DocumentValue::Array(items) = &entry.node.value else {
            let message = format!("expected an array of tables, found {}", entry.node.type_name());
            let problem = ConfigProblem::new(FaultCode::WrongType, message).hint(format!("write `[[{key}]]`"));
            self.context.error(&self.location(entry), problem);
            return Vec::new();
        };
        let path = self.path_of(key);
        let item = |(index, node): (usize, &DocumentNode)| {
            let at = DocumentLocation { path: format!("{path}[{index}]"), span: node.span.clone() };
            let path = TablePath { at, pattern: format!("{}[]", self.pattern_of(key)) };
            read_node(self.context, Some(node), path, &mut read)
        };
        items.iter().enumerate().map(item).collect()
    }

    /// Reads each table of the table under `key`, with its name.
    pub(super) fn named_tables<R>(
        &self,
        key: &'static str,
        mut read: impl FnMut(Located<&str>, &TableReader<'_>) -> R,
    ) -> Vec<R> {
        self.entries_of(key, |name, node| {
            let at = DocumentLocation { path: name.at.path.clone(), span: node.span.clone() };
            let path = TablePath { at, pattern: format!("{}.NAME", self.pattern_of(key)) };
            read_node(self.context, Some(node), path, |table| read(name, table))
        })
    }

    /// Reads each value of the table under `key`, with its name.
    pub(super) fn named_values<K: ValueKind>(&self, key: &'static str, kind: &K) -> Vec<(Located<String>, K::Value)> {
        let pattern = format!("{}.NAME", self.pattern_of(key));
        let (kind_text, schema) = (kind.describe(), kind.schema());
        let default = KeyDefault::None;
        self.context.record_key(KeySpec { key: pattern, kind: kind_text, schema, default, former: None });
        let values = self.entries_of(key, |name, node| {
            let at = DocumentLocation { path: name.at.path.clone(), span: node.span.clone() };
            let value = self.read_input(kind, &InputValue { node, at: &at, context: self.context })?;
            self.record_value(&at, kind.format(&value), true);
            Some((Located { value: name.value.to_owned(), at: name.at }, value))
        });
        values.into_iter().flatten().collect()
    }

    /// Visits the entries of the table under `key`, whose keys are names chosen by the user.
    fn entries_of<R>(&self, key: &'static str, mut visit: impl FnMut(Located<&str>, &DocumentNode) -> R) -> Vec<R> {
        self.declare_name(key);
        let Some(entry) = self.entry(key) else { return Vec::new() };
        let DocumentValue::Table(entries) = &entry.node.value else {
            self.context.error(&self.location(entry), not_a_table(&entry.node));
            return Vec::new();
        };
        let path = self.path_of(key);
        let visit_entry = |entry: &DocumentEntry| {
            let at = DocumentLocation { path: join(&path, &bare_or_quoted(&entry.key)), span: entry.key_span.clone() };
            visit(Located { value: &entry.key, at }, &entry.node)
        };
        entries.iter().map(visit_entry).collect()
    }

    fn read<K: ValueKind>(&self, key: &'static str, kind: &K) -> Option<Located<K::Value>> {
        let entry = self.entry(key)?;
        let at = self.location(entry);
        let value = self.read_input(kind, &self.input(entry, &at))?;
        self.record_value(&at, kind.format(&value), true);
        Some(Located { value, at })
    }

    fn record_value(&self, at: &DocumentLocation, text: String, is_set: bool) {
        let offset = is_set.then_some(at.span.start);
        self.context.record_value(EffectiveValue { path: at.path.clone(), text, offset });
    }

    /// Parses a value; a problem is recorded as a fault.
    fn read_input<K: ValueKind>(&self, kind: &K, input: &InputValue<'_>) -> Option<K::Value> {
        kind.read(input).map_err(|problem| self.context.error(input.at, problem)).ok()
    }

    fn input<'g>(&'g self, entry: &'g DocumentEntry, at: &'g DocumentLocation) -> InputValue<'g> {
        InputValue { node: &entry.node, at, context: self.context }
    }

    fn entry(&self, key: &str) -> Option<&'a DocumentEntry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    fn location(&self, entry: &DocumentEntry) -> DocumentLocation {
        DocumentLocation { path: self.path_of(&entry.key), span: entry.node.span.clone() }
    }

    /// Declares a key, and records it for the reference documentation.
    fn declare(&self, key: &'static str, kind: &impl ValueKind, default: KeyDefault) {
        self.declare_name(key);
        let (key, schema) = (self.pattern_of(key), kind.schema());
        self.context.record_key(KeySpec { key, kind: kind.describe(), schema, default, former: None });
    }

    /// Declares a renamed key under its current name.
    fn declare_renamed<K: ValueKind>(&self, key: &RenamedKey, kind: &K, default: &K::Value) {
        self.declare_name(key.name);
        let default = KeyDefault::Value(kind.format(default));
        let (pattern, former) = (self.pattern_of(key.name), Some(key.former));
        let spec = KeySpec { key: pattern, kind: kind.describe(), schema: kind.schema(), default, former };
        self.context.record_key(spec);
    }

    /// Declares a constraint between the keys of this table, for the JSON Schema. The reader checks
    /// it by itself, with a message of its own.
    pub(super) fn constraint(&self, schema: serde_json::Value) {
        self.context.record_table(TableSpec::Constraint(self.pattern.clone(), schema));
    }

    fn declare_name(&self, key: &'static str) {
        self.declared.borrow_mut().push(key);
    }

    /// Reports every key that no reader has declared.
    fn report_unknown(&self) {
        let (declared, deprecated) = (self.declared.borrow(), self.deprecated.borrow());
        let is_known = |key: &str| declared.contains(&key) || deprecated.contains(&key);
        for entry in self.entries.iter().filter(|entry| !is_known(&entry.key)) {
            let at = DocumentLocation { path: self.path_of(&entry.key), span: entry.key_span.clone() };
            let problem = ConfigProblem::new(FaultCode::UnknownKey, format!("unknown key `{}`", entry.key));
            self.context.error(&at, problem.hint(suggest(&entry.key, &declared)));
        }
    }

    fn path_of(&self, key: &str) -> String {
        join(&self.at.path, key)
    }

    fn pattern_of(&self, key: &str) -> String {
        join(&self.pattern, key)
    }
}

fn join(parent: &str, key: &str) -> String {
    if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") }
}

/// A key as a dotted key has it.
pub(super) fn bare_or_quoted(key: &str) -> String {
    let is_bare = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if !key.is_empty() && key.bytes().all(is_bare) { key.to_owned() } else { quoted(key) }
}

/// A neutral value in the syntax of the document.
fn format_value(value: &DocumentValue) -> String {
    match value {
        DocumentValue::String(text) => format!("{text:?}"),
        DocumentValue::Integer(number) => number.to_string(),
        _ => String::new(),
    }
}
