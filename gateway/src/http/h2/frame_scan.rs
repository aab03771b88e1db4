//! Counts the frames of a client that cost work without being part of a request: PING, SETTINGS,
//! WINDOW_UPDATE, PRIORITY, empty DATA, CONTINUATION, unknown types, and RST_STREAM.
//!
//! `h2` answers or ignores most of them without telling its user, so their heads are read from the
//! received bytes. Nothing is copied but a head that two reads share.

use std::time::Duration;

use tokio::time::Instant;

use crate::label;

/// Bytes of the client connection preface (RFC 9113 section 3.4).
const PREFACE_LEN: usize = 24;
/// Bytes of a frame head (RFC 9113 section 4.1).
const HEAD_LEN: usize = 9;

/// Frames that a client may send at once beyond those that its requests and responses explain. A
/// page of a hundred resources that is left, or a download with small windows, stays below it.
const BURST_MAX: u32 = 150;
/// How many such frames a second are allowed in the long run.
const FRAMES_PER_SECOND: u32 = 20;
/// Bytes of responses that explain one WINDOW_UPDATE or PING (clients measure bandwidth by PING).
const BYTES_PER_FRAME: usize = 512;

label! {
    /// The kind of frames that a client sent too many of.
    pub(crate) FrameAbuse, "frames", {
        Control = "control",
        Reset = "reset",
    }
}

/// How many frames of a kind are unexplained.
struct FrameBudget {
    spent: u32,
    refilled_at: Instant,
}

impl FrameBudget {
    /// Counts one frame. Returns whether there were too many. Reads the clock only then.
    fn charge(&mut self) -> bool {
        self.spent += 1;
        if self.spent <= BURST_MAX {
            return false;
        }
        let elapsed = self.refilled_at.elapsed().min(Duration::from_secs(60));
        self.spent = self.spent.saturating_sub((elapsed.as_secs_f64() * f64::from(FRAMES_PER_SECOND)) as u32);
        self.refilled_at = Instant::now();
        self.spent > BURST_MAX
    }

    fn explain(&mut self, frames: u32) {
        self.spent = self.spent.saturating_sub(frames);
    }
}

/// Follows the frames of one connection.
pub(super) struct FrameScanner {
    /// Bytes of the preface or of a payload that are still to come.
    skip: usize,
    head: [u8; HEAD_LEN],
    head_len: usize,
    /// Whether a head block has begun and its last frame is not complete.
    in_head_block: bool,
    ends_head_block: bool,
    control: FrameBudget,
    resets: FrameBudget,
    abuse: Option<FrameAbuse>,
}

impl FrameScanner {
    pub(super) fn new() -> Self {
        let budget = || FrameBudget { spent: 0, refilled_at: Instant::now() };
        FrameScanner {
            skip: PREFACE_LEN,
            head: [0; HEAD_LEN],
            head_len: 0,
            in_head_block: false,
            ends_head_block: false,
            control: budget(),
            resets: budget(),
            abuse: None,
        }
    }

    /// The kind of frames that the client sent too many of, if it did.
    pub(super) fn abuse(&self) -> Option<FrameAbuse> {
        self.abuse
    }

    /// Whether a head is received in part.
    pub(super) fn is_in_head_block(&self) -> bool {
        self.in_head_block
    }

    /// `bytes` were sent to the client.
    pub(super) fn record_sent(&mut self, bytes: usize) {
        self.control.explain(u32::try_from(bytes / BYTES_PER_FRAME).unwrap_or(u32::MAX));
    }

    /// One DATA frame is sent to the client, which may answer it by a WINDOW_UPDATE of the stream
    /// and one of the connection.
    pub(super) fn record_data_frame(&mut self) {
        self.control.explain(2);
    }

    /// A response was sent to its end.
    pub(super) fn record_response(&mut self) {
        self.resets.explain(1);
    }

    /// Follows received bytes.
    pub(super) fn scan(&mut self, mut bytes: &[u8]) {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if self.skip > 0 {
                return;
            }
            if self.ends_head_block {
                (self.in_head_block, self.ends_head_block) = (false, false);
            }
            let wanted = (HEAD_LEN - self.head_len).min(bytes.len());
            self.head[self.head_len..self.head_len + wanted].copy_from_slice(&bytes[..wanted]);
            self.head_len += wanted;
            bytes = &bytes[wanted..];
            if self.head_len < HEAD_LEN {
                return;
            }
            self.head_len = 0;
            self.record_frame();
        }
    }

    fn record_frame(&mut self) {
        const END_STREAM: u8 = 0x1;
        const END_HEADERS: u8 = 0x4;
        let [a, b, c, kind, flags, ..] = self.head;
        self.skip = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        let too_many = match kind {
            0x0 if self.skip > 0 || flags & END_STREAM != 0 => return,
            0x1 => {
                // A request explains the frames of its flow control.
                self.control.explain(2);
                (self.in_head_block, self.ends_head_block) = (true, flags & END_HEADERS != 0);
                return;
            }
            0x3 => self.resets.charge().then_some(FrameAbuse::Reset),
            kind => {
                if kind == 0x9 {
                    self.ends_head_block = flags & END_HEADERS != 0;
                }
                self.control.charge().then_some(FrameAbuse::Control)
            }
        };
        self.abuse = self.abuse.or(too_many);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).expect("short").to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 0];
        frame.resize(HEAD_LEN + payload, 0);
        frame
    }

    fn scan(frames: &[Vec<u8>], piece: usize) -> Option<FrameAbuse> {
        let mut scanner = FrameScanner::new();
        let bytes = [vec![b'P'; PREFACE_LEN], frames.concat()].concat();
        bytes.chunks(piece).for_each(|piece| scanner.scan(piece));
        scanner.abuse()
    }

    #[test]
    fn floods_are_found_at_every_split() {
        let floods = [(0x0, 0, 0), (0x2, 0, 5), (0x3, 0, 4), (0x4, 0, 0), (0x6, 0, 8), (0x8, 0, 4), (0x9, 0, 1)];
        for (kind, flags, payload) in floods.into_iter().chain([(0x10, 0, 8), (0xab, 0, 300)]) {
            for piece in [1, 7, 9, 4096] {
                assert_eq!(scan(&vec![frame(kind, flags, payload); 100], piece), None, "{kind} in {piece}");
                assert!(scan(&vec![frame(kind, flags, payload); 200], piece).is_some(), "{kind} in {piece}");
            }
        }
    }

    #[test]
    fn requests_and_uploads_are_no_flood() {
        let request = [frame(0x1, 0x5, 40), frame(0x8, 0, 4), frame(0x8, 0, 4)].concat();
        assert_eq!(scan(&vec![request; 2_000], 1_000), None);
        assert_eq!(scan(&vec![frame(0x0, 0, 1); 2_000], 1_000), None);
        assert_eq!(scan(&vec![frame(0x0, 0x1, 0); 2_000], 1_000), None);
    }

    #[test]
    fn partial_head_block_is_known() {
        let mut scanner = FrameScanner::new();
        scanner.scan(&[0; PREFACE_LEN]);
        scanner.scan(&frame(0x1, 0, 10)[..12]);
        assert!(scanner.is_in_head_block());
        scanner.scan(&[0; 7]);
        scanner.scan(&frame(0x9, 0x4, 2)[..10]);
        assert!(scanner.is_in_head_block());
        scanner.scan(&[0]);
        assert!(!scanner.is_in_head_block());
    }
}
