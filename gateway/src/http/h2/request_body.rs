//! The body of a request, from its DATA frames to the pipeline.
//!
//! The window of the connection is opened again as soon as bytes have arrived, unless many are
//! held, so that a stream that is not read holds up no other. The window of a stream is opened as
//! its bytes are read: no more than it is held of one stream. It grows while its bytes are read and
//! the connection has memory, and shrinks to its share when other streams need that.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::client_clock::ClientClock;
use super::frame::PAYLOAD_MAX;
use super::shared::{ConnectionShared, UploadWindows};
use crate::http::body::{BodyError, BodySource};
use crate::http::exchange_clock::ExchangeTimeout;
use crate::http::fields::{Fields, matches_pattern};
use crate::http::h1;
use crate::http::limits::{HttpLimits, UnderscorePolicy};
use crate::http::message::{InterimResponses, Request, Response, StatusCode};
use crate::http::refusal::RequestRefusal;

/// Bytes of a body that a client may send before the gateway reads it.
pub(super) const WINDOW_FIRST: u32 = 16 << 10;
/// The same while the client has a large window of the connection that an upload has left: those of
/// all streams that may come fit into the base window.
pub(super) const WINDOW_FIRST_SMALL: u32 = 1 << 10;
/// A window is opened when so many of its bytes were read, or half of it.
const OPEN_BYTES: u32 = 128 << 10;
/// Received bytes are kept in pieces of this size: one space for all would be copied as it grows.
const PIECE_MAX: usize = 64 << 10;
/// Space for received bytes that is used again.
const REUSED_MAX: usize = 4 << 10;

/// The receiving side of one stream.
pub(crate) struct UploadStream {
    stream: u32,
    shared: Rc<ConnectionShared>,
    state: RefCell<UploadState>,
}

struct UploadState {
    /// Received and not yet taken; empty only if `later` is.
    received: Vec<u8>,
    /// Received after `received`.
    later: VecDeque<Vec<u8>>,
    /// Bytes that the client may still send.
    window: i64,
    /// Bytes that the client may send while none is read.
    granted: u32,
    /// The first window, below which `granted` does not shrink.
    granted_min: u32,
    /// Bytes beyond the window that one frame may have, which the client has sent before it used a
    /// smaller first window.
    overrun_allowed: u32,
    has_overrun: bool,
    /// The windows as the connection counts them.
    counted: UploadWindows,
    /// Bytes that were read since the window was last opened.
    read: u32,
    /// Bytes of the body that have arrived.
    arrived: u64,
    /// Bytes that had been read at the last check, if more were held.
    read_before: Option<u64>,
    unread_checks: u32,
    /// Bytes of the body that are still to come, if its length was announced.
    announced: Option<u64>,
    end: Option<UploadEnd>,
    trailers: Option<Box<Fields>>,
    /// Bytes of the pieces that are in memory, of which some are read.
    held: usize,
    /// Bytes of the piece that was taken, and those of it that are not read.
    taken: usize,
    taken_unread: usize,
    /// Bytes that are kept in case the request is sent again.
    kept: usize,
    /// Received bytes are dropped.
    is_discarded: bool,
    discarded: usize,
    waker: Option<Waker>,
}

/// How the receiving side of a stream has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum UploadEnd {
    Complete,
    /// For this reason.
    Reset(RequestRefusal),
}

/// A frame that the receiving side of a stream cannot accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UploadFault {
    /// More bytes than its window.
    Window,
    /// Not as many bytes as announced.
    Length,
    /// Trailers that are malformed, or bytes after the end.
    Syntax,
}

impl UploadFault {
    pub(super) fn refusal(self) -> RequestRefusal {
        match self {
            UploadFault::Window => RequestRefusal::BodyFlowControl,
            UploadFault::Length => RequestRefusal::BodyLength,
            UploadFault::Syntax => RequestRefusal::BodySyntax,
        }
    }
}

