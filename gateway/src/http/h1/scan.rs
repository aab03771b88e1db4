//! Finds the end of a head as its bytes arrive, reading each byte once.
//!
//! Every line must end in CRLF: a bare LF is refused the moment it is seen (RFC 9112 section 2.2 lets us), because
//! peers that disagree on line ends are the root of request smuggling.

/// Where the search stands in the bytes received so far.
#[derive(Debug, Default)]
pub(super) struct Scan {
    line_start: usize,
    at: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The head's length, its empty line included.
    Whole(usize),
    /// More bytes are needed; `lines` says whether the first line is complete.
    Partial { first_line_done: bool },
    /// A line ended in LF alone.
    BareLf,
}

impl Scan {
    /// Looks at `data`, which starts where it started last time and may have grown.
    pub(super) fn advance(&mut self, data: &[u8]) -> Found {
        while let Some(offset) = memchr::memchr(b'\n', &data[self.at..]) {
            let lf = self.at + offset;
            if lf == 0 || data[lf - 1] != b'\r' {
                return Found::BareLf;
            }
            let is_empty = lf - 1 == self.line_start;
            self.at = lf + 1;
            self.line_start = lf + 1;
            if is_empty {
                return Found::Whole(lf + 1);
            }
        }
        self.at = data.len();
        Found::Partial { first_line_done: self.line_start > 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_lf_is_seen_at_once() {
        assert_eq!(Scan::default().advance(b"GET / HTTP/1.1\n"), Found::BareLf);
        assert_eq!(Scan::default().advance(b"\n"), Found::BareLf);
        assert_eq!(Scan::default().advance(b"GET / HTTP/1.1\r\nA: b\n\r\n"), Found::BareLf);
    }

    #[test]
    fn one_byte_at_a_time_finds_the_same_end() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nrest";
        let mut scan = Scan::default();
        let whole = (1..=head.len()).find_map(|len| match scan.advance(&head[..len]) {
            Found::Whole(end) => Some((len, end)),
            _ => None,
        });
        assert_eq!(whole, Some((head.len() - 4, head.len() - 4)));
        assert_eq!(Scan::default().advance(head), Found::Whole(head.len() - 4));
    }
}
