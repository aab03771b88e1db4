//! The access log: one JSON object per line, written by a dedicated thread.
//!
//! A request formats its line into a buffer of its thread and never writes to a file. A bounded
//! channel passes whole buffers to the single writer, so lines do not interleave. If the writer
//! cannot keep up, lines are dropped and counted.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use crate::event::Event;
use crate::http::message::{HttpVersion, Method, Scheme, StatusCode};
use crate::metrics::{self, Counter};

/// Destination of the access log.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum AccessLogTarget {
    /// JSON lines on standard output.
    Stdout,
    /// Disabled.
    Off,
    /// JSON lines in this file.
    File(PathBuf),
}

/// A thread submits its buffer at this size.
const BATCH_BYTES: usize = 32 << 10;
/// A thread submits its buffer at this age.
const BATCH_AGE_MAX: Duration = Duration::from_millis(100);
/// Buffers queued for the writer: about 4 MiB, which is 0.1 s at 150,000 requests per second.
const QUEUE_BATCHES: usize = 128;
/// Time that `close` waits for a writer that is blocked on a full pipe.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

static DROPPED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Exposes `tidegate_access_log_dropped_total`.
pub(crate) fn expose() {
    metrics::expose_counter_with(
        "tidegate_access_log_dropped",
        "Lines of the access log that were dropped because its writer could not keep up or failed.",
        |emit| emit(&[], DROPPED.get()),
    );
}

/// One line of the access log.
#[derive(Clone, Debug)]
pub(crate) struct AccessLogEntry<'a> {
    pub(crate) method: &'a Method,
    pub(crate) scheme: Scheme,
    pub(crate) authority: &'a str,
    pub(crate) path_and_query: &'a str,
    pub(crate) version: HttpVersion,
    pub(crate) status: StatusCode,
    /// Bytes of the response body.
    pub(crate) bytes: u64,
    pub(crate) duration: Duration,
    pub(crate) client: IpAddr,
    /// The proxy that reported the client in a PROXY protocol header.
    pub(crate) proxy: Option<IpAddr>,
    pub(crate) route: &'a str,
    /// The cache result. Omitted from the line if empty, as are the texts below.
    pub(crate) cache: &'a str,
    /// The degrade step that produced the response.
    pub(crate) degraded: &'a str,
    /// The side that is responsible for a failure.
    pub(crate) blame: &'a str,
    /// The class of the failure.
    pub(crate) failure: &'a str,
    /// Why the response was not completed.
    pub(crate) aborted: &'a str,
    /// The limit rule that denied the request.
    pub(crate) limit: &'a str,
    /// The limit rules in shadow mode that would have denied the request.
    pub(crate) shadow_limit: &'a str,
    /// Why the request was refused while it was parsed.
    pub(crate) refused: &'a str,
    /// The endpoint that received the request.
    pub(crate) upstream: &'a str,
    /// How often the request was sent again. Omitted from the line if 0.
    pub(crate) retries: u32,
    /// Whether a second endpoint was sent the request. Omitted from the line if not.
    pub(crate) is_hedged: bool,
    /// The key or the user that the route has authenticated.
    pub(crate) user: &'a str,
    /// The country of the client, from the GeoIP database.
    pub(crate) country: &'a str,
    /// The JA4 fingerprint of the TLS connection.
    pub(crate) ja4: &'a str,
    /// The part of it to which devices are bound.
    pub(crate) fingerprint: &'a str,
    pub(crate) trace_id: &'a str,
    pub(crate) request_id: &'a str,
}

/// Formatted lines for the writer.
#[derive(Default)]
struct LineBatch {
    text: Vec<u8>,
    lines: u64,
}

/// Message to the writer thread of the access log: a batch of lines, or the request to stop.
enum WriterMessage {
    Lines(LineBatch),
    Close,
}

/// Access log: the channel to its writer thread, or `None` if it is disabled. `record` may be
/// called from any thread.
pub(crate) struct AccessLog(Option<AccessLogInner>);

