//! The sending side of a connection: responses become frames, in the order of their priorities and
//! as far as the client's windows allow.

use std::rc::Rc;

use super::frame::{self, END_HEADERS, END_STREAM, FrameHead, PAYLOAD_MAX, WINDOW_DEFAULT};
use super::hpack_encode;
use super::out_queue::OutQueue;
use super::shared::ConnectionShared;
use super::stream::{Http2Stream, OutgoingBody};
use crate::http::body::BodySource;
use crate::http::fields::Fields;
use crate::http::message::Response;

/// Unsent bytes of a connection beyond which nothing more is produced: about what a socket accepts
/// at once, and four TLS records. One frame, or one head, may exceed it.
pub(super) const OUT_MAX: usize = 64 << 10;
/// Payloads from memory that are not copied.
const SHARED_MIN: usize = 4 << 10;

/// Windows below which a frame that the window cuts short explains no frame of the client.
const DRIBBLE_MAX: i64 = 512;

/// Frames that were written.
#[derive(Clone, Copy, Default)]
pub(super) struct PumpedFrames {
    pub(super) all: u32,
    pub(super) explained: u32,
}

/// Frames that are to be sent, and the streams that have more.
pub(super) struct Sender<B> {
    pub(super) out: OutQueue,
    /// Bytes of bodies that the client allows on the connection.
    pub(super) window: i64,
    /// The window of a new stream.
    pub(super) stream_window: i64,
    /// Streams whose body has bytes.
    ready: Vec<Rc<Http2Stream<B>>>,
    /// Streams that wait for room in `out`.
    pub(super) room_waiters: Vec<Rc<Http2Stream<B>>>,
    turn: u64,
    /// The urgency of a stream that may have more bytes once its task was polled: less urgent
    /// streams wait for that.
    awaited: Option<AwaitedStream>,
    has_sent_section: bool,
    section: Vec<u8>,
    shared: Rc<ConnectionShared>,
}

/// A stream whose bytes were all sent while less urgent streams had some.
struct AwaitedStream {
    id: u32,
    urgency: u8,
    /// The tasks of streams were polled once since.
    is_polled: bool,
}

