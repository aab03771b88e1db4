//! Invariants of the parsers of a connection's first bytes, for arbitrary bytes: the PROXY protocol
//! header and the ClientHello. Used by the fuzz targets and by `tests/replay.rs`.
#![allow(dead_code, reason = "each fuzz target uses one function")]

use gateway::testing::fingerprint_text;
use gateway::testing::proxy_header::{HeaderStart, parse};

/// Longest header that is accepted.
const HEADER_BYTES_MAX: usize = 4_096;
const RECORD_HANDSHAKE: u8 = 22;

/// A header is found by its own bytes alone, however many of them have arrived.
pub(crate) fn proxy_header(data: &[u8]) {
    let whole = parse(data);
    let ends = (0..data.len()).filter(|end| *end < 300 || data.len() - end < 20);
    let starts = ends.map(|end| parse(&data[..end]));
    match &whole {
        HeaderStart::Complete(length, _) => {
            assert!((8..=HEADER_BYTES_MAX.min(data.len())).contains(length));
            assert_eq!(parse(&data[..*length]), whole);
            assert_eq!(parse(&data[..length - 1]), HeaderStart::Incomplete);
            for (end, start) in (0..data.len()).filter(|end| *end < 300 || data.len() - end < 20).zip(starts) {
                let expected = if end < *length { &HeaderStart::Incomplete } else { &whole };
                assert_eq!(start, *expected, "the first {end} bytes");
            }
        }
        HeaderStart::Incomplete => {
            assert!(data.len() < HEADER_BYTES_MAX);
            starts.for_each(|start| assert_eq!(start, HeaderStart::Incomplete));
        }
        HeaderStart::Absent => {
            starts.for_each(|start| assert!(matches!(start, HeaderStart::Absent | HeaderStart::Incomplete)));
        }
        HeaderStart::Refused => {
            starts.for_each(|start| assert!(matches!(start, HeaderStart::Refused | HeaderStart::Incomplete)));
        }
    }
    let more = parse(&[data, b"GET / HTTP/1.1"].concat());
    if whole != HeaderStart::Incomplete && !data.is_empty() {
        assert_eq!(more, whole, "bytes after the header do not count");
    }
}

/// The first byte selects the size of records; the rest is a handshake message, or records as they
/// are for zero.
pub(crate) fn client_hello(data: &[u8]) {
    let Some((size, rest)) = data.split_first() else { return };
    if *size == 0 {
        check_prefixes(rest);
        return;
    }
    let message = &rest[..rest.len().min(8_192)];
    let split = records(message, usize::from(*size));
    let whole = records(message, 16_384);
    assert_eq!(fingerprint_text(&split), fingerprint_text(&whole), "records do not count");
    check_prefixes(&split);
}

/// Once a message is complete, more bytes change nothing.
fn check_prefixes(records: &[u8]) {
    let result = fingerprint_text(records);
    if let Some((ja4, stable)) = &result {
        for text in [ja4, stable] {
            assert!(text.len() == 36 && text.is_ascii(), "{text}");
            assert!(text.as_bytes()[10] == b'_' && text.as_bytes()[23] == b'_', "{text}");
        }
        assert_eq!(fingerprint_text(&[records, &[RECORD_HANDSHAKE, 3, 1, 0, 1, 7]].concat()), result);
    }
    let mut before = None;
    for end in (0..records.len()).filter(|end| *end < 400 || records.len() - end < 20) {
        let now = fingerprint_text(&records[..end]);
        assert!(before.is_none() || now == before, "the first {end} bytes");
        before = now;
    }
    assert!(before.is_none() || before == result);
}

fn records(message: &[u8], size: usize) -> Vec<u8> {
    let record = |part: &[u8]| {
        let length = u16::try_from(part.len()).expect("a record of at most 16 KiB").to_be_bytes();
        [&[RECORD_HANDSHAKE, 3, 1][..], &length, part].concat()
    };
    message.chunks(size).flat_map(record).collect()
}
