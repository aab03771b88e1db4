//! The Huffman code of header fields (RFC 7541 section 5.2 and appendix B), decoded four bits at a
//! time.

use std::sync::LazyLock;

/// The code of each byte, aligned to the least significant bit.
const CODES: [u32; 256] = [
    0x1ff8, 0x7fffd8, 0xfffffe2, 0xfffffe3, 0xfffffe4, 0xfffffe5, 0xfffffe6, 0xfffffe7, 0xfffffe8, 0xffffea,
    0x3ffffffc, 0xfffffe9, 0xfffffea, 0x3ffffffd, 0xfffffeb, 0xfffffec, 0xfffffed, 0xfffffee, 0xfffffef, 0xffffff0,
    0xffffff1, 0xffffff2, 0x3ffffffe, 0xffffff3, 0xffffff4, 0xffffff5, 0xffffff6, 0xffffff7, 0xffffff8, 0xffffff9,
    0xffffffa, 0xffffffb, 0x14, 0x3f8, 0x3f9, 0xffa, 0x1ff9, 0x15, 0xf8, 0x7fa, 0x3fa, 0x3fb, 0xf9, 0x7fb, 0xfa, 0x16,
    0x17, 0x18, 0x0, 0x1, 0x2, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f, 0x5c, 0xfb, 0x7ffc, 0x20, 0xffb, 0x3fc,
    0x1ffa, 0x21, 0x5d, 0x5e, 0x5f, 0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d,
    0x6e, 0x6f, 0x70, 0x71, 0x72, 0xfc, 0x73, 0xfd, 0x1ffb, 0x7fff0, 0x1ffc, 0x3ffc, 0x22, 0x7ffd, 0x3, 0x23, 0x4,
    0x24, 0x5, 0x25, 0x26, 0x27, 0x6, 0x74, 0x75, 0x28, 0x29, 0x2a, 0x7, 0x2b, 0x76, 0x2c, 0x8, 0x9, 0x2d, 0x77, 0x78,
    0x79, 0x7a, 0x7b, 0x7ffe, 0x7fc, 0x3ffd, 0x1ffd, 0xffffffc, 0xfffe6, 0x3fffd2, 0xfffe7, 0xfffe8, 0x3fffd3,
    0x3fffd4, 0x3fffd5, 0x7fffd9, 0x3fffd6, 0x7fffda, 0x7fffdb, 0x7fffdc, 0x7fffdd, 0x7fffde, 0xffffeb, 0x7fffdf,
    0xffffec, 0xffffed, 0x3fffd7, 0x7fffe0, 0xffffee, 0x7fffe1, 0x7fffe2, 0x7fffe3, 0x7fffe4, 0x1fffdc, 0x3fffd8,
    0x7fffe5, 0x3fffd9, 0x7fffe6, 0x7fffe7, 0xffffef, 0x3fffda, 0x1fffdd, 0xfffe9, 0x3fffdb, 0x3fffdc, 0x7fffe8,
    0x7fffe9, 0x1fffde, 0x7fffea, 0x3fffdd, 0x3fffde, 0xfffff0, 0x1fffdf, 0x3fffdf, 0x7fffeb, 0x7fffec, 0x1fffe0,
    0x1fffe1, 0x3fffe0, 0x1fffe2, 0x7fffed, 0x3fffe1, 0x7fffee, 0x7fffef, 0xfffea, 0x3fffe2, 0x3fffe3, 0x3fffe4,
    0x7ffff0, 0x3fffe5, 0x3fffe6, 0x7ffff1, 0x3ffffe0, 0x3ffffe1, 0xfffeb, 0x7fff1, 0x3fffe7, 0x7ffff2, 0x3fffe8,
    0x1ffffec, 0x3ffffe2, 0x3ffffe3, 0x3ffffe4, 0x7ffffde, 0x7ffffdf, 0x3ffffe5, 0xfffff1, 0x1ffffed, 0x7fff2,
    0x1fffe3, 0x3ffffe6, 0x7ffffe0, 0x7ffffe1, 0x3ffffe7, 0x7ffffe2, 0xfffff2, 0x1fffe4, 0x1fffe5, 0x3ffffe8,
    0x3ffffe9, 0xffffffd, 0x7ffffe3, 0x7ffffe4, 0x7ffffe5, 0xfffec, 0xfffff3, 0xfffed, 0x1fffe6, 0x3fffe9, 0x1fffe7,
    0x1fffe8, 0x7ffff3, 0x3fffea, 0x3fffeb, 0x1ffffee, 0x1ffffef, 0xfffff4, 0xfffff5, 0x3ffffea, 0x7ffff4, 0x3ffffeb,
    0x7ffffe6, 0x3ffffec, 0x3ffffed, 0x7ffffe7, 0x7ffffe8, 0x7ffffe9, 0x7ffffea, 0x7ffffeb, 0xffffffe, 0x7ffffec,
    0x7ffffed, 0x7ffffee, 0x7ffffef, 0x7fffff0, 0x3ffffee,
];

/// Bits of the code of each byte.
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12,
    10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6,
    5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22,
    22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20,
    22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28,
    27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28,
    27, 27, 27, 27, 27, 26,
];

