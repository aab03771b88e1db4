//! State shared while one document is read: faults found so far and keys declared so far.
//!
//! A fault never stops the read: it is recorded and a default value is used instead, so that one
//! run reports all faults. Each key is recorded with its type and default; the reference
//! documentation is generated from this record.

use std::cell::RefCell;
use std::collections::HashMap;

use super::expand::ExpansionEnvironment;
use super::fault::{ConfigFault, ConfigProblem, DocumentLocation, FaultSeverity};
use super::own_machine::OwnMachine;

/// Shared state of one read of a document.
pub(super) struct ReadContext<'a> {
    pub(super) source: &'a str,
    pub(super) environment: ExpansionEnvironment<'a>,
    pub(super) purpose: ReadPurpose,
    pub(super) own_machine: OwnMachine,
    /// With the keys that each is about (see [`ConfigProblem::lacks`]).
    faults: RefCell<Vec<(ConfigFault, Vec<String>)>>,
    keys: RefCell<Vec<KeySpec>>,
    tables: RefCell<Vec<TableSpec>>,
    values: RefCell<Vec<EffectiveValue>>,
}

/// Why a document is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadPurpose {
    /// To run by it.
    Run,
    /// To run by it in place of another one: what listeners have loaded from files stays in use
    /// without the files.
    Reload,
    /// To find its faults: also those that a start would find later, in files.
    Check,
    /// To print it.
    Print,
}

/// The value that a key has, in the syntax of the document.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct EffectiveValue {
    /// Such as `upstreams.shop.timeout` or `routes[0].cost`.
    pub(super) path: String,
    pub(super) text: String,
    /// The first byte of the value in the document; `None`: a default.
    pub(super) offset: Option<usize>,
}

/// A key as its reader declares it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct KeySpec {
    /// Such as `upstreams.NAME.timeout` or `routes[].cost`.
    pub(super) key: String,
    pub(super) kind: String,
    /// The accepted values as a JSON Schema.
    pub(super) schema: serde_json::Value,
    pub(super) default: KeyDefault,
    /// The former name, which is still accepted.
    pub(super) former: Option<&'static str>,
}

/// A declaration of a reader about a table, for the JSON Schema.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum TableSpec {
    /// A table that is read where it is absent too: it is required if one of its keys is.
    AlwaysRead(String),
    /// A constraint between the keys of a table, as a JSON Schema.
    Constraint(String, serde_json::Value),
}

/// Meaning of an absent key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum KeyDefault {
    /// A fault.
    Required,
    /// A fault, unless the table has one of these keys, which exclude this one and each other.
    RequiredWithout(&'static [&'static str]),
    /// The key is optional and has no default value.
    None,
    Value(String),
    /// The key belongs to a feature that is not available yet.
    Unavailable,
}

/// A value and its location, for checks that compare several values.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Located<T> {
    pub(super) value: T,
    pub(super) at: DocumentLocation,
}

impl<'a> ReadContext<'a> {
    pub(super) fn new(source: &'a str, environment: ExpansionEnvironment<'a>) -> Self {
        ReadContext {
            source,
            environment,
            purpose: ReadPurpose::Run,
            own_machine: OwnMachine::default(),
            faults: RefCell::default(),
            keys: RefCell::default(),
            tables: RefCell::default(),
            values: RefCell::default(),
        }
    }

    pub(super) fn error(&self, at: &DocumentLocation, mut problem: ConfigProblem) {
        let lacking = std::mem::take(&mut problem.lacking);
        self.faults.borrow_mut().push((self.narrow(at, &problem).error(problem), lacking));
    }

    /// The part of `at` that holds the problem's excerpt, or all of `at` if the source there does
    /// not contain the excerpt literally.
    fn narrow(&self, at: &DocumentLocation, problem: &ConfigProblem) -> DocumentLocation {
        let excerpt = problem.excerpt.as_deref().zip(self.source.get(at.span.clone()));
        match excerpt.and_then(|(excerpt, value)| Some((excerpt, value.find(excerpt)?))) {
            Some((excerpt, offset)) => {
                let start = at.span.start + offset;
                DocumentLocation { path: at.path.clone(), span: start..start + excerpt.len() }
            }
            None => at.clone(),
        }
    }

