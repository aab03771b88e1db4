//! Owns the bound on what a server may send: a stream that ends with an error as soon as a reply
//! turns out to be longer than its limit, before its bytes reach the Redis client, which buffers a
//! reply whole.
//!
//! Follows only the framing of RESP2 and RESP3. A reply counts its bytes and `VALUE_BYTES` for each
//! value in it, which is what a value takes in memory. An announced length that exceeds the limit
//! counts at once. Push messages have a limit of their own.
//!
//! A limit on one reply does not bound a pipeline of many. On a metered connection, the sender
//! allows an amount for all replies to it, and a reply beyond that, also one without a request,
//! exceeds the limit.
//!
//! Refuses what is not RESP: the client would refuse it as well.
//! Invariant: the client holds at most one read beyond the limits.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Memory of a parsed value besides its bytes.
const VALUE_BYTES: usize = 64;

/// Of all replies that a metered connection may still receive, however many pipelines are sent at
/// once.
const ALLOWED_MAX: usize = 32 << 20;

/// Longest line with a length: an integer of 64 bits, its sign and spaces around it.
const LENGTH_LINE_MAX: usize = 32;

/// The limits of replies on one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReplyLimits {
    /// Of one reply.
    pub(crate) reply_bytes: usize,
    /// Of one push message.
    pub(crate) push_bytes: usize,
    /// Whether replies are allowed only as far as `ReplyAllowance::allow` was called.
    pub(crate) is_metered: bool,
}

impl ReplyLimits {
    /// Limits of a connection without subscription.
    pub(crate) const fn per_reply(reply_bytes: usize) -> Self {
        Self { reply_bytes, push_bytes: reply_bytes, is_metered: false }
    }
}

/// State that the sender and the stream of a connection share.
#[derive(Debug, Default)]
pub(crate) struct ReplyAllowance {
    is_exceeded: AtomicBool,
    expected: Mutex<ExpectedReplies>,
}

/// The replies that a metered connection may still receive.
#[derive(Clone, Copy, Debug, Default)]
struct ExpectedReplies {
    /// Pipelines without complete replies, also those that their senders have given up.
    pipelines: usize,
    bytes: usize,
}

impl ReplyAllowance {
    /// Whether the server has exceeded a limit; the connection has ended.
    pub(crate) fn is_exceeded(&self) -> bool {
        self.is_exceeded.load(Ordering::Relaxed)
    }

    /// Allows replies of `bytes` in addition, `ALLOWED_MAX` together. Call it before a pipeline is
    /// sent.
    pub(crate) fn allow(&self, bytes: usize) {
        let mut expected = self.expected();
        expected.pipelines += 1;
        expected.bytes = expected.bytes.saturating_add(bytes).min(ALLOWED_MAX);
    }

    /// Call it when the replies to a pipeline are complete. Without another pipeline, no reply is
    /// expected.
    pub(crate) fn settle(&self) {
        let mut expected = self.expected();
        expected.pipelines = expected.pipelines.saturating_sub(1);
        if expected.pipelines == 0 {
            expected.bytes = 0;
        }
    }

    fn spend(&self, bytes: usize) -> bool {
        let mut expected = self.expected();
        let left = expected.bytes.checked_sub(bytes);
        expected.bytes = left.unwrap_or_default();
        left.is_some()
    }

    fn expected(&self) -> MutexGuard<'_, ExpectedReplies> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reply is longer than its limit, or not RESP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LimitExceeded;

/// Position in the bytes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Position {
    /// The next byte is the type of a value.
    Type,
    /// In a line that is the value itself; whether the last byte was a carriage return.
    Line { after_cr: bool },
    /// In a line with the length of a value of this type.
    Length { of: u8 },
    /// In the bytes of a string.
    Body { left: usize },
}

/// Follows the framing of a connection's replies and counts their bytes.
struct ReplyMeter {
    limits: ReplyLimits,
    allowance: Arc<ReplyAllowance>,
    position: Position,
    /// Values that complete the current reply; 0 between replies.
    values_left: usize,
    is_push: bool,
    /// Bytes that the current reply may still have.
    bytes_left: usize,
    /// The line of a length so far.
    line: [u8; LENGTH_LINE_MAX],
    line_bytes: usize,
}

impl ReplyMeter {
    fn new(limits: ReplyLimits, allowance: Arc<ReplyAllowance>) -> Self {
        let (position, line) = (Position::Type, [0; LENGTH_LINE_MAX]);
        let (values_left, bytes_left, line_bytes, is_push) = (0, 0, 0, false);
        Self { limits, allowance, position, values_left, is_push, bytes_left, line, line_bytes }
    }