/// The channel to the writer thread, and what identifies this log among the thread buffers.
struct AccessLogInner {
    /// Identifies the log within the process: a thread's buffer belongs to one log.
    id: u64,
    sender: SyncSender<WriterMessage>,
    reopen: Arc<AtomicBool>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl AccessLog {
    /// Opens the log and starts its writer.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or the writer's thread cannot be started.
    pub(crate) fn open(target: &AccessLogTarget) -> io::Result<AccessLog> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let sink = match target {
            AccessLogTarget::Off => return Ok(AccessLog(None)),
            AccessLogTarget::Stdout => LogSink::Stdout,
            AccessLogTarget::File(path) => LogSink::File { file: open_file(path)?, path: path.clone() },
        };
        let (sender, receiver) = sync_channel(QUEUE_BATCHES);
        let reopen = Arc::new(AtomicBool::new(false));
        let writer = LogWriter { sink, receiver, reopen: Arc::clone(&reopen), has_partial_line: false };
        let writer = thread::Builder::new().name("access-log".to_owned()).spawn(|| writer.run())?;
        let id = NEXT.fetch_add(1, Relaxed);
        Ok(AccessLog(Some(AccessLogInner { id, sender, reopen, writer: Mutex::new(Some(writer)) })))
    }

    /// Whether the log is enabled.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// Appends a line to this thread's buffer, and submits the buffer when it is full or old.
    pub(crate) fn record(&self, line: &AccessLogEntry<'_>) {
        let Some(open) = &self.0 else { return };
        let now = SystemTime::now();
        BUFFER.with_borrow_mut(|buffer| {
            buffer.attach_to(open);
            buffer.append(now, line);
            buffer.submit_if_due(now);
        });
    }

    /// Submits this thread's buffer. Call it about every 100 ms, so that lines do not wait for
    /// later ones, and before the thread stops recording.
    pub(crate) fn flush(&self) {
        BUFFER.with_borrow_mut(ThreadBuffer::submit);
    }

    /// Reopens the file, for log rotation.
    pub(crate) fn reopen(&self) {
        let Some(open) = &self.0 else { return };
        open.reopen.store(true, Relaxed);
        // Wakes an idle writer. If the channel is full, the writer is awake.
        let _full_or_closed = open.sender.try_send(WriterMessage::Lines(LineBatch::default()));
    }

