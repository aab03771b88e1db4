//! The directory of stored figures: latest.json, and latest.md and latest.svg generated from it.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use serde_json::Value;

use crate::bench::record::{BenchRecord, WorkloadRecord};
use crate::bench::{chart, markdown};
use crate::error::{LoadtestError, Result};

/// Values of latest.json below this depth are not broken into lines, which gives one line per peer
/// of a workload.
const DEPTH_MAX: usize = 4;

/// The directory and the record in it.
pub(crate) struct ReportDirectory {
    directory: PathBuf,
    record: BenchRecord,
}

impl ReportDirectory {
    /// Reads the stored figures. A file that cannot be extended is an error now, not after an hour
    /// of measuring.
    pub(crate) fn open(directory: PathBuf) -> Result<Self> {
        let path = directory.join("latest.json");
        let record = match fs::read_to_string(&path) {
            Ok(text) => BenchRecord::parse(&text)
                .map_err(|source| LoadtestError::Record { path: path.display().to_string(), source })?,
            Err(error) if error.kind() == ErrorKind::NotFound => BenchRecord::default(),
            Err(source) => return Err(LoadtestError::io(format!("cannot read {}", path.display()))(source)),
        };
        fs::create_dir_all(&directory).map_err(LoadtestError::io(format!("cannot create {}", directory.display())))?;
        Ok(ReportDirectory { directory, record })
    }

    /// Replaces the figures of one workload.
    pub(crate) fn put(&mut self, entry: WorkloadRecord) -> Result<()> {
        self.record.put(entry);
        let value = serde_json::to_value(&self.record).expect("a record has only strings for keys");
        let mut json = String::new();
        format_json(&value, 0, &mut json);
        json.push('\n');
        self.write("latest.json", &json)?;
        self.write("latest.md", &markdown::page(&self.record))?;
        self.write("latest.svg", &chart::svg(&self.record))
    }

    /// Writes atomically, because a bench may be interrupted.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let (path, new) = (self.directory.join(name), self.directory.join(format!(".{name}.new")));
        let written = fs::write(&new, text).and_then(|()| fs::rename(&new, &path));
        written.map_err(LoadtestError::io(format!("cannot write {}", path.display())))
    }
}

/// Formats JSON with line breaks up to a depth, so that a changed peer is one changed line in a
/// diff.
fn format_json(value: &Value, depth: usize, text: &mut String) {
    let indent = |text: &mut String, depth: usize| {
        text.push('\n');
        text.push_str(&"  ".repeat(depth));
    };
    match value {
        Value::Array(items) if depth < DEPTH_MAX && !items.is_empty() => {
            text.push('[');
            for (position, item) in items.iter().enumerate() {
                text.push_str(if position == 0 { "" } else { "," });
                indent(text, depth + 1);
                format_json(item, depth + 1, text);
            }
            indent(text, depth);
            text.push(']');
        }
        Value::Object(fields) if depth < DEPTH_MAX && !fields.is_empty() => {
            text.push('{');
            for (position, (name, field)) in fields.iter().enumerate() {
                text.push_str(if position == 0 { "" } else { "," });
                indent(text, depth + 1);
                text.push_str(&format!("{}: ", Value::from(name.as_str())));
                format_json(field, depth + 1, text);
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
    use crate::bench::record::tests::entry;
    use crate::bench::workload::Workload;
    use crate::process::child::ScratchDirectory;

    #[test]
    fn file_that_is_not_a_record_is_rejected_and_kept() {
        let scratch = ScratchDirectory::named("report-rejected").expect("a directory");
        scratch.write("latest.json", "{}").expect("room");
        assert!(ReportDirectory::open(scratch.path().to_owned()).is_err());
        assert_eq!(fs::read_to_string(scratch.path().join("latest.json")).expect("the file exists"), "{}");
    }

    #[test]
    fn later_run_extends_earlier_figures() {
        let scratch = ScratchDirectory::named("report-extended").expect("a directory");
        let directory = scratch.path().join("performance");
        for (workload, commit) in [(Workload::Hit1k, "a"), (Workload::Pass1k, "b")] {
            let mut report = ReportDirectory::open(directory.clone()).expect("a record or none");
            report.put(entry(workload, commit)).expect("room");
        }
        let names: Vec<String> = ["json", "md", "svg"].map(|end| format!("latest.{end}")).to_vec();
        for name in &names {
            let text = fs::read_to_string(directory.join(name)).expect("the file exists");
            assert!(text.contains("hit-1k") && text.contains("pass-1k"), "{name}: {text}");
        }
        assert_eq!(fs::read_dir(&directory).expect("the file exists").count(), names.len());
    }

    #[test]
    fn json_has_one_line_per_peer() {
        let mut record = BenchRecord::default();
        record.put(entry(Workload::Hit1k, "a"));
        let mut text = String::new();
        format_json(&serde_json::to_value(&record).expect("JSON"), 0, &mut text);
        assert_eq!(text.lines().filter(|line| line.contains("\"p50_us\"")).count(), 2, "{text}");
        assert_eq!(BenchRecord::parse(&text).expect("the same record"), record);
        let mut empty = String::new();
        format_json(&serde_json::json!({"a\"": [], "b": {}}), 0, &mut empty);
        assert_eq!(empty, "{\n  \"a\\\"\": [],\n  \"b\": {}\n}");
    }
}