    pub(super) fn warning(&self, at: &DocumentLocation, mut problem: ConfigProblem) {
        let lacking = std::mem::take(&mut problem.lacking);
        self.faults.borrow_mut().push((at.warning(problem), lacking));
    }

    pub(super) fn report(&self, severity: FaultSeverity, at: &DocumentLocation, problem: ConfigProblem) {
        match severity {
            FaultSeverity::Error => self.error(at, problem),
            FaultSeverity::Warning => self.warning(at, problem),
        }
    }

    /// Whether a fault was found at `path` or below it.
    pub(super) fn has_fault_under(&self, path: &str) -> bool {
        let is_under = |fault: &ConfigFault| {
            fault.path.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        self.faults.borrow().iter().any(|(fault, _)| is_under(fault))
    }

    /// Whether one of the faults found so far is such a one.
    pub(super) fn has_fault(&self, is_such: impl Fn(&ConfigFault) -> bool) -> bool {
        self.faults.borrow().iter().any(|(fault, _)| is_such(fault))
    }

    /// Records a key as its reader declares it.
    pub(super) fn record_key(&self, spec: KeySpec) {
        self.keys.borrow_mut().push(spec);
    }

    /// Records the declaration of a reader about a table.
    pub(super) fn record_table(&self, spec: TableSpec) {
        self.tables.borrow_mut().push(spec);
    }

    /// Records the value that a key has.
    pub(super) fn record_value(&self, value: EffectiveValue) {
        self.values.borrow_mut().push(value);
    }

    /// Removes the effective values of the keys of a table that has just been read: they are among
    /// the last ones, those of the table around it. Others are not compared: a document may have
    /// thousands of routes.
    pub(super) fn remove_values_under(&self, table: &str) {
        let is_under = |path: &str| path.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'));
        let around = table.rsplit_once('.').map_or("", |(around, _)| around);
        let mut values = self.values.borrow_mut();
        let from = values.iter().rposition(|value| !value.path.starts_with(around)).map_or(0, |last| last + 1);
        let mut recent = values.split_off(from);
        recent.retain(|value| !is_under(&value.path));
        values.append(&mut recent);
    }

    /// The values of all keys that were read, in the order of reading.
    pub(super) fn values(&self) -> Vec<EffectiveValue> {
        self.values.borrow().clone()
    }

    /// The faults without those that are consequences of others.
    pub(super) fn into_faults(self) -> Vec<ConfigFault> {
        let all = self.faults.into_inner();
        let is_cause = |(fault, lacking): &&(ConfigFault, Vec<String>)| {
            lacking.is_empty() && fault.severity == FaultSeverity::Error
        };
        let causes: Vec<ConfigFault> = all.iter().filter(is_cause).map(|(fault, _)| fault.clone()).collect();
        // A document may have thousands of consequences of one kind.
        let mut is_explained: HashMap<String, bool> = HashMap::new();
        let mut is_consequence = |keys: Vec<String>| {
            keys.into_iter().any(|key| {
                let explained = || causes.iter().any(|fault| fault.explains_absence_of(&key));
                match is_explained.get(&key) {
                    Some(known) => *known,
                    None => {
                        let explained = explained();
                        is_explained.insert(key, explained);
                        explained
                    }
                }
            })
        };
        all.into_iter().filter_map(|(fault, lacking)| (!is_consequence(lacking)).then_some(fault)).collect()
    }

    /// All declarations about tables, in their order.
    pub(super) fn tables(&self) -> Vec<TableSpec> {
        self.tables.borrow().clone()
    }

    /// All declared keys, in the order of declaration.
    pub(super) fn keys(&self) -> Vec<KeySpec> {
        self.keys.borrow().clone()
    }
}
