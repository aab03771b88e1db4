//! The receiving side of a connection: its buffer, and what is known of frames that are incomplete.

use std::collections::VecDeque;

use tokio::time::Instant;

use super::hpack_decode::HpackDecoder;
use super::priority::Priority;
use super::repeated_head::RepeatedHead;
use super::request_head::HeadReader;
use crate::http::buffer::ReadBuffer;

/// The receiving side.
pub(super) struct Receiver {
    pub(super) buffer: ReadBuffer,
    pub(super) state: ReceiveState,
}

pub(super) struct ReceiveState {
    pub(super) decoder: HpackDecoder,
    pub(super) reader: HeadReader,
    pub(super) repeated: RepeatedHead,
    /// The field section that is being received in several frames.
    pub(super) section: Option<PartialSection>,
    pub(super) has_preface: bool,
    pub(super) has_settings: bool,
    pub(super) early_priorities: VecDeque<(u32, Priority)>,
    /// When the section began.
    pub(super) section_began: Option<Instant>,
}

pub(super) struct PartialSection {
    pub(super) stream: u32,
    pub(super) ends_stream: bool,
    pub(super) depends_on_itself: bool,
    pub(super) bytes: Vec<u8>,
}

impl ReceiveState {
    pub(super) fn new() -> Self {
        ReceiveState {
            decoder: HpackDecoder::new(),
            reader: HeadReader::default(),
            repeated: RepeatedHead::default(),
            section: None,
            has_preface: false,
            has_settings: false,
            early_priorities: VecDeque::new(),
            section_began: None,
        }
    }
}
