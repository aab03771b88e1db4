//! HTTPS client of the response check: curl, one process for each request.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::bench::client::CheckedResponse;

/// Requests over TLS to one address, with HTTP/1.1 or HTTP/2.
pub(crate) struct CurlClient {
    pub(crate) program: PathBuf,
    pub(crate) address: SocketAddr,
    pub(crate) is_http2: bool,
}

impl CurlClient {
    pub(crate) fn get(&self, target: &str) -> io::Result<CheckedResponse> {
        let (option, version) = if self.is_http2 { ("--http2", "2") } else { ("--http1.1", "1.1") };
        let mut curl = Command::new(&self.program);
        curl.args(["--silent", "--show-error", "--insecure", "--include", "--max-time", "5", option]);
        let output = curl.arg(format!("https://{}{target}", self.address)).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
        }
        parse(&output.stdout, version).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a response"))
    }
}

/// Parses head and body as curl prints them.
fn parse(output: &[u8], version: &str) -> Option<CheckedResponse> {
    let end = memchr::memmem::find(output, b"\r\n\r\n")?;
    let head = std::str::from_utf8(&output[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let (protocol, rest) = lines.next()?.split_once(' ')?;
    let status = (protocol.strip_prefix("HTTP/")? == version).then(|| rest.get(..3)?.parse().ok())??;
    let etag = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("etag").then(|| value.trim().to_owned())
    });
    Some(CheckedResponse { status, etag, body: output[end + 4..].to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn response_of_another_protocol_is_rejected() {
        let output = b"HTTP/2 200 \r\nETag: \"a\"\r\nx: y\r\n\r\nbody";
        assert!(parse(output, "1.1").is_none());
        let response = parse(output, "2").expect("a response");
        assert_eq!((response.status, response.etag.as_deref(), &response.body[..]), (200, Some("\"a\""), &b"body"[..]));
        for text in [&b""[..], b"HTTP/2 200 \r\n", b"HTTP/2 2\r\n\r\n", b"SSH-2.0\r\n\r\n"] {
            assert!(parse(text, "2").is_none());
        }
    }
}
