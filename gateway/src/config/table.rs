//! A table of the document as its readers see it: ask for keys, and whatever was not asked for is unknown.

use std::cell::RefCell;

use super::document::{Entry, Node, Value};
use super::fault::{At, Code, Problem};
use super::kind::{Given, Kind, Text};
use super::nearest::nearest;
use super::reading::{Absent, Placed, Reading};

/// One table, or the absence of one: then every key of it is absent.
pub(super) struct Table<'a> {
    pub(super) reading: &'a Reading<'a>,
    pub(super) at: At,
    entries: &'a [Entry],
    pattern: String,
    known: RefCell<Vec<&'static str>>,
}

/// What stands where a value or a table may stand.
pub(super) enum Either<V, T> {
    Value(Placed<V>),
    Table(T),
}

impl<'a> Table<'a> {
    pub(super) fn new(reading: &'a Reading<'a>, at: At, pattern: String, entries: &'a [Entry]) -> Self {
        Table { reading, at, entries, pattern, known: RefCell::default() }
    }

    /// A value that may be absent.
    pub(super) fn optional<K: Kind>(&self, key: &'static str, kind: &K) -> Option<Placed<K::Value>> {
        self.ask(key, kind.describe(), Absent::Nothing);
        self.read(key, kind)
    }

    /// A value, or what stands in for it; `None` after a fault, so that a caller need not repeat the default.
    pub(super) fn or<K: Kind>(&self, key: &'static str, kind: &K, default: K::Value) -> K::Value {
        self.placed_or(key, kind, default).0
    }

    /// The same, with its place where it is written.
    pub(super) fn placed_or<K: Kind>(&self, key: &'static str, kind: &K, default: K::Value) -> (K::Value, Option<At>) {
        self.ask(key, kind.describe(), Absent::Value(kind.show(&default)));
        self.read(key, kind).map_or((default, None), |placed| (placed.value, Some(placed.at)))
    }

    /// A value that may be absent, or a table in its place.
    pub(super) fn either<K: Kind, R>(
        &self,
        key: &'static str,
        kind: &K,
        read: impl FnOnce(&Table<'_>) -> R,
    ) -> Option<Either<K::Value, R>> {
        self.ask(key, kind.describe(), Absent::Nothing);
        let entry = self.entry(key)?;
        if let Value::Table(_) = entry.node.value {
            let (at, pattern) = (self.place(entry), self.pattern_of(key));
            return Some(Either::Table(self.reading.scope(Some(&entry.node), at, pattern, read)));
        }
        self.read(key, kind).map(Either::Value)
    }

    /// A value that has to be there.
    pub(super) fn required<K: Kind>(&self, key: &'static str, kind: &K) -> Option<Placed<K::Value>> {
        self.ask(key, kind.describe(), Absent::Required);
        if self.entry(key).is_none() {
            let problem = Problem::new(Code::Missing, format!("`{key}` is missing"));
            let at = At { path: self.path_of(key), span: self.at.span.clone() };
            self.reading.error(&at, problem.hint(format!("it takes {}", kind.describe())));
        }
        self.read(key, kind)
    }

    /// A key whose feature is not available yet: only `neutral`, which asks for nothing, is accepted.
    pub(super) fn later(&self, key: &'static str, neutral: Option<&Value>) {
        let kind = neutral.map_or_else(|| "absent".to_owned(), |value| format!("`{}` or absent", written(value)));
        self.ask(key, kind, Absent::Later);
        let Some(entry) = self.entry(key) else { return };
        let at = self.place(entry);
        let value = match &entry.node.value {
            Value::Text(_) => match Text.read(&self.given(entry, &at)) {
                Ok(text) => Value::Text(text),
                Err(problem) => return self.reading.error(&at, problem),
            },
            other => other.clone(),
        };
        if Some(&value) != neutral {
            let hint = match neutral {
                Some(neutral) => format!("leave it out, or write `{key} = {}`", written(neutral)),
                None => "leave it out".to_owned(),
            };
            self.reading.error(&at, Problem::unavailable(&format!("`{key}`")).hint(hint));
        }
    }

    /// Whether `key` is there.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entry(key).is_some()
    }

    /// Whether there is a table under `key`.
    pub(super) fn has_table(&self, key: &str) -> bool {
        self.entry(key).is_some_and(|entry| matches!(entry.node.value, Value::Table(_)))
    }

    /// Where the value stands that `keys` lead to, or the nearest table around it.
    pub(super) fn place_of(&self, keys: &[&str]) -> At {
        let mut at = self.at.clone();
        let mut entries = self.entries;
        for key in keys {
            at.path = join(&at.path, key);
            let Some(entry) = entries.iter().find(|entry| entry.key == *key) else { break };
            at.span = entry.node.span.clone();
            entries = if let Value::Table(entries) = &entry.node.value { entries } else { &[] };
        }
        at
    }

