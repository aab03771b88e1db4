//! Invariants of an HTTP/2 connection, for arbitrary frames. Used by the fuzz target and by
//! `tests/replay.rs`.

use std::collections::{HashMap, HashSet};

use gateway::testing::h2_fuzzing::run_connection;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const WINDOW_DEFAULT: u64 = 65_535;

/// The first byte selects the size of the pieces, and whether the rest are bytes as they are (after
/// the preface) or instructions for `frames_of`.
pub(crate) fn frames(data: &[u8]) {
    count_requests(data);
}

/// As `frames`. Returns how many requests were accepted.
pub(crate) fn count_requests(data: &[u8]) -> usize {
    let Some((first, rest)) = data.split_first() else { return 0 };
    let mut input = [PREFACE, &frame(4, 0, 0, &[])].concat();
    if first & 0x80 == 0 {
        input.extend(frames_of(rest))
    } else {
        input.extend_from_slice(rest)
    }
    let piece = [1, 9, 100, 5_000, usize::MAX][usize::from(first % 5)];
    // A byte at a time is slow.
    let piece = if input.len() > 3_000 { piece.max(100) } else { piece };
    let Ok(seen) = run_connection(&input, piece) else { return 0 };
    assert_eq!(seen.accounted, 0, "bytes stay accounted for");
    for (method, target, authority) in &seen.requests {
        assert!(!method.is_empty() && !authority.is_empty(), "{method} {target} {authority}");
        assert!(target.starts_with('/') || target == "*", "{target}");
    }
    check_output(&seen.output, granted(&input));
    seen.requests.len()
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Frames of which many are valid: each instruction is a kind, a stream, flags and a length.
fn frames_of(data: &[u8]) -> Vec<u8> {
    let (mut out, mut opened) = (Vec::new(), 0);
    let mut rest = data;
    while let [kind, choice, flags, length, after @ ..] = rest {
        let count = usize::from(*length).min(after.len());
        let (bytes, after) = after.split_at(count);
        rest = after;
        let stream = 1 + 2 * (u32::from(*choice) % u32::max(opened, 1));
        let number = bytes.iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte));
        match kind % 16 {
            // Seldom valid: these end a connection soon.
            11..=13 if choice & 0xe0 != 0xe0 => {}
            5.. if opened == 0 => {}
            // A request, with what the bytes add.
            0..=4 => {
                let method = [b"\x82", b"\x83"][usize::from(flags >> 7)];
                let added = if flags & 0x40 != 0 { bytes } else { &[] };
                let block = [method, &b"\x87\x84\x01\x06a.test"[..], added].concat();
                out.extend(frame(HEADERS, flags & 1 | 4, 1 + 2 * opened, &block));
                opened += 1;
            }
            5 => out.extend(frame(DATA, flags & 1, stream, bytes)),
            6 => out.extend(frame(DATA, flags & 1, stream, &vec![b'd'; usize::from(*length) * 60])),
            7 => out.extend(frame(RST_STREAM, 0, stream, &number.to_be_bytes())),
            8 => {
                let setting = [
                    0,
                    [1, 3, 4, 6][usize::from(flags % 4)],
                    0,
                    bytes.first().copied().unwrap_or(0) & 0x7f,
                    *length,
                    0,
                ];
                out.extend(frame(4, 0, 0, &setting));
            }
            9 => out.extend(frame(8, 0, stream * u32::from(flags & 1), &(number >> 12 | 1).to_be_bytes())),
            10 => out.extend(frame(0x10, 0, 0, &[&stream.to_be_bytes(), bytes].concat())),
            11 => out.extend(frame(CONTINUATION, flags & 4, stream, bytes)),
            12 => out.extend(frame(HEADERS, *flags, stream, bytes)),
            13 => out.extend(frame(*flags, *length, u32::from(*choice & 1) * stream, bytes)),
            // Trailers.
            14 => out.extend(frame(HEADERS, 5, stream, b"\0\x01a\x01b")),
            _ => out.extend(frame(6, flags & 1, 0, &[0; 8])),
        }
    }
    out
}

/// Bytes of DATA that the client has allowed on the connection, at most.
fn granted(input: &[u8]) -> u64 {
    let mut granted = WINDOW_DEFAULT;
    for (kind, _, stream, payload) in parse(&input[PREFACE.len()..]) {
        if let (8, 0, Some(increment)) = (kind, stream, payload.first_chunk()) {
            granted += u64::from(u32::from_be_bytes(*increment) & 0x7fff_ffff);
        }
    }
    granted
}

/// The complete frames at the front of `bytes`.
fn parse(bytes: &[u8]) -> impl Iterator<Item = (u8, u8, u32, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let [a, b, c, kind, flags, stream @ ..] = *rest.first_chunk::<9>()?;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        let payload = rest[9..].get(..length)?;
        rest = &rest[9 + length..];
        Some((kind, flags, u32::from_be_bytes(stream) & 0x7fff_ffff, payload))
    })
}

fn check_output(output: &[u8], granted: u64) {
    let (mut begun, mut ended, mut reset) = (HashSet::new(), HashSet::new(), HashSet::new());
    let (mut sent, mut section, mut announced) = (0, None, HashMap::new());
    for (kind, flags, stream, payload) in parse(output) {
        assert!(payload.len() <= 16 << 10, "a frame of {} bytes", payload.len());
        assert!(matches!(kind, 0..=9), "a frame of kind {kind}");
        assert!(section.is_none_or(|open| kind == CONTINUATION && stream == open), "a frame inside a section");
        if matches!(kind, DATA | HEADERS) {
            assert!(stream % 2 == 1 && !reset.contains(&stream), "a frame of stream {stream} after its reset");
            assert!(!ended.contains(&stream), "a frame of stream {stream} after its end");
        }
        match kind {
            DATA => {
                assert!(begun.contains(&stream), "DATA of stream {stream} before its head");
                sent += payload.len() as u64;
                *announced.entry(stream).or_insert(0) += payload.len();
            }
            HEADERS => drop(begun.insert(stream)),
            RST_STREAM => assert!(reset.insert(stream), "a second reset of stream {stream}"),
            _ => {}
        }
        if matches!(kind, HEADERS | CONTINUATION) {
            section = (flags & 4 == 0).then_some(stream);
        }
        if matches!(kind, DATA | HEADERS) && flags & 1 != 0 {
            ended.insert(stream);
        }
    }
    assert!(sent <= granted, "{sent} bytes of DATA, {granted} allowed");
}
