//! The effective configuration as a TOML document: the value of each key, and its origin.
//!
//! Invariants: no secret is printed, and `tidegate check -` accepts what is printed. It has the
//! same effective configuration, except for secrets that the document holds as text: passwords and
//! tokens, and fields and parameters whose names or values indicate credentials.

mod layout;
mod secrets;

use layout::Tree;

use super::check;
use super::document::{self, ConfigDocument, DocumentFormat};
use super::expand::{self, ExpansionEnvironment};
use super::fault::ConfigReport;
use super::node::{DocumentNode, DocumentValue};
use super::read_context::{EffectiveValue, ReadContext, ReadPurpose};
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
/// then `[[listen]]` and `[[routes]]` with theirs. Defaults that may not be written where they are,
/// because the key has no effect there, are left out.
///
/// # Errors
/// The faults of the document, if it has an error.
pub(super) fn print(document: &ConfigDocument<'_>, options: PrintOptions) -> Result<String, ConfigReport> {
    let reading = Reading::of(document)?;
    let (set, defaults): (Vec<usize>, Vec<usize>) =
        (0..reading.values.len()).partition(|index| reading.values[*index].offset.is_some());
    if !options.defaults {
        return Ok(reading.to_toml(&set, document, options));
    }
    let with = |defaults: &[usize]| {
        let mut shown = [&set[..], defaults].concat();
        shown.sort_unstable();
        reading.to_toml(&shown, document, options)
    };
    let faults_with = |defaults: &[usize]| {
        let text = with(defaults);
        let printed = ConfigDocument { text: &text, format: DocumentFormat::Toml, ..*document };
        Reading::of(&printed).ok().map(|again| again.faults)
    };
    let expected = faults_with(&[]);
    let is_sound = |defaults: &[usize]| faults_with(defaults) == expected;
    let left_out = misplaced(&defaults, &is_sound);
    let mut kept: Vec<usize> = defaults.into_iter().filter(|index| !left_out.contains(index)).collect();
    // Some have no effect only without another one, such as `tracing.otlp`, which is there now.
    for index in left_out {
        kept.push(index);
        if !is_sound(&kept) {
            kept.pop();
        }
    }
    Ok(with(&kept))
}

/// The items without which `is_sound` holds of the others. It is asked a few times for each.
fn misplaced(items: &[usize], is_sound: &dyn Fn(&[usize]) -> bool) -> Vec<usize> {
    if items.is_empty() || is_sound(items) {
        return Vec::new();
    }
    if items.len() == 1 {
        return items.to_vec();
    }
    let (first, second) = items.split_at(items.len() / 2);
    [misplaced(first, is_sound), misplaced(second, is_sound)].concat()
}

/// A document, the values that its keys have, and its warnings.
struct Reading {
    root: DocumentNode,
    values: Vec<EffectiveValue>,
    faults: Vec<String>,
}

impl Reading {
    fn of(document: &ConfigDocument<'_>) -> Result<Reading, ConfigReport> {
        let report = |faults| ConfigReport::new(document.name, document.text, faults);
        let root = document::parse(document.text, document.format).map_err(report)?;
        let mut context = ReadContext::new(document.text, ExpansionEnvironment::new(document.base, document.env));
        context.purpose = ReadPurpose::Print;
        let draft = table_reader::read_document(&context, &root, section::read);
        check::resolve(draft, &context);
        let values = context.values();
        let report = report(context.into_faults());
        if report.has_errors() {
            return Err(report);
        }
        let mut faults: Vec<String> = report.faults().iter().map(|fault| fault.message.clone()).collect();
        faults.sort_unstable();
        Ok(Reading { root, values, faults })
    }