impl UploadStream {
    /// `window` is the first window.
    pub(super) fn new(stream: u32, window: u32, shared: &Rc<ConnectionShared>) -> Rc<Self> {
        let mut state = UploadState {
            received: Vec::new(),
            later: VecDeque::new(),
            window: window.into(),
            granted: window,
            granted_min: window,
            overrun_allowed: 0,
            has_overrun: false,
            counted: UploadWindows::default(),
            read: 0,
            arrived: 0,
            read_before: None,
            unread_checks: 0,
            announced: None,
            end: None,
            trailers: None,
            held: 0,
            taken: 0,
            taken_unread: 0,
            kept: 0,
            is_discarded: false,
            discarded: 0,
            waker: None,
        };
        state.recount(shared);
        Rc::new(UploadStream { stream, shared: Rc::clone(shared), state: RefCell::new(state) })
    }

    /// The length that the head has announced.
    pub(super) fn set_announced(&self, length: u64) {
        let state = &mut *self.state.borrow_mut();
        state.announced = Some(length);
        state.recount(&self.shared);
    }

    /// Bytes of the body that have arrived.
    pub(crate) fn arrived_bytes(&self) -> u64 {
        self.state.borrow().arrived
    }

    pub(super) fn has_ended(&self) -> bool {
        self.state.borrow().end.is_some()
    }

    pub(super) fn fault(&self) -> Option<RequestRefusal> {
        match self.state.borrow().end {
            Some(UploadEnd::Reset(reason)) => Some(reason),
            Some(UploadEnd::Complete) | None => None,
        }
    }

    pub(super) fn holds_bytes(&self) -> bool {
        self.held_bytes() > 0
    }

    /// Bytes that are in memory.
    pub(super) fn held_bytes(&self) -> usize {
        self.state.borrow().held
    }

    /// Whether the reader waits for bytes that the client may send if the window of the connection
    /// allows it.
    pub(super) fn is_awaited(&self) -> bool {
        let state = self.state.borrow();
        let is_waiting = state.end.is_none() && state.received.is_empty() && state.waker.is_some();
        is_waiting && !state.is_discarded && state.window > 0 && state.announced != Some(0)
    }

    /// Counts how often in a row nothing was read since the last check.
    pub(super) fn record_check(&self) {
        let state = &mut *self.state.borrow_mut();
        let read = state.read_bytes();
        let is_unread = state.held > 0 && read > 0 && state.read_before == Some(read);
        state.unread_checks = if is_unread { state.unread_checks + 1 } else { 0 };
        // Bytes that arrive later may be unread without a fault of the upstream.
        state.read_before = (state.held > 0).then_some(read);
    }

    /// Checks in a row by which nothing was read of a body of which some had been read.
    pub(super) fn unread_checks(&self) -> u32 {
        let state = self.state.borrow();
        if state.read_before == Some(state.read_bytes()) { state.unread_checks } else { 0 }
    }

    /// Takes the payload of a DATA frame; `padding` counts towards the window only.
    pub(super) fn receive(&self, data: &[u8], padding: u32) -> Result<(), UploadFault> {
        let state = &mut *self.state.borrow_mut();
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let counted = length.saturating_add(padding);
        state.window -= i64::from(counted);
        // A frame without bytes needs no window (RFC 9113 section 6.9.1).
        if state.window < 0 && counted > 0 {
            if state.has_overrun || state.window < -i64::from(state.overrun_allowed) {
                return Err(UploadFault::Window);
            }
            state.has_overrun = true;
        }
        if let Some(announced) = &mut state.announced {
            *announced = announced.checked_sub(u64::from(length)).ok_or(UploadFault::Length)?;
        }
        state.arrived += u64::from(length);
        if state.is_discarded {
            state.discarded += data.len();
            state.open(length + padding, self);
        } else {
            state.push(data);
            state.held += data.len();
            state.recount(&self.shared);
            self.shared.account.hold(data.len());
            if padding > 0 {
                state.open(padding, self);
            }
        }
        state.wake();
        Ok(())
    }