/// Inner nodes of the code tree: one less than its 257 leaves (the 256 bytes, and the end of the
/// string, which no string contains).
const NODES: usize = 256;
/// The transition is invalid: it passes the end of the string.
const INVALID: u16 = 1 << 8;
/// The transition completes a byte. Four bits never complete two: no code is shorter than five.
const EMITS: u16 = 1 << 9;

/// From a node by four bits: the next node (low byte) with `INVALID` and `EMITS`, and the byte.
type DecodeTable = [[(u16, u8); 16]; NODES];

struct Huffman {
    table: Box<DecodeTable>,
    /// Whether a string may end at a node: after at most seven bits, all ones (RFC 7541 section
    /// 5.2).
    may_end: [bool; NODES],
}

/// A child of an inner node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Child {
    None,
    Node(u8),
    Byte(u8),
}

static HUFFMAN: LazyLock<Huffman> = LazyLock::new(Huffman::build);

impl Huffman {
    fn build() -> Huffman {
        let mut children = vec![[Child::None; 2]];
        for byte in 0..=u8::MAX {
            let (code, length) = (CODES[usize::from(byte)], LENGTHS[usize::from(byte)]);
            let mut node = 0;
            for position in (0..length).rev() {
                let bit = (code >> position & 1) as usize;
                if position == 0 {
                    children[node][bit] = Child::Byte(byte);
                    break;
                }
                node = match children[node][bit] {
                    Child::Node(next) => usize::from(next),
                    _ => {
                        children.push([Child::None; 2]);
                        let next = children.len() - 1;
                        children[node][bit] = Child::Node(u8::try_from(next).expect("256 inner nodes"));
                        next
                    }
                };
            }
        }
        let mut table: Box<DecodeTable> = vec![[(INVALID, 0); 16]; NODES].try_into().expect("as many nodes");
        for (node, row) in table.iter_mut().enumerate().take(children.len()) {
            for (bits, transition) in row.iter_mut().enumerate() {
                *transition = walk(&children, node, bits);
            }
        }
        let mut may_end = [false; NODES];
        let mut node = 0;
        for _ in 0..8 {
            may_end[node] = true;
            let Child::Node(next) = children[node][1] else { break };
            node = usize::from(next);
        }
        Huffman { table, may_end }
    }
}

fn walk(children: &[[Child; 2]], mut node: usize, bits: usize) -> (u16, u8) {
    let mut emitted = None;
    for position in (0..4).rev() {
        match children[node][bits >> position & 1] {
            Child::None => return (INVALID, 0),
            Child::Node(next) => node = usize::from(next),
            Child::Byte(byte) => {
                emitted = Some(byte);
                node = 0;
            }
        }
    }
    let next = u16::try_from(node).expect("256 inner nodes");
    emitted.map_or((next, 0), |byte| (next | EMITS, byte))
}

/// Appends the decoded form of `text` to `out`. Returns whether `text` is valid.
pub(super) fn decode(text: &[u8], out: &mut Vec<u8>) -> bool {
    let huffman = &*HUFFMAN;
    // No code is shorter than five bits.
    out.reserve(text.len() * 8 / 5 + 1);
    let mut node = 0;
    for byte in text {
        for bits in [byte >> 4, byte & 15] {
            let (next, emitted) = huffman.table[node][usize::from(bits)];
            if next & INVALID != 0 {
                return false;
            }
            if next & EMITS != 0 {
                out.push(emitted);
            }
            node = usize::from(next & 0xff);
        }
    }
    huffman.may_end[node]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Encodes, which the gateway itself does not do.
    pub(in crate::http::h2) fn encode(text: &[u8]) -> Vec<u8> {
        let (mut out, mut bits, mut count) = (Vec::new(), 0_u64, 0);
        for byte in text {
            bits = bits << LENGTHS[usize::from(*byte)] | u64::from(CODES[usize::from(*byte)]);
            count += LENGTHS[usize::from(*byte)];
            while count >= 8 {
                count -= 8;
                out.push((bits >> count) as u8);
            }
        }
        if count > 0 {
            out.push((bits << (8 - count)) as u8 | (0xff >> count));
        }
        out
    }

    #[test]
    fn malformed_strings_are_refused() {
        let decoded = |text: &[u8]| decode(text, &mut Vec::new());
        assert!(!decoded(&[0xff, 0xff, 0xff, 0xff]), "the end of the string");
        assert!(!decoded(&[0x07 << 2]), "padding with zeros");
        assert!(!decoded(&[0x1f, 0xff]), "padding of more than seven bits");
        assert!(decoded(&[]) && decoded(&[0x1f]), "`a` and three ones");
    }

    #[test]
    fn every_byte_survives() {
        let all: Vec<u8> = (0..=u8::MAX).chain((0..=u8::MAX).rev()).collect();
        for length in 0..all.len() {
            let mut out = b"before ".to_vec();
            assert!(decode(&encode(&all[..length]), &mut out));
            assert_eq!(out[7..], all[..length]);
        }
        // RFC 7541 appendix C.4.1.
        let example = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(encode(b"www.example.com"), example);
    }
}
