//! Relief of a connection whose window stays closed because its uploads hold all its memory: the
//! upload that holds most of it without being read is ended, so that the others go on.
//!
//! The window is looked at in intervals. An upload is ended only if nothing of it was read between
//! two looks, and another one waits for bytes or for memory. Without such a one, requests that wait
//! for memory and hold bytes are refused: those that run could not get the rest of theirs.

use std::rc::Rc;

use tokio::time::Instant;

use super::connection::Http2Connection;
use super::frame::Http2ErrorCode;
use super::request_body::{UploadStream, WINDOW_FIRST};
use super::stream::Http2Stream;
use crate::http::body::BodySource;

impl<B: BodySource> Http2Connection<B> {
    /// Since when the window is withheld, or was last looked at.
    pub(crate) fn withheld_since(&self) -> Option<Instant> {
        self.withheld.since.get()
    }

    /// Looks at a window that was withheld for an interval. The window itself is computed again
    /// when the connection sends: other connections may have released memory.
    pub(crate) fn relieve_window(&self) {
        // The next interval begins with the next look at the window.
        self.withheld.since.set(None);
        let account = &self.shared.account;
        if !self.shared.is_withheld() || account.may_open() || account.is_budget_full() {
            return;
        }
        if self.withheld.is_marked.replace(true) && self.end_stalled() {
            return self.withheld.is_marked.set(false);
        }
        self.streams.borrow().iter().filter_map(|stream| stream.upload.as_ref()).for_each(|upload| upload.mark_read());
    }

    /// Returns whether an upload was ended.
    fn end_stalled(&self) -> bool {
        let is_awaited = |upload: &Rc<UploadStream>| upload.is_awaited();
        let is_starved = self.streams.borrow().iter().filter_map(|stream| stream.upload.as_ref()).any(is_awaited);
        let largest = self.largest_stalled();
        let held = |stream: &Http2Stream<B>| stream.upload.as_ref().map_or(0, |upload| upload.held_bytes());
        if let Some(stream) = largest.as_ref().filter(|stream| held(stream) > WINDOW_FIRST as usize)
            && (is_starved || self.shared.account.has_deferred())
        {
            self.end_upload(stream);
            return true;
        }
        if is_starved && self.refuse_holding() {
            return true;
        }
        match largest {
            Some(stream) if is_starved => self.end_upload(&stream),
            _ => return false,
        }
        true
    }

    /// The stream with most bytes of those that run and were not read since they were marked.
    fn largest_stalled(&self) -> Option<Rc<Http2Stream<B>>> {
        let (streams, deferred) = (self.streams.borrow(), self.deferred.borrow());
        let stalled = streams.iter().filter_map(|stream| {
            let upload = stream.upload.as_ref().filter(|upload| !upload.has_been_read())?;
            (!deferred.contains(stream.id)).then(|| (upload.held_bytes(), Rc::clone(stream)))
        });
        stalled.max_by_key(|(held, _)| *held).map(|(_, stream)| stream)
    }

    /// Its upstream is to blame: the exchange ends as one that failed.
    fn end_upload(&self, stream: &Rc<Http2Stream<B>>) {
        stream.is_stalled.set(true);
        self.reset(stream, Http2ErrorCode::EnhanceYourCalm);
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