    /// The client knows the setting of the first window, which is smaller by `bytes` than the one
    /// that the stream began with (RFC 9113 section 6.9.2). Some clients acknowledge the settings
    /// before they send a frame for which they have used the larger window: it is accepted.
    pub(super) fn shrink_window(&self, bytes: u32) {
        let state = &mut *self.state.borrow_mut();
        state.window -= i64::from(bytes);
        state.overrun_allowed = state.overrun_allowed.max(bytes);
        state.granted -= bytes;
        state.granted_min -= bytes;
        // The bytes that were read may be enough to open the smaller window.
        state.open(0, self);
    }

    /// The client gets a setting of the first window that is larger by `bytes`.
    pub(super) fn enlarge_window(&self, bytes: u32) {
        let state = &mut *self.state.borrow_mut();
        state.window += i64::from(bytes);
        state.granted += bytes;
        state.granted_min += bytes;
        state.recount(&self.shared);
    }

    /// Wakes the reader.
    pub(super) fn wake(&self) {
        self.state.borrow_mut().wake();
    }

    /// The client has ended the stream.
    pub(super) fn end(&self, trailers: Option<Box<Fields>>) -> Result<(), UploadFault> {
        let state = &mut *self.state.borrow_mut();
        if state.announced.is_some_and(|left| left > 0) {
            return Err(UploadFault::Length);
        }
        state.trailers = trailers;
        state.end = Some(UploadEnd::Complete);
        state.recount(&self.shared);
        state.wake();
        Ok(())
    }

    /// The stream was reset, by either side, for this reason.
    pub(super) fn reset(&self, reason: RequestRefusal) {
        let state = &mut *self.state.borrow_mut();
        state.end.get_or_insert(UploadEnd::Reset(reason));
        state.recount(&self.shared);
        state.wake();
    }

    /// Drops what has arrived and what will arrive.
    pub(super) fn discard(&self) {
        let state = &mut *self.state.borrow_mut();
        state.is_discarded = true;
        let pieces = std::mem::take(&mut state.later).into_iter().map(|piece| piece.len()).sum::<usize>();
        let dropped = u32::try_from(std::mem::take(&mut state.received).len() + pieces).unwrap_or(u32::MAX);
        state.discarded += dropped as usize;
        state.release(dropped as usize, self);
        state.open(dropped, self);
    }

    /// While the body is discarded: ready once it has ended or `max` bytes were dropped.
    pub(super) fn poll_discarded(&self, cx: &mut Context<'_>, max: usize) -> Poll<()> {
        let state = &mut *self.state.borrow_mut();
        if state.end.is_some() || state.discarded > max {
            return Poll::Ready(());
        }
        state.register(cx);
        Poll::Pending
    }

    /// Whether the client has ended the stream without a byte, and without trailers.
    pub(crate) fn is_complete_and_empty(&self) -> bool {
        let state = self.state.borrow();
        state.arrived == 0 && state.trailers.is_none() && matches!(state.end, Some(UploadEnd::Complete))
    }

    /// Ready when bytes have arrived or the stream has ended. Returns whether it has ended without
    /// a byte.
    pub(crate) fn poll_first(&self, cx: &mut Context<'_>) -> Poll<Result<bool, BodyError>> {
        let state = &mut *self.state.borrow_mut();
        match state.end {
            _ if !state.received.is_empty() => Poll::Ready(Ok(false)),
            Some(UploadEnd::Complete) => Poll::Ready(Ok(true)),
            Some(UploadEnd::Reset(reason)) => Poll::Ready(Err(BodyError::Stream(reason))),
            None => {
                state.register(cx);
                Poll::Pending
            }
        }
    }

    /// Replaces `taken`, which is empty, by what has arrived. Returns false if there is
    /// nothing, because the client has ended the stream.
    pub(super) fn poll_take(&self, cx: &Context<'_>, taken: &mut Vec<u8>) -> Poll<io::Result<bool>> {
        let state = &mut *self.state.borrow_mut();
        if !state.received.is_empty() {
            state.take_received(taken);
            return Poll::Ready(Ok(true));
        }
        match state.end {
            Some(UploadEnd::Complete) => Poll::Ready(Ok(false)),
            Some(UploadEnd::Reset(_)) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            None => {
                state.register(cx);
                Poll::Pending
            }
        }
    }

