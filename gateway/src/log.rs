//! The access log: one JSON object a line, written by a thread of its own.
//!
//! A request formats its line into a buffer of its thread and never writes to a file. Buffers travel whole over a bounded
//! channel to the one writer, so lines do not interleave; where the writer cannot keep up, lines are dropped and counted.

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
use crate::http::message::{Method, Scheme, StatusCode, Version};
use crate::metrics::{self, Counter};

/// Where the access log goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Access {
    /// JSON lines on standard output.
    Stdout,
    /// Nowhere.
    Off,
    /// JSON lines in this file.
    File(PathBuf),
}

/// A thread's buffer is handed over when it holds this much.
const BATCH: usize = 32 << 10;
/// A thread's buffer is handed over when it is this old.
const BATCH_AGE: Duration = Duration::from_millis(100);
/// Buffers under way to the writer: about 4 MiB, a tenth of a second at 150,000 requests per second.
const QUEUE: usize = 128;
/// How long `close` waits for a writer that is stuck on a full pipe.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

static DROPPED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Exposes `tidegate_access_log_dropped_total`.
pub fn expose() {
    metrics::expose_counter_with(
        "tidegate_access_log_dropped",
        "Lines of the access log that were dropped because its writer could not keep up or failed.",
        |emit| emit(&[], DROPPED.get()),
    );
}

/// One answered request.
#[derive(Clone, Debug)]
pub struct Line<'a> {
    pub method: &'a Method,
    pub scheme: Scheme,
    pub authority: &'a str,
    pub path_and_query: &'a str,
    pub version: Version,
    pub status: StatusCode,
    /// Bytes of the answer's body.
    pub bytes: u64,
    pub duration: Duration,
    pub client: IpAddr,
    pub route: &'a str,
    /// What the cache did; like the texts below, left out of the line when empty.
    pub cache: &'a str,
    /// The step of the degrade ladder that answered.
    pub degraded: &'a str,
    /// The limit rule that denied the request.
    pub limit: &'a str,
    /// Why the request was refused before it was understood.
    pub refused: &'a str,
    /// The endpoint that was asked.
    pub upstream: &'a str,
    pub trace_id: &'a str,
}

/// Lines on their way to the writer.
#[derive(Default)]
struct Batch {
    text: Vec<u8>,
    lines: u64,
}

enum Message {
    Batch(Batch),
    Close,
}

/// An open access log. `record` may be called from any thread.
pub struct AccessLog(Option<Open>);

struct Open {
    /// Tells the logs of one process apart: a thread's buffer belongs to one of them.
    id: u64,
    sender: SyncSender<Message>,
    reopen: Arc<AtomicBool>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl AccessLog {
    /// Opens the log and starts its writer.
    ///
    /// # Errors
    /// A file that cannot be opened for appending, or no thread for the writer.
    pub fn open(access: &Access) -> io::Result<AccessLog> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let sink = match access {
            Access::Off => return Ok(AccessLog(None)),
            Access::Stdout => Sink::Stdout,
            Access::File(path) => Sink::File { file: open_file(path)?, path: path.clone() },
        };
        let (sender, receiver) = sync_channel(QUEUE);
        let reopen = Arc::new(AtomicBool::new(false));
        let writer = Writer { sink, receiver, reopen: Arc::clone(&reopen), torn: false };
        let writer = thread::Builder::new().name("access-log".to_owned()).spawn(|| writer.run())?;
        let id = NEXT.fetch_add(1, Relaxed);
        Ok(AccessLog(Some(Open { id, sender, reopen, writer: Mutex::new(Some(writer)) })))
    }

    /// Whether lines go anywhere.
    pub fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// Appends a line to this thread's buffer, and hands the buffer over when it is full or old.
    pub fn record(&self, line: &Line<'_>) {
        let Some(open) = &self.0 else { return };
        let now = SystemTime::now();
        LOCAL.with_borrow_mut(|local| {
            local.belong_to(open);
            local.append(now, line);
            local.flush_if_due(now);
        });
    }

    /// Hands this thread's buffer over. To be called about every 100 ms, for lines that no later one pushes out,
    /// and before a thread stops recording for good.
    pub fn flush(&self) {
        LOCAL.with_borrow_mut(Local::hand_over);
    }

    /// Opens the file anew, after something moved the old one away.
    pub fn reopen(&self) {
        let Some(open) = &self.0 else { return };
        open.reopen.store(true, Relaxed);
        // Wakes an idle writer; a full channel has its attention anyway.
        let _full_or_closed = open.sender.try_send(Message::Batch(Batch::default()));
    }

