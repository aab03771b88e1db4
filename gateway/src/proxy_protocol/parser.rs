//! Parser of a PROXY protocol header at the start of some bytes. It copies and allocates nothing.
//!
//! It is stricter than most: one space between the fields of version 1, no signs or leading zeros
//! in its ports, only TCP over IPv4 and IPv6, and type-length-values that fill the header exactly.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Longest header: a version 2 header with addresses and type-length-values. The known proxies send
/// less than 600 bytes without a client certificate, and a certificate takes up to 3 KiB.
pub(super) const HEADER_BYTES_MAX: usize = 4_096;
/// Longest version 1 header with its CRLF, from the specification.
const V1_BYTES_MAX: usize = 107;
const V1_PREFIX: &[u8] = b"PROXY ";
const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family, length.
const V2_FIXED_BYTES: usize = 16;
/// Type of the CRC-32C among the type-length-values.
const TYPE_CRC32C: u8 = 3;

/// The sender of a connection, according to its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProxiedClient {
    /// The proxy itself, for a health check for instance (`LOCAL`).
    Local,
    /// A client whose address the proxy does not know, or that has none (`UNKNOWN`, UNSPEC, UNIX).
    Unknown,
    Address(SocketAddr),
}

/// The start of the bytes received so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ParsedHeader {
    /// No header.
    Absent,
    /// All bytes may belong to a header, which is not complete.
    Incomplete,
    Complete {
        /// Bytes of the header.
        length: usize,
        client: ProxiedClient,
    },
}

/// Why a header is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeaderFault {
    Malformed,
    TooLong,
    Checksum,
}

/// Parses the start of a connection.
pub(super) fn parse(bytes: &[u8]) -> Result<ParsedHeader, HeaderFault> {
    let begins_with = |prefix: &[u8]| bytes.iter().zip(prefix).all(|(byte, expected)| byte == expected);
    if begins_with(V2_SIGNATURE) {
        parse_v2(bytes)
    } else if begins_with(V1_PREFIX) {
        parse_v1(bytes)
    } else {
        Ok(ParsedHeader::Absent)
    }
}

fn parse_v1(bytes: &[u8]) -> Result<ParsedHeader, HeaderFault> {
    let bytes = &bytes[..bytes.len().min(V1_BYTES_MAX)];
    let Some(end) = bytes.iter().position(|byte| !matches!(byte, b' '..=b'~')) else {
        return if bytes.len() < V1_BYTES_MAX { Ok(ParsedHeader::Incomplete) } else { Err(HeaderFault::TooLong) };
    };
    match &bytes[end..] {
        [b'\r', b'\n', ..] => {}
        [b'\r'] if bytes.len() < V1_BYTES_MAX => return Ok(ParsedHeader::Incomplete),
        [b'\r'] => return Err(HeaderFault::TooLong),
        _ => return Err(HeaderFault::Malformed),
    }
    let line = std::str::from_utf8(&bytes[V1_PREFIX.len()..end]).map_err(|_| HeaderFault::Malformed)?;
    let client = v1_client(line).ok_or(HeaderFault::Malformed)?;
    Ok(ParsedHeader::Complete { length: end + 2, client })
}

/// The client of a line after `PROXY `, without its end.
fn v1_client(line: &str) -> Option<ProxiedClient> {
    let mut fields = line.split(' ');
    let family = fields.next()?;
    if family == "UNKNOWN" {
        // The specification has receivers ignore the rest of the line.
        return Some(ProxiedClient::Unknown);
    }
    let (source, _destination) = match family {
        "TCP4" => (v1_address::<Ipv4Addr>(fields.next()?)?, v1_address::<Ipv4Addr>(fields.next()?)?),
        "TCP6" => (v1_address::<Ipv6Addr>(fields.next()?)?, v1_address::<Ipv6Addr>(fields.next()?)?),
        _ => return None,
    };
    let (source_port, _destination_port) = (v1_port(fields.next()?)?, v1_port(fields.next()?)?);
    fields.next().is_none().then(|| ProxiedClient::Address(SocketAddr::new(source, source_port)))
}

