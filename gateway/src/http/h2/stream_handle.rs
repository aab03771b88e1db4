//! The side of a stream for the task that answers it.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use super::connection::Http2Connection;
use super::frame::{self, Http2ErrorCode};
use super::request_body::UploadStream;
use super::stream::{Http2Stream, OutgoingBody};
use crate::http::body::{BodyError, BodySource};
use crate::http::fields::Fields;
use crate::http::message::{BodyLength, Response};
use crate::http::refusal::RequestRefusal;

/// Bytes of the head of a response that are part of the cost of a stream.
const RESPONSE_HEAD: usize = 2 << 10;

/// How a response ended before its end.
#[derive(Debug)]
pub(crate) enum ResponseEnd {
    /// The stream was reset, or the connection is over.
    ClientClosed,
    /// The body failed.
    Source(BodyError),
}

/// The side of a stream for the task that answers it: reads the request, sends the response. A
/// stream that has not ended is reset when its handle is dropped.
pub(crate) struct StreamHandle<B: BodySource> {
    pub(super) connection: Rc<Http2Connection<B>>,
    pub(super) stream: Rc<Http2Stream<B>>,
}

impl<B: BodySource> StreamHandle<B> {
    /// The body of the request; `None`: the head has ended the stream.
    pub(crate) fn upload(&self) -> Option<&Rc<UploadStream>> {
        self.stream.upload.as_ref()
    }

    /// Why the request has ended before its end, if it has.
    pub(crate) fn upload_fault(&self) -> Option<RequestRefusal> {
        self.stream.upload.as_ref().and_then(|upload| upload.fault())
    }

    /// Bytes that the client has accepted on the whole connection.
    pub(crate) fn sent_on_connection(&self) -> u64 {
        self.connection.sent_bytes.get()
    }

