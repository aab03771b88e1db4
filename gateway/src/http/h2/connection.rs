//! One connection: the states of its streams, and its frames to the client that are no stream's.
//!
//! Everything happens on one thread. The task that owns the connection polls `poll_request` and
//! `poll_send`; the tasks of streams use their `StreamHandle`. Invariants: a stream is in `streams`
//! from its head to its last frame in both directions; no `RefCell` of the connection is borrowed
//! while a body is polled.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::time::Instant;

use super::abuse::{FrameCounts, Http2Client};
use super::account::{STREAMS_MAX, WINDOW_BASE};
use super::deferred::DeferredStreams;
use super::first_window::FirstWindow;
use super::frame::{self, Http2ErrorCode, WINDOW_DEFAULT_BYTES};
use super::memory_budget::{MemoryBudget, MemoryLimits, StreamRefusal};
use super::receiver::{ReceiveState, Receiver};
use super::request_body::{UploadFault, UploadStream, WINDOW_FIRST};
use super::request_head::HeadReader;
use super::sender::{OUT_MAX, Sender};
use super::shared::ConnectionShared;
use super::stream::Http2Stream;
use super::withheld::WithheldWindow;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::{ReadBuffer, ReadSize};
use crate::http::limits::HttpLimits;
use crate::http::refusal::RequestRefusal;
use crate::http::transport::TransportStream;
use crate::http::write_timer::WriteTimer;

/// Bytes of a response that are read at once from an upstream, once its head was sent.
const READ_BYTES: usize = 64 << 10;
/// Unsent bytes beyond which nothing more is received: a client that does not read gets no further
/// acknowledgements and resets either. Responses alone stay below it.
pub(super) const OUT_READ_MAX: usize = 2 * OUT_MAX;
/// Closed streams that are remembered: frames for them may be under way.
const CLOSED_MAX: usize = 256;
/// The payload of the PING that finds out when the client knows of the end of the connection.
pub(super) const DRAIN_PING: [u8; 8] = *b"draining";
/// The payload of the PING that finds out whether the client is there.
const PROBE_PING: [u8; 8] = *b"probing.";

/// One connection. `B` is the body of its responses.
pub(crate) struct Http2Connection<B> {
    pub(super) io: TransportStream,
    pub(super) shared: Rc<ConnectionShared>,
    pub(super) limits: HttpLimits,
    pub(super) receiver: RefCell<Receiver>,
    pub(super) sender: RefCell<Sender<B>>,
    pub(super) streams: RefCell<Vec<Rc<Http2Stream<B>>>>,
    /// Streams whose requests wait until there is memory for them. They are in `streams` too.
    pub(super) deferred: RefCell<DeferredStreams<B>>,
    pub(super) withheld: WithheldWindow,
    pub(super) closed: RefCell<VecDeque<ClosedStream>>,
    pub(super) counts: RefCell<FrameCounts>,
    pub(super) write_timer: RefCell<WriteTimer>,
    /// Bytes that the client has accepted.
    pub(super) sent_bytes: Cell<u64>,
    /// When bytes were received last.
    pub(super) read_at: Cell<Instant>,
    pub(super) last_stream: Cell<u32>,
    /// Streams above it are ignored: the client was told.
    pub(super) accepted_max: Cell<u32>,
    pub(super) drain_acknowledged: Cell<bool>,
    pub(super) first_window: RefCell<FirstWindow>,
    /// Nothing is received until the client has accepted bytes.
    pub(super) is_receiving_paused: Cell<bool>,
    pub(super) is_shut: Cell<bool>,
}

/// A stream that has ended.
#[derive(Clone, Copy)]
pub(super) struct ClosedStream {
    pub(super) id: u32,
    /// Frames of the client may still arrive, because the gateway has reset it.
    pub(super) was_reset: bool,
}