    /// Bytes that the client may send.
    #[cfg(test)]
    pub(super) fn window(&self) -> u32 {
        u32::try_from(self.state.borrow().window).unwrap_or(0)
    }

    /// Reads all that has arrived.
    #[cfg(test)]
    pub(super) fn take_all(&self) {
        let mut taken = Vec::new();
        while let Poll::Ready(Ok(true)) = self.poll_take(&Context::from_waker(Waker::noop()), &mut taken) {
            self.record_read(taken.len() as u32);
        }
    }

    /// Opens the window by `bytes` that were read.
    pub(super) fn record_read(&self, bytes: u32) {
        let state = &mut *self.state.borrow_mut();
        state.taken_unread = state.taken_unread.saturating_sub(bytes as usize);
        if state.taken_unread == 0 {
            let piece = std::mem::take(&mut state.taken);
            state.release(piece, self);
        }
        state.open(bytes, self);
    }
}

impl UploadState {
    fn register(&mut self, cx: &Context<'_>) {
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Bytes of the body that were read or dropped.
    fn read_bytes(&self) -> u64 {
        (self.arrived + self.taken as u64) - (self.held + self.taken_unread) as u64
    }

    /// Bytes that are to come; as many as there can be if no length was announced.
    fn to_come(&self) -> usize {
        self.announced.map_or(usize::MAX, |left| usize::try_from(left).unwrap_or(usize::MAX))
    }

    /// Bytes that the client may still send: those of its window, or of a frame beyond it.
    fn open_bytes(&self) -> i64 {
        let overrun = if self.has_overrun { 0 } else { self.overrun_allowed.into() };
        self.window.max((self.window + overrun).min(PAYLOAD_MAX as i64))
    }

    /// Tells the connection of changed windows. A stream that has ended has none, and one whose
    /// last bytes come needs no more than them.
    fn recount(&mut self, shared: &ConnectionShared) {
        let windows = match self.end {
            Some(_) => UploadWindows::default(),
            None => UploadWindows {
                streams: 1,
                open: usize::try_from(self.open_bytes()).unwrap_or(0).min(self.to_come()),
                grown: ((self.granted - self.granted_min) as usize).min(self.to_come()),
            },
        };
        shared.change_windows(std::mem::replace(&mut self.counted, windows), windows);
    }

    /// Appends received bytes to the last piece, or to a new one.
    fn push(&mut self, data: &[u8]) {
        let last = self.later.back_mut().unwrap_or(&mut self.received);
        let needed = last.len() + data.len();
        if !last.is_empty() && needed > PIECE_MAX {
            return self.later.push_back(data.to_vec());
        }
        if needed > last.capacity() {
            let capacity = (2 * last.capacity()).min(PIECE_MAX).min(self.granted as usize).max(needed);
            last.reserve_exact(capacity - last.len());
        }
        last.extend_from_slice(data);
    }

    /// Replaces `taken` by the first piece of what has arrived. Only small space is used again:
    /// else a stream would hold it twice.
    fn take_received(&mut self, taken: &mut Vec<u8>) {
        let next = self.later.pop_front().unwrap_or_default();
        let used = std::mem::replace(taken, std::mem::replace(&mut self.received, next));
        (self.taken, self.taken_unread) = (taken.len(), taken.len());
        if self.received.is_empty() && used.capacity() <= REUSED_MAX {
            self.received = used;
            self.received.clear();
        }
    }

    /// Bytes that were received are read, or dropped.
    fn release(&mut self, bytes: usize, upload: &UploadStream) {
        self.held -= bytes;
        upload.shared.unhold(bytes);
    }

    fn open(&mut self, bytes: u32, upload: &UploadStream) {
        self.read += bytes;
        if self.end.is_some() || self.read == 0 || self.read < (self.granted / 2).min(OPEN_BYTES) {
            return self.recount(&upload.shared);
        }
        let mut increment = std::mem::take(&mut self.read);
        let share = upload.shared.stream_share().max(self.granted_min);
        if self.granted < share && !self.is_discarded {
            let growth = self.granted.min(share - self.granted);
            increment += growth;
            self.granted += growth;
        } else if let Some(shrinkage) = self.granted.checked_sub(share) {
            let shrinkage = shrinkage.min(increment);
            increment -= shrinkage;
            self.granted -= shrinkage;
        }
        // Bytes of a window that no byte can use would be left to the client. They are opened if
        // padding takes their place.
        let left = self.announced.map_or(i64::MAX, |left| i64::try_from(left).unwrap_or(i64::MAX));
        let wanted = u32::try_from(left.saturating_sub(self.window).max(0)).unwrap_or(u32::MAX);
        let excess = increment.saturating_sub(wanted);
        increment -= excess;
        self.read = excess;
        self.window += i64::from(increment);
        self.recount(&upload.shared);
        if increment > 0 {
            upload.shared.credits.borrow_mut().push((upload.stream, increment));
            upload.shared.wake();
        }
    }
}

impl Drop for UploadStream {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        state.end.get_or_insert(UploadEnd::Reset(RequestRefusal::BodyTruncated));
        state.recount(&self.shared);
        self.shared.release(state.kept);
        self.shared.unhold(state.held);
    }
}

