//! The latest lines of the process log in memory, for the dashboard.
//!
//! Invariant: at most `LINES` lines of at most `LINE_BYTES` bytes each are kept. Every line has a
//! sequence number, so that a reader gets each line once.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use tracing::field::Field;
use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Lines that are kept: more than a person reads, in about 100 KB.
pub(crate) const LINES: usize = 200;
/// Bytes of the values of one line. A longer text is cut, and further fields are left out.
const LINE_BYTES: usize = 2_048;

static TAIL: LazyLock<Mutex<LogTail>> = LazyLock::new(Mutex::default);

/// The latest lines and the number of the next one.
#[derive(Default)]
struct LogTail {
    lines: VecDeque<(u64, Value)>,
    next: u64,
}

impl LogTail {
    fn push(&mut self, line: Value) {
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back((self.next, line));
        self.next += 1;
    }

    fn since(&self, from: u64) -> (Vec<Value>, u64) {
        let lines = self.lines.iter().filter(|(number, _)| *number >= from).map(|(_, line)| line.clone());
        (lines.collect(), self.next)
    }
}

/// The lines from number `from` on, the oldest first, and the number of the next line.
pub(crate) fn since(from: u64) -> (Vec<Value>, u64) {
    TAIL.lock().unwrap_or_else(PoisonError::into_inner).since(from)
}

/// Keeps the lines of INFO and above.
pub(super) struct TailLayer;

impl<S: Subscriber> Layer<S> for TailLayer {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        if level > Level::INFO {
            return;
        }
        let mut line = LineFields::default();
        event.record(&mut |field: &Field, value: &dyn fmt::Debug| line.add(field, value));
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = json!({
            "time": time.as_secs_f64(),
            "level": level.as_str().to_ascii_lowercase(),
            "message": line.message,
            "fields": line.fields,
        });
        TAIL.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }
}

/// The fields of one line.
#[derive(Default)]
struct LineFields {
    message: Value,
    fields: Map<String, Value>,
    bytes: usize,
}

impl LineFields {
    /// Adds a value by its text: numbers and flags are JSON already, and so are most strings, which
    /// have quotes here.
    fn add(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.bytes >= LINE_BYTES {
            return;
        }
        let text = format!("{value:?}");
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        let value = match value {
            Value::String(text) => {
                let end = text.floor_char_boundary(LINE_BYTES - self.bytes);
                self.bytes += end;
                Value::String(text[..end].to_owned())
            }
            value => value,
        };
        if field.name() == "message" {
            self.message = value;
        } else {
            self.bytes += field.name().len() + size_of::<f64>();
            self.fields.insert(field.name().to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn tail_is_bounded_and_numbered() {
        let mut tail = LogTail::default();
        for number in 0..LINES + 5 {
            tail.push(json!(number));
        }
        let (lines, next) = tail.since(0);
        assert_eq!((lines.len(), lines[0].as_u64(), next), (LINES, Some(5), LINES as u64 + 5));
        assert_eq!(tail.since(next - 1), (vec![json!(LINES + 4)], next));
        assert_eq!(tail.since(next), (vec![], next));
    }

    #[test]
    fn lines_have_their_fields_and_no_more_than_their_bytes() {
        let before = since(0).1;
        let long = "é".repeat(LINE_BYTES);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(TailLayer), || {
            tracing::warn!(event = "a", count = 3_u64, ratio = 0.5, is = true, "first");
            tracing::debug!("not kept");
            tracing::error!(text = %long, more = "not kept", "second");
        });
        let (lines, _) = since(before);
        let first = lines.iter().find(|line| line["message"] == "first").expect("a line");
        assert_eq!(first["level"], "warn");
        assert_eq!(first["fields"], json!({ "event": "a", "count": 3, "ratio": 0.5, "is": true }));
        let second = lines.iter().find(|line| line["level"] == "error").expect("a line");
        assert!(second["fields"]["text"].as_str().is_some_and(|text| text.len() <= LINE_BYTES));
        assert!(second["fields"].get("more").is_none(), "{second}");
    }
}
