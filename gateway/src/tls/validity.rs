//! The end of a certificate's validity (RFC 5280 section 4.1.2.5).

use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use super::der::{Der, INTEGER, SEQUENCE};

/// Tags of the two forms of a time.
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// The last second at which a certificate in DER is valid; `None` if that cannot be read. One that
/// ended before 1970 has ended in 1970.
pub(crate) fn not_after(certificate: &[u8]) -> Option<SystemTime> {
    let mut fields = Der(Der(certificate).content(SEQUENCE)?);
    let mut fields = Der(fields.content(SEQUENCE)?);
    // The version is optional; it is followed by serial number, algorithm and issuer.
    if fields.0.first() == Some(&0xa0) {
        fields.element()?;
    }
    fields.content(INTEGER)?;
    fields.content(SEQUENCE)?;
    fields.content(SEQUENCE)?;
    let mut validity = Der(fields.content(SEQUENCE)?);
    validity.element()?;
    let (tag, time) = validity.element()?;
    parse_time(tag, time)
}

/// The last second of each certificate in a PEM text.
pub(crate) fn not_after_each(pem: &[u8]) -> Vec<SystemTime> {
    CertificateDer::pem_slice_iter(pem).filter_map(Result::ok).filter_map(|der| not_after(&der)).collect()
}

/// `YYMMDDHHMMSSZ`, where years from 50 on are of the last century, or `YYYYMMDDHHMMSSZ`.
fn parse_time(tag: u8, time: &[u8]) -> Option<SystemTime> {
    let digits = time.strip_suffix(b"Z")?;
    let (year, rest) = match (tag, digits.len()) {
        (UTC_TIME, 12) => {
            let year = number(&digits[..2])?;
            (if year < 50 { 2_000 + year } else { 1_900 + year }, &digits[2..])
        }
        (GENERALIZED_TIME, 14) => (number(&digits[..4])?, &digits[4..]),
        _ => return None,
    };
    let mut parts = rest.chunks(2).map(number);
    let mut next = |range: std::ops::RangeInclusive<u64>| parts.next().flatten().filter(|part| range.contains(part));
    let (month, day) = (next(1..=12)?, next(1..=31)?);
    let (hour, minute, second) = (next(0..=23)?, next(0..=59)?, next(0..=60)?);
    let days = days_before(year, month, day);
    let seconds = days.checked_mul(86_400).map_or(0, |seconds| seconds + hour * 3_600 + minute * 60 + second);
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(if year < 1_970 { 0 } else { seconds }))
}

fn number(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0, |number, digit| digit.is_ascii_digit().then(|| number * 10 + u64::from(digit - b'0')))
}

/// Days since 1970, by Howard Hinnant's algorithm days_from_civil; 0 before 1970.
fn days_before(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year.saturating_sub(1) } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let march_month = (month + 9) % 12;
    let day_of_year = (153 * march_month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    (era * 146_097 + day_of_era).saturating_sub(719_468)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_forms_of_a_time_are_read() {
        let seconds = |tag, text: &str| {
            let time = parse_time(tag, text.as_bytes())?;
            Some(time.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs())
        };
        assert_eq!(seconds(UTC_TIME, "700101000000Z"), Some(0));
        assert_eq!(seconds(UTC_TIME, "000229235959Z"), Some(951_868_799));
        assert_eq!(seconds(UTC_TIME, "491231235959Z"), Some(2_524_607_999));
        assert_eq!(seconds(UTC_TIME, "500101000000Z"), Some(0));
        assert_eq!(seconds(GENERALIZED_TIME, "20500101000000Z"), Some(2_524_608_000));
        assert_eq!(seconds(GENERALIZED_TIME, "99991231235959Z"), Some(253_402_300_799));
        for text in ["", "Z", "7001010000Z", "700101000000", "701301000000Z", "7001010000x0Z", "700101240000Z"] {
            assert_eq!(seconds(UTC_TIME, text), None, "{text}");
        }
    }

    #[test]
    fn end_of_a_certificate_is_read() {
        let mut params = rcgen::CertificateParams::new(vec!["a.test".to_owned()]).expect("a name");
        params.not_after = rcgen::date_time_ymd(2031, 2, 3);
        let certificate = params.self_signed(&rcgen::KeyPair::generate().expect("a key")).expect("a certificate");
        let expected = SystemTime::UNIX_EPOCH + Duration::from_secs(1_927_843_200);
        assert_eq!(not_after(certificate.der()), Some(expected));
        assert_eq!(not_after(b""), None);
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_result(bytes in prop::collection::vec(any::<u8>(), 0..300), tag in 0x17_u8..=0x18) {
            let _any = not_after(&bytes);
            let _any = parse_time(tag, &bytes);
        }
    }
}
