//! Reads the field sections of a client: the heads of requests, which become streams at once or
//! when there is memory for them, and trailers.

use std::rc::Rc;

use tokio::time::Instant;

use super::abuse::FrameAbuse;
use super::account::{STREAM_COST, STREAMS_MAX};
use super::connection::Http2Connection;
use super::deferred::{DeferredStream, KeptFields};
use super::frame::{self, FrameHead, Http2ErrorCode, number, unpadded};
use super::memory_budget::StreamRefusal;
use super::receiver::{PartialSection, ReceiveState};
use super::repeated_head::ReceivedSection;
use super::request_body::UploadStream;
use super::request_head::{HeadDetails, HeadRefusal, is_name, is_value};
use super::stream::Http2Stream;
use super::stream_handle::StreamHandle;
use crate::http::body::BodySource;
use crate::http::buffer::{self, ReadSize};
use crate::http::fields::Fields;
use crate::http::grpc;
use crate::http::limits::HttpLimits;
use crate::http::message::{BodyLength, Request};

/// The fields of a head are copied for the upstream.
const HEAD_COPIES: usize = 2;
/// With so many open streams, only a little of the responses of further ones is read with their
/// heads: their client may not take them.
const READERS_MAX: usize = 4;
/// Bytes of an encoded field section in several frames, at least; and as a multiple of the limit of
/// a head. A larger one ends the connection, a smaller one has a response of its own.
const SECTION_MIN: usize = 64 << 10;
const SECTION_FACTOR: usize = 4;
/// Bytes of the fields of a request that waits, as a multiple of the limit of a head: their lengths
/// come on top.
const KEPT_FACTOR: usize = 4;

/// The effect of one frame.
pub(super) enum FrameOutcome<B: BodySource> {
    Continue,
    Request(IncomingRequest<B>),
}

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

/// Reads the head of a request from its section into `request`. `kept`: a place for its fields,
/// which is taken away if they are too many. After a refusal of the head, `request` is its
/// description.
///
/// # Errors
/// The section cannot be decoded, and no later one.
#[expect(clippy::too_many_arguments, reason = "a section, and what it is read into")]
fn read_head(
    state: &mut ReceiveState,
    (bytes, ends_stream): (&[u8], bool),
    limits: &HttpLimits,
    kept: &mut Option<KeptFields>,
    request: &mut Request,
) -> Result<Result<HeadDetails, HeadRefusal>, Http2ErrorCode> {
    let ReceiveState { decoder, reader, repeated, .. } = state;
    let section = ReceivedSection { bytes, table_changes: decoder.table_changes(), ends_stream };
    if kept.is_none()
        && let Some(details) = repeated.restore(&section, request)
    {
        return Ok(Ok(details));
    }
    reader.begin(request);
    let decoded = decoder.decode(bytes, |field| {
        reader.receive(field, limits, request);
        if kept.as_mut().is_some_and(|kept| !kept.push(field)) {
            *kept = None;
        }
    });
    decoded.map_err(|_| Http2ErrorCode::Compression)?;
    let head = reader.finish(ends_stream, limits, request);
    if let Ok(details) = head
        && decoder.table_changes() == section.table_changes
    {
        repeated.keep(&section, details, request);
    }
    Ok(head)
}

