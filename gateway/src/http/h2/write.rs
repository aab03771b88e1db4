//! Writes what the streams of a connection send, and opens the windows of what they receive.

use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use super::connection::{Http2Connection, OUT_READ_MAX};
use super::frame;
use super::request_body::UploadStream;
use crate::http::body::BodySource;

impl<B: BodySource> Http2Connection<B> {
    /// Sends what was handed over. Ready when everything is sent. An error ends the connection:
    /// also `TimedOut`, when the client has accepted no byte in time.
    pub(crate) fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write_credits();
        self.sender.borrow_mut().end_wait();
        let sent = self.poll_send_out(cx);
        if self.sender.borrow().is_waiting() {
            cx.waker().wake_by_ref();
        }
        if self.is_receiving_paused.get() && self.sender.borrow().out.len() <= OUT_READ_MAX {
            self.is_receiving_paused.set(false);
            cx.waker().wake_by_ref();
        }
        sent
    }

    fn poll_send_out(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let polled = self.poll_write(cx)?;
            let timer = &mut *self.write_timer.borrow_mut();
            if polled.is_ready() && self.io.poll_flush(cx)?.is_ready() {
                timer.restart();
                self.sender.borrow_mut().out.shrink();
                return Poll::Ready(Ok(()));
            }
            // The system reports space late: a slow reader would seem to have stopped.
            ready!(timer.poll_check(cx));
            let sender = &mut *self.sender.borrow_mut();
            match self.io.write_unready(sender.out.front(), &[])? {
                Some(count) => {
                    timer.record_accepted();
                    sender.out.advance(count);
                    self.record_sent(count);
                }
                None if timer.record_blocked() => return Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                None => {}
            }
        }
    }

    /// Writes until nothing is left, or the socket accepts no more.
    fn poll_write(&self, cx: &mut Context<'_>) -> io::Result<Poll<()>> {
        loop {
            {
                let sender = &mut *self.sender.borrow_mut();
                while sender.out.len() > 0 {
                    match sender.out.poll_write(&self.io, cx)? {
                        Poll::Ready(count) => {
                            self.write_timer.borrow_mut().restart();
                            self.record_sent(count);
                        }
                        Poll::Pending => return Ok(Poll::Pending),
                    }
                }
                sender.room_waiters.drain(..).for_each(|stream| stream.wake());
            }
            self.pump();
            // Bodies that were sent may let the windows of uploads open.
            self.write_credits();
            if self.sender.borrow().out.len() == 0 {
                return Ok(Poll::Ready(()));
            }
        }
    }

    fn record_sent(&self, count: usize) {
        self.sent_bytes.set(self.sent_bytes.get() + count as u64);
        self.counts.borrow_mut().record_sent(count);
    }

    /// Opens the windows of the connection and of streams by what was received and read.
    fn write_credits(&self) {
        let was_withheld = self.shared.is_withheld();
        let credit = self.shared.take_credit();
        self.withheld.observe(self.shared.is_withheld());
        if let Some(increment) = credit {
            if was_withheld {
                // Their clocks run again.
                self.uploads_of_streams(UploadStream::wake);
            }
            self.sender.borrow_mut().write_frame(frame::WINDOW_UPDATE, 0, 0, &increment.to_be_bytes());
        }
        self.write_first_window();
        let credits = &mut *self.shared.credits.borrow_mut();
        if credits.is_empty() {
            return;
        }
        let mut sender = self.sender.borrow_mut();
        for (id, increment) in credits.drain(..) {
            let streams = self.streams.borrow();
            if streams.binary_search_by_key(&id, |stream| stream.id).is_ok() {
                sender.write_frame(frame::WINDOW_UPDATE, 0, id, &increment.to_be_bytes());
            }
        }
    }

    /// Changes the first window of streams if that is due.
    fn write_first_window(&self) {
        let first_window = &mut *self.first_window.borrow_mut();
        let is_left = self.shared.is_window_left(first_window.is_small());
        let Some(bytes) = first_window.change(is_left) else { return };
        let growth = first_window.growth();
        self.shared.set_first_window(first_window.bytes());
        if growth > 0 {
            self.uploads_of_streams(|upload| upload.enlarge_window(growth));
        }
        // That is acknowledged.
        self.counts.borrow_mut().explain_control(1);
        let setting = frame::SETTING_INITIAL_WINDOW.to_be_bytes();
        let payload = [&setting[..], &bytes.to_be_bytes()].concat();
        self.sender.borrow_mut().write_frame(frame::SETTINGS, 0, 0, &payload);
    }

    /// Sends what is left and discards what the client still sends, for a bounded time, so that a
    /// reset by the system does not destroy the last frames on their way.
    pub(crate) async fn linger(&self, timeout: Duration) {
        const DISCARDED_MAX: usize = 1 << 20;
        let mut deadline = crate::http::deadline::ResettableDeadline::after(timeout);
        let (mut discarded, mut space) = (0, vec![0; 4 << 10]);
        std::future::poll_fn(|cx| {
            if deadline.poll(cx).is_ready() || self.poll_end(cx).is_err() {
                return Poll::Ready(());
            }
            while let Poll::Ready(read) = self.io.poll_read(cx, &mut space) {
                match read {
                    Ok(count) if count > 0 && discarded < DISCARDED_MAX => discarded += count,
                    // The end, an error, or too much.
                    _ => return Poll::Ready(()),
                }
            }
            Poll::Pending
        })
        .await;
    }

    /// Sends what is gathered and shuts down the sending side, as far as it is possible now.
    fn poll_end(&self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.poll_send(cx)?.is_ready() {
            let mut is_shut = self.is_shut.get();
            let _pending_is_retried = self.io.poll_shutdown_once(cx, &mut is_shut)?;
            self.is_shut.set(is_shut);
        }
        Ok(())
    }
}
