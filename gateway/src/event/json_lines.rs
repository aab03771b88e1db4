//! The process log as JSON: one object per line, with the same `time` as a line of the access log.

use std::fmt;
use std::time::SystemTime;

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::timestamp::TimestampFormatter;

/// Writes the time in the form of the access log.
pub(super) struct LogTime;

impl FormatTime for LogTime {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let mut text = Vec::with_capacity(24);
        TimestampFormatter::new().push(&mut text, SystemTime::now());
        writer.write_str(&String::from_utf8_lossy(&text))
    }
}

/// Writes `time`, `level`, the fields of the event in their order, and `target`.
pub(super) struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        writer.write_str("{\"time\":\"")?;
        LogTime.format_time(&mut writer)?;
        write!(writer, "\",\"level\":\"{}\"", event.metadata().level())?;
        let mut members = JsonMembers { writer: &mut writer, result: Ok(()) };
        event.record(&mut members);
        members.push("target", event.metadata().target());
        members.result?;
        writer.write_str("}\n")
    }
}

/// Appends members to an object that has some.
struct JsonMembers<'w, 'l> {
    writer: &'w mut Writer<'l>,
    result: fmt::Result,
}

impl JsonMembers<'_, '_> {
    fn push(&mut self, name: &str, value: impl Serialize) {
        let value = serde_json::to_string(&value).unwrap_or_else(|_| "null".to_owned());
        let name = name.trim_start_matches("r#");
        self.result = self.result.and_then(|()| write!(self.writer, ",\"{name}\":{value}"));
    }
}

impl Visit for JsonMembers<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field.name(), value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field.name(), value);
    }
}
