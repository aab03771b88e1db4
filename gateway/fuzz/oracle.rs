//! Invariants of the HTTP/1 parsers for arbitrary bytes. Used by the fuzz targets and by
//! `tests/replay.rs`, which replays the stored corpus.
#![allow(dead_code, reason = "each fuzz target uses one function")]

use gateway::testing::HttpLimits;
use gateway::testing::fuzzing;
use gateway::testing::{BodyLength, HttpVersion, Request, Response};
use gateway::testing::{Fields, KnownField, is_token};
use http::{Method, StatusCode};

/// The piece size in which the rest of an input is fed.
fn piece_size(byte: u8) -> usize {
    usize::from(byte % 64) + 1
}

fn limits(byte: u8) -> HttpLimits {
    match byte % 3 {
        0 => HttpLimits::default(),
        1 => HttpLimits {
            header_bytes: 256,
            header_fields: 8,
            uri_bytes: 64,
            body_bytes: 1_000,
            ..HttpLimits::default()
        },
        _ => HttpLimits { header_bytes: 64, header_fields: 3, uri_bytes: 8, body_bytes: 0, ..HttpLimits::default() },
    }
}

/// Both are accepted with the same result, or both are refused. The reasons may differ: a split
/// head may be refused before its end has arrived.
fn assert_same_result<T: PartialEq + std::fmt::Debug, E: std::fmt::Debug>(
    whole: &Option<Result<T, E>>,
    split: &Option<Result<T, E>>,
) {
    match (whole, split) {
        (None, None) | (Some(Err(_)), Some(Err(_))) => {}
        (Some(Ok(whole)), Some(Ok(split))) => assert_eq!(whole, split),
        _ => panic!("whole: {whole:?}, split: {split:?}"),
    }
}

fn lines(fields: &Fields) -> Vec<(Vec<u8>, Vec<u8>)> {
    fields.iter().map(|field| (field.name.to_vec(), field.value.to_vec())).collect()
}

fn is_text(byte: &u8) -> bool {
    *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f)
}

/// Fields are valid lines, and httparse finds the same ones.
fn assert_fields(fields: &Fields, parsed: &[httparse::Header<'_>]) {
    for (name, value) in lines(fields) {
        assert!(is_token(&name), "the name {name:?}");
        assert!(value.iter().all(is_text) && value.trim_ascii() == value, "the value {value:?}");
    }
    let others: Vec<(Vec<u8>, Vec<u8>)> =
        parsed.iter().map(|line| (line.name.as_bytes().to_vec(), line.value.trim_ascii().to_vec())).collect();
    assert_eq!(lines(fields), others);
}

/// At most one of the two framing fields is present, and it matches `length`.
fn assert_framing(fields: &Fields, length: BodyLength) {
    let lengths: Vec<&[u8]> = fields.all(KnownField::ContentLength).collect();
    let codings: Vec<&[u8]> = fields.all(KnownField::TransferEncoding).collect();
    match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => assert!(matches!(length, BodyLength::Empty | BodyLength::UntilClose), "{length:?}"),
        ([value], []) => {
            let text = std::str::from_utf8(value).expect("digits");
            assert!(text.bytes().all(|byte| byte.is_ascii_digit()), "{text:?}");
            let announced: u64 = text.parse().expect("a number");
            assert!(announced < 1 << 63);
            assert!(
                length == BodyLength::Known(announced) || length == BodyLength::Empty,
                "{length:?} for {announced}"
            );
        }
        ([], [value]) => {
            assert!(value.eq_ignore_ascii_case(b"chunked"), "{value:?}");
            assert!(matches!(length, BodyLength::Streamed | BodyLength::Empty), "{length:?}");
        }
        _ => panic!("framed twice: {lengths:?} {codings:?}"),
    }
}

