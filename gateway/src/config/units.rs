//! Durations and sizes as they are written: a whole number and its unit.

use std::time::Duration;

use super::fault::Problem;

const DURATIONS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
const SIZES: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Reads a duration such as `250ms`, `30s`, `5m` or `1h`.
pub(super) fn duration(text: &str) -> Result<Duration, Problem> {
    measure(text, &DURATIONS).map(Duration::from_millis).map_err(|reason| {
        let problem = Problem::bad(format!("`{text}` is not a duration: {reason}"));
        match suggestion(text, &["s", "m", "h"]) {
            Some(written) => problem.hint(format!("write \"{written}\" if that is meant")),
            None => problem.hint("durations are whole numbers of ms, s, m or h, such as \"250ms\" or \"30s\""),
        }
    })
}

/// Reads a size such as `16KiB`, `256MiB` or `512B`.
pub(super) fn size(text: &str) -> Result<u64, Problem> {
    measure(text, &SIZES).map_err(|reason| {
        let problem = Problem::bad(format!("`{text}` is not a size: {reason}"));
        match suggestion(text, &["B", "KiB", "MiB", "GiB"]) {
            Some(written) => problem.hint(format!("sizes count in powers of 1024: write \"{written}\"")),
            None => problem.hint("sizes are whole numbers of B, KiB, MiB or GiB, such as \"16KiB\""),
        }
    })
}

/// A duration as it would be written.
pub(super) fn show_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis == 0 { "0s".to_owned() } else { show(millis, &DURATIONS) }
}

/// A size as it would be written.
pub(super) fn show_size(bytes: u64) -> String {
    if bytes == 0 { "0B".to_owned() } else { show(bytes, &SIZES) }
}

fn measure(text: &str, units: &[(&str, u64)]) -> Result<u64, String> {
    let (digits, unit) = split(text);
    if digits.is_empty() {
        return Err("it does not start with a digit".to_owned());
    }
    if unit.is_empty() {
        return Err("its unit is missing".to_owned());
    }
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit) else {
        return Err(format!("`{unit}` is not a unit"));
    };
    let number = digits.parse::<u64>().ok();
    number.and_then(|number| number.checked_mul(*factor)).ok_or_else(|| "it is too large".to_owned())
}

fn split(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// `text` with the unit that was probably meant: the first of `units` where there is none, or one with the same first letter.
fn suggestion(text: &str, units: &[&str]) -> Option<String> {
    let (digits, unit) = split(text);
    let unit = unit.trim();
    if units.contains(&unit) && !text.contains(' ') {
        return None; // the unit is right, the number is not
    }
    let initial = |text: &str| text.chars().next().map(|c| c.to_ascii_lowercase());
    let meant = units.iter().find(|name| unit.is_empty() || initial(name) == initial(unit))?;
    (!digits.is_empty()).then(|| format!("{digits}{meant}"))
}

/// `value` in the largest of `units` that leaves no rest.
fn show(value: u64, units: &[(&str, u64)]) -> String {
    let whole = units.iter().find(|(_, factor)| value.is_multiple_of(*factor));
    let (name, factor) = whole.expect("the last unit is 1");
    format!("{}{name}", value / factor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_measure_is_explained() {
        for (text, message, hint) in [
            ("", "`` is not a duration: it does not start with a digit", "durations are whole numbers"),
            ("s", "`s` is not a duration: it does not start with a digit", "durations are whole numbers"),
            ("-1s", "`-1s` is not a duration: it does not start with a digit", "durations are whole numbers"),
            ("30", "`30` is not a duration: its unit is missing", "write \"30s\" if that is meant"),
            ("1.5s", "`1.5s` is not a duration: `.5s` is not a unit", "durations are whole numbers"),
            ("5 s", "`5 s` is not a duration: ` s` is not a unit", "write \"5s\" if that is meant"),
            ("5min", "`5min` is not a duration: `min` is not a unit", "write \"5m\" if that is meant"),
            ("7d", "`7d` is not a duration: `d` is not a unit", "durations are whole numbers"),
            (
                "99999999999999999h",
                "`99999999999999999h` is not a duration: it is too large",
                "durations are whole numbers",
            ),
        ] {
            let problem = duration(text).expect_err(text);
            assert_eq!(problem.message, message);
            assert!(problem.hint.as_deref().is_some_and(|found| found.starts_with(hint)), "{problem:?}");
        }
        for (text, reason, hint) in [
            ("16", "its unit is missing", "write \"16B\""),
            ("16KB", "`KB` is not a unit", "write \"16KiB\""),
            ("16k", "`k` is not a unit", "write \"16KiB\""),
            ("16mib", "`mib` is not a unit", "write \"16MiB\""),
            ("16XB", "`XB` is not a unit", "such as \"16KiB\""),
            ("KiB", "it does not start with a digit", "such as \"16KiB\""),
            ("99999999999GiB", "it is too large", "GiB"),
        ] {
            let problem = size(text).expect_err(text);
            assert_eq!(problem.message, format!("`{text}` is not a size: {reason}"));
            assert!(problem.hint.as_deref().is_some_and(|found| found.contains(hint)), "{problem:?}");
        }
    }

    #[test]
    fn measures_are_read() {
        for (text, millis) in [("0s", 0), ("250ms", 250), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)));
        }
        for (text, bytes) in
            [("0B", 0), ("512B", 512), ("16KiB", 16_384), ("256MiB", 268_435_456), ("2GiB", 2_147_483_648)]
        {
            assert_eq!(size(text), Ok(bytes));
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(number in 0u64..1 << 40) {
            let span = Duration::from_millis(number);
            prop_assert_eq!(duration(&show_duration(span)), Ok(span));
            prop_assert_eq!(size(&show_size(number)), Ok(number));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,12}") {
            prop_assert_eq!(duration(&text).is_err_and(|problem| problem.hint.is_none()), false);
            prop_assert_eq!(size(&text).is_err_and(|problem| problem.hint.is_none()), false);
        }
    }
}
