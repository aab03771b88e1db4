//! The effective configuration as a TOML document: the value of each key, and its origin.
//!
//! Invariants: no secret is printed, and `tidegate check -` accepts what is printed. It has the
//! same effective configuration, except for secrets that the document holds as text.

mod layout;
mod secrets;

use layout::Tree;

use super::check;
use super::document::{self, ConfigDocument};
use super::expand::{self, ExpansionEnvironment};
use super::fault::ConfigReport;
use super::node::{DocumentNode, DocumentValue};
use super::read_context::{EffectiveValue, ReadContext};
use super::value_kind::quoted;
use super::{section, table_reader};

/// The parts of the effective configuration that are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrintOptions {
    /// Also keys that the document does not have.
    pub defaults: bool,
    /// A comment with the place of each value.
    pub origin: bool,
}

/// One line for each key, `key = value`: first those outside arrays of tables, by their whole path,
/// then `[[listen]]` and `[[routes]]` with theirs.
///
/// # Errors
/// The faults of the document, if it has an error.
pub(super) fn print(document: &ConfigDocument<'_>, options: PrintOptions) -> Result<String, ConfigReport> {
    let report = |faults| ConfigReport::new(document.name, document.text, faults);
    let root = document::parse(document.text, document.format).map_err(report)?;
    let context = ReadContext::new(document.text, ExpansionEnvironment::new(document.base, document.env));
    let draft = table_reader::read_document(&context, &root, section::read);
    check::resolve(draft, &context);
    let values = context.values();
    let report = report(context.into_faults());
    if report.has_errors() {
        return Err(report);
    }
    let mut tree = Tree::default();
    for value in values.iter().filter(|value| options.defaults || value.offset.is_some()) {
        let comment = options.origin.then(|| origin(value, document));
        tree.insert(&layout::segments(&value.path), (shown(value, &root), comment));
    }
    // The presence of a table can be a setting, also where each of its keys has its default.
    add_tables(&root, &mut Vec::new(), &mut tree);
    Ok(tree.to_toml())
}

fn add_tables(node: &DocumentNode, path: &mut Vec<layout::Segment>, tree: &mut Tree) {
    match &node.value {
        DocumentValue::Table(entries) => {
            tree.insert_table(path);
            for entry in entries {
                path.push(layout::Segment::Key(entry.key.clone()));
                add_tables(&entry.node, path, tree);
                path.pop();
            }
        }
        DocumentValue::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                path.push(layout::Segment::Index(index));
                add_tables(item, path, tree);
                path.pop();
            }
        }
        _ => {}
    }
}

/// The place of a value: its document and line, or that it is a default.
fn origin(value: &EffectiveValue, document: &ConfigDocument<'_>) -> String {
    value
        .offset
        .map_or_else(|| "default".to_owned(), |offset| format!("{}:{}", document.name, line(document.text, offset)))
}

/// The number of the line of a byte.
fn line(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// The value as it is printed: the effective one, or as the document writes it where that has a
/// secret or the reference to one.
fn shown(value: &EffectiveValue, root: &DocumentNode) -> String {
    let segments = layout::segments(&value.path);
    let written = value.offset.and_then(|_| layout::node_at(root, &segments)).map(|node| &node.value);
    let secrecy = secrets::Secrecy::of(&segments);
    let concealed = match written {
        Some(DocumentValue::String(text)) => secrecy.conceal(text).map(|text| quoted(&text)),
        Some(DocumentValue::Array(items)) => concealed_items(items, secrecy),
        _ => None,
    };
    concealed.unwrap_or_else(|| expand::escape(&value.text))
}

/// An array of texts, where at least one has a secret or the reference to one.
fn concealed_items(items: &[DocumentNode], secrecy: secrets::Secrecy) -> Option<String> {
    let mut has_secret = false;
    let texts: Option<Vec<String>> = items
        .iter()
        .map(|item| {
            let DocumentValue::String(text) = &item.value else { return None };
            let concealed = secrecy.conceal(text);
            has_secret |= concealed.is_some();
            Some(quoted(&concealed.unwrap_or_else(|| text.clone())))
        })
        .collect();
    texts.filter(|_| has_secret).map(|texts| format!("[{}]", texts.join(", ")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::document::DocumentFormat;
    use super::*;

    fn printed(text: &str, options: PrintOptions) -> Vec<String> {
        let env = |name: &str| (name == "SECRET").then(|| "hunter2hunter2hunter2hunter2".to_owned());
        let document =
            ConfigDocument { name: "t.toml", text, format: DocumentFormat::Toml, base: Path::new(""), env: &env };
        print(&document, options).expect("valid").lines().map(str::to_owned).collect()
    }

    const TEXT: &str = "version = 1\n[admin]\ntoken = \"${SECRET}\"\n[redis.regions.default]\n\
        endpoints = [\"redis://user:pa%73s@127.0.0.1:6379\"]\n[upstreams.shop]\nendpoints = [\"http://127.0.0.1:1\"]\n\
        [[routes]]\nname = \"all\"\nmatch = { path = \"/*\" }\nupstream = \"shop\"\n\
        headers.request.set = { authorization = \"Bearer abc\", x-plain = \"shown\" }\n\
        headers.request.add = { x-other = \"${SECRET}\" }\n";

    #[test]
    fn values_of_the_document_have_their_line_and_no_secret() {
        let lines = printed(TEXT, PrintOptions { defaults: false, origin: true });
        for expected in [
            "version = 1  # t.toml:1",
            "admin.token = \"${SECRET}\"  # t.toml:3",
            "redis.regions.default.endpoints = [\"redis://user:***@127.0.0.1:6379\"]  # t.toml:5",
            "match.path = \"/*\"  # t.toml:10",
            "headers.request.set.authorization = \"***\"  # t.toml:12",
            "headers.request.set.x-plain = \"shown\"  # t.toml:12",
            "headers.request.add.x-other = \"${SECRET}\"  # t.toml:13",
        ] {
            assert!(lines.iter().any(|line| line == expected), "{expected}: {lines:#?}");
        }
        assert!(
            !lines.iter().any(|line| line.contains("hunter2") || line.contains("abc") || line.contains("default  #")),
            "{lines:#?}"
        );
    }

    #[test]
    fn defaults_are_those_of_the_reference() {
        let lines = printed(TEXT, PrintOptions { defaults: true, origin: true });
        for expected in
            ["upstreams.shop.timeout = \"10s\"  # default", "limits_http.header_bytes = \"16KiB\"  # default"]
        {
            assert!(lines.iter().any(|line| line == expected), "{expected}: {lines:#?}");
        }
    }
}
