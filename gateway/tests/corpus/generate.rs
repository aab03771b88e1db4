//! Generates requests for property tests: mostly well-formed, built from parts that parsers
//! disagree on, then mutated slightly.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// Bytes on which parsers disagree.
const SPECIAL_BYTES: &[u8] = b"\r\n\0 \t:;,\"\\=/?#*@[]<>{}`|^%+-_.0aA\x01\x0b\x0c\x1f\x7f\x80\x85\xa0\xc3\xff";

const LINES: &[&str] = &[
    "X-A: b",
    "x-a:b",
    "X-A: \t b \t",
    "X-Empty:",
    "Accept: */*",
    "Cookie: a=b; c=\"d\"",
    "Connection: close",
    "Connection: keep-alive",
    "Connection: X-A, close",
    "Connection: Host, Content-Length",
    "Keep-Alive: timeout=5",
    "TE: trailers",
    "Trailer: X-T",
    "Upgrade: h2c",
    "Expect: 100-continue",
    "Via: 1.0 x",
    "X-Latin: \u{e4}",
    "Content_Length: 7",
    "Content-Lengths: 7",
    "X-Long: 0123456789012345678901234567890123456789012345678901234567890123456789",
    "Host: b",
    "Content-Length: 0",
    "Content-Length: 5",
    "Content-Length: 05",
    "Content-Length: +5",
    "Content-Length: 5, 5",
    "Content-Length: 99999999999999999999",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: Chunked",
    "Transfer-Encoding: chunked ",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: identity",
    "Transfer-Encoding : chunked",
    " folded: x",
    "no colon",
    ": nothing",
];

fn target() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => "/([a-z0-9/._~-]{1,3}|%[2-7a-fA-F][0-9a-fA-F]){0,5}(\\?[a-z0-9=&%/?`]{0,8})?",
        2 => "/[!-~]{0,10}",
        1 => "http://a(:80)?(/[a-z]{0,4})?(\\?[a-z]{0,3})?",
        1 => "(HTTP|https|ftp)://[aA@]{1,2}/[a-z]{0,3}",
        1 => select(vec!["*".to_owned(), "a:80".into(), "a".into(), "//a".into(), "/#a".into(), "/a b".into(), "/..".into()]),
    ]
    .prop_map(String::into_bytes)
}

fn request_line() -> impl Strategy<Value = Vec<u8>> {
    let method = prop_oneof![
        8 => select(vec!["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE"]).prop_map(str::to_owned),
        1 => select(vec!["CONNECT", "TRACE", "get", "M-SEARCH", "PRI"]).prop_map(str::to_owned),
        1 => "[!#$%&'*+.^_`|~0-9A-Za-z-]{1,5}",
        1 => "[!-~]{1,5}",
    ];
    let version = prop_oneof![
        12 => Just("HTTP/1.1"),
        3 => Just("HTTP/1.0"),
        1 => select(vec!["HTTP/1.2", "HTTP/2.0", "http/1.1", "HTTP/1.10", "HTTP/1", ""]),
    ];
    (method, target(), version)
        .prop_map(|(method, target, version)| [method.as_bytes(), b" ", &target, b" ", version.as_bytes()].concat())
}

/// A chunked body with correct sizes and mostly valid extensions and trailers.
pub(crate) fn chunked_body() -> impl Strategy<Value = Vec<u8>> {
    let extension = prop_oneof![
        8 => Just(String::new()),
        2 => ";[a-z]{1,3}(=[a-z0-9]{1,3})?",
        1 => select(vec![";", ";=", ";a=", ";;a", ";a=\"b\"", "; a", " ;a", " ", "\t", ";a=b=c"]).prop_map(str::to_owned),
    ];
    let size = |length: usize| {
        select(vec![format!("{length:x}"), format!("{length:X}"), format!("0{length:x}"), format!("000{length:x}")])
    };
    let data = prop_oneof![6 => vec(any::<u8>(), 1..20), 1 => vec(select(SPECIAL_BYTES.to_vec()), 1..40)];
    let chunk = data.prop_flat_map(move |data| (size(data.len()), Just(data)));
    let trailer = prop_oneof![
        4 => "X-[A-Z]{1,3}: [a-z]{0,4}",
        1 => select(LINES.to_vec()).prop_map(str::to_owned),
    ];
    (vec((chunk, extension.clone()), 0..4), extension, vec(trailer, 0..2)).prop_map(|(chunks, extension, trailers)| {
        let mut body = Vec::new();
        for ((size, data), extension) in chunks {
            body.extend([size.as_bytes(), extension.as_bytes(), b"\r\n", &data, b"\r\n"].concat());
        }
        body.extend([b"0", extension.as_bytes(), b"\r\n"].concat());
        for trailer in trailers {
            body.extend([trailer.as_bytes(), b"\r\n"].concat());
        }
        body.extend(b"\r\n");
        body
    })
}

