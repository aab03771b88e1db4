//! The trace context of B3 (openzipkin/b3-propagation), in one field or in several.

use super::trace_parent::{SAMPLED, TraceParent, ids};
use crate::http::fields::Fields;

/// The parent in `b3`, or else in `X-B3-TraceId`, `X-B3-SpanId` and `X-B3-Sampled`.
pub(super) fn parse(fields: &Fields) -> Option<TraceParent> {
    if let Some(single) = text(fields, b"b3") {
        let mut parts = single.split('-');
        let (id, parent) = ids(parts.next()?, parts.next()?)?;
        return Some(TraceParent { id, parent, flags: parts.next().and_then(flags) });
    }
    let (id, parent) = ids(text(fields, b"x-b3-traceid")?, text(fields, b"x-b3-spanid")?)?;
    Some(TraceParent { id, parent, flags: multiple_flags(fields) })
}

/// The decision of a sender that names no trace: `b3: 0`, or `X-B3-Sampled` without ids.
pub(super) fn flags_without_trace(fields: &Fields) -> Option<u8> {
    text(fields, b"b3").map_or_else(|| multiple_flags(fields), flags)
}

/// Whether the sender has decided for sampling, with ids or without.
pub(super) fn asks_for_sampling(fields: &Fields) -> bool {
    let single = text(fields, b"b3").map(|single| single.split('-').nth(2).unwrap_or(single));
    single.and_then(flags) == Some(SAMPLED) || multiple_flags(fields) == Some(SAMPLED)
}

/// Whether a field belongs to B3.
pub(super) fn is_field(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"b3") || name.get(..5).is_some_and(|start| start.eq_ignore_ascii_case(b"x-b3-"))
}

fn multiple_flags(fields: &Fields) -> Option<u8> {
    let is_debug = text(fields, b"x-b3-flags") == Some("1");
    if is_debug { Some(SAMPLED) } else { text(fields, b"x-b3-sampled").and_then(flags) }
}

fn text<'f>(fields: &'f Fields, name: &'static [u8]) -> Option<&'f str> {
    fields.named(name).next().and_then(|value| std::str::from_utf8(value).ok())
}

/// `None`: the sender has not decided.
fn flags(sampled: &str) -> Option<u8> {
    match sampled {
        "1" | "true" | "d" => Some(SAMPLED),
        "0" | "false" => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    #[test]
    fn both_forms_are_read() {
        let (long, short, span) = ("80f198ee56343ba864fe8b2a57d3eff7", "64fe8b2a57d3eff7", "e457b5a2e4d86bd1");
        let read = |lines: &[(&str, &str)]| {
            let parent = parse(&fields(lines))?;
            Some((format!("{:x}", parent.id), parent.parent, parent.flags))
        };
        let expected = |id: &str, flags| Some((id.to_owned(), 0xe457_b5a2_e4d8_6bd1, flags));
        for (end, flags) in
            [("-1", Some(1)), ("-d", Some(1)), ("-0", Some(0)), ("", None), ("-1-05e3ac9a4f6e3b90", Some(1))]
        {
            assert_eq!(read(&[("b3", &format!("{long}-{span}{end}"))]), expected(long, flags), "{end}");
        }
        assert_eq!(read(&[("b3", &format!("{short}-{span}"))]), expected(short, None));
        let multiple = [("X-B3-TraceId", long), ("X-B3-SpanId", span)];
        assert_eq!(read(&multiple), expected(long, None));
        for (name, value, flags) in
            [("X-B3-Sampled", "1", 1), ("X-B3-Sampled", "0", 0), ("X-B3-Sampled", "true", 1), ("X-B3-Flags", "1", 1)]
        {
            assert_eq!(read(&[multiple[0], multiple[1], (name, value)]), expected(long, Some(flags)));
        }
        for bad in
            ["0", "1", "d", "", "x-y", &format!("{long}-{}", "0".repeat(16)), &format!("{}-{span}", "0".repeat(32))]
        {
            assert_eq!(read(&[("b3", bad)]), None, "{bad}");
        }
        assert_eq!(read(&multiple[..1]), None);
    }
}
