//! One connection: reads frames, keeps the states of its streams, and writes what they send.
//!
//! Everything happens on one thread. The task that owns the connection polls `poll_request` and
//! `poll_send`; the tasks of streams use their `StreamHandle`. Invariants: a stream is in `streams`
//! from its head to its last frame in both directions; no `RefCell` of the connection is borrowed
//! while a body is polled.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::Instant;

use super::abuse::{FrameAbuse, FrameCounts};
use super::account::{STREAM_COST, STREAMS_MAX, WINDOW_BASE};
use super::deferred::{DeferredStream, DeferredStreams, KeptFields};
use super::frame::{self, FrameHead, HEAD_LEN, Http2ErrorCode, PAYLOAD_MAX, PREFACE, WINDOW_MAX, number, unpadded};
use super::hpack_decode::HpackDecoder;
use super::memory_budget::{MemoryBudget, MemoryLimits, StreamRefusal};
use super::priority::Priority;
use super::request_body::{UploadFault, UploadStream, WINDOW_FIRST};
use super::relief::WindowRelief;
use super::request_head::{HeadDetails, HeadReader, HeadRefusal, is_name, is_value};
use super::sender::{OUT_MAX, Sender};
use super::shared::ConnectionShared;
use super::stream::{Http2Stream, OutgoingBody};
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::{ReadBuffer, ReadSize};
use crate::http::fields::Fields;
use crate::http::limits::HttpLimits;
use crate::http::message::{BodyLength, Request, Response};
use crate::http::refusal::RequestRefusal;
use crate::http::transport::TransportStream;
use crate::http::write_timer::WriteTimer;

/// The fields of a head are copied for the upstream.
const HEAD_COPIES: usize = 2;
/// Bytes of a response that are read at once from an upstream, once its head was sent.
const READ_BYTES: usize = 64 << 10;
/// With so many open streams, only a little of the responses of further ones is read with their
/// heads: their client may not take them.
const READERS_MAX: usize = 4;
/// Bytes of the head of a response that are part of the cost of a stream.
const RESPONSE_HEAD: usize = 2 << 10;
/// The first window of a stream before the client knows the settings.
const WINDOW_DEFAULT_BYTES: u32 = frame::WINDOW_DEFAULT as u32;
/// Bytes of an encoded field section in several frames, at least; and as a multiple of the limit of
/// a head. A larger one ends the connection, a smaller one has a response of its own.
const SECTION_MIN: usize = 64 << 10;
const SECTION_FACTOR: usize = 4;
/// Unsent bytes beyond which nothing more is received: a client that does not read gets no further
/// acknowledgements and resets either. Responses alone stay below it.
const OUT_READ_MAX: usize = 2 * OUT_MAX;
/// Bytes of the fields of a request that waits, as a multiple of the limit of a head: their lengths
/// come on top.
const KEPT_FACTOR: usize = 4;
/// Closed streams that are remembered: frames for them may be under way.
const CLOSED_MAX: usize = 256;
/// Priorities that are remembered for streams that have not begun.
const EARLY_PRIORITIES_MAX: usize = 16;
/// The payload of the PING that finds out when the client knows of the end of the connection.
const DRAIN_PING: [u8; 8] = *b"draining";
/// The payload of the PING that finds out whether the client is there.
const PROBE_PING: [u8; 8] = *b"probing.";

/// Why no more requests arrive.
#[derive(Debug)]
pub(crate) enum ReceiveEnd {
    /// The client has closed the connection, or its last bytes cannot be read.
    Closed,
    /// The connection ends with this code.
    Error(Http2ErrorCode),
    /// The client sent too many frames of a kind.
    Abuse(FrameAbuse),
}

impl From<Http2ErrorCode> for ReceiveEnd {
    fn from(code: Http2ErrorCode) -> Self {
        ReceiveEnd::Error(code)
    }
}

/// A request whose head was read.
pub(crate) struct IncomingRequest<B: BodySource> {
    pub(crate) handle: StreamHandle<B>,
    pub(crate) head: Result<HeadDetails, HeadRefusal>,
    /// When its last byte was received.
    pub(crate) at: Instant,
}

