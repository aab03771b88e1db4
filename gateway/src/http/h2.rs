//! HTTP/2 on hyper: converts hyper's requests into `Request` and `Response` into hyper's responses.
//! hyper does framing, flow control and HPACK.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;

use super::body::{BodyError, BodySource};
use super::deadline::ResettableDeadline;
use super::exchange_clock::ExchangeTimeout;
use super::fields::{Fields, KnownField};
use super::head;
use super::limits::HttpLimits;
use super::message::{BodyLength, HttpVersion, Request, Response, Scheme};
use super::refusal::RequestRefusal;

/// The body of an HTTP/2 request.
pub(crate) struct Http2RequestBody {
    incoming: Incoming,
    frame_data: Bytes,
    received_bytes: u64,
    body_max: u64,
    /// Runs only while the gateway waits for the client.
    deadline: ResettableDeadline,
    idle_timeout: Duration,
}

impl Http2RequestBody {
    pub(crate) fn new(incoming: Incoming, limits: &HttpLimits) -> Self {
        let (body_max, idle_timeout) = (limits.body_bytes_max(), limits.idle_timeout);
        let deadline = ResettableDeadline::after(idle_timeout);
        Http2RequestBody { incoming, frame_data: Bytes::new(), received_bytes: 0, body_max, deadline, idle_timeout }
    }

    /// Lowers the limit of the body's size.
    pub(crate) fn limit(&mut self, bytes: u64) {
        self.body_max = self.body_max.min(bytes);
    }
}

impl BodySource for Http2RequestBody {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        while self.frame_data.is_empty() {
            match Pin::new(&mut self.incoming).poll_frame(cx) {
                Poll::Pending => {
                    ready!(self.deadline.poll(cx));
                    return Poll::Ready(Err(BodyError::Timeout(ExchangeTimeout::ClientBody)));
                }
                Poll::Ready(None) => break,
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Err(BodyError::Truncated)),
                Poll::Ready(Some(Ok(frame))) => self.frame_data = frame.into_data().unwrap_or_default(),
            }
            self.deadline.restart(self.idle_timeout);
            self.received_bytes += self.frame_data.len() as u64;
            if self.received_bytes > self.body_max {
                return Poll::Ready(Err(BodyError::TooLarge));
            }
        }
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        &self.frame_data
    }

    fn consume(&mut self, count: usize) {
        // The client is not late while the gateway does not consume its bytes.
        self.deadline.restart(self.idle_timeout);
        self.frame_data.advance(count);
    }
}

/// Fills `request` from an HTTP/2 head (RFC 9113 section 8.3).
///
/// # Errors
/// Refuses what the HTTP/1.1 engine refuses, so that both protocols pass the same requests to an
/// origin.
pub(crate) fn read_head(
    parts: &http::request::Parts,
    body: &Incoming,
    limits: &HttpLimits,
    request: &mut Request,
) -> Result<(), RequestRefusal> {
    request.clear();
    request.version = HttpVersion::Http2;
    request.method = parts.method.clone();
    head::check_method(&request.method)?;
    head::set_target(parts.uri.path_and_query().map_or("/", |target| target.as_str()), limits, request)?;
    if parts.headers.len() > limits.header_fields {
        return Err(RequestRefusal::TooManyFields);
    }
    for (name, value) in &parts.headers {
        request.fields.push(name.as_str().as_bytes(), value.as_bytes().trim_ascii());
    }
    join_cookies(&mut request.fields);
    set_authority(parts.uri.authority().map(|authority| authority.as_str()), request)?;
    head::expects_continue(request)?;
    request.scheme = if parts.uri.scheme_str() == Some("http") { Scheme::Http } else { Scheme::Https };
    request.length = match (body.is_end_stream(), body.size_hint().exact()) {
        (true, _) => BodyLength::Empty,
        (false, Some(length)) if length > limits.body_bytes_max() => return Err(RequestRefusal::BodyTooLarge),
        (false, Some(length)) => BodyLength::Known(length),
        (false, None) => BodyLength::Streamed,
    };
    if limits.refuses_body(&request.method, request.length) {
        return Err(RequestRefusal::BodyOfGet);
    }
    Ok(())
}

