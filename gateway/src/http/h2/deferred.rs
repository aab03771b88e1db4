//! Streams that wait until their connection has memory for them: the window that the client has
//! makes others wait while an upload holds much. Only the fields of their heads are kept, and what
//! they receive.

use std::collections::VecDeque;
use std::rc::Rc;

use tokio::time::Instant;

use super::hpack_table::HpackField;
use super::shared::ConnectionShared;
use super::stream::Http2Stream;
use crate::http::fields::KnownField;

/// Bytes that a waiting stream takes beside its fields.
const DEFERRED_BYTES: usize = 1 << 10;
/// Bytes of a field beside its text.
const FIELD_BYTES: usize = 2 * size_of::<u32>();

/// The fields of a head, to be read again.
pub(super) struct KeptFields {
    /// Lengths of name and value, then both.
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl KeptFields {
    pub(super) fn new(bytes_max: usize) -> Self {
        KeptFields { bytes: Vec::new(), bytes_max }
    }

    /// Returns false if there are too many.
    pub(super) fn push(&mut self, field: HpackField<'_>) -> bool {
        let HpackField { name, value, .. } = field;
        if self.bytes.len() + FIELD_BYTES + name.len() + value.len() > self.bytes_max {
            return false;
        }
        for text in [name, value] {
            self.bytes.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
        }
        self.bytes.extend_from_slice(name);
        self.bytes.extend_from_slice(value);
        true
    }

    /// All fields are pushed.
    pub(super) fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
    }

    pub(super) fn read(&self, mut receive: impl FnMut(HpackField<'_>)) {
        let mut rest = &self.bytes[..];
        while let Some(field) = take_field(&mut rest) {
            receive(field);
        }
    }
}

fn take_field<'a>(rest: &mut &'a [u8]) -> Option<HpackField<'a>> {
    let mut take = |length: usize| {
        let (text, after) = rest.split_at_checked(length)?;
        *rest = after;
        Some(text)
    };
    let mut lengths = [0; 2];
    for length in &mut lengths {
        *length = u32::from_be_bytes(take(4)?.try_into().ok()?) as usize;
    }
    let (name, value) = (take(lengths[0])?, take(lengths[1])?);
    Some(HpackField { known: KnownField::of(name), name, value })
}

/// A stream that waits.
pub(super) struct DeferredStream<B> {
    pub(super) stream: Rc<Http2Stream<B>>,
    pub(super) fields: KeptFields,
    /// The head has ended the stream.
    pub(super) has_ended: bool,
    /// When its head was received.
    pub(super) at: Instant,
}

impl<B> DeferredStream<B> {
    pub(super) fn cost(&self) -> usize {
        DEFERRED_BYTES + self.fields.bytes.capacity()
    }
}

/// The streams that wait, the oldest first. At most as many as a connection may have.
pub(super) struct DeferredStreams<B> {
    queue: VecDeque<DeferredStream<B>>,
    shared: Rc<ConnectionShared>,
}

impl<B> DeferredStreams<B> {
    pub(super) fn new(shared: &Rc<ConnectionShared>) -> Self {
        DeferredStreams { queue: VecDeque::new(), shared: Rc::clone(shared) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether the connection has memory for the oldest now.
    pub(super) fn has_room(&self) -> bool {
        self.queue.front().is_some_and(|oldest| {
            let more = oldest.stream.cost.saturating_sub(oldest.cost());
            self.shared.has_room_for_stream(more, !oldest.has_ended)
        })
    }

    /// When the head of the oldest was received.
    pub(super) fn since(&self) -> Option<Instant> {
        self.queue.front().map(|deferred| deferred.at)
    }

    /// Appends a stream whose cost is accounted for.
    pub(super) fn push(&mut self, deferred: DeferredStream<B>) {
        self.queue.push_back(deferred);
    }

    /// The oldest, if the connection has memory for it now. It is accounted for as a stream.
    pub(super) fn take(&mut self) -> Option<DeferredStream<B>> {
        let account = &self.shared.account;
        let (waiting, running) = self.queue.front().map(|oldest| (oldest.cost(), oldest.stream.cost))?;
        if !self.has_room() {
            return None;
        }
        account.release_deferred(waiting);
        if account.account_stream(running).is_err() {
            // The process has no memory. Its place is kept until it is refused.
            account.keep_deferred(waiting);
            return None;
        }
        self.queue.pop_front()
    }

    /// The oldest, if its head was received before `time`. It is no longer accounted for.
    pub(super) fn take_older(&mut self, time: Instant) -> Option<Rc<Http2Stream<B>>> {
        let deferred = self.queue.pop_front_if(|oldest| oldest.at <= time)?;
        self.shared.account.release_deferred(deferred.cost());
        Some(deferred.stream)
    }

    /// The youngest whose request has bytes that are held. It is no longer accounted for.
    pub(super) fn take_youngest_upload(&mut self) -> Option<Rc<Http2Stream<B>>> {
        let holds = |stream: &Http2Stream<B>| stream.upload.as_ref().is_some_and(|upload| upload.holds_bytes());
        let index = self.queue.iter().rposition(|deferred| holds(&deferred.stream))?;
        let deferred = self.queue.remove(index)?;
        self.shared.account.release_deferred(deferred.cost());
        Some(deferred.stream)
    }

    /// The stream has ended otherwise.
    pub(super) fn remove(&mut self, id: u32) {
        let account = &self.shared.account;
        self.queue.retain(|deferred| {
            let is_other = deferred.stream.id != id;
            if !is_other {
                account.release_deferred(deferred.cost());
            }
            is_other
        });
    }

    /// All streams have ended.
    pub(super) fn clear(&mut self) {
        self.queue.drain(..).for_each(|deferred| self.shared.account.release_deferred(deferred.cost()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::request_body::UploadStream;
    use super::*;

    #[test]
    fn cost_of_a_waiting_stream_covers_its_parts() {
        // Beside a body of 256 bytes, which is that of no response yet.
        let parts = size_of::<Http2Stream<[u8; 256]>>() + size_of::<UploadStream>() + 4 * size_of::<usize>();
        assert!(parts + size_of::<DeferredStream<[u8; 256]>>() <= DEFERRED_BYTES, "{parts}");
    }

    #[test]
    fn fields_are_read_as_they_were_kept() {
        let mut kept = KeptFields::new(60);
        let fields = [(":path", "/a"), ("x", ""), ("cookie", "c=1")];
        for (name, value) in fields {
            assert!(kept.push(HpackField { known: None, name: name.as_bytes(), value: value.as_bytes() }));
        }
        assert!(!kept.push(HpackField { known: None, name: &[b'n'; 20], value: b"" }));
        let mut read = Vec::new();
        kept.read(|field| {
            assert_eq!(field.known, KnownField::of(field.name));
            read.push((field.name.to_vec(), field.value.to_vec()));
        });
        assert_eq!(read, fields.map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())));
    }
}
