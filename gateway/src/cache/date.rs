//! Parses dates in the three formats of RFC 9110 section 5.6.7, in any letter case.

use std::time::SystemTime;

/// Longest value that can be a date.
const BYTES_MAX: usize = 40;

/// Returns `None` for an invalid date and for a date before 1970. The caller treats both as being
/// in the distant past.
pub(super) fn parse(value: &[u8]) -> Option<SystemTime> {
    let text = std::str::from_utf8(value).ok()?;
    if let Ok(date) = httpdate::parse_http_date(text) {
        return Some(date);
    }
    // Normalise to the letter case of the grammar: day and month capitalised, the zone in capitals.
    // Some senders use another case.
    let mut buffer = [0; BYTES_MAX];
    let normalized = buffer.get_mut(..value.len())?;
    normalized.copy_from_slice(value);
    let mut in_word = 0;
    for byte in normalized.iter_mut() {
        in_word = if byte.is_ascii_alphabetic() { in_word + 1 } else { 0 };
        *byte = if in_word > 1 { byte.to_ascii_lowercase() } else { byte.to_ascii_uppercase() };
    }
    if let Some(zone) = normalized.len().checked_sub(3).and_then(|at| normalized.get_mut(at..))
        && zone.eq_ignore_ascii_case(b"gmt")
    {
        zone.make_ascii_uppercase();
    }
    httpdate::parse_http_date(std::str::from_utf8(normalized).ok()?).ok().or_else(|| asctime(normalized))
}

/// `Thu Aug  8 02:01:18 2050`. The day may have one digit. The name of the day is not checked.
fn asctime(value: &[u8]) -> Option<SystemTime> {
    let mut parts = std::str::from_utf8(value).ok()?.split(' ').filter(|part| !part.is_empty());
    let [_, month, day, time, year] = [parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()?];
    if parts.next().is_some() || day.len() > 2 {
        return None;
    }
    let date = |name: &str| httpdate::parse_http_date(&format!("{name}, {day:0>2} {month} {year} {time} GMT")).ok();
    ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"].into_iter().find_map(date)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_formats_are_parsed_in_any_letter_case() {
        let expected = parse(b"Thu, 18 Aug 2050 02:01:18 GMT");
        assert!(expected.is_some());
        for form in [
            "THU, 18 Aug 2050 02:01:18 GMT",
            "Thu, 18 AUG 2050 02:01:18 GMT",
            "thu, 18 aug 2050 02:01:18 gMT",
            "Thursday, 18-Aug-50 02:01:18 GMT",
            "Thu Aug 18 02:01:18 2050",
        ] {
            assert_eq!(parse(form.as_bytes()), expected, "{form}");
        }
        assert_eq!(parse(b"Sun Aug  4 02:01:18 2050"), parse(b"Thu, 04 Aug 2050 02:01:18 GMT"));
    }

    #[test]
    fn invalid_dates_are_rejected() {
        let long = "1".repeat(1_000);
        for form in [
            "",
            "0",
            "-1",
            "Thu, 18 Aug 2050 02:01:18 PST",
            "Thu, 18 Aug 2050 02:01 GMT",
            "2050-08-18",
            "\u{fc}",
            &long,
        ] {
            assert_eq!(parse(form.as_bytes()), None, "{form}");
        }
    }
}
