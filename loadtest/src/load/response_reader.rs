//! Reads an HTTP/1.1 response from the bytes of a connection: its framing by length, by chunks or
//! by the end of the connection.

use std::io;

/// Largest head, and largest line of a chunk's size.
const HEAD_BYTES_MAX: usize = 64 << 10;
const LINE_BYTES_MAX: usize = 4 << 10;
const FIELDS_MAX: usize = 128;

/// The parts of a response that a reader keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// The status.
    Status,
    /// Fields and body too.
    All,
}

/// A response as it arrives. `feed` is called with the bytes of the connection until `is_complete`.
#[derive(Debug)]
pub(crate) struct ResponseReader {
    keep: Keep,
    is_head: bool,
    state: ReadState,
    /// Bytes of an incomplete head or line.
    pending: Vec<u8>,
    pub(crate) status: u16,
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) is_reusable: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadState {
    Head,
    Sized(u64),
    ChunkSize,
    Chunk(u64),
    ChunkEnd,
    Trailers,
    UntilEnd,
    Complete,
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

impl ResponseReader {
    /// `is_head`: the request was a HEAD, whose response has no body.
    pub(crate) fn new(keep: Keep, is_head: bool) -> Self {
        ResponseReader {
            keep,
            is_head,
            state: ReadState::Head,
            pending: Vec::new(),
            status: 0,
            fields: Vec::new(),
            body: Vec::new(),
            is_reusable: true,
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.state == ReadState::Complete
    }

    /// The first value of a field, by its name in lower case.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    /// The connection has ended.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        self.is_reusable = false;
        match self.state {
            ReadState::Complete => Ok(()),
            ReadState::UntilEnd => {
                self.state = ReadState::Complete;
                Ok(())
            }
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Reads all of `bytes`. Bytes behind the response are an error: one request is in progress.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let used = match self.state {
                ReadState::Complete => return Err(invalid("bytes behind the response")),
                ReadState::Head => self.head(bytes)?,
                ReadState::UntilEnd => self.body(bytes, u64::MAX),
                ReadState::Sized(left) => {
                    let used = self.body(bytes, left);
                    let left = left - used as u64;
                    self.state = if left == 0 { ReadState::Complete } else { ReadState::Sized(left) };
                    used
                }
                ReadState::Chunk(left) => {
                    let used = self.body(bytes, left);
                    let left = left - used as u64;
                    self.state = if left == 0 { ReadState::ChunkEnd } else { ReadState::Chunk(left) };
                    used
                }
                ReadState::ChunkSize | ReadState::ChunkEnd | ReadState::Trailers => self.line(bytes)?,
            };
            bytes = &bytes[used..];
        }
        Ok(())
    }

    fn body(&mut self, bytes: &[u8], left: u64) -> usize {
        let used = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        if self.keep == Keep::All {
            self.body.extend_from_slice(&bytes[..used]);
        }
        used
    }

    /// Collects the head; returns the bytes that belong to it.
    fn head(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let before = self.pending.len();
        self.pending.extend_from_slice(bytes);
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut response = httparse::Response::new(&mut fields);
        let length = match response.parse(&self.pending) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) if self.pending.len() > HEAD_BYTES_MAX => {
                return Err(invalid("a head too long"));
            }
            Ok(httparse::Status::Partial) => return Ok(bytes.len()),
            Err(_) => return Err(invalid("not an HTTP response")),
        };
        let status = response.code.ok_or_else(|| invalid("no status"))?;
        let closes_by_default = response.version == Some(0);
        let mut framing = Framing { closes: closes_by_default, ..Framing::default() };
        for field in response.headers.iter() {
            framing.read(field.name, field.value)?;
            if self.keep == Keep::All {
                let value = String::from_utf8_lossy(field.value).into_owned();
                self.fields.push((field.name.to_ascii_lowercase(), value));
            }
        }
        self.pending.clear();
        if (100..200).contains(&status) && status != 101 {
            self.fields.clear();
            return Ok(length - before);
        }
        self.status = status;
        self.is_reusable = !framing.closes;
        self.state = match framing {
            _ if self.is_head || matches!(status, 101 | 204 | 304) => ReadState::Complete,
            Framing { is_chunked: true, .. } => ReadState::ChunkSize,
            Framing { length: Some(0), .. } => ReadState::Complete,
            Framing { length: Some(length), .. } => ReadState::Sized(length),
            _ => {
                self.is_reusable = false;
                ReadState::UntilEnd
            }
        };
        Ok(length - before)
    }

    /// Reads a line of the chunked coding.
    fn line(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let end = memchr::memchr(b'\n', bytes);
        let used = end.map_or(bytes.len(), |end| end + 1);
        self.pending.extend_from_slice(&bytes[..used]);
        if self.pending.len() > LINE_BYTES_MAX {
            return Err(invalid("a line of a chunk too long"));
        }
        if end.is_none() {
            return Ok(used);
        }
        let line = std::mem::take(&mut self.pending);
        let line = line.trim_ascii();
        self.state = match self.state {
            ReadState::ChunkSize => match chunk_size(line)? {
                0 => ReadState::Trailers,
                size => ReadState::Chunk(size),
            },
            ReadState::ChunkEnd if line.is_empty() => ReadState::ChunkSize,
            ReadState::ChunkEnd => return Err(invalid("a chunk longer than its size")),
            _ if line.is_empty() => ReadState::Complete,
            state => state,
        };
        Ok(used)
    }
}