    /// Takes the next bytes of the connection.
    fn advance(&mut self, mut input: &[u8]) -> Result<(), LimitExceeded> {
        while let Some(&first) = input.first() {
            let taken = match self.position {
                Position::Type => {
                    self.begin_value(first)?;
                    1
                }
                Position::Line { after_cr } => self.take_line(input, after_cr)?,
                Position::Length { of } => {
                    self.spend(1)?;
                    self.take_length(of, first)?;
                    1
                }
                Position::Body { left } => {
                    // The body was spent when its length was announced.
                    let taken = left.min(input.len());
                    self.position = Position::Body { left: left - taken };
                    if taken == left {
                        self.end_value();
                    }
                    taken
                }
            };
            input = &input[taken..];
        }
        Ok(())
    }

    fn begin_value(&mut self, kind: u8) -> Result<(), LimitExceeded> {
        if self.values_left == 0 {
            self.is_push = kind == b'>';
            self.values_left = 1;
            self.bytes_left = if self.is_push { self.limits.push_bytes } else { self.limits.reply_bytes };
        }
        self.spend(1 + VALUE_BYTES)?;
        self.line_bytes = 0;
        self.position = match kind {
            b'+' | b'-' | b':' | b'_' | b',' | b'#' | b'(' => Position::Line { after_cr: false },
            b'$' | b'!' | b'=' | b'*' | b'%' | b'|' | b'~' | b'>' => Position::Length { of: kind },
            _ => return Err(LimitExceeded),
        };
        Ok(())
    }

    fn take_line(&mut self, input: &[u8], mut after_cr: bool) -> Result<usize, LimitExceeded> {
        for (taken, &byte) in (1..).zip(input) {
            if after_cr && byte == b'\n' {
                self.spend(taken)?;
                self.end_value();
                return Ok(taken);
            }
            after_cr = byte == b'\r';
        }
        self.spend(input.len())?;
        self.position = Position::Line { after_cr };
        Ok(input.len())
    }

    fn take_length(&mut self, of: u8, byte: u8) -> Result<(), LimitExceeded> {
        *self.line.get_mut(self.line_bytes).ok_or(LimitExceeded)? = byte;
        self.line_bytes += 1;
        let Some(line) = self.line[..self.line_bytes].strip_suffix(b"\r\n") else { return Ok(()) };
        let length: i64 = str::from_utf8(line).ok().and_then(|line| line.trim().parse().ok()).ok_or(LimitExceeded)?;
        if length < 0 {
            // An absent string, array or set. In other types it is an error, or endless.
            if !matches!(of, b'$' | b'*' | b'~' | b'>') {
                return Err(LimitExceeded);
            }
            self.end_value();
            return Ok(());
        }
        let length = usize::try_from(length).map_err(|_| LimitExceeded)?;
        let values = match of {
            b'$' | b'!' | b'=' => {
                let body = length.checked_add(2).ok_or(LimitExceeded)?;
                self.spend(body)?;
                self.position = Position::Body { left: body };
                return Ok(());
            }
            b'%' => length.checked_mul(2),
            b'|' => length.checked_mul(2).and_then(|values| values.checked_add(1)),
            _ => Some(length),
        }
        .ok_or(LimitExceeded)?;
        if values.checked_mul(VALUE_BYTES).is_none_or(|bytes| bytes > self.bytes_left) {
            return Err(LimitExceeded);
        }
        self.values_left += values;
        self.end_value();
        Ok(())
    }

    fn end_value(&mut self) {
        self.position = Position::Type;
        self.values_left -= 1;
    }

    fn spend(&mut self, bytes: usize) -> Result<(), LimitExceeded> {
        self.bytes_left = self.bytes_left.checked_sub(bytes).ok_or(LimitExceeded)?;
        if self.limits.is_metered && !self.is_push && !self.allowance.spend(bytes) {
            return Err(LimitExceeded);
        }
        Ok(())
    }
}

/// A stream to a server whose replies are limited.
pub(crate) struct LimitedStream<S> {
    stream: S,
    meter: ReplyMeter,
}