/// The body of an HTTP/2 request.
pub(crate) struct Http2RequestBody {
    upload: Rc<UploadStream>,
    /// Bytes taken from the stream; those before `consumed` are consumed.
    taken: Vec<u8>,
    consumed: usize,
    received_bytes: u64,
    body_max: u64,
    clock: ClientClock,
    /// The queue that `100 Continue` is pushed to, once, if the client waits for it.
    awaits_continue: Option<InterimResponses>,
    dropped_trailers: std::sync::Arc<[String]>,
    drops_underscores: bool,
    trailers: Option<Box<Fields>>,
}

impl Http2RequestBody {
    /// `request` is the head.
    pub(crate) fn new(upload: &Rc<UploadStream>, limits: &HttpLimits, request: &Request) -> Self {
        Http2RequestBody {
            upload: Rc::clone(upload),
            taken: Vec::new(),
            consumed: 0,
            received_bytes: 0,
            body_max: limits.body_bytes_max(),
            clock: ClientClock::new(limits),
            awaits_continue: request.connection.expects_continue.then(|| request.interim.share()),
            dropped_trailers: std::sync::Arc::clone(&limits.dropped_trailers),
            drops_underscores: limits.underscores == UnderscorePolicy::Drop,
            trailers: None,
        }
    }

    /// Lowers the limit of the body's size.
    pub(crate) fn limit(&mut self, bytes: u64) {
        self.body_max = self.body_max.min(bytes);
    }

    fn take_trailers(&mut self, state: &mut UploadState) {
        let Some(trailers) = state.trailers.take() else { return };
        let mut fields = Fields::default();
        for field in trailers.iter() {
            let is_dropped =
                self.dropped_trailers.iter().any(|dropped| matches_pattern(field.name, dropped.as_bytes()))
                    || self.drops_underscores && field.name.contains(&b'_');
            let is_allowed = str::from_utf8(field.name).is_ok_and(h1::is_allowed_trailer);
            if is_allowed && !is_dropped {
                fields.push(field.name, field.value);
            }
        }
        self.trailers = (!fields.is_empty()).then(|| Box::new(fields));
    }
}

/// Bytes that were taken and are not read open the windows: the rest of the request may still
/// arrive, and is discarded.
impl Drop for Http2RequestBody {
    fn drop(&mut self) {
        let unread = self.data().len();
        if unread > 0 {
            self.upload.record_read(u32::try_from(unread).unwrap_or(u32::MAX));
        }
    }
}

