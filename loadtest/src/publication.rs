//! The directory of kept figures: latest.json, and latest.md and latest.svg made from it.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::record::{Entry, Record};
use crate::{chart, markdown};

/// Below this depth of latest.json, a value stays on its line: one line for each peer of a workload.
const DEPTH_MAX: usize = 4;

pub(crate) struct Publication {
    directory: PathBuf,
    record: Record,
}

impl Publication {
    /// Reads what is there. A file that cannot be added to is refused now, and not after an hour of measuring.
    pub(crate) fn open(directory: PathBuf) -> Result<Self> {
        let path = directory.join("latest.json");
        let record = match fs::read_to_string(&path) {
            Ok(text) => {
                Record::parse(&text).map_err(|source| Failure::Record { path: path.display().to_string(), source })?
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Record::default(),
            Err(source) => return Err(Failure::io(format!("cannot read {}", path.display()))(source)),
        };
        fs::create_dir_all(&directory).map_err(Failure::io(format!("cannot create {}", directory.display())))?;
        Ok(Publication { directory, record })
    }

    /// Replaces the figures of one workload.
    pub(crate) fn put(&mut self, entry: Entry) -> Result<()> {
        self.record.put(entry);
        let value = serde_json::to_value(&self.record).expect("a record has only strings for keys");
        let mut json = String::new();
        lay_out(&value, 0, &mut json);
        json.push('\n');
        self.write("latest.json", &json)?;
        self.write("latest.md", &markdown::page(&self.record))?;
        self.write("latest.svg", &chart::svg(&self.record))
    }

    /// All or nothing: a bench may be interrupted.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let (path, new) = (self.directory.join(name), self.directory.join(format!(".{name}.new")));
        let written = fs::write(&new, text).and_then(|()| fs::rename(&new, &path));
        written.map_err(Failure::io(format!("cannot write {}", path.display())))
    }
}

/// JSON with an indentation that ends at some depth, so that a change shows as one changed line.
fn lay_out(value: &Value, depth: usize, text: &mut String) {
    let indent = |text: &mut String, depth: usize| {
        text.push('\n');
        text.push_str(&"  ".repeat(depth));
    };
    match value {
        Value::Array(items) if depth < DEPTH_MAX && !items.is_empty() => {
            text.push('[');
            for (place, item) in items.iter().enumerate() {
                text.push_str(if place == 0 { "" } else { "," });
                indent(text, depth + 1);
                lay_out(item, depth + 1, text);
            }
            indent(text, depth);
            text.push(']');
        }
        Value::Object(fields) if depth < DEPTH_MAX && !fields.is_empty() => {
            text.push('{');
            for (place, (name, field)) in fields.iter().enumerate() {
                text.push_str(if place == 0 { "" } else { "," });
                indent(text, depth + 1);
                text.push_str(&format!("{}: ", Value::from(name.as_str())));
                lay_out(field, depth + 1, text);
            }
            indent(text, depth);
            text.push('}');
        }
        _ => text.push_str(&value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Scratch;
    use crate::record::tests::entry;
    use crate::workload::Workload;

    #[test]
    fn a_file_that_is_no_record_is_refused_and_kept() {
        let scratch = Scratch::named("publication-refused").expect("a directory");
        scratch.write("latest.json", "{}").expect("room");
        assert!(Publication::open(scratch.path().to_owned()).is_err());
        assert_eq!(fs::read_to_string(scratch.path().join("latest.json")).expect("it is there"), "{}");
    }

    #[test]
    fn a_later_run_adds_to_an_earlier_one() {
        let scratch = Scratch::named("publication-added").expect("a directory");
        let directory = scratch.path().join("performance");
        for (workload, commit) in [(Workload::Hit1k, "a"), (Workload::Pass1k, "b")] {
            let mut publication = Publication::open(directory.clone()).expect("a record or none");
            publication.put(entry(workload, commit)).expect("room");
        }
        let names: Vec<String> = ["json", "md", "svg"].map(|end| format!("latest.{end}")).to_vec();
        for name in &names {
            let text = fs::read_to_string(directory.join(name)).expect("it is there");
            assert!(text.contains("hit-1k") && text.contains("pass-1k"), "{name}: {text}");
        }
        assert_eq!(fs::read_dir(&directory).expect("it is there").count(), names.len());
    }

    #[test]
    fn json_has_one_line_for_each_peer() {
        let mut record = Record::default();
        record.put(entry(Workload::Hit1k, "a"));
        let mut text = String::new();
        lay_out(&serde_json::to_value(&record).expect("JSON"), 0, &mut text);
        assert_eq!(text.lines().filter(|line| line.contains("\"p50_us\"")).count(), 2, "{text}");
        assert_eq!(Record::parse(&text).expect("the same record"), record);
        let mut empty = String::new();
        lay_out(&serde_json::json!({"a\"": [], "b": {}}), 0, &mut empty);
        assert_eq!(empty, "{\n  \"a\\\"\": [],\n  \"b\": {}\n}");
    }
}
