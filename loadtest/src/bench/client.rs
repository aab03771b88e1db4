//! HTTP client of the response check: one connection, one GET at a time, responses with
//! Content-Length only.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Timeout of each step of an exchange; a peer that exceeds it on an idle machine is broken.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Far above the size of any requested body.
const BODY_BYTES_MAX: u64 = 64 << 20;
const LINE_BYTES_MAX: u64 = 16 << 10;
const FIELDS_MAX: usize = 100;

/// A keep-alive connection to a peer with a timeout of `TIMEOUT` for each step, and the address for
/// the `Host` field.
pub(crate) struct CheckConnection {
    address: SocketAddr,
    stream: BufReader<TcpStream>,
}

/// Status, entity tag and complete body (at most `BODY_BYTES_MAX`) of one response.
#[derive(Debug)]
pub(crate) struct CheckedResponse {
    pub(crate) status: u16,
    pub(crate) etag: Option<String>,
    pub(crate) body: Vec<u8>,
}

impl CheckConnection {
    pub(crate) fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.set_nodelay(true)?;
        Ok(CheckConnection { address, stream: BufReader::new(stream) })
    }

    pub(crate) fn get(&mut self, target: &str) -> io::Result<CheckedResponse> {
        // The same Host as wrk sends: it is part of most caches' keys.
        let request = format!("GET {target} HTTP/1.1\r\nHost: {}\r\n\r\n", self.address);
        self.stream.get_mut().write_all(request.as_bytes())?;
        read_response(&mut self.stream)
    }
}

fn read_response(stream: &mut impl BufRead) -> io::Result<CheckedResponse> {
    let start = read_line(stream)?;
    let status = start.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
    let mut response = CheckedResponse {
        status: status.ok_or_else(|| invalid_data("not a status line"))?,
        etag: None,
        body: Vec::new(),
    };
    let mut length = None;
    for _ in 0..FIELDS_MAX {
        let field = read_line(stream)?;
        let Some((name, value)) = field.split_once(':') else {
            if !field.is_empty() {
                return Err(invalid_data("field without colon"));
            }
            let length: u64 = length.ok_or_else(|| invalid_data("no Content-Length"))?;
            stream.take(length).read_to_end(&mut response.body)?;
            let is_complete = u64::try_from(response.body.len()) == Ok(length);
            return if is_complete { Ok(response) } else { Err(invalid_data("truncated body")) };
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok().filter(|length| *length <= BODY_BYTES_MAX);
        } else if name.eq_ignore_ascii_case("etag") {
            response.etag = Some(value.trim().to_owned());
        }
    }
    Err(invalid_data("too many fields"))
}

fn read_line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    stream.take(LINE_BYTES_MAX).read_line(&mut line)?;
    line.strip_suffix("\r\n").map(str::to_owned).ok_or_else(|| invalid_data("truncated or too long line"))
}

fn invalid_data(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(text: &str) -> String {
        read_response(&mut text.as_bytes()).expect_err(text).to_string()
    }

    #[test]
    fn truncated_or_unframed_responses_are_errors() {
        assert_eq!(error_of(""), "truncated or too long line");
        assert_eq!(error_of("SSH-2.0\r\n"), "not a status line");
        assert_eq!(error_of("HTTP/1.1 200 OK\r\n\r\n"), "no Content-Length");
        assert_eq!(error_of("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc"), "truncated body");
        assert_eq!(error_of(&format!("HTTP/1.1 200 OK\r\n{}", "a: b\r\n".repeat(101))), "too many fields");
    }

    #[test]
    fn response_ends_at_its_content_length() {
        let mut stream = b"HTTP/1.1 429 No\r\nETag: \"x\"\r\ncontent-length:3\r\n\r\nabcHTTP/1.1".as_slice();
        let response = read_response(&mut stream).expect("a complete response");
        assert_eq!(
            (response.status, response.etag.as_deref(), response.body.as_slice()),
            (429, Some("\"x\""), &b"abc"[..])
        );
        assert_eq!(stream, b"HTTP/1.1");
    }
}