/// A request before mutation.
fn valid_request() -> impl Strategy<Value = Vec<u8>> {
    let host = prop_oneof![
        16 => Just("Host: a"),
        2 => select(vec!["host:a", "HOST: \ta ", "Host: A", "Host: a:80", "Host: [::1]", "Host: a.b.", "Host: a_b"]),
        1 => select(vec!["Host:", "Host: a b", "Host: u@a", "Host: a/b", "Host: a:x", "X: y"]),
    ];
    let length = vec(any::<u8>(), 0..12);
    let body = prop_oneof![
        4 => Just((String::new(), Vec::new())),
        3 => length.prop_map(|body| (format!("Content-Length: {}\r\n", body.len()), body)),
        4 => chunked_body().prop_map(|body| ("Transfer-Encoding: chunked\r\n".to_owned(), body)),
    ];
    let line = prop_oneof![
        3 => select(LINES[..20].to_vec()).prop_map(str::to_owned),
        2 => "[!#$%&'*+.^_`|~0-9A-Za-z-]{1,6}:[ -~]{0,8}",
        1 => select(LINES.to_vec()).prop_map(str::to_owned),
    ];
    (request_line(), host, vec(line, 0..4), body).prop_map(|(start, host, lines, (framing, body))| {
        let mut bytes = [&start, &b"\r\n"[..], host.as_bytes(), b"\r\n"].concat();
        for line in lines {
            // Latin-1, so that one character is one byte.
            bytes.extend(line.chars().map(|character| u8::try_from(u32::from(character)).unwrap_or(b'?')));
            bytes.extend(b"\r\n");
        }
        bytes.extend(framing.as_bytes());
        bytes.extend(b"\r\n");
        bytes.extend(body);
        bytes
    })
}

/// A mutation of one byte.
#[derive(Clone, Debug)]
enum Mutation {
    Insert(u8),
    Replace(u8),
    Delete,
    Double,
    Swap,
}

fn apply(bytes: &mut Vec<u8>, (at, mutation): (proptest::sample::Index, Mutation)) {
    if bytes.is_empty() {
        return;
    }
    let at = at.index(bytes.len());
    match mutation {
        Mutation::Insert(byte) => bytes.insert(at, byte),
        Mutation::Replace(byte) => bytes[at] = byte,
        Mutation::Delete => drop(bytes.remove(at)),
        Mutation::Double => bytes.insert(at, bytes[at]),
        Mutation::Swap => {
            let other = (at + 1) % bytes.len();
            bytes.swap(at, other);
        }
    }
}

/// `valid` with up to two mutations, half of the time with none.
fn mutated(valid: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let byte = || select(SPECIAL_BYTES.to_vec());
    let mutation = prop_oneof![
        byte().prop_map(Mutation::Insert),
        byte().prop_map(Mutation::Replace),
        Just(Mutation::Delete),
        Just(Mutation::Double),
        Just(Mutation::Swap),
    ];
    let mutations = prop_oneof![
        vec((any::<proptest::sample::Index>(), mutation.clone()), 0..1),
        vec((any::<proptest::sample::Index>(), mutation), 1..3)
    ];
    (valid, mutations).prop_map(|(mut bytes, mutations)| {
        mutations.into_iter().for_each(|mutation| apply(&mut bytes, mutation));
        bytes
    })
}

pub(crate) fn request() -> impl Strategy<Value = Vec<u8>> {
    mutated(valid_request())
}

pub(crate) fn mutated_chunks() -> impl Strategy<Value = Vec<u8>> {
    mutated(chunked_body())
}