    /// Writes out what has been handed over, this thread's buffer included, and ends the writer. Blocks, for 5 s at most.
    /// A thread hands its buffer over when it ends, so threads that record are to be joined before.
    pub fn close(&self) {
        self.flush();
        let Some(open) = &self.0 else { return };
        let Some(writer) = open.writer.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let deadline = Instant::now() + CLOSE_PATIENCE;
        while let Err(TrySendError::Full(_)) = open.sender.try_send(Message::Close) {
            if Instant::now() >= deadline {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        while !writer.is_finished() {
            if Instant::now() >= deadline {
                Event::AccessLogFailed { error: &"the writer is stuck; its lines are lost" }.emit();
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
    static LOCAL: RefCell<Local> = const { RefCell::new(Local::new()) };
}

/// A thread's buffer.
struct Local {
    /// The log that the lines belong to.
    owner: Option<(u64, SyncSender<Message>)>,
    batch: Batch,
    begun: SystemTime,
    clock: Clock,
}

impl Local {
    const fn new() -> Self {
        Local {
            owner: None,
            batch: Batch { text: Vec::new(), lines: 0 },
            begun: SystemTime::UNIX_EPOCH,
            clock: Clock::new(),
        }
    }

    fn belong_to(&mut self, open: &Open) {
        if self.owner.as_ref().is_none_or(|(id, _)| *id != open.id) {
            self.hand_over();
            self.owner = Some((open.id, open.sender.clone()));
        }
    }

    fn append(&mut self, now: SystemTime, line: &Line<'_>) {
        if self.batch.lines == 0 {
            self.begun = now;
            self.batch.text.reserve(BATCH + 1024);
        }
        write_line(&mut self.batch.text, &mut self.clock, now, line);
        self.batch.lines += 1;
    }

    fn flush_if_due(&mut self, now: SystemTime) {
        // A clock that was set back makes the age unknown: then the buffer counts as old.
        let is_old = now.duration_since(self.begun).map_or(true, |age| age >= BATCH_AGE);
        if is_old || self.batch.text.len() >= BATCH {
            self.hand_over();
        }
    }

    fn hand_over(&mut self) {
        if self.batch.lines == 0 {
            return;
        }
        let Some((_, sender)) = &self.owner else { return };
        let batch = std::mem::take(&mut self.batch);
        let lines = batch.lines;
        if let Err(TrySendError::Full(message) | TrySendError::Disconnected(message)) =
            sender.try_send(Message::Batch(batch))
        {
            DROPPED.add(lines);
            if let Message::Batch(mut batch) = message {
                batch.text.clear();
                self.batch = Batch { text: batch.text, lines: 0 };
            }
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.hand_over();
    }
}

enum Sink {
    Stdout,
    File { file: File, path: PathBuf },
}

struct Writer {
    sink: Sink,
    receiver: Receiver<Message>,
    reopen: Arc<AtomicBool>,
    /// The last write failed, perhaps inside a line.
    torn: bool,
}

impl Writer {
    fn run(mut self) {
        while let Ok(Message::Batch(batch)) = self.receiver.recv() {
            self.reopen_if_asked();
            if let Err(error) = self.write(&batch.text) {
                self.torn = true;
                DROPPED.add(batch.lines);
                Event::AccessLogFailed { error: &error }.emit();
            }
        }
    }

    fn reopen_if_asked(&mut self) {
        if !self.reopen.swap(false, Relaxed) {
            return;
        }
        if let Sink::File { file, path } = &mut self.sink {
            match open_file(path) {
                Ok(opened) => *file = opened,
                Err(error) => Event::AccessLogFailed { error: &error }.emit(),
            }
        }
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        let mut stdout;
        let sink: &mut dyn Write = match &mut self.sink {
            Sink::File { file, .. } => file,
            Sink::Stdout => {
                stdout = io::stdout().lock();
                &mut stdout
            }
        };
        if self.torn {
            sink.write_all(b"\n")?;
            self.torn = false;
        }
        sink.write_all(text)?;
        sink.flush()
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

fn write_line(out: &mut Vec<u8>, clock: &mut Clock, now: SystemTime, line: &Line<'_>) {
    out.extend_from_slice(b"{\"time\":\"");
    clock.push(out, now);
    out.extend_from_slice(b"\",\"client\":\"");
    push_display(out, line.client);
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
    let texts = [
        ("route", line.route),
        ("cache", line.cache),
        ("degraded", line.degraded),
        ("limit", line.limit),
        ("refused", line.refused),
        ("upstream", line.upstream),
        ("trace_id", line.trace_id),
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

/// Seconds with six digits after the point.
fn push_seconds(out: &mut Vec<u8>, duration: Duration) {
    out.extend_from_slice(itoa::Buffer::new().format(duration.as_secs()).as_bytes());
    out.push(b'.');
    push_digits(out, u64::from(duration.subsec_micros()), 6);
}

/// `number` with leading zeros.
fn push_digits(out: &mut Vec<u8>, number: u64, width: u32) {
    for place in (0..width).rev() {
        // One decimal digit always fits.
        out.push(b'0' + (number / 10_u64.pow(place) % 10) as u8);
    }
}

/// The inside of a JSON string (RFC 8259 section 7).
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

/// Writes times in RFC 3339 and keeps the text of the current second.
struct Clock {
    second: u64,
    /// `YYYY-MM-DDTHH:MM:SS.`
    text: [u8; 20],
}

impl Clock {
    const fn new() -> Self {
        Clock { second: u64::MAX, text: [0; 20] }
    }

    fn push(&mut self, out: &mut Vec<u8>, now: SystemTime) {
        // A clock before 1970 is a broken clock; its lines say 1970.
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if since.as_secs() != self.second {
            self.second = since.as_secs();
            self.text = date_and_time(since.as_secs());
        }
        out.extend_from_slice(&self.text);
        push_digits(out, u64::from(since.subsec_millis()), 3);
        out.push(b'Z');
    }
}

/// Howard Hinnant's civil-from-days: eras of 400 years, years that begin in March.
fn date_and_time(unix: u64) -> [u8; 20] {
    let (days, second) = (unix / 86_400 + 719_468, unix % 86_400);
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

    fn line<'a>(path: &'a str, route: &'a str) -> Line<'a> {
        Line {
            method: &GET,
            scheme: Scheme::Https,
            authority: "example.org",
            path_and_query: path,
            version: Version::Http2,
            status: StatusCode::OK,
            bytes: 1_234,
            duration: Duration::from_micros(1_002_003),
            client: Ipv4Addr::LOCALHOST.into(),
            route,
            cache: "hit",
            degraded: "",
            limit: "",
            refused: "",
            upstream: "",
            trace_id: "",
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
    fn hostile_text_stays_inside_its_string() {
        let hostile = "/\"},\n{\"a\\\u{0}\u{1f}\u{7f}é";
        let mut out = Vec::new();
        let mut clock = Clock::new();
        write_line(&mut out, &mut clock, SystemTime::UNIX_EPOCH + Duration::from_millis(7), &line(hostile, "r"));
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1);
        let value: serde_json::Value = serde_json::from_slice(&out).expect("a line is JSON");
        assert_eq!(value["path"], hostile);
        assert_eq!(value["time"], "1970-01-01T00:00:00.007Z");
        assert_eq!((&value["duration"], &value["status"]), (&1.002_003.into(), &200.into()));
        assert_eq!((value["version"].as_str(), value["client"].as_str()), (Some("2.0"), Some("127.0.0.1")));
        assert!(value.get("degraded").is_none());
    }

    #[test]
    fn dates_agree_with_another_implementation() {
        // Every 11 hours and a bit over 130 years: all months, leap days and the turn of 2100.
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
    fn lines_of_many_threads_arrive_whole() {
        let path = file("threads");
        let log = AccessLog::open(&Access::File(path.clone())).expect("the file can be opened");
        let long = "/".repeat(300);
        thread::scope(|scope| {
            let record = || (0..500).for_each(|_| log.record(&line(&long, "r")));
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(record)).collect();
            // Joined one by one: the scope's end does not wait for what threads do as they end, which is to hand over the rest.
            threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        });
        log.close();
        assert_eq!(read(&path).len(), 2_000);
    }

    #[test]
    fn a_moved_file_is_left_on_reopen() {
        let (path, moved) = (file("reopen"), file("moved"));
        let log = AccessLog::open(&Access::File(path.clone())).expect("the file can be opened");
        log.record(&line("/1", "r"));
        log.flush();
        let begun = Instant::now();
        while std::fs::metadata(&path).expect("the log exists").len() == 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "a flushed line was not written");
            thread::sleep(Duration::from_millis(1));
        }
        std::fs::rename(&path, &moved).expect("the log can be moved");
        log.reopen();
        log.record(&line("/2", "r"));
        log.close();
        assert_eq!((&read(&moved)[0]["path"], &read(&path)[0]["path"]), (&"/1".into(), &"/2".into()));
    }

    #[test]
    fn a_stuck_writer_costs_lines_and_no_time() {
        let (sender, receiver) = sync_channel(1);
        let open = Open { id: u64::MAX, sender, reopen: Arc::default(), writer: Mutex::new(None) };
        let log = AccessLog(Some(open));
        let before = DROPPED.get();
        for _ in 0..3 {
            log.record(&line("/", "r"));
            log.flush();
        }
        assert!(DROPPED.get() >= before + 2);
        assert!(matches!(receiver.recv(), Ok(Message::Batch(batch)) if batch.lines == 1));
        log.record(&line("/", "r"));
        log.flush();
        assert!(matches!(receiver.recv(), Ok(Message::Batch(_))));
    }

    #[test]
    fn a_log_that_is_off_or_cannot_be_opened() {
        let log = AccessLog::open(&Access::Off).expect("nothing to open");
        log.record(&line("/", "r"));
        log.close();
        assert!(AccessLog::open(&Access::File("/nonexistent/dir/log".into())).is_err());
    }
}
