//! Appends numbers and addresses as text to a byte buffer. Used on every request: `std::fmt` takes
//! ten times as long.

use std::io::Write as _;
use std::net::IpAddr;

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Appends a decimal number.
pub(crate) fn push_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// Appends 16 lower-case hexadecimal digits.
pub(crate) fn push_hex(out: &mut Vec<u8>, number: u64) {
    let mut text = [0; 16];
    for (at, digit) in text.iter_mut().enumerate() {
        *digit = DIGITS[(number >> (60 - 4 * at)) as usize & 15];
    }
    out.extend_from_slice(&text);
}

/// Appends a chunk size in hexadecimal without leading zeros.
pub(crate) fn push_chunk_size(out: &mut Vec<u8>, size: usize) {
    let significant = (usize::BITS - size.leading_zeros()).div_ceil(4).max(1);
    out.extend((0..significant).rev().map(|digit| DIGITS[(size >> (digit * 4)) & 15]));
}

/// Appends an IP address in its usual notation, IPv6 without brackets.
pub(crate) fn push_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            for (at, octet) in ip.octets().into_iter().enumerate() {
                if at > 0 {
                    out.push(b'.');
                }
                push_number(out, u64::from(octet));
            }
        }
        IpAddr::V6(ip) => write!(out, "{ip}").expect("writing to a vector does not fail"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).expect("ASCII")
    }

    #[test]
    fn output_matches_std_fmt() {
        for number in [0, 1, 9, 10, 0xabc, u64::from(u32::MAX), u64::MAX] {
            assert_eq!(text(|out| push_number(out, number)), number.to_string());
            assert_eq!(text(|out| push_hex(out, number)), format!("{number:016x}"));
            assert_eq!(text(|out| push_chunk_size(out, number as usize)), format!("{number:x}"));
        }
        for ip in ["0.0.0.0", "127.0.0.1", "255.10.99.100", "::1", "2001:db8::7"] {
            assert_eq!(text(|out| push_ip(out, ip.parse().expect("an address"))), ip);
        }
    }
}