/// HTTP/2 may split `Cookie` into several lines; HTTP/1.1 requires one (RFC 9113 section 8.2.3).
fn join_cookies(fields: &mut Fields) {
    if fields.all(KnownField::Cookie).nth(1).is_some() {
        let joined = fields.all(KnownField::Cookie).collect::<Vec<_>>().join(&b"; "[..]);
        fields.set(KnownField::Cookie, joined);
    }
}

fn set_authority(pseudo: Option<&str>, request: &mut Request) -> Result<(), RequestRefusal> {
    let mut hosts = request.fields.all(KnownField::Host);
    let host = hosts.next().map(|host| String::from_utf8_lossy(host).into_owned());
    if hosts.next().is_some() {
        return Err(RequestRefusal::RepeatedHost);
    }
    let Some(authority) = pseudo.or(host.as_deref()) else { return Err(RequestRefusal::NoHost) };
    if let Some(host) = &host {
        head::set_authority(host, &mut request.authority)?;
    }
    let from_host = std::mem::take(&mut request.authority);
    head::set_authority(authority, &mut request.authority)?;
    // RFC 9113 section 8.3.1.
    if host.is_some() && from_host != request.authority {
        return Err(RequestRefusal::HostMismatch);
    }
    Ok(())
}

/// Converts a response head into hyper's. `hop` has already removed the fields that HTTP/2 forbids.
///
/// # Errors
/// A status or field that the `http` crate rejects; the caller responds with 502.
pub(crate) fn write_head<B>(response: &Response, body: B) -> Result<http::Response<B>, http::Error> {
    let mut head = http::Response::builder().status(response.status);
    for field in response.fields.iter() {
        if !matches!(
            field.known,
            Some(KnownField::ContentLength | KnownField::TransferEncoding | KnownField::Connection)
        ) {
            head = head.header(field.name, field.value);
        }
    }
    if let BodyLength::Known(length) = response.length {
        head = head.header("content-length", length);
    }
    head.body(body)
}

/// A `BodySource` as a hyper body. Copies at most `FRAME_MAX` bytes into one frame.
pub(crate) struct Http2ResponseBody<S> {
    source: Option<S>,
    remaining: Option<u64>,
    ended: bool,
}

impl<S: BodySource> Http2ResponseBody<S> {
    /// `length` is the length announced in the head; `Empty` for a response without a body.
    pub(crate) fn new(source: S, length: BodyLength) -> Self {
        let remaining = match length {
            BodyLength::Empty => Some(0),
            BodyLength::Known(length) => Some(length),
            BodyLength::Streamed | BodyLength::UntilClose => None,
        };
        Http2ResponseBody { source: Some(source), remaining, ended: remaining == Some(0) }
    }

    /// No body.
    pub(crate) fn empty() -> Self {
        Http2ResponseBody { source: None, remaining: Some(0), ended: true }
    }
}

/// Maximum bytes copied into one frame.
const FRAME_MAX: usize = 64 << 10;

impl<S: BodySource + Unpin> http_body::Body for Http2ResponseBody<S> {
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
            return Poll::Ready(this.remaining.map(|_| Err(BodyError::Truncated)));
        }
        let allowed = this
            .remaining
            .map_or(FRAME_MAX, |remaining| usize::try_from(remaining).unwrap_or(FRAME_MAX).min(FRAME_MAX));
        let frame_data = Bytes::copy_from_slice(&data[..data.len().min(allowed)]);
        source.consume(frame_data.len());
        if let Some(remaining) = &mut this.remaining {
            *remaining -= frame_data.len() as u64;
            this.ended = *remaining == 0;
        }
        Poll::Ready(Some(Ok(Frame::data(frame_data))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        self.remaining.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
