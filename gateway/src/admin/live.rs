//! The stream of server-sent events behind the dashboard: the state once a second, each point of
//! the history, and each line of the process log.
//!
//! Invariant: at most `STREAMS_MAX` streams are open, each for at most `STREAM_TIME`. A stream ends
//! when the token that it was opened with is not the configured one any more. A client that does
//! not read is bounded by the server (`simple_server`, and the idle timeout of its connection).

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use arc_swap::ArcSwap;
use serde_json::{Value, json};
use tokio::time::{Instant, Sleep, sleep_until};

use super::config::AdminConfig;
use crate::event::tail;
use crate::http::body::{BodyError, BodySource};

/// Streams that may be open: a few dashboards, far below the connections of the admin address.
const STREAMS_MAX: usize = 16;
/// Time after which a client has to open the stream again, and is checked again.
const STREAM_TIME: Duration = Duration::from_secs(900);
/// Time between two states.
const INTERVAL: Duration = Duration::from_secs(1);

/// The sources of a stream.
pub(crate) struct LiveSources {
    /// The current state as JSON.
    pub(crate) state: Box<dyn Fn() -> Rc<str>>,
    /// The points of the history from a number on, and the number of the next one.
    pub(crate) history: Box<dyn Fn(u64) -> (Vec<Value>, u64)>,
}

/// The streams that are open.
#[derive(Clone, Default)]
pub(super) struct LiveStreams(Rc<Cell<usize>>);

impl LiveStreams {
    /// Opens a stream; `None` if there are too many. It ends when the token is replaced.
    pub(super) fn open(&self, sources: Rc<LiveSources>, config: Arc<ArcSwap<AdminConfig>>) -> Option<LiveStream> {
        if self.0.get() >= STREAMS_MAX {
            return None;
        }
        self.0.set(self.0.get() + 1);
        let now = Instant::now();
        let token = config.load().token.clone();
        Some(LiveStream {
            sources,
            config,
            token,
            next: Box::pin(sleep_until(now)),
            ends_at: now + STREAM_TIME,
            history_from: 0,
            log_from: 0,
            text: Vec::new(),
            read: 0,
            _open: OpenStream(self.clone()),
        })
    }
}

/// The place of an open stream.
struct OpenStream(LiveStreams);

impl Drop for OpenStream {
    fn drop(&mut self) {
        let open = &self.0.0;
        open.set(open.get().saturating_sub(1));
    }
}

/// A stream of one client.
pub(super) struct LiveStream {
    sources: Rc<LiveSources>,
    config: Arc<ArcSwap<AdminConfig>>,
    /// The token at the begin.
    token: Option<String>,
    /// Due with the next events.
    next: Pin<Box<Sleep>>,
    ends_at: Instant,
    history_from: u64,
    log_from: u64,
    /// Events, of which the client has got the first `read` bytes.
    text: Vec<u8>,
    read: usize,
    _open: OpenStream,
}

impl LiveStream {
    /// The events that are new.
    fn write_events(&mut self) {
        self.text.clear();
        self.read = 0;
        self.write_event("state", &(self.sources.state)());
        let (points, next) = (self.sources.history)(self.history_from);
        if next != self.history_from {
            self.history_from = next;
            self.write_event("history", &json!(points).to_string());
        }
        let (lines, next) = tail::since(self.log_from);
        if next != self.log_from {
            self.log_from = next;
            self.write_event("log", &json!(lines).to_string());
        }
    }

    /// `data` is JSON in one line.
    fn write_event(&mut self, name: &str, data: &str) {
        for part in ["event: ", name, "\ndata: ", data, "\n\n"] {
            self.text.extend_from_slice(part.as_bytes());
        }
    }

    fn is_ended(&self) -> bool {
        Instant::now() >= self.ends_at || self.config.load().token != self.token
    }
}

impl BodySource for LiveStream {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if self.data().is_empty() {
            ready!(self.next.as_mut().poll(cx));
            if self.is_ended() {
                return Poll::Ready(Ok(()));
            }
            self.write_events();
            let next = Instant::now() + INTERVAL;
            self.next.as_mut().reset(next);
        }
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        &self.text[self.read..]
    }

    fn consume(&mut self, count: usize) {
        self.read += count;
    }
}
