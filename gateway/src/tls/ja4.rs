//! The JA4 fingerprint of a ClientHello, as FoxIO specifies it.
//!
//! Ciphers and extensions are sorted, so that clients that send them in a random order keep their
//! fingerprint.

use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;

use super::client_hello::{ALPN, Numbers, ParsedHello, SERVER_NAME};
use crate::peer::{Ja4, TlsFingerprint};

/// Extensions that one client sends only in some of its connections: `padding`, which depends on
/// the length of the message (RFC 7685), those of resumption (`session_ticket` of RFC 5077,
/// `pre_shared_key` and `early_data` of RFC 8446 section 4.2), and the application protocol.
const VARYING: [u16; 5] = [0x0015, 0x0023, 0x0029, 0x002a, ALPN];
/// The hash of an empty list.
const NO_HASH: [u8; 12] = *b"000000000000";

/// The fingerprint of a TLS stack; `None` if `records` do not begin with a ClientHello.
pub(super) fn fingerprint(records: &[u8]) -> Option<TlsFingerprint> {
    let mut hello = super::client_hello::parse(records)?;
    let ja4 = ja4(&hello);
    hello.extensions.retain(|kind| !VARYING.contains(kind));
    hello.alpn = None;
    Some(TlsFingerprint { ja4, stable: self::ja4(&hello) })
}

fn ja4(hello: &ParsedHello) -> Ja4 {
    let mut text = [b'_'; Ja4::LENGTH];
    text[0] = b't';
    text[1..3].copy_from_slice(version(hello));
    text[3] = if hello.extensions.contains(&SERVER_NAME) { b'd' } else { b'i' };
    text[4..6].copy_from_slice(&two_digits(hello.ciphers.len()));
    text[6..8].copy_from_slice(&two_digits(hello.extensions.len()));
    text[8..10].copy_from_slice(&protocol(hello.alpn));
    text[11..23].copy_from_slice(&hash(&sorted(&hello.ciphers, &[]), &[]));
    let extensions = sorted(&hello.extensions, &[SERVER_NAME, ALPN]);
    text[24..].copy_from_slice(&hash(&extensions, &hello.signature_algorithms));
    Ja4(text)
}

/// The highest version that the client offers.
fn version(hello: &ParsedHello) -> &'static [u8; 2] {
    match hello.versions.iter().max().copied().unwrap_or(hello.legacy_version) {
        0x0304 => b"13",
        0x0303 => b"12",
        0x0302 => b"11",
        0x0301 => b"10",
        0x0300 => b"s3",
        0x0002 => b"s2",
        _ => b"00",
    }
}

fn two_digits(count: usize) -> [u8; 2] {
    let count = u8::try_from(count.min(99)).expect("below 100");
    [b'0' + count / 10, b'0' + count % 10]
}

/// First and last character of the first protocol, or of its bytes in hexadecimal if one of them is
/// neither letter nor digit.
fn protocol(alpn: Option<(u8, u8)>) -> [u8; 2] {
    match alpn {
        None => *b"00",
        Some((first, last)) if first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric() => [first, last],
        Some((first, last)) => [hex(first >> 4), hex(last & 15)],
    }
}

fn hex(digit: u8) -> u8 {
    b"0123456789abcdef"[usize::from(digit)]
}

fn sorted(numbers: &Numbers, without: &[u16]) -> Numbers {
    let mut sorted: Numbers = numbers.iter().copied().filter(|number| !without.contains(number)).collect();
    sorted.sort_unstable();
    sorted
}

/// The first twelve digits of the SHA-256 of both lists in hexadecimal.
fn hash(first: &[u16], second: &[u16]) -> [u8; 12] {
    if first.is_empty() && second.is_empty() {
        return NO_HASH;
    }
    let mut text = Vec::with_capacity(5 * (first.len() + second.len()));
    for (at, number) in first.iter().enumerate() {
        push_number(&mut text, (at > 0).then_some(b','), *number);
    }
    for (at, number) in second.iter().enumerate() {
        push_number(&mut text, Some(if at > 0 { b',' } else { b'_' }), *number);
    }
    let suite = TLS13_AES_128_GCM_SHA256.tls13().expect("a suite of TLS 1.3");
    let digest = suite.common.hash_provider.hash(&text);
    std::array::from_fn(|at| {
        let byte = digest.as_ref()[at / 2];
        hex(if at % 2 == 0 { byte >> 4 } else { byte & 15 })
    })
}