impl<B: BodySource> Http2Connection<B> {
    #[expect(clippy::too_many_arguments, reason = "a frame, and what it acts on")]
    pub(super) fn receive_headers(
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
    pub(super) fn receive_continuation(
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
        let may_wait = self.shared.account.is_short(self.shared.exposable()) || !self.deferred.borrow().is_empty();
        let mut kept = may_wait.then(|| KeptFields::new(KEPT_FACTOR * self.limits.header_bytes));
        let head = read_head(state, (bytes, section.ends_stream), &self.limits, &mut kept, request)?;
        if self.is_ignored(id) {
            // The client may send the request again elsewhere: it was told so.
            self.counts.borrow_mut().charge_control();
            return Ok(FrameOutcome::Continue);
        }
        if section.depends_on_itself {
            self.write_reset(id, Http2ErrorCode::Protocol);
            return Ok(FrameOutcome::Continue);
        }
        if let Err(refused) = &head {
            // The response explains one of two. A malformed request is reset, which is counted
            // then.
            (0..if refused.is_malformed { 1 } else { 2 }).for_each(|_| {
                self.counts.borrow_mut().charge_reset();
            });
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
        let exposed_before = self.shared.account.exposed();
        let mut upload = None;
        if !section.ends_stream {
            let window = self.first_window.borrow().bytes();
            let upload = upload.insert(UploadStream::new(id, window, &self.shared));
            if let BodyLength::Known(length) = request.length {
                upload.set_announced(length);
            }
        }
        let mut priority = head.as_ref().ok().and_then(|details| details.priority).unwrap_or_default();
        let early_priorities = &mut state.early_priorities;
        if let Some(index) = early_priorities.iter().position(|(stream, _)| *stream == id) {
            priority = early_priorities.remove(index).map_or(priority, |(_, early)| early);
        }
        let window = self.sender.borrow().stream_window;
        let is_call = upload.is_some() && head.is_ok() && grpc::is_call(request);
        let stream = Http2Stream::new(id, upload, window, priority, cost);
        stream.is_call.set(is_call);
        match is_accounted {
            Ok(()) => {}
            Err(StreamRefusal::Connection) => {
                let has_exposed = self.shared.account.exposed() > exposed_before;
                return Ok(self.defer_or_refuse(stream, kept, (section.ends_stream, has_exposed)));
            }
            Err(refusal) => {
                self.refuse_stream(id, refusal);
                return Ok(FrameOutcome::Continue);
            }
        }
        self.set_read_size(request, &stream);
        self.streams.borrow_mut().push(Rc::clone(&stream));
        let handle = StreamHandle { connection: Rc::clone(self), stream };
        Ok(FrameOutcome::Request(IncomingRequest { handle, head, at: self.read_at.get() }))
    }

    /// Sets how much of a response is read at first: beside many other streams a short response at
    /// once, as long as the connection may hold those. Memory beside uploads is left to them.
    fn set_read_size(&self, request: &mut Request, stream: &Http2Stream<B>) {
        if self.streams.borrow().len() < READERS_MAX {
            return;
        }
        let is_granted = stream.upload.is_none() && self.shared.account.account_short_read(buffer::SHORT);
        stream.read_grant.set(if is_granted { buffer::SHORT } else { 0 });
        request.read_size = if is_granted { ReadSize::Short } else { ReadSize::Least };
    }

    /// Keeps a request until the connection has memory for its stream. `has_exposed`: its window
    /// lets the client send more than before.
    fn defer_or_refuse(
        &self,
        stream: Rc<Http2Stream<B>>,
        kept: Option<KeptFields>,
        (has_ended, has_exposed): (bool, bool),
    ) -> FrameOutcome<B> {
        let accounted = kept.ok_or(StreamRefusal::Connection).and_then(|mut fields| {
            fields.shrink();
            let deferred = DeferredStream { stream: Rc::clone(&stream), fields, has_ended, at: self.read_at.get() };
            self.shared.account.account_deferred(deferred.cost(), has_exposed).map(|()| deferred)
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
    pub(super) fn take_deferred(
        self: &Rc<Self>,
        state: &mut ReceiveState,
        request: &mut Request,
    ) -> Option<IncomingRequest<B>> {
        if !self.shared.account.has_deferred() {
            return None;
        }
        let DeferredStream { stream, fields, has_ended, at } = self.deferred.borrow_mut().take()?;
        let reader = &mut state.reader;
        reader.begin(request);
        fields.read(|field| reader.receive(field, &self.limits, request));
        let head = reader.finish(has_ended, &self.limits, request);
        self.set_read_size(request, &stream);
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::KnownField;

    const GET: &[u8] = b"\x82\x84\x87";
    /// `:authority: a.test` and `x: 1`, inserted into the table and then the indices 63 and 62.
    const INSERTIONS: &[u8] = b"\x82\x84\x87\x41\x06a.test\x40\x01x\x011";
    const REPEATED: &[u8] = b"\x82\x84\x87\xbf\xbe";
    /// `:authority` and one line without the table: with other values for the second.
    const LITERAL: &[u8] = b"\x82\x84\x87\x01\x06a.test\x00\x01x\x012";
    const TRAILERS: &[u8] = b"\x82\x84\x87\x01\x06a.test\x00\x02te\x08trailers";
    const NO_FIELDS: &[u8] = b"\x82\x84\x87\x01\x06a.test";
    const PRIORITY: &[u8] = b"\x82\x84\x87\x01\x06a.test\x00\x08priority\x03u=1";
    const LONG_POST: &[u8] = b"\x83\x84\x87\x01\x06a.test\x0f\x0d\x015\x0f\x14\x0c100-continue";
    const OTHER_FORM: &[u8] = b"\x82\x04\x04/%78\x87\x01\x06A.TEST\x00\x01x\x012";

    fn read(state: &mut ReceiveState, section: &[u8], ends_stream: bool, request: &mut Request) -> String {
        let head = read_head(state, (section, ends_stream), &HttpLimits::default(), &mut None, request);
        let head = head.expect("the section can be decoded");
        let Request { method, authority, target, received_path, length, connection, fields, upgrade, .. } = &*request;
        let details = head.map(|details| (details.priority, details.bytes));
        let target = (method, authority, target, received_path);
        format!("{details:?} {target:?} {length:?} {connection:?} {fields:?} {upgrade:?}")
    }

    #[test]
    fn previous_section_does_not_change_the_result() {
        let all = [GET, REPEATED, LITERAL, TRAILERS, NO_FIELDS, PRIORITY, LONG_POST, OTHER_FORM];
        let sections = || all.iter().flat_map(|section| [(*section, true), (*section, false)]);
        let mut repetitions = 0;
        for before in sections() {
            for (section, ends_stream) in sections() {
                let [mut used, mut new] = [ReceiveState::new(), ReceiveState::new()];
                let mut requests = [Request::default(), Request::default()];
                for state in [&mut used, &mut new] {
                    read(state, INSERTIONS, true, &mut Request::default());
                }
                for request in &mut requests {
                    read(&mut used, before.0, before.1, request);
                    // A line of the gateway belongs to that exchange, and so does an empty body.
                    request.fields.add(KnownField::Via, "2.0 tidegate");
                    request.length = BodyLength::Empty;
                }
                let expected = read(&mut new, section, ends_stream, &mut Request::default());
                for request in &mut requests {
                    assert_eq!(read(&mut used, section, ends_stream, request), expected, "{before:?}, {section:?}");
                    assert!(!request.repeats_previous || before == (section, ends_stream), "{before:?}, {section:?}");
                    repetitions += usize::from(request.repeats_previous);
                }
            }
        }
        // All but those that are refused (two without an authority, one without its body) and two
        // without a line.
        assert_eq!(repetitions, 2 * (sections().count() - 5));
    }

    #[test]
    fn index_that_means_something_else_is_decoded_again() {
        let (mut state, mut request) = (ReceiveState::new(), Request::default());
        read(&mut state, INSERTIONS, true, &mut request);
        read(&mut state, REPEATED, true, &mut request);
        read(&mut state, REPEATED, true, &mut request);
        assert!(request.repeats_previous);
        // Two more insertions: the same indices are other fields.
        let other = b"\x82\x84\x87\x41\x06b.test\x40\x01x\x012";
        read(&mut state, other, true, &mut Request::default());
        read(&mut state, REPEATED, true, &mut request);
        assert!(!request.repeats_previous);
        assert_eq!((&*request.authority, request.fields.named(b"x").next()), ("b.test", Some(&b"2"[..])));
    }

    #[test]
    fn removed_line_makes_the_head_a_new_one() {
        let (mut state, mut request) = (ReceiveState::new(), Request::default());
        for _ in 0..2 {
            read(&mut state, LITERAL, true, &mut request);
            request.fields.retain(|field| field.name != b"x");
        }
        read(&mut state, LITERAL, true, &mut request);
        assert!(!request.repeats_previous && request.fields.named(b"x").next().is_some());
    }
}