    /// Writes the submitted buffers, including this thread's, and stops the writer. Blocks for at
    /// most 5 s. A thread submits its buffer when it ends, so join the recording threads first.
    pub(crate) fn close(&self) {
        self.flush();
        let Some(open) = &self.0 else { return };
        let Some(writer) = open.writer.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        while let Err(TrySendError::Full(_)) = open.sender.try_send(WriterMessage::Close) {
            if Instant::now() >= deadline {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        while !writer.is_finished() {
            if Instant::now() >= deadline {
                Event::AccessLogFailed { error: &"the writer is blocked; its lines are lost" }.emit();
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        if writer.join().is_err() {
            Event::AccessLogFailed { error: &"the writer panicked" }.emit();
        }
    }
}

thread_local! {
    static BUFFER: RefCell<ThreadBuffer> = const { RefCell::new(ThreadBuffer::new()) };
}

/// Formatted lines of one thread, submitted to the writer at `BATCH_BYTES` or `BATCH_AGE_MAX`.
struct ThreadBuffer {
    /// Id and channel of the log that the lines belong to.
    log: Option<(u64, SyncSender<WriterMessage>)>,
    batch: LineBatch,
    /// Time of the first line.
    started_at: SystemTime,
    timestamps: TimestampFormatter,
}

impl ThreadBuffer {
    const fn new() -> Self {
        ThreadBuffer {
            log: None,
            batch: LineBatch { text: Vec::new(), lines: 0 },
            started_at: SystemTime::UNIX_EPOCH,
            timestamps: TimestampFormatter::new(),
        }
    }

    fn attach_to(&mut self, open: &AccessLogInner) {
        if self.log.as_ref().is_none_or(|(id, _)| *id != open.id) {
            self.submit();
            self.log = Some((open.id, open.sender.clone()));
        }
    }

    fn append(&mut self, now: SystemTime, line: &AccessLogEntry<'_>) {
        if self.batch.lines == 0 {
            self.started_at = now;
            self.batch.text.reserve(BATCH_BYTES + 1024);
        }
        write_line(&mut self.batch.text, &mut self.timestamps, now, line);
        self.batch.lines += 1;
    }

    fn submit_if_due(&mut self, now: SystemTime) {
        // If the clock was set back, the age is unknown and the buffer counts as old.
        let is_old = now.duration_since(self.started_at).map_or(true, |age| age >= BATCH_AGE_MAX);
        if is_old || self.batch.text.len() >= BATCH_BYTES {
            self.submit();
        }
    }

    fn submit(&mut self) {
        if self.batch.lines == 0 {
            return;
        }
        let Some((_, sender)) = &self.log else { return };
        let batch = std::mem::take(&mut self.batch);
        let lines = batch.lines;
        if let Err(TrySendError::Full(message) | TrySendError::Disconnected(message)) =
            sender.try_send(WriterMessage::Lines(batch))
        {
            DROPPED.add(lines);
            if let WriterMessage::Lines(mut batch) = message {
                batch.text.clear();
                self.batch = LineBatch { text: batch.text, lines: 0 };
            }
        }
    }
}

impl Drop for ThreadBuffer {
    fn drop(&mut self) {
        self.submit();
    }
}

/// Open destination of the access log: standard output, or a file with the path for reopening.
enum LogSink {
    Stdout,
    File { file: File, path: PathBuf },
}

/// State of the writer thread: the destination, the bounded channel of batches, and the flag that
/// requests a reopened file.
struct LogWriter {
    sink: LogSink,
    receiver: Receiver<WriterMessage>,
    reopen: Arc<AtomicBool>,
    /// The last write failed and may have written part of a line.
    has_partial_line: bool,
}

impl LogWriter {
    fn run(mut self) {
        while let Ok(WriterMessage::Lines(batch)) = self.receiver.recv() {
            self.reopen_if_requested();
            if let Err(error) = self.write(&batch.text) {
                self.has_partial_line = true;
                DROPPED.add(batch.lines);
                Event::AccessLogFailed { error: &error }.emit();
            }
        }
    }

    fn reopen_if_requested(&mut self) {
        if !self.reopen.swap(false, Relaxed) {
            return;
        }
        if let LogSink::File { file, path } = &mut self.sink {
            match open_file(path) {
                Ok(opened) => *file = opened,
                Err(error) => Event::AccessLogFailed { error: &error }.emit(),
            }
        }
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        let mut stdout;
        let sink: &mut dyn Write = match &mut self.sink {
            LogSink::File { file, .. } => file,
            LogSink::Stdout => {
                stdout = io::stdout().lock();
                &mut stdout
            }
        };
        if self.has_partial_line {
            sink.write_all(b"\n")?;
            self.has_partial_line = false;
        }
        sink.write_all(text)?;
        sink.flush()
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

fn write_line(out: &mut Vec<u8>, timestamps: &mut TimestampFormatter, now: SystemTime, line: &AccessLogEntry<'_>) {
    out.extend_from_slice(b"{\"time\":\"");
    timestamps.push(out, now);
    out.extend_from_slice(b"\",\"client\":\"");
    push_display(out, line.client);
    if let Some(proxy) = line.proxy {
        out.extend_from_slice(b"\",\"proxy\":\"");
        push_display(out, proxy);
    }
    out.extend_from_slice(b"\",\"method\":\"");
    push_escaped(out, line.method.as_str());
    out.extend_from_slice(b"\",\"scheme\":\"");
    out.extend_from_slice(line.scheme.as_str().as_bytes());
    out.extend_from_slice(b"\",\"authority\":\"");
    push_escaped(out, line.authority);
    out.extend_from_slice(b"\",\"path\":\"");
    push_escaped(out, line.path_and_query);
    out.extend_from_slice(b"\",\"version\":\"");
    out.extend_from_slice(line.version.via().as_bytes());
    out.extend_from_slice(b"\",\"status\":");
    out.extend_from_slice(line.status.as_str().as_bytes());
    out.extend_from_slice(b",\"bytes\":");
    out.extend_from_slice(itoa::Buffer::new().format(line.bytes).as_bytes());
    out.extend_from_slice(b",\"duration\":");
    push_seconds(out, line.duration);
    if line.retries > 0 {
        out.extend_from_slice(b",\"retries\":");
        out.extend_from_slice(itoa::Buffer::new().format(line.retries).as_bytes());
    }
    if line.is_hedged {
        out.extend_from_slice(b",\"hedged\":true");
    }
    let texts = [
        ("route", line.route),
        ("cache", line.cache),
        ("degraded", line.degraded),
        ("blame", line.blame),
        ("failure", line.failure),
        ("aborted", line.aborted),
        ("limit", line.limit),
        ("shadow_limit", line.shadow_limit),
        ("refused", line.refused),
        ("upstream", line.upstream),
        ("user", line.user),
        ("country", line.country),
        ("ja4", line.ja4),
        ("fingerprint", line.fingerprint),
        ("trace_id", line.trace_id),
        ("request_id", line.request_id),
    ];
    for (key, value) in texts.into_iter().filter(|(_, value)| !value.is_empty()) {
        out.extend_from_slice(b",\"");
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(b"\":\"");
        push_escaped(out, value);
        out.push(b'"');
    }
    out.extend_from_slice(b"}\n");
}

fn push_display(out: &mut Vec<u8>, value: impl std::fmt::Display) {
    write!(out, "{value}").expect("writing to a vector does not fail");
}

/// Seconds with six decimal places.
fn push_seconds(out: &mut Vec<u8>, duration: Duration) {
    out.extend_from_slice(itoa::Buffer::new().format(duration.as_secs()).as_bytes());
    out.push(b'.');
    push_digits(out, u64::from(duration.subsec_micros()), 6);
}

/// `number` with leading zeros.
fn push_digits(out: &mut Vec<u8>, number: u64, width: u32) {
    for exponent in (0..width).rev() {
        // One decimal digit always fits.
        out.push(b'0' + (number / 10_u64.pow(exponent) % 10) as u8);
    }
}

/// The contents of a JSON string, escaped (RFC 8259 section 7).
fn push_escaped(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = text.as_bytes();
    let mut copied = 0;
    for (at, byte) in bytes.iter().enumerate() {
        if *byte >= 0x20 && *byte != b'"' && *byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[copied..at]);
        copied = at + 1;
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', *byte]),
            _ => {
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
            }
        }
    }
    out.extend_from_slice(&bytes[copied..]);
}

/// Formats timestamps by RFC 3339 and caches the text of the current second.
struct TimestampFormatter {
    second: u64,
    /// `YYYY-MM-DDTHH:MM:SS.`
    text: [u8; 20],
}

impl TimestampFormatter {
    const fn new() -> Self {
        TimestampFormatter { second: u64::MAX, text: [0; 20] }
    }

    fn push(&mut self, out: &mut Vec<u8>, now: SystemTime) {
        // A wall clock before 1970 is wrong; its lines have 1970.
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if since_epoch.as_secs() != self.second {
            self.second = since_epoch.as_secs();
            self.text = date_and_time(since_epoch.as_secs());
        }
        out.extend_from_slice(&self.text);
        push_digits(out, u64::from(since_epoch.subsec_millis()), 3);
        out.push(b'Z');
    }
}

/// Howard Hinnant's algorithm civil_from_days: eras of 400 years; years begin in March.
fn date_and_time(unix_seconds: u64) -> [u8; 20] {
    let (days, second) = (unix_seconds / 86_400 + 719_468, unix_seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let mut text = *b"0000-00-00T00:00:00.";
    let parts = [
        (0..4, year),
        (5..7, month),
        (8..10, day),
        (11..13, second / 3_600),
        (14..16, second / 60 % 60),
        (17..19, second % 60),
    ];
    for (range, mut number) in parts {
        for digit in text[range].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const GET: Method = Method::GET;

    fn line<'a>(path: &'a str, route: &'a str) -> AccessLogEntry<'a> {
        AccessLogEntry {
            method: &GET,
            scheme: Scheme::Https,
            authority: "example.org",
            path_and_query: path,
            version: HttpVersion::Http2,
            status: StatusCode::OK,
            bytes: 1_234,
            duration: Duration::from_micros(1_002_003),
            client: Ipv4Addr::LOCALHOST.into(),
            proxy: None,
            route,
            cache: "hit",
            degraded: "",
            blame: "",
            failure: "",
            aborted: "",
            limit: "",
            shadow_limit: "",
            refused: "",
            upstream: "",
            retries: 0,
            is_hedged: false,
            user: "",
            country: "",
            ja4: "",
            fingerprint: "",
            trace_id: "",
            request_id: "",
        }
    }

    fn file(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("tidegate-log-{}-{name}", std::process::id()));
        std::fs::remove_file(&path).ok();
        path
    }

    fn read(path: &Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).expect("the log exists");
        std::fs::remove_file(path).expect("the log can be removed");
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    #[test]
    fn hostile_text_is_escaped() {
        let hostile = "/\"},\n{\"a\\\u{0}\u{1f}\u{7f}é";
        let mut out = Vec::new();
        let mut timestamps = TimestampFormatter::new();
        write_line(&mut out, &mut timestamps, SystemTime::UNIX_EPOCH + Duration::from_millis(7), &line(hostile, "r"));
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1);
        let value: serde_json::Value = serde_json::from_slice(&out).expect("a line is JSON");
        assert_eq!(value["path"], hostile);
        assert_eq!(value["time"], "1970-01-01T00:00:00.007Z");
        assert_eq!((&value["duration"], &value["status"]), (&1.002_003.into(), &200.into()));
        assert_eq!((value["version"].as_str(), value["client"].as_str()), (Some("2.0"), Some("127.0.0.1")));
        assert!(value.get("degraded").is_none());
    }

    #[test]
    fn dates_equal_those_of_httpdate() {
        // Every 11 hours and 9 minutes over 130 years: all months, leap days and the turn of 2100.
        for second in (0..4_102_444_800 + 86_400 * 90).step_by(40_123) {
            let text = String::from_utf8(date_and_time(second).to_vec()).expect("ASCII");
            let other = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(second));
            let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
            let month = months.iter().position(|month| *month == &other[8..11]).expect("a month") + 1;
            let expected = format!("{}-{month:02}-{}T{}.", &other[12..16], &other[5..7], &other[17..25]);
            assert_eq!(text, expected, "{second}");
        }
    }

    #[test]
    fn lines_of_many_threads_do_not_interleave() {
        let path = file("threads");
        let log = AccessLog::open(&AccessLogTarget::File(path.clone())).expect("the file can be opened");
        let long = "/".repeat(300);
        thread::scope(|scope| {
            let record = || (0..500).for_each(|_| log.record(&line(&long, "r")));
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(record)).collect();
            // Joined explicitly: the end of the scope does not wait for thread-local destructors,
            // which submit the rest.
            threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        });
        log.close();
        assert_eq!(read(&path).len(), 2_000);
    }

    #[test]
    fn reopen_creates_the_file_after_rotation() {
        let (path, moved) = (file("reopen"), file("moved"));
        let log = AccessLog::open(&AccessLogTarget::File(path.clone())).expect("the file can be opened");
        log.record(&line("/1", "r"));
        log.flush();
        let start = Instant::now();
        while std::fs::metadata(&path).expect("the log exists").len() == 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "a flushed line was not written");
            thread::sleep(Duration::from_millis(1));
        }
        std::fs::rename(&path, &moved).expect("the log can be moved");
        log.reopen();
        log.record(&line("/2", "r"));
        log.close();
        assert_eq!((&read(&moved)[0]["path"], &read(&path)[0]["path"]), (&"/1".into(), &"/2".into()));
    }

    #[test]
    fn blocked_writer_drops_lines_without_blocking() {
        let (sender, receiver) = sync_channel(1);
        let open = AccessLogInner { id: u64::MAX, sender, reopen: Arc::default(), writer: Mutex::new(None) };
        let log = AccessLog(Some(open));
        let before = DROPPED.get();
        for _ in 0..3 {
            log.record(&line("/", "r"));
            log.flush();
        }
        assert!(DROPPED.get() >= before + 2);
        assert!(matches!(receiver.recv(), Ok(WriterMessage::Lines(batch)) if batch.lines == 1));
        log.record(&line("/", "r"));
        log.flush();
        assert!(matches!(receiver.recv(), Ok(WriterMessage::Lines(_))));
    }

    #[test]
    fn disabled_log_records_nothing_and_unopenable_file_is_an_error() {
        let log = AccessLog::open(&AccessLogTarget::Off).expect("nothing to open");
        log.record(&line("/", "r"));
        log.close();
        assert!(AccessLog::open(&AccessLogTarget::File("/nonexistent/dir/log".into())).is_err());
    }
}
