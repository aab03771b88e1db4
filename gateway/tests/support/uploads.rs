//! Request bodies over HTTP/2 by hand: sends on many streams what the windows of the gateway allow.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::STEP_TIMEOUT;
use super::frames::{
    ACK, DATA, END_STREAM, Frame, FrameClient, HEADERS, RST_STREAM, SETTINGS, WINDOW_UPDATE, request_with,
};

/// Bytes of one frame.
const FRAME_MAX: usize = 16_000;
const SETTING_INITIAL_WINDOW: u16 = 4;

/// A stream as its client sees it.
#[derive(Debug, Default)]
pub struct Upload {
    window: i64,
    /// Bytes that are still to be sent.
    left: usize,
    pub status: u16,
    /// The last field section, of the head or of trailers.
    pub section: Vec<u8>,
    /// The code of RST_STREAM.
    pub reset: Option<u32>,
    pub has_ended: bool,
}

fn first_window(settings: &Frame) -> Option<i64> {
    settings.payload.as_chunks::<6>().0.iter().find_map(|[a, b, value @ ..]| {
        let is_window = u16::from_be_bytes([*a, *b]) == SETTING_INITIAL_WINDOW;
        is_window.then(|| u32::from_be_bytes(*value).into())
    })
}

/// The uploads of one connection.
pub struct Uploader {
    pub client: FrameClient,
    pub uploads: BTreeMap<u32, Upload>,
    pub first_window: i64,
    window: i64,
}

impl Uploader {
    /// `client` has sent its settings. Waits for those of the gateway.
    pub fn new(mut client: FrameClient) -> Self {
        let settings = client.expect(SETTINGS);
        let first_window = first_window(&settings).expect("a first window");
        Uploader { client, uploads: BTreeMap::new(), first_window, window: 65_535 }
    }

    /// Sends the heads of uploads of `length` bytes to `path`, in one write.
    pub fn begin(&mut self, streams: impl Iterator<Item = u32>, path: &str, length: usize) {
        let mut heads = Vec::new();
        for stream in streams {
            heads.extend(request_with(stream, ("PUT", path), &[("content-length", &length.to_string())]).bytes());
            self.uploads.insert(stream, Upload { window: self.first_window, left: length, ..Upload::default() });
        }
        self.client.send_bytes(&heads);
    }

    /// Begins calls of gRPC that send `length` bytes, which they do not announce.
    pub fn begin_calls(&mut self, streams: impl Iterator<Item = u32>, path: &str, length: usize) {
        let fields = [("content-type", "application/grpc"), ("te", "trailers")];
        let mut heads = Vec::new();
        for stream in streams {
            heads.extend(request_with(stream, ("POST", path), &fields).bytes());
            self.uploads.insert(stream, Upload { window: self.first_window, left: length, ..Upload::default() });
        }
        self.client.send_bytes(&heads);
    }

    /// Bytes that the gateway offers to a stream.
    pub fn offered(&self, stream: u32) -> i64 {
        self.uploads[&stream].window.min(self.window)
    }

    /// Sends what the windows allow; each stream in its turn a frame.
    pub fn send(&mut self) {
        loop {
            let mut frames = Vec::new();
            for (stream, upload) in &mut self.uploads {
                let allowed = usize::try_from(upload.window.min(self.window)).unwrap_or(0);
                let count = upload.left.min(allowed).min(FRAME_MAX);
                if count == 0 || upload.has_ended {
                    continue;
                }
                upload.left -= count;
                let flags = if upload.left == 0 { END_STREAM } else { 0 };
                frames.extend(Frame::new(DATA, flags, *stream).with(vec![b'u'; count]).bytes());
                let sent = i64::try_from(count).expect("a small frame");
                upload.window -= sent;
                self.window -= sent;
            }
            if frames.is_empty() {
                return;
            }
            self.client.send_bytes(&frames);
        }
    }

    /// Handles the next frame. Returns whether there was one in time.
    pub fn receive(&mut self, deadline: Duration) -> bool {
        let Some(frame) = self.client.next_within(deadline) else { return false };
        let upload = self.uploads.get_mut(&frame.stream);
        match (frame.kind, upload) {
            (SETTINGS, None) if frame.flags & ACK == 0 => self.change_first_window(&frame),
            (WINDOW_UPDATE, None) if frame.stream == 0 => self.window += i64::from(frame.code()),
            (WINDOW_UPDATE, Some(upload)) => upload.window += i64::from(frame.code()),
            (RST_STREAM, Some(upload)) => {
                upload.reset = Some(frame.code());
                upload.has_ended = true;
            }
            (HEADERS, Some(upload)) => {
                if upload.status == 0 {
                    upload.status = frame.status();
                }
                upload.section.clone_from(&frame.payload);
                upload.has_ended |= frame.ends_stream();
            }
            (DATA, Some(upload)) => upload.has_ended |= frame.ends_stream(),
            _ => {}
        }
        true
    }

    /// A setting changes the windows of all streams (RFC 9113 section 6.9.2).
    fn change_first_window(&mut self, settings: &Frame) {
        if let Some(first_window) = first_window(settings) {
            let change = first_window - std::mem::replace(&mut self.first_window, first_window);
            self.uploads.values_mut().for_each(|upload| upload.window += change);
        }
        self.client.send(&Frame::new(SETTINGS, ACK, 0));
    }

    /// Sends and receives until `is_done`. Returns whether that was in time.
    pub fn run_until(&mut self, is_done: impl Fn(&Self) -> bool) -> bool {
        let start = Instant::now();
        loop {
            self.send();
            if is_done(self) {
                return true;
            }
            // A stream that waits for memory is refused only after ten seconds.
            let left = (2 * STEP_TIMEOUT).saturating_sub(start.elapsed());
            if left.is_zero() || !self.receive(left) {
                return false;
            }
        }
    }

    /// Sends all that is allowed, then nothing until the gateway has answered it all, `rounds`
    /// times or until `is_done`: as over a link with a long delay.
    pub fn run_in_round_trips(&mut self, rounds: usize, is_done: impl Fn(&Self) -> bool) -> bool {
        (0..rounds).any(|_| {
            self.send();
            while self.receive(Duration::from_millis(30)) {}
            is_done(self)
        })
    }

    /// The windows and the uploads that have not ended.
    pub fn state(&self) -> String {
        let open: Vec<_> = self.uploads.iter().filter(|(_, upload)| !upload.has_ended).collect();
        format!("window {}, {open:?}", self.window)
    }

    /// Whether each of these streams has its response.
    pub fn are_complete(&self, mut streams: impl Iterator<Item = u32>) -> bool {
        streams.all(|stream| self.uploads[&stream].has_ended)
    }

    /// Statuses and resets of the streams that have no 200.
    pub fn failures(&self, streams: impl Iterator<Item = u32>) -> Vec<(u32, u16, Option<u32>)> {
        streams
            .map(|stream| (stream, self.uploads[&stream].status, self.uploads[&stream].reset))
            .filter(|(_, status, reset)| *status != 200 || reset.is_some_and(|code| code != 0))
            .collect()
    }
}
