//! Reads the frames of a client.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::time::Instant;

use super::connection::{ClosedStream, DRAIN_PING, Http2Connection, OUT_READ_MAX};
use super::frame::{self, FrameHead, HEAD_LEN, Http2ErrorCode, PAYLOAD_MAX, PREFACE, WINDOW_MAX, number, unpadded};
use super::priority::Priority;
use super::receive_request::{FrameOutcome, IncomingRequest, ReceiveEnd};
use super::receiver::{ReceiveState, Receiver};
use super::request_body::UploadFault;
use crate::http::body::BodySource;
use crate::http::message::Request;
use crate::http::refusal::RequestRefusal;

/// Priorities that are remembered for streams that have not begun.
const EARLY_PRIORITIES_MAX: usize = 16;

impl<B: BodySource> Http2Connection<B> {
    /// Reads frames until the head of a request is complete, which fills `request`, or the
    /// connection ends. Cancel safe.
    pub(crate) fn poll_request(
        self: &Rc<Self>,
        cx: &mut Context<'_>,
        request: &mut Request,
    ) -> Poll<Result<IncomingRequest<B>, ReceiveEnd>> {
        let receiver = &mut *self.receiver.borrow_mut();
        loop {
            if self.sender.borrow().out.len() > OUT_READ_MAX {
                self.is_receiving_paused.set(true);
                return Poll::Pending;
            }
            if let Some(incoming) = self.take_deferred(&mut receiver.state, request) {
                return Poll::Ready(Ok(incoming));
            }
            match self.next_frame(receiver, request)? {
                Some(FrameOutcome::Request(incoming)) => return Poll::Ready(Ok(incoming)),
                Some(FrameOutcome::Continue) => continue,
                None => {}
            }
            match ready!(receiver.buffer.poll_fill(&self.io, cx, HEAD_LEN + PAYLOAD_MAX)) {
                Ok(count) if count > 0 => self.read_at.set(Instant::now()),
                _ => return Poll::Ready(Err(ReceiveEnd::Closed)),
            }
        }
    }