impl<S> LimitedStream<S> {
    pub(crate) fn new(stream: S, limits: ReplyLimits, allowance: Arc<ReplyAllowance>) -> Self {
        Self { stream, meter: ReplyMeter::new(limits, allowance) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for LimitedStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
        let result = this.meter.advance(&buffer.filled()[before..]);
        Poll::Ready(result.map_err(|LimitExceeded| {
            buffer.set_filled(before);
            this.meter.allowance.is_exceeded.store(true, Ordering::Relaxed);
            io::Error::new(io::ErrorKind::InvalidData, "a reply exceeds its limit")
        }))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LimitedStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buffer)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Result of all bytes, in pieces of `step`.
    fn meter(limits: ReplyLimits, allowed: usize, input: &[u8], step: usize) -> Result<usize, LimitExceeded> {
        let allowance = Arc::new(ReplyAllowance::default());
        allowance.allow(allowed);
        let mut meter = ReplyMeter::new(limits, allowance);
        for piece in input.chunks(step) {
            meter.advance(piece)?;
        }
        Ok(meter.values_left)
    }

    const LIMIT: usize = 1_000;

    #[test]
    fn replies_within_the_limit_pass_and_longer_ones_do_not() {
        let bulk = |bytes: usize| [format!("${bytes}\r\n").as_bytes(), &vec![b'x'; bytes], b"\r\n"].concat();
        for (input, passes) in [
            (b"+OK\r\n:1\r\n$-1\r\n*-1\r\n_\r\n,1.5\r\n#t\r\n(12345\r\n-ERR x\r\n".to_vec(), true),
            (b"*2\r\n$1\r\na\r\n*1\r\n%1\r\n+a\r\n~1\r\n:1\r\n".to_vec(), true),
            (
                b"|1\r\n+a\r\n+b\r\n+value\r\n>2\r\n+invalidate\r\n*1\r\n$1\r\na\r\n!5\r\nERR x\r\n=5\r\ntxt:a\r\n"
                    .to_vec(),
                true,
            ),
            (b"+a\rb\nc\r\r\n:1\r\n".to_vec(), true),
            (b"$ 5 \r\nhello\r\n".to_vec(), true),
            ([bulk(900), bulk(900), bulk(0)].concat(), true),
            (bulk(1_001), false),
            (b"$1001\r\n".to_vec(), false),
            (b"$99999999999999999999\r\n".to_vec(), false),
            (b"$9223372036854775807\r\n".to_vec(), false),
            (b"*16\r\n".to_vec(), false),
            (b"%8\r\n".to_vec(), false),
            (b"|4611686018427387904\r\n".to_vec(), false),
            (b"*1\r\n".repeat(16), false),
            (b"!-1\r\n".to_vec(), false),
            (b"%-1\r\n".to_vec(), false),
            ([b"+".to_vec(), vec![b'x'; 1_000]].concat(), false),
            ([b"-".to_vec(), vec![b'\r'; 1_000]].concat(), false),
            ([b"*".to_vec(), vec![b' '; 40]].concat(), false),
            (b"HTTP/1.1 200 OK\r\n".to_vec(), false),
            (vec![0], false),
        ] {
            for step in [1, 2, 3, 7, 5_000] {
                let result = meter(ReplyLimits::per_reply(LIMIT), 0, &input, step);
                let expected = if passes { Ok(0) } else { Err(LimitExceeded) };
                assert_eq!(result, expected, "{} in pieces of {step}", input.escape_ascii());
            }
        }
    }

    #[test]
    fn metered_replies_need_an_allowance_and_push_messages_do_not() {
        let limits = ReplyLimits { reply_bytes: LIMIT, push_bytes: 3 * LIMIT, is_metered: true };
        let push = [b">1\r\n$1500\r\n".to_vec(), vec![b'x'; 1_500], b"\r\n".to_vec()].concat();
        assert_eq!(meter(limits, 0, &push.repeat(10), 64), Ok(0));
        let reply = b":1\r\n".repeat(10);
        let cost = 10 * (4 + VALUE_BYTES);
        assert_eq!(meter(limits, cost, &reply, 64), Ok(0));
        assert_eq!(meter(limits, cost - 1, &reply, 64), Err(LimitExceeded));
    }

    #[test]
    fn allowance_lasts_until_all_pipelines_are_answered_and_is_bounded() {
        let allowance = ReplyAllowance::default();
        assert!(!allowance.spend(1));
        allowance.allow(100);
        allowance.allow(100);
        assert!(allowance.spend(50));
        allowance.settle();
        assert!(allowance.spend(150), "the second pipeline");
        allowance.allow(100);
        allowance.settle();
        allowance.settle();
        assert!(!allowance.spend(1));
        (0..1_000).for_each(|_| allowance.allow(8 << 20));
        assert!(!allowance.spend(ALLOWED_MAX + 1));
    }

    proptest! {
        /// The client's parser reads no value that the meter has not seen end.
        #[test]
        fn framing_is_that_of_the_client(input in proptest::collection::vec(
            proptest::sample::select(vec!["+a\r\n", ":1\r\n", "$1\r\na\r\n", "*1\r\n", "*0\r\n", "*2\r\n", "%1\r\n",
                "$-1\r\n", "~1\r\n", "_\r\n", "|1\r\n", ">1\r\n", "$0\r\n\r\n"]), 0..12)) {
            let bytes = input.concat().into_bytes();
            let (mut parser, mut rest) = (redis::Parser::new(), bytes.as_slice());
            let mut complete = true;
            while !rest.is_empty() {
                // The parser reads ahead, so it is given one value at a time.
                let Some(end) = (1..=rest.len()).find(|&end| redis::parse_redis_value(&rest[..end]).is_ok()) else {
                    complete = false;
                    break;
                };
                prop_assert!(parser.parse_value(&rest[..end]).is_ok());
                rest = &rest[end..];
            }
            let metered = meter(ReplyLimits::per_reply(100_000), 0, &bytes, 1);
            if complete {
                prop_assert_eq!(metered, Ok(0), "{}", input.concat());
            } else if let Ok(values) = metered {
                prop_assert!(values > 0 || input.concat().contains('>'), "{}", input.concat());
            }
        }
    }
}