fn v1_address<T: std::str::FromStr + Into<IpAddr>>(text: &str) -> Option<IpAddr> {
    text.parse::<T>().ok().map(Into::into)
}

fn v1_port(text: &str) -> Option<u16> {
    let is_canonical = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| is_canonical)
}

fn parse_v2(bytes: &[u8]) -> Result<ParsedHeader, HeaderFault> {
    let [version_and_command, family, length_high, length_low] = match bytes.get(V2_SIGNATURE.len()..V2_FIXED_BYTES) {
        Some(fixed) => fixed.try_into().expect("the range has four bytes"),
        None => return Ok(ParsedHeader::Incomplete),
    };
    let is_local = match version_and_command {
        0x20 => true,
        0x21 => false,
        _ => return Err(HeaderFault::Malformed),
    };
    let length = V2_FIXED_BYTES + usize::from(u16::from_be_bytes([length_high, length_low]));
    if length > HEADER_BYTES_MAX {
        return Err(HeaderFault::TooLong);
    }
    let Some(header) = bytes.get(..length) else { return Ok(ParsedHeader::Incomplete) };
    let client = if is_local { ProxiedClient::Local } else { v2_client(header, family)? };
    Ok(ParsedHeader::Complete { length, client })
}

/// The client of a complete header with the command `PROXY`.
fn v2_client(header: &[u8], family: u8) -> Result<ProxiedClient, HeaderFault> {
    let body = &header[V2_FIXED_BYTES..];
    let (client, address_bytes) = match family {
        // The format of what follows is unspecified.
        0x00 => return Ok(ProxiedClient::Unknown),
        0x11 => {
            let (source, port) = (array::<4>(body, 0)?, array::<2>(body, 8)?);
            (ProxiedClient::Address(SocketAddr::from((source, u16::from_be_bytes(port)))), 12)
        }
        0x21 => {
            let (source, port) = (array::<16>(body, 0)?, array::<2>(body, 32)?);
            (ProxiedClient::Address(SocketAddr::from((source, u16::from_be_bytes(port)))), 36)
        }
        0x31 => (ProxiedClient::Unknown, 216),
        // Datagrams, and values that are not assigned.
        _ => return Err(HeaderFault::Malformed),
    };
    let values = body.get(address_bytes..).ok_or(HeaderFault::Malformed)?;
    check_values(header, values)?;
    Ok(client)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], HeaderFault> {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).ok_or(HeaderFault::Malformed)
}

/// Checks that type-length-values fill the end of `header`, and the checksum if there is one. All
/// other values (server name, TLS, name spaces) are ignored.
fn check_values(header: &[u8], values: &[u8]) -> Result<(), HeaderFault> {
    let mut rest = values;
    let mut has_checksum = false;
    while let [kind, high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let value = after.get(..length).ok_or(HeaderFault::Malformed)?;
        if *kind == TYPE_CRC32C {
            let expected = array::<4>(value, 0)?;
            if length != 4 || std::mem::replace(&mut has_checksum, true) {
                return Err(HeaderFault::Malformed);
            }
            let at = header.len() - after.len();
            // The checksum is computed with its own bytes as zeros.
            let parts = [&header[..at], &[0; 4], &header[at + 4..]];
            if crc32c(&parts) != u32::from_be_bytes(expected) {
                return Err(HeaderFault::Checksum);
            }
        }
        rest = &after[length..];
    }
    if rest.is_empty() { Ok(()) } else { Err(HeaderFault::Malformed) }
}

