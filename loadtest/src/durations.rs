//! Durations of the command line, such as `250ms`, `5s` or `2m`.

use std::time::Duration;

/// For clap. An integer with `ms`, `s`, `m` or `h`, as in the gateway's configuration.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let digits = text.find(|it: char| !it.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let hint = || format!("`{text}` is not a duration: write 250ms, 5s, 2m or 1h");
    let number: u64 = number.parse().map_err(|_| hint())?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(hint()),
    };
    number.checked_mul(millis).map(Duration::from_millis).ok_or_else(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_is_needed() {
        for bad in ["", "5", "s", "-1s", "1.5s", "5 s", "5sec", "99999999999999999999s", "18446744073709551615h"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for (text, millis) in [("250ms", 250), ("0s", 0), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)));
        }
    }
}
