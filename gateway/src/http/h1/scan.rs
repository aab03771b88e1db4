//! Finds the end of a head as its bytes arrive; reads each byte once.
//!
//! Every line must end in CRLF. A bare LF is refused at once, as RFC 9112 section 2.2 allows: peers
//! that disagree on line ends are the root of request smuggling.

/// The position of the search in the bytes received so far.
#[derive(Debug, Default)]
pub(super) struct HeadScanner {
    line_start: usize,
    at: usize,
}

/// Result of scanning the bytes received so far for the end of a head.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ScanResult {
    /// The head's length, its empty line included.
    Complete(usize),
    /// More bytes are needed; `first_line_complete` says whether the first line has ended.
    Partial { first_line_complete: bool },
    /// A line ended in LF alone.
    BareLf,
}

impl HeadScanner {
    /// Continues the search. `data` starts at the same byte as in the previous call and may have
    /// grown.
    pub(super) fn advance(&mut self, data: &[u8]) -> ScanResult {
        while let Some(offset) = memchr::memchr(b'\n', &data[self.at..]) {
            let lf = self.at + offset;
            if lf == 0 || data[lf - 1] != b'\r' {
                return ScanResult::BareLf;
            }
            let is_empty = lf - 1 == self.line_start;
            self.at = lf + 1;
            self.line_start = lf + 1;
            if is_empty {
                return ScanResult::Complete(lf + 1);
            }
        }
        self.at = data.len();
        ScanResult::Partial { first_line_complete: self.line_start > 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_lf_is_found_at_once() {
        assert_eq!(HeadScanner::default().advance(b"GET / HTTP/1.1\n"), ScanResult::BareLf);
        assert_eq!(HeadScanner::default().advance(b"\n"), ScanResult::BareLf);
        assert_eq!(HeadScanner::default().advance(b"GET / HTTP/1.1\r\nA: b\n\r\n"), ScanResult::BareLf);
    }

    #[test]
    fn byte_by_byte_scan_finds_the_same_end() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nrest";
        let mut scan = HeadScanner::default();
        let complete = (1..=head.len()).find_map(|len| match scan.advance(&head[..len]) {
            ScanResult::Complete(end) => Some((len, end)),
            _ => None,
        });
        assert_eq!(complete, Some((head.len() - 4, head.len() - 4)));
        assert_eq!(HeadScanner::default().advance(head), ScanResult::Complete(head.len() - 4));
    }
}