/// One connection. `B` is the body of its responses.
pub(crate) struct Http2Connection<B> {
    pub(super) io: TransportStream,
    pub(super) shared: Rc<ConnectionShared>,
    limits: HttpLimits,
    receiver: RefCell<Receiver>,
    pub(super) sender: RefCell<Sender<B>>,
    pub(super) streams: RefCell<Vec<Rc<Http2Stream<B>>>>,
    /// Streams whose requests wait until there is memory for them. They are in `streams` too.
    pub(super) deferred: RefCell<DeferredStreams<B>>,
    pub(super) relief: WindowRelief,
    closed: RefCell<VecDeque<ClosedStream>>,
    pub(super) counts: RefCell<FrameCounts>,
    write_timer: RefCell<WriteTimer>,
    /// Bytes that the client has accepted.
    pub(super) sent_bytes: Cell<u64>,
    /// When bytes were received last.
    read_at: Cell<Instant>,
    last_stream: Cell<u32>,
    /// Streams above it are ignored: the client was told.
    accepted_max: Cell<u32>,
    drain_acknowledged: Cell<bool>,
    /// Whether the client knows the first window of its streams.
    knows_settings: Cell<bool>,
    /// Nothing is received until the client has accepted bytes.
    is_receiving_paused: Cell<bool>,
    is_shut: Cell<bool>,
}

/// A stream that has ended.
#[derive(Clone, Copy)]
struct ClosedStream {
    id: u32,
    /// Frames of the client may still arrive, because the gateway has reset it.
    was_reset: bool,
}

/// The receiving side.
struct Receiver {
    buffer: ReadBuffer,
    state: ReceiveState,
}

struct ReceiveState {
    decoder: HpackDecoder,
    reader: HeadReader,
    /// The field section that is being received in several frames.
    section: Option<PartialSection>,
    has_preface: bool,
    has_settings: bool,
    early_priorities: VecDeque<(u32, Priority)>,
    /// When the section began.
    section_began: Option<Instant>,
}

struct PartialSection {
    stream: u32,
    ends_stream: bool,
    depends_on_itself: bool,
    bytes: Vec<u8>,
}

/// The effect of one frame.
enum FrameOutcome<B: BodySource> {
    Continue,
    Request(IncomingRequest<B>),
}

impl<B: BodySource> Http2Connection<B> {
    pub(crate) fn new(io: TransportStream, address: IpAddr, limits: HttpLimits) -> Rc<Self> {
        let bytes = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
        let memory = MemoryLimits { process: bytes(limits.http2_memory), address: bytes(limits.http2_memory_per_ip) };
        let shared = ConnectionShared::new(MemoryBudget::new(address, memory));
        let connection = Http2Connection {
            io,
            receiver: RefCell::new(Receiver { buffer: ReadBuffer::default(), state: ReceiveState::new() }),
            sender: RefCell::new(Sender::new(&shared)),
            deferred: RefCell::new(DeferredStreams::new(&shared)),
            shared,
            streams: RefCell::default(),
            relief: WindowRelief::default(),
            closed: RefCell::default(),
            counts: RefCell::new(FrameCounts::new(address)),
            write_timer: RefCell::new(WriteTimer::new(limits.idle_timeout)),
            sent_bytes: Cell::new(0),
            read_at: Cell::new(Instant::now()),
            last_stream: Cell::new(0),
            accepted_max: Cell::new(u32::MAX),
            drain_acknowledged: Cell::new(false),
            knows_settings: Cell::new(false),
            is_receiving_paused: Cell::new(false),
            is_shut: Cell::new(false),
            limits,
        };
        connection.write_settings();
        Rc::new(connection)
    }

