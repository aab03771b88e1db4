//! Parser of a ClientHello (RFC 8446 section 4.1.2) as it arrives in TLS records.
//!
//! It reads what a fingerprint needs and checks no more than its own bounds: rustls decides whether
//! the message is acceptable. Invariant: no input panics, and every list is a part of the input.

use std::borrow::Cow;

use smallvec::SmallVec;

/// Content type of a handshake record.
const RECORD_HANDSHAKE: u8 = 22;
/// Handshake type of a ClientHello.
const CLIENT_HELLO: u8 = 1;
/// Extensions that are read (RFC 6066, RFC 7301, RFC 8446).
pub(super) const SERVER_NAME: u16 = 0;
const SIGNATURE_ALGORITHMS: u16 = 13;
pub(super) const ALPN: u16 = 16;
const SUPPORTED_VERSIONS: u16 = 43;

/// Numbers of one list. Clients send fewer than this many; more are allocated.
pub(super) type Numbers = SmallVec<[u16; 32]>;

/// The parts of a ClientHello that identify the client's TLS stack, in the order of the message and
/// without GREASE (RFC 8701).
#[derive(Debug, Default, PartialEq)]
pub(super) struct ParsedHello {
    pub(super) legacy_version: u16,
    pub(super) ciphers: Numbers,
    /// Types of all extensions.
    pub(super) extensions: Numbers,
    pub(super) versions: Numbers,
    pub(super) signature_algorithms: Numbers,
    /// First and last byte of the first application protocol.
    pub(super) alpn: Option<(u8, u8)>,
}

/// Parses the handshake message at the start of the records of a connection; `None` if it is
/// incomplete or malformed.
pub(super) fn parse(records: &[u8]) -> Option<ParsedHello> {
    let message = message(records)?;
    let mut reader = Reader(&message);
    let [CLIENT_HELLO] = *reader.take(1)? else { return None };
    let mut body = reader.block(3)?;
    let legacy_version = body.u16()?;
    let _random = body.take(32)?;
    let _session_id = body.block(1)?;
    let ciphers = body.block(2)?.numbers();
    let _compression = body.block(1)?;
    let mut hello = ParsedHello { legacy_version, ciphers, ..ParsedHello::default() };
    // A ClientHello without extensions is valid in TLS 1.2.
    if body.0.is_empty() {
        return Some(hello);
    }
    let mut extensions = body.block(2)?;
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let mut content = extensions.block(2)?;
        match kind {
            SIGNATURE_ALGORITHMS => hello.signature_algorithms = content.block(2)?.numbers(),
            SUPPORTED_VERSIONS => hello.versions = content.block(1)?.numbers(),
            ALPN => {
                let first = content.block(2)?.block(1)?;
                hello.alpn = first.0.first().copied().zip(first.0.last().copied());
            }
            _ => {}
        }
        if !is_grease(kind) {
            hello.extensions.push(kind);
        }
    }
    Some(hello)
}

/// The first handshake message, which may be split over records (RFC 8446 section 5.1).
fn message(records: &[u8]) -> Option<Cow<'_, [u8]>> {
    let mut records = Reader(records);
    let first = records.handshake_fragment()?;
    if is_complete(first) {
        return Some(Cow::Borrowed(first));
    }
    let mut joined = first.to_vec();
    while !is_complete(&joined) {
        joined.extend_from_slice(records.handshake_fragment()?);
    }
    Some(Cow::Owned(joined))
}

fn is_complete(message: &[u8]) -> bool {
    matches!(message, [_, length @ .., ] if Reader(length).block(3).is_some())
}

/// Values that clients send at random, so that servers learn to ignore unknown ones.
fn is_grease(number: u16) -> bool {
    let [high, low] = number.to_be_bytes();
    high == low && low & 0x0f == 0x0a
}