    /// The values with these indexes.
    fn to_toml(&self, shown: &[usize], document: &ConfigDocument<'_>, options: PrintOptions) -> String {
        let mut tree = Tree::default();
        for value in shown.iter().map(|index| &self.values[*index]) {
            let comment = options.origin.then(|| origin(value, document));
            tree.insert(&layout::segments(&value.path), (text_of(value, &self.root), comment));
        }
        // The presence of a table can be a setting, also where each of its keys has its default.
        add_tables(&self.root, &mut Vec::new(), &mut tree);
        tree.to_toml()
    }
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
fn text_of(value: &EffectiveValue, root: &DocumentNode) -> String {
    let segments = layout::segments(&value.path);
    let written = value.offset.and_then(|_| layout::node_at(root, &segments)).map(|node| &node.value);
    let secrecy = secrets::Secrecy::of(&segments);
    let concealed = match written {
        Some(DocumentValue::String(text)) => {
            let effective = effective_texts(&value.text);
            secrecy.conceal(text, effective.first().unwrap_or(&value.text)).map(|text| quoted(&text))
        }
        Some(DocumentValue::Array(items)) => concealed_items(items, secrecy, &value.text),
        _ => None,
    };
    concealed.unwrap_or_else(|| expand::escape(&secrets::without_passwords(value.text.clone())))
}

/// The texts of a value, one or an array of them. None if it is another one.
fn effective_texts(value: &str) -> Vec<String> {
    let Ok(root) = document::parse(&format!("value = {value}"), DocumentFormat::Toml) else { return Vec::new() };
    let text = |node: &DocumentNode| match &node.value {
        DocumentValue::String(text) => Some(text.clone()),
        _ => None,
    };
    match layout::node_at(&root, &layout::segments("value")).map(|node| &node.value) {
        Some(DocumentValue::Array(items)) => items.iter().map(text).collect::<Option<_>>().unwrap_or_default(),
        Some(DocumentValue::String(text)) => vec![text.clone()],
        _ => Vec::new(),
    }
}

/// An array of texts, where at least one has a secret or the reference to one. `effective`: the
/// array without placeholders.
fn concealed_items(items: &[DocumentNode], secrecy: secrets::Secrecy, effective: &str) -> Option<String> {
    let mut has_secret = false;
    let each = effective_texts(effective);
    let texts: Option<Vec<String>> = items
        .iter()
        .enumerate()
        .map(|(index, item)| {
            let DocumentValue::String(text) = &item.value else { return None };
            let effective = if each.len() == items.len() { &each[index] } else { effective };
            let concealed = secrecy.conceal(text, effective);
            has_secret |= concealed.is_some();
            Some(quoted(&concealed.unwrap_or_else(|| text.clone())))
        })
        .collect();
    texts.filter(|_| has_secret).map(|texts| format!("[{}]", texts.join(", ")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn printed(text: &str, options: PrintOptions) -> Vec<String> {
        let env = |name: &str| match name {
            "SECRET" => Some("hunter2hunter2hunter2hunter2".to_owned()),
            "REDIS_URL" => Some("redis://user:hunter2@127.0.0.1:6379".to_owned()),
            "FORWARD" => Some("http://127.0.0.1:4000/v?key=hunter2".to_owned()),
            "ADDRESS" => Some("127.0.0.1:8081".to_owned()),
            _ => None,
        };
        let document =
            ConfigDocument { name: "t.toml", text, format: DocumentFormat::Toml, base: Path::new(""), env: &env };
        print(&document, options).expect("valid").lines().map(str::to_owned).collect()
    }

    #[test]
    fn misplaced_items_are_found() {
        let items: Vec<usize> = (0..100).collect();
        for wrong in [vec![], vec![0], vec![99], vec![3, 4, 50]] {
            assert_eq!(misplaced(&items, &|some| !some.iter().any(|item| wrong.contains(item))), wrong);
        }
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
    fn secrets_of_the_surroundings_are_printed_as_they_are_written() {
        const TEXT: &str = "version = 1\n[[listen]]\naddress = \"${ADDRESS}\"\n\
            [redis.regions.default]\nendpoints = [\"redis://127.0.0.1:1\", \"${REDIS_URL}\"]\n\
            [redis.regions.other]\ncluster = [\"${REDIS_URL:-redis://u:pass@127.0.0.1:1}\"]\n\
            [upstreams.shop]\nendpoints = [\"http://127.0.0.1:1\"]\nhealth = { path = \"/h/${SECRET}\" }\n\
            [upstreams.b]\nendpoints = [\"http://127.0.0.1:2\"]\n\
            [[routes]]\nname = \"fixed\"\nmatch = { path = \"/fixed\" }\nrespond = { body = \"${REDIS_URL}\" }\n\
            [[routes]]\nname = \"all\"\nmatch = { path = \"/*\" }\nupstream = \"shop\"\n\
            auth = { forward = \"${FORWARD}\" }\n\
            canary = { upstream = \"b\", header = { x-canary-token = \"sekrit\" } }\n\
            headers.response.set = { x-backend = \"${SECRET}\" }\n";
        let lines = printed(TEXT, PrintOptions::default());
        for expected in [
            "address = \"127.0.0.1:8081\"",
            "redis.regions.default.endpoints = [\"redis://127.0.0.1:1\", \"${REDIS_URL}\"]",
            "redis.regions.other.cluster = [\"${REDIS_URL:-redis://u:***@127.0.0.1:1}\"]",
            "upstreams.shop.health.path = \"/h/${SECRET}\"",
            "respond.body = \"${REDIS_URL}\"",
            "auth.forward = \"${FORWARD}\"",
            "canary.header.x-canary-token = \"REDACTED\"",
            "headers.response.set.x-backend = \"${SECRET}\"",
        ] {
            assert!(lines.iter().any(|line| line == expected), "{expected}: {lines:#?}");
        }
        assert!(
            !lines.iter().any(|line| ["hunter2", "pass@", "sekrit"].iter().any(|secret| line.contains(secret))),
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