impl<B: BodySource> Http2Connection<B> {
    pub(crate) fn new(
        (io, received): (TransportStream, ReadBuffer),
        client: Http2Client,
        limits: HttpLimits,
    ) -> Rc<Self> {
        let bytes = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
        let memory = MemoryLimits { process: bytes(limits.http2_memory), address: bytes(limits.http2_memory_per_ip) };
        let shared = ConnectionShared::new(MemoryBudget::new(client.address, memory));
        let connection = Http2Connection {
            io,
            receiver: RefCell::new(Receiver { buffer: received, state: ReceiveState::new() }),
            sender: RefCell::new(Sender::new(&shared)),
            deferred: RefCell::new(DeferredStreams::new(&shared)),
            shared,
            streams: RefCell::default(),
            withheld: WithheldWindow::default(),
            closed: RefCell::default(),
            counts: RefCell::new(FrameCounts::new(client)),
            write_timer: RefCell::new(WriteTimer::new(limits.idle_timeout)),
            sent_bytes: Cell::new(0),
            read_at: Cell::new(Instant::now()),
            last_stream: Cell::new(0),
            accepted_max: Cell::new(u32::MAX),
            drain_acknowledged: Cell::new(false),
            first_window: RefCell::new(FirstWindow::new()),
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

    pub(super) fn find(&self, id: u32) -> Option<Rc<Http2Stream<B>>> {
        let streams = self.streams.borrow();
        let index = streams.binary_search_by_key(&id, |stream| stream.id).ok()?;
        Some(Rc::clone(&streams[index]))
    }

    /// The record of a stream that has ended. A forgotten stream may have been reset.
    pub(super) fn closed(&self, id: u32) -> Option<ClosedStream> {
        let closed = self.closed.borrow();
        let known = closed.iter().rev().find(|closed| closed.id == id).copied();
        known.or_else(|| (closed.len() >= CLOSED_MAX).then_some(ClosedStream { id, was_reset: true }))
    }

    /// Whether the last GOAWAY says that the stream is ignored. Frames that the client sent before
    /// it received that are no error (RFC 9113 section 6.8).
    pub(super) fn is_ignored(&self, id: u32) -> bool {
        id > self.accepted_max.get()
    }

    pub(super) fn is_unused(&self, id: u32) -> bool {
        id > self.last_stream.get()
    }

    pub(super) fn uploads_of_streams(&self, act: impl FnMut(&UploadStream)) {
        self.streams.borrow().iter().filter_map(|stream| stream.upload.as_deref()).for_each(act);
    }

    /// Resets a stream because of what the client sent.
    pub(super) fn reset_by_fault(&self, stream: &Rc<Http2Stream<B>>, code: Http2ErrorCode) {
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
    pub(super) fn write_reset(&self, id: u32, code: Http2ErrorCode) {
        self.counts.borrow_mut().charge_reset();
        self.send_reset(id, code);
    }

    fn send_reset(&self, id: u32, code: Http2ErrorCode) {
        self.sender.borrow_mut().write_frame(frame::RST_STREAM, 0, id, &(code as u32).to_be_bytes());
        self.remember(ClosedStream { id, was_reset: true });
    }

    /// Streams that are open for the client. Others remain until their tasks are polled again; the
    /// memory that is accounted for them bounds their number.
    pub(super) fn open_streams(&self) -> usize {
        let streams = self.streams.borrow();
        streams.iter().filter(|stream| !(stream.has_sent_end.get() && stream.has_received_end())).count()
    }

    /// Refuses a stream for lack of memory. Its client has done nothing that it may not, but must
    /// stop at some time if its own connection has none. Memory that others hold is no fault of it.
    pub(super) fn refuse_stream(&self, id: u32, refusal: StreamRefusal) {
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
    pub(super) fn poll_fill(
        &self,
        cx: &mut Context<'_>,
        stream: &Http2Stream<B>,
        body: &mut B,
    ) -> Poll<Result<(), BodyError>> {
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

    /// Bytes that the socket has accepted.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent_bytes.get()
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
}
