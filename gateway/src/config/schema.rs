//! The configuration's JSON Schema, made from the keys that the readers declare.
//!
//! Editors use it for completion and hints. It refuses nothing that the gateway accepts. `tidegate
//! check` knows more: references between sections, files, and what needs more than the syntax.

use serde_json::{Map, Value, json};

use super::constraints;
use super::read_context::{KeyDefault, TableSpec};
use super::reference;

/// The schema as a JSON document.
pub fn schema() -> Value {
    let mut root = table();
    for (spec, description) in reference::documented_keys() {
        if spec.default == KeyDefault::Unavailable {
            continue;
        }
        let mut leaf = spec.schema.clone();
        if let Value::Object(leaf) = &mut leaf {
            leaf.insert("description".to_owned(), json!(format!("{description} ({})", spec.kind)));
            if let KeyDefault::Value(text) = &spec.default
                && let Ok(default) = serde_json::from_str::<Value>(text)
            {
                leaf.insert("default".to_owned(), default);
            }
        }
        if let Some(former) = spec.former {
            let (parent, _) = split_last(&spec.key);
            let mut deprecated = leaf.clone();
            deprecated["deprecated"] = json!(true);
            insert(&mut root, &join(parent, former), deprecated, false);
        }
        insert(&mut root, &spec.key, leaf, spec.default == KeyDefault::Required);
        let (parent, key) = split_last(&spec.key);
        if let KeyDefault::RequiredWithout(others) = spec.default {
            let keys: Vec<&str> = [key].into_iter().chain(others.iter().copied()).collect();
            constrain(&mut root, parent, constraints::exactly_one(&keys));
        }
        if let Some(former) = spec.former {
            constrain(&mut root, parent, constraints::excludes(former, &[key]));
        }
    }
    for spec in reference::declared_tables() {
        match spec {
            TableSpec::AlwaysRead(path) => require_with_its_keys(&mut root, &path),
            TableSpec::Constraint(path, constraint) => constrain(&mut root, &path, constraint),
        }
    }
    if let Value::Object(root) = &mut root {
        root.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
        root.insert("title".to_owned(), json!("Configuration of Tidegate"));
    }
    root
}

fn split_last(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}

fn join(parent: &str, key: &str) -> String {
    if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") }
}

/// Adds a constraint to the table at `path`.
fn constrain(root: &mut Value, path: &str, constraint: Value) {
    let Some(table) = table_at(root, path).and_then(Value::as_object_mut) else { return };
    let all = table.entry("allOf").or_insert_with(|| json!([]));
    if let Some(all) = all.as_array_mut().filter(|all| !all.contains(&constraint)) {
        all.push(constraint);
    }
}

/// Requires the table at `path` if one of its keys is required.
fn require_with_its_keys(root: &mut Value, path: &str) {
    let (parent, key) = split_last(path);
    if table_at(root, path).is_none_or(|table| table.get("required").is_none()) {
        return;
    }
    let Some(parent) = table_at(root, parent).and_then(Value::as_object_mut) else { return };
    let required = parent.entry("required").or_insert_with(|| json!([]));
    if let Some(required) = required.as_array_mut().filter(|required| !required.contains(&json!(key))) {
        required.push(json!(key));
    }
}

/// The table at `path`, such as `routes[].match`; `None` if no key of it is known.
fn table_at<'a>(root: &'a mut Value, path: &str) -> Option<&'a mut Value> {
    let mut at = root;
    for segment in path.split('.').filter(|segment| !segment.is_empty()) {
        let inner = match segment.strip_suffix("[]") {
            Some(name) => at.get_mut("properties")?.get_mut(name)?.get_mut("items")?,
            None if segment == "NAME" => at.get_mut("additionalProperties")?,
            None => at.get_mut("properties")?.get_mut(segment)?,
        };
        at = if inner.get("properties").is_some() { inner } else { inner.get_mut("anyOf")?.get_mut(1)? };
    }
    Some(at)
}

fn table() -> Value {
    json!({ "type": "object", "properties": {}, "additionalProperties": false })
}