impl<B: BodySource> Sender<B> {
    pub(super) fn new(shared: &Rc<ConnectionShared>) -> Self {
        Sender {
            shared: Rc::clone(shared),
            out: OutQueue::default(),
            window: WINDOW_DEFAULT,
            stream_window: WINDOW_DEFAULT,
            ready: Vec::new(),
            room_waiters: Vec::new(),
            turn: 0,
            awaited: None,
            has_sent_section: false,
            section: Vec::new(),
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.out.len() < OUT_MAX
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of a frame")]
    pub(super) fn write_frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.out.write(|text| frame::write_frame(text, kind, flags, stream, payload));
    }

    /// Writes the head of a response, final or interim.
    pub(super) fn write_head(&mut self, stream: u32, response: &Response, flags: u8) {
        self.write_section(stream, flags, |section| hpack_encode::write_response(response, section));
    }

    /// Writes trailers, which end the stream.
    pub(super) fn write_trailers(&mut self, stream: u32, trailers: &Fields) {
        self.write_section(stream, END_STREAM, |section| hpack_encode::write_fields(trailers, section));
    }

    fn write_section(&mut self, stream: u32, flags: u8, write: impl FnOnce(&mut Vec<u8>)) {
        let Sender { section, out, has_sent_section, .. } = self;
        section.clear();
        if !std::mem::replace(has_sent_section, true) {
            section.push(hpack_encode::EMPTY_TABLE);
        }
        write(section);
        out.write(|text| {
            let mut pieces = section.chunks(PAYLOAD_MAX).peekable();
            let (mut kind, mut flags) = (frame::HEADERS, flags);
            while let Some(piece) = pieces.next() {
                flags |= if pieces.peek().is_none() { END_HEADERS } else { 0 };
                frame::write_frame(text, kind, flags, stream, piece);
                (kind, flags) = (frame::CONTINUATION, 0);
            }
        });
        if section.capacity() > PAYLOAD_MAX {
            *section = Vec::new();
        }
    }

    /// The body of the stream has bytes.
    pub(super) fn add_ready(&mut self, stream: &Rc<Http2Stream<B>>) {
        if !stream.is_ready.replace(true) {
            self.ready.push(Rc::clone(stream));
            self.awaited.take_if(|awaited| awaited.id == stream.id);
        }
    }

    /// The stream has ended otherwise.
    pub(super) fn remove(&mut self, stream: &Rc<Http2Stream<B>>) {
        if stream.is_ready.replace(false) {
            self.ready.retain(|other| !Rc::ptr_eq(other, stream));
        }
        if !self.room_waiters.is_empty() {
            self.room_waiters.retain(|other| !Rc::ptr_eq(other, stream));
        }
    }

    /// Writes frames of the streams that are ready while there is room. Returns how many, without
    /// those that are short because the client has opened a window by so little.
    pub(super) fn pump(&mut self) -> PumpedFrames {
        let mut frames = PumpedFrames::default();
        while self.has_room() && self.window > 0 && !self.ready.is_empty() {
            let Some(index) = self.next_stream() else { break };
            let stream = Rc::clone(&self.ready[index]);
            if self.awaited.as_ref().is_some_and(|awaited| stream.priority.get().urgency > awaited.urgency) {
                break;
            }
            let window = stream.window.get().min(self.window);
            let is_filled = self.send_data(&stream);
            let is_dribble = window < DRIBBLE_MAX && !is_filled;
            frames.all += 1;
            frames.explained += u32::from(!is_dribble);
            if is_filled {
                self.shared.release(stream.read_grant.take());
                stream.is_ready.set(false);
                self.ready.swap_remove(index);
                stream.wake();
                self.await_more_of(&stream);
            }
        }
        frames
    }

    /// Makes less urgent streams wait for a stream that has not ended.
    fn await_more_of(&mut self, stream: &Http2Stream<B>) {
        let urgency = stream.priority.get().urgency;
        let has_others = self.ready.iter().any(|other| other.priority.get().urgency > urgency);
        if has_others && !stream.has_sent_end.get() {
            self.awaited = Some(AwaitedStream { id: stream.id, urgency, is_polled: false });
        }
    }

    /// The tasks of all streams that were woken have been polled. A stream that was emptied since
    /// the last time is awaited once more: its task may have been polled before.
    pub(super) fn end_wait(&mut self) {
        self.awaited.take_if(|awaited| std::mem::replace(&mut awaited.is_polled, true));
    }

    /// Whether streams wait for a more urgent one: the tasks of streams are to be polled.
    pub(super) fn is_waiting(&self) -> bool {
        self.awaited.is_some()
    }

    /// The stream whose turn it is: the most urgent; of those, the ones that are not useful in
    /// parts, one after the other; of the others, the one that was served longest ago (RFC 9218
    /// section 10).
    fn next_stream(&self) -> Option<usize> {
        if let [only] = &*self.ready {
            return (only.window.get() > 0).then_some(0);
        }
        let candidates = self.ready.iter().enumerate().filter(|(_, stream)| stream.window.get() > 0);
        let order = |stream: &Http2Stream<B>| (stream.priority.get().urgency, stream.served.get(), stream.id);
        candidates.min_by_key(|(_, stream)| order(stream)).map(|(index, _)| index)
    }

    /// Writes one frame. Returns whether the body has to be filled, or has ended.
    fn send_data(&mut self, stream: &Http2Stream<B>) -> bool {
        let mut outgoing = stream.outgoing.borrow_mut();
        let Some(OutgoingBody { body, remaining }) = &mut *outgoing else { return true };
        let allowed = usize::try_from(stream.window.get().min(self.window)).unwrap_or(0);
        let announced = remaining.map_or(usize::MAX, |left| usize::try_from(left).unwrap_or(usize::MAX));
        let available = body.data().len();
        let count = available.min(allowed).min(announced).min(PAYLOAD_MAX);
        if count == 0 {
            return true;
        }
        if let Some(left) = remaining {
            *left -= count as u64;
        }
        let is_last = *remaining == Some(0) && !body.may_have_trailers();
        let flags = if is_last { END_STREAM } else { 0 };
        let head = FrameHead { length: count, kind: frame::DATA, flags, stream: stream.id }.bytes();
        if count >= SHARED_MIN && body.complete_body().is_some() {
            self.out.write(|text| text.extend_from_slice(&head));
            self.out.push(body.take_bytes(count));
        } else {
            self.out.write(|text| {
                text.reserve(head.len() + count);
                text.extend_from_slice(&head);
                text.extend_from_slice(&body.data()[..count]);
            });
            body.consume(count);
        }
        let sent = count as i64;
        self.window -= sent;
        stream.window.set(stream.window.get() - sent);
        stream.sent.set(stream.sent.get() + count as u64);
        if stream.priority.get().is_incremental {
            self.turn += 1;
            stream.served.set(self.turn);
        }
        if is_last {
            stream.has_sent_end.set(true);
            return true;
        }
        body.data().is_empty()
    }
}