    /// Bytes of the body that were handed over.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.stream.sent.get()
    }

    /// Whether the client has ended its side of the stream.
    pub(crate) fn has_received_end(&self) -> bool {
        self.stream.has_received_end()
    }

    /// Whether the stream is ended because its upstream did not read what it held. It is reset, or
    /// its task is to end it.
    pub(crate) fn is_stalled(&self) -> bool {
        self.stream.is_stalled.get()
    }

    /// Whether the stream was reset, or its connection has ended.
    pub(crate) fn is_reset(&self) -> bool {
        self.stream.reset.get().is_some()
    }

    /// Ready when the stream is over: it was reset, or its connection has ended.
    pub(crate) fn poll_reset(&self, cx: &Context<'_>) -> Poll<()> {
        if self.stream.reset.get().is_some() {
            return Poll::Ready(());
        }
        self.stream.register(cx);
        Poll::Pending
    }

    /// Sends an interim response, if there is room for it now: a client can do without it.
    pub(crate) fn send_interim(&self, response: &Response) {
        let mut sender = self.connection.sender.borrow_mut();
        if self.stream.reset.get().is_none() && sender.has_room() {
            sender.write_head(self.stream.id, response, 0);
            self.connection.shared.wake();
        }
    }

    /// Ready when there is room for a head, or the stream is over.
    pub(crate) fn poll_room(&self, cx: &Context<'_>) -> Poll<()> {
        let mut sender = self.connection.sender.borrow_mut();
        if sender.has_room() || self.stream.reset.get().is_some() {
            return Poll::Ready(());
        }
        self.stream.register(cx);
        if !sender.room_waiters.iter().any(|stream| Rc::ptr_eq(stream, &self.stream)) {
            sender.room_waiters.push(Rc::clone(&self.stream));
        }
        Poll::Pending
    }

    /// The response is in memory already: nothing of it is to be read.
    pub(crate) fn return_read_grant(&self) {
        self.connection.shared.release(self.stream.read_grant.take());
    }

    /// Accounts for the head of a response that has to wait for room. Returns whether the
    /// connection may hold it.
    pub(crate) fn account_head(&self, response: &Response) -> bool {
        if self.connection.sender.borrow().has_room() {
            // It is written at once.
            return true;
        }
        let bytes = response.fields.heap_bytes();
        let is_held = bytes <= RESPONSE_HEAD || self.connection.shared.account.account(bytes);
        if !is_held {
            // The stream is reset, which its client may have brought about by not reading.
            self.connection.counts.borrow_mut().charge_reset();
        } else if bytes > RESPONSE_HEAD {
            self.stream.head_cost.set(bytes);
        }
        is_held
    }

    /// The head was sent. Returns whether it was accounted for.
    pub(crate) fn release_head(&self) -> bool {
        let bytes = self.stream.head_cost.take();
        self.connection.shared.release(bytes);
        bytes > 0
    }

    /// Sends the head of the response. `remaining`: the length of the body, if it is known.
    pub(crate) fn begin_response(&self, response: &Response, body: B, remaining: Option<u64>) {
        if self.stream.reset.get().is_some() {
            return;
        }
        let is_end = remaining == Some(0) && !(response.length == BodyLength::Known(0) && body.may_have_trailers());
        let flags = if is_end { frame::END_STREAM } else { 0 };
        self.connection.sender.borrow_mut().write_head(self.stream.id, response, flags);
        self.connection.shared.wake();
        self.stream.has_sent_end.set(is_end);
        *self.stream.outgoing.borrow_mut() = Some(OutgoingBody { body, remaining });
    }

    /// Takes the body back, for a response that has failed or ended.
    pub(crate) fn take_body(&self) -> Option<B> {
        self.stream.outgoing.borrow_mut().take().map(|outgoing| outgoing.body)
    }

    /// Whether the body has bytes that wait for the client, or for their turn.
    pub(crate) fn is_waiting_for_client(&self) -> bool {
        self.stream.is_ready.get()
    }

    /// Whether the client allows no byte of this body, whatever others take of the connection's
    /// window.
    pub(crate) fn is_stream_window_closed(&self) -> bool {
        self.stream.window.get() <= 0
    }

    /// Whether the client allows no byte of this body, or none of the connection.
    pub(crate) fn is_window_closed(&self) -> bool {
        self.is_stream_window_closed() || self.connection.sender.borrow().window <= 0
    }

    /// Sends the body. Ready when its last frame was handed over, or cannot be.
    pub(crate) fn poll_body(&self, cx: &mut Context<'_>) -> Poll<Result<(), ResponseEnd>> {
        let StreamHandle { connection, stream } = self;
        loop {
            if stream.has_sent_end.get() {
                connection.counts.borrow_mut().record_response();
                return Poll::Ready(Ok(()));
            }
            if stream.reset.get().is_some() {
                return Poll::Ready(Err(ResponseEnd::ClientClosed));
            }
            stream.register(cx);
            if stream.is_ready.get() {
                return Poll::Pending;
            }
            let mut outgoing = stream.outgoing.borrow_mut();
            let Some(OutgoingBody { body, remaining }) = &mut *outgoing else {
                return Poll::Ready(Err(ResponseEnd::ClientClosed));
            };
            if body.data().is_empty() && body.complete_body().is_none() {
                ready!(connection.poll_fill(cx, stream, body)).map_err(ResponseEnd::Source)?;
            }
            if body.data().is_empty() {
                if remaining.is_some_and(|left| left > 0) {
                    return Poll::Ready(Err(ResponseEnd::Source(BodyError::Truncated)));
                }
                let mut sender = connection.sender.borrow_mut();
                match body.trailers() {
                    Some(trailers) => sender.write_trailers(stream.id, trailers),
                    None => sender.write_frame(frame::DATA, frame::END_STREAM, stream.id, &[]),
                }
                drop(sender);
                stream.has_sent_end.set(true);
                connection.shared.wake();
                continue;
            }
            if *remaining == Some(0) {
                let error = BodyError::Malformed("body longer than announced");
                return Poll::Ready(Err(ResponseEnd::Source(error)));
            }
            drop(outgoing);
            connection.sender.borrow_mut().add_ready(stream);
            connection.pump();
        }
    }

    /// Ends a response whose body has failed with trailers. False if the head has announced a
    /// length, which the body did not reach, or if the stream is over.
    pub(crate) fn end_with_trailers(&self, trailers: &Fields) -> bool {
        let StreamHandle { connection, stream } = self;
        let is_of_known_length = stream.outgoing.borrow().as_ref().is_none_or(|body| body.remaining.is_some());
        if is_of_known_length || stream.has_sent_end.get() || stream.reset.get().is_some() {
            return false;
        }
        connection.sender.borrow_mut().write_trailers(stream.id, trailers);
        stream.has_sent_end.set(true);
        connection.counts.borrow_mut().record_response();
        connection.shared.wake();
        true
    }

    /// Resets the stream.
    pub(crate) fn reset(&self, code: Http2ErrorCode) {
        self.connection.reset(&self.stream, code);
    }

    /// The request was malformed: counts as a reset that the client has provoked.
    pub(crate) fn reset_malformed(&self) {
        self.connection.reset_by_fault(&self.stream, Http2ErrorCode::Protocol);
    }

    /// Drops the rest of the request.
    pub(crate) fn discard_upload(&self) {
        if let Some(upload) = &self.stream.upload {
            upload.discard();
        }
    }

    /// While the request is discarded: ready once it has ended, or `max` bytes were dropped.
    pub(crate) fn poll_discarded(&self, cx: &mut Context<'_>, max: usize) -> Poll<()> {
        self.stream.upload.as_ref().map_or(Poll::Ready(()), |upload| upload.poll_discarded(cx, max))
    }
}

impl<B: BodySource> Drop for StreamHandle<B> {
    fn drop(&mut self) {
        let StreamHandle { connection, stream } = self;
        if stream.reset.get().is_none() {
            match (stream.has_sent_end.get(), stream.has_received_end()) {
                (true, true) => connection.close(stream, false),
                (true, false) => connection.reset(stream, Http2ErrorCode::NoError),
                (false, _) => connection.reset(stream, Http2ErrorCode::Internal),
            }
        }
        connection.sender.borrow_mut().remove(stream);
        connection.shared.release_stream(stream.cost);
        connection.shared.release(stream.head_cost.take() + stream.read_grant.take());
        // The body may hold a connection to an upstream.
        drop(stream.outgoing.borrow_mut().take());
        connection.shared.wake();
    }
}