/// CRC-32C (RFC 3309) of the concatenated parts.
fn crc32c(parts: &[&[u8]]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let (mut value, mut bit) = (index as u32, 0);
            while bit < 8 {
                value = if value & 1 == 1 { (value >> 1) ^ 0x82f6_3b78 } else { value >> 1 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    let bytes = parts.iter().copied().flatten();
    !bytes.fold(u32::MAX, |crc, byte| TABLE[usize::from(crc.to_le_bytes()[0] ^ byte)] ^ (crc >> 8))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn complete(bytes: &[u8]) -> ProxiedClient {
        match parse(bytes) {
            Ok(ParsedHeader::Complete { length, client }) if length == bytes.len() => client,
            other => panic!("{other:?}: {}", String::from_utf8_lossy(bytes)),
        }
    }

    fn address(text: &str) -> ProxiedClient {
        ProxiedClient::Address(text.parse().expect("an address"))
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).expect("a short body").to_be_bytes();
        [V2_SIGNATURE, &[command, family], &length, body].concat()
    }

    const V4: [u8; 12] = [192, 0, 2, 1, 192, 0, 2, 2, 0x03, 0xe8, 1, 187];

    fn v6() -> Vec<u8> {
        let ip = |text: &str| text.parse::<Ipv6Addr>().expect("an address").octets();
        [&ip("2001:db8::1")[..], &ip("2001:db8::2"), &[0x03, 0xe8, 1, 187]].concat()
    }

    #[test]
    fn v1_clients() {
        for (line, client) in [
            ("TCP4 192.0.2.1 192.0.2.2 1000 443", address("192.0.2.1:1000")),
            ("TCP4 255.255.255.255 255.255.255.255 65535 65535", address("255.255.255.255:65535")),
            ("TCP4 192.0.2.1 192.0.2.2 0 0", address("192.0.2.1:0")),
            ("TCP6 2001:db8::1 ::1 1000 443", address("[2001:db8::1]:1000")),
            ("TCP6 ::ffff:192.0.2.1 ::1 1000 443", address("[::ffff:192.0.2.1]:1000")),
            ("UNKNOWN", ProxiedClient::Unknown),
            ("UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535", ProxiedClient::Unknown),
            (
                "UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535",
                ProxiedClient::Unknown,
            ),
        ] {
            assert_eq!(complete(format!("PROXY {line}\r\n").as_bytes()), client, "{line}");
        }
    }

    #[test]
    fn malformed_v1_headers() {
        for line in [
            "\r\n",
            " \r\n",
            "TCP4\r\n",
            "TCP5 192.0.2.1 192.0.2.2 1000 443\r\n",
            "tcp4 192.0.2.1 192.0.2.2 1000 443\r\n",
            "UNKNOWNS\r\n",
            "unknown\r\n",
            "UDP4 192.0.2.1 192.0.2.2 1000 443\r\n",
            "TCP4  192.0.2.1 192.0.2.2 1000 443\r\n",
            "TCP4 192.0.2.1 192.0.2.2 1000\r\n",
            "TCP4 192.0.2.1 192.0.2.2 1000 443 \r\n",
            "TCP4 192.0.2.1 192.0.2.2 1000 443 x\r\n",
            "TCP4 192.0.2.1 192.0.2.2 +1000 443\r\n",
            "TCP4 192.0.2.1 192.0.2.2 -1 443\r\n",
            "TCP4 192.0.2.1 192.0.2.2 01000 443\r\n",
            "TCP4 192.0.2.1 192.0.2.2 1000 00\r\n",
            "TCP4 192.0.2.1 192.0.2.2 1000 65536\r\n",
            "TCP4 192.0.2.1 192.0.2.2 1000 \r\n",
            "TCP4 192.0.2.01 192.0.2.2 1000 443\r\n",
            "TCP4 192.0.2 192.0.2.2 1000 443\r\n",
            "TCP4 192.0.2.256 192.0.2.2 1000 443\r\n",
            "TCP4 ::1 ::1 1000 443\r\n",
            "TCP4 192.0.2.1 ::1 1000 443\r\n",
            "TCP6 192.0.2.1 192.0.2.2 1000 443\r\n",
            "TCP6 [::1] [::1] 1000 443\r\n",
            "TCP6 fe80::1%eth0 ::1 1000 443\r\n",
            "TCP6 1:::2 ::1 1000 443\r\n",
            "TCP4 192.0.2.1 192.0.2.2 1000 443\n",
            "TCP4 192.0.2.1 192.0.2.2 1000 443\rx",
            "TCP4 192.0.2.1\t192.0.2.2 1000 443\r\n",
            "TCP4 192.0.2.1 192.0.2.2 1000 443\0\r\n",
            "TCP4 192.0.2.1 192.0.2.2 1000 443\u{a0}\r\n",
            "UNKNOWN \0\r\n",
        ] {
            assert_eq!(parse(format!("PROXY {line}").as_bytes()), Err(HeaderFault::Malformed), "{line:?}");
        }
    }

    #[test]
    fn v1_has_at_most_107_bytes() {
        let line = |bytes: usize| [b"PROXY UNKNOWN ", &*vec![b'x'; bytes - 16], b"\r\n"].concat();
        assert_eq!(complete(&line(107)), ProxiedClient::Unknown);
        assert_eq!(parse(&line(107)[..105]), Ok(ParsedHeader::Incomplete));
        assert_eq!(parse(&line(107)[..106]), Ok(ParsedHeader::Incomplete));
        assert_eq!(parse(&line(108)), Err(HeaderFault::TooLong));
        assert_eq!(parse(&line(108)[..107]), Err(HeaderFault::TooLong));
        assert_eq!(parse(&line(400)[..300]), Err(HeaderFault::TooLong));
    }

    #[test]
    fn v2_clients() {
        let local = v2(0x20, 0x00, &[]);
        let cases = [
            (v2(0x21, 0x11, &V4), address("192.0.2.1:1000")),
            (v2(0x21, 0x21, &v6()), address("[2001:db8::1]:1000")),
            (v2(0x21, 0x31, &[b'x'; 216]), ProxiedClient::Unknown),
            (v2(0x21, 0x00, &[]), ProxiedClient::Unknown),
            (v2(0x21, 0x00, b"anything"), ProxiedClient::Unknown),
            (local, ProxiedClient::Local),
            // The family and the rest of a local connection are ignored.
            (v2(0x20, 0x11, &V4), ProxiedClient::Local),
            (v2(0x20, 0xff, b"x"), ProxiedClient::Local),
            // Server name, TLS, a padding and a name space.
            (
                v2(0x21, 0x11, &[&V4[..], b"\x02\0\x06a.test\x20\0\x05\x01\0\0\0\0\x04\0\x03abc\x30\0\0"].concat()),
                address("192.0.2.1:1000"),
            ),
        ];
        for (header, client) in cases {
            assert_eq!(complete(&header), client, "{header:?}");
        }
    }

    #[test]
    fn malformed_v2_headers() {
        let with_values = |values: &[u8]| v2(0x21, 0x11, &[&V4[..], values].concat());
        for header in [
            v2(0x11, 0x11, &V4),
            v2(0x22, 0x11, &V4),
            v2(0x31, 0x11, &V4),
            v2(0x00, 0x11, &V4),
            v2(0x21, 0x12, &V4),
            v2(0x21, 0x22, &v6()),
            v2(0x21, 0x32, &[0; 216]),
            v2(0x21, 0x10, &V4),
            v2(0x21, 0x01, &V4),
            v2(0x21, 0x13, &V4),
            v2(0x21, 0x41, &V4),
            v2(0x21, 0xff, &V4),
            v2(0x21, 0x11, &V4[..11]),
            v2(0x21, 0x11, &[]),
            v2(0x21, 0x21, &v6()[..35]),
            v2(0x21, 0x31, &[0; 215]),
            with_values(b"\x04"),
            with_values(b"\x04\0"),
            with_values(b"\x04\0\x01"),
            with_values(b"\x04\xff\xffxx"),
            with_values(b"\x03\0\x03abc"),
            with_values(b"\x03\0\x05abcde"),
        ] {
            assert_eq!(parse(&header), Err(HeaderFault::Malformed), "{header:?}");
        }
    }

    #[test]
    fn v2_has_a_bound() {
        let values = |bytes: usize| {
            let length = u16::try_from(bytes - 3).expect("short").to_be_bytes();
            [&V4[..], &[4], &length, &*vec![0; bytes - 3]].concat()
        };
        assert_eq!(complete(&v2(0x21, 0x11, &values(4_096 - 28))), address("192.0.2.1:1000"));
        let long = v2(0x21, 0x11, &values(4_097 - 28));
        assert_eq!(parse(&long), Err(HeaderFault::TooLong));
        // Refused before its bytes arrive.
        assert_eq!(parse(&long[..16]), Err(HeaderFault::TooLong));
    }

    #[test]
    fn v2_checksum_is_verified() {
        assert_eq!(crc32c(&[b"1234", b"56789"]), 0xe306_9283, "the check value of CRC-32C");
        let header = |crc: u32| {
            let values = [&b"\x04\0\x01x\x03\0\x04"[..], &crc.to_be_bytes(), b"\x30\0\x01n"].concat();
            v2(0x21, 0x11, &[&V4[..], &values].concat())
        };
        let right = crc32c(&[&header(0)]);
        assert_eq!(complete(&header(right)), address("192.0.2.1:1000"));
        assert_eq!(parse(&header(right ^ 1)), Err(HeaderFault::Checksum));
        let mut changed = header(right);
        changed[16] ^= 1;
        assert_eq!(parse(&changed), Err(HeaderFault::Checksum));
        let twice = [&V4[..], b"\x03\0\x04\0\0\0\0\x03\0\x04\0\0\0\0"].concat();
        assert!(parse(&v2(0x21, 0x11, &twice)).is_err());
    }

    #[test]
    fn other_starts_are_not_headers() {
        for start in
            [&b"GET / HTTP/1.1"[..], b"PUT", b"PROXY: x", b"PROXYX", b"\x16\x03\x01", b"\r\nGET", b"\r\n\r\n\r"]
        {
            assert_eq!(parse(start), Ok(ParsedHeader::Absent), "{start:?}");
        }
        for start in [&b""[..], b"P", b"PROXY", b"PROXY ", b"\r", b"\r\n\r\n\0", V2_SIGNATURE] {
            assert_eq!(parse(start), Ok(ParsedHeader::Incomplete), "{start:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_result(prefix in 0..4_usize, bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let prefix: &[u8] = [&b""[..], V1_PREFIX, V2_SIGNATURE, b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x40"][prefix];
            let bytes = [prefix, &bytes].concat();
            if let Ok(ParsedHeader::Complete { length, .. }) = parse(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }

        /// The result depends on the header alone, and no prefix of it is complete.
        #[test]
        fn valid_headers_are_read_to_their_last_byte(
            (source, destination) in (any::<IpAddr>(), any::<IpAddr>()),
            (port, values) in (any::<u16>(), prop::collection::vec((4_u8.., prop::collection::vec(any::<u8>(), 0..20)), 0..4)),
            rest in prop::collection::vec(any::<u8>(), 0..20),
            is_text: bool,
        ) {
            let client = ProxiedClient::Address(SocketAddr::new(source, port));
            let destination = match source {
                IpAddr::V4(_) => match destination { IpAddr::V4(ip) => ip.into(), IpAddr::V6(_) => source },
                IpAddr::V6(_) => match destination { IpAddr::V6(ip) => ip.into(), IpAddr::V4(_) => source },
            };
            let header = if is_text {
                let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
                format!("PROXY {family} {source} {destination} {port} 443\r\n").into_bytes()
            } else {
                let octets = |ip| match ip { IpAddr::V4(ip) => Ipv4Addr::octets(&ip).to_vec(), IpAddr::V6(ip) => ip.octets().to_vec() };
                let mut body = [octets(source), octets(destination), port.to_be_bytes().to_vec(), vec![1, 187]].concat();
                for (kind, value) in &values {
                    body.push(*kind);
                    body.extend(u16::try_from(value.len()).expect("short").to_be_bytes());
                    body.extend(value);
                }
                v2(0x21, if source.is_ipv4() { 0x11 } else { 0x21 }, &body)
            };
            prop_assert_eq!(parse(&[&header[..], &rest].concat()), Ok(ParsedHeader::Complete { length: header.len(), client }));
            for end in 0..header.len() {
                prop_assert_eq!(parse(&header[..end]), Ok(ParsedHeader::Incomplete));
            }
        }
    }
}
