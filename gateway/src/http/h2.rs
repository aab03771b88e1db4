//! HTTP/2 on the crate `h2`: converts its requests into `Request` and `Response` into its
//! responses. `h2` does framing, flow control and HPACK.

mod frame_scan;
mod send_budget;
mod client_clock;
mod gather;

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use http::header::{CONTENT_LENGTH, HeaderName, HeaderValue};

pub(crate) use client_clock::ClientClock;
pub(crate) use frame_scan::FrameAbuse;
pub(crate) use gather::{GatheredStream, GatheredTransport};
pub(crate) use send_budget::{DataChunk, SendBudget};

use super::body::{BodyError, BodySource};
use super::exchange_clock::ExchangeTimeout;
use super::fields::{Fields, KnownField};
use super::h1;
use super::head;
use super::limits::HttpLimits;
use super::message::{BodyLength, HttpVersion, InterimResponses, Request, Response, Scheme, StatusCode};
use super::refusal::RequestRefusal;

/// The receiving side of a stream, shared by the body of the request and the loop that discards
/// what the response did not wait for.
pub(crate) type SharedRecvStream = Rc<RefCell<h2::RecvStream>>;

/// The body of an HTTP/2 request.
pub(crate) struct Http2RequestBody {
    incoming: SharedRecvStream,
    frame_data: Bytes,
    received_bytes: u64,
    body_max: u64,
    clock: ClientClock,
    /// The queue that `100 Continue` is pushed to, once, if the client waits for it.
    awaits_continue: Option<InterimResponses>,
    dropped_trailers: std::sync::Arc<[String]>,
    trailers: Option<Box<Fields>>,
}

impl Http2RequestBody {
    /// `received` is a part of the body that was already taken from `incoming`. `request` is the
    /// head.
    pub(crate) fn new(
        (incoming, received): (&SharedRecvStream, Bytes),
        limits: &HttpLimits,
        request: &Request,
    ) -> Self {
        Http2RequestBody {
            incoming: Rc::clone(incoming),
            received_bytes: received.len() as u64,
            frame_data: received,
            body_max: limits.body_bytes,
            clock: ClientClock::new(limits),
            awaits_continue: request.connection.expects_continue.then(|| request.interim.share()),
            dropped_trailers: std::sync::Arc::clone(&limits.dropped_trailers),
            trailers: None,
        }
    }

