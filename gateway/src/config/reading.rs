//! One reading of a document: what it found wrong, and which keys it asked for.
//!
//! A fault never stops a reading: it is recorded and a value stands in, so that one run reports everything. Every key
//! that is asked for is also noted with its type and default, from which the documentation of keys is made.

use std::cell::RefCell;

use super::document::{Node, Value};
use super::expand::Values;
use super::fault::{At, Code, Fault, Problem};
use super::table::Table;

/// What one reading of a document shares: where values come from, and everything found so far.
pub(super) struct Reading<'a> {
    pub(super) source: &'a str,
    pub(super) values: Values<'a>,
    faults: RefCell<Vec<Fault>>,
    asked: RefCell<Vec<Asked>>,
}

/// A key as its reader asked for it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Asked {
    /// Such as `upstreams.NAME.timeout` or `routes[].cost`.
    pub(super) key: String,
    pub(super) kind: String,
    pub(super) absent: Absent,
}

/// What stands in for a key that is not there.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Absent {
    Required,
    Nothing,
    Value(String),
    /// The key is not available yet.
    Later,
}

/// A value and its place, for checks that look at several values together.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Placed<T> {
    pub(super) value: T,
    pub(super) at: At,
}

impl<'a> Reading<'a> {
    pub(super) fn new(source: &'a str, values: Values<'a>) -> Self {
        Reading { source, values, faults: RefCell::default(), asked: RefCell::default() }
    }

    pub(super) fn error(&self, at: &At, problem: Problem) {
        self.faults.borrow_mut().push(self.narrow(at, &problem).error(problem));
    }

    /// The part of `at` where the text that the problem names is found as it stands, or all of `at`.
    fn narrow(&self, at: &At, problem: &Problem) -> At {
        let within = problem.within.as_deref().zip(self.source.get(at.span.clone()));
        match within.and_then(|(part, whole)| Some((part, whole.find(part)?))) {
            Some((part, offset)) => {
                let start = at.span.start + offset;
                At { path: at.path.clone(), span: start..start + part.len() }
            }
            None => at.clone(),
        }
    }

    pub(super) fn warning(&self, at: &At, problem: Problem) {
        self.faults.borrow_mut().push(at.warning(problem));
    }

    /// Whether an error was found at `path` or below it.
    pub(super) fn has_error_under(&self, path: &str) -> bool {
        let under = |fault: &Fault| {
            fault.path.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        self.faults.borrow().iter().any(under)
    }

    /// Records a key as its reader asks for it.
    pub(super) fn note(&self, key: String, kind: String, absent: Absent) {
        self.asked.borrow_mut().push(Asked { key, kind, absent });
    }

    pub(super) fn into_faults(self) -> Vec<Fault> {
        self.faults.into_inner()
    }

    /// Every key that was asked for, in the order of asking.
    pub(super) fn asked(&self) -> Vec<Asked> {
        self.asked.borrow().clone()
    }

    /// Reads the document: `read` asks its keys, then every other key is reported.
    pub(super) fn document<R>(&self, root: &Node, read: impl FnOnce(&Table<'_>) -> R) -> R {
        self.scope(Some(root), At::default(), String::new(), read)
    }

    /// Reads one table; `pattern` is its path with names and indexes left open.
    pub(super) fn scope<R>(
        &self,
        node: Option<&Node>,
        at: At,
        pattern: String,
        read: impl FnOnce(&Table<'_>) -> R,
    ) -> R {
        let entries = match node {
            None => None,
            Some(Node { value: Value::Table(entries), .. }) => Some(entries.as_slice()),
            Some(node) => {
                let problem = Problem::new(Code::WrongType, format!("expected a table, found {}", node.found()));
                self.error(&at, problem);
                None
            }
        };
        let table = Table::new(self, at, pattern, entries.unwrap_or_default());
        let result = read(&table);
        table.report_unknown();
        result
    }
}