impl BodySource for Http2RequestBody {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if self.data().is_empty() {
            let upload = Rc::clone(&self.upload);
            let state = &mut *upload.state.borrow_mut();
            if state.received.is_empty() {
                if state.is_discarded {
                    // The rest is missing, although its end may have arrived.
                    return Poll::Ready(Err(BodyError::Stream(RequestRefusal::BodyTruncated)));
                }
                match state.end {
                    Some(UploadEnd::Complete) => {
                        self.take_trailers(state);
                        return Poll::Ready(Ok(()));
                    }
                    Some(UploadEnd::Reset(reason)) => return Poll::Ready(Err(BodyError::Stream(reason))),
                    None => {}
                }
                if let Some(interim) = self.awaits_continue.take() {
                    interim.push(Response::new(StatusCode::CONTINUE));
                }
                state.register(cx);
                if upload.shared.is_withheld() {
                    self.clock.record_progress(0);
                    return Poll::Pending;
                }
                return self.clock.poll(cx).map(|()| Err(BodyError::Timeout(ExchangeTimeout::ClientBody)));
            }
            self.consumed = 0;
            state.take_received(&mut self.taken);
            self.awaits_continue = None;
            self.clock.record_progress(self.taken.len());
            self.received_bytes += self.taken.len() as u64;
        }
        let is_too_large = self.received_bytes > self.body_max;
        Poll::Ready(if is_too_large { Err(BodyError::TooLarge) } else { Ok(()) })
    }

    fn data(&self) -> &[u8] {
        &self.taken[self.consumed..]
    }

    fn consume(&mut self, count: usize) {
        // The client is not late while the gateway does not consume its bytes.
        self.clock.record_progress(0);
        self.consumed += count;
        self.upload.record_read(u32::try_from(count).unwrap_or(u32::MAX));
    }

    fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }

    fn may_have_trailers(&self) -> bool {
        let state = self.upload.state.borrow();
        self.trailers.is_some() || state.trailers.is_some() || state.end.is_none()
    }

    fn account_kept(&mut self, bytes: usize) -> bool {
        let upload = &self.upload;
        let is_accounted = upload.shared.account.account(bytes);
        upload.state.borrow_mut().kept += if is_accounted { bytes } else { 0 };
        is_accounted
    }

    fn release_kept(&mut self) {
        let kept = std::mem::take(&mut self.upload.state.borrow_mut().kept);
        self.upload.shared.release(kept);
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory_budget::MemoryBudget;
    use super::super::shared::STREAM_WINDOW_MAX;
    use super::*;

    #[test]
    fn window_that_shrinks_late_is_opened_by_what_was_read() {
        for read in [8_192, 16_384, 20_000, 32_766] {
            let shared = ConnectionShared::new(MemoryBudget::unlimited());
            let upload = UploadStream::new(1, 65_535, &shared);
            assert_eq!(upload.receive(&vec![0; read as usize], 0), Ok(()));
            upload.take_all();
            assert!(shared.credits.borrow().is_empty(), "half of the window is left");
            upload.shrink_window(65_535 - WINDOW_FIRST);
            assert!(matches!(shared.credits.borrow()[..], [(1, increment)] if increment >= read), "{read}");
        }
    }

    #[test]
    fn empty_frame_needs_no_window() {
        let shared = ConnectionShared::new(MemoryBudget::unlimited());
        for (data, padding, expected) in
            [(&[][..], 0, Ok(())), (&[0], 0, Err(UploadFault::Window)), (&[], 1, Err(UploadFault::Window))]
        {
            let upload = UploadStream::new(1, WINDOW_FIRST, &shared);
            assert_eq!(upload.receive(&[0; WINDOW_FIRST as usize], 0), Ok(()));
            assert_eq!(upload.receive(data, padding), expected);
        }
    }

    /// Bytes that the client may send beyond a window that has shrunk are counted until a frame has
    /// used them.
    #[test]
    fn one_frame_may_overrun_a_window_that_has_shrunk() {
        let shared = ConnectionShared::new(MemoryBudget::unlimited());
        let upload = UploadStream::new(1, WINDOW_FIRST, &shared);
        let open = || upload.state.borrow().counted.open;
        assert_eq!(open(), WINDOW_FIRST as usize);
        upload.shrink_window(WINDOW_FIRST - WINDOW_FIRST_SMALL);
        assert_eq!(open(), WINDOW_FIRST as usize, "all of it may still come");
        assert_eq!(upload.receive(&[0; 8 << 10], 0), Ok(()));
        assert_eq!(open(), 0);
        assert_eq!(upload.receive(&[0], 0), Err(UploadFault::Window));
    }

    /// A request that has ended is not complete for its reader once its bytes were dropped.
    #[test]
    fn body_that_is_discarded_has_no_end() {
        let shared = ConnectionShared::new(MemoryBudget::unlimited());
        let upload = UploadStream::new(1, WINDOW_FIRST, &shared);
        assert_eq!(upload.receive(&[0; 8 << 10], 0), Ok(()));
        assert_eq!(upload.end(None), Ok(()));
        upload.discard();
        let mut body = Http2RequestBody::new(&upload, &HttpLimits::default(), &Request::default());
        let filled = body.poll_fill(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(filled, Poll::Ready(Err(BodyError::Stream(RequestRefusal::BodyTruncated)))));
    }

    #[test]
    fn frame_that_was_under_way_when_the_settings_were_acknowledged_is_accepted() {
        let shared = ConnectionShared::new(MemoryBudget::unlimited());
        let upload = UploadStream::new(1, 65_535, &shared);
        assert_eq!(upload.receive(&[0; 49_151], 0), Ok(()));
        upload.shrink_window(65_535 - WINDOW_FIRST);
        assert_eq!(upload.receive(&[0; 16_384], 0), Ok(()));
        assert_eq!(upload.receive(&[0], 0), Err(UploadFault::Window));
    }

    #[test]
    fn pieces_are_read_in_order() {
        let shared = ConnectionShared::new(MemoryBudget::unlimited());
        let upload = UploadStream::new(1, 1 << 20, &shared);
        let (mut sent, mut read, mut taken) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..200_u32 {
            let piece: Vec<u8> = (0..round * 97 % 16_000).map(|at| (at + round) as u8).collect();
            upload.receive(&piece, 0).expect("within the window");
            sent.extend_from_slice(&piece);
            if round % 11 == 0 && upload.poll_take(&Context::from_waker(Waker::noop()), &mut taken).is_ready() {
                read.extend_from_slice(&taken);
                upload.record_read(taken.len() as u32);
                taken.clear();
            }
        }
        while upload.poll_take(&Context::from_waker(Waker::noop()), &mut taken).is_ready() {
            read.extend_from_slice(&taken);
            upload.record_read(taken.len() as u32);
            taken.clear();
        }
        assert!(read == sent);
        assert_eq!(upload.state.borrow().held, 0);
    }

    #[test]
    fn windows_grow_to_their_maximum() {
        let shared = ConnectionShared::new(MemoryBudget::unlimited());
        let upload = UploadStream::new(1, 65_535, &shared);
        for _ in 0..12 {
            let granted = upload.state.borrow().granted;
            let window = upload.window();
            upload.receive(&vec![0; window as usize], 0).expect("within the window");
            assert!(granted >= window);
            upload.take_all();
        }
        let state = upload.state.borrow();
        assert_eq!((state.granted, state.window), (STREAM_WINDOW_MAX, i64::from(STREAM_WINDOW_MAX)));
    }

    #[test]
    fn bytes_of_a_dropped_body_open_the_windows() {
        let shared = ConnectionShared::new(MemoryBudget::unlimited());
        let upload = UploadStream::new(1, WINDOW_FIRST, &shared);
        let mut body = Http2RequestBody::new(&upload, &HttpLimits::default(), &Request::default());
        upload.receive(&[0; WINDOW_FIRST as usize], 0).expect("within the window");
        assert!(body.poll_fill(&mut Context::from_waker(Waker::noop())).is_ready());
        body.consume(10);
        drop(body);
        assert_eq!((upload.state.borrow().held, shared.account.accounted()), (0, 0));
        assert!(upload.state.borrow().window >= i64::from(WINDOW_FIRST));
    }
}
