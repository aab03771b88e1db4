//! Frames of HTTP/2 (RFC 9113 sections 4.1, 6 and 7): heads, kinds, flags, settings and error
//! codes.

/// The client connection preface (RFC 9113 section 3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes of a frame head.
pub(super) const HEAD_LEN: usize = 9;
/// Bytes of the largest payload that each side accepts by default. The gateway does not raise it.
pub(super) const PAYLOAD_MAX: usize = 16 << 10;
/// The largest window, and the largest increment of one.
pub(super) const WINDOW_MAX: i64 = (1 << 31) - 1;
/// The window of the connection, and of each stream without a setting.
pub(super) const WINDOW_DEFAULT: i64 = 65_535;
/// As the first window of a stream, before the client knows the settings.
pub(super) const WINDOW_DEFAULT_BYTES: u32 = WINDOW_DEFAULT as u32;

pub(super) const DATA: u8 = 0x0;
pub(super) const HEADERS: u8 = 0x1;
pub(super) const PRIORITY: u8 = 0x2;
pub(super) const RST_STREAM: u8 = 0x3;
pub(super) const SETTINGS: u8 = 0x4;
pub(super) const PUSH_PROMISE: u8 = 0x5;
pub(super) const PING: u8 = 0x6;
pub(super) const GOAWAY: u8 = 0x7;
pub(super) const WINDOW_UPDATE: u8 = 0x8;
pub(super) const CONTINUATION: u8 = 0x9;
/// RFC 9218 section 7.1.
pub(super) const PRIORITY_UPDATE: u8 = 0x10;

pub(super) const END_STREAM: u8 = 0x1;
pub(super) const ACK: u8 = 0x1;
pub(super) const END_HEADERS: u8 = 0x4;
pub(super) const PADDED: u8 = 0x8;
pub(super) const HAS_PRIORITY: u8 = 0x20;

pub(super) const SETTING_ENABLE_PUSH: u16 = 0x2;
pub(super) const SETTING_STREAMS_MAX: u16 = 0x3;
pub(super) const SETTING_INITIAL_WINDOW: u16 = 0x4;
pub(super) const SETTING_PAYLOAD_MAX: u16 = 0x5;
pub(super) const SETTING_SECTION_BYTES: u16 = 0x6;
/// RFC 8441 section 3.
pub(super) const SETTING_EXTENDED_CONNECT: u16 = 0x8;
/// RFC 9218 section 2.1.
pub(super) const SETTING_NO_OLD_PRIORITIES: u16 = 0x9;

/// Why a stream or a connection ends (RFC 9113 section 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Http2ErrorCode {
    NoError = 0x0,
    Protocol = 0x1,
    Internal = 0x2,
    FlowControl = 0x3,
    StreamClosed = 0x5,
    FrameSize = 0x6,
    RefusedStream = 0x7,
    Cancel = 0x8,
    Compression = 0x9,
    EnhanceYourCalm = 0xb,
}

/// The head of a frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct FrameHead {
    pub(super) length: usize,
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
}

impl FrameHead {
    /// Parses the head at the front of `bytes`; `None` if it is incomplete.
    pub(super) fn parse(bytes: &[u8]) -> Option<FrameHead> {
        let [a, b, c, kind, flags, stream @ ..] = *bytes.first_chunk::<HEAD_LEN>()?;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        Some(FrameHead { length, kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff })
    }

    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The head as bytes. The length is below 2^24: the peer's limit of payloads is.
    pub(super) fn bytes(self) -> [u8; HEAD_LEN] {
        let [.., a, b, c] = self.length.to_be_bytes();
        let [d, e, f, g] = self.stream.to_be_bytes();
        [a, b, c, self.kind, self.flags, d, e, f, g]
    }
}

/// Appends a frame with a short payload.
#[expect(clippy::too_many_arguments, reason = "the parts of a frame")]
pub(super) fn write_frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&FrameHead { length: payload.len(), kind, flags, stream }.bytes());
    out.extend_from_slice(payload);
}

/// The payload of a frame without its padding (RFC 9113 section 6.1); `None`: the padding is longer
/// than the payload.
pub(super) fn unpadded<'a>(head: &FrameHead, payload: &'a [u8]) -> Option<&'a [u8]> {
    if !head.has(PADDED) {
        return Some(payload);
    }
    let (padding, rest) = payload.split_first()?;
    rest.get(..rest.len().checked_sub(usize::from(*padding))?)
}

/// The number at the front of a payload; `None` if it is too short.
pub(super) fn number(payload: &[u8]) -> Option<u32> {
    payload.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}