    /// Reads the table under `key`, which may be absent.
    pub(super) fn table<R>(&self, key: &'static str, read: impl FnOnce(&Table<'_>) -> R) -> R {
        self.know(key);
        let entry = self.entry(key);
        let span = entry.map_or_else(|| self.at.span.clone(), |entry| entry.node.span.clone());
        let at = At { path: self.path_of(key), span };
        self.reading.scope(entry.map(|entry| &entry.node), at, self.pattern_of(key), read)
    }

    /// Reads the table under `key` where there is one.
    pub(super) fn some_table<R>(&self, key: &'static str, read: impl FnOnce(&Table<'_>) -> R) -> Option<R> {
        self.know(key);
        self.entry(key).is_some().then(|| self.table(key, read))
    }

    /// Reads each table of the list under `key`.
    pub(super) fn tables<R>(&self, key: &'static str, mut read: impl FnMut(&Table<'_>) -> R) -> Vec<R> {
        self.know(key);
        let Some(entry) = self.entry(key) else { return Vec::new() };
        let Value::List(items) = &entry.node.value else {
            let message = format!("expected a list of tables, found {}", entry.node.found());
            let problem = Problem::new(Code::WrongType, message).hint(format!("write `[[{key}]]`"));
            self.reading.error(&self.place(entry), problem);
            return Vec::new();
        };
        let path = self.path_of(key);
        let item = |(index, node): (usize, &Node)| {
            let at = At { path: format!("{path}[{index}]"), span: node.span.clone() };
            self.reading.scope(Some(node), at, format!("{}[]", self.pattern_of(key)), &mut read)
        };
        items.iter().enumerate().map(item).collect()
    }

    /// Reads each table of the table under `key`, with the name it stands under.
    pub(super) fn named<R>(&self, key: &'static str, mut read: impl FnMut(Placed<&str>, &Table<'_>) -> R) -> Vec<R> {
        self.free(key, |name, node| {
            let at = At { path: name.at.path.clone(), span: node.span.clone() };
            let pattern = format!("{}.NAME", self.pattern_of(key));
            self.reading.scope(Some(node), at, pattern, |table| read(name, table))
        })
    }

    /// Reads each value of the table under `key`, with the name it stands under.
    pub(super) fn pairs<K: Kind>(&self, key: &'static str, kind: &K) -> Vec<(Placed<String>, K::Value)> {
        self.reading.note(format!("{}.NAME", self.pattern_of(key)), kind.describe(), Absent::Nothing);
        let pairs = self.free(key, |name, node| {
            let at = At { path: name.at.path.clone(), span: node.span.clone() };
            let value = self.settle(kind, &Given { node, at: &at, reading: self.reading })?;
            Some((Placed { value: name.value.to_owned(), at: name.at }, value))
        });
        pairs.into_iter().flatten().collect()
    }

    /// Visits a table whose keys are names of the user's own choice.
    fn free<R>(&self, key: &'static str, mut visit: impl FnMut(Placed<&str>, &Node) -> R) -> Vec<R> {
        self.know(key);
        let Some(entry) = self.entry(key) else { return Vec::new() };
        let Value::Table(entries) = &entry.node.value else {
            let problem = Problem::new(Code::WrongType, format!("expected a table, found {}", entry.node.found()));
            self.reading.error(&self.place(entry), problem);
            return Vec::new();
        };
        let path = self.path_of(key);
        let named = |entry: &Entry| {
            let at = At { path: join(&path, &entry.key), span: entry.key_span.clone() };
            visit(Placed { value: &entry.key, at }, &entry.node)
        };
        entries.iter().map(named).collect()
    }

    fn read<K: Kind>(&self, key: &'static str, kind: &K) -> Option<Placed<K::Value>> {
        let entry = self.entry(key)?;
        let at = self.place(entry);
        let value = self.settle(kind, &self.given(entry, &at))?;
        Some(Placed { value, at })
    }

    fn settle<K: Kind>(&self, kind: &K, given: &Given<'_>) -> Option<K::Value> {
        kind.read(given).map_err(|problem| self.reading.error(given.at, problem)).ok()
    }

    fn given<'g>(&'g self, entry: &'g Entry, at: &'g At) -> Given<'g> {
        Given { node: &entry.node, at, reading: self.reading }
    }

    fn entry(&self, key: &str) -> Option<&'a Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    fn place(&self, entry: &Entry) -> At {
        At { path: self.path_of(&entry.key), span: entry.node.span.clone() }
    }

    fn ask(&self, key: &'static str, kind: String, absent: Absent) {
        self.know(key);
        self.reading.note(self.pattern_of(key), kind, absent);
    }

    fn know(&self, key: &'static str) {
        self.known.borrow_mut().push(key);
    }

    /// Reports every key that no reader asked for.
    pub(super) fn report_unknown(&self) {
        let known = self.known.borrow();
        for entry in self.entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let at = At { path: self.path_of(&entry.key), span: entry.key_span.clone() };
            let problem = Problem::new(Code::UnknownKey, format!("unknown key `{}`", entry.key));
            self.reading.error(&at, problem.hint(nearest(&entry.key, &known)));
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

/// A neutral value as it would be written.
fn written(value: &Value) -> String {
    match value {
        Value::Text(text) => format!("{text:?}"),
        Value::Whole(number) => number.to_string(),
        _ => String::new(),
    }
}