    fn write_settings(&self) {
        let mut payload = Vec::new();
        for (setting, value) in [
            (frame::SETTING_STREAMS_MAX, STREAMS_MAX as u32),
            (frame::SETTING_INITIAL_WINDOW, WINDOW_FIRST),
            (frame::SETTING_SECTION_BYTES, u32::try_from(self.limits.header_bytes).unwrap_or(u32::MAX)),
            (frame::SETTING_EXTENDED_CONNECT, 1),
            (frame::SETTING_NO_OLD_PRIORITIES, 1),
        ] {
            payload.extend_from_slice(&setting.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        let increment = WINDOW_BASE - WINDOW_DEFAULT_BYTES;
        let mut sender = self.sender.borrow_mut();
        sender.write_frame(frame::SETTINGS, 0, 0, &payload);
        sender.write_frame(frame::WINDOW_UPDATE, 0, 0, &increment.to_be_bytes());
    }

    /// The task of the connection begins to poll it, until `leave`.
    pub(crate) fn enter(&self, cx: &Context<'_>) {
        self.shared.enter(cx);
    }

    pub(crate) fn leave(&self) {
        self.shared.leave();
    }

    /// Whether the preface of the client has arrived.
    pub(crate) fn has_begun(&self) -> bool {
        self.receiver.borrow().state.has_settings
    }

    /// When a head began that has been received in part.
    pub(crate) fn section_began(&self) -> Option<Instant> {
        self.receiver.borrow().state.section_began
    }

    pub(crate) fn read_at(&self) -> Instant {
        self.read_at.get()
    }

    /// Whether the client has opened a stream.
    pub(crate) fn has_streams_begun(&self) -> bool {
        self.last_stream.get() > 0
    }

    /// Whether no stream is open.
    pub(crate) fn is_idle(&self) -> bool {
        self.streams.borrow().is_empty()
    }

    /// Bytes that are accounted for.
    pub(super) fn accounted(&self) -> usize {
        self.shared.account.accounted()
    }

    /// Releases the memory that only streams need.
    pub(crate) fn release_buffers(&self) {
        self.sender.borrow_mut().out.release();
        let receiver = &mut *self.receiver.borrow_mut();
        receiver.buffer.release();
        receiver.state.reader = HeadReader::default();
        self.shared.account.return_reservation();
    }

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

    fn find(&self, id: u32) -> Option<Rc<Http2Stream<B>>> {
        let streams = self.streams.borrow();
        let index = streams.binary_search_by_key(&id, |stream| stream.id).ok()?;
        Some(Rc::clone(&streams[index]))
    }

    /// The record of a stream that has ended. A forgotten stream may have been reset.
    fn closed(&self, id: u32) -> Option<ClosedStream> {
        let closed = self.closed.borrow();
        let known = closed.iter().rev().find(|closed| closed.id == id).copied();
        known.or_else(|| (closed.len() >= CLOSED_MAX).then_some(ClosedStream { id, was_reset: true }))
    }

    /// Whether the last GOAWAY says that the stream is ignored. Frames that the client sent before
    /// it received that are no error (RFC 9113 section 6.8).
    fn is_ignored(&self, id: u32) -> bool {
        id > self.accepted_max.get()
    }

    fn is_unused(&self, id: u32) -> bool {
        id > self.last_stream.get()
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

    #[expect(clippy::too_many_arguments, reason = "a frame, and what it acts on")]
    fn receive_headers(
        self: &Rc<Self>,
        state: &mut ReceiveState,
        head: FrameHead,
        payload: &[u8],
        request: &mut Request,
    ) -> Result<FrameOutcome<B>, Http2ErrorCode> {
        if head.stream.is_multiple_of(2) {
            return Err(Http2ErrorCode::Protocol);
        }
        let mut section = unpadded(&head, payload).ok_or(Http2ErrorCode::Protocol)?;
        let mut depends_on_itself = false;
        if head.has(frame::HAS_PRIORITY) {
            depends_on_itself = number(section).is_some_and(|other| other & 0x7fff_ffff == head.stream);
            section = section.get(5..).ok_or(Http2ErrorCode::FrameSize)?;
        }
        let mut partial = PartialSection {
            stream: head.stream,
            ends_stream: head.has(frame::END_STREAM),
            depends_on_itself,
            bytes: Vec::new(),
        };
        if head.has(frame::END_HEADERS) {
            state.section_began = None;
            return self.receive_section(state, &partial, section, request);
        }
        state.section_began.get_or_insert_with(|| self.read_at.get());
        partial.bytes.extend_from_slice(section);
        state.section = Some(partial);
        Ok(FrameOutcome::Continue)
    }

    #[expect(clippy::too_many_arguments, reason = "a frame, and what it acts on")]
    fn receive_continuation(
        self: &Rc<Self>,
        state: &mut ReceiveState,
        head: FrameHead,
        payload: &[u8],
        request: &mut Request,
    ) -> Result<FrameOutcome<B>, Http2ErrorCode> {
        let mut section = state.section.take().ok_or(Http2ErrorCode::Protocol)?;
        if section.stream != head.stream {
            return Err(Http2ErrorCode::Protocol);
        }
        self.counts.borrow_mut().charge_control();
        section.bytes.extend_from_slice(payload);
        if section.bytes.len() > SECTION_MIN.max(self.limits.header_bytes.saturating_mul(SECTION_FACTOR)) {
            return Err(Http2ErrorCode::EnhanceYourCalm);
        }
        if head.has(frame::END_HEADERS) {
            state.section_began = None;
            let bytes = std::mem::take(&mut section.bytes);
            return self.receive_section(state, &section, &bytes, request);
        }
        state.section = Some(section);
        Ok(FrameOutcome::Continue)
    }

    /// Decodes a complete section: of a request, of trailers, or of a stream that has ended, which
    /// changes the table of the decoder all the same.
    #[expect(clippy::too_many_arguments, reason = "a section, and what it acts on")]
    fn receive_section(
        self: &Rc<Self>,
        state: &mut ReceiveState,
        section: &PartialSection,
        bytes: &[u8],
        request: &mut Request,
    ) -> Result<FrameOutcome<B>, Http2ErrorCode> {
        let compression = |_| Http2ErrorCode::Compression;
        let skip = |state: &mut ReceiveState| state.decoder.decode(bytes, |_| ()).map_err(compression);
        if self.is_unused(section.stream) {
            return self.receive_request(state, section, bytes, request);
        }
        if let Some(stream) = self.find(section.stream) {
            let trailers = self.read_trailers(state, bytes)?;
            let code = match (&stream.upload, trailers) {
                _ if stream.has_received_end() => Http2ErrorCode::StreamClosed,
                (Some(upload), Some(trailers)) if section.ends_stream && !section.depends_on_itself => {
                    match upload.end(Some(Box::new(trailers))) {
                        Ok(()) => return Ok(FrameOutcome::Continue),
                        Err(fault) => upload.reset(fault.refusal()),
                    }
                    Http2ErrorCode::Protocol
                }
                _ => Http2ErrorCode::Protocol,
            };
            self.reset_by_fault(&stream, code);
            return Ok(FrameOutcome::Continue);
        }
        match self.closed(section.stream) {
            closed if self.is_ignored(section.stream) || closed.is_some_and(|closed| closed.was_reset) => {
                self.counts.borrow_mut().charge_control();
                skip(state).map(|()| FrameOutcome::Continue)
            }
            Some(_) => Err(Http2ErrorCode::StreamClosed),
            None => Err(Http2ErrorCode::Protocol),
        }
    }

    /// `None`: the trailers are malformed.
    fn read_trailers(&self, state: &mut ReceiveState, bytes: &[u8]) -> Result<Option<Fields>, Http2ErrorCode> {
        let (mut fields, mut is_valid, mut size) = (Fields::default(), true, 0);
        let decoded = state.decoder.decode(bytes, |field| {
            // Not a byte of further fields is read: each may be 4 KiB for one byte of the section.
            if !is_valid {
                return;
            }
            size += field.name.len() + field.value.len() + 4;
            is_valid = size <= self.limits.header_bytes
                && fields.len() < self.limits.header_fields
                && is_name(field.name)
                && is_value(field.value);
            if is_valid {
                fields.push_known(field.known, field.name, field.value);
            }
        });
        decoded.map_err(|_| Http2ErrorCode::Compression)?;
        Ok(is_valid.then_some(fields))
    }

    #[expect(clippy::too_many_arguments, reason = "a section, and what it acts on")]
    fn receive_request(
        self: &Rc<Self>,
        state: &mut ReceiveState,
        section: &PartialSection,
        bytes: &[u8],
        request: &mut Request,
    ) -> Result<FrameOutcome<B>, Http2ErrorCode> {
        let id = section.stream;
        self.last_stream.set(id);
        let ReceiveState { decoder, reader, early_priorities, .. } = state;
        reader.begin(request);
        let may_wait = self.shared.account.is_short(self.shared.exposable()) || !self.deferred.borrow().is_empty();
        let mut kept = may_wait.then(|| KeptFields::new(KEPT_FACTOR * self.limits.header_bytes));
        let decoded = decoder.decode(bytes, |field| {
            reader.receive(field, &self.limits, request);
            if kept.as_mut().is_some_and(|kept| !kept.push(field)) {
                kept = None;
            }
        });
        decoded.map_err(|_| Http2ErrorCode::Compression)?;
        if self.is_ignored(id) {
            // The client may send the request again elsewhere: it was told so.
            self.counts.borrow_mut().charge_control();
            return Ok(FrameOutcome::Continue);
        }
        if section.depends_on_itself {
            self.write_reset(id, Http2ErrorCode::Protocol);
            return Ok(FrameOutcome::Continue);
        }
        let head = reader.finish(section.ends_stream, &self.limits, request);
        if head.as_ref().is_err_and(|refused| refused.refusal == RequestRefusal::HeadTooLarge) {
            // Its fields may be many times as many as its bytes. The response explains one of two.
            self.counts.borrow_mut().charge_reset();
            self.counts.borrow_mut().charge_reset();
        }
        if self.streams.borrow().len() >= STREAMS_MAX && self.open_streams() >= STREAMS_MAX {
            self.write_reset(id, Http2ErrorCode::RefusedStream);
            return Ok(FrameOutcome::Continue);
        }
        let cost = STREAM_COST + HEAD_COPIES * head.as_ref().map_or(0, |details| details.bytes);
        let must_wait =
            !self.deferred.borrow().is_empty() || !self.shared.has_room_for_stream(cost, !section.ends_stream);
        let is_accounted =
            if must_wait { Err(StreamRefusal::Connection) } else { self.shared.account.account_stream(cost) };
        // A request explains the frames of its flow control.
        self.counts.borrow_mut().explain_control(2);
        let mut upload = None;
        if !section.ends_stream {
            let window = if self.knows_settings.get() { WINDOW_FIRST } else { WINDOW_DEFAULT_BYTES };
            let upload = upload.insert(UploadStream::new(id, window, &self.shared));
            if let BodyLength::Known(length) = request.length {
                upload.set_announced(length);
            }
        }
        let mut priority = head.as_ref().ok().and_then(|details| details.priority).unwrap_or_default();
        if let Some(index) = early_priorities.iter().position(|(stream, _)| *stream == id) {
            priority = early_priorities.remove(index).map_or(priority, |(_, early)| early);
        }
        let window = self.sender.borrow().stream_window;
        let stream = Http2Stream::new(id, upload, window, priority, cost);
        match is_accounted {
            Ok(()) => {}
            Err(StreamRefusal::Connection) => return Ok(self.defer_or_refuse(stream, kept, section.ends_stream)),
            Err(refusal) => {
                self.refuse_stream(id, refusal);
                return Ok(FrameOutcome::Continue);
            }
        }
        self.set_read_size(request);
        self.streams.borrow_mut().push(Rc::clone(&stream));
        let handle = StreamHandle { connection: Rc::clone(self), stream };
        Ok(FrameOutcome::Request(IncomingRequest { handle, head, at: self.read_at.get() }))
    }

    /// The response of a stream beside many others is read in small pieces at first.
    fn set_read_size(&self, request: &mut Request) {
        if self.streams.borrow().len() >= READERS_MAX {
            request.read_size = ReadSize::Least;
        }
    }

    /// Keeps a request until the connection has memory for its stream.
    fn defer_or_refuse(
        &self,
        stream: Rc<Http2Stream<B>>,
        kept: Option<KeptFields>,
        has_ended: bool,
    ) -> FrameOutcome<B> {
        let accounted = kept.ok_or(StreamRefusal::Connection).and_then(|fields| {
            let deferred = DeferredStream { stream: Rc::clone(&stream), fields, has_ended, at: self.read_at.get() };
            self.shared.account.account_deferred(deferred.cost()).map(|()| deferred)
        });
        match accounted {
            Ok(deferred) => {
                self.streams.borrow_mut().push(stream);
                self.deferred.borrow_mut().push(deferred);
            }
            Err(refusal) => self.refuse_stream(stream.id, refusal),
        }
        FrameOutcome::Continue
    }

    /// The oldest request that waits, if there is memory for its stream now.
    fn take_deferred(self: &Rc<Self>, state: &mut ReceiveState, request: &mut Request) -> Option<IncomingRequest<B>> {
        if !self.shared.account.has_deferred() {
            return None;
        }
        let DeferredStream { stream, fields, has_ended, at } = self.deferred.borrow_mut().take()?;
        let reader = &mut state.reader;
        reader.begin(request);
        fields.read(|field| reader.receive(field, &self.limits, request));
        let head = reader.finish(has_ended, &self.limits, request);
        self.set_read_size(request);
        Some(IncomingRequest { handle: StreamHandle { connection: Rc::clone(self), stream }, head, at })
    }

    /// Requests that wait, if there is memory for the oldest.
    pub(crate) fn deferred_to_begin(&self) -> Option<usize> {
        if !self.shared.account.has_deferred() {
            return None;
        }
        let deferred = self.deferred.borrow();
        deferred.has_room().then_some(deferred.len())
    }

    /// When the oldest request began to wait for memory.
    pub(crate) fn deferred_since(&self) -> Option<Instant> {
        self.deferred.borrow().since()
    }

    /// Refuses the requests that wait since `time` or longer.
    pub(crate) fn refuse_deferred(&self, time: Instant) {
        loop {
            let Some(stream) = self.deferred.borrow_mut().take_older(time) else { return };
            self.refuse_waiting(&stream);
        }
    }

    pub(super) fn refuse_waiting(&self, stream: &Rc<Http2Stream<B>>) {
        self.shared.account.count_refusal(StreamRefusal::Connection);
        self.counts.borrow_mut().charge_reset();
        self.reset(stream, Http2ErrorCode::RefusedStream);
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
            if !self.knows_settings.replace(true) {
                let streams = self.streams.borrow();
                let uploads = streams.iter().filter_map(|stream| stream.upload.as_ref());
                uploads.for_each(|upload| upload.shrink_window(WINDOW_DEFAULT_BYTES - WINDOW_FIRST));
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

    /// Resets a stream because of what the client sent.
    fn reset_by_fault(&self, stream: &Rc<Http2Stream<B>>, code: Http2ErrorCode) {
        self.counts.borrow_mut().charge_reset();
        if let Some(upload) = &stream.upload {
            let is_window = matches!(code, Http2ErrorCode::FlowControl);
            upload.reset(if is_window { UploadFault::Window } else { UploadFault::Syntax }.refusal());
        }
        self.reset(stream, code);
    }

    /// Resets a stream.
    pub(super) fn reset(&self, stream: &Rc<Http2Stream<B>>, code: Http2ErrorCode) {
        if stream.reset.get().is_some() {
            return;
        }
        self.sender.borrow_mut().write_frame(frame::RST_STREAM, 0, stream.id, &(code as u32).to_be_bytes());
        self.close(stream, true);
        stream.end_by(code, RequestRefusal::BodyTruncated);
        self.shared.wake();
    }

    /// Resets a stream that never was in `streams`.
    fn write_reset(&self, id: u32, code: Http2ErrorCode) {
        self.counts.borrow_mut().charge_reset();
        self.send_reset(id, code);
    }

    fn send_reset(&self, id: u32, code: Http2ErrorCode) {
        self.sender.borrow_mut().write_frame(frame::RST_STREAM, 0, id, &(code as u32).to_be_bytes());
        self.remember(ClosedStream { id, was_reset: true });
    }

    /// Streams that are open for the client. Others remain until their tasks are polled again; the
    /// memory that is accounted for them bounds their number.
    fn open_streams(&self) -> usize {
        let streams = self.streams.borrow();
        streams.iter().filter(|stream| !(stream.has_sent_end.get() && stream.has_received_end())).count()
    }

    /// Refuses a stream for lack of memory. Its client has done nothing that it may not, but must
    /// stop at some time if its own connection has none. Memory that others hold is no fault of it.
    fn refuse_stream(&self, id: u32, refusal: StreamRefusal) {
        self.shared.account.count_refusal(refusal);
        if refusal == StreamRefusal::Connection {
            self.counts.borrow_mut().charge_reset();
        }
        self.send_reset(id, Http2ErrorCode::RefusedStream);
    }

    /// Removes a stream whose last frame was handed over or received.
    pub(super) fn close(&self, stream: &Rc<Http2Stream<B>>, was_reset: bool) {
        let mut streams = self.streams.borrow_mut();
        let Ok(index) = streams.binary_search_by_key(&stream.id, |other| other.id) else { return };
        streams.remove(index);
        drop(streams);
        self.sender.borrow_mut().remove(stream);
        if self.shared.account.has_deferred() {
            self.deferred.borrow_mut().remove(stream.id);
        }
        self.remember(ClosedStream { id: stream.id, was_reset });
    }

    /// Fills the body of a response. The client may not read it: the space for more than a little
    /// is accounted for, and what is not granted stays in the sockets.
    fn poll_fill(&self, cx: &mut Context<'_>, stream: &Http2Stream<B>, body: &mut B) -> Poll<Result<(), BodyError>> {
        if stream.read_grant.get() == 0 {
            let is_granted = self.shared.account.account(READ_BYTES);
            stream.read_grant.set(if is_granted { READ_BYTES } else { 0 });
            body.set_read_size(if is_granted { ReadSize::Normal } else { ReadSize::Least });
        }
        let filled = body.poll_fill(cx);
        if filled.is_pending() || body.data().is_empty() {
            self.shared.release(stream.read_grant.take());
        }
        filled
    }

    fn remember(&self, stream: ClosedStream) {
        let mut closed = self.closed.borrow_mut();
        if closed.len() >= CLOSED_MAX {
            closed.pop_front();
        }
        closed.push_back(stream);
    }

    /// Hands over what the windows and the room allow.
    pub(super) fn pump(&self) {
        let frames = self.sender.borrow_mut().pump();
        if frames.all > 0 {
            // The client may answer each by an increment of two windows.
            self.counts.borrow_mut().explain_control(2 * frames.explained);
            self.shared.wake();
        }
    }

    /// Sends what was handed over. Ready when everything is sent. An error ends the connection:
    /// also `TimedOut`, when the client has accepted no byte in time.
    pub(crate) fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write_credits();
        self.sender.borrow_mut().end_wait();
        let sent = self.poll_send_out(cx);
        if self.sender.borrow().is_waiting() {
            cx.waker().wake_by_ref();
        }
        if self.is_receiving_paused.get() && self.sender.borrow().out.len() <= OUT_READ_MAX {
            self.is_receiving_paused.set(false);
            cx.waker().wake_by_ref();
        }
        sent
    }

    fn poll_send_out(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let polled = self.poll_write(cx)?;
            let timer = &mut *self.write_timer.borrow_mut();
            if polled.is_ready() && self.io.poll_flush(cx)?.is_ready() {
                timer.restart();
                self.sender.borrow_mut().out.shrink();
                return Poll::Ready(Ok(()));
            }
            // The system reports space late: a slow reader would seem to have stopped.
            ready!(timer.poll_check(cx));
            let sender = &mut *self.sender.borrow_mut();
            match self.io.write_unready(sender.out.front(), &[])? {
                Some(count) => {
                    timer.record_accepted();
                    sender.out.advance(count);
                    self.record_sent(count);
                }
                None if timer.record_blocked() => return Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                None => {}
            }
        }
    }

    /// Writes until nothing is left, or the socket accepts no more.
    fn poll_write(&self, cx: &mut Context<'_>) -> io::Result<Poll<()>> {
        loop {
            {
                let sender = &mut *self.sender.borrow_mut();
                while sender.out.len() > 0 {
                    match sender.out.poll_write(&self.io, cx)? {
                        Poll::Ready(count) => {
                            self.write_timer.borrow_mut().restart();
                            self.record_sent(count);
                        }
                        Poll::Pending => return Ok(Poll::Pending),
                    }
                }
                sender.room_waiters.drain(..).for_each(|stream| stream.wake());
            }
            self.pump();
            // Bodies that were sent may let the windows of uploads open.
            self.write_credits();
            if self.sender.borrow().out.len() == 0 {
                return Ok(Poll::Ready(()));
            }
        }
    }

    /// Bytes that the socket has accepted.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent_bytes.get()
    }

    fn record_sent(&self, count: usize) {
        self.sent_bytes.set(self.sent_bytes.get() + count as u64);
        self.counts.borrow_mut().record_sent(count);
    }

    /// Opens the windows of the connection and of streams by what was received and read.
    fn write_credits(&self) {
        let was_withheld = self.shared.is_withheld();
        let credit = self.shared.take_credit();
        self.relief.observe(self.shared.is_withheld());
        if let Some(increment) = credit {
            if was_withheld {
                // Their clocks run again.
                self.streams
                    .borrow()
                    .iter()
                    .filter_map(|stream| stream.upload.as_ref())
                    .for_each(|upload| upload.wake());
            }
            self.sender.borrow_mut().write_frame(frame::WINDOW_UPDATE, 0, 0, &increment.to_be_bytes());
        }
        let credits = &mut *self.shared.credits.borrow_mut();
        if credits.is_empty() {
            return;
        }
        let mut sender = self.sender.borrow_mut();
        for (id, increment) in credits.drain(..) {
            let streams = self.streams.borrow();
            if streams.binary_search_by_key(&id, |stream| stream.id).is_ok() {
                sender.write_frame(frame::WINDOW_UPDATE, 0, id, &increment.to_be_bytes());
            }
        }
    }

    /// Tells the client that the connection ends: which streams are still answered, and why.
    fn write_goaway(&self, last_stream: u32, code: Http2ErrorCode) {
        let payload = [last_stream.to_be_bytes(), (code as u32).to_be_bytes()].concat();
        self.sender.borrow_mut().write_frame(frame::GOAWAY, 0, 0, &payload);
    }

    /// Ends the connection at once: resets every stream, tells the client why.
    pub(crate) fn abort(&self, code: Http2ErrorCode) {
        // A later GOAWAY must not name a higher stream (RFC 9113 section 6.8).
        self.write_goaway(self.last_stream.get().min(self.accepted_max.get()), code);
        self.accepted_max.set(0);
        self.end_streams();
    }

    /// Ends every stream without a frame: the connection is over.
    pub(crate) fn end_streams(&self) {
        self.deferred.borrow_mut().clear();
        let streams = std::mem::take(&mut *self.streams.borrow_mut());
        for stream in streams {
            self.sender.borrow_mut().remove(&stream);
            stream.end_by(Http2ErrorCode::Cancel, RequestRefusal::BodyTruncated);
        }
    }

    /// Tells the client to open no more streams. Those that it opens until it knows are still
    /// answered, so that no request is lost (RFC 9113 section 6.8).
    pub(crate) fn begin_drain(&self) {
        // Both arrive together. A PING after a GOAWAY is an error for some clients (h2 of Python).
        self.sender.borrow_mut().write_frame(frame::PING, 0, 0, &DRAIN_PING);
        self.write_goaway(u32::MAX >> 1, Http2ErrorCode::NoError);
    }

    /// Whether the client knows that it must open no more streams.
    pub(crate) fn is_drain_acknowledged(&self) -> bool {
        self.drain_acknowledged.get()
    }

    /// Accepts no more streams.
    pub(crate) fn finish_drain(&self) {
        self.accepted_max.set(self.last_stream.get());
        self.write_goaway(self.last_stream.get(), Http2ErrorCode::NoError);
    }

    /// Finds out whether the client is there: it must answer. Returns the bytes that the socket
    /// accepts even if the client is gone: the frame itself, unless others wait before it.
    pub(crate) fn write_probe(&self) -> u64 {
        let mut sender = self.sender.borrow_mut();
        let before = sender.out.len();
        sender.write_frame(frame::PING, 0, 0, &PROBE_PING);
        if before == 0 { sender.out.len() as u64 } else { 0 }
    }

    /// Sends what is left and discards what the client still sends, for a bounded time, so that a
    /// reset by the system does not destroy the last frames on their way.
    pub(crate) async fn linger(&self, timeout: Duration) {
        const DISCARDED_MAX: usize = 1 << 20;
        let mut deadline = crate::http::deadline::ResettableDeadline::after(timeout);
        let (mut discarded, mut space) = (0, vec![0; 4 << 10]);
        std::future::poll_fn(|cx| {
            if deadline.poll(cx).is_ready() || self.poll_end(cx).is_err() {
                return Poll::Ready(());
            }
            while let Poll::Ready(read) = self.io.poll_read(cx, &mut space) {
                match read {
                    Ok(count) if count > 0 && discarded < DISCARDED_MAX => discarded += count,
                    // The end, an error, or too much.
                    _ => return Poll::Ready(()),
                }
            }
            Poll::Pending
        })
        .await;
    }

    /// Sends what is gathered and shuts down the sending side, as far as it is possible now.
    fn poll_end(&self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.poll_send(cx)?.is_ready() {
            let mut is_shut = self.is_shut.get();
            let _pending_is_retried = self.io.poll_shutdown_once(cx, &mut is_shut)?;
            self.is_shut.set(is_shut);
        }
        Ok(())
    }
}

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
    connection: Rc<Http2Connection<B>>,
    stream: Rc<Http2Stream<B>>,
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

    /// Whether the stream was ended because its upstream did not read what it held.
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

    /// Whether the client allows no byte of this body, and not because of other streams.
    pub(crate) fn is_window_closed(&self) -> bool {
        self.stream.window.get() <= 0 || self.connection.sender.borrow().window <= 0
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

impl ReceiveState {
    fn new() -> Self {
        ReceiveState {
            decoder: HpackDecoder::new(),
            reader: HeadReader::default(),
            section: None,
            has_preface: false,
            has_settings: false,
            early_priorities: VecDeque::new(),
            section_began: None,
        }
    }
}

#[cfg(test)]
mod tests;