/// Inserts the schema of the key at `path`, such as `routes[].match.headers.NAME`.
fn insert(at: &mut Value, path: &str, leaf: Value, is_required: bool) {
    let (segment, rest) = path.split_once('.').map_or((path, None), |(segment, rest)| (segment, Some(rest)));
    let Some(node) = table_of(at).as_object_mut() else { return };
    let (name, is_array) = segment.strip_suffix("[]").map_or((segment, false), |name| (name, true));
    if name == "NAME" {
        let inner = node.entry("additionalProperties").or_insert(Value::Bool(false));
        return match rest {
            None => *inner = leaf,
            Some(rest) => {
                if !inner.is_object() {
                    *inner = table();
                }
                insert(inner, rest, leaf, is_required);
            }
        };
    }
    if is_required && rest.is_none() {
        let required = node.entry("required").or_insert_with(|| json!([]));
        if let Some(required) = required.as_array_mut() {
            required.push(json!(name));
        }
    }
    let Some(properties) = node.get_mut("properties").and_then(Value::as_object_mut) else { return };
    match (rest, is_array) {
        (None, _) => either(properties, name, leaf),
        (Some(rest), false) => {
            let inner = properties.entry(name).or_insert_with(table);
            if !is_table(inner) {
                // A key that has a value or a table.
                *inner = json!({ "anyOf": [inner.take(), table()] });
            }
            insert(inner, rest, leaf, is_required);
        }
        (Some(rest), true) => {
            let inner = properties.entry(name).or_insert_with(|| json!({ "type": "array", "items": table() }));
            insert(&mut inner["items"], rest, leaf, is_required);
        }
    }
}

/// Adds the schema of a value to a key that may have a table too.
fn either(properties: &mut Map<String, Value>, name: &str, leaf: Value) {
    match properties.get_mut(name) {
        Some(existing) => *existing = json!({ "anyOf": [leaf, existing.take()] }),
        None => drop(properties.insert(name.to_owned(), leaf)),
    }
}

fn is_table(node: &Value) -> bool {
    node.get("properties").is_some() || node.get("anyOf").and_then(|any| any.get(1)).is_some_and(is_table)
}

/// The table of a key that may have a value too.
fn table_of(node: &mut Value) -> &mut Value {
    if node.get("properties").is_some() { node } else { &mut node["anyOf"][1] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_types_ranges_and_defaults() {
        let schema = schema();
        let of = |pointer: &str| schema.pointer(pointer).unwrap_or_else(|| panic!("{pointer}: {schema:#}"));
        assert_eq!(of("/properties/routes/items/properties/cost/minimum"), &json!(1));
        assert_eq!(of("/properties/upstreams/additionalProperties/properties/timeout/default"), &json!("10s"));
        assert_eq!(
            of("/properties/routes/items/properties/match/properties/headers/additionalProperties/type"),
            &json!("string")
        );
        assert_eq!(of("/properties/routes/items/properties/cors/properties/credentials/type"), &json!("boolean"));
        assert_eq!(of("/properties/identity/properties/user/anyOf/0/type"), &json!("string"));
        assert!(of("/properties/identity/properties/user/anyOf/1/properties/jwt").is_object());
        assert_eq!(of("/properties/limits/additionalProperties/required"), &json!(["tier", "rate", "burst"]));
        assert_eq!(of("/properties/routes/items/required"), &json!(["name", "match"]));
        assert_eq!(of("/properties/cache/properties/fill_bytes/deprecated"), &json!(true));
    }

    #[test]
    fn every_constraint_is_in_its_table() {
        let (mut schema, mut constraints) = (schema(), 0);
        for spec in reference::declared_tables() {
            let TableSpec::Constraint(path, constraint) = spec else { continue };
            let table = table_at(&mut schema, &path).unwrap_or_else(|| panic!("no table {path}"));
            assert!(table["allOf"].as_array().is_some_and(|all| all.contains(&constraint)), "{path}: {constraint}");
            constraints += 1;
        }
        assert!(constraints > 50, "{constraints}");
    }
}
