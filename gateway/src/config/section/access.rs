//! `[access]`: whom no limit holds, and whom nothing is answered.

use super::super::fault::Problem;
use super::super::kind::{ListOf, Parsed};
use super::super::table::Table;
use super::forms;
use crate::identify::{self, AccessSettings, Entry};

const ENTRY: Parsed<Entry> =
    Parsed { name: "a network such as \"10.0.0.0/8\", \"device:ID\" or \"user:ID\"", parse: entry, show };

pub(super) fn read(root: &Table<'_>, identify: &identify::Settings) -> AccessSettings {
    root.table("access", |table| AccessSettings {
        exempt: list(table, "exempt", identify),
        denied: list(table, "denied", identify),
    })
}

/// An entry that nobody could ever be is a fault: who is meant to be denied would not be.
fn list(table: &Table<'_>, key: &'static str, identify: &identify::Settings) -> Vec<Entry> {
    let entries = table.or(key, &ListOf { item: ENTRY, least: 0 }, Vec::new());
    for entry in &entries {
        let missing = match &entry.value {
            Entry::Device(_) if identify.device.is_empty() => "device",
            Entry::User(_) if identify.user.is_none() => "user",
            _ => continue,
        };
        let problem = Problem::bad(format!("`{}` is nobody: there is no `identity.{missing}`", show(&entry.value)));
        table.reading.error(&entry.at, problem.hint(format!("set `identity.{missing}`")));
    }
    entries.into_iter().map(|entry| entry.value).collect()
}

fn entry(text: &str) -> Result<Entry, Problem> {
    let id = |id: &str| match id {
        "" => Err(Problem::bad(format!("`{text}` names nobody")).hint(format!("write {}", ENTRY.name))),
        id => Ok(id.to_owned()),
    };
    match text.split_once(':') {
        Some(("device", device)) => id(device).map(Entry::Device),
        Some(("user", user)) => id(user).map(Entry::User),
        _ => (forms::NETWORK.parse)(text).map(Entry::Network),
    }
}

fn show(entry: &Entry) -> String {
    match entry {
        Entry::Network(network) => network.to_string(),
        Entry::Device(id) => format!("device:{id}"),
        Entry::User(id) => format!("user:{id}"),
    }
}