pub(crate) fn request_head(data: &[u8]) {
    let [split, choice, bytes @ ..] = data else { return };
    let limits = limits(*choice);
    let (mut request, mut other) = (Request::default(), Request::default());
    let whole = fuzzing::parse_request_head(bytes, usize::MAX, &limits, &mut request);
    assert_same_result(&whole, &fuzzing::parse_request_head(bytes, piece_size(*split), &limits, &mut other));
    let Some(Ok(head)) = whole else { return };
    assert_eq!(lines(&request.fields), lines(&other.fields));
    assert_eq!(
        (&request.method, &request.target, &request.authority),
        (&other.method, &other.target, &other.authority)
    );

    // A connection parses its requests into the same value. The previous content must not change
    // the result.
    let (mut used, mut new) = (request.clone(), Request::default());
    let next = fuzzing::parse_request_head(&bytes[head.length..], usize::MAX, &limits, &mut used);
    assert_same_result(&next, &fuzzing::parse_request_head(&bytes[head.length..], usize::MAX, &limits, &mut new));
    if let Some(Ok(_)) = next {
        assert_eq!((&used.target, &used.authority), (&new.target, &new.authority));
        assert_eq!(lines(&used.fields), lines(&new.fields));
    }

    // Repeated fields are restored, although the pipeline has added one to the previous request.
    let line = bytes[..head.length].strip_prefix(b"\r\n").unwrap_or(&bytes[..head.length]);
    if let Some(section) = line.windows(2).position(|two| two == b"\r\n") {
        for target in [request.target.as_str(), "/", "/a?b", "/<"] {
            let mut again = format!("{} {target} HTTP/1.1\r\n", request.method).into_bytes();
            again.extend_from_slice(&line[section + 2..]);
            again.extend_from_slice(b"GET");
            let (mut used, mut new) = (request.clone(), Request::default());
            used.fields.add(KnownField::Via, "1.1 tidegate");
            let parsed = fuzzing::parse_request_head(&again, usize::MAX, &limits, &mut used);
            assert_eq!(parsed, fuzzing::parse_request_head(&again, usize::MAX, &limits, &mut new), "{target}");
            if let Some(Ok(_)) = parsed {
                assert_eq!((&used.target, used.path_len, &used.authority), (&new.target, new.path_len, &new.authority));
                assert_eq!((used.version, used.length), (new.version, new.length));
                assert_eq!(lines(&used.fields), lines(&new.fields));
            }
        }
    }

    let text = &bytes[..head.length];
    assert!(text.ends_with(b"\r\n\r\n") && head.length <= limits.header_bytes + 2);
    assert!(request.fields.len() <= limits.header_fields);
    let target = request.target.as_bytes();
    assert!(target.first() == Some(&b'/') || request.target == "*" && request.method == Method::OPTIONS);
    assert!(target.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#'), "{:?}", request.target);
    assert!(request.path_len <= target.len() && !request.path().contains('?'));
    assert!(!matches!(request.method, Method::CONNECT | Method::TRACE));
    let hosts = request.fields.all(KnownField::Host).count();
    assert!(hosts == 1 || hosts == 0 && request.version == HttpVersion::Http10);
    assert!(!request.authority.bytes().any(|byte| byte.is_ascii_uppercase() || byte == b'@' || byte <= b' '));
    assert!(!request.authority.is_empty() || hosts == 0);
    assert_framing(&request.fields, request.length);
    assert!(request.length != BodyLength::UntilClose);
    assert!(!matches!(request.length, BodyLength::Known(length) if length > limits.body_bytes));
    if request.length == BodyLength::Empty {
        assert!(!request.fields.has(KnownField::TransferEncoding));
        assert!(request.fields.all(KnownField::ContentLength).all(|value| value.iter().all(|digit| *digit == b'0')));
    }
    assert!(!head.expects_continue || request.fields.has(KnownField::Expect));

    let mut space = [httparse::EMPTY_HEADER; 256];
    let mut parsed = httparse::Request::new(&mut space);
    assert_eq!(parsed.parse(text), Ok(httparse::Status::Complete(text.len())));
    assert_eq!(parsed.method, Some(request.method.as_str()));
    assert_eq!(parsed.version, Some(u8::from(request.version == HttpVersion::Http11)));
    if request.ignores_host {
        // The authority of the target has replaced it.
        assert_eq!(request.fields.get(KnownField::Host), Some(request.authority.as_bytes()));
        request.fields.remove(KnownField::Host);
        let others = parsed.headers.iter().filter(|line| !line.name.eq_ignore_ascii_case("host"));
        assert_fields(&request.fields, &others.copied().collect::<Vec<_>>());
    } else {
        assert_fields(&request.fields, parsed.headers);
    }
}

pub(crate) fn response_head(data: &[u8]) {
    let [split, choice, bytes @ ..] = data else { return };
    let method = [Method::GET, Method::HEAD, Method::POST][usize::from(choice % 3)].clone();
    let (mut response, mut other) = (Response::new(StatusCode::OK), Response::new(StatusCode::OK));
    let whole = fuzzing::parse_response_head(bytes, usize::MAX, &method, &mut response);
    assert_same_result(&whole, &fuzzing::parse_response_head(bytes, piece_size(*split), &method, &mut other));
    let Some(Ok((length, is_reusable))) = whole else { return };
    assert_eq!(lines(&response.fields), lines(&other.fields));
    assert_eq!((response.status, response.length), (other.status, other.length));

    let text = &bytes[..length];
    assert!(text.ends_with(b"\r\n\r\n") && text.starts_with(b"HTTP/1."));
    assert!((100..600).contains(&response.status.as_u16()), "{}", response.status);
    assert_framing(&response.fields, response.length);
    assert!(!(is_reusable && response.length == BodyLength::UntilClose));
    let closes = response.fields.members(KnownField::Connection).any(|member| member.eq_ignore_ascii_case(b"close"));
    assert!(!(is_reusable && closes));
    let is_bodiless = matches!(response.status.as_u16(), 100..=199 | 204 | 304);
    assert!(!is_bodiless || method == Method::HEAD || response.length == BodyLength::Empty);

    let mut space = [httparse::EMPTY_HEADER; 256];
    let mut parsed = httparse::Response::new(&mut space);
    assert_eq!(parsed.parse(text), Ok(httparse::Status::Complete(text.len())));
    assert_eq!(parsed.code, Some(response.status.as_u16()));
    assert_fields(&response.fields, parsed.headers);
}

pub(crate) fn chunk_decoder(data: &[u8]) {
    let [split, bytes @ ..] = data else { return };
    let (mut body, mut other) = (Vec::new(), Vec::new());
    let (mut trailers, mut others) = (Fields::default(), Fields::default());
    let whole = fuzzing::decode_chunked(bytes, usize::MAX, &mut body, &mut trailers);
    assert_same_result(&whole, &fuzzing::decode_chunked(bytes, piece_size(*split), &mut other, &mut others));
    assert_eq!(body, other, "data decoded before the end or an error");
    let Some(Ok(length)) = whole else { return };
    assert!(length <= bytes.len() && length >= body.len() + 5);
    assert_eq!(decode(&bytes[..length]), Some((body.clone(), length)));

    assert_eq!(lines(&trailers), lines(&others));
    for (name, value) in lines(&trailers) {
        assert!(is_token(&name) && value.iter().all(is_text), "the trailer {name:?} {value:?}");
        let names = ["content-length", "transfer-encoding", "host", "connection", "authorization", "trailer", "te"];
        assert!(!names.iter().any(|other| name.eq_ignore_ascii_case(other.as_bytes())), "the trailer {name:?}");
    }

    // Re-encoded, it decodes to the same body.
    let mut encoded = Vec::new();
    for chunk in body.chunks(7) {
        encoded.extend(format!("{:x}\r\n", chunk.len()).as_bytes());
        encoded.extend([chunk, b"\r\n"].concat());
    }
    encoded.extend(b"0\r\n\r\n");
    let mut again = Vec::new();
    assert_eq!(fuzzing::decode_chunked(&encoded, piece_size(*split), &mut again, &mut others), Some(Ok(encoded.len())));
    assert_eq!(again, body);
}

/// A simple decoder: returns the body and its encoded length. Does not validate extensions and
/// trailers.
fn decode(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let line = |at: usize| {
        bytes[at..].windows(2).position(|two| two == b"\r\n").map(|end| (&bytes[at..at + end], at + end + 2))
    };
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let (head, next) = line(at)?;
        let size = head.split(|byte| *byte == b';').next()?;
        let size = usize::from_str_radix(std::str::from_utf8(size).ok()?, 16).ok()?;
        at = next;
        if size == 0 {
            break;
        }
        body.extend_from_slice(bytes.get(at..at + size)?);
        at += size;
        if bytes.get(at..at + 2)? != b"\r\n" {
            return None;
        }
        at += 2;
    }
    loop {
        let (trailer, next) = line(at)?;
        at = next;
        if trailer.is_empty() {
            return Some((body, at));
        }
    }
}
