//! Relief of a connection whose window stays closed because its uploads hold all its memory: the
//! upload that holds most of it without being read is ended, so that the others go on.
//!
//! The connection is checked at intervals while its window is withheld. An upload is ended only if
//! its upstream has read a part of it and then nothing for several intervals, and another upload
//! waits for bytes that its client must not send, or for memory. If no upload holds more than a
//! first window, requests that wait for memory and hold bytes are refused first: their clients may
//! send them again.

use std::rc::Rc;

use tokio::time::Instant;

use super::connection::Http2Connection;
use super::frame::{Http2ErrorCode, PAYLOAD_MAX};
use super::request_body::{UploadStream, WINDOW_FIRST};
use super::stream::Http2Stream;
use crate::http::body::BodySource;

/// Intervals in which nothing was read of an upload with a grown window until it may be ended, and
/// of one with a first window: it holds little, and many of them stall together.
const GROWN_UNREAD_MAX: u32 = 2;
const FIRST_UNREAD_MAX: u32 = 5;

impl<B: BodySource> Http2Connection<B> {
    /// Since when the window is withheld, or was last checked.
    pub(crate) fn withheld_since(&self) -> Option<Instant> {
        self.withheld.since()
    }

    /// Checks a window that was withheld for an interval. The window itself is computed again when
    /// the connection sends: other connections may have released memory.
    pub(crate) fn relieve_window(&self) {
        let checks = self.withheld.record_check();
        let account = &self.shared.account;
        if !self.shared.is_withheld() || account.may_open() || account.is_budget_full() {
            return;
        }
        self.uploads().iter().for_each(|stream| upload_of(stream).record_check());
        if checks > 1 {
            self.end_stalled();
        }
    }

    fn end_stalled(&self) {
        let is_starved = self.shared.window_bytes() < PAYLOAD_MAX
            && self.uploads().iter().any(|stream| upload_of(stream).is_awaited());
        if !is_starved && !self.shared.account.has_deferred() {
            return;
        }
        let largest = self.largest_unread();
        let held = |stream: &Http2Stream<B>| stream.upload.as_ref().map_or(0, |upload| upload.held_bytes());
        if let Some(stream) = largest.as_ref().filter(|stream| held(stream) > WINDOW_FIRST as usize) {
            if upload_of(stream).unread_checks() >= GROWN_UNREAD_MAX {
                self.end_upload(stream);
            }
        } else if is_starved && !self.refuse_holding() {
            let late = largest.filter(|stream| upload_of(stream).unread_checks() >= FIRST_UNREAD_MAX);
            if let Some(stream) = late {
                self.end_upload(&stream);
            }
        }
    }

    /// Streams whose request has a body.
    fn uploads(&self) -> Vec<Rc<Http2Stream<B>>> {
        self.streams.borrow().iter().filter(|stream| stream.upload.is_some()).map(Rc::clone).collect()
    }

    /// The stream with most bytes of those whose upstream has read a part, and nothing in the last
    /// interval; the oldest of several. It runs: nothing is read of one that waits for memory.
    fn largest_unread(&self) -> Option<Rc<Http2Stream<B>>> {
        let unread = self.uploads().into_iter().filter(|stream| upload_of(stream).unread_checks() > 0);
        let unread: Vec<_> = unread.collect();
        unread.into_iter().rev().max_by_key(|stream| upload_of(stream).held_bytes())
    }

    /// Its upstream is to blame. The bytes that a call of gRPC holds are dropped at once, and its
    /// task ends it with a status.
    fn end_upload(&self, stream: &Rc<Http2Stream<B>>) {
        stream.is_stalled.set(true);
        if stream.is_call.get() {
            upload_of(stream).discard();
            stream.wake();
        } else {
            self.reset(stream, Http2ErrorCode::Internal);
        }
    }

    /// Refuses requests that wait for memory and hold bytes, the youngest first, until the window
    /// may be opened. Returns whether there was one.
    fn refuse_holding(&self) -> bool {
        let mut has_refused = false;
        while !self.shared.account.may_open() {
            let Some(stream) = self.deferred.borrow_mut().take_youngest_upload() else { break };
            self.refuse_waiting(&stream);
            has_refused = true;
        }
        has_refused
    }
}

fn upload_of<B>(stream: &Http2Stream<B>) -> &UploadStream {
    stream.upload.as_deref().expect("chosen by `uploads`")
}