fn push_number(text: &mut Vec<u8>, separator: Option<u8>, number: u16) {
    text.extend(separator);
    text.extend([12, 8, 4, 0].map(|shift| hex((number >> shift & 15) as u8)));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tls::client_hello::tests::{encode, records};

    const CHROME_CIPHERS: &str = "002f,0035,009c,009d,1301,1302,1303,c013,c014,c02b,c02c,c02f,c030,cca8,cca9";
    const CHROME_SIGNATURES: &str = "0403,0804,0401,0503,0805,0501,0806,0601";
    const FIREFOX_CIPHERS: &str =
        "002f,0035,009c,009d,1301,1302,1303,c009,c00a,c013,c014,c02b,c02c,c02f,c030,cca8,cca9";

    fn numbers(text: &str) -> Numbers {
        let parse = |part: &str| u16::from_str_radix(part, 16).expect("a number");
        text.split(',').filter(|part| !part.is_empty()).map(parse).collect()
    }

    /// The lists of a published JA4_r, with server name and ALPN.
    fn hello(ciphers: &str, extensions: &str, signatures: &str) -> ParsedHello {
        ParsedHello {
            legacy_version: 0x0303,
            ciphers: numbers(ciphers),
            extensions: numbers(&format!("0010,{extensions},0000")),
            versions: numbers("0303,0304"),
            signature_algorithms: numbers(signatures),
            alpn: None,
        }
    }

    fn of(hello: &ParsedHello, alpn: &[u8]) -> TlsFingerprint {
        fingerprint(&records(&encode(hello, alpn), 16_384)).expect("a ClientHello")
    }

    #[test]
    fn published_examples() {
        for (ciphers, extensions, signatures, expected) in [
            (
                CHROME_CIPHERS,
                "0005,000a,000b,000d,0012,0015,0017,001b,0023,002b,002d,0033,4469,ff01",
                CHROME_SIGNATURES,
                "t13d1516h2_8daaf6152771_e5627efa2ab1",
            ),
            (
                CHROME_CIPHERS,
                "0005,000a,000b,000d,0012,0017,001b,0023,002b,002d,0033,4469,fe0d,ff01",
                CHROME_SIGNATURES,
                "t13d1516h2_8daaf6152771_02713d6af862",
            ),
            (
                FIREFOX_CIPHERS,
                "0005,000a,000b,000d,0015,0017,001c,0022,0023,002b,002d,0033,ff01",
                "0403,0503,0603,0804,0805,0806,0401,0501,0601,0203,0201",
                "t13d1715h2_5b57614c22b0_3d5424432f57",
            ),
        ] {
            let mut hello = hello(ciphers, extensions, signatures);
            assert_eq!(of(&hello, b"h2").ja4.as_str(), expected);
            // In another order, with GREASE.
            hello.ciphers.reverse();
            hello.ciphers.insert(0, 0x3a3a);
            hello.extensions.rotate_left(5);
            hello.extensions.insert(0, 0x0a0a);
            hello.extensions.push(0xfafa);
            hello.versions.insert(0, 0x7a7a);
            assert_eq!(of(&hello, b"h2").ja4.as_str(), expected);
        }
    }

    #[test]
    fn parts_of_the_first_section() {
        let with = |change: fn(&mut ParsedHello), alpn: &[u8]| {
            let mut hello = hello("1301", "000d,002b", "0403");
            change(&mut hello);
            of(&hello, alpn).ja4.as_str()[..10].to_owned()
        };
        assert_eq!(with(|_| {}, b"h2"), "t13d0104h2");
        assert_eq!(with(|hello| hello.extensions.retain(|kind| *kind != SERVER_NAME), b"h2"), "t13i0103h2");
        assert_eq!(with(|hello| hello.versions = numbers("0303"), b"h2"), "t12d0104h2");
        let without_versions = |hello: &mut ParsedHello| {
            hello.extensions.retain(|kind| *kind != 43);
            hello.legacy_version = 0x0301;
        };
        assert_eq!(with(without_versions, b"h2"), "t10d0103h2");
        assert_eq!(with(|hello| hello.ciphers = (0..150).collect(), b"h2"), "t13d9904h2");
        assert_eq!(with(|hello| hello.extensions.retain(|kind| *kind != ALPN), b"h2"), "t13d010300");
        for (alpn, expected) in [
            (&b"http/1.1"[..], "h1"),
            (b"h", "hh"),
            (b"", "00"),
            (b"\xab", "ab"),
            (b"\xab\xcd", "ad"),
            (b"0\xab", "3b"),
            (b"\xabz", "aa"),
            (b"h2c-", "6d"),
        ] {
            assert_eq!(&with(|_| {}, alpn)[8..], expected, "{alpn:?}");
        }
    }

    #[test]
    fn empty_lists_have_no_hash() {
        let hello = ParsedHello { legacy_version: 0x0303, ..ParsedHello::default() };
        assert_eq!(of(&hello, b"").ja4.as_str(), "t12i000000_000000000000_000000000000");
        let mut hello = self::hello("", "000d", "0403");
        hello.extensions.retain(|kind| *kind == 13);
        assert!(of(&hello, b"").ja4.as_str().starts_with("t12i000100_000000000000_"));
    }

    #[test]
    fn stable_part_survives_resumption_padding_and_another_protocol() {
        let first = hello(CHROME_CIPHERS, "0023,000d,002b,0033", CHROME_SIGNATURES);
        let resumed = hello(CHROME_CIPHERS, "000d,0015,002a,002b,0033,0029", CHROME_SIGNATURES);
        let (first_seen, resumed) = (of(&first, b"h2"), of(&resumed, b"http/1.1"));
        assert_ne!(first_seen.ja4, resumed.ja4);
        assert_eq!(first_seen.stable, resumed.stable);
        let other = hello(FIREFOX_CIPHERS, "000d,002b,0033", CHROME_SIGNATURES);
        assert_ne!(first_seen.stable, of(&other, b"h2").stable);
    }

    proptest! {
        #[test]
        fn any_hello_has_a_fingerprint_of_ascii(
            ciphers in prop::collection::vec(any::<u16>(), 0..120),
            extensions in prop::collection::vec(any::<u16>(), 0..120),
            alpn in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let hello = ParsedHello { ciphers: ciphers.into(), extensions: extensions.into(), ..ParsedHello::default() };
            if let Some(fingerprint) = fingerprint(&records(&encode(&hello, &alpn), 500)) {
                prop_assert!(fingerprint.ja4.as_str().bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'));
            }
        }
    }
}
