//! The process log as JSON: one object per line, with the same `time` as a line of the access log.

use std::fmt;
use std::time::SystemTime;

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

/// Writes `time`, `level`, the fields of the event, and `target`. Needs the fields as JSON.
pub(super) struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = String::new();
        context.format_fields(Writer::new(&mut fields), event)?;
        out.write_str("{\"time\":\"")?;
        LogTime.format_time(&mut out)?;
        write!(out, "\",\"level\":\"{}\"", event.metadata().level())?;
        // The members of an object, without its braces.
        let members = fields.trim_start_matches('{').strip_suffix('}').unwrap_or_default();
        if !members.is_empty() {
            write!(out, ",{members}")?;
        }
        // A path of modules needs no escapes.
        writeln!(out, ",\"target\":\"{}\"}}", event.metadata().target())
    }
}