    /// Handles the frame at the front of the buffer; `None` if it is incomplete.
    fn next_frame(
        self: &Rc<Self>,
        receiver: &mut Receiver,
        request: &mut Request,
    ) -> Result<Option<FrameOutcome<B>>, ReceiveEnd> {
        let Receiver { buffer, state } = receiver;
        if !state.has_preface {
            let data = buffer.data();
            let count = data.len().min(PREFACE.len());
            if data[..count] != PREFACE[..count] {
                return Err(Http2ErrorCode::Protocol.into());
            }
            if count < PREFACE.len() {
                return Ok(None);
            }
            buffer.consume(count);
            state.has_preface = true;
        }
        let Some(head) = FrameHead::parse(buffer.data()) else { return Ok(None) };
        if head.length > PAYLOAD_MAX {
            return Err(Http2ErrorCode::FrameSize.into());
        }
        let Some(payload) = buffer.data()[HEAD_LEN..].get(..head.length) else {
            if head.kind == frame::HEADERS {
                state.section_began.get_or_insert_with(|| self.read_at.get());
            }
            return Ok(None);
        };
        let is_settings = head.kind == frame::SETTINGS && !head.has(frame::ACK);
        if !std::mem::replace(&mut state.has_settings, true) && !is_settings {
            return Err(Http2ErrorCode::Protocol.into());
        }
        let outcome = self.receive(state, head, payload, request)?;
        buffer.consume(HEAD_LEN + head.length);
        match self.counts.borrow().abuse() {
            Some(abuse) => Err(ReceiveEnd::Abuse(abuse)),
            None => Ok(Some(outcome)),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a frame, and what it acts on")]
    fn receive(
        self: &Rc<Self>,
        state: &mut ReceiveState,
        head: FrameHead,
        payload: &[u8],
        request: &mut Request,
    ) -> Result<FrameOutcome<B>, Http2ErrorCode> {
        if state.section.is_some() && head.kind != frame::CONTINUATION {
            return Err(Http2ErrorCode::Protocol);
        }
        if head.kind > frame::CONTINUATION
            || matches!(head.kind, frame::PRIORITY | frame::SETTINGS | frame::PING | frame::GOAWAY)
        {
            self.counts.borrow_mut().charge_control();
        }
        match head.kind {
            frame::HEADERS => return self.receive_headers(state, head, payload, request),
            frame::CONTINUATION => return self.receive_continuation(state, head, payload, request),
            frame::DATA => self.receive_data(head, payload)?,
            frame::PRIORITY => match number(payload).map(|other| other & 0x7fff_ffff) {
                _ if payload.len() != 5 => return Err(Http2ErrorCode::FrameSize),
                Some(other) if other == head.stream => return Err(Http2ErrorCode::Protocol),
                _ if head.stream == 0 => return Err(Http2ErrorCode::Protocol),
                _ => {}
            },
            frame::RST_STREAM => self.receive_reset(head, payload)?,
            frame::SETTINGS => self.receive_settings(head, payload)?,
            frame::PUSH_PROMISE => return Err(Http2ErrorCode::Protocol),
            frame::PING => self.receive_ping(head, payload)?,
            frame::GOAWAY if head.stream != 0 => return Err(Http2ErrorCode::Protocol),
            frame::GOAWAY if payload.len() < 8 => return Err(Http2ErrorCode::FrameSize),
            frame::WINDOW_UPDATE => self.receive_window(head, payload)?,
            frame::PRIORITY_UPDATE => self.receive_priority(state, head, payload)?,
            _ => {}
        }
        Ok(FrameOutcome::Continue)
    }

    fn receive_data(&self, head: FrameHead, payload: &[u8]) -> Result<(), Http2ErrorCode> {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if head.stream == 0 || self.is_unused(head.stream) {
            return Err(Http2ErrorCode::Protocol);
        }
        if !self.shared.receive(length) {
            return Err(Http2ErrorCode::FlowControl);
        }
        let data = unpadded(&head, payload).ok_or(Http2ErrorCode::Protocol)?;
        let ends_stream = head.has(frame::END_STREAM);
        if data.is_empty() && !ends_stream {
            self.counts.borrow_mut().charge_control();
        }
        let Some(stream) = self.find(head.stream) else {
            return match self.closed(head.stream) {
                Some(ClosedStream { was_reset: true, .. }) => Ok(()),
                _ if self.is_ignored(head.stream) => Ok(()),
                _ => Err(Http2ErrorCode::StreamClosed),
            };
        };
        let Some(upload) = stream.upload.as_ref().filter(|upload| !upload.has_ended()) else {
            self.reset_by_fault(&stream, Http2ErrorCode::StreamClosed);
            return Ok(());
        };
        let padding = length - u32::try_from(data.len()).unwrap_or(length);
        let received = upload.receive(data, padding).and_then(|()| if ends_stream { upload.end(None) } else { Ok(()) });
        if let Err(fault) = received {
            upload.reset(fault.refusal());
            let is_window = fault == UploadFault::Window;
            let code = if is_window { Http2ErrorCode::FlowControl } else { Http2ErrorCode::Protocol };
            self.reset_by_fault(&stream, code);
        }
        Ok(())
    }

    fn receive_reset(&self, head: FrameHead, payload: &[u8]) -> Result<(), Http2ErrorCode> {
        if payload.len() != 4 {
            return Err(Http2ErrorCode::FrameSize);
        }
        if head.stream == 0 || self.is_unused(head.stream) {
            return Err(Http2ErrorCode::Protocol);
        }
        self.counts.borrow_mut().charge_reset();
        if let Some(stream) = self.find(head.stream) {
            self.close(&stream, false);
            stream.end_by(Http2ErrorCode::Cancel, RequestRefusal::BodyReset);
        }
        Ok(())
    }

    fn receive_settings(&self, head: FrameHead, payload: &[u8]) -> Result<(), Http2ErrorCode> {
        if head.stream != 0 {
            return Err(Http2ErrorCode::Protocol);
        }
        if head.has(frame::ACK) {
            if !payload.is_empty() {
                return Err(Http2ErrorCode::FrameSize);
            }
            let shrinkage = self.first_window.borrow_mut().acknowledge();
            self.shared.set_first_window(self.first_window.borrow().bytes());
            if shrinkage > 0 {
                self.uploads_of_streams(|upload| upload.shrink_window(shrinkage));
            }
            return Ok(());
        }
        let (settings, []) = payload.as_chunks::<6>() else { return Err(Http2ErrorCode::FrameSize) };
        for [a, b, value @ ..] in settings {
            let value = u32::from_be_bytes(*value);
            match u16::from_be_bytes([*a, *b]) {
                frame::SETTING_ENABLE_PUSH | frame::SETTING_NO_OLD_PRIORITIES if value > 1 => {
                    return Err(Http2ErrorCode::Protocol);
                }
                frame::SETTING_INITIAL_WINDOW => self.set_stream_window(value)?,
                frame::SETTING_PAYLOAD_MAX => match usize::try_from(value) {
                    // Larger frames than the default have no use here.
                    Ok(PAYLOAD_MAX..0x100_0000) => {}
                    _ => return Err(Http2ErrorCode::Protocol),
                },
                _ => {}
            }
        }
        self.sender.borrow_mut().write_frame(frame::SETTINGS, frame::ACK, 0, &[]);
        self.pump();
        Ok(())
    }

    /// Changes the windows of all streams (RFC 9113 section 6.9.2).
    fn set_stream_window(&self, value: u32) -> Result<(), Http2ErrorCode> {
        let value = i64::from(value);
        if value > WINDOW_MAX {
            return Err(Http2ErrorCode::FlowControl);
        }
        let change = value - std::mem::replace(&mut self.sender.borrow_mut().stream_window, value);
        for stream in &*self.streams.borrow() {
            let window = stream.window.get() + change;
            if window > WINDOW_MAX {
                return Err(Http2ErrorCode::FlowControl);
            }
            stream.window.set(window);
        }
        Ok(())
    }

    fn receive_ping(&self, head: FrameHead, payload: &[u8]) -> Result<(), Http2ErrorCode> {
        if head.stream != 0 {
            return Err(Http2ErrorCode::Protocol);
        }
        if payload.len() != 8 {
            return Err(Http2ErrorCode::FrameSize);
        }
        if !head.has(frame::ACK) {
            self.sender.borrow_mut().write_frame(frame::PING, frame::ACK, 0, payload);
        } else if payload == DRAIN_PING {
            self.drain_acknowledged.set(true);
        }
        Ok(())
    }

    fn receive_window(&self, head: FrameHead, payload: &[u8]) -> Result<(), Http2ErrorCode> {
        if payload.len() != 4 {
            return Err(Http2ErrorCode::FrameSize);
        }
        let increment = i64::from(number(payload).unwrap_or(0) & 0x7fff_ffff);
        self.counts.borrow_mut().charge_window();
        if head.stream == 0 {
            let mut sender = self.sender.borrow_mut();
            match increment {
                0 => return Err(Http2ErrorCode::Protocol),
                _ if sender.window + increment > WINDOW_MAX => return Err(Http2ErrorCode::FlowControl),
                _ => sender.window += increment,
            }
            drop(sender);
            self.pump();
            return Ok(());
        }
        if self.is_unused(head.stream) {
            return Err(Http2ErrorCode::Protocol);
        }
        let Some(stream) = self.find(head.stream) else { return Ok(()) };
        match increment {
            0 => self.reset_by_fault(&stream, Http2ErrorCode::Protocol),
            _ if stream.window.get() + increment > WINDOW_MAX => {
                self.reset_by_fault(&stream, Http2ErrorCode::FlowControl);
            }
            _ => {
                stream.window.set(stream.window.get() + increment);
                self.pump();
            }
        }
        Ok(())
    }

    fn receive_priority(
        &self,
        state: &mut ReceiveState,
        head: FrameHead,
        payload: &[u8],
    ) -> Result<(), Http2ErrorCode> {
        let id = number(payload).ok_or(Http2ErrorCode::FrameSize)? & 0x7fff_ffff;
        if head.stream != 0 || id == 0 {
            return Err(Http2ErrorCode::Protocol);
        }
        let priority = Priority::parse(&payload[4..]);
        if let Some(stream) = self.find(id) {
            stream.priority.set(priority);
        } else if self.is_unused(id) {
            // The latest one applies.
            state.early_priorities.retain(|(stream, _)| *stream != id);
            if state.early_priorities.len() >= EARLY_PRIORITIES_MAX {
                state.early_priorities.pop_front();
            }
            state.early_priorities.push_back((id, priority));
        }
        Ok(())
    }
}
