//! Constraints between the keys of a table, as JSON Schemas. Each is checked by the reader too,
//! with a message of its own.

use serde_json::{Value, json};

/// The table has one of `keys`, and no other of them.
pub(super) fn exactly_one(keys: &[&str]) -> Value {
    json!({ "oneOf": each(keys) })
}

/// The table has one of `keys`, or several.
pub(super) fn at_least_one(keys: &[&str]) -> Value {
    json!({ "anyOf": each(keys) })
}

/// `key` has no effect beside any of `others`, and is refused there.
pub(super) fn excludes(key: &str, others: &[&str]) -> Value {
    json!({ "not": { "required": [key], "anyOf": each(others) } })
}

/// `key` is refused without `other`.
pub(super) fn needs(key: &str, other: &str) -> Value {
    json!({ "dependentRequired": { key: [other] } })
}

/// The array of tables `key` is required, and has an item.
pub(super) fn not_empty(key: &str) -> Value {
    json!({ "required": [key], "properties": { key: { "minItems": 1 } } })
}

/// The names in the table `key` match a regular expression.
pub(super) fn names(key: &str, pattern: &str) -> Value {
    json!({ "properties": { key: { "propertyNames": { "pattern": format!("^(?:{pattern})$") } } } })
}

/// `key` is required where `selector` has the value `word`.
pub(super) fn needed_by(key: &str, (selector, word): (&str, &str)) -> Value {
    json!({ "if": selected(selector, &[word]), "then": { "required": [key] } })
}

/// `key` is refused where `selector` has one of `words`.
pub(super) fn refused_by(key: &str, (selector, words): (&str, &[&str])) -> Value {
    json!({ "if": selected(selector, words), "then": { "not": { "required": [key] } } })
}

fn each(keys: &[&str]) -> Vec<Value> {
    keys.iter().map(|key| json!({ "required": [key] })).collect()
}

fn selected(selector: &str, words: &[&str]) -> Value {
    json!({ "properties": { selector: { "enum": words } }, "required": [selector] })
}