/// Reads from the start of a slice.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    /// A block after its length, which has `prefix` bytes.
    fn block(&mut self, prefix: usize) -> Option<Reader<'a>> {
        let length = self.take(prefix)?.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        self.take(length).map(Reader)
    }

    /// All numbers but GREASE; an odd byte at the end is ignored.
    fn numbers(&self) -> Numbers {
        let numbers = self.0.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
        numbers.filter(|number| !is_grease(*number)).collect()
    }

    /// The content of the next record, which is a handshake record and not empty.
    fn handshake_fragment(&mut self) -> Option<&'a [u8]> {
        let [RECORD_HANDSHAKE, _, _] = *self.take(3)? else { return None };
        self.block(2).map(|fragment| fragment.0).filter(|fragment| !fragment.is_empty())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(prefix: usize, content: &[u8]) -> Vec<u8> {
        let length = content.len().to_be_bytes();
        [&length[length.len() - prefix..], content].concat()
    }

    fn numbers(numbers: &[u16]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
    }

    /// An extension with the content that its type needs, or none.
    pub(in crate::tls) fn extension(kind: u16, hello: &ParsedHello, alpn: &[u8]) -> Vec<u8> {
        let content = match kind {
            SIGNATURE_ALGORITHMS => block(2, &numbers(&hello.signature_algorithms)),
            SUPPORTED_VERSIONS => block(1, &numbers(&hello.versions)),
            ALPN => block(2, &[block(1, alpn), block(1, b"other")].concat()),
            _ => vec![0; usize::from(kind % 5)],
        };
        [kind.to_be_bytes().to_vec(), block(2, &content)].concat()
    }

    /// A ClientHello message with the lists of `hello`, in their order.
    pub(in crate::tls) fn encode(hello: &ParsedHello, alpn: &[u8]) -> Vec<u8> {
        let extensions: Vec<u8> = hello.extensions.iter().flat_map(|kind| extension(*kind, hello, alpn)).collect();
        let body = [
            hello.legacy_version.to_be_bytes().to_vec(),
            vec![7; 32],
            block(1, &[1; 32]),
            block(2, &numbers(&hello.ciphers)),
            block(1, &[0]),
            block(2, &extensions),
        ];
        [vec![CLIENT_HELLO], block(3, &body.concat())].concat()
    }

    /// Splits a message into records of at most `size` bytes.
    pub(in crate::tls) fn records(message: &[u8], size: usize) -> Vec<u8> {
        message.chunks(size).flat_map(|part| [vec![RECORD_HANDSHAKE, 3, 1], block(2, part)].concat()).collect()
    }

    #[test]
    fn grease_is_left_out_everywhere() {
        let grease = |at: u16| 0x0a0a + at * 0x1010;
        assert!((0..16).all(|at| is_grease(grease(at))) && !is_grease(0x0a1a) && !is_grease(0x0b0b));
        let with = |at: u16, rest: &[u16]| rest.iter().copied().chain([grease(at)]).collect::<Numbers>();
        let sent = ParsedHello {
            legacy_version: 0x0303,
            ciphers: with(0, &[0x1301]),
            extensions: with(1, &[0, SIGNATURE_ALGORITHMS, SUPPORTED_VERSIONS]),
            versions: with(2, &[0x0304]),
            signature_algorithms: with(3, &[0x0403]),
            alpn: None,
        };
        let read = parse(&records(&encode(&sent, b""), 16_384)).expect("well-formed");
        let single = |number| Numbers::from_slice(&[number]);
        assert_eq!(
            (read.ciphers, read.versions, read.signature_algorithms),
            (single(0x1301), single(0x0304), single(0x0403))
        );
        assert_eq!(read.extensions[..], [0, SIGNATURE_ALGORITHMS, SUPPORTED_VERSIONS]);
    }

    #[test]
    fn other_messages_and_records_are_no_hello() {
        let hello = encode(&ParsedHello::default(), b"");
        assert!(parse(&records(&hello, 100)).is_some());
        let mut other = hello.clone();
        other[0] = 2;
        assert_eq!(parse(&records(&other, 100)), None);
        let mut alert = records(&hello, 100);
        alert[0] = 21;
        assert_eq!(parse(&alert), None);
        assert_eq!(parse(b"GET / HTTP/1.1\r\n\r\n"), None);
        // An empty fragment would let a peer send records for ever.
        assert_eq!(parse(&[&[RECORD_HANDSHAKE, 3, 1, 0, 0][..], &records(&hello, 100)].concat()), None);
    }

    fn lists() -> impl Strategy<Value = ParsedHello> {
        let numbers = || prop::collection::vec(any::<u16>().prop_filter("not GREASE", |n| !is_grease(*n)), 0..40);
        (any::<u16>(), numbers(), numbers(), numbers(), numbers()).prop_map(
            |(legacy_version, ciphers, extensions, versions, signature_algorithms)| {
                let mut extensions: Numbers = extensions.into();
                extensions.retain(|kind| ![SIGNATURE_ALGORITHMS, SUPPORTED_VERSIONS, ALPN].contains(kind));
                extensions.extend([SIGNATURE_ALGORITHMS, ALPN, SUPPORTED_VERSIONS]);
                ParsedHello {
                    legacy_version,
                    ciphers: ciphers.into(),
                    extensions,
                    versions: versions.into(),
                    signature_algorithms: signature_algorithms.into(),
                    alpn: Some((b'h', b'2')),
                }
            },
        )
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_result(is_record: bool, bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _any = parse(&if is_record { records(&bytes, 97) } else { bytes.clone() });
            let body = [vec![CLIENT_HELLO], block(3, &bytes)].concat();
            let _any = parse(&records(&body, 16_384));
        }

        /// The lists are read in their order from any records; no prefix has a result.
        #[test]
        fn lists_are_read_over_any_records(hello in lists(), size in 1..400_usize) {
            let sent = records(&encode(&hello, b"h2"), size);
            let read = parse(&sent);
            prop_assert_eq!(read.as_ref(), Some(&hello));
            for end in 0..sent.len() {
                prop_assert_eq!(parse(&sent[..end]), None);
            }
        }

        #[test]
        fn changed_messages_do_not_panic(hello in lists(), at: prop::sample::Index, byte: u8) {
            let mut message = encode(&hello, b"h2");
            let at = at.index(message.len());
            message[at] = byte;
            let _any = parse(&records(&message, 16_384));
        }
    }
}
