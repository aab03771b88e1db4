//! Timestamps of log lines, by RFC 3339 and in the form of the combined log format.

use std::time::SystemTime;

/// Formats timestamps by RFC 3339 and caches the text of the current second.
pub(crate) struct TimestampFormatter {
    second: u64,
    /// `YYYY-MM-DDTHH:MM:SS.`
    text: [u8; 20],
}

impl TimestampFormatter {
    pub(crate) const fn new() -> Self {
        TimestampFormatter { second: u64::MAX, text: [0; 20] }
    }

    pub(crate) fn push(&mut self, out: &mut Vec<u8>, now: SystemTime) {
        // A wall clock before 1970 is wrong; its lines have 1970.
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if since_epoch.as_secs() != self.second {
            self.second = since_epoch.as_secs();
            self.text = date_and_time(since_epoch.as_secs());
        }
        out.extend_from_slice(&self.text);
        push_digits(out, u64::from(since_epoch.subsec_millis()), 3);
        out.push(b'Z');
    }

    /// Appends `29/Nov/2026:17:05:09 +0000`.
    pub(crate) fn push_combined(&mut self, out: &mut Vec<u8>, now: SystemTime) {
        const MONTHS: [&[u8; 3]; 12] =
            [b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"];
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let text = date_and_time(since_epoch.as_secs());
        let month = usize::from(text[5] - b'0') * 10 + usize::from(text[6] - b'0') - 1;
        for part in [&text[8..10], b"/", &MONTHS[month % 12][..], b"/", &text[..4], b":", &text[11..19], b" +0000"] {
            out.extend_from_slice(part);
        }
    }
}

/// Howard Hinnant's algorithm civil_from_days: eras of 400 years; years begin in March.
fn date_and_time(unix_seconds: u64) -> [u8; 20] {
    let (days, second) = (unix_seconds / 86_400 + 719_468, unix_seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let mut text = *b"0000-00-00T00:00:00.";
    let parts = [
        (0..4, year),
        (5..7, month),
        (8..10, day),
        (11..13, second / 3_600),
        (14..16, second / 60 % 60),
        (17..19, second % 60),
    ];
    for (range, mut number) in parts {
        for digit in text[range].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
    }
    text
}

/// `number` with leading zeros.
pub(crate) fn push_digits(out: &mut Vec<u8>, number: u64, width: u32) {
    for exponent in (0..width).rev() {
        // One decimal digit always fits.
        out.push(b'0' + (number / 10_u64.pow(exponent) % 10) as u8);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_equal_those_of_httpdate() {
        // Every 11 hours and 9 minutes over 130 years: all months, leap days and the turn of 2100.
        for second in (0..4_102_444_800 + 86_400 * 90).step_by(40_123) {
            let text = String::from_utf8(date_and_time(second).to_vec()).expect("ASCII");
            let other = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(second));
            let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
            let month = months.iter().position(|month| *month == &other[8..11]).expect("a month") + 1;
            let expected = format!("{}-{month:02}-{}T{}.", &other[12..16], &other[5..7], &other[17..25]);
            assert_eq!(text, expected, "{second}");
            let mut combined = Vec::new();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(second);
            TimestampFormatter::new().push_combined(&mut combined, time);
            let expected = format!("{}/{}/{}:{} +0000", &other[5..7], &other[8..11], &other[12..16], &other[17..25]);
            assert_eq!(String::from_utf8(combined).as_deref(), Ok(&*expected), "{second}");
        }
    }
}
