//! The body of a response of the API server: whole, or line by line. Both are bounded.

use std::future::poll_fn;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http_body::Body as _;
use kube::client::Body;
use tokio::time::timeout;

use super::api_error::{ApiError, error_chain};

/// Largest page of a list. A page has 100 slices, which have 100 endpoints as the controller makes
/// them: about 4 MiB.
pub(super) const PAGE_BYTES_MAX: usize = 16 << 20;
/// Longest line of a watch, which is one slice: etcd stores no object of more than 1.5 MiB.
const LINE_BYTES_MAX: usize = 4 << 20;
/// Of the body of an error.
pub(super) const ERROR_BYTES_MAX: usize = 64 << 10;

/// The next bytes of a body; `None` at its end. Cancel safe.
async fn next_data(body: &mut Body) -> Result<Option<Bytes>, ApiError> {
    loop {
        match poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
            None => return Ok(None),
            Some(Err(error)) => return Err(ApiError::Broken(error_chain(&error))),
            // Trailers are not used.
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => return Ok(Some(data)),
                Err(_trailers) => continue,
            },
        }
    }
}

/// The whole body.
///
/// # Errors
/// It is longer than `limit`, or broken.
pub(super) async fn read_all(mut body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut whole = Vec::new();
    while let Some(data) = next_data(&mut body).await? {
        if whole.len() + data.len() > limit {
            return Err(ApiError::TooLarge(limit));
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole)
}

/// The lines of a watch.
pub(super) struct WatchLines {
    body: Body,
    /// Bytes that arrived, from the line on that is to be returned next.
    buffer: Vec<u8>,
    /// Of them, those that have no line end.
    scanned: usize,
    /// A connection that is silent for longer is dead.
    silence_max: Duration,
}

impl WatchLines {
    pub(super) fn new(body: Body, silence_max: Duration) -> Self {
        WatchLines { body, buffer: Vec::new(), scanned: 0, silence_max }
    }

    /// The next line without its end; `None` at the end of the body. Bytes behind the last line
    /// end are a line that was cut off, which the next watch repeats. Cancel safe.
    ///
    /// # Errors
    /// The line is too long, nothing arrives in time, or the connection breaks.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, ApiError> {
        loop {
            if let Some(end) = memchr::memchr(b'\n', &self.buffer[self.scanned..]) {
                let rest = self.buffer.split_off(self.scanned + end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                self.scanned = 0;
                line.pop();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Some(line));
            }
            self.scanned = self.buffer.len();
            if self.scanned > LINE_BYTES_MAX {
                return Err(ApiError::TooLarge(LINE_BYTES_MAX));
            }
            match timeout(self.silence_max, next_data(&mut self.body)).await {
                Err(_) => return Err(ApiError::Stalled),
                Ok(data) => match data? {
                    Some(data) => self.buffer.extend_from_slice(&data),
                    None => return Ok(None),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_split_and_a_cut_one_is_left_out() {
        let body = Body::from(b"{\"a\":1}\n\n  \r\n{\"b\":2}\r\n{\"c\":".to_vec());
        let mut lines = WatchLines::new(body, Duration::from_secs(5));
        assert_eq!(lines.next().await.expect("a line").as_deref(), Some(&b"{\"a\":1}"[..]));
        assert_eq!(lines.next().await.expect("a line").as_deref(), Some(&b"{\"b\":2}\r"[..]));
        assert_eq!(lines.next().await.expect("the end"), None);
    }

    #[tokio::test]
    async fn bodies_and_lines_are_bounded() {
        let long = || Body::from(vec![b'x'; LINE_BYTES_MAX + 1]);
        assert!(matches!(read_all(long(), LINE_BYTES_MAX).await, Err(ApiError::TooLarge(_))));
        assert_eq!(read_all(long(), LINE_BYTES_MAX + 1).await.expect("the whole body").len(), LINE_BYTES_MAX + 1);
        let mut lines = WatchLines::new(long(), Duration::from_secs(5));
        assert!(matches!(lines.next().await, Err(ApiError::TooLarge(_))));
    }
}
