//! A blocking HTTP/1.1 client of the field cases: any method, fields and body, one connection.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::load::response_reader::{Keep, ResponseReader};

/// Far above any wait of a case on a busy machine.
pub(crate) const STEP_TIMEOUT: Duration = Duration::from_secs(15);

/// A connection to a server; it is opened again after an error or the server's close.
pub(crate) struct CaseClient {
    address: SocketAddr,
    stream: Option<TcpStream>,
}

impl CaseClient {
    pub(crate) fn new(address: SocketAddr) -> Self {
        CaseClient { address, stream: None }
    }

    /// Whether the next request uses the connection of the last one.
    pub(crate) fn is_open(&self) -> bool {
        self.stream.is_some()
    }

    /// A GET with further lines of fields, each with its end.
    pub(crate) fn get(&mut self, target: &str, fields: &str) -> io::Result<ResponseReader> {
        let request = format!("GET {target} HTTP/1.1\r\nHost: {}\r\n{fields}\r\n", self.address);
        self.send(request.as_bytes())
    }

    pub(crate) fn post(&mut self, target: &str, (fields, body): (&str, &str)) -> io::Result<ResponseReader> {
        let (host, length) = (self.address, body.len());
        let head = format!("POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n{fields}\r\n");
        self.send((head + body).as_bytes())
    }

    /// Sends the bytes of a request and reads the response.
    pub(crate) fn send(&mut self, request: &[u8]) -> io::Result<ResponseReader> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => open(self.address)?,
        };
        let mut response = ResponseReader::new(Keep::All, request.starts_with(b"HEAD "));
        stream.write_all(request)?;
        let mut buffer = [0; 8_192];
        while !response.is_complete() {
            match stream.read(&mut buffer)? {
                0 => response.end()?,
                length => response.feed(&buffer[..length])?,
            }
        }
        if response.is_reusable {
            self.stream = Some(stream);
        }
        Ok(response)
    }
}

/// A connection with timeouts.
pub(crate) fn open(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, STEP_TIMEOUT)?;
    stream.set_read_timeout(Some(STEP_TIMEOUT))?;
    stream.set_write_timeout(Some(STEP_TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
