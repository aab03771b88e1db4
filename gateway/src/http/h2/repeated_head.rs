//! Recognises a request whose field section repeats the previous one of its connection, so that it
//! is neither decoded nor checked again (docs/adr/0012-repeated-requests.md).
//!
//! Invariant: a request has the number of a section only while it holds what that section means.

use std::cell::Cell;

use super::request_head::HeadDetails;
use crate::http::message::{BodyLength, Request};

/// Bytes of a section that is kept. Those that repeat are indices into the table, one byte per
/// field.
const SECTION_MAX: usize = 256;

thread_local! {
    /// The last number that was given to a section.
    static LAST_NUMBER: Cell<u64> = const { Cell::new(0) };
}

/// A field section as it was received, and what decides about its meaning.
pub(super) struct ReceivedSection<'a> {
    pub(super) bytes: &'a [u8],
    /// Of the decoder's table: an index may mean something else after a change.
    pub(super) table_changes: u64,
    /// No body follows.
    pub(super) ends_stream: bool,
}

/// The last section of a connection that may be repeated.
#[derive(Default)]
pub(super) struct RepeatedHead {
    bytes: Vec<u8>,
    table_changes: u64,
    ends_stream: bool,
    /// Differs from those of all other sections of the thread.
    number: u64,
    details: HeadDetails,
    /// As the head says: a body of no bytes may have followed.
    length: Option<BodyLength>,
}

impl RepeatedHead {
    /// Restores the head in `request` if it holds that of this section. Otherwise changes nothing
    /// but its fields, which the caller replaces.
    pub(super) fn restore(&self, section: &ReceivedSection<'_>, request: &mut Request) -> Option<HeadDetails> {
        let holds_head = request.section_number.is_some_and(|number| number == self.number);
        if !holds_head || !self.is_of(section) || !request.repeat() {
            return None;
        }
        request.length = self.length?;
        Some(self.details)
    }

    /// Keeps a section whose decoding has left the table unchanged, and `request`, which was read
    /// from it.
    pub(super) fn keep(&mut self, section: &ReceivedSection<'_>, details: HeadDetails, request: &mut Request) {
        // The head of an extended CONNECT is not that of its section.
        if section.bytes.len() > SECTION_MAX || request.upgrade.is_some() {
            return;
        }
        if !self.is_of(section) {
            self.bytes.clear();
            self.bytes.extend_from_slice(section.bytes);
            (self.table_changes, self.ends_stream) = (section.table_changes, section.ends_stream);
            (self.details, self.length) = (details, Some(request.length));
            self.number = LAST_NUMBER.get() + 1;
            LAST_NUMBER.set(self.number);
        }
        request.section_number = Some(self.number);
        request.fields.keep_received();
    }

    fn is_of(&self, section: &ReceivedSection<'_>) -> bool {
        let ReceivedSection { bytes, table_changes, ends_stream } = *section;
        self.bytes == bytes && (self.table_changes, self.ends_stream) == (table_changes, ends_stream)
    }
}