fn chunk_size(line: &[u8]) -> io::Result<u64> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let text = std::str::from_utf8(digits).map_err(|_| invalid("not the size of a chunk"))?;
    u64::from_str_radix(text, 16).map_err(|_| invalid("not the size of a chunk"))
}

/// The fields that say how a response ends.
#[derive(Clone, Copy, Debug, Default)]
struct Framing {
    length: Option<u64>,
    is_chunked: bool,
    closes: bool,
}

impl Framing {
    fn read(&mut self, name: &str, value: &[u8]) -> io::Result<()> {
        let text = || std::str::from_utf8(value).unwrap_or_default().trim();
        if name.eq_ignore_ascii_case("content-length") {
            self.length = Some(text().parse().map_err(|_| invalid("not a Content-Length"))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            self.is_chunked = text().to_ascii_lowercase().ends_with("chunked");
        } else if name.eq_ignore_ascii_case("connection") {
            self.closes |= text().split(',').any(|option| option.trim().eq_ignore_ascii_case("close"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `text` in pieces of each size.
    fn read(text: &str) -> io::Result<ResponseReader> {
        let mut last = None;
        for size in [1, 2, 7, text.len().max(1)] {
            let mut reader = ResponseReader::new(Keep::All, false);
            for piece in text.as_bytes().chunks(size) {
                reader.feed(piece)?;
            }
            if !reader.is_complete() {
                reader.end()?;
            }
            last = Some(reader);
        }
        Ok(last.expect("a size"))
    }

    #[test]
    fn broken_responses_are_errors() {
        for text in [
            "",
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\ng\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn body_ends_by_length_chunks_or_the_connection() {
        for (text, body, is_reusable) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc", true),
            ("HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 0\r\n\r\n", "", false),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nab\r\n1\r\nc\r\n0\r\nx: y\r\n\r\n",
                "abc",
                true,
            ),
            ("HTTP/1.1 200 OK\r\n\r\nabc", "abc", false),
            ("HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc", false),
            ("HTTP/1.1 103 Hints\r\nA: b\r\n\r\nHTTP/1.1 204 No\r\nC: d\r\n\r\n", "", true),
        ] {
            let response = read(text).expect(text);
            assert_eq!((response.body.as_slice(), response.is_reusable), (body.as_bytes(), is_reusable), "{text}");
            assert_eq!(response.field("a"), None);
        }
    }

    #[test]
    fn response_of_head_has_no_body() {
        let mut reader = ResponseReader::new(Keep::Status, true);
        reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n").expect("a head");
        assert!(reader.is_complete() && reader.is_reusable && reader.status == 200);
    }
}
