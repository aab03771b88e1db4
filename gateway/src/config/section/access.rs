//! `[access]`: allow list (exempt from limits) and deny list (rejected).

use super::super::fault::ConfigProblem;
use super::super::table_reader::TableReader;
use super::super::value_kind::{ArrayOf, ParsedString, Repeats};
use super::formats;
use crate::identify::{self, AccessConfig, AccessEntry};

const ENTRY: ParsedString<AccessEntry> = ParsedString {
    name: "a network such as \"10.0.0.0/8\", \"device:ID\" or \"user:ID\"",
    pattern: r"(device|user):[\s\S]+|[0-9A-Fa-f:.]+(/[0-9]+)?",
    parse: parse_entry,
    format: format_entry,
};

pub(super) fn read(root: &TableReader<'_>, identify: &identify::IdentityConfig) -> AccessConfig {
    root.table("access", |table| AccessConfig {
        exempt: list(table, "exempt", identify),
        denied: list(table, "denied", identify),
    })
}

/// An entry that can never match is a fault: a caller on the deny list would be let through.
fn list(table: &TableReader<'_>, key: &'static str, identify: &identify::IdentityConfig) -> Vec<AccessEntry> {
    let entries = table.value_or(key, &ArrayOf { item: ENTRY, min_items: 0, repeats: Repeats::Warned }, Vec::new());
    for entry in &entries {
        let missing = match &entry.value {
            AccessEntry::Device(_) if identify.device.is_empty() => "device",
            AccessEntry::User(_) if !identify.has_users() => "user",
            _ => continue,
        };
        let problem = ConfigProblem::bad_value(format!(
            "`{}` never matches: `identity.{missing}` is not set",
            format_entry(&entry.value)
        ));
        let key = format!("identity.{missing}");
        table.context.error(&entry.at, problem.hint(format!("set `{key}`")).lacks(&[&key]));
    }
    entries.into_iter().map(|entry| entry.value).collect()
}

fn parse_entry(text: &str) -> Result<AccessEntry, ConfigProblem> {
    let id = |id: &str| match id {
        "" => Err(ConfigProblem::bad_value(format!("`{text}` has an empty ID")).hint(format!("write {}", ENTRY.name))),
        id => Ok(id.to_owned()),
    };
    match text.split_once(':') {
        Some(("device", device)) => id(device).map(AccessEntry::Device),
        Some(("user", user)) => id(user).map(AccessEntry::User),
        _ => (formats::NETWORK.parse)(text).map(AccessEntry::Network),
    }
}

fn format_entry(entry: &AccessEntry) -> String {
    match entry {
        AccessEntry::Network(network) => network.to_string(),
        AccessEntry::Device(id) => format!("device:{id}"),
        AccessEntry::User(id) => format!("user:{id}"),
    }
}
