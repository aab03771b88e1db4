//! HTTP/2 by hyper: turns its requests into ours and our answers into its own. Framing, flow control and HPACK are hyper's.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;

use super::body::{BodyError, Source};
use super::fields::{Fields, Known};
use super::h1::Refusal;
use super::limits::Limits;
use super::message::{Length, Request, Response, Scheme, Version};

/// The body of an HTTP/2 request.
pub struct RequestBody {
    incoming: Incoming,
    piece: Bytes,
    seen: u64,
    body_max: u64,
}

impl RequestBody {
    pub fn new(incoming: Incoming, limits: &Limits) -> Self {
        RequestBody { incoming, piece: Bytes::new(), seen: 0, body_max: limits.body_bytes }
    }
}

impl Source for RequestBody {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        while self.piece.is_empty() {
            match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
                None => break,
                Some(Err(_)) => return Poll::Ready(Err(BodyError::Truncated)),
                Some(Ok(frame)) => self.piece = frame.into_data().unwrap_or_default(),
            }
            self.seen += self.piece.len() as u64;
            if self.seen > self.body_max {
                return Poll::Ready(Err(BodyError::TooLarge));
            }
        }
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        &self.piece
    }

    fn consume(&mut self, count: usize) {
        self.piece.advance(count);
    }
}

/// Fills `request` from an HTTP/2 head (RFC 9113 section 8.3).
///
/// # Errors
/// What HTTP/1.1 would refuse is refused here too, so that nothing else can reach an origin.
pub fn read_head(
    parts: &http::request::Parts,
    body: &Incoming,
    limits: &Limits,
    request: &mut Request,
) -> Result<(), Refusal> {
    request.clear();
    request.version = Version::Http2;
    request.method = parts.method.clone();
    if matches!(parts.method, http::Method::CONNECT | http::Method::TRACE) {
        return Err(Refusal::Method);
    }
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
    if target.len() > limits.uri_bytes {
        return Err(Refusal::TargetTooLong);
    }
    if !(target.starts_with('/') || target == "*") || !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Refusal::Target);
    }
    request.set_target(target);
    if parts.headers.len() > limits.header_fields {
        return Err(Refusal::TooManyFields);
    }
    for (name, value) in &parts.headers {
        request.fields.push(name.as_str().as_bytes(), value.as_bytes().trim_ascii());
    }
    join_cookies(&mut request.fields);
    set_authority(parts.uri.authority().map(|authority| authority.as_str()), request)?;
    request.scheme = if parts.uri.scheme_str() == Some("http") { Scheme::Http } else { Scheme::Https };
    request.length = match (body.is_end_stream(), body.size_hint().exact()) {
        (true, _) => Length::Empty,
        (false, Some(length)) if length > limits.body_bytes => return Err(Refusal::BodyTooLarge),
        (false, Some(length)) => Length::Known(length),
        (false, None) => Length::Streamed,
    };
    if limits.refuses_body(&request.method, request.length) {
        return Err(Refusal::BodyOfGet);
    }
    Ok(())
}

/// HTTP/2 may split `Cookie` over lines; HTTP/1.1 wants one (RFC 9113 section 8.2.3).
fn join_cookies(fields: &mut Fields) {
    if fields.all(Known::Cookie).nth(1).is_some() {
        let joined = fields.all(Known::Cookie).collect::<Vec<_>>().join(&b"; "[..]);
        fields.set(Known::Cookie, joined);
    }
}

fn set_authority(pseudo: Option<&str>, request: &mut Request) -> Result<(), Refusal> {
    let mut hosts = request.fields.all(Known::Host);
    let host = hosts.next().map(|host| String::from_utf8_lossy(host).into_owned());
    if hosts.next().is_some() {
        return Err(Refusal::RepeatedHost);
    }
    let authority = match (pseudo, &host) {
        (Some(pseudo), Some(host)) if !pseudo.eq_ignore_ascii_case(host) => return Err(Refusal::HostMismatch),
        (Some(pseudo), _) => pseudo,
        (None, Some(host)) => host,
        (None, None) => return Err(Refusal::NoHost),
    };
    if !super::h1::is_authority(authority) {
        return Err(Refusal::BadHost);
    }
    request.authority.extend(authority.chars().map(|c| c.to_ascii_lowercase()));
    Ok(())
}

/// Turns our answer's head into hyper's. Fields that HTTP/2 forbids never get this far: `hop` removed them.
///
/// # Errors
/// A status or field that the `http` crate refuses; the caller answers 502.
pub fn write_head<B>(response: &Response, body: B) -> Result<http::Response<B>, http::Error> {
    let mut head = http::Response::builder().status(response.status);
    for field in response.fields.iter() {
        if !matches!(field.known, Some(Known::ContentLength | Known::TransferEncoding | Known::Connection)) {
            head = head.header(field.name, field.value);
        }
    }
    if let Length::Known(length) = response.length {
        head = head.header("content-length", length);
    }
    head.body(body)
}

/// Carries a `Source` as hyper's body. `limit` bytes at most leave in one frame's copy.
pub struct Outgoing<S> {
    source: Option<S>,
    left: Option<u64>,
    ended: bool,
}

impl<S: Source> Outgoing<S> {
    /// `length` is what the head announced; a bodiless answer is `Empty`.
    pub fn new(source: S, length: Length) -> Self {
        let left = match length {
            Length::Empty => Some(0),
            Length::Known(length) => Some(length),
            Length::Streamed | Length::UntilClose => None,
        };
        Outgoing { source: Some(source), left, ended: left == Some(0) }
    }

    /// No body at all.
    pub fn nothing() -> Self {
        Outgoing { source: None, left: Some(0), ended: true }
    }
}

/// Bytes copied into one frame at most.
const FRAME_MAX: usize = 64 << 10;

impl<S: Source + Unpin> http_body::Body for Outgoing<S> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let Some(source) = this.source.as_mut().filter(|_| !this.ended) else { return Poll::Ready(None) };
        if let Err(error) = ready!(source.poll_fill(cx)) {
            this.ended = true;
            return Poll::Ready(Some(Err(error)));
        }
        let data = source.data();
        if data.is_empty() {
            this.ended = true;
            return Poll::Ready(this.left.map(|_| Err(BodyError::Truncated)));
        }
        let allowed = this.left.map_or(FRAME_MAX, |left| usize::try_from(left).unwrap_or(FRAME_MAX).min(FRAME_MAX));
        let piece = Bytes::copy_from_slice(&data[..data.len().min(allowed)]);
        source.consume(piece.len());
        if let Some(left) = &mut this.left {
            *left -= piece.len() as u64;
            this.ended = *left == 0;
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
