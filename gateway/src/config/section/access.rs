//! `[access]`: whom no limit holds, and whom nothing is answered.

use super::super::fault::Problem;
use super::super::kind::Parsed;
use super::super::table::Table;
use super::forms;
use crate::identify::{AccessSettings, Entry};

const ENTRY: Parsed<Entry> =
    Parsed { name: "a network such as \"10.0.0.0/8\", \"device:ID\" or \"user:ID\"", parse: entry, show };

pub(super) fn read(root: &Table<'_>) -> AccessSettings {
    root.table("access", |table| AccessSettings {
        exempt: forms::list(table, "exempt", ENTRY, Vec::new()),
        denied: forms::list(table, "denied", ENTRY, Vec::new()),
    })
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
