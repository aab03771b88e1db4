//! Syntax of durations and sizes: an integer and its unit.

use std::time::Duration;

use super::fault::ConfigProblem;

const DURATIONS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
const SIZES: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Parses a duration such as `250ms`, `30s`, `5m` or `1h`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, ConfigProblem> {
    parse_quantity(text, &DURATIONS).map(Duration::from_millis).map_err(|reason| {
        let problem = ConfigProblem::bad_value(format!("`{text}` is not a duration: {reason}"));
        match suggestion(text, &["s", "m", "h"]) {
            Some(written) => problem.hint(format!("did you mean \"{written}\"?")),
            None => problem.hint("durations are integers with unit ms, s, m or h, such as \"250ms\" or \"30s\""),
        }
    })
}

/// Parses a size such as `16KiB`, `256MiB` or `512B`.
pub(super) fn parse_size(text: &str) -> Result<u64, ConfigProblem> {
    parse_quantity(text, &SIZES).map_err(|reason| {
        let problem = ConfigProblem::bad_value(format!("`{text}` is not a size: {reason}"));
        match suggestion(text, &["B", "KiB", "MiB", "GiB"]) {
            Some(written) => problem.hint(format!("units are powers of 1024: write \"{written}\"")),
            None => problem.hint("sizes are integers with unit B, KiB, MiB or GiB, such as \"16KiB\""),
        }
    })
}

/// A duration in this syntax.
pub(super) fn format_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis == 0 { "0s".to_owned() } else { format_quantity(millis, &DURATIONS) }
}

/// A size in this syntax.
pub(super) fn format_size(bytes: u64) -> String {
    if bytes == 0 { "0B".to_owned() } else { format_quantity(bytes, &SIZES) }
}

fn parse_quantity(text: &str, units: &[(&str, u64)]) -> Result<u64, String> {
    let (digits, unit) = split_unit(text);
    if digits.is_empty() {
        return Err("it does not start with a digit".to_owned());
    }
    if unit.is_empty() {
        return Err("the unit is missing".to_owned());
    }
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit) else {
        return Err(format!("`{unit}` is not a unit"));
    };
    let number = digits.parse::<u64>().ok();
    number.and_then(|number| number.checked_mul(*factor)).ok_or_else(|| "it is too large".to_owned())
}

fn split_unit(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// `text` with the unit that was probably intended: the first of `units` if `text` has none, or one
/// with the same first letter.
fn suggestion(text: &str, units: &[&str]) -> Option<String> {
    let (digits, unit) = split_unit(text);
    let unit = unit.trim();
    if units.contains(&unit) && !text.contains(' ') {
        return None; // the unit is valid, the number is not
    }
    let initial = |text: &str| text.chars().next().map(|c| c.to_ascii_lowercase());
    let intended = units.iter().find(|name| unit.is_empty() || initial(name) == initial(unit))?;
    (!digits.is_empty()).then(|| format!("{digits}{intended}"))
}

/// `value` in the largest of `units` that divides it.
fn format_quantity(value: u64, units: &[(&str, u64)]) -> String {
    let unit = units.iter().find(|(_, factor)| value.is_multiple_of(*factor));
    let (name, factor) = unit.expect("the last unit is 1");
    format!("{}{name}", value / factor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn malformed_durations_and_sizes_are_explained() {
        for (text, message, hint) in [
            ("", "`` is not a duration: it does not start with a digit", "durations are integers"),
            ("s", "`s` is not a duration: it does not start with a digit", "durations are integers"),
            ("-1s", "`-1s` is not a duration: it does not start with a digit", "durations are integers"),
            ("30", "`30` is not a duration: the unit is missing", "did you mean \"30s\"?"),
            ("1.5s", "`1.5s` is not a duration: `.5s` is not a unit", "durations are integers"),
            ("5 s", "`5 s` is not a duration: ` s` is not a unit", "did you mean \"5s\"?"),
            ("5min", "`5min` is not a duration: `min` is not a unit", "did you mean \"5m\"?"),
            ("7d", "`7d` is not a duration: `d` is not a unit", "durations are integers"),
            ("99999999999999999h", "`99999999999999999h` is not a duration: it is too large", "durations are integers"),
        ] {
            let problem = parse_duration(text).expect_err(text);
            assert_eq!(problem.message, message);
            assert!(problem.hint.as_deref().is_some_and(|found| found.starts_with(hint)), "{problem:?}");
        }
        for (text, reason, hint) in [
            ("16", "the unit is missing", "write \"16B\""),
            ("16KB", "`KB` is not a unit", "write \"16KiB\""),
            ("16k", "`k` is not a unit", "write \"16KiB\""),
            ("16mib", "`mib` is not a unit", "write \"16MiB\""),
            ("16XB", "`XB` is not a unit", "such as \"16KiB\""),
            ("KiB", "it does not start with a digit", "such as \"16KiB\""),
            ("99999999999GiB", "it is too large", "GiB"),
        ] {
            let problem = parse_size(text).expect_err(text);
            assert_eq!(problem.message, format!("`{text}` is not a size: {reason}"));
            assert!(problem.hint.as_deref().is_some_and(|found| found.contains(hint)), "{problem:?}");
        }
    }

    #[test]
    fn durations_and_sizes_are_parsed() {
        for (text, millis) in [("0s", 0), ("250ms", 250), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)));
        }
        for (text, bytes) in
            [("0B", 0), ("512B", 512), ("16KiB", 16_384), ("256MiB", 268_435_456), ("2GiB", 2_147_483_648)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
    }

    proptest! {
        #[test]
        fn formatted_values_parse_back(number in 0u64..1 << 40) {
            let duration = Duration::from_millis(number);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
            prop_assert_eq!(parse_size(&format_size(number)), Ok(number));
        }

        #[test]
        fn any_text_is_parsed_or_rejected_with_a_hint(text in "\\PC{0,12}") {
            prop_assert_eq!(parse_duration(&text).is_err_and(|problem| problem.hint.is_none()), false);
            prop_assert_eq!(parse_size(&text).is_err_and(|problem| problem.hint.is_none()), false);
        }
    }
}