    fn poll_trailers(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let polled = self.incoming.borrow_mut().poll_trailers(cx);
        match polled {
            Poll::Pending => self.clock.poll(cx).map(|()| Err(BodyError::Timeout(ExchangeTimeout::ClientBody))),
            Poll::Ready(Err(_)) => Poll::Ready(Err(BodyError::Truncated)),
            Poll::Ready(Ok(trailers)) => {
                let is_dropped =
                    |name: &HeaderName| self.dropped_trailers.iter().any(|n| n.eq_ignore_ascii_case(name.as_str()));
                let mut fields = Fields::default();
                for (name, value) in trailers.iter().flatten() {
                    if h1::is_allowed_trailer(name.as_str()) && !is_dropped(name) {
                        fields.push(name.as_str().as_bytes(), value.as_bytes().trim_ascii());
                    }
                }
                self.trailers = (!fields.is_empty()).then(|| Box::new(fields));
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl BodySource for Http2RequestBody {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        while self.frame_data.is_empty() {
            let polled = self.incoming.borrow_mut().poll_data(cx);
            match polled {
                Poll::Pending => {
                    if let Some(interim) = self.awaits_continue.take() {
                        interim.push(Response::new(StatusCode::CONTINUE));
                    }
                    return self.clock.poll(cx).map(|()| Err(BodyError::Timeout(ExchangeTimeout::ClientBody)));
                }
                Poll::Ready(None) if self.trailers.is_some() => break,
                Poll::Ready(None) => return self.poll_trailers(cx),
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Err(BodyError::Truncated)),
                Poll::Ready(Some(Ok(data))) => self.frame_data = data,
            }
            self.awaits_continue = None;
            self.clock.record_progress(self.frame_data.len());
            self.received_bytes += self.frame_data.len() as u64;
        }
        let is_too_large = self.received_bytes > self.body_max;
        Poll::Ready(if is_too_large { Err(BodyError::TooLarge) } else { Ok(()) })
    }

    fn data(&self) -> &[u8] {
        &self.frame_data
    }

    fn consume(&mut self, count: usize) {
        // The client is not late while the gateway does not consume its bytes.
        self.clock.record_progress(0);
        self.frame_data.advance(count);
        // Fails only for a stream that is over.
        let _window_is_opened = self.incoming.borrow_mut().flow_control().release_capacity(count);
    }

    fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }
}

/// Whether a head that does not end its stream may still be that of a request without a body: it
/// announces none, and its method has no use for one. The next frame then tells.
pub(crate) fn may_be_bodiless(parts: &http::request::Parts) -> bool {
    let is_bodiless = matches!(parts.method, http::Method::GET | http::Method::HEAD | http::Method::OPTIONS);
    is_bodiless && !parts.headers.contains_key(CONTENT_LENGTH)
}

/// Fills `request` from an HTTP/2 head (RFC 9113 section 8.3). `has_ended`: no body follows.
///
/// # Errors
/// Refuses what the HTTP/1.1 engine refuses, so that both protocols pass the same requests to an
/// origin.
pub(crate) fn read_head(
    parts: &http::request::Parts,
    has_ended: bool,
    limits: &HttpLimits,
    request: &mut Request,
) -> Result<(), RequestRefusal> {
    request.clear();
    request.version = HttpVersion::Http2;
    request.method = parts.method.clone();
    head::check_method(&request.method)?;
    head::set_target(parts.uri.path_and_query().map_or("/", |target| target.as_str()), limits, request)?;
    for (name, value) in &parts.headers {
        request.fields.push(name.as_str().as_bytes(), value.as_bytes().trim_ascii());
    }
    join_cookies(&mut request.fields);
    if request.fields.len() > limits.header_fields {
        return Err(RequestRefusal::TooManyFields);
    }
    set_authority(parts.uri.authority().map(|authority| authority.as_str()), request)?;
    request.connection.expects_continue = head::expects_continue(request)?;
    request.scheme = if parts.uri.scheme_str() == Some("http") { Scheme::Http } else { Scheme::Https };
    // `h2` has refused malformed and contradictory lengths.
    let announced = parts.headers.get(CONTENT_LENGTH).map(|value| value.to_str().unwrap_or_default().trim().parse());
    request.length = match announced {
        _ if has_ended => BodyLength::Empty,
        Some(Ok(0)) => BodyLength::Empty,
        Some(Ok(length)) if length > limits.body_bytes => return Err(RequestRefusal::BodyTooLarge),
        Some(Ok(length)) => BodyLength::Known(length),
        Some(Err(_)) => return Err(RequestRefusal::BadLength),
        None => BodyLength::Streamed,
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

/// Converts a response head into that of `h2`. `hop` has already removed the fields that HTTP/2
/// forbids.
///
/// # Errors
/// A status or field that the `http` crate rejects; the caller responds with 502.
pub(crate) fn write_head(response: &Response) -> Result<http::Response<()>, http::Error> {
    let mut head = http::Response::new(());
    *head.status_mut() = response.status;
    let fields = write_fields(&response.fields)?;
    *head.headers_mut() = fields;
    if let BodyLength::Known(length) = response.length {
        head.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(head)
}

/// Converts fields, of a head or of trailers, without those of framing.
///
/// # Errors
/// A field that the `http` crate rejects.
pub(crate) fn write_fields(fields: &Fields) -> Result<http::HeaderMap, http::Error> {
    let is_framing = |known| {
        matches!(known, Some(KnownField::ContentLength | KnownField::TransferEncoding | KnownField::Connection))
    };
    let lines = || fields.iter().filter(|field| !is_framing(field.known));
    // The values share one allocation.
    let mut text = Vec::with_capacity(lines().map(|field| field.value.len()).sum());
    lines().for_each(|field| text.extend_from_slice(field.value));
    let mut text = Bytes::from(text);
    let mut map = http::HeaderMap::with_capacity(fields.len() + 1);
    for field in lines() {
        let name = HeaderName::from_bytes(field.name)?;
        map.append(name, HeaderValue::from_maybe_shared(text.split_to(field.value.len()))?);
    }
    Ok(map)
}
