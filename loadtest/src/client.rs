//! A client that checks answers: one connection, one GET at a time, answers with a Content-Length only.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// For each step of an exchange; a peer that takes longer on an idle machine is broken.
const PATIENCE: Duration = Duration::from_secs(5);
/// Far above any body that is asked for here.
const BODY_BYTES_MAX: u64 = 64 << 20;
const LINE_BYTES_MAX: u64 = 16 << 10;
const FIELDS_MAX: usize = 100;

pub(crate) struct Connection {
    address: SocketAddr,
    stream: BufReader<TcpStream>,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) etag: Option<String>,
    pub(crate) body: Vec<u8>,
}

impl Connection {
    pub(crate) fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Connection { address, stream: BufReader::new(stream) })
    }

    pub(crate) fn get(&mut self, target: &str) -> io::Result<Answer> {
        // The Host that wrk sends: most caches have it in their key.
        let request = format!("GET {target} HTTP/1.1\r\nHost: {}\r\n\r\n", self.address);
        self.stream.get_mut().write_all(request.as_bytes())?;
        read_answer(&mut self.stream)
    }
}

fn read_answer(stream: &mut impl BufRead) -> io::Result<Answer> {
    let start = line(stream)?;
    let status = start.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
    let mut answer = Answer { status: status.ok_or_else(|| bad("not a status line"))?, etag: None, body: Vec::new() };
    let mut length = None;
    for _ in 0..FIELDS_MAX {
        let field = line(stream)?;
        let Some((name, value)) = field.split_once(':') else {
            if !field.is_empty() {
                return Err(bad("a field without colon"));
            }
            let length: u64 = length.ok_or_else(|| bad("no Content-Length"))?;
            stream.take(length).read_to_end(&mut answer.body)?;
            let is_whole = u64::try_from(answer.body.len()) == Ok(length);
            return if is_whole { Ok(answer) } else { Err(bad("the body ends early")) };
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok().filter(|length| *length <= BODY_BYTES_MAX);
        } else if name.eq_ignore_ascii_case("etag") {
            answer.etag = Some(value.trim().to_owned());
        }
    }
    Err(bad("too many fields"))
}

fn line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    stream.take(LINE_BYTES_MAX).read_line(&mut line)?;
    line.strip_suffix("\r\n").map(str::to_owned).ok_or_else(|| bad("a line is cut or too long"))
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> String {
        read_answer(&mut text.as_bytes()).expect_err(text).to_string()
    }

    #[test]
    fn cut_or_unframed_answers_are_errors() {
        assert_eq!(fault(""), "a line is cut or too long");
        assert_eq!(fault("SSH-2.0\r\n"), "not a status line");
        assert_eq!(fault("HTTP/1.1 200 OK\r\n\r\n"), "no Content-Length");
        assert_eq!(fault("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc"), "the body ends early");
        assert_eq!(fault(&format!("HTTP/1.1 200 OK\r\n{}", "a: b\r\n".repeat(101))), "too many fields");
    }

    #[test]
    fn an_answer_ends_where_its_length_says() {
        let mut stream = b"HTTP/1.1 429 No\r\nETag: \"x\"\r\ncontent-length:3\r\n\r\nabcHTTP/1.1".as_slice();
        let answer = read_answer(&mut stream).expect("a whole answer");
        assert_eq!((answer.status, answer.etag.as_deref(), answer.body.as_slice()), (429, Some("\"x\""), &b"abc"[..]));
        assert_eq!(stream, b"HTTP/1.1");
    }
}
